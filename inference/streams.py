"""Where minibatches come from: arrays in memory, rows read as they are needed, or an iterable of batches.

An epoch is a few *chunks*, each some stacked minibatches and the order in which training takes their rows. Data in
memory are one chunk, which stays on the device. Others are read, checked and put on the device a chunk at a time, by
one background thread that is one chunk ahead, so that the device need not wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any

import numpy as np

from elbozoo.inference import storage
from elbozoo.inference.data import Binarize, as_array, minibatches, prepare
from elbozoo.inference.errors import InvalidArgument, must

CHUNK_BYTES = 2**25
"""About how much of the data a chunk holds; two to four are in memory at a time."""

READER = "elbozoo-reader"
"""How the background thread's name begins."""

Chunk = tuple[tuple | None, np.ndarray]
"""Arrays on the device (None: those that the trainer was made with), and the rows of every step's minibatch in them,
``(replicates, steps, batch)``."""

Chunks = Generator[Chunk, None, None]


def source_of(program: Any, data: Any, batch_size: int, binarize: Binarize) -> InMemory | Rows | Passes:
    """The source of the minibatches that ``data`` ask for by their type. Raises: InvalidArgument."""
    parts = data if isinstance(data, tuple) else (data,)
    if is_stream(data):
        return Passes(program, data, binarize)
    if any(map(_is_stored, parts)):
        if _num_data(parts) > batch_size:
            return Rows(program, data, batch_size, binarize)
        loaded = tuple(np.array(p) if _is_stored(p) else p for p in parts)
        data = loaded if isinstance(data, tuple) else loaded[0]
    return InMemory(program, data, batch_size, binarize)


def is_stream(data: Any) -> bool:
    """Whether ``data`` is an iterable of batches, and no array or what NumPy makes one of."""
    kinds = (list, tuple, str, bytes, Mapping, Set, np.ndarray)
    return hasattr(data, "__iter__") and not isinstance(data, kinds) and not hasattr(data, "__array__")


def _is_stored(x: Any) -> bool:
    """Whether ``x`` is an array whose rows lie elsewhere: memory-mapped, or of Zarr, HDF5 and the like."""
    if isinstance(x, np.ndarray):
        return isinstance(x, np.memmap) and x.mode is not None  # what is computed from one has none
    in_memory = type(x).__module__.partition(".")[0] in ("numpy", "torch", "jax", "jaxlib", "pandas")
    return not in_memory and all(hasattr(x, name) for name in ("shape", "dtype", "ndim", "__getitem__"))


def _num_data(parts: tuple) -> int:
    return next((int(p.shape[0]) for p in parts if _is_stored(p) and p.ndim), 0)


class InMemory:
    """All data in memory, checked once.

    Attributes (of every source):
        example: arrays as the program takes them, at least a minibatch of them.
        num_data: how many data there are; ``math.inf`` where nobody can tell.
        batch_size: data a minibatch.
        steps: minibatches a pass over the data; None where nobody can tell.
    """

    def __init__(self, program: Any, data: Any, batch_size: int, binarize: Binarize):
        # What is checked is one draw of the pixels; where they are drawn anew at every step, training has the grey.
        self.example = self.drawn = prepare(program, data, binarize)
        if binarize == "stochastic":
            self.example = prepare(program, data, check=False)
        self.num_data: float = len(self.example[0])
        self.batch_size = min(batch_size, len(self.example[0]))
        self.steps = len(self.example[0]) // self.batch_size

    def checksum(self) -> str:
        """To know the data again on resuming."""
        return storage.checksum(self.example)

    def epoch(self, seeds: list[int], first: int, epoch: int, count: int | None, put: Callable) -> Chunks:
        """The chunks of an epoch of ``count`` minibatches, or of one pass.

        Args:
            seeds: one a replicate; they and ``first + epoch`` fix the order.
            put: from arrays to those on the device; called by the background thread.
        """
        yield None, _orders(self, seeds, first, epoch, count)


def _orders(source: InMemory | Rows, seeds: list[int], first: int, epoch: int, count: int | None) -> np.ndarray:
    return np.stack([minibatches(s, first, epoch, count, int(source.num_data), source.batch_size) for s in seeds])


class Rows:
    """Arrays whose rows are read as they are needed, in the order in which they are taken from arrays in memory.

    Rows are asked for by an array of increasing, different numbers: what memory maps, Zarr and HDF5 all read.
    """

    def __init__(self, program: Any, data: Any, batch_size: int, binarize: Binarize):
        self.alone = not isinstance(data, tuple)
        names = ["data"] if self.alone else [f"data[{i}]" for i in range(len(data))]
        given = (data,) if self.alone else data
        self.parts = tuple(x if _is_stored(x) else as_array(n, x) for n, x in zip(names, given, strict=True))
        self.program, self.batch_size = program, batch_size
        self.binarize: Binarize = binarize
        _check_not_local(program)
        for name, part in zip(names, self.parts, strict=True):
            if np.dtype(part.dtype).kind not in "fiub":
                raise must(name, "be an array of numbers", f"dtype {part.dtype}", "Pass a float or integer array")
            if part.ndim == 0 or part.shape[0] != self.parts[0].shape[0]:
                got, rows = f"shape {tuple(part.shape)}", self.parts[0].shape[0]
                raise must(name, f"have the {rows} rows of {names[0]}", got, "Pass arrays of equal length")
        self.num_data: float = int(self.parts[0].shape[0])
        self.steps = int(self.num_data) // batch_size
        self.example = self._read(np.arange(batch_size))

    def checksum(self) -> str:
        """Of the shapes, the types and sixteen rows: not of all data, which would have to be read."""
        rows = np.unique(np.linspace(0, int(self.num_data) - 1, 16).astype(int))
        kinds = "; ".join(f"{np.dtype(p.dtype)} {tuple(p.shape)}" for p in self.parts)
        return f"{kinds}; rows {storage.checksum(self._raw(rows))}"

    def epoch(self, seeds: list[int], first: int, epoch: int, count: int | None, put: Callable) -> Chunks:
        """As :meth:`InMemory.epoch`; the same rows in the same order."""
        return _ahead(self._chunks(_orders(self, seeds, first, epoch, count), put))

    def _chunks(self, order: np.ndarray, put: Callable) -> Chunks:
        length = _chunk_steps(self.example, self.batch_size * len(order))
        for start in range(0, order.shape[1], length):
            piece = order[:, start : start + length]
            rows, place = np.unique(piece, return_inverse=True)
            spare = np.zeros(piece.size - len(rows), int)  # rows that come twice: JAX compiles for one shape
            data = self._read(rows)
            data = tuple(np.concatenate([a, a[spare]]) for a in data) if len(spare) else data
            yield put(data), place.reshape(piece.shape)

    def _raw(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        found = tuple(np.asarray(part[rows]) for part in self.parts)
        for part, array in zip(self.parts, found, strict=True):
            if array.shape != (want := (len(rows), *part.shape[1:])):
                got = f"shape {array.shape}, where {want} was to come, from a {type(part).__name__}"
                raise must("data", "give the rows that an array of row numbers asks for", got, "Load it into memory")
        return found

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        return _checked(self.program, self._raw(rows), self.binarize, rows, self.alone)


class Passes:
    """An iterable of batches, taken as they come: an epoch is one pass, or so many batches, passes going on."""

    def __init__(self, program: Any, data: Any, binarize: Binarize):
        _check_not_local(program)
        if binarize == "static":
            todo = 'Pass arrays, use "stochastic" or "threshold", or binarise in the iterable'
            raise must("binarize", "not be 'static' for batches of an iterable", "binarize='static'", todo)
        self.program, self.data = program, data
        self.binarize: Binarize = binarize
        self.alone, self.shapes, self.passes, self.current = True, None, 0, iter(())
        items = iter(data)
        self.once = items is data
        opening = next(items, None)
        if opening is None:
            raise must("data", "hold at least one batch", "an iterable without any", "Pass one with batches")
        self.alone = not isinstance(opening, tuple | list) or len(opening) == 1
        batch = self._batch(opening, 0)
        self.batch_size = len(batch[0])
        self.opened: Iterable | None = chain([opening], items)  # the first pass goes on from here
        self.example = _checked(program, batch, binarize, np.arange(self.batch_size), self.alone)
        self.num_data = self._count()
        self.steps = None if math.isinf(self.num_data) else max(1, int(self.num_data) // self.batch_size)

    def _count(self) -> float:
        for things, each in ((getattr(self.data, "dataset", None), 1), (self.data, self.batch_size)):
            try:
                return len(things) * each  # type: ignore[arg-type]
            except (TypeError, NotImplementedError):
                continue
        return math.inf

    def checksum(self) -> str:
        """Of the shapes and types alone: the order of an iterable is its own."""
        return "; ".join(f"{a.dtype} {a.shape}" for a in self.example)

    def check(self, passes: int, replicates: int | None) -> None:
        """Refuse trainings that the iterable cannot serve. Raises: InvalidArgument.

        Args:
            passes: how many are known to be needed.
        """
        if replicates is not None:
            todo = "Pass arrays (memory-mapped, say), or call fit for every seed"
            raise must("replicates", "be None with an iterable, whose order no seed fixes", replicates, todo)
        if self.once and passes > 1:
            raise self._used_up(f"an iterator, which ends after one pass of the {passes}")

    def _used_up(self, got: str) -> InvalidArgument:
        todo = "Pass a DataLoader or an object whose __iter__ starts anew, or epochs=1"
        return must("data", "give its batches anew at every pass", got, todo)  # type: ignore[return-value]

    def epoch(self, seeds: list[int], first: int, epoch: int, count: int | None, put: Callable) -> Chunks:
        """As :meth:`InMemory.epoch`, in the iterable's own order."""
        chunks = self._chunks(self._take(count), put)
        # Torch has one random state for all threads: batches that are drawn with it (a DataLoader's order, random
        # crops) would disturb the training's noise. A DataLoader's own workers read ahead.
        return chunks if self.program.engine == "pyro" else _ahead(chunks)

    def _chunks(self, batches: Iterator[tuple[int, tuple]], put: Callable) -> Chunks:
        length = _chunk_steps(self.example, self.batch_size)
        while group := list(islice(batches, length)):
            data = tuple(np.concatenate(same) for same in zip(*(batch for _, batch in group), strict=True))
            rows = np.concatenate([start + np.arange(self.batch_size) for start, _ in group])
            data = _checked(self.program, data, self.binarize, rows, self.alone)
            yield put(data), np.arange(len(rows)).reshape(1, -1, self.batch_size)

    def _take(self, count: int | None) -> Iterator[tuple[int, tuple]]:
        if count is None:
            yield from self._pass()
            return
        for _ in range(count):
            found = next(self.current, None)
            if found is None:
                self.current = self._pass()
                found = next(self.current)
            yield found

    def _pass(self) -> Iterator[tuple[int, tuple]]:
        """The full batches of one pass, at least one, each with the number of its first row in the pass."""
        items, self.opened = self.opened or self.data, None
        self.passes += 1
        short, full = None, 0
        for number, item in enumerate(items):
            batch = self._batch(item, number)
            size = len(batch[0])
            if short is not None or size > self.batch_size:
                got = f"one of {size} rows as number {number}, after others of {short or self.batch_size}"
                todo = "Give every batch one size; a last one may be smaller, and sits out"
                raise must("data", f"have batches of one size, here {self.batch_size}", got, todo)
            if size < self.batch_size:
                short = size
                continue
            full += 1
            yield number * self.batch_size, batch
        if not full:
            raise self._used_up(f"no batch of {self.batch_size} at pass {self.passes}")

    def _batch(self, item: Any, number: int) -> tuple[np.ndarray, ...]:
        parts = tuple(item) if isinstance(item, tuple | list) else (item,)
        if isinstance(item, Mapping | str | bytes) or not parts:
            todo = "Give an array or tensor, or a tuple of them, in the order of the program's arguments"
            raise must("data", "have arrays, or tuples of them, as batches", f"a {type(item).__name__}", todo)
        where = f"batch {number} of data"
        names = [where if self.alone else f"{where}[{i}]" for i in range(len(parts))]
        arrays = tuple(as_array(n, p, finite=False) for n, p in zip(names, parts, strict=True))
        shapes = [(a.shape[1:], a.dtype) for a in arrays]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes or any(len(a) != len(arrays[0]) for a in arrays):
            got = f"{[a.shape for a in arrays]} in batch {number}"
            todo = f"Give arrays of shapes and types {self.shapes} after the batch's axis in every one"
            raise must("data", "have batches alike", got, todo)
        return arrays


def _check_not_local(program: Any) -> None:
    if getattr(program, "local_to", None) is not None:
        todo = "Pass those in memory, or the program with the amortised guide"
        raise must("data", f"be the {program.local_to} data that the guide was optimised for", "a stream", todo)


def _chunk_steps(example: tuple[np.ndarray, ...], rows_a_step: int) -> int:
    """How many steps' minibatches make a chunk."""
    a_row = sum(a.nbytes for a in example) / len(example[0])
    return max(1, int(CHUNK_BYTES // max(1.0, a_row * rows_a_step)))


def _checked(
    program: Any, parts: tuple[np.ndarray, ...], binarize: Binarize, rows: np.ndarray, alone: bool
) -> tuple[np.ndarray, ...]:
    """:func:`prepare` for some rows of the data; errors name the row by its number in the whole."""

    def prepared(parts: tuple[np.ndarray, ...], rows: np.ndarray) -> tuple[np.ndarray, ...]:
        data = parts[0] if alone else parts
        if binarize != "stochastic":
            return prepare(program, data, binarize, rows=rows)
        prepare(program, data, "threshold", rows=rows)  # what a draw of the pixels will be held against
        return prepare(program, data, check=False, rows=rows)

    try:
        return prepared(parts, rows)
    except InvalidArgument as error:
        for i, row in enumerate(rows):
            try:
                prepared(tuple(p[i : i + 1] for p in parts), rows[i : i + 1])
            except InvalidArgument as its:
                raise type(its)(f"{its} (Row {row} of the data.)") from None
        raise error


def _ahead(chunks: Chunks) -> Chunks:
    """``chunks``, each made by a background thread while the one before it is in use; the thread ends with them."""
    with ThreadPoolExecutor(1, READER) as thread:
        coming = thread.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = thread.submit(next, chunks, None)
            yield chunk
