"""Grids of measurements: killed, corrupted, changed, failing, spread over processes; the table is always the same."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sweep
from sweep import Config, figures, logged

from elbozoo.benchmarks import grid as grids
from elbozoo.benchmarks import records
from elbozoo.benchmarks.grid import CellsFailed, Grid, code_version, measure_all, name_of, result
from elbozoo.benchmarks.records import write_result
from elbozoo.inference.errors import CorruptFile, InvalidArgument
from elbozoo.inference.storage import WriteFailed, plain

ROOT = Path(__file__).resolve().parents[1]
TESTS = Path(__file__).resolve().parent


def run(grid: Grid, **options: Any) -> list[dict[str, Any]]:
    return grid.run(progress=False, **options)


@pytest.fixture
def done(tmp_path: Path) -> Grid:
    """A grid of four cells that is finished, and its log empty again."""
    grid = sweep.grid(tmp_path, {"quick": 4})
    run(grid)
    (tmp_path / "log.txt").unlink()
    return grid


# --- killed ---------------------------------------------------------------------------------------------------------


@pytest.mark.numpyro
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the nursery forks")
def test_a_sweep_killed_ten_times_has_the_table_of_one_never_killed(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(TESTS / "sweep.py"), "killed", str(tmp_path), "1", "10"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / sweep.FOUND).read_text())
    assert found["killed"] == [True] * 10
    assert found["codes"] == [0, 0]
    killed, whole = found["figures"]
    assert len(whole) == 31
    assert killed == whole
    assert found["left"] == [], "checkpoints of cells that are finished"
    for life in found["lives"]:
        assert not set(life["found"]) & set(life["began"]), "a finished cell was measured again"
    assert len({len(life["found"]) for life in found["lives"]}) > 2, "it was killed at few places"


def test_workers_end_with_the_process_that_started_them(tmp_path: Path):
    """Else who starts anew would measure beside them, into the same files."""
    code = (
        f"import sweep, pathlib; sweep.grid(pathlib.Path({str(tmp_path)!r}), {{'long': 6}}).run(jobs=2, progress=False)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not logged(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        began = logged(tmp_path)
        time.sleep(1.5 * sweep.LONG)
        assert 1 <= len(began) <= len(logged(tmp_path)) <= 2, "of two workers"
        assert not list((tmp_path / "cells").glob("*.json")), "a worker went on"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_worker_that_is_killed_is_told(tmp_path: Path):
    grid = sweep.grid(tmp_path, {"die": 1, "quick": 2})
    with pytest.raises(CellsFailed, match=r"(?s)workers ended.*die, 0"):
        run(grid, jobs=2)


# --- corrupted ------------------------------------------------------------------------------------------------------


def truncated(grid: Grid) -> list[str]:
    path = grid.path(grid.cells[1])
    path.write_bytes(path.read_bytes()[:-40])
    return ["quick, 1"]


def another_digit(grid: Grid) -> list[str]:
    path = grid.path(grid.cells[2])
    text = path.read_text()
    found = re.search(r'"figure": -?\d\.(\d)', text)
    assert found
    at = found.start(1)
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    return ["quick, 2"]


def swapped(grid: Grid) -> list[str]:
    one, two = (grid.path(grid.cells[i]) for i in (0, 3))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return ["quick, 0", "quick, 3"]


def of_another_kind(grid: Grid) -> list[str]:
    grid.path(grid.cells[0]).write_text('["digest"]')
    return ["quick, 0"]


@pytest.mark.parametrize("corrupt", [truncated, another_digit, swapped, of_another_kind])
def test_a_corrupt_cell_is_named_and_measured_anew_alone(done: Grid, corrupt: Any):
    before = figures(done)
    spoilt = corrupt(done)
    with pytest.raises(CorruptFile, match=r"Delete it; the cell will be measured anew"):
        figures(done)
    with pytest.warns(UserWarning, match="measured anew") as warned:
        run(done)
    said = [str(w.message) for w in warned]
    assert len(said) == len(spoilt)
    for name, path, words in zip(spoilt, [done.path(c) for c in done.cells if name_of(c) in spoilt], said, strict=True):
        assert words.endswith(f"{name} is measured anew.")
        assert str(path) in words
    assert logged(done.config.folder) == spoilt
    assert figures(done) == before


def test_the_table_is_kept_up_to_date_past_a_corrupt_cell(done: Grid, tmp_path: Path):
    """It is written after every cell, and so before the corrupt one has had its turn."""
    before = figures(done)
    done.path(done.cells[0]).unlink()
    truncated(done)
    with pytest.warns(UserWarning, match="measured anew"):
        measure_all(done, tmp_path / "result.json", lambda cells: {"all": len(cells) == 4}, progress=False)
    assert json.loads((tmp_path / "result.json").read_text())["checks"] == {"all": True}
    assert figures(done) == before


# --- changed --------------------------------------------------------------------------------------------------------


def test_a_finished_cell_is_not_measured_again(done: Grid):
    before = figures(done)
    run(done)
    assert logged(done.config.folder) == []
    assert figures(done) == before
    assert before[0]["undefined"] == [None, 1.0]


def test_what_a_figure_depends_on_is_in_the_address(tmp_path: Path):
    def address(cell: dict[str, Any], engines: tuple[str, ...] = (), measure: Any = sweep.measure, **options: Any):
        config = Config(**{"folder": tmp_path, **options})
        return Grid("Q?", measure, config, [cell], engines, tmp_path, axes=("numbers",)).address(cell)

    cell = {"kind": "quick", "number": 0}
    same = address(cell)
    assert address(dict(reversed(cell.items()))) == same
    assert address(cell, numbers=(7,)) == same, "an axis says which cells there are"
    assert address(cell, folder=tmp_path / "elsewhere") == same, "a folder is no setting"
    others = [
        address({**cell, "number": 1}),
        address(cell, scale=1.25),
        address(cell, note="x"),
        address(cell, measure=sweep.where),
        address(cell, engines=("numpyro",)),
    ]
    assert len({same, *others}) == 6


SCRIPT = '''
"""A script."""
def measure(config, cell, scratch):
    """Measure."""
    x = 1.0  # one
    return {"x": x}
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one file, in place of ours."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "datasets.py").write_text("x = 1\n")
    monkeypatch.setattr(grids, "__file__", str(tmp_path / "benchmarks" / "grid.py"))
    return tmp_path


def script_address(folder: Path, text: str) -> str:
    """A cell's address, measured by a script of such a text."""
    path = folder / "script.py"
    path.write_text(text)
    code_version.cache_clear()
    spec = importlib.util.spec_from_file_location("script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return Grid("Q?", module.measure, Config(), [{}], (), folder).address({})
    finally:
        code_version.cache_clear()


def test_changed_code_is_another_cell_and_a_changed_comment_is_not(library: Path):
    same = script_address(library, SCRIPT)
    for text in (
        SCRIPT.replace("# one", "# still one\n"),
        SCRIPT.replace("Measure.", "Measure with care."),
        SCRIPT.replace('    """Measure."""\n', ""),
        SCRIPT.replace("def", "\n\ndef"),
    ):
        assert text != SCRIPT
        assert script_address(library, text) == same
    for text in (SCRIPT.replace("1.0", "1.5"), SCRIPT.replace('{"x"', '{"y"'), SCRIPT + "\nUNUSED = 'a text'\n"):
        assert script_address(library, text) != same


@pytest.mark.parametrize("part", ["zoo/vae/model.py", "guides/a.py", "inference/a.py", "benchmarks/datasets.py"])
def test_the_librarys_code_counts(library: Path, part: str):
    (library / part).parent.mkdir(parents=True, exist_ok=True)
    digests = []
    for text in ("x = 1\n", "x = 1  # one\n", "x = 2\n"):
        (library / part).write_text(text)
        code_version.cache_clear()
        digests.append(code_version(""))
    code_version.cache_clear()
    assert digests[0] == digests[1] != digests[2]


# --- failing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_cell_takes_no_other_and_is_tried_again_alone(tmp_path: Path, jobs: int):
    grid, seen = sweep.grid(tmp_path, {"fail until mended": 1, "quick": 3}), []
    with pytest.raises(CellsFailed, match=r"1 of 4 cells failed.*\nfail until mended, 0: RuntimeError: not mended"):
        run(grid, jobs=jobs, done=lambda cell, record: seen.append((name_of(cell), record["figures"])))
    assert sorted(name for name, _ in seen) == ["quick, 0", "quick, 1", "quick, 2"]
    assert figures(grid)[0] is None
    assert dict(seen) == {name_of(cell): f for cell, f in zip(grid.cells[1:], figures(grid)[1:], strict=True)}
    (tmp_path / "mended").touch()
    run(grid, jobs=jobs)
    assert Counter(logged(tmp_path)) == {"fail until mended, 0": 2, "quick, 0": 1, "quick, 1": 1, "quick, 2": 1}
    assert None not in figures(grid)


def test_every_failing_cell_is_named(tmp_path: Path):
    grid = sweep.grid(tmp_path, {"fail": 2, "object": 1, "list": 1, "quick": 1})
    with pytest.raises(CellsFailed) as caught:
        run(grid)
    words = str(caught.value)
    assert words.startswith("4 of 5 cells failed, the others are there:")
    assert "fail, 1: ZeroDivisionError: of no use" in words
    assert "object, 0: InvalidArgument: a cell's figures must be JSON values; got" in words
    assert "list, 0: InvalidArgument: a cell's figures must be a dict; got list" in words
    assert [f is None for f in figures(grid)] == [True] * 4 + [False]


@pytest.mark.parametrize(("options", "words"), [
    ({"jobs": 0}, "jobs must"), ({"jobs": 1.5}, "jobs must"), ({"backend": "dask"}, "backend must"),
])  # fmt: skip
def test_wrong_arguments_are_refused(tmp_path: Path, options: dict[str, Any], words: str):
    with pytest.raises(InvalidArgument, match=words):
        run(sweep.grid(tmp_path, {"quick": 1}), **options)
    assert logged(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path):
    (tmp_path / "cells").write_text("a file")
    with pytest.raises(WriteFailed, match="cells"):
        run(sweep.grid(tmp_path, {"quick": 1}))
    assert logged(tmp_path) == []


def test_cells_have_names_of_their_own_and_are_json(tmp_path: Path):
    cells = [{"seeds": [0]}, {"seeds": [1]}]
    with pytest.raises(InvalidArgument, match="cells must differ in their names"):
        Grid("Q?", sweep.measure, Config(), cells, (), tmp_path)
    with pytest.raises(InvalidArgument, match="cells and config must be JSON values"):
        run(Grid("Q?", sweep.measure, Config(), [{"kind": object()}], (), tmp_path))


def test_ray_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray.util.joblib", None)
    with pytest.raises(InvalidArgument, match=re.escape('Install "elbozoo[cluster]"')):
        run(sweep.grid(tmp_path, {"quick": 2}), backend="ray", jobs=2)


# --- spread ---------------------------------------------------------------------------------------------------------


def test_two_processes_make_the_table_of_one(tmp_path: Path):
    two, one = (sweep.spread(tmp_path / name) for name in ("two", "one"))
    before = {name: os.environ.get(name) for name in ("NPROC", "OMP_NUM_THREADS")}
    run(two, jobs=2)
    run(one)
    assert {name: os.environ.get(name) for name in before} == before
    assert_spread(figures(two), figures(one), os.getpid())


def test_two_workers_of_ray_make_the_table_of_one_process(tmp_path: Path):
    """In a process of its own: Ray forks, which JAX warns of once it has computed something."""
    pytest.importorskip("ray")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, str(TESTS / "sweep.py"), "ray", str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / sweep.FOUND).read_text())
    assert_spread(*found["figures"], found["process"])
    assert "fail, 0: ZeroDivisionError: of no use" in found["failed"]
    assert [f is None for f in found["beside"]] == [True, False]


def assert_spread(two: list[Any], one: list[Any], here: int) -> None:
    """Two processes, neither of them ``here``, found what ``here`` found."""
    processes = {f["process"] for f in two}
    assert len(processes) == 2
    assert here not in processes
    assert {f["process"] for f in one} == {here}
    assert [f["figure"] for f in two] == [f["figure"] for f in one] == [0.0, 1.5, 3.0, 4.5]


# --- the result file ------------------------------------------------------------------------------------------------


def test_the_result_has_the_cells_that_there_are(tmp_path: Path):
    grid = sweep.grid(tmp_path, {"fail": 1, "quick": 2})
    with pytest.raises(CellsFailed):
        run(grid)
    found = result(grid, lambda cells: {"both are there": len(cells) == 2})
    write_result(tmp_path / "result.json", found)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert found["question"] == "Q?"
    assert found["checks"] == {"both are there": True}
    assert found["config"] == {"scale": 1.5, "numbers": [0, 1, 2, 3]}
    assert list(found["cells"]) == ["quick, 0", "quick, 1"]
    cell = found["cells"]["quick, 1"]
    assert cell["figure"] == figures(grid)[2]["figure"]
    assert (cell["kind"], cell["number"]) == ("quick", 1)
    assert set(cell["run"]) == {"code", "machine", "seconds"}


def test_a_result_file_keeps_the_cells_of_another_part_of_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Unless they are of other settings or of another machine."""
    path = tmp_path / "result.json"

    def written(kinds: dict[str, int], **settings: Any) -> dict[str, Any]:
        grid = sweep.grid(tmp_path, kinds)
        grid = replace(grid, config=replace(grid.config, **settings), axes=("numbers",))
        measure_all(grid, path, lambda cells: {f"{len(cells)} cells": True}, progress=False)
        return json.loads(path.read_text())

    first = written({"quick": 2}, numbers=[0, 1])
    assert first["machine"].pop("accelerator") is None
    path.write_text(json.dumps(first))  # as files were before accelerators were named
    both = written({"slow": 1}, numbers=[7])
    assert list(both["cells"]) == ["quick, 0", "quick, 1", "slow, 0"]
    assert {name: both["cells"][name] for name in first["cells"]} == first["cells"]
    assert both["checks"] == {"3 cells": True}
    assert both["config"]["numbers"] == [0, 1, 7]
    (tmp_path / "mended").touch()
    assert "fail until mended, 0" in written({"fail until mended": 1})["cells"]
    (tmp_path / "mended").unlink()
    for file in sweep.grid(tmp_path, {}).folder.glob("*.json"):
        file.unlink()
    with pytest.raises(CellsFailed):
        written({"fail until mended": 1})
    assert json.loads(path.read_text())["cells"] == both["cells"], "what this grid could not measure is no result of it"
    other = written({"quick": 1}, numbers=[7], scale=2.0)
    assert list(other["cells"]) == ["quick, 0"]
    here = records.machine()
    monkeypatch.setattr(records, "machine", lambda: here | {"cpu": "another"})
    assert list(written({"slow": 1}, numbers=[7], scale=2.0)["cells"]) == ["slow, 0"]
    path.write_text("[]")
    assert list(written({"slow": 1}, numbers=[7], scale=2.0)["cells"]) == ["slow, 0"]


def test_figures_are_plain():
    found = plain(
        {"a": np.float32(0.5), 1: (np.arange(2), float("inf")), "b": {"c": np.array([[np.nan]]), "d": "text"}}
    )
    assert found == {"a": 0.5, "1": [[0, 1], None], "b": {"c": [[None]], "d": "text"}}
    json.dumps(found, allow_nan=False)
