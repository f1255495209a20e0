"""Large temporaries of *fit*."""

from __future__ import annotations

from torch import Tensor

from platonic_core.memory import empty

__all__ = ["empty_rows", "rows_together"]


def rows_together(most: int, like: Tensor) -> int:
    """How many rows to take in one step: `most`, which keeps a step in a CPU's cache; elsewhere many more."""
    return most if like.device.type == "cpu" else 256 * most


def empty_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """An uninitialised matrix of the dtype and device of `like`."""
    return empty((rows, columns), like.dtype, like.device)
