"""Pictures of trained runs and of what the instruments found: Matplotlib figures in one style, readable in grey.

Each function returns a ``Figure`` that belongs to nobody: ``figure.savefig("rates.svg")``. Everything is in nats per
datum. Where there is nothing to draw (a site that does not factorise, latents that are discrete), the figure is a line
that says why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import ArrayLike

from elbozoo.inference import Bottleneck, Calibration, Evaluation, RateDistortion, Run
from elbozoo.inference.evaluation import ACTIVE, call_seed, call_size
from elbozoo.inference.terms import Terms

Runs = Mapping[str, Run]
Evaluations = Mapping[str, Evaluation]
Values = dict[str, np.ndarray]

# Told apart by line, by marker and by lightness, so that print and every eye can follow; colours after Okabe & Ito.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#e69f00", "#009e73")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
DARK, LIGHT = "0.25", "0.75"

_ENCODE, _DECODE, _PRIOR = 0xE, 0xDE, 0xF  # streams of random numbers
_NO_SITE = "the program has no latent with posterior means, or one that all data share"


# --- style ------------------------------------------------------------------------------------------------------


def _panels(count: int, columns: int = 4, width: float = 3.2, height: float = 2.6, **options: Any) -> Any:
    """A figure and so many axes of one look, in rows."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(width * columns, 4.4), height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels[:count]


def _stroke(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)], "linewidth": 1.6}


def instead(reason: str) -> Figure:
    """A line of text where there is nothing to draw."""
    figure = Figure(figsize=(6.4, 0.5))
    figure.text(0.01, 0.5, reason, va="center", fontsize=9, wrap=True)
    return figure


# --- training ---------------------------------------------------------------------------------------------------


def curves(runs: Runs) -> Figure:
    """The bound, the rate, the distortion and, where they were counted, the live units over epochs."""
    rows = {label: [_with_live_units(row) for row in run.history] for label, run in runs.items()}
    titles = {"bound": "bound", "valid_bound": "held-out bound", "rate": "rate", "distortion": "distortion"}
    titles["live"] = "live units"
    shown = [name for name in titles if any(history and name in history[-1] for history in rows.values())]
    if not shown:
        return instead("No training curves: these runs have no history.")
    figure, panels = _panels(len(shown), columns=len(shown), height=3.1)
    for axes, name in zip(panels, shown, strict=True):
        settled: list[float] = []
        for i, (label, history) in enumerate(rows.items()):
            points = [(row["epoch"], row[name]) for row in history if name in row]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), label=label, **_stroke(i))
            settled += [value for _, value in points[len(points) // 10 :]]
        low, high = min(settled), max(settled)  # the first epochs would flatten everything after them
        margin = 0.05 * (high - low) or 1.0
        axes.set(title=titles[name], xlabel="epoch", ylim=(low - margin, high + margin))
        axes.set_ylabel("nats per datum" if name == shown[0] else "")
        axes.grid(color="0.9")
    if len(runs) > 1:
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=min(len(runs), 5), frameon=False)
    return figure


def _with_live_units(row: Mapping[str, float]) -> dict[str, float]:
    """A row of history with the live units of all sites (columns ``live_<site>``) added up."""
    live = [value for name, value in row.items() if name.startswith("live_")]
    return {**row, "live": sum(live)} if live else dict(row)


# --- the bottleneck ---------------------------------------------------------------------------------------------


def kl_per_dimension(evaluations: Evaluations) -> Figure:
    """The rate of every latent dimension, largest first; hollow bars are dimensions that are not active.

    Dimensions of a site whose guide or prior does not factorise have no rates of their own and are left out.
    """
    figure, panels = _panels(len(evaluations), width=5 if len(evaluations) == 1 else 3.2, sharey=True)
    for axes, (label, found) in zip(panels, evaluations.items(), strict=True):
        rate = np.concatenate([np.ravel(r) for r in found.rate_per_dimension.values()] or [np.zeros(0)])
        activity = [found.activity.get(site, np.full(len(r), np.inf)) for site, r in found.rate_per_dimension.items()]
        active = np.concatenate([np.ravel(a) for a in activity] or [np.zeros(0)]) > ACTIVE
        order = np.argsort(-rate)
        colour = np.where(active[order], DARK, "1.0").tolist()
        axes.bar(np.arange(1, len(rate) + 1), rate[order], color=colour, edgecolor=DARK, linewidth=0.6)
        axes.set(title=label, xlabel="latent dimension, by rate")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if not len(rate):
            axes.text(0.5, 0.5, "does not factorise", ha="center", transform=axes.transAxes)
            axes.set_xticks([])
    figure.axes[0].set_ylabel("rate, nats")
    return figure


def collapse_curve(found: Mapping[str, Bottleneck | Mapping[str, ArrayLike]], epsilon: float = 0.01) -> Figure:
    """How many dimensions have a KL below ε nats for nearly all data, over ε (Lucas et al. 2019).

    Args:
        found: by label, what ``bottleneck`` found, or ε by site and dimension (``collapse_epsilon``).
        epsilon: where a mark goes.
    """
    least = {label: _least_epsilon(value) for label, value in found.items()}
    least = {label: value for label, value in least.items() if len(value)}
    if not least:
        return instead("No collapse curve: no latent site factorises, so no dimension has a KL of its own.")
    figure, (axes,) = _panels(1, width=5, height=3.1)
    above = np.concatenate(list(least.values()))
    low, high = 1e-4, max(1.0, 2 * float(above.max()))
    for i, (label, value) in enumerate(least.items()):
        value = np.sort(np.clip(value, low, None))
        count = [0, *np.arange(1, len(value) + 1), len(value)]
        axes.step([low, *value, high], count, where="post", label=label, **_stroke(i))
    axes.axvline(epsilon, color="0.6", linewidth=0.8)
    at_top = {"va": "top", "transform": axes.get_xaxis_transform()}
    axes.text(epsilon, 1.0, f" ε = {epsilon:g}", color="0.35", fontsize=8, **at_top)
    delta = {value.delta for value in found.values() if isinstance(value, Bottleneck)}
    share = f"{1 - delta.pop():.0%} of the data" if len(delta) == 1 else "nearly all data"
    axes.set(xscale="log", xlim=(low, high), xlabel="ε, nats", ylabel="dimensions")
    axes.set_title(f"KL below ε for {share}", fontsize=10)
    axes.set_ylim(0, 1.05 * max(len(v) for v in least.values()))
    axes.yaxis.get_major_locator().set_params(integer=True)
    if len(least) > 1:
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def _least_epsilon(found: Bottleneck | Mapping[str, ArrayLike]) -> np.ndarray:
    by_site = found.collapse_epsilon if isinstance(found, Bottleneck) else found
    return np.concatenate([np.ravel(np.asarray(e, float)) for e in by_site.values()] or [np.zeros(0)])


def rate_distortion_plane(
    models: Mapping[str, Any],
    curve: RateDistortion | None = None,
    exact: tuple[ArrayLike, ArrayLike] | None = None,
) -> Figure:
    """Where models lie between what their latents carry and what decoding loses, with lines of equal ELBO.

    Args:
        models: by label, anything with a ``rate`` and a ``distortion`` in nats (a ``Bottleneck``, an ``Evaluation``);
            their standard errors, where it has them, are drawn as bars.
        curve: a sweep over β, drawn as points along its frontier, each with its β.
        exact: rates and distortions of a curve that is known, drawn as a line.
    """
    figure, (axes,) = _panels(1, width=5, height=4.4)
    if exact is not None:
        axes.plot(*exact, color=LIGHT, linewidth=3, label="closed form", zorder=1)
    if curve is not None:
        frontier = curve.frontier()
        axes.plot([p.rate for p in frontier], [p.distortion for p in frontier], color=DARK, linewidth=1, zorder=2)
        for i, point in enumerate(curve.points):
            marks = {"marker": "o", "markersize": 4, "color": DARK}
            marks["markerfacecolor"] = DARK if point in frontier else "1.0"
            _error_bars(axes, point, label="trained under β" if i == 0 else None, zorder=3, **marks)
            near = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(f"β = {point.beta:g}", (point.rate, point.distortion), **near)
    for i, (label, model) in enumerate(models.items()):
        marks = {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)], "markersize": 7}
        _error_bars(axes, model, label=label, zorder=4, **marks)
    axes.set(xlabel="rate, nats per datum", ylabel="distortion, nats per datum")
    axes.margins(0.16)
    if curve is None and exact is None:
        _square(axes)
    _lines_of_equal_elbo(axes)
    if models or exact is not None:
        axes.legend(facecolor="1.0", edgecolor="1.0", framealpha=0.9, fontsize=8, loc="upper right")
    return figure


def _error_bars(axes: Axes, point: Any, **marks: Any) -> None:
    errors = {"xerr": getattr(point, "rate_se", 0.0), "yerr": getattr(point, "distortion_se", 0.0)}
    axes.errorbar(point.rate, point.distortion, linestyle="", elinewidth=0.8, **errors, **marks)


def _square(axes: Axes) -> None:
    """As many nats up as across, from a rate of 0: an error bar alone says nothing of the scale."""
    (_, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    span = 1.2 * max(right, top - bottom)
    middle = 0.5 * (bottom + top)
    axes.set(xlim=(-0.04 * span, span), ylim=(middle - 0.5 * span, middle + 0.5 * span))


def _lines_of_equal_elbo(axes: Axes, count: int = 7) -> None:
    """Diagonals ``R + D = -ELBO``, each with its -ELBO where it leaves the axes."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for level in MaxNLocator(count).tick_values(left + bottom, right + top):
        if not left + bottom < level < right + top:
            continue
        axes.plot([level - top, level - bottom], [top, bottom], color="0.87", linewidth=0.7, zorder=0)
        x = min(right, level - bottom)
        axes.text(x, level - x, f"{level:g}", color="0.55", fontsize=7, ha="right", va="bottom", zorder=0)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_title("light diagonals: equal −ELBO", fontsize=9, color="0.35")


# --- the gaps ---------------------------------------------------------------------------------------------------


def gap_waterfall(gaps: Any) -> Figure:
    """From the ELBO up to log p(x): what amortisation loses, what the guide's family loses.

    Args:
        gaps: anything with ``elbo``, ``optimal_elbo``, ``richer_elbo`` (or None), ``log_lik`` (means, nats per datum),
            the ``_se`` of ``amortisation``, ``approximation`` and ``richer``, and ``log_lik_method``.
    """
    steps = [("amortisation", gaps.elbo, gaps.optimal_elbo, gaps.amortisation_se)]
    if gaps.richer_elbo is None:
        steps.append(("family", gaps.optimal_elbo, gaps.log_lik, gaps.approximation_se))
    else:
        steps += [("family:\ncorrelations", gaps.optimal_elbo, gaps.richer_elbo, gaps.richer_se)]
        steps += [("family:\nbeyond Gaussian", gaps.richer_elbo, gaps.log_lik, math.nan)]
    figure, (axes,) = _panels(1, width=5.5, height=3.4)
    ends = [gaps.elbo, gaps.log_lik]
    levels = [*ends, *(level for step in steps for level in step[1:3])]
    span = max(max(levels) - min(levels), 1e-3)
    floor = min(levels) - 0.35 * span  # differences count, not the distance from zero
    axes.bar([0, len(steps) + 1], np.subtract(ends, floor), bottom=floor, color=LIGHT, edgecolor=DARK, linewidth=0.8)
    for i, (_, start, stop, se) in enumerate(steps, start=1):
        hatch = {"color": "1.0", "hatch": "////", "edgecolor": DARK, "linewidth": 0.8}
        axes.bar(i, stop - start, bottom=start, yerr=se or None, error_kw={"elinewidth": 0.8}, **hatch)
        top = max(start, stop) + (se if math.isfinite(se) else 0.0)
        axes.text(i, top + 0.03 * span, f"{stop - start:+.2f}", ha="center", fontsize=9)
        axes.plot([i - 1.4, i + 0.4], [start, start], color=DARK, linewidth=0.6, linestyle=":")
    for x, level in zip((0, len(steps) + 1), ends, strict=True):
        axes.text(x, level + 0.03 * span, f"{level:.2f}", ha="center", fontsize=9)
    names = ["ELBO", *(name for name, *_ in steps), "log p(x)"]
    axes.set_title(f"log p(x): {gaps.log_lik_method}", fontsize=8)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set(ylabel="nats per datum", ylim=(floor, max(levels) + 0.25 * span))
    return figure


# --- the guide's calibration ---------------------------------------------------------------------------------------


def rank_histograms(calibration: Calibration, *, coverage: float = 0.99, columns: int = 4) -> Figure:
    """The rank histogram of each latent dimension, over the band that a calibrated guide's bars keep to.

    The line is the expected count, the grey band the central ``coverage`` of the binomial distribution of one bar: with
    20 bars and 0.99 one in five calibrated histograms has a bar outside. Bars are dark where the dimension is
    miscalibrated (see :attr:`~elbozoo.inference.Calibration.words`), and the title says how.

    Args:
        calibration: what :func:`elbozoo.inference.calibrate` returned.
        coverage: probability that a bar of a calibrated guide is inside the band.
        columns: panels a row.

    Returns: a Matplotlib figure, one panel a dimension.
    """
    from scipy import stats

    histograms, words = calibration.histograms, calibration.words
    panels = [(name, i) for name, rows in histograms.items() for i in range(len(rows))]
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    share = 1 / calibration.num_bins
    low, high = stats.binom.interval(coverage, calibration.num_simulations, share)
    width = (calibration.num_draws + 1) // calibration.num_bins
    edges = [width * (b + 0.5) - 0.5 for b in range(calibration.num_bins)]
    figure = Figure(figsize=(2.6 * columns, 2.1 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel, (name, i) in zip(axes.flat, panels, strict=False):
        wrong = words[name][i] != "calibrated"
        panel.axhspan(low, high, color="0.85", zorder=0)
        panel.axhline(calibration.num_simulations * share, color="0.3", linewidth=0.8, zorder=3)
        style = {"color": "0.25" if wrong else "0.6", "edgecolor": "white", "linewidth": 0.4, "zorder": 2}
        panel.bar(edges, histograms[name][i], width=width, **style)
        said = words[name][i].replace(" and ", "\n") if wrong else ""
        panel.set_title(f"{name}[{i}] {said}".rstrip(), fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    figure.supxlabel(f"rank of the true latent among {calibration.num_draws} draws of the guide", fontsize=9)
    figure.supylabel("simulations", fontsize=9)
    return figure


# --- the latent space -------------------------------------------------------------------------------------------


def aggregate_posterior(
    run: Run, data: Any, labels: ArrayLike | None = None, *, projection: str = "active", seed: int = 0
) -> Figure:
    """One draw of q(z|x) for each datum in two dimensions, over the prior's contours.

    The contours hold half, nine tenths and 99 in 100 of the prior, estimated from its draws. A prior that the draws
    fill evenly is matched; rings of prior without a draw are where samples from the model are unlike data.

    Args:
        run: the run.
        data: data as they were before binarisation.
        labels: a label a datum, drawn as the mark.
        projection: "active" for the two dimensions whose posterior means vary most over data, "pca" for the two
            principal components of the posterior means.
        seed: of the draws.
    """
    args = run.prepare(data)
    latents = _encode(run, args, seed)
    if (site := latents.site) is None:
        return instead(f"No picture of the aggregate posterior: {_NO_SITE}.")
    draws, prior = _flat(latents.draw[site]), _prior(run, args, site, seed)
    if draws.shape[1] == 1:
        return _one_dimension(site, draws[:, 0], prior[:, 0])
    basis, names = _projection(latents, site, projection)
    figure, (axes,) = _panels(1, width=5, height=5)
    _contours(axes, prior @ basis)
    _scatter(axes, draws @ basis, labels)
    axes.set(xlabel=names[0], ylabel=names[1], aspect="equal")
    axes.set_title("lines: the prior's 50, 90 and 99 %", fontsize=9, color="0.35")
    return figure


def _projection(latents: _Latents, site: str, projection: str) -> tuple[np.ndarray, list[str]]:
    """Two directions of a site's values ``(D, 2)``, and their names."""
    if projection == "pca":
        means = _flat(latents.mean[site])
        vectors = np.linalg.svd(means - means.mean(0), full_matrices=False)[2][:2]
        return vectors.T, [f"principal component {i} of E[{site} | x]" for i in (1, 2)]
    order = latents.ranked(site)[:2]
    return np.eye(len(latents.activity[site]))[:, order], [f"{site}[{i}]" for i in order]


def _contours(axes: Axes, prior: np.ndarray) -> None:
    from scipy.stats import gaussian_kde  # a slow import that only this picture needs

    density = gaussian_kde(prior.T, bw_method=0.35)  # smooth out to the last contour, which few draws lie beyond
    levels = np.quantile(density(prior.T), (0.01, 0.1, 0.5))
    low, high = prior.min(axis=0), prior.max(axis=0)
    grid = np.meshgrid(*(np.linspace(a, b, 60) for a, b in zip(low, high, strict=True)))
    height = density(np.stack([g.ravel() for g in grid])).reshape(grid[0].shape)
    if (np.diff(levels) > 0).all():
        axes.contour(*grid, height, levels=levels, colors="0.55", linewidths=(0.7, 0.9, 1.1), zorder=3)


def _scatter(axes: Axes, points: np.ndarray, labels: ArrayLike | None) -> None:
    if labels is None:
        axes.scatter(*points.T, s=6, color=DARK, alpha=0.6, linewidths=0)
        return
    kinds = np.asarray(labels)
    for i, kind in enumerate(dict.fromkeys(sorted(kinds.tolist()))):
        own = points[kinds == kind]
        mark = f"${kind}$" if len(str(kind)) <= 2 else MARKERS[i % len(MARKERS)]
        colour = COLOURS[i % len(COLOURS)]
        axes.scatter(*own.T, s=22, marker=mark, color=colour, linewidths=0.2, label=str(kind))
    if any(len(str(kind)) > 2 for kind in kinds.tolist()):
        axes.legend(frameon=False, fontsize=8)


def _one_dimension(site: str, draws: np.ndarray, prior: np.ndarray) -> Figure:
    figure, (axes,) = _panels(1, width=5, height=3)
    low, high = min(draws.min(), prior.min()), max(draws.max(), prior.max())
    bins = np.linspace(low, high, 41)
    axes.hist(draws, bins, density=True, color=LIGHT, edgecolor="1.0", linewidth=0.3, label="aggregate posterior")
    axes.hist(prior, bins, density=True, histtype="step", color=DARK, linewidth=1.4, label="prior")
    axes.set(xlabel=f"{site}[0]", ylabel="density")
    axes.legend(frameon=False, fontsize=8)
    return figure


def traversals(run: Run, data: Any, *, most: int = 3, least: int = 2, steps: int = 9, seed: int = 0) -> Figure:
    """What one datum decodes to as single latent dimensions run through the prior, the others at its posterior mean.

    Args:
        run: the run.
        data: data as they were before binarisation: the dimensions are ranked on all of them, the first is decoded.
        most: so many of the most active dimensions (by the variance over data of their posterior mean).
        least: so many of the least active, which should change nothing.
        steps: values a dimension, from the prior's 1st to its 99th percentile.
        seed: of the draws.
    """
    args = run.prepare(data)
    latents = _encode(run, args, seed)
    if (site := latents.site) is None:
        return instead(f"No traversals: {_NO_SITE}.")
    order = latents.ranked(site)
    least = min(least, max(len(order) - most, 0))
    chosen = [*order[:most], *order[len(order) - least :]]
    quantiles = np.quantile(_prior(run, args, site, seed), np.linspace(0.01, 0.99, steps), axis=0)
    values = {name: np.repeat(mean[:1], len(chosen) * steps, axis=0) for name, mean in latents.mean.items()}
    rows = values[site].reshape(len(chosen), steps, -1)
    for row, dimension in zip(rows, chosen, strict=True):
        row[:, dimension] = quantiles[:, dimension]
    decoded = _decode(run, args, values, seed)
    names = [f"{site}[{i}]\n{max(latents.activity[site][i], 0.0):.2f}" for i in chosen]
    return _tiles(run, decoded, steps, names, "left: the dimension, and the variance of its posterior mean")


def interpolations(run: Run, data: Any, *, pairs: int = 4, steps: int = 8, seed: int = 0) -> Figure:
    """The way from one datum's posterior mean to another's, decoded; the data themselves at either end.

    Args:
        run: the run.
        data: data as they were before binarisation; neighbours (1st and 2nd, 3rd and 4th, …) are paired.
        pairs: how many.
        steps: points on each way, ends included.
        seed: of the draws.
    """
    args = run.prepare(_first(data, 2 * pairs))
    pairs = len(args[0]) // 2
    latents = _encode(run, args, seed)
    if latents.site is None or not pairs:
        return instead(f"No interpolations: {_NO_SITE if pairs else 'there is one datum'}.")
    values: Values = {}
    for name, mean in latents.mean.items():
        ends = mean[: 2 * pairs].reshape(pairs, 2, 1, *mean.shape[1:])
        weight = np.linspace(0.0, 1.0, steps).reshape(1, steps, *(1,) * (mean.ndim - 1))
        if name not in latents.activity:  # nothing lies between two classes
            weight = weight > 0.5
        way = ends[:, 0] + weight * (ends[:, 1] - ends[:, 0])
        values[name] = way.reshape(-1, *mean.shape[1:]).astype(mean.dtype)
    decoded = _decode(run, args, values, seed).reshape(pairs, steps, -1)
    seen = _observed(args, decoded.shape[-1])
    if seen is not None:
        ends = seen[: 2 * pairs].reshape(pairs, 2, -1)
        decoded = np.concatenate([ends[:, :1], decoded, ends[:, 1:]], axis=1)
    return _tiles(run, decoded.reshape(-1, decoded.shape[-1]), decoded.shape[1])


# --- data -------------------------------------------------------------------------------------------------------


def samples(run: Run, rows: int = 6, columns: int = 6, seed: int = 0, *, data: Any = None) -> Figure:
    """Means of the data that draws from the prior decode to.

    Args:
        run: the run.
        rows, columns: of the picture.
        seed: of the draws.
        data: some data, whose shape alone matters: for a program that is not of the zoo.
    """
    count = rows * columns
    if data is not None:
        args = _cycled(run.prepare(_first(data, count)), count)
    elif run.program.spec is None:
        return instead("No samples: pass data=… for a program that is not of the zoo, to tell the shape of a datum.")
    else:
        args = (np.zeros((count, run.program.spec.data_dim), run.program.float_dtype),)
    return _tiles(run, _mean(run.program.predict(args, seed=seed, prior=True))[0].reshape(count, -1), columns)


def reconstructions(run: Run, data: Any, columns: int = 8, seed: int = 0) -> Figure:
    """Data above the mean of what they decode to, over draws of the guide.

    Args:
        run: the run.
        data: data as they were before binarisation; the first ``columns`` are shown, as the model sees them.
        columns: how many.
        seed: of the draws.
    """
    data = _first(data, columns)
    x = run.prepare(data)
    decoded = _mean(run.program.predict(x, num_particles=20, seed=seed)).mean(axis=0)
    decoded = decoded.reshape(len(x[0]), -1)
    rows = [decoded]
    if (seen := _observed(x, decoded.shape[1])) is not None:
        rows.insert(0, seen)
        if run.config["binarize"] != "none":
            rows.insert(0, np.reshape(data[0] if isinstance(data, tuple) else data, seen.shape))
    return _tiles(run, np.concatenate(rows), len(x[0]))


def _first(data: Any, count: int) -> Any:
    """The first data, of an array or of a tuple of them."""
    return tuple(a[:count] for a in data) if isinstance(data, tuple) else data[:count]


def _cycled(args: tuple[np.ndarray, ...], count: int) -> tuple[np.ndarray, ...]:
    """``count`` rows of each array, from the first again where they do not suffice."""
    return tuple(a[np.arange(count) % len(a)] for a in args)


def _observed(args: tuple[np.ndarray, ...], size: int) -> np.ndarray | None:
    """The first argument with so many entries a datum, flat: what the decoded data stand for."""
    return next((a.reshape(len(a), -1) for a in args if a.size == len(a) * size), None)


# --- latents ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Latents:
    """What the guide says of the latents that belong to one datum each.

    Attributes:
        mean: by site, posterior means ``(N, …)``; one draw instead for classes and the like, which have no mean.
        draw: by site, one draw ``(N, …)``.
        activity: by site with means, ``(D,)``: their variance over data, less that of a mean of few draws.
    """

    mean: Values
    draw: Values
    activity: Values

    @property
    def site(self) -> str | None:
        """The site whose posterior means vary most over data; None where no site has means."""
        return max(self.activity, key=lambda name: self.activity[name].sum()) if self.activity else None

    def ranked(self, site: str) -> np.ndarray:
        """A site's dimensions, the most active first."""
        return np.argsort(-self.activity[site], kind="stable")


def _encode(run: Run, args: tuple[np.ndarray, ...], seed: int) -> _Latents:
    """The latents of some data, a batch at a time; empty where a latent is shared by all data."""
    batch, _ = call_size(args, _ENCODED)
    parts = []
    for start in range(0, len(args[0]), batch):
        rows = np.minimum(np.arange(start, start + batch), len(args[0]) - 1)  # the last batch repeats its last datum
        of_call = call_seed(call_seed(seed, _ENCODE, 0), start, 0)
        parts.append(run.program.apply(_moments, tuple(a[rows] for a in args), num_particles=_ENCODED, seed=of_call))
    smooth = [name for name, is_smooth in parts[0]["smooth"].items() if is_smooth]
    joined = {k: {n: np.concatenate([p[k][n] for p in parts])[: len(args[0])] for n in parts[0][k]} for k in _KINDS}
    mean, draw, variance = (joined[kind] for kind in _KINDS)
    activity = {n: _flat(mean[n]).var(axis=0) - _flat(variance[n]).mean(axis=0) / _ENCODED for n in smooth}
    return _Latents({n: mean[n] if n in smooth else draw[n] for n in draw}, draw, activity)


_ENCODED = 20  # draws a datum
_KINDS = ("mean", "draw", "variance")


def _moments(terms: Terms) -> dict[str, Any]:
    sites = {name: terms.values[name] for name, site in terms.sites.items() if not site.auxiliary}
    plate = terms.log_lik.shape[1:]
    if terms.joint or len(plate) != 1 or any(z.shape[1:2] != plate for z in sites.values()):
        sites = {}
    mean = {name: (1.0 * z).mean(axis=0) for name, z in sites.items()}
    return {
        "mean": mean,
        "draw": {name: z[0] for name, z in sites.items()},
        "variance": {name: ((z - mean[name]) ** 2).sum(axis=0) / (_ENCODED - 1) for name, z in sites.items()},
        "smooth": {name: terms.sites[name].reparameterised for name in sites},
    }


def _prior(run: Run, args: tuple[np.ndarray, ...], site: str, seed: int) -> np.ndarray:
    """4000 draws of one of the model's latents, ``(4000, D)``."""
    of_call = call_seed(seed, _PRIOR, 0)
    return _flat(run.program.predict(_cycled(args, 4000), seed=of_call, prior=True)["latent"][site][0])


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


def _decode(run: Run, args: tuple[np.ndarray, ...], values: Values, seed: int) -> np.ndarray:
    """The mean of the data, ``(R, D)``, given latents ``(R, …)`` by site."""
    count = len(next(iter(values.values())))
    fresh = call_seed(seed, _DECODE, 0)
    given = {name: value[None] for name, value in values.items()}
    return _mean(run.program.predict(_cycled(args, count), seed=fresh, values=given))[0].reshape(count, -1)


def _mean(draws: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
    """The first observed site's mean (K, B, D), or its draws where its distribution has none."""
    site = next(iter(draws["observed"]))
    return draws["mean"].get(site, draws["observed"][site])


# --- tiles ------------------------------------------------------------------------------------------------------


def _tiles(run: Run, data: np.ndarray, columns: int, names: Sequence[str] = (), note: str = "") -> Figure:
    """Data ``(R, D)`` in a grid: images in one ink, or profiles where a datum is no image."""
    height, width = _image_shape(run, data.shape[-1])
    rows = len(data) // columns
    size = max(3.2, 0.45 * columns)
    if height == 1:
        picture, shape = None, (0.5 * size / columns * rows, size)
    else:
        picture = _mosaic(data.reshape(-1, columns, height, width))
        shape = (size * picture.shape[0] / picture.shape[1], size)
    left, top = (0.55 if names else 0.0), (0.3 if note else 0.0)
    figure = Figure(figsize=(shape[1] + left, shape[0] + top))
    whole = shape[1] + left, shape[0] + top
    axes = figure.add_axes((left / whole[0], 0, shape[1] / whole[0], shape[0] / whole[1]))
    if picture is None:
        _profiles(axes, data.reshape(rows, columns, -1))
    else:
        ink = {"cmap": "gray_r", "vmin": np.nanmin(data), "vmax": np.nanmax(data)}
        axes.imshow(picture, interpolation="nearest", aspect="auto", **ink)
    axes.set_axis_off()
    for i, name in enumerate(names):
        y = (1 - (i + 0.5) / rows) * shape[0] / whole[1]
        figure.text(0.02, y, name, va="center", fontsize=7)
    if note:
        figure.text(0.02, 1 - 0.5 * top / whole[1], note, va="center", fontsize=7, color="0.35")
    return figure


def _mosaic(grid: np.ndarray) -> np.ndarray:
    """Images ``(rows, columns, height, width)`` side by side, with gaps between them."""
    height = grid.shape[2]
    gap = max(1, height // 12)
    grid = np.pad(grid, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    return grid.transpose(0, 2, 1, 3).reshape(len(grid) * (height + gap), -1)[:-gap, :-gap]


def _profiles(axes: Axes, grid: np.ndarray) -> None:
    """Data ``(rows, columns, D)`` as lines over their entries, one scale for all."""
    rows, columns, size = grid.shape
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    y = 0.1 + 0.8 * (grid - low) / ((high - low) or 1.0)
    x = np.linspace(0.1, 0.9, size) if size > 1 else np.array([0.5])
    lines = [np.stack([x + c, y[r, c] + rows - 1 - r], axis=1) for r in range(rows) for c in range(columns)]
    axes.add_collection(LineCollection(lines, colors=DARK, linewidths=1.0))
    if size <= 30:
        axes.plot(*np.concatenate(lines).T, linestyle="", marker=".", markersize=3, color=DARK)
    axes.set(xlim=(0, columns), ylim=(0, rows))


def _image_shape(run: Run, data_dim: int) -> tuple[int, int]:
    """Height and width of one datum: as recorded, or a square, or one row."""
    recorded = run.config.get("image_shape")
    if recorded and math.prod(recorded) == data_dim:
        return math.prod(recorded[:-1]), recorded[-1]
    side = math.isqrt(data_dim)
    return (side, side) if side * side == data_dim and side > 2 else (1, data_dim)


# --- benchmarks -------------------------------------------------------------------------------------------------


def nll_against_seconds(cells: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The NLL of training cells against what their training took: a panel a model, data and engine.

    Args:
        cells: of a benchmark's result file. Those of kind "training" count, with what a budget of steps (``"steps"``)
            and one of time (``"time"``) made of each seed: lists ``"nll"`` and ``"seconds"``.

    Returns: points of means over seeds with their standard errors, filled under the budget of steps, hollow under that
        of time, larger for larger K; those of one objective are joined in its order. None where there is no such cell.
    """
    found = [cell for cell in cells if cell.get("kind") == "training"]
    points: dict[str, dict[str, dict[str, list[tuple[int, list[float]]]]]] = {}
    for cell, budget in ((c, b) for c in found for b in ("steps", "time") if isinstance(c.get(b), Mapping)):
        nll, seconds = (_finite(cell[budget].get(name)) for name in ("nll", "seconds"))
        if not len(nll) or not len(seconds):
            continue
        mean = [float(np.mean(seconds)), float(np.mean(nll)), _error(nll)]
        panel = points.setdefault(_panel(cell), {}).setdefault(str(cell.get("objective")), {})
        panel.setdefault(budget, []).append((int(cell.get("num_particles") or 1), mean))
    if not points:
        return None
    figure, panels = _panels(len(points), columns=3, width=3.6, height=3.2)
    names = list(dict.fromkeys(name for series in points.values() for name in series))
    rows = [
        row for series in points.values() for budgets in series.values() for rows in budgets.values() for row in rows
    ]
    sizes = {k: 4.0 + 2.0 * i for i, k in enumerate(sorted({k for k, _ in rows}))}
    for axes, (title, series) in zip(panels, points.items(), strict=True):
        for name, budgets in series.items():
            style = _mark(names.index(name))
            for budget, rows in budgets.items():
                particles, means = zip(*sorted(rows), strict=True)
                axes.errorbar(*zip(*means, strict=True), **{**style, "marker": ""})
                filled = style["color"] if budget == "steps" else "white"
                for k, (x, y, _) in zip(particles, means, strict=True):
                    axes.plot(x, y, **{**style, "markersize": sizes[k], "markerfacecolor": filled})
        axes.set(xlabel="seconds of training", ylabel="NLL, nats per datum", xscale="log")
        axes.set_title(title, fontsize=9)
        _plain_ticks(axes.xaxis)
        axes.grid(color="0.9")
    handles = [Line2D([], [], label=name, **_mark(i)) for i, name in enumerate(names)]
    said = "filled: one number of steps; hollow: one time"
    said += f"\nsmall to large: K = {', '.join(map(str, sizes))}" if len(sizes) > 1 else ""
    _legend(figure, handles, len(panels), said)
    return figure


def signal_to_noise(cells: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The gradients' ratio of signal to noise against K: a panel a part (model, guide), stage of training and setting.

    Args:
        cells: of a benchmark's result file. Those of kind "gradients" count, with ``"stages"``: by stage and objective
            ``"num_particles"`` and, of the model's and the guide's gradients, ``"snr"``.

    Returns: lines of one family of objectives in the order of K. None where there is no such cell.
    """
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for cell in cells:
        if cell.get("kind") != "gradients":
            continue
        for part in ("guide", "model"):
            for stage, objectives in cell.get("stages", {}).items():
                for name, figures in objectives.items():
                    k = int(figures.get("num_particles") or 1)
                    snr = (figures.get(part) or {}).get("snr")
                    if snr and math.isfinite(snr):
                        panel = lines.setdefault(f"{part}, {stage}: {_panel(cell)}", {})
                        panel.setdefault(family(name, k), []).append((k, snr))
    if not lines:
        return None
    figure, panels = _panels(len(lines), columns=3, width=3.6, height=2.9)
    names = list(dict.fromkeys(name for series in lines.values() for name in series))
    for axes, (title, series) in zip(panels, lines.items(), strict=True):
        for name, points in series.items():
            axes.plot(*zip(*sorted(points), strict=True), **_mark(names.index(name)))
        axes.set(xlabel="K", ylabel="signal-to-noise", xscale="log", yscale="log")
        axes.set_title(title, fontsize=9)
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        axes.grid(color="0.9")
    handles = [Line2D([], [], label=name, **_mark(i)) for i, name in enumerate(names)]
    _legend(figure, handles, len(panels))
    return figure


def family(objective: str, num_particles: int) -> str:
    """An objective's name without its K: "iwae-5" and "iwae, K=5" are "iwae"."""
    return re.sub(rf"[-, (]*(K\s*=\s*)?\b{num_particles}\)?$", "", objective) or objective


def _panel(cell: Mapping[str, Any]) -> str:
    return ", ".join(str(cell[name]) for name in ("data", "model", "engine") if cell.get(name))


def _mark(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th of up to twenty-five series: the markers go on where the colours start anew."""
    round_, style = i // len(COLOURS), _stroke(i)
    return {**style, "marker": MARKERS[(i + round_) % len(MARKERS)], "markersize": 5, "linewidth": 1.1}


def _legend(figure: Figure, handles: list[Line2D], panels: int, title: str = "") -> None:
    """One legend for all panels, as wide as they are."""
    columns = min(len(handles), 3 * min(panels, 3))
    look = {"frameon": False, "fontsize": 8, "title_fontsize": 8}
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, title=title, **look)


def _plain_ticks(axis: Any) -> None:
    """A logarithmic axis in plain numbers, few enough to be read."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 500 * low else (1.0,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _finite(values: Any) -> np.ndarray:
    """The numbers of a list, or of one number, that are finite."""
    values = np.ravel(np.array(values if values is not None else [], float))
    return values[np.isfinite(values)]


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
