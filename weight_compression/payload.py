"""Step 4 of *compress*: the bytes of one tensor, as FORMAT.md lays them out. Every field is checked before it is used."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from weight_compression import _ops
from weight_compression.errors import (
    BadChecksumError,
    BadCodeError,
    BadHeaderError,
    BadMagicError,
    BadOffsetError,
    BadShapeError,
    TruncatedError,
    UnsupportedVersionError,
)

__all__ = [
    "DTYPES",
    "RAW_BLOCK_BYTES",
    "Header",
    "Mode",
    "header_size",
    "is_less",
    "parse_header",
    "peek",
    "write_header",
]

MAGIC = b"PLWC"
VERSION = 0
RAW_BLOCK_BYTES = 1 << 18
MAX_NUMEL = 1 << 40
MAX_DIMENSIONS = 64

_START = struct.Struct("<4sBBBBQ")  # magic, version, mode, dtype, dimensions, bytes of the payload
_QUANTISED = struct.Struct("<ddIfHH")  # lo, hi, levels, entropy, bytes of the code lengths, 0

# dtype by code. The first four can be quantised; all can be stored exactly.
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


class Mode(IntEnum):
    RAW = 0
    CONSTANT = 1
    FIXED = 2
    ENTROPY = 3


@dataclass(frozen=True)
class Header:
    """What a payload says of itself before its data begins.

    Attributes
    ----------
    mode, dtype, shape
        How the tensor is stored, and what it is.
    total : int
        Bytes of the whole payload.
    data : int
        Where the blocks begin.
    table : numpy.ndarray
        uint32 [blocks, 2], bytes and CRC32C of every block.
    value : bytes
        The element's bytes in mode CONSTANT.
    lo, hi, levels, entropy
        The quantiser, and the entropy of the sample that it was chosen by, in bits.
    lengths : torch.Tensor or None
        uint8 [levels], code lengths in mode ENTROPY.
    """

    mode: Mode
    dtype: torch.dtype
    shape: tuple[int, ...]
    total: int
    data: int
    table: np.ndarray
    value: bytes = b""
    lo: float = 0.0
    hi: float = 0.0
    levels: int = 0
    entropy: float = 0.0
    lengths: torch.Tensor | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def block_count(mode: Mode, numel: int, itemsize: int) -> int:
    if mode == Mode.CONSTANT:
        return 0
    if mode == Mode.RAW:
        return -(-numel * itemsize // RAW_BLOCK_BYTES)
    return -(-numel // _ops.BLOCK_SYMBOLS)


def header_size(mode: Mode, dimensions: int, blocks: int, length_bytes: int = 0) -> int:
    """Bytes before the data, of a mode other than CONSTANT."""
    own = 0 if mode == Mode.RAW else _QUANTISED.size + length_bytes
    return _START.size + 8 * dimensions + own + 8 * blocks + 4


def write_header(
    mode: Mode,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    table: np.ndarray,
    *,
    value: bytes = b"",
    lo: float = 0.0,
    hi: float = 0.0,
    levels: int = 0,
    entropy: float = 0.0,
    packed_lengths: bytes = b"",
) -> np.ndarray:
    """The header as uint8, its checksum at its end."""
    own = len(value) if mode == Mode.CONSTANT else header_size(mode, 0, 0, len(packed_lengths)) - _START.size - 4
    total = _START.size + 8 * len(shape) + own + 8 * len(table) + 4 + int(table[:, 0].sum(dtype=np.uint64))
    parts = [_START.pack(MAGIC, VERSION, mode, DTYPES.index(dtype), len(shape), total)]
    parts.append(struct.pack(f"<{len(shape)}Q", *shape))
    if mode == Mode.CONSTANT:
        parts.append(value)
    elif mode != Mode.RAW:
        parts += [_QUANTISED.pack(lo, hi, levels, entropy, len(packed_lengths), 0), packed_lengths]
    parts.append(table.astype("<u4").tobytes())
    body = b"".join(parts)
    checksum = _ops.crc32c(np.frombuffer(body, np.uint8))
    return np.frombuffer(body + struct.pack("<I", checksum), np.uint8)


class _Reader:
    """Takes fields off bytes, none beyond their end."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def take(self, size: int, what: str) -> bytes:
        if size > self.data.size - self.at:
            raise TruncatedError(f"expected {size} bytes of {what} at byte {self.at}, got {self.data.size - self.at}")
        self.at += size
        return self.data[self.at - size : self.at].tobytes()


def parse_header(data: np.ndarray, *, whole: bool = True) -> Header:
    """The header at the beginning of uint8 `data`; with `whole`, the data must be the payload and nothing more.

    Raises
    ------
    PayloadError
        One of its subclasses says what is wrong.
    """
    reader = _Reader(data)
    if data.size < len(MAGIC) or data[: len(MAGIC)].tobytes() != MAGIC:
        if MAGIC.startswith(data[: len(MAGIC)].tobytes()):
            raise TruncatedError(f"expected a payload of at least {_START.size} bytes, got {data.size}")
        raise BadMagicError(f"expected a payload to begin with {MAGIC!r}, got {data[:4].tobytes()!r}")
    _, version, mode_code, dtype_code, dimensions, total = _START.unpack(reader.take(_START.size, "header"))
    if version != VERSION:
        raise UnsupportedVersionError(f"expected format version {VERSION}, got {version}")
    if mode_code not in list(Mode):
        raise BadHeaderError(f"expected a mode of 0 to {max(Mode)}, got {mode_code}")
    if dtype_code >= len(DTYPES):
        raise BadHeaderError(f"expected a dtype code below {len(DTYPES)}, got {dtype_code}")
    if total > data.size or (whole and total != data.size):
        raise TruncatedError(f"expected {total} bytes as the header says, got {data.size}")
    mode, dtype = Mode(mode_code), DTYPES[dtype_code]
    reader.data = data[:total]
    if dimensions > MAX_DIMENSIONS:
        raise BadShapeError(f"expected at most {MAX_DIMENSIONS} dimensions, got {dimensions}")
    shape = struct.unpack(f"<{dimensions}Q", reader.take(8 * dimensions, "shape"))
    numel = math.prod(shape)
    if math.prod(size for size in shape if size > 0) > MAX_NUMEL:
        raise BadShapeError(f"expected at most {MAX_NUMEL} elements, got shape {shape}")
    fields, packed = _parse_mode(reader, mode, dtype, numel)
    table = reader.take(8 * block_count(mode, numel, dtype.itemsize), "block table")
    end = reader.at
    (checksum,) = struct.unpack("<I", reader.take(4, "header checksum"))
    actual = _ops.crc32c(data[:end])
    if actual != checksum:
        raise BadChecksumError(f"header: expected checksum {checksum:08x}, got {actual:08x}")
    blocks = np.frombuffer(table, "<u4").astype(np.uint32).reshape(-1, 2)
    _check_blocks(blocks, total - reader.at, mode, numel, dtype.itemsize, fields.get("levels", 0))
    if mode == Mode.ENTROPY:
        lengths = _ops.unpack_lengths(packed, fields["levels"])
        if lengths is None:
            raise BadCodeError(
                f"expected the {fields['levels']} lengths of a complete prefix code in {len(packed)} bytes"
            )
        fields["lengths"] = lengths
    return Header(mode=mode, dtype=dtype, shape=shape, total=total, data=reader.at, table=blocks, **fields)


def peek(payload: torch.Tensor) -> tuple[torch.dtype, torch.Size] | None:
    """What tensor a payload anywhere seems to be, from its first bytes alone; None if it cannot be one."""
    head = payload[: _START.size + 8 * MAX_DIMENSIONS].cpu().numpy().tobytes()
    if len(head) < _START.size:
        return None
    magic, _, _, dtype, dimensions, total = _START.unpack_from(head)
    end = _START.size + 8 * dimensions
    if magic != MAGIC or dtype >= len(DTYPES) or dimensions > MAX_DIMENSIONS or total != len(payload) or end > total:
        return None
    shape = struct.unpack_from(f"<{dimensions}Q", head, _START.size)
    if math.prod(size for size in shape if size > 0) > MAX_NUMEL:
        return None
    return DTYPES[dtype], torch.Size(shape)


def _parse_mode(reader: _Reader, mode: Mode, dtype: torch.dtype, numel: int) -> tuple[dict, bytes]:
    if mode == Mode.RAW:
        return {}, b""
    if mode == Mode.CONSTANT:
        if numel == 0:
            raise BadHeaderError(f"expected a constant of at least one element, got shape of {numel}")
        return {"value": reader.take(dtype.itemsize, "constant")}, b""
    lo, hi, levels, entropy, length_bytes, zero = _QUANTISED.unpack(reader.take(_QUANTISED.size, "quantiser"))
    if dtype not in _ops.DTYPE_CODES or numel == 0:
        raise BadHeaderError(f"expected {mode.name.lower()} mode of floating point values, got {numel} of {dtype}")
    if not (math.isfinite(lo) and math.isfinite(hi) and is_less(lo, hi)):
        raise BadHeaderError(f"expected finite lo < hi, neither of them -0, got {lo} and {hi}")
    if not (_is_exact(lo, dtype) and _is_exact(hi, dtype)):
        raise BadHeaderError(f"expected lo and hi that are values of {dtype}, got {lo} and {hi}")
    most = _ops.MAX_CODED_LEVELS if mode == Mode.ENTROPY else _ops.MAX_LEVELS
    if not 2 <= levels <= most:
        raise BadHeaderError(f"expected 2 to {most} levels, got {levels}")
    if not (0 <= entropy <= 64) or zero != 0 or (mode == Mode.FIXED and length_bytes != 0):
        raise BadHeaderError(f"expected an entropy and reserved zeros, got {entropy}, {zero}, {length_bytes}")
    packed = reader.take(length_bytes, "code lengths")
    return {"lo": lo, "hi": hi, "levels": levels, "entropy": entropy}, packed


def is_less(lo: float, hi: float) -> bool:
    """lo < hi for finite numbers but -0, compared as the integers of their bits: a thread may flush denormals."""
    a, b = struct.unpack("<qq", struct.pack("<dd", lo, hi))
    smallest = -(1 << 63)
    if smallest in (a, b):
        return False
    return (a if a >= 0 else smallest - a) < (b if b >= 0 else smallest - b)


# Digits of the mantissa, and the exponent of the smallest number.
_PRECISION = {
    torch.float32: (24, -149),
    torch.float16: (11, -24),
    torch.bfloat16: (8, -133),
    torch.float64: (53, -1074),
}


def _is_exact(value: float, dtype: torch.dtype) -> bool:
    """Whether a finite number is one of the dtype's, without arithmetic that a thread may have told to flush denormals."""
    digits, smallest = _PRECISION[dtype]
    unit = max(math.frexp(value)[1] - digits, smallest)
    return abs(value) <= torch.finfo(dtype).max and math.ldexp(value, -unit).is_integer()


def _check_blocks(table: np.ndarray, data_bytes: int, mode: Mode, numel: int, itemsize: int, levels: int) -> None:
    sizes = table[:, 0].astype(np.int64)
    if int(sizes.sum()) != data_bytes:
        raise BadOffsetError(f"expected blocks of {data_bytes} bytes together, got {int(sizes.sum())}")
    if mode == Mode.ENTROPY:
        if len(sizes) and (sizes.min() < 64 or sizes.max() > _ops.kernels.max_block_bytes or (sizes % 2).any()):
            raise BadOffsetError("expected even block sizes between 64 bytes and what a block can take")
        return
    if mode == Mode.CONSTANT:
        return
    if mode == Mode.RAW:
        full, last = RAW_BLOCK_BYTES, numel * itemsize % RAW_BLOCK_BYTES
    else:
        bits = _ops.kernels.fixed_bits(levels)
        full, last = _ops.BLOCK_SYMBOLS * bits // 8, -(-(numel % _ops.BLOCK_SYMBOLS) * bits // 8)
    expected = np.full(len(sizes), full)
    if last:
        expected[-1] = last
    if (sizes != expected).any():
        raise BadOffsetError(f"expected blocks of {full} bytes, the last of {last or full}, got {sizes.tolist()[:8]}")
