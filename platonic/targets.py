"""Step 3a of *fit*: where the weights of a hidden layer come from.

Every projection is a function ``(LayerInput, width, rng) -> Weights`` in :data:`PROJECTIONS`; a layer's pre-activations
are Z W + b. Notation: Z (m, n) is the representation the layer sees, Y (m, k) the targets, B (n, k) the ridge read-out
of Y from Z.

*Equation 7.2.* The target A P with A = alpha [1 Z | beta Y] lies in the span of [1 Z] except for its part in Y, so its
least squares fit is W = alpha (P_Z + beta B P_Y): only the k right-hand sides in B are ever solved for, and a further P
costs products. With l2 > 0 the literal ridge fit also shrinks P_Z: absolute scaling does so, relative scaling penalises
the distance to P_Z instead of to 0 and keeps it, but for the first layer, whose two terms are ridge fits under a fixed
relative penalty (INPUT_L2). The constant column belongs to A, as in the thesis's figure 7.3: its
row of P is the layer's spread of biases.

*Scaling.* ``absolute`` takes alpha and beta literally. ``relative`` measures the columns of Z in units of their standard
deviation, gives each of the two terms of equation 7.2 unit standard deviation over the rows, and mixes them with weights
1 and beta, normalised; alpha is then the standard deviation of a pre-activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from platonic.memory import empty_rows, rows_together
from platonic.pca import sorted_pca_rows
from platonic.readout import Readout
from platonic.sampling import RowSampler
from platonic.solvers import factor_moments, solve_moments

__all__ = ["DETERMINISTIC", "PROJECTIONS", "LayerInput", "TargetOptions", "Weights", "draw_candidates"]

BIAS_SCALE = 0.7  # relative scaling: standard deviation of a bias in units of that of the pre-activation
INPUT_L2 = 3.0  # relative scaling: ridge penalty on a first layer's weights, in units of the columns' mean variance
INPUT_SPREAD = 0.3  # an input column's scale is at least this fraction of its largest deviation from its mean
BETA_SPREAD = 1.5  # `auto` draws beta log-normally: standard deviation of log beta
ALPHA_RANGE = 2.0  # `auto` draws alpha log-uniformly between 1/2 and 2 times its value
PAIR_CHOICES = 4  # `auto` takes the steepest of so many pairs for each candidate of a first layer
_BLOCK = 512  # rows of X that are looked at together
LEAST_SIDE = 4  # smallest side of a random rectangle, in pixels


@dataclass(frozen=True)
class TargetOptions:
    """alpha, beta, relative, image_shape: as the estimators' parameters."""

    alpha: float
    beta: float
    relative: bool
    image_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Weights:
    """weight (n, width) and bias (width,), float64."""

    weight: Tensor
    bias: Tensor


@dataclass
class LayerInput:
    """What a projection may look at. Costly parts are computed when first asked for.

    Attributes
    ----------
    Z, Y : Tensor
        (m, n), (m, k).
    weights : Tensor or None
        (m,): sample weights.
    importance : Tensor or None
        (m,): the running squared errors d by which weighted Platonic PCA scales the rows of Y.
    sampler : callable
        () -> RowSampler of the input rows.
    make_readout : callable
        () -> Readout of Y from Z.
    first : bool
        Whether Z is the input X.
    """

    Z: Tensor
    Y: Tensor
    weights: Tensor | None
    importance: Tensor | None
    sampler: Callable[[], RowSampler]
    make_readout: Callable[[], Readout]
    first: bool
    options: TargetOptions

    @property
    def effective_samples(self) -> float:
        """The total weight, but for weights below 1 no less than the number of samples that equal weights would stand for."""
        if self.weights is None:
            return float(len(self.Z))
        total = float(self.weights.sum())
        return max(total, total**2 / float(self.weights.square().sum()))

    @cached_property
    def readout(self) -> Readout:
        return self.make_readout()

    @cached_property
    def location(self) -> tuple[Tensor, Tensor]:
        """(n,) mean and (n,) scale of the columns of Z."""
        if not self.first:
            return self.readout.moments.mean_z, self.readout.scale
        return input_scale(self.Z, self.weights)

    @cached_property
    def covariance(self) -> Tensor:
        """(n, n), float64."""
        return self.readout.moments.zz / self.readout.moments.total

    @cached_property
    def input_ridge(self) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Of the standardised input: zz (n, n), zy (n, k) and the solver of zz + INPUT_L2 mean(zz_ii) I, factored once."""
        scale = self.location[1][:, None]
        zz = self.covariance / scale / scale.T
        penalty = (INPUT_L2 * zz.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny).expand(len(zz))
        return zz, self.readout.moments.zy / self.readout.moments.total / scale, factor_moments(zz, penalty)


def input_scale(X: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and scale of each input column: its standard deviation, but at least a fixed fraction of its largest
    deviation, so that columns that are nearly always constant are not blown up; 1 for constant columns."""
    shift = X[:_BLOCK].mean(0)
    low, high = shift.clone(), shift.clone()
    total = float(len(X) if weights is None else weights.sum())
    first = torch.zeros(X.shape[1], dtype=torch.float64, device=X.device)
    second = torch.zeros_like(first)
    size = rows_together(_BLOCK, X)
    buffer = torch.empty_like(X[:size])
    for start in range(0, len(X), size):  # blocks that stay in cache: one pass over X for all four
        block = X[start : start + size]
        low, high = torch.minimum(low, block.amin(0)), torch.maximum(high, block.amax(0))
        centred = torch.sub(block, shift, out=buffer[: len(block)])
        w = block.new_ones(len(block)) if weights is None else weights[start : start + size].to(X.dtype)
        first += w @ centred
        second += w @ centred.square_()
    mean = shift.double() + first / total
    std = ((second - first.square() / total) / total).clamp_min(0).sqrt()
    if not bool(torch.isfinite(std).all()):
        raise ValueError(
            f"X: some numbers are too large to be squared in {X.dtype}; divide the columns by their largest values."
        )
    farthest = torch.maximum(high.double() - mean, mean - low.double())
    constant = high == low
    return torch.where(constant, high.double(), mean), torch.where(
        constant, 1.0, torch.maximum(std, INPUT_SPREAD * farthest)
    )


def project_random(layer: LayerInput, width: int, rng: np.random.Generator) -> Weights:
    """Equation 7.2 with P ~ N(0, 1), drawn as one (1 + n + k, width) block: constant, Z and Y rows."""
    n, k = layer.Z.shape[1], layer.Y.shape[1]
    P = torch.from_numpy(rng.standard_normal((1 + n + k, width))).to(layer.Z.device)
    if layer.options.relative:
        ones = torch.ones(width, dtype=torch.float64, device=P.device)
        return mix_relative(layer, P[1 : 1 + n], P[1 + n :], BIAS_SCALE * P[0], ones, layer.options.beta * ones)
    return combine_absolute(layer, P[0], P[1 : 1 + n], P[1 + n :])


def combine_absolute(layer: LayerInput, p_one: Tensor, p_z: Tensor, p_y: Tensor) -> Weights:
    """The ridge fit of the target alpha [1 Z | beta Y] P: alpha (Q + beta B P_Y), Q being the ridge fit of Z P_Z.

    Q = (Z'Z + l2 I)^-1 Z'Z P_Z is P_Z itself when l2 is 0 (equation 7.2).
    """
    alpha, beta, readout = layer.options.alpha, layer.options.beta, layer.readout
    q = p_z
    if readout.l2 > 0:
        penalty = torch.full((len(p_z),), readout.l2, dtype=torch.float64, device=p_z.device)
        q = p_z - solve_moments(readout.moments.zz, penalty, penalty[:, None] * p_z)
    weight = alpha * (q + beta * (readout.solution.coef @ p_y))
    bias = alpha * (p_one + readout.moments.mean_z @ (p_z - q) + beta * (readout.solution.intercept @ p_y))
    return Weights(weight, bias)


def mix_relative(layer: LayerInput, p_z: Tensor, p_y: Tensor, bias: Tensor, alpha: Tensor, beta: Tensor) -> Weights:
    """Both terms of equation 7.2 at unit output standard deviation, mixed by `beta`, scaled by `alpha` (per unit).

    `bias` is in units of the pre-activation's standard deviation, around a centred pre-activation.
    """
    mean, _ = layer.location
    random, target = _relative_terms(layer, p_z, p_y)
    total = layer.options.alpha * alpha / (1 + beta.square()).sqrt()
    weight = (random + beta * target) * total
    return Weights(weight, layer.options.alpha * alpha * bias - mean @ weight)


def _relative_terms(layer: LayerInput, p_z: Tensor, p_y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights whose outputs are the terms of equation 7.2, Z P_Z (in units of Z's columns) and Y P_Y, at unit variance.

    In the first layer both are ridge fits under a penalty of INPUT_L2, so that they follow the directions in which
    inputs vary most: neighbouring pixels get like weights, those that hardly vary next to none.
    """
    _, scale = layer.location
    if not layer.first:
        z, y = p_z / scale[:, None], layer.readout.solution.coef @ p_y
    else:
        zz, zy, solve = layer.input_ridge
        both = solve(torch.cat([zz @ p_z, zy @ p_y], 1)) / scale[:, None]
        z, y = both[:, : p_z.shape[1]], both[:, p_z.shape[1] :]
    return _unit_output(z, layer.covariance), _unit_output(y, layer.covariance)


def _unit_output(weight: Tensor, covariance: Tensor) -> Tensor:
    """Columns of `weight` scaled to unit standard deviation of Z w; those that do not vary become 0."""
    variance = (weight * (covariance @ weight)).sum(0)
    noise = torch.finfo(torch.float64).eps * (weight.square() * covariance.diagonal()[:, None]).sum(0)
    return torch.where(variance > noise, weight / variance.clamp_min(torch.finfo(torch.float64).tiny).sqrt(), 0.0)


def project_platonic_pca(layer: LayerInput, width: int, rng: np.random.Generator) -> Weights:
    """P = leading principal components of A = [Z | beta d Y] (d: the importance of each row), then equation 7.2.

    Relative: of the standardised columns of [Z | d Y]; beta only mixes the two terms, both of unit output variance. On
    MNIST this is what reproduces table 7.2 of the thesis; components of unscaled columns do not.
    d is used only to find P, as in the thesis. A has n + k columns, so there are no more components than that; of a
    component along which A does not vary but for rounding, any direction would do, and 0 is taken.
    """
    n, k = layer.Z.shape[1], layer.Y.shape[1]
    if width > n + k:
        raise ValueError(
            f"platonic_pca: a layer of width {width} was asked for, but [Z | Y] has only {n} + {k} principal components. "
            "Use a narrower layer, or another projection for this one."
        )
    options, moments = layer.options, layer.readout.moments
    zz, (zy, yy) = moments.zz, _important_moments(layer)
    if options.relative:
        z_scale = layer.location[1] * math.sqrt(moments.total)
        y_scale = _positive_root(yy.diagonal())
        zz, zy, yy = zz / z_scale[:, None] / z_scale, zy / z_scale[:, None] / y_scale, yy / y_scale[:, None] / y_scale
    else:
        zy, yy = options.beta * zy, options.beta**2 * yy
    joint = torch.cat([torch.cat([zz, zy], 1), torch.cat([zy.T, yy], 1)])
    variances, P = torch.linalg.eigh(joint)
    variances, P = variances.flip(0)[:width], P.flip(1)[:, :width]
    P = P * torch.sign(torch.gather(P, 0, P.abs().argmax(0, keepdim=True)))
    eps = torch.finfo(layer.Z.dtype).eps
    noise = 8 * eps * (P.square() * joint.diagonal()[:, None]).sum(0)  # of products in the dtype of Z
    noise += (n + k) * torch.finfo(torch.float64).eps * variances[0]  # of the decomposition
    P = torch.where(variances > noise, P, 0.0)
    if not options.relative:
        return combine_absolute(layer, torch.zeros(width, dtype=torch.float64, device=P.device), P[:n], P[n:])
    mean, _ = layer.location
    # a part of a component that is rounding must not be blown up to unit variance
    parts = torch.linalg.vector_norm(P[:n], dim=0), torch.linalg.vector_norm(P[n:], dim=0)
    least = max(1e-10, 1e3 * eps)
    P = torch.cat([torch.where(parts[0] > least, P[:n], 0.0), torch.where(parts[1] > least, P[n:], 0.0)])
    z_term, y_term = _relative_terms(layer, P[:n], P[n:] / _positive_root(moments.yy.diagonal())[:, None])
    weight = options.alpha * _unit_output(z_term + options.beta * y_term, layer.covariance)
    return Weights(weight, -(mean @ weight))


def _positive_root(variance: Tensor) -> Tensor:
    return torch.where(variance > 0, variance, 1.0).sqrt()


def _important_moments(layer: LayerInput) -> tuple[Tensor, Tensor]:
    """Centred sums of Z'(dY) and (dY)'(dY)."""
    moments = layer.readout.moments
    if layer.importance is None:
        return moments.zy, moments.yy
    d_y = layer.importance[:, None] * layer.Y.double()
    w = 1.0 if layer.weights is None else layer.weights[:, None]
    mean = (w * d_y).sum(0) / moments.total
    centred = d_y - mean
    weighted = w * centred
    zy = (layer.Z.T @ weighted.to(layer.Z.dtype)).double() - torch.outer(moments.mean_z, weighted.sum(0))
    return zy, centred.T @ weighted


def project_sorted_pca(layer: LayerInput, width: int, rng: np.random.Generator) -> Weights:
    """Samples at evenly spaced ranks along the first principal component, less the mean, as weight vectors (7.8.2).

    Pre-activations are inner products of centred samples, so their mean is 0 and the ReLU clips.
    """
    mean, scale = layer.location
    if not layer.options.relative:
        scale = torch.ones_like(scale)
    rows = sorted_pca_rows(layer.Z, width, layer.weights)
    weight = ((layer.Z[rows].double() - mean) / scale.square()).T
    weight = layer.options.alpha * (_unit_by_rows(layer.Z, layer.weights, weight) if layer.options.relative else weight)
    return Weights(weight, -(mean @ weight))


def project_pairs(layer: LayerInput, width: int, rng: np.random.Generator) -> Weights:
    """Differences of random pairs of rows of different classes, bias at the midpoint (relative: unit output std)."""
    weight, first, second = draw_pair_weights(layer, width, rng)
    middle = ((layer.Z[first].double() + layer.Z[second].double()) / 2 * weight.T).sum(1)
    if layer.options.relative:
        scaled = _unit_by_rows(layer.Z, layer.weights, weight)
        middle = middle * (scaled.abs().amax(0) / weight.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny))
        weight = scaled
    return Weights(layer.options.alpha * weight, -layer.options.alpha * middle)


def draw_pair_weights(
    layer: LayerInput, count: int, rng: np.random.Generator, choices: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, count) differences of pairs (of images: each within a random rectangle), and the rows they came from.

    Each pair is the steepest of `choices` draws: the one with the largest ||y - y'|| / ||x - x'||, columns of x in units
    of their scale.
    """
    uniforms = rng.random((2, choices * count))
    first, second = (index.to(layer.Z.device) for index in layer.sampler().draw_pairs(uniforms))
    if choices > 1:
        scale = layer.location[1].to(layer.Z.dtype)
        size = rows_together(_BLOCK, layer.Z)
        steepness = torch.cat([
            _steepness(layer, one, other, scale)
            for one, other in zip(first.split(size), second.split(size), strict=True)
        ])  # fmt: skip
        chosen = steepness.view(choices, count).argmax(0) * count + torch.arange(count, device=first.device)
        first, second = first[chosen], second[chosen]
    weight = (layer.Z[first].double() - layer.Z[second].double()).T
    if layer.options.relative:
        weight = weight / layer.location[1].square()[:, None]
    if layer.first and layer.options.image_shape is not None:
        weight = weight * draw_rectangles(layer.options.image_shape, count, rng).to(layer.Z.device).T
    return weight, first, second


def _steepness(layer: LayerInput, first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    """(c,): ||y - y'|| / ||x - x'|| of pairs of rows, 0 where x = x'."""
    run = torch.linalg.vector_norm(layer.Z[first].sub_(layer.Z[second]).div_(scale), dim=1)
    rise = torch.linalg.vector_norm(layer.Y[first] - layer.Y[second], dim=1)
    return torch.where(run > 0, rise / run, 0.0)


def draw_rectangles(image_shape: tuple[int, ...], count: int, rng: np.random.Generator) -> Tensor:
    """(count, H W [C]) masks of 0 and 1: side lengths uniform between 4 (or the whole side) and the side, then a place."""
    uniforms = rng.random((2, 2, count))
    inside = []
    for side, (length_u, place_u) in zip(image_shape[:2], uniforms, strict=True):
        least = min(LEAST_SIDE, side)
        length = least + np.floor(length_u * (side - least + 1))
        start = np.floor(place_u * (side - length + 1))
        at = np.arange(side)
        inside.append((at >= start[:, None]) & (at < (start + length)[:, None]))
    mask = inside[0][:, :, None] & inside[1][:, None, :]
    if len(image_shape) == 3:
        mask = np.repeat(mask[..., None], image_shape[2], axis=-1)
    return torch.from_numpy(mask.reshape(count, -1).astype(np.float64))


def _unit_by_rows(Z: Tensor, row_weights: Tensor | None, weight: Tensor) -> Tensor:
    """As :func:`_unit_output`, from the rows: for a first layer, whose covariance nothing else needs."""
    return weight * _unit_factor(Z @ weight.to(Z.dtype), row_weights)


def _unit_factor(H: Tensor, row_weights: Tensor | None) -> Tensor:
    """(c,): 1 / standard deviation of each column of H (r, c), 0 for those that hardly vary."""
    w = torch.ones(len(H), dtype=H.dtype, device=H.device) if row_weights is None else row_weights.to(H.dtype)
    mean = (w @ H) / w.sum()
    variance = torch.zeros_like(mean)
    size = rows_together(_BLOCK, H)
    buffer = torch.empty_like(H[:size])
    for rows, row_weight in zip(H.split(size), w.split(size), strict=True):
        variance += row_weight @ torch.sub(rows, mean, out=buffer[: len(rows)]).square_()
    std = (variance / w.sum()).double().sqrt()
    return torch.where(std > 1e-9 * std.max(), 1 / std.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def project_elm(layer: LayerInput, width: int, rng: np.random.Generator) -> Weights:
    """Random weights and biases N(0, 1), which see neither Z nor Y: the Extreme Learning Machine."""
    P = torch.from_numpy(rng.standard_normal((1 + layer.Z.shape[1], width))).to(layer.Z.device)
    alpha = layer.options.alpha
    if not layer.options.relative:
        return Weights(alpha * P[1:], alpha * P[0])
    mean, scale = layer.location
    weight = alpha * P[1:] / scale[:, None] / math.sqrt(max(1, layer.Z.shape[1]))
    return Weights(weight, alpha * BIAS_SCALE * P[0] - mean @ weight)


PROJECTIONS: dict[str, Callable[[LayerInput, int, np.random.Generator], Weights]] = {
    "random": project_random,
    "platonic_pca": project_platonic_pca,
    "sorted_pca": project_sorted_pca,
    "pairs": project_pairs,
    "elm": project_elm,
}
DETERMINISTIC = frozenset({"platonic_pca", "sorted_pca"})


def draw_candidates(
    layer: LayerInput, rows: Tensor | None, row_weights: Tensor | None, count: int, rng: np.random.Generator
) -> tuple[Weights, Tensor]:
    """`count` candidate units of the `auto` recipe, and their pre-activations (r, count) on `rows`.

    First layer: differences of pairs, each the steepest of four draws; later layers: equation 7.2 with beta drawn per
    unit. Every unit has unit output standard deviation (first layer: on `rows`, of weights `row_weights`) times an alpha
    drawn per unit, and its zero at the projection of a random one of `rows`, so that zeros lie where the data lie.

    Parameters
    ----------
    rows : Tensor or None
        (r,), int64: equally weighted rows, in an order that their contents decide; None means all rows, weighted by
        `row_weights`.
    """
    options, device = layer.options, layer.Z.device
    Z = layer.Z if rows is None else layer.Z[rows]
    if layer.first:
        weight = draw_pair_weights(layer, count, rng, PAIR_CHOICES)[0]
        H = torch.mm(Z, weight.to(Z.dtype), out=empty_rows(len(Z), count, Z))
        factor = _unit_factor(H, row_weights) * (options.alpha * _draw_alpha(rng, count, device))
        weight = weight * factor
        H *= factor.to(H.dtype)
    else:
        n, k = layer.Z.shape[1], layer.Y.shape[1]
        P = torch.from_numpy(rng.standard_normal((n + k, count))).to(device)
        beta = options.beta * torch.from_numpy(np.exp(BETA_SPREAD * rng.standard_normal(count))).to(device)
        weight = mix_relative(layer, P[:n], P[n:], torch.zeros_like(beta), _draw_alpha(rng, count, device), beta).weight
        H = torch.mm(Z, weight.to(Z.dtype), out=empty_rows(len(Z), count, Z))
    uniforms = rng.random(count)
    at = layer.sampler().draw(uniforms) if rows is None else torch.from_numpy((uniforms * len(rows)).astype(np.int64))
    zero = H.gather(0, at.to(device)[None])[0]
    H -= zero
    return Weights(weight, -zero.double()), H


def _draw_alpha(rng: np.random.Generator, count: int, device: torch.device) -> Tensor:
    exponent = 2 * rng.random(count) - 1
    return torch.from_numpy(ALPHA_RANGE**exponent).to(device)
