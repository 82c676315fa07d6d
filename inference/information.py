"""How many nats the latents carry, and where they go: the bottleneck that the ELBO makes, measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.progress import Progress
from scipy.special import stdtrit

from elbozoo.inference.arrays import logsumexp, standard_error
from elbozoo.inference.data import prepare_to_measure, subset
from elbozoo.inference.errors import NonFinite, must
from elbozoo.inference.evaluation import call_seed, call_size, check_plate, count_active, weigh
from elbozoo.inference.parts import number, whole_number
from elbozoo.inference.terms import Terms, refuse_estimate

Vector = Float[np.ndarray, " _"]

_DRAWS, _MEANS = range(2)  # streams of random numbers


@dataclass(frozen=True, eq=False)
class Bottleneck:
    r"""What :func:`bottleneck` found. Everything in nats per datum; standard errors from the choice of data and draws.

    Attributes:
        num_data: M, the data that the aggregate posterior ``q(z) = 1/M Σ_m q(z | x_m)`` is made of.
        rate, rate_se: mean of ``log q(z|x) - log p(z)`` over one draw a datum: the KL to the prior.
        distortion, distortion_se: mean of ``-log p(x|z)``.
        mutual_information, mutual_information_se: ``I_q(x; z)`` where x is one of these M data with equal probability;
            at most ``log M``, which it comes close to as soon as posteriors do not overlap: then it says how many data
            there are and not how much z knows. As an estimate for the population it is low.
        mutual_information_upper: the same with x_n left out of its own mixture, which is high for the population (and
            unbounded): the two bracket the population's on average.
        marginal_kl, marginal_kl_se: ``KL(q(z) || p(z))``, how far the aggregate posterior is from the prior.
        kl_per_dimension: by site that factorises, ``(D,)``: the mean over data of each dimension's KL.
        collapse_epsilon: by the same sites, ``(D,)``: the least ε for which the dimension is (ε, δ)-collapsed.
        delta: δ.
        activity: by site, ``(D,)``: the variance over x of ``E_q[z | x]``, from ``num_particles`` draws a datum, less
            that mean's own Monte Carlo variance.
    """

    num_data: int
    rate: float
    rate_se: float
    distortion: float
    distortion_se: float
    mutual_information: float
    mutual_information_se: float
    mutual_information_upper: float
    marginal_kl: float
    marginal_kl_se: float
    kl_per_dimension: Mapping[str, Vector]
    collapse_epsilon: Mapping[str, Vector]
    delta: float
    activity: Mapping[str, Vector]

    @property
    def elbo(self) -> float:
        """``-(rate + distortion)``."""
        return -(self.rate + self.distortion)

    @property
    def active_units(self) -> dict[str, int]:
        """By site, how many dimensions have an activity above 0.01 (Burda et al. 2016)."""
        return count_active(self.activity)

    def collapsed(self, epsilon: float = 0.01) -> dict[str, np.ndarray]:
        """By site, which dimensions have a KL below ε nats for at least ``1 - δ`` of the data, ``(D,)``.

        Over ε it is the collapse curve of Lucas et al. (2019). Raises: InvalidArgument unless ε > 0.
        """
        number("epsilon", epsilon, lambda v: v > 0, "be finite and above 0", "Pass 0.01, say")
        return {name: e < epsilon for name, e in self.collapse_epsilon.items()}


def bottleneck(
    program: Any,
    data: Any,
    *,
    num_data: int | None = 1000,
    num_particles: int = 100,
    delta: float = 0.01,
    seed: int = 0,
    progress: bool = False,
) -> Bottleneck:
    r"""Rate, distortion, mutual information, distance of the aggregate posterior from the prior, and collapse.

    With ``q(z) = 1/M Σ_m q(z | x_m)``, the mean rate splits (ELBO surgery) into

    .. math:: \frac1M \sum_n KL(q(z|x_n) \| p(z)) = I_q(x; z) + KL(q(z) \| p(z)),\qquad 0 \le I_q \le \log M

    A latent draw of each datum is scored under the guide at every other datum: M² densities.

    Args:
        program: a trained program of either engine, with every site inside its data plate.
        data: as for :func:`elbozoo.inference.evaluation.evaluate`.
        num_data: M, so many of the data (drawn without replacement); None for all.
        num_particles: draws a datum for the KL of each dimension, where it has no closed form, and for the activity.
        delta: δ of (ε, δ)-collapse.
        seed: equal arguments give equal results.
        progress: show a progress bar.

    Returns: a :class:`Bottleneck`; nats per datum.
    Raises: InvalidArgument for bad data, fewer than two data, a site outside the data plate or with another plate to
        the left of it; NonFinite for densities that are nan or infinite, or where the identity above or its bounds do
        not hold: then the guide's densities depend on more than their own datum (batch normalisation in training mode
        does that).

    References: Hoffman & Johnson 2016, ELBO surgery; Alemi et al. 2018 (arXiv 1711.00464), rate and distortion; Poole
        et al. 2019 (arXiv 1905.06922), the leave-one-out bound; Lucas et al. 2019 (arXiv 1911.02469), (ε, δ)-collapse.
    """
    whole_number("num_particles", num_particles, least=2)
    whole_number("seed", seed, least=0)
    number("delta", delta, lambda v: 0 <= v < 1, "lie in [0, 1)", "Pass 0.01, the usual one")
    arrays = _subset(prepare_to_measure(program, data), num_data, seed)
    size = len(arrays[0])

    refuse_estimate(program.outline(arrays), "bottleneck")
    drawn = program.apply(_one_draw, arrays, seed=call_seed(seed, _DRAWS, 0))
    if drawn["log_lik"].ndim != 2 or drawn["joint"]:
        todo = "Move every site into the data plate; a latent that all data share has no mutual information with one"
        raise must("program", "have every latent inside its data plate", "one that is not", todo)
    check_plate(drawn["log_lik"], size)
    for name, z in drawn["values"].items():
        if z.shape[1:2] != (size,):
            todo = "Put other plates to the right of the data plate, or into event dims"
            got = f"shape {z.shape[1:]} for {size} data"
            raise must(f"site '{name}'", "have the data along its first dim", got, todo)
    weigh(drawn["log_lik"], {n: drawn["log_guide"][n] - p for n, p in drawn["log_prior"].items()})
    log_prior, drawn_log_guide = _total(drawn["log_prior"]), _total(drawn["log_guide"])
    rate = drawn_log_guide - log_prior
    log_guide = _all_pairs(program, arrays, drawn["values"], progress)  # (n, m)
    own = np.diag(log_guide)
    _check_own(own, drawn_log_guide)

    log_marginal = logsumexp(log_guide, axis=1) - math.log(size)
    others = np.where(np.eye(size, dtype=bool), -np.inf, log_guide)
    left_out = logsumexp(others, axis=1) - math.log(size - 1)
    information, marginal_kl = own - log_marginal, log_marginal - log_prior
    _check_identity(information, marginal_kl, rate, size)

    kl, mean, noise = _per_dimension(program, arrays, num_particles, seed)
    distortion = -drawn["log_lik"][0].astype(np.float64)
    return Bottleneck(
        num_data=size,
        rate=float(rate.mean()),
        rate_se=standard_error(rate),
        distortion=float(distortion.mean()),
        distortion_se=standard_error(distortion),
        mutual_information=float(information.mean()),
        mutual_information_se=standard_error(information),
        mutual_information_upper=float((own - left_out).mean()),
        marginal_kl=float(marginal_kl.mean()),
        marginal_kl_se=standard_error(marginal_kl),
        kl_per_dimension={n: k.mean(axis=0) for n, k in kl.items()},
        collapse_epsilon={n: np.quantile(k, 1 - delta, axis=0, method="inverted_cdf") for n, k in kl.items()},
        delta=delta,
        activity={n: m.var(axis=0, ddof=1) - noise[n].mean(axis=0) for n, m in mean.items()},
    )


def _subset(arrays: tuple[np.ndarray, ...], num_data: int | None, seed: int) -> tuple[np.ndarray, ...]:
    if num_data is not None:
        whole_number("num_data", num_data, least=2)
    if len(arrays[0]) < 2:
        raise must("data", "hold at least two data, for information about which", 1, "Pass more of them")
    return subset(arrays, num_data, seed)


def _one_draw(terms: Terms) -> dict[str, Any]:
    return {
        "log_lik": terms.log_lik,
        "log_prior": {name: site.log_prior for name, site in terms.sites.items()},
        "log_guide": {name: site.log_guide for name, site in terms.sites.items()},
        "values": dict(terms.values),
        "joint": terms.joint,
    }


def _all_pairs(
    program: Any, arrays: tuple[np.ndarray, ...], values: Mapping[str, np.ndarray], progress: bool
) -> np.ndarray:
    """``log q(z_n | x_m)``, ``(n, m)``, float64: the draws shifted along the data by 0, 1, …, M - 1, some at a time."""
    size = len(arrays[0])
    _, chunk = call_size(arrays, size, size)
    rows, out = np.arange(size), np.empty((size, size))
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("all pairs of draw and datum", total=size)
        for start in range(0, size, chunk):
            shifts = np.arange(start, start + chunk) % size  # the last call repeats some: one shape, one compilation
            at = (rows + shifts[:, None]) % size
            found = program.apply(_log_guides, arrays, values={n: z[0][at] for n, z in values.items()})
            out[at, rows] = sum(q.astype(np.float64) for q in found.values())
            bar.advance(task, min(chunk, size - start))
    return out


def _log_guides(terms: Terms) -> dict[str, Any]:
    return {name: site.log_guide for name, site in terms.sites.items()}


def _per_dimension(
    program: Any, arrays: tuple[np.ndarray, ...], num_particles: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By site, ``(M, D)``: each dimension's KL (closed form, else sampled), the draws' mean, that mean's variance."""
    batch, chunk = call_size(arrays, num_particles)
    parts: list[dict[str, dict[str, np.ndarray]]] = []
    for start in range(0, len(arrays[0]), batch):
        rows = np.minimum(np.arange(start, start + batch), len(arrays[0]) - 1)
        total: dict[str, dict[str, np.ndarray]] = {"kl": {}, "first": {}, "second": {}}
        calls = math.ceil(num_particles / chunk)
        for call in range(calls):
            args = tuple(a[rows] for a in arrays)
            seed_of_call = call_seed(call_seed(seed, _MEANS, 0), start, call)
            found = program.apply(_moments, args, num_particles=chunk, seed=seed_of_call, analytic_kl=True)
            for kind, sites in found.items():
                for name, value in sites.items():
                    total[kind][name] = total[kind].get(name, 0.0) + value.astype(np.float64)
        keep = min(batch, len(arrays[0]) - start)
        count = calls * chunk
        parts.append({k: {n: v[:keep] / count for n, v in sites.items()} for k, sites in total.items()})
    kl, first, second = (
        {n: np.concatenate([p[kind][n] for p in parts]) for n in parts[0][kind]} for kind in ("kl", "first", "second")
    )
    count = math.ceil(num_particles / chunk) * chunk
    noise = {n: np.maximum(second[n] - first[n] ** 2, 0.0) / (count - 1) for n in first}
    return kl, first, noise


def _moments(terms: Terms) -> dict[str, Any]:
    """Sums over the draws, ``(B, D)`` by site."""
    out: dict[str, Any] = {"kl": {}, "first": {}, "second": {}}
    for name, site in terms.sites.items():
        if site.rate_terms is not None:
            out["kl"][name] = site.rate_terms.sum(axis=0)
        z = terms.values[name]
        z = 1.0 * z.reshape((z.shape[0], z.shape[1], -1))
        out["first"][name], out["second"][name] = z.sum(axis=0), (z**2).sum(axis=0)
    return out


def _total(densities: Mapping[str, np.ndarray]) -> np.ndarray:
    """The joint log density of one draw a datum, ``(M,)``, float64."""
    return np.stack([p[0] for p in densities.values()]).astype(np.float64).sum(axis=0)


def _check_own(own: np.ndarray, drawn: np.ndarray) -> None:
    """A draw scored again under its own datum has the density that it was drawn with."""
    if not np.allclose(own, drawn, rtol=1e-3, atol=1e-3):
        worst = float(np.abs(own - drawn).max())
        todo = "Put modules into evaluation mode (no dropout, no batch statistics)"
        raise must("guide", "give one draw one density", f"two, {worst:.3g} nats apart", todo, NonFinite)


def _check_identity(information: np.ndarray, marginal_kl: np.ndarray, rate: np.ndarray, size: int) -> None:
    """``0 ≤ I ≤ log M``, ``KL(q(z) || p(z)) ≥ 0`` within Monte Carlo error, and their sum is the rate."""
    error = -stdtrit(size - 1, 1e-6)  # in standard errors: that quantile of a Student t
    gap = abs(information.mean() + marginal_kl.mean() - rate.mean())
    holds = (
        gap <= 1e-3 * (1 + abs(rate.mean())),  # of densities worked out twice, in single precision
        information.max() <= math.log(size) + 1e-6,
        information.mean() >= -error * standard_error(information) - 1e-3,
        marginal_kl.mean() >= -error * standard_error(marginal_kl) - 1e-3,
    )
    if not all(holds):
        got = f"I = {information.mean():.4g}, KL(q(z)||p(z)) = {marginal_kl.mean():.4g}, rate = {rate.mean():.4g} nats"
        todo = "Look for guide densities that depend on other data than their own"
        condition = f"have 0 ≤ I ≤ log {size}, KL(q(z)||p(z)) ≥ 0 and both sum to the rate"
        raise must("program", condition, got, todo, NonFinite)
