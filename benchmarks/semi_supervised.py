"""What does the generative model win for a classifier with few labels, and does it need the auxiliary loss?

Kingma et al.'s M2 (2014, arXiv 1406.5298) on MNIST with 100, 600, 1000 and 3000 labels: one layer of 500 softplus units
each way and 50 latents, as in Pyro's own example, whose test accuracies are the published ones here. Four objectives on
the same labels: ``auxiliary`` is the bound, its sum over classes exact (``Enumerate``), and 46 times the classifier's
log-probability of each label (the example's weight); ``sampled`` the same with classes drawn by the guide and scored
(``ScoreFunction``); ``bound`` is ``auxiliary`` with weight 0, where labels reach the classifier through the decoder
alone; ``classifier`` the same network trained on the labelled images alone.

Labels, as many of each class, are repeated to make up a fifth of every epoch, as the example gives labelled data
batches of their own. Three settings decide how far M2 gets, and are arguments: pixels are redrawn at every step with
the grey value as mean (the example takes grey values for outcomes of a Bernoulli, which is no density; with fixed zeros
and ones it ends lower), hidden layers begin small as the example's do, and training is
long: accuracy rises late, and may fall first. It is measured after each of ``stages`` parts of the training; the last
is reported, none is chosen. Adam's rate and batches are chosen for one core, and a moving average of the weights takes
out what that rate shakes; the example's are ``--batch-size 200 --learning-rate 4.2e-4``. How many epochs the published
accuracies took is not said with them; the example's default is 50, which 100 labels have here, and more have 20.

    python benchmarks/semi_supervised.py --data-dir DIR
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from elbozoo.benchmarks.datasets import binarize, load
from elbozoo.benchmarks.records import Record
from elbozoo.inference import (
    ELBO,
    Adam,
    Classification,
    Enumerate,
    NonFinite,
    Objective,
    ScoreFunction,
    accuracy,
    class_probabilities,
    fit,
)
from elbozoo.inference.errors import must
from elbozoo.zoo import MLP, Bernoulli, ContinuousBernoulli, SemiSupervisedVAE

Cells = Mapping[str, dict[str, Any]]

PUBLISHED = {"auxiliary": (0.932, 0.944, 0.949, 0.958), "classifier": (0.771, 0.872, 0.886, 0.911)}
"""Test accuracy of Pyro's example with ``PUBLISHED_LABELS``."""
PUBLISHED_LABELS = (100, 600, 1000, 3000)

FEW = 100
"""Labels that ``epochs_of_few`` is for."""

OBJECTIVES = ("auxiliary", "sampled", "bound", "classifier")
BINARIZE: dict[str, Literal["stochastic", "threshold", "none"]] = {
    "redrawn": "stochastic",
    "binary": "threshold",
    "grey": "none",
}
"""What becomes of grey pixels, as ``fit`` and ``binarize`` have it."""


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        data: data set.
        data_dir: folder with the files; ELBOZOO_DATA or a download otherwise.
        engine: pyro or numpyro.
        labels: numbers of labels.
        objectives: of ``auxiliary``, ``sampled``, ``bound`` and ``classifier``.
        seeds: seeds, one run each.
        num_unlabelled: training images without a label.
        epochs: passes over them with more than 100 labels.
        epochs_of_few: passes over them with at most 100 labels, where accuracy rises for longer.
        stages: parts of the training after each of which accuracy is measured.
        labelled_share: of each epoch, by repeating the labelled images.
        weight: of the auxiliary loss at a labelled datum.
        pixels: redrawn at every step, binary (at one half) or grey (under a continuous Bernoulli).
        num_draws: draws of redrawn pixels that a test image's class probabilities are averaged over.
        latent_dim, hidden: entries of z, units of each hidden layer.
        hidden_gain: factor on the hidden layers' initial weights; 0.025 is the example's, whose deviation is 0.001.
        batch_size, learning_rate: of Adam.
        average: decay of the moving average of the weights, which classifies.
        num_test: test images (10,000 are all of MNIST's).
        results: JSON file to write and to go on from.
        smoke: a few seconds on digits, to see that it runs.
    """

    data: str = "mnist"
    data_dir: Path | None = None
    engine: Literal["pyro", "numpyro"] = "pyro"
    labels: tuple[int, ...] = PUBLISHED_LABELS
    objectives: tuple[str, ...] = OBJECTIVES
    seeds: tuple[int, ...] = (0,)
    num_unlabelled: int = 50_000
    epochs: int = 20
    epochs_of_few: int = 50
    stages: int = 5
    labelled_share: float = 0.2
    weight: float = 46.0
    pixels: Literal["redrawn", "binary", "grey"] = "redrawn"
    num_draws: int = 10
    latent_dim: int = 50
    hidden: int = 500
    hidden_gain: float = 0.025
    batch_size: int = 50
    learning_rate: float = 3e-3
    average: float = 0.999
    num_test: int = 10_000
    results: Path = Path("benchmarks/results/semi_supervised.json")
    smoke: bool = False


def split(labels: np.ndarray, num_labelled: int, num_unlabelled: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a label, as many of each class, and rows without, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(labels))
    classes = np.unique(labels)
    each = num_labelled // len(classes)
    known = np.concatenate([order[labels[order] == c][:each] for c in classes])
    return known, order[~np.isin(order, known)][:num_unlabelled]


def training_data(config: Config, data: Any, objective: str, num_labels: int, seed: int) -> tuple[Any, Any]:
    """Grey images and labels of an epoch, -1 where a label is hidden."""
    known, hidden = split(data.train_labels, num_labels, config.num_unlabelled, seed)
    if objective == "classifier":
        share, hidden = 1.0, hidden[:0]
        count = config.num_unlabelled
    else:
        share = config.labelled_share
        count = round(len(hidden) * share / (1 - share))
    rows = np.concatenate([hidden, np.resize(known, max(count, len(known)))])
    labels = np.where(np.arange(len(rows)) < len(hidden), -1, data.train_labels[rows])
    return data.train[rows], labels


def objective_of(name: str, weight: float) -> Objective:
    """By its name. Where every label is known there is no sum over classes, and one drawn class is that label."""
    drawn = name in ("sampled", "classifier")
    gradient = ScoreFunction(baseline="running-mean") if drawn else Enumerate()
    return Classification(ELBO(gradient=gradient), weight=0.0 if name == "bound" else weight)


def test_accuracy(config: Config, program: Any, images: np.ndarray, truth: np.ndarray) -> float:
    """Of the class probabilities given the grey image, a mean over the pixels that it stands for."""
    how, draws = BINARIZE[config.pixels], config.num_draws if config.pixels == "redrawn" else 1
    rng = np.random.default_rng(0)
    seen = [class_probabilities(program, binarize(images, how, rng)) for _ in range(draws)]
    return accuracy(np.mean(seen, axis=0), truth)


def measure(config: Config, objective: str, num_labels: int, seed: int) -> dict[str, Any]:
    """Train one cell, classifying the test images after each stage. One that diverges says where."""
    data = load(config.data, data_dir=config.data_dir)
    x, labels = training_data(config, data, objective, num_labels, seed)
    test, truth = data.test[: config.num_test], data.test_labels[: config.num_test]
    likelihood = ContinuousBernoulli() if config.pixels == "grey" else Bernoulli()
    network = MLP((config.hidden,), "softplus", hidden_gain=config.hidden_gain)
    spec = SemiSupervisedVAE(x.shape[1], 10, config.latent_dim, network, likelihood)
    program = getattr(spec, config.engine)()
    in_all = config.epochs_of_few if num_labels <= FEW else config.epochs
    stages = sorted({round(in_all * (i + 1) / config.stages) for i in range(config.stages)} - {0})
    accuracies: list[float] = []
    named = {"objective": objective, "labels": num_labels, "seed": seed, "epochs": in_all, "num_train": len(x)}
    with tempfile.TemporaryDirectory() as folder:
        for epochs in stages:
            try:
                run = fit(
                    program,
                    (x, labels),
                    objective=objective_of(objective, config.weight),
                    epochs=epochs,
                    batch_size=config.batch_size,
                    optimizer=Adam(config.learning_rate, average=config.average),
                    seed=seed,
                    binarize=BINARIZE[config.pixels],
                    directory=folder,
                    resume=True,
                )
            except NonFinite as error:
                reached = dict(zip(map(str, stages), accuracies, strict=False))
                return {**named, "diverged": f"at step {error.step}, site {error.site}", "accuracy_by_stage": reached}
            accuracies.append(test_accuracy(config, run.program, test, truth))
            print(f"{objective}, {num_labels} labels, {epochs} epochs: accuracy {accuracies[-1]:.3f}", flush=True)
    found, history = accuracies[-1], run.history
    return {
        **named,
        "accuracy": found,
        "accuracy_se": float(np.sqrt(found * (1 - found) / len(truth))),
        "num_test": len(truth),
        "accuracy_by_stage": dict(zip(map(str, stages), accuracies, strict=True)),
        "train_seconds": sum(row["seconds"] for row in history),
        "bound_by_epoch": [row["bound"] for row in history],
    }


def mean_accuracy(cells: Cells, objective: str, num_labels: int) -> float | None:
    """Over the seeds that there are and that did not diverge; None without any.

    Raises: InvalidArgument for seeds of several budgets.
    """
    of_these = [c for c in cells.values() if (c["objective"], c["labels"]) == (objective, num_labels)]
    found = [c for c in of_these if "accuracy" in c]
    if len(budgets := {c["epochs"] for c in found}) > 1:
        todo = "Delete the cells of one of them"
        raise must(f"cells of {objective}, {num_labels} labels", "be of one budget", f"epochs {budgets}", todo)
    return float(np.mean([c["accuracy"] for c in found])) if found else None


def published(objective: str, num_labels: int) -> float | None:
    """The published test accuracy, if there is one."""
    if objective not in PUBLISHED or num_labels not in PUBLISHED_LABELS:
        return None
    return PUBLISHED[objective][PUBLISHED_LABELS.index(num_labels)]


def checks(cells: Cells, data: str) -> dict[str, bool]:
    """Each claim about cells that are there, means over their seeds, and whether it held."""
    held = {}
    for count in sorted({cell["labels"] for cell in cells.values()}):
        found = {o: mean_accuracy(cells, o, count) for o in OBJECTIVES}
        ours, known = found["auxiliary"], published("auxiliary", count)
        if ours is None:
            continue
        if known is not None and data == "mnist":
            held[f"{count} labels: M2 with the auxiliary loss is at most 0.02 below the published accuracy"] = (
                ours >= known - 0.02
            )
        for other, name in (
            ("classifier", "the classifier alone"),
            ("sampled", "the same with classes drawn"),
            ("bound", "the bound alone"),
        ):
            theirs = found[other]
            if theirs is not None:
                held[f"{count} labels: M2 with the auxiliary loss classifies better than {name}"] = ours > theirs
    return held


def main(config: Config) -> None:
    """Measure every cell, then say which claims held."""
    if config.smoke:
        results = config.results.with_name("smoke_semi_supervised.json")
        small: dict[str, Any] = {"data": "digits", "labels": (20,), "num_unlabelled": 80, "epochs_of_few": 1}
        small |= {"batch_size": 20, "objectives": ("auxiliary", "classifier")}
        config = replace(config, **small, latent_dim=2, hidden=4, num_test=50, results=results, smoke=False)
    grid = ("labels", "objectives", "seeds")
    record = Record(config.results, __doc__ or "", config, (config.engine,), grid=grid, timed=False)
    cells = {}
    for seed in config.seeds:
        for count in config.labels:
            for objective in config.objectives:
                key = f"{objective}-{count}-{seed}"
                cells[key] = record.cell(key, lambda o=objective, c=count, s=seed: measure(config, o, c, s))
    found = checks(record.content["cells"], config.data)
    record.check(found)
    for cell in cells.values():
        known = published(cell["objective"], cell["labels"])
        beside = "" if known is None or config.data != "mnist" else f", published {known:.3f}"
        what = f"diverged {cell['diverged']}" if "diverged" in cell else f"accuracy {cell['accuracy']:.3f}{beside}"
        print(f"{cell['objective']}, {cell['labels']} labels: {what}")
    for claim, good in found.items():
        print(f"{'holds' if good else 'DOES NOT HOLD'}: {claim}")


if __name__ == "__main__":
    main(tyro.cli(Config))
