"""Tensors kept exactly, in fewer bytes: planes of bytes, each Huffman coded where that is smaller.

Trained weights use few of the exponents that their dtype has, and exponents are most of what can be saved: about a third
of bfloat16, a sixth of float32.
"""

from __future__ import annotations

import numpy as np
import torch

from platonic_core.memory import empty
from weight_compression import _ops
from weight_compression.payload import (
    Header,
    Mode,
    PlaneHeader,
    PlaneKind,
    block_count,
    header_size,
    pack_planes,
    unit_width,
    write_header,
)

__all__ = ["compress_planes", "decode_planes"]

SAMPLED = 1 << 20  # units from which on a sample decides whether a plane is worth counting

_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _units(x: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(x).view(-1) if x.dtype.is_complex else x).view(_UNITS[unit_width(x.dtype)])


def _planes(dtype: torch.dtype) -> list[_ops.Plane]:
    width = unit_width(dtype)
    # Rotated by a bit, a float begins with its exponent, and the sign comes last. Floats of one byte have no such byte.
    rotate = width > 1 and (dtype.is_floating_point or dtype.is_complex)
    return [_ops.Plane(width, 8 * (width - 1 - p), rotate) for p in range(width)]


def _choose_kind(units: torch.Tensor, plane: _ops.Plane) -> tuple[PlaneHeader, int]:
    """How a plane is stored, and room for its blocks."""
    n = units.numel()
    raw = PlaneHeader(PlaneKind.RAW), n
    if n >= SAMPLED and _is_hopeless(_ops.plane_counts(_sample(units), plane)):
        return raw
    counts = _ops.plane_counts(units, plane)
    if int((counts > 0).sum()) == 1:
        return PlaneHeader(PlaneKind.CONSTANT, int(counts.argmax())), 0
    lengths = _ops.code_lengths(counts)
    room = _ops.kernels.coded_bytes_bound(n, int((counts * lengths).sum()))
    if room + len(_ops.pack_lengths(lengths)) >= n:
        return raw
    return PlaneHeader(PlaneKind.CODED, lengths=lengths), room


def _is_hopeless(counts: torch.Tensor) -> bool:
    """Whether coding would leave more than 0.995 of the bytes that they count."""
    if int((counts > 0).sum()) == 1:
        return False
    return 200 * int((counts * _ops.code_lengths(counts)).sum()) > 199 * 8 * int(counts.sum())


def _sample(units: torch.Tensor) -> torch.Tensor:
    """Runs of 64 units, 3 % of them."""
    runs = _ops.kernels.sample_runs(units.numel(), 0.03)
    return units.as_strided((runs, 64), (units.numel() // runs, 1), units.storage_offset()).reshape(-1)


def compress_planes(x: torch.Tensor, shape: tuple[int, ...], at_most: int) -> torch.Tensor | None:
    """A payload of flat x in mode PLANES, or None if it would have more bytes than `at_most`."""
    units, planes = _units(x), _planes(x.dtype)
    headers, rooms = zip(*(_choose_kind(units, plane) for plane in planes), strict=True)
    own = pack_planes(headers)
    start = header_size(len(shape), len(own), block_count(Mode.PLANES, x.dtype, x.numel(), headers))
    if start + sum(rooms) > at_most:
        return None
    payload = empty([start + sum(rooms)], torch.uint8)
    end, tables = start, [np.empty((0, 2), np.uint32)]
    for plane, header, room in zip(planes, headers, rooms, strict=True):
        out, size = payload[end : end + room], room
        if header.lengths is not None:
            size, table = _ops.encode_plane(units, plane, header.lengths, out)
            tables.append(table)
        elif header.kind == PlaneKind.RAW:
            tables.append(_ops.copy_plane(units, plane, out))
        end += size
    payload[:start] = torch.from_numpy(
        write_header(Mode.PLANES, x.dtype, shape, own, np.concatenate(tables), None).copy()
    )
    payload[end:] = 0  # the few bytes that the bounds were too high stay behind the view's end
    return payload[:end]


def decode_planes(data: np.ndarray, header: Header, out: torch.Tensor, check: bool) -> tuple[int, int]:
    """Into flat `out`; returns as ``_ops.decode_blocks``."""
    units = _units(out)
    blocks = -(-units.numel() // _ops.BLOCK_SYMBOLS)
    planes: list[tuple[_ops.Blocks | None, torch.Tensor | None, int]] = []
    begin, row = header.data, 0
    for plane in header.planes:
        if plane.kind == PlaneKind.CONSTANT:
            planes.append((None, None, plane.value))
            continue
        table = header.table[row : row + blocks]
        end = begin + int(table[:, 0].sum(dtype=np.uint64))
        planes.append((_ops.Blocks(data[begin:end], table), plane.lengths, 0))
        begin, row = end, row + blocks
    return _ops.decode_planes(planes, _planes(header.dtype)[0].rotate, units, check)
