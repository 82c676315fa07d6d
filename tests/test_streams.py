"""Data that are not in memory: the same training as in memory, bit for bit, and errors that say where the data break."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE, covering
from programs import program
from test_fit import Decay, same_history, same_weights

from elbozoo.inference import ELBO, PPCA, Adam, AnnealedKL, Collapsed, NonFinite, fit, streams
from elbozoo.inference.data import batches
from elbozoo.inference.errors import InvalidArgument
from elbozoo.zoo import MLP, VAE, SemiSupervisedVAE

GREY = np.random.default_rng(3).random((103, 6))
SPEC = VAE(data_dim=6, latent_dim=2, network=MLP(hidden=(4,)))


def saved(x: np.ndarray, folder: Path) -> np.ndarray:
    """``x``, memory-mapped."""
    path = folder / f"{len(list(folder.iterdir()))}.npy"
    np.save(path, x)
    return np.load(path, mmap_mode="r")


def zarred(x: np.ndarray, folder: Path) -> Any:
    """``x`` as a Zarr array on the disk, whose chunks are not minibatches."""
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(folder / "x.zarr", shape=x.shape, chunks=(10, *x.shape[1:]), dtype=x.dtype)
    array[:] = x
    return array


def hdf5(x: np.ndarray, folder: Path) -> Any:
    import h5py

    return h5py.File(folder / "x.h5", "w").create_dataset("x", data=x)


STORES: dict[str, Callable[[np.ndarray, Path], Any]] = {"memmap": saved, "zarr": zarred, "hdf5": hdf5}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minibatches of sixteen of ``GREY``: several chunks an epoch, and a smaller last one."""
    monkeypatch.setattr(streams, "CHUNK_BYTES", 2 * 16 * GREY[0].nbytes)


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(streams.READER)]


def train(engine: str, data: Any, **options: Any) -> Any:
    """Everything random: weights, order, pixels, latents."""
    defaults: dict[str, Any] = {"objective": AnnealedKL(ELBO(), warmup=1.0), "epochs": 3, "batch_size": 16}
    defaults |= {"binarize": "stochastic", "learning_rate": 0.01, "progress": False}
    return fit(getattr(options.pop("spec", SPEC), engine)(), data, **(defaults | options))


def location(engine: str, data: Any, **options: Any) -> Any:
    defaults = {"epochs": 3, "batch_size": 16, "learning_rate": 0.1, "progress": False}
    return fit(program(engine, options.pop("name", "location")), data, **(defaults | options))


def same(a: Any, b: Any) -> bool:
    return same_weights(a.weights, b.weights) and same_history(a, b)


# --- rows of files --------------------------------------------------------------------------------------------------


@covering("store", tuple(STORES), numpyro=(0,))
def test_stored_rows_train_as_those_in_memory(engine: str, store: str, tmp_path: Path) -> None:
    """Bit for bit, with redrawn pixels, held-out data and passes that end inside an epoch."""
    options = {"epoch_steps": 7, "valid": GREY[:20], "optimizer": Adam(Decay(0.01), average=0.9)}
    stored = STORES[store](GREY, tmp_path)
    assert streams._is_stored(stored)
    assert same(train(engine, GREY, **options), train(engine, stored, **options))
    assert readers() == []


@covering("binarize", ("static", "none"), numpyro=())
def test_pixels_are_binarised_as_in_memory(engine: str, binarize: str, tmp_path: Path) -> None:
    x = GREY.round() if binarize == "none" else GREY
    one, two = (train(engine, d, binarize=binarize, epochs=2) for d in (x, saved(x, tmp_path)))
    assert same(one, two)


@PYRO_ALONE
def test_images_and_labels_of_integer_types(engine: str, tmp_path: Path) -> None:
    """Two files; images are flattened, integers become floats, labels stay."""
    spec = SemiSupervisedVAE(data_dim=6, latent_dim=2, num_classes=3, network=MLP(hidden=(4,)))
    x = (GREY > 0.5).astype(np.uint8).reshape(-1, 2, 3)
    y = np.arange(len(x)) % 4 - 1
    options = {"spec": spec, "binarize": "none", "epochs": 1}
    objective = ELBO(gradient=gradient_of(spec))
    whole = train(engine, (x, y), objective=objective, **options)
    mixed = [(saved(x, tmp_path), y)] if engine == "pyro" else []  # files are read in one way for both engines
    for stored in ((saved(x, tmp_path), saved(y, tmp_path)), *mixed):
        assert same(whole, train(engine, stored, objective=objective, **options))


def gradient_of(spec: Any) -> Any:
    from elbozoo import inference

    return getattr(inference, "".join(word.capitalize() for word in spec.fitting_gradient.split("-")))()


def test_replicates_each_in_their_own_order(engine: str, tmp_path: Path) -> None:
    pairs = zip(*(train(engine, d, replicates=2) for d in (GREY, saved(GREY, tmp_path))), strict=True)
    assert all(same(*pair) for pair in pairs)


@PYRO_ALONE
def test_a_start_with_a_phase(engine: str, tmp_path: Path) -> None:
    one, two = (train(engine, d, start=Collapsed(epochs=2), epochs=1) for d in (GREY, saved(GREY, tmp_path)))
    assert same(one, two)
    assert one.config["phase"] == two.config["phase"]
    with pytest.raises(InvalidArgument, match=r"data must be in memory for PPCA.*fit\(run.program, data\)"):
        train(engine, saved(GREY, tmp_path), start=PPCA())


@PYRO_ALONE  # written once for both engines
def test_all_data_a_minibatch_are_loaded(engine: str, tmp_path: Path) -> None:
    one, two = (train(engine, d, batch_size=200) for d in (GREY, saved(GREY, tmp_path)))
    assert same(one, two)


def test_resumed_to_the_same_bits(engine: str, tmp_path: Path) -> None:
    stored = saved(GREY, tmp_path)
    whole = train(engine, stored, epoch_steps=4)
    for epochs in (1, 3):
        parts = train(engine, stored, epoch_steps=4, epochs=epochs, directory=tmp_path / "run", resume=True)
    assert same(whole, parts)
    other = GREY.copy()
    other[0] = other[1]
    with pytest.raises(InvalidArgument, match="different data"):
        train(engine, saved(other, tmp_path), epoch_steps=4, directory=tmp_path / "run", resume=True)


def test_nothing_is_read_before_it_is_needed(engine: str, tmp_path: Path) -> None:
    """Two steps of a file read two minibatches, the first rows, and those of the checksum."""

    class Watched:
        shape, dtype, ndim = GREY.shape, GREY.dtype, 2
        rows: set[int] = set()  # noqa: RUF012

        def __getitem__(self, index: Any) -> np.ndarray:
            assert (np.diff(index) > 0).all()
            self.rows |= set(index.tolist())
            return GREY[index]

    train(engine, Watched(), epochs=1, epoch_steps=2, directory=tmp_path)
    first = set(range(16)) | set(batches(0, 0, len(GREY), 16)[:2].ravel().tolist())
    assert first <= Watched.rows
    assert len(Watched.rows - first) <= 16


# --- what is broken -------------------------------------------------------------------------------------------------

BREAKS: dict[str, tuple[float, str]] = {
    "not a number": (np.nan, r"got NaN at data\[{row}, 3\]"),
    "out of range": (1.5, r"\[0, 1\] to be binarised.*\(Row {row} of the data.\)"),
}


@covering("kind", tuple(BREAKS), numpyro=())
def test_a_broken_row_is_named_and_nothing_is_lost(engine: str, kind: str, tmp_path: Path) -> None:
    """A row of the second epoch that neither the first one nor the checksum has read."""
    value, message = BREAKS[kind]
    seen = set(batches(0, 0, len(GREY), 16).ravel()) | set(np.linspace(0, len(GREY) - 1, 16).astype(int))
    row = next(r for r in batches(0, 1, len(GREY), 16).ravel()[::-1] if r not in seen)
    x = GREY.copy()
    x[row, 3] = value
    options = {"directory": tmp_path / "run", "checkpoint_every": 10}
    with pytest.raises(InvalidArgument, match=message.format(row=row)):
        train(engine, saved(x, tmp_path), **options)
    assert readers() == []
    mended = train(engine, saved(GREY, tmp_path), resume=True, **options)
    assert same(mended, train(engine, GREY))
    first = [row["seconds"] for row in mended.history]
    assert len(first) == 3


def test_an_error_of_the_reader_comes_out(engine: str) -> None:
    class Gone:
        shape, dtype, ndim, reads = GREY.shape, GREY.dtype, 2, 0

        def __getitem__(self, index: Any) -> np.ndarray:
            self.reads += 1
            if self.reads == 4:
                raise OSError("the disk is gone")
            return GREY[index]

    with pytest.raises(OSError, match="the disk is gone"):
        train(engine, Gone())
    assert readers() == []


def test_rows_that_are_not_given(engine: str) -> None:
    class Wrong:
        shape, dtype, ndim = GREY.shape, GREY.dtype, 2

        def __getitem__(self, index: Any) -> np.ndarray:
            return GREY[:3]

    with pytest.raises(InvalidArgument, match="data must give the rows that an array of row numbers asks for"):
        train(engine, Wrong())


@covering("name", ("fragile", "root"), numpyro=(0,))
def test_non_finite_is_blamed_as_in_memory(engine: str, name: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(103, 3))
    found = []
    for data in (x, saved(x, tmp_path)):
        with pytest.raises(NonFinite) as caught:
            location(engine, data, name=name, epochs=40, learning_rate=0.0525)
        found.append(caught.value)
    assert (found[0].site, found[0].step, str(found[0])) == (found[1].site, found[1].step, str(found[1]))
    assert same_weights(found[0].run.weights, found[1].run.weights)
    assert name == "root" or found[0].step % 6 > 3, "not in the first chunk of an epoch"
    assert readers() == []


def test_the_thread_ends_when_training_fails(engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from importlib import import_module

    trainer = import_module(f"elbozoo.inference.{engine}_trainer").Trainer

    def fails(*_: Any) -> None:
        assert len(readers()) == 1
        raise ArithmeticError("in the step")

    monkeypatch.setattr(trainer, "epoch", fails)
    with pytest.raises(ArithmeticError, match="in the step"):
        train(engine, saved(GREY, tmp_path))
    assert readers() == []


def test_memory_does_not_grow_with_the_file(engine: str, tmp_path: Path) -> None:
    """Two steps on 800 MB of zeros, in a process that may not hold as much."""
    code = f"""
import resource
import numpy as np
from elbozoo.inference import fit
from elbozoo.zoo import MLP, VAE
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def train(rows):
    x = np.lib.format.open_memmap({str(tmp_path / "x.npy")!r}, "w+", np.float32, (rows, 1000))
    return fit(VAE(1000, 2, network=MLP(hidden=(4,))).{engine}(), x, epochs=1, epoch_steps=2, batch_size=100, progress=False)
train(300)
before = peak()
train(200_000)
print(peak() - before)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 150, f"{grown} MB"


# --- iterables ------------------------------------------------------------------------------------------------------


class Again:
    """Batches of arrays in order, as often as asked."""

    def __init__(self, x: np.ndarray, size: int = 16, length: bool = False):
        self.x, self.size, self.opened = x, size, 0
        if length:
            self.dataset = x

    def __iter__(self) -> Iterator[np.ndarray]:
        self.opened += 1
        return (self.x[i : i + self.size] for i in range(0, len(self.x), self.size))


def ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in memory takes the data in order, and leaves out the rest."""
    from elbozoo.inference import data

    def in_order(seed: int, epoch: int, num_data: int, batch_size: int) -> np.ndarray:
        return np.arange(num_data // batch_size * batch_size).reshape(-1, batch_size)

    monkeypatch.setattr(data, "batches", in_order)


@covering("options", ({"start": Collapsed(epochs=2)}, {}, {"epoch_steps": 4}), numpyro=(0,))
def test_an_iterable_trains_as_an_array_in_its_order(
    engine: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered(monkeypatch)
    whole = train(engine, GREY, **options)
    batches_of = Again(GREY, length=True)
    found = train(engine, batches_of, batch_size=7, **options)
    assert same(whole, found)
    assert found.config["num_data"] == 103
    assert found.config["batch_size"] == 16
    passes = 5 if "start" in options else 2 if "epoch_steps" in options else 3
    assert batches_of.opened == passes, "a pass was begun for nothing"
    assert readers() == []


@PYRO_ALONE
@pytest.mark.pyro
def test_a_data_loader(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tuples of tensors, whose last batch is smaller; what it draws does not reach the training's noise."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    ordered(monkeypatch)
    loader = DataLoader(TensorDataset(torch.from_numpy(GREY)), batch_size=16, shuffle=False)
    found = train(engine, loader)
    assert same(train(engine, GREY), found)
    assert found.config["num_data"] == 103
    assert [row["step"] for row in found.history] == [6, 12, 18]


@PYRO_ALONE  # a loader of torch in NumPyro is the test above
def test_a_shuffling_data_loader_repeats_under_its_generator(engine: str) -> None:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    def shuffled(seed: int) -> Any:
        random = torch.Generator().manual_seed(seed)
        return DataLoader(TensorDataset(torch.from_numpy(GREY)), batch_size=16, shuffle=True, generator=random)

    one, two, other = (train(engine, shuffled(seed)) for seed in (0, 0, 1))
    assert same(one, two)
    assert not same(one, other)


@PYRO_ALONE  # written once for both engines
def test_an_iterator_serves_one_pass(engine: str) -> None:
    x = GREY.round()
    made = iter(Again(x))
    with pytest.raises(InvalidArgument, match=r"data must give its batches anew at every pass; got an iterator, .* 3"):
        train(engine, made, objective=ELBO(), binarize="none")
    assert len(train(engine, iter(Again(x)), objective=ELBO(), binarize="none", epochs=1).history) == 1
    endless = (x[:16] for _ in iter(int, 1))
    assert len(train(engine, endless, objective=ELBO(), binarize="none", epoch_steps=2).history) == 3
    with pytest.raises(InvalidArgument, match="at every pass; got no batch of 16 at pass 2"):
        train(engine, iter(Again(x)), objective=ELBO(), binarize="none", epoch_steps=4)


ROWS = GREY.round()
BAD: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "empty": (lambda: Again(ROWS[:0]), {}, "data must hold at least one batch"),
    "an empty batch": (lambda: Again([ROWS[:16], ROWS[:0]], 1), {}, r"must hold at least one datum"),
    "a smaller batch inside": (lambda: Pieces(16, 8, 16), {}, "have batches of one size, here 16; got one of 16 rows as number 2, after others of 8"),
    "a larger batch": (lambda: Pieces(16, 17), {}, "have batches of one size, here 16; got one of 17 rows as number 1"),
    "other rows": (lambda: iter([ROWS[:16], ROWS[:16, :3]]), {}, "have batches alike"),
    "more arrays": (lambda: iter([ROWS[:16], (ROWS[:16], ROWS[:16])]), {}, "have batches alike"),
    "dicts": (lambda: iter([{"x": ROWS}]), {}, "have arrays, or tuples of them, as batches; got a dict"),
    "strings": (lambda: iter(["x"]), {}, "as batches; got a str"),
    "a broken row": (lambda: iter([ROWS[:16], np.where(np.arange(16)[:, None] == 3, np.nan, ROWS[:16])]), {}, r"NaN at data\[19, 0\]"),
    "static pixels": (lambda: Again(ROWS), {"binarize": "static"}, "not be 'static' for batches of an iterable"),
    "replicates": (lambda: Again(ROWS), {"replicates": 2}, "replicates must be None with an iterable"),
    "a schedule in epochs": (lambda: Again(ROWS), {"objective": AnnealedKL(ELBO(), warmup=1)}, "have a length for a schedule in epochs.*unit='steps'"),
    "held out": (lambda: ROWS, {"valid": Again(ROWS)}, "valid must fit into memory"),
    "a start that looks at all": (lambda: Again(ROWS), {"start": PPCA()}, "data must be in memory for PPCA"),
}  # fmt: skip


class Pieces:
    """Batches of given sizes."""

    def __init__(self, *sizes: int):
        self.sizes = sizes

    def __iter__(self) -> Iterator[np.ndarray]:
        return (ROWS[:n] for n in self.sizes)


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_trained_on(engine: str, case: str) -> None:
    make, options, message = BAD[case]
    with pytest.raises(InvalidArgument, match=message):
        train(engine, make(), **({"objective": ELBO(), "binarize": "none", "epochs": 1} | options))
    assert readers() == []


@PYRO_ALONE
def test_the_number_of_data_is_asked_for_where_it_matters(engine: str) -> None:
    """A latent outside the plate is charged once for all data: how many nobody knows."""
    made = with_global(engine)
    x = np.random.default_rng(0).normal(size=(64, 1))
    options = {"epochs": 1, "batch_size": 16, "progress": False}
    with pytest.raises(InvalidArgument, match="data must have a known number where a site lies outside"):
        fit(made(None), Again(x), **options)
    with pytest.raises(InvalidArgument, match="program must know the size of the whole data"):
        fit(made(None), Again(x, length=True), **options)
    assert len(fit(made(64), Again(x), **options).history) == 1


def with_global(engine: str) -> Callable[[int | None], Any]:
    """``x ~ N(m, 1)`` with one m for all."""
    from importlib import import_module

    lib = import_module(engine)
    dist = import_module(f"{engine}.distributions")
    zero, one = (import_module("torch").tensor if engine == "pyro" else np.asarray)(0.0), 1.0

    def made(size: int | None) -> Any:
        def model(x: Any) -> None:
            m = lib.sample("m", dist.Normal(zero, one))
            with lib.plate("data", size or len(x), subsample_size=len(x)):
                lib.sample("x", dist.Normal(m, one).expand([1]).to_event(1), obs=x)

        def guide(x: Any) -> None:
            lib.sample("m", dist.Normal(lib.param("at", zero), one))

        return import_module(f"elbozoo.inference.{engine}_engine").Program(model, guide)

    return made
