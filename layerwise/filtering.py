"""Samples that a window need not see: k-filtering and loss filtering (thesis, sections 5.4 and 6.8)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from layerwise.feednet import Batch

__all__ = ["Filter"]


@runtime_checkable
class Filter(Protocol):
    """Something that thins out the batches that reach a window."""

    def apply(self, stream: Iterator[Batch], epoch: int) -> Iterator[Batch]:
        """The batches that are left in the window's `epoch`-th epoch, counted from 0."""
