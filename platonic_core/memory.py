"""Uninitialised tensors, in huge pages where the system gives them, and in memory that is used again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["empty", "recycled", "release_recycled"]

_RECYCLED_FROM = 4 << 20  # bytes; below, malloc keeps freed memory itself
_KEPT = 2  # a loss's gradient and a payload come and go in the same step
_ALIGNMENT = 64
_freed: dict[int, np.ndarray] = {}  # by their bytes, the last of that size; at most _KEPT, the last that were freed


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """``torch.empty``, but on the CPU from NumPy, which asks Linux for huge pages.

    Touching 100 MB for the first time then takes 8 ms instead of 36.
    """
    count = 1
    for size in shape:
        count *= size
    if torch.device(device).type != "cpu" or count == 0:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.from_numpy(np.empty(count * dtype.itemsize, np.uint8)).view(dtype).view(tuple(shape))


class _Block:
    """The owner of a block of memory while tensors use it. The last one gone, the block waits for the next request."""

    def __init__(self, memory: np.ndarray, used: int) -> None:
        self._memory = memory
        self.__array_interface__ = memory[:used].__array_interface__

    def __del__(self, freed: dict[int, np.ndarray] = _freed) -> None:  # bound here: globals may be gone at exit
        size = self._memory.nbytes
        freed.pop(size, None)
        freed[size] = self._memory
        for old in list(freed)[:-_KEPT]:
            freed.pop(old, None)  # another thread may have been faster


def recycled(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor, aligned to 64 bytes, in a block that such a tensor of about its size left behind.

    For large tensors that live from one step of training to the next: the system clears every page that it hands out,
    which takes as long as computing a gradient does. Blocks have room for up to an eighth more than was asked for, so
    that payloads, whose sizes vary, find them. Two blocks, the last that were freed, stay allocated;
    :func:`release_recycled` gives them back.
    """
    count = 1
    for size in shape:
        count *= size
    bytes_ = count * dtype.itemsize
    if bytes_ < _RECYCLED_FROM:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    step = 1 << (bytes_.bit_length() - 4)
    room = -(-bytes_ // step) * step
    memory = _freed.pop(room, None)
    if memory is None:
        whole = np.empty(room + _ALIGNMENT, np.uint8)
        start = -whole.ctypes.data % _ALIGNMENT
        memory = whole[start : start + room]
    return torch.from_numpy(np.asarray(_Block(memory, bytes_))).view(dtype).view(tuple(shape))


def release_recycled() -> None:
    """Give the blocks that :func:`recycled` keeps back to the system."""
    _freed.clear()
