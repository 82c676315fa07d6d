"""Options of the command line, made from the dataclasses of the parts: their fields, types, defaults and docstrings.

Nothing is listed here: a part that ``elbozoo.inference``, ``elbozoo.zoo`` or ``elbozoo.guides`` exports has its name
and its options on the command line.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import takewhile
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import tyro

from elbozoo import guides, inference, zoo
from elbozoo.inference import Adam, Bound, GradientEstimator, Objective, Shape
from elbozoo.inference.errors import must
from elbozoo.inference.parts import Part, one_of
from elbozoo.zoo import Denoiser, EndLikelihood, Likelihood, Network, Spec

OBJECTIVE = {"objective": Bound, "gradient": GradientEstimator, "shape": Shape}
"""What an objective is chosen from, by the option that chooses it."""

FROM_DATA = {"data_dim": None, "image_shape": "the data's", "levels": "the data's"}
"""Fields that the data settle where they can, and what stands for them in the help (None: not an option)."""

OF_DATA = (Spec, Network, Likelihood, Denoiser, EndLikelihood)
"""The kinds of part that have such fields: an image settles its levels, and not those of a grid of codes."""


def command_name(cls: type) -> str:
    """A class's name on the command line: ``AnnealedKL`` is annealed-kl, ``DReG`` dreg, ``BoxOfTools`` box-of-tools."""
    return re.sub(r"(?<=[a-z]{2})(?=[A-Z])|(?<=[a-z])(?=[A-Z][a-z]{2})", "-", cls.__name__).lower()


@cache
def choices(kind: type) -> dict[str, type]:
    """Every public class of one kind, by its name on the command line."""
    public = (getattr(module, name) for module in (inference, zoo, guides) for name in module.__all__)
    classes = (c for c in public if isinstance(c, type) and issubclass(c, kind) and c is not kind)
    return {command_name(c): c for c in classes if dataclasses.is_dataclass(c) and not inspect.isabstract(c)}


def choose(option: str, kind: type, name: str) -> type:
    """The class of a name. Raises: InvalidArgument with the nearest name."""
    found = choices(kind)
    one_of(f"--{option}", name, found)
    return found[name]


def summary(cls: type) -> str:
    """The first line of a docstring, as plain text."""
    return plain(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0])


@cache
def arguments(cls: type) -> dict[str, str]:
    """What the "Args" section of a docstring (and of its bases') says of each argument, as plain text."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        lines = inspect.cleandoc(base.__dict__.get("__doc__") or "").splitlines()
        if "Args:" in lines:
            section = takewhile(lambda line: line[:1] in ("", " "), lines[lines.index("Args:") + 1 :])
            text = textwrap.dedent("\n".join(section))
            for names, said in re.findall(r"^([\w, ]+):((?:.|\n(?=[ \n]))*)", text, re.MULTILINE):
                found |= {name.strip(): plain(said) for name in names.split(",")}
    return found


def plain(text: str) -> str:
    """One line, without the markup of the docstrings."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split())).replace("``", "")


# --- the options --------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One field of one class that can be set on the command line."""

    name: str
    hint: Any
    default: str
    help: str


@cache
def settings(cls: type) -> dict[str, Setting]:
    """The fields of a part that are plain values; those that hold parts are chosen by name instead."""
    hints, said = get_type_hints(cls), arguments(cls)
    plain_fields = (f for f in dataclasses.fields(cls) if part_of(hints[f.name]) is None)
    return {
        f.name: Setting(f.name, hints[f.name], _default(cls, f), said.get(f.name, ""))
        for f in plain_fields
        if _from_data(cls, f.name) is not None
    }


def _from_data(cls: type, name: str) -> str | None:
    """The entry of ``FROM_DATA``; "" for a field that the data do not settle: of another kind of part, or another."""
    return FROM_DATA.get(name, "") if issubclass(cls, OF_DATA) else ""


def part_of(hint: Any) -> type | None:
    """The kind of part that a field holds, if it does."""
    kinds = (Part, Objective, GradientEstimator)
    return hint if isinstance(hint, type) and issubclass(hint, kinds) else None


def nested(spec: type[Spec]) -> dict[str, type]:
    """The kinds of part that a model is made of, by field."""
    hints = get_type_hints(spec)
    return {f.name: hints[f.name] for f in dataclasses.fields(spec) if part_of(hints[f.name]) is not None}


def group(title: str, about: str, kinds: Mapping[str, tuple[type, str]], fixed: tuple[type, ...]) -> type:
    """A frozen dataclass with one field for each choice and each setting of what can be chosen.

    Args:
        title: the class's name.
        about: its docstring, which heads its part of the help.
        kinds: by option, the kind of part that it chooses among and the name chosen by default ("": any number may be
            chosen, none by default).
        fixed: classes that need no choosing.
    """
    fields: dict[str, tuple] = {}
    takers: dict[str, list[tuple[str, Setting]]] = {}
    for cls in fixed:
        for name, setting in settings(cls).items():
            takers.setdefault(name, []).append(("", setting))
    for option, (kind, default) in kinds.items():
        found = choices(kind)
        text = f"{summary(kind)} `elbozoo list` has a line on each."
        if default:
            fields[option] = Annotated[str, tyro.conf.arg(metavar=_braces(found), help=text)], default
        else:
            text = f"{text} One or several, the outermost first."
            arg = tyro.conf.arg(metavar=f"{_braces(found)} …", help=text, help_behavior_hint="(default: none)")
            fields[option] = Annotated[tuple[str, ...], arg], ()
        for name, cls in found.items():
            for setting in settings(cls).values():
                takers.setdefault(setting.name, []).append((name, setting))
    for name, found in takers.items():
        fields.setdefault(name, (_annotation(found), None))
    rows = [(name, hint, dataclasses.field(default=default)) for name, (hint, default) in fields.items()]
    made = dataclasses.make_dataclass(title, rows, frozen=True, kw_only=True)
    made.__doc__ = about
    return made


def _annotation(takers: list[tuple[str, Setting]]) -> Any:
    """The type and help of an option that the settings of several parts share."""
    said: dict[tuple[str, str], list[str]] = {}
    for owner, setting in takers:
        said.setdefault((setting.help, setting.default), []).append(owner)
    texts = []
    for (text, default), owners in said.items():
        names = ", ".join(filter(None, owners))
        texts.append(f"{f'[{names}] ' if names else ''}{text.rstrip('.')} ({default}).")
    hints = dict.fromkeys(member for _, setting in takers for member in _members(setting.hint))
    arg = tyro.conf.arg(metavar="|".join(_metavar(h) for h in hints), help=" ".join(texts), help_behavior_hint="")
    return Annotated[Union[(*hints, None)], arg]


def _default(cls: type, field: dataclasses.Field) -> str:
    if settled := _from_data(cls, field.name):
        return f"default: {settled}"
    value = field.default_factory() if callable(field.default_factory) else field.default
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return "required" if value is dataclasses.MISSING else f"default: {value}"


def _members(hint: Any) -> Iterator[Any]:
    """What of a type can be written on a command line."""
    if get_origin(hint) in (Union, types.UnionType):
        for member in get_args(hint):
            yield from _members(member)
    elif hint is not type(None) and get_origin(hint) is not Callable:
        yield hint


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return _braces(get_args(hint))
    if get_origin(hint) is tuple:
        return f"{_metavar(get_args(hint)[0])} …"
    return "{True,False}" if hint is bool else hint.__name__.upper()


def _braces(names: Any) -> str:
    return "{" + ",".join(names) + "}"


# --- from options to parts ----------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What the options ask for."""

    spec: Spec
    objective: Objective
    optimizer: Adam


def assemble(spec: type[Spec], options: Mapping[str, Any], facts: Mapping[str, Any]) -> Parts:
    """Build the model, the objective and the optimiser.

    Args:
        spec: the model's class.
        options: by name, choices and settings; None where a setting is not given.
        facts: what the data settle (see ``FROM_DATA``).

    Raises: InvalidArgument for unknown names, and for a setting that none of the chosen parts has, or two of them have.
    """
    bound = choose("objective", Bound, options["objective"])
    gradient = choose("gradient", GradientEstimator, options["gradient"])
    shapes = [choose("shape", Shape, name) for name in options["shape"]]
    pieces = {option: choose(option, kind, options[option]) for option, kind in nested(spec).items()}
    chosen = [spec, *pieces.values(), bound, gradient, *shapes, Adam]
    given = {name: value for name, value in options.items() if value is not None and name not in (*OBJECTIVE, *pieces)}
    for name in given:
        takers = [command_name(c) for c in chosen if name in settings(c)]
        if len(takers) > 1:
            got, todo = " and ".join(takers), "Choose one of them, or set both in Python"
            raise must(_option(name), "belong to one of the chosen parts", got, todo)
        if not takers:
            kinds = (OBJECTIVE | nested(spec)).items()
            owners = [f"--{o} {n}" for o, kind in kinds for n, c in choices(kind).items() if name in settings(c)]
            got = " ".join(command_name(c) for c in chosen[:-1])
            todo = f"Choose that, or leave {_option(name)} out"
            raise must(_option(name), f"go with {' or '.join(owners)}", got, todo)

    def build(cls: type, **parts: Any) -> Any:
        values = {}
        for field in dataclasses.fields(cls):
            if field.name in parts:
                continue
            if field.name in given:
                values[field.name] = _alone(given[field.name], get_type_hints(cls)[field.name])
            elif field.name in facts and _from_data(cls, field.name) != "":
                values[field.name] = facts[field.name]
            elif field.default is field.default_factory is dataclasses.MISSING:
                option = _option(field.name)
                raise must(option, f"be given for {command_name(cls)}", "nothing", f"Add {option} to the command")
        return cls(**values, **parts)

    objective = build(bound, gradient=build(gradient))
    for shape in reversed(shapes):
        objective = build(shape, objective=objective)
    return Parts(build(spec, **{option: build(cls) for option, cls in pieces.items()}), objective, build(Adam))


def _alone(value: Any, hint: Any) -> Any:
    """One number where options of one name take one or many (``--hidden 256``)."""
    many = any(get_origin(member) is tuple for member in _members(hint))
    return value[0] if isinstance(value, tuple) and len(value) == 1 and not many else value


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def describe(part: Any) -> str:
    """A part with what differs from its defaults: ``AnnealedKL(ELBO(), warmup=50)``."""
    shown = []
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        text = (
            describe(value) if dataclasses.is_dataclass(value) else f"{value:g}" if type(value) is float else str(value)
        )
        if field.name == "objective":  # what a shape wraps
            shown.append(text)
        elif value != default:
            shown.append(f"{field.name}={text}")
    return f"{type(part).__name__}({', '.join(shown)})"
