"""What ``_ops.py`` is on the CPU, for whole payloads on a CUDA device: the only other place that takes ``data_ptr()``.

Everything is queued on the stream that torch uses; nothing waits for the device. See
``csrc/weight_compression/device_codec.h``.
"""

from __future__ import annotations

import torch

from platonic_core import _C
from platonic_core.launch import where
from weight_compression import _ops
from weight_compression.config import CompressionConfig
from weight_compression.payload import DTYPES, unit_width
from weight_compression.planes import SAMPLED
from weight_compression.ranges import group_size_of, values_cut

kernels = _C.weight_compression

_BY_ENTROPY, _GIVEN, _BY_ERROR, _BY_RATIO = 0, 1, 2, 3  # LevelRule of the kernels
_EXACT, _QUANTISED, _PLANES = 0, 1, 2  # Way


def _rule(config: CompressionConfig) -> tuple[int, float]:
    if config.bits is not None:
        return _GIVEN, kernels.levels_of_bits(config.bits)
    if config.max_error is not None:
        return _BY_ERROR, config.max_error
    if config.ratio is not None:
        return _BY_RATIO, config.ratio
    if config.gradient_rms is not None:
        return _GIVEN, kernels.levels_of_bits(kernels.exact_log2(config.gradient_rms + 1.0) + config.floor_bits)
    return _BY_ENTROPY, config.floor_bits


def compress(x: torch.Tensor, shape: tuple[int, ...], config: CompressionConfig, out: torch.Tensor) -> torch.Tensor:
    """Writes the payload of flat contiguous x to uint8 `out`, large enough for any; returns its size, int64 [], or -1.

    -1: x holds NaN or infinity, and the configuration does not keep those.
    """
    kind = DTYPES.index(x.dtype), x.element_size(), x.numel()
    way, group_size, cut, try_sample = _EXACT, 0, 0, False
    if config.lossless and x.numel() > 1:
        way = _PLANES
        try_sample = x.numel() * x.element_size() // unit_width(x.dtype) >= SAMPLED
    elif x.dtype in _ops.DTYPE_CODES and x.numel() > 0 and not config.lossless:
        way, group_size = _QUANTISED, group_size_of(shape, config)
        cut = values_cut(_ops.kernels.sample_size(x.numel(), config.sample_fraction), config)
        enough = x.numel() >= _ops.kernels.sample_coded_from
        try_sample = enough and config.ratio is None and not config.full_histogram
    size = torch.empty((), dtype=torch.int64, device=x.device)
    room = kernels.compress_scratch_bytes(*kind, way, group_size, cut)
    scratch = torch.empty(room, dtype=torch.uint8, device=x.device)
    kernels.compress_on_device(
        *kind, x.data_ptr(), list(shape), way, group_size, cut, config.nonfinite == "raw", *_rule(config),
        config.entropy_bits, config.sample_fraction, try_sample, out.data_ptr(), size.data_ptr(), scratch.data_ptr(),
        *where(x),
    )  # fmt: skip
    return size


def decompress(payload: torch.Tensor, out: torch.Tensor, accumulate: bool, scale: float, check: bool) -> torch.Tensor:
    """Decodes a payload, uint8 [bytes], into contiguous `out`; returns int32 [], 0 if it is one of such a tensor."""
    status = torch.empty((), dtype=torch.int32, device=out.device)
    kind = DTYPES.index(out.dtype), out.element_size(), out.numel()
    scratch = torch.empty(kernels.decompress_scratch_bytes(*kind), dtype=torch.uint8, device=out.device)
    kernels.decompress_on_device(
        payload.data_ptr(), payload.numel(), *kind, out.data_ptr(),
        list(out.shape), accumulate, scale, check, status.data_ptr(), scratch.data_ptr(), *where(out),
    )  # fmt: skip
    return status
