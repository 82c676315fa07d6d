"""What does the harness cost, against hand-written training loops of the same mathematics and pythae's trainer?

A 784-400-400-20 VAE (ReLU, Bernoulli, diagonal Gaussian guide), batch 128, Adam 1e-3: the ELBO with analytic KL at
K=1, and IWAE at K=50. A two-layer hierarchy under IWAE, also against the engines' own ``RenyiELBO`` under their own
``SVI``, and a sigmoid belief net under VIMCO, both at K=5. All contenders run in one process, one epoch each in turn,
so that what else the machine does hits all of them; what is reported is the ratio within each round, its median and a
95% interval of that: many short rounds, for a shared machine is now fast, now slow. ``fit`` runs
exactly the epoch timed here (its loop object is driven directly, so that epochs of the contenders can alternate).
Compilation and the first epochs are left out.

Replicates are timed on three networks, for what they gain depends on how busy one run keeps the processor; and as
whole calls of ``fit``, compilation included.

    python benchmarks/overhead.py
"""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from elbozoo.benchmarks.loops import (
    Loop,
    hand_written_jax,
    hand_written_torch,
    has_pythae,
    numpyro_svi,
    ours,
    products_jax,
    pyro_svi,
    pythae_trainer,
    ratio,
    rounds,
)
from elbozoo.benchmarks.records import Record
from elbozoo.inference import ELBO, fit
from elbozoo.zoo import MLP, VAE, HierarchicalVAE, SigmoidBeliefNet

D, Z, H, BATCH = 784, 20, 400, 128
TARGETS = {
    "numpyro / hand-written JAX": 1.05,
    "pyro / hand-written PyTorch": 1.15,
    "numpyro / its own RenyiELBO": 1.0,
    "pyro / its own RenyiELBO": 1.0,
    "pythae / numpyro": 2.0,
    "epochs of 8 replicates / 8 runs": 0.9,
    "fits of 8 replicates / 8 runs": 0.9,
}

PRODUCTS = "matrix products alone, JAX"
"""No contender: what is left of a step where everything but its matrix products takes no time."""

MODELS = {
    "two layers, IWAE, K=5": HierarchicalVAE(D, (32, 16), (200, 100)),
    "sigmoid belief net, VIMCO, K=5": SigmoidBeliefNet(D, (100,)),
}
"""Timed at K = 5 beside the VAE."""

NETWORKS = {  # (data, hidden, latent, batch)
    "64-100-100-16, batch 100": (64, 100, 16, 100),
    "784-200-200-50, batch 20": (784, 200, 50, 20),
    "784-400-400-20, batch 128": (D, H, Z, BATCH),
}
"""On which replicates are timed: the demo's, Burda et al.'s, and the one of this benchmark."""


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        repeats: timed rounds; every contender runs one epoch in each.
        batches_1: minibatches an epoch at K = 1.
        batches_50: minibatches an epoch at K = 50.
        batches_models: minibatches an epoch of the other models.
        batches_replicates: minibatches an epoch of the replicates.
        replicates: replicates of the run of several.
        whole_epochs: epochs of the whole calls of ``fit``.
        whole_repeats: timed pairs of whole calls.
        pythae: time pythae's trainer too, where the extra ``bench`` is installed.
        fresh: measure all cells anew, those too that the file has.
        results: JSON file to write; its cells are kept, for ratios within rounds compare where hours do not.
        smoke: two rounds of two batches of some cells, to see that it runs.
    """

    repeats: int = 31
    batches_1: int = 40
    batches_50: int = 1
    batches_models: int = 10
    batches_replicates: int = 20
    replicates: int = 8
    whole_epochs: int = 5
    whole_repeats: int = 6
    pythae: bool = True
    fresh: bool = False
    results: Path = Path("benchmarks/results/overhead.json")
    smoke: bool = False


AXES = ("repeats", "batches_1", "batches_50", "batches_models", "batches_replicates", "whole_epochs", "whole_repeats")
AXES += ("pythae", "fresh", "smoke")
"""Settings that say how often something is timed, and nothing of what is."""


def vae(data: int = D, hidden: int = H, latent: int = Z) -> VAE:
    """A VAE with two hidden layers each way."""
    return VAE(data, latent, network=MLP(hidden=(hidden, hidden), activation="relu"))


def pixels(num: int, dim: int = D) -> np.ndarray:
    """Data of the right kind; what they are does not matter here."""
    return (np.random.default_rng(0).random((num, dim)) < 0.2).astype(np.float32)


def measure(config: Config, k: int) -> dict[str, Any]:
    """All contenders on the VAE at one K."""
    num = BATCH * (config.batches_1 if k == 1 else config.batches_50)
    x = pixels(num)
    contenders = ours_and_by_hand(vae(), x, k)
    if config.pythae and has_pythae():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # third-party deprecations
            contenders["pythae"] = pythae_trainer(vae(), x, k, BATCH)
    more = {
        "pythae / numpyro": ("pythae", "numpyro"),
        "pythae / matrix products in JAX": ("pythae", PRODUCTS),
        "numpyro / matrix products in JAX": ("numpyro", PRODUCTS),
    }
    return figures(contenders | {PRODUCTS: products_jax(vae(), x, k, BATCH)}, num, config.repeats, more)


def measure_model(config: Config, name: str, k: int = 5) -> dict[str, Any]:
    """All contenders on another model; the engines' own losses are not for latents that take no path."""
    spec, num = MODELS[name], BATCH * config.batches_models
    x = pixels(num)
    contenders, more = ours_and_by_hand(spec, x, k), {}
    if isinstance(spec, HierarchicalVAE):
        for engine, svi in (("numpyro", numpyro_svi), ("pyro", pyro_svi)):
            contenders[f"{engine}'s own"] = svi(spec, x, k, BATCH)
            more[f"{engine} / its own RenyiELBO"] = (engine, f"{engine}'s own")
    return figures(contenders, num, config.repeats, more)


def ours_and_by_hand(spec: Any, x: np.ndarray, k: int) -> dict[str, Loop]:
    """The four loops that every model has."""
    return {
        "numpyro": ours("numpyro", spec, x, k, BATCH),
        "hand-written JAX": hand_written_jax(spec, x, k, BATCH),
        "pyro": ours("pyro", spec, x, k, BATCH),
        "hand-written PyTorch": hand_written_torch(spec, x, k, BATCH),
    }


def figures(contenders: dict[str, Loop], num: int, repeats: int, more: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Times, and ratios: with those of ``more`` where both are there."""
    seconds = rounds(contenders, repeats)
    wanted = {
        "numpyro / hand-written JAX": ("numpyro", "hand-written JAX"),
        "pyro / hand-written PyTorch": ("pyro", "hand-written PyTorch"),
        **more,
    }
    return {
        "images_per_epoch": num,
        "seconds": seconds,
        "images_per_second": {n: num / statistics.median(s) for n, s in seconds.items()},
        "ratios": {n: ratio(seconds[a], seconds[b]) for n, (a, b) in wanted.items() if {a, b} <= set(seconds)},
    }


def measure_replicates(config: Config, network: str) -> dict[str, Any]:
    """Several seeds at once against as many runs of one seed: epochs, and one whole call of ``fit`` each way."""
    data, hidden, latent, batch = NETWORKS[network]
    spec, count = vae(data, hidden, latent), config.replicates
    x = pixels(batch * config.batches_replicates, data)
    contenders = {
        "replicates": ours("numpyro", spec, x, 1, batch, replicates=count),
        "run": ours("numpyro", spec, x, 1, batch),
    }
    seconds = rounds(contenders, config.repeats)

    def whole(replicates: int | None, seed: int) -> float:
        start = time.perf_counter()
        settings: dict[str, Any] = {"epochs": config.whole_epochs, "batch_size": batch, "progress": False}
        fit(spec.numpyro(), x, objective=ELBO(), seed=seed, replicates=replicates, **settings)
        return time.perf_counter() - start

    fits: dict[str, list[float]] = {"replicates": [], "runs": []}
    for _ in range(config.whole_repeats):
        fits["replicates"].append(whole(count, 0))
        fits["runs"].append(sum(whole(None, seed) for seed in range(count)))
    return {
        "seconds": seconds,
        "fits": fits,
        "ratios": {
            "epochs of 8 replicates / 8 runs": ratio(seconds["replicates"], [count * s for s in seconds["run"]]),
            "fits of 8 replicates / 8 runs": ratio(fits["replicates"], fits["runs"]),
        },
    }


def verdict_of(name: str, r: dict[str, Any]) -> tuple[str, bool]:
    """A ratio's claim against its target, and whether its median holds it; the claim says where that is undecided."""
    target = TARGETS[name]
    claim, good = f"{name}, target {target}", r["median"] <= target
    if name.startswith("pythae"):
        good = r["median"] >= target
    if r["low"] is not None and r["low"] <= target <= r["high"]:
        claim += " (by the median alone: its 95% interval holds the target)"
    return claim, good


def main(config: Config) -> None:
    """Time what is not there yet, and say which targets are met."""
    cells = {f"K={k}": partial(measure, k=k) for k in (1, 50)}
    cells |= {name: partial(measure_model, name=name) for name in MODELS}
    cells |= {network: partial(measure_replicates, network=network) for network in NETWORKS}
    if config.smoke:
        small: dict[str, Any] = {"batches_1": 2, "batches_50": 1, "batches_models": 1, "batches_replicates": 2}
        results = config.results.with_name("smoke_overhead.json")
        config = Config(2, **small, replicates=2, pythae=False, whole_epochs=1, whole_repeats=1, results=results)
        cells = {name: cells[name] for name in ("K=1", next(iter(NETWORKS)))}
    if config.fresh:
        config.results.unlink(missing_ok=True)
    record = Record(config.results, __doc__ or "", config, ("numpyro", "pyro"), grid=AXES)
    checks = {}
    for key, measured in cells.items():
        for name, r in record.cell(key, partial(measured, config))["ratios"].items():
            print(f"{key:30s} {name:32s} {r['median']:.3f}  [{r['min']:.3f}, {r['max']:.3f}]", flush=True)
            if name in TARGETS:
                claim, good = verdict_of(name, r)
                checks[f"{key}: {claim}"] = good
    record.check(checks)
    for claim, good in checks.items():
        print(f"{'holds' if good else 'DOES NOT HOLD'}: {claim}")


if __name__ == "__main__":
    main(tyro.cli(Config))
