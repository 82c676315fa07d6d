"""A zoo of deep latent-variable models, in Pyro and in NumPyro, measured in nats.

``import elbozoo`` loads neither engine: the parts below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from elbozoo._version import __version__

if TYPE_CHECKING:
    from elbozoo import benchmarks, guides, inference, zoo

__all__ = ["__version__", "benchmarks", "guides", "inference", "zoo"]


def __getattr__(name: str) -> Any:
    """Import a part of the package when it is first asked for (PEP 562)."""
    if name in __all__:
        return import_module(f"elbozoo.{name}")
    raise AttributeError(f"module 'elbozoo' has no attribute {name!r}; its names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
