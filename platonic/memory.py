"""Large temporaries of *fit*, in huge pages where the system gives them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty_rows", "rows_together"]

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def rows_together(most: int, like: Tensor) -> int:
    """How many rows to take in one step: `most`, which keeps a step in a CPU's cache; elsewhere many more."""
    return most if like.device.type == "cpu" else 256 * most


def empty_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """An uninitialised matrix of the dtype and device of `like`.

    NumPy asks Linux for huge pages, torch does not: touching 100 MB for the first time then takes 8 ms instead of 36.
    """
    if like.device.type != "cpu":
        return torch.empty(rows, columns, dtype=like.dtype, device=like.device)
    return torch.from_numpy(np.empty((rows, columns), _NUMPY[like.dtype]))
