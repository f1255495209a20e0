"""Step 4 of *fit*: ridge regression of Y on [1 Z], the intercept unpenalised.

Every solver minimises, over B (p, k) and an intercept,

    sum_i w_i ||z_i B + intercept - y_i||^2 + sum_j penalty_j ||B_j||^2

and knows no layers. :data:`SOLVERS` maps names to functions ``(Problem, penalty) -> Solution``. Whatever the dtype of the
data, moments, factors, coefficients and intercepts are float64; products with the m rows are made in the data's dtype.

==========  ============================================================================================================
cholesky    equilibrated Gram matrix, Cholesky; where the pivots say that the Gram matrix has lost digits, conjugate
            gradients on the rows, preconditioned by the factor, bring back the accuracy of a QR decomposition. A matrix
            that is singular to rounding gets the smallest multiple of the identity that makes it positive definite,
            reported as ``jitter``.
eig         eigendecomposition of the scaled Gram matrix; directions under the tolerance are left out (``rank``).
svd, pinv   singular value decomposition of the rows (two names of one solver); singular values under the tolerance are
            left out.
lstsq       ``torch.linalg.lstsq`` (LAPACK gelsd) of the rows with the penalty appended as rows.
==========  ============================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from platonic.moments import Moments, compute_moments

__all__ = ["SOLVERS", "Problem", "Solution", "solve_moments", "solve_ridge"]

_EPS = torch.finfo(torch.float64).eps
_REFINE_BELOW = 1e-8  # smallest pivot of the equilibrated Gram matrix at which its factor alone is still good to 1e-8
_MAX_ITERATIONS = 40  # of conjugate gradients; each costs 4 m p k operations
_NOISE = 8.0  # components of a gradient under this many roundings of the residual are taken for 0


@dataclass
class Problem:
    """One least squares problem. `moments` are computed on first use.

    Attributes
    ----------
    Z, Y : Tensor
        (m, p) and (m, k).
    weights : Tensor or None
        (m,) float64, positive.
    tol : float or None
        Relative tolerance of the rank decision in ``eig``, ``svd`` and ``lstsq``; None means max(m, p) times the
        rounding unit of float64.
    """

    Z: Tensor
    Y: Tensor
    weights: Tensor | None = None
    tol: float | None = None
    given_moments: Moments | None = field(default=None, repr=False)

    @cached_property
    def moments(self) -> Moments:
        return self.given_moments or compute_moments(self.Z, self.Y, self.weights)

    @cached_property
    def dead(self) -> Tensor:
        """(p,): columns that are constant to rounding; their coefficients are 0."""
        moments = self.moments
        spread = moments.zz.diagonal().clamp_min(0)
        noise = 32 * torch.finfo(self.Z.dtype).eps * moments.mean_z.abs()
        return spread <= noise.square() * moments.total

    def rank_tolerance(self) -> float:
        return max(self.Z.shape) * _EPS if self.tol is None else self.tol

    def centred_rows(self) -> tuple[Tensor, Tensor]:
        """Rows of Z and Y less their means, times the root of their weight; in the dtype of Z."""
        moments = self.moments
        Zc = self.Z - moments.mean_z.to(self.Z.dtype)
        Yc = self.Y.to(self.Z.dtype) - moments.mean_y.to(self.Z.dtype)
        if self.weights is None:
            return Zc, Yc
        root = self.weights.sqrt().to(self.Z.dtype)[:, None]
        return Zc.mul_(root), Yc.mul_(root)


@dataclass(frozen=True)
class Solution:
    """Attributes
    ----------
    coef, intercept : Tensor
        (p, k) and (k,), float64.
    rank : int
        Number of directions of Z that the solution uses.
    jitter : float
        What was added to the unit diagonal of the equilibrated Gram matrix to make it positive definite; 0 normally.
    """

    coef: Tensor
    intercept: Tensor
    rank: int
    jitter: float = 0.0


def solve_cholesky(problem: Problem, penalty: Tensor) -> Solution:
    moments, dead = problem.moments, problem.dead
    gram, scale = _equilibrate(moments.zz, dead)
    ridge = torch.where(dead, 1.0, penalty / scale.square())
    gram.diagonal().add_(ridge)
    factor, pivots, jitter = _factor(gram, torch.finfo(problem.Z.dtype).eps)
    rhs = moments.zy / scale[:, None]
    coef = torch.cholesky_solve(rhs, factor)
    if float(pivots.min()) < _REFINE_BELOW:
        ridge = torch.where(dead, 0.0, ridge)
        coef = _refine(problem, coef, factor, scale, ridge)
    rank = int(((pivots > 10 * jitter) & ~dead).sum())
    return _with_intercept(problem, coef / scale[:, None], rank, jitter)


def solve_eig(problem: Problem, penalty: Tensor) -> Solution:
    moments, dead = problem.moments, problem.dead
    gram, scale = _equilibrate(
        moments.zz + torch.diag(penalty), dead
    )  # the rank is that of the problem with its penalty
    values, vectors = torch.linalg.eigh(gram)
    kept = values > problem.rank_tolerance() * values[-1].clamp_min(0)
    inverse = torch.where(kept, 1 / values, 0.0)
    coef = vectors @ (inverse[:, None] * (vectors.T @ (moments.zy / scale[:, None]))) / scale[:, None]
    return _with_intercept(problem, coef, int((kept & (values > 0)).sum()))


def solve_svd(problem: Problem, penalty: Tensor) -> Solution:
    Zc, Yc, scale = _scaled_rows(problem, penalty)
    U, S, Vh = torch.linalg.svd(Zc, full_matrices=False)
    if not len(S):
        return _with_intercept(problem, torch.zeros_like(problem.moments.zy), 0)
    kept = problem.rank_tolerance() * S[0] < S
    inverse = torch.where(kept, 1 / S, 0.0)
    coef = Vh.T @ (inverse[:, None] * (U.T @ Yc)) / scale[:, None]
    return _with_intercept(problem, coef, int(kept.sum()))


def solve_lstsq(problem: Problem, penalty: Tensor) -> Solution:
    Zc, Yc, scale = _scaled_rows(problem, penalty)
    driver = "gelsd" if Zc.device.type == "cpu" else "gels"
    result = torch.linalg.lstsq(Zc, Yc, rcond=problem.rank_tolerance(), driver=driver)
    rank = int(result.rank) if driver == "gelsd" else Zc.shape[1]
    return _with_intercept(problem, result.solution / scale[:, None], rank)


SOLVERS: dict[str, Callable[[Problem, Tensor], Solution]] = {
    "cholesky": solve_cholesky,
    "eig": solve_eig,
    "svd": solve_svd,
    "pinv": solve_svd,
    "lstsq": solve_lstsq,
}


def solve_ridge(
    Z: Tensor,
    Y: Tensor,
    l2: float = 0.0,
    *,
    weights: Tensor | None = None,
    solver: str = "cholesky",
    tol: float | None = None,
) -> Solution:
    """Ridge regression of Y (m, k) on Z (m, p) with an unpenalised intercept: the plain entry to :data:`SOLVERS`."""
    problem = Problem(Z, Y, weights, tol)
    return SOLVERS[solver](problem, torch.full((Z.shape[1],), l2, dtype=torch.float64, device=Z.device))


def solve_moments(zz: Tensor, penalty: Tensor, right: Tensor) -> Tensor:
    """``(zz + diag(penalty))^-1 right`` for a centred Gram matrix, by Cholesky with the jitter of :func:`_factor`."""
    return factor_moments(zz, penalty)(right)


def factor_moments(zz: Tensor, penalty: Tensor) -> Callable[[Tensor], Tensor]:
    """:func:`solve_moments` as a function of the right-hand sides; the matrix is factored once."""
    dead = (zz.diagonal() + penalty) <= 0
    scale = torch.where(dead, 1.0, zz.diagonal() + penalty).sqrt()
    gram = (zz + torch.diag(penalty)) / scale[:, None] / scale
    gram.diagonal().add_(dead.double())
    factor, _, _ = _factor(gram, torch.finfo(torch.float64).eps)
    return lambda right: torch.cholesky_solve(right / scale[:, None], factor) / scale[:, None]


def _with_intercept(problem: Problem, coef: Tensor, rank: int, jitter: float = 0.0) -> Solution:
    moments = problem.moments
    coef = torch.where(problem.dead[:, None], 0.0, coef)
    return Solution(coef, moments.mean_y - moments.mean_z @ coef, rank, jitter)


def _equilibrate(gram: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix with unit diagonal (rows and columns of dead columns are 0), and the scale of each column."""
    scale = torch.where(dead, 1.0, gram.diagonal().clamp_min(0)).sqrt()
    scaled = gram / scale[:, None] / scale
    alive = ~dead
    return scaled * alive * alive[:, None], scale


def _factor(gram: Tensor, data_eps: float) -> tuple[Tensor, Tensor, float]:
    """Lower Cholesky factor of ``gram + jitter I`` for the smallest jitter in {0, j0, 10 j0, ...} that works.

    The pivots of a matrix of order p that is singular to rounding are noise of up to about p eps: such a factor is not
    accepted without jitter.
    """
    p = len(gram)
    floor = 4 * p * _EPS
    jitter = 0.0
    while True:
        shifted = gram if jitter == 0 else gram + jitter * torch.eye(p, dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            pivots = factor.diagonal().square()
            if jitter > 0 or p == 0 or float(pivots.min()) > floor:
                return factor, pivots if p else gram.new_ones(1), jitter
        jitter = max(floor, 1e-14, data_eps**2) if jitter == 0 else 10 * jitter


def _refine(problem: Problem, coef: Tensor, factor: Tensor, scale: Tensor, ridge: Tensor) -> Tensor:
    """Conjugate gradients on the least squares problem, preconditioned by the Cholesky factor (CGLS).

    Residuals come from the rows, not from the Gram matrix, so the error is governed by the condition number of Z instead
    of its square. What rounding can explain of a gradient is taken for 0: along a null direction of Z nothing else is
    there, and the factor, which has next to nothing there either, would blow it up. Each right-hand side stops when a step
    no longer lowers its objective measurably; a step that does not lower it is not taken.
    """
    Zs, Yc = problem.centred_rows()
    dtype = Zs.dtype
    Zs = Zs / torch.where(problem.dead, torch.inf, scale).to(dtype)
    eps = torch.finfo(dtype).eps
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    gain = torch.linalg.solve_triangular(factor, eye, upper=False).norm(dim=1)  # of noise, per preconditioned component

    def gradient(residual: Tensor, coef: Tensor) -> Tensor:
        g = (Zs.T @ residual).double() - ridge[:, None] * coef
        g = torch.linalg.solve_triangular(factor, g, upper=False)
        noise = _NOISE * eps * residual.double().norm(dim=0)
        return torch.where(g.abs() > gain[:, None] * noise, g, 0.0)

    def objective(residual: Tensor, coef: Tensor) -> Tensor:
        return residual.double().square().sum(0) + (ridge[:, None] * coef.square()).sum(0)

    residual = Yc - (Zs @ coef.to(dtype))
    value = objective(residual, coef)
    direction = g = gradient(residual, coef)
    size = g.square().sum(0)
    target = Yc.double().square().sum(0)
    live = torch.ones_like(size, dtype=torch.bool)
    for _ in range(_MAX_ITERATIONS):
        live = live & (size > (1e-13**2) * value) & (value > (4 * eps) ** 2 * target)
        if not bool(live.any()):
            break
        step_direction = torch.linalg.solve_triangular(factor.T, direction, upper=True)
        moved = Zs @ step_direction.to(dtype)
        curvature = moved.double().square().sum(0) + (ridge[:, None] * step_direction.square()).sum(0)
        step = torch.where(live & (curvature > 0), size / curvature.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        new_coef = coef + step * step_direction
        new_residual = residual - (step * moved).to(dtype)
        new_value = objective(new_residual, new_coef)
        live = live & (new_value < value)
        coef = torch.where(live, new_coef, coef)
        residual = torch.where(live, new_residual, residual)
        live, value = live & (value - new_value > 1e-12 * new_value), torch.where(live, new_value, value)
        g = gradient(residual, coef)
        new_size = g.square().sum(0)
        direction = (
            g + torch.where(size > 0, new_size / size.clamp_min(torch.finfo(torch.float64).tiny), 0.0) * direction
        )
        size = new_size
    return coef


def _scaled_rows(problem: Problem, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred rows in float64, the penalty appended as rows where it is not 0, with columns of unit norm (dead ones 0)."""
    dead = problem.dead
    scale = torch.where(dead, 1.0, problem.moments.zz.diagonal().clamp_min(0) + penalty).sqrt()
    Zc, Yc = (A.double() for A in problem.centred_rows())
    Zc = Zc / scale * ~dead
    if bool((penalty > 0).any()):
        Zc = torch.cat([Zc, torch.diag(penalty.sqrt() / scale * ~dead)])
        Yc = torch.cat([Yc, Yc.new_zeros(len(penalty), Yc.shape[1])])
    return Zc, Yc, scale
