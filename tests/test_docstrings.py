"""The examples in docstrings and pages run, and print what they say."""

from __future__ import annotations

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

import elbozoo

ROOT = Path(elbozoo.__file__).parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NEEDS = {"numpyro": r"\b(numpyro|jax|flax|optax)\b|_numpyro\b", "pyro": r"\b(pyro|torch)\b|_pyro\b"}
"""Which words in an example, or in a file's name, mean that it needs an engine."""


def table(paths: list[Path]) -> list:
    """A row for each file that has examples, marked with the engines that they need."""
    rows = []
    for path in sorted(paths):
        if examples := re.findall(r"^\s*(?:>>>|\.\.\.) (.*)", path.read_text("utf-8"), re.MULTILINE):
            words = "\n".join([path.stem, *examples])
            marks = [getattr(pytest.mark, engine) for engine, pattern in NEEDS.items() if re.search(pattern, words)]
            rows.append(pytest.param(path.relative_to(ROOT).as_posix(), marks=marks))
    return rows


PARTS = ("elbozoo", *(f"elbozoo/{name}" for name in elbozoo.__all__ if name != "__version__"))
MODULES = table([path for part in PARTS for path in (ROOT / part).rglob("*.py")])
PAGES = table([path for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")) if path.exists()])


@pytest.mark.parametrize("path", MODULES)
def test_docstring_examples(path: str):
    module = import_module(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    found = doctest.testmod(module, optionflags=OPTIONS, verbose=False)
    assert found.attempted > 0  # an example that doctest does not reach is one that nobody runs
    assert found.failed == 0


@pytest.mark.parametrize("path", PAGES)
def test_page_examples(path: str):
    text = re.sub("^ *```.*", "", (ROOT / path).read_text("utf-8"), flags=re.MULTILINE)  # no fence is expected output
    page = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, path, path, 0)
    assert doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(page).failed == 0
