"""Rows of a test that runs in both engines; ``ELBOZOO_EVERY_ROW=1`` runs all of them in both.

Pyro runs everything; NumPyro compiles every program, which costs three times as much, and runs by default what is its own:
its trace reader, its trainer, each model's densities and gradients against Pyro's (``test_twins.py``), every estimator
against quadrature on some program, one exact answer and one training for each kind of model and instrument.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest

EVERY_ROW = bool(os.environ.get("ELBOZOO_EVERY_ROW"))

PYRO_ALONE = pytest.mark.parametrize("engine", ["numpyro", "pyro"] if EVERY_ROW else ["pyro"])
"""A test of what is written once for both engines, or whose NumPyro side other tests run. Pyro compiles nothing.

``test_twins.py`` holds NumPyro's log densities and their gradients at given values against Pyro's: no draws, no initial
weights, no trainer.
"""


def covering(
    names: str, rows: Sequence[Any], *, numpyro: Collection[int] = (0,), ids: Callable[[Any], Any] | None = None
) -> pytest.MarkDecorator:
    """Parametrise ``engine`` and ``names``: every row in Pyro; in NumPyro, which compiles each, those at ``numpyro``.

    For rows that differ in what is written once for both engines: what is NumPyro's own must be in the rows it gets.

    Args:
        names: argument names, separated by commas.
        rows: as for ``pytest.mark.parametrize``.
        numpyro: indices of rows; none where other tests have what is NumPyro's own.
        ids: what a row, or each value of one, is called.
    """
    several = "," in names
    found = []
    for engine in ("numpyro", "pyro"):
        for i, row in enumerate(rows):
            if engine == "numpyro" and i not in numpyro and not EVERY_ROW:
                continue
            values = tuple(row) if several else (row,)
            words = [str(ids(value) if ids else i if not isinstance(value, str) else value) for value in values]
            found.append(pytest.param(engine, *values, id="-".join([engine, *words])))
    return pytest.mark.parametrize(f"engine,{names}", found)
