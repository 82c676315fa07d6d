"""Annealed importance sampling: how likely the data are, where importance sampling from the guide is too loose."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from rich.progress import Progress

from elbozoo.inference.arrays import logsumexp, standard_error
from elbozoo.inference.data import prepare_to_measure
from elbozoo.inference.errors import NonFinite
from elbozoo.inference.evaluation import call_seed, call_size, log_mean_variance
from elbozoo.inference.parts import number, one_of, whole_number
from elbozoo.inference.posterior import effective_draws
from elbozoo.inference.simulation import places, simulate
from elbozoo.inference.terms import Terms

InitialDistribution = Literal["guide", "prior"]
Vector = Float[np.ndarray, " N"]

WU_2016: Mapping[str, Any] = {"num_temperatures": 10_000, "num_chains": 16, "num_leapfrog": 10, "start": "prior"}
"""The settings of Wu et al. (2016), for ``annealed_importance_sampling(program, data, **WU_2016)``."""

_SEGMENT = 50  # temperatures in one call of the engine, at most
_FIRST_STEP = 0.1  # where the step size starts, in units of unconstrained latents
_ADAPT = 0.3  # how fast it follows the acceptance
_BEGIN, _PILOT, _FORWARD, _BACKWARD, _DATA = range(5)  # streams of random numbers


@dataclass(frozen=True, eq=False)
class AnnealedLikelihood:
    """What :func:`annealed_importance_sampling` found; nats per datum.

    Attributes:
        log_lik_estimate: by datum, ``log mean_k w_k``: an estimate of ``log p(x)`` that is low on average.
        log_lik, log_lik_se: its mean over data, and the standard error of that from the choice of data.
        mc_se: the standard error of ``log_lik`` from the chains (delta method); too small where ``ess`` is near 1.
        ess: by datum, ``(Σ w)² / Σ w²`` of the chains' weights.
        acceptance: mean acceptance of the transitions.
        num_chains, num_temperatures, num_leapfrog, start: the settings.
        values: the chains' last latents ``(K, N, …)`` by site: draws from about the posterior.
        seconds: wall time.
    """

    log_lik_estimate: Vector
    log_lik: float
    log_lik_se: float
    mc_se: float
    ess: Vector
    acceptance: float
    num_chains: int
    num_temperatures: int
    num_leapfrog: int
    start: str
    values: Mapping[str, np.ndarray]
    seconds: float


@dataclass(frozen=True, eq=False)
class Bracket:
    """What :func:`bracket` found on simulated data; nats per datum.

    Attributes:
        lower, upper: by datum, stochastic bounds of ``log p(x)``: each is on its wrong side by b nats with a
            probability of at most ``exp(-b)``.
        log_lik_lower, log_lik_upper: their means over data; ``E[lower] ≤ E[log p(x)] ≤ E[upper]``.
        gap, gap_se: mean of ``upper - lower``, which says how far AIS with these settings may be off on such data, and
            its standard error.
        data: the simulated data, one array an argument of the program.
        acceptance: mean acceptance of the transitions.
        seconds: wall time.
    """

    lower: Vector
    upper: Vector
    log_lik_lower: float
    log_lik_upper: float
    gap: float
    gap_se: float
    data: tuple[np.ndarray, ...]
    acceptance: float
    seconds: float


def annealed_importance_sampling(
    program: Any,
    data: Any,
    *,
    num_temperatures: int = 500,
    num_chains: int = 16,
    num_leapfrog: int = 10,
    start: InitialDistribution = "guide",
    target_acceptance: float = 0.65,
    seed: int = 0,
    memory_limit: int = 2**30,
    progress: bool = False,
) -> AnnealedLikelihood:
    r"""``log p(x)`` by annealed importance sampling with Hamiltonian transitions.

    From ``π_0`` (the guide or the prior) through ``π_β ∝ π_0^{1-β} p(x, z)^β`` to the posterior, each of K chains a
    datum gets the weight

    .. math:: w = \prod_{t=1}^{T} \left( \frac{p(x, z_{t-1})}{\pi_0(z_{t-1})} \right)^{\beta_t - \beta_{t-1}},\qquad
        \mathrm{E}[w] = p(x)

    so that ``E[log mean_k w_k] ≤ log p(x)``. With one temperature and ``start="guide"`` it is importance sampling. The
    βs are a sigmoid schedule. Step sizes, by temperature and datum, are found by a pilot run of a quarter of the
    temperatures (50 at least, if there are as many) and then held, so that the weights are exact; latents with a
    bounded support are moved in unconstrained space.

    Args:
        program: a trained program of either engine with continuous latents inside its data plate.
        data: as for :func:`elbozoo.inference.evaluate`. It costs ``1.25 T (L + 2)`` passes through the model for each
            of ``K N`` chains.
        num_temperatures: T.
        num_chains: K.
        num_leapfrog: L, leapfrog steps a transition.
        start: "guide" (closer to the posterior) or "prior" (nothing of the guide comes in).
        target_acceptance: what the step sizes aim at.
        seed: equal arguments give equal results.
        memory_limit: bytes that one call may take, approximately.
        progress: show a progress bar.

    Returns: an :class:`AnnealedLikelihood`; nats per datum. State T, K, L and the start with its figures.
    Raises: InvalidArgument for bad data or settings, discrete latents, latents that data share and auxiliary sites;
        NonFinite where every chain of a datum has weight zero.

    References: Neal 2001, Annealed importance sampling, Statistics and Computing 11; Wu, Burda, Salakhutdinov & Grosse
        2016 (arXiv 1611.04273), whose settings are ``WU_2016``.
    """
    settings = _Settings(num_temperatures, num_chains, num_leapfrog, start, target_acceptance, seed)
    began, arrays = time.perf_counter(), prepare_to_measure(program, data)
    batch, _ = call_size(arrays, num_chains, program.local_to, memory_limit)
    found: list[dict[str, Any]] = []
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("annealing", total=math.ceil(len(arrays[0]) / batch) * settings.cost(1))
        for begin in range(0, len(arrays[0]), batch):
            rows = np.minimum(np.arange(begin, begin + batch), len(arrays[0]) - 1)  # one shape, one compilation
            chains = _Chains(program, tuple(a[rows] for a in arrays), settings, begin, lambda: bar.advance(task))
            log_weight, acceptance, values = chains.forward()
            keep = slice(0, min(batch, len(arrays[0]) - begin))
            found.append({"w": log_weight[:, keep], "a": acceptance[keep], **_prefixed(values, keep)})
    joined = {name: np.concatenate([f[name] for f in found], axis=-1 if name in "wa" else 1) for name in found[0]}
    log_weight = joined.pop("w")
    estimate = _log_mean(log_weight)
    ess = effective_draws(log_weight)
    variance = log_mean_variance(ess, num_chains)
    size = len(estimate)
    return AnnealedLikelihood(
        log_lik_estimate=estimate,
        log_lik=float(estimate.mean()),
        log_lik_se=standard_error(estimate),
        mc_se=math.sqrt(variance.sum()) / size,
        ess=ess,
        acceptance=float(joined.pop("a").mean()),
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        num_leapfrog=num_leapfrog,
        start=start,
        values={name.removeprefix("z/"): v for name, v in joined.items()},
        seconds=time.perf_counter() - began,
    )


def bracket(
    program: Any,
    data: Any,
    *,
    num_temperatures: int = 500,
    num_chains: int = 16,
    num_leapfrog: int = 10,
    start: InitialDistribution = "guide",
    target_acceptance: float = 0.65,
    observed: Mapping[str, int] | None = None,
    seed: int = 0,
    memory_limit: int = 2**30,
    progress: bool = False,
) -> Bracket:
    r"""Bidirectional Monte Carlo: ``log p(x)`` from below and from above, on data that the model itself made.

    On ``(z, x) ~ p(z) p(x|z)`` the latent is an exact draw from the posterior. Annealing from ``π_0`` bounds
    ``log p(x)`` below, annealing back from that draw bounds it above; how far apart they are says how well AIS with
    these settings does, on data like the model's.

    Args:
        program: as for :func:`annealed_importance_sampling`, as are the other arguments.
        data: observed arrays give their shapes alone; others (covariates) are used as they are.
        observed: by observed site, which argument of the program is its data (0 for the first), where shapes do not
            tell.

    Returns: a :class:`Bracket`; nats per datum.
    Raises: as :func:`annealed_importance_sampling`; InvalidArgument where it cannot be told which argument of the
        program an observed site is.

    References: Grosse, Ghahramani & Adams 2015, Sandwiching the marginal likelihood (arXiv 1511.02543); Wu et al. 2016
        (arXiv 1611.04273).
    """
    settings = _Settings(num_temperatures, num_chains, num_leapfrog, start, target_acceptance, seed)
    began, like = time.perf_counter(), prepare_to_measure(program, data)
    batch, _ = call_size(like, num_chains, memory_limit=memory_limit)
    where = places(program, like, observed, call_seed(seed, _DATA, 0), "bracket")
    drawn, arrays = simulate(program, like, where, call_seed(seed, _DATA, 1))
    latents = {name: z[0] for name, z in drawn.items()}
    lower, upper, accepted = [], [], []
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("annealing there and back", total=math.ceil(len(like[0]) / batch) * settings.cost(2))
        for begin in range(0, len(like[0]), batch):
            rows = np.minimum(np.arange(begin, begin + batch), len(like[0]) - 1)
            chains = _Chains(program, tuple(a[rows] for a in arrays), settings, begin, lambda: bar.advance(task))
            forward, acceptance, _ = chains.forward()
            backward = chains.backward({name: z[rows] for name, z in latents.items()})
            keep = min(batch, len(like[0]) - begin)
            lower.append(_log_mean(forward)[:keep])
            upper.append(-_log_mean(backward)[:keep])
            accepted.append(acceptance[:keep])
    low, high = np.concatenate(lower), np.concatenate(upper)
    return Bracket(
        lower=low,
        upper=high,
        log_lik_lower=float(low.mean()),
        log_lik_upper=float(high.mean()),
        gap=float((high - low).mean()),
        gap_se=standard_error(high - low),
        data=arrays,
        acceptance=float(np.concatenate(accepted).mean()),
        seconds=time.perf_counter() - began,
    )


def sigmoid_schedule(num_temperatures: int, steepness: float = 4.0) -> np.ndarray:
    """``β_0 = 0 < β_1 < … < β_T = 1``, ``(T + 1,)``: slow at both ends, a rescaled logistic curve."""
    t = np.linspace(-1.0, 1.0, num_temperatures + 1)
    sigmoid = 1.0 / (1.0 + np.exp(-steepness * t))
    return (sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])


@dataclass(frozen=True)
class _Settings:
    num_temperatures: int
    num_chains: int
    num_leapfrog: int
    start: str
    target_acceptance: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("num_temperatures", "num_chains", "num_leapfrog"):
            whole_number(name, getattr(self, name))
        whole_number("seed", self.seed, least=0)
        one_of("start", self.start, ("guide", "prior"))
        number("target_acceptance", self.target_acceptance, lambda v: 0 < v < 1, "lie in (0, 1)", "Pass 0.65")

    @property
    def pilot(self) -> int:
        """Temperatures of the pilot run."""
        return max(self.num_temperatures // 4, min(self.num_temperatures, 50))

    @property
    def segment(self) -> int:
        """Temperatures in one call of the engine: one length, one compilation."""
        return min(_SEGMENT, self.pilot)

    def cost(self, directions: int) -> int:
        """Calls of the engine for one batch of data."""
        calls = [math.ceil(t / self.segment) for t in (self.pilot, *[self.num_temperatures] * directions)]
        return sum(calls)


class _Chains:
    """K chains for each of B data."""

    def __init__(self, program: Any, args: tuple[np.ndarray, ...], settings: _Settings, begin: int, tick: Any):
        self.program, self.args, self.settings, self.begin, self.tick = program, args, settings, begin, tick
        engine = importlib.import_module(f"elbozoo.inference.{program.engine}_annealing")
        self.annealer = engine.Annealer(program, args, settings.start, settings.num_leapfrog)
        self.betas = sigmoid_schedule(settings.num_temperatures)
        self.step_sizes = self._tune()  # (T + 1, B)

    def forward(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Log weights ``(K, B)``, each datum's acceptance ``(B,)`` and the last latents."""
        path = np.diff(self.betas), self.betas[1:], self.step_sizes[1:]
        state, log_weight, _, accepted = self._walk(self._start(_FORWARD), path, _FORWARD)
        return log_weight, accepted.mean(axis=0), self.annealer.values(state)

    def backward(self, latents: Mapping[str, np.ndarray]) -> np.ndarray:
        """Log weights ``(K, B)`` of chains that start at an exact draw ``(B, …)`` each; ``E[w] = 1 / p(x)``."""
        repeated = {n: np.repeat(z[None], self.settings.num_chains, axis=0) for n, z in latents.items()}
        change, before = -np.diff(self.betas)[::-1], np.arange(len(self.betas) - 1)[::-1]
        before = np.maximum(before, 1)  # where the last move goes weighs nothing, and at β = 0 data may be impossible
        path = change, self.betas[before], self.step_sizes[before]
        return self._walk(self.annealer.begin(repeated, _FIRST_STEP), path, _BACKWARD)[1]

    def _tune(self) -> np.ndarray:
        """Step sizes by temperature and datum, from a pilot run of fewer temperatures."""
        betas = sigmoid_schedule(self.settings.pilot)
        path = np.diff(betas), betas[1:], np.zeros((len(betas) - 1, len(self.args[0])))
        _, _, sizes, _ = self._walk(self._start(_PILOT), path, _PILOT, adapt=_ADAPT)
        every = [np.interp(self.betas, betas[1:], np.log(s)) for s in sizes.T.astype(np.float64)]
        return np.exp(np.stack(every, axis=1))

    def _start(self, stream: int) -> Any:
        seed, size = self._seed(_BEGIN + 10 * stream, 0), self.settings.num_chains
        if self.settings.start == "guide":
            values = self.program.apply(_values, self.args, num_particles=size, seed=seed)
        else:
            values = self.program.predict(self.args, num_particles=size, seed=seed, prior=True)["latent"]
        return self.annealer.begin(values, _FIRST_STEP)

    def _walk(self, state: Any, path: tuple, stream: int, adapt: float = 0.0) -> Any:
        """Along the whole path, some temperatures a call; the last call is filled up with moves that weigh nothing."""
        change, beta, sizes = path
        length, segment = len(change), self.settings.segment
        fill = -length % segment
        change = np.concatenate([change, np.zeros(fill)])
        beta = np.concatenate([beta, np.repeat(beta[-1:], fill)])
        sizes = np.concatenate([sizes, np.repeat(sizes[-1:], fill, axis=0)])
        total, used, accepted = 0.0, [], []
        for call, first in enumerate(range(0, len(change), segment)):
            part = slice(first, first + segment)
            options = {"seed": self._seed(stream, call), "adapt": adapt, "target": self.settings.target_acceptance}
            state, log_weight, size, acceptance = self.annealer.advance(
                state, (change[part], beta[part], sizes[part]), **options
            )
            total = total + log_weight.astype(np.float64)
            used.append(size)
            accepted.append(acceptance)
            self.tick()
        return state, total, np.concatenate(used)[:length], np.concatenate(accepted)[:length]

    def _seed(self, stream: int, call: int) -> int:
        return call_seed(call_seed(self.settings.seed, stream, self.begin), 0, call)


def _values(terms: Terms) -> dict[str, Any]:
    return dict(terms.values)


def _prefixed(values: Mapping[str, np.ndarray], keep: slice) -> dict[str, np.ndarray]:
    return {f"z/{name}": z[:, keep] for name, z in values.items()}


def _log_mean(log_weight: np.ndarray) -> np.ndarray:
    """``log mean_k w_k`` ``(B,)``."""
    mean = logsumexp(log_weight) - math.log(len(log_weight))
    if not np.isfinite(mean).all():
        at = int(np.argmin(np.isfinite(mean)))
        raise NonFinite(
            f"log weights must be finite for some chain of each datum; got {mean[at]} for one. Look for data that are "
            'impossible under the model, or use start="guide".'
        )
    return mean
