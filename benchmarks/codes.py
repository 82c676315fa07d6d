"""What do discrete codes cost and carry? VQ-VAE on Fashion-MNIST, against a categorical and a continuous VAE.

Every model has the same networks (two ReLU layers each way), the same 8-bit likelihood, data, steps and optimiser.
VQ-VAEs and the categorical VAE have the same budget: 32 indices of 64 codes. Variants of the VQ-VAE: a codebook of
moving averages that revives dead codes, one that gradients move; a learned autoregressive prior in place of the uniform
one; two residual codebooks of 8 codes a position (the same budget) and a finite scalar grid of 8 x 8 levels; and, at a
larger budget, 1024 codes with and without revival. The categorical VAE trains under Gumbel-softmax with a temperature
that falls from 1 to 0.5, and is reported as the discrete model that it is. The autoencoder has no bottleneck in nats
and no bound.

Reported on held-out images: minus the ELBO in bits/dim, distortion and rate in nats, how many codes are used (their
perplexity), and pictures. One seed; the share of the original's 250,000 steps is in each cell.

    python benchmarks/codes.py --data-dir DIR
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from elbozoo.benchmarks.datasets import load
from elbozoo.benchmarks.records import Record, compiled_once
from elbozoo.inference import ELBO, Adam, GumbelSoftmax, Objective, StraightThrough, evaluate, fit
from elbozoo.zoo import (
    MLP,
    VAE,
    VQVAE,
    Autoencoder,
    CategoricalVAE,
    Codebook,
    DiscretizedLogistic,
    FiniteScalar,
    Residual,
    Spec,
    code_usage,
)

PROTOCOL = 250_000 * 128
"""Images seen in van den Oord et al.'s: 250,000 steps with batches of 128."""

MODELS = ("vq", "vq, learned prior", "vq, gradient", "categorical", "continuous", "autoencoder")
MODELS += ("vq, 1024 codes", "vq, 1024 codes, no revival", "vq, residual", "vq, finite scalar")

MANY = 1024
"""Codes of the codebook that is too large to be all used."""

PICTURES = 8
"""Reconstructions and samples that a cell keeps."""

Cells = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        data: data set.
        data_dir: folder with the files; ELBOZOO_DATA or a download otherwise.
        models: names from the list of the script.
        num_latents: indices of a datum; entries of the continuous latent.
        num_codes: a square.
        code_dim: entries of a code.
        hidden: units of each of the two layers each way.
        num_train: training images.
        epochs: passes over them.
        batch_size, learning_rate, clip_norm: of Adam's steps.
        num_test: held-out images.
        results: JSON file to write and to go on from.
        smoke: a few seconds on digits, to see that it runs.
    """

    data: str = "fashion-mnist"
    data_dir: Path | None = None
    models: tuple[str, ...] = MODELS
    num_latents: int = 32
    num_codes: int = 64
    code_dim: int = 8
    hidden: int = 400
    num_train: int = 20_000
    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    clip_norm: float = 1000.0
    num_test: int = 1000
    results: Path = Path("benchmarks/results/codes.json")
    smoke: bool = False


@dataclass(frozen=True)
class Falling:
    """A temperature that falls from 1 to 0.5, halfway through the run."""

    steps: int

    def __call__(self, step: Any) -> Any:
        share = step / (self.steps / 2)
        return 1.0 - 0.5 * (share * (share < 1) + 1.0 * (share >= 1))


def cell_of(config: Config, model: str, levels: int, data_dim: int) -> tuple[Spec, Objective]:
    """The model and the objective of a cell."""
    network = MLP((config.hidden, config.hidden), "relu")
    shape: dict[str, Any] = {"network": network, "likelihood": DiscretizedLogistic(levels)}
    codes, root = (config.num_codes, config.code_dim), math.isqrt(config.num_codes)
    quantizer = {
        "vq": Codebook(*codes, update="ema", revive=0.1),
        "vq, 1024 codes": Codebook(MANY, config.code_dim, update="ema", revive=0.1),
        "vq, 1024 codes, no revival": Codebook(MANY, config.code_dim, update="ema"),
        "vq, gradient": Codebook(*codes),
        "vq, learned prior": Codebook(*codes, update="ema", revive=0.1),
        "vq, residual": Residual(root, config.code_dim, update="ema", revive=0.1, depth=2),
        "vq, finite scalar": FiniteScalar((root, root)),
    }
    if model in quantizer:
        prior = "autoregressive" if model == "vq, learned prior" else "uniform"
        spec = VQVAE(data_dim, config.num_latents, quantizer=quantizer[model], prior=prior, **shape)
        return spec, ELBO(gradient=StraightThrough())
    if model == "categorical":
        steps = config.epochs * (config.num_train // config.batch_size)
        spec = CategoricalVAE(data_dim, config.num_latents, config.num_codes, **shape)
        return spec, ELBO(gradient=GumbelSoftmax(Falling(steps)))
    kind = {"continuous": VAE, "autoencoder": Autoencoder}[model]
    return kind(data_dim, config.num_latents, **shape), ELBO()


def measure(config: Config, model: str) -> dict[str, Any]:
    """Train and evaluate one model."""
    data = load(config.data, data_dir=config.data_dir)
    train, test = data.train[: config.num_train], data.test[: config.num_test]
    spec, objective = cell_of(config, model, data.levels, train.shape[1])
    began = time.perf_counter()
    run = fit(
        spec.numpyro(),
        train,
        objective=objective,
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimizer=Adam(config.learning_rate, clip_norm=config.clip_norm),
    )
    seconds = time.perf_counter() - began
    cell: dict[str, Any] = {
        "model": model,
        "share_of_protocol": config.epochs * len(train) / PROTOCOL,
        "train_seconds": seconds,
        "num_data": len(test),
        "pixels": train.shape[1],
    }
    few = (run.prepare(test[:PICTURES])[0],)
    pictures = {"data": few[0], "reconstruction": run.program.predict(few, seed=0)["mean"]["x"][0]}
    if model == "autoencoder":
        cell["distortion"] = reconstruction(run.program, run.prepare(test)[0])
    else:
        cell |= scores(run.program, run.prepare(test)[0])
        pictures["sample"] = run.program.predict(few, seed=1, prior=True)["mean"]["x"][0]
    if isinstance(spec, VQVAE):
        usage = code_usage(run.program, test)
        cell |= {"perplexity": usage.perplexity.tolist(), "used": usage.used.tolist()}
    return cell | {"pictures": {name: packed(x) for name, x in pictures.items()}}


def scores(program: Any, x: np.ndarray) -> dict[str, Any]:
    """Bound in bits/dim with its standard error, distortion and rate in nats."""
    found = evaluate(program, x, num_particles=1 if isinstance(program.spec, VQVAE) else 20)
    bits = -found.per_datum.elbo / (x.shape[1] * math.log(2.0))
    return {
        "bits_per_dim": float(bits.mean()),
        "bits_per_dim_se": float(bits.std(ddof=1) / math.sqrt(len(bits))),
        "distortion": found.distortion,
        "rate": found.rate,
    }


def reconstruction(program: Any, x: np.ndarray) -> float:
    """``-log p(x | z)`` at the encoder's z, nats a datum, which for an autoencoder is all there is."""
    return float(-np.asarray(program.apply(lambda terms: terms.log_lik, (x,))).mean())


def packed(images: np.ndarray) -> str:
    """Means in [0, 1] as 8-bit grey values."""
    return base64.b64encode((np.clip(images, 0, 1) * 255).round().astype(np.uint8).tobytes()).decode()


def unpacked(images: str, pixels: int) -> np.ndarray:
    """The same as square images."""
    side = math.isqrt(pixels)
    return np.frombuffer(base64.b64decode(images), np.uint8).reshape(-1, side, side)


CLAIMS = (
    ("vq, learned prior", "vq", "bits_per_dim", "a learned prior lowers -ELBO in bits/dim"),
    ("vq, 1024 codes, no revival", "vq, 1024 codes", "perplexity", "without revival the codes' perplexity is lower"),
    ("vq", "categorical", "distortion", "at one budget the VQ-VAE's distortion is below the categorical's"),
    ("vq", "categorical", "bits_per_dim", "at one budget codes with a uniform prior beat the categorical's -ELBO"),
    ("vq, learned prior", "categorical", "bits_per_dim", "at one budget a learned prior beats the categorical's"),
    ("vq", "vq, residual", "distortion", "at one budget one codebook's distortion is below two residual ones'"),
    ("vq", "vq, finite scalar", "distortion", "at one budget a codebook's distortion is below a finite scalar grid's"),
    ("autoencoder", "vq", "distortion", "without a bottleneck the distortion is lower than with codes"),
    ("continuous", "vq, learned prior", "bits_per_dim", "the continuous VAE's -ELBO is below the best of the codes'"),
)
"""Model, model, figure, and what is expected of the first, whose figure should be the lower one."""


def claims(cells: Cells) -> dict[str, bool]:
    """What is expected, where there are the cells; nothing here is made to hold."""
    there = [claim for claim in CLAIMS if claim[0] in cells and claim[1] in cells]
    return {said: bool(np.min(cells[a][what]) < np.min(cells[b][what])) for a, b, what, said in there}


def main(config: Config) -> None:
    """Run every cell, then say which claims held."""
    if config.smoke:
        small: dict[str, Any] = {"data": "digits", "num_latents": 2, "num_codes": 9, "code_dim": 2, "hidden": 4}
        small |= {"models": ("vq", "vq, learned prior"), "num_train": 64, "epochs": 1, "batch_size": 32}
        results = config.results.with_name("smoke_codes.json")
        config = replace(config, **small, num_test=20, results=results, smoke=False)
    record = Record(config.results, __doc__ or "", config, ("numpyro",), grid=("models",))
    with compiled_once():
        for model in config.models:
            cell = record.cell(model, lambda m=model: measure(config, m))
            bits = f"{cell['bits_per_dim']:.3f} bits/dim, " if "bits_per_dim" in cell else ""
            print(f"{model}: {bits}distortion {cell['distortion']:.1f}, {cell['train_seconds']:.0f} s", flush=True)
    record.check(claims(record.content["cells"]))


if __name__ == "__main__":
    main(tyro.cli(Config))
