"""Step 1 of *compress*: what users call, from tensors to payloads and back; ``host.py`` or ``device.py`` does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from platonic_core.memory import empty, recycled
from weight_compression import _ops, device, host
from weight_compression.config import CompressionConfig
from weight_compression.errors import (
    BadShapeError,
    NonFiniteError,
    SizeLimitError,
)
from weight_compression.payload import DTYPES, MAX_DIMENSIONS, Header, compress_bound, parse_header

__all__ = ["PayloadInfo", "compress", "compress_bound", "compress_into", "decompress", "payload_info"]

Bytes: TypeAlias = torch.Tensor | np.ndarray | bytes | bytearray | memoryview

DEFAULT_MAX_BYTES = 1 << 34


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
        If the tensor is neither on the CPU nor on a CUDA device.
    TypeError
        If the dtype is not one that payloads can hold.

    Examples
    --------
    >>> payload = compress(torch.linspace(-1, 1, 1000))
    >>> float((decompress(payload) - torch.linspace(-1, 1, 1000)).abs().max()) <= payload_info(payload).error_bound
    True
    """
    config = _checked(config)
    x, shape = _flat_values(tensor)
    if x.device.type == "cuda":
        payload = device.compress(x, shape, config, compress_bound(x.numel(), x.dtype, len(shape)))
        if payload is None:
            raise NonFiniteError(host.NONFINITE)
        return payload
    return host.compress(x, shape, config, lambda size: recycled([size], torch.uint8))


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
    ValueError
        If `out` is not such memory.
    """
    config = _checked(config)
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
        payload = host.compress(x, shape, config, lambda size: out[:size])
    except NonFiniteError:
        return torch.tensor(-1, device="cpu")
    return torch.tensor(payload.numel(), device="cpu")


def _flat_values(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The tensor flat and contiguous, and its shape, after checking that it can be compressed."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(tensor).__name__}")
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
    if not _has_memory(tensor):
        raise TypeError(
            f"expected a tensor with memory of its own, got {type(tensor).__name__}; of a DTensor: to_local() or full_tensor()"
        )
    x = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    return x, tuple(tensor.shape)


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether its values lie where it says: those of wrappers, fake tensors and tensors of function transforms do not."""
    if isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor):
        return False
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:
        return False


def _checked(config: CompressionConfig | None) -> CompressionConfig:
    if config is None:
        return CompressionConfig()
    if not isinstance(config, CompressionConfig):
        raise TypeError(f"config: expected a CompressionConfig, got {type(config).__name__}")
    return config


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
        ``out += scale * values`` instead of ``out = values``; without a temporary, but on the CPU for tensors that are stored
        exactly or have a single value. Needs `out`, floating point.
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
    if out is not None and not isinstance(out, torch.Tensor):
        raise TypeError(f"out: expected a torch.Tensor, got {type(out).__name__}")
    if out is not None and _is_target(out) and _ops.decode_payload(data, out, accumulate, scale, check):
        torch.autograd.graph.increment_version(out)
        return out
    header = parse_header(data)
    if out is None:
        size = header.numel * header.dtype.itemsize
        if size > max_bytes:
            raise SizeLimitError(f"expected at most max_bytes = {max_bytes}, got a tensor of {size} bytes")
        out = empty(header.shape, header.dtype)
    else:
        _check_out(out, header, accumulate)
    if header.numel > 0:
        host.decode(data, header, out.detach().view(-1), accumulate, scale, check)
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
    on_cpu = payload.cpu()
    same = None if out is None else torch.zeros(out.shape, dtype=out.dtype, device="cpu")
    decompress(on_cpu, same, accumulate=accumulate, scale=scale, max_bytes=max_bytes, check=check)
    raise RuntimeError("decompress: the device refused a payload that the CPU decodes; was it changed meanwhile?")


def _is_target(out: torch.Tensor) -> bool:
    """Whether :func:`_check_target` will not complain, on the CPU."""
    return (
        _has_memory(out) and out.device.type == "cpu" and out.is_contiguous()
        and not (out.requires_grad and torch.is_grad_enabled()) and not out.is_conj() and not out.is_neg()
    )  # fmt: skip


def _check_out(out: torch.Tensor, header: Header, accumulate: bool) -> None:
    if tuple(out.shape) != header.shape:
        raise BadShapeError(f"out: expected shape {header.shape}, got {tuple(out.shape)}")
    if out.dtype != header.dtype:
        raise TypeError(f"out: expected {header.dtype}, got {out.dtype}")
    _check_target(out, torch.device("cpu"), accumulate)


def _check_target(out: torch.Tensor, where: torch.device, accumulate: bool) -> None:
    if out.device != where:
        raise ValueError(f"out: expected a tensor on {where}, where the payload is, got one on {out.device}")
    if not _has_memory(out):
        raise TypeError(f"out: expected a tensor with memory of its own, got {type(out).__name__}")
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
        error_bound=_ops.error_bound(header.scheme, header.dtype, header.numel) if header.scheme else 0.0,
        bytes=header.total,
    )
