"""Fixture of the tests that see the library as its users do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def as_users_run_it() -> Iterator[None]:
    """Without the shape and type checks that pytest adds: they draw random numbers, and refuse before our own checks do."""
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
