"""Step 3d of *fit*: which of many candidate units make a layer.

Orthogonal least squares (Chen, Billings and Luo 1989): take, one after another (in layers of more than 64 units a few at
a time), the candidates that lower the least squares distance of the read-out most. It sees only the moments of the
candidates. Selection fits noise where there is noise to fit, so it is used only where two-fold cross-validation says that
it predicts better than the first candidates drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from platonic.moments import Moments, compute_moments, merge_moments

__all__ = ["choose_units", "select_forward"]

_STEPS = 64  # at most this many steps: wide layers take several units a step
_TWO_FOLDS = (
    4096  # rows, or total weight, up to which the two halves swap roles; more rows make one split reliable enough
)
_TEST_L2 = (1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def select_forward(moments: Moments, count: int, l2: float) -> Tensor:
    """Indices (count,) of the columns of Z that forward selection takes, in the order in which it takes them.

    A partial Cholesky factorisation of the correlation matrix, pivoted by how much a column lowers the error; `l2` is
    added to its diagonal. Costs p count^2 operations for p candidates. Constant columns come last.
    """
    p = len(moments.zz)
    spread = moments.zz.diagonal().clamp_min(0)
    dead = spread <= 1e-12 * spread.max()
    inverse = torch.where(dead, 0.0, spread.sqrt().clamp_min(torch.finfo(torch.float64).tiny).reciprocal())
    gram = (moments.zz * inverse[:, None]).mul_(inverse)
    cross = moments.zy * inverse[:, None]
    unexplained = gram.diagonal().clone()
    rows = gram.new_empty(count, p)
    free = torch.ones(p, dtype=torch.bool, device=gram.device)
    taken: list[Tensor] = []
    block = -(-count // _STEPS)
    done = 0
    while done < count:
        size = min(block, count - done)
        gain = torch.where(free, cross.square().sum(1) / (unexplained + l2), -1.0)
        chosen = gain.topk(size).indices
        free[chosen] = False
        taken.append(chosen)
        remainder = gram[chosen] - rows[:done, chosen].T @ rows[:done]
        corner = remainder[:, chosen]
        factor = _factor_corner(corner, l2)
        row = torch.linalg.solve_triangular(factor, remainder, upper=False)
        cross = cross - row.T @ torch.linalg.solve_triangular(factor, cross[chosen], upper=False)
        unexplained = (unexplained - row.square().sum(0)).clamp_min(0)
        rows[done : done + size] = row
        done += size
    return torch.cat(taken) if taken else torch.empty(0, dtype=torch.int64, device=gram.device)


def _factor_corner(corner: Tensor, l2: float) -> Tensor:
    shift = l2 + 1e-14
    eye = torch.eye(len(corner), dtype=corner.dtype, device=corner.device)
    while True:
        factor, info = torch.linalg.cholesky_ex(corner + shift * eye)
        if int(info) == 0:
            return factor
        shift *= 10


def choose_units(
    A: Tensor,
    Y: Tensor,
    weights: Tensor | None,
    halves: tuple[Tensor | slice, Tensor | slice],
    count: int,
    l2: float,
) -> tuple[Tensor, bool]:
    """Which `count` of the candidate columns of A (r, c) to keep, and whether selection was used.

    Parameters
    ----------
    halves : tuple
        Index or slice of the rows of each half for cross-validation; equal rows are in the same half.
    """
    first = torch.arange(min(count, A.shape[1]), device=A.device)
    if len(first) == A.shape[1]:
        return first, False
    parts = [(A[half], Y[half], None if weights is None else weights[half]) for half in halves]
    if not all(len(part[0]) for part in parts):
        return first, False
    moments = [compute_moments(*part) for part in parts]
    selected_error = first_error = 0.0
    total = max(len(A), sum(half.total for half in moments))
    for train, test in ((0, 1), (1, 0))[: 2 if total <= _TWO_FOLDS else 1]:
        selected_error += _test_error(moments[train], select_forward(moments[train], count, l2), parts[test])
        first_error += _test_error(moments[train], first, parts[test])
    if selected_error >= first_error:
        return first, False
    return select_forward(merge_moments(*moments), count, l2), True


def _test_error(moments: Moments, columns: Tensor, test: tuple[Tensor, Tensor, Tensor | None]) -> float:
    """Squared error on `test` of the ridge fitted to `columns`, at the l2 that suits it best."""
    A, Y, weights = test
    spread = moments.zz.diagonal()[columns].clamp_min(0)
    scale = torch.where(spread > 0, spread, 1.0).sqrt()
    gram = moments.zz[columns][:, columns] / scale[:, None] / scale
    cross = moments.zy[columns] / scale[:, None]
    centred = (A[:, columns].double() - moments.mean_z[columns]) / scale
    target = Y.double() - moments.mean_y

    def error(l2: float) -> float:
        shifted = gram.clone()
        shifted.diagonal().add_(l2)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) != 0:
            return float("inf")
        square = (target - centred @ torch.cholesky_solve(cross, factor)).square().sum(1)
        return float(square.sum() if weights is None else weights @ square)

    # the error falls and rises along the grid: walk downhill from its middle, first to more
    middle = len(_TEST_L2) // 2
    best = error(_TEST_L2[middle])
    for side in (_TEST_L2[middle + 1 :], reversed(_TEST_L2[:middle])):
        before = best
        for l2 in side:
            value = error(l2)
            if not value < best and best < float("inf"):
                break
            best = value
        if best < before:
            break
    return best
