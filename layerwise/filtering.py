"""Samples that a window need not see: k-filtering and loss filtering (thesis, sections 5.4 and 6.8)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from layerwise.feednet import Batch

__all__ = ["Filter", "k_redundancy"]

_CHUNK = 1024  # samples whose distances to all others are held at once


@runtime_checkable
class Filter(Protocol):
    """Something that thins out the batches that reach a window."""

    def apply(self, stream: Iterator[Batch], epoch: int) -> Iterator[Batch]:
        """The batches that are left in the window's `epoch`-th epoch, counted from 0."""


def k_redundancy(Z: Tensor, y: Tensor, k: int) -> float:
    """Share of the samples whose k nearest neighbours all have their class (thesis, definition 8).

    Neighbours are by Euclidean distance between the flattened rows of Z (N, ...), without the sample itself.
    """
    rows = Z.detach().flatten(1)
    if not 1 <= k < len(rows):
        raise ValueError(f"k: expected a number from 1 to below the {len(rows)} samples, got {k}")
    rows = rows - rows.mean(0)
    half = rows.square().sum(1) / 2
    redundant = 0
    for begin in range(0, len(rows), _CHUNK):
        chunk = rows[begin : begin + _CHUNK]
        near = chunk @ rows.T - half  # larger is nearer
        near.diagonal(begin).fill_(-torch.inf)
        neighbours = near.topk(k, 1).indices
        redundant += int((y[neighbours] == y[begin : begin + _CHUNK, None]).all(1).sum())
    return redundant / len(rows)
