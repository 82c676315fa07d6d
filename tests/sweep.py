"""Measurements for the tests of grids, in a module that workers find by its name; and a nursery of sweeps to kill.

python tests/sweep.py killed FOLDER SEED KILLS
python tests/sweep.py ray FOLDER

Both write what they found to ``found.json`` in the folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elbozoo.benchmarks.grid import Cell, CellsFailed, Grid, name_of


@dataclass(frozen=True)
class Config:
    """Settings of a sweep: one that figures depend on, one that may be left out, an axis, and where the log is."""

    scale: float = 1.5
    note: str | None = None
    numbers: tuple[int, ...] = (0, 1, 2, 3)
    folder: Path = Path(".")


def log(config: Config, cell: Cell) -> None:
    """A line for each time that a cell's measurement begins: one write, which processes do not interleave."""
    with open(config.folder / "log.txt", "a") as file:
        file.write(f"{name_of(cell)}\n")


def logged(folder: Path) -> list[str]:
    """The cells whose measurement began, each time."""
    path = folder / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def measure(config: Config, cell: Cell, scratch: Path) -> dict[str, Any]:
    """A figure or two; what a cell's ``kind`` asks for on the way."""
    log(config, cell)
    match cell["kind"]:
        case "fail":
            raise ZeroDivisionError("of no use")
        case "fail until mended" if not (config.folder / "mended").exists():
            raise RuntimeError("not mended")
        case "object":
            return {"figure": object()}
        case "list":
            return [1.0]  # type: ignore[return-value]
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "long":
            time.sleep(LONG)
        case "slow":
            time.sleep(0.05)
        case "train":
            return train(cell["number"], scratch)
    draws = np.random.default_rng(cell["number"]).normal(size=3) * config.scale
    return {"figure": draws.mean(), "draws": draws, "undefined": np.array([np.nan, 1.0])}


def where(config: Config, cell: Cell, scratch: Path) -> dict[str, Any]:
    """The process that measures, which takes its time, so that another takes the next cell."""
    time.sleep(0.3)
    return {"process": os.getpid(), "figure": config.scale * cell["number"]}


def train(seed: int, scratch: Path) -> dict[str, Any]:
    """A tiny VAE that goes on from its checkpoints."""
    from elbozoo.benchmarks.datasets import load
    from elbozoo.inference import fit
    from elbozoo.zoo import MLP, VAE

    program = VAE(64, 2, network=MLP(hidden=(4,))).numpyro()
    where = {"directory": scratch, "resume": True, "progress": False}
    data = load("digits").train[:64]
    run = fit(program, data, epochs=EPOCHS, batch_size=32, seed=seed, binarize="stochastic", **where)
    return {"bound": [row["bound"] for row in run.history], "weights": sum(w.sum() for w in run.weights.values())}


EPOCHS, LONG = 8, 2.0
FOUND = "found.json"
"""What a nursery found, in its folder."""


def grid(folder: Path, kinds: dict[str, int], **options: Any) -> Grid:
    """So many cells of each kind, in ``folder``."""
    cells = [{"kind": kind, "number": i} for kind, count in kinds.items() for i in range(count)]
    config = Config(folder=folder, **options)
    return Grid("Q?", measure, config, cells, (), folder / "cells", axes=("numbers",))


def spread(folder: Path) -> Grid:
    """Cells that say which process measured them."""
    folder.mkdir()
    return Grid("Q?", where, Config(folder=folder), [{"number": i} for i in range(4)], (), folder)


def figures(of: Grid) -> list[Any]:
    """What was measured, in the grid's order, without the seconds; None for what was not."""
    return [None if (record := of.read(cell)) is None else record["figures"] for cell in of.cells]


# --- the nursery ----------------------------------------------------------------------------------------------------


def finished(of: Grid) -> list[str]:
    return [name_of(cell) for cell in of.cells if of.path(cell).exists()]


def die_at(change: int, folder: Path) -> None:
    """Kill this process right before its so-manieth change of files below ``folder``.

    Between two changes a sweep can lose nothing but time, so these are all the moments that there are, and which one it
    is does not depend on how busy the machine is.
    """
    left = change

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") or str(folder) not in str(
            arguments[0]
        ):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def life(of: Grid, last: int | None = None) -> int:
    """Run a grid in a new process: a fork of this one, which has imported everything and computed nothing.

    Returns: its status, as ``os.waitpid`` has it.
    """
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    try:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(of.folder.parents[1] / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        if last is not None:
            die_at(last, of.folder)
        of.run(progress=False)
        os._exit(0)
    finally:
        os._exit(1)


def sweep_and_kill(folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """A sweep that is killed, and one that is not: their figures, and what each life of the first found and began."""
    import numpyro  # noqa: F401  # by the nursery, once

    import elbozoo.zoo.vae.model_numpyro  # noqa: F401

    (folder / "killed").mkdir()
    (folder / "whole").mkdir()
    killed, whole = (grid(folder / name, {"slow": 5, "train": 1, "quick": 25}) for name in ("killed", "whole"))
    codes = [life(whole)]
    rng, lives, ended = np.random.default_rng(seed), [], []
    for _ in range(kills):
        before, lines = finished(killed), len(logged(folder / "killed"))
        ended.append(os.WIFSIGNALED(life(killed, int(rng.integers(5, 40)))))
        lives.append({"found": before, "began": logged(folder / "killed")[lines:]})
    codes.append(life(killed))
    left = [path.name for path in killed.folder.iterdir() if path.suffix != ".json"]
    return {"killed": ended, "lives": lives, "codes": codes, "figures": [figures(killed), figures(whole)], "left": left}


def on_ray(folder: Path) -> dict[str, Any]:
    """A grid on two workers of Ray and one in this process; and what two workers make of a cell that fails."""
    import ray

    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    ray.init(address="local", num_cpus=2, object_store_memory=80 * 2**20, **quiet)
    failing, failed = grid(folder, {"fail": 1, "quick": 1}), ""
    try:
        two, one = (spread(folder / name) for name in ("two", "one"))
        two.run(jobs=2, backend="ray", progress=False)
        failing.run(jobs=2, backend="ray", progress=False)
    except CellsFailed as error:
        failed = str(error)
    finally:
        ray.shutdown()
    one.run(progress=False)
    found = {"figures": [figures(two), figures(one)], "beside": figures(failing), "failed": failed}
    return {**found, "process": os.getpid()}


if __name__ == "__main__":
    what, where_to, *numbers = sys.argv[1:]
    done = {"killed": sweep_and_kill, "ray": on_ray}[what](Path(where_to), *map(int, numbers))
    # Not to standard output, where Ray says what became of a worker.
    (Path(where_to) / FOUND).write_text(json.dumps(done))
