"""What the tests of the codec's CUDA kernels share: running them anywhere, and holding them to the CPU's."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

import weight_compression as wc
from cuda_emulation.codec import EmulatedCodec
from platonic_core import _C
from test_weight_codec import draw
from weight_compression import _device_ops, _ops, codec, device

NO_GPU = "needs a CUDA device and a CUDA build"


def gpu_is_here() -> bool:
    return torch.cuda.is_available() and _C.has_cuda


no_gpu = pytest.mark.skipif(not gpu_is_here(), reason=NO_GPU)


class Backend:
    """compress and decompress of CPU tensors by the kernels for devices, wherever they run."""

    def __init__(self, where: str, kernels: EmulatedCodec | None):
        self.where, self.kernels = where, kernels

    def compress(self, x: torch.Tensor, config: wc.CompressionConfig | None = None) -> torch.Tensor | None:
        """The payload, on the CPU; None for values that are not finite."""
        flat, shape = codec._flat_values(x.to(self.where))
        bound = wc.compress_bound(x.numel(), x.dtype, x.ndim)
        payload = device.compress(flat, shape, config or wc.CompressionConfig(), bound)
        return None if payload is None else payload.cpu()

    def decode(
        self, payload: torch.Tensor, out: torch.Tensor, *, accumulate=False, scale=1.0, check=True
    ) -> tuple[torch.Tensor, bool]:
        """What `out` is afterwards, and whether the payload was good."""
        there = out.to(self.where, copy=True)
        status = _device_ops.decompress(payload.to(self.where), there, accumulate, scale, check)
        return there.cpu(), int(status) == 0


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def check_equal(backend: Backend, x: torch.Tensor, config: wc.CompressionConfig | None = None) -> str:
    """Payload and values are the CPU's; returns the mode."""
    expected = wc.compress(x, config)
    payload = backend.compress(x, config)
    assert payload is not None and torch.equal(payload, expected)
    values, good = backend.decode(expected, torch.full_like(x, 1))
    assert good and same_bits(values, wc.decompress(expected))
    return wc.payload_info(payload).mode


# What kinds of payloads there are: values, options, the mode that comes out.
PAYLOADS = {
    "entropy": ("heavy", {}, "entropy"),
    "fixed": ("uniform", {"floor_bits": 9.0}, "fixed"),
    "constant": ("constant", {}, "constant"),
    "raw": ("normal", {"max_error": 1e-9}, "raw"),
    "coded groups": ("heavy", {"group_size": 50}, "entropy"),
    "fixed groups": ("uniform", {"group_size": 300, "floor_bits": 9.0}, "fixed"),
    "coded escapes": ("heavy", {"clip_quantile": 0.9}, "entropy"),
    "fixed escapes": ("uniform", {"clip_quantile": 0.95, "bits": 12.1}, "fixed"),
    "planes": ("normal", {"lossless": True}, "planes"),
}


def payload_of(kind: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    values, options, mode = PAYLOADS[kind]
    x = torch.full((n,), 0.75, dtype=dtype) if values == "constant" else draw(values, n, dtype)
    payload = wc.compress(x, wc.CompressionConfig(**options))
    assert wc.payload_info(payload).mode == mode
    return payload


def reseal(data: np.ndarray, header: int) -> torch.Tensor:
    """With the header's checksum made right again, as an attacker would."""
    data = data.copy()
    data[header - 4 : header] = np.frombuffer(struct.pack("<I", _ops.crc32c(data[: header - 4])), np.uint8)
    return torch.from_numpy(data)


def agree(backend: Backend, payload: torch.Tensor, like: torch.Tensor, check: bool) -> bool:
    """Whether a payload is good: the device and the CPU say the same, and then have the same values."""
    try:
        expected = wc.decompress(payload, torch.empty_like(like), check=check)
    except (wc.PayloadError, TypeError):
        expected = None
    values, good = backend.decode(payload, torch.zeros_like(like), check=check)
    assert good == (expected is not None)
    assert not good or same_bits(values, expected)
    return good
