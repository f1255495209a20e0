"""Step 3 of *compress* on the CPU: the only place of this room but ``_device_ops.py`` that takes ``data_ptr()``.

Tensors arrive flat and contiguous on the CPU; results that are a few numbers leave as Python numbers. The kernels are
described in ``csrc/weight_compression/codec.h``.
"""

from __future__ import annotations

import numpy as np
import torch

from platonic_core import _C
from platonic_core.launch import where

kernels = _C.weight_compression

BLOCK_SYMBOLS: int = kernels.block_symbols
MAX_LEVELS: int = kernels.max_levels
MAX_CODED_LEVELS: int = kernels.max_coded_levels

# Codes of the payload's header; the first four can be quantised.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def _values(x: torch.Tensor) -> tuple[int, int, int]:
    if x.dtype not in DTYPE_CODES:
        raise TypeError(f"expected values of {', '.join(map(str, DTYPE_CODES))}, got {x.dtype}")
    if x.device.type != "cpu":
        raise NotImplementedError(
            f"expected a tensor on the CPU, where this is computed, got one on {x.device}: move it with .cpu()"
        )
    if x.ndim != 1 or not x.is_contiguous():
        raise ValueError(f"expected a flat contiguous tensor, got shape {tuple(x.shape)}, strides {x.stride()}")
    return DTYPE_CODES[x.dtype], x.numel(), x.data_ptr()


def value_range(x: torch.Tensor) -> tuple[float, float, bool]:
    """(smallest, largest, whether all are finite) of x [n], n >= 1."""
    return kernels.value_range(*_values(x), where(x)[1])


def sample_counts(x: torch.Tensor, lo: float, hi: float, bins: int, fraction: float) -> list[int]:
    """Histogram of the sample of x [n] that its entropy is estimated from, in `bins` equal bins of [lo, hi]."""
    return kernels.sample_counts(*_values(x), lo, hi, bins, fraction)


def symbol_counts(x: torch.Tensor, lo: float, hi: float, levels: int) -> torch.Tensor:
    """int64 [levels], how many values of x [n] fall into each bin."""
    counts = torch.empty(levels, dtype=torch.int64)
    kernels.symbol_counts(*_values(x), lo, hi, levels, counts.data_ptr(), where(x)[1])
    return counts


def code_lengths(counts: torch.Tensor) -> torch.Tensor:
    """uint8 [levels], lengths in bits of the optimal prefix code under the format's limit for int64 counts [levels].

    0 for symbols that do not occur. At least two have to, and at most 4,096 levels are coded.
    """
    if counts.dtype != torch.int64 or counts.ndim != 1 or not 2 <= len(counts) <= MAX_CODED_LEVELS:
        raise ValueError(
            f"code_lengths: expected int64 counts of 2 to {MAX_CODED_LEVELS} symbols, got {counts.dtype} of shape "
            f"{tuple(counts.shape)}"
        )
    if int((counts > 0).sum()) < 2 or int((counts < 0).sum()) > 0:
        raise ValueError("code_lengths: expected counts >= 0, at least two of them > 0")
    counts = counts.contiguous()
    lengths = torch.empty(len(counts), dtype=torch.uint8)
    kernels.code_lengths(len(counts), counts.data_ptr(), lengths.data_ptr())
    return lengths


def pack_lengths(lengths: torch.Tensor) -> bytes:
    """Code lengths in the payload's nibbles."""
    return kernels.pack_lengths(len(lengths), lengths.data_ptr())


def unpack_lengths(packed: bytes, levels: int) -> torch.Tensor | None:
    """The inverse of :func:`pack_lengths`; None unless the bytes give a complete code of exactly `levels` lengths."""
    lengths = torch.empty(levels, dtype=torch.uint8)
    if not kernels.unpack_lengths(packed, levels, lengths.data_ptr()):
        return None
    return lengths if kernels.is_complete_code(levels, lengths.data_ptr()) else None


def encode_blocks(
    x: torch.Tensor, lo: float, hi: float, levels: int, lengths: torch.Tensor | None, out: torch.Tensor
) -> tuple[int, np.ndarray]:
    """Codes x into `out` (uint8, large enough); returns bytes written and the table, uint32 [blocks, 2]."""
    table = np.empty((-(-x.numel() // BLOCK_SYMBOLS), 2), np.uint32)
    bits = 0 if lengths is not None else kernels.fixed_bits(levels)
    size = kernels.encode_blocks(
        *_values(x), lo, hi, levels, 0 if lengths is None else lengths.data_ptr(), bits, out.data_ptr(), out.numel(),
        table.ctypes.data, where(x)[1],
    )  # fmt: skip
    return size, table


def decode_blocks(
    data: np.ndarray,
    table: np.ndarray,
    lo: float,
    hi: float,
    levels: int,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    accumulate: bool,
    scale: float,
    check: bool,
) -> tuple[int, int]:
    """Decodes uint8 data into flat `out`; returns (0 ok, 1 checksum, 2 malformed) and a block that failed.

    The table's sizes add up to the data's.
    """
    dtype, n, address = _values(out)
    bits = 0 if lengths is not None else kernels.fixed_bits(levels)
    return kernels.decode_blocks(
        data.ctypes.data, data.size, table.ctypes.data, n, lo, hi, levels,
        0 if lengths is None else lengths.data_ptr(), bits, dtype, address, accumulate, scale, check, where(out)[1],
    )  # fmt: skip


def checksum_blocks(data: np.ndarray, block_bytes: int) -> np.ndarray:
    """Table, uint32 [blocks, 2], of uint8 data cut into blocks of so many bytes."""
    table = np.empty((-(-data.size // block_bytes), 2), np.uint32)
    kernels.checksum_blocks(data.ctypes.data, data.size, block_bytes, table.ctypes.data, torch.get_num_threads())
    return table


def crc32c(data: np.ndarray) -> int:
    """CRC32C of uint8 data."""
    return kernels.crc32c(data.ctypes.data, data.size)
