"""Data as programs take them: checked, flattened, binarised, in minibatches."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from elbozoo.inference.errors import must

Binarize = Literal["none", "stochastic", "static", "threshold"]
_PIXELS = 0xB1_7A_12_E5  # the seed of static binarisation, unlike any that data may have been made with


def prepare(
    program: Any, data: Any, binarize: Binarize = "none", check: bool = True, rows: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Data as NumPy arrays that the program accepts, one an argument.

    Args:
        program: a program of either engine. Floats become its float type; for a program of the zoo so do integers, and
            images ``(N, H, W)`` with as many pixels as the spec has are flattened.
        data: an array ``(N, ...)`` or a tuple of them, whose first axes run over the same data.
        binarize: "stochastic" and "static" draw each pixel once from a Bernoulli with the pixel as mean (the same draw
            in every run, so that runs compare), "threshold" cuts at one half.
        check: hold the data against the spec.
        rows: which rows of the whole data these are, where they are not all: for messages, and for static draws.

    Raises: InvalidArgument for empty, misshapen, non-finite or out-of-range data, with what to do.
    """
    arrays = _arrays(data, rows)
    kinds = "fiub" if program.spec is not None else "f"
    x, *rest = (a.astype(program.float_dtype, copy=False) if a.dtype.kind in kinds else a for a in arrays)
    if program.spec is not None and x.ndim > 2 and math.prod(x.shape[1:]) == program.spec.data_dim:
        x = x.reshape(len(x), -1)
    if binarize != "none":
        x = _binarize(x, binarize, rows)
    if program.spec is not None and check:
        program.spec.check_data(x, *rest)
    local_to = getattr(program, "local_to", None)
    if local_to not in (None, len(x)):
        todo = "Pass those, or the program with the amortised guide"
        raise must("data", f"be the {local_to} data that the guide was optimised for", len(x), todo)
    return (x, *rest)


def prepare_to_measure(program: Any, data: Any) -> tuple[np.ndarray, ...]:
    """:func:`prepare`, for an instrument that takes the program for a distribution of data.

    Raises: InvalidArgument where it is not one (its spec says so), besides what ``prepare`` raises.
    """
    if not getattr(program.spec, "generative", True):
        todo = "Read the reconstruction off the history of training, or use VAE"
        raise must("program", "have a prior, to be measured as a distribution of data", program.spec, todo)
    return prepare(program, data)


def _arrays(data: Any, rows: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """The arrays of ``data``, refused unless they are finite numbers, as many rows in each."""
    given = data if isinstance(data, tuple) else (data,)
    names = [f"data[{i}]" for i in range(len(given))] if isinstance(data, tuple) else ["data"]
    if not given:
        raise must("data", "hold at least one array", "an empty tuple", "Pass an array of shape (N, D)")
    arrays = tuple(as_array(name, a, rows=rows) for name, a in zip(names, given, strict=True))
    for name, array in zip(names, arrays, strict=True):
        if len(array) != len(arrays[0]):
            raise must(name, f"have the {len(arrays[0])} rows of {names[0]}", len(array), "Pass arrays of equal length")
    return arrays


def as_array(name: str, x: Any, finite: bool = True, rows: np.ndarray | None = None) -> np.ndarray:
    """``x`` as a NumPy array of numbers, ``(N, ...)`` with N > 0, refused unless it is ``finite``."""
    try:
        array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    except ValueError as error:
        got = f"{type(x).__name__}: {error}"
        raise must(name, "be a rectangular array", got, "Give every datum the same shape") from error
    if array.dtype.kind not in "fiub":
        raise must(name, "be an array of numbers", f"dtype {array.dtype}", "Pass a float or integer array")
    if array.ndim == 0 or len(array) == 0:
        raise must(name, "hold at least one datum", f"shape {array.shape}", "Pass an array of shape (N, D)")
    if finite and array.dtype.kind == "f" and not (are := np.isfinite(array)).all():
        at = np.unravel_index(int(np.argmin(are)), array.shape)
        first = at[0] if rows is None else rows[at[0]]
        where = f"{name}[{', '.join(str(int(i)) for i in (first, *at[1:]))}]"
        value, count = "NaN" if np.isnan(array[at]) else array[at], int(are.size - are.sum())
        got = f"{value} at {where} ({count} not finite in {'all' if rows is None else 'what was read with it'})"
        raise must(name, "be finite everywhere", got, "Impute or drop those entries")
    return array


def _binarize(x: np.ndarray, how: str, rows: np.ndarray | None = None) -> np.ndarray:
    if x.min() < 0 or x.max() > 1:
        raise must("data", "lie in [0, 1] to be binarised", f"[{x.min()}, {x.max()}]", "Divide 8-bit pixels by 255")
    if how == "threshold":
        return (x > 0.5).astype(x.dtype)
    return (_uniforms(x.shape, rows) < x).astype(x.dtype)


def _uniforms(shape: tuple[int, ...], rows: np.ndarray | None) -> np.ndarray:
    """What static pixels are drawn with; of some ``rows``, the numbers that those have in the whole."""
    if rows is None:
        return np.random.default_rng(_PIXELS).random(shape)
    bits, width, position = np.random.PCG64(_PIXELS), math.prod(shape[1:]), 0
    draw, found = np.random.Generator(bits), np.empty((len(rows), width))
    for i, row in enumerate(rows.tolist()):  # one number a pixel, so those of a row begin where this skips to
        bits.advance(row * width - position)
        draw.random(out=found[i])
        position = (row + 1) * width
    return found.reshape(shape)


def batches(seed: int, epoch: int, num_data: int, batch_size: int) -> np.ndarray:
    """Shuffled minibatches of one pass over the data, ``(steps, batch)``, the same in both engines.

    What does not fill a batch sits this pass out. All data at once keep their order, for guides with a parameter a
    datum.
    """
    size = min(batch_size, num_data)
    if size == num_data:
        return np.arange(num_data)[None]
    order = np.random.default_rng([seed, epoch]).permutation(num_data)
    return order[: num_data // size * size].reshape(-1, size)


def minibatches(seed: int, first: int, epoch: int, count: int | None, num_data: int, batch_size: int) -> np.ndarray:
    """The minibatches of an epoch of ``count`` steps, passes going on from one to the next; None for one pass.

    Args:
        first: the number of the first epoch's first pass.
    """
    if count is None:
        return batches(seed, first + epoch, num_data, batch_size)
    whole = num_data // min(batch_size, num_data)
    steps = range(epoch * count, (epoch + 1) * count)
    passes = {p: batches(seed, first + p, num_data, batch_size) for p in {i // whole for i in steps}}
    return np.stack([passes[i // whole][i % whole] for i in steps])


def subset(arrays: tuple[np.ndarray, ...], num_data: int | None, seed: int) -> tuple[np.ndarray, ...]:
    """So many of the data, drawn without replacement, in their order; all where there are no more, or for None."""
    if num_data is None or num_data >= len(arrays[0]):
        return arrays
    rows = np.sort(np.random.default_rng(seed).choice(len(arrays[0]), num_data, replace=False))
    return tuple(a[rows] for a in arrays)
