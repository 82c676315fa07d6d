"""Files are written whole or not at all, tell when they were altered, and are never unpickled."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as save_foreign

from elbozoo.inference import storage
from elbozoo.inference.errors import CorruptFile, InvalidArgument
from elbozoo.inference.storage import WriteFailed, load_arrays, load_json, save_arrays, save_json

ARRAYS = {
    "decoder.weight": np.arange(6.0).reshape(2, 3),
    "flag": np.array([True, False]),
    "key": np.array([7, 2**32 - 1], np.uint32),
    "scalar": np.array(-0.0),
    "empty": np.zeros((0, 4), np.float32),
}
NOTES = {"engine": "numpyro", "rows": [{"bound": -1.5, "name": "naïve"}], "limit": float("inf")}


def write(kind: str, path: Path) -> Path:
    if kind == "arrays":
        save_arrays(path, ARRAYS, NOTES)
    else:
        save_json(path, NOTES)
    return path


READ: dict[str, Callable[[Path], Any]] = {"arrays": load_arrays, "json": load_json}
KINDS = pytest.mark.parametrize("kind", sorted(READ))


def refused(kind: str, path: Path) -> str:
    with pytest.raises(CorruptFile) as info:
        READ[kind](path)
    return str(info.value)


# --- round trips ------------------------------------------------------------------------------------------------


def test_arrays_come_back_bit_for_bit(tmp_path: Path) -> None:
    strided = np.arange(12.0).reshape(3, 4).T[::2]
    save_arrays(tmp_path / "a", ARRAYS | {"strided": strided}, NOTES)
    arrays, notes = load_arrays(tmp_path / "a")
    assert set(arrays) == {*ARRAYS, "strided"}
    for name, value in (ARRAYS | {"strided": strided}).items():
        assert arrays[name].dtype == value.dtype
        assert arrays[name].shape == value.shape
        assert arrays[name].tobytes() == np.ascontiguousarray(value).tobytes()
    assert notes == NOTES


def test_json_comes_back_with_every_digit(tmp_path: Path) -> None:
    content = {"pi": 0.1 + 0.2, "tiny": 5e-324, "nested": {"z": [1, None, True]}, "inf": -float("inf")}
    save_json(tmp_path / "a", content)
    assert load_json(tmp_path / "a") == content


def test_files_get_the_permissions_that_the_user_chose(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_json(tmp_path / "a", NOTES)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_file_of_another_library_loads_without_notes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(save_foreign({"w": np.ones(2)}, {"format": "pt"}))
    arrays, notes = load_arrays(tmp_path / "a")
    assert notes == {}
    np.testing.assert_array_equal(arrays["w"], np.ones(2))


def test_checksum_tells_values_types_and_shapes_apart() -> None:
    x = np.arange(6.0)
    same = storage.checksum([x.reshape(2, 3)])
    assert same == storage.checksum([np.asfortranarray(x.reshape(2, 3))])
    others = [
        [x],
        [x.reshape(3, 2)],
        [x.reshape(2, 3).astype(np.float32)],
        [x.reshape(2, 3) + 1e-15],
        [x.reshape(2, 3), x],
    ]
    assert len({same, *(storage.checksum(o) for o in others)}) == 6


# --- what is altered is refused -----------------------------------------------------------------------------------


@KINDS
def test_a_flipped_bit_in_any_byte_is_refused(kind: str, tmp_path: Path) -> None:
    """Or changes nothing that is read: bit 5 turns the ``\\u00ef`` of a JSON file into ``\\u00EF``, the same letter."""
    path = write(kind, tmp_path / "file")
    before, whole = READ[kind](path), path.read_bytes()
    refusals = 0
    for position in range(len(whole)):
        for bit in {position % 8, 5}:
            altered = bytearray(whole)
            altered[position] ^= 1 << bit
            path.write_bytes(altered)
            try:
                found = READ[kind](path)
            except CorruptFile as error:
                assert str(path) in str(error)
                refusals += 1
            else:
                assert kind == "json"
                assert found == before
    assert refusals >= len(whole)


@KINDS
def test_every_truncation_is_refused(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path / "file")
    whole = path.read_bytes()
    kept = len(whole) - (kind == "json")  # the newline at the end of a JSON file says nothing
    for length in range(kept):
        path.write_bytes(whole[:length])
        assert str(path) in refused(kind, path)


@KINDS
@pytest.mark.parametrize("tail", [b"\0", b"x", b"{}"])
def test_trailing_bytes_are_refused(kind: str, tail: bytes, tmp_path: Path) -> None:
    path = write(kind, tmp_path / "file")
    path.write_bytes(path.read_bytes() + tail)
    refused(kind, path)


def test_swapped_tensors_are_refused(tmp_path: Path) -> None:
    """Each tensor whole, under the other's name: the header alone differs, and stays well formed."""
    path = tmp_path / "file"
    save_arrays(path, {"one": np.zeros(3), "two": np.ones(3)})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"one"', b'"tmp"').replace(b'"two"', b'"one"').replace(b'"tmp"', b'"two"'))
    assert "checksum" in refused("arrays", path)


def test_removing_the_checksum_does_not_make_a_file_foreign(tmp_path: Path) -> None:
    path = write("arrays", tmp_path / "file")
    path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"sha255"'))
    refused("arrays", path)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"3", b'"text"', b"[]", b"[1, 2]", b"{}", b'{"sha256": 3}', b"\xff\xfe", b"{"]
)
def test_json_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    message = refused("json", path)
    assert message.startswith(f"{path} must be a whole, unaltered file; got ")
    assert "Restore it from a copy" in message


@KINDS
def test_a_missing_file_and_a_folder_in_its_place(kind: str, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refused(kind, tmp_path / "none")
    assert "IsADirectoryError" in refused(kind, tmp_path)


class Bomb:
    """What would run on being unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (self.where,)

    def __init__(self, where: str):
        self.where = where


@KINDS
def test_a_pickle_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(str(tmp_path / "exploded")))
    (tmp_path / "file").write_bytes(bomb)
    refused(kind, tmp_path / "file")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists(), "the bomb is a dud, so this test shows nothing"


# --- what cannot be written -----------------------------------------------------------------------------------------


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFile:
    """A file that takes half of what it is given and then has no room."""

    def __init__(self, path: Path, mode: str):
        self.file = open(path, mode)

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.file.close()

    def write(self, content: bytes) -> int:
        self.file.write(content[: len(content) // 2])
        return no_space()

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


FAILURES = {
    "write": lambda patch: patch.setattr(storage, "open", FullFile, raising=False),
    "fsync": lambda patch: patch.setattr(os, "fsync", no_space),
    "replace": lambda patch: patch.setattr(os, "replace", no_space),
}


@KINDS
@pytest.mark.parametrize("failure", sorted(FAILURES))
def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(
    kind: str, failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(kind, tmp_path / "file")
    before = READ[kind](path)
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        FAILURES[failure](patch)
        with pytest.raises(
            WriteFailed, match="must be writable, on a disk with room; got OSError: No space left"
        ) as info:
            save_arrays(path, {"other": np.ones(5)}) if kind == "arrays" else save_json(path, {"other": 1})
    assert isinstance(info.value, OSError)
    assert str(path) in str(info.value)
    assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == ["file"]
    np.testing.assert_equal(READ[kind](path), before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """The temporary file is /dev/full: the kernel itself says ENOSPC."""
    path = write("arrays", tmp_path / "file")
    (tmp_path / ".file.partial").symlink_to("/dev/full")
    with pytest.raises(WriteFailed, match="No space left"):
        save_arrays(path, {"other": np.ones(5)})
    assert os.listdir(tmp_path) == ["file"]
    np.testing.assert_equal(load_arrays(path)[0], ARRAYS)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(WriteFailed, match="run"):
        save_json(tmp_path / "run" / "config.json", NOTES)
    with pytest.raises(WriteFailed, match="run"):
        storage.check_writable(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "in the way"


def test_an_interrupt_while_writing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("arrays", tmp_path / "file")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_arrays(path, {})
    assert os.listdir(tmp_path) == ["file"]
    np.testing.assert_equal(load_arrays(path)[0], ARRAYS)


def test_what_a_killed_process_leaves_does_not_pile_up(tmp_path: Path) -> None:
    """Killed between the write and the move, three times: one partial file, and the next write takes it away."""
    path = write("arrays", tmp_path / "file")
    script = (
        "import os, sys, signal, pathlib\n"
        "from elbozoo.inference import storage\n"
        "os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL)\n"
        "storage.write_atomically(pathlib.Path(sys.argv[1]), b'new')\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
        assert done.returncode == -9
        assert sorted(os.listdir(tmp_path)) == [".file.partial", "file"]
        np.testing.assert_equal(load_arrays(path)[0], ARRAYS)
    write("arrays", path)
    assert os.listdir(tmp_path) == ["file"]


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    storage.check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_errors_are_values_of_the_kinds_users_catch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a readable file"):
        load_json(tmp_path / "none")
    assert issubclass(WriteFailed, OSError)
    assert not issubclass(CorruptFile, InvalidArgument)
    assert json.loads(write("json", tmp_path / "a").read_text())["sha256"]
