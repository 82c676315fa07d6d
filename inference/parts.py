"""Parts: frozen dataclasses of hyperparameters, each with a form in Pyro and one in NumPyro beside it."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from elbozoo.inference.errors import must

ENGINES = {
    "pyro": ("torch", "pyro", "zuko", "torchdiffeq"),
    "numpyro": ("jax", "numpyro", "flax", "optax", "flowjax", "equinox", "diffrax"),
}
"""Each engine, and the modules its extra installs."""


AnyPart = TypeVar("AnyPart", bound="Part")  # Self is unknown to run-time checks of methods


@dataclasses.dataclass(frozen=True)
class Part:
    """Hyperparameters of a model or of a piece of one: no engine, no weights, no state.

    A part in ``zoo/likelihoods/__init__.py`` has its forms in ``likelihoods_pyro.py`` and
    ``likelihoods_numpyro.py`` beside it, under its own class name. Nothing is registered: a user's own part in a
    folder of the same shape works like the ones here.
    """

    stem: ClassVar[str] = "model"
    """The form files are called ``<stem>_pyro.py`` and ``<stem>_numpyro.py``."""

    def form(self, engine: str, suffix: str = "") -> Any:
        """The part's class in one engine, found by name in the file beside the spec.

        Args:
            engine: ``"pyro"`` or ``"numpyro"``.
            suffix: appended to the class name (``"Encoder"``, ``"Decoder"`` for networks).

        Raises:
            InvalidArgument: the engine is unknown or not installed.
        """
        return getattr(self.form_module(engine), type(self).__name__ + suffix)

    def form_module(self, engine: str) -> Any:
        """The file beside the spec that holds its form in one engine."""
        one_of("engine", engine, ENGINES)
        try:
            return importlib.import_module(f"{type(self).__module__}.{self.stem}_{engine}")
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in ENGINES[engine]:
                raise
            todo = f'Run pip install "elbozoo[{engine}]"'
            raise must("engine", "be installed", f"no module {missing!r}", todo) from error

    def to_config(self) -> dict[str, Any]:
        """The part as a JSON-able dict: its class name under ``"class"``, then its fields; parts nest."""
        fields = {field.name: _encode(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"class": type(self).__name__, **fields}

    @classmethod
    def from_config(cls: type[AnyPart], config: Mapping[str, Any]) -> AnyPart:
        """Build a part from ``to_config``'s dict.

        Classes are looked up by name among the public names of ``elbozoo.zoo`` and ``elbozoo.guides`` (and ``cls``
        itself), fields among the class's own; nothing is evaluated or unpickled. A field left out takes its default.

        Args:
            config: what ``to_config`` returned, or that after a round trip through JSON.

        Returns:
            A ``cls``, equal to the part that ``to_config`` was called on.

        Raises:
            InvalidArgument: an unknown class or field (with the nearest known name), a missing field without a
                default, a value the class refuses, or a class that is not a ``cls``.
        """
        part = _decode(config, {**public_parts(), cls.__name__: cls}, cls.__name__)
        if not isinstance(part, cls):
            raise must("config", f"describe a {cls.__name__}", type(part).__name__, "Call from_config of that class")
        return part


def public_parts() -> dict[str, type[Part]]:
    """Every part that ``elbozoo.zoo`` and ``elbozoo.guides`` export, by class name."""
    exported: dict[str, type[Part]] = {}
    for package in ("elbozoo.zoo", "elbozoo.guides"):
        module = importlib.import_module(package)
        values = ((name, getattr(module, name)) for name in module.__all__)
        exported.update({name: value for name, value in values if isinstance(value, type) and issubclass(value, Part)})
    return exported


def _encode(value: Any) -> Any:
    if isinstance(value, Part):
        return value.to_config()
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def _decode(value: Any, classes: Mapping[str, type[Part]], where: str) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_decode(item, classes, where) for item in value)
    if not isinstance(value, Mapping):
        return value
    if "class" not in value:
        todo = "Pass the dict that to_config returned"
        raise must(where, 'name its class under the key "class"', sorted(value), todo)
    name = value["class"]
    one_of(f"{where}: class", name, classes)
    fields = {field.name: field for field in dataclasses.fields(classes[name])}
    given = {key: item for key, item in value.items() if key != "class"}
    for key in given:
        one_of(f"{name}: field", key, fields)
    required = {key for key, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(given)):
        raise must(name, f"have the fields {sorted(required)}", f"none for {missing}", "Add them to the config")
    return classes[name](**{key: _decode(item, classes, f"{name}.{key}") for key, item in given.items()})


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is not among ``choices``, naming the nearest one."""
    choices = list(choices)
    if isinstance(value, str) and value in choices:
        return
    nearest = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 1, cutoff=0.0)
    raise must(name, f"be one of {choices}", repr(value), f"The nearest is {nearest[0]!r}")


def whole_number(name: str, value: Any, least: int = 1) -> None:
    """Refuse anything but an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise must(name, f"be a whole number of at least {least}", repr(value), f"Pass an int >= {least}")


def whole_numbers(name: str, values: Any, length: int | None = None) -> tuple[int, ...]:
    """``values`` as a tuple of ints of at least 1, of the given length if there is one."""
    items = tuple(values) if isinstance(values, (tuple, list)) else None
    if items is None or (length is not None and len(items) != length):
        wanted = "a tuple of whole numbers" if length is None else f"a tuple of {length} whole numbers"
        raise must(name, f"be {wanted}", repr(values), f"Pass {name}=({', '.join(['4'] * (length or 2))})")
    for item in items:
        whole_number(f"every entry of {name}", item)
    return items


def number(name: str, value: Any, holds: Callable[[Any], bool], condition: str, todo: str) -> None:
    """Refuse anything but a finite real number for which ``holds``."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and math.isfinite(value) and holds(value)):
        raise must(name, condition, repr(value), todo)


def positive(name: str, value: Any, todo: str = "") -> None:
    """Refuse anything but a finite number above zero."""
    number(name, value, lambda v: v > 0, "be a finite number above 0", todo or f"Pass {name}=1.0, say")


def instance_of(name: str, value: Any, kind: type) -> None:
    """Refuse anything but an instance of ``kind`` (the class itself is a frequent slip)."""
    if not isinstance(value, kind):
        todo = f"Pass {value.__name__}()" if isinstance(value, type) else f"Pass an instance of a {kind.__name__}"
        raise must(name, f"be a {kind.__name__}", repr(value), todo)
