"""The benchmark data sets: reading, checking, fetching and binarising."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import pathlib
import pickle
import re
import struct
import threading
from typing import Any

import numpy as np
import pytest
import requests
from rich.progress import Progress

from elbozoo.benchmarks import datasets
from elbozoo.benchmarks.datasets import NAMES, binarize, load, load_array, read_idx
from elbozoo.inference.errors import CorruptFile, ElbozooError, InvalidArgument

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def idx(array: np.ndarray) -> bytes:
    """The IDX bytes of an array of bytes, by ``struct`` and from the format's description alone."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def small_arrays() -> list[np.ndarray]:
    """Six training and two test images with their labels, in the order of ``FILES``."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 28, 28))
    images[0, 0, :3] = 0, 255, 51
    labels = np.arange(8) % 10
    return [images[:6], labels[:6], images[6:], labels[6:]]


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A data directory with a small MNIST whose hashes are the accepted ones."""
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    hashes = {}
    for file, array in zip(FILES, small_arrays(), strict=True):
        contents = idx(array)
        (folder / file).write_bytes(gzip.compress(contents))
        hashes[file] = hashlib.sha256(contents).hexdigest()
    monkeypatch.setitem(datasets._IDX_FILES, "mnist", hashes)
    monkeypatch.setenv("ELBOZOO_DATA", str(folder.parent))
    return folder


@pytest.fixture
def no_internet(monkeypatch):
    """Any request fails, as it does without a network; the list counts the attempts."""
    attempts: list[str] = []

    def get(url, **_):
        attempts.append(url)
        raise requests.exceptions.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", get)
    return attempts


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine that stands for MNIST's: yields (the folder that it serves, the paths asked for)."""
    served = tmp_path / "served"
    served.mkdir()
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def log_message(self, format, *args):
            asked.append(self.path)

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(datasets._URLS, "mnist", f"http://127.0.0.1:{httpd.server_port}/")
    yield served, asked
    httpd.shutdown()
    httpd.server_close()
    thread.join()


# Digits


def test_digits_are_scikit_learns_in_its_order():
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    digits = load("digits")
    assert (digits.name, digits.image_shape, digits.levels) == ("digits", (8, 8), 17)
    assert digits.train.shape == (1497, 64)
    assert digits.test.shape == (300, 64)
    assert digits.train.dtype == digits.test.dtype == np.float32
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int64
    both = np.concatenate([digits.train, digits.test])
    np.testing.assert_array_equal(both * 16, bunch.data)  # sixteenths are exact in float32
    assert both.min() == 0
    assert both.max() == 1
    np.testing.assert_array_equal(np.concatenate([digits.train_labels, digits.test_labels]), bunch.target)
    np.testing.assert_array_equal(digits.test[-1].reshape(digits.image_shape) * 16, bunch.images[-1])


def test_both_parts_of_digits_have_every_class():
    digits = load("digits")
    for labels in (digits.train_labels, digits.test_labels):
        share = np.bincount(labels, minlength=10) / len(labels)
        assert share.min() > 0.08
        assert share.max() < 0.12


def test_digits_are_the_same_every_time_and_not_shared():
    first, second = load("digits"), load("digits")
    np.testing.assert_array_equal(first.train, second.train)
    first.train[:] = -1
    assert second.train.min() == 0
    assert load("digits").train.min() == 0


def test_validation_split_holds_out_the_end_of_the_training_set():
    whole, part = load("digits"), load("digits", split="validation")
    assert len(part.train) == 1197
    assert len(part.test) == 300
    np.testing.assert_array_equal(np.concatenate([part.train, part.test]), whole.train)
    np.testing.assert_array_equal(np.concatenate([part.train_labels, part.test_labels]), whole.train_labels)


# Names


@pytest.mark.parametrize(
    ("name", "near"),
    [("minst", "'mnist'"), ("MNIST", "'mnist'"), ("fashion_mnist", "'fashion-mnist'"), ("digit", "'digits'")],
)
def test_unknown_name_gets_the_nearest_match(name, near):
    with pytest.raises(InvalidArgument, match=rf"^name must be one of .*; got '{name}'\. Pass {near}, the nearest"):
        load(name)


def test_unknown_name_without_a_near_one_lists_them_all():
    with pytest.raises(InvalidArgument) as caught:
        load("zzz")
    assert all(repr(name) in str(caught.value) for name in NAMES)
    assert "nearest" not in str(caught.value)


def test_unknown_split_and_binarization_are_refused():
    with pytest.raises(InvalidArgument, match=r"split must .*; got 'valid'\. Pass 'validation'"):
        load("digits", split="valid")
    with pytest.raises(InvalidArgument, match=r"how must .*; got 'stochastc'\. Pass 'stochastic'"):
        binarize(np.zeros(3), "stochastc")


# The four files


def test_load_scales_flattens_and_splits(small_mnist, no_internet):
    train_images, train_labels, test_images, test_labels = small_arrays()
    mnist = load("mnist")
    assert (mnist.image_shape, mnist.levels) == ((28, 28), 256)
    assert mnist.train.dtype == np.float32
    assert mnist.train_labels.dtype == np.int64
    np.testing.assert_array_equal(mnist.train[0, :3], np.array([0, 1, 0.2], np.float32))
    np.testing.assert_array_equal(mnist.train.reshape(-1, 28, 28), (train_images / 255).astype(np.float32))
    np.testing.assert_array_equal(mnist.test.reshape(-1, 28, 28), (test_images / 255).astype(np.float32))
    np.testing.assert_array_equal(np.rint(mnist.train * 255), train_images.reshape(6, -1))  # grey levels survive
    np.testing.assert_array_equal(mnist.train_labels, train_labels)
    np.testing.assert_array_equal(mnist.test_labels, test_labels)
    validation = load("mnist", split="validation")
    np.testing.assert_array_equal(validation.train, mnist.train[:4])
    np.testing.assert_array_equal(validation.test, mnist.train[4:])
    assert no_internet == []


def test_arrays_are_writable(small_mnist):
    # torch.from_numpy warns of read-only arrays, and bytes read from a file are read-only.
    mnist = load("mnist")
    assert all(x.flags.writeable for x in (mnist.train, mnist.test, mnist.train_labels, mnist.test_labels))


def test_another_compression_of_the_same_contents_is_accepted(small_mnist, no_internet):
    expected = load("mnist").train
    path = small_mnist / FILES[0]
    contents = gzip.decompress(path.read_bytes())
    for stored in (gzip.compress(contents, compresslevel=1, mtime=1), contents):
        assert path.read_bytes() != stored
        path.write_bytes(stored)
        np.testing.assert_array_equal(load("mnist").train, expected)


def test_data_dir_comes_before_the_variable_and_the_variable_before_the_cache(small_mnist, tmp_path, monkeypatch):
    assert datasets.data_directory() == small_mnist.parent
    other = tmp_path / "other"
    assert datasets.data_directory(other) == other
    monkeypatch.setenv("ELBOZOO_DATA", "~/elsewhere")
    assert datasets.data_directory() == pathlib.Path.home() / "elsewhere"
    for unset in (lambda: monkeypatch.setenv("ELBOZOO_DATA", ""), lambda: monkeypatch.delenv("ELBOZOO_DATA")):
        unset()
        assert datasets.data_directory().name == "elbozoo"
    assert load("mnist", data_dir=small_mnist.parent).train.shape == (6, 784)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_well_formed_files_that_are_not_the_originals_are_refused(name, tmp_path, no_internet):
    (tmp_path / name).mkdir()
    for file, array in zip(FILES, small_arrays(), strict=True):
        (tmp_path / name / file).write_bytes(gzip.compress(idx(array)))
    with pytest.raises(CorruptFile) as caught:
        load(name, data_dir=tmp_path)
    message = str(caught.value)
    assert str(tmp_path / name / FILES[0]) in message
    assert datasets._IDX_FILES[name][FILES[0]] in message  # expected
    assert hashlib.sha256(idx(small_arrays()[0])).hexdigest() in message  # got
    assert "ELBOZOO_DATA" in message
    assert "delete" in message
    assert no_internet == []


@pytest.mark.parametrize("file", FILES)
def test_one_changed_pixel_or_label_in_any_file_is_refused(file, small_mnist):
    contents = bytearray(gzip.decompress((small_mnist / file).read_bytes()))
    contents[-1] ^= 1
    (small_mnist / file).write_bytes(gzip.compress(bytes(contents)))
    with pytest.raises(CorruptFile, match=file):
        load("mnist")


def test_a_file_changed_between_two_loads_is_refused(small_mnist):
    load("mnist")
    path = small_mnist / FILES[0]
    stat = path.stat()
    path.write_bytes(gzip.compress(idx(small_arrays()[0] ^ 1)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CorruptFile):
        load("mnist")


# Fetching


def test_absent_files_are_fetched_once_with_a_progress_bar(small_mnist, server, tmp_path, capsys):
    served, asked = server
    for file in FILES:
        (small_mnist / file).rename(served / file)
    first = load("mnist")
    assert sorted(path.name for path in small_mnist.iterdir()) == sorted(FILES)
    assert len(asked) == 4
    err = capsys.readouterr().err
    size = (small_mnist / FILES[3]).stat().st_size
    assert re.search(rf"{FILES[3]}.* {size}/{size} bytes", err)
    np.testing.assert_array_equal(load("mnist").train, first.train)
    assert len(asked) == 4  # nothing is fetched twice
    np.testing.assert_array_equal(first.test.reshape(-1, 28, 28), (small_arrays()[2] / 255).astype(np.float32))
    load("mnist", data_dir=tmp_path / "not" / "yet")
    assert (tmp_path / "not" / "yet" / "mnist" / FILES[3]).exists()


def test_the_bar_knows_the_size_while_the_file_comes_in():
    with Progress(disable=True) as progress:
        bar = datasets._Bar(progress, "file")
        bar.total = 100  # as pooch does it, after the answer's header
        bar.update(30)
        assert (progress.tasks[0].completed, progress.tasks[0].total) == (30, 100)


@pytest.mark.parametrize(
    "sent",
    [b"<html>please log in</html>", gzip.compress(idx(np.zeros((2, 28, 28)))), b""],
    ids=["a page", "another file", "nothing"],
)
def test_a_bad_download_is_refused_and_not_kept(sent, small_mnist, server):
    served, asked = server
    (small_mnist / FILES[0]).unlink()
    (served / FILES[0]).write_bytes(sent)
    with pytest.raises(CorruptFile, match=rf"http://127.*{FILES[0]} must"):
        load("mnist")
    assert len(asked) == 1
    assert sorted(path.name for path in small_mnist.iterdir()) == sorted(FILES[1:])  # nor a temporary file


def test_a_file_that_the_server_lacks_says_what_to_do(small_mnist, server):
    (small_mnist / FILES[1]).unlink()
    with pytest.raises(ElbozooError, match=r"404.*set ELBOZOO_DATA to a directory that has mnist/train-labels"):
        load("mnist")


def test_without_internet_the_error_says_what_to_do(tmp_path, no_internet):
    with pytest.raises(ElbozooError) as caught:
        load("fashion-mnist", data_dir=tmp_path / "empty")
    message = str(caught.value)
    assert str(tmp_path / "empty" / "fashion-mnist" / FILES[0]) in message
    assert datasets._URLS["fashion-mnist"] in message
    assert "no network" in message
    assert f"set ELBOZOO_DATA to a directory that has fashion-mnist/{FILES[0]}" in message
    assert no_internet == [datasets._URLS["fashion-mnist"] + FILES[0]]
    assert isinstance(caught.value.__cause__, requests.exceptions.ConnectionError)


def test_a_data_directory_that_cannot_be_made_is_a_typed_error(tmp_path, no_internet):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ElbozooError, match="ELBOZOO_DATA"):
        load("mnist", data_dir=tmp_path / "file")
    assert no_internet == []


# IDX


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 28, 28), (1, 1, 1, 7)])
@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_idx_round_trip(shape, compress, tmp_path):
    array = np.random.default_rng(1).integers(0, 256, shape)
    (tmp_path / "x").write_bytes(compress(idx(array)))
    read = read_idx(tmp_path / "x")
    assert read.dtype == np.uint8
    assert read.shape == shape
    np.testing.assert_array_equal(read, array)


def test_idx_by_hand(tmp_path):
    # 2 x 3, written byte by byte: rows run slowest.
    (tmp_path / "x").write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 10, 11, 12, 20, 21, 255]))
    np.testing.assert_array_equal(read_idx(tmp_path / "x"), [[10, 11, 12], [20, 21, 255]])


GOOD = idx(np.arange(24).reshape(2, 3, 4))
BAD_IDX = {
    "empty": (b"", "an empty file"),
    "shorter than the magic": (GOOD[:3], "got 00 00 08"),
    "no header": (GOOD[:4], "header of 16 bytes; got 4 bytes"),
    "truncated in the header": (GOOD[:15], "header of 16 bytes; got 15 bytes"),
    "truncated in the data": (GOOD[:-1], r"hold 24 bytes after its header, for the shape \(2, 3, 4\); got 23"),
    "bytes left over": (GOOD + b"\0", "got 25"),
    "wrong magic": (b"\1" + GOOD[1:], "got 01 00 08 03"),
    "floats": (GOOD[:2] + b"\x0d" + GOOD[3:], "got 00 00 0d 03"),
    "no dimensions": (GOOD[:3] + b"\0" + GOOD[4:], "got 00 00 08 00"),
    "a dimension too many": (GOOD[:3] + b"\4" + GOOD[4:], "must hold"),
    "huge dimensions": (GOOD[:4] + b"\xff" * 12 + GOOD[16:], "must hold 79228162458924105385300197375 bytes"),
}
BAD_GZIP = {
    "truncated": gzip.compress(GOOD)[:-9],
    "no trailer": gzip.compress(GOOD)[:-8],
    "header alone": gzip.compress(GOOD)[:10],
    "magic alone": b"\x1f\x8b",
    "altered data": gzip.compress(GOOD, mtime=0)[:20] + b"\xff\xff" + gzip.compress(GOOD, mtime=0)[22:],
    "altered checksum": gzip.compress(GOOD)[:-8] + b"\0\0\0\0" + gzip.compress(GOOD)[-4:],
    "rubbish after it": gzip.compress(GOOD) + b"rubbish",
}


@pytest.mark.parametrize(("contents", "match"), BAD_IDX.values(), ids=BAD_IDX.keys())
@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_bad_idx_is_refused(contents, match, compress, tmp_path):
    (tmp_path / "bad").write_bytes(compress(contents))
    with pytest.raises(CorruptFile, match=match) as caught:
        read_idx(tmp_path / "bad")
    assert str(tmp_path / "bad") in str(caught.value)


@pytest.mark.parametrize("stored", BAD_GZIP.values(), ids=BAD_GZIP.keys())
def test_bad_gzip_is_refused(stored, tmp_path):
    (tmp_path / "bad.gz").write_bytes(stored)
    with pytest.raises(CorruptFile, match=r"bad\.gz must be a whole gzip file"):
        read_idx(tmp_path / "bad.gz")


def test_idx_hash_is_of_the_uncompressed_contents(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(GOOD))
    assert read_idx(tmp_path / "x.gz", hashlib.sha256(GOOD).hexdigest()).shape == (2, 3, 4)
    with pytest.raises(CorruptFile, match="SHA256"):
        read_idx(tmp_path / "x.gz", hashlib.sha256(gzip.compress(GOOD)).hexdigest())


def test_idx_file_that_is_not_there(tmp_path):
    with pytest.raises(InvalidArgument, match="nowhere must be a file that can be read"):
        read_idx(tmp_path / "nowhere")


# Binarisation


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_stochastic_binarization_has_the_mean_and_variance_of_a_bernoulli(dtype):
    pixels = np.arange(17, dtype=dtype) / dtype(16)
    draws = 20_000
    bits = binarize(np.tile(pixels, (draws, 1)), "stochastic", np.random.default_rng(3))
    assert bits.dtype == dtype
    assert bits.shape == (draws, 17)
    assert set(np.unique(bits)) == {0, 1}
    assert not bits[:, 0].any()
    assert bits[:, -1].all()
    p = pixels.astype(np.float64)
    variance = p * (1 - p)
    bits = bits.astype(np.float64)
    np.testing.assert_array_less(np.abs(bits.mean(0) - p), 4.5 * np.sqrt(variance / draws) + 1e-12)
    # Var of the sample variance of a Bernoulli, up to O(1/n^2): variance (1 - 2p)^2 / n; 1/n covers p = 1/2.
    bound = 4.5 * np.sqrt(variance * (1 - 2 * p) ** 2 / draws) + 10 / draws
    np.testing.assert_array_less(np.abs(bits.var(0) - variance), bound)
    # Pixels are drawn apart: neighbours' products have the product of the means.
    product, joint = bits[:, 1:] * bits[:, :-1], p[1:] * p[:-1]
    np.testing.assert_array_less(np.abs(product.mean(0) - joint), 4.5 * np.sqrt(joint * (1 - joint) / draws) + 1e-12)


def test_stochastic_binarization_repeats_with_the_seed_and_changes_with_the_draw():
    images = load("digits").test
    first = binarize(images, "stochastic", np.random.default_rng(0))
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(first, binarize(images, "stochastic", rng))
    assert (first != binarize(images, "stochastic", rng)).any()
    assert images.max() == 1
    assert set(np.unique(images * 16)) == set(range(17))


def test_threshold_and_none():
    images = np.array([[0, 0.5], [np.nextafter(0.5, 1), 1]])
    np.testing.assert_array_equal(binarize(images, "threshold"), [[0, 0], [1, 1]])
    assert binarize(images, "none") is images
    assert binarize(images.astype(np.float32), "threshold").dtype == np.float32
    assert binarize(np.zeros((0, 4)), "threshold").shape == (0, 4)


@pytest.mark.parametrize("how", datasets.BINARIZATIONS)
@pytest.mark.parametrize(
    ("images", "match"),
    [
        (np.array([0, 255], np.uint8), "images must have a floating-point dtype; got uint8"),
        (np.array([0.0, 255.0]), r"images must lie in \[0, 1\]; got \[0.0, 255.0\]"),
        (np.array([-0.1, 0.5]), r"images must lie in \[0, 1\]"),
        (np.array([0.1, np.nan]), r"images must lie in \[0, 1\]"),
    ],
)
def test_images_that_are_no_probabilities_are_refused(how, images, match):
    with pytest.raises(InvalidArgument, match=match):
        binarize(images, how, np.random.default_rng(0))


def test_a_draw_without_a_generator_is_refused():
    with pytest.raises(InvalidArgument, match=r"rng must .*; got None\. Pass numpy\.random\.default_rng"):
        binarize(np.zeros(3), "stochastic")


# A user's own array


@pytest.mark.parametrize("dtype", ["f4", "f8", "u1", "i8", "?", ">f4", "<f4", ">i2"])
def test_load_array_gives_back_what_was_saved(dtype, tmp_path):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    read = load_array(tmp_path / "x.npy")
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype.newbyteorder("=")
    assert read.dtype.isnative


def save_bytes(array: np.ndarray, path) -> bytes:
    np.save(path, array)
    return path.read_bytes()


@pytest.mark.parametrize("keep", [0, 3, 6, 9, 40, 127, 128, 130, 223])
def test_a_truncated_npy_is_refused(keep, tmp_path):
    stored = save_bytes(np.zeros((3, 4)), tmp_path / "x.npy")
    assert len(stored) == 224
    (tmp_path / "x.npy").write_bytes(stored[:keep])
    with pytest.raises(CorruptFile, match=r"x\.npy must be a whole \.npy file"):
        load_array(tmp_path / "x.npy")


NPY_HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (3,)}"


# numpy raises another error for each: which one depends on its version and on Python's.
BAD_NPY_HEADERS = {
    "too few data": NPY_HEADER.replace("3", "4"),
    "a huge array": NPY_HEADER.replace("3", "99999999999999"),
    "a huge integer": NPY_HEADER.replace("3", "1" + "0" * 30),
    "deep nesting": NPY_HEADER.replace("3", "-" * 9000 + "3"),
    "bad dtype": NPY_HEADER.replace("f8", "08"),
    "open bracket": NPY_HEADER.replace("(3,)", "(3,"),
    "unhashable key": "{[]: 1}",
}


@pytest.mark.parametrize("header", BAD_NPY_HEADERS.values(), ids=BAD_NPY_HEADERS.keys())
def test_a_damaged_npy_header_is_refused(header, tmp_path):
    contents = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + bytes(24)
    (tmp_path / "x.npy").write_bytes(contents)
    with pytest.raises(CorruptFile, match=r"x\.npy must be a whole \.npy file"):
        load_array(tmp_path / "x.npy")


def test_the_npy_header_that_those_damage_is_good(tmp_path):
    contents = b"\x93NUMPY\1\0" + struct.pack("<H", len(NPY_HEADER)) + NPY_HEADER.encode() + bytes(24)
    (tmp_path / "x.npy").write_bytes(contents)
    assert load_array(tmp_path / "x.npy").tolist() == [0, 0, 0]


def test_pickles_are_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    np.save(tmp_path / "x.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptFile, match="without pickles"):
        load_array(tmp_path / "x.npy")
    assert not (tmp_path / "it ran").exists()


def test_other_things_than_one_array_of_numbers_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    (tmp_path / "broken.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-30])
    (tmp_path / "x.csv").write_text("1,2,3\n")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([1, 2, 3]))
    for other in ("x.npz", "broken.npz", "x.csv", "x.pkl"):
        with pytest.raises(CorruptFile, match=rf"{other} must be a whole \.npy file.*numpy\.save"):
            load_array(tmp_path / other)
    for array in (np.array(["a", "b"]), np.zeros(2, np.complex64), np.zeros(2, [("a", "f4")])):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(InvalidArgument, match="hold numbers or booleans"):
            load_array(tmp_path / "x.npy")
    for nowhere in (tmp_path / "nowhere.npy", tmp_path):
        with pytest.raises(InvalidArgument, match="be a file that can be read"):
            load_array(nowhere)


# The real files


@pytest.mark.skipif(not os.environ.get("ELBOZOO_DATA"), reason="set ELBOZOO_DATA to a directory with mnist/ to run it")
@pytest.mark.parametrize(("name", "mean"), [("mnist", 0.1307), ("fashion-mnist", 0.2860)])
def test_the_real_files(name, mean, no_internet):
    # The means are the ones that everybody normalises these data with.
    if not (datasets.data_directory() / name).is_dir():
        pytest.skip(f"ELBOZOO_DATA has no {name}/")
    data = load(name)
    assert data.train.shape == (60_000, 784)
    assert data.test.shape == (10_000, 784)
    assert data.train.min() == 0
    assert data.train.max() == 1
    assert data.train.mean(dtype=np.float64) == pytest.approx(mean, abs=5e-5)
    first = {"mnist": [5, 0, 4, 1, 9], "fashion-mnist": [9, 0, 0, 3, 0]}[name]
    assert data.train_labels[:5].tolist() == first
    assert np.bincount(data.test_labels).shape == (10,)
    assert len(load(name, split="validation").train) == 50_000
