"""What is published, beside what we got: every table that our benchmarks reach for, with its protocol and our budget.

A published figure is entered here once (or imported from the script that reaches for it); ours are read from the
committed result files, never typed. Where there is no cell the row says so.

    python benchmarks/papers.py
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elbozoo.bench_report import number, with_error
from elbozoo.benchmarks import discrete, hierarchy, iwae_mnist, semi_supervised
from elbozoo.inference.errors import CorruptFile, must

RESULTS = Path(__file__).resolve().parent / "results"

LONGER = "_longer"
"""Ends the name of a script's second result file, of fewer cells trained for longer."""

HEAD = ("figure", "published", "ours ± s.e.", "K, data", "share of the budget", "where")
NOT_RUN = "not run"


@dataclass(frozen=True)
class Figure:
    """One published number.

    Args:
        what: the row and column of the published table, in words.
        published: the number as it is printed.
        cell: fields that the cell with ours has, as the script writes them.
        name: the figure in that cell; a list is one number a seed, unless ``index`` takes one of it.
        index: which number of a list that is no list over seeds.
    """

    what: str
    published: float | str
    cell: Mapping[str, Any]
    name: str = "nll"
    index: int | None = None


@dataclass(frozen=True)
class Paper:
    """A published table and how our script comes to it.

    Args:
        source: who and when.
        arxiv: the paper's number there.
        table: which of its tables, or where else the figures are.
        protocol: how the published figures were made.
        script: name of our script, and of its result files.
        config: the script's settings, a dataclass.
        full: settings under which the script follows the whole protocol.
        figures: the published numbers.
        differs: what our script does otherwise, or does not have.
        decimals: of the published figures.
        share: the share of the published budget that a cell has, from the cell; None where the source does not say.
    """

    source: str
    arxiv: str
    table: str
    protocol: str
    script: str
    config: type
    full: Mapping[str, Any]
    figures: Sequence[Figure]
    differs: str = ""
    decimals: int = 2
    share: Callable[[Mapping[str, Any]], float | None] = lambda cell: cell["share_of_protocol"]

    @property
    def arguments(self) -> list[str]:
        """The script's options under which it follows the whole protocol."""
        words = []
        for name, value in self.full.items():
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
        return words

    @property
    def command(self) -> str:
        """The command of the whole protocol; its result file is another than ours, which is of other settings."""
        results = f"runs/{self.script}_whole.json"
        return shlex.join(["python", f"benchmarks/{self.script}.py", *self.arguments, "--results", results])


# --- the tables -----------------------------------------------------------------------------------------------------

VAE_MORE = {"vae-5": (86.47, "20"), "vae-50": (86.35, "20"), "2-vae-5": (85.01, "17+5"), "2-vae-50": (84.78, "17+5")}
"""Burda et al.'s other cells: NLL and active units, as in ``iwae_mnist.PUBLISHED``."""

BOUNDS = {
    "score": ("REINFORCE", 164.0, 114.6),
    "nvil": ("NVIL", 113.1, 102.2),
    "concrete": ("Concrete", 107.3, 99.6),
    "rebar": ("REBAR", 107.7, 101.4),
    "arm": ("ARM", 107.2, 98.4),
}
"""Yin & Zhou's: by our name of the estimator theirs, and the linear and the nonlinear net's figure."""


def _burda() -> Iterator[Figure]:
    known = {**iwae_mnist.PUBLISHED, **VAE_MORE}
    for cell, (nll, active) in sorted(known.items(), key=lambda item: (item[0].startswith("2-"), "iwae" in item[0])):
        kind, k = cell.removeprefix("2-").split("-")
        what = f"{'two layers' if cell.startswith('2-') else 'one layer'}, {kind.upper()}, k = {k}"
        ours = {"objective": cell, "data": "mnist"}
        yield Figure(f"{what}: NLL", nll, ours)
        yield Figure(f"{what}: active units", active, ours, "total_active_units")


def _yin() -> Iterator[Figure]:
    for estimator, (name, *bounds) in BOUNDS.items():
        for net, bound in zip(("linear", "nonlinear"), bounds, strict=True):
            # theirs adapts its control variate, as does ours of the linear net
            ours = "rebar-adapted" if (estimator, net) == ("rebar", "linear") else estimator
            yield Figure(f"{name}, {net}: test bound", bound, {"net": net, "estimator": ours})


def _curve() -> Iterator[Figure]:
    cell = {"published": list(discrete.PUBLISHED_CURVE)}
    for i, bound in enumerate(discrete.PUBLISHED_CURVE):
        yield Figure(f"epoch {i + 1}: training bound", bound, cell, "bound_by_epoch", i)


def _pyro() -> Iterator[Figure]:
    for objective, accuracies in semi_supervised.PUBLISHED.items():
        for labels, accuracy in zip(semi_supervised.PUBLISHED_LABELS, accuracies, strict=True):
            what = f"{objective}, {labels} labels: test accuracy"
            yield Figure(what, accuracy, {"objective": objective, "labels": labels}, "accuracy")


PAPERS = (
    Paper(
        source="Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders",
        arxiv="1509.00519",
        table="table 1, MNIST",
        protocol="50 latents, or 100 and 50; Bernoulli pixels redrawn at every step; Adam in batches of 20, 3280 "
        "epochs at a falling rate; test NLL with K = 5000",
        script="iwae_mnist",
        config=iwae_mnist.Config,
        full={"stages": 8, "cells": (*iwae_mnist.PUBLISHED, *VAE_MORE)},
        figures=tuple(_burda()),
    ),
    Paper(
        source="Sønderby et al. (2016), Ladder variational autoencoders",
        arxiv="1602.02282",
        table="the authors' code, after 200 epochs",
        protocol="five layers of 64-32-16-8-4 latents and 512-256-128-64-32 units, leaky ReLU, batch normalisation; "
        "warm-up over 200 epochs, batches of 256, a rate of 2e-4, pixels redrawn; NLL with K = 100",
        script="hierarchy",
        config=hierarchy.Config,
        full={
            "layers": (5,),
            "guides": ("ladder",),
            "objectives": ("warm-up",),
            "num_train": 60_000,
            "epochs": 200,
            "warmup": 1.0,
            "batch_size": 256,
            "learning_rate": 2e-4,
            "hidden": (512, 256, 128, 64, 32),
            "num_particles": 100,
            "num_test": 10_000,
        },
        figures=(
            Figure(
                "ladder, five layers, 200 epochs: NLL",
                87.88,
                {"layers": 5, "guide": "ladder", "objective": "warm-up"},
            ),
        ),
        differs="Our layers are narrower unless `--hidden` says so, and without batch normalisation.",
        share=lambda cell: cell["share_of_protocol"] * 2000 / 200,  # the cell's is of the paper's 2000 epochs
    ),
    Paper(
        source="Yin & Zhou (2019), ARM: Augment-REINFORCE-merge gradient",
        arxiv="1807.11143",
        table="test bounds, static MNIST",
        protocol="200 Bernoulli latents under an affine (linear) or two tanh layers (nonlinear); a million steps with "
        "batches of 50",
        script="discrete",
        config=discrete.Config,
        full={"num_train": 50_000, "epochs": 1000, "batch_size": 50, "num_test": 10_000},
        figures=tuple(_yin()),
        decimals=1,
        differs="Ours is the NLL with K importance samples, a tighter bound; our REBAR adapts its control variate by "
        "the variance in the logits, and of the nonlinear net not at all; our script has no net of two stochastic "
        "layers.",
    ),
    Paper(
        source="Mnih & Rezende (2016), Variational inference for Monte Carlo objectives",
        arxiv="1602.06725",
        table="VIMCO; the training bound by epoch of a published run",
        protocol="three layers of 200 Bernoulli latents, K = 5, batches of 24, a rate of 1e-3, static MNIST, 4 epochs",
        script="discrete",
        config=discrete.Config,
        full={"nets": (), "variance_epochs": (), "curve_train": 60_000, "curve_epochs": 4},
        figures=tuple(_curve()),
        decimals=1,
        share=lambda cell: cell["images"] / 60_000,
    ),
    Paper(
        source="Kingma et al. (2014), Semi-supervised learning with deep generative models",
        arxiv="1406.5298",
        table="test accuracies of Pyro's example of M2, MNIST",
        protocol="500 softplus units, 50 latents, Adam at 4.2e-4, batches of 200, 50,000 images; epochs not "
        "said (50 by default)",
        script="semi_supervised",
        config=semi_supervised.Config,
        full={"batch_size": 200, "learning_rate": 4.2e-4, "epochs": 50, "epochs_of_few": 50},
        figures=tuple(_pyro()),
        decimals=3,
        share=lambda cell: None,
    ),
)  # fmt: skip


# --- ours -----------------------------------------------------------------------------------------------------------


def row(paper: Paper, figure: Figure, results: Path = RESULTS) -> list[str]:
    """A line under :data:`HEAD`, of the longer training where we have two. Never a figure without its budget.

    Raises: CorruptFile for a cell with our figure and without its budget.
    """
    files = [results / f"{paper.script}{more}.json" for more in (LONGER, "")]
    path, ours = next(((path, found) for path in files if (found := _cells(path, figure))), (files[-1], {}))
    published = figure.published if isinstance(figure.published, str) else f"{figure.published:.{paper.decimals}f}"
    if not ours:
        return [figure.what, published, NOT_RUN, "", "", ""]
    budgets = {name: _budget(paper, cell, f"{path}: {name}") for name, cell in ours.items()}
    first, *others = budgets.values()
    if any(other != first for other in others):
        todo = "Measure one figure under one budget"
        raise must(f"{path}: {list(ours)}", "be of one budget", list(budgets.values()), todo, CorruptFile)
    where = f"{path.name}: {', '.join(ours)}"
    return [
        figure.what,
        published,
        _ours(figure, list(ours.values())),
        _measured(next(iter(ours.values()))),
        first,
        where,
    ]


def _cells(path: Path, figure: Figure) -> dict[str, Any]:
    """The cells of a result file that have our figure; none where there is no file."""
    cells = json.loads(path.read_text())["cells"] if path.exists() else {}
    return {n: c for n, c in cells.items() if figure.name in c and all(c.get(k) == v for k, v in figure.cell.items())}


def _ours(figure: Figure, cells: Sequence[Mapping[str, Any]]) -> str:
    """The mean over seeds and its standard error; of one seed, the standard error of the choice of data."""
    values = [cell[figure.name] for cell in cells]
    if figure.index is not None:
        values = [value[figure.index] for value in values]
    seeds = [v for value in values for v in (value if isinstance(value, list) else [value])]
    mean = statistics.fmean(seeds)
    if len(seeds) > 1:
        return f"{with_error(mean, statistics.stdev(seeds) / math.sqrt(len(seeds)))} ({len(seeds)} seeds)"
    error = cells[0].get(f"{figure.name}_se")
    error = error[0] if isinstance(error, list) else error
    return f"{number(mean) if error is None else with_error(mean, error)} (1 seed)"


def _measured(cell: Mapping[str, Any]) -> str:
    """On what: importance samples and held-out data, as far as the cell says."""
    words = {"num_particles": "K = {}", "num_data": "{} data", "num_test": "{} data"}
    return ", ".join(form.format(cell[name]) for name, form in words.items() if name in cell)


def _budget(paper: Paper, cell: Mapping[str, Any], name: str) -> str:
    try:
        share = paper.share(cell)
        if share is None:
            return f"{cell['epochs']} epochs of {cell['num_train']} images; the source's are not said"
    except KeyError as error:
        todo = "Measure the cell again with the script as it is"
        raise must(name, "have its budget", f"no {error}", todo, CorruptFile) from error
    return f"{share:.2%}"


def rows(paper: Paper, results: Path = RESULTS) -> list[list[str]]:
    """The lines of a paper under :data:`HEAD`."""
    return [row(paper, figure, results) for figure in paper.figures]


def title(paper: Paper) -> str:
    """Paper and table in a line."""
    return f"{paper.source} (arXiv {paper.arxiv}): {paper.table}"


def main() -> None:
    """Print every table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for paper in PAPERS:
        table = Table(*HEAD, title=title(paper), box=SIMPLE_HEAD, title_justify="left")
        for line in rows(paper):
            table.add_row(*line)
        console.print(table)
        console.print(f"The whole protocol: {paper.command}", markup=False)


if __name__ == "__main__":
    main()
