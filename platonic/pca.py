"""First principal component and the samples spread evenly along it (thesis section 7.8.2, figure 7.14)."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning

from platonic import _ops
from platonic_core.arrays import to_torch

__all__ = ["Component", "first_component", "sorted_pca", "sorted_pca_rows"]

_EXACT_WIDTH = 128  # up to here the whole second-moment matrix costs no more than a few passes
_MATRIX_WIDTH = 4096  # up to here second-moment matrices are formed where that helps
_BLOCK = 4  # vectors multiplied in one pass over the data
_SAMPLE_ROWS = 2048  # evenly spaced rows that give the start vectors
_SAMPLE_PASSES = 8


class Component(NamedTuple):
    """First principal component of [X | Y].

    Attributes
    ----------
    direction : torch.Tensor
        float64 [p], unit length, its largest-magnitude entry positive.
    mean : torch.Tensor
        float64 [p], weighted mean of the rows.
    passes : int
        Passes over all rows, without the projection; 1 where the second-moment matrix was formed instead.
    error : float
        Bound on the sine of the angle to the exact direction (residual over gap), 0 where it was formed.
    """

    direction: torch.Tensor
    mean: torch.Tensor
    passes: int
    error: float


class _Rows:
    """Products with the centred second-moment matrix of [x | y], one pass over the rows each."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor | None):
        self.x, self.y, self.weight = x, y, weight
        self.total = float(x.shape[0] if weight is None else weight.sum(dtype=torch.float64))
        self.width = x.shape[1] + (0 if y is None else y.shape[1])
        parts = [part[:: max(1, x.shape[0] // 1024)].mean(0) for part in (x, y) if part is not None]
        self.shift = torch.cat(parts)  # any point near the mean
        self.mean = torch.zeros(self.width, dtype=torch.float64)

    def product(self, vectors: torch.Tensor) -> torch.Tensor:
        """C v [p, b] in float64 on the CPU; vectors [p, b], float64, hold numbers of x's dtype."""
        rows = vectors.T.to(self.x.device, self.x.dtype).contiguous()
        product, sums = _ops.centred_product(self.x, self.shift, rows, self.y, self.weight)
        if not torch.isfinite(sums).all():
            raise ValueError("expected finite numbers, got NaN or infinity (or sums that overflow)")
        delta = sums.cpu() / self.total
        self.mean = self.shift.cpu().double() + delta
        # sum w (v - mean)(v - mean)^T = sum w (v - shift)(v - shift)^T - total delta delta^T
        return product.cpu().T - self.total * torch.outer(delta, delta @ vectors)

    def every(self, step: int) -> _Rows:
        """Rows 0, step, 2 step, ..."""
        y, weight = (None if t is None else t[::step].contiguous() for t in (self.y, self.weight))
        return _Rows(self.x[::step].contiguous(), y, weight)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix C [p, p] itself and the mean, float64 on the CPU."""
        result = _ops.gram(self.x, self.y, sample_weight=self.weight)
        if not torch.isfinite(result.mean).all():
            raise ValueError("expected finite numbers, got NaN or infinity (or sums that overflow)")
        return result.gram.cpu(), result.mean.cpu()


class _Ritz(NamedTuple):
    vectors: torch.Tensor  # [p, up to _BLOCK]: the leading Ritz vectors
    error: float
    passes: int


def _iterate(rows: _Rows, block: torch.Tensor, tol: float, max_passes: int) -> _Ritz:
    """Leading eigenvectors of C by block Lanczos iteration with full orthogonalisation.

    Every pass multiplies one block; a Rayleigh-Ritz step on all blocks so far gives the estimate v, theta. Stops when
    ||C v - theta v|| / (theta_1 - theta_2), a bound on the sine of the angle to the eigenvector, is at most `tol`.
    """
    basis = result = block.new_empty(block.shape[0], 0)
    block = torch.linalg.qr(block).Q
    passes = 0
    while passes < max_passes:
        passes += 1
        block = block.to(rows.x.dtype).double()  # exactly what the kernel multiplies
        basis = torch.cat([basis, block], 1)
        result = torch.cat([result, rows.product(block)], 1)
        # Rounding to dtype left the basis slightly oblique: solve the small problem in its own inner product.
        root = torch.linalg.cholesky(basis.T @ basis)
        small = torch.linalg.solve_triangular(root, basis.T @ result, upper=False)
        small = torch.linalg.solve_triangular(root, small.T, upper=False)
        theta, u = torch.linalg.eigh((small + small.T) / 2)
        theta, u = theta.flip(0), torch.linalg.solve_triangular(root.T, u.flip(1)[:, :_BLOCK], upper=True)
        vectors = basis @ u
        residual = result @ u[:, 0] - theta[0] * vectors[:, 0]
        size = float(torch.linalg.vector_norm(residual))
        gap = float(theta[0] - theta[1]) if theta.numel() > 1 else float(theta[0])
        error = 0.0 if size == 0 else size / gap if gap > 0 else float("inf")
        if error <= tol:
            break
        block = result[:, -block.shape[1] :]
        length = torch.linalg.vector_norm(block, dim=0)
        for _ in range(2):
            block = block - basis @ torch.cholesky_solve(basis.T @ block, root)
        block = block[:, torch.linalg.vector_norm(block, dim=0) > 1e-12 * length]  # else invariant up to rounding
        if block.shape[1] == 0 or basis.shape[1] + block.shape[1] > basis.shape[0]:
            break
        block = torch.linalg.qr(block).Q
    return _Ritz(vectors, error, passes)


def _leading(rows: _Rows, tol: float, max_passes: int) -> tuple[torch.Tensor, torch.Tensor, int, float]:
    """(direction, mean, passes, error) by iteration, started from what it finds on evenly spaced rows."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(rows.width, _BLOCK, generator=generator, dtype=torch.float64)
    step = rows.x.shape[0] // _SAMPLE_ROWS
    if step >= 4 and (sample := rows.every(step)).total > 0:
        block = _iterate(sample, block, tol, _SAMPLE_PASSES).vectors
    ritz = _iterate(rows, block, tol, max_passes)
    return ritz.vectors[:, 0], rows.mean, ritz.passes, ritz.error


def _first_component(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor | None, tol: float, max_passes: int
) -> Component:
    """:func:`first_component` on tensors of one dtype and device."""
    rows = _Rows(x, y, weight)
    passes, error = 0, float("inf")
    if rows.width > _EXACT_WIDTH:
        direction, mean, passes, error = _leading(rows, tol, max_passes)
    if not error <= tol and rows.width <= _MATRIX_WIDTH:
        matrix, mean = rows.moments()
        direction, passes, error = torch.linalg.eigh(matrix).eigenvectors[:, -1], passes + 1, 0.0
    if not error <= tol:
        warnings.warn(
            f"the first principal component did not converge in {passes} passes: its direction is within "
            f"{error:.1e} radians, above tol={tol:.1e}. Raise max_passes, or tol if that is enough.",
            ConvergenceWarning,
            stacklevel=4,
        )
    direction = direction / torch.linalg.vector_norm(direction)
    largest = direction[torch.argmax(direction.abs())]
    return Component(torch.where(largest < 0, -direction, direction), mean, passes, error)


def first_component(
    X: Any, *, sample_weight: Any = None, y: Any = None, tol: float = 2e-5, max_passes: int = 40
) -> Component:
    """First principal component of X, or of [X | y], by block Lanczos iteration on the fused centred product.

    Maximises sum_i w_i ((v_i - mean) . d)^2 over unit vectors d, v = [X | y]. Up to 128 columns the second-moment
    matrix is formed and decomposed. Above, each pass reads the rows once and multiplies 4 vectors; the start comes
    from 2,048 evenly spaced rows. float64 whatever the data's dtype, except that products of float32 rows are summed
    in float32 over 512 rows at a time.

    Parameters
    ----------
    X : array [m, n]
        NumPy, torch, CuPy or DLPack array; numbers other than float32 are taken as float64.
    sample_weight : array [m], optional
        Not negative, not all 0.
    y : array [m] or [m, k], optional
        Further columns.
    tol : float, default 2e-5
        Stop when the direction is certain within this angle in radians: residual norm over the gap between the two
        largest Ritz values. A projection moves by at most tol times its row's distance from the mean; measured on
        MNIST, by less than 1e-6 of the range of all projections.
    max_passes : int, default 40
        Cap. An iteration that reaches it is replaced by a decomposition of the matrix up to 4,096 columns.

    Returns
    -------
    Component
        direction and mean (float64 tensors on the CPU), passes, error.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        If `max_passes` was reached with more than 4,096 columns.
    """
    x, y_, weight, _ = _enter(X, y, sample_weight)
    return _first_component(x, y_, weight, tol, max_passes)


def sorted_pca(
    X: Any, n: int, *, sample_weight: Any = None, y: Any = None, tol: float = 2e-5, max_passes: int = 40
) -> Any:
    """Indices of `n` samples spread evenly along the first principal component of X, or of [X | y].

    The samples serve as weight vectors of a first layer (Sorted PCA, thesis section 7.8.2). Every row is projected on
    the component, the projections are sorted (equal ones stay in row order), and from `n` equal shares of the sorted
    rows, or of their weight, the one in the middle of each is taken: rank floor((j + 1/2) m / n) for j = 0 .. n - 1.
    Figure 7.14 takes ranks j m / n, which always holds the lowest sample and never the highest, and by its
    ``arange(0, m - 1, m / n)`` one sample fewer for some sizes; middles treat both ends alike and always give n.

    Parameters
    ----------
    X : array [m, n_features]
        NumPy, torch, CuPy or DLPack array; numbers other than float32 are taken as float64.
    n : int
        How many, 1 to m.
    sample_weight : array [m], optional
        Not negative, not all 0. A sample that holds several shares is returned several times, one of weight 0 never;
        weights of 1 are the same as none, and a weight of 2 the same as having the row twice.
    y : array [m] or [m, k], optional
        Take the component of [X | y], and project on it.
    tol, max_passes
        See :func:`first_component`.

    Returns
    -------
    array of int64 [n]
        Row indices in the order of their projections, in X's library and on its device.

    Raises
    ------
    ValueError
        If `n` is below 1 or above m, shapes do not match, or weights are negative or all 0.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        See :func:`first_component`.
    """
    x, y_, weight, origin = _enter(X, y, sample_weight)
    m = x.shape[0]
    if not 1 <= n <= m:
        raise ValueError(f"sorted_pca: expected 1 <= n <= {m}, the number of samples, got n={n}")
    return origin.back(sorted_pca_rows(x, n, weight, y_, tol, max_passes))


def sorted_pca_rows(
    x: torch.Tensor,
    n: int,
    weight: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    tol: float = 2e-5,
    max_passes: int = 40,
) -> torch.Tensor:
    """:func:`sorted_pca` on tensors of one device that need no checks; y and weight are taken in x's dtype."""
    weight = None if weight is None else weight.to(x.dtype)
    y = None if y is None else y.to(x.dtype)
    component = _first_component(x, y, weight, tol, max_passes)
    projection = _ops.project_rows(x, component.mean.to(x.device), component.direction.to(x.device), y)
    order = torch.sort(projection, stable=True).indices
    return order[_evenly_spaced(n, x.shape[0], None if weight is None else weight[order]).to(x.device)]


def _evenly_spaced(n: int, m: int, weight: torch.Tensor | None) -> torch.Tensor:
    """Positions among `m` sorted rows in the middle of `n` equal shares of their number or weight."""
    odd = 2 * torch.arange(n, dtype=torch.int64) + 1
    if weight is None:
        return odd * m // (2 * n)
    reached = torch.cumsum(weight.double(), 0)
    middle = odd.to(weight.device) * reached[-1] / (2 * n)
    return torch.searchsorted(reached, middle, right=True)


def _enter(X: Any, y: Any, sample_weight: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Any]:
    """X, y and weights as tensors of X's floating dtype on its device, checked, and where X came from."""
    x, origin = to_torch(X)
    if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"expected X of shape [samples, features], at least one each, got {tuple(x.shape)}")
    if x.is_complex():
        raise ValueError("expected real numbers in X, got complex ones")
    if x.dtype != torch.float32:
        x = x.double()
    columns = None
    if y is not None:
        columns = to_torch(y)[0].to(x.device, x.dtype)
        columns = columns[:, None] if columns.ndim == 1 else columns
        if columns.ndim != 2 or columns.shape[0] != x.shape[0]:
            raise ValueError(f"expected y of {x.shape[0]} rows like X, got shape {tuple(columns.shape)}")
        if not torch.isfinite(columns).all():
            raise ValueError("expected finite numbers in y, got NaN or infinity")
    weight = None
    if sample_weight is not None:
        weight = to_torch(sample_weight)[0].to(x.device, x.dtype)
        if weight.shape != (x.shape[0],):
            raise ValueError(f"expected sample_weight of shape ({x.shape[0]},), got {tuple(weight.shape)}")
        if not (torch.isfinite(weight).all() and (weight >= 0).all() and (weight > 0).any()):
            raise ValueError("expected sample_weight finite, not negative and not all 0")
    return x, columns, weight, origin
