"""The page and the Markdown of benchmarks' results: every figure, its record, nothing from outside, typed errors."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elbozoo import bench_report, cli, pictures
from elbozoo.bench_report import Result, committed, markdown, read, tables, with_error, write_report
from elbozoo.inference.errors import CorruptFile, ElbozooError, InvalidArgument

MACHINE = {"cpu": "a processor", "cores": 2, "system": "a system", "python": "3.11"}
RUN = {"code": "c0de", "machine": MACHINE, "seconds": 12.25}
STEPS = {"nll": [90.0, 91.0, 92.0, 93.0], "elbo": [-93.0, -94.0, -95.0, None], "seconds": [2.0, 2.0, 3.0, 3.0]}


def training(objective: str, num_particles: int, shift: float = 0.0) -> dict[str, Any]:
    """A training cell, as the grid of estimators has them."""
    budgets = {
        "steps": {**STEPS, "nll": [x + shift for x in STEPS["nll"]]},
        "time": {**STEPS, "steps": [10, 11, 12, 13]},
    }
    axes = {"kind": "training", "data": "digits", "engine": "numpyro", "model": "vae", "objective": objective}
    return {**axes, "num_particles": num_particles, "seeds": [0, 1, 2, 3], **budgets, "run": RUN}


def gradients() -> dict[str, Any]:
    """A cell of gradients: two stages, two objectives."""
    of = {
        f"iwae-{k}": {"num_particles": k, "value": -90.0 - k, "model": {"snr": 1.5 * k, "variance": 0.5, "bias": None}, "guide": {"snr": 3.0 / k, "variance": 0.25, "bias": 0.125}}
        for k in (1, 5)
    }  # fmt: skip
    return {"kind": "gradients", "data": "digits", "engine": "numpyro", "model": "vae", "stages": {"start": of, "end": of}, "run": RUN}  # fmt: skip


def content(**cells: dict[str, Any]) -> dict[str, Any]:
    """A result file of some cells."""
    checks = {"IWAE beats the ELBO": True, "K = 5 | beats <K = 1>": False}
    about = {"config": {"seeds": [0, 1, 2, 3], "epochs": 77}, "versions": {"jax": "0.10.2"}, "machine": MACHINE}
    return {"question": "Which estimator is best?", **about, "cells": cells, "checks": checks}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A result file with cells of every kind."""
    odd = {"nll": 89.123456, "nll_se": 0.0456, "flags": {"live": True}, "picture": "A" * 900, "long": list(range(40)), "why": "the training met nan at step 12, and after that there is nothing to tell", "nested": [[1, 2]]}  # fmt: skip
    cells = {"elbo, 1": training("elbo", 1), "iwae, 5": training("iwae", 5, -1.0), "gradients": gradients(), "odd": odd}
    path = tmp_path / "made.json"
    path.write_text(json.dumps(content(**cells)))
    return path


class Page(HTMLParser):
    """What a page has: the cells of its tables, addresses it takes things from, and its records."""

    def __init__(self, path: Path):
        super().__init__()
        self.rows: list[tuple[str | None, list[tuple[str | None, str]]]] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.records: dict[str, str] = {}
        self.heads: list[list[str]] = []
        self._in: str = ""
        self._id: str | None = None
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.sources += [value for name, value in found.items() if name in ("src", "href", "data", "action", "srcset")]
        if tag == "thead":
            self.heads.append([])
        if tag == "tr":
            self.rows.append((found.get("data-record"), []))
        if tag == "td":
            self.rows[-1][1].append((found.get("data-key"), ""))
        if tag == "details":
            self._id = found.get("id")
        if tag in ("td", "th", "pre"):
            self._in = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "td":
            key, text = self.rows[-1][1][-1]
            self.rows[-1][1][-1] = (key, text + data)
        elif self._in == "th":
            self.heads[-1].append(data)
        elif self._in == "pre" and self._id:
            self.records[self._id] = self.records.get(self._id, "") + data

    def row(self, name: str) -> dict[str, tuple[str | None, str]]:
        """A line of the table by the column's name."""
        index = -1
        for _, cells in self.rows:
            index += not cells
            if cells and cells[0][1] == name:
                return dict(zip(self.heads[index], cells, strict=True))
        raise KeyError(name)


@pytest.fixture
def page(made: Path, tmp_path: Path) -> Page:
    return Page(write_report([read(made)], tmp_path / "page.html"))


# --- the page -------------------------------------------------------------------------------------------------------


def test_figures_and_what_they_are_sorted_by(page: Page):
    row = page.row("iwae, 5")
    error = np.std([0, 1, 2, 3], ddof=1) / 2
    assert row["steps.nll"] == ("90.5", f"90.50 ± {error:.2f} (n = 4)")
    assert row["objective"] == ("iwae", "iwae")
    assert row["num_particles"] == ("5", "5")
    assert "steps.elbo: -94.00 ± 0.58 (n = 3 of 4)" in page.text, "a seed without a number is told"
    assert "In all rows: data: digits; engine: numpyro; model: vae; seeds: 0, 1, 2, 3;" in page.text
    odd = page.row("odd")
    assert odd["nll"] == ("89.123456", "89.123 ± 0.046")
    assert odd["flags.live"] == ("1.0", "yes")
    assert odd["why"][1].startswith("the training met nan at step 12,")
    assert not {"nll_se", "picture", "long", "nested"} & set(odd)


def test_gradients_have_a_line_a_stage_and_objective(page: Page):
    lines = [cells for _, cells in page.rows if cells and cells[0][1] == "gradients"]
    head = next(head for head in page.heads if "stage" in head)
    found = [dict(zip(head, [text for _, text in line], strict=True)) for line in lines]
    assert [(f["stage"], f["objective"]) for f in found] == [
        (s, o) for s in ("start", "end") for o in ("iwae-1", "iwae-5")
    ]
    assert (found[1]["value"], found[1]["model gradient.snr"], found[1]["guide gradient.snr"]) == ("-95", "7.5", "0.6")
    assert "model gradient.bias: –" in page.text
    assert "model: vae;" in page.text, "the model's name is not lost to its gradient's figures"


def test_every_line_leads_to_its_record(page: Page, made: Path):
    known = json.loads(made.read_text())
    lines = [(record, cells[0][1]) for record, cells in page.rows if cells]
    assert len(lines) == 2 + 4 + 1
    for record, name in lines:
        assert record is not None
        found = json.loads(page.records[record])
        cell = known["cells"][name]
        assert found["result"] == "made"
        assert found["cell"] == name
        assert found["config"] == known["config"]
        assert found["versions"] == known["versions"]
        machine = found["run"]["machine"] if "run" in cell else found["machine"]
        assert machine == MACHINE
        assert {k: v for k, v in found.items() if k in cell and k != "picture"} == {k: v for k, v in cell.items() if k != "picture"}  # fmt: skip
        assert found.get("picture", "").endswith("(900 characters in the file)") == (name == "odd")


def test_the_page_takes_nothing_from_outside(page: Page):
    assert all(source.startswith(("#", "data:image/")) for source in page.sources), page.sources
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    without = re.sub(r"data:image/[^\"]*", "", page.text)
    assert "http" not in without
    assert "@import" not in without
    assert "url(" not in without


def test_questions_and_checks_are_there_and_escaped(page: Page):
    assert "Which estimator is best?" in page.text
    assert "holds: IWAE beats the ELBO" in page.text
    assert "does not hold: K = 5 | beats &lt;K = 1&gt;" in page.text
    assert "1 of 2 claims hold" in page.text
    assert "a processor, 2 cores; jax 0.10.2" in page.text


def test_pictures_are_drawn_where_there_is_something_to_draw(made: Path, tmp_path: Path):
    cells = read(made).content["cells"]
    expected = {"odd": 0, "elbo, 1": 1, "gradients": 1}
    for name, count in expected.items():
        path = tmp_path / "one.json"
        path.write_text(json.dumps(content(**{name: cells[name]})))
        found = Page(write_report([read(path)], tmp_path / "one.html"))
        assert found.tags.count("img") == count, name


def test_points_are_means_of_seeds(made: Path):
    cells = list(read(made).content["cells"].values())
    figure = pictures.nll_against_seconds(cells)
    assert figure is not None
    (axes,) = figure.axes
    points = sorted(
        tuple(map(float, line.get_xydata()[0])) for line in axes.lines if line.get_marker() not in ("", "None")
    )
    assert points == [(2.5, 90.5), (2.5, 91.5), (2.5, 91.5), (2.5, 91.5)], "two budgets of two objectives"
    figure = pictures.signal_to_noise(cells)
    assert figure is not None
    lines = {axes.get_title(): [line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes}
    assert lines["guide, end: digits, vae, numpyro"] == [[[1.0, 3.0], [5.0, 0.6]]], "iwae-1 and iwae-5 are one line"
    assert len(lines) == 4


@pytest.mark.parametrize(("name", "k", "expected"), [
    ("iwae-5", 5, "iwae"), ("iwae, K=50", 50, "iwae"), ("elbo", 1, "elbo"), ("miwae (K = 8)", 8, "miwae"),
    ("iwae-50", 5, "iwae-50"), ("5", 5, "5"),
])  # fmt: skip
def test_an_objective_without_its_k(name: str, k: int, expected: str):
    assert pictures.family(name, k) == expected


@pytest.mark.parametrize(("value", "error", "expected"), [
    (97.55482, 0.27268, "97.55 ± 0.27"), (0.45367, 0.00979, "0.4537 ± 0.0098"), (1234.5, 56.0, "1234 ± 56"),
    (1.0, 0.0, "1 ± 0"), (2.5e7, 1.2e5, "2.5e+07 ± 1.2e+05"),
])  # fmt: skip
def test_a_figure_ends_where_its_error_does(value: float, error: float, expected: str):
    assert with_error(value, error) == expected


def test_lists_that_are_not_over_seeds_are_no_means():
    cell = {"seed": 3, "objective": "elbo", "bound_by_epoch": [1.0, 2.0, 3.0, 4.0]}
    (table,) = tables(Result("r", content(one=cell)))
    assert table.columns == ["seed", "objective"]
    flags = {"collapsed": [True, False, True, True], "none": [None] * 4}
    (table,) = tables(Result("r", content(one=flags)))
    assert {c: e.text for c, e in table.rows[0].entries.items()} == {"collapsed": "3 of 4", "none": "– (n = 0 of 4)"}


# --- Markdown -------------------------------------------------------------------------------------------------------


def test_markdown_has_the_same_tables(made: Path, page: Page):
    text = markdown([read(made)])
    lines = [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line.startswith("|")]  # fmt: skip
    heads = [line for line in lines if line[0] == "cell"]
    assert heads == page.heads
    rows = [line for line in lines if line[0] not in ("cell", "---")]
    assert rows == [[text for _, text in cells] for _, cells in page.rows if cells]
    assert "- holds: IWAE beats the ELBO\n- **does not hold**: K = 5 | beats <K = 1>" in text
    assert "Which estimator is best?" in text


# --- the committed results, and errors ------------------------------------------------------------------------------


def test_the_committed_results_have_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        cli.main(["bench", "report", "--out", str(tmp_path / "all.html"), "--markdown", str(tmp_path / "all.md")]) == 0
    )
    assert str(tmp_path / "all.html") in capsys.readouterr().out
    names = [path.stem for path in committed()]
    text, found = (tmp_path / "all.md").read_text(), Page(tmp_path / "all.html")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == names
    for path in committed():
        for cell in json.loads(path.read_text())["cells"]:
            assert f"| {cell} |" in text
            assert found.row(cell)
    assert cli.main(["bench", "list"]) == 0
    listed = capsys.readouterr().out
    assert [name for name in names if not re.search(rf"^{name} .*\d+ of \d+ hold", listed, re.MULTILINE)] == []


@pytest.mark.parametrize(("text", "error", "words"), [
    (None, InvalidArgument, "must be a file that can be read"),
    ("{", CorruptFile, "no JSON"),
    ("[]", CorruptFile, "without .*question"),
    ('{"cells": {}}', CorruptFile, "without .*question"),
    (json.dumps({**content(), "cells": []}), CorruptFile, "cells that are no objects"),
    (json.dumps({**content(), "cells": {"a": 1}}), CorruptFile, "cells that are no objects"),
    (b"\xff\xfe", CorruptFile, "no JSON"),
])  # fmt: skip
def test_errors_are_typed(
    text: Any, error: type[ElbozooError], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(error, match=words):
        read(path)
    assert cli.main(["bench", "report", str(path), "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_a_command_of_bench_that_is_none_is_named(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "reprot"]) == 2
    assert "command of bench must be one of" in capsys.readouterr().err


def test_outside_a_checkout_results_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(bench_report, "RESULTS", tmp_path)
    with pytest.raises(InvalidArgument, match="RESULTS must be given outside a checkout"):
        committed()
