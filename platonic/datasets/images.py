"""Folders of images, a folder for each class, and tar archives of them.

Archives are read in one pass and nothing is extracted to disk. Files are untrusted: an image's size is checked before
it is decoded, an archive's while it is unpacked, and a damaged file is an error that names it.
"""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from platonic.datasets.base import CLASSIFICATION, Dataset, PathLike

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")
_MAX_IMAGE_FILE = 1 << 28  # bytes of one encoded image
_TAR_BLOCK = 512
_TAR_RECORD = 20 * _TAR_BLOCK  # what tar pads an archive to
# What tarfile and the decompressors raise on damage; long chains of headers make tarfile recurse.
_ARCHIVE_DAMAGE = (
    tarfile.TarError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError, ValueError, OverflowError, RecursionError,
)  # fmt: skip
# Pillow's modes of 8 bits a channel that are read as they are, and those that convert without loss of what is seen.
_MODE_OF = {"L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}


def load_image_folder(path: PathLike, *, mode: str | None = None, max_bytes: int = 1 << 34) -> Dataset:
    """Load images sorted into folders by class: ``class/name.png``, or ``train/class/...`` and ``test/class/...``.

    Read are files that end in .png, .jpg or .jpeg and do not start with a dot, exactly at these levels of a folder, or
    of a tar archive (.tar, .tar.gz, .tar.xz), which is read in one pass without extracting it; an archive may have
    one more folder around everything. Needs Pillow.

    Parameters
    ----------
    path : path-like
        Folder or archive.
    mode : {'L', 'RGB'} or None
        Convert every image to grey or colour. None keeps grey, colour and transparency as they are.
    max_bytes : int
        Refuse to make arrays, or to unpack an archive, larger than this.

    Returns
    -------
    Dataset
        X float32 of shape (m, height * width * channels), pixels in 0..255, flattened in the order height, width,
        channels; y the folders' names; `image_shape` (height, width), or (height, width, channels) in colour. Rows are
        sorted by class, then file name. Without ``train`` and ``test`` all samples are training samples.

    Raises
    ------
    FileNotFoundError
        If there is no such folder or archive, or no image in it.
    ValueError
        If an image or the archive is damaged, images differ in size or colour, or the folders are laid out otherwise;
        the message names the file.
    ImportError
        If Pillow is not installed.
    """
    path = Path(path)
    if mode not in (None, "L", "RGB"):
        raise ValueError(f"expected mode to be None, 'L' (grey) or 'RGB', got {mode!r}")
    if not path.exists():
        raise FileNotFoundError(f"no such folder or archive of images: {path}")
    decoder = _ImageDecoder(mode, max_bytes)
    files = _folder_images(path) if path.is_dir() else _archive_images(path, max_bytes)
    images = [(parts, decoder.decode(content, f"{path}/{'/'.join(parts)}")) for parts, content in files]
    if not images:
        raise FileNotFoundError(
            f"no images in {path}: expected train/CLASS/*.png and test/CLASS/*.png, or CLASS/*.png (or .jpg, .jpeg)"
        )
    return _assemble_images(path, images)


class _ImageDecoder:
    """Decodes images that all have the shape of the first, with an error that names the one that has not."""

    def __init__(self, mode: str | None, max_bytes: int) -> None:
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError('reading images needs Pillow: pip install "platonic-dl[plot]"') from error
        self._open = Image.open
        self._mode = mode
        self._max_bytes = max_bytes
        self._count = 0
        self._first: tuple[tuple[int, int], str, str] | None = None  # size, mode, name

    def decode(self, content: bytes, name: str) -> np.ndarray:
        """The uint8 pixels, of shape (height, width) or (height, width, channels)."""
        try:
            with self._open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
                mode = self._check(image.size, image.mode, name)
                return np.asarray(image if image.mode == mode else image.convert(mode))
        except (MemoryError, _Refused):
            raise
        except Exception as error:  # Pillow's decoders raise whatever the damage leads them to
            raise ValueError(f"{name}: not a readable PNG or JPEG image: {error}") from error

    def _check(self, size: tuple[int, int], stored_mode: str, name: str) -> str:
        """Compare what the image's header says with the first image, before any pixel is decoded; the mode to read."""
        if stored_mode not in _MODE_OF:
            raise _Refused(f"{name}: pixels of Pillow's mode {stored_mode!r}; expected 8 bits a channel")
        mode = self._mode or _MODE_OF[stored_mode]
        self._first = self._first or (size, mode, name)
        if (size, mode) != self._first[:2]:
            (width, height), first_mode, first_name = self._first
            raise _Refused(
                f"{name}: {size[0]} x {size[1]} {mode}, but {first_name} is {width} x {height} {first_mode}; all "
                "images must have one size and mode (mode='L' or 'RGB' converts colours)"
            )
        self._count += 1
        needed = self._count * size[0] * size[1] * len(mode) * 4
        if needed > self._max_bytes:
            raise _Refused(f"{name}: {self._count} images take {needed} bytes, more than max_bytes={self._max_bytes}")
        return mode


class _Refused(ValueError):
    """Our own verdict on a file, told apart from what Pillow and tarfile raise."""


def _is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGE_SUFFIXES) and not name.startswith(".")


def _folder_images(folder: Path) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """Path parts below `folder` and content of each image that is two or three levels deep."""
    for file in sorted([*folder.glob("*/*"), *folder.glob("*/*/*")]):
        if _is_image(file.name) and file.is_file():
            if file.stat().st_size > _MAX_IMAGE_FILE:
                raise ValueError(
                    f"{file}: {file.stat().st_size} bytes, more than an image may have ({_MAX_IMAGE_FILE})"
                )
            yield file.relative_to(folder).parts, file.read_bytes()


def _archive_images(path: Path, max_bytes: int) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """Path parts and content of each image of a tar archive, read forwards once, nothing written to disk."""
    try:
        with _open_decompressed(path) as stream:
            bounded = _BoundedStream(stream, path, max_bytes)
            archive = tarfile.open(fileobj=bounded, mode="r:")  # type: ignore[call-overload] # noqa: SIM115
            while (member := archive.next()) is not None:
                archive.members.clear()  # one entry for each file would outgrow the images
                parts = tuple(part for part in PurePosixPath(member.name).parts if part != ".")
                if not member.isdir() and parts and _is_image(parts[-1]):
                    yield parts, _read_member(bounded, member, path)
            if bounded.last != bytes(_TAR_BLOCK):  # tarfile takes a damaged header for the end
                raise _Refused(f"{path}: damaged or truncated: no end mark where the entries end")
            while bounded.read(_TAR_RECORD):  # the padding, so that what unpacks it verifies its checksum
                pass
    except _Refused:
        raise
    except _ARCHIVE_DAMAGE as error:
        raise ValueError(
            f"{path}: not a tar archive (.tar, .tar.gz, .tar.xz), damaged or truncated: {error}"
        ) from error


def _read_member(stream: _BoundedStream, member: tarfile.TarInfo, path: Path) -> bytes:
    if not member.isreg() or member.issparse():
        raise _Refused(
            f"{path}: {member.name} is a link or sparse file: archive it with --dereference --hard-dereference"
        )
    stream.seek(member.offset_data)
    content = stream.read(member.size)
    if len(content) < member.size:
        raise _Refused(f"{path}: truncated within {member.name}")
    return content


def _open_decompressed(path: Path) -> Any:
    with open(path, "rb") as raw:
        magic = raw.read(6)
    if magic == b"\xfd7zXZ\0":
        return lzma.open(path)
    return gzip.open(path) if magic[:2] == b"\x1f\x8b" else open(path, "rb")


class _BoundedStream:
    """A file that tarfile reads forwards, with a limit on its length and on what one read may ask for."""

    def __init__(self, stream: BinaryIO, path: Path, limit: int) -> None:
        self._stream = stream
        self._path = path
        self._limit = limit
        self._position = 0
        self.last = b""  # what the last read returned

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position != self._position:
            self._check(position)
            self._position = self._stream.seek(position)
        return self._position

    def read(self, count: int) -> bytes:
        if count > _MAX_IMAGE_FILE:
            raise _Refused(f"{self._path}: an entry of {count} bytes, more than an image may have ({_MAX_IMAGE_FILE})")
        self._check(self._position + count)
        self.last = self._stream.read(count)
        self._position += len(self.last)
        return self.last

    def _check(self, end: int) -> None:
        if end < self._position:
            raise _Refused(f"{self._path}: damaged: an entry of negative size")
        if end > self._limit:
            raise _Refused(f"{self._path}: unpacks to more than max_bytes={self._limit}")


def _assemble_images(path: Path, images: list[tuple[tuple[str, ...], np.ndarray]]) -> Dataset:
    """Sort by split, class and file name, and stack; `images` is left empty, so that its pixels can be freed."""
    splits: dict[str, list[tuple[str, str, np.ndarray]]] = {"": [], "train": [], "test": []}
    around: tuple[tuple[str, ...], str] | None = None  # what is before the split or class, and the first file's name
    while images:
        parts, pixels = images.pop()
        split = parts[-3] if len(parts) >= 3 and parts[-3] in ("train", "test") else ""
        before = parts[: -3 if split else -2]
        around = around or (before, "/".join(parts))
        if len(parts) < 2 or len(before) > 1 or before != around[0]:
            raise ValueError(
                f"{path}: expected train/CLASS/image and test/CLASS/image, or CLASS/image, everywhere; found "
                f"{'/'.join(parts)} beside {around[1]}"
            )
        splits[split].append((parts[-2], parts[-1], pixels))
    if splits[""] and (splits["train"] or splits["test"]):
        raise ValueError(f"{path}: expected either folders train and test or folders of classes, found both")
    if splits["test"] and not splits["train"]:
        raise ValueError(f"{path}: expected folders train and test, found only test")
    shape = (splits[""] or splits["train"])[0][2].shape
    X_train, y_train = _stack_images(splits[""] or splits["train"])
    X_test, y_test = _stack_images(splits["test"]) if splits["test"] else (None, None)
    if y_test is not None and (unseen := np.setdiff1d(y_test, y_train)).size:
        raise ValueError(f"{path}: class {unseen[0]!s} has test images but no training images")
    description = (
        f"{len(X_train)} + {0 if X_test is None else len(X_test)} images of {' x '.join(map(str, shape))} bytes"
    )
    name = path.name.split(".")[0] if path.is_file() else path.resolve().name
    return Dataset(name, X_train, y_train, X_test, y_test, CLASSIFICATION, shape, None, f"{description} from {path}")


def _stack_images(images: list[tuple[str, str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    images.sort(key=lambda image: image[:2])
    X = np.empty((len(images), images[0][2].size), np.float32)
    for row, (_, _, pixels) in zip(X, images, strict=True):
        row[:] = pixels.reshape(-1)
    return X, np.array([label for label, _, _ in images])
