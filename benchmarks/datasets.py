"""The benchmark data sets: digits, MNIST and Fashion-MNIST as grey values, and what reads and binarises them.

Grey values stay grey: how pixels become the zeros and ones of a Bernoulli likelihood changes every figure in nats, so
it is a choice of its own (``binarize``) and never hidden in the loading.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pooch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from elbozoo.inference.errors import CorruptFile, ElbozooError, must

# The SHA256 of each file's *uncompressed* contents. Copies of these files are compressed in different ways (some lack
# the name in the gzip header, some were compressed again), so a hash of the .gz would refuse good data.
_IDX_FILES = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
_URLS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
}
NAMES = ("digits", *_IDX_FILES)
SPLITS = ("test", "validation")
BINARIZATIONS = ("none", "stochastic", "threshold")

_DIGITS_TRAIN = 1497
_REFETCH = "Fetch it again (delete a local copy first), or set ELBOZOO_DATA to a directory that has the original files"
_WRITE_NPY = "Write the file with numpy.save, as one array of numbers"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Grey images, flat and scaled to [0, 1], in a training and a held-out part.

    A pixel of value ``v`` is the grey level ``k = v * (levels - 1)``, an integer from 0 to ``levels - 1``.

    Shapes:
        train (N, D), test (M, D) float32; train_labels (N,), test_labels (M,) int64; D = prod(image_shape).

    Attributes:
        name: the data set's name, as given to ``load``.
        train: training images.
        test: held-out images: the test images, or the validation images when ``split="validation"``.
        train_labels: class of each training image.
        test_labels: class of each held-out image.
        image_shape: (height, width) of one image; ``test.reshape(-1, *image_shape)`` undoes the flattening.
        levels: how many grey levels a pixel can have.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray
    image_shape: tuple[int, int]
    levels: int


def load(name: str, split: str = "test", data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a data set as grey values in [0, 1].

    - ``"digits"``: 1797 images of 8×8 pixels with 17 levels, out of scikit-learn: nothing is fetched. The first 1497
      are for training and the last 300 are the test set, in scikit-learn's order: one writer's digits stand together
      there, so that the test holds out writers and not only digits, and no random stream decides the split.
    - ``"mnist"`` and ``"fashion-mnist"``: 60,000 and 10,000 images of 28×28 pixels with 256 levels, from the original
      four gzipped IDX files in ``<data directory>/<name>/``. The data directory is ``data_dir``, else the environment
      variable ``ELBOZOO_DATA``, else a cache of the user's. Files that are absent are fetched into it, with a progress
      bar. Contents are checked against their SHA256 at every load.

    Shapes:
        See ``Dataset``: images come flat, (N, D).

    Args:
        name: one of ``NAMES``.
        split: what is held out. ``"test"``: the test set. ``"validation"``: the end of the training set (10,000 images;
            300 of digits), and ``train`` is what is left before it: choose hyperparameters on this one and leave the
            test set alone.
        data_dir: data directory; None takes the setting above. Digits need none.

    Returns:
        The images, their labels, the shape of an image and the number of levels.

    Raises:
        InvalidArgument: no data set or split has that name.
        CorruptFile: a file, local or just fetched, does not have the original's contents.
        ElbozooError: a file is absent and cannot be fetched.

    Example:
        >>> from elbozoo.benchmarks.datasets import load
        >>> digits = load("digits")
        >>> digits.train.shape, digits.test.shape, digits.levels
        ((1497, 64), (300, 64), 17)

    References:
        Alpaydin & Kaynak (1998), Optical Recognition of Handwritten Digits (digits); LeCun et al. (1998),
        Gradient-based learning applied to document recognition (MNIST); Xiao et al. (2017), arXiv:1708.07747
        (Fashion-MNIST).
    """
    _one_of("name", name, NAMES)
    _one_of("split", split, SPLITS)
    if name == "digits":
        from sklearn.datasets import load_digits  # a slow import that only this data set needs

        pixels, classes = load_digits(return_X_y=True)
        images = pixels[:_DIGITS_TRAIN], pixels[_DIGITS_TRAIN:]
        labels = classes[:_DIGITS_TRAIN], classes[_DIGITS_TRAIN:]
        image_shape, levels = (8, 8), 17
    else:
        folder = data_directory(data_dir) / name
        arrays = [_read_or_fetch(folder, name, file) for file in _IDX_FILES[name]]
        images, labels = arrays[0::2], arrays[1::2]
        image_shape, levels = (28, 28), 256
    train, test = (np.divide(x.reshape(len(x), -1), levels - 1, dtype=np.float32) for x in images)
    train_labels, test_labels = (np.asarray(y, np.int64) for y in labels)
    if split == "validation":
        cut = len(train) - len(test)
        train, test = train[:cut], train[cut:]
        train_labels, test_labels = train_labels[:cut], train_labels[cut:]
    return Dataset(name, train, test, train_labels, test_labels, image_shape, levels)


def binarize(images: np.ndarray, how: str, rng: np.random.Generator | None = None) -> np.ndarray:
    """Turn grey values in [0, 1] into the zeros and ones of a Bernoulli likelihood.

    - ``"stochastic"``: each pixel is drawn, ``b ~ Bernoulli(x)``, so ``E[b] = x`` and ``Var[b] = x (1 - x)``. Each
      call is a new draw; called once an epoch this is the dynamic binarisation of Burda et al.
    - ``"threshold"``: ``b = 1`` where ``x > 0.5``.
    - ``"none"``: the images as they are.

    Shapes:
        images (...), any shape; the result has the same shape and dtype.

    Args:
        images: floating-point grey values in [0, 1].
        how: one of ``BINARIZATIONS``.
        rng: where ``"stochastic"`` draws from; the others ignore it.

    Returns:
        A new array of 0 and 1; for ``"none"`` the argument itself.

    Raises:
        InvalidArgument: unknown ``how``, images not floating-point or not in [0, 1], or a draw without ``rng``.

    Example:
        >>> import numpy as np
        >>> from elbozoo.benchmarks.datasets import binarize
        >>> binarize(np.array([0.0, 0.5, 0.75]), "threshold")
        array([0., 0., 1.])

    References:
        Burda, Grosse & Salakhutdinov (2015), arXiv:1509.00519, section 5.
    """
    _one_of("how", how, BINARIZATIONS)
    if not np.issubdtype(images.dtype, np.floating):
        # Bytes 0..255 taken for probabilities would all be "certain".
        raise must("images", "have a floating-point dtype", images.dtype, "Divide grey levels by (levels - 1)")
    if images.size and not (images.min() >= 0 and images.max() <= 1):  # not (...), so that NaN fails too
        raise must("images", "lie in [0, 1]", f"[{images.min()}, {images.max()}]", "Divide by the largest grey level")
    if how == "none":
        return images
    if how == "threshold":
        return (images > 0.5).astype(images.dtype)
    if not isinstance(rng, np.random.Generator):
        raise must("rng", "be a numpy Generator for a stochastic draw", rng, "Pass numpy.random.default_rng(seed)")
    # random() is in [0, 1): a pixel of 0 is never drawn and a pixel of 1 always is. Float32 steps of 2^-24 are finer
    # than any grey level; wider dtypes get wider uniforms.
    uniform = rng.random(images.shape, dtype=np.float32 if images.dtype.itemsize <= 4 else np.float64)
    return (uniform < images).astype(images.dtype)


def load_array(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a user's own data from an ``.npy`` file; nothing is unpickled.

    Shapes:
        As stored.

    Args:
        path: an ``.npy`` file that holds one array of numbers or booleans.

    Returns:
        The array, of the dtype stored, in the machine's own byte order (torch takes no other).

    Raises:
        InvalidArgument: the file cannot be opened, or its array is not of numbers.
        CorruptFile: the file is truncated, altered or not an ``.npy`` file.

    Example:
        >>> import os, tempfile
        >>> import numpy as np
        >>> from elbozoo.benchmarks.datasets import load_array
        >>> path = os.path.join(tempfile.mkdtemp(), "mine.npy")
        >>> np.save(path, np.zeros((5, 3)))
        >>> load_array(path).shape
        (5, 3)
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            # Not numpy.load, which also takes archives and pickles, and leaves a broken archive open.
            array = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise must(name, "be a file that can be read", error, "Pass the path of an .npy file") from error
    except Exception as error:
        # Not ValueError alone: numpy parses the header as Python, so that a damaged one also gives a TokenError,
        # TypeError, SyntaxError, RecursionError or OverflowError, and one that claims a huge array a MemoryError.
        got = f"{type(error).__name__}: {error}"
        raise must(name, "be a whole .npy file, without pickles", got, _WRITE_NPY, CorruptFile) from error
    if array.dtype.kind not in "biuf":
        raise must(name, "hold numbers or booleans", f"dtype {array.dtype}", _WRITE_NPY)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def read_idx(path: str | os.PathLike[str], sha256: str | None = None) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or plain, and refuse anything out of place in it.

    The format: two zero bytes, 8 (unsigned byte), the number of dimensions; each dimension as a big-endian 32-bit
    integer; then the bytes, last dimension fastest, and nothing after them.

    Shapes:
        As the file's header says: (N,) for labels, (N, height, width) for images.

    Args:
        path: the file.
        sha256: hash, in hexadecimal, that the uncompressed contents must have; None checks the structure alone.

    Returns:
        The array, uint8, read-only.

    Raises:
        InvalidArgument: the file cannot be opened.
        CorruptFile: it is truncated, too long, of another format, damaged in its compression, or of another hash.

    References:
        LeCun, Cortes & Burges, The MNIST database of handwritten digits, "File formats".
    """
    name = os.fspath(path)
    try:
        contents = Path(path).read_bytes()
    except OSError as error:
        raise must(name, "be a file that can be read", error, "Pass the path of an IDX file") from error
    return _parse_idx(name, contents, sha256)


def data_directory(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The directory with one folder per data set: ``data_dir``, else ``ELBOZOO_DATA``, else a cache of the user's."""
    return Path(data_dir or os.environ.get("ELBOZOO_DATA") or pooch.os_cache("elbozoo")).expanduser()


def _one_of(argument: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value).lower(), allowed, n=1)
        todo = f"Pass {near[0]!r}, the nearest match" if near else "Pass one of them"
        raise must(argument, f"be one of {', '.join(map(repr, allowed))}", repr(value), todo)


def _parse_idx(name: str, contents: bytes, sha256: str | None) -> np.ndarray:
    """Check and parse the bytes of an IDX file; ``name`` is what errors call it."""
    if contents[:2] == b"\x1f\x8b":  # told by its first bytes: a download's temporary file has no .gz in its name
        try:
            contents = gzip.decompress(contents)
        except (OSError, EOFError, zlib.error) as error:
            got = f"{type(error).__name__}: {error}"
            raise must(name, "be a whole gzip file", got, _REFETCH, CorruptFile) from error
    if contents[:3] != b"\0\0\x08" or len(contents) < 4 or contents[3] == 0:
        got = contents[:4].hex(" ") or "an empty file"
        raise must(name, "start with the IDX bytes 00 00 08 and a dimension count", got, _REFETCH, CorruptFile)
    start = 4 + 4 * contents[3]
    if len(contents) < start:
        got = f"{len(contents)} bytes"
        raise must(name, f"have an IDX header of {start} bytes", got, _REFETCH, CorruptFile)
    shape = tuple(int.from_bytes(contents[i : i + 4], "big") for i in range(4, start, 4))
    if len(contents) - start != math.prod(shape):
        condition = f"hold {math.prod(shape)} bytes after its header, for the shape {shape}"
        raise must(name, condition, len(contents) - start, _REFETCH, CorruptFile)
    if sha256 is not None and (got := hashlib.sha256(contents).hexdigest()) != sha256:
        raise must(name, f"have uncompressed contents of SHA256 {sha256}", got, _REFETCH, CorruptFile)
    return np.frombuffer(contents, np.uint8, offset=start).reshape(shape)


def _read_or_fetch(folder: Path, name: str, file: str) -> np.ndarray:
    """Read one original file of the data set ``name``, fetching it first when ``folder`` lacks it."""
    sha256 = _IDX_FILES[name][file]

    def download(url: str, output_file: str, fetcher: Any) -> None:
        _http_download(url, output_file, fetcher)
        # Inside the download, so that pooch throws a bad file away rather than leave it in the data directory.
        _parse_idx(url, Path(output_file).read_bytes(), sha256)

    try:
        # Does nothing where the file is there. No hash for pooch itself: it would hash the .gz, not the contents.
        fetcher = pooch.create(path=folder, base_url=_URLS[name], registry={file: None})
        fetcher.fetch(file, downloader=cast(Any, download))  # pooch's own annotation has other argument names
    except OSError as error:  # requests' own errors are OSErrors too
        condition = f"be there, or be fetched from {_URLS[name]}"
        got = f"{type(error).__name__}: {error}"
        todo = f"Connect to the internet, or set ELBOZOO_DATA to a directory that has {name}/{file}"
        raise must(str(folder / file), condition, got, todo, ElbozooError) from error
    return read_idx(folder / file, sha256)


def _http_download(url: str, output_file: str, fetcher: Any) -> None:
    """Download with a progress bar on standard error."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar: Any = _Bar(progress, url)
        pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16)(url, output_file, fetcher)


class _Bar:
    """A rich progress bar in the form that pooch asks for: ``total``, ``update``, ``reset`` and ``close``."""

    def __init__(self, progress: Progress, description: str):
        self._progress = progress
        self._task = progress.add_task(description, total=None)
        self.total = 0

    def update(self, size: int) -> None:
        self._progress.update(self._task, advance=size, total=self.total)

    def reset(self) -> None:
        self._progress.reset(self._task, total=self.total)

    def close(self) -> None:
        pass  # Progress closes itself when its block ends
