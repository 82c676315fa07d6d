"""Write ``docs/benchmarks.md`` and its pictures from the committed result files: nothing there is typed by hand.

python benchmarks/tables.py
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elbozoo.benchmarks import discrete as discrete_script
from elbozoo.benchmarks import hierarchy as hierarchy_script
from elbozoo.benchmarks import papers
from elbozoo.benchmarks.estimators import objectives as estimator_objectives
from elbozoo.benchmarks.estimators import slopes as estimator_slopes
from elbozoo.benchmarks.guides import FAMILIES, LOCAL, ORDER, amortisation, gap, interval
from elbozoo.benchmarks.iwae_mnist import PUBLISHED
from elbozoo.benchmarks.semi_supervised import published
from elbozoo.inference.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent
RESULTS, PAGE = ROOT / "results", ROOT.parent / "docs" / "benchmarks.md"
FIGURES = PAGE.parent / "figures"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows]])


def _setting(record: dict[str, Any]) -> str:
    found = [record["machine"], *(c["machine"] for c in record["cells"].values() if "machine" in c)]
    places = [", ".join(filter(None, (m.get("accelerator"), m["cpu"], f"{m['cores']} cores"))) for m in found]
    where = "; some cells: ".join(dict.fromkeys(places))
    return f"{where}; " + ", ".join(f"{k} {v}" for k, v in sorted(record["versions"].items()))


def _checks(record: dict[str, Any]) -> str:
    return "\n".join(
        f"- {'holds' if good else '**does not hold**'}: {claim}" for claim, good in record.get("checks", {}).items()
    )


def iwae(record: dict[str, Any]) -> str:
    """Burda et al.'s first table at our budget."""
    rows = []
    for cell in record["cells"].values():
        published = PUBLISHED.get(cell["objective"])
        rows.append(
            [
                cell["objective"],
                str(cell["seed"]),
                str(cell["epochs"]),
                f"{cell['share_of_protocol']:.2%}",
                f"{cell['train_seconds']:.0f}",
                f"{cell['nll']:.2f} ± {cell['nll_se']:.2f}",
                f"{cell['num_particles']}, {cell['num_data']}",
                f"{cell['elbo']:.2f}",
                str(cell["total_active_units"]),
                "" if published is None else f"{published[0]} ({published[1]})",
            ]
        )
    head = [
        "objective-K",
        "seed",
        "epochs",
        "share of the protocol",
        "training s",
        "NLL ± s.e.",
        "K, test images",
        "ELBO",
        "active units",
        "published after 3280 epochs: NLL (active)",
    ]
    return table(head, rows)


def _span(ratio: dict[str, float | None], low: str, high: str) -> str:
    return "too few rounds" if ratio[low] is None else f"{ratio[low]:.3f} – {ratio[high]:.3f}"


def overhead(record: dict[str, Any]) -> str:
    """Ratios of epoch times."""
    rows = [
        [key, name, f"{r['median']:.3f}", *(_span(r, *ends) for ends in (("low", "high"), ("min", "max")))]
        for key, c in record["cells"].items()
        for name, r in c["ratios"].items()
    ]
    images = [
        [
            key,
            *(
                f"{c['images_per_second'][n]:.0f}" if n in c["images_per_second"] else ""
                for n in ("numpyro", "hand-written JAX", "pyro", "hand-written PyTorch", "pythae")
            ),
        ]
        for key, c in record["cells"].items()
        if "images_per_second" in c
    ]
    return (
        table(["", "time of", "median ratio", "95% interval of it", "range over rounds"], rows)
        + "\n\nImages a second (medians; this machine is shared, so the ratios above are what counts):\n\n"
        + table(["", "fit, NumPyro", "hand-written JAX", "fit, Pyro", "hand-written PyTorch", "pythae"], images)
    )


# --- local minima ---------------------------------------------------------------------------------------------------

STARTS = {"normal": ("o", "0.0"), "collapsed": ("s", "0.45"), "informative": ("^", "0.7")}
"""Each start's marker and grey in the picture."""


def local_minima(record: dict[str, Any]) -> str:
    """The table of the cells, the picture, and what they say."""
    cells, config = record["cells"], record["config"]
    total = len(config["decoders"]) * len(config["starts"]) * len(config["objectives"])
    rows = [_minima_row(cell) for cell in cells.values()]
    head = ["decoder", "start", "objective", "seeds collapsed", "NLL, mean of seeds (best – worst)"]
    head += ["worse than the cell's best", "minima", "rate", "active units", "live at the end", "back from collapse"]
    any_cell = next(iter(cells.values()))
    setting = (
        f"{len(cells)} of {total} cells, {len(any_cell['seeds'])} seeds each: {config['num_train']} images of 14×14 "
        f"pixels, {config['epochs']} epochs ({any_cell['share_of_long_protocol']:.1%} of the longer protocol's images "
        f"seen), {config['latent_dim']} latents; NLL with K = {any_cell['num_particles']} on {any_cell['num_data']} "
        f"held-out images, whose choice has a standard error of {np.mean(any_cell['nll_se']):.2f} nats that all cells "
        f"share. A seed is worse when it is so by {any_cell['tolerance']:g} nats and two standard errors of the paired "
        "difference."
    )
    picture = "![NLL of every seed above its decoder's best, by objective and start](figures/local_minima.svg)"
    return "\n\n".join([setting, table(head, rows), picture, *_minima_words(cells)])


def _minima_row(cell: Mapping[str, Any]) -> list[str]:
    nll, count = cell["nll"], len(cell["seeds"])
    back = [epoch for epoch in cell["recovery_epoch"] if epoch is not None]
    return [
        cell["decoder"],
        cell["start"],
        cell["objective"],
        f"{sum(cell['collapsed'])} of {count}",
        f"{np.mean(nll):.2f} ({min(nll):.2f} – {max(nll):.2f})",
        str(sum(cell["worse"])),
        str(cell["num_minima"]),
        f"{np.mean(cell['rate']):.2f}",
        f"{np.mean(cell['active_units']):.1f}",
        f"{np.mean(cell['live_at_end']):.1f}",
        f"{len(back)}, by epoch {max(back)}" if back else "–",
    ]


def _minima_words(cells: Mapping[str, dict[str, Any]]) -> list[str]:
    """What the cells say of the received wisdom, for each decoder: a paragraph of counts and one of differences."""
    said = []
    for decoder in ("strong", "weak"):
        if mine := {key: cell for key, cell in cells.items() if cell["decoder"] == decoder}:
            said += [f"**The {decoder} decoder.** {_counts(mine)}", _differences(cells, decoder)]
    return [text for text in said if text]


def _counts(cells: Mapping[str, dict[str, Any]]) -> str:
    """How many runs of one decoder's cells collapsed, came back and ended worse, and what is left of the starts."""
    seeds = sum(len(c["seeds"]) for c in cells.values())
    dead = [
        f"{sum(c['collapsed'])} of {c['objective']} from the {c['start']} start"
        for c in cells.values()
        if any(c["collapsed"])
    ]
    words = [f"{sum(sum(c['collapsed']) for c in cells.values())} of {seeds} runs end with the whole latent collapsed"]
    words[0] += f": {'; '.join(dead)}." if dead else ", whatever its start and objective."
    for start in ("collapsed", "informative"):
        started = [c for c in cells.values() if c["start"] == start]
        if started:
            rate, live = (np.concatenate([c[f"{name}_in_phase"] for c in started]).mean() for name in ("rate", "live"))
            words.append(
                f"The {start} start's phase ends at a rate of {rate:.3g} nats, with {live:.1f} live dimensions; "
                f"{_idle(started)}."
            )
    kept = [
        f"{np.mean(c['rate']):.2f} nats from the {c['start']} start" for c in cells.values() if c["objective"] == "elbo"
    ]
    if len(kept) > 1:
        words.append(f"The plain ELBO ends at a rate of {', '.join(kept)}.")
    rates, nlls = ([float(np.mean(c[name])) for c in cells.values()] for name in ("rate", "nll"))
    words.append(
        f"From cell to cell the mean rate goes from {min(rates):.2f} to {max(rates):.2f} nats, the mean NLL from "
        f"{min(nlls):.2f} to {max(nlls):.2f}."
    )
    moving = max(abs(c["rate_by_epoch"][-1] - c["rate_by_epoch"][-2]) for c in cells.values())
    words.append(
        f"Training is not quite over: in the last epoch the mean rate still moves by up to {moving:.2f} nats, so seeds "
        "that are told apart may be slow ones rather than stuck ones."
    )
    spread = max(max(c["nll"]) - min(c["nll"]) for c in cells.values())
    worse = sum(sum(c["worse"]) for c in cells.values())
    words.append(
        f"Within a cell the seeds' NLLs lie at most {spread:.2f} nats apart, and {worse} of {seeds} runs are worse "
        "than their cell's best by more than the tolerance."
    )
    return " ".join(words)


def _idle(cells: list[dict[str, Any]]) -> str:
    """How long runs from such a start go without a live dimension."""
    count, back = sum(len(c["seeds"]) for c in cells), sum(e is not None for c in cells for e in c["recovery_epoch"])
    idle = back + sum(sum(c["collapsed"]) for c in cells)
    if not idle:
        return f"all {count} runs then have live dimensions from the first epoch on"
    return f"{idle} of {count} runs then go an epoch or more without a live dimension, and {back} of them recover"


def _differences(cells: Mapping[str, dict[str, Any]], decoder: str) -> str:
    """Mean NLLs of one decoder's cells against each other's."""
    from elbozoo.benchmarks.local_minima import REMEDIES, gap

    words = []
    for start in ("collapsed", "informative"):
        stuck = gap(cells, (decoder, start, "elbo"), (decoder, "normal", "elbo"))
        if stuck:
            words.append(
                f"From the {start} start the plain ELBO ends {_against(stuck)} where it ends from the normal one."
            )
    for start in ("normal", "collapsed", "informative"):
        gaps = {r: gap(cells, (decoder, start, r), (decoder, start, "elbo")) for r in REMEDIES}
        parts = [f"{r} ends {_against(g)} it" for r, g in gaps.items() if g]
        if parts:
            words.append(f"Against the plain ELBO, all from the {start} start: {'; '.join(parts)}.")
    mine = [c for c in cells.values() if c["decoder"] == decoder]
    best = min(mine, key=lambda c: np.mean(c["nll"]))
    words.append(
        f"The lowest mean NLL, {np.mean(best['nll']):.2f} nats, is that of {best['objective']} from the "
        f"{best['start']} start."
    )
    return " ".join(words)


def _against(gap: tuple[float, float]) -> str:
    """A difference of mean NLLs in words; within two standard errors of the choice of seeds it is none."""
    mean, error = gap
    if abs(mean) <= 2 * error:
        return f"no further than the seeds' error ({mean:+.2f} ± {error:.2f} nats) from"
    return f"{abs(mean):.2f} ± {error:.2f} nats {'above' if mean > 0 else 'below'}"


def local_minima_figure(record: dict[str, Any]) -> Figure:
    """Every seed's NLL above the best of its decoder's; filled markers are seeds that ended collapsed."""
    from matplotlib.figure import Figure

    cells = record["cells"]
    names = [n for n in ("strong", "weak") if any(c["decoder"] == n for c in cells.values())]
    figure = Figure(figsize=(9, 3.4 * len(names)), layout="constrained")
    for axes, decoder in zip(np.ravel(figure.subplots(len(names), 1)), names, strict=True):
        mine = [c for c in cells.values() if c["decoder"] == decoder]
        floor = min(min(c["nll"]) for c in mine)
        objectives = list(dict.fromkeys(c["objective"] for c in mine))
        for cell in mine:
            order = list(STARTS).index(cell["start"])
            marker, grey = STARTS[cell["start"]]
            centre = objectives.index(cell["objective"]) + 0.27 * (order - 1)
            above = np.array(cell["nll"]) - floor
            place = centre + np.linspace(-0.09, 0.09, len(above))
            dead = np.array(cell["collapsed"])
            style = {"marker": marker, "edgecolors": grey, "s": 22, "linewidths": 0.9}
            axes.scatter(place[~dead], above[~dead], facecolors="none", **style)
            axes.scatter(place[dead], above[dead], facecolors=grey, **style)
            axes.plot([centre - 0.12, centre + 0.12], [above.mean()] * 2, color="0.0", linewidth=1.6)
            label = f"{dead.sum()}/{len(dead)}"
            axes.annotate(label, (centre, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=7.5)
        axes.set_xticks(range(len(objectives)), objectives)
        axes.set_ylim(0, None)
        axes.set_ylabel("NLL above the best seed, nats")
        axes.set_title(f"{decoder} decoder (above each column: seeds that end collapsed)", fontsize=10, pad=16)
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        figure.axes[0].scatter([], [], marker=m, facecolors="none", edgecolors=g, s=22, label=f"{n} start")
        for n, (m, g) in STARTS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


# --- hierarchies ----------------------------------------------------------------------------------------------------


def hierarchy(record: dict[str, Any]) -> str:
    """NLL and nats of each layer by depth, guide and objective."""
    cells, config = record["cells"], record["config"]
    order = hierarchy_script.Config.objectives
    ordered = sorted(cells.values(), key=lambda c: (c["layers"], c["guide"], order.index(c["objective"])))
    any_cell = next(iter(hierarchy_script.ended(cells).values()))
    setting = (
        f"{len(cells)} of {len(hierarchy_script.grid(hierarchy_script.Config()))} cells, "
        f"{len(any_cell['nll'])} seeds each, {config['num_train']} images, {config['epochs']} epochs "
        f"({any_cell['share_of_protocol']:.2%} of the images that the paper's protocol sees); NLL with "
        f"K = {any_cell['num_particles']} on {any_cell['num_data']} held-out images, whose choice has a standard error "
        f"of {np.mean(any_cell['nll_se']):.2f} nats that all cells share. ± is the standard deviation over seeds; the "
        "gain on the same guide's plain ELBO is paired by seed, with its standard error. Nats are of z1 (next to the "
        "data) to zL; where a guide climbs, a layer's part given those it depends on is no KL and may be below 0. "
        f"A top layer is alive in a seed where it carries more than {hierarchy_script.DEAD} nats."
    )
    picture = "![Nats of each layer of five, by guide and objective](figures/hierarchy.svg)"
    head = ["L", "guide", "objective", "NLL", "gain on plain", "nats z1 … zL", "active units z1 … zL", "top alive"]
    return "\n\n".join([setting, table(head, [_hierarchy_row(cells, cell) for cell in ordered]), picture])


def _hierarchy_row(cells: Mapping[str, Any], cell: Mapping[str, Any]) -> list[str]:
    if "diverged" in cell:
        return [str(cell["layers"]), cell["guide"], cell["objective"], "diverged", "", "", "", ""]
    base = f"{cell['layers']}-{cell['guide']}"
    alive = hierarchy_script.tops_alive(cell)
    gain = (
        None
        if cell["objective"] == "plain"
        else hierarchy_script.gap(cells, f"{base}-plain", f"{base}-{cell['objective']}")
    )
    return [
        str(cell["layers"]),
        "(one)" if cell["layers"] == 1 else cell["guide"],
        cell["objective"],
        f"{np.mean(cell['nll']):.2f} ± {np.std(cell['nll'], ddof=1):.2f}",
        "" if gain is None else f"{gain[0]:.2f} ± {gain[1]:.2f}",
        ", ".join(f"{n:.2f}" for n in np.mean(cell["nats"], axis=0)),
        ", ".join(f"{n:.1f}" for n in np.mean(cell["active"], axis=0)),
        f"{sum(alive)} of {len(alive)}",
    ]


def hierarchy_figure(record: dict[str, Any]) -> Figure:
    """Nats of each of the most layers that there are, one panel a guide, one line an objective."""
    from matplotlib.figure import Figure

    cells = list(hierarchy_script.ended(record["cells"]).values())
    deepest = max(cell["layers"] for cell in cells)
    guides = [g for g in ("bottom-up", "ladder") if any(c["guide"] == g and c["layers"] == deepest for c in cells)]
    names = zip(hierarchy_script.Config.objectives, "osD^v", strict=True)
    looks: dict[str, Any] = {name: {"label": name, "marker": m, "color": f"C{i}"} for i, (name, m) in enumerate(names)}
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes = figure.subplots(1, len(guides), sharey=True, squeeze=False)[0]
    for ax, guide in zip(axes, guides, strict=True):
        for cell in (c for c in cells if (c["guide"], c["layers"]) == (guide, deepest)):
            nats = np.clip(np.mean(cell["nats"], axis=0), 1e-3, None)
            ax.plot(range(1, deepest + 1), nats, **looks[cell["objective"]], linewidth=1, markersize=5)
        ax.set(title=guide, yscale="log", xticks=range(1, deepest + 1), ylim=(7e-4, None))
        ax.set_xticklabels([f"$z_{i}$" for i in range(1, deepest + 1)])
        ax.grid(alpha=0.3, linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("nats per datum (0.001 or less\nat the bottom)")
    entries = axes[-1].get_legend_handles_labels()
    figure.legend(*entries, loc="outside right upper", frameon=False, fontsize="small")
    return figure


# --- depth ----------------------------------------------------------------------------------------------------------


def estimators(record: dict[str, Any]) -> str:
    """Where each objective lands, what it costs and how noisy its gradient is; then the laws."""
    cells = list(record["cells"].values())
    parts, names = [], list(estimator_objectives(1, 1.0))
    for key in dict.fromkeys((c["data"], c["engine"], c["model"]) for c in cells):  # cells of one may be far apart
        here = [c for c in cells if (c["data"], c["engine"], c["model"]) == key]
        training = sorted((c for c in here if c["kind"] == "training"), key=lambda c: names.index(c["objective"]))
        trained = {c["objective"]: c for c in training}
        noise = next((c for c in here if c["kind"] == "gradients"), None)
        name = ", ".join(key)
        if trained:
            parts += [f"**{name}: training.** {_estimators_caption(record, trained)}", _landed(trained)]
        if noise is not None:
            said = f"{noise['num_draws']} gradients of one batch of {noise['batch_size']} at each state"
            parts += [f"**{name}: gradients.** {said}.", _noises(noise["stages"])]
    laws = [c for c in cells if c["kind"] == "laws"]
    if laws:
        rows = []
        for cell in laws:
            power = estimator_slopes(cell)
            k_hat = [f"{cell['k_hat'][of]:.2f}" for of in ("gap", "gradients")]
            rows.append([cell["data"], cell["engine"], *(f"{power[n]:.2f}" for n in power), *k_hat])
        head = ["data", "engine", *(f"{n}" for n in estimator_slopes(laws[0])), "k̂: gap", "k̂: gradients"]
        said = (
            "**Laws**: exponents in K, of IWAE's gap and of the gradients' signal-to-noise. They are laws of weights "
            "with a finite variance, and claimed where the median over data of Pareto k̂ is below 0.5, nowhere else."
        )
        parts += [said, table(head, rows)]
    return "\n\n".join(parts)


def _estimators_caption(record: dict[str, Any], trained: dict[str, Any]) -> str:
    config, one = record["config"], next(iter(trained.values()))
    return (
        f"{len(one['seeds'])} seeds; {one['steps']['steps'][0]} steps of {config['batch_size']}, and as many as fit"
        f" into {config['seconds']:g} s of one run (compilation aside; at most {config['most']:g} times as many). NLL"
        f" by importance sampling, K = {one['nll_particles']}, of {config['num_test']} held-out images; ± is half of"
        " the 95 % interval over the seeds, of the difference to the first row paired by seed."
    )


def _landed(trained: dict[str, Any]) -> str:
    """A row for each objective."""
    first = next(iter(trained.values()))
    rows = []
    for name, cell in trained.items():
        row = [
            name,
            str(cell["num_particles"]),
            f"{1e3 * cell['step_seconds']:.2f}",
            f"{cell['step_bytes'] / 1024:.0f}",
        ]
        for when in ("steps", "time"):
            landed = {n: np.array(v, float) for n, v in cell[when].items()}
            paired = landed["nll"] - np.array(first[when]["nll"], float)
            row += [_plus_minus(landed["nll"]), "" if cell is first else _plus_minus(paired)]
            row += [f"{landed['steps'].mean():.0f}"] if when == "time" else []
        ends = {n: np.array(v, float).mean() for n, v in cell["time"].items()}
        rows.append([*row, f"{ends['gap']:.2f}", f"{ends['rate']:.2f}", f"{ends['active_units']:.1f}"])
    head = ["objective", "K", "ms/step", "KiB/step", "NLL after the steps", "difference", "NLL after the time"]
    return table([*head, "difference", "steps", "log p - ELBO", "rate", "active units"], rows)


def _plus_minus(x: np.ndarray) -> str:
    mean, half = interval(x)
    return f"{mean:.2f} ± {half:.2f}"


def _noises(stages: dict[str, Any]) -> str:
    """A row for each objective: signal-to-noise, variance and bias, at each state."""
    rows = []
    for name in stages["end"]:
        row = [name, str(stages["end"][name]["num_particles"])]
        for part in ("guide", "model"):
            row.append(" / ".join(_short(stages[stage][name][part]["snr"]) for stage in stages))
        end = stages["end"][name]["guide"]
        row += [_short(end["variance"])]
        if "bias" in end:
            seen = end["bias"] is not None and end["bias"] > 2 * end["bias_resolution"]
            row.append(f"{end['bias']:.0%}" if seen else f"below {2 * end['bias_resolution']:.0%}")
        else:
            row.append("")
        rows.append(row)
    when = " / ".join(stages)
    head = ["objective", "K", f"SNR of the guide's, {when}", "SNR of the model's", "variance of the guide's, end"]
    return table([*head, "bias of the guide's, end"], rows)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def depth(record: dict[str, Any]) -> str:
    """Cost and gain of each depth, what the layers carry, and the differences."""
    from elbozoo.benchmarks.depth import fall

    cells, config = record["cells"], record["config"]
    found = [layers for layers in config["layers"] if f"recomputed-{layers}" in cells]
    head = ["layers", "compile: processor s (clock)", "compile, recomputing", "step: processor s (clock)"]
    head += ["step, recomputing", "memory, MiB", "memory, recomputing", "bits/dim ± s.e.", "rate, nats", "skipped"]
    rows = [_depth_row(cells[f"trained-{n}"], cells[f"recomputed-{n}"]) for n in found]
    first = cells[f"trained-{found[0]}"]
    setting = (
        f"{first['steps']} steps of {config['batch_size']} images each, {first['share_of_protocol']:.3%} of the images "
        f"of NVAE's training on MNIST; {config['width']} channels, {config['hidden']} inside the blocks, "
        f"{config['latent_channels']} latent ones; held out: {config['num_test']} images, one draw of each; one seed. "
        "Memory is what XLA says it sets aside for intermediate results."
    )
    falls = []
    for few, many in itertools.pairwise(found):
        mean, error = fall(cells, few, many)
        word = "falls" if mean > 2 * error else "rises" if mean < -2 * error else "does not move"
        falls.append(f"from {few} to {many} layers it {word} ({-mean:+.4f} ± {error:.4f}, paired over images)")
    words = f"-ELBO in bits per dimension: {'; '.join(falls)}." if falls else ""
    grown = [
        f"from {depths.replace(' to ', ' layers to ')} it takes {times['median']:.2f} times as long"
        + (f" [{times['low']:.2f}, {times['high']:.2f}]" if times["low"] and times["high"] else "")
        for depths, times in cells["in turn"]["growth"].items()
    ]
    if grown:
        words += f" A step: {'; '.join(grown)} (medians of {config['turns']} turns and their 95% intervals)."
    picture = "![Nats of each layer, by depth, from the first to be drawn](figures/depth.svg)"
    return "\n\n".join(part for part in (setting, table(head, rows), words, picture) if part)


def _depth_row(cell: Mapping[str, Any], lean: Mapping[str, Any]) -> list[str]:
    def seconds(c: Mapping[str, Any], name: str, digits: int) -> str:
        return f"{c[f'{name}_processor_seconds']:.{digits}f} ({c[f'{name}_seconds']:.{digits}f})"

    rate = sum(sum(nats) for nats in cell["nats_by_layer"].values())
    return [
        str(cell["layers"]),
        seconds(cell, "compile", 0),
        seconds(lean, "compile", 0),
        seconds(cell, "step", 2),
        seconds(lean, "step", 2),
        *(f"{c['temporary_bytes'] / 2**20:.0f}" for c in (cell, lean)),
        f"{cell['bits_per_dim']:.3f} ± {cell['bits_per_dim_se']:.3f}",
        f"{rate:.1f}",
        f"{cell['skipped']:.1%}",
    ]


def depth_figure(record: dict[str, Any]) -> Figure:
    """The rate of every layer, in the order in which layers are drawn; a line where the resolution doubles."""
    from matplotlib.figure import Figure

    cells = [cell for key, cell in record["cells"].items() if key.startswith("trained-")]
    figure = Figure(figsize=(3.2 * len(cells), 2.8), layout="constrained")
    for axes, cell in zip(np.ravel(figure.subplots(1, len(cells), sharey=True)), cells, strict=True):
        end, nats = 0, cell["nats_by_layer"]
        for site, shape in cell["shapes"].items():
            place = 1 + end + np.arange(len(nats[site]))
            grey = "0.25" if site == "z1" else "0.65"
            axes.bar(place, nats[site], color=grey, label=f"{site}: {shape[-2]}×{shape[-1]}")
            end += len(nats[site])
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_title(f"{cell['layers']} layers: {sum(map(sum, nats.values())):.1f} nats", fontsize=10)
        axes.set_xlabel("layer, as drawn")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("rate of the layer, nats")
    return figure


def write_figures() -> None:
    """Draw the pictures of the page."""
    import io

    import matplotlib

    for name, draw in FIGURE_WRITERS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            buffer = io.BytesIO()
            with matplotlib.rc_context({"svg.hashsalt": "elbozoo"}):  # equal figures make equal files
                draw(json.loads(path.read_text())).savefig(buffer, format="svg", metadata={"Date": None})
            write_atomically(FIGURES / f"{name}.svg", buffer.getvalue())


def instruments(record: dict[str, Any]) -> str:
    """Estimates of one likelihood side by side, NUTS beside the guide, and the cost."""
    cells = record["cells"]
    found, both, split, truth = (cells[n] for n in ("likelihood", "bracket", "gaps", "posterior"))

    def pm(x: dict[str, float]) -> str:
        return f"{x['mean']:.3f} ± {x['se']:.3f}"

    config, pairs = record["config"], found["paired"]
    annealed = f"AIS, {config['num_temperatures']} temperatures, {config['num_chains']} chains"
    rows = [
        ["ELBO", pm(found["elbo"]), ""],
        [
            f"IS, K = {config['num_particles']}",
            pm(found["importance"]),
            f"{pm(pairs['importance - elbo'])} above the ELBO",
        ],
        [annealed, pm(found["annealed"]), f"{pm(pairs['annealed - importance'])} above IS"],
        ["simulated data: forward AIS", pm(both["lower"]), ""],
        ["simulated data: backward AIS", pm(both["upper"]), f"{pm(both['gap'])} above forward"],
    ]
    gaps = [
        [name, f"{split[name]:.2f} ± {split[name + '_se']:.2f}"] for name in ("approximation", "amortisation", "richer")
    ]
    best = cells["optimised_posterior"]
    posterior = [
        [str(image), *one, *two]
        for image, one, two in zip(truth["images"], _against_nuts(truth), _against_nuts(best), strict=True)
    ]
    pair = ["k̂", "distance", "agree", "weighted: distance", "agree"]
    largest = ["largest distance", "weighted", "largest error of the mean", "weighted"]
    by_k_hat = [[name, *row] for name, cell in (("guide", truth), ("optimised", best)) for row in _by_k_hat(cell)]
    memory = [
        [f"K = {k}", f"{cells[f'memory-{k}']['bytes'] / 2**20:.0f} MiB", f"{cells[f'memory-{k}']['seconds']:.0f} s"]
        for k in config["many_particles"]
    ]
    cost, few = cells["cost"], cells[f"memory-{config['many_particles'][0]}"]["num_data"]
    nuts = truth["summary"]
    return "\n\n".join(
        [
            f"Means of log p(x) over {found['num_data']} images, with standard errors from the choice of images; "
            "differences are paired:",
            table(["", "nats per datum", "difference"], rows),
            f"The gap of {split['num_data']} images drawn at random ({split['log_lik_method']}). Richer is what a full "
            "covariance wins of the approximation gap:",
            table(["gap", "nats per datum"], gaps),
            f"NUTS converged on {nuts['nuts_converged']} of {nuts['num_data']} images (R-hat at most "
            f"{nuts['nuts_r_hat_max']:.3f}). Of {config['num_data']} images these are the ones of the lowest k̂, of the "
            "lowest from 0.7 on, and of the highest. Beside the guide, and beside full-covariance Gaussians optimised "
            "for each image by itself; as they are, and importance-weighted: as many draws as NUTS has, resampled from "
            f"{nuts['oversample']} times as many in proportion to their Pareto-smoothed weights, whose k̂ is given. The "
            "energy distance is a share of its largest possible value (within NUTS it is "
            f"{nuts['energy_floor_median']:.4f}); they agree at 0.02 or less, with R-hat across both at most 1.05. The "
            "mean's error is the largest over dimensions, in posterior standard deviations:",
            table(["", "k̂", "images", "agree", "weighted", *largest], by_k_hat),
            "Each image:",
            table(["test image", *pair, "optimised: k̂", *pair[1:]], posterior),
            f"`diagnose` on {cost['num_data']} images, compilation included: {cost['seconds']:.0f} s. Peak memory of "
            f"importance sampling on {few} images, above what the process had before:",
            table(["", "peak", "time"], memory),
        ]
    )


def _against_nuts(cell: Mapping[str, Any]) -> list[list[str]]:
    """For each image: k̂, the energy distance to NUTS and whether it agrees, plain and weighted."""
    words = {True: "yes", False: "no"}
    names = ("k_hat", "energy_distance", "agree", "weighted_energy_distance", "weighted_agree")
    return [
        [f"{k:.2f}", f"{plain:.4f}", words[agree], f"{weighted:.4f}", words[right]]
        for k, plain, agree, weighted, right in zip(*(cell[name] for name in names), strict=True)
    ]


def _by_k_hat(cell: Mapping[str, Any]) -> list[list[str]]:
    """How many images agree in each range of k̂, and the largest differences there."""
    k_hat, rows = np.array(cell["k_hat"]), []
    for name, where in (
        ("below 0.7", k_hat < 0.7),
        ("0.7 to 1", (k_hat >= 0.7) & (k_hat < 1.0)),
        ("1 and above", k_hat >= 1.0),
    ):
        if where.any():
            agree, distance, error = (
                [np.array(cell[prefix + what])[where] for prefix in ("", "weighted_")]
                for what in ("agree", "energy_distance", "mean_error")
            )
            counts = [str(a.sum()) for a in agree]
            rows.append([name, str(where.sum()), *counts, *_largest(distance, ".4f"), *_largest(error, ".2f")])
    return rows


def _largest(columns: list[np.ndarray], form: str) -> list[str]:
    return [format(column.max(), form) for column in columns]


def guides(record: dict[str, Any]) -> str:
    """The gap of each family, and of each pair that has an expected order."""
    cells = {key: cell for key, cell in record["cells"].items() if key.startswith("seed")}

    def pm(x: np.ndarray) -> str:
        return "{:.3f} ± {:.3f}".format(*interval(x))

    rows = [
        [family, pm(gap(cells, family)), pm(amortisation(cells, family)) if family in LOCAL else "not known; left in"]
        for family in FAMILIES
    ]
    pairs = [[f"{worse} – {better}", pm(gap(cells, worse) - gap(cells, better))] for worse, better in ORDER]
    first, exact = next(iter(cells.values())), record["cells"]["quadrature"]["log_lik"]
    config = record["config"]
    return "\n\n".join(
        [
            f"Means over {len(cells)} seeds of {config['num_data']} data each, with 95 % intervals from the seeds:",
            table(["guide family", "approximation gap", "amortisation, taken out"], rows),
            "Paired within seeds:",
            table(["loses more than", "by"], pairs),
            f"log p(x) of the first seed: {first['log_lik']:.4f} ± {first['mc_se']:.4f} by importance sampling "
            f"(K = {config['num_importance']}, largest k̂ {max(first['k_hat']):.2f}), {exact:.4f} by quadrature.",
        ]
    )


# --- discrete latents -----------------------------------------------------------------------------------------------


def discrete(record: dict[str, Any]) -> str:
    """NLL of each net under each estimator, the variance of their gradients, the three-layer net's first epochs."""
    cells, config = record["cells"], record["config"]
    nets = {key: cell for key, cell in cells.items() if "net" in cell}
    parts = []
    if nets:
        first = next(iter(nets.values()))
        head = ["estimator", "K in training", *(f"{net}: NLL ± s.e. (ELBO), seconds" for net in config["nets"])]
        by_name = {
            name: [list(discrete_script.by_seed(cells, net, name).values()) for net in config["nets"]]
            for name in config["estimators"]
        }
        rows = [
            [
                name,
                next(str(seeds[0]["training_particles"]) for seeds in found if seeds),
                *map(_discrete_cell, found),
            ]
            for name, found in by_name.items()
            if any(found)
        ]
        parts += [
            f"{config['num_train']} images, {config['epochs']} epochs in batches of {config['batch_size']} "
            f"({first['share_of_protocol']:.2%} of the images that the paper's protocol sees); NLL with "
            f"K = {first['num_particles']} on {first['num_data']} held-out images, which all cells share. Of "
            "several seeds, their mean and its standard error given these images; of one, the error of the choice of "
            f"images ({first['nll_se']:.2f} nats or thereabouts for every cell).",
            table(head, rows),
        ]
        if over := _discrete_differences(cells, config):
            parts.append(table(["linear net", "NLL higher by ± s.e., paired by seed"], over))
    if states := [cell for cell in cells.values() if "variance" in cell]:
        first = states[0]
        values = {name: [cell["variance"].get(name) for cell in states] for name in first["variance"]}
        rows = [[n, *("not run" if value is None else f"{value:.3g}" for value in v)] for n, v in values.items()]
        parts += [
            f"Variance of the gradient of the mean bound of one batch of {first['batch_size']}, summed over the "
            f"guide's parameters of the linear net after some epochs of VIMCO, from {first['num_gradients']} draws "
            "(unbiased estimators; one particle unless said otherwise; a learned baseline has had as many epochs):",
            table(["estimator", *(f"after {cell['epochs']} epochs" for cell in states)], rows),
        ]
    if "curve" in cells:
        found = cells["curve"]
        rows = [
            [str(i + 1), f"{ours:.1f}", f"{theirs:.1f}"]
            for i, (ours, theirs) in enumerate(zip(found["bound_by_epoch"], found["published"], strict=False))
        ]
        parts += [
            f"Three layers, VIMCO with K = 5, {found['images']} images, {found['seconds']:.0f} seconds:",
            table(["epoch", "training bound", "published"], rows),
        ]
    return "\n\n".join(parts)


def _discrete_cell(seeds: Sequence[Mapping[str, Any]]) -> str:
    if not seeds:
        return "not run"
    nll, elbo, seconds = ([cell[name] for cell in seeds] for name in ("nll", "elbo", "train_seconds"))
    error = seeds[0]["nll_se"] if len(seeds) == 1 else discrete_script.standard_error(nll)
    count = f"; {len(seeds)} seeds" if len(seeds) > 1 else ""
    return f"{np.mean(nll):.2f} ± {error:.2f} ({np.mean(elbo):.2f}), {np.mean(seconds):.0f}{count}"


def _discrete_differences(cells: Mapping[str, Any], config: Mapping[str, Any]) -> list[list[str]]:
    """Every two estimators of the linear net that have several seeds in common."""
    rows = []
    for one, other in itertools.combinations(config["estimators"], 2):
        higher = discrete_script.higher_nll(cells, "linear", one, other)
        if len(higher) > 1:
            error = discrete_script.standard_error(higher)
            rows.append([f"{one} than {other}", f"{np.mean(higher):.2f} ± {error:.2f} ({len(higher)} seeds)"])
    return rows


# --- clusters -------------------------------------------------------------------------------------------------------


def clusters(record: dict[str, Any]) -> str:
    """NLL and agreement of the clusters with the digits, by how clusters are summed over."""
    cells, config = record["cells"], record["config"]
    first = next(iter(cells.values()))
    setting = (
        f"{config['num_train']} images, {config['epochs']} epochs, {len(first['nll'])} seeds; NLL with "
        f"K = {first['num_particles']} on {first['num_data']} held-out images, whose choice has a standard error of "
        f"{np.mean(first['nll_se']):.2f} nats that all cells share; ± is the standard deviation over seeds."
    )
    head = ["clusters", "NLL", "ELBO", "accuracy", "clusters used", "seconds"]
    rows = [
        [
            name,
            f"{np.mean(cell['nll']):.2f} ± {np.std(cell['nll'], ddof=1):.2f}",
            f"{np.mean(cell['elbo']):.2f}",
            f"{np.mean(cell['accuracy']):.3f} ± {np.std(cell['accuracy'], ddof=1):.3f}",
            f"{np.mean(cell['clusters_used']):.1f} of {config['num_clusters']}",
            f"{cell['train_seconds']:.0f}",
        ]
        for name, cell in cells.items()
    ]
    return "\n\n".join([setting, table(head, rows)])


# --- codes ----------------------------------------------------------------------------------------------------------


def codes(record: dict[str, Any]) -> str:
    """Bits/dim, distortion, rate and usage of the codes, model by model."""
    cells, config = record["cells"], record["config"]
    any_cell = next(iter(cells.values()))
    setting = (
        f"{config['num_train']} images, {config['epochs']} epochs in batches of {config['batch_size']} "
        f"({any_cell['share_of_protocol']:.2%} of the images that the paper's protocol sees); {any_cell['num_data']} "
        f"held-out images; a budget of {config['num_latents']} indices of {config['num_codes']} codes is "
        f"{config['num_latents'] * np.log(config['num_codes']):.1f} nats; the continuous latent has "
        f"{config['num_latents']} entries."
    )
    head = ["model", "-ELBO, bits/dim ± s.e.", "distortion, nats", "rate, nats", "perplexity (codes used)", "seconds"]
    rows = [
        [
            name,
            f"{cell['bits_per_dim']:.3f} ± {cell['bits_per_dim_se']:.3f}" if "bits_per_dim" in cell else "no bound",
            f"{cell['distortion']:.1f}",
            f"{cell['rate']:.1f}" if "rate" in cell else "",
            ", ".join(f"{p:.1f} ({u})" for p, u in zip(cell["perplexity"], cell["used"], strict=True))
            if "used" in cell
            else "",
            f"{cell['train_seconds']:.0f}",
        ]
        for name, cell in cells.items()
    ]
    picture = "![Held-out images, their reconstructions, and samples from the priors](figures/codes.svg)"
    return "\n\n".join([setting, table(head, rows), picture])


def codes_figure(record: dict[str, Any]) -> Figure:
    """A row of images each: data, reconstructions, samples."""
    from matplotlib.figure import Figure

    from elbozoo.benchmarks.codes import unpacked

    cells = record["cells"]
    pixels = next(iter(cells.values()))["pixels"]
    wanted = [
        ("vq", "data"),
        *((name, "reconstruction") for name in ("autoencoder", "vq", "categorical", "continuous")),
    ]
    wanted += [(name, "sample") for name in ("vq", "vq, learned prior", "categorical", "continuous")]
    rows = [(name, what) for name, what in wanted if what in cells.get(name, {}).get("pictures", {})]
    figure = Figure(figsize=(7.5, 0.8 * len(rows)), layout="constrained")
    for ax, (name, what) in zip(np.ravel(figure.subplots(len(rows), 1, squeeze=False)), rows, strict=True):
        ax.imshow(np.hstack(list(unpacked(cells[name]["pictures"][what], pixels))), cmap="gray", vmin=0, vmax=255)
        label = "data" if what == "data" else f"{name}:\n{what}"
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize="small")
        ax.set(xticks=[], yticks=[])
    return figure


# --- few labels -----------------------------------------------------------------------------------------------------


def semi_supervised(record: dict[str, Any]) -> str:
    """Test accuracies beside the published ones."""
    rows = []
    for cell in record["cells"].values():
        known = published(cell["objective"], cell["labels"]) if record["config"]["data"] == "mnist" else None
        ended = "diverged" not in cell
        rows.append(
            [
                cell["objective"],
                str(cell["labels"]),
                str(cell["seed"]),
                f"{cell['num_train']}, {cell['epochs']}",
                f"{cell['train_seconds']:.0f}" if ended else "",
                ", ".join(f"{found:.2f}" for found in cell["accuracy_by_stage"].values()),
                f"{cell['accuracy']:.3f} ± {cell['accuracy_se']:.3f}" if ended else f"diverged {cell['diverged']}",
                "" if known is None else f"{known:.3f}",
            ]
        )
    head = ["objective", "labels", "seed", "images, epochs", "training s", "on the way", "test accuracy ± s.e."]
    return table([*head, "published"], rows)


# --- remedies -------------------------------------------------------------------------------------------------------


def remedies(record: dict[str, Any]) -> str:
    """Bits/dim model by model, a data set at a time."""
    cells, config = in_order(record), record["config"]
    setting = (
        f"{config['num_train']} images, batches of {config['batch_size']}, {config['seconds']:.0f} s of training a "
        f"cell on one core; {cells[0]['num_data']} held-out images, K beside the figures; one seed."
    )
    head = [
        "data",
        "model",
        "parameters",
        "images seen",
        "s",
        "-ELBO, bits/dim ± s.e.",
        "NLL, bits/dim",
        "rate, nats",
        "distortion, nats",
    ]
    rows = [
        [
            cell["data"],
            cell["model"],
            f"{cell['parameters']:,}",
            f"{cell['images_seen']:,}",
            f"{cell['train_seconds']:.0f}",
            f"{cell['bits_per_dim']:.3f} ± {cell['bits_per_dim_se']:.3f}",
            f"{cell['nll_bits_per_dim']:.3f} (K = {cell['num_particles']})"
            if cell["nll_bits_per_dim"]
            else "no weights",
            f"{cell['rate']:.1f}",
            f"{cell['distortion']:.1f}",
        ]
        for cell in cells
    ]
    picture = "![Samples, and where the nats go: by layer or by piece of time](figures/remedies.svg)"
    return "\n\n".join([setting, table(head, rows), picture])


def in_order(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells by data and model, whenever they were run."""
    config = record["config"]
    rank = {(d, m): i for i, (d, m) in enumerate(itertools.product(config["data"], config["models"]))}
    return sorted(record["cells"].values(), key=lambda cell: rank.get((cell["data"], cell["model"]), len(rank)))


def remedies_figure(record: dict[str, Any]) -> Figure:
    """A row a cell: its samples, and its nats from next to the data upwards, by layer or by piece of time."""
    from matplotlib.figure import Figure

    from elbozoo.benchmarks.codes import unpacked

    cells = in_order(record)
    figure = Figure(figsize=(9.0, 0.95 * len(cells)), layout="constrained")
    axes = figure.subplots(len(cells), 2, squeeze=False, width_ratios=(2.2, 1))
    for (left, right), cell in zip(axes, cells, strict=True):
        left.imshow(np.hstack(list(unpacked(cell["samples"], cell["pixels"]))), cmap="gray", vmin=0, vmax=255)
        left.set_ylabel(f"{cell['data']}:\n{cell['model']}", rotation=0, ha="right", va="center", fontsize="small")
        left.set(xticks=[], yticks=[])
        nats = np.asarray(cell["nats"])
        right.bar(np.arange(len(nats)), nats, width=0.9, color="C1" if "diffusion" in cell["model"] else "C0")
        right.set(xticks=[])
        right.tick_params(labelsize="x-small")
    axes[0, 0].set_title("samples", fontsize="small")
    axes[0, 1].set_title("nats, from the data up\nblue: layers; orange: time", fontsize="x-small")
    return figure


# --- published tables -----------------------------------------------------------------------------------------------


def published_tables() -> str:
    """Every published figure that a script reaches for, with ours and its budget, or that it was not run."""
    parts = ["## Published tables", "Ours are of the result files below; a share of the budget goes with each."]
    for paper in papers.PAPERS:
        rows = papers.rows(paper)
        parts += [
            f"### {papers.title(paper)}",
            f"{paper.protocol[0].upper()}{paper.protocol[1:]}. {paper.differs}".strip(),
        ]
        parts += [f"The whole protocol: `{paper.command}`.", table(list(papers.HEAD), rows)]
    return "\n\n".join(parts)


# --- scaling --------------------------------------------------------------------------------------------------------

LINES = {
    "numpyro": ("o", "-", "0.0"),
    "hand-written JAX": ("o", ":", "0.5"),
    "NumPyro's own": ("s", "--", "0.5"),
    "pyro": ("^", "-", "0.0"),
    "hand-written PyTorch": ("^", ":", "0.5"),
    "Pyro's own": ("D", "--", "0.5"),
    "pythae": ("x", "-.", "0.3"),
    "as many runs": ("s", "--", "0.5"),
}
"""Each contender's marker, line and grey in the picture."""


def scaling(record: dict[str, Any]) -> str:
    """Slopes, turning points and times per axis and contender; the ratios of paired times; bytes."""
    from elbozoo.benchmarks.scaling import curves, slopes

    cells, config = record["cells"], record["config"]
    times, rows = curves(cells), []
    for axis, named in slopes(cells).items():
        for name, found in named.items():
            values, seconds = times[axis][name]
            turn = found["turning_point"]
            slope = "" if found["slope"] is None else f"{found['slope']:.2f}"
            local = " ".join(f"{s:.2f}" for s in found["local"])
            ends = f"{1e3 * seconds[0]:.3g} ({values[0]}) – {1e3 * seconds[-1]:.3g} ({values[-1]})"
            rows.append([axis, name, slope, local, "not linear yet" if turn is None else str(turn), ends])
    head = ["varied", "loop", "slope", "local slopes", "linear from", "ms a step at the first and last value"]
    setting = (
        f"At the base point {config['latent_dim']} latents, batch {config['batch_size']}, K = 1. Slopes are of "
        "logarithms; a time is the median over turns. A loop that was too slow, or is not there, has no row or fewer "
        "values."
    )
    picture = "![Time of a step against K and against replicates](figures/scaling.svg)"
    ratios, sizes = _scaling_ratios(cells), _scaling_bytes(cells)
    said = "Paired times, the median over turns, by the value of what is varied:"
    kept = "What a step keeps beside weights and data (of replicates: the temporaries of the whole loop; of data: "
    kept += "those on the device), MB at the first and last value, and the slope:"
    return "\n\n".join([setting, table(head, rows), picture, said, ratios, kept, sizes])


def _scaling_ratios(cells: Mapping[str, Any]) -> str:
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for cell in cells.values():
        for name, r in cell["ratios"].items():
            found.setdefault((cell["axis"], name), []).append((cell["value"], r["median"]))
    rows = [[*key, ", ".join(f"{r:.2f} ({v})" for v, r in sorted(pairs))] for key, pairs in found.items()]
    return table(["varied", "time of", "ratio (value)"], rows)


def _scaling_bytes(cells: Mapping[str, Any]) -> str:
    from elbozoo.benchmarks.scaling import curves, slope

    rows = []
    for axis, named in curves(cells, "bytes").items():
        for name, (values, sizes) in named.items():
            power = slope(values, sizes)
            ends = f"{sizes[0] / 1e6:.3g} ({values[0]}) – {sizes[-1] / 1e6:.3g} ({values[-1]})"
            rows.append([axis, name, ends, "" if power is None else f"{power:.2f}"])
    return table(["varied", "loop", "MB", "slope"], rows)


def scaling_figure(record: dict[str, Any]) -> Figure:
    """Time of a step against K and against replicates, both logarithmic; turning points ringed."""
    from matplotlib.figure import Figure

    from elbozoo.benchmarks.scaling import curves, turning_point

    found = curves(record["cells"])
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    for ax, axis in zip(figure.subplots(1, 2), ("particles", "replicates"), strict=True):
        for name, (values, seconds) in found.get(axis, {}).items():
            marker, line, grey = LINES[name]
            milliseconds = 1e3 * np.asarray(seconds)
            ax.plot(values, milliseconds, marker=marker, linestyle=line, color=grey, markersize=4, label=name)
            if (turn := turning_point(values, seconds)) is not None:
                ax.plot(turn, milliseconds[values.index(turn)], "o", markersize=11, markerfacecolor="none", color=grey)
        ax.set(xscale="log", yscale="log", xlabel="K" if axis == "particles" else axis, ylabel="ms a step")
        if axis in found:
            ax.legend(fontsize="x-small", frameon=False)
    figure.suptitle("ring: from here on linear", fontsize="small")
    return figure


FIGURE_WRITERS = {
    "codes": codes_figure,
    "depth": depth_figure,
    "hierarchy": hierarchy_figure,
    "local_minima": local_minima_figure,
    "remedies": remedies_figure,
    "scaling": scaling_figure,
}
WRITERS = {
    "clusters": clusters,
    "codes": codes,
    "depth": depth,
    "discrete": discrete,
    "estimators": estimators,
    "guides": guides,
    "hierarchy": hierarchy,
    "instruments": instruments,
    "iwae_mnist": iwae,
    "local_minima": local_minima,
    "overhead": overhead,
    "remedies": remedies,
    "scaling": scaling,
    "semi_supervised": semi_supervised,
}


def page() -> str:
    """The whole page."""
    parts = [
        "# Benchmarks",
        "Generated by `python benchmarks/tables.py` from `benchmarks/results/*.json`. Nats per datum unless said"
        " otherwise.",
        published_tables(),
    ]
    files = [(RESULTS / f"{name}{more}.json", name, more) for name in WRITERS for more in ("", papers.LONGER)]
    for path, name, more in files:
        if not path.exists():
            continue
        record, writer = json.loads(path.read_text()), WRITERS[name]
        parts += [
            f"## `benchmarks/{name}.py`{', longer' if more else ''}",
            record["question"],
            writer(record),
            _checks(record),
            record.get("note", ""),
            f"*{_setting(record)}*",
        ]
    return "\n\n".join(p for p in parts if p) + "\n"


if __name__ == "__main__":
    write_figures()
    write_atomically(PAGE, page().encode())
