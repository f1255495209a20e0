"""Batches kept in memory or in a file, for the feature cache."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from layerwise.feednet import Batch

__all__ = ["DiskRecording", "MemoryRecording", "Recording", "bytes_of"]


class Recording:
    """Batches in order, and the fingerprints of the units that made them. What is read is the caller's to change."""

    def __init__(self, key: list[bytes]) -> None:
        self.key = key
        self.nbytes = 0
        self._index: list[tuple[list[Any], TreeSpec]] = []

    def __len__(self) -> int:
        return len(self._index)

    def append(self, batch: Batch) -> None:
        leaves, structure = tree_flatten(batch)
        self._index.append(([self._put(x.detach()) if isinstance(x, Tensor) else x for x in leaves], structure))
        self.nbytes += sum(x.nbytes for x in leaves if isinstance(x, Tensor))

    def read(self, number: int, device: torch.device) -> Batch:
        leaves, structure = self._index[number]
        return tree_unflatten([self._get(x, device) for x in leaves], structure)

    def close(self) -> None:
        self._index.clear()

    def _put(self, tensor: Tensor) -> Any:
        raise NotImplementedError

    def _get(self, kept: Any, device: torch.device) -> Any:
        raise NotImplementedError


class MemoryRecording(Recording):
    """On the device that made them, or in page-locked memory of the host."""

    def __init__(self, key: list[bytes], pinned: bool) -> None:
        super().__init__(key)
        self.pinned = pinned

    def _put(self, tensor: Tensor) -> Tensor:
        if not self.pinned:
            return tensor.clone()
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

    def _get(self, kept: Any, device: torch.device) -> Any:
        if not isinstance(kept, Tensor):
            return kept
        return kept.to(device, non_blocking=True) if self.pinned else kept.clone()


class _Piece:
    """Where a tensor is in the file, and how its elements lie there."""

    def __init__(self, offset: int, tensor: Tensor) -> None:
        self.offset, self.nbytes = offset, tensor.nbytes
        self.shape, self.strides, self.dtype = tensor.shape, tensor.stride(), tensor.dtype


class DiskRecording(Recording):
    """Raw bytes, one tensor after the other, in a file without a name: the system frees it however the process ends.

    Where files cannot be nameless (Windows), it has one, and is removed when it is closed.
    """

    def __init__(self, key: list[bytes], directory: str | os.PathLike[str] | None) -> None:
        super().__init__(key)
        self._file = tempfile.TemporaryFile(prefix="layerwise-", dir=directory)  # noqa: SIM115 - open until close()
        self._end = 0

    def _put(self, tensor: Tensor) -> _Piece:
        dense = tensor.to("cpu", copy=True)  # without gaps, the dimensions in memory in the order in which they were
        piece = _Piece(self._end, dense)
        self._file.seek(piece.offset)
        self._file.write(_memory_of(dense))
        self._file.flush()
        self._end += piece.nbytes
        return piece

    def _get(self, kept: Any, device: torch.device) -> Any:
        if not isinstance(kept, _Piece):
            return kept
        tensor = torch.empty_strided(kept.shape, kept.strides, dtype=kept.dtype)
        self._file.seek(kept.offset)
        got = self._file.readinto(_memory_of(tensor))
        if got != kept.nbytes:
            raise OSError(f"the feature cache's file has been cut short: expected {kept.nbytes} bytes, got {got}")
        return tensor.to(device)

    def close(self) -> None:
        super().close()
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # it could be opened
            self._file.close()


def _memory_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU that has no gaps."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements in row-major order."""
    return _memory_of(tensor.detach().cpu().contiguous())
