"""Step 3b of *fit*: draws that mean the same with sample weights as with repeated rows.

Rows are put into a canonical order that depends on their contents alone, and are drawn by cumulative weight along it.
So a row of weight 2 is drawn exactly as two copies of it would be, a row of weight 0 never, and permuting the rows
changes nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from platonic._ops import project_rows

__all__ = ["RowSampler"]


class RowSampler:
    """Rows of X in canonical order, with their weights.

    Parameters
    ----------
    X : Tensor
        (m, n).
    Y : Tensor
        (m, k): targets. Rows are ordered by class, or by the leading direction of the targets.
    group : Tensor or None
        (m,), int64: class of each row; None for regression.
    weights : Tensor or None
        (m,), positive.

    Attributes
    ----------
    order : Tensor
        (m,), int64, CPU: row indices, sorted by class or target, then by content.
    edges : Tensor
        (m,), float64, CPU: cumulative weight along `order`.
    """

    def __init__(self, X: Tensor, Y: Tensor, group: Tensor | None, weights: Tensor | None):
        content = _row_key(X).cpu()
        first = (_leading_direction(Y, weights) if group is None else group).cpu()
        by_content = torch.argsort(content, stable=True)
        self.order = by_content[torch.argsort(first[by_content], stable=True)]
        self.group = None if group is None else group.cpu()[self.order]
        weight = torch.ones(len(X), dtype=torch.float64) if weights is None else weights.cpu().double()
        self.weight = weight[self.order]
        self.edges = torch.cumsum(self.weight, 0)
        self._content, self._first = content[self.order], first[self.order]

    @property
    def total(self) -> float:
        return float(self.edges[-1])

    def positions(self, position: Tensor) -> Tensor:
        """Places in `order` of the rows that cover the cumulative weights `position`, each in [0, total)."""
        # side="right": the first row whose edge exceeds the position
        return torch.searchsorted(self.edges, position, right=True).clamp_(max=len(self.order) - 1)

    def draw(self, uniforms: np.ndarray) -> Tensor:
        """Row indices for numbers in [0, 1)."""
        return self.order[self.positions(torch.from_numpy(uniforms) * self.total)]

    def draw_pairs(self, uniforms: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pairs of rows of different classes, or of clearly different targets, for numbers (2, count) in [0, 1).

        In regression the partner's rank in target order is between a quarter and three quarters of the total weight
        away, going round at the end.
        """
        u, v = (torch.from_numpy(np.ascontiguousarray(row)) for row in uniforms)
        first = self.positions(u * self.total)
        if self.group is None:
            other = torch.remainder(u * self.total + (0.25 + 0.5 * v) * self.total, self.total)
            return self.order[first], self.order[self.positions(other)]
        mass = torch.zeros(int(self.group.max()) + 1, dtype=torch.float64).index_add_(0, self.group, self.weight)
        start = torch.cumsum(mass, 0) - mass
        own = self.group[first]
        # a position in everybody else's weight: step over the interval of the own class
        position = v * (self.total - mass[own])
        position = torch.where(position >= start[own], position + mass[own], position)
        return self.order[first], self.order[self.positions(position)]

    def spread(self, count: int) -> Tensor:
        """`count` row indices at evenly spaced cumulative weights."""
        return self.order[self.positions((torch.arange(count, dtype=torch.float64) + 0.5) * (self.total / count))]

    def fold(self) -> Tensor:
        """(m,), bool, by row index: two halves of the rows, equal rows in the same one."""
        new = torch.ones(len(self.order), dtype=torch.bool)
        new[1:] = (self._content[1:] != self._content[:-1]) | (self._first[1:] != self._first[:-1])
        half = torch.empty(len(self.order), dtype=torch.bool)
        half[self.order] = torch.cumsum(new, 0) % 2 == 0
        return half


def _row_key(X: Tensor) -> Tensor:
    """(m,), float64: one fixed pseudo-random projection of each row; equal rows get equal keys to the last bit."""
    direction = torch.from_numpy(np.random.default_rng(20).uniform(0.5, 1.5, X.shape[1])).to(X.device)
    return project_rows(X, torch.zeros_like(direction), direction)


def _leading_direction(Y: Tensor, weights: Tensor | None) -> Tensor:
    """(m,): regression targets projected on the first principal component of their standardised columns."""
    if Y.shape[1] == 1:
        return Y[:, 0]
    w = torch.ones(len(Y), 1, dtype=torch.float64, device=Y.device) if weights is None else weights[:, None]
    Yc = Y.double() - (w * Y).sum(0) / w.sum()
    Yc = Yc / (w * Yc.square()).sum(0).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    vector = torch.linalg.eigh((w * Yc).T @ Yc)[1][:, -1]
    # The sign of the first component that is not small: of two targets, both are equally large but for rounding.
    vector = vector * torch.sign(vector[vector.abs() > vector.abs().max() / 2][0])
    return (Yc * vector).sum(1)
