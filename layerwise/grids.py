"""Layers of heads on images (B, C, H, W), volumes (B, C, D, H, W) and rows (B, C, 1, L)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["FORMS", "Pool", "average", "average_cells", "batch_norm", "convolution", "is_grid", "pooled"]

FORMS = "features (B, C), tokens (B, T, C), images (B, C, H, W) or volumes (B, C, D, H, W)"

_CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_AVERAGES: dict[int, Any] = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_CELLS: dict[int, Any] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
_POOLS: dict[int, Any] = {2: nn.functional.adaptive_avg_pool2d, 3: nn.functional.adaptive_avg_pool3d}


def is_grid(x: Tensor) -> bool:
    """Whether `x` has channels at two or three axes of positions."""
    return x.dim() - 2 in _CONVOLUTIONS


class Pool(nn.Module):
    """Mean over a grid of at most `size` cells a side; what is smaller already stays."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if not is_grid(x):
            raise ValueError(f"expected images (B, C, H, W) or volumes (B, C, D, H, W), got {tuple(x.shape)}")
        return _POOLS[x.dim() - 2](x, [min(self.size, side) for side in x.shape[2:]])

    def extra_repr(self) -> str:
        return str(self.size)


def pooled(sides: Sequence[int], size: int) -> int:
    """Cells of :class:`Pool`'s grid."""
    return math.prod(min(size, side) for side in sides)


def convolution(
    entering: int, leaving: int, sides: Sequence[int], *, stride: int = 1, padding: bool = True, bias: bool = False
) -> tuple[nn.Module, list[int]]:
    """A convolution of three cells a side on positions of these sides, and the sides of what it gives. Along a side of one cell,
    where others are longer, its kernel has one cell too."""
    kernel = [1 if side == 1 < max(sides) else 3 for side in sides]
    pad = [k // 2 if padding else 0 for k in kernel]
    given = [(side + 2 * p - k) // stride + 1 for side, p, k in zip(sides, pad, kernel, strict=True)]
    made = _CONVOLUTIONS[len(sides)](entering, leaving, tuple(kernel), stride=stride, padding=tuple(pad), bias=bias)
    return made, given


def batch_norm(channels: int, sides: Sequence[int]) -> nn.Module:
    return _NORMS[len(sides)](channels)


def average(sides: Sequence[int]) -> nn.Module:
    """Means over a grid of so many cells a side."""
    return _AVERAGES[len(sides)](tuple(sides))


def average_cells(cell: Sequence[int]) -> nn.Module:
    """Means over cells of these sides; the last ones may be cut off."""
    return _CELLS[len(cell)](tuple(cell), ceil_mode=True)
