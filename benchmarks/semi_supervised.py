"""What does the generative model win for a classifier with few labels, and does it need the auxiliary loss?

Kingma et al.'s M2 (2014, arXiv 1406.5298) on MNIST with 100, 600, 1000 and 3000 labels: one layer of 500 softplus units
each way, 50 latents, Adam at 4.2e-4, batches of 200, the networks and settings of Pyro's own example, whose test
accuracies are the published ones here. Three objectives on the same labels: ``auxiliary`` is the bound and 46 times the
classifier's log-probability of each label (the example's weight), ``bound`` the same with weight 0, where labels reach
the classifier through the decoder alone, and ``classifier`` the same network trained on the labelled images alone.

The sum over classes is exact (``Enumerate``). Of the 50,000 training images ``num_unlabelled`` are taken, so that a
cell takes minutes on one core; labels, as many of each class, are repeated to make up a fifth of every epoch, as the
example gives labelled data batches of their own. Pixels are binarised at one half, or with ``--pixels grey`` left grey
under a continuous Bernoulli likelihood: the example takes grey values for outcomes of a Bernoulli, which is no density.
How many epochs the published accuracies took is not said with them; they are of 50,000 images.

    python benchmarks/semi_supervised.py --data-dir DIR
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from elbozoo.benchmarks.datasets import load
from elbozoo.benchmarks.records import Record
from elbozoo.inference import ELBO, Classification, Enumerate, accuracy, class_probabilities, fit
from elbozoo.zoo import MLP, Bernoulli, ContinuousBernoulli, SemiSupervisedVAE

Cells = Mapping[str, dict[str, Any]]

PUBLISHED = {"auxiliary": (0.932, 0.944, 0.949, 0.958), "classifier": (0.771, 0.872, 0.886, 0.911)}
"""Test accuracy of Pyro's example with ``PUBLISHED_LABELS``."""
PUBLISHED_LABELS = (100, 600, 1000, 3000)

OBJECTIVES = ("auxiliary", "bound", "classifier")


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        data: data set.
        data_dir: folder with the files; ELBOZOO_DATA or a download otherwise.
        labels: numbers of labels.
        objectives: of ``auxiliary``, ``bound`` and ``classifier``.
        seeds: seeds, one run each.
        num_unlabelled: training images without a label.
        epochs: passes over them.
        labelled_share: of each epoch, by repeating the labelled images.
        weight: of the auxiliary loss at a labelled datum.
        pixels: binary or grey.
        latent_dim, hidden: entries of z, units of each hidden layer.
        hidden_gain: factor on the hidden layers' initial weights; 0.025 is the example's, whose deviation is 0.001.
        batch_size, learning_rate: of Adam.
        num_test: test images (10,000 are all of MNIST's).
        results: JSON file to write and to go on from.
        smoke: a few seconds on digits, to see that it runs.
    """

    data: str = "mnist"
    data_dir: Path | None = None
    labels: tuple[int, ...] = PUBLISHED_LABELS
    objectives: tuple[str, ...] = OBJECTIVES
    seeds: tuple[int, ...] = (0,)
    num_unlabelled: int = 10_000
    epochs: int = 20
    labelled_share: float = 0.2
    weight: float = 46.0
    pixels: Literal["binary", "grey"] = "binary"
    latent_dim: int = 50
    hidden: int = 500
    hidden_gain: float = 1.0
    batch_size: int = 200
    learning_rate: float = 4.2e-4
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
    """Images and labels of an epoch, -1 where a label is hidden."""
    known, hidden = split(data.train_labels, num_labels, config.num_unlabelled, seed)
    if objective == "classifier":
        share, hidden = 1.0, hidden[:0]
        count = config.num_unlabelled
    else:
        share = config.labelled_share
        count = round(len(hidden) * share / (1 - share))
    rows = np.concatenate([hidden, np.resize(known, max(count, len(known)))])
    labels = np.where(np.arange(len(rows)) < len(hidden), -1, data.train_labels[rows])
    return seen(config, data.train[rows]), labels


def seen(config: Config, images: np.ndarray) -> np.ndarray:
    """What the model sees of the images."""
    return images if config.pixels == "grey" else (images > 0.5).astype(np.float32)


def measure(config: Config, objective: str, num_labels: int, seed: int) -> dict[str, Any]:
    """Train one cell and classify the test images."""
    data = load(config.data, data_dir=config.data_dir)
    x, labels = training_data(config, data, objective, num_labels, seed)
    likelihood = ContinuousBernoulli() if config.pixels == "grey" else Bernoulli()
    network = MLP((config.hidden,), "softplus", hidden_gain=config.hidden_gain)
    spec = SemiSupervisedVAE(x.shape[1], 10, config.latent_dim, network, likelihood)
    began = time.perf_counter()
    run = fit(
        spec.numpyro(),
        (x, labels),
        objective=Classification(ELBO(gradient=Enumerate()), weight=0.0 if objective == "bound" else config.weight),
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=seed,
    )
    seconds = time.perf_counter() - began
    test, truth = seen(config, data.test[: config.num_test]), data.test_labels[: config.num_test]
    found = accuracy(class_probabilities(run.program, test), truth)
    return {
        "objective": objective,
        "labels": num_labels,
        "seed": seed,
        "accuracy": found,
        "accuracy_se": float(np.sqrt(found * (1 - found) / len(truth))),
        "num_test": len(truth),
        "epochs": config.epochs,
        "num_train": len(x),
        "train_seconds": seconds,
        "bound_by_epoch": [row["bound"] for row in run.history],
    }


def mean_accuracy(cells: Cells, objective: str, num_labels: int) -> float | None:
    """Over the seeds that there are; None without any."""
    found = [c["accuracy"] for c in cells.values() if (c["objective"], c["labels"]) == (objective, num_labels)]
    return float(np.mean(found)) if found else None


def published(objective: str, num_labels: int) -> float | None:
    """The published test accuracy, if there is one."""
    if objective not in PUBLISHED or num_labels not in PUBLISHED_LABELS:
        return None
    return PUBLISHED[objective][PUBLISHED_LABELS.index(num_labels)]


def checks(cells: Cells, labels: tuple[int, ...]) -> dict[str, bool]:
    """Each claim about cells that are there, and whether it held."""
    held = {}
    for count in labels:
        found = {o: mean_accuracy(cells, o, count) for o in OBJECTIVES}
        ours = found["auxiliary"]
        for other, name in (("classifier", "the classifier alone"), ("bound", "the bound alone")):
            theirs = found[other]
            if ours is not None and theirs is not None:
                held[f"{count} labels: M2 with the auxiliary loss classifies better than {name}"] = ours > theirs
    return held


def main(config: Config) -> None:
    """Measure every cell, then say which claims held."""
    if config.smoke:
        results = config.results.with_name("smoke_semi_supervised.json")
        small: dict[str, Any] = {"data": "digits", "labels": (20,), "num_unlabelled": 80, "epochs": 1, "batch_size": 20}
        small |= {"objectives": ("auxiliary", "classifier")}
        config = replace(config, **small, latent_dim=2, hidden=4, num_test=50, results=results, smoke=False)
    record = Record(config.results, __doc__ or "", config, ("numpyro",), grid=("labels", "objectives", "seeds"))
    cells = {}
    for seed in config.seeds:
        for count in config.labels:
            for objective in config.objectives:
                key = f"{objective}-{count}-{seed}"
                cells[key] = record.cell(key, lambda o=objective, c=count, s=seed: measure(config, o, c, s))
    found = checks(cells, config.labels)
    record.check(found)
    for cell in cells.values():
        known = published(cell["objective"], cell["labels"])
        beside = "" if known is None or config.data != "mnist" else f", published {known:.3f}"
        print(f"{cell['objective']}, {cell['labels']} labels: accuracy {cell['accuracy']:.3f}{beside}")
    for claim, good in found.items():
        print(f"{'holds' if good else 'DOES NOT HOLD'}: {claim}")


if __name__ == "__main__":
    main(tyro.cli(Config))
