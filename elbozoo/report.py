"""Figures and one offline HTML page about trained runs: what they cost, what they learned, how they differ.

``runs`` and ``evaluations`` are dicts with the same labels. Every figure is in nats per datum.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from elbozoo._version import __version__
from elbozoo.inference import Evaluation, Run
from elbozoo.inference.evaluation import ACTIVE
from elbozoo.inference.storage import write_atomically
from elbozoo.options import describe

Runs = Mapping[str, Run]
Evaluations = Mapping[str, Evaluation]

# Told apart by line and by lightness, so that print and every eye can follow; colours after Okabe & Ito.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#e69f00", "#009e73")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


# --- the table --------------------------------------------------------------------------------------------------


def results(runs: Runs, evaluations: Evaluations, paired: bool) -> list[dict[str, str]]:
    """The table of runs, one dict of printable cells a run.

    Args:
        runs: by label.
        evaluations: by the same labels.
        paired: whether all were evaluated on the same data, so that their NLLs may be subtracted datum by datum.
    """
    first = next(iter(evaluations.values()))
    rows = []
    for label, run in runs.items():
        found = evaluations[label]
        row = {"run": label, "NLL ± s.e.": f"{found.nll:.2f} ± {found.nll_se:.2f}"}
        if paired and len(runs) > 1:
            row["less the first's"] = "" if found is first else _difference(found, first)
        units = sum(len(a) for a in found.activity.values())
        row |= {"ELBO": f"{found.elbo:.2f}", "rate": f"{found.rate:.2f}", "distortion": f"{found.distortion:.2f}"}
        row["active units"] = "" if found.total_active_units is None else f"{found.total_active_units}/{units}"
        row["seconds"] = f"{sum(r['seconds'] for r in run.history):.1f}"
        rows.append(row)
    return rows


def _difference(a: Evaluation, b: Evaluation) -> str:
    """The mean difference of two NLLs with its standard error from the choice of data."""
    gap = b.per_datum.log_lik_estimate - a.per_datum.log_lik_estimate
    return f"{gap.mean():+.2f} ± {gap.std(ddof=1) / math.sqrt(len(gap)) if len(gap) > 1 else math.nan:.2f}"


def caption(evaluations: Evaluations, paired: bool) -> str:
    """What the table's numbers are."""
    data = " or ".join(str(n) for n in sorted({e.num_data for e in evaluations.values()}))
    particles = " or ".join(str(k) for k in sorted({e.num_particles for e in evaluations.values()}))
    text = (
        f"Nats per datum over {data} data. NLL with K = {particles} importance samples, s.e. from the choice of data. "
    )
    if not paired:
        text += "The runs were not measured on one and the same data: their NLLs do not compare. "
    elif len(evaluations) > 1:
        text += "Less the first's: the NLLs subtracted datum by datum. "
    return text + "Seconds of training."


# --- the figures ------------------------------------------------------------------------------------------------


def curves(runs: Runs) -> Figure:
    """The bound, the rate and the distortion over epochs, and the held-out bound where there is one."""
    titles = {"bound": "bound", "valid_bound": "held-out bound", "rate": "rate", "distortion": "distortion"}
    shown = [name for name in titles if any(name in run.history[-1] for run in runs.values())]
    figure = Figure(figsize=(3.2 * len(shown), 3.1), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        settled = []
        for i, (label, run) in enumerate(runs.items()):
            rows = [(row["epoch"], row[name]) for row in run.history if name in row]
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
            axes.plot(*zip(*rows, strict=True), linewidth=1.6, label=label, **style)
            settled += [value for _, value in rows[len(rows) // 10 :]]
        low, high = min(settled), max(settled)  # the first epochs would flatten everything after them
        margin = 0.05 * (high - low) or 1.0
        axes.set(title=titles[name], xlabel="epoch", ylim=(low - margin, high + margin))
        axes.set_ylabel("nats per datum" if name == shown[0] else "")
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False
        )
    return figure


def kl_per_dimension(evaluations: Evaluations) -> Figure:
    """The rate of every latent dimension, largest first; hollow bars are dimensions that are not active.

    Dimensions of a site whose guide or prior does not factorise have no rates of their own and are left out.
    """
    columns = min(4, len(evaluations))
    rows = math.ceil(len(evaluations) / columns)
    figure = Figure(figsize=(max(3.2 * columns, 5), 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes, (label, found) in zip(panels, evaluations.items(), strict=False):
        rate = np.concatenate([np.ravel(r) for r in found.rate_per_dimension.values()] or [np.zeros(0)])
        activity = [found.activity.get(site, np.full(len(r), np.inf)) for site, r in found.rate_per_dimension.items()]
        active = np.concatenate([np.ravel(a) for a in activity] or [np.zeros(0)]) > ACTIVE
        order = np.argsort(-rate)
        colour = np.where(active[order], "0.25", "1.0").tolist()
        axes.bar(np.arange(1, len(rate) + 1), rate[order], color=colour, edgecolor="0.25", linewidth=0.6)
        axes.set(title=label, xlabel="latent dimension, by rate")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if not len(rate):
            axes.text(0.5, 0.5, "does not factorise", ha="center", transform=axes.transAxes)
            axes.set_xticks([])
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(panels):
        axes.set_visible(False)
    figure.axes[0].set_ylabel("rate, nats")
    return figure


def samples(run: Run, rows: int = 6, columns: int = 6, seed: int = 0) -> Figure:
    """Means of the data that draws from the prior decode to."""
    count = rows * columns
    shape = (np.zeros((count, run.program.spec.data_dim), run.program.float_dtype),)
    return _tiles(run, _mean(run.program.predict(shape, seed=seed, prior=True))[0], columns)


def reconstructions(run: Run, data: Any, columns: int = 8, seed: int = 0) -> Figure:
    """Data above the mean of what they decode to, over draws of the guide.

    Args:
        run: the run.
        data: data as they were before binarisation; the first ``columns`` are shown, as the model sees them.
        columns: how many.
        seed: of the draws.
    """
    x = run.prepare(data[:columns])
    decoded = _mean(run.program.predict(x, num_particles=20, seed=seed)).mean(axis=0)
    given = [np.reshape(data[:columns], x[0].shape)] if run.config["binarize"] != "none" else []
    return _tiles(run, np.concatenate([*given, x[0], decoded]), len(x[0]))


def _mean(draws: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
    """The first observed site's mean (K, B, D), or its draws where its distribution has none."""
    site = next(iter(draws["observed"]))
    return draws["mean"].get(site, draws["observed"][site])


def _tiles(run: Run, images: np.ndarray, columns: int) -> Figure:
    """Images in a grid, one ink for all: white is the smallest value, black the largest."""
    height, width = _image_shape(run, images.shape[-1])
    grid = images.reshape(-1, columns, height, width)
    gap = max(1, height // 12)
    grid = np.pad(grid, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    picture = grid.transpose(0, 2, 1, 3).reshape(len(grid) * (height + gap), columns * (width + gap))[:-gap, :-gap]
    figure = Figure(figsize=(3.2, 3.2 * picture.shape[0] / picture.shape[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(picture, cmap="gray_r", interpolation="nearest", vmin=np.nanmin(images), vmax=np.nanmax(images))
    axes.set_axis_off()
    return figure


def _image_shape(run: Run, data_dim: int) -> tuple[int, int]:
    """Height and width of one datum: as recorded, or a square, or one row."""
    recorded = run.config.get("image_shape")
    if recorded:
        return math.prod(recorded[:-1]), recorded[-1]
    side = math.isqrt(data_dim)
    return (side, side) if side * side == data_dim else (1, data_dim)


# --- the page ---------------------------------------------------------------------------------------------------


def write_report(
    runs: Runs, evaluations: Evaluations, data: Mapping[str, Any], path: str | Path, *, paired: bool = True
) -> Path:
    """One self-contained HTML page: table, curves, rates, samples, reconstructions, settings, versions.

    Args:
        runs: by label.
        evaluations: by the same labels.
        data: by the same labels, data to reconstruct, as they were before binarisation.
        path: the file; written whole or not at all.
        paired: see :func:`results`.

    Raises: WriteFailed.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("elbozoo").joinpath("report.html.j2").read_text("utf-8"))
    html = template.render(
        title=", ".join(runs),
        version=__version__,
        rows=results(runs, evaluations, paired),
        caption=caption(evaluations, paired),
        objectives={label: describe(run.objective) for label, run in runs.items()},
        curves=as_uri(curves(runs), "svg"),
        kl=as_uri(kl_per_dimension(evaluations), "svg"),
        samples={label: as_uri(samples(run), "png") for label, run in runs.items()},
        reconstructions={label: as_uri(reconstructions(run, data[label]), "png") for label, run in runs.items()},
        binarized=any(run.config["binarize"] != "none" for run in runs.values()),
        configs={label: json.dumps(run.config, indent=2) for label, run in runs.items()},
    )
    write_atomically(Path(path), html.encode())
    return Path(path)


def as_uri(figure: Figure, kind: str) -> str:
    """A figure as a data URI, so that the page needs no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    mime = "image/svg+xml" if kind == "svg" else "image/png"
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"
