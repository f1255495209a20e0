"""Which ranges a tensor's levels divide: one of all values, one of every group, or one without the outermost values."""

from __future__ import annotations

import math

import numpy as np
import torch

from weight_compression import _ops
from weight_compression.config import CompressionConfig
from weight_compression.payload import is_less

__all__ = ["choose_ranges", "half_width"]


def choose_ranges(
    x: torch.Tensor, sample: torch.Tensor, shape: tuple[int, ...], config: CompressionConfig, lo: float, hi: float
) -> _ops.Scheme:
    """The scheme, still without levels, of flat finite x whose range is lo < hi."""
    whole = _ops.Scheme(lo=lo, hi=hi)
    size = config.group_size or 0
    if config.per_channel and len(shape) > 1:
        size = math.prod(shape[1:])
    if 0 < size < x.numel():
        return _ops.Scheme(lo=lo, hi=hi, group_size=size, ranges=_ops.group_ranges(x, size))
    if config.clip_quantile is not None:
        return _clipped(sample, config.clip_quantile, whole)
    return whole


def _clipped(sample: torch.Tensor, quantile: float, whole: _ops.Scheme) -> _ops.Scheme:
    """The sample's range without its outermost values; the whole where that has no width."""
    bits = sample.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[sample.dtype.itemsize]).numpy()
    # Integers that ascend with the numbers, since comparing those depends on whether the thread flushes denormals.
    # Twice the same: of an integer below 0 all bits but the sign's are inverted.
    inverted = np.iinfo(bits.dtype).max
    order = np.where(bits < 0, bits ^ inverted, bits)
    cut = int((1.0 - quantile) * len(order) / 2.0)
    if cut == 0:
        return whole
    order.partition((cut, len(order) - 1 - cut))
    ends = order[[cut, len(order) - 1 - cut]]
    values = torch.from_numpy(np.where(ends < 0, ends ^ inverted, ends)).view(sample.dtype)
    lo, hi = (_ops.value_range(value)[0] for value in values.split(1))
    return _ops.Scheme(lo=lo, hi=hi, clamp=True) if is_less(lo, hi) else whole


def half_width(scheme: _ops.Scheme, dtype: torch.dtype) -> float:
    """Half the widest range that the levels divide."""
    if scheme.ranges is None:
        return scheme.hi / 2 - scheme.lo / 2
    ranges = torch.from_numpy(scheme.ranges.view(f"<i{dtype.itemsize}").copy()).view(dtype).double()
    return float((ranges[:, 1] / 2 - ranges[:, 0] / 2).max())
