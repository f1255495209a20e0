"""Steps 2 to 4 of *compress* on a CUDA device, where one call does all of them. Bytes and values are those of the CPU.

Which mode and how many bytes a tensor gets is known only to the device: a payload is written to the room that the
longest possible one needs, and its size is a tensor.
"""

from __future__ import annotations

import torch

from weight_compression import _device_ops
from weight_compression.config import CompressionConfig
from weight_compression.errors import SizeLimitError
from weight_compression.payload import peek

__all__ = ["compress", "compress_into", "decompress"]


def compress_into(
    x: torch.Tensor, shape: tuple[int, ...], config: CompressionConfig, out: torch.Tensor
) -> torch.Tensor:
    """The payload of flat contiguous x into `out`; its size on the device, -1 if it may not be stored. Never waits."""
    return _device_ops.compress(x, shape, config, out)


def compress(x: torch.Tensor, shape: tuple[int, ...], config: CompressionConfig, bound: int) -> torch.Tensor | None:
    """The payload of flat contiguous x, at most `bound` bytes, in memory of its own; None if it may not be stored."""
    out = torch.empty(bound, dtype=torch.uint8, device=x.device)
    size = int(compress_into(x, shape, config, out))
    return None if size < 0 else out[:size].clone()


def decompress(
    payload: torch.Tensor, out: torch.Tensor | None, accumulate: bool, scale: float, max_bytes: int, check: bool
) -> torch.Tensor | None:
    """`out` or a new tensor, or None if the payload is not one of such a tensor. Waits unless there is `out` and no check."""
    if not payload.is_contiguous():
        payload = payload.contiguous()
    wait = check or out is None
    if out is None:
        found = peek(payload)
        if found is None:
            return None
        dtype, shape = found
        size = shape.numel() * dtype.itemsize
        if size > max_bytes:
            raise SizeLimitError(f"expected at most max_bytes = {max_bytes}, got a tensor of {size} bytes")
        out = torch.empty(shape, dtype=dtype, device=payload.device)
    status = _device_ops.decompress(payload, out, accumulate, scale, check)
    torch.autograd.graph.increment_version(out)  # kernels write by address: autograd must know
    return None if wait and int(status) != 0 else out
