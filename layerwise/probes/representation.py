"""What enters every measure: a representation Z of samples and their labels y, checked once, and made rows of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerwise.grids import FORMS, Pool, is_grid

__all__ = ["as_features", "check_samples"]

_MOST_CLASSES = 1 << 16


def check_samples(Z: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Z (N, ...) and y (N,) as tensors on Z's device; y int64.

    Raises
    ------
    ValueError
        If there are no samples, the numbers of rows differ, Z is not finite, or y is not one class number, from 0, a sample.
    TypeError
        If Z is not of floating point or y not of integers.
    """
    Z, y = torch.as_tensor(Z), torch.as_tensor(y)
    if not Z.is_floating_point():
        raise TypeError(f"Z: expected floating-point numbers, got {Z.dtype}; convert with .float()")
    if Z.dim() < 2 or 0 in Z.shape:
        raise ValueError(f"Z: expected {FORMS}, none of size 0, got {tuple(Z.shape)}")
    if y.shape != Z.shape[:1]:
        raise ValueError(f"y: expected one label for each of {Z.shape[0]} samples, got shape {tuple(y.shape)}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y: expected class numbers, got {y.dtype}; convert with .long()")
    if not torch.isfinite(Z).all():
        raise ValueError("Z: expected finite numbers, got infinities or NaN; the network, or its data, is out of range")
    y = y.to(Z.device, torch.int64)
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= _MOST_CLASSES:
        raise ValueError(f"y: expected class numbers from 0 to below {_MOST_CLASSES}, got {low} to {high}")
    return Z.detach(), y


def as_features(Z: Tensor, pool: int | None) -> Tensor:
    """Z as rows (N, p).

    Parameters
    ----------
    Z : Tensor
        Features (N, C), tokens (N, T, C), images (N, C, H, W) or volumes (N, C, D, H, W); a sequence (N, C, L) as an
        image of one row, ``Z.unsqueeze(2)``.
    pool : int or None
        None: everything is flattened. A number: images are averaged over a grid of at most so many cells a side and then
        flattened; tokens are averaged.

    Raises
    ------
    ValueError
        If Z has a form that cannot be pooled, or `pool` is no positive number.
    """
    if pool is None or Z.dim() == 2:
        return Z.flatten(1)
    if pool < 1:
        raise ValueError(f"pool: expected None or a positive number, got {pool}")
    if Z.dim() == 3:
        return Z.mean(1)
    if is_grid(Z):
        return Pool(pool)(Z).flatten(1)
    raise ValueError(f"Z: cannot average {tuple(Z.shape)} over a grid; pool=None flattens it")
