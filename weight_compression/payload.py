"""Step 4 of *compress*: the bytes of one tensor, as FORMAT.md lays them out. Every field is checked before it is used."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
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
    "PlaneHeader",
    "compress_bound",
    "header_size",
    "is_less",
    "pack_planes",
    "parse_header",
    "peek",
    "sampled_entropy",
    "unit_width",
    "write_header",
]

MAGIC = b"PLWC"
VERSION = 0
RAW_BLOCK_BYTES = 1 << 18
MAX_NUMEL = 1 << 40
MAX_DIMENSIONS = 64

_START = struct.Struct("<4sBBBBQ")  # magic, version, mode, dtype, dimensions, bytes of the payload
_QUANTISED = struct.Struct("<ddIfHH")  # lo, hi, levels, entropy, bytes of the code lengths, flags
_PLANE = struct.Struct("<BBH")  # kind, value, bytes of the code lengths
_GROUPED, _ESCAPED = 1, 2  # flags

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
    PLANES = 4


class PlaneKind(IntEnum):
    RAW = 0
    CONSTANT = 1
    CODED = 2


@dataclass(frozen=True)
class PlaneHeader:
    """One plane of bytes in mode PLANES: `value` of kind CONSTANT, uint8 [256] `lengths` of kind CODED."""

    kind: PlaneKind
    value: int = 0
    lengths: torch.Tensor | None = None


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
    escapes : numpy.ndarray or None
        uint32 [blocks], values that are stored exactly behind the symbols of every block.
    value : bytes
        The element's bytes in mode CONSTANT.
    scheme : Scheme or None
        The quantiser of modes FIXED and ENTROPY.
    entropy : float
        Of the sample that the levels were chosen by, in bits.
    lengths : torch.Tensor or None
        uint8 [levels], code lengths in mode ENTROPY.
    planes : tuple of PlaneHeader
        In mode PLANES.
    """

    mode: Mode
    dtype: torch.dtype
    shape: tuple[int, ...]
    total: int
    data: int
    table: np.ndarray
    escapes: np.ndarray | None = None
    value: bytes = b""
    scheme: _ops.Scheme | None = None
    entropy: float = 0.0
    lengths: torch.Tensor | None = None
    planes: tuple[PlaneHeader, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def levels(self) -> int:
        return self.scheme.levels if self.scheme is not None else 0


def unit_width(dtype: torch.dtype) -> int:
    """Bytes of what mode PLANES takes apart: an element, or of complex numbers each part."""
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize


def block_count(mode: Mode, dtype: torch.dtype, numel: int, planes: Sequence[PlaneHeader] = ()) -> int:
    if mode == Mode.CONSTANT:
        return 0
    if mode == Mode.RAW:
        return -(-numel * dtype.itemsize // RAW_BLOCK_BYTES)
    if mode == Mode.PLANES:
        stored = sum(plane.kind != PlaneKind.CONSTANT for plane in planes)
        return stored * -(-numel * dtype.itemsize // unit_width(dtype) // _ops.BLOCK_SYMBOLS)
    return -(-numel // _ops.BLOCK_SYMBOLS)


def header_size(dimensions: int, own: int, blocks: int, escaped: bool = False) -> int:
    """Bytes before the data; `own` are those of the mode."""
    return _START.size + 8 * dimensions + own + (12 if escaped else 8) * blocks + 4


def compress_bound(numel: int, dtype: torch.dtype = torch.float32, dimensions: int = 64) -> int:
    """No payload of `numel` values of that dtype and at most so many dimensions is longer than this, in bytes."""
    return header_size(dimensions, 0, block_count(Mode.RAW, dtype, numel)) + numel * dtype.itemsize


def sampled_entropy(payload: np.ndarray) -> float:
    """Bits that a payload's levels were chosen by, 0 where it has none. The payload has been parsed before."""
    head = payload[: _START.size + 8 * MAX_DIMENSIONS + _QUANTISED.size].tobytes()
    _, _, mode, _, dimensions, _ = _START.unpack_from(head)
    if mode not in (Mode.FIXED, Mode.ENTROPY):
        return 0.0
    return _QUANTISED.unpack_from(head, _START.size + 8 * dimensions)[3]


def pack_planes(planes: Sequence[PlaneHeader]) -> bytes:
    """What the header of mode PLANES has of its own."""
    packed = [b"" if plane.lengths is None else _ops.pack_lengths(plane.lengths) for plane in planes]
    kinds = [_PLANE.pack(plane.kind, plane.value, len(p)) for plane, p in zip(planes, packed, strict=True)]
    return b"".join(kinds + packed)


def write_header(mode: Mode, dtype: torch.dtype, shape: tuple[int, ...], own: bytes, table: np.ndarray) -> np.ndarray:
    """The header as uint8, its checksum at its end."""
    total = header_size(len(shape), len(own), len(table)) + int(table[:, 0].sum(dtype=np.uint64))
    start = _START.pack(MAGIC, VERSION, mode, DTYPES.index(dtype), len(shape), total)
    body = start + struct.pack(f"<{len(shape)}Q", *shape) + own + table.astype("<u4").tobytes()
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
    parse = {Mode.CONSTANT: _constant_fields, Mode.PLANES: _plane_fields}.get(mode, _quantised_fields)
    fields, packed = ({}, []) if mode == Mode.RAW else parse(reader, mode, dtype, numel)
    escaped = "escapes" in fields
    blocks = block_count(mode, dtype, numel, fields.get("planes", ()))
    rows = reader.take((12 if escaped else 8) * blocks, "block table")
    end = reader.at
    (checksum,) = struct.unpack("<I", reader.take(4, "header checksum"))
    actual = _ops.crc32c(data[:end])
    if actual != checksum:
        raise BadChecksumError(f"header: expected checksum {checksum:08x}, got {actual:08x}")
    table = np.frombuffer(rows, "<u4").astype(np.uint32).reshape(-1, 3 if escaped else 2)
    if escaped:
        fields["escapes"] = np.ascontiguousarray(table[:, 2])
    table = np.ascontiguousarray(table[:, :2])
    expected = _expected_blocks(mode, dtype, numel, fields)
    _check_blocks(table, fields.get("escapes"), expected, total - reader.at, dtype.itemsize)
    # Codes only now: what they are made from is covered by the checksum.
    if mode == Mode.ENTROPY:
        fields["lengths"] = _unpack_code(packed[0], fields["scheme"].levels)
    elif mode == Mode.PLANES:
        fields["planes"] = tuple(
            PlaneHeader(plane.kind, plane.value, _unpack_code(p, 256)) if plane.kind == PlaneKind.CODED else plane
            for plane, p in zip(fields["planes"], packed, strict=True)
        )
    return Header(mode=mode, dtype=dtype, shape=shape, total=total, data=reader.at, table=table, **fields)


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


def _unpack_code(packed: bytes, levels: int) -> torch.Tensor:
    lengths = _ops.unpack_lengths(packed, levels)
    if lengths is None:
        raise BadCodeError(f"expected the {levels} lengths of a complete prefix code in {len(packed)} bytes")
    return lengths


def _constant_fields(reader: _Reader, mode: Mode, dtype: torch.dtype, numel: int) -> tuple[dict, list[bytes]]:
    if numel == 0:
        raise BadHeaderError("expected a constant of at least one element, got a shape of none")
    return {"value": reader.take(dtype.itemsize, "constant")}, []


def _plane_fields(reader: _Reader, mode: Mode, dtype: torch.dtype, numel: int) -> tuple[dict, list[bytes]]:
    if numel == 0:
        raise BadHeaderError("expected planes of at least one element, got a shape of none")
    planes, sizes = [], []
    for _ in range(unit_width(dtype)):
        kind, value, length_bytes = _PLANE.unpack(reader.take(_PLANE.size, "plane"))
        if kind not in list(PlaneKind):
            raise BadHeaderError(f"expected a plane's kind of 0 to {max(PlaneKind)}, got {kind}")
        if (value and kind != PlaneKind.CONSTANT) or (length_bytes and kind != PlaneKind.CODED):
            raise BadHeaderError(f"expected zeros in a plane of kind {kind}, got {value} and {length_bytes}")
        planes.append(PlaneHeader(PlaneKind(kind), value))
        sizes.append(length_bytes)
    if all(plane.kind == PlaneKind.CONSTANT for plane in planes):  # mode CONSTANT; nothing would pay for the elements
        raise BadHeaderError("expected a plane that is not constant")
    return {"planes": tuple(planes)}, [reader.take(size, "code lengths") for size in sizes]


def _quantised_fields(reader: _Reader, mode: Mode, dtype: torch.dtype, numel: int) -> tuple[dict, list[bytes]]:
    lo, hi, levels, entropy, length_bytes, flags = _QUANTISED.unpack(reader.take(_QUANTISED.size, "quantiser"))
    if dtype not in _ops.DTYPE_CODES or numel == 0:
        raise BadHeaderError(f"expected {mode.name.lower()} mode of floating point values, got {numel} of {dtype}")
    if not (math.isfinite(lo) and math.isfinite(hi) and is_less(lo, hi)):
        raise BadHeaderError(f"expected finite lo < hi, neither of them -0, got {lo} and {hi}")
    if not (_is_exact(lo, dtype) and _is_exact(hi, dtype)):
        raise BadHeaderError(f"expected lo and hi that are values of {dtype}, got {lo} and {hi}")
    most = _ops.MAX_CODED_LEVELS if mode == Mode.ENTROPY else _ops.MAX_LEVELS
    if not 2 <= levels <= most:
        raise BadHeaderError(f"expected 2 to {most} levels, got {levels}")
    if not (0 <= entropy <= 64) or (mode == Mode.FIXED and length_bytes != 0):
        raise BadHeaderError(f"expected an entropy and, of fixed bits, no code lengths, got {entropy}, {length_bytes}")
    if flags not in (0, _GROUPED, _ESCAPED):
        raise BadHeaderError(f"expected flags 0, {_GROUPED} or {_ESCAPED}, got {flags}")
    packed = reader.take(length_bytes, "code lengths")
    scheme = _ops.Scheme(lo=lo, hi=hi, levels=levels, clamp=flags == _ESCAPED)
    if flags == _GROUPED:
        scheme = _grouped(reader, dtype, numel, scheme)
    fields: dict = {"scheme": scheme, "entropy": entropy}
    return (fields | {"escapes": None} if flags == _ESCAPED else fields), [packed]


def _grouped(reader: _Reader, dtype: torch.dtype, numel: int, scheme: _ops.Scheme) -> _ops.Scheme:
    """The scheme with the ranges of its groups."""
    (size,) = struct.unpack("<Q", reader.take(8, "group size"))
    if not 1 <= size < numel:
        raise BadHeaderError(f"expected groups of 1 to {numel - 1} values, got {size}")
    stored = np.frombuffer(
        reader.take(2 * dtype.itemsize * -(-numel // size), "ranges of groups"), f"<u{dtype.itemsize}"
    ).reshape(-1, 2)
    signed = stored.view(f"<i{dtype.itemsize}")
    smallest = np.iinfo(signed.dtype).min
    infinity = (
        torch.tensor(float("inf"), dtype=dtype, device="cpu").view(getattr(torch, f"int{8 * dtype.itemsize}")).item()
    )
    # Ascending with the numbers, as integers: a thread may flush denormals. smallest is -0.
    order = np.where(signed >= 0, signed, smallest - signed)
    finite = (signed & ~smallest) < infinity
    if not finite.all() or (signed == smallest).any() or (order[:, 0] > order[:, 1]).any():
        raise BadHeaderError("expected finite ranges lo <= hi of groups, none of them -0")
    return _ops.Scheme(
        lo=scheme.lo, hi=scheme.hi, levels=scheme.levels, group_size=size, ranges=np.ascontiguousarray(stored)
    )


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


def _expected_blocks(mode: Mode, dtype: torch.dtype, numel: int, fields: dict) -> np.ndarray:
    """int64 [blocks], the bytes that each must have (without escapes), or -1 where its symbols are coded."""

    def cut(total: int, full: int) -> np.ndarray:
        sizes = np.full(-(-total // full), full, np.int64)
        if total % full:
            sizes[-1] = total % full
        return sizes

    if mode == Mode.CONSTANT:
        return np.empty(0, np.int64)
    if mode == Mode.RAW:
        return cut(numel * dtype.itemsize, RAW_BLOCK_BYTES)
    symbols = cut(numel * dtype.itemsize // unit_width(dtype), _ops.BLOCK_SYMBOLS)
    if mode == Mode.PLANES:
        stored = [plane.kind for plane in fields["planes"] if plane.kind != PlaneKind.CONSTANT]
        parts = [symbols if kind == PlaneKind.RAW else np.full_like(symbols, -1) for kind in stored]
        return np.concatenate([np.empty(0, np.int64), *parts])
    if mode == Mode.ENTROPY:
        return np.full_like(symbols, -1)
    return (symbols * _ops.kernels.fixed_bits(fields["scheme"].levels) + 7) // 8


def _check_blocks(
    table: np.ndarray, escapes: np.ndarray | None, expected: np.ndarray, data_bytes: int, itemsize: int
) -> None:
    sizes = table[:, 0].astype(np.int64)
    if int(sizes.sum()) != data_bytes:
        raise BadOffsetError(f"expected blocks of {data_bytes} bytes together, got {int(sizes.sum())}")
    if escapes is not None:
        if len(escapes) and int(escapes.max()) > _ops.BLOCK_SYMBOLS:
            raise BadOffsetError(f"expected at most {_ops.BLOCK_SYMBOLS} escapes of a block, got {int(escapes.max())}")
        sizes = sizes - escapes.astype(np.int64) * (2 + itemsize)
    coded = expected < 0
    wrong = sizes[~coded] != expected[~coded]
    if wrong.any():
        at = int(np.flatnonzero(~coded)[np.flatnonzero(wrong)[0]])
        raise BadOffsetError(f"expected {expected[at]} bytes in block {at}, got {sizes[at]}")
    sizes = sizes[coded]
    if len(sizes) and (sizes.min() < 64 or sizes.max() > _ops.kernels.max_block_bytes or (sizes % 2).any()):
        raise BadOffsetError("expected even block sizes between 64 bytes and what a block can take")
