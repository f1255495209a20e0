"""Steps 2 to 4 of *compress* on the CPU, one after the other, and the way back. ``device.py`` is the same in one call.

Which mode a tensor gets follows from its values and the configuration alone, and every step is specified operation by
operation, so that equal tensors give equal bytes anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from weight_compression import _ops
from weight_compression.config import CompressionConfig
from weight_compression.entropy import choose_levels, sample_entropy
from weight_compression.errors import BadChecksumError, BadCodeError, NonFiniteError
from weight_compression.payload import (
    RAW_BLOCK_BYTES,
    Header,
    Mode,
    compress_bound,
    is_less,
    write_header,
)
from weight_compression.planes import compress_planes, decode_planes
from weight_compression.ranges import Ranges, choose_ranges

__all__ = ["compress", "decode"]

Allocate: TypeAlias = Callable[[int], torch.Tensor]  # memory for a payload, uint8 [bytes], of at most so many bytes

NONFINITE = "expected finite values, got NaN or infinity; nonfinite='raw' stores such tensors exactly"


def compress(x: torch.Tensor, shape: tuple[int, ...], config: CompressionConfig, allocate: Allocate) -> torch.Tensor:
    """The payload of flat contiguous x, the beginning of what `allocate` gives for no more than its ``compress_bound``."""
    if x.numel() == 1:
        return _compress_constant(x, shape, config, allocate)
    if x.numel() == 0:
        return _compress_raw(x, shape, allocate)
    if config.lossless:
        return _compress_exactly(x, shape, config, allocate)
    if x.dtype not in _ops.DTYPE_CODES:
        return _compress_raw(x, shape, allocate)
    if config.is_by_entropy_alone:
        # All steps at once: of small tensors, going through them in Python takes longer than coding.
        plan = _ops.plan_by_entropy(x, shape, config)
        payload = None if plan is None else _write(plan, allocate)
        if payload is not None:
            return payload
    lo, hi, finite, sample = _ops.range_and_sample(x, config.sample_fraction)
    if not finite:
        if config.nonfinite == "raise":
            raise NonFiniteError(NONFINITE)
        return _compress_raw(x, shape, allocate)
    if not is_less(lo, hi):
        return _compress_constant(x, shape, config, allocate)
    return _compress_finite(x, sample, shape, choose_ranges(x, sample, shape, config, lo, hi), config, allocate)


def _compress_finite(
    x: torch.Tensor,
    sample: torch.Tensor,
    shape: tuple[int, ...],
    ranges: Ranges,
    config: CompressionConfig,
    allocate: Allocate,
) -> torch.Tensor:
    entropy = sample_entropy(x, sample, ranges.scheme, config.entropy_bits, config.sample_fraction)
    levels = choose_levels(x, config, ranges, entropy)
    if levels is None:
        return _compress_raw(x, shape, allocate)
    scheme = ranges.scheme.with_levels(levels)
    beside = entropy, ranges.escapes, ranges.escape_bytes
    # A ratio is one of all values.
    enough = x.numel() >= _ops.kernels.sample_coded_from and config.ratio is None and not config.full_histogram
    for counted in (sample, None) if enough and levels <= _ops.MAX_CODED_LEVELS else (None,):
        plan = _ops.plan_payload(x, shape, scheme, *beside, counted, config.sample_fraction)
        if plan is None:
            continue
        payload = _write(plan, allocate)
        if payload is not None:
            return payload
        if counted is None:
            raise RuntimeError("compress: the tensor was changed while it was being compressed")
    if ranges.escapes is not None:
        # What is kept exactly would take more than it saves.
        return _compress_finite(x, sample, shape, ranges.unclipped(), config, allocate)
    return _compress_raw(x, shape, allocate)


def _write(plan: Any, allocate: Allocate) -> torch.Tensor | None:
    """None if the plan's room does not suffice. What is left of it stays behind the view's end."""
    payload = allocate(plan.room)
    size = _ops.write_payload(plan, payload)
    return None if size < 0 else payload[:size]


def _raw_bytes(x: torch.Tensor) -> np.ndarray:
    """Flat contiguous x as uint8, without a copy."""
    return x.view(torch.uint8).numpy() if x.numel() else np.empty(0, np.uint8)


def _compress_constant(
    x: torch.Tensor, shape: tuple[int, ...], config: CompressionConfig, allocate: Allocate
) -> torch.Tensor:
    inexact = x.dtype in _ops.DTYPE_CODES and not config.lossless
    if inexact and config.nonfinite == "raise" and not bool(x[:1].to(torch.float64).isfinite()):
        raise NonFiniteError(NONFINITE)
    none = np.empty((0, 2), np.uint32)
    header = write_header(Mode.CONSTANT, x.dtype, shape, _raw_bytes(x[:1]).tobytes(), none)
    return allocate(header.size).copy_(torch.from_numpy(header.copy()))


def _compress_raw(x: torch.Tensor, shape: tuple[int, ...], allocate: Allocate) -> torch.Tensor:
    data = _raw_bytes(x)
    header = write_header(Mode.RAW, x.dtype, shape, b"", _ops.checksum_blocks(data, RAW_BLOCK_BYTES))
    payload = allocate(header.size + data.size)
    payload[: header.size] = torch.from_numpy(header.copy())
    payload[header.size :] = torch.from_numpy(data)
    return payload


def _compress_exactly(
    x: torch.Tensor, shape: tuple[int, ...], config: CompressionConfig, allocate: Allocate
) -> torch.Tensor:
    data = _raw_bytes(x).reshape(-1, x.dtype.itemsize)
    if (data[0] == data[-1]).all() and (data == data[0]).all():
        return _compress_constant(x, shape, config, allocate)
    raw = compress_bound(x.numel(), x.dtype, len(shape))
    payload = compress_planes(x, shape, raw - 1, allocate)
    return _compress_raw(x, shape, allocate) if payload is None else payload


def decode(data: np.ndarray, header: Header, out: torch.Tensor, accumulate: bool, scale: float, check: bool) -> None:
    """The values of payload `data` into, or added to, flat contiguous `out`."""
    if header.scheme is None and accumulate:
        values = torch.empty_like(out)
        decode(data, header, values, False, 1.0, check)
        _ops.add_values(values, out, scale)
        return
    status, block = 0, 0
    if header.mode == Mode.CONSTANT:
        # torch has no from_bytes; a view of a copy is one.
        value = torch.from_numpy(np.frombuffer(header.value, np.uint8).copy()).view(header.dtype)
        with torch.no_grad():
            out.copy_(value.expand_as(out))
    elif header.mode == Mode.RAW:
        raw = data[header.data :]
        if check:
            found = _ops.checksum_blocks(raw, RAW_BLOCK_BYTES)
            if (bad := np.flatnonzero(found[:, 1] != header.table[:, 1])).size:
                status, block = 1, int(bad[0])
        if status == 0:
            out.view(torch.uint8).numpy()[:] = raw
    elif header.mode == Mode.PLANES:
        status, block = decode_planes(data, header, out, check)
    else:
        assert header.scheme is not None
        status, block = _ops.decode_blocks(
            _ops.Blocks(data[header.data :], header.table, header.escapes), header.scheme, header.lengths, out,
            accumulate, scale, check,
        )  # fmt: skip
    if status == 1:
        raise BadChecksumError(f"block {block}: its bytes have changed")
    if status == 2:
        raise BadCodeError(f"block {block}: its bits do not follow the code")
