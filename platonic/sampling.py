"""Step 3b of *fit*: draws that mean the same with sample weights as with repeated rows.

Rows are put into a canonical order that depends on their contents alone, and are drawn by cumulative weight along it.
So a row of weight 2 is drawn exactly as two copies of it would be, a row of weight 0 never, and permuting the rows
changes nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from platonic._ops import project_rows

__all__ = ["canonical_order", "draw_pairs"]


def canonical_order(X: torch.Tensor, first_key: torch.Tensor | None = None) -> torch.Tensor:
    """Row indices of `X` (m, n) in an order that does not depend on the order of the rows.

    Sorted by `first_key` (m,), when given, then by one fixed pseudo-random projection of the row. The projection is
    computed row by row in a fixed order of operations, so equal rows tie exactly and are neighbours.

    Returns
    -------
    order : torch.Tensor
        (m,), int64, on the CPU.
    """
    direction = np.random.default_rng(0x9E3779B9).uniform(0.5, 1.5, X.shape[1])
    key = project_rows(X, torch.from_numpy(direction).to(X.device)).cpu()
    order = torch.argsort(key, stable=True)
    if first_key is not None:
        order = order[torch.argsort(first_key.cpu()[order], stable=True)]
    return order


def draw_pairs(
    order: torch.Tensor,
    group: torch.Tensor | None,
    sample_weight: torch.Tensor | None,
    uniforms: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pairs of rows that should be told apart.

    Parameters
    ----------
    order : torch.Tensor
        (m,): rows in canonical order, sorted by class (classes) or by target (regression).
    group : torch.Tensor or None
        (m,), int64: class of each row. None means regression: the partner's rank in target order is between a
        quarter and three quarters of the total weight away, going round at the end.
    sample_weight : torch.Tensor or None
        (m,), non-negative.
    uniforms : numpy.ndarray
        (2, count): numbers in [0, 1) that decide the draws.

    Returns
    -------
    first, second : torch.Tensor
        (count,), int64: row indices; the classes of each pair differ.
    """
    weight = torch.ones(len(order), dtype=torch.float64) if sample_weight is None else sample_weight.cpu().double()[order]
    edges = torch.cumsum(weight, 0)
    total = edges[-1]
    u, v = torch.from_numpy(np.ascontiguousarray(uniforms))

    def row_at(position: torch.Tensor) -> torch.Tensor:
        # side="right": position p falls to the first row whose cumulative weight exceeds p, never to weight 0
        return torch.searchsorted(edges, position, right=True).clamp_(max=len(order) - 1)

    first = row_at(u * total)
    if group is None:
        second = row_at(torch.remainder(u * total + (0.25 + 0.5 * v) * total, total))
        return order[first], order[second]
    labels = group.cpu()[order]
    n_classes = int(labels.max()) + 1
    mass = torch.zeros(n_classes, dtype=torch.float64).index_add_(0, labels, weight)
    start = torch.cumsum(mass, 0) - mass
    own = labels[first]
    # a position in everybody else's weight: step over the own class's interval
    position = v * (total - mass[own])
    position = torch.where(position >= start[own], position + mass[own], position)
    return order[first], order[row_at(position)]
