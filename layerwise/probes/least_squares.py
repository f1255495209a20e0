"""The least squares distance of a representation to its labels (thesis, equation 5.3), in one pass over the samples.

N: samples; p: features; k: classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.probes.representation import as_features, check_samples

__all__ = ["LeastSquares", "least_squares_distance"]

_LEAST_ROWS = 256  # rows that are worth a decomposition


class LeastSquares:
    """Samples summed up so that their least squares distance can be told: the triangular factor of [1 Z Y].

    The factor of the rows seen so far, with further rows below it, has the factor of them all: so N need not fit into memory,
    only min(N, 1 + p + k) rows of 1 + p + k float64 numbers. Unlike Z'Z, the factor has the condition of Z, not its square.

    Parameters
    ----------
    pool : int or None, default=2
        As in :func:`least_squares_distance`.
    """

    def __init__(self, *, pool: int | None = 2) -> None:
        self.pool = pool
        self.samples = 0
        self._eps = 0.0
        self._columns = 0  # of [1 Z]
        self._factor: Tensor | None = None
        self._waiting: list[Tensor] = []

    def update(self, Z: Any, y: Any) -> None:
        """Add samples; see :func:`least_squares_distance`."""
        Z, y = check_samples(Z, y)
        rows = as_features(Z, self.pool).double()
        if self._columns not in (0, 1 + rows.shape[1]):
            raise ValueError(f"Z: expected {self._columns - 1} features as before, got {rows.shape[1]}")
        self._columns = 1 + rows.shape[1]
        self._eps = max(self._eps, torch.finfo(Z.dtype).eps)
        self.samples += len(y)
        rows = torch.cat([rows.new_ones(len(rows), 1), rows, F.one_hot(y).double()], 1)
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= max(_LEAST_ROWS, rows.shape[1]):
            self._fold()

    def _fold(self) -> Tensor:
        """The factor of all rows. A class that had not been seen was 0 in all earlier rows."""
        parts = [*([] if self._factor is None else [self._factor]), *self._waiting]
        width = max(part.shape[1] for part in parts)
        stacked = torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])
        self._factor, self._waiting = torch.linalg.qr(stacked, mode="r").R, []
        return self._factor

    def distance(self, *, intercept: bool = False) -> float:
        """The least squares distance of the samples so far; see :func:`least_squares_distance`."""
        if not self.samples:
            raise ValueError("no samples: call update first")
        factor = self._fold()
        # without its first row, the factor is that of the centred columns
        below = factor[1:, 1:] if intercept else factor[:, 1:]
        Z, Y = below[:, : self._columns - 1], below[:, self._columns - 1 :]
        norms = torch.linalg.vector_norm(factor[:, 1 : self._columns], dim=0)
        return _residual(Z[:, norms > 0] / norms[norms > 0], Y, self._eps) / self.samples


def _residual(Z: Tensor, Y: Tensor, eps: float) -> float:
    """||Y - Z Z+ Y||_F^2, what is left of Y outside the span of Z's columns.

    The columns had norm 1 before they were centred, if they are, and entries known to within eps; so singular values are
    uncertain by eps sqrt(p), and what is not larger counts as 0.
    """
    rows, p = Z.shape
    if not p:
        return float(Y.square().sum())
    tolerance = p**0.5 * max(eps, p * torch.finfo(torch.float64).eps)
    if rows >= p:
        R = torch.linalg.qr(torch.cat([Z, Y], 1), mode="r").R
        inverse = torch.linalg.solve_triangular(R[:p, :p], torch.eye(p, dtype=R.dtype, device=R.device), upper=True)
        # the smallest singular value is at least 1 / ||inverse||_F: where that is enough, all columns count
        if float(torch.linalg.matrix_norm(inverse)) * tolerance < 1:
            return float(R[p:, p:].square().sum())
    U, singular, _ = torch.linalg.svd(Z, full_matrices=False)
    U = U[:, singular > tolerance]
    return float((Y - U @ (U.T @ Y)).square().sum())


def least_squares_distance(Z: Any, y: Any, *, intercept: bool = False, pool: int | None = 2) -> float:
    """How far labels are from what is linear in a representation: ||Y - Z Z+ Y||_F^2 / N (thesis, equation 5.3).

    Y (N, k) holds the labels' one-hot codes, Z+ is the pseudoinverse. The distance is the mean squared error, summed over
    classes, of the best linear read-out of these samples: from 0, where classes are linear in Z, to 1. It never rises with more
    features and is 0 as soon as N of them are independent, so it tells something only of many more samples than features.

    Parameters
    ----------
    Z : array (N, C), (N, T, C) or (N, C, H, W)
        Representation of the samples, in floating point.
    y : array (N,)
        Class numbers from 0.
    intercept : bool, default=False
        Whether a constant column joins Z, which is to say that Z and Y are centred. Equation 5.3 has none, although the layer
        that follows Z usually has biases; with it, the distance does not depend on where Z's zero lies.
    pool : int or None, default=2
        Images are averaged over a grid of so many cells a side, as for linear separability, tokens over all; None flattens
        them, as the equation reads.

    Returns
    -------
    float
        Computed in float64 by orthogonal transformations. Rank is decided at the precision of Z's dtype.
    """
    sums = LeastSquares(pool=pool)
    sums.update(Z, y)
    return sums.distance(intercept=intercept)
