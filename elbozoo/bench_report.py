"""One offline page, and Markdown, of the result files of benchmarks: tables, pictures, and each figure's record.

A result file is JSON with what it asks (``question``), the settings (``config``), ``versions`` and ``machine``, the
``cells`` by name, and the claims about them (``checks``). What a cell holds is its own affair: its numbers and short
texts become columns, one level of dicts is joined with dots, and a list with a number for each seed becomes its mean.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elbozoo import pictures
from elbozoo._version import __version__
from elbozoo.inference.errors import CorruptFile, must
from elbozoo.report import as_uri, write_page

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
"""Where a checkout has them."""

LONG_TEXT = 60
"""Characters at which a text is cut in a table. One without a space before it (a picture, say) is no column."""

ASIDE = ("kind", "run.code")
"""What is in the record alone."""


# --- what there is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Result:
    """A result file: its name, and what it holds."""

    name: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A figure as it is shown, and what it is sorted by: a number (nan for one that is missing), or a text."""

    text: str
    key: float | str


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a table: the cell's name, its entries by column, and all that is known of it as JSON."""

    name: str
    entries: Mapping[str, Entry]
    record: str


@dataclass(frozen=True, eq=False)
class Table:
    """Cells with the same kind of figures: the columns that tell them apart, and what is the same in all of them."""

    columns: Sequence[str]
    rows: Sequence[Row]

    @property
    def shared(self) -> dict[str, Entry]:
        """Columns in which all rows, where there are several, have one entry."""
        if len(self.rows) < 2:
            return {}
        first, *others = (row.entries for row in self.rows)
        return {c: first[c] for c in self.columns if c in first and all(o.get(c) == first[c] for o in others)}

    @property
    def telling(self) -> list[str]:
        """The other columns."""
        return [column for column in self.columns if column not in self.shared]

    @property
    def note(self) -> str:
        """What all rows share, in words."""
        return "; ".join(f"{column}: {entry.text}" for column, entry in self.shared.items())

    def is_text(self, column: str) -> bool:
        """Whether a column holds texts."""
        return any(isinstance(row.entries[column].key, str) for row in self.rows if column in row.entries)


def committed() -> list[Path]:
    """The result files of the checkout. Raises: InvalidArgument where there are none (an installed package)."""
    found = sorted(path for path in RESULTS.glob("*.json") if not path.name.startswith("smoke_"))
    if not found:
        raise must("RESULTS", "be given outside a checkout", f"none, and none in {RESULTS}", "Name result files")
    return found


def read(path: str | Path) -> Result:
    """A result file.

    Raises:
        InvalidArgument: there is no such file.
        CorruptFile: it is no JSON, or not of a benchmark.
    """
    path, todo = Path(path), "Name a file that a benchmark's --results wrote"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise must(str(path), "be a file that can be read", error.strerror or error, todo) from error
    except ValueError as error:
        raise must(str(path), "be a benchmark's result file", f"no JSON ({error})", todo, CorruptFile) from error
    missing = [n for n in ("question", "config", "versions", "machine", "cells") if n not in _dict(content)]
    if missing:
        raise must(str(path), "be a benchmark's result file", f"one without {missing}", todo, CorruptFile)
    if not isinstance(content["cells"], dict) or not all(isinstance(c, dict) for c in content["cells"].values()):
        raise must(str(path), "be a benchmark's result file", "cells that are no objects", todo, CorruptFile)
    return Result(path.stem, content)


def tables(result: Result) -> list[Table]:
    """The tables of a result: cells of one kind, or with half of their columns in common, share one."""
    groups: list[tuple[Any, list[str], list[Row]]] = []
    for name, cell in result.content["cells"].items():
        record = _record(result, name, cell)
        for line in _lines(cell):
            entries = dict(_entries(line, _num_seeds(result, cell)))
            group = next((g for g in groups if g[0] == cell.get("kind") and _alike(g[1], list(entries))), None)
            if group is None:
                groups.append(group := (cell.get("kind"), [], []))
            group[1].extend(column for column in entries if column not in group[1])
            group[2].append(Row(name, entries, record))
    return [Table(columns, rows) for _, columns, rows in groups]


def _alike(one: list[str], other: list[str]) -> bool:
    return 2 * len(set(one) & set(other)) >= min(len(one), len(other))


# --- from cells to entries ------------------------------------------------------------------------------------------


def _lines(cell: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A cell as the lines of a table: one, or one for each stage and objective whose gradients it has."""
    if cell.get("kind") != "gradients" or not isinstance(cell.get("stages"), dict):
        yield cell
        return
    axes = {name: value for name, value in cell.items() if name not in ("stages", "run")}
    for stage, objectives in cell["stages"].items():
        for objective, figures in _dict(objectives).items():
            of_part = {f"{n} gradient" if isinstance(v, dict) else n: v for n, v in _dict(figures).items()}
            yield {**axes, "stage": stage, "objective": objective, **of_part, "run": cell.get("run", {})}


def _entries(line: Mapping[str, Any], num_seeds: int | None) -> Iterator[tuple[str, Entry]]:
    """The columns of a line. A scalar with a standard error beside it (``x`` and ``x_se``) is one of them."""
    flat: dict[str, Any] = {}
    for name, value in line.items():
        flat |= {f"{name}.{n}": v for n, v in value.items()} if isinstance(value, dict) else {name: value}
    for name, value in flat.items():
        if name in ASIDE or (_is_number(flat.get(name.removesuffix("_se"))) and name.endswith("_se")):
            continue
        if _is_number(value) and _is_number(flat.get(f"{name}_se")):
            yield name, Entry(with_error(value, flat[f"{name}_se"]), value)
        elif (entry := _entry(name, value, num_seeds)) is not None:
            yield name, entry


def _entry(name: str, value: Any, num_seeds: int | None) -> Entry | None:
    """A value as it is shown; None for what is not: dicts, long texts, and lists that are not over seeds."""
    if isinstance(value, bool):
        return Entry("yes" if value else "no", float(value))
    if _is_number(value):
        return Entry(number(value), value)
    if isinstance(value, str):
        short = textwrap.shorten(value, LONG_TEXT, placeholder=" …")
        return None if short == "…" else Entry(short, value[:LONG_TEXT])
    if value is None:
        return Entry("–", math.nan)
    if not isinstance(value, list) or not value:
        return None
    if name == "seeds" or all(isinstance(v, str) for v in value):
        words = ", ".join(map(str, value))
        return Entry(words, words) if len(words) <= LONG_TEXT else None
    if len(value) != num_seeds or not all(v is None or isinstance(v, int | float) for v in value):
        return None
    if all(isinstance(v, bool) for v in value):
        return Entry(f"{sum(value)} of {len(value)}", float(sum(value)))
    return _mean(value)


def _mean(values: list[float | None]) -> Entry:
    """The mean over seeds and its standard error; a seed without a number is counted and left out."""
    there = [float(v) for v in values if v is not None and math.isfinite(v)]
    count = f"n = {len(there)}" + (f" of {len(values)}" if len(there) < len(values) else "")
    if not there:
        return Entry(f"– ({count})", math.nan)
    mean = math.fsum(there) / len(there)
    if len(there) == 1:
        return Entry(f"{number(mean)} ({count})", mean)
    variance = math.fsum((v - mean) ** 2 for v in there) / (len(there) - 1)
    return Entry(f"{with_error(mean, math.sqrt(variance / len(there)))} ({count})", mean)


def number(value: float) -> str:
    """A number to five figures; whole ones as they are."""
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e5):
        return str(int(value))
    return f"{value:.5g}"


def with_error(value: float, error: float) -> str:
    """A number to the second figure of its standard error, and that."""
    if not (math.isfinite(error) and error > 0):
        return f"{number(value)} ± {number(error)}"
    digits = 1 - math.floor(math.log10(error))
    if not -4 < digits < 7:
        return f"{value:.4g} ± {error:.2g}"
    digits = max(digits, 0)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _num_seeds(result: Result, cell: Mapping[str, Any]) -> int | None:
    """How long a list is that has a number for each seed; None where a cell is of one seed."""
    if "seed" in cell:
        return None
    config = _dict(result.content["config"])
    if isinstance(seeds := cell.get("seeds", config.get("seeds")), list):
        return len(seeds)
    return config.get("num_seeds")


def _record(result: Result, name: str, cell: Mapping[str, Any]) -> str:
    """All that is known of a cell: itself, the settings, the versions, and the machine unless it has its own."""
    about = {n: result.content[n] for n in ("config", "versions", "machine")}
    if "machine" in _dict(cell.get("run")):
        del about["machine"]
    text = json.dumps({"result": result.name, "cell": name, **_shortened(cell), **about}, indent=1, ensure_ascii=False)
    # a list of numbers takes a line, not one for each
    return re.sub(r"\[\n\s*([^\[\]{}]*?)\n\s*\]", lambda m: "[" + re.sub(r"\n\s*", " ", m[1]) + "]", text)


def _shortened(value: Any) -> Any:
    """A value without its pictures, which are long texts."""
    if isinstance(value, dict):
        return {k: _shortened(v) for k, v in value.items()}
    if isinstance(value, str) and len(value) > 500:
        return f"{value[:40]}… ({len(value)} characters in the file)"
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


# --- the page, and Markdown -----------------------------------------------------------------------------------------

CAPTION = (
    "Nats per datum unless a column says otherwise. A figure with n is the mean over n seeds ± its standard error; one "
    "without is of one run, ± the standard error that the benchmark recorded, which is that of the choice of data."
)


def write_report(results: Sequence[Result], path: str | Path) -> Path:
    """One self-contained HTML page: of each result the question, the checks, sortable tables, pictures and records.

    Args:
        results: see :func:`read`.
        path: the file; written whole or not at all.

    Raises: WriteFailed.
    """
    parts = [
        {
            "name": result.name,
            "question": result.content["question"],
            "checks": _dict(result.content.get("checks")),
            "tables": tables(result),
            "pictures": _pictures(result),
            "setting": setting(result),
        }
        for result in results
    ]
    return write_page("bench.html.j2", path, version=__version__, caption=CAPTION, results=parts)


def _pictures(result: Result) -> dict[str, str]:
    """What there is to draw of a result, by what it shows."""
    cells = list(result.content["cells"].values())
    drawn = {
        "NLL against the seconds of training": pictures.nll_against_seconds(cells),
        "Signal-to-noise ratio of the gradients against K": pictures.signal_to_noise(cells),
    }
    return {title: as_uri(figure, "svg") for title, figure in drawn.items() if figure is not None}


def setting(result: Result) -> str:
    """The machine and the versions in a line."""
    machine, versions = (_dict(result.content[name]) for name in ("machine", "versions"))
    where = f"{machine.get('cpu')}, {machine.get('cores')} cores"
    return "; ".join([where, ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))])


def markdown(results: Sequence[Result]) -> str:
    """The same tables and checks as Markdown."""
    parts = ["# Benchmarks", CAPTION]
    for result in results:
        parts += [f"## {result.name}", result.content["question"]]
        parts += [_markdown_table(table) for table in tables(result)]
        checks = _dict(result.content.get("checks")).items()
        parts.append("\n".join(f"- {'holds' if good else '**does not hold**'}: {claim}" for claim, good in checks))
        parts.append(f"*{setting(result)}*")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table) -> str:
    columns = table.telling
    rows = [[row.name, *(row.entries[c].text if c in row.entries else "" for c in columns)] for row in table.rows]
    lines = [["cell", *columns], ["---"] * (1 + len(columns)), *rows]
    text = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
    return f"In all rows: {table.note}.\n\n{text}" if table.note else text
