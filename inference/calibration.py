"""Simulation-based calibration: on data that the model itself makes, is the guide's posterior the right one?"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.special import chdtrc, ndtri

from elbozoo.inference.data import prepare_to_measure
from elbozoo.inference.errors import NonFinite, must
from elbozoo.inference.evaluation import call_seed, call_size, check_plate
from elbozoo.inference.parts import whole_number
from elbozoo.inference.simulation import places, simulate
from elbozoo.inference.terms import Terms, refuse_estimate

LEVEL = 0.01
"""A dimension is miscalibrated when its p-value, corrected for the number of dimensions, is below this."""

_MODEL, _GUIDE, _TIES, _SHAPES = range(4)  # streams of random numbers
_BINS = 20  # at most
_PER_BIN = 20  # expected ranks a bin, at least

PerDimension = Mapping[str, Float[np.ndarray, " D"]]


@dataclass(frozen=True, eq=False)
class Calibration:
    r"""What :func:`calibrate` found. Sites are the model's latents; a site's dimensions are flattened.

    Attributes:
        ranks: by site, ``(N, D)``: of each simulation's true latent among the guide's ``num_draws`` draws, how many of
            these are below it: 0 … ``num_draws``, uniform where the guide is the posterior.
        num_simulations: N.
        num_draws: L, the guide's draws in each simulation.
        num_bins: bins of the histograms, each of as many ranks.
    """

    ranks: Mapping[str, Int[np.ndarray, "N D"]] = field(repr=False)
    num_simulations: int
    num_draws: int
    num_bins: int

    @property
    def histograms(self) -> dict[str, Int[np.ndarray, "D bins"]]:
        """By site, ``(D, num_bins)``: how many ranks fall into each bin. ``N / num_bins`` are expected."""
        width = (self.num_draws + 1) // self.num_bins
        bins = np.arange(self.num_bins)
        return {name: (ranks.T[:, :, None] // width == bins).sum(axis=1) for name, ranks in self.ranks.items()}

    @property
    def p_values(self) -> dict[str, Float[np.ndarray, " D"]]:
        r"""By site, ``(D,)``: of the :math:`\chi^2` test that a dimension's bins are equally likely."""
        expected = self.num_simulations / self.num_bins
        squares = {name: ((h - expected) ** 2).sum(axis=1) / expected for name, h in self.histograms.items()}
        return {name: np.asarray(chdtrc(self.num_bins - 1, square)) for name, square in squares.items()}

    @property
    def corrected_p_values(self) -> dict[str, Float[np.ndarray, " D"]]:
        """:attr:`p_values` after Holm's correction for the number of all dimensions, whatever their dependence."""
        found = self.p_values
        flat = np.concatenate(list(found.values()))
        order = np.argsort(flat)
        corrected = np.empty_like(flat)
        corrected[order] = np.minimum(1.0, np.maximum.accumulate(flat[order] * np.arange(len(flat), 0, -1)))
        edges = np.cumsum([len(p) for p in found.values()])[:-1]
        return dict(zip(found, np.split(corrected, edges), strict=True))

    @property
    def p_value(self) -> float:
        """The smallest of the corrected ones: that of the hypothesis that every dimension is calibrated."""
        return float(min(p.min() for p in self.corrected_p_values.values()))

    @property
    def slope(self) -> dict[str, Float[np.ndarray, " D"]]:
        r"""By site: the mean of the ranks' normal scores :math:`\Phi^{-1}((r + 1/2) / (L + 1))`, in standard errors.

        Standard normal for uniform ranks. Above 0 the histogram rises: true latents are above the guide's draws, which
        are too low.
        """
        return {name: self._moments(ranks)[0] for name, ranks in self.ranks.items()}

    @property
    def curvature(self) -> dict[str, Float[np.ndarray, " D"]]:
        r"""By site: the normal scores' variance about their own mean, less that of uniform ranks, in standard errors.

        Standard normal for uniform ranks. Above 0 is ∪, a guide that is too narrow; below 0 is ∩, too wide. A guide
        that is merely displaced has none: a Gaussian's scores are then displaced as a whole.
        """
        return {name: self._moments(ranks)[1] for name, ranks in self.ranks.items()}

    def _moments(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the normal scores, standardised by their mean and variance under uniform ranks."""
        scores = ndtri((np.arange(self.num_draws + 1) + 0.5) / (self.num_draws + 1))
        variance, fourth = np.mean(scores**2), np.mean(scores**4)
        found, root = scores[ranks], math.sqrt(len(ranks))
        slope = found.mean(axis=0) / math.sqrt(variance) * root
        return slope, (found.var(axis=0, ddof=1) - variance) / math.sqrt(fourth - variance**2) * root

    @property
    def words(self) -> dict[str, list[str]]:
        """By site and dimension: ``"calibrated"``, or what is wrong with the guide there.

        Miscalibrated is a corrected p-value below 0.01. Then it is ``"too narrow (∪)"`` or ``"too wide (∩)"`` where the
        curvature, and ``"too low (rising)"`` or ``"too high (falling)"`` where the slope is beyond 3 standard errors;
        ``"of another shape"`` where neither is.
        """
        slope, curvature = self.slope, self.curvature
        return {
            name: [_word(*row) for row in zip(p, slope[name], curvature[name], strict=True)]
            for name, p in self.corrected_p_values.items()
        }

    @property
    def verdict(self) -> list[str]:
        """One sentence or two a site, figures included."""
        said = []
        for name, words in self.words.items():
            p = self.corrected_p_values[name].min()
            figures = f"smallest corrected p-value {p:.2g}, {self.num_simulations} simulations"
            kinds = dict.fromkeys(word for word in words if word != "calibrated")
            if not kinds:
                said.append(
                    f"No miscalibration of the guide is found in {len(words)} dimensions of {name} ({figures})."
                )
                continue
            parts = [
                f"{kind} in {words.count(kind)} ({', '.join(str(i) for i, w in enumerate(words) if w == kind)})"
                for kind in kinds
            ]
            said.append(f"Of {len(words)} dimensions of {name} the guide is {'; '.join(parts)} ({figures}).")
        return said

    def summary(self) -> dict[str, Any]:
        """Plain numbers and words for JSON."""
        return {
            "num_simulations": self.num_simulations,
            "num_draws": self.num_draws,
            "num_bins": self.num_bins,
            "p_value": self.p_value,
            "p_values": {name: [float(v) for v in p] for name, p in self.p_values.items()},
            "slope": {name: [float(v) for v in s] for name, s in self.slope.items()},
            "curvature": {name: [float(v) for v in c] for name, c in self.curvature.items()},
            "words": self.words,
            "verdict": self.verdict,
        }

    def __rich__(self) -> Table:
        title = f"Calibration: {self.num_simulations} simulations, {self.num_draws} draws each"
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(("dimension", "p (corrected)", "slope", "curvature", "the guide is")):
            table.add_column(name, justify="right" if 0 < i < 4 else "left")
        p, slope, curvature = self.corrected_p_values, self.slope, self.curvature
        for name, words in self.words.items():
            for i, word in enumerate(words):
                figures = (f"{p[name][i]:.2g}", f"{slope[name][i]:+.1f}", f"{curvature[name][i]:+.1f}")
                table.add_row(f"{name}[{i}]", *figures, word)
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
        with console.capture() as text:
            console.print(self)
        return text.get().rstrip()


def _word(p: float, slope: float, curvature: float) -> str:
    if p >= LEVEL:
        return "calibrated"
    said = []
    if abs(curvature) > 3:
        said.append("too narrow (∪)" if curvature > 0 else "too wide (∩)")
    if abs(slope) > 3:
        said.append("too low (rising)" if slope > 0 else "too high (falling)")
    return " and ".join(said) or "of another shape"


# --- the computation --------------------------------------------------------------------------------------------


def calibrate(
    program: Any,
    data: Any,
    *,
    num_simulations: int = 1000,
    num_draws: int = 99,
    observed: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    r"""Simulation-based calibration of the guide on the model's own draws.

    A latent and its data are drawn from the model, :math:`z, x \sim p(z) p(x | z)`, and L more latents from the
    guide at those data, :math:`z_1, …, z_L \sim q(z | x)`. Where the guide is the posterior, z is one more draw like
    these, and its rank among them is uniform on 0 … L, in every dimension. The converse does not hold: a guide that
    ignores its data and returns the prior is calibrated too, and so is one that misses correlations alone.

    It says how the guide does on the *model's* data, which need not look like the ones that the model was trained on.

    Args:
        program: a trained program of either engine, with every site inside its data plate.
        data: as for :func:`~elbozoo.inference.evaluate`. Observed arrays give their shape alone; others (covariates)
            are used as they are, row by row and over again.
        num_simulations: N.
        num_draws: L. A histogram needs bins of as many ranks each: let ``L + 1`` have many divisors.
        observed: by observed site, which argument of the program is its data (0 for the first). Needed where shapes do
            not tell.
        seed: equal arguments give equal results.
        progress: show a progress bar.

    Returns: a :class:`Calibration`.
    Raises: InvalidArgument for bad data, a latent outside the data plate, one that is drawn given observed data, an
        observed site of which it cannot be told which argument its data are; NonFinite for draws that are nan.

    References: Talts, Betancourt, Simpson, Vehtari & Gelman 2018 (arXiv 1804.06788); Holm 1979, A simple sequentially
        rejective multiple test procedure, Scand. J. Stat. 6.
    """
    whole_number("num_simulations", num_simulations, least=2)
    whole_number("num_draws", num_draws, least=2)
    whole_number("seed", seed, least=0)
    arrays = prepare_to_measure(program, data)
    refuse_estimate(program.outline(arrays), "calibrate")
    where = places(program, arrays, observed, call_seed(seed, _SHAPES, 0), "calibrate")
    parts: dict[str, list[np.ndarray]] = {}
    rng = np.random.default_rng([seed, _TIES])
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("calibrate", total=num_simulations)
        for truth, drawn, keep in _simulations(program, arrays, where, num_simulations, num_draws, seed):
            for name, z in truth.items():
                parts.setdefault(name, []).append(_ranks(name, z, drawn[name], rng)[:keep])
            bar.advance(task, keep)
    ranks = {name: np.concatenate(part) for name, part in parts.items()}
    return Calibration(ranks, num_simulations, num_draws, _num_bins(num_simulations, num_draws))


def _draws(terms: Terms) -> dict[str, Any]:
    return {
        "values": dict(terms.values),
        "log_lik": terms.log_lik,
        "joint": terms.joint,
    }


def _simulations(
    program: Any, arrays: tuple[np.ndarray, ...], where: Mapping[str, int], count: int, num_draws: int, seed: int
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]]:
    """Batches of true latents ``(B, D)``, the guide's draws ``(L, B, D)``, and how many of the B count."""
    like = tuple(np.broadcast_to(a[:1], (count, *a.shape[1:])) for a in arrays)
    batch, chunk = call_size(like, num_draws)
    for call, start in enumerate(range(0, count, batch)):
        # The last batch is a whole one: one shape, one compilation.
        rows = np.arange(start, start + batch) % len(arrays[0])
        noise = call_seed(seed, _MODEL, call * len(where))
        latent, args = simulate(program, tuple(a[rows] for a in arrays), where, noise)
        drawn: dict[str, list[np.ndarray]] = {name: [] for name in latent}
        for i in range(math.ceil(num_draws / chunk)):
            noise = call_seed(call_seed(seed, _GUIDE, 0), start, i)
            out = program.apply(_draws, args, num_particles=chunk, seed=noise)
            if out["log_lik"].ndim < 2 or out["joint"]:
                todo = "Move every site into the data plate; a latent that all data share has no rank a datum"
                raise must("program", "have every latent inside its data plate", "one that is not", todo)
            check_plate(out["log_lik"], batch)
            for name in latent:
                drawn[name].append(out["values"][name].reshape(chunk, batch, -1))
        guide = {name: np.concatenate(z)[:num_draws] for name, z in drawn.items()}
        yield {name: z.reshape(batch, -1) for name, z in latent.items()}, guide, min(batch, count - start)


def _ranks(name: str, truth: np.ndarray, drawn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many draws are below the truth, ``(B, D)``; ties are broken at random."""
    if np.isnan(drawn).any() or np.isnan(truth).any():
        todo = "Look at that site's parameters, and at the history of training"
        raise must(f"site '{name}'", "be drawn as numbers", "nan", todo, NonFinite)
    below, ties = (drawn < truth).sum(axis=0), (drawn == truth).sum(axis=0)
    # Among m equal draws the truth takes each of m + 1 places with equal probability.
    return below + rng.integers(0, ties, endpoint=True)


def _num_bins(num_simulations: int, num_draws: int) -> int:
    """The most bins of as many ranks each, at most 20, of which each expects 20 simulations; two at least.

    Where ``L + 1`` has no such divisor, each rank is a bin.
    """
    most = max(2, min(_BINS, num_simulations // _PER_BIN))
    divisors = [n for n in range(2, most + 1) if (num_draws + 1) % n == 0]
    return max(divisors, default=num_draws + 1)
