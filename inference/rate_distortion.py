"""The rate–distortion curve: what a program pays for its latents, and what it gets for them, as β runs."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.progress import Progress

from elbozoo.inference import storage
from elbozoo.inference.arrays import standard_error
from elbozoo.inference.data import prepare
from elbozoo.inference.errors import must
from elbozoo.inference.evaluation import call_seed, call_size, evaluate
from elbozoo.inference.objectives import ELBO
from elbozoo.inference.parts import number, whole_number
from elbozoo.inference.shapes import Beta
from elbozoo.inference.terms import Terms
from elbozoo.inference.training import Run, fit

Vector = Float[np.ndarray, " _"]

BETAS = (0.25, 0.5, 1.0, 2.0, 4.0)

_DRAWS = 100  # a datum, for the rate and the distortion: the choice of data is then what their errors come from
_PARTS = 0xD  # a stream of random numbers


@dataclass(frozen=True, eq=False)
class RatePoint:
    """One β of the curve, measured on the N held-out data. Everything in nats per datum.

    Attributes:
        beta: β that it was trained under.
        rate, rate_se: mean over data of ``KL(q(z|x) || p(z))``, in closed form where a site has one, else sampled.
        distortion, distortion_se: mean of ``-E_q log p(x|z)``.
        nll, nll_se: by ``num_particles`` importance samples a datum.
        num_particles: K of the NLL.
        active_units: by site, how many dimensions have an activity above 0.01; empty for K = 1.
        collapse_epsilon: by site that factorises, ``(D,)``: the least ε for which the dimension is (ε, δ)-collapsed.
        rate_per_datum, distortion_per_datum: ``(N,)``.
        run: the trained run.
    """

    beta: float
    rate: float
    rate_se: float
    distortion: float
    distortion_se: float
    nll: float
    nll_se: float
    num_particles: int
    active_units: Mapping[str, int]
    collapse_epsilon: Mapping[str, Vector]
    rate_per_datum: Float[np.ndarray, " N"] = field(repr=False)
    distortion_per_datum: Float[np.ndarray, " N"] = field(repr=False)
    run: Run = field(repr=False)

    @property
    def elbo(self) -> float:
        """``-(rate + distortion)``."""
        return -(self.rate + self.distortion)


class Slope(NamedTuple):
    """``-ΔD / ΔR`` between two neighbouring points, with its standard error; nan between equal rates."""

    low: float
    high: float
    slope: float
    se: float


@dataclass(frozen=True, eq=False)
class RateDistortion:
    """What :func:`rate_distortion` found.

    Attributes:
        points: one a β, in the order of β.
        num_data: N, the data that every point was measured on.
        delta: δ of (ε, δ)-collapse.
    """

    points: tuple[RatePoint, ...]
    num_data: int
    delta: float

    def frontier(self) -> tuple[RatePoint, ...]:
        """The points on the lower convex hull: those with the least ``D + β R`` for some β ≥ 0, by increasing rate.

        A point off it was not the best for any β: its training ended in a worse minimum than a neighbour's, or the
        difference is within the errors.
        """
        hull: list[RatePoint] = []
        for point in sorted(self.points, key=lambda p: (p.rate, p.distortion)):
            while len(hull) > 1 and _turns_right(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        least = min(range(len(hull)), key=lambda i: hull[i].distortion)  # beyond it, more rate buys nothing
        return tuple(hull[: least + 1])

    def slopes(self) -> tuple[Slope, ...]:
        r"""The slope ``-ΔD / ΔR`` between neighbouring β.

        Where every point is the optimum under its β, ``-dD/dR = β`` along the curve, so that each lies between the
        two β. The standard error is that of the choice of data and of the draws (delta method; both points are measured
        on the same data); that of training comes on top of it.
        """
        return tuple(_slope(low, high) for low, high in zip(self.points, self.points[1:], strict=False))

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON; None where a number does not exist."""
        names = ("beta", "rate", "rate_se", "distortion", "distortion_se", "nll", "nll_se", "num_particles", "elbo")
        points = []
        for point in self.points:
            row: dict[str, Any] = {name: storage.plain(getattr(point, name)) for name in names}
            row["active_units"] = dict(point.active_units)
            row["collapse_epsilon"] = {n: [float(v) for v in e] for n, e in point.collapse_epsilon.items()}
            points.append(row)
        return {
            "num_data": self.num_data,
            "delta": self.delta,
            "points": points,
            "slopes": [{name: storage.plain(v) for name, v in slope._asdict().items()} for slope in self.slopes()],
            "frontier": [point.beta for point in self.frontier()],
        }


def _turns_right(a: RatePoint, b: RatePoint, c: RatePoint) -> bool:
    """Whether b is on or above the line from a to c."""
    cross = (b.rate - a.rate) * (c.distortion - a.distortion) - (b.distortion - a.distortion) * (c.rate - a.rate)
    return cross <= 0


def _slope(low: RatePoint, high: RatePoint) -> Slope:
    rate = high.rate_per_datum - low.rate_per_datum
    distortion = high.distortion_per_datum - low.distortion_per_datum
    if rate.mean() == 0:
        return Slope(low.beta, high.beta, math.nan, math.nan)
    slope = float(-distortion.mean() / rate.mean())
    return Slope(low.beta, high.beta, slope, standard_error(distortion + slope * rate) / abs(float(rate.mean())))


# --- the computation --------------------------------------------------------------------------------------------


def rate_distortion(
    program: Any,
    data: Any,
    betas: Sequence[float] = BETAS,
    *,
    test: Any = None,
    num_particles: int = 1000,
    delta: float = 0.01,
    seed: int = 0,
    directory: str | Path | None = None,
    progress: bool = True,
    **fit_options: Any,
) -> RateDistortion:
    r"""Train a program under each β and measure where it ends: the points of its rate–distortion curve.

    .. math:: \max_{p, q}\; E_q[\log p(x|z)] - \beta\, KL(q(z|x) \| p(z)) = -(D + \beta R)

    At the optimum ``-dD/dR = β``: under β the last nat that the latents carry saves β nats of distortion. A program
    with β = 1 maximises the ELBO. Every β starts from the same weights: those of the program if it has been trained,
    else those of ``seed``.

    Args:
        program: a program of either engine, with every site inside its data plate.
        data: training data, as for ``fit``.
        betas: the β, at least 0, in any order.
        test: data to measure on; those trained on when None.
        num_particles: K of the NLL.
        delta: δ of (ε, δ)-collapse (:meth:`elbozoo.inference.Bottleneck.collapsed`).
        seed: of training and of the draws; equal arguments give equal results.
        directory: write the runs here, each into a folder ``beta-<β>``.
        progress: show a bar.
        fit_options: handed on to :func:`~elbozoo.inference.fit`: ``epochs``, ``batch_size``, ``binarize``, …

    Returns: a :class:`RateDistortion`; nats per datum.
    Raises: InvalidArgument for β that are not distinct finite numbers of at least 0, for ``objective`` or
        ``replicates`` among the options, and for a site outside the data plate; what ``fit`` and
        :func:`~elbozoo.inference.evaluate` raise.

    References: Alemi et al. 2018 (arXiv 1711.00464), the curve and its slope; Higgins et al. 2017 (β-VAE).
    """
    _check(betas, delta, fit_options)
    if program.engine == "pyro":  # a module that a plain function closes over would go on from the β before
        trainer = importlib.import_module("elbozoo.inference.pyro_trainer")
        trainer.check_copies(program, prepare(program, data, fit_options.get("binarize", "none")), "betas")
    points = []
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("rate–distortion", total=len(betas))
        for beta in sorted(betas):
            folder = None if directory is None else Path(directory) / f"beta-{beta:g}"
            shaped = Beta(ELBO(), float(beta))
            run = fit(program, data, objective=shaped, seed=seed, directory=folder, progress=False, **fit_options)
            points.append(_point(run, run.prepare(data if test is None else test), num_particles, delta, seed))
            bar.advance(task)
    return RateDistortion(tuple(points), len(points[0].rate_per_datum), delta)


def _check(betas: Sequence[float], delta: float, fit_options: Mapping[str, Any]) -> None:
    for beta in betas:
        number("every β", beta, lambda v: v >= 0, "be finite and at least 0", "β = 1 is the ELBO")
    if len(set(betas)) != len(betas) or not len(betas):
        raise must("betas", "hold one distinct number or more", list(betas), "Pass (0.5, 1.0, 2.0), say")
    number("delta", delta, lambda v: 0 <= v < 1, "lie in [0, 1)", "Pass 0.01, the usual one")
    for name in ("objective", "replicates"):
        if name in fit_options:
            todo = "Leave it out: the curve is that of the ELBO under each β, one run each"
            raise must(name, "not be among the options of fit", repr(fit_options[name]), todo)


def _point(run: Run, arrays: tuple[np.ndarray, ...], num_particles: int, delta: float, seed: int) -> RatePoint:
    arrays = prepare(run.program, arrays)
    parts = _per_datum(run.program, arrays, seed)
    found = evaluate(run.program, arrays, num_particles=num_particles, seed=seed)
    kl = {name.removeprefix("kl "): value for name, value in parts.items() if name.startswith("kl ")}
    return RatePoint(
        beta=run.objective.beta,  # pyright: ignore[reportAttributeAccessIssue]
        rate=float(parts["rate"].mean()),
        rate_se=standard_error(parts["rate"]),
        distortion=float(parts["distortion"].mean()),
        distortion_se=standard_error(parts["distortion"]),
        nll=found.nll,
        nll_se=found.nll_se,
        num_particles=num_particles,
        active_units=found.active_units,
        collapse_epsilon={n: np.quantile(k, 1 - delta, axis=0, method="inverted_cdf") for n, k in kl.items()},
        rate_per_datum=parts["rate"],
        distortion_per_datum=parts["distortion"],
        run=run,
    )


def _per_datum(program: Any, arrays: tuple[np.ndarray, ...], seed: int) -> dict[str, np.ndarray]:
    """Rate and distortion ``(N,)``, and ``kl <site>`` ``(N, D)`` where a site factorises; float64, means over draws."""
    whole_number("seed", seed, least=0)
    num_data = len(arrays[0])
    batch, chunk = call_size(arrays, _DRAWS)
    calls = math.ceil(_DRAWS / chunk)
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, num_data, batch):
        rows = np.minimum(np.arange(start, start + batch), num_data - 1)  # the last call repeats a datum: one shape
        args, total = tuple(a[rows] for a in arrays), {}
        for call in range(calls):
            seed_of_call = call_seed(call_seed(seed, _PARTS, 0), start, call)
            found = program.apply(_means, args, num_particles=chunk, seed=seed_of_call, analytic_kl=True)
            if found["distortion"].shape != (batch,) or found.pop("joint"):
                todo = "Move every site into the data plate"
                raise must("program", "have every latent inside its data plate", "one that is not", todo)
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + value.astype(np.float64) / calls
        parts.append({name: value[: num_data - start] for name, value in total.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _means(terms: Terms) -> dict[str, Any]:
    """What one call hands back, means over its draws."""
    kl = {f"kl {n}": s.rate_terms.mean(axis=0) for n, s in terms.sites.items() if s.rate_terms is not None}
    return {"rate": terms.rate.mean(axis=0), "distortion": -terms.log_lik.mean(axis=0), "joint": terms.joint, **kl}
