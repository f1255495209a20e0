"""Step 3 of *compress* on the CPU: the only place of this room but ``_device_ops.py`` that takes ``data_ptr()``.

Tensors arrive flat and contiguous on the CPU; results that are a few numbers leave as Python numbers. The kernels are
described in ``csrc/weight_compression/codec.h``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from platonic_core import _C
from platonic_core.launch import where

if TYPE_CHECKING:
    from weight_compression.config import CompressionConfig

kernels = _C.weight_compression

BLOCK_SYMBOLS: int = kernels.block_symbols
MAX_LEVELS: int = kernels.max_levels
MAX_CODED_LEVELS: int = kernels.max_coded_levels

# Codes of the payload's header; the first four can be quantised.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How values become symbols.

    Attributes
    ----------
    lo, hi : float
        Range of all values, or what is left of it by `clamp`.
    levels : int
        K, of every range.
    ranges : numpy.ndarray or None
        lo and hi of every run of `group_size` values as the dtype's bits, unsigned [groups, 2].
    group_size : int
    clamp : bool
        Whether there may be values beyond lo and hi, which are stored exactly beside the symbols.
    """

    lo: float
    hi: float
    levels: int = 0
    group_size: int = 0
    ranges: np.ndarray | None = None
    clamp: bool = False

    def with_levels(self, levels: int) -> Scheme:
        # dataclasses.replace takes ten times as long.
        return Scheme(
            lo=self.lo, hi=self.hi, levels=levels, group_size=self.group_size, ranges=self.ranges, clamp=self.clamp
        )

    def fields(self) -> tuple:
        address = 0 if self.ranges is None else self.ranges.ctypes.data
        return self.levels, self.lo, self.hi, self.group_size, address, self.clamp


class Plane(NamedTuple):
    """One byte of every unit of `width` bytes, `shift` bits from the bottom, after rotating the unit left by a bit."""

    width: int
    shift: int
    rotate: bool

    def fields(self) -> tuple:
        return 256, *self


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
    return kernels.value_range(*_values(x), 1.0, 0, where(x)[1])


def range_and_sample(x: torch.Tensor, fraction: float) -> tuple[float, float, bool, torch.Tensor]:
    """The same, and the values that levels are chosen from (FORMAT.md), in new memory."""
    sample = torch.empty(kernels.sample_size(x.numel(), fraction), dtype=x.dtype, device="cpu")
    return *kernels.value_range(*_values(x), fraction, sample.data_ptr(), where(x)[1]), sample


def levels_of_error(scheme: Scheme, dtype: torch.dtype, numel: int, max_error: float) -> int | None:
    """The fewest levels whose bins are at most 2 max_error wide; None if 65,536 do not suffice."""
    return kernels.levels_of_error(DTYPE_CODES[dtype], numel, scheme.fields(), max_error) or None


def error_bound(scheme: Scheme, dtype: torch.dtype, numel: int) -> float:
    """Half a bin of the widest range."""
    return kernels.error_bound(DTYPE_CODES[dtype], numel, scheme.fields())


def add_values(values: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    """out += scale * values, both flat; every operation rounded as when payloads are decoded."""
    kernels.add_values(*_values(out)[:2], values.data_ptr(), out.data_ptr(), scale, where(out)[1])


def group_ranges(x: torch.Tensor, group_size: int) -> np.ndarray:
    """lo and hi of every run of so many values of finite x [n], as the dtype's bits, unsigned [groups, 2]."""
    ranges = np.empty((-(-x.numel() // group_size), 2), f"<u{x.dtype.itemsize}")
    kernels.group_ranges(*_values(x), group_size, ranges.ctypes.data, where(x)[1])
    return ranges


def count_outside(x: torch.Tensor, lo: float, hi: float) -> np.ndarray:
    """uint32 [blocks], how many values of each block of x [n] are below lo or above hi."""
    counts = np.empty(-(-x.numel() // BLOCK_SYMBOLS), np.uint32)
    kernels.count_outside(*_values(x), lo, hi, counts.ctypes.data, where(x)[1])
    return counts


def sample_counts(x: torch.Tensor, sample: torch.Tensor, scheme: Scheme, fraction: float) -> torch.Tensor:
    """int64 [levels], how many values of the sample of x [n] get each symbol."""
    if scheme.ranges is None:
        return symbol_counts(sample, scheme)
    # A value's symbol depends on its group, and that on where it is in x.
    counts = torch.empty(scheme.levels, dtype=torch.int64, device="cpu")
    kernels.sample_counts(*_values(x), scheme.fields(), fraction, counts.data_ptr())
    return counts


def symbol_counts(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """int64 [levels], how many values of x [n] get each symbol."""
    counts = torch.empty(scheme.levels, dtype=torch.int64, device="cpu")
    kernels.symbol_counts(*_values(x), scheme.fields(), counts.data_ptr(), where(x)[1])
    return counts


def plane_counts(units: torch.Tensor, plane: Plane) -> torch.Tensor:
    """int64 [256], how often each byte is in a plane of flat contiguous units."""
    counts = torch.empty(256, dtype=torch.int64, device="cpu")
    kernels.symbol_counts(
        0, units.numel(), units.data_ptr(), plane.fields(), counts.data_ptr(), torch.get_num_threads()
    )
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
    lengths = torch.empty(len(counts), dtype=torch.uint8, device="cpu")
    kernels.code_lengths(len(counts), counts.data_ptr(), lengths.data_ptr())
    return lengths


def pack_lengths(lengths: torch.Tensor) -> bytes:
    """Code lengths in the payload's nibbles."""
    return kernels.pack_lengths(len(lengths), lengths.data_ptr())


def unpack_lengths(packed: bytes, levels: int) -> torch.Tensor | None:
    """The inverse of :func:`pack_lengths`; None unless the bytes give a complete code of exactly `levels` lengths."""
    lengths = torch.empty(levels, dtype=torch.uint8, device="cpu")
    if not kernels.unpack_lengths(packed, levels, lengths.data_ptr()):
        return None
    return lengths if kernels.is_complete_code(levels, lengths.data_ptr()) else None


def encode_blocks(
    x: torch.Tensor, scheme: Scheme, lengths: torch.Tensor | None, escapes: np.ndarray | None, out: torch.Tensor
) -> tuple[int, np.ndarray]:
    """Codes x into `out`, uint8; returns bytes written, -1 if there is not enough room, and the table, uint32 [blocks, 2].

    `escapes` is what :func:`count_outside` found, where the scheme clamps.
    """
    return _encode(_values(x), scheme.fields(), scheme.levels, lengths, escapes, out)


def plan_payload(
    x: torch.Tensor,
    shape: tuple[int, ...],
    scheme: Scheme,
    entropy: float,
    escapes: np.ndarray | None,
    escape_bytes: int,
    sample: torch.Tensor | None,
    fraction: float,
) -> Any:
    """How flat x is stored, quantised by that scheme; None if raw is smaller. x, scheme and escapes have to outlive the plan.

    With a sample the code is made from that: None, then, unless that suffices and is the smallest way.
    """
    address, sampled = (0, 0) if sample is None else (sample.data_ptr(), sample.numel())
    plan = kernels.plan_payload(
        *_values(x), shape, scheme.fields(), entropy, 0 if escapes is None else escapes.ctypes.data, escape_bytes,
        address, sampled, fraction, where(x)[1],
    )  # fmt: skip
    return plan if plan.mode else None


def plan_by_entropy(x: torch.Tensor, shape: tuple[int, ...], config: CompressionConfig) -> Any:
    """From flat x to the plan in one call, where `config` is by entropy alone. None where that is not all there is to do:
    values that are not finite or all equal, or stored raw. x has to outlive the plan."""
    plan = kernels.plan_by_entropy(*_values(x), shape, _by_entropy(config), where(x)[1])
    return plan if plan.mode else None


def _by_entropy(config: CompressionConfig) -> tuple[int, float, float, int]:
    sampled_from = 1 << 62 if config.full_histogram else kernels.sample_coded_from
    return config.entropy_bits, config.floor_bits, config.sample_fraction, sampled_from


def write_payloads(tensors: Sequence[torch.Tensor], config: CompressionConfig, out: torch.Tensor) -> list[int]:
    """Payloads of flat tensors to uint8 `out`, one behind the other, up to the first for which that is not all there is to do
    by entropy alone, or which has not enough room. Returns the bytes of each."""
    quantised = itertools.takewhile(lambda x: x.dtype in DTYPE_CODES, tensors)
    return kernels.write_payloads(
        [_values(x) for x in quantised], _by_entropy(config), out.data_ptr(), out.numel(), torch.get_num_threads()
    )


def write_payload(plan: Any, out: torch.Tensor) -> int:
    """The planned payload, and zeros, to the first `plan.room` bytes of uint8 `out`; returns its bytes, -1 if it takes more."""
    return plan.write(out.data_ptr(), torch.get_num_threads())


def encode_plane(units: torch.Tensor, plane: Plane, lengths: torch.Tensor, out: torch.Tensor) -> tuple[int, np.ndarray]:
    """The same of one plane of flat contiguous units."""
    return _encode((0, units.numel(), units.data_ptr()), plane.fields(), 256, lengths, None, out)


def _encode(
    values: tuple[int, int, int],
    fields: tuple,
    levels: int,
    lengths: torch.Tensor | None,
    escapes: np.ndarray | None,
    out: torch.Tensor,
) -> tuple[int, np.ndarray]:
    table = np.empty((-(-values[1] // BLOCK_SYMBOLS), 2), np.uint32)
    bits = 0 if lengths is not None else kernels.fixed_bits(levels)
    size = kernels.encode_blocks(
        *values, fields, 0 if lengths is None else lengths.data_ptr(), bits,
        0 if escapes is None else escapes.ctypes.data, out.data_ptr(), out.numel(), table.ctypes.data,
        torch.get_num_threads(),
    )  # fmt: skip
    return size, table


def copy_plane(units: torch.Tensor, plane: Plane, out: torch.Tensor) -> np.ndarray:
    """Writes a plane's bytes to uint8 `out` [n]; returns their table, uint32 [blocks, 2]."""
    table = np.empty((-(-units.numel() // BLOCK_SYMBOLS), 2), np.uint32)
    kernels.copy_plane(
        units.numel(), units.data_ptr(), plane.fields(), out.data_ptr(), table.ctypes.data, torch.get_num_threads()
    )
    return table


@dataclass(frozen=True)
class Blocks:
    """Stored blocks: uint8 data, whose sizes the contiguous table, uint32 [blocks, 2], adds up to."""

    data: np.ndarray
    table: np.ndarray
    escapes: np.ndarray | None = None


def decode_blocks(
    blocks: Blocks,
    scheme: Scheme,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    accumulate: bool,
    scale: float,
    check: bool,
) -> tuple[int, int]:
    """Decodes into flat `out`; returns (0 ok, 1 checksum, 2 malformed) and a block that failed."""
    dtype, n, address = _values(out)
    bits = 0 if lengths is not None else kernels.fixed_bits(scheme.levels)
    return kernels.decode_blocks(
        blocks.data.ctypes.data, blocks.data.size, blocks.table.ctypes.data,
        0 if blocks.escapes is None else blocks.escapes.ctypes.data, n, scheme.fields(),
        0 if lengths is None else lengths.data_ptr(), bits, dtype, address, accumulate, scale, check, where(out)[1],
    )  # fmt: skip


def decode_payload(data: np.ndarray, out: torch.Tensor, accumulate: bool, scale: float, check: bool) -> bool:
    """A whole payload, uint8 [bytes], into contiguous `out` of its shape and dtype, if it is of a kind made by default.

    False if it is not, or anything is wrong with it: `out` is then unspecified, but nothing has been added unless checksums were
    right or not compared.
    """
    if out.dtype not in DTYPE_CODES:
        return False
    return kernels.decode_payload(
        data.ctypes.data, data.size, out.shape, out.numel(), DTYPE_CODES[out.dtype], out.data_ptr(), accumulate,
        scale, check, where(out)[1],
    )  # fmt: skip


def decode_payloads(
    data: torch.Tensor, sizes: Sequence[int], outs: Sequence[torch.Tensor], accumulate: bool, scale: float
) -> int:
    """Payloads of so many bytes, one behind the other in uint8 `data`, into flat `outs`, as :func:`decode_payload` with checks.

    Returns how many were decoded before the first of which that is False.
    """
    if min(sizes, default=0) < 0 or sum(sizes) > data.numel() or len(sizes) != len(outs):
        raise ValueError(f"expected {len(outs)} sizes >= 0 that sum to at most {data.numel()}, got {list(sizes)}")
    return kernels.decode_payloads(
        data.data_ptr(), sizes, [_values(x) for x in outs], accumulate, scale, True, torch.get_num_threads()
    )


def decode_planes(
    planes: list[tuple[Blocks | None, torch.Tensor | None, int]], rotate: bool, out: torch.Tensor, check: bool
) -> tuple[int, int]:
    """Units from their planes, the top first: each (blocks, code lengths, 0), (blocks, None, 0) as they are or
    (None, None, the byte that all have). Returns as :func:`decode_blocks`; the block counts through all planes."""
    described = [
        (0, 0, 0, 0, value) if blocks is None else
        (blocks.data.ctypes.data, blocks.data.size, blocks.table.ctypes.data,
         0 if lengths is None else lengths.data_ptr(), 0)
        for blocks, lengths, value in planes
    ]  # fmt: skip
    return kernels.decode_planes(described, out.numel(), rotate, out.data_ptr(), check, torch.get_num_threads())


def checksum_blocks(data: np.ndarray, block_bytes: int) -> np.ndarray:
    """Table, uint32 [blocks, 2], of uint8 data cut into blocks of so many bytes."""
    table = np.empty((-(-data.size // block_bytes), 2), np.uint32)
    kernels.checksum_blocks(data.ctypes.data, data.size, block_bytes, table.ctypes.data, torch.get_num_threads())
    return table


def crc32c(data: np.ndarray) -> int:
    """CRC32C of uint8 data."""
    return kernels.crc32c(data.ctypes.data, data.size)
