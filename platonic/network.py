"""Step 3 of *fit*: walk the layers. Per layer: project, apply, activate, read out, score. Pure functions of tensors.

The representation Z is held once, in the dtype of X. What decides (moments, factorisations, weights) is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from platonic._ops import NARROW_MAX_WIDTH
from platonic.activations import Activation
from platonic.memory import empty_rows, rows_together
from platonic.narrow import fit_narrow
from platonic.readout import LooRows, Readout, ReadoutOptions, fit_readout
from platonic.sampling import RowSampler
from platonic.selection import choose_units
from platonic.targets import (
    DETERMINISTIC,
    PROJECTIONS,
    LayerInput,
    TargetOptions,
    Weights,
    draw_candidates,
    input_scale,
)

__all__ = ["Fit", "FitOptions", "LayerPlan", "LayerRecord", "Network", "fit_network"]

DEEP_LAYERS = 64  # this many layers of the plain method, thin enough, go to one native call
JUDGED_VALUES = 10_000_000  # candidates of `auto` are judged on so many values in all ...
JUDGED_ROWS_EACH = 5  # ... but on no fewer rows than so many times their number ...
MOST_JUDGED_ROWS = 16_384  # ... and on no more rows than this
_BLOCK = 2048  # rows that go through a layer together: in cache between its steps
LOO_ROWS = 2048  # most rows on which leave-one-out errors are measured
POOL = 4  # `auto`: candidates per unit when n_tries is not given ...
LEAST_POOL = 256  # ... at least so many for a layer ...
MOST_EXTRA = 1024  # ... and at most so many more than there are units
SAMPLES_PER_CANDIDATE = 4  # ... and no more than the samples can judge
SELECTION_L2 = 1e-8  # ridge of the forward selection, on a correlation matrix


@dataclass(frozen=True)
class LayerPlan:
    """width : int; activation : Activation; projection : str ('auto' or one of PROJECTIONS)."""

    width: int
    activation: Activation
    projection: str


@dataclass(frozen=True)
class FitOptions:
    """The estimators' parameters that the walk needs; `n_tries` None means each projection's own default."""

    target: TargetOptions
    readout: ReadoutOptions
    n_tries: int | None
    ema: float


@dataclass(frozen=True)
class LayerRecord:
    """Scores of one hidden layer, measured on the training rows by the layer's own ridge read-out.

    Attributes
    ----------
    width : int
        Units.
    projection : str
        What made its weights; for `auto`, 'selected' or 'drawn' says whether forward selection was used.
    lsd : float
        Least squares distance: mean over rows of the squared error of the read-out.
    score : float
        Training accuracy (classes) or coefficient of determination (regression).
    l2 : float
        Penalty of the read-out, given or chosen by leave-one-out.
    rank : int
        Directions that the read-out's solver used.
    jitter : float
        Added to the unit diagonal of the Gram matrix to make it positive definite; 0 normally.
    """

    width: int
    projection: str
    lsd: float
    score: float
    l2: float
    rank: int
    jitter: float


@dataclass(frozen=True)
class Network:
    """A multilayer perceptron: weights[i] (n_i, n_{i+1}), biases[i], one activation per hidden layer."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activations: Sequence[Activation]

    def representations(self, X: Tensor) -> Iterator[Tensor]:
        """Hidden representations, one after another. X is not changed."""
        Z = X
        for weight, bias, activation in zip(self.weights[:-1], self.biases[:-1], self.activations, strict=True):
            Z = activation.apply_(torch.addmm(bias, Z, weight))
            yield Z

    def hidden(self, X: Tensor, layer: int) -> Tensor:
        """Representation after hidden layer `layer` (0 is the first)."""
        for i, Z in enumerate(self.representations(X)):
            if i == layer:
                return Z
        raise IndexError(layer)

    def output(self, X: Tensor) -> Tensor:
        *_, Z = self.representations(X)
        return torch.addmm(self.biases[-1], Z, self.weights[-1])


@dataclass(frozen=True)
class Fit:
    """The network, the hidden layers' records, and what the output layer was fitted to: calibration needs it."""

    network: Network
    records: list[LayerRecord]
    readout: Readout
    representation: Tensor
    targets: Tensor
    weights: Tensor | None
    loo_rows: LooRows


@dataclass(frozen=True)
class Judged:
    """Rows on which candidates are judged.

    Attributes
    ----------
    index : Tensor or None
        (r,), int64; None means all rows.
    Y : Tensor
        (r, k): their targets.
    weights : Tensor or None
        (r,).
    halves : tuple
        Positions among them of the two halves for cross-validation; equal rows are in the same half.
    """

    index: Tensor | None
    Y: Tensor
    weights: Tensor | None
    halves: tuple[Tensor | slice, Tensor | slice]


class _Rows:
    """The training rows and what depends on them alone; canonical order is computed when first needed."""

    def __init__(self, X: Tensor, Y: Tensor, group: Tensor | None, weights: Tensor | None, left_out: Tensor | None):
        self.X, self.Y, self.group, self.weights = X, Y, group, weights
        self.left_out = torch.ones(len(X), dtype=torch.float64, device=X.device) if left_out is None else left_out

    @cached_property
    def sampler(self) -> RowSampler:
        return RowSampler(self.X, self.Y, self.group, self.weights)

    def subset(self, most: int) -> LooRows:
        """All rows with their weights, or `most` rows at evenly spaced cumulative weights.

        The total weight decides as the number of rows does, so that a weight of 2 stays the same as the row twice.
        """
        device = self.X.device
        if len(self.X) <= most and (self.weights is None or float(self.weights.sum()) <= most):
            weight = (
                torch.ones(len(self.X), dtype=torch.float64, device=device) if self.weights is None else self.weights
            )
            return LooRows(None, weight, self.left_out)
        index = self.sampler.spread(most).to(device)
        return LooRows(index, torch.ones(most, dtype=torch.float64, device=device), self.left_out[index])

    @cached_property
    def loo(self) -> LooRows:
        return self.subset(LOO_ROWS)

    def judged(self, count: int) -> Judged:
        """On which rows `count` candidates are judged."""
        device = self.X.device
        index = self.subset(min(MOST_JUDGED_ROWS, max(JUDGED_VALUES // count, JUDGED_ROWS_EACH * count))).index
        fold = self.sampler.fold().to(device)
        if index is None:
            return Judged(None, self.Y, self.weights, (torch.nonzero(fold)[:, 0], torch.nonzero(~fold)[:, 0]))
        first = int(fold[index].sum())
        index = torch.cat([index[fold[index]], index[~fold[index]]])
        return Judged(index, self.Y[index], None, (slice(0, first), slice(first, None)))


Observer = Callable[[int, LayerRecord, Weights, Readout], None]


def fit_network(
    X: Tensor,
    Y: Tensor,
    group: Tensor | None,
    weights: Tensor | None,
    plans: Sequence[LayerPlan],
    options: FitOptions,
    rng: np.random.Generator,
    observe: Observer | None = None,
    left_out: Tensor | None = None,
    show: Observer | None = None,
) -> Fit:
    """Fit the hidden layers one after another, then the output layer.

    Parameters
    ----------
    X, Y : Tensor
        (m, n) and (m, k), of one dtype and device.
    group : Tensor or None
        (m,), int64: classes; None for regression.
    weights : Tensor or None
        (m,), float64, positive.
    observe : callable, optional
        Called after each hidden layer with its index, record, weights and read-out.
    left_out : Tensor, optional
        (m,): the weight that leaving one sample out takes away, at most `weights`; 1 by default.
    show : callable, optional
        As `observe`, for progress: it does not decide which path is taken.
    """
    rows = _Rows(X, Y, group, weights, left_out)
    if observe is None and _is_deep_and_narrow(X, Y, group, plans, options):
        return _fit_deep_and_narrow(rows, plans, options, rng, verbose=show is not None)
    Z = X
    importance = None
    uses_importance = any(plan.projection == "platonic_pca" for plan in plans)
    readout: Readout | None = None
    all_weights: list[Weights] = []
    records: list[LayerRecord] = []
    for index, plan in enumerate(plans):
        layer = LayerInput(
            Z, Y, weights, importance, lambda: rows.sampler, _readout_maker(Z, rows, options, readout, index == 0),
            index == 0, options.target,
        )  # fmt: skip
        found, Z, readout, how = _fit_layer(layer, plan, rows, options, rng)
        record = LayerRecord(
            plan.width, how, readout.lsd, training_score(Y, readout.fitted, group, weights), readout.l2,
            readout.solution.rank, readout.solution.jitter,
        )  # fmt: skip
        all_weights.append(found)
        records.append(record)
        if uses_importance:
            error = (Y - readout.fitted).double().square().sum(1)
            importance = options.ema * (1.0 if importance is None else importance) + (1 - options.ema) * error
        for look in (show, observe):
            if look is not None:
                look(index, record, found, readout)
    assert readout is not None  # estimators refuse an empty list of layers
    dtype = X.dtype
    network = Network(
        [w.weight.to(dtype) for w in all_weights] + [readout.solution.coef.to(dtype)],
        [w.bias.to(dtype) for w in all_weights] + [readout.solution.intercept.to(dtype)],
        [plan.activation for plan in plans],
    )
    return Fit(network, records, readout, Z, Y, weights, rows.loo)


def _is_deep_and_narrow(
    X: Tensor, Y: Tensor, group: Tensor | None, plans: Sequence[LayerPlan], options: FitOptions
) -> bool:
    """Whether one native call fits all layers: hundreds of thin layers of the thesis's plain method."""
    return (
        len(plans) >= DEEP_LAYERS
        and group is None
        and Y.shape[1] == 1
        and not options.target.relative
        and options.readout.l2 == 0
        and options.readout.solver == "cholesky"
        and max(X.shape[1], *(plan.width for plan in plans)) <= NARROW_MAX_WIDTH
        and all(plan.projection == "random" and plan.activation == plans[0].activation for plan in plans)
        and plans[0].activation.name is not None
    )


def _fit_deep_and_narrow(
    rows: _Rows, plans: Sequence[LayerPlan], options: FitOptions, rng: np.random.Generator, verbose: bool
) -> Fit:
    """:func:`fit_network` by :func:`platonic.narrow.fit_narrow`, which draws the same P and solves the same equations."""
    assert plans[0].activation.name is not None
    found = fit_narrow(
        rows.X, rows.Y, [plan.width for plan in plans], activation=plans[0].activation.name, alpha=options.target.alpha,
        beta=options.target.beta, n_tries=options.n_tries or 1, l2=0.0, scaling="absolute",
        sample_weight=rows.weights, random_state=rng, verbose=verbose,
    )  # fmt: skip
    Z = found.representation.to(rows.X.dtype)
    readout = fit_readout(Z, rows.Y, rows.weights, options.readout, rows.loo)
    variance = (
        float(readout.moments.yy[0, 0]) / readout.moments.total or 1.0
    )  # of a constant target nothing is left to explain
    records = [
        LayerRecord(plan.width, plan.projection, lsd, 1 - lsd / variance, 0.0, plan.width, jitter)
        for plan, lsd, jitter in zip(plans, found.lsd[1:].tolist(), found.jitter[1:].tolist(), strict=True)
    ]
    dtype = rows.X.dtype
    network = Network(
        [w.to(dtype) for w in found.weights] + [readout.solution.coef.to(dtype)],
        [b.to(dtype) for b in found.biases] + [readout.solution.intercept.to(dtype)],
        [plan.activation for plan in plans],
    )
    return Fit(network, records, readout, Z, rows.Y, rows.weights, rows.loo)


def _readout_maker(
    Z: Tensor, rows: _Rows, options: FitOptions, readout: Readout | None, first: bool
) -> Callable[[], Readout]:
    """The read-out of a layer's input: the one that scored the layer before, or made on demand for X."""

    def make() -> Readout:
        if not first:
            assert readout is not None
            return readout
        scale = input_scale(Z, rows.weights)[1] if options.readout.relative else None
        return fit_readout(Z, rows.Y, rows.weights, options.readout, rows.loo, scale)

    return make


def _fit_layer(
    layer: LayerInput, plan: LayerPlan, rows: _Rows, options: FitOptions, rng: np.random.Generator
) -> tuple[Weights, Tensor, Readout, str]:
    """Weights, representation and read-out of one hidden layer, and how they came about."""
    if plan.projection == "auto":
        found, how = _select_units(layer, plan, rows, options, rng)
        return found, *_apply(layer, plan, found, rows, options), how
    project = PROJECTIONS[plan.projection]
    best: tuple[Weights, Tensor, Readout] | None = None
    tries = 1 if plan.projection in DETERMINISTIC else options.n_tries or 1
    for _ in range(tries):
        found = project(layer, plan.width, rng)
        Z, readout = _apply(layer, plan, found, rows, options)
        if best is None or readout.lsd < best[2].lsd:
            best = found, Z, readout
    assert best is not None
    return *best, plan.projection


def _apply(
    layer: LayerInput, plan: LayerPlan, found: Weights, rows: _Rows, options: FitOptions
) -> tuple[Tensor, Readout]:
    dtype = layer.Z.dtype
    weight, bias = found.weight.to(dtype), found.bias.to(dtype)
    Z = empty_rows(len(layer.Z), plan.width, layer.Z)
    block = rows_together(_BLOCK, Z)
    for some, out in zip(layer.Z.split(block), Z.split(block), strict=True):
        out.copy_(plan.activation.apply_(torch.addmm(bias, some, weight, out=out)))
    return Z, fit_readout(Z, rows.Y, rows.weights, options.readout, rows.loo)


def _select_units(
    layer: LayerInput, plan: LayerPlan, rows: _Rows, options: FitOptions, rng: np.random.Generator
) -> tuple[Weights, str]:
    """The `auto` recipe: a pool of candidates, from which forward selection takes the layer's units."""
    width = plan.width
    tries = POOL if options.n_tries is None else options.n_tries
    count = width
    if tries > 1:  # few samples cannot choose among many candidates
        most = min(width + max(MOST_EXTRA, width // 2), int(layer.effective_samples / SAMPLES_PER_CANDIDATE))
        count = max(width, min(max(tries * width, LEAST_POOL), most))
    judged = rows.judged(count)
    pool, candidates = draw_candidates(layer, judged.index, judged.weights, count, rng)
    if count == width:
        return pool, "auto (drawn)"
    kept, selected = choose_units(
        plan.activation.apply_(candidates), judged.Y, judged.weights, judged.halves, width, SELECTION_L2
    )
    return Weights(pool.weight[:, kept], pool.bias[kept]), "auto (selected)" if selected else "auto (drawn)"


def training_score(Y: Tensor, fitted: Tensor, group: Tensor | None, weights: Tensor | None) -> float:
    """Weighted accuracy, or coefficient of determination averaged over outputs (nan where a target is constant)."""
    w = torch.ones(len(Y), dtype=torch.float64, device=Y.device) if weights is None else weights
    if group is not None:
        predicted = (fitted[:, 0] > 0).long() if fitted.shape[1] == 1 else fitted.argmax(1)
        return float(w @ (predicted == group).double() / w.sum())
    residual = w @ (Y - fitted).double().square()
    spread = w @ (Y.double() - (w @ Y.double()) / w.sum()).square()
    return float((1 - residual / spread).mean())


def with_output_scale(network: Network, scale: Tensor, shift: Tensor) -> Network:
    """The network whose output is ``output * scale + shift``."""
    weights, biases = list(network.weights), list(network.biases)
    weights[-1] = weights[-1] * scale.to(weights[-1].dtype)
    biases[-1] = biases[-1] * scale.to(biases[-1].dtype) + shift.to(biases[-1].dtype)
    return replace(network, weights=weights, biases=biases)
