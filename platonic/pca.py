"""First principal component and the samples spread evenly along it (thesis section 7.8.2, figure 7.14)."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning

from platonic import _ops
from platonic_core.arrays import to_torch

__all__ = ["Component", "first_component", "sorted_pca", "sorted_pca_rows"]

_EXACT_WIDTH = 128  # up to here the whole second-moment matrix costs no more than a few passes
_MATRIX_WIDTH = 4096  # up to here second-moment matrices are formed where that helps
_LEADING = 4  # Ritz vectors that are followed; without a sample the first pass multiplies as many
_GUIDED = 3  # vectors of the first pass where a sample leads it: the fourth costs more than it brings
_CORRECTIONS = 2  # vectors multiplied in a pass that follows the sample's model
_PROGRESS = 0.25  # a pass that leaves more of the error than this is the last to follow it
_SAMPLE_ROWS = 2048  # evenly spaced rows that give the start vectors and the model
_SAMPLE_PASSES = 8
_KEPT_PASSES = 8  # of so many passes the rows' inner products are kept: at most a quarter of the data


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
        Estimate of the sine of the angle to the exact direction, from residuals and gaps between Ritz values; 0 where
        the matrix was formed.
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
        self.delta = self.mean = torch.zeros(
            self.width, dtype=torch.float64
        )  # mean - shift, mean: by the first product
        self.dots: list[torch.Tensor] = []  # of the first _KEPT_PASSES passes: rows, less the shift, times vectors
        self.passes = 0

    def product(self, vectors: torch.Tensor) -> torch.Tensor:
        """C v [p, b] in float64 on the CPU; vectors [p, b], float64, hold numbers of x's dtype."""
        rows = vectors.T.to(self.x.device, self.x.dtype).contiguous()
        first = self.passes == 0
        dots, product, sums = _ops.centred_product(self.x, self.shift, rows, self.y, self.weight, sums=first)
        if not (torch.isfinite(product).all() and torch.isfinite(sums).all()):
            raise ValueError("expected finite numbers, got NaN or infinity (or sums that overflow)")
        self.passes += 1
        self.dots = [*self.dots, dots] if self.passes <= _KEPT_PASSES else []
        if first:
            self.delta = sums.cpu() / self.total
            self.mean = self.shift.cpu().double() + self.delta
        # sum w (v - mean)(v - mean)^T = sum w (v - shift)(v - shift)^T - total delta delta^T
        return product.cpu().T - self.total * torch.outer(self.delta, self.delta @ vectors)

    def every(self, step: int) -> _Rows:
        """Rows 0, step, 2 step, ..., in float32 about the shift: they only guide what the exact products decide."""
        x_shift, y_shift = self.shift.split([self.x.shape[1], self.width - self.x.shape[1]])
        x = (self.x[::step] - x_shift).float()
        y = None if self.y is None else (self.y[::step] - y_shift).float()
        return _Rows(x, y, None if self.weight is None else self.weight[::step].float())

    def trace(self) -> float:
        """Of C, roughly: from every eighth row, about the mean that the last product left."""
        total = 0.0
        weight = None if self.weight is None else self.weight[::8]
        means = self.mean.to(self.x.device, self.x.dtype).split([self.x.shape[1], self.width - self.x.shape[1]])
        for part, mean in zip((self.x, self.y), means, strict=True):
            if part is not None:
                square = (part[::8] - mean).square_().sum(1)
                total += 8 * float(square.sum() if weight is None else weight @ square)
        return total

    def projections(self, coefficients: torch.Tensor) -> torch.Tensor | None:
        """Float64 [m]: rows, less a constant, times the vectors of all passes so combined; None if they were not kept."""
        if not self.dots:
            return None
        out = torch.zeros(self.x.shape[0], dtype=torch.float64, device=self.x.device)
        columns = (column for dots in self.dots for column in dots.T)
        for column, factor in zip(columns, coefficients.tolist(), strict=True):
            out.add_(column, alpha=factor)  # the same operations for every row: equal rows tie
        return out

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix C [p, p] itself and the mean, float64 on the CPU."""
        result = _ops.gram(self.x, self.y, sample_weight=self.weight)
        if not torch.isfinite(result.mean).all():
            raise ValueError("expected finite numbers, got NaN or infinity (or sums that overflow)")
        return result.gram.cpu(), result.mean.cpu()


class _Ritz(NamedTuple):
    """Rayleigh-Ritz on all vectors that were multiplied so far."""

    values: torch.Tensor  # descending
    vectors: torch.Tensor  # [p, all]
    coefficients: torch.Tensor  # [multiplied vectors, all]
    error: float


class _Model(NamedTuple):
    """C as a sample shows it: eigenvalues `values` of orthonormal `vectors` [p, r], and `rest` across them."""

    values: torch.Tensor
    vectors: torch.Tensor
    rest: float

    def correct(self, residual: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """(C - theta_j)^-1 residual_j for the model's C, [p, b]: what is missing from the j-th Ritz vector."""
        inside = self.vectors.T @ residual
        distance = self.values[:, None] - theta
        near = 0.05 * theta.abs()
        distance = torch.where(distance.abs() < near, -near, distance)
        return self.vectors @ (inside / distance) + (residual - self.vectors @ inside) / (self.rest - theta)


def _solve_small(basis: torch.Tensor, result: torch.Tensor) -> _Ritz:
    """From vectors `basis` [p, n] and C times them. Rounding to dtype left them slightly oblique: their own inner product
    is used.

    The error of the leading Ritz vector is what the subspace lacks, at most its residual over the distance from its
    value to the largest one outside, for which the one after the vectors that are followed stands; what the residuals of
    those turn inside comes on top. Or, if that is less, the residual over the gap to the next value.
    """
    root = torch.linalg.cholesky(basis.T @ basis)
    small = torch.linalg.solve_triangular(root, basis.T @ result, upper=False)
    small = torch.linalg.solve_triangular(root, small.T, upper=False)
    values, u = torch.linalg.eigh((small + small.T) / 2)
    values, u = values.flip(0), torch.linalg.solve_triangular(root.T, u.flip(1), upper=True)
    vectors = basis @ u
    followed = min(_LEADING, len(values))
    residuals = result @ u[:, :followed] - values[:followed] * vectors[:, :followed]
    size, *others = torch.linalg.vector_norm(residuals, dim=0).tolist()
    gap = float(values[0] - values[1]) if len(values) > 1 else float(values[0])
    if size == 0:
        return _Ritz(values, vectors, u, 0.0)
    if gap <= 0:
        return _Ritz(values, vectors, u, float("inf"))
    error = size / gap
    if len(values) > _LEADING:
        outside = float(values[0] - values[_LEADING])
        error = min(error, size / outside * math.hypot(1, math.hypot(*others) / gap))
    return _Ritz(values, vectors, u, error)


def _new_directions(block: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns for what `block` has outside the (nearly orthonormal) `basis`; none if that is rounding."""
    length = torch.linalg.vector_norm(block, dim=0)
    for _ in range(2):
        block = block - basis @ (basis.T @ block)
    block = block[:, torch.linalg.vector_norm(block, dim=0) > 1e-6 * length]
    if basis.shape[1] + block.shape[1] > basis.shape[0]:
        return block[:, :0]
    # columns that depend on each other leave noise behind, which need not be orthogonal to the basis
    block = torch.linalg.qr(block).Q
    return torch.linalg.qr(block - basis @ (basis.T @ block)).Q


def _iterate(rows: _Rows, start: torch.Tensor, model: _Model | None, tol: float, max_passes: int) -> _Ritz:
    """Leading eigenvectors of C in a subspace that every pass over the rows widens.

    By the model's corrections of the first Ritz vectors (generalised Davidson method) while those make progress, then by
    the residuals of all that are followed (block Lanczos method). Stops when the error is at most `tol`.
    """
    basis = result = start.new_empty(start.shape[0], 0)
    block = torch.linalg.qr(start).Q
    error = float("inf")
    while True:
        block = block.to(rows.x.dtype).double()  # exactly what the kernel multiplies
        basis = torch.cat([basis, block], 1)
        result = torch.cat([result, rows.product(block)], 1)
        ritz = _solve_small(basis, result)
        if ritz.error <= tol or rows.passes >= max_passes:
            return ritz
        if rows.passes > 2 and ritz.error > _PROGRESS * error:
            model = None
        error = ritz.error
        followed = min(_LEADING if model is None else _CORRECTIONS, len(ritz.values))
        theta = ritz.values[:followed]
        block = result @ ritz.coefficients[:, :followed] - theta * ritz.vectors[:, :followed]
        if model is not None:
            block = model.correct(block, theta)
        block = _new_directions(block, ritz.vectors)
        if block.shape[1] == 0:
            return ritz


def _sample_model(sample: _Rows, start: torch.Tensor, scale: float) -> _Model:
    """What a few steps of the block Lanczos method find of a sample's second moments, times `scale`."""
    basis = result = start.new_empty(start.shape[0], 0)
    block = start
    for _ in range(_SAMPLE_PASSES):
        block = _new_directions(block, basis).to(sample.x.dtype).double()
        if block.shape[1] == 0:
            break
        basis = torch.cat([basis, block], 1)
        result = torch.cat([result, sample.product(block)], 1)
        block = result[:, -block.shape[1] :]
    ritz = _solve_small(basis, result)
    across = max(0.0, sample.trace() - float(ritz.values.sum())) / max(1, sample.width - len(ritz.values))
    return _Model(scale * ritz.values, ritz.vectors, scale * across)


def _leading(rows: _Rows, tol: float, max_passes: int) -> _Ritz:
    """:func:`_iterate`, started from and guided by what it finds on evenly spaced rows."""
    generator = torch.Generator().manual_seed(0)
    start, model = torch.randn(rows.width, _LEADING, generator=generator, dtype=torch.float64), None
    step = rows.x.shape[0] // _SAMPLE_ROWS
    if step >= 4 and (sample := rows.every(step)).total > 0:
        model = _sample_model(sample, start, rows.total / sample.total)
        # a little of the random start: the sample may know nothing of a direction that matters
        start = start[:, :_GUIDED] / torch.linalg.vector_norm(start[:, :_GUIDED], dim=0)
        start = model.vectors[:, :_GUIDED] + 1e-3 * start
    return _iterate(rows, start, model, tol, max_passes)


def _first_component(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor | None, tol: float, max_passes: int
) -> tuple[Component, torch.Tensor | None]:
    """:func:`first_component` on tensors of one dtype and device, and the rows' projections where they came with it."""
    rows = _Rows(x, y, weight)
    error, projections = float("inf"), None
    if rows.width > _EXACT_WIDTH:
        ritz = _leading(rows, tol, max_passes)
        direction, error = ritz.vectors[:, 0], ritz.error
        projections = rows.projections(ritz.coefficients[:, 0])
    passes, mean = rows.passes, rows.mean
    if not error <= tol and rows.width <= _MATRIX_WIDTH:
        matrix, mean = rows.moments()
        direction, passes, error, projections = torch.linalg.eigh(matrix).eigenvectors[:, -1], passes + 1, 0.0, None
    if not error <= tol:
        warnings.warn(
            f"the first principal component did not converge in {passes} passes: its direction is within about "
            f"{error:.1e} radians, above tol={tol:.1e}. Raise max_passes, or tol if that is enough.",
            ConvergenceWarning,
            stacklevel=4,
        )
    direction = direction / torch.linalg.vector_norm(direction)
    if direction[torch.argmax(direction.abs())] < 0:
        direction, projections = -direction, None if projections is None else -projections
    return Component(direction, mean, passes, error), projections


def first_component(
    X: Any, *, sample_weight: Any = None, y: Any = None, tol: float = 2e-5, max_passes: int = 40
) -> Component:
    """First principal component of X, or of [X | y], by subspace iteration on the fused centred product.

    Maximises sum_i w_i ((v_i - mean) . d)^2 over unit vectors d, v = [X | y]. Up to 128 columns the second-moment
    matrix is formed and decomposed. Above, each pass reads the rows once and multiplies up to 4 vectors; 2,048 evenly
    spaced rows give the first ones and, as long as that converges fast, the next (generalised Davidson method with the
    sample's second moments; then the block Lanczos method). float64 whatever the data's dtype, except that products of
    float32 rows are summed in float32 over 512 rows at a time (and inner products of float32 rows are float32).

    Parameters
    ----------
    X : array [m, n]
        NumPy, torch, CuPy or DLPack array; numbers other than float32 are taken as float64.
    sample_weight : array [m], optional
        Not negative, not all 0.
    y : array [m] or [m, k], optional
        Further columns.
    tol : float, default 2e-5
        Stop when the direction is within this angle of the exact one, in radians, as estimated from the residuals and
        the gaps between Ritz values. A projection moves by at most tol times its row's distance from the mean; measured on
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
    return _first_component(x, y_, weight, tol, max_passes)[0]


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
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise ValueError(f"sorted_pca: expected n to be an integer, got {n!r}")
    if isinstance(max_passes, bool) or not isinstance(max_passes, Integral) or max_passes < 1:
        raise ValueError(f"sorted_pca: expected max_passes to be an integer of at least 1, got {max_passes!r}")
    if not isinstance(tol, Real) or not 0 <= tol < math.inf:
        raise ValueError(f"sorted_pca: expected tol to be finite and >= 0, got {tol!r}")
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
    component, projection = _first_component(x, y, weight, tol, max_passes)
    if projection is None:
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
