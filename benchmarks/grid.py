"""Many cells: a declarative grid of measurements, each made once, by one process or by many.

A cell's file is named by a digest of all that its figures depend on: what is measured, the settings, the versions of
the libraries, and the code (as it is parsed: comments and docstrings do not count). So a finished cell is never
measured twice, and one of other code or settings is another cell. Every file is whole or not there, and carries a
digest of its content: one that was altered is named and measured anew.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed, parallel_config
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from elbozoo.benchmarks.records import about, differences, machine, settings_of, versions_of, write_result
from elbozoo.inference import storage
from elbozoo.inference.errors import CorruptFile, ElbozooError, must
from elbozoo.inference.parts import one_of, whole_number
from elbozoo.inference.storage import check_writable, write_atomically

BACKENDS = ("loky", "ray")

Cell = Mapping[str, Any]
"""Where in the grid a cell is: JSON values by the name of the axis."""

Measure = Callable[[Any, Cell, Path], dict[str, Any]]
"""``measure(config, cell, scratch)``: a cell's figures, JSON values; ``scratch`` is a folder for its checkpoints."""


class CellsFailed(ElbozooError):
    """Some cells could not be measured; the others are there."""


@dataclass(frozen=True)
class Grid:
    """Cells to measure, and the folder of their files.

    Args:
        question: what the benchmark asks: the first paragraph of its docstring.
        measure: a function at the top of a module (workers find it by its name).
        config: the settings, a frozen dataclass.
        cells: the cells, in the order of the table.
        engines: whose versions count.
        folder: of the cells' files; a cluster's workers must all see it.
        axes: fields of ``config`` that say which cells there are, and nothing of what one is.
    """

    question: str
    measure: Measure
    config: Any
    cells: Sequence[Cell]
    engines: tuple[str, ...]
    folder: Path
    axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [name_of(cell) for cell in self.cells]
        if twice := {name for name in names if names.count(name) > 1}:
            todo = "A cell's name is its texts and numbers, without its lists: give each a name of its own"
            raise must("cells", "differ in their names", f"{sorted(twice)} more than once", todo)

    def about(self, cell: Cell) -> dict[str, Any]:
        """All that a cell's figures depend on, but for the machine."""
        settings = {k: v for k, v in settings_of(self.config).items() if k not in self.axes}
        versions = versions_of(self.engines)
        code = code_version(inspect.getsourcefile(self.measure) or "")
        found = {"cell": dict(cell), "settings": settings, "versions": versions, "code": code}
        try:
            return json.loads(json.dumps({"measure": self.measure.__name__, **found}))
        except (TypeError, ValueError) as error:
            raise must("cells and config", "be JSON values", error, "Name parts by text, not by objects") from error

    def address(self, cell: Cell) -> str:
        """The name of a cell's file."""
        return _digest(self.about(cell))[:24]

    def path(self, cell: Cell) -> Path:
        """A cell's file."""
        return self.folder / f"{self.address(cell)}.json"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell: its figures under ``"figures"``, beside :meth:`about`, ``"machine"`` and ``"seconds"``.

        Returns: None where it has not been measured.
        Raises: CorruptFile for a file that is not what was written.
        """
        path, todo = self.path(cell), "Delete it; the cell will be measured anew"
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            digest = found.pop("digest")
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise must(str(path), "be a cell's file", type(error).__name__, todo, CorruptFile) from error
        about = self.about(cell)
        if digest != _digest(found) or any(found.get(k) != v for k, v in about.items()):
            raise must(str(path), "be as it was written", "altered content", todo, CorruptFile)
        return found

    def missing(self) -> list[Cell]:
        """The cells that are still to be measured. A corrupt file is named in a warning, and its cell is among them."""
        found = []
        for cell in self.cells:
            try:
                record = self.read(cell)
            except CorruptFile as error:
                warnings.warn(f"{error} {name_of(cell)} is measured anew.", stacklevel=3)
                self.path(cell).unlink()  # or whoever makes the table before its turn would meet it again
                record = None
            if record is None:
                found.append(cell)
            else:  # a process that was killed right after the cell was finished has left this
                shutil.rmtree(_scratch(self.path(cell)), ignore_errors=True)
        return found

    def run(
        self,
        jobs: int = 1,
        backend: str = "loky",
        progress: bool = True,
        done: Callable[[Cell, dict[str, Any]], object] | None = None,
    ) -> list[dict[str, Any]]:
        """Measure what is missing. Returns: the records of all cells (see :meth:`read`), in the grid's order.

        Args:
            jobs: processes; 1 measures here, one after another. With ``"ray"`` as many tasks of the cluster that
                ``ray.init`` has joined (a local one else).
            backend: "loky" for processes of this machine, "ray" for a cluster (``elbozoo[cluster]``).
            progress: show a bar.
            done: called with each new cell and its record.

        Raises:
            CellsFailed: naming cells whose measurement raised, after all others have been measured; or whose worker
                was killed, at once.
            InvalidArgument, WriteFailed.
        """
        whole_number("jobs", jobs)
        one_of("backend", backend, BACKENDS)
        check_writable(self.folder)
        wanted, failed = self.missing(), []
        with _bar(progress, len(wanted), len(self.cells)) as tick:
            try:
                for cell, error in _measured(self, wanted, jobs, backend):
                    if error:
                        failed.append(f"{name_of(cell)}: {error}")
                    elif done is not None:
                        done(cell, self.read(cell) or {})
                    tick(cell)
            except BrokenExecutor as error:
                left = [name_of(cell) for cell in wanted if not self.path(cell).exists()]
                raise CellsFailed(
                    f"The workers ended ({error}); {len(left)} of {len(self.cells)} cells are not there: "
                    f"{'; '.join(left)}. Run the same again, with fewer jobs if memory ran out."
                ) from error
        if failed:
            raise CellsFailed(
                f"{len(failed)} of {len(self.cells)} cells failed, the others are there:\n" + "\n".join(failed)
            )
        return [record for cell in self.cells if (record := self.read(cell))]


def name_of(cell: Cell) -> str:
    """A cell in words: its texts and numbers, without its lists."""
    return ", ".join(str(value) for value in cell.values() if not isinstance(value, list | tuple | dict))


def result(grid: Grid, checks: Callable[[dict[str, Any]], dict[str, bool]]) -> dict[str, Any]:
    """A result file's content: of the cells that there are, the figures by name, and the claims about them."""
    records = {name_of(cell): record for cell in grid.cells if (record := grid.read(cell))}
    kept = ("code", "machine", "seconds")
    cells = {n: {**r["cell"], **r["figures"], "run": {k: r[k] for k in kept}} for n, r in records.items()}
    return {**about(grid.question, grid.config, grid.engines), "cells": cells, "checks": checks(cells)}


def measure_all(
    grid: Grid,
    path: Path,
    checks: Callable[[dict[str, Any]], dict[str, bool]],
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda cells: {},
    **options: Any,
) -> None:
    """Measure what is missing, keep the result file up to date, and say which claims held.

    Args:
        path: the result file, written after every cell. One that exists, of the same settings, versions and machine,
            keeps the cells that this grid has not: each names its code. Another one is written anew.
        checks: claims, read off the cells.
        more: what else the file says of the cells.
        options: of :meth:`Grid.run`.

    Raises: as :meth:`Grid.run`.
    """

    before = _before(grid, path)

    def write(*_: Any) -> dict[str, bool]:
        content = _beside(before, result(grid, lambda cells: {}), grid.axes)
        content["checks"] = checks(content["cells"])  # of all cells, the earlier ones too
        write_result(path, content | more(content["cells"]))
        return content["checks"]

    try:
        grid.run(done=write, **options)
    finally:
        held = write()
    for claim, good in held.items():
        print(f"{'holds' if good else 'DOES NOT HOLD'}: {claim}")


def _before(grid: Grid, path: Path) -> dict[str, Any]:
    """What an earlier result file of the same settings, versions and machine has of cells that are not the grid's;
    empty where there is no such file.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        facts = about(grid.question, grid.config, grid.engines)
        shared = found["versions"].keys() & facts["versions"].keys()  # a grid of one engine has that one's versions
        facts["versions"] = {name: facts["versions"][name] for name in shared}
        if differences(found, facts, grid.axes):
            return {}
        names = set(map(name_of, grid.cells))
        cells = {name: cell for name, cell in found["cells"].items() if name not in names}
        return {"config": found["config"], "versions": found["versions"], "cells": cells}
    except (ValueError, KeyError, AttributeError, TypeError):  # no result file of a grid
        return {}


def _beside(before: dict[str, Any], content: dict[str, Any], axes: tuple[str, ...]) -> dict[str, Any]:
    """A result with the cells of an earlier one that it has not itself; an axis is what either went along."""
    if not before:
        return content
    config = dict(content["config"])
    for axis in axes:
        both = before["config"].get(axis), config.get(axis)
        if all(isinstance(values, list) for values in both):
            config[axis] = list(dict.fromkeys(both[0] + both[1]))  # type: ignore[operator]
    merged = {part: before[part] | content[part] for part in ("versions", "cells")}
    return content | merged | {"config": config}


# --- one cell -------------------------------------------------------------------------------------------------------


def _measure_one(measure: Measure, config: Any, about: dict[str, Any], path: Path) -> tuple[Cell, str]:
    """Measure a cell and write its file; what went wrong, if anything, in words. Runs in a worker."""
    cell, scratch = about["cell"], _scratch(path)
    began = time.perf_counter()
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        figures = measure(config, cell, scratch)
        record = {**about, "machine": machine(), "seconds": time.perf_counter() - began, "figures": _values(figures)}
        write_atomically(path, json.dumps({**record, "digest": _digest(record)}, indent=1).encode())
    except Exception as error:  # a cell must not take the sweep with it
        return cell, f"{type(error).__name__}: {error}"
    shutil.rmtree(scratch, ignore_errors=True)
    return cell, ""


def _measure_for(parent: int, *task: Any) -> tuple[Cell, str]:
    """:func:`_measure_one` in a worker of one process, without which it ends: who starts anew meets no one at work."""
    _end_without(parent)
    return _measure_one(*task)


@cache  # one thread a worker
def _end_without(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _scratch(path: Path) -> Path:
    """The folder of a cell's checkpoints, beside its file."""
    return path.with_name(f"{path.stem}-unfinished")


def _values(figures: Any) -> dict[str, Any]:
    """Figures as they are read back. Raises: InvalidArgument for what is no JSON object."""
    todo = "Return a dict of numbers, texts, lists and dicts of them"
    if not isinstance(figures, Mapping):
        raise must("a cell's figures", "be a dict", type(figures).__name__, todo)
    try:
        return json.loads(json.dumps(storage.plain(figures), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise must("a cell's figures", "be JSON values", error, todo) from error


def _measured(grid: Grid, cells: list[Cell], jobs: int, backend: str) -> Iterable[tuple[Cell, str]]:
    """The cells as they are finished, in any order."""
    tasks = [(grid.measure, grid.config, grid.about(cell), grid.path(cell)) for cell in cells]
    if jobs == 1 and backend == "loky":
        yield from (_measure_one(*task) for task in tasks)
        return
    if backend == "ray":  # which ends the tasks of a process that is gone
        _join_ray()
        calls = [delayed(_measure_one)(*task) for task in tasks]
    else:
        calls = [delayed(_measure_for)(os.getpid(), *task) for task in tasks]
    # Workers that each start a thread a core slow one another down; XLA reads its own variable.
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    before = {name: os.environ.get(name) for name in ("NPROC", "OMP_NUM_THREADS")}
    os.environ.update(dict.fromkeys(before, threads))
    try:
        with parallel_config(backend=backend, n_jobs=jobs):
            unordered = {"return_as": "generator_unordered"} if backend == "loky" else {}
            finished: Any = Parallel(**unordered)(calls)
            yield from finished
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _join_ray() -> None:
    """Let joblib know Ray. Raises: InvalidArgument where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of a benchmark unless asked
    try:
        from ray.util.joblib import register_ray
    except ImportError as error:
        todo = 'Install "elbozoo[cluster]"'
        raise must("backend", "be one that is installed", "'ray'", todo) from error
    register_ray()


class _bar:
    """A progress bar over the cells that are to be measured."""

    def __init__(self, show: bool, wanted: int, total: int):
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.bar, self.wanted, self.total = Progress(*columns, disable=not show), wanted, total

    def __enter__(self) -> Callable[[Cell], None]:
        self.bar.start()
        self.task = self.bar.add_task("cells", total=self.total, completed=self.total - self.wanted)
        return lambda cell: self.bar.update(self.task, advance=1, description=name_of(cell))

    def __exit__(self, *exc: Any) -> None:
        self.bar.stop()


# --- what a cell is ---------------------------------------------------------------------------------------------------


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def code_version(script: str) -> str:
    """A digest of the library's code, the data sets' and the script's, comments and docstrings aside."""
    root = Path(__file__).resolve().parents[1]
    library = sorted(path for part in ("zoo", "guides", "inference") for path in (root / part).rglob("*.py"))
    found = hashlib.sha256()
    for path in (*library, root / "benchmarks" / "datasets.py", *([Path(script)] if script else [])):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
        found.update(f"{path.name}\n{ast.dump(tree)}\n".encode())
    return found.hexdigest()[:16]


def _is_text(line: ast.AST) -> bool:
    """Whether a statement is a string and nothing else: a docstring, or the like of one below a name."""
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
