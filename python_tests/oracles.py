"""Slow, plain answers that several test files compare with."""

from __future__ import annotations

import numpy as np
import torch

from platonic.solvers import Problem


def brute_ridge(Z, Y, penalty=0.0, weights=None):
    """(coef, intercept) of ridge regression with an unpenalised intercept, by NumPy least squares on stacked rows.

    `penalty` is a number or one number per column; with penalty 0 the minimum-norm solution of the centred problem.
    """
    Z, Y = np.asarray(Z, dtype=np.float64), np.asarray(Y, dtype=np.float64)
    w = np.ones(len(Z)) if weights is None else np.asarray(weights, dtype=np.float64)
    mean_z, mean_y = w @ Z / w.sum(), w @ Y / w.sum()
    root = np.sqrt(w)[:, None]
    rows, values = root * (Z - mean_z), root * (Y - mean_y)
    penalty = np.broadcast_to(np.asarray(penalty, dtype=np.float64), Z.shape[1])
    if (penalty > 0).any():
        rows = np.vstack([rows, np.diag(np.sqrt(penalty))])
        values = np.vstack([values, np.zeros((Z.shape[1], Y.shape[1]))])
    coef = np.linalg.lstsq(rows, values, rcond=None)[0]
    return coef, mean_y - mean_z @ coef


def brute_leave_one_out(Z, Y, penalty, weights=None, left_out=None):
    """(m, k): prediction of each row by the ridge fitted with `left_out` (default 1) of its weight taken away."""
    m = len(Z)
    w = np.ones(m) if weights is None else np.asarray(weights, dtype=np.float64)
    left_out = np.ones(m) if left_out is None else np.asarray(left_out)
    out = np.empty_like(np.asarray(Y, dtype=np.float64))
    for i in range(m):
        rest = w.copy()
        rest[i] -= left_out[i]
        rest[np.abs(rest) < 1e-12] = 0
        coef, intercept = brute_ridge(Z, Y, penalty, rest)
        out[i] = Z[i] @ coef + intercept
    return out


def problem(Z, Y, weights=None, tol=None):
    """A Problem of tensors that share no memory with the arrays given."""
    return Problem(*(None if a is None else torch.tensor(np.asarray(a)) for a in (Z, Y, weights)), tol)


def spread_columns(rng, m, p, condition):
    """(m, p) centred matrix whose singular values fall geometrically from 1 to 1 / condition."""
    A = rng.standard_normal((m, p))
    U, _, Vt = np.linalg.svd(A - A.mean(0), full_matrices=False)
    return (U * np.geomspace(1, 1 / condition, min(m, p))) @ Vt


def repeated(weights, *arrays):
    """Arrays with row i repeated weights[i] times."""
    return [np.repeat(a, weights, axis=0) for a in arrays]
