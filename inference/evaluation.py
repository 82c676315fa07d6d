"""Held-out likelihood by importance sampling, streamed: memory grows neither with the particles nor with the data."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from elbozoo.inference import storage
from elbozoo.inference.data import prepare_to_measure
from elbozoo.inference.errors import NonFinite, must
from elbozoo.inference.parts import whole_number
from elbozoo.inference.psis import LARGE_K, largest, pareto_k_from_tail, tail_size
from elbozoo.inference.terms import Terms, by_number

ACTIVE = 0.01
"""A latent dimension is active when the variance over x of its posterior mean is above this (Burda et al. 2016)."""

_ROWS = 4096  # particles times data in one call: enough to amortise it, little enough to stay in the caches
_CHUNK = 256  # particles in one call where memory allows: an encoder runs once a call, whatever their number
_ACTIVATIONS = 32  # assumed working memory of one row, in copies of its datum
_SEEDS = 2**31  # what fits the seeds of both engines

Vector = Float[np.ndarray, " _"]


# --- calls -------------------------------------------------------------------------------------------------------


def call_size(
    arrays: tuple[np.ndarray, ...], num_particles: int, batch_size: int | None = None, memory_limit: int = 2**30
) -> tuple[int, int]:
    """How many data and how many particles one call of the program handles, within about ``memory_limit`` bytes.

    The particles come in equal calls but for the last, which may be smaller; the data too, but :func:`evaluate` pads
    them. So a program is compiled for two shapes at most.
    """
    num_data = len(arrays[0])
    datum = sum(max(4, a.itemsize) * (a.size // num_data) for a in arrays)
    rows = max(1, min(_ROWS, memory_limit // (_ACTIVATIONS * max(1, datum))))
    batch = min(num_data, batch_size or max(1, rows // min(num_particles, _CHUNK)))
    chunk = min(num_particles, max(1, rows // batch))
    return batch, math.ceil(num_particles / math.ceil(num_particles / chunk))


def call_seed(seed: int, start: int, call: int) -> int:
    """The seed of one call: never shared by two calls on the same data, and of little relation between data."""
    (base,) = np.random.SeedSequence([seed, start]).generate_state(1)
    return (int(base) + call) % _SEEDS


# --- the result -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PerDatum:
    """One entry a datum (one for the whole data set where the weight is joint), float64.

    Attributes:
        log_lik_estimate: ``log mean_k w_k``, an estimate of log p(x), low by about half its Monte Carlo variance, nats.
        elbo: ``mean_k log w_k``, nats.
        k_hat: Pareto k̂ of the weights (:func:`elbozoo.inference.psis.pareto_k`).
        ess: effective number of draws, ``(Σ w)² / Σ w²``.
    """

    log_lik_estimate: Float[np.ndarray, " N"]
    elbo: Float[np.ndarray, " N"]
    k_hat: Float[np.ndarray, " N"]
    ess: Float[np.ndarray, " N"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    r"""What :func:`evaluate` found. Everything in nats per datum.

    Attributes:
        nll: mean over data of ``-log mean_k w_k``. It depends on K: state ``num_particles`` beside it.
        nll_se: its standard error from the choice of data, ``nan`` for one datum.
        nll_mc_se: its standard error from the draws (delta method), ``nan`` for K = 1; too small where k̂ is large.
        num_particles: K.
        elbo: mean of ``log w``; ``-elbo = rate + distortion`` exactly.
        rate: mean of ``log q(z|x) - log p(z)``, all sites together: E KL(q || p).
        distortion: mean of ``-log p(x|z)``.
        rate_per_site: the rate by site (a site's part given the sites it depends on); they sum to ``rate``.
        rate_per_dimension: by site, ``(D,)``, where guide and prior factorise over the site's dimensions.
        activity: by site, ``(D,)``: the variance over x of E_q[z | x], from the K draws' mean, less that mean's own
            Monte Carlo variance. Empty for K = 1, for one datum and for a joint weight, where it cannot be told.
        per_datum: arrays with one entry a datum.
        num_data: N.
        seconds: wall time.
        weighted: whether ``nll`` is of importance weights. False for a program whose log weight is only an estimate of
            one (a diffusion that draws one of its steps): then ``nll = -elbo``, an upper bound on the NLL whatever K,
            ``nll_mc_se`` is the standard error of that mean (at most, where times are stratified); k̂, ess are nan.
    """

    nll: float
    nll_se: float
    nll_mc_se: float
    num_particles: int
    elbo: float
    rate: float
    distortion: float
    rate_per_site: Mapping[str, float]
    rate_per_dimension: Mapping[str, Vector]
    activity: Mapping[str, Vector]
    per_datum: PerDatum = field(repr=False)
    num_data: int
    seconds: float
    weighted: bool = True

    @property
    def active_units(self) -> dict[str, int]:
        """By site, how many dimensions have an activity above 0.01."""
        return count_active(self.activity)

    @property
    def total_active_units(self) -> int | None:
        """Over all sites; None where no site's activity could be told."""
        return sum(self.active_units.values()) if self.activity else None

    def bits_per_dim(self, data_dim: int) -> float:
        """The NLL in bits per entry of a datum, ``nll / (data_dim log 2)``."""
        whole_number("data_dim", data_dim)
        return self.nll / (data_dim * math.log(2.0))

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON, K among them; None where a number does not exist."""
        k_hat, ess = self.per_datum.k_hat, self.per_datum.ess
        bad = k_hat[~np.isnan(k_hat)] > LARGE_K
        return storage.plain(
            {
                "num_particles": self.num_particles,
                "weighted": self.weighted,
                "nll": self.nll,
                "nll_se": self.nll_se,
                "nll_mc_se": self.nll_mc_se,
                "elbo": self.elbo,
                "rate": self.rate,
                "distortion": self.distortion,
                "rate_per_site": self.rate_per_site,
                "active_units": self.active_units,
                "total_active_units": self.total_active_units,
                "k_hat_max": k_hat.max(),
                "k_hat_bad": bad.mean() if bad.size else math.nan,
                "ess_min": ess.min(),
                "ess_median": float(np.median(ess)),
                "num_data": self.num_data,
                "seconds": self.seconds,
            }
        )

    def __rich__(self) -> Table:
        samples = "importance samples" if self.weighted else "draws"
        table = Table(title=f"{self.num_data} data, K = {self.num_particles} {samples}", title_justify="left")
        table.add_column("nats per datum")
        table.add_column("", justify="right")
        table.add_column("")
        found = self.summary()
        table.add_row(
            "NLL" if self.weighted else "NLL, at most",
            f"{self.nll:.3f}",
            f"± {self.nll_se:.3f} (data) ± {self.nll_mc_se:.4f} (draws)",
        )
        for name in ("elbo", "rate", "distortion"):
            table.add_row(name.upper() if name == "elbo" else name, f"{getattr(self, name):.3f}")
        for name, rate in self.rate_per_site.items():
            units = self.activity.get(name)
            active = "" if units is None else f"{self.active_units[name]} of {len(units)} units active"
            table.add_row(f"  rate of {name}", f"{rate:.3f}", active)
        if found["k_hat_bad"] is not None:
            worst = "" if found["k_hat_max"] is None else f"largest {found['k_hat_max']:.2f}"
            table.add_row(f"k̂ above {LARGE_K}", f"{found['k_hat_bad']:.1%}", worst)
        ess = self.per_datum.ess
        if self.weighted:
            table.add_row("effective draws", f"{np.median(ess):.1f}", f"least {ess.min():.1f}")
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
        with console.capture() as text:
            console.print(self)
        return text.get().rstrip()


# --- the computation --------------------------------------------------------------------------------------------


def _chunk(terms: Terms) -> dict[str, Any]:
    """What one call hands back: per draw and datum only scalars; what has a latent dim is summed over the draws."""
    out: dict[str, Any] = {"log_lik": terms.log_lik, "data_per_entry": terms.data_per_entry}
    out |= {"rate": {}, "dimension": {}, "mean": {}, "square": {}}
    for name, site in terms.sites.items():
        out["rate"][name] = site.rate if terms.estimated else site.sampled_rate
        if site.rate_terms is not None:
            out["dimension"][name] = site.rate_terms.sum(axis=0)
        z = terms.values[name]
        if terms.log_lik.ndim == 2 and not terms.joint and z.shape[1:2] == terms.log_lik.shape[1:]:
            z = 1.0 * z.reshape((z.shape[0], z.shape[1], -1))
            mean = z.mean(axis=0)
            out["mean"][name], out["square"][name] = mean, ((z - mean) ** 2).sum(axis=0)
    return out


def check_plate(log_lik: np.ndarray, num_data: int) -> None:
    """Refuse weights ``(K, B)`` that are not one a datum: the program draws a subsample of its data by itself."""
    if log_lik.ndim == 2 and log_lik.shape[1] != num_data:
        todo = "Let its plate run over all rows: plate('data', N, subsample_size=len(x))"
        got = f"{log_lik.shape[1]}, from a plate that subsamples them"
        raise must("program", f"give one weight for each of the {num_data} data it is called on", got, todo)


def weigh(log_lik: np.ndarray, rates: Mapping[str, np.ndarray]) -> np.ndarray:
    """Log weights, float64, from the log likelihood and each site's ``log q - log p``, all ``(K, ...)``.

    Raises: NonFinite, naming the first site at fault, for nan and +inf (-inf is an impossible draw, and fine);
        InvalidArgument for a program with more shared plates than the data's.
    """
    if log_lik.ndim > 2:
        todo = "Move the inner dims into the event with .to_event(…)"
        got = f"log weights of shape {log_lik.shape}"
        raise must("program", "have at most one plate that all sites share", got, todo)
    log_weight = log_lik.astype(np.float64)
    for rate in rates.values():
        log_weight = log_weight - rate.astype(np.float64)
    if (wrong := np.isnan(log_weight) | (log_weight == np.inf)).any():
        site = next((n for n, r in rates.items() if not np.isfinite(r).all()), "an observed site")
        todo = "Look at that site's parameters, and at the history of training"
        raise must("log weights", "be numbers below infinity", f"{log_weight[wrong][0]} from {site}", todo, NonFinite)
    return log_weight


def count_active(activity: Mapping[str, np.ndarray]) -> dict[str, int]:
    """By site, how many dimensions have an activity above 0.01 (Burda et al. 2016)."""
    return {name: int((a > ACTIVE).sum()) for name, a in activity.items()}


def log_mean_variance(ess: np.ndarray, num_draws: int) -> np.ndarray:
    """The variance of ``log mean_k w_k`` by the delta method, from K weights' effective number; nan for K = 1."""
    if num_draws == 1:
        return np.full_like(ess, np.nan)
    return np.maximum(num_draws / ess - 1.0, 0.0) / (num_draws - 1.0)


class _Moments:
    """Running count, mean and sum of squares about the mean, by Chan's merge; float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0, np.zeros(()), np.zeros(())

    def add(self, count: int, mean: np.ndarray, square: np.ndarray) -> None:
        total = self.count + count
        step = np.asarray(mean, np.float64) - self.mean
        self.mean = self.mean + step * (count / total)
        self.square = self.square + np.asarray(square, np.float64) + step**2 * (self.count * count / total)
        self.count = total


class _Sums(dict[tuple[str, str], Any]):
    """Running sums by (kind, site)."""

    def add(self, kind: str, site: str, value: Any) -> None:
        self[kind, site] = self.get((kind, site), 0.0) + value


class _Batch:
    """What is kept of the particles of B data (B = 1 for a joint weight)."""

    def __init__(self, num_particles: int, weighs: bool):
        self.weighs, self.moments = weighs, _Moments()
        self.num_particles, self.tail = num_particles, min(tail_size(num_particles) + 1, num_particles)
        self.top: Any = None
        self.peak: Any = -np.inf
        self.w: Any = 0.0  # Σ w and Σ w² relative to the largest weight so far
        self.w2: Any = 0.0
        self.sums = _Sums()
        self.latent: dict[str, _Moments] = {}

    def add(self, out: Mapping[str, Any]) -> None:
        count = out["log_lik"].shape[0]
        log_weight = weigh(out["log_lik"], out["rate"]).reshape(count, -1)
        self.sums.add("log_weight", "", log_weight.sum(axis=0))
        self.sums.add("log_lik", "", out["log_lik"].reshape(count, -1).sum(axis=0, dtype=np.float64))
        for name, rate in out["rate"].items():
            self.sums.add("rate", name, rate.reshape(count, -1).sum(axis=0, dtype=np.float64))
        for name, rate in out["dimension"].items():
            self.sums.add("dimension", name, rate.reshape(log_weight.shape[1], -1).astype(np.float64))
        for name, mean in out["mean"].items():
            self.latent.setdefault(name, _Moments()).add(count, mean, out["square"][name])
        if not self.weighs:
            mean = log_weight.mean(axis=0)
            self.moments.add(count, mean, ((log_weight - mean) ** 2).sum(axis=0))
            return
        self._add_weights(log_weight)
        # The engine's precision stays visible to the tail's fit, which must not read rounding as a tail.
        rounded = log_weight.astype(out["log_lik"].dtype)
        self.top = largest(rounded if self.top is None else np.concatenate([self.top, rounded]), self.tail)

    def _add_weights(self, log_weight: np.ndarray) -> None:
        peak = np.maximum(self.peak, log_weight.max(axis=0))
        safe = np.where(np.isfinite(peak), peak, 0.0)  # all weights zero so far
        old, w = np.exp(self.peak - safe), np.exp(log_weight - safe)
        self.w = self.w * old + w.sum(axis=0)
        self.w2 = self.w2 * old**2 + (w**2).sum(axis=0)
        self.peak = peak

    def columns(self) -> dict[str, np.ndarray]:
        """Per-datum arrays; ``variance`` is that of ``log mean w``, by the delta method."""
        k = self.num_particles
        if not self.weighs:
            mean, unknown = self.moments.mean, np.full_like(self.moments.mean, np.nan)
            variance = self.moments.square / (k * (k - 1)) if k > 1 else unknown
            return {"log_lik_estimate": mean, "variance": variance, "elbo": mean, "ess": unknown, "k_hat": unknown}
        with np.errstate(divide="ignore", invalid="ignore"):  # all weights zero: log p = -inf, no effective draw
            ess = self.w**2 / self.w2
            variance = log_mean_variance(ess, k)
            log_lik = self.peak + np.log(self.w / k)
        k_hat = pareto_k_from_tail(self.top, k)
        elbo = self.sums["log_weight", ""] / k
        return {"log_lik_estimate": log_lik, "variance": variance, "elbo": elbo, "ess": ess, "k_hat": k_hat}


class _Totals:
    """What is kept of the data."""

    def __init__(self) -> None:
        self.entries, self.data_per_entry, self.weighs = 0, 1.0, True
        self.columns: list[dict[str, np.ndarray]] = []
        self.sums = _Sums()
        self.posterior_mean: dict[str, _Moments] = {}
        self.noise = _Sums()  # Monte Carlo variances of those means

    def add(self, batch: _Batch, keep: int) -> None:
        """Take the first ``keep`` entries of a finished batch."""
        k = batch.num_particles
        self.entries += keep
        self.columns.append({name: column[:keep] for name, column in batch.columns().items()})
        for (kind, site), value in batch.sums.items():
            self.sums.add(kind, site, value[:keep].sum(axis=0) / k)
        for name, latent in batch.latent.items():
            means = latent.mean[:keep]
            centre = means.mean(axis=0)
            moments = self.posterior_mean.setdefault(name, _Moments())
            moments.add(keep, centre, ((means - centre) ** 2).sum(axis=0))
            self.noise.add("variance", name, latent.square[:keep].sum(axis=0) / (max(k - 1, 1) * k))

    def activity(self) -> dict[str, np.ndarray]:
        """The variance over data of the sampled posterior means, less the part of it that is Monte Carlo noise."""
        return {
            name: (moments.square / (moments.count - 1) - self.noise["variance", name] / moments.count)
            for name, moments in self.posterior_mean.items()
        }


def _stream(
    program: Any, arrays: tuple[np.ndarray, ...], num_particles: int, seed: int, sizes: tuple[int, int], progress: bool
) -> _Totals | None:
    """Run the program over all data and particles; None if its weight is joint and a batch is not all of the data."""
    (batch, chunk), num_data, totals = sizes, len(arrays[0]), _Totals()
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("evaluate", total=num_data * num_particles)
        for start in range(0, num_data, batch):
            # The last batch repeats its last datum: one shape, one compilation.
            rows = np.minimum(np.arange(start, start + batch), num_data - 1)
            args, keep = tuple(a[rows] for a in arrays), min(batch, num_data - start)
            if start == 0:
                totals.weighs = not program.outline(args).estimated
            state = _Batch(num_particles, totals.weighs)
            for call, first in enumerate(range(0, num_particles, chunk)):
                size = min(chunk, num_particles - first)
                how = {"seed": call_seed(seed, start, call), "analytic_kl": not totals.weighs}
                out = program.apply(_chunk, args, num_particles=size, **how)
                joint = out["log_lik"].ndim == 1
                check_plate(out["log_lik"], batch)
                if joint and batch < num_data:
                    return None
                state.add(out)
                totals.data_per_entry = float(out["data_per_entry"])
                bar.advance(task, size * keep)
            totals.add(state, 1 if joint else keep)
    return totals


def evaluate(
    program: Any,
    data: Any,
    *,
    num_particles: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    memory_limit: int = 2**30,
    progress: bool = False,
) -> Evaluation:
    r"""Negative log likelihood by K importance samples a datum, and what the bound is made of.

    .. math:: \mathrm{NLL} = -\frac1N \sum_n \log \frac1K \sum_k w_{nk},\qquad
        w_{nk} = \frac{p(x_n, z_{nk})}{q(z_{nk} | x_n)},\quad z_{nk} \sim q(z | x_n)

    Every other figure comes from the same draws, so that ``-elbo = rate + distortion`` holds exactly. Rates are sampled
    (``log q - log p``), not analytic.

    The estimate of ``log p(x)`` is low on average, by about half the Monte Carlo variance of its logarithm: NLLs at
    different K do not compare. Where many k̂ are above 0.7 it is loose by an unknown amount, and only a larger K or
    another method tells.

    It is streamed over batches of data and chunks of particles. What is held grows neither with K nor with N, but for
    the per-datum results and the ``3 √K`` largest weights of the data at hand.

    A program with a site outside the data plate (a global latent, or no plate at all) has one joint weight for the
    whole data set. It then runs on all data at once, the one joint estimate is divided by their number, per-datum
    arrays have one entry, and there is no ``nll_se``.

    A program that draws one of its steps (``DiffusionVAE``, ``VariationalDiffusion``) has no weights but the mean of
    their logarithm: its ``nll`` is ``-elbo``, with analytic KLs where there are (see :class:`Evaluation`).

    Args:
        program: a trained program of either engine.
        data: an array ``(N, D)``, or a tuple of arrays (one an argument of the program), rows being data.
        num_particles: K.
        seed: equal arguments give equal results; another batch size gives other draws.
        batch_size: data in one call; chosen when None.
        memory_limit: bytes that one call may take, approximately.
        progress: show a progress bar.

    Returns: an :class:`Evaluation`; nats per datum.
    Raises: InvalidArgument for data that are empty, not finite or outside the likelihood's support, for K < 1, and for
        a program with more than one plate that all sites share, or that subsamples its data by itself; NonFinite when a
        log weight is nan or +inf.

    References: Burda, Grosse & Salakhutdinov 2016 (arXiv 1509.00519), eq. 8 and section 5 (NLL, active units); Alemi
        et al. 2018 (arXiv 1711.00464), rate and distortion.
    """
    whole_number("num_particles", num_particles)
    whole_number("seed", seed, least=0)
    whole_number("memory_limit", memory_limit)
    if batch_size is not None:
        whole_number("batch_size", batch_size)
    began = time.perf_counter()
    arrays = prepare_to_measure(program, data)
    batch_size = batch_size or getattr(program, "local_to", None)  # a guide for these data takes them all at once
    sizes = call_size(arrays, num_particles, batch_size, memory_limit)
    totals = _stream(program, arrays, num_particles, seed, sizes, progress)
    if totals is None:  # the first call found a joint weight
        sizes = call_size(arrays, num_particles, len(arrays[0]), memory_limit)
        totals = _stream(program, arrays, num_particles, seed, sizes, progress)
    assert totals is not None
    return _result(totals, num_particles, time.perf_counter() - began)


def _result(totals: _Totals, num_particles: int, seconds: float) -> Evaluation:
    entries, per = totals.entries, totals.data_per_entry
    column = {name: np.concatenate([c[name] for c in totals.columns]) for name in totals.columns[0]}
    mean = {key: value / (entries * per) for key, value in totals.sums.items()}
    rate = {site: float(value) for (kind, site), value in mean.items() if kind == "rate"}
    rate = {site: rate[site] for site in sorted(rate, key=by_number)}
    log_lik = column["log_lik_estimate"] / per
    spread = entries > 1 and bool(np.isfinite(log_lik).all())
    return Evaluation(
        nll=float(-log_lik.mean()),
        nll_se=float(log_lik.std(ddof=1)) / math.sqrt(entries) if spread else math.nan,
        nll_mc_se=math.sqrt(column["variance"].sum()) / (entries * per),
        num_particles=num_particles,
        elbo=float(mean["log_weight", ""]),
        rate=sum(rate.values()),
        distortion=float(-mean["log_lik", ""]),
        rate_per_site=rate,
        rate_per_dimension={site: value for (kind, site), value in mean.items() if kind == "dimension"},
        activity=totals.activity() if num_particles > 1 and entries > 1 else {},
        per_datum=PerDatum(log_lik, column["elbo"] / per, column["k_hat"], column["ess"]),
        num_data=round(entries * per),
        seconds=seconds,
        weighted=totals.weighs,
    )
