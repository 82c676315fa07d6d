"""What does depth cost, and what does it buy? A very deep hierarchical VAE of 2, 8 and 32 stochastic layers.

``DeepHierarchicalVAE`` in NumPyro on Fashion-MNIST, 28×28 pixels of 256 levels under a discretised logistic. A quarter
of the layers (at least one) are 14×14 maps, the others 7×7; every depth sees the same images in the same order for as
many steps, under Adam with skipped updates and averaged weights. One group of layers is one ``scan``.

Reported: compile time of a training step (forward, backward and update); time a step; memory for intermediate results
by XLA's own account, with and without recomputation (``remat``); minus the ELBO in bits per dimension on held-out
images, at the averaged weights, with the standard error of each difference in depth; and the nats of each layer. Times
are of the processor (all threads together), which other work on the machine moves less than the clock's, beside those
of the clock; how a step's time grows is measured by turns of all depths, whose ratios are those within each turn.

The published protocol that comes nearest is NVAE's on MNIST (400 epochs, 20 groups, 32 channels and more, binary
pixels): each cell records the share of its images that were seen. No published figure is for these data.

    python benchmarks/depth.py --data-dir DIR
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

from elbozoo.benchmarks.datasets import Dataset, load
from elbozoo.benchmarks.loops import ratio
from elbozoo.benchmarks.records import Record
from elbozoo.inference import ELBO, Adam, Terms
from elbozoo.inference.arrays import standard_error
from elbozoo.inference.data import batches
from elbozoo.zoo import DeepHierarchicalVAE, DiscretizedLogistic

PROTOCOL = 60_000 * 400
"""Images seen in NVAE's training on MNIST (Vahdat & Kautz 2020, and the authors' code)."""

Cells = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        data: data set.
        data_dir: folder with the files; ELBOZOO_DATA or a download otherwise.
        layers: stochastic layers of each cell.
        width, hidden, latent_channels: of the model.
        num_train: training images.
        epochs: passes over them.
        batch_size, learning_rate, clip_norm, skip_norm, average: of Adam's steps.
        remat_steps: steps that are timed with recomputation.
        turns: of all depths one after another, to compare their steps' times.
        num_test: held-out images.
        seed: of everything.
        results: JSON file to write and to go on from.
        smoke: a few seconds on digits, to see that it runs.
    """

    data: str = "fashion-mnist"
    data_dir: Path | None = None
    layers: tuple[int, ...] = (2, 8, 32)
    width: int = 16
    hidden: int = 8
    latent_channels: int = 2
    num_train: int = 6400
    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 1e-3
    clip_norm: float = 500.0
    skip_norm: float = 30_000.0
    average: float = 0.98
    remat_steps: int = 20
    turns: int = 15
    num_test: int = 512
    seed: int = 0
    results: Path = Path("benchmarks/results/depth.json")
    smoke: bool = False


def spec_of(config: Config, data: Dataset, layers: int, remat: bool) -> DeepHierarchicalVAE:
    """The model of a cell."""
    fine = max(1, layers // 4)
    return DeepHierarchicalVAE(
        image_shape=(1, *data.image_shape),
        width=config.width,
        hidden=config.hidden,
        latent_channels=config.latent_channels,
        blocks=(layers - fine, fine),
        likelihood=DiscretizedLogistic(data.levels),
        remat=remat,
    )


class Steps:
    """A training step, compiled ahead of time, so that its cost is told apart from what it does."""

    def __init__(self, config: Config, data: Dataset, layers: int, remat: bool):
        import jax

        from elbozoo.inference.numpyro_trainer import Trainer

        norms = {"clip_norm": config.clip_norm, "skip_norm": config.skip_norm}
        adam = Adam(config.learning_rate, **norms, average=config.average)
        train, seeds = data.train[: config.num_train], [config.seed]
        self.trainer = Trainer(
            spec_of(config, data, layers, remat).numpyro(),
            ELBO(),
            adam,
            (train,),
            batch_size=config.batch_size,
            seeds=seeds,
            redraw_pixels=False,
            device=None,
        )
        epochs = [batches(config.seed, epoch, len(train), config.batch_size) for epoch in range(config.epochs)]
        self.order = np.concatenate(epochs).astype(np.int32)
        lowered = jax.jit(self.trainer._step).lower(self.trainer.data, self.trainer.state, self.order[0])
        clock, processor = time.perf_counter(), time.process_time()
        self.compiled = lowered.compile()
        self.cost: dict[str, Any] = {
            "compile_seconds": time.perf_counter() - clock,
            "compile_processor_seconds": time.process_time() - processor,
        }
        memory: Any = self.compiled.memory_analysis()
        self.cost["temporary_bytes"] = int(memory.temp_size_in_bytes)

    def run(self, count: int | None = None) -> dict[str, Any]:
        """Take so many steps, or all; their metrics, and the medians of their times."""
        rows, clocks, processors, state = [], [], [], self.trainer.state
        for index in self.order[:count]:
            clock, processor = time.perf_counter(), time.process_time()
            state, metrics = self.compiled(self.trainer.data, state, index)
            rows.append({name: float(value) for name, value in metrics.items()})
            clocks.append(time.perf_counter() - clock)
            processors.append(time.process_time() - processor)
        self.trainer.take(state)
        times = {"step_seconds": float(np.median(clocks)), "step_processor_seconds": float(np.median(processors))}
        return {name: [row[name] for row in rows] for name in ("bound", "grad_norm", "skipped")} | times


def what_layers_carry(terms: Terms) -> dict[str, Any]:
    """The ELBO of each datum, ``(B,)``, and the rate of each layer, ``(B, layers)``, from the first to be drawn on."""
    carried = {name: site.rate_terms.mean(axis=0) for name, site in terms.sites.items() if site.rate_terms is not None}
    return {"elbo": terms.log_weight.mean(axis=0), **carried}


def trained(config: Config, layers: int) -> dict[str, Any]:
    """Train one depth and measure it on held-out images."""
    data = load(config.data, data_dir=config.data_dir)
    steps = Steps(config, data, layers, remat=False)
    run, (program,) = steps.run(), steps.trainer.programs()
    test, size = data.test[: config.num_test], min(128, config.num_test)
    parts = [
        program.apply(what_layers_carry, (test[i : i + size],), seed=i, analytic_kl=True)
        for i in range(0, len(test) // size * size, size)
    ]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    bits = -found.pop("elbo") / (test.shape[1] * math.log(2.0))
    bound = np.array(run.pop("bound"))
    return {
        "layers": layers,
        "share_of_protocol": len(bound) * config.batch_size / PROTOCOL,
        "steps": len(bound),
        **steps.cost,
        **run,
        "skipped": float(np.mean(run["skipped"])),
        "grad_norm": float(np.median(run["grad_norm"])),
        "train_bits_by_tenth": [
            float(-b.mean() / (test.shape[1] * math.log(2.0))) for b in np.array_split(bound, min(10, len(bound)))
        ],
        "bits_per_dim": float(bits.mean()),
        "bits_per_dim_se": standard_error(bits),
        "bits_of_image": bits.round(5).tolist(),
        "shapes": {name: list(shape) for name, shape in program.spec.shapes.items()},
        "nats_by_layer": {name: found[name].mean(axis=0).tolist() for name in program.spec.shapes},
    }


def recomputed(config: Config, layers: int) -> dict[str, Any]:
    """The cost of a step that keeps no intermediate results."""
    steps = Steps(config, load(config.data, data_dir=config.data_dir), layers, remat=True)
    run = steps.run(config.remat_steps)
    return {"layers": layers, **steps.cost, **{k: v for k, v in run.items() if k.startswith("step_")}}


def in_turn(config: Config) -> dict[str, Any]:
    """Processor seconds of a step of each depth, by turns, in each of which the depths run about equally long."""
    data = load(config.data, data_dir=config.data_dir)
    steps = {layers: Steps(config, data, layers, remat=False) for layers in config.layers}
    for each in steps.values():
        each.run(1)
    taken: dict[int, list[float]] = {layers: [] for layers in steps}
    for turn in range(config.turns):
        for layers in sorted(steps, reverse=turn % 2 == 1):  # a machine that grows slower favours no depth
            found = steps[layers].run(2 * max(config.layers) // layers)
            taken[layers].append(found["step_processor_seconds"])
    pairs = itertools.pairwise(config.layers)
    growth = {f"{few} to {many}": ratio(taken[many], taken[few]) for few, many in pairs}
    return {"step_processor_seconds": {str(layers): found for layers, found in taken.items()}, "growth": growth}


# --- what is claimed, and whether it held ---------------------------------------------------------------------------


def fall(cells: Cells, few: int, many: int) -> tuple[float, float]:
    """How many bits per dimension ``many`` layers are below ``few``, and the paired standard error over images."""
    one, two = (np.array(cells[f"trained-{layers}"]["bits_of_image"]) for layers in (few, many))
    return float((one - two).mean()), standard_error(one - two)


def claims(cells: Cells, layers: tuple[int, ...]) -> dict[str, bool]:
    """Of each depth, and of each against the next one."""
    found = {
        f"{n} layers: a step with recomputation needs no more memory": cells[f"recomputed-{n}"]["temporary_bytes"]
        <= cells[f"trained-{n}"]["temporary_bytes"]
        for n in layers
    }
    for few, many in itertools.pairwise(layers):
        one, two, growth = cells[f"trained-{few}"], cells[f"trained-{many}"], many / few
        lean, leaner = cells[f"recomputed-{few}"], cells[f"recomputed-{many}"]
        mean, error = fall(cells, few, many)
        found |= {
            f"{few} to {many} layers: a step takes at most twice as long to compile": two["compile_processor_seconds"]
            <= 2 * one["compile_processor_seconds"],
            f"{few} to {many} layers: a step's time grows at most as the layers do, by the median of the turns": cells[
                "in turn"
            ]["growth"][f"{few} to {many}"]["median"]
            <= growth,
            f"{few} to {many} layers: with recomputation, memory grows at most as the root of the layers": leaner[
                "temporary_bytes"
            ]
            <= math.sqrt(growth) * lean["temporary_bytes"],
            f"{few} to {many} layers: bits per dimension fall, by more than two standard errors": mean > 2 * error,
        }
    return found


def main(config: Config) -> None:
    """Run every cell, then say which claims held."""
    if config.smoke:
        config = Config(
            data="digits",
            layers=(2,),
            width=4,
            hidden=2,
            latent_channels=1,
            num_train=8,
            batch_size=4,
            remat_steps=2,
            turns=1,
            num_test=4,
            results=config.results.with_name("smoke_depth.json"),
        )
    record = Record(config.results, __doc__ or "", config, ("numpyro",), grid=("layers",))
    for layers in config.layers:
        cell = record.cell(f"trained-{layers}", lambda n=layers: trained(config, n))
        lean = record.cell(f"recomputed-{layers}", lambda n=layers: recomputed(config, n))
        memory = " / ".join(f"{c['temporary_bytes'] / 2**20:.0f}" for c in (cell, lean))
        print(
            f"{layers} layers: {cell['bits_per_dim']:.3f} bits/dim, compiled in {cell['compile_seconds']:.0f} s, "
            f"{cell['step_seconds']:.2f} s a step, {memory} MiB kept / recomputed",
            flush=True,
        )
    turns = record.cell("in turn", lambda: in_turn(config))
    for depths, found in turns["growth"].items():
        print(f"{depths} layers: a step takes {found['median']:.2f} times as long")
    record.check(claims(record.content["cells"], config.layers))


if __name__ == "__main__":
    main(tyro.cli(Config))
