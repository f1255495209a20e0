"""How kernels are told where to run. Used by the rooms' ``_ops``, the only places that take ``data_ptr()``."""

from __future__ import annotations

import torch

__all__ = ["pointer", "stream_of", "where"]


def stream_of(device: torch.device) -> int:
    """The ``cudaStream_t`` that torch is using on `device`, 0 on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def where(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(device index or -1 for the CPU, CPU threads, stream)."""
    if tensor.device.type == "cuda":
        return tensor.device.index, 0, stream_of(tensor.device)
    if tensor.device.type == "cpu":
        return -1, torch.get_num_threads(), 0
    raise ValueError(f"expected a tensor on cpu or cuda, got one on {tensor.device}")


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
