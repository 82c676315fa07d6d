"""Files: written whole or not at all, checked when read, never unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from elbozoo.inference.errors import CorruptFile, ElbozooError, must


class WriteFailed(ElbozooError, OSError):
    """A file could not be written (full disk, unwritable folder); what was there before is intact."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to a temporary file beside ``path`` and move it there in one step.

    The temporary file has one name for each ``path``: what a killed process leaves is overwritten, and does not pile
    up. (Two processes that write one ``path`` at once are one too many.)

    Raises: WriteFailed; the earlier file, if any, is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise


def plain(value: Any) -> Any:
    """Figures as JSON values: NumPy's numbers and arrays as Python's, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync_directory(directory: Path) -> None:
    """Make a rename last through a power cut, where the system lets a directory be opened for it."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_writable(directory: Path) -> None:
    """Make ``directory`` and see that files can be made in it, before hours of training go by. Raises: WriteFailed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise _unwritable(directory, error) from error


def checksum(arrays: Iterable[np.ndarray]) -> str:
    """A short digest of arrays with their types and shapes, to tell other data from the same (not against malice)."""
    value = 0
    for array in arrays:
        value = zlib.crc32(f"{array.dtype}{array.shape}".encode(), value)
        value = zlib.crc32(np.ascontiguousarray(array).data.cast("B"), value)
    return f"{value:08x}"


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any] | None = None) -> None:
    """Named arrays and a JSON-able metadata dict, as one safetensors file that carries its own SHA-256."""
    whole = {n: np.array(a, order="C") for n, a in arrays.items()}
    text = json.dumps(metadata or {}, sort_keys=True)
    write_atomically(path, save_tensors(whole, {"elbozoo": text, "sha256": _digest(whole, text)}))


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and metadata of :func:`save_arrays`.

    Raises: CorruptFile for a missing, truncated, altered or foreign file. A safetensors file of another library (no
        checksum) loads with empty metadata.
    """
    content = _read(path)
    try:
        arrays = load_tensors(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise _corrupt(path, f"{type(error).__name__}: {error}") from error
    notes = header.get("__metadata__", {})
    if not {"sha256", "elbozoo"} & set(notes):  # not a file of ours; ours has both, whatever was altered
        return arrays, {}
    if _digest(arrays, notes.get("elbozoo", "")) != notes.get("sha256"):
        raise _corrupt(path, "a checksum that does not match its content")
    return arrays, json.loads(notes["elbozoo"])


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object with its own checksum under ``sha256``."""
    text = json.dumps(content, sort_keys=True)
    signed = {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_atomically(path, (json.dumps(signed, indent=2) + "\n").encode())


def load_json(path: Path) -> dict[str, Any]:
    """The object of :func:`save_json`. Raises: CorruptFile for a missing, truncated or altered file."""
    text = _read(path)
    try:
        content = json.loads(text)
        claimed = content.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(path, f"{type(error).__name__}: {error}") from error
    if hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() != claimed:
        raise _corrupt(path, "a checksum that does not match its content")
    return content


def _read(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise must(
            str(path),
            "be a readable file",
            f"{type(error).__name__}",
            "Give the folder of a run that fit or `elbozoo train` wrote",
            CorruptFile,
        ) from error


def _digest(arrays: Mapping[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _unwritable(path: Path, error: OSError) -> ElbozooError:
    got = f"{type(error).__name__}: {error.strerror or error}"
    todo = "Free space or choose another directory; an earlier file of this name is intact"
    return must(str(path), "be writable, on a disk with room", got, todo, WriteFailed)


def _corrupt(path: Path, got: str) -> ElbozooError:
    return must(
        str(path),
        "be a whole, unaltered file",
        got,
        "Restore it from a copy, or train again (an interrupted run resumes from its checkpoint)",
        CorruptFile,
    )
