"""What every test starts from: float64, the CPU (JAX_PLATFORMS=cpu,cuda lets `test_accelerator.py` find a GPU; with
cuda first, all of NumPyro's tests run on it), one core a worker, checked shapes, and only the engines installed.

A test that has a parameter or fixture called ``engine``, or the mark ``pyro`` or ``numpyro``, is skipped where that
engine's extra is not installed.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from threadpoolctl import threadpool_limits

# Read once, when jax, matplotlib and torch start; programs that a test runs inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_X64"] = "1"
# Most of the suite's time is XLA compiling small programs that run once: compile fast, not well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if find_spec("jaxlib") and version("jaxlib").startswith(
    "0.10."
):  # a compiler that does not know a flag refuses to start
    # The older emitters compile a training step in half the time, and one piece of a program in three quarters of the
    # time of the many pieces that several threads could take.
    for flag, value in (("xla_cpu_use_fusion_emitters", "false"), ("xla_cpu_parallel_codegen_split_count", "1")):
        if flag not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}".strip()
# And what is compiled is kept: for later tests, for the other workers, for programs that a test runs, and for the next
# run of the suite. What is traced, and how often, stays as it was; JAX asks for the same program on the same compiler.
COMPILED = Path(__file__).resolve().parents[1] / ".pytest_cache" / "compiled"
KEPT_FOR = 7 * 24 * 3600
"""Seconds after which a compiled program is thrown away, lest the folder grow for ever."""
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker keeps to one core: workers that each start a thread a core slow one another down.
    os.environ["NPROC"] = "1"  # XLA's thread pools; its own flags no longer reach them
    os.environ["OMP_NUM_THREADS"] = "1"  # torch
    threadpool_limits(1)  # NumPy's BLAS, which a pytest plugin has loaded by now

# Tracing makes many small objects, few of which are garbage: looked for less often, they cost a tenth less time.
gc.set_threshold(50_000, 20, 20)

JAXTYPED = jaxtyping.jaxtyped


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """Leaves functions within functions as they are: they are made anew at every call, and so would their checks be, at
    two thirds of the cost of a small training step in Pyro. Their annotations name no shapes.
    """

    def decorate(what: Any) -> Any:
        nested = "<locals>" in getattr(what, "__qualname__", "")
        return what if nested else JAXTYPED(what, typechecker=typechecker)

    return decorate


# Shapes and types in the annotations of elbozoo.inference hold at run time, under pytest alone.
# An int is a float to Python's type checkers (PEP 484's tower), and so it is here.
jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
jaxtyping.install_import_hook(
    "elbozoo.inference", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

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


LONGEST = {"test_benchmarks", "test_cli", "test_docs", "test_gradients", "test_streams", "test_twins"}
"""Files to begin with, lest one worker end with them alone."""


def pytest_sessionstart(session: pytest.Session) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ and COMPILED.is_dir():
        for path in COMPILED.iterdir():
            if path.stat().st_mtime < time.time() - KEPT_FOR:
                path.unlink()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)  # stable: else the order stays
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        for engine, gone in MISSING.items():
            if gone and (item.get_closest_marker(engine) or parameters.get("engine") == engine):
                item.add_marker(pytest.mark.skip(reason=f"elbozoo[{engine}] is not installed: no {', '.join(gone)}"))
