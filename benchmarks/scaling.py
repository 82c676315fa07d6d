"""How do the time and the memory of a training step grow with particles, batch, latents, depth, replicates and data?

A 64-100-100-16 VAE on random binary data, batch 100, Adam 1e-3, under the ELBO at K=1 and IWAE above, of which one
thing at a time is varied (depth: hierarchies of as many layers of 16 latents). Beside ``fit`` on both engines stand
hand-written JAX and PyTorch loops, the engines' own losses for the same bound under their own ``SVI``, and pythae's
trainer where it is installed. The contenders of a cell take turns, so that what else the machine does hits all of them;
ratios are those within each turn. Compilation and the first turns are left out.

The *turning point* is the first value after which the local slope of the logarithm of the time between neighbours stays
above 0.8: from there on a step's time is linear in what is varied.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from elbozoo.benchmarks.estimators import slope, step_bytes
from elbozoo.benchmarks.grid import Cell, Grid, code_version, measure_all
from elbozoo.benchmarks.loops import (
    Loop,
    hand_written_jax,
    hand_written_torch,
    has_pythae,
    loop_of,
    numpyro_svi,
    objective_of,
    once,
    ours,
    pyro_svi,
    pythae_trainer,
    ratio,
    rounds,
    sizes_of,
)
from elbozoo.benchmarks.loops import __file__ as LOOPS
from elbozoo.inference.data import prepare
from elbozoo.zoo import MLP, VAE, HierarchicalVAE

LINEAR = 0.8
"""The local slope from which on a time counts as linear."""

HAND_WRITTEN = {"numpyro": "hand-written JAX", "pyro": "hand-written PyTorch"}
OWN = {"numpyro": "NumPyro's own", "pyro": "Pyro's own"}
TARGETS = {"numpyro": 1.05, "pyro": 1.15}
"""Of the times against the hand-written loops, at the base point and at K = 50."""


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        particles: values of K.
        batches: batch sizes.
        latents: latents of the one layer.
        depths: layers of latents of a hierarchy.
        replicates: seeds at once.
        data: numbers of training data, in memory and memory-mapped.
        data_dim: entries of one datum.
        hidden: units of each of two hidden layers.
        latent_dim: latents at the base point, and of each layer of a hierarchy.
        batch_size: at the base point.
        repeats: turns of a cell.
        base_repeats: turns at the base point and at K = 50, where speed is claimed.
        seconds: about how long a turn of one contender takes, of as many steps as that makes.
        base_seconds: the same where speed is claimed.
        longest: seconds of a turn that are not exceeded for the sake of ``least_steps``.
        least_steps: of a turn; five times as many of replicates.
        most_steps: of a turn.
        data_steps: of a turn where the number of data is varied: of a pass, so that shuffling has its share.
        slowest: seconds of a step beyond which the libraries' own loops are left out.
        most_trainers: replicates on torch, which run one after another; more are left out.
        cells: folder of the cells' files.
        results: JSON file to write.
        smoke: a few small cells, to see that it runs.
    """

    particles: tuple[int, ...] = (1, 4, 16, 50, 256, 1024, 4096)
    batches: tuple[int, ...] = (10, 50, 200, 1000, 4000)
    latents: tuple[int, ...] = (2, 16, 128, 1024)
    depths: tuple[int, ...] = (1, 2, 4)
    replicates: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    data: tuple[int, ...] = (1_000, 30_000, 1_000_000)
    data_dim: int = 64
    hidden: int = 100
    latent_dim: int = 16
    batch_size: int = 100
    repeats: int = 7
    base_repeats: int = 9
    seconds: float = 0.2
    base_seconds: float = 0.5
    longest: float = 1.5
    least_steps: int = 5
    most_steps: int = 500
    data_steps: int = 500
    slowest: float = 2.0
    most_trainers: int = 4
    cells: Path = Path("runs/scaling")
    results: Path = Path("benchmarks/results/scaling.json")
    smoke: bool = False


AXES = {
    "particles": "particles",
    "batch": "batches",
    "latents": "latents",
    "depth": "depths",
    "replicates": "replicates",
    "data": "data",
}
"""What is varied, and the field of its values."""


@dataclass(frozen=True)
class Point:
    """Where a cell is: the base point, but for one thing."""

    spec: Any
    particles: int
    batch: int
    replicates: int


def point(config: Config, cell: Cell) -> Point:
    """A cell's model and sizes."""
    axis, value = cell["axis"], cell["value"]
    found = {"particles": 1, "batch": config.batch_size, "replicates": 1}
    if axis in found:
        found[axis] = value
    latents = value if axis == "latents" else config.latent_dim
    spec: Any = VAE(config.data_dim, latents, MLP((config.hidden, config.hidden)))
    if axis == "depth":
        spec = HierarchicalVAE(config.data_dim, (latents,) * value, (config.hidden,) * value, output_gain=0.1)
    return Point(spec, **found)


def steps_of(config: Config, at: Point, seconds: float) -> int:
    """Steps of a turn of about so long, by the multiplications of a step.

    What an epoch costs beside its steps must not count much, as it does not in an epoch of usual length.
    """
    weights = sum(a * b for sizes in sizes_of(at.spec).values() for s in sizes for a, b in itertools.pairwise(s))
    step = 5e-4 + 6 * weights * at.particles * at.batch * at.replicates / 2e10
    least = config.least_steps * (5 if at.replicates > 1 else 1)  # what an epoch costs beside its steps
    return min(config.most_steps, max(1, round(seconds / step), round(min(least, config.longest / step))))


def pixels(num: int, dim: int) -> np.ndarray:
    """Data of the right kind; what they are does not matter here."""
    return (np.random.default_rng(0).random((num, dim), np.float32) < 0.2).astype(np.float32)


# --- a cell


@dataclass(frozen=True)
class Contest:
    """What is timed in a cell.

    Args:
        loops: the contenders by name.
        pairs: whose times are divided by whose.
        bytes: gives the contenders' bytes, once they have run.
        times: by name, how many epochs of a contender one of the others' is worth.
    """

    loops: dict[str, Loop]
    pairs: Sequence[tuple[str, str]]
    bytes: Callable[[], dict[str, int]]
    times: Mapping[str, int]


def measure(config: Config, cell: Cell, scratch: Path) -> dict[str, Any]:
    """Seconds of a step of every contender by turn, their ratios, and bytes; None of a contender that was too slow."""
    at, axis, value = point(config, cell), cell["axis"], cell["value"]
    claimed = axis == "particles" and value in (1, 50)
    steps = steps_of(config, at, config.base_seconds if claimed else config.seconds)
    steps = config.data_steps if axis == "data" else steps
    if axis == "data":
        contest = by_data(config, at, value, steps, scratch)
    elif axis == "replicates":
        contest = by_replicates(config, at, steps)
    else:
        contest = by_size(at, steps)
    slow = too_slow(contest.loops, config.slowest * steps)
    runs = {name: run for name, run in contest.loops.items() if name not in slow}
    repeats = config.base_repeats if claimed else config.repeats
    taken = {
        name: [contest.times.get(name, 1) * s / steps for s in turns]
        for name, turns in rounds(runs, repeats, warm_up=0).items()
    }
    return {
        "steps": steps,
        "seconds": dict.fromkeys(slow) | taken,
        "ratios": {f"{a} / {b}": ratio(taken[a], taken[b]) for a, b in contest.pairs if {a, b} <= set(taken)},
        "bytes": contest.bytes(),
    }


def too_slow(loops: Mapping[str, Loop], seconds: float) -> list[str]:
    """Run every contender twice, of which the first compiles; the libraries' own loops that then take longer."""
    found = []
    for name, run in loops.items():
        run()
        if once(run) > seconds and name in (*OWN.values(), "pythae"):
            found.append(name)
    return found


def by_size(at: Point, steps: int) -> Contest:
    """All contenders at one size of the problem; the bytes are what a step keeps beside weights and data."""
    x, k = pixels(at.batch * steps, at.spec.data_dim), at.particles
    loops = {
        "numpyro": ours("numpyro", at.spec, x, k, at.batch),
        HAND_WRITTEN["numpyro"]: hand_written_jax(at.spec, x, k, at.batch),
        OWN["numpyro"]: numpyro_svi(at.spec, x, k, at.batch),
        "pyro": ours("pyro", at.spec, x, k, at.batch),
        HAND_WRITTEN["pyro"]: hand_written_torch(at.spec, x, k, at.batch),
        OWN["pyro"]: pyro_svi(at.spec, x, k, at.batch),
    }
    pairs = [(engine, other[engine]) for other in (HAND_WRITTEN, OWN) for engine in TARGETS]
    if isinstance(at.spec, VAE) and has_pythae():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # third-party deprecations
            loops["pythae"] = pythae_trainer(at.spec, x, k, at.batch)
        pairs += [(engine, "pythae") for engine in TARGETS]

    def size() -> dict[str, int]:
        programs = {engine: getattr(at.spec, engine)() for engine in TARGETS}
        batches = {engine: prepare(program, x[: at.batch])[0] for engine, program in programs.items()}
        return {e: step_bytes(program, objective_of(at.spec, k), batches[e]) for e, program in programs.items()}

    return Contest(loops, pairs, size, {})


def by_replicates(config: Config, at: Point, steps: int) -> Contest:
    """Several seeds at once against as many runs of one; the bytes are the temporaries of the whole loop."""
    x, k, count = pixels(at.batch * steps, at.spec.data_dim), at.particles, at.replicates
    together = loop_of("numpyro", at.spec, x, k, at.batch, None, list(range(count)))
    loops = {
        "numpyro": together.run_epoch,
        "as many runs": ours("numpyro", at.spec, x, k, at.batch),
        HAND_WRITTEN["numpyro"]: hand_written_jax(at.spec, x, k, at.batch, replicates=count),
    }
    if count <= config.most_trainers:
        loops["pyro"] = ours("pyro", at.spec, x, k, at.batch, replicates=count)
    pairs = [("numpyro", "as many runs"), ("numpyro", HAND_WRITTEN["numpyro"])]

    def size() -> dict[str, int]:
        trainer = together.trainer
        order = np.zeros((count, steps, at.batch)[0 if count > 1 else 1 :], np.int32)
        compiled = trainer._run_epoch.lower(trainer.state, trainer.data, order).compile()
        return {"numpyro": int(compiled.memory_analysis().temp_size_in_bytes)}

    return Contest(loops, pairs, size, {"as many runs": count})


def by_data(config: Config, at: Point, num_data: int, steps: int, scratch: Path) -> Contest:
    """Data in memory and memory-mapped; the bytes are those of the data that the training has on its device."""
    x, k = pixels(num_data, at.spec.data_dim), at.particles
    np.save(scratch / "data.npy", x)
    mapped = np.load(scratch / "data.npy", mmap_mode="r")
    drivers = {
        f"{engine}{name}": loop_of(engine, at.spec, data, k, at.batch, steps, [0])
        for engine in TARGETS
        for name, data in (("", x), (", mapped", mapped))
    }
    loops: dict[str, Loop] = {name: driver.run_epoch for name, driver in drivers.items()}
    loops[HAND_WRITTEN["numpyro"]] = hand_written_jax(at.spec, x, k, at.batch, steps=steps)
    loops[HAND_WRITTEN["pyro"]] = hand_written_torch(at.spec, x, k, at.batch, steps=steps)
    pairs = [*HAND_WRITTEN.items(), *((f"{engine}, mapped", engine) for engine in TARGETS)]

    def size() -> dict[str, int]:
        return {name: sum(a.nbytes for a in driver.trainer.data) for name, driver in drivers.items()}

    return Contest(loops, pairs, size, {})


# --- what the cells say

Curve = tuple[list[int], list[float]]
"""Values of what is varied, increasing, and the median seconds of a step at each."""


def curves(cells: Mapping[str, Any], what: str = "seconds") -> dict[str, dict[str, Curve]]:
    """By axis and contender: the values that were measured, with the median seconds (or the bytes) at each."""
    found: dict[str, dict[str, Curve]] = {axis: {} for axis in AXES}
    for cell in sorted(cells.values(), key=lambda cell: cell["value"]):
        for name, taken in cell[what].items():
            if taken:
                values, figures = found[cell["axis"]].setdefault(name, ([], []))
                values.append(cell["value"])
                figures.append(statistics.median(taken) if isinstance(taken, list) else taken)
    return {axis: named for axis, named in found.items() if named}


def local_slopes(values: Sequence[float], figures: Sequence[float]) -> list[float]:
    """Of the logarithms, between neighbours."""
    return (np.diff(np.log(figures)) / np.diff(np.log(values))).tolist()


def turning_point(values: Sequence[int], figures: Sequence[float]) -> int | None:
    """The first value after which every local slope is above 0.8; None where the last one is not."""
    found = None
    for value, local in zip(values[-2::-1], local_slopes(values, figures)[::-1], strict=True):
        if local <= LINEAR:
            break
        found = value
    return found


def slopes(cells: Mapping[str, Any]) -> dict[str, Any]:
    """By axis and contender: the slope of all values, those between neighbours, and where the time turns linear."""
    return {
        axis: {
            name: {"slope": slope(*curve), "local": local_slopes(*curve), "turning_point": turning_point(*curve)}
            for name, curve in named.items()
        }
        for axis, named in curves(cells).items()
    }


def claims(cells: Mapping[str, Any]) -> dict[str, bool]:
    """The targets of speed and of scaling, where there are the cells; nothing here is made to hold."""
    found = by_hand_claims(cells) | own_claims(cells)
    for cell in cells.values():
        together = cell["ratios"].get("numpyro / as many runs")
        if together and cell["value"] == 8:
            claim = f"numpyro: 8 replicates take less time than 8 runs ({together['median']:.3f} of it)"
            found[claim] = together["median"] < 1
    if curve := curves(cells).get("replicates", {}).get("numpyro"):
        turn = turning_point(*curve)
        count = len(curve[0]) if turn is None else curve[0].index(turn) + 1
        steep = slope(curve[0][:count], curve[1][:count])
        where = f"from 1 to {turn} replicates, where it turns linear," if turn else "over all numbers of replicates"
        value = "no value before" if steep is None else f"slope {steep:.2f}"
        found[f"numpyro: {where} the time of a step grows more slowly than their number ({value})"] = (
            steep is not None and steep < 1
        )
    return found


def by_hand_claims(cells: Mapping[str, Any]) -> dict[str, bool]:
    """Against the hand-written loops, at the base point and at K = 50."""
    found = {}
    for cell in cells.values():
        if cell["axis"] == "particles" and cell["value"] in (1, 50):
            for engine, target in TARGETS.items():
                median = cell["ratios"][f"{engine} / {HAND_WRITTEN[engine]}"]["median"]
                claim = f"{engine}, K = {cell['value']}: a step takes at most {target} times as long as in the "
                found[f"{claim}{HAND_WRITTEN[engine]} loop ({median:.3f})"] = median <= target
    return found


def own_claims(cells: Mapping[str, Any]) -> dict[str, bool]:
    """Against the engines' own losses, the worst of every axis."""
    found = {}
    for axis, engine in itertools.product(AXES, TARGETS):
        name = f"{engine} / {OWN[engine]}"
        if there := [(c["ratios"][name]["median"], c["value"]) for c in _of(cells, axis) if name in c["ratios"]]:
            median, value = max(there)
            claim = f"{engine}, {axis}: no step takes longer than with {OWN[engine]} loss for the same bound "
            found[f"{claim}({median:.3f} of its time at most, at {value})"] = median <= 1.0
    return found


def _of(cells: Mapping[str, Any], axis: str) -> list[Any]:
    return [cell for cell in cells.values() if cell["axis"] == axis]


def grid_of(config: Config) -> Grid:
    """The cells that the settings ask for."""
    code = {"loops": {"code": code_version(LOOPS)}}  # no part of a cell's name, being no text
    cells = [{"axis": axis, "value": value, **code} for axis, field in AXES.items() for value in getattr(config, field)]
    return Grid(__doc__ or "", measure, config, cells, tuple(TARGETS), config.cells, (*AXES.values(), "smoke"))


def main(config: Config) -> None:
    """Measure what is missing, then write the figures and say which claims held."""
    if config.smoke:
        small: dict[str, Any] = {"particles": (2,), "batches": (), "latents": (), "depths": (), "replicates": ()}
        small |= {"data": (40,), "data_dim": 6, "hidden": 4, "latent_dim": 2, "batch_size": 10, "repeats": 1}
        small |= {"most_steps": 2, "data_steps": 4, "most_trainers": 1}
        results = config.results.with_name("smoke_scaling.json")
        config = replace(config, **small, cells=results.with_suffix(""), results=results, smoke=False)
    measure_all(grid_of(config), config.results, claims, lambda cells: {"slopes": slopes(cells)})


if __name__ == "__main__":
    # of the module, not of the script: worker processes could not find what is the script's
    from elbozoo.benchmarks import scaling

    scaling.main(tyro.cli(scaling.Config))
