"""Step 1 of *compress*: from tensors to payloads and back.

Which mode a tensor gets follows from its values and the configuration alone, and every step is specified operation by
operation, so that equal tensors give equal bytes anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from platonic_core.memory import empty
from weight_compression import _ops, device
from weight_compression.config import CompressionConfig
from weight_compression.entropy import choose_levels, sample_entropy
from weight_compression.errors import (
    BadChecksumError,
    BadCodeError,
    BadShapeError,
    NonFiniteError,
    SizeLimitError,
)
from weight_compression.payload import (
    DTYPES,
    MAX_DIMENSIONS,
    RAW_BLOCK_BYTES,
    Header,
    Mode,
    block_count,
    header_size,
    is_less,
    pack_quantiser,
    parse_header,
    write_header,
)
from weight_compression.planes import compress_planes, decode_planes
from weight_compression.ranges import choose_ranges, half_width

__all__ = ["PayloadInfo", "compress", "compress_bound", "compress_into", "decompress", "payload_info"]

Bytes: TypeAlias = torch.Tensor | np.ndarray | bytes | bytearray | memoryview

DEFAULT_MAX_BYTES = 1 << 34
_NONFINITE = "expected finite values, got NaN or infinity; nonfinite='raw' stores such tensors exactly"


def compress(tensor: torch.Tensor, config: CompressionConfig | None = None) -> torch.Tensor:
    """A tensor's values, quantised by their entropy and Huffman coded, as bytes.

    Algorithm 1 of the thesis (section 3.6): the levels are K = round(2^(H + c)) equal bins of [min, max] (see
    :class:`CompressionConfig`); bin numbers are coded with the canonical Huffman code of their histogram. Of that code,
    bin numbers of a fixed number of bits, a single value and the tensor as it is, the payload has what is smallest.

    Every value w is decoded to a w' with \\|w - w'\\| <= (max - min) / (2 K), up to rounding in the tensor's dtype. With
    ``config.lossless`` values are kept bit by bit.

    Parameters
    ----------
    tensor : torch.Tensor
        Any shape, layout and dtype, on the CPU or a CUDA device. float16, bfloat16, float32 and float64 are quantised,
        others kept as they are.
    config : CompressionConfig, optional

    Returns
    -------
    torch.Tensor
        uint8 [bytes] on the tensor's device, self-contained: :func:`decompress` needs nothing else. On a CUDA device
        the call waits once, to learn the size; :func:`compress_into` does not. The bytes are the same on every device.

    Raises
    ------
    NonFiniteError
        If there is NaN or infinity and ``config.nonfinite`` is 'raise'.
    NotImplementedError
        If the tensor is on a CUDA device and the configuration asks for what only the CPU does: `ratio`, `lossless`,
        `group_size`, `per_channel` or `clip_quantile`.
    TypeError
        If the dtype is not one that payloads can hold.

    Examples
    --------
    >>> payload = compress(torch.linspace(-1, 1, 1000))
    >>> float((decompress(payload) - torch.linspace(-1, 1, 1000)).abs().max()) <= payload_info(payload).error_bound
    True
    """
    config = CompressionConfig() if config is None else config
    x, shape = _flat_values(tensor)
    if x.device.type == "cuda":
        payload = device.compress(x, shape, config, compress_bound(x.numel(), x.dtype, len(shape)))
        if payload is None:
            raise NonFiniteError(_NONFINITE)
        return payload
    if x.numel() == 1:
        return _compress_constant(x, shape, config)
    if x.numel() == 0:
        return _compress_raw(x, shape)
    if config.lossless:
        return _compress_exactly(x, shape, config)
    if x.dtype not in _ops.DTYPE_CODES:
        return _compress_raw(x, shape)
    lo, hi, finite, sample = _ops.range_and_sample(x, config.sample_fraction)
    if not finite:
        if config.nonfinite == "raise":
            raise NonFiniteError(_NONFINITE)
        return _compress_raw(x, shape)
    if not is_less(lo, hi):
        return _compress_constant(x, shape, config)
    scheme = choose_ranges(x, sample, shape, config, lo, hi)
    entropy = sample_entropy(x, sample, scheme, config.entropy_bits, config.sample_fraction)
    levels = choose_levels(x, config, scheme, entropy)
    if levels is None:
        return _compress_raw(x, shape)
    scheme = scheme.with_levels(levels)
    if x.numel() >= _ops.kernels.sample_coded_from and not config.full_histogram:
        counts = _ops.sample_counts(x, sample, scheme, config.sample_fraction)
        payload = _compress_quantised(x, shape, scheme, entropy, counts)
        if payload is not None:
            return payload
    payload = _compress_quantised(x, shape, scheme, entropy, None)
    if payload is None:
        raise RuntimeError("compress: the tensor was changed while it was being compressed")
    return payload


def compress_into(tensor: torch.Tensor, out: torch.Tensor, config: CompressionConfig | None = None) -> torch.Tensor:
    """:func:`compress` into memory of the caller's. On a CUDA device it only queues work: nothing waits.

    Parameters
    ----------
    tensor : torch.Tensor
        As for :func:`compress`.
    out : torch.Tensor
        uint8 [bytes], contiguous, on the tensor's device, at least ``compress_bound(tensor.numel(), tensor.dtype,
        tensor.ndim)`` bytes. The payload is ``out[:size]``; the bytes behind it are not touched on a CUDA device.
    config : CompressionConfig, optional

    Returns
    -------
    torch.Tensor
        int64 [], the payload's size, on the tensor's device; -1, and no payload, if there is NaN or infinity and
        ``config.nonfinite`` is 'raise'.

    Raises
    ------
    NotImplementedError, TypeError
        As :func:`compress`.
    """
    config = CompressionConfig() if config is None else config
    x, shape = _flat_values(tensor)
    bound = compress_bound(x.numel(), x.dtype, len(shape))
    if out.dtype != torch.uint8 or out.ndim != 1 or not out.is_contiguous() or out.numel() < bound:
        raise ValueError(
            f"out: expected contiguous uint8 of at least {bound} bytes, got {out.dtype} of shape {tuple(out.shape)}, "
            f"strides {out.stride()}"
        )
    if out.device != x.device:
        raise ValueError(f"out: expected memory on {x.device}, where the tensor is, got {out.device}")
    if x.device.type == "cuda":
        return device.compress_into(x, shape, config, out)
    try:
        payload = compress(tensor, config)
    except NonFiniteError:
        return torch.tensor(-1)
    out[: payload.numel()] = payload
    return torch.tensor(payload.numel())


def _flat_values(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The tensor flat and contiguous, and its shape, after checking that it can be compressed."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"expected one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(f"expected a dense tensor with values, got layout {tensor.layout} on {tensor.device}")
    if tensor.ndim > MAX_DIMENSIONS:
        raise TypeError(f"expected at most {MAX_DIMENSIONS} dimensions, got {tensor.ndim}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"expected a tensor on the CPU or a CUDA device, got one on {tensor.device}: move it with .cpu()"
        )
    x = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    return x, tuple(tensor.shape)


def compress_bound(numel: int, dtype: torch.dtype = torch.float32, dimensions: int = 64) -> int:
    """No payload of `numel` values of that dtype and at most so many dimensions is longer than this, in bytes."""
    return header_size(dimensions, 0, block_count(Mode.RAW, dtype, numel)) + numel * dtype.itemsize


def _raw_bytes(x: torch.Tensor) -> np.ndarray:
    """Flat contiguous x as uint8, without a copy."""
    return x.view(torch.uint8).numpy() if x.numel() else np.empty(0, np.uint8)


def _compress_constant(x: torch.Tensor, shape: tuple[int, ...], config: CompressionConfig) -> torch.Tensor:
    inexact = x.dtype in _ops.DTYPE_CODES and not config.lossless
    if inexact and config.nonfinite == "raise" and not bool(x[:1].to(torch.float64).isfinite()):
        raise NonFiniteError(_NONFINITE)
    none = np.empty((0, 2), np.uint32)
    header = write_header(Mode.CONSTANT, x.dtype, shape, _raw_bytes(x[:1]).tobytes(), none, None)
    return torch.from_numpy(header.copy())


def _compress_raw(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    data = _raw_bytes(x)
    header = write_header(Mode.RAW, x.dtype, shape, b"", _ops.checksum_blocks(data, RAW_BLOCK_BYTES), None)
    payload = empty([header.size + data.size], torch.uint8)
    payload[: header.size] = torch.from_numpy(header.copy())
    payload[header.size :] = torch.from_numpy(data)
    return payload


def _compress_exactly(x: torch.Tensor, shape: tuple[int, ...], config: CompressionConfig) -> torch.Tensor:
    data = _raw_bytes(x).reshape(-1, x.dtype.itemsize)
    if (data[0] == data[-1]).all() and (data == data[0]).all():
        return _compress_constant(x, shape, config)
    raw = compress_bound(x.numel(), x.dtype, len(shape))
    payload = compress_planes(x, shape, raw - 1)
    return _compress_raw(x, shape) if payload is None else payload


def _compress_quantised(
    x: torch.Tensor, shape: tuple[int, ...], scheme: _ops.Scheme, entropy: float, sampled: torch.Tensor | None
) -> torch.Tensor | None:
    """With the code of all values, or of the sample's counts if they are given. None if that code does not suffice."""
    n = x.numel()
    escapes, beside = None, 0
    if scheme.clamp:
        escapes = _ops.count_outside(x, scheme.lo, scheme.hi)
        beside = int(escapes.sum(dtype=np.int64)) * (2 + x.dtype.itemsize)
    # By mode: what its header has of its own, code lengths, and room for the blocks.
    fixed = _ops.kernels.fixed_bytes(n, _ops.kernels.fixed_bits(scheme.levels)) + beside
    ways: dict[Mode, tuple[bytes, torch.Tensor | None, int]] = {}
    ways[Mode.FIXED] = (pack_quantiser(scheme, entropy, b""), None, fixed)
    if scheme.levels <= _ops.MAX_CODED_LEVELS:
        code, bits = _make_code(x, scheme, sampled)
        if code is not None:
            coded = _ops.kernels.coded_bytes_bound(n, bits) + beside
            ways[Mode.ENTROPY] = (pack_quantiser(scheme, entropy, _ops.pack_lengths(code)), code, coded)

    def start(mode: Mode) -> int:
        return header_size(len(shape), len(ways[mode][0]), block_count(mode, x.dtype, n), scheme.clamp)

    sizes = {mode: start(mode) + room for mode, (_, _, room) in ways.items()}
    sizes[Mode.RAW] = compress_bound(n, x.dtype, len(shape))
    mode = min(sizes, key=lambda m: (sizes[m], m))
    if sampled is not None and mode != Mode.ENTROPY:
        return None
    if mode == Mode.RAW:
        return _compress_raw(x, shape)
    own, lengths, _ = ways[mode]
    payload = empty([sizes[mode]], torch.uint8)
    size, table = _ops.encode_blocks(x, scheme, lengths, escapes, payload[start(mode) :])
    if size < 0:
        return None
    end = start(mode) + size
    payload[: start(mode)] = torch.from_numpy(write_header(mode, x.dtype, shape, own, table, escapes).copy())
    payload[end:] = 0  # the few bytes that the bound was too high stay behind the view's end
    return payload[:end]


def _make_code(x: torch.Tensor, scheme: _ops.Scheme, sampled: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """Code lengths, and the bits that x takes or may take at most; None where there is no code."""
    counts = _ops.symbol_counts(x, scheme) if sampled is None else sampled
    if int((counts > 0).sum()) < 2:
        return None, 0
    if sampled is None:
        lengths = _ops.code_lengths(counts)
        return lengths, int((counts * lengths).sum())
    lengths = _ops.code_lengths(_ops.kernels.sample_weight * counts + 1)
    bits = _ops.kernels.sample_code_bits(scheme.levels, counts.data_ptr(), lengths.data_ptr(), x.numel())
    return (None, 0) if bits < 0 else (lengths, bits)


def _as_bytes(payload: Bytes) -> np.ndarray:
    """uint8 [bytes], sharing the payload's memory."""
    if isinstance(payload, torch.Tensor):
        if payload.device.type != "cpu":
            raise NotImplementedError(f"expected a payload on the CPU or a CUDA device, got one on {payload.device}")
        if payload.dtype != torch.uint8 or payload.ndim != 1:
            raise TypeError(f"expected a payload of uint8 [bytes], got {payload.dtype} of shape {tuple(payload.shape)}")
        return payload.detach().contiguous().numpy()
    array = payload if isinstance(payload, np.ndarray) else np.frombuffer(payload, np.uint8)
    if array.dtype != np.uint8 or array.ndim != 1:
        raise TypeError(f"expected a payload of uint8 [bytes], got {array.dtype} of shape {array.shape}")
    return np.ascontiguousarray(array)


def decompress(
    payload: Bytes,
    out: torch.Tensor | None = None,
    *,
    accumulate: bool = False,
    scale: float = 1.0,
    max_bytes: int = DEFAULT_MAX_BYTES,
    check: bool = True,
) -> torch.Tensor:
    """The tensor of a payload (thesis, algorithm 2), decoded and dequantised in one pass.

    Parameters
    ----------
    payload : torch.Tensor, numpy.ndarray or bytes-like
        uint8, what :func:`compress` returned. A tensor on a CUDA device is decoded there.
    out : torch.Tensor, optional
        Contiguous, of the payload's shape and dtype, on its device: written instead of a new tensor.
    accumulate : bool, default False
        ``out += scale * values`` instead of ``out = values``; without a temporary, but for tensors that are stored exactly or
        have a single value. Needs `out`, floating point.
    scale : float, default 1.0
        Factor of `accumulate`.
    max_bytes : int, default 16 GiB
        No tensor above this size is allocated: small payloads can describe large tensors.
    check : bool, default True
        Compare the checksum of every block; the header's is always compared. Payloads that were tampered with are safe
        to decode without, but may give other values.
        On a CUDA device with `out`, False also means that nothing waits and nothing is raised for what the bytes are:
        a payload that is not one, or not one of `out`, leaves it unspecified.

    Returns
    -------
    torch.Tensor
        `out`, or a new tensor.

    Raises
    ------
    PayloadError
        Which subclass says what is wrong. `out` is then unspecified; when accumulating it is unchanged unless the
        checksums were right, or not compared.
    """
    if scale != 1.0 and not accumulate:
        raise ValueError(f"scale: expected 1 without accumulate, got {scale}")
    if accumulate and out is None:
        raise ValueError("accumulate: expected out, the tensor to add to")
    if isinstance(payload, torch.Tensor) and payload.device.type == "cuda":
        return _decompress_on_device(payload, out, accumulate, scale, max_bytes, check)
    data = _as_bytes(payload)
    header = parse_header(data)
    if out is None:
        size = header.numel * header.dtype.itemsize
        if size > max_bytes:
            raise SizeLimitError(f"expected at most max_bytes = {max_bytes}, got a tensor of {size} bytes")
        out = empty(header.shape, header.dtype)
    else:
        _check_out(out, header, accumulate)
    if header.numel > 0:
        _decode(data, header, out.detach().view(-1), accumulate, scale, check)
        torch.autograd.graph.increment_version(out)  # kernels write by address: autograd must know
    return out


def _decompress_on_device(
    payload: torch.Tensor, out: torch.Tensor | None, accumulate: bool, scale: float, max_bytes: int, check: bool
) -> torch.Tensor:
    """decompress of a payload on a CUDA device. What is wrong with one that is, the CPU finds out from a copy."""
    if payload.dtype != torch.uint8 or payload.ndim != 1:
        raise TypeError(f"expected a payload of uint8 [bytes], got {payload.dtype} of shape {tuple(payload.shape)}")
    if out is not None:
        _check_target(out, payload.device, accumulate)
    decoded = device.decompress(payload.detach(), out, accumulate, scale, max_bytes, check)
    if decoded is not None:
        return decoded
    host = payload.cpu()
    same = None if out is None else torch.zeros(out.shape, dtype=out.dtype)
    decompress(host, same, accumulate=accumulate, scale=scale, max_bytes=max_bytes, check=check)
    raise NotImplementedError(
        f"expected a payload that a CUDA device decodes, got one of mode {payload_info(host).mode} that the CPU does: "
        f"use decompress(payload.cpu())"
    )


def _check_out(out: torch.Tensor, header: Header, accumulate: bool) -> None:
    if tuple(out.shape) != header.shape:
        raise BadShapeError(f"out: expected shape {header.shape}, got {tuple(out.shape)}")
    if out.dtype != header.dtype:
        raise TypeError(f"out: expected {header.dtype}, got {out.dtype}")
    _check_target(out, torch.device("cpu"), accumulate)


def _check_target(out: torch.Tensor, where: torch.device, accumulate: bool) -> None:
    if out.device != where:
        raise ValueError(f"out: expected a tensor on {where}, where the payload is, got one on {out.device}")
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    if out.is_conj() or out.is_neg():
        raise ValueError(
            "out: expected a tensor without a lazy conjugation or sign; use its resolve_conj().resolve_neg()"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: expected a tensor that does not require grad; wrap the call in torch.no_grad()")
    if accumulate and out.dtype not in _ops.DTYPE_CODES:
        raise TypeError(f"accumulate: expected one of {', '.join(map(str, _ops.DTYPE_CODES))}, got {out.dtype}")


def _decode(data: np.ndarray, header: Header, out: torch.Tensor, accumulate: bool, scale: float, check: bool) -> None:
    if header.scheme is None and accumulate:
        values = torch.empty_like(out)
        _decode(data, header, values, False, 1.0, check)
        with torch.no_grad():
            # float64 factors would promote nothing, but would be rounded differently from the kernels' float32.
            wide = torch.float64 if header.dtype == torch.float64 else torch.float32
            out.copy_(out.to(wide) + torch.tensor(scale, dtype=wide) * values.to(wide))
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


@dataclass(frozen=True)
class PayloadInfo:
    """What a payload holds.

    Attributes
    ----------
    shape : tuple of int
    dtype : torch.dtype
    mode : str
        'entropy', 'fixed', 'constant', 'planes' or 'raw'.
    levels : int
        K, or 0 if values are stored exactly.
    entropy : float
        Bits, estimated from a sample in 2^entropy_bits bins when the levels were chosen; 0 where none were.
    bits_per_weight : float
        Of the whole payload, headers included.
    error_bound : float
        Largest difference between a value and its decoded value, up to rounding in the dtype: (max - min) / (2 K) of the
        widest range; 0 where values are stored exactly.
    bytes : int
        Of the whole payload.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    mode: str
    levels: int
    entropy: float
    bits_per_weight: float
    error_bound: float
    bytes: int


def payload_info(payload: Bytes) -> PayloadInfo:
    """What a payload holds, from its header alone.

    Raises
    ------
    PayloadError
        If the header is not one.
    """
    if isinstance(payload, torch.Tensor):
        payload = payload.cpu()  # all of it, because the header's length is inside
    header = parse_header(_as_bytes(payload))
    return PayloadInfo(
        shape=header.shape,
        dtype=header.dtype,
        mode=header.mode.name.lower(),
        levels=header.levels,
        entropy=header.entropy,
        bits_per_weight=8 * header.total / max(1, header.numel),
        error_bound=half_width(header.scheme, header.dtype) / header.levels if header.scheme else 0.0,
        bytes=header.total,
    )
