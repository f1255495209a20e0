"""Step 5 of *fit*: the only file of this room that takes ``data_ptr()``.

Each op checks dtype, shape, device and layout once, allocates outputs and scratch, passes the current stream, and
is registered with ``torch.library`` (schema and fake; autograd where a gradient makes sense) as ``platonic::<name>``.
"""

from __future__ import annotations

import torch

from platonic_core import _C

_kernels = _C.platonic


def _stream(device: torch.device) -> int:
    """The ``cudaStream_t`` that torch is using on `device`, 0 on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _where(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(device index or -1 for the CPU, CPU threads, stream): how every kernel is told where to run."""
    if tensor.device.type == "cuda":
        return tensor.device.index, 0, _stream(tensor.device)
    if tensor.device.type == "cpu":
        return -1, torch.get_num_threads(), 0
    raise ValueError(f"expected a tensor on cpu or cuda, got one on {tensor.device}")
