"""Weights between NumPyro's nested parameters and the flat names and layouts of torch's ``state_dict``.

One rule, both ways. A parameter site ``decoder$params`` that holds a pytree becomes one entry a leaf, named by the site
without ``$params`` and the path, joined by dots. A leaf called ``kernel`` is called ``weight`` in torch, which puts the
output features first: ``(..., in, out) -> (out, in, ...)``, a transpose for a dense layer and HWIO to OIHW for a
convolution. Every other leaf keeps its name and layout. A site that is a plain array keeps its own name. Mutable sites
called ``<module>$buffers`` are a torch module's buffers, and go by the same rule.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from elbozoo.inference.errors import must

SUFFIX, BUFFERS = "$params", "$buffers"


def to_torch_layout(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """NumPyro parameters, by site, as a flat dict with torch's names and layouts.

    Args:
        params: ``{site: array or nested dict of arrays}``, what ``SVI.get_params`` returns.
        prefix: beginning of every site name that the flat names go without (``"a."`` for a program named ``a``).

    Returns:
        ``{name: array}``, C-contiguous NumPy arrays in the order of ``params``.

    Raises:
        InvalidArgument: two leaves would get one name, or a site does not begin with ``prefix``.
    """
    return {name: _to_torch(np.asarray(leaf), path) for name, path, leaf in _leaves(params, prefix)}


def from_torch_layout(flat: Mapping[str, Any], template: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of ``to_torch_layout``: nested NumPyro parameters from a flat dict.

    Args:
        flat: ``{name: array}`` with torch's names and layouts.
        template: parameters of the same program; only the structure, shapes and dtypes of its leaves are read.
        prefix: as in ``to_torch_layout``.

    Returns:
        A dict with the template's structure, sites and dtypes, and the values of ``flat``.

    Raises:
        InvalidArgument: names missing from ``flat`` or unexpected there, or an array of another shape.
    """
    leaves = list(_leaves(template, prefix))
    check_names(flat, [name for name, _, _ in leaves])
    arrays: dict[str, np.ndarray] = {}
    for name, path, leaf in leaves:
        array, layout = np.asarray(flat[name]), _torch_shape(tuple(leaf.shape), path)
        if array.shape != layout:
            todo = "Load weights of a program with the same hyperparameters, dense kernels as (out, in)"
            raise must(f"weights[{name!r}]", f"have shape {layout}", array.shape, todo)
        arrays[name] = _from_torch(array, path).astype(leaf.dtype)
    values = iter(arrays.values())
    return {site: _rebuild(tree, values) for site, tree in template.items()}


def with_values(
    params: Mapping[str, Any], prefix: str, flat: Mapping[str, Any], replicated: bool = False
) -> dict[str, Any]:
    """Those sites of ``params`` that have a leaf in ``flat``, with its values; their other leaves as they are.

    Args:
        params: NumPyro parameters, by site.
        prefix: as in ``to_torch_layout``.
        flat: some weights, with torch's names and layouts.
        replicated: whether every leaf has an axis of replicates in front; they all get the value.

    Raises: InvalidArgument for a name that no leaf has, and for a value of another shape.
    """
    leaves = {name: (path, leaf) for name, path, leaf in _leaves(params, prefix)}
    found = {}
    for name, value in flat.items():
        if name not in leaves:
            raise must("weights", "have names of the program's parameters", repr(name), f"They are {sorted(leaves)}")
        path, leaf = leaves[name]
        array, shape = _from_torch(np.asarray(value), path).astype(leaf.dtype), tuple(leaf.shape)[replicated:]
        if array.shape != shape:
            todo = "Pass weights of a program with the same hyperparameters"
            raise must(f"weights[{name!r}]", f"have shape {_torch_shape(shape, path)}", np.shape(value), todo)
        found[id(leaf)] = np.broadcast_to(array, leaf.shape)

    def replaced(tree: Any) -> Any:
        if isinstance(tree, Mapping):
            return {key: replaced(value) for key, value in tree.items()}
        return found.get(id(tree), tree)

    touched = {n: t for n, t in params.items() if any(id(leaf) in found for _, leaf in _walk(t, ()))}
    return {site: replaced(tree) for site, tree in touched.items()}


def frozen_names(names: Iterable[str], frozen: tuple[str, ...]) -> set[str]:
    """The weights whose names begin with one of ``frozen``, whole parts of it.

    Raises: InvalidArgument for a beginning that no weight has.
    """
    names, found = list(names), set[str]()
    for start in frozen:
        mine = {name for name in names if name == start or name.startswith(start + ".")}
        if not mine:
            todo = f"The weights are {', '.join(dict.fromkeys(name.partition('.')[0] for name in names))}"
            raise must("frozen", "hold beginnings of the names of weights", repr(start), todo)
        found |= mine
    return found


def frozen_mask(params: Mapping[str, Any], prefix: str, frozen: tuple[str, ...]) -> dict[str, Any]:
    """A tree of truth values like ``params``: whether :func:`frozen_names` has the leaf."""
    leaves = list(_leaves(params, prefix))
    names = frozen_names((name for name, _, _ in leaves), frozen)
    ids = {id(leaf) for name, _, leaf in leaves if name in names}

    def mask(tree: Any) -> Any:
        return {key: mask(value) for key, value in tree.items()} if isinstance(tree, Mapping) else id(tree) in ids

    return mask(params)


def check_names(flat: Mapping[str, Any], expected: list[str]) -> None:
    """Refuse a weights dict whose names are not exactly the expected ones."""
    missing = [name for name in expected if name not in flat]
    unexpected = [name for name in flat if name not in set(expected)]
    if not (missing or unexpected):
        return
    todo = "Pass the weights of a program built from the same spec"
    if missing and unexpected:
        nearest = difflib.get_close_matches(unexpected[0], missing, 1, cutoff=0.0)[0]
        todo += f": the missing name nearest to {unexpected[0]!r} is {nearest!r}"
    raise must("weights", "have the program's parameter names", f"missing {missing}, unexpected {unexpected}", todo)


def _leaves(params: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield (torch name, path below the site, leaf) for every array, refusing two of one name."""
    seen: dict[str, tuple[str, ...]] = {}
    for site, tree in params.items():
        if not site.startswith(prefix):
            raise must("params", f"have sites that begin with {prefix!r}", repr(site), "Pass one program's parameters")
        root = site[len(prefix) :].removesuffix(SUFFIX).removesuffix(BUFFERS)
        for path, leaf in _walk(tree, ()):
            name = ".".join((root, *path[:-1], "weight" if path[-1] == "kernel" else path[-1])) if path else root
            if name in seen:
                todo = "Rename one of the two modules or leaves"
                raise must("params", "give every leaf its own torch name", f"two called {name!r}", todo)
            seen[name] = path
            yield name, path, leaf


def _walk(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from _walk(child, (*path, str(key)))
    else:
        yield path, tree


def _rebuild(tree: Any, values: Iterator[np.ndarray]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _rebuild(child, values) for key, child in tree.items()}
    return next(values)


def _is_kernel(path: tuple[str, ...], ndim: int) -> bool:
    return bool(path) and path[-1] == "kernel" and ndim >= 2


def _torch_shape(shape: tuple[int, ...], path: tuple[str, ...]) -> tuple[int, ...]:
    return (shape[-1], shape[-2], *shape[:-2]) if _is_kernel(path, len(shape)) else shape


def _to_torch(array: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    if _is_kernel(path, array.ndim):
        array = array.transpose(-1, -2, *range(array.ndim - 2))
    return np.array(array, order="C")  # safetensors writes the buffer as it lies, so a view would be saved wrong


def _from_torch(array: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    if _is_kernel(path, array.ndim):
        array = array.transpose(*range(2, array.ndim), 1, 0)
    return np.array(array, order="C")
