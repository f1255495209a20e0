"""Thousands of small ridge regressions in one call, and ridge regressions on rolling windows.

:func:`batched_ridge` solves a batch of independent systems; :func:`rolling_ridge` fits every window of a series. Both
accept NumPy and CuPy arrays and torch tensors and return the same kind; both report every system that cannot be solved
and let it touch no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from platonic import _ops
from platonic_core.arrays import Origin, to_torch

__all__ = ["BatchedRidge", "batched_ridge", "rolling_ridge"]


class BatchedRidge(NamedTuple):
    """What :func:`batched_ridge` and :func:`rolling_ridge` return.

    Attributes
    ----------
    coef : array
        Weights; NaN where the status is not 0, and of right-hand sides that are not finite.
    intercept : array or None
        Constants; None when none were fitted.
    status : array of int32
        0: solved. i > 0: pivot i was refused (see the functions). -1: too few rows in the window.
    """

    coef: Any
    intercept: Any
    status: Any


def _enter(*arrays: Any) -> tuple[list[torch.Tensor], Origin]:
    """Tensors that share a floating-point dtype and a device. Tensors stay in their autograd graph."""
    entered = [(a, Origin("torch", a.device)) if isinstance(a, torch.Tensor) else to_torch(a) for a in arrays]
    tensors, origins = [tensor for tensor, _ in entered], [origin for _, origin in entered]
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
        if tensor.device != tensors[0].device:
            raise ValueError(f"expected all arrays on {tensors[0].device}, got one on {tensor.device}")
    if dtype.is_complex:
        raise TypeError(f"expected real arrays, got {dtype}")
    if not dtype.is_floating_point:
        dtype = torch.float64
    elif dtype not in (torch.float32, torch.float64):
        dtype = torch.float32
    return [tensor.to(dtype) for tensor in tensors], origins[0]


def _leave(origin: Origin, tensor: torch.Tensor) -> Any:
    return tensor if origin.library == "torch" else origin.back(tensor)


def batched_ridge(
    X: Any,
    Y: Any,
    l2: float | Sequence[float] | Any,
    *,
    gram: bool = False,
    fit_intercept: bool = False,
    rtol: float | None = None,
) -> BatchedRidge:
    """Solve many independent ridge regressions at once.

    For every b (and every value of `l2`), W_b minimises ``||X_b W_b - Y_b||^2 + l2 ||W_b||^2``, that is
    ``(X_b' X_b + l2 I) W_b = X_b' Y_b``, solved by a Cholesky factorisation.

    Parameters
    ----------
    X : array [B, m, p], or [B, p, p] with ``gram=True``
        Data, or symmetric Gram matrices, of which only the lower triangles are read.
    Y : array [B, m, r] or [B, m]; [B, p, r] or [B, p] with ``gram=True``
        Targets, or right-hand sides ``X_b' Y_b``.
    l2 : float or 1-D array [L]
        The penalty, absolute (not divided by m), >= 0; or a grid of penalties, all solved in the same call.
    gram : bool, default False
        X and Y are Gram matrices and right-hand sides.
    fit_intercept : bool, default False
        Also fit a constant, which is not penalised. Needs data.
    rtol : float, optional
        A pivot is refused when it is not above `rtol` times its diagonal entry (of G + l2 I), or not finite: nothing
        but rounding error is left of it. Default: 10 times the machine epsilon of the arithmetic. 0: refuse only what
        is not positive.

    Returns
    -------
    BatchedRidge
        ``coef`` [B, p, r] ([B, L, p, r] with a grid; without the last axis if Y has none), ``intercept`` [B, r]
        ([B, L, r], likewise) or None, ``status`` int32 [B] ([B, L]): 0, or the number (from 1) of the first pivot,
        so of the feature, at which a system was refused. Its coefficients are NaN; other systems are not affected.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or options do not fit.

    Notes
    -----
    With ``gram=True`` the arithmetic is that of X's dtype. From data it is float64 whatever the dtype, Gram matrices
    included (where the products of float32 numbers are exact), and the result is rounded to the dtype of X at the end:
    float32 data lose nothing to the squared condition number that float64 data would not. Integers are computed in
    float64, half precision in float32.

    Differentiable (torch) in X, Y and a tensor `l2`; gradients of Gram matrices are those of the lower triangle.
    Refused systems have zero gradients. Up to p = 128 systems are solved by the library's kernels, beyond by
    ``torch.linalg`` with the same results and statuses.

    Examples
    --------
    >>> import numpy as np
    >>> from platonic.batched import batched_ridge
    >>> X = np.ones((3, 4, 1)); Y = np.full((3, 4), 2.0)
    >>> batched_ridge(X, Y, 4.0).coef.ravel().round(9).tolist()
    [1.0, 1.0, 1.0]
    """
    (x, y), origin = _enter(X, Y)
    flat = y.ndim == 2
    y = y[..., None] if flat else y
    what = ("X [B, p, p]", "Y [B, p, r] or [B, p]") if gram else ("X [B, m, p]", "Y [B, m, r] or [B, m]")
    if x.ndim != 3 or y.ndim != 3 or x.shape[:2] != y.shape[:2] or (gram and x.shape[1] != x.shape[2]):
        raise ValueError(f"expected {what[0]} and {what[1]}, got {tuple(x.shape)} and {tuple(Y.shape)}")
    if x.shape[2] == 0:
        raise ValueError("expected at least one feature, got p = 0")
    if gram and fit_intercept:
        raise ValueError("fit_intercept needs data: Gram matrices do not hold the means; centre them before")
    if fit_intercept and x.shape[1] == 0:
        raise ValueError("fit_intercept needs at least one row of data, got m = 0")
    grid = torch.as_tensor(l2, dtype=torch.float64, device=x.device)
    if grid.ndim > 1:
        raise ValueError(f"expected l2 to be a number or a 1-D grid, got shape {tuple(grid.shape)}")
    if not bool(torch.all((grid >= 0) & torch.isfinite(grid))):
        raise ValueError(f"expected l2 to be finite and >= 0, got {l2!r}")
    if rtol is None:
        rtol = 10 * torch.finfo(x.dtype if gram else torch.float64).eps
    elif not rtol >= 0:
        raise ValueError(f"expected rtol >= 0, got {rtol!r}")
    values = grid.reshape(-1)
    if x.shape[2] > _ops.MAX_RIDGE_WIDTH:
        coef, intercept, status = _solve_wide(x, y, values, gram, fit_intercept, rtol)
    elif gram:
        coef, status = torch.ops.platonic.batched_ridge_gram(x, y, values, rtol)
        intercept = None
    else:
        coef, intercept, status = torch.ops.platonic.batched_ridge_data(x, y, values, fit_intercept, rtol)
    results = [coef, intercept if fit_intercept else None, status]
    if flat:
        results[:2] = [None if t is None else t[..., 0] for t in results[:2]]
    if grid.ndim == 0:
        results = [None if t is None else t[:, 0] for t in results]
    return BatchedRidge(*(None if t is None else _leave(origin, t) for t in results))


def _solve_wide(
    x: torch.Tensor, y: torch.Tensor, l2: torch.Tensor, gram: bool, fit_intercept: bool, rtol: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What the kernels compute, through torch.linalg, for p beyond their limit."""
    coef, intercept, status = _solve_together(x, y, l2, gram, fit_intercept, rtol)
    refused = (status != 0).all(1)[:, None, None]
    if bool(refused.any()) and torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        # Once more without their data, which may be NaN: no factor of 0 takes that away from gradients.
        x, y = torch.where(refused, 0.0, x), torch.where(refused, 0.0, y)
        coef, intercept, _ = _solve_together(x, y, l2, gram, fit_intercept, rtol)
        coef = torch.where(refused[..., None], torch.nan, coef)
        intercept = None if intercept is None else torch.where(refused, torch.nan, intercept)
    return coef, intercept, status


def _solve_together(
    x: torch.Tensor, y: torch.Tensor, l2: torch.Tensor, gram: bool, fit_intercept: bool, rtol: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    dtype, mean_x, mean_y = x.dtype, None, None
    if not gram:
        x, y = x.double(), y.double()
        if fit_intercept:
            mean_x, mean_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
            x, y = x - mean_x, y - mean_y
        x, y = x.mT @ x, x.mT @ y
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    shifted = x[:, None] + l2.to(x.dtype)[:, None, None] * eye  # [B, L, p, p]
    factor, status = torch.linalg.cholesky_ex(shifted)
    pivots = factor.diagonal(dim1=-2, dim2=-1).detach() ** 2
    small = ~(pivots > rtol * shifted.diagonal(dim1=-2, dim2=-1).detach()) | ~torch.isfinite(pivots)
    first = torch.where(small.any(-1), small.int().argmax(-1) + 1, 0).int()
    status = torch.where((status > 0) & ((first == 0) | (status < first)), status, first)
    good = (status == 0)[..., None, None]
    if not bool(good.all()):  # once more without the refused, so that no NaN reaches gradients that systems share
        factor, _ = torch.linalg.cholesky_ex(torch.where(good, shifted, eye))
    coef = torch.cholesky_solve(y[:, None].expand(-1, l2.shape[0], -1, -1), factor)
    coef = torch.where(good, coef, torch.full((), torch.nan, dtype=coef.dtype, device=coef.device))
    intercept = None
    if mean_x is not None and mean_y is not None:
        intercept = (mean_y[:, None] - mean_x[:, None] @ coef)[:, :, 0].to(dtype)
    return coef.to(dtype), intercept, status


def rolling_ridge(
    x: Any,
    y: Any,
    window: int,
    l2: float,
    *,
    fit_intercept: bool = True,
    min_periods: int | None = None,
    rtol: float | None = None,
) -> BatchedRidge:
    """Fit a ridge regression on every window of consecutive rows.

    Row t of the result is the fit of rows t - window + 1 ... t: w and b minimise
    ``sum_i (x_i w + b - y_i)^2 + l2 ||w||^2`` over the window's rows.

    Parameters
    ----------
    x : array [n, p], p <= 128
        Features, in order of time.
    y : array [n] or [n, r]
        Targets.
    window : int
        Rows in a window.
    l2 : float
        The penalty, absolute (not divided by the window), >= 0. 0 is ordinary least squares.
    fit_intercept : bool, default True
        Fit the constant b, which is not penalised.
    min_periods : int, optional
        The smallest number of usable rows that a window is fitted from; windows with fewer are NaN. Default: `window`.
        A smaller number also gives fits for the first window - 1 rows, of the rows that exist.
    rtol : float, optional
        When a window counts as singular: see :func:`batched_ridge`. Default: 10 times the float64 epsilon.

    Returns
    -------
    BatchedRidge
        ``coef`` [n, p] ([n, p, r] for y [n, r]), ``intercept`` [n] ([n, r]) or None, ``status`` int32 [n]: 0; -1: fewer
        than `min_periods` usable rows; i > 0: singular at feature i. Coefficients are NaN unless the status is 0.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or options do not fit.

    Notes
    -----
    Rows with a NaN or an infinity in x or y are left out of the windows that hold them. The arithmetic is float64; a
    Cholesky factor is up-dated with the row that enters and down-dated with the row that leaves (O(p^2) a row), and
    built anew from the data after at most ``max(window, 256)`` rows, and whenever rounding errors could have grown: the
    leaving row had leverage above 0.999, a feature's or target's sum of squares fell to 1/10,000 of its largest since,
    or a pivot fell to 1e-10 of its diagonal entry. Not differentiable.

    Examples
    --------
    >>> import numpy as np
    >>> from platonic.batched import rolling_ridge
    >>> t = np.arange(6.0)
    >>> fit = rolling_ridge(t[:, None], 2 * t + 1, window=4, l2=0.0)
    >>> fit.status.tolist(), fit.coef[3:, 0].round(9).tolist(), fit.intercept[3:].round(9).tolist()
    ([-1, -1, -1, 0, 0, 0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    """
    (xs, ys), origin = _enter(x, y)
    flat = ys.ndim == 1
    ys = ys[:, None] if flat else ys
    least = window if min_periods is None else min_periods
    for name, count in (("window", window), ("min_periods", least)):
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
            raise ValueError(f"expected {name} to be an integer of at least 1, got {count!r}")
    if not isinstance(l2, Real) or not 0 <= l2 < float("inf"):
        raise ValueError(f"expected l2 to be finite and >= 0, got {l2!r}")
    if rtol is None:
        rtol = 10 * torch.finfo(torch.float64).eps
    elif not isinstance(rtol, Real) or not rtol >= 0:
        raise ValueError(f"expected rtol >= 0, got {rtol!r}")
    if not isinstance(fit_intercept, bool):
        raise ValueError(f"expected fit_intercept to be True or False, got {fit_intercept!r}")
    options = (int(window), float(l2), bool(fit_intercept), int(least), float(rtol))
    coef, intercept, status = torch.ops.platonic.rolling_ridge(xs.detach(), ys.detach(), *options)
    if flat:
        coef, intercept = coef[..., 0], intercept[..., 0]
    return BatchedRidge(
        _leave(origin, coef), _leave(origin, intercept) if fit_intercept else None, _leave(origin, status)
    )
