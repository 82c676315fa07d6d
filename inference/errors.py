"""Typed errors, each of the form ``<name> must <condition>; got <value>. <what to do>.``"""

from __future__ import annotations

from typing import Any


class ElbozooError(Exception):
    """Base class of every error that elbozoo raises on purpose."""


class InvalidArgument(ElbozooError, ValueError):
    """An argument, a data array or a setting that cannot be right."""


class Refused(InvalidArgument):
    """A bound, gradient estimator, shape or site that cannot be combined without a wrong gradient."""


class NonFinite(ElbozooError, FloatingPointError):
    """A non-finite value met while training; carries where, and the last good run.

    Attributes:
        site: name of the sample site or parameter that went non-finite first.
        step: global step (0-based) at which it did.
        run: the ``Run`` with the last good state, or None when there is none.
    """

    def __init__(self, message: str, site: str = "", step: int = -1, run: Any = None):
        super().__init__(message)
        self.site, self.step, self.run = site, step, run


class CorruptFile(ElbozooError, ValueError):
    """A file that is truncated, altered or of another kind than expected."""


def must(
    name: str, condition: str, got: object, todo: str, error: type[ElbozooError] = InvalidArgument
) -> ElbozooError:
    """Build (not raise) the error ``<name> must <condition>; got <got>. <todo>.``"""
    return error(f"{name} must {condition}; got {got}. {todo.rstrip('.')}.")
