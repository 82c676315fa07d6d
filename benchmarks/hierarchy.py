"""Where do the upper layers of a hierarchical VAE die, and what revives them? L = 1 … 5 on MNIST, 4 seeds a cell.

Cells: L × {bottom-up, ladder} × {plain, warm-up}, ladders also with a warm-up that begins at one layer after another
(``layerwise``: the data's side first, so that upper layers stay the cheaper ones until the end), and for L = 5 that of
the bottom-up guide, free bits, and free bits with warm-up. Bottom-up is ``HierarchicalVAE``, ladder ``LadderVAE``: the
same decoders, data, steps and optimiser; only the guide differs, and the law of its initial weights (those of a ladder
are larger, with which a bottom-up guide's tower of exponentials overflows). For L = 1 the two are one model but for a
scale's parameters, and the first is trained. Latents 64-32-16-8-4 and two hidden layers below each, as Sønderby et al.
(2016), with narrower layers (128-64-48-32-24 units for their 512-256-128-64-32), He's initial weights for their batch
normalisation (see docs/design/0004), and Adam at 1e-3 for 2e-4. Pixels are redrawn at every step with the grey value as
mean. Warm-ups take 7/8 of the run (in the paper a tenth of one that is many times longer).

Reported for each seed: NLL with K importance samples on held-out images (one binary draw of each, the same for all),
nats and active units of each layer. A cell in which a seed's training met nan or infinity says so and has no figures.
The default is a small share of the paper's 2000 epochs, stated in each cell; its protocol is ``--num-train 60000
--epochs 2000 --warmup 0.1 --delay 0.005 --hidden 512 256 128 64 32 --learning-rate 2e-4``.

    python benchmarks/hierarchy.py --data-dir DIR
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from elbozoo.benchmarks.datasets import load
from elbozoo.benchmarks.records import Record, compiled_once
from elbozoo.inference import (
    ELBO,
    Adam,
    AnnealedKL,
    FreeBits,
    LayerwiseAnnealedKL,
    NonFinite,
    Objective,
    evaluate,
    fit,
)
from elbozoo.inference.arrays import standard_error
from elbozoo.zoo import HierarchicalVAE, LadderVAE

PROTOCOL = 60_000 * 2000
"""Images seen in the paper's."""

DEAD = 0.05
"""Nats below which a layer counts as dead."""

Cells = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        data: data set.
        data_dir: folder with the files; ELBOZOO_DATA or a download otherwise.
        layers: numbers of stochastic layers.
        guides: bottom-up, ladder.
        objectives: plain, warm-up, free-bits, warm-up-free-bits, layerwise.
        num_seeds: seeds 0 … num_seeds - 1, trained at once.
        num_train: training images.
        epochs: passes over them.
        warmup: share of the run until the KL is charged in full.
        beta: price of the KL before its warm-up; at 0 nothing keeps scales from running off.
        delay: share of the run from the beginning of one layer's warm-up to the next's, where they differ.
        batch_size, learning_rate, clip_norm: of Adam's steps.
        latent_dims, hidden: of five layers, next to the data first; L layers are the first L.
        normalization: "none" or "layer", of the hidden layers.
        output_gain: factor on the initial weights of the last layers, but not of those of a ladder's guide.
        hidden_gain: factor on the hidden layers'; by default He's, which keeps variances through rectifiers.
        free_bits: nats a layer.
        num_particles: K of the reported NLL.
        num_test: held-out images.
        results: JSON file to write and to go on from.
        smoke: a few seconds on digits, to see that it runs.
    """

    data: str = "mnist"
    data_dir: Path | None = None
    layers: tuple[int, ...] = (5, 1, 2, 3, 4)
    guides: tuple[str, ...] = ("bottom-up", "ladder")
    objectives: tuple[str, ...] = ("plain", "warm-up", "free-bits", "warm-up-free-bits", "layerwise")
    num_seeds: int = 4
    num_train: int = 20_000
    epochs: int = 36
    warmup: float = 0.875
    beta: float = 0.001
    delay: float = 0.05
    batch_size: int = 128
    learning_rate: float = 1e-3
    clip_norm: float = 50.0
    latent_dims: tuple[int, ...] = (64, 32, 16, 8, 4)
    hidden: tuple[int, ...] = (128, 64, 48, 32, 24)
    normalization: str = "none"
    output_gain: float = 0.1
    hidden_gain: float = sqrt(2)
    free_bits: float = 2.0
    num_particles: int = 200
    num_test: int = 500
    results: Path = Path("benchmarks/results/hierarchy.json")
    smoke: bool = False


def objective_of(config: Config, name: str, layers: int) -> Objective:
    """The objective of a cell."""
    warmup, delay = config.warmup * config.epochs, config.delay * config.epochs
    free_bits = FreeBits(ELBO(), free_bits=config.free_bits, per="site")
    return {
        "plain": ELBO(),
        "warm-up": AnnealedKL(ELBO(), warmup=warmup, start=config.beta),
        "free-bits": free_bits,
        "warm-up-free-bits": AnnealedKL(free_bits, warmup=warmup, start=config.beta),
        "layerwise": LayerwiseAnnealedKL(ELBO(), warmup - (layers - 1) * delay, delay, start=config.beta),
    }[name]


def worth(layers: int, guide: str, objective: str) -> bool:
    """Whether a cell is run: one layer has one guide and one warm-up, and the rarer remedies are for the deepest."""
    if layers == 1:
        return guide == "bottom-up" and objective in ("plain", "warm-up")
    return layers == 5 or objective in ("plain", "warm-up", *(["layerwise"] if guide == "ladder" else []))


def grid(config: Config) -> list[tuple[int, str, str]]:
    """Every cell that is run: layers, guide and objective."""
    every = itertools.product(config.layers, config.objectives, config.guides)
    return [(layers, guide, objective) for layers, objective, guide in every if worth(layers, guide, objective)]


def measure_or_say(config: Config, layers: int, guide: str, objective: str) -> dict[str, Any]:
    """The figures of one cell, or where its training ended."""
    try:
        return measure(config, layers, guide, objective)
    except NonFinite as error:
        return {"layers": layers, "guide": guide, "objective": objective, "diverged": str(error).splitlines()[0]}


def measure(config: Config, layers: int, guide: str, objective: str) -> dict[str, Any]:
    """Train and evaluate the seeds of one cell."""
    data = load(config.data, data_dir=config.data_dir)
    train, test = data.train[: config.num_train], data.test[: config.num_test]
    kind = {"bottom-up": HierarchicalVAE, "ladder": LadderVAE}[guide]
    shape: dict[str, Any] = {"latent_dims": config.latent_dims[:layers], "hidden": config.hidden[:layers]}
    shape |= {name: getattr(config, name) for name in ("normalization", "output_gain", "hidden_gain")}
    spec = kind(train.shape[1], **shape, activation="leaky_relu")
    began = time.perf_counter()
    runs = fit(
        spec.numpyro(),
        train,
        objective=objective_of(config, objective, layers),
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimizer=Adam(config.learning_rate, clip_norm=config.clip_norm),
        binarize="stochastic",
        replicates=config.num_seeds,
    )
    trained = time.perf_counter()
    x = runs[0].prepare(test)[0]
    found = [evaluate(run.program, x, num_particles=config.num_particles) for run in runs]
    sites = [f"z{layer}" for layer in range(1, layers + 1)]
    return {
        "layers": layers,
        "guide": guide,
        "objective": objective,
        "share_of_protocol": config.epochs * len(train) / PROTOCOL,
        "train_seconds": trained - began,
        "evaluate_seconds": time.perf_counter() - trained,
        "num_particles": config.num_particles,
        "num_data": len(x),
        "nll": [e.nll for e in found],
        "nll_se": [e.nll_se for e in found],
        "nll_mc_se": [e.nll_mc_se for e in found],
        "elbo": [e.elbo for e in found],
        "nats": [[e.rate_per_site[site] for site in sites] for e in found],
        "active": [[e.active_units[site] for site in sites] for e in found],
        "bound_by_epoch": np.mean([[row["bound"] for row in run.history] for run in runs], axis=0).tolist(),
        "nats_by_epoch": np.mean([[[row[f"kl_{s}"] for s in sites] for row in r.history] for r in runs], 0).tolist(),
    }


# --- what is claimed, and whether it held ---------------------------------------------------------------------------


def ended(cells: Cells) -> Cells:
    """The cells whose training came to its end."""
    return {key: cell for key, cell in cells.items() if "diverged" not in cell}


def gap(cells: Cells, one: str, two: str) -> tuple[float, float] | None:
    """How much higher the mean NLL of cell ``one`` is than that of ``two``, paired by seed, and its standard error."""
    cells = ended(cells)
    if one not in cells or two not in cells:
        return None
    difference = np.subtract(cells[one]["nll"], cells[two]["nll"])
    return float(difference.mean()), standard_error(difference)


def tops_alive(cell: Mapping[str, Any]) -> list[bool]:
    """Whether the top layer is alive, seed by seed, in a cell that ended."""
    return [bool(layers[-1] > DEAD) for layers in cell["nats"]]


def claims(cells: Cells) -> dict[str, bool]:
    """The received wisdom, claim by claim, where there are the cells; nothing here is made to hold."""
    found: dict[str, bool] = {}

    def lower(claim: str, one: str, two: str) -> None:
        if (found_gap := gap(cells, two, one)) is not None:
            found[claim] = found_gap[0] > 2 * found_gap[1]

    for layers in (2, 3, 4, 5):
        for guide, objective, alive in (
            ("bottom-up", "plain", False),
            ("bottom-up", "warm-up", False),
            ("ladder", "warm-up", True),
            ("ladder", "layerwise", True),
        ):
            cell = ended(cells).get(f"{layers}-{guide}-{objective}")
            if cell is not None:
                living = tops_alive(cell)
                state = "alive" if alive else f"dead (below {DEAD} nats)"
                claim = f"L = {layers}: {guide}, {objective}: the top layer is {state} in most seeds"
                found[claim] = living.count(alive) > len(living) / 2
        for objective, guide in itertools.product(Config.objectives[1:], ("bottom-up", "ladder")):
            claim = f"L = {layers}, {guide}: {objective} has a lower NLL than plain"
            lower(claim, f"{layers}-{guide}-{objective}", f"{layers}-{guide}-plain")
        for ours, theirs in (("warm-up", "plain"), ("warm-up", "warm-up"), ("layerwise", "warm-up")):
            claim = f"L = {layers}: ladder, {ours}, has a lower NLL than bottom-up, {theirs}"
            lower(claim, f"{layers}-ladder-{ours}", f"{layers}-bottom-up-{theirs}")
    for guide, objective in itertools.product(("bottom-up", "ladder"), ("plain", "warm-up", "layerwise")):
        least = "warm-up" if objective == "layerwise" else objective
        claim = f"{guide}, {objective}: five layers have a lower NLL than one"
        lower(claim, f"5-{guide}-{objective}", f"1-bottom-up-{least}")
    return found


def main(config: Config) -> None:
    """Run every cell, then say which claims held."""
    if config.smoke:
        config = Config(
            data="digits",
            layers=(2,),
            objectives=("plain",),
            num_seeds=2,
            num_train=300,
            epochs=2,
            latent_dims=(4, 2),
            hidden=(8, 4),
            num_particles=5,
            num_test=50,
            results=config.results.with_name("smoke_hierarchy.json"),
        )
    for layers, _, objective in grid(config):
        objective_of(config, objective, layers)  # what it refuses is refused before anything is trained
    record = Record(config.results, __doc__ or "", config, ("numpyro",), grid=("layers", "guides", "objectives"))
    with compiled_once():  # cells that differ in their objective are evaluated by one program
        for layers, guide, objective in grid(config):
            key = f"{layers}-{guide}-{objective}"
            cell = record.cell(key, lambda c=(layers, guide, objective): measure_or_say(config, *c))
            if "diverged" in cell:
                print(f"{key}: {cell['diverged']}", flush=True)
                continue
            by_layer = " ".join(f"{n:.2f}" for n in np.mean(cell["nats"], axis=0))
            seconds = cell["train_seconds"] + cell["evaluate_seconds"]
            nll = f"NLL {np.mean(cell['nll']):.2f} (K={config.num_particles})"
            print(f"{key}: {nll}, nats {by_layer}, {seconds:.0f} s", flush=True)
    record.check(claims(record.content["cells"]))


if __name__ == "__main__":
    main(tyro.cli(Config))
