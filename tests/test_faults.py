"""What goes wrong while training: processes killed, files damaged, disks full, numbers that are none, bad input.

Run as a program (``python tests/test_faults.py ENGINE FOLDER KILLS SEED``, and ``compile`` for JAX to compile anew in
every process) it is the nursery of the first test: it starts trainings, kills them, and starts them again.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

EPOCHS = 30


@dataclasses.dataclass(frozen=True)
class Decay:
    """A learning rate that falls as 1/t."""

    start: float = 0.02
    over: float = 100.0

    def __call__(self, step: Any) -> Any:
        return self.start / (1.0 + step / self.over)


def images(num_data: int = 96) -> np.ndarray:
    """Grey images in [0, 1], (N, 16): a few blobs that move."""
    rng = np.random.default_rng(7)
    at, grid = rng.uniform(0, 3, size=(num_data, 2, 1)), np.arange(4.0)
    rows, columns = np.exp(-((grid - at[:, 0]) ** 2)), np.exp(-((grid - at[:, 1]) ** 2))
    return (rows[:, :, None] * columns[:, None, :]).reshape(num_data, 16)


def train(engine: str, directory: Path, epochs: int = EPOCHS, **options: Any) -> Any:
    """Everything that a resumed run must find again: moments, order, noise, pixels, β, learning rate, held-out bounds."""
    from elbozoo.inference import ELBO, Adam, AnnealedKL, fit
    from elbozoo.zoo import MLP, VAE

    program = getattr(VAE(data_dim=16, latent_dim=2, network=MLP(hidden=(6,))), engine)()
    defaults: dict[str, Any] = {
        "objective": AnnealedKL(ELBO(), warmup=EPOCHS / 2),
        "optimizer": Adam(Decay(), clip_norm=10.0, skip_norm=100.0, average=0.9),
        "batch_size": 16,
        "binarize": "stochastic",
        "valid": images()[:16],
        "seed": 11,
        "progress": False,
    }
    return fit(program, images(), directory=directory, epochs=epochs, **(defaults | options))


# --- the nursery: a process that starts trainings and kills them ----------------------------------------------------


def start(engine: str, directory: Path, compiled: Path | None = None) -> int:
    """A training in a process of its own. Forked, so that it need not import the engine again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking is safe before JAX and torch have started a thread
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        if engine == "numpyro" and compiled is not None:
            from jax import config

            config.update("jax_compilation_cache_dir", str(compiled))
            config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        train(engine, directory, resume=True)
        code = 0
    finally:
        os._exit(code)


def stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def ended(child: int) -> bool:
    done, status = os.waitpid(child, os.WNOHANG)
    if done and status:
        raise SystemExit(f"a training ended with status {status}")
    return bool(done)


def nursery(engine: str, folder: Path, kills: int, seed: int, compiled: Path | None) -> dict[str, Any]:
    """Kill trainings ``kills`` times, each at a random moment, and let the last one end.

    Half of the moments are anywhere in the life of a process, start-up included; half come after its first checkpoint, in
    what is left of the run, writing included. A training that ends before its time is kept, and another one begins.

    With ``compiled``, the killed trainings find their XLA programs there; the one that they are held against never does.
    """
    import importlib

    for module in ("pyro", "torch") if engine == "pyro" else ("jax", "numpyro", "flax", "optax"):
        importlib.import_module(module)
    if engine == "pyro":
        importlib.import_module("torch").set_default_dtype(importlib.import_module("torch").float64)
    importlib.import_module(f"elbozoo.inference.{engine}_trainer")
    importlib.import_module(f"elbozoo.zoo.vae.model_{engine}")
    rng = random.Random(seed)

    def life(directory: Path, compiled: Path | None) -> tuple[float, float]:
        """Seconds to the first checkpoint, and from there to the end."""
        began, first, child = time.monotonic(), math.inf, start(engine, directory, compiled)
        while not ended(child):
            if first == math.inf and stamp(directory / "checkpoint.safetensors"):
                first = time.monotonic() - began
            time.sleep(0.0005)
        return first, time.monotonic() - began - first

    head, tail = life(folder / "reference", None)
    runs, moments, partial = [folder / "run-0"], [], 0
    if compiled is not None and engine == "numpyro":
        life(runs[-1], compiled)
        runs.append(folder / "run-1")
        head, tail = life(runs[-1], compiled)
        runs.append(folder / "run-2")
    while len(moments) < kills:
        checkpoint = runs[-1] / "checkpoint.safetensors"
        before, began, child = stamp(checkpoint), time.monotonic(), start(engine, runs[-1], compiled)
        wait = rng.uniform(0, head + tail)
        if len(moments) % 2:
            while stamp(checkpoint) == before and not ended(child):
                time.sleep(0.0005)
            began, wait = time.monotonic(), rng.uniform(0, tail / 2)
        alive = True
        while alive and time.monotonic() - began < wait:
            time.sleep(0.0005)
            alive = stamp(runs[-1] / "history.json") == 0 and not ended(child)
        if alive and not ended(child):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            moments.append(epoch_of(checkpoint))
            partial += (runs[-1] / ".checkpoint.safetensors.partial").exists()
        else:
            while alive and not ended(child):
                time.sleep(0.001)
            runs.append(folder / f"run-{len(runs)}")
    life(runs[-1], compiled)
    return {"runs": [run.name for run in runs], "epochs": moments, "partial": partial}


def epoch_of(checkpoint: Path) -> int:
    from elbozoo.inference.storage import load_arrays

    return load_arrays(checkpoint)[1]["epoch"] if checkpoint.exists() else 0


if __name__ == "__main__":
    where = Path(sys.argv[2])
    found = nursery(
        sys.argv[1], where, int(sys.argv[3]), int(sys.argv[4]), None if sys.argv[5:] else where / "compiled"
    )
    print(json.dumps(found))
    sys.exit()


# --- the tests ------------------------------------------------------------------------------------------------------

import pytest  # noqa: E402
from as_users import as_users_run_it  # noqa: E402, F401
from covering import PYRO_ALONE, covering  # noqa: E402
from programs import data, program  # noqa: E402

from elbozoo.inference import (  # noqa: E402
    ELBO,
    IWAE,
    Adam,
    AnnealedKL,
    Capacity,
    CorruptFile,
    InvalidArgument,
    NonFinite,
    Renyi,
    Run,
    fit,
    storage,
)
from elbozoo.inference.storage import WriteFailed, load_arrays, load_json, save_arrays, save_json  # noqa: E402
from elbozoo.zoo import (  # noqa: E402
    MLP,
    VAE,
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    LinearVAE,
)

FILES = ("checkpoint.safetensors", "weights.safetensors", "config.json", "history.json")


def rows(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def assert_same_bits(one: Path, two: Path) -> None:
    """Weights, history, and everything that a checkpoint holds."""
    for name in FILES[:2]:
        (a, notes_a), (b, notes_b) = load_arrays(one / name), load_arrays(two / name)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            assert a[key].tobytes() == b[key].tobytes(), f"{two / name}: {key}"
        if "rows" in notes_a:
            assert [rows(r) for r in notes_a.pop("rows")] == [rows(r) for r in notes_b.pop("rows")]
        assert notes_a == notes_b
    assert rows(load_json(one / FILES[3])["rows"]) == rows(load_json(two / FILES[3])["rows"])
    assert load_json(one / FILES[2]) == load_json(two / FILES[2])


# --- killed ---------------------------------------------------------------------------------------------------------


def test_killed_at_random_moments_resumes_to_the_same_bits(engine: str, tmp_path: Path) -> None:
    command = [sys.executable, __file__, engine, str(tmp_path), "3", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["epochs"]) == 3
    assert any(0 < epoch < EPOCHS for epoch in found["epochs"]), "no run was killed half-way, so this shows nothing"
    assert len(load_json(tmp_path / "reference" / "history.json")["rows"]) == EPOCHS
    for name in found["runs"]:
        assert_same_bits(tmp_path / "reference", tmp_path / name)


@pytest.fixture(scope="module", params=["numpyro", "pyro"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An engine and the folder of a finished run."""
    engine = request.param
    pytest.importorskip({"numpyro": "numpyro", "pyro": "pyro"}[engine])
    folder = tmp_path_factory.mktemp(engine) / "run"
    linear(engine, directory=folder)
    return engine, folder


def linear(engine: str, **options: Any) -> Any:
    """The cheapest training there is: exact data, three steps an epoch."""
    defaults = {"epochs": 2, "batch_size": 20, "learning_rate": 0.01, "progress": False}
    return fit(getattr(LinearVAE(3, 2, scale=0.5), engine)(), options.pop("data", data()), **(defaults | options))


@PYRO_ALONE
def test_interrupted_and_resumed_in_one_process(engine: str, tmp_path: Path) -> None:
    """As above without the drama: stopped after each epoch, and the history goes on where it was."""
    linear(engine, epochs=4, directory=tmp_path / "whole", valid=data(10))
    for epochs in (1, 2, 4):
        run = linear(engine, epochs=epochs, directory=tmp_path / "parts", valid=data(10), resume=True)
        assert [row["epoch"] for row in run.history] == list(range(1, epochs + 1))
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_resuming_a_finished_run_changes_nothing(engine: str, tmp_path: Path) -> None:
    first = linear(engine, directory=tmp_path)
    again = linear(engine, directory=tmp_path, resume=True)
    assert again.history == first.history
    for name, value in first.weights.items():
        np.testing.assert_array_equal(value, again.weights[name])


def test_a_run_that_stopped_early_stays_stopped(engine: str, tmp_path: Path) -> None:
    """The held-out bound falls from the start: one epoch, and ``early_stopping`` more; resuming adds none."""
    options = {"epochs": 30, "learning_rate": 0.1, "valid": -data(20), "early_stopping": 2, "directory": tmp_path}
    options |= {"batch_size": 60, "data": data() + 5.0}
    first = fit(program(engine, "location"), progress=False, **options)
    assert len(first.history) == 3
    again = fit(program(engine, "location"), progress=False, resume=True, **options)
    assert again.history == first.history


def test_replicates_resume_to_the_same_bits(engine: str, tmp_path: Path) -> None:
    linear(engine, epochs=2, replicates=2, directory=tmp_path / "whole")
    for epochs in (1, 2):
        linear(engine, epochs=epochs, replicates=2, directory=tmp_path / "parts", resume=True)
    for r in range(2):
        one, two = (Run.load(tmp_path / name / f"replicate-{r}") for name in ("whole", "parts"))
        assert rows(one.history) == rows(two.history)
        for name, value in one.weights.items():
            np.testing.assert_array_equal(value, two.weights[name])


@covering("name", ("functions", "modules", "batch_norm"), numpyro=(2,))
def test_programs_of_the_user_s_own_resume_to_the_same_bits(engine: str, name: str, tmp_path: Path) -> None:
    """Constrained parameters, modules' buffers and mutable sites are in the checkpoint; the optimiser is the library's."""
    user, options = program(engine, name), {"batch_size": 20, "progress": False, "optimizer": momentum(engine)}
    fit(user, data(), epochs=4, directory=tmp_path / "whole", **options)
    for epochs in (1, 4):
        fit(user, data(), epochs=epochs, directory=tmp_path / "parts", resume=True, **options)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def momentum(engine: str) -> Any:
    if engine == "pyro":
        import torch

        return lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9)
    import optax

    return optax.sgd(0.01, momentum=0.9)


OTHER_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": IWAE(2)}, "objective"),
    "learning rate": ({"learning_rate": 0.02}, "optimizer"),
    "schedule": ({"learning_rate": Decay(0.5)}, "optimizer"),
    "batch size": ({"batch_size": 19}, "batch_size"),
    "seed": ({"seed": 1}, "seed"),
    "data": ({"data": data() + 1e-9}, "data"),
    "fewer data": ({"data": data()[:59]}, "data, num_data"),
    "held-out data": ({"valid": data(5)}, "valid"),
}


@pytest.mark.parametrize("case", OTHER_SETTINGS)
def test_resuming_with_other_settings_is_refused(whole: tuple[str, Path], case: str, tmp_path: Path) -> None:
    engine, source = whole
    options, named = OTHER_SETTINGS[case]
    shutil.copytree(source, tmp_path / "run")
    with pytest.raises(InvalidArgument) as info:
        linear(engine, directory=tmp_path / "run", resume=True, epochs=4, **options)
    message = str(info.value)
    assert message.startswith("settings must equal those of the run to resume; got different ")
    assert all(name in message for name in named.split(", "))
    assert_same_bits(source, tmp_path / "run")


def test_resuming_to_fewer_epochs_is_refused(whole: tuple[str, Path], tmp_path: Path) -> None:
    engine, source = whole
    shutil.copytree(source, tmp_path / "run")
    with pytest.raises(InvalidArgument, match="epochs must be at least the 2 of the checkpoint; got 1"):
        linear(engine, directory=tmp_path / "run", resume=True, epochs=1)


def test_resuming_with_another_program_is_refused(whole: tuple[str, Path], tmp_path: Path) -> None:
    engine, source = whole
    shutil.copytree(source, tmp_path / "run")
    other = getattr(LinearVAE(3, 1, scale=0.5), engine)()
    with pytest.raises(InvalidArgument, match="different .*spec"):
        fit(
            other,
            data(),
            directory=tmp_path / "run",
            resume=True,
            epochs=4,
            batch_size=20,
            learning_rate=0.01,
            progress=False,
        )


def test_a_checkpoint_of_other_arrays_is_refused(whole: tuple[str, Path], tmp_path: Path) -> None:
    """Well formed and signed, with a float32 array in place of a float64 one, or one too few."""
    engine, source = whole
    arrays, notes = load_arrays(source / FILES[0])
    name = next(n for n, a in arrays.items() if a.dtype == np.float64 and a.ndim == 2)
    shutil.copytree(source, tmp_path / "run")
    for other in (arrays | {name: arrays[name].astype(np.float32)}, {n: a for n, a in arrays.items() if n != name}):
        save_arrays(tmp_path / "run" / FILES[0], other, notes)
        with pytest.raises(
            CorruptFile, match="checkpoint must hold the state of this program and optimizer; got a mismatch"
        ):
            linear(engine, directory=tmp_path / "run", resume=True, epochs=4)


def test_an_earlier_run_is_not_written_over(whole: tuple[str, Path], tmp_path: Path) -> None:
    engine, source = whole
    for keep in (FILES, FILES[:1], FILES[1:]):
        folder = tmp_path / f"run-{len(keep)}-{keep[0]}"
        folder.mkdir()
        for name in keep:
            shutil.copy(source / name, folder / name)
        with pytest.raises(InvalidArgument, match=r"directory must hold no earlier run; got .*Pass resume=True"):
            linear(engine, directory=folder)
        for name in keep:
            assert (folder / name).read_bytes() == (source / name).read_bytes()


# --- damaged files --------------------------------------------------------------------------------------------------


def header(content: bytes) -> int:
    """Where a safetensors file's tensors begin."""
    return 8 + int.from_bytes(content[:8], "little")


def flip(content: bytes, position: int) -> bytes:
    altered = bytearray(content)
    altered[position] ^= 0x10
    return bytes(altered)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "cut in the length": lambda b: b[:5],
    "cut in the header": lambda b: b[: header(b) // 2],
    "cut in the data": lambda b: b[: (header(b) + len(b)) // 2],
    "one byte short": lambda b: b[:-1],
    "one byte long": lambda b: b + b"\0",
    "altered length": lambda b: flip(b, 1),
    "altered notes": lambda b: flip(b, b.index(b"elbozoo") + 20),
    "altered checksum": lambda b: flip(b, b.index(b"sha256") + 20),
    "altered names": lambda b: flip(b, b.index(b"data_offsets") - 30),
    "altered data": lambda b: flip(b, header(b) + 9),
    "altered last byte": lambda b: flip(b, len(b) - 1),
    "zeros": lambda b: bytes(len(b)),
    "text": lambda b: b"not a run at all",
}
JSON_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": DAMAGE["empty"],
    "cut": lambda b: b[: len(b) // 2],
    "altered value": lambda b: b.replace(b"2", b"3", 1),
    "altered key": lambda b: flip(b, b.index(b'"') + 1),
    "altered checksum": lambda b: flip(b, b.index(b"sha256") + 20),
    "value dropped": lambda b: json.dumps(
        {k: v for k, v in json.loads(b).items() if k not in ("seed", "rows")}
    ).encode(),
    "checksum dropped": lambda b: json.dumps({k: v for k, v in json.loads(b).items() if k != "sha256"}).encode(),
    "zeros": DAMAGE["zeros"],
    "text": DAMAGE["text"],
}


def refuses(action: Callable[[], Any], path: Path) -> None:
    with pytest.raises(CorruptFile) as info:
        action()
    message = str(info.value)
    assert message.startswith(f"{path} must be a whole, unaltered file; got ")
    assert "Restore it from a copy, or train again" in message


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("name", FILES[:2])
def test_a_damaged_tensor_file_is_refused(whole: tuple[str, Path], name: str, case: str, tmp_path: Path) -> None:
    engine, source = whole
    shutil.copytree(source, tmp_path / "run")
    path = tmp_path / "run" / name
    content = DAMAGE[case](path.read_bytes())
    path.write_bytes(content)
    if name == FILES[0]:
        refuses(lambda: linear(engine, directory=tmp_path / "run", resume=True, epochs=3), path)
        assert path.read_bytes() == content
        Run.load(tmp_path / "run")  # the weights are whole
    else:
        refuses(lambda: Run.load(tmp_path / "run"), path)


@pytest.mark.parametrize("case", JSON_DAMAGE)
@pytest.mark.parametrize("name", FILES[2:])
def test_a_damaged_json_file_is_refused(whole: tuple[str, Path], name: str, case: str, tmp_path: Path) -> None:
    _, source = whole
    shutil.copytree(source, tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(JSON_DAMAGE[case](path.read_bytes()))
    refuses(lambda: Run.load(tmp_path / "run"), path)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(whole: tuple[str, Path], name: str, tmp_path: Path) -> None:
    _, source = whole
    shutil.copytree(source, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    missing = "must be a readable file; got FileNotFoundError"
    unfinished = "must be there in the folder of a finished run; got a checkpoint alone"
    with pytest.raises(CorruptFile, match=unfinished if name == FILES[2] else missing) as info:
        Run.load(tmp_path / "run")
    assert str(tmp_path / "run" / name) in str(info.value)


def test_files_in_one_another_s_place_are_refused(whole: tuple[str, Path], tmp_path: Path) -> None:
    engine, source = whole
    for one, two in ((FILES[0], FILES[1]), (FILES[2], FILES[3])):
        folder = tmp_path / one
        shutil.copytree(source, folder)
        shutil.copy(source / one, folder / two)
        with pytest.raises((CorruptFile, InvalidArgument)):
            Run.load(folder)
        shutil.copy(source / two, folder / one)
        shutil.copy(source / two, folder / two)
        with pytest.raises(CorruptFile, match=one):
            linear(engine, directory=folder, resume=True, epochs=3) if one == FILES[0] else Run.load(folder)


def test_weights_of_another_program_are_refused(whole: tuple[str, Path]) -> None:
    engine, source = whole
    for other in (LinearVAE(3, 1), LinearVAE(3, 2, learn_scale=True)):
        with pytest.raises(InvalidArgument, match="weights"):
            Run.load(source, getattr(other, engine)())


def test_a_config_of_another_version_is_refused(whole: tuple[str, Path], tmp_path: Path) -> None:
    """Signed, but it names an objective, or a setting of one, that is not known here: nothing is evaluated or imported."""
    _, source = whole
    shutil.copytree(source, tmp_path / "run")
    config = load_json(tmp_path / "run" / FILES[2])
    for objective in ({"class": "os.system"}, {"class": "fit"}, {"class": "ELBO", "new": 1}, {"no": "class"}):
        save_json(tmp_path / "run" / FILES[2], config | {"objective": objective})
        with pytest.raises(CorruptFile, match="objective must be one that this version knows"):
            Run.load(tmp_path / "run")


def test_nothing_is_unpickled(whole: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, saving, resuming and loading with every road to pickle closed."""
    import pickle

    def closed(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    engine, source = whole
    linear(engine, epochs=1)  # compiled programs come from a cache of the tests' own
    with monkeypatch.context() as patch:
        for name in ("load", "loads", "Unpickler", "_Unpickler"):
            patch.setattr(pickle, name, closed)
        patch.setattr(np, "load", closed)
        if engine == "pyro":
            import torch

            patch.setattr(torch, "load", closed)
        shutil.copytree(source, tmp_path / "run")
        linear(engine, directory=tmp_path / "run", resume=True, epochs=3)
        assert len(Run.load(tmp_path / "run").history) == 3


# --- disks ----------------------------------------------------------------------------------------------------------


os_fsync = os.fsync


class Disk:
    """Fails the n-th write from now on."""

    def __init__(self, patch: pytest.MonkeyPatch, call: str, after: int):
        self.left, self.real = after, getattr(os, call)
        patch.setattr(os, call, self)

    def __call__(self, *args: Any) -> Any:
        if self.real is os_fsync and stat.S_ISDIR(os.fstat(args[0]).st_mode):
            return self.real(*args)  # a directory's entry, after its file is in place
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.real(*args)


@covering("call", ("fsync", "replace"), numpyro=(1,))
def test_a_disk_that_fills_up_loses_no_checkpoint(
    engine: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every write of a run in turn: the error is typed, what was written before is whole, and the run goes on from it."""
    linear(engine, epochs=3, directory=tmp_path / "reference")
    for after in range(6):  # three checkpoints, then weights, history and config
        folder = tmp_path / f"after-{after}"
        with monkeypatch.context() as patch:
            Disk(patch, call, after)
            with pytest.raises(
                WriteFailed, match="must be writable, on a disk with room; got OSError: No space left"
            ) as info:
                linear(engine, epochs=3, directory=folder)
        assert str(folder) in str(info.value)
        expected = [FILES[0]] * min(after, 1) + [FILES[1]] * (after > 3) + [FILES[3]] * (after > 4)
        assert sorted(os.listdir(folder)) == sorted(expected)
        if after:
            assert load_arrays(folder / FILES[0])[1]["epoch"] == min(after, 3)
        linear(engine, epochs=3, directory=folder, resume=True)
        assert_same_bits(tmp_path / "reference", folder)


def test_a_folder_that_cannot_be_written_stops_a_run_before_it_begins(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").write_text("in the way")
    monkeypatch.setattr("elbozoo.inference.training._Loop.run_epoch", lambda *a: pytest.fail("it trained"))
    with pytest.raises(WriteFailed, match="run"):
        linear(engine, directory=tmp_path / "run")
    assert (tmp_path / "run").read_text() == "in the way"


def test_a_folder_removed_while_training_comes_back(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, checkpoints = tmp_path / "deep" / "run", []
    write = storage.save_arrays

    def remove_first(path: Path, *args: Any) -> None:
        checkpoints.append(path)
        if len(checkpoints) == 2:
            shutil.rmtree(tmp_path / "deep")
        write(path, *args)

    monkeypatch.setattr(storage, "save_arrays", remove_first)
    linear(engine, epochs=3, directory=folder)
    assert len(Run.load(folder).history) == 3


def test_a_file_put_in_the_folder_s_place_while_training(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file system that went read-only looks like to root, whom modes do not stop."""
    folder, checkpoints = tmp_path / "run", []
    write = storage.save_arrays

    def replace_first(path: Path, *args: Any) -> None:
        checkpoints.append(path)
        if len(checkpoints) == 2:
            folder.rename(tmp_path / "aside")
            folder.write_text("in the way")
        write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_arrays", replace_first)
        with pytest.raises(WriteFailed, match="checkpoint.safetensors must be writable"):
            linear(engine, epochs=3, directory=folder)
    folder.unlink()
    (tmp_path / "aside").rename(folder)
    assert os.listdir(folder) == [FILES[0]]
    assert len(linear(engine, epochs=3, directory=folder, resume=True).history) == 3


# --- numbers that are none ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Jump:
    """A learning rate that is 0.01 until ``at``, and ``to`` from there."""

    at: int
    to: float

    def __call__(self, step: Any) -> Any:
        return 0.01 + (self.to - 0.01) * (step >= self.at)


@dataclasses.dataclass(frozen=True)
class Undefined:
    """A learning rate that is 0.01, and NaN at ``at``: 0 / 0 there, written so that Python does not raise."""

    at: int

    def __call__(self, step: Any) -> Any:
        return 0.01 + (step == self.at) * math.nan if isinstance(step, int) and step == self.at else self.traced(step)

    def traced(self, step: Any) -> Any:
        if isinstance(step, int):
            return 0.01
        import jax.numpy as jnp

        return jnp.where(step == self.at, jnp.nan, 0.01)


def stops(**options: Any) -> NonFinite:
    with pytest.raises(NonFinite) as info:
        linear(**options)
    return info.value


def assert_finite(run: Run) -> None:
    for name, value in run.weights.items():
        assert np.isfinite(value).all(), name


CASES: dict[str, tuple[Any, int, dict[str, set[str]]]] = {
    # The step after the jump: the update itself is finite, the scale exp(±1e200) is 0 or infinite.
    "exploding learning rate": (Jump(4, 1e200), 5, {"numpyro": {"z"}, "pyro": {"z"}}),
    # The scale's logarithm falls by 2000: the scale underflows to 0 and log q is infinite.
    "scale underflow": (Jump(4, 2e3), 5, {"numpyro": {"z"}, "pyro": {"z"}}),
    # The update makes parameters NaN: no bound shows it before the step is over.
    "update to NaN": (Undefined(4), 4, {"numpyro": {"decoder$params"}, "pyro": {"decoder.weight"}}),
    # The same at an epoch's last step: no bound of the epoch shows it.
    "update to NaN at the end": (Undefined(5), 5, {"numpyro": {"decoder$params"}, "pyro": {"decoder.weight"}}),
    "at the first step": (Undefined(0), 0, {"numpyro": {"decoder$params"}, "pyro": {"decoder.weight"}}),
}


@covering("case", tuple(CASES), numpyro=(3,))
def test_a_non_finite_value_stops_at_the_last_good_state(engine: str, case: str, tmp_path: Path) -> None:
    """Site, step and run; the run has the weights of one that stopped by itself before that step (3 steps an epoch)."""
    rate, step, sites = CASES[case]
    error = stops(
        engine=engine, epochs=4, learning_rate=rate, directory=tmp_path / "run", objective=ELBO(analytic_kl=False)
    )
    assert error.step == step
    assert error.site in sites[engine]
    assert f"site '{error.site}' must stay finite while training; got a non-finite value at step {step}" in str(error)
    assert isinstance(error, FloatingPointError)
    assert len(error.run.history) == step // 3
    assert_finite(error.run)
    replayed = replay(engine, rate, step)
    for name, value in replayed.items():
        np.testing.assert_allclose(error.run.weights[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
    kept = Run.load(tmp_path / "run" / "last-good")
    for name, value in error.run.weights.items():
        np.testing.assert_array_equal(kept.weights[name], value)
    if step >= 3:  # the checkpoint is of the epoch before, and finite
        arrays, notes = load_arrays(tmp_path / "run" / FILES[0])
        assert notes["epoch"] == step // 3
        assert all(np.isfinite(a).all() for a in arrays.values())


def replay(engine: str, rate: Any, steps: int) -> dict[str, np.ndarray]:
    """The weights after so many steps, by the same trainer taken one step at a time."""
    from importlib import import_module

    from elbozoo.inference.data import batches, prepare

    user = getattr(LinearVAE(3, 2, scale=0.5), engine)()
    trainer = import_module(f"elbozoo.inference.{engine}_trainer").Trainer(
        user,
        ELBO(analytic_kl=False),
        Adam(rate),
        prepare(user, data()),
        batch_size=20,
        seeds=[0],
        redraw_pixels=False,
        device=None,
    )
    order = np.concatenate([batches(0, epoch, 60, 20) for epoch in range(4)])
    for step in range(steps):
        trainer.epoch(order[None, step : step + 1])
    return trainer.programs()[0].weights


@covering("batch_size", (60, 4), numpyro=(1,))
def test_a_gradient_that_is_none_names_the_parameter(engine: str, batch_size: int) -> None:
    """The bound is finite; ``sqrt`` has no gradient at 0."""
    with pytest.raises(NonFinite) as info:
        fit(program(engine, "root"), data(), epochs=2, batch_size=batch_size, progress=False)
    assert (info.value.site, info.value.step) == ("tilt", 0)
    assert_finite(info.value.run)
    assert info.value.run.weights["tilt"] == 0.0


def test_a_gradient_that_is_none_between_two_that_are_measured(engine: str) -> None:
    """In 15 steps an epoch NumPyro measures every tenth; the step is found by what the parameters are after it."""
    error = stops(engine=engine, epochs=2, batch_size=4, learning_rate=Undefined(7), objective=ELBO())
    assert (error.step, error.site) == (7, {"numpyro": "decoder$params", "pyro": "decoder.weight"}[engine])
    assert_finite(error.run)


@pytest.mark.numpyro
@pytest.mark.parametrize(("gradient", "clip_norm"), [("overflowing", None), ("undefined", None), ("undefined", 1.0)])
def test_one_datum_breaks_one_parameter(gradient: str, clip_norm: float | None) -> None:
    """A finite bound whose gradient overflows when squared stops Adam for good; clipping by one that is NaN breaks all."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from elbozoo.inference.numpyro_engine import Program

    x = data()
    x[17, 0] = 7.0

    def model(x: Any) -> None:
        healthy, broken = (numpyro.param(name, jnp.array(0.3)) for name in ("a_healthy", "broken"))
        nothing = jnp.where(x[:, 0] == 7.0, broken - jax.lax.stop_gradient(broken), 1.0)
        with numpyro.plate("data", len(x), dim=-1):
            z = numpyro.sample("z", dist.Normal(healthy, 1.0))
            loc = z[..., None] + jnp.where(x[:, :1] == 7.0, steep(nothing)[:, None], 0.0)
            numpyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def steep(nothing: Any) -> Any:
        return jnp.sqrt(nothing) - jnp.sqrt(2.0 * nothing) if gradient == "undefined" else 1e200 * nothing

    def guide(x: Any) -> None:
        with numpyro.plate("data", len(x), dim=-1):
            numpyro.sample("z", dist.Normal(x.mean(-1), 1.0))

    with pytest.raises(NonFinite) as info:
        settings: dict[str, Any] = {"batch_size": 4, "epochs": 1, "progress": False}
        fit(Program(model, guide), x, optimizer=Adam(0.01, clip_norm=clip_norm), **settings)
    assert info.value.site == "broken"
    assert info.value.step % 10, "a step whose norm is not measured, or this shows nothing"


def test_initial_parameters_that_are_not_finite_leave_no_good_state(engine: str, tmp_path: Path) -> None:
    user = getattr(LinearVAE(3, 2, scale=0.5), engine)()
    weights = {n: v.copy() for n, v in linear(engine, epochs=1).weights.items()}
    weights["encoder.bias"][1] = np.nan
    with pytest.raises(NonFinite, match="there is no good state") as info:
        fit(user.with_weights(weights), data(), epochs=2, progress=False, directory=tmp_path)
    assert (info.value.step, info.value.run) == (0, None)
    assert info.value.site in ("encoder$params", "encoder.bias")
    assert os.listdir(tmp_path) == []


@pytest.mark.pyro
def test_running_statistics_of_a_bad_step_are_not_kept() -> None:
    """Batch normalisation moves its buffers on the way forward, before the loss is known."""
    import torch

    user = program("pyro", "batch_norm")
    with pytest.raises(NonFinite) as info:
        fit(user, data(), epochs=3, batch_size=20, progress=False, optimizer=Adam(Jump(4, 1e200)))
    assert float(info.value.run.weights["encoder.1.num_batches_tracked"]) == info.value.step
    assert torch.isfinite(torch.as_tensor(info.value.run.weights["encoder.1.running_var"])).all()


def test_one_bad_replicate_is_named_by_its_seed(engine: str, tmp_path: Path) -> None:
    """Noise decides at which step each seed breaks. On JAX all train at once, and the first to break is named."""
    seeds = (3, 4)  # of which the second breaks first on JAX
    alone = {seed: breaks_at(engine, seed) for seed in seeds}
    with pytest.raises(NonFinite) as info:
        fit_fragile(engine, seed=seeds[0], replicates=2, directory=tmp_path / "run")
    first = min(seeds, key=lambda seed: alone[seed]) if engine == "numpyro" else seeds[0]
    assert info.value.step == alone[first]
    assert info.value.run.config["seed"] == first
    assert_finite(info.value.run)
    if engine == "numpyro":  # in Pyro they are runs one after the other
        assert first > seeds[0], "the first seed breaks first, so this shows nothing"
        assert f"seed {first}" in str(info.value)


def fit_fragile(engine: str, seed: int, **options: Any) -> Any:
    options |= {"epochs": 3, "batch_size": 6, "learning_rate": 0.06, "progress": False}
    return fit(program(engine, "fragile"), data(), seed=seed, **options)


def breaks_at(engine: str, seed: int) -> int:
    with pytest.raises(NonFinite) as info:
        fit_fragile(engine, seed)
    assert info.value.site == "z"
    return info.value.step


@PYRO_ALONE  # written once for both engines
def test_a_full_disk_does_not_hide_a_non_finite_value(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    error = stops(engine=engine, learning_rate=Undefined(1), directory=tmp_path)
    assert error.step == 1
    assert "not on disk" in str(error)
    assert_finite(error.run)


# --- bad input ------------------------------------------------------------------------------------------------------


def bad_spec(likelihood: Any) -> VAE:
    return VAE(data_dim=4, latent_dim=1, network=MLP(hidden=(2,)), likelihood=likelihood)


GREY = np.random.default_rng(3).random((6, 4))
BINARY = (GREY > 0.5) * 1.0
BAD_DATA: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "grey to Bernoulli": (Bernoulli(), GREY, {}, r"x must be 0 or 1 under a Bernoulli.*binarize=\"stochastic\""),
    "above 1 to Bernoulli": (Bernoulli(), 255 * BINARY, {}, "x must be 0 or 1"),
    "8-bit pixels, binarised": (
        Bernoulli(),
        255 * GREY,
        {"binarize": "stochastic"},
        r"data must lie in \[0, 1\] to be binarised",
    ),
    "below 0, binarised": (Bernoulli(), GREY - 0.5, {"binarize": "threshold"}, r"data must lie in \[0, 1\]"),
    "above 1 to continuous Bernoulli": (ContinuousBernoulli(), 2 * GREY, {}, r"x must lie in \[0, 1\]"),
    "between levels": (DiscretizedLogistic(levels=4), GREY, {}, "x must be a multiple of 1/3"),
    "above the levels": (DiscretizedLogistic(levels=4), 4 * BINARY, {}, "x must be a multiple of 1/3"),
    "infinite": (
        Gaussian(),
        np.where(BINARY > 0, np.inf, GREY),
        {},
        r"data must be finite everywhere; got inf at data\[0, 2\] \(10 not finite in all\)",
    ),
    "NaN": (
        Gaussian(),
        np.where(np.arange(24).reshape(6, 4) == 9, np.nan, GREY),
        {},
        r"data must be finite everywhere; got NaN at data\[2, 1\] \(1 not finite in all\)",
    ),
    "NaN, binarised": (
        Bernoulli(),
        np.full((6, 4), np.nan),
        {"binarize": "stochastic"},
        "data must be finite everywhere",
    ),
    "NaN held out": (Gaussian(), GREY, {"valid": GREY * np.nan}, "data must be finite everywhere"),
    "grey held out": (Bernoulli(), BINARY, {"valid": GREY}, "x must be 0 or 1"),
    "too wide": (Gaussian(), np.zeros((6, 5)), {}, r"x must have shape \(N, 4\); got \(6, 5\)"),
    "one datum unrolled": (Gaussian(), np.zeros(4), {}, r"x must have shape \(N, 4\); got \(4,\)"),
    "images of another size": (Gaussian(), np.zeros((6, 2, 3)), {}, r"x must have shape \(N, 4\); got \(6, 2, 3\)"),
    "held out of another width": (Gaussian(), GREY, {"valid": GREY[:, :3]}, r"x must have shape \(N, 4\)"),
    "empty": (Gaussian(), np.zeros((0, 4)), {}, r"data must hold at least one datum; got shape \(0, 4\)"),
    "empty held out": (Gaussian(), GREY, {"valid": np.zeros((0, 4))}, "data must hold at least one datum"),
    "a number": (Gaussian(), 3.0, {}, "data must hold at least one datum"),
    "no array": (Gaussian(), (), {}, "data must hold at least one array"),
    "nothing": (Gaussian(), None, {}, "data must be an array of numbers; got dtype object"),
    "text": (Gaussian(), np.array([["a"] * 4] * 6), {}, "data must be an array of numbers"),
    "complex": (Gaussian(), GREY * 1j, {}, "data must be an array of numbers"),
    "ragged": (Gaussian(), [[1.0, 2.0], [3.0]], {}, "data must be a rectangular array; got list"),
    "unequal lengths": (Gaussian(), (GREY, GREY[:5]), {}, r"data\[1\] must have the 6 rows of data\[0\]; got 5"),
}


def one_sentence(error: Exception) -> None:
    """``<name> must <condition>; got <value>. <what to do>.``"""
    message = str(error)
    assert " must " in message
    assert "; got " in message
    assert message.endswith(".")
    assert len(message.partition("; got ")[2].split(". ", 1)) == 2, message


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_are_refused(engine: str, case: str, tmp_path: Path) -> None:
    likelihood, x, options, message = BAD_DATA[case]
    with pytest.raises(InvalidArgument, match=message) as info:
        fit(getattr(bad_spec(likelihood), engine)(), x, directory=tmp_path / "run", progress=False, **options)
    one_sentence(info.value)
    assert isinstance(info.value, ValueError)
    assert not (tmp_path / "run").exists()


@covering("binarize", ("stochastic", "static", "threshold"), numpyro=())
def test_grey_pixels_are_taken_when_they_are_binarised(engine: str, binarize: str) -> None:
    run = fit(getattr(bad_spec(Bernoulli()), engine)(), GREY, binarize=binarize, epochs=1, valid=GREY, progress=False)
    assert np.isfinite(run.evaluate(GREY, num_particles=2).nll)
    with pytest.raises(InvalidArgument, match="x must be 0 or 1"):
        from elbozoo.inference.evaluation import evaluate

        evaluate(run.program, GREY, num_particles=2)


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "epochs": ({"epochs": 0}, "epochs must be a whole number of at least 1; got 0"),
    "half an epoch": ({"epochs": 1.5}, "epochs must be a whole number"),
    "batch size": ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    "seed": ({"seed": -1}, "seed must be a whole number of at least 0"),
    "large seed": ({"seed": 2**31}, r"seed must be below 2\*\*31"),
    "checkpoints": ({"checkpoint_every": 0}, "checkpoint_every must"),
    "replicates": ({"replicates": 0}, "replicates must"),
    "binarize": (
        {"binarize": "stochastik"},
        r"binarize must be one of \[.*; got 'stochastik'. The nearest is 'stochastic'",
    ),
    "objective": ({"objective": "ELBO"}, "objective must be an objective; got 'ELBO'"),
    "objective's class": ({"objective": ELBO}, "objective must be an objective"),
    "learning rate": ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0; got 0.0"),
    "learning rate NaN": ({"learning_rate": math.nan}, "learning_rate must be a finite number above 0"),
    "learning rate in words": ({"learning_rate": "fast"}, "learning_rate must be a finite number above 0; got 'fast'"),
    "optimizer's name": ({"optimizer": "adam"}, "optimizer must be an Adam or"),
    "optimizer's class": ({"optimizer": Adam}, "optimizer must be an Adam or"),
    "a number for an optimizer": ({"optimizer": 1e-3}, "optimizer must be an Adam or"),
    "early stopping without held-out data": ({"early_stopping": 2}, "early_stopping must go with held-out data"),
    "early stopping with replicates": (
        {"early_stopping": 2, "valid": GREY, "replicates": 2},
        "early_stopping must go with",
    ),
    "early stopping at once": (
        {"early_stopping": 0, "valid": GREY},
        "early_stopping must be a whole number of at least 1",
    ),
    "resume without a directory": ({"resume": True}, "directory must be given to resume"),
    "GPU": ({"device": "gpu"}, "device must be one that (JAX|torch) can see here; got 'gpu'"),
    "CUDA": ({"device": "cuda"}, "device must be one that (JAX|torch) can see here; got 'cuda'"),
    "unknown device": ({"device": "warp"}, "device must be one that (JAX|torch) can see here; got 'warp'"),
}


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused(engine: str, case: str) -> None:
    options, message = BAD_SETTINGS[case]
    if case in ("GPU", "CUDA") and has_gpu(engine):
        pytest.skip("there is a GPU here")
    with pytest.raises(InvalidArgument, match=message) as info:
        fit(getattr(bad_spec(Gaussian()), engine)(), GREY, progress=False, **options)
    one_sentence(info.value)


def has_gpu(engine: str) -> bool:
    if engine == "pyro":
        import torch

        return torch.cuda.is_available()
    import jax

    return any(d.platform == "gpu" for d in jax.devices())


def test_the_other_engine_s_optimizer_is_refused(engine: str) -> None:
    pytest.importorskip("optax")
    pytest.importorskip("torch")
    other = momentum("pyro" if engine == "numpyro" else "numpyro")
    with pytest.raises(InvalidArgument, match="optimizer must be an Adam or"):
        linear(engine, optimizer=other)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    "what", [None, "VAE", lambda x: x, VAE, bad_spec(Gaussian())], ids=["None", "str", "function", "class", "spec"]
)
def test_what_is_no_program_is_refused(what: Any) -> None:
    with pytest.raises(InvalidArgument, match="program must be a zoo program, or a Program"):
        fit(what, GREY, progress=False)


def test_a_program_without_parameters_is_refused(engine: str) -> None:
    with pytest.raises(InvalidArgument, match="program must have a parameter to train; got none"):
        fit(program(engine, "nothing"), data(), progress=False)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IWAE(0), "num_particles must be a whole number of at least 1; got 0"),
        (lambda: IWAE(2.0), "num_particles must be a whole number"),
        (lambda: ELBO(-1), "num_particles must"),
        (lambda: Renyi(1.0), "alpha must be finite and differ from 1; got 1.0. Use ELBO"),
        (lambda: Renyi(1), "alpha must be finite and differ from 1"),
        (lambda: Renyi(math.nan), "alpha must be finite"),
        (lambda: AnnealedKL(ELBO(), warmup=0.0), "warmup must be finite and above 0"),
        (lambda: Adam(b1=1.0), r"b1 must lie in \[0, 1\)"),
        (lambda: Adam(eps=0.0), "eps must be a finite number above 0"),
        (lambda: Adam(clip_norm=-1.0), "clip_norm must be a finite number above 0"),
        (lambda: Adam(skip_norm=0.0), "skip_norm must be a finite number above 0"),
        (lambda: Adam(average=1.0), r"average must lie in \(0, 1\); got 1.0. Pass None"),
    ],
)  # fmt: skip
def test_bad_objectives_and_optimizers_are_refused_when_built(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as info:
        make()
    one_sentence(info.value)


@pytest.mark.numpyro
def test_a_program_without_weights_is_not_evaluated() -> None:
    from elbozoo.inference.evaluation import evaluate

    with pytest.raises(
        InvalidArgument, match="program must have trained parameters; got an untrained program. Call fit"
    ):
        evaluate(LinearVAE(3, 2).numpyro(), data(), num_particles=2)


@PYRO_ALONE
@pytest.mark.parametrize(
    "objective",
    [AnnealedKL(ELBO(), warmup=3.0), AnnealedKL(ELBO(), warmup=7.0, unit="steps"), Capacity(ELBO(), warmup=3.0)],
    ids=["epochs", "steps", "capacity"],
)
def test_a_warm_up_longer_than_the_run_warns(engine: str, objective: Any) -> None:
    """2 epochs of 3 steps."""
    with pytest.warns(UserWarning, match="warm-up of [79] steps is longer than the run of 6 steps"):
        linear(engine, objective=objective)


def test_a_warm_up_as_long_as_the_run_does_not_warn(engine: str) -> None:
    linear(engine, objective=AnnealedKL(ELBO(), warmup=2.0))


def test_bad_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="Give the folder of a run"):
        Run.load(tmp_path / "nowhere")


def test_a_run_of_the_user_s_own_program_asks_for_it(engine: str, tmp_path: Path) -> None:
    fit(program(engine, "location"), data(), epochs=1, progress=False, directory=tmp_path)
    with pytest.raises(InvalidArgument, match="program must be given for a run of a program that is not of the zoo"):
        Run.load(tmp_path)


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    """Whatever went wrong, no temporary file stays (but for processes killed while writing, which the first test starts)."""
    yield
    if not (tmp_path / "reference" / "config.json").exists() or not (tmp_path / "compiled").exists():
        assert list(tmp_path.rglob(".*")) == []
