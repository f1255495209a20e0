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
from weight_compression.payload import DTYPES

kernels = _C.weight_compression

_BY_ENTROPY, _GIVEN, _BY_ERROR = 0, 1, 2  # LevelRule of the kernels


def _rule(config: CompressionConfig) -> tuple[int, float]:
    if config.bits is not None:
        return _GIVEN, kernels.levels_of_bits(config.bits)
    if config.max_error is not None:
        return _BY_ERROR, config.max_error
    if config.gradient_rms is not None:
        return _GIVEN, kernels.levels_of_bits(kernels.exact_log2(config.gradient_rms + 1.0) + config.floor_bits)
    return _BY_ENTROPY, config.floor_bits


def compress(
    x: torch.Tensor, shape: tuple[int, ...], quantise: bool, config: CompressionConfig, out: torch.Tensor
) -> torch.Tensor:
    """Writes the payload of flat contiguous x to uint8 `out`, large enough for any; returns its size, int64 [], or -1.

    -1: x holds NaN or infinity, and the configuration does not keep those.
    """
    try_sample = x.numel() >= _ops.kernels.sample_coded_from and not config.full_histogram
    size = torch.empty((), dtype=torch.int64, device=x.device)
    scratch = torch.empty(
        kernels.compress_scratch_bytes(x.element_size(), x.numel()), dtype=torch.uint8, device=x.device
    )
    kernels.compress_on_device(
        DTYPES.index(x.dtype), x.element_size(), x.numel(), x.data_ptr(), list(shape), quantise,
        config.nonfinite == "raw", *_rule(config), config.entropy_bits, config.sample_fraction, try_sample, out.data_ptr(),
        size.data_ptr(), scratch.data_ptr(), *where(x),
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
