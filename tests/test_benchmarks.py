"""Every benchmark script runs at a small size, and the docs' tables are what the committed results give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from elbozoo.benchmarks.records import Record
from elbozoo.inference.errors import InvalidArgument

ROOT = Path(__file__).resolve().parents[1]
NOT_SCRIPTS = {"__init__", "datasets", "records", "tables"}
SMOKE = ["instruments", "iwae_mnist", "overhead"]


def test_every_script_has_a_smoke_row() -> None:
    scripts = {p.stem for p in (ROOT / "benchmarks").glob("*.py")} - NOT_SCRIPTS
    assert scripts == set(SMOKE)


@pytest.mark.pyro
@pytest.mark.numpyro
@pytest.mark.parametrize("name", SMOKE)
def test_smoke(name: str, tmp_path: Path) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--smoke", "--results", str(tmp_path / f"{name}.json")]
    if name in ("instruments", "iwae_mnist"):
        command += ["--checkpoints", str(tmp_path / "checkpoints")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # also where the package is not installed
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / f"smoke_{name}.json").read_text())
    assert record["cells"]
    assert record["checks"]
    assert record["versions"]
    assert record["machine"]["cpu"]


def test_tables_are_generated_from_the_results() -> None:
    from elbozoo.benchmarks.tables import PAGE, page

    assert PAGE.read_text() == page(), "run python benchmarks/tables.py"


def test_a_result_file_is_of_one_setting(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Config:
        hidden: int
        seeds: tuple[int, ...] = (0,)

    first = Record(tmp_path / "r.json", "Q?\n\nA.", Config(100), (), grid=("seeds",))
    first.cell("a", lambda: {"x": 1})
    more = Record(tmp_path / "r.json", "Q?\n\nA.", Config(100, seeds=(0, 1)), (), grid=("seeds",))
    assert more.cell("a", lambda: {"x": 2}) == {"x": 1}, "what is there is not measured again"
    with pytest.raises(InvalidArgument, match=r"be of the same settings.*config\.hidden"):
        Record(tmp_path / "r.json", "Q?\n\nA.", Config(200), (), grid=("seeds",))
