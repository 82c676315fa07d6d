"""Which remedy for the bottleneck explains images best, at one wall-clock time and about one number of parameters?

A VAE, a ladder VAE, a very deep hierarchy, a VQ-VAE with a learned prior, and two diffusions (a convolutional and a
dense denoiser), on 8-bit MNIST and Fashion-MNIST: some 300,000 parameters each, Adam at one step size, and as many
steps as fit into one time on one machine, compilation included. Reported of held-out images: -ELBO in bits/dim, the
same by importance sampling where the program has weights (K beside it), rate and distortion. What is called the rate
of a diffusion is the KL of its chain, and nearly all of its nats: it reconstructs exactly. The ladder has a warm-up of
one layer shortly after another, without which ladders end in a bad minimum, and the VAE is run with a warm-up too; the
others have the plain ELBO.

    python benchmarks/remedies.py --data-dir DIR
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from elbozoo.benchmarks.codes import packed
from elbozoo.benchmarks.datasets import load
from elbozoo.benchmarks.records import Record, compiled_once
from elbozoo.inference import (
    ELBO,
    Adam,
    AnnealedKL,
    LayerwiseAnnealedKL,
    Objective,
    StraightThrough,
    Terms,
    evaluate,
    fit,
)
from elbozoo.zoo import (
    MLP,
    VAE,
    VQVAE,
    Codebook,
    DeepHierarchicalVAE,
    DiscretizedLogistic,
    DiscretizedNormal,
    LadderVAE,
    MLPDenoiser,
    Spec,
    UNet,
    VariationalDiffusion,
    draw,
)

MODELS = ("vae", "vae, warm-up", "ladder", "deep hierarchy", "vq-vae, learned prior")
MODELS += ("diffusion, dense", "diffusion, U-Net")

DRAWS = {"vq-vae, learned prior": 1, "deep hierarchy": 20, "diffusion, U-Net": 16}
"""K of the evaluation, where it is not the config's: a point mass has one draw, and convolutions are dear."""

PICTURES = 8
"""Samples that a cell keeps."""

TIMES = 20
"""Pieces of a diffusion's time whose nats a cell keeps."""

Cells = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        data: data sets.
        data_dir: folder with the files; ELBOZOO_DATA or a download otherwise.
        models: names from the list of the script.
        seconds: of training for each cell, compilation included (1800 for half an hour of each); it ends with the
            piece in which they are over.
        epoch_steps: steps of a piece.
        num_train: training images.
        scale: factor on the widths of all networks.
        warmup: steps of a warm-up; in the ladder of each layer's, which begin a tenth of it after one another.
        batch_size, learning_rate, clip_norm: of Adam's steps.
        num_test: held-out images.
        num_particles: K, draws of the latents of a held-out image (fewer where ``DRAWS`` says so).
        sampling_steps: of the diffusions' samples.
        seed: of the runs.
        results: JSON file to write and to go on from.
        smoke: a few seconds on digits, to see that it runs.
    """

    data: tuple[str, ...] = ("mnist", "fashion-mnist")
    data_dir: Path | None = None
    models: tuple[str, ...] = MODELS
    seconds: float = 300.0
    epoch_steps: int = 20
    num_train: int = 60_000
    scale: float = 1.0
    warmup: int = 10_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    clip_norm: float = 1000.0
    num_test: int = 500
    num_particles: int = 64
    sampling_steps: int = 250
    seed: int = 0
    results: Path = Path("benchmarks/results/remedies.json")
    smoke: bool = False


def cell_of(config: Config, model: str, levels: int, image_shape: tuple[int, ...]) -> tuple[Spec, Objective]:
    """The model and the objective of a cell."""
    data_dim, likelihood = math.prod(image_shape), DiscretizedLogistic(levels)

    def wide(units: int) -> int:
        return max(2, round(units * config.scale))

    if model in ("vae", "vae, warm-up"):
        warm_up = AnnealedKL(warmup=config.warmup, unit="steps", start=0.001)
        spec = VAE(data_dim, wide(32), MLP((wide(110), wide(110)), "relu"), likelihood)
        return spec, ELBO() if model == "vae" else warm_up
    if model == "ladder":
        dims, hidden = tuple(map(wide, (32, 16, 8))), tuple(map(wide, (100, 64, 48)))
        warm_up = LayerwiseAnnealedKL(warmup=config.warmup, delay=config.warmup / 10, unit="steps", start=0.001)
        return LadderVAE(data_dim, dims, hidden, likelihood=likelihood), warm_up
    if model == "deep hierarchy":
        return DeepHierarchicalVAE(image_shape, 2, wide(36), wide(28), 4, (4, 4), likelihood), ELBO()
    if model == "vq-vae, learned prior":
        codebook, network = Codebook(wide(64), 8, update="ema", revive=0.1), MLP((wide(80), wide(80)), "relu")
        spec = VQVAE(data_dim, wide(32), network, codebook, likelihood, "autoregressive", 4 * wide(12), 2)
        return spec, ELBO(gradient=StraightThrough())
    octaves = tuple(n for n in (7, 8) if 2**n <= levels)
    denoiser = {
        "diffusion, dense": MLPDenoiser(wide(100), 3),
        "diffusion, U-Net": UNet(image_shape, (wide(28), wide(56)), octaves=octaves, patch=2),
    }[model]
    likelihood = DiscretizedNormal(levels)
    return VariationalDiffusion(data_dim, denoiser, "prior", likelihood=likelihood), ELBO()


def measure(config: Config, name: str, model: str) -> dict[str, Any]:
    """Train for the time that there is, and evaluate."""
    data = load(name, data_dir=config.data_dir)
    train, test = data.train[: config.num_train], data.test[: config.num_test]
    side = math.isqrt(train.shape[1])
    spec, objective = cell_of(config, model, data.levels, (1, side, side))
    run = fit(
        spec.numpyro(),
        train,
        objective=objective,
        epochs=1_000_000,
        epoch_steps=config.epoch_steps,
        max_seconds=config.seconds,
        batch_size=config.batch_size,
        optimizer=Adam(config.learning_rate, clip_norm=config.clip_norm),
        seed=config.seed,
        progress=False,
    )
    x = run.prepare(test)[0]
    found = evaluate(run.program, x, num_particles=DRAWS.get(model, config.num_particles))
    bits = -found.per_datum.elbo / (x.shape[1] * math.log(2.0))
    return {
        "data": name,
        "model": model,
        "parameters": int(sum(w.size for w in (run.program.weights or {}).values())),
        "images_seen": run.history[-1]["step"] * config.batch_size,
        "train_seconds": sum(row["seconds"] for row in run.history),
        "bits_per_dim": float(bits.mean()),
        "bits_per_dim_se": float(bits.std(ddof=1) / math.sqrt(len(bits))),
        "nll_bits_per_dim": found.bits_per_dim(x.shape[1]) if found.weighted and found.num_particles > 1 else None,
        "num_particles": found.num_particles,
        "rate": found.rate,
        "distortion": found.distortion,
        "nats": nats(run.program, x[:200], found),
        "num_data": len(x),
        "pixels": x.shape[1],
        "samples": packed(samples(config, run.program, x)),
    }


def nats(program: Any, x: np.ndarray, found: Any) -> list[float]:
    """The rate by layer, next to the data first, or by piece of a diffusion's time, likewise."""
    if isinstance(program.spec, VariationalDiffusion):
        middle = (np.arange(TIMES) + 0.5) / TIMES
        rate = program.apply(_step, (x,), values={"time": np.repeat(middle[:, None], len(x), 1)}, analytic_kl=True)
        return (rate.mean(axis=1) / TIMES).tolist()
    if isinstance(program.spec, DeepHierarchicalVAE):
        return [float(v) for site in sorted(found.rate_per_dimension) for v in found.rate_per_dimension[site][::-1]]
    return [found.rate_per_site[site] for site in sorted(found.rate_per_site)]


def _step(terms: Terms) -> Any:
    return terms.sites["step"].rate


def samples(config: Config, program: Any, x: np.ndarray) -> np.ndarray:
    """New images: means of x given latents of the prior, draws of a diffusion."""
    if isinstance(program.spec, VariationalDiffusion):
        return draw(program, PICTURES, num_steps=config.sampling_steps, seed=config.seed)
    return program.predict((x[:PICTURES],), seed=1, prior=True)["mean"]["x"][0]


def claims(cells: Cells) -> dict[str, bool]:
    """What is expected, where there are the cells; nothing here is made to hold."""
    found: dict[str, bool] = {}
    for data in dict.fromkeys(cell["data"] for cell in cells.values()):
        bits = {cell["model"]: cell["bits_per_dim"] for cell in cells.values() if cell["data"] == data}
        for model in MODELS[1:]:
            if model in bits and "vae" in bits:
                found[f"{data}: {model} has a lower -ELBO than the VAE"] = bits[model] < bits["vae"]
        if "ladder" in bits and "vae, warm-up" in bits:
            claim = f"{data}: ladder has a lower -ELBO than the VAE under a warm-up"
            found[claim] = bits["ladder"] < bits["vae, warm-up"]
    return found


def main(config: Config) -> None:
    """Run every cell, then say which claims held."""
    if config.smoke:
        small: dict[str, Any] = {"data": ("digits",), "models": (MODELS[0], MODELS[-2]), "scale": 0.1}
        small |= {"seconds": 0.1, "num_train": 64, "batch_size": 32, "num_particles": 2, "sampling_steps": 3}
        config = replace(
            config, **small, num_test=20, results=config.results.with_name("smoke_remedies.json"), smoke=False
        )
    record = Record(config.results, __doc__ or "", config, ("numpyro",), grid=("models", "data"))
    with compiled_once():
        for data in config.data:
            for model in config.models:
                cell = record.cell(f"{data}, {model}", lambda d=data, m=model: measure(config, d, m))
                print(
                    f"{data}, {model}: {cell['bits_per_dim']:.3f} bits/dim, {cell['images_seen']} images in "
                    f"{cell['train_seconds']:.0f} s",
                    flush=True,
                )
    found = claims(record.content["cells"])
    record.check(found)
    for claim, held in found.items():
        print(f"{'holds' if held else 'DOES NOT HOLD'}: {claim}")


if __name__ == "__main__":
    main(tyro.cli(Config))
