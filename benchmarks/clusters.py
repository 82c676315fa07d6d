"""Does an exact sum over clusters train a better mixture VAE than drawn clusters do? MNIST, 10 clusters, 4 seeds.

A ``GaussianMixtureVAE`` with a guide that draws the cluster first, ``q(y | x) q(z | x, y)``, under the ELBO: the sum
over clusters exact (``Enumerate``) or drawn, with a running-mean baseline; and both with two draws of everything that
is drawn, where the drawn clusters' baseline is the other draw's. A fifth cell has the exact cluster posterior
``q(y | z) = p(y | z)`` and the exact sum. Pixels are redrawn at every step with the grey value as mean.

Reported on held-out images: NLL with K importance samples, the accuracy of the clusters under the best match to the
digits, and how many clusters hold at least 2 % of the images.

    python benchmarks/clusters.py --data-dir DIR
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from elbozoo.benchmarks.datasets import load
from elbozoo.benchmarks.records import Record, compiled_once
from elbozoo.inference import (
    ELBO,
    Adam,
    Enumerate,
    Objective,
    ScoreFunction,
    class_probabilities,
    cluster_accuracy,
    evaluate,
    fit,
)
from elbozoo.inference.arrays import standard_error
from elbozoo.zoo import MLP, GaussianMixtureVAE

OBJECTIVES: dict[str, tuple[bool, Objective]] = {
    "enumerated": (False, ELBO(gradient=Enumerate())),
    "sampled, running mean": (False, ELBO(gradient=ScoreFunction(baseline="running-mean"))),
    "sampled twice, leave-one-out": (False, ELBO(2, ScoreFunction())),
    "enumerated, two draws": (False, ELBO(2, Enumerate())),
    "exact cluster, enumerated": (True, ELBO(gradient=Enumerate())),
}
"""By name, whether the cluster's posterior is the model's own, and the objective."""
PAIRS = (
    ("enumerated", "sampled, running mean"),
    ("enumerated", "sampled twice, leave-one-out"),  # which draws z twice as well
    ("enumerated, two draws", "sampled twice, leave-one-out"),
)
"""What should win, and over what."""

Cells = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        data: data set.
        data_dir: folder with the files; ELBOZOO_DATA or a download otherwise.
        objectives: names from the table of the script.
        num_seeds: seeds 0 … num_seeds - 1, trained at once.
        num_clusters: C.
        latent_dim: entries of z.
        hidden: units of each of the two layers each way.
        num_train: training images.
        epochs: passes over them.
        batch_size, learning_rate: of Adam's steps.
        num_particles: K of the reported NLL.
        num_test: held-out images.
        results: JSON file to write and to go on from.
        smoke: a few seconds on digits, to see that it runs.
    """

    data: str = "mnist"
    data_dir: Path | None = None
    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    num_seeds: int = 4
    num_clusters: int = 10
    latent_dim: int = 10
    hidden: int = 200
    num_train: int = 10_000
    epochs: int = 36
    batch_size: int = 100
    learning_rate: float = 1e-3
    num_particles: int = 100
    num_test: int = 1000
    results: Path = Path("benchmarks/results/clusters.json")
    smoke: bool = False


def measure(config: Config, name: str) -> dict[str, Any]:
    """Train and evaluate the seeds of one cell."""
    data = load(config.data, data_dir=config.data_dir)
    train, test = data.train[: config.num_train], data.test[: config.num_test]
    exact, objective = OBJECTIVES[name]
    network = MLP((config.hidden, config.hidden), "relu")
    spec = GaussianMixtureVAE(
        train.shape[1], config.num_clusters, config.latent_dim, network=network, exact_cluster=exact
    )
    began = time.perf_counter()
    runs = fit(
        spec.numpyro(),
        train,
        objective=objective,
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimizer=Adam(config.learning_rate),
        binarize="stochastic",
        replicates=config.num_seeds,
    )
    seconds = time.perf_counter() - began
    x = runs[0].prepare(test)[0]
    found = [evaluate(run.program, x, num_particles=config.num_particles) for run in runs]
    probabilities = [class_probabilities(run.program, x, num_particles=5) for run in runs]
    shares = [np.bincount(p.argmax(-1), minlength=config.num_clusters) / len(x) for p in probabilities]
    return {
        "objective": name,
        "train_seconds": seconds,
        "num_data": len(x),
        "num_particles": config.num_particles,
        "nll": [e.nll for e in found],
        "nll_se": [e.nll_se for e in found],
        "elbo": [e.elbo for e in found],
        "accuracy": [cluster_accuracy(p, data.test_labels[: config.num_test]) for p in probabilities],
        "clusters_used": [int((share >= 0.02).sum()) for share in shares],
    }


def claims(cells: Cells) -> dict[str, bool]:
    """What is expected of the exact sum, paired by seed; nothing here is made to hold."""
    found: dict[str, bool] = {}
    for exact, other in PAIRS:
        if exact in cells and other in cells:
            nll = np.subtract(cells[other]["nll"], cells[exact]["nll"])
            found[f"{exact}: has a lower NLL than {other}"] = bool(nll.mean() > 2 * standard_error(nll))
            accuracy = np.subtract(cells[exact]["accuracy"], cells[other]["accuracy"])
            claim = f"{exact}: clusters agree better with the digits than {other}"
            found[claim] = bool(accuracy.mean() > 2 * standard_error(accuracy))
    return found


def main(config: Config) -> None:
    """Run every cell, then say which claims held."""
    if config.smoke:
        small: dict[str, Any] = {"data": "digits", "num_seeds": 2, "num_clusters": 3, "latent_dim": 2, "hidden": 4}
        small |= {"objectives": ("enumerated", "sampled, running mean"), "num_train": 60, "epochs": 1}
        results = config.results.with_name("smoke_clusters.json")
        config = replace(config, **small, batch_size=20, num_test=20, num_particles=3, results=results, smoke=False)
    record = Record(config.results, __doc__ or "", config, ("numpyro",), grid=("objectives",))
    with compiled_once():
        for name in config.objectives:
            cell = record.cell(name, lambda n=name: measure(config, n))
            nll, accuracy = np.mean(cell["nll"]), np.mean(cell["accuracy"])
            print(f"{name}: NLL {nll:.2f}, accuracy {accuracy:.3f}, {cell['train_seconds']:.0f} s", flush=True)
    record.check(claims(record.content["cells"]))


if __name__ == "__main__":
    main(tyro.cli(Config))
