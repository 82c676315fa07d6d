"""Does a tighter bound train a better model, and a second layer? Burda et al. (2016), table 1, on MNIST.

Protocol of the paper (arXiv 1509.00519, section 5): one layer of 50 latents with two tanh layers of 200 each way, or
two of 100 and 50 latents with two tanh layers of 100 between them (cells that begin with ``2-``); Bernoulli pixels
redrawn at every step with the grey value as mean, Adam(0.9, 0.999, eps 1e-4), batch 20, ``3^i`` passes over the data at
learning rate ``0.001 · 10^(-i/7)`` for i = 0 … 7 (3280 epochs). As in the authors' code, though not in the paper, the
output's bias begins at the data's mean (``DataMean``), and ``eps`` is that of a gradient summed over the batch. The
default here stops after i = 2, which is 13 of the 3280 epochs: at that budget the *ordering* is the claim, not the last
decimal. ``--stages 8`` is the full protocol.

Reported: NLL with K = 5000 importance samples on the test images (one binary draw of each), in nats, and active units.

    python benchmarks/iwae_mnist.py --data-dir DIR
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro

from elbozoo.benchmarks.datasets import load
from elbozoo.benchmarks.records import Record
from elbozoo.inference import ELBO, IWAE, Adam, DataMean, Run, fit
from elbozoo.zoo import MLP, VAE, HierarchicalVAE, Spec

# NLL, active units after 3280 epochs
PUBLISHED = {
    "vae-1": (86.76, "19"),
    "iwae-5": (85.54, "22"),
    "iwae-50": (84.78, "25"),
    "2-vae-1": (85.33, "16+5"),
    "2-iwae-5": (83.89, "21+5"),
    "2-iwae-50": (82.90, "26+7"),
}


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        data: data set.
        data_dir: folder with the files; ELBOZOO_DATA or a download otherwise.
        engine: pyro or numpyro.
        cells: objectives, as ``vae-K`` or ``iwae-K``; with two stochastic layers, as ``2-vae-K`` or ``2-iwae-K``.
        stages: stages i = 0 … stages-1 of the paper's schedule; 8 is all of it.
        seeds: seeds 0, 1, …, one run each; all of a cell train together.
        num_particles: K of the reported NLL.
        num_test: test images (10,000 are all of MNIST's).
        hidden, latent_dim: units and latents of one layer; the first of two has twice the latents, the second half
            the units.
        results: JSON file to write and to go on from.
        checkpoints: folder for checkpoints, from which more stages go on; fewer need another one.
        smoke: a few seconds on digits, to see that it runs.
    """

    data: str = "mnist"
    data_dir: Path | None = None
    engine: str = "numpyro"
    cells: tuple[str, ...] = ("vae-1", "iwae-5", "iwae-50", "2-vae-1", "2-iwae-5", "2-iwae-50")
    stages: int = 3
    seeds: int = 1
    num_particles: int = 5000
    num_test: int = 10_000
    hidden: int = 200
    latent_dim: int = 50
    results: Path = Path("benchmarks/results/iwae_mnist.json")
    checkpoints: Path = Path("runs/iwae_mnist")
    smoke: bool = False


@dataclass(frozen=True)
class StagedRate:
    """``0.001 · 10^(-i/7)`` in stage i, which lasts ``3^i`` epochs."""

    steps_per_epoch: int

    def __call__(self, step: Any) -> Any:
        rate, end = 1e-3, 0
        for i in range(8):
            end += 3**i * self.steps_per_epoch
            later = 1.0 * (step >= end)
            rate = rate * (1 - later) + later * 1e-3 * 10 ** (-(i + 1) / 7)
        return rate


def train(config: Config, cell: str) -> list[Run]:
    """Train one cell under every seed."""
    data = load(config.data, data_dir=config.data_dir)
    kind, k = cell.removeprefix("2-").split("-")
    objective = ELBO(int(k)) if kind == "vae" else IWAE(int(k))
    batch, size, latent_dim, hidden = 20, data.train.shape[1], config.latent_dim, config.hidden
    if cell.startswith("2-"):
        spec: Spec = HierarchicalVAE(size, (2 * latent_dim, latent_dim), (hidden, hidden // 2), activation="tanh")
    else:
        spec = VAE(size, latent_dim, network=MLP(hidden=(hidden, hidden), activation="tanh"))
    return fit(
        getattr(spec, config.engine)(),
        data.train,
        objective=objective,
        epochs=epochs_of(config),
        batch_size=batch,
        optimizer=Adam(StagedRate(len(data.train) // batch), eps=1e-4 / batch),  # theirs is of the batch's sum
        seed=0,
        replicates=config.seeds,
        binarize="stochastic",
        start=DataMean(),
        directory=config.checkpoints / f"{config.data}-{config.engine}-{config.seeds}-{cell}",
        resume=True,
    )


def epochs_of(config: Config) -> int:
    """Of the stages together."""
    return sum(3**i for i in range(config.stages))


def figures(config: Config, cell: str, seed: int, run: Run) -> dict[str, Any]:
    """Evaluate one run of a cell."""
    test = load(config.data, data_dir=config.data_dir).test[: config.num_test]
    result = run.evaluate(test, num_particles=config.num_particles, progress=True)
    return {
        "objective": cell,
        "seed": seed,
        "engine": config.engine,
        "data": config.data,
        "epochs": epochs_of(config),
        "share_of_protocol": epochs_of(config) / 3280,
        "trained_together": config.seeds,
        "train_seconds": sum(row["seconds"] for row in run.history),
        **result.summary(),
        "bound_by_epoch": [row["bound"] for row in run.history],
    }


def measure(config: Config, record: Record, cell: str) -> list[dict[str, Any]]:
    """What the record has of a cell's seeds; the rest is trained, and evaluated, first."""
    head = f"{config.data}-{config.engine}-{config.stages}-{config.num_particles}-{config.num_test}-{cell}"
    keys = [f"{head}-{seed}" for seed in range(config.seeds)]
    if not set(keys) <= set(record.content["cells"]):
        for seed, run in enumerate(train(config, cell)):
            record.cell(keys[seed], lambda s=seed, r=run: figures(config, cell, s, r))
    return [record.content["cells"][key] for key in keys]


def claims(cells: tuple[str, ...], found: dict[str, list[dict[str, Any]]]) -> dict[str, bool]:
    """The orders of the paper's table, of means over seeds, and whether each held."""
    nll, active = mean(found, "nll"), mean(found, "total_active_units")
    one, two = ([c for c in cells if c.startswith("2-") is deep] for deep in (False, True))
    return (
        {f"NLL({b}) < NLL({a})": nll[b] < nll[a] for a, b in (*pairwise(one), *pairwise(two))}
        | {f"active({b}) >= active({a})": active[b] >= active[a] for a, b in (*pairwise(one), *pairwise(two))}
        | {f"NLL({c}) < NLL({c[2:]}): two layers against one": nll[c] < nll[c[2:]] for c in two if c[2:] in one}
    )


def mean(found: dict[str, list[dict[str, Any]]], figure: str) -> dict[str, float]:
    """A figure's mean over the seeds of each cell."""
    return {cell: statistics.mean(row[figure] for row in rows) for cell, rows in found.items()}


def main(config: Config) -> None:
    """Run every cell, then say whether the ordering held."""
    if config.smoke:
        config = Config(
            data="digits",
            cells=("iwae-5", "2-iwae-5"),
            stages=1,
            num_particles=20,
            num_test=50,
            hidden=16,
            latent_dim=4,
            results=config.results.with_name("smoke_iwae_mnist.json"),
            checkpoints=config.checkpoints / "smoke",
        )
    record = Record(config.results, __doc__ or "", config, (config.engine,), grid=("cells", "seeds"))
    found = {cell: measure(config, record, cell) for cell in config.cells}
    record.check(claims(config.cells, found))
    nll, active = mean(found, "nll"), mean(found, "total_active_units")
    for cell in config.cells:
        published = (
            f", published after 3280 epochs {PUBLISHED[cell]}" if cell in PUBLISHED and config.data == "mnist" else ""
        )
        line = f"{cell}: NLL {nll[cell]:.2f} (K={config.num_particles}), active units {active[cell]:.1f}"
        print(f"{line}, {config.seeds} seed(s){published}")


if __name__ == "__main__":
    main(tyro.cli(Config))
