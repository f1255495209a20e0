"""What every op of this room needs: the kernels, where they run, checks of their arguments."""

from __future__ import annotations

from typing import overload

import torch

from platonic_core import _C
from platonic_core.launch import pointer, where

__all__ = ["check", "check_rows", "kernels", "pointer", "where"]

kernels = _C.platonic


@overload
def check(tensor: torch.Tensor, name: str, shape: tuple[int, ...], like: torch.Tensor, op: str) -> torch.Tensor: ...
@overload
def check(tensor: None, name: str, shape: tuple[int, ...], like: torch.Tensor, op: str) -> None: ...
def check(
    tensor: torch.Tensor | None, name: str, shape: tuple[int, ...], like: torch.Tensor, op: str
) -> torch.Tensor | None:
    """`tensor`, contiguous, after checking that it has `shape` and the dtype and device of `like`."""
    if tensor is None:
        return None
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: expected {name} of shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{op}: expected {name} of {like.dtype} on {like.device} like x, got {tensor.dtype} on {tensor.device}"
        )
    return tensor.contiguous()


def check_rows(x: torch.Tensor, op: str) -> torch.Tensor:
    """`x` [m, n], float32 or float64, with contiguous columns (rows may be any distance apart)."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: expected x of float32 or float64, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"{op}: expected x of 2 dimensions [rows, columns], got shape {tuple(x.shape)}")
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        return x.contiguous() if x.stride(0) != 0 else x.clone(memory_format=torch.contiguous_format)
    return x
