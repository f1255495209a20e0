"""Representations on their first two principal components (figure 5.9)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.probes.representation import as_features, check_samples

__all__ = ["Projection", "project_pca"]


class Projection(NamedTuple):
    """Attributes
    ----------
    points : Tensor
        (N, components), float64 on the CPU.
    labels : Tensor
        (N,), class numbers.
    share : float
        Of the variance, that the components hold.
    """

    points: Tensor
    labels: Tensor
    share: float


def project_pca(Z: Any, y: Any, *, components: int = 2, pool: int | None = None) -> Projection:
    """Samples on the first principal components of their representation, by an exact decomposition.

    Parameters
    ----------
    Z : array (N, C), (N, T, C) or (N, C, H, W)
    y : array (N,)
        Class numbers, which the components do not depend on.
    components : int, default=2
        Where there are fewer, the rest is 0.
    pool : int or None
        See :func:`~layerwise.probes.as_features`.

    Returns
    -------
    Projection
        The sign of a component is such that the sample farthest out on it is positive.
    """
    Z, y = check_samples(Z, y)
    if components < 1:
        raise ValueError(f"components: expected a positive number, got {components}")
    rows = as_features(Z, pool).double()
    rows = rows - rows.mean(0)
    N, p = rows.shape
    if p <= N:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        points = rows @ vectors.flip(1)[:, :components]
    else:
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        points = vectors.flip(1)[:, :components] * values.flip(0)[:components].clamp_min(0).sqrt()
    far = points.gather(0, points.abs().argmax(0, keepdim=True))
    points = torch.nn.functional.pad(points * torch.where(far < 0, -1.0, 1.0), (0, components - points.shape[1]))
    total = float(values.clamp_min(0).sum())
    share = float(values.flip(0)[:components].clamp_min(0).sum()) / total if total else 0.0
    return Projection(points.cpu(), y.cpu(), share)
