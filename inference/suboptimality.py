"""Where the bound loses nats: to the guide's family, or to one network serving all data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from elbozoo.inference.annealing import annealed_importance_sampling
from elbozoo.inference.arrays import cos, standard_error
from elbozoo.inference.data import prepare_to_measure, subset
from elbozoo.inference.evaluation import evaluate
from elbozoo.inference.exact import exact_log_lik
from elbozoo.inference.gradients import STL
from elbozoo.inference.latents import check_one_weight_a_datum
from elbozoo.inference.objectives import ELBO
from elbozoo.inference.optimizers import Adam
from elbozoo.inference.parts import whole_number
from elbozoo.inference.training import fit

Vector = Float[np.ndarray, " N"]

_PARTICLES = 8  # of the local optimisation's ELBO
_STEP = 0.03  # its first step size, in units of unconstrained parameters; it falls to 0 along a cosine


@dataclass(frozen=True, eq=False)
class Gaps:
    r"""What :func:`gaps` found: means over data in nats per datum, and their standard errors from the choice of data.

    ``log_lik - elbo = approximation + amortisation``.

    Attributes:
        num_data: N.
        log_lik, log_lik_se: mean of ``log p(x)``, as ``log_lik_method`` says; unless exact it is low, and so is
            ``approximation``.
        log_lik_method: "exact", or how it was estimated.
        elbo: of the amortised guide.
        optimal_elbo: of the best member of the guide's family for each datum by itself.
        richer_elbo: of the best Gaussian with a full covariance for each site whose guide is a diagonal one; None where
            no site's is.
        approximation, approximation_se: ``log_lik - optimal_elbo``: what the family cannot do.
        amortisation, amortisation_se: ``optimal_elbo - elbo``: what the network does worse than it could.
        richer, richer_se: ``richer_elbo - optimal_elbo``: what a full covariance would win; None as above.
        per_datum: "log_lik", "elbo", "optimal_elbo" and "richer_elbo" by datum, ``(N,)``.
    """

    num_data: int
    log_lik: float
    log_lik_se: float
    log_lik_method: str
    elbo: float
    optimal_elbo: float
    richer_elbo: float | None
    approximation: float
    approximation_se: float
    amortisation: float
    amortisation_se: float
    richer: float | None
    richer_se: float | None
    per_datum: Mapping[str, Vector] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON; None where a number does not exist."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "per_datum"}
        return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in found.items()}


def gaps(
    program: Any,
    data: Any,
    *,
    num_data: int | None = 100,
    num_steps: int = 500,
    num_particles: int = 1000,
    num_temperatures: int = 200,
    num_chains: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Gaps:
    r"""Split ``log p(x) - ELBO`` into the approximation gap and the amortisation gap.

    .. math:: \log p(x) - L[q_\phi] = \underbrace{\log p(x) - L[q^*]}_{\text{approximation}}
        + \underbrace{L[q^*] - L[q_\phi]}_{\text{amortisation}}

    ``q*`` is found by optimising the parameters of the guide's distributions for each datum by itself, from where the
    guide puts them (Adam on the ELBO with sticking-the-landing gradients); so ``q*`` may still be short of the best
    member of the family. From there sites that are diagonal Gaussians over one event dim are optimised on as full ones:
    what that wins is what full covariances within sites could win. ``log p(x)`` is exact where the model has it; else
    it is estimated by annealed importance sampling from the richest of these guides.

    Args:
        program: a trained program of either engine with reparameterised latents inside its data plate.
        data: as for :func:`elbozoo.inference.evaluate`.
        num_data: so many of the data (drawn without replacement); None for all. They are optimised together.
        num_steps: steps of each local optimisation.
        num_particles: draws a datum for each ELBO.
        num_temperatures, num_chains: of the annealed importance sampling.
        seed: equal arguments give equal results.
        progress: show progress bars.

    Returns: a :class:`Gaps`; nats per datum.
    Raises: InvalidArgument for bad data, latents that data share, auxiliary sites, and distributions without parameters
        of their own (flows); Refused for discrete latents.

    References: Cremer, Li & Duvenaud 2018, Inference suboptimality in variational autoencoders (arXiv 1801.03558).
    """
    whole_number("num_steps", num_steps)
    whole_number("num_particles", num_particles)
    whole_number("seed", seed, least=0)
    if num_data is not None:
        whole_number("num_data", num_data)
    arrays = subset(prepare_to_measure(program, data), num_data, seed)
    outline = program.outline(arrays)
    check_one_weight_a_datum(outline, len(arrays[0]))

    def bound(guided: Any) -> np.ndarray:
        """The ELBO by datum."""
        return evaluate(guided, arrays, num_particles=num_particles, seed=seed).per_datum.elbo

    optimal = _optimised(program.localised(arrays), arrays, num_steps, seed, progress)
    columns = {"elbo": bound(program), "optimal_elbo": bound(optimal)}
    best = optimal
    if any(site.guide_family == "Normal" for site in outline.sites.values()):
        full = _optimised(optimal.localised(arrays, full_covariance=True), arrays, num_steps, seed, progress)
        if set(full.weights) != set(optimal.weights):  # some site was a diagonal Gaussian over one event dim
            best, columns["richer_elbo"] = full, bound(full)
    exact, method = exact_log_lik(program, arrays), "exact"
    if exact is None:
        options: dict[str, Any] = {"num_temperatures": num_temperatures, "num_chains": num_chains, "num_leapfrog": 5}
        options |= {"seed": seed, "progress": progress}
        found = annealed_importance_sampling(best, arrays, **options)
        exact = found.log_lik_estimate
        method = f"AIS, {num_chains} chains, {num_temperatures} temperatures, from locally optimised guides"
    return _result({"log_lik": exact, **columns}, method)


def optimise_guide(
    program: Any,
    data: Any,
    *,
    full_covariance: bool = False,
    num_steps: int = 500,
    seed: int = 0,
    progress: bool = False,
) -> Any:
    r"""The same model with a guide that is optimised for each of these data by itself.

    Each parameter of each latent's distribution gets an unconstrained offset a datum, 0 at first, which maximises the
    ELBO (Adam, sticking-the-landing gradients, a step size that falls to 0). A site that depends on others keeps its
    network.

    Args:
        program: a trained program of either engine with reparameterised latents inside its data plate.
        data: the data; the result is for these alone, all at once and in this order.
        full_covariance: then let diagonal Gaussians become full ones, and optimise on.
        num_steps: steps of each of the two optimisations.
        seed: equal arguments give equal results.
        progress: show progress bars.

    Returns: a program for :func:`~elbozoo.inference.evaluate`, :func:`~elbozoo.inference.annealed_importance_sampling`
        and :func:`~elbozoo.inference.ground_truth` on these data; on others it is refused.
    Raises: as :func:`gaps`.
    """
    whole_number("num_steps", num_steps)
    whole_number("seed", seed, least=0)
    arrays = prepare_to_measure(program, data)
    check_one_weight_a_datum(program.outline(arrays), len(arrays[0]))
    best = _optimised(program.localised(arrays), arrays, num_steps, seed, progress)
    if full_covariance:
        best = _optimised(best.localised(arrays, full_covariance=True), arrays, num_steps, seed, progress)
    return best


def _optimised(program: Any, arrays: tuple[np.ndarray, ...], num_steps: int, seed: int, progress: bool) -> Any:
    """The program with each datum's own guide at its best."""

    def step_size(step: Any) -> Any:
        return _STEP * 0.5 * (1.0 + cos(math.pi * step / num_steps))

    objective = ELBO(num_particles=_PARTICLES, gradient=STL())
    settings: dict[str, Any] = {"batch_size": len(arrays[0]), "epochs": num_steps, "progress": progress, "seed": seed}
    return fit(program, arrays, objective=objective, optimizer=Adam(step_size), **settings).program


def _result(columns: dict[str, np.ndarray], method: str) -> Gaps:
    def mean(name: str) -> float | None:
        return float(columns[name].mean()) if name in columns else None

    def difference(a: str, b: str) -> tuple[float, float]:
        values = columns[a] - columns[b]
        return float(values.mean()), standard_error(values)

    richer = difference("richer_elbo", "optimal_elbo") if "richer_elbo" in columns else (None, None)
    approximation, amortisation = difference("log_lik", "optimal_elbo"), difference("optimal_elbo", "elbo")
    return Gaps(
        num_data=len(columns["elbo"]),
        log_lik=float(columns["log_lik"].mean()),
        log_lik_se=standard_error(columns["log_lik"]),
        log_lik_method=method,
        elbo=float(columns["elbo"].mean()),
        optimal_elbo=float(columns["optimal_elbo"].mean()),
        richer_elbo=mean("richer_elbo"),
        approximation=approximation[0],
        approximation_se=approximation[1],
        amortisation=amortisation[0],
        amortisation_se=amortisation[1],
        richer=richer[0],
        richer_se=richer[1],
        per_datum=columns,
    )
