"""Do annealing and free bits escape the bad minimum that the plain ELBO falls into? Sixteen seeds a cell, on MNIST.

Cells: {ELBO, annealed KL, cyclical KL, free bits, IWAE-10} × {normal, collapsed, informative start} × {weak, strong
decoder}. The weak decoder's pixels are independent given z; the strong one's depend on all pixels before them too
(``AutoregressiveBernoulli``), so that it can do without z. MNIST's images are averaged over 2×2 pixels to 14×14, and
pixels are redrawn at every step with the grey value as mean. One layer of tanh units each way, Adam, batches of 100.

Every cell sees the data equally often: a start's epochs come out of the cell's, so the objective itself has
``epochs - start_epochs`` of them after a collapsed or informative start and ``epochs`` after the normal one. Annealing
takes half, and four cycles take all, of the ``epochs - start_epochs``, wherever it starts.

Reported for each seed: NLL with K importance samples on held-out images (one binary draw of each, the same for all), in
nats, rate, active units, the epoch of collapse; for each cell, how many minima and which seeds are in a worse one
(``local_minima``). The default is short, to run in half an hour on two cores; ``--num-train 60000 --epochs 100`` is the
longer protocol, of which each cell records its share.

    python benchmarks/local_minima.py --data-dir DIR
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from elbozoo.benchmarks.datasets import load
from elbozoo.benchmarks.records import Record, compiled_once
from elbozoo.inference import (
    ELBO,
    IWAE,
    AnnealedKL,
    Collapsed,
    FreeBits,
    Informative,
    LocalMinima,
    Objective,
    Start,
    fit,
    local_minima,
)
from elbozoo.zoo import MLP, VAE, AutoregressiveBernoulli, Bernoulli

LONG = 60_000 * 100
"""Images seen in the longer protocol."""

Cells = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        data: data set.
        data_dir: folder with the files; ELBOZOO_DATA or a download otherwise.
        decoders: weak (factorised Bernoulli), strong (autoregressive Bernoulli).
        starts: normal, collapsed, informative.
        objectives: elbo, annealed, cyclical, free-bits, iwae-K.
        num_seeds: seeds 0 … num_seeds - 1, trained at once.
        num_train: training images.
        epochs: passes over them, those of the start included.
        start_epochs: of which the start takes so many.
        batch_size, learning_rate: of Adam's steps.
        hidden, latent_dim: tanh units each way, and latents.
        masked_units: hidden units of the strong decoder between a pixel and the later ones.
        free_bits: nats a latent.
        tolerance: nats within which two seeds count as in one minimum.
        num_particles: K of the reported NLL.
        num_test: held-out images.
        results: JSON file to write and to go on from.
        smoke: a few seconds on digits, to see that it runs.
    """

    data: str = "mnist"
    data_dir: Path | None = None
    decoders: tuple[str, ...] = ("strong", "weak")
    starts: tuple[str, ...] = ("normal", "collapsed", "informative")
    objectives: tuple[str, ...] = ("elbo", "annealed", "cyclical", "free-bits", "iwae-10")
    num_seeds: int = 16
    num_train: int = 5000
    epochs: int = 28
    start_epochs: int = 4
    batch_size: int = 100
    learning_rate: float = 3e-3
    hidden: int = 50
    latent_dim: int = 8
    masked_units: int = 64
    free_bits: float = 0.25
    tolerance: float = 0.1
    num_particles: int = 100
    num_test: int = 1000
    results: Path = Path("benchmarks/results/local_minima.json")
    smoke: bool = False


def halved(images: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Flat images averaged over 2×2 pixels, flat."""
    height, width = (side // 2 for side in shape)
    return images.reshape(-1, height, 2, width, 2).mean(axis=(2, 4)).reshape(-1, height * width)


def objective_of(config: Config, name: str) -> Objective:
    """The objective of a cell."""
    rest = config.epochs - config.start_epochs
    if name.startswith("iwae-"):
        return IWAE(int(name.removeprefix("iwae-")))
    return {
        "elbo": ELBO(),
        "annealed": AnnealedKL(ELBO(), warmup=rest / 2),
        "cyclical": AnnealedKL(ELBO(), warmup=rest / 4, schedule_form="cyclical", cycles=4),
        "free-bits": FreeBits(ELBO(), free_bits=config.free_bits),
    }[name]


def start_of(config: Config, name: str) -> Start | None:
    """The start of a cell."""
    return {
        "normal": None,
        "collapsed": Collapsed(epochs=config.start_epochs),
        "informative": Informative(epochs=config.start_epochs),
    }[name]


def measure(config: Config, decoder: str, start: str, objective: str) -> dict[str, Any]:
    """Train and compare the seeds of one cell."""
    data = load(config.data, data_dir=config.data_dir)
    train, test = (halved(x, data.image_shape) for x in (data.train[: config.num_train], data.test[: config.num_test]))
    size = train.shape[1]
    likelihood = Bernoulli() if decoder == "weak" else AutoregressiveBernoulli(size, config.masked_units)
    spec = VAE(size, config.latent_dim, MLP(hidden=(config.hidden,)), likelihood)
    began = time.perf_counter()
    runs = fit(
        spec.numpyro(),
        train,
        objective=objective_of(config, objective),
        start=start_of(config, start),
        epochs=config.epochs - (config.start_epochs if start != "normal" else 0),
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        binarize="stochastic",
        replicates=config.num_seeds,
    )
    trained = time.perf_counter()
    found = local_minima(runs, test, num_particles=config.num_particles, tolerance=config.tolerance)
    rates = np.array([[row["rate"] for row in run.history] for run in runs])
    summary = found.summary()
    phases = [run.config["phase"] or {} for run in runs]  # none after a normal start
    del summary["live_units"]  # too long to keep; rate_by_epoch has the course in short
    return {
        "decoder": decoder,
        "start": start,
        "objective": objective,
        "share_of_long_protocol": config.epochs * len(train) / LONG,
        "train_seconds": trained - began,
        "evaluate_seconds": time.perf_counter() - trained,
        "nll_mc_se": [e.nll_mc_se for e in found.evaluations],
        "rate_by_epoch": rates.mean(axis=0).tolist(),
        "rate_in_phase": [phase.get("rate") for phase in phases],
        "live_in_phase": [phase.get("live_z") for phase in phases],
        "live_at_end": live_at_end(found),
        **summary,
    }


def live_at_end(found: LocalMinima) -> list[int]:
    """Live dimensions of each seed in the last epoch."""
    return [int(course.live[-1]) for course in found.courses]


# --- what is claimed, and whether it held ---------------------------------------------------------------------------


def gap(cells: Cells, one: tuple[str, str, str], two: tuple[str, str, str]) -> tuple[float, float] | None:
    """How much higher the mean NLL of the seeds of cell ``one`` is than that of ``two``, and its standard error.

    The error is of the choice of seeds (Welch's); the images are the same. None where a cell is not there.
    """
    first, second = (cells.get("-".join(key), {}).get("nll") for key in (one, two))
    if not first or not second or min(len(first), len(second)) < 2:
        return None
    error = math.sqrt(np.var(first, ddof=1) / len(first) + np.var(second, ddof=1) / len(second))
    return float(np.mean(first) - np.mean(second)), error


REMEDIES = ("annealed", "cyclical", "free-bits", "iwae-10")


def claims(cells: Cells, tolerance: float) -> dict[str, bool]:
    """The received wisdom, claim by claim, for each decoder that there are cells of; nothing here is made to hold."""
    found: dict[str, bool | None] = {}
    for decoder in ("strong", "weak"):
        plain = cells.get(f"{decoder}-normal-elbo")
        if plain:
            found[f"{decoder} decoder, normal start: the ELBO leaves some seed with the whole latent collapsed"] = any(
                plain["collapsed"]
            )
            found[f"{decoder} decoder, normal start: some seed of the ELBO ends in a worse minimum than another"] = any(
                plain["worse"]
            )
        cell = cells.get(f"{decoder}-collapsed-elbo")
        if cell:
            found[f"{decoder} decoder, collapsed start: the ELBO does not get out in any seed"] = all(cell["collapsed"])
        stuck = gap(cells, (decoder, "collapsed", "elbo"), (decoder, "normal", "elbo"))
        claim = f"{decoder} decoder: the ELBO ends worse from the collapsed start than from the normal one"
        found[claim] = None if stuck is None else stuck[0] > tolerance and stuck[0] > 2 * stuck[1]
        for remedy in REMEDIES:
            for start in ("normal", "collapsed"):
                better = gap(cells, (decoder, start, "elbo"), (decoder, start, remedy))
                claim = f"{decoder} decoder, {start} start: {remedy} ends better than the ELBO"
                found[claim] = None if better is None else better[0] > tolerance and better[0] > 2 * better[1]
    return {claim: bool(held) for claim, held in found.items() if held is not None}


def main(config: Config) -> None:
    """Run every cell, then say which claims held."""
    if config.smoke:
        config = Config(
            data="digits",
            decoders=("strong",),
            starts=("normal", "collapsed"),
            objectives=("elbo",),
            num_seeds=2,
            num_train=300,
            epochs=3,
            start_epochs=1,
            hidden=5,
            latent_dim=2,
            masked_units=4,
            num_particles=5,
            num_test=50,
            results=config.results.with_name("smoke_local_minima.json"),
        )
    record = Record(config.results, __doc__ or "", config, ("numpyro",), grid=("decoders", "starts", "objectives"))
    with compiled_once():  # cells that differ in their start alone are compiled once
        for decoder, start, objective in itertools.product(config.decoders, config.starts, config.objectives):
            key = f"{decoder}-{start}-{objective}"
            cell = record.cell(key, lambda c=(decoder, start, objective): measure(config, *c))
            mean, count = np.mean(cell["nll"]), len(cell["nll"])
            seconds = cell["train_seconds"] + cell["evaluate_seconds"]
            print(
                f"{key}: NLL {mean:.2f} (K={config.num_particles}), rate {np.mean(cell['rate']):.2f}, "
                f"{sum(cell['collapsed'])} of {count} collapsed, {cell['num_minima']} minima, {seconds:.0f} s",
                flush=True,
            )
    record.check(claims(record.content["cells"], config.tolerance))


if __name__ == "__main__":
    main(tyro.cli(Config))
