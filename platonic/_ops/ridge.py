"""Ops of many small ridge systems: batched and rolling."""

from __future__ import annotations

from typing import Any

import torch

from platonic._ops._entry import kernels, where

# B systems, p unknowns, r right-hand sides, m rows of data, L values of l2.

MAX_RIDGE_WIDTH = 128


def _check_ridge(name: str, arrays: dict[str, torch.Tensor], l2: torch.Tensor, p: int, limit: int) -> None:
    first, lead = next(iter(arrays.items()))
    if lead.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected {first} to be float32 or float64, got {lead.dtype}")
    for label, array in arrays.items():
        if array.dtype != lead.dtype or array.device != lead.device:
            raise TypeError(
                f"{name}: expected {label} to be {lead.dtype} on {lead.device} as {first} is, "
                f"got {array.dtype} on {array.device}"
            )
    if l2.dtype != torch.float64 or l2.device != lead.device or l2.ndim != 1:
        raise TypeError(
            f"{name}: expected l2 [L] of float64 on {lead.device}, got {tuple(l2.shape)} {l2.dtype} on {l2.device}"
        )
    if not 1 <= p <= limit:
        raise ValueError(f"{name}: expected 1 <= p <= {limit}, got p = {p}")


def _check_gram(gram: torch.Tensor, right: torch.Tensor, l2: torch.Tensor) -> tuple[int, int, int, int]:
    if gram.ndim != 3 or right.ndim != 3 or gram.shape[1] != gram.shape[2] or gram.shape[:2] != right.shape[:2]:
        raise ValueError(
            "batched_ridge_gram: expected gram [B, p, p] and right [B, p, r], "
            f"got {tuple(gram.shape)} and {tuple(right.shape)}"
        )
    _check_ridge("batched_ridge_gram", {"gram": gram, "right": right}, l2, gram.shape[1], MAX_RIDGE_WIDTH)
    return gram.shape[0], gram.shape[1], right.shape[2], l2.shape[0]


@torch.library.custom_op("platonic::batched_ridge_gram", mutates_args=())
def batched_ridge_gram(
    gram: torch.Tensor,  # [B, p, p], lower triangle
    right: torch.Tensor,  # [B, p, r]
    l2: torch.Tensor,  # [L] float64
    rtol: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # [B, L, p, r], [B, L] int32
    """(G_b + l2 I) W_b = C_b for every system and every l2; see csrc/platonic/batched_ridge.h."""
    batch, p, r, grid = _check_gram(gram, right, l2)
    gram, right, l2 = gram.contiguous(), right.contiguous(), l2.contiguous()
    weights = gram.new_empty(batch, grid, p, r)
    status = torch.empty(batch, grid, dtype=torch.int32, device=gram.device)
    kernel = kernels.batched_ridge_gram_float32 if gram.dtype == torch.float32 else kernels.batched_ridge_gram_float64
    pointers = (t.data_ptr() for t in (gram, right, l2, weights, status))
    kernel(*pointers, batch, p, r, grid, rtol, *where(gram))
    return weights, status


@batched_ridge_gram.register_fake
def _(gram: torch.Tensor, right: torch.Tensor, l2: torch.Tensor, rtol: float) -> tuple[torch.Tensor, torch.Tensor]:
    batch, p, r, grid = _check_gram(gram, right, l2)
    return gram.new_empty(batch, grid, p, r), gram.new_empty(batch, grid, dtype=torch.int32)


def _usable(status: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """`tensors` [B, L, ...] with 0 where a system was refused: it is constant (NaN) and has no gradient."""
    masks = (status.reshape(status.shape + (1,) * (t.ndim - status.ndim)) == 0 for t in tensors)
    return [
        torch.where(mask, t, torch.zeros((), dtype=t.dtype, device=t.device))
        for mask, t in zip(masks, tensors, strict=True)
    ]


def _solve_each(gram: torch.Tensor, right: torch.Tensor, l2: torch.Tensor, rtol: float) -> torch.Tensor:
    """(G_b + l2_l I)^-1 right_bl, a right-hand side [B, L, p, r] of its own for every l2."""
    solved = [batched_ridge_gram(gram, right[:, i], l2[i : i + 1], rtol)[0] for i in range(l2.shape[0])]
    return torch.cat(solved, 1) if solved else right


def _save_gram(ctx: Any, inputs: Any, output: Any) -> None:
    gram, _, l2, ctx.rtol = inputs
    ctx.save_for_backward(gram, l2, *output)
    ctx.mark_non_differentiable(output[1])


def _gram_backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gram, l2, weights, status = ctx.saved_tensors
    solved = _solve_each(gram, grad, l2, ctx.rtol)
    solved, weights = _usable(status, solved, weights)
    # dL/dA = -S W' for an A whose entries all count. Here entry (i, j) of the lower triangle stands for (j, i) too.
    full = -torch.einsum("blic,bljc->bij", solved, weights)
    lower = torch.tril(full + full.mT) - torch.diag_embed(full.diagonal(dim1=1, dim2=2))
    grad_l2 = -(solved.double() * weights).sum((0, 2, 3))
    return lower, solved.sum(1), grad_l2, None


batched_ridge_gram.register_autograd(_gram_backward, setup_context=_save_gram)


def _check_data(x: torch.Tensor, y: torch.Tensor, l2: torch.Tensor) -> tuple[int, int, int, int, int]:
    if x.ndim != 3 or y.ndim != 3 or x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"batched_ridge_data: expected x [B, m, p] and y [B, m, r], got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    _check_ridge("batched_ridge_data", {"x": x, "y": y}, l2, x.shape[2], MAX_RIDGE_WIDTH)
    return x.shape[0], x.shape[1], x.shape[2], y.shape[2], l2.shape[0]


@torch.library.custom_op("platonic::batched_ridge_data", mutates_args=())
def batched_ridge_data(
    x: torch.Tensor,  # [B, m, p]
    y: torch.Tensor,  # [B, m, r]
    l2: torch.Tensor,  # [L] float64
    fit_intercept: bool,
    rtol: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # [B, L, p, r], [B, L, r], [B, L] int32
    """Weights, intercepts (0 without fit_intercept) and status; see csrc/platonic/batched_ridge.h."""
    batch, m, p, r, grid = _check_data(x, y, l2)
    if fit_intercept and m == 0:
        raise ValueError("batched_ridge_data: an intercept needs at least one row of data, got m = 0")
    x, y, l2 = x.contiguous(), y.contiguous(), l2.contiguous()
    weights, intercepts = x.new_empty(batch, grid, p, r), x.new_zeros(batch, grid, r)
    status = torch.empty(batch, grid, dtype=torch.int32, device=x.device)
    kernel = kernels.batched_ridge_data_float32 if x.dtype == torch.float32 else kernels.batched_ridge_data_float64
    constants = intercepts.data_ptr() if fit_intercept else 0
    pointers = (x.data_ptr(), y.data_ptr(), l2.data_ptr(), weights.data_ptr(), constants, status.data_ptr())
    kernel(*pointers, batch, m, p, r, grid, rtol, *where(x))
    return weights, intercepts, status


@batched_ridge_data.register_fake
def _(
    x: torch.Tensor, y: torch.Tensor, l2: torch.Tensor, fit_intercept: bool, rtol: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, _, p, r, grid = _check_data(x, y, l2)
    return x.new_empty(batch, grid, p, r), x.new_empty(batch, grid, r), x.new_empty(batch, grid, dtype=torch.int32)


def _save_data(ctx: Any, inputs: Any, output: Any) -> None:
    x, y, l2, ctx.fit_intercept, ctx.rtol = inputs
    ctx.save_for_backward(x, y, l2, *output)
    ctx.mark_non_differentiable(output[2])


def _data_backward(
    ctx: Any, grad_w: torch.Tensor, grad_b: torch.Tensor, _: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    x, y, l2, weights, intercepts, status = ctx.saved_tensors
    x64, y64, w, b, gw, gb = (t.double() for t in (x, y, weights, intercepts, grad_w, grad_b))
    refused = (status != 0).all(1)[:, None, None]  # whose data may be NaN, which no factor of 0 takes away
    x64, y64 = torch.where(refused, 0.0, x64), torch.where(refused, 0.0, y64)
    m = x.shape[1]
    mean = x64.mean(1, keepdim=True) if ctx.fit_intercept else torch.zeros_like(x64[:, :1])
    centred = x64 - mean
    # With the intercept eliminated: (Xc'Xc + l2 I) S = dW - mean(x)' db, and s0 = db / m is its share of every row.
    if ctx.fit_intercept:
        gw = gw - mean.mT[:, None] * gb[:, :, None]
    solved = _solve_each(centred.mT @ centred, gw, l2, 0.0)
    solved, w, b, gb = _usable(status, solved, w, b, gb)
    rows = torch.einsum("bmp,blpr->blmr", centred, solved)  # d objective / d residual-side of every row
    if ctx.fit_intercept:
        rows = rows + gb[:, :, None] / m
    fitted = torch.einsum("bmp,blpr->blmr", x64, w) + (b[:, :, None] if ctx.fit_intercept else 0)
    residual = y64[:, None] - fitted
    grad_x = torch.einsum("blmr,blpr->bmp", residual, solved) - torch.einsum("blmr,blpr->bmp", rows, w)
    return grad_x.to(x.dtype), rows.sum(1).to(y.dtype), -(solved * w).sum((0, 2, 3)), None, None


batched_ridge_data.register_autograd(_data_backward, setup_context=_save_data)


# ---- rolling_ridge ----


def _check_rolling(x: torch.Tensor, y: torch.Tensor, window: int, min_periods: int) -> tuple[int, int, int]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0] or y.shape[1] == 0:
        raise ValueError(
            f"rolling_ridge: expected x [n, p] and y [n, r] with r >= 1, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.dtype not in (torch.float32, torch.float64) or y.dtype != x.dtype or y.device != x.device:
        raise TypeError(
            "rolling_ridge: expected x and y of one dtype, float32 or float64, on one device, "
            f"got {x.dtype} on {x.device} and {y.dtype} on {y.device}"
        )
    if not 1 <= x.shape[1] <= MAX_RIDGE_WIDTH:
        raise ValueError(f"rolling_ridge: expected 1 <= p <= {MAX_RIDGE_WIDTH}, got p = {x.shape[1]}")
    if window < 1 or not 1 <= min_periods <= window:
        raise ValueError(
            f"rolling_ridge: expected 1 <= min_periods <= window, got min_periods = {min_periods}, window = {window}"
        )
    return x.shape[0], x.shape[1], y.shape[1]


@torch.library.custom_op("platonic::rolling_ridge", mutates_args=())
def rolling_ridge(
    x: torch.Tensor,  # [n, p]
    y: torch.Tensor,  # [n, r]
    window: int,
    l2: float,
    fit_intercept: bool,
    min_periods: int,
    rtol: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # [n, p, r], [n, r], [n] int32
    """Weights, intercepts (0 without fit_intercept) and status of every window; see csrc/platonic/rolling_ridge.h."""
    n, p, r = _check_rolling(x, y, window, min_periods)
    x, y = x.contiguous(), y.contiguous()
    weights, intercepts = x.new_empty(n, p, r), x.new_zeros(n, r)
    status = torch.empty(n, dtype=torch.int32, device=x.device)
    kernel = kernels.rolling_ridge_float32 if x.dtype == torch.float32 else kernels.rolling_ridge_float64
    constants = intercepts.data_ptr() if fit_intercept else 0
    pointers = (x.data_ptr(), y.data_ptr(), weights.data_ptr(), constants, status.data_ptr())
    # 32 segments fill four tiles of AVX-512 lanes; a GPU has room for hundreds of blocks.
    segment = kernels.rolling_segment(n, window, 256 if x.device.type == "cuda" else 32)
    kernel(*pointers, n, p, r, window, min_periods, segment, l2, rtol, *where(x))
    return weights, intercepts, status


@rolling_ridge.register_fake
def _(
    x: torch.Tensor, y: torch.Tensor, window: int, l2: float, fit_intercept: bool, min_periods: int, rtol: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, p, r = _check_rolling(x, y, window, min_periods)
    return x.new_empty(n, p, r), x.new_empty(n, r), x.new_empty(n, dtype=torch.int32)
