"""Which ranges a tensor's levels divide: one of all values, one of every group, or one without the outermost values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from weight_compression import _ops
from weight_compression.config import MIN_GROUP, CompressionConfig
from weight_compression.payload import is_less

__all__ = ["Ranges", "choose_ranges", "group_size_of", "values_cut"]


@dataclass(frozen=True)
class Ranges:
    """The scheme, at first without levels, and what it leaves out.

    Attributes
    ----------
    scheme : Scheme
    escapes : numpy.ndarray or None
        uint32 [blocks], values beyond the range if it is clipped.
    escape_bytes : int
        That these take.
    whole : Scheme or None
        The scheme without clipping.
    """

    scheme: _ops.Scheme
    escapes: np.ndarray | None = None
    escape_bytes: int = 0
    whole: _ops.Scheme | None = None

    def unclipped(self) -> Ranges:
        assert self.whole is not None
        return Ranges(self.whole)

    @property
    def bytes(self) -> int:
        """Of the payload that belong to ranges and escapes."""
        return self.escape_bytes + (0 if self.scheme.ranges is None else self.scheme.ranges.nbytes)


def group_size_of(shape: tuple[int, ...], config: CompressionConfig) -> int:
    """Values of a tensor that share a range, or 0: all."""
    size = config.group_size or 0
    if config.per_channel and len(shape) > 1 and math.prod(shape[1:]) >= MIN_GROUP:
        size = math.prod(shape[1:])
    return size if size < math.prod(shape) else 0


def values_cut(sample: int, config: CompressionConfig) -> int:
    """Values of a sample of so many that its range leaves out at either end."""
    return 0 if config.clip_quantile is None else int((1.0 - config.clip_quantile) * sample / 2.0)


def choose_ranges(
    x: torch.Tensor, sample: torch.Tensor, shape: tuple[int, ...], config: CompressionConfig, lo: float, hi: float
) -> Ranges:
    """The ranges of flat finite x, whose own is lo < hi."""
    whole = _ops.Scheme(lo=lo, hi=hi)
    if size := group_size_of(shape, config):
        return Ranges(_ops.Scheme(lo=lo, hi=hi, group_size=size, ranges=_ops.group_ranges(x, size)))
    if cut := values_cut(sample.numel(), config):
        clipped = _clipped(sample, cut, whole)
        if clipped.clamp:
            escapes = _ops.count_outside(x, clipped.lo, clipped.hi)
            return Ranges(clipped, escapes, int(escapes.sum(dtype=np.int64)) * (2 + x.dtype.itemsize), whole)
    return Ranges(whole)


def _clipped(sample: torch.Tensor, cut: int, whole: _ops.Scheme) -> _ops.Scheme:
    """The sample's range without its `cut` outermost values at either end; the whole where that has no width."""
    bits = sample.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[sample.dtype.itemsize]).numpy()
    # Integers that ascend with the numbers, since comparing those depends on whether the thread flushes denormals.
    # Twice the same: of an integer below 0 all bits but the sign's are inverted.
    inverted = np.iinfo(bits.dtype).max
    order = np.where(bits < 0, bits ^ inverted, bits)
    order.partition((cut, len(order) - 1 - cut))
    ends = order[[cut, len(order) - 1 - cut]]
    values = torch.from_numpy(np.where(ends < 0, ends ^ inverted, ends)).view(sample.dtype)
    lo, hi = (_ops.value_range(value)[0] for value in values.split(1))
    return _ops.Scheme(lo=lo, hi=hi, clamp=True) if is_less(lo, hi) else whole
