"""Step 3c of *fit*: the ridge read-out of a representation, which scores it and drives the next layer (equation 7.2).

A read-out chooses its penalty (given, or by leave-one-out error), solves for it once, and keeps what the rest of the fit
asks of it: coefficients, means and scales, fitted values, the least squares distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from platonic.moments import Moments
from platonic.solvers import SOLVERS, Problem, Solution

__all__ = ["LooRows", "Readout", "ReadoutOptions", "fit_readout"]

_LEAST_FREEDOM = 1e-3  # smallest mean of 1 - leverage at which a leave-one-out error is believed
_SCALE_FLOOR = 0.01
_DECADES = [10.0**e for e in range(-13, 2)]
_EXACT_WORK = 2**27  # m p min(m, p) up to which leave-one-out errors come from a decomposition of the rows
_GRAM_FLOOR = {torch.float64: 1e-10, torch.float32: 1e-6}  # smallest l2 tried on a Gram matrix made in this dtype


@dataclass(frozen=True)
class ReadoutOptions:
    """l2 : float or 'loo'. relative : whether l2 is per unit of total weight and per squared scale of a column."""

    l2: float | str
    solver: str
    tol: float | None
    relative: bool


@dataclass(frozen=True)
class LooRows:
    """The rows on which leave-one-out errors are measured, the same for every layer.

    Attributes
    ----------
    index : Tensor or None
        (r,), rows; None means all.
    weight : Tensor
        (r,), how often each counts.
    left_out : Tensor
        (r,), the weight in the fit that leaving one sample out takes away.
    """

    index: Tensor | None
    weight: Tensor
    left_out: Tensor


@dataclass(frozen=True)
class Readout:
    """Attributes
    ----------
    solution : Solution
    moments : Moments
    scale : Tensor
        (p,): scale of each column (:func:`column_scale`).
    l2 : float
        As given or chosen (relative or absolute, as the options say).
    fitted : Tensor
        (m, k): predictions for the rows it was fitted to.
    lsd : float
        Weighted mean over rows of ||y - fitted||^2: the least squares distance of the thesis (equation 5.3) when l2 is 0.
    """

    solution: Solution
    moments: Moments
    scale: Tensor
    l2: float
    fitted: Tensor
    lsd: float


def fit_readout(
    Z: Tensor, Y: Tensor, weights: Tensor | None, options: ReadoutOptions, rows: LooRows, scale: Tensor | None = None
) -> Readout:
    """The read-out of Y (m, k) from Z (m, p). `scale` (p,) overrides the columns' scales (for inputs)."""
    problem = Problem(Z, Y, weights, options.tol)
    if scale is None:
        scale = column_scale(problem)
    unit = penalty_unit(problem, scale, options.relative)
    l2 = choose_l2(problem, unit, rows) if options.l2 == "loo" else float(options.l2)
    solution = SOLVERS[options.solver](problem, l2 * unit)
    fitted = torch.addmm(solution.intercept.to(Z.dtype), Z, solution.coef.to(Z.dtype))
    square = (Y - fitted).double().square().sum(1)
    lsd = square.mean() if weights is None else (weights @ square) / problem.moments.total
    return Readout(solution, problem.moments, scale, l2, fitted, float(lsd))


def column_scale(problem: Problem) -> Tensor:
    """(p,): standard deviations, but at least a hundredth of their root mean square.

    A unit that is active on a row or two has a tiny standard deviation on the training rows and a large value on the
    first other row that wakes it: the floor keeps the penalty on its coefficient. Constant columns have scale 1.
    """
    std = torch.where(problem.dead, 0.0, problem.moments.std_z())
    alive = int((~problem.dead).sum())
    floor = _SCALE_FLOOR * float((std.square().sum() / max(1, alive)).sqrt())
    return torch.where(problem.dead, 1.0, std.clamp_min(floor))


def penalty_unit(problem: Problem, scale: Tensor, relative: bool) -> Tensor:
    """(p,): the penalty on each row of the coefficients per unit of l2."""
    if relative:
        return problem.moments.total * scale.square()
    return torch.ones_like(scale)


def choose_l2(problem: Problem, unit: Tensor, rows: LooRows) -> float:
    """The l2 with the smallest leave-one-out error, among powers of ten."""
    path = _path(problem, unit, rows)
    return path.best()


def leave_one_out_scores(
    Z: Tensor, Y: Tensor, weights: Tensor | None, readout: Readout, options: ReadoutOptions, rows: LooRows
) -> Tensor:
    """(r, k): what each row of `rows` would be predicted by the read-out fitted without it, at the read-out's l2."""
    problem = Problem(Z, Y, weights, options.tol, readout.moments)
    unit = penalty_unit(problem, readout.scale, options.relative)
    residual, remaining = _path(problem, unit, rows).residuals(readout.l2)
    targets = Y if rows.index is None else Y[rows.index]
    return targets.double() - residual / remaining[:, None]


def _path(problem: Problem, unit: Tensor, rows: LooRows) -> _ExactPath | _GramPath:
    m, p = problem.Z.shape
    average = float((problem.moments.zz.diagonal() / unit).sum()) / max(1, p) if p else 1.0
    if m * p * min(m, p) <= _EXACT_WORK:
        return _ExactPath(problem, unit, rows, average)
    return _GramPath(problem, unit, rows, average)


class _Path:
    """Residuals r and 1 - h of the chosen rows, for any l2.

    The leave-one-out residual of a row is r / (1 - h), h being the leverage of the weight that is left out.
    """

    def __init__(self, problem: Problem, unit: Tensor, rows: LooRows, average: float):
        self.problem, self.rows, self.average = problem, rows, average
        self.total = problem.moments.total
        weights = problem.weights
        index = rows.index
        m = len(problem.Z)
        w = torch.ones(m, dtype=torch.float64, device=problem.Z.device) if weights is None else weights
        self.row_weights = w if index is None else w[index]
        self.left_out = rows.left_out
        self.grid = _DECADES

    def residuals(self, l2: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def error(self, l2: float) -> float:
        """Mean squared leave-one-out residual; infinite where the fit is next to interpolation and the error says little."""
        residual, remaining = self.residuals(l2)
        if float(self.rows.weight @ remaining) < _LEAST_FREEDOM * float(self.rows.weight.sum()):
            return float("inf")
        squared = (residual / remaining[:, None]).square().sum(1)
        return float(self.rows.weight @ squared)

    def best(self) -> float:
        # of equal errors (all infinite, say) the larger penalty
        return min(reversed(self.grid), key=lambda l2: self.error(l2 * self.average)) * self.average


class _ExactPath(_Path):
    """From a singular value decomposition of the scaled rows: exact for any l2, at m p min(m, p) once."""

    def __init__(self, problem: Problem, unit: Tensor, rows: LooRows, average: float):
        super().__init__(problem, unit, rows, average)
        Zc, Yc = (A.double() for A in problem.centred_rows())
        Zc = Zc / torch.where(problem.dead, torch.inf, unit.sqrt())
        if Zc.shape[0] > 2 * Zc.shape[1]:
            Q, R = torch.linalg.qr(Zc)
            U, S, _ = torch.linalg.svd(R, full_matrices=False)
            U = Q @ U
        else:
            U, S, _ = torch.linalg.svd(Zc, full_matrices=False)
        if len(S):
            kept = max(Zc.shape) * torch.finfo(torch.float64).eps * S[0] < S
            U, S = U[:, kept], S[kept]
        self.square = S.square()
        projected = U.T @ Yc
        index = rows.index
        self.root = self.row_weights.sqrt()[:, None]
        self.U = U if index is None else U[index]
        self.inside = projected
        # What the span of the columns leaves of each row, of its leverage and of Y: 0 for a row that lies in the span,
        # where rounding would otherwise be divided by rounding.
        outside = 1 - self.row_weights / self.total - self.U.square().sum(1)
        self.outside = torch.where(outside > 1e-12, outside, 0.0)
        rest = (Yc if index is None else Yc[index]) - self.U @ projected
        self.rest = torch.where(self.outside[:, None] > 0, rest, 0.0)

    def residuals(self, l2: float) -> tuple[Tensor, Tensor]:
        # sums of what the span leaves and what the penalty takes: no cancellation where a leverage is nearly 1, and where it is
        # 1, as of a fit that goes through the row, the limit of a penalty that vanishes
        if len(self.square):
            l2 = max(l2, 1e-30 * float(self.square.max()))
        lost = l2 / (self.square + l2)
        residual = (self.rest + self.U @ (lost[:, None] * self.inside)) / self.root
        remaining = self.outside + self.U.square() @ lost
        share = self.left_out / self.row_weights
        return residual, ((1 - share) + share * remaining).clamp_min(1e-300)


class _GramPath(_Path):
    """From a Cholesky factor of the scaled Gram matrix per l2; the grid is walked downhill from the first finite error."""

    def __init__(self, problem: Problem, unit: Tensor, rows: LooRows, average: float):
        super().__init__(problem, unit, rows, average)
        moments = problem.moments
        root = unit.sqrt()
        alive = ~problem.dead
        self.gram = moments.zz / root[:, None] / root * alive * alive[:, None]
        self.zy = moments.zy / root[:, None] * alive[:, None]
        index = rows.index
        Z, Y = (problem.Z, problem.Y) if index is None else (problem.Z[index], problem.Y[index])
        self.Z = ((Z.double() - moments.mean_z) / torch.where(problem.dead, torch.inf, root)).T.contiguous()
        self.Y = Y.double() - moments.mean_y
        floor = _GRAM_FLOOR[problem.Z.dtype]
        self.grid = [l2 for l2 in _DECADES if l2 >= floor]

    def residuals(self, l2: float) -> tuple[Tensor, Tensor]:
        shifted = self.gram.clone()
        shifted.diagonal().add_(l2)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) != 0:
            return torch.full_like(self.Y, torch.inf), torch.ones_like(self.row_weights)
        residual = self.Y - self.Z.T @ torch.cholesky_solve(self.zy, factor)
        leverage = torch.linalg.solve_triangular(factor, self.Z, upper=False).square().sum(0)
        remaining = 1 - self.left_out * (leverage + 1 / self.total)
        # rounding can take a leverage past 1: such a row says nothing, and infinity keeps this l2 from being chosen
        return torch.where((remaining > 1e-9)[:, None], residual, torch.inf), remaining.clamp_min(1e-9)

    def best(self) -> float:
        known: dict[int, float] = {}

        def error(i: int) -> float:
            if i not in known:
                known[i] = self.error(self.grid[i] * self.average)
            return known[i]

        at = self.grid.index(1e-4)
        while at + 1 < len(self.grid) and error(at) == float("inf"):  # next to interpolation: only more can help
            at += 1
        for step in (-1, 1):
            while 0 <= at + step < len(self.grid) and error(at + step) < error(at):
                at += step
        return self.grid[at] * self.average
