"""Step 5 of *compress*: named payloads in a ``.wcz`` file, laid out as FORMAT.md says."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from platonic_core.files import atomic_file
from weight_compression import _ops
from weight_compression.codec import DEFAULT_MAX_BYTES, PayloadInfo, compress, decompress, payload_info
from weight_compression.config import CompressionConfig
from weight_compression.errors import (
    BadChecksumError,
    BadHeaderError,
    BadMagicError,
    BadOffsetError,
    TruncatedError,
    UnsupportedVersionError,
)

__all__ = ["WczFile", "load_file", "save_file"]

MAGIC = b"PLWZ"
VERSION = 0
_START = struct.Struct("<4sIQ")  # magic, version, bytes of the index
_CHECKSUM = struct.Struct("<I")
MAX_INDEX_BYTES = 1 << 30


def save_file(
    state_dict: Mapping[str, torch.Tensor] | torch.nn.Module,
    path: str | os.PathLike[str],
    config: CompressionConfig | None = None,
    *,
    only: Callable[[str, torch.Tensor], bool] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None,
) -> None:
    """Compresses tensors by name into a ``.wcz`` file.

    The file appears whole or not at all: it is written under a temporary name in the same folder and renamed. One
    payload is in memory at a time. Names that share memory, shape and strides (tied weights) share a payload, if `only` says
    the same of them.

    Parameters
    ----------
    state_dict : mapping of str to torch.Tensor, or torch.nn.Module
        Of a module, its ``state_dict()``. Integer and boolean buffers are kept exactly. Tensors on a CUDA device are
        compressed there.
    path : path-like
    config : CompressionConfig, optional
    only : callable (name, tensor) -> bool, optional
        Tensors for which it is false are stored exactly.
    metadata : mapping of str to str, optional
        Kept with the file; see :attr:`WczFile.metadata`.
    progress : callable (name, tensor, payload), optional
        Called after each tensor that is written; tied ones are written once.

    Raises
    ------
    NonFiniteError
        If a tensor holds NaN or infinity; the message names it.
    TypeError
        If an entry is not a tensor, or of a dtype that payloads cannot hold.
    """
    tensors = state_dict.state_dict() if isinstance(state_dict, torch.nn.Module) else state_dict
    metadata = dict(metadata or {})
    if any(not isinstance(v, str) for pair in metadata.items() for v in pair):
        raise TypeError("metadata: expected strings as keys and values")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"expected tensors by name, got {name!r}: {type(tensor).__name__}")
    config = CompressionConfig() if config is None else config
    exact = CompressionConfig(lossless=True)
    path = Path(path)
    # The index comes first in the file, but is known last: payloads wait in a file of their own.
    with tempfile.TemporaryFile(dir=path.parent) as payloads:
        entries: dict[str, list[int]] = {}
        # With a weak reference each: memory may be used again once a tensor that was made on access is gone.
        seen: dict[tuple, tuple[weakref.ref, list[int]]] = {}
        end = 0
        for name, tensor in tensors.items():
            chosen = config if only is None or only(name, tensor) else exact
            try:
                key = (chosen, *_identity(tensor))
                if key in seen and seen[key][0]() is not None:
                    entries[name] = seen[key][1]
                    continue
                payload = compress(tensor, chosen).cpu()
            except (ValueError, TypeError, NotImplementedError) as error:
                raise type(error)(f"{name}: {error}") from error
            payloads.write(payload.numpy().data)
            entries[name] = [end, end + payload.numel()]
            end += payload.numel()
            if tensor.numel() > 0:
                seen[key] = (weakref.ref(tensor), entries[name])
            if progress is not None:
                progress(name, tensor, payload)
        index = json.dumps({"metadata": metadata, "tensors": entries}, separators=(",", ":"), ensure_ascii=False)
        start = _START.pack(MAGIC, VERSION, len(index.encode())) + index.encode()
        with atomic_file(path) as file:
            file.write(start + _CHECKSUM.pack(_ops.crc32c(np.frombuffer(start, np.uint8))))
            payloads.seek(0)
            shutil.copyfileobj(payloads, file, 1 << 22)


def _identity(tensor: torch.Tensor) -> tuple:
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return (id(tensor),)  # compress says what is wrong with it
    return (
        tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(),
        tensor.is_neg(),
    )  # fmt: skip


@dataclass(frozen=True)
class _Index:
    entries: dict[str, tuple[int, int]]
    metadata: dict[str, str]
    data: int  # where payloads begin


class WczFile:
    """A ``.wcz`` file, mapped into memory: a tensor is read without the others.

    Parameters
    ----------
    path : path-like

    Attributes
    ----------
    metadata : dict of str to str

    Raises
    ------
    PayloadError
        If it is not such a file, or its index is damaged.

    Examples
    --------
    >>> with WczFile("model.wcz") as file:  # doctest: +SKIP
    ...     weight = file["layer.weight"]
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if self.path.stat().st_size < _START.size + _CHECKSUM.size:
            raise TruncatedError(f"{self.path}: expected at least {_START.size + _CHECKSUM.size} bytes")
        self._bytes: np.ndarray | None = np.memmap(self.path, np.uint8, mode="r")
        self._index = _parse_index(self._bytes, str(self.path))
        self.metadata = self._index.metadata

    def keys(self) -> list[str]:
        return list(self._index.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.entries)

    def __len__(self) -> int:
        return len(self._index.entries)

    def __contains__(self, name: object) -> bool:
        return name in self._index.entries

    def span(self, name: str) -> tuple[int, int]:
        """First byte and end of a tensor's payload, counted from the first payload. Tied tensors share theirs."""
        if name not in self._index.entries:
            raise KeyError(f"{name!r} is not in {self.path}; there are {', '.join(self.keys()) or 'no tensors'}")
        return self._index.entries[name]

    def payload(self, name: str) -> np.ndarray:
        """A tensor's payload, uint8, in the file's memory."""
        begin, end = self.span(name)
        if self._bytes is None:
            raise ValueError(f"{self.path} has been closed")
        return self._bytes[self._index.data + begin : self._index.data + end]

    def info(self, name: str) -> PayloadInfo:
        """What a tensor's payload holds, from its header alone."""
        return payload_info(self.payload(name))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.get(name)

    def get(self, name: str, *, max_bytes: int = DEFAULT_MAX_BYTES) -> torch.Tensor:
        """A tensor, decoded; errors name it."""
        try:
            return decompress(self.payload(name), max_bytes=max_bytes)
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from error

    def close(self) -> None:
        self._bytes = None

    def __enter__(self) -> WczFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parse_index(data: np.ndarray, where: str) -> _Index:
    magic, version, size = _START.unpack(data[: _START.size].tobytes())
    if magic != MAGIC:
        raise BadMagicError(f"{where}: expected a file to begin with {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise UnsupportedVersionError(f"{where}: expected container version {VERSION}, got {version}")
    if size > MAX_INDEX_BYTES or size > data.size - _START.size - _CHECKSUM.size:
        raise TruncatedError(f"{where}: expected an index of {size} bytes, the file has {data.size}")
    begin = _START.size + size
    (checksum,) = _CHECKSUM.unpack(data[begin : begin + _CHECKSUM.size].tobytes())
    actual = _ops.crc32c(np.ascontiguousarray(data[:begin]))
    if actual != checksum:
        raise BadChecksumError(f"{where}: index: expected checksum {checksum:08x}, got {actual:08x}")
    try:
        index = json.loads(data[_START.size : begin].tobytes().decode())
        entries = {str(name): (a, b) for name, (a, b) in index["tensors"].items()}
        if any(type(end) is not int for span in entries.values() for end in span):
            raise ValueError("expected whole numbers as offsets")
        metadata = {str(k): str(v) for k, v in index["metadata"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadHeaderError(f"{where}: expected an index of tensors and metadata: {error}") from error
    data_begin = begin + _CHECKSUM.size
    # The payloads tile the rest of the file, so that no byte is outside of a checksum.
    end = 0
    for a, b in sorted(set(entries.values())):
        if a != end or b < a:
            raise BadOffsetError(f"{where}: expected a payload to begin at {end}, got {a} to {b}")
        end = b
    if end != data.size - data_begin:
        error_class = TruncatedError if end > data.size - data_begin else BadOffsetError
        raise error_class(f"{where}: expected {end} bytes of payloads, got {data.size - data_begin}")
    return _Index(entries, metadata, data_begin)


def load_file(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    names: Iterable[str] | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> dict[str, torch.Tensor]:
    """The tensors of a ``.wcz`` file.

    Parameters
    ----------
    path : path-like
    device : torch.device or str, default 'cpu'
    names : iterable of str, optional
        Only these; nothing else is read.
    max_bytes : int, default 16 GiB
        Limit for each tensor.

    Returns
    -------
    dict of str to torch.Tensor
        Names that were tied when the file was written are one tensor again.

    Raises
    ------
    KeyError
        If a name is not in the file.
    PayloadError
        If the file is damaged; the message names the tensor.
    """
    with WczFile(path) as file:
        loaded: dict[tuple[int, int], torch.Tensor] = {}
        result = {}
        if isinstance(names, str):
            raise TypeError(f"names: expected names in a list, got {names!r}")
        for name in file.keys() if names is None else names:
            span = file.span(name)
            if span not in loaded or span[0] == span[1]:
                loaded[span] = file.get(name, max_bytes=max_bytes).to(device)
            result[name] = loaded[span]
        return result
