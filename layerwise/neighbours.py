"""Redundant samples: those whose nearest neighbours are all of their own class (thesis, section 5.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch

__all__ = ["k_redundancy"]

_CHUNK = 1024  # samples whose distances to all others are held at once


@overload
def k_redundancy(Z: Any, y: Any, k: int) -> float: ...
@overload
def k_redundancy(Z: Any, y: Any, k: Sequence[int]) -> list[float]: ...
def k_redundancy(Z: Any, y: Any, k: int | Sequence[int]) -> float | list[float]:
    """Share of the samples whose k nearest neighbours all have their class (thesis, definition 8); of several k a list.

    Neighbours are by Euclidean distance between the flattened rows of Z (m, ...), without the sample itself. Where some are
    equally far, all of them have to be of the sample's class.
    """
    rows, y = torch.as_tensor(Z).detach().flatten(1).double(), torch.as_tensor(y)
    ks = [k] if isinstance(k, int) else list(k)
    for each in ks:
        if not 1 <= each < len(rows):
            raise ValueError(f"k: expected numbers from 1 to below the {len(rows)} samples, got {each}")
    rows = rows - rows.mean(0)
    half = rows.square().sum(1) / 2
    closer = []  # than the nearest of another class
    for begin in range(0, len(rows), _CHUNK):
        near = rows[begin : begin + _CHUNK] @ rows.T - half  # larger is nearer
        near.diagonal(begin).fill_(-torch.inf)
        same = y[begin : begin + _CHUNK, None] == y
        other = near.masked_fill(same, -torch.inf).amax(1, keepdim=True)
        closer.append((same & (near > other)).sum(1))
    counts = torch.cat(closer)
    shares = [float((counts >= each).double().mean()) for each in ks]
    return shares[0] if isinstance(k, int) else shares
