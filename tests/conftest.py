"""What every test starts from: float64, the CPU, one core a worker, checked shapes, and only the engines installed.

A test that has a parameter or fixture called ``engine``, or the mark ``pyro`` or ``numpyro``, is skipped where that
engine's extra is not installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from jaxtyping import install_import_hook
from threadpoolctl import threadpool_limits

# Read once, when jax, matplotlib and torch start; programs that a test runs inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"
# Most of the suite's time is XLA compiling small programs that run once: compile fast, not well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker keeps to one core: workers that each start a thread a core slow one another down.
    os.environ["NPROC"] = "1"  # XLA's thread pools; its own flags no longer reach them
    os.environ["OMP_NUM_THREADS"] = "1"  # torch
    threadpool_limits(1)  # NumPy's BLAS, which a pytest plugin has loaded by now

# Shapes and types in the annotations of elbozoo.inference hold at run time, under pytest alone.
# An int is a float to Python's type checkers (PEP 484's tower), and so it is here.
install_import_hook("elbozoo.inference", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

NEEDS = {
    "numpyro": ("jax", "numpyro", "flax", "optax", "flowjax", "equinox", "diffrax"),
    "pyro": ("torch", "pyro", "zuko", "torchdiffeq"),
}
"""What each engine's extra brings, by import name."""

MISSING = {engine: [module for module in modules if find_spec(module) is None] for engine, modules in NEEDS.items()}

if not MISSING["pyro"]:
    import torch

    torch.set_default_dtype(torch.float64)  # here too: tables of arguments are made before any fixture runs


@pytest.fixture(params=sorted(NEEDS))
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine in turn."""
    return request.param


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """Undo what a test may leave behind in torch and Pyro: the default dtype, the random state, the param store."""
    if not MISSING["pyro"]:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
    yield
    if "pyro" in sys.modules:
        sys.modules["pyro"].clear_param_store()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        for engine, gone in MISSING.items():
            if gone and (item.get_closest_marker(engine) or parameters.get("engine") == engine):
                item.add_marker(pytest.mark.skip(reason=f"elbozoo[{engine}] is not installed: no {', '.join(gone)}"))
