"""Pictures of a guide's calibration, readable in grey."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from elbozoo.inference import Calibration


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
