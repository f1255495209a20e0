"""What several processes that train together need of one another beside gradients."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

__all__ = ["agree", "own_path"]


@torch.no_grad()
def agree(module: nn.Module) -> None:
    """Give all processes the mean of their weights, exactly: averagers may have left steps since the last one."""
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            torch.distributed.all_reduce(tensor)
            tensor.div_(torch.distributed.get_world_size())
        else:
            torch.distributed.broadcast(tensor, 0)


def own_path(path: Path, distributed: bool) -> Path:
    if distributed and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return path.with_name(f"{path.stem}.rank{torch.distributed.get_rank()}{path.suffix}")
    return path
