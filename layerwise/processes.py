"""What several processes that train together need of one another beside gradients."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["agree", "own_path"]


@torch.no_grad()
def agree(tensors: Iterable[Tensor]) -> None:
    """Give all processes the mean, exactly, of what is floating point, and the first one's values of the rest."""
    for tensor in tensors:
        if tensor.is_floating_point():
            torch.distributed.all_reduce(tensor)
            tensor.div_(torch.distributed.get_world_size())
        else:
            torch.distributed.broadcast(tensor, 0)


def own_path(path: Path, distributed: bool) -> Path:
    if distributed and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return path.with_name(f"{path.stem}.rank{torch.distributed.get_rank()}{path.suffix}")
    return path
