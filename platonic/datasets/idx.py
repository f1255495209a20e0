"""IDX files: MNIST and the sets that share its format.

Files are untrusted: sizes are checked before memory is taken, and a damaged file is an error that names it.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from platonic.datasets.base import CLASSIFICATION, Dataset, PathLike

_IDX_DTYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_GZIP_MAGIC = b"\x1f\x8b"
_MAX_DEFLATE_RATIO = 1032  # zlib: a byte of deflate makes at most 1032 bytes
_READ_BYTES = 1 << 20

# Where torchvision keeps each set under its root.
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
_IDX_SOURCES = {
    "mnist": "'The MNIST database of handwritten digits' by LeCun, Cortes and Burges, or its copy in torchvision",
    "fashion-mnist": "the GitHub repository zalandoresearch/fashion-mnist, folder data/fashion, or torchvision",
    "kmnist": "'Kuzushiji-MNIST' of the Center for Open Data in the Humanities (CODH), or torchvision",
    "emnist": "'The EMNIST Dataset' of NIST, the download 'Binary format as the original MNIST dataset'",
}
EMNIST_NAMES = tuple(f"emnist-{kind}" for kind in ("balanced", "byclass", "bymerge", "digits", "letters", "mnist"))
IDX_NAMES = (*_TORCHVISION, *EMNIST_NAMES)


def load_idx(folder: PathLike, name: str = "mnist") -> Dataset:
    """Load MNIST, or a set in the same format, from its four IDX files.

    Looked for are ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
    ``t10k-labels-idx1-ubyte``, also spelt with a dot (``train-images.idx3-ubyte``), gzipped with ``.gz`` at the end or
    not; for EMNIST ``emnist-digits-train-images-idx3-ubyte``, ``emnist-digits-test-...`` and so on. All four must be in
    one of ``folder/name``, torchvision's ``folder/MNIST/raw`` (``FashionMNIST``, ``KMNIST``, ``EMNIST``) and `folder`
    itself, in this order.

    Parameters
    ----------
    folder : path-like
        Where to look.
    name : {'mnist', 'fashion-mnist', 'kmnist', 'emnist-digits', 'emnist-letters', ...}
        Which set.

    Returns
    -------
    Dataset
        X float32 of shape (m, height * width) with pixels in 0..255 as stored (EMNIST stores its images transposed), y
        int64.

    Raises
    ------
    FileNotFoundError
        Naming the files, the folders and a source.
    ValueError
        If a file is not IDX of unsigned bytes, is truncated or too long, or does not fit the others.
    """
    if name not in IDX_NAMES:
        raise ValueError(f"unknown IDX set {name!r}; expected one of {', '.join(IDX_NAMES)}")
    folders = _idx_folders(Path(folder), name)
    found = next((files for files in (_find_idx_files(place, name) for place in folders) if None not in files), None)
    if found is None:
        raise FileNotFoundError(_idx_missing_message(folders, name))
    X_train, y_train, shape = _read_idx_pair(found[0], found[1])
    X_test, y_test, test_shape = _read_idx_pair(found[2], found[3])
    if shape != test_shape:
        raise ValueError(f"{found[2]}: images of {test_shape}, but those of {found[0]} are {shape}")
    description = (
        f"{name}: {len(X_train)} + {len(X_test)} images of {shape[0]} x {shape[1]} bytes from {found[0].parent}"
    )
    return Dataset(name, X_train, y_train, X_test, y_test, CLASSIFICATION, shape, None, description)


def has_idx_files(folder: PathLike) -> bool:
    """Whether the four files of a set named as MNIST names them lie in `folder` itself."""
    return None not in _find_idx_files(Path(folder), "mnist")


def _idx_folders(folder: Path, name: str) -> list[Path]:
    inner = "EMNIST" if name in EMNIST_NAMES else _TORCHVISION[name]
    names = [name, "emnist"] if name in EMNIST_NAMES else [name]
    return [*(folder / each for each in names), folder / inner / "raw", folder]


def _idx_stems(name: str) -> list[str]:
    """The files' names up to ``-idx``: train images and labels, test images and labels."""
    if name in EMNIST_NAMES:
        return [f"{name}-{split}-{what}" for split in ("train", "test") for what in ("images", "labels")]
    return [f"{split}-{what}" for split in ("train", "t10k") for what in ("images", "labels")]


def _find_idx_files(folder: Path, name: str) -> list[Any]:
    """The four files in `folder`, in the order of :func:`_idx_stems`, with None for each that is not there."""
    files = []
    for stem in _idx_stems(name):
        spellings = [f"{stem}{separator}{_idx_kind(stem)}{end}" for end in ("", ".gz") for separator in "-."]
        files.append(next((folder / each for each in spellings if (folder / each).is_file()), None))
    return files


def _idx_kind(stem: str) -> str:
    return "idx3-ubyte" if stem.endswith("images") else "idx1-ubyte"


def _idx_missing_message(folders: Sequence[Path], name: str) -> str:
    wanted = [f"{stem}-{_idx_kind(stem)}" for stem in _idx_stems(name)]
    looked = []
    for folder in folders:
        missing = [file for file, found in zip(wanted, _find_idx_files(folder, name), strict=True) if found is None]
        partly = f" (which lacks {', '.join(missing)})" if len(missing) < len(wanted) else ""
        looked.append(f"{folder.absolute()}{partly}")
    return (
        f"{name} was not found. Expected four files, gzipped (.gz) or not: {', '.join(wanted)}. Looked in "
        f"{', '.join(looked)}. Get them from {_IDX_SOURCES['emnist' if name in EMNIST_NAMES else name]}, and put them "
        "into one of these folders."
    )


def _read_idx_pair(images_file: Path, labels_file: Path) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    images, labels = _read_idx(images_file, 3), _read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise ValueError(f"{images_file} holds {len(images)} images, but {labels_file} holds {len(labels)} labels")
    if images.size == 0:
        raise ValueError(f"{images_file} holds no pixels: its dimensions are {images.shape}")
    X = images.reshape(len(images), -1).astype(np.float32)
    return X, labels.astype(np.int64), (images.shape[1], images.shape[2])


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """The uint8 array of `ndim` dimensions in an IDX file, whose length is checked before memory is taken."""
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            most = path.stat().st_size * (_MAX_DEFLATE_RATIO if zipped else 1)
            return _read_idx_stream(gzip.GzipFile(fileobj=raw) if zipped else raw, path, ndim, most)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or truncated gzip: {error}") from error


def _read_idx_stream(stream: Any, path: Path, ndim: int, most: int) -> np.ndarray:
    """`most` is how many bytes the stream can possibly hold."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_DTYPES:
        raise ValueError(
            f"{path}: not an IDX file: expected it to start with 00 00 08 {ndim:02x}, got {magic.hex(' ')!r}"
        )
    if magic[2] != 0x08 or magic[3] != ndim:
        raise ValueError(
            f"{path}: expected unsigned bytes (type 08) in {ndim} dimensions, got {_IDX_DTYPES[magic[2]]} (type "
            f"{magic[2]:02x}) in {magic[3]}"
        )
    header = stream.read(4 * ndim)
    if len(header) < 4 * ndim:
        raise ValueError(f"{path}: truncated: it ends within its header")
    shape = struct.unpack(f">{ndim}I", header)
    size = math.prod(shape)
    if size > most:
        raise ValueError(f"{path}: its header announces {size} bytes {shape}, more than the file can hold ({most})")
    values = np.empty(size, np.uint8)
    filled = 0
    while filled < size and (count := stream.readinto(values[filled : filled + _READ_BYTES].data)):
        filled += count
    if filled < size:
        raise ValueError(f"{path}: truncated: its header announces {size} bytes {shape}, it holds {filled}")
    if stream.read(1):
        raise ValueError(f"{path}: longer than the {size} bytes {shape} that its header announces")
    return values.reshape(shape)
