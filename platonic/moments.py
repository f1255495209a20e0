"""Step 4a of *fit*: centred second moments of [Z | Y], in float64 whatever the dtype of the data.

Everything a layer needs of its m rows is in these few small matrices: the ridge solve, the standard deviations that make
scales relative, and the principal components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from platonic._ops import gram, use_gram_kernel
from platonic.memory import empty_rows

__all__ = ["Moments", "compute_moments", "merge_moments"]

_CHUNK = 8192  # rows whose products may be added up in float32 before they go into a float64 sum
_SHIFT_ROWS = 256  # about so many evenly spaced rows give the point that moments are first taken about
_BLOCK = 384  # columns whose products with themselves and those to their right are made at once


@dataclass(frozen=True)
class Moments:
    """Weighted, centred second moments of a representation Z (m, p) and targets Y (m, k); all float64.

    Attributes
    ----------
    zz, zy, yy : Tensor
        (p, p), (p, k) and (k, k): sums over rows of w (z - mean z)'(z - mean z), and so on.
    mean_z, mean_y : Tensor
        (p,), (k,): weighted means.
    total : float
        Sum of the weights; m without weights.
    """

    zz: Tensor
    zy: Tensor
    yy: Tensor
    mean_z: Tensor
    mean_y: Tensor
    total: float

    def std_z(self) -> Tensor:
        """(p,): weighted standard deviation of each column of Z."""
        return (self.zz.diagonal() / self.total).clamp_min(0).sqrt()


def compute_moments(Z: Tensor, Y: Tensor, weights: Tensor | None) -> Moments:
    """Moments in one pass over the rows: by our kernel where it is faster (decided by shape and dtype), else by BLAS.

    With BLAS, rows are shifted by the mean of some of them before any product, which keeps the products small where a mean is
    large beside its standard deviation; what remains of the mean is taken out exactly at the end. Products are made in
    the dtype of `Z` and added up in float64 chunk by chunk, so the relative error of an entry stays near the dtype's
    rounding unit for any number of rows.

    Raises
    ------
    ValueError
        If a product is not finite: everything that is solved for comes from these matrices, so it stops here.
    """
    m, p = Z.shape
    k = Y.shape[1]
    moments = (_by_kernel if use_gram_kernel(m, p + k, Z.dtype) and Z.device.type == "cpu" else _by_blas)(Z, Y, weights)
    if not all(bool(torch.isfinite(A).all()) for A in (moments.zz, moments.zy, moments.yy)):
        raise ValueError(
            "The moments of a layer are not finite: its representation, or the targets, have overflowed. "
            "Scale X, or lower alpha or beta."
        )
    return moments


def _by_kernel(Z: Tensor, Y: Tensor, weights: Tensor | None) -> Moments:
    p = Z.shape[1]
    result = gram(Z, Y, sample_weight=None if weights is None else weights.to(Z.dtype))
    joint, mean = result.gram, result.mean
    return Moments(
        joint[:p, :p].contiguous(), joint[:p, p:].contiguous(), joint[p:, p:].contiguous(), mean[:p], mean[p:],
        float(result.total),
    )  # fmt: skip


def _by_blas(Z: Tensor, Y: Tensor, weights: Tensor | None) -> Moments:
    m, p = Z.shape
    k = Y.shape[1]
    total = float(m) if weights is None else float(weights.sum())
    some = slice(None, None, max(1, m // _SHIFT_ROWS))
    shift_z = _weighted_mean(Z[some], None if weights is None else weights[some]).to(Z.dtype)
    shift_y = _weighted_mean(Y[some], None if weights is None else weights[some]).to(Y.dtype)
    zz = torch.zeros(p, p, dtype=torch.float64, device=Z.device)
    zy = torch.zeros(p, k, dtype=torch.float64, device=Z.device)
    yy = torch.zeros(k, k, dtype=torch.float64, device=Z.device)
    sum_z = torch.zeros(p, dtype=torch.float64, device=Z.device)
    sum_y = torch.zeros(k, dtype=torch.float64, device=Z.device)
    width = max(1, -(-p // max(1, round(p / _BLOCK))))
    buffer = empty_rows(min(m, _CHUNK), p, Z)
    for start in range(0, m, _CHUNK):
        rows = slice(start, start + _CHUNK)
        y = Y[rows] - shift_y
        z = torch.sub(Z[rows], shift_z, out=buffer[: len(y)])
        if weights is None:
            wz, wy = z, y
        else:
            w = weights[rows, None].to(Z.dtype)
            wz, wy = w * z, w * y
        for left in range(0, p, width):  # on and above the diagonal
            zz[left : left + width, left:] += wz[:, left : left + width].T @ z[:, left:]
        zy += wz.T @ y
        yy += wy.T @ y
        sum_z += wz.sum(0, dtype=torch.float64)
        sum_y += wy.sum(0, dtype=torch.float64)
    zz -= torch.outer(sum_z, sum_z / total)
    for left in range(0, p, width):
        right = min(p, left + width)
        corner = zz[left:right, left:right]
        corner.copy_((corner + corner.T) / 2)
        zz[right:, left:right] = zz[left:right, right:].T
    zy -= torch.outer(sum_z, sum_y / total)
    yy -= torch.outer(sum_y, sum_y / total)
    return Moments(zz, zy, yy, shift_z.double() + sum_z / total, shift_y.double() + sum_y / total, total)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of `a` and `b` together (Chan, Golub and LeVeque 1983)."""
    total = a.total + b.total
    factor = a.total * b.total / total
    dz, dy = b.mean_z - a.mean_z, b.mean_y - a.mean_y
    return Moments(
        a.zz + b.zz + factor * torch.outer(dz, dz),
        a.zy + b.zy + factor * torch.outer(dz, dy),
        a.yy + b.yy + factor * torch.outer(dy, dy),
        a.mean_z + (b.total / total) * dz,
        a.mean_y + (b.total / total) * dy,
        total,
    )


def _weighted_mean(A: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return A.mean(0, dtype=torch.float64)
    return (weights @ A.double()) / weights.sum().clamp_min(torch.finfo(torch.float64).tiny)
