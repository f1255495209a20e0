"""Measures that :func:`~layerwise.probes.probe` takes: what each needs of a unit, the columns it fills, where they should go.

A measure of a *stream* sees every sample once and keeps sums; one of *samples* needs them at once and gets a subsample, the
same for every unit; one of *weights* looks at the unit alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from layerwise.neighbours import k_redundancy
from layerwise.probes.least_squares import LeastSquares
from layerwise.probes.pca import project_pca
from layerwise.probes.representation import as_features
from layerwise.probes.selections import Selections, threshold_of
from layerwise.probes.separability import Separability, cnn_separability, linear_separability
from layerwise.probes.voronoi import pure_voronoi_map
from layerwise.probes.weights import stable_ranks

__all__ = [
    "MEASURES",
    "CNNSeparability",
    "ConditionalEntropy",
    "KRedundancy",
    "LeastSquaresDistance",
    "LinearSeparability",
    "Measure",
    "PCAScatter",
    "PureEntropy",
    "Samples",
    "StableRank",
    "make_measures",
]

FALLS, RISES = -1, 1  # through the layers of a trained network


class Samples(NamedTuple):
    """A unit's output of some samples, and of the test samples where there are any."""

    Z: Tensor
    y: Tensor
    Z_test: Tensor | None = None
    y_test: Tensor | None = None


class Stream(Protocol):
    """Sums over batches."""

    def update(self, Z: Any, y: Any) -> None: ...

    def values(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Measure:
    """What all measures share. A measure has one of the three methods below."""

    kind: ClassVar[str]  # "stream", "samples" or "weights"
    of_input: ClassVar[bool] = True  # whether the network's input has it
    needs_test: ClassVar[bool] = False

    @property
    def trends(self) -> dict[str, int]:
        """Its columns, and whether they should rise or fall from layer to layer; 0: neither."""
        raise NotImplementedError

    def stream(self) -> Stream:
        """Empty sums for one unit."""
        raise NotImplementedError

    def of_samples(self, samples: Samples) -> dict[str, Any]:
        raise NotImplementedError

    def of_weights(self, unit: nn.Module) -> dict[str, Any]:
        raise NotImplementedError


class _LeastSquares(LeastSquares):
    def __init__(self, measure: LeastSquaresDistance) -> None:
        super().__init__(pool=measure.pool)
        self.measure = measure

    def values(self) -> dict[str, Any]:
        return {self.measure.column: self.distance(intercept=self.measure.intercept)}


@dataclass(frozen=True)
class LeastSquaresDistance(Measure):
    """``lsd``, or ``lsd_intercept`` with a constant column; see :func:`~layerwise.probes.least_squares_distance`."""

    intercept: bool = False
    pool: int | None = 2
    kind: ClassVar[str] = "stream"

    @property
    def column(self) -> str:
        return "lsd_intercept" if self.intercept else "lsd"

    @property
    def trends(self) -> dict[str, int]:
        return {self.column: FALLS}

    def stream(self) -> Stream:
        return _LeastSquares(self)


class _Selections(Selections):
    def values(self) -> dict[str, Any]:
        found = self.entropy()
        return {"conditional_entropy": found.mean, "empty_features": found.empty}


@dataclass(frozen=True)
class ConditionalEntropy(Measure):
    """``conditional_entropy`` in bits, and the share of ``empty_features``; see
    :func:`~layerwise.probes.selection_entropy`. One threshold serves all units; the network's input has no selections."""

    threshold: float | str = 0.0
    spatial: str = "positions"
    kind: ClassVar[str] = "stream"
    of_input: ClassVar[bool] = False

    def __post_init__(self) -> None:
        Selections(threshold=threshold_of(self.threshold), spatial=self.spatial)  # checks both

    @property
    def trends(self) -> dict[str, int]:
        return {"conditional_entropy": FALLS, "empty_features": 0}

    def stream(self) -> Stream:
        return _Selections(threshold=self.threshold, spatial=self.spatial)


@dataclass(frozen=True)
class KRedundancy(Measure):
    """``k_redundancy_K`` for every K in `k`: share of samples whose K nearest neighbours have their class; see
    :func:`~layerwise.neighbours.k_redundancy`. Images and tokens are flattened, unless `pool` says otherwise."""

    k: int | Sequence[int] = 10
    pool: int | None = None
    kind: ClassVar[str] = "samples"

    def __post_init__(self) -> None:
        if not self.neighbours or len(set(self.neighbours)) < len(self.neighbours) or min(self.neighbours) < 1:
            raise ValueError(f"k: expected distinct positive numbers, got {self.k}")

    @property
    def neighbours(self) -> tuple[int, ...]:
        return (self.k,) if isinstance(self.k, int) else tuple(self.k)

    @property
    def trends(self) -> dict[str, int]:
        return {f"k_redundancy_{k}": RISES for k in self.neighbours}

    def of_samples(self, samples: Samples) -> dict[str, Any]:
        shares = k_redundancy(as_features(samples.Z, self.pool), samples.y, self.neighbours)
        return dict(zip(self.trends, shares, strict=True))


def _accuracies(name: str, found: Separability) -> dict[str, Any]:
    return {name: found.test, f"{name}_train": found.train}


@dataclass(frozen=True)
class LinearSeparability(Measure):
    """``linear_separability``, an accuracy on test samples, and ``linear_separability_train``; see
    :func:`~layerwise.probes.linear_separability`."""

    pool: int | None = 2
    multi_class: str = "multinomial"
    C: float = 1.0
    max_iter: int = 1000
    kind: ClassVar[str] = "samples"
    needs_test: ClassVar[bool] = True

    @property
    def trends(self) -> dict[str, int]:
        return {"linear_separability": RISES, "linear_separability_train": 0}

    def of_samples(self, samples: Samples) -> dict[str, Any]:
        found = linear_separability(
            *samples, pool=self.pool, multi_class=self.multi_class, C=self.C, max_iter=self.max_iter
        )
        return _accuracies("linear_separability", found)


@dataclass(frozen=True)
class CNNSeparability(Measure):
    """``cnnP_separability`` for p = P, an accuracy on test samples, and ``cnnP_separability_train``; see
    :func:`~layerwise.probes.cnn_separability`."""

    p: int = 1
    width: int = 256
    epochs: int = 20
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0
    kind: ClassVar[str] = "samples"
    needs_test: ClassVar[bool] = True

    @property
    def trends(self) -> dict[str, int]:
        return {f"cnn{self.p}_separability": RISES, f"cnn{self.p}_separability_train": 0}

    def of_samples(self, samples: Samples) -> dict[str, Any]:
        found = cnn_separability(
            *samples,
            p=self.p,
            width=self.width,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            seed=self.seed,
        )
        return _accuracies(f"cnn{self.p}_separability", found)


@dataclass(frozen=True)
class StableRank(Measure):
    """``stable_rank``: mean over the unit's weight matrices; see :func:`~layerwise.probes.stable_ranks`."""

    kind: ClassVar[str] = "weights"
    of_input: ClassVar[bool] = False

    @property
    def trends(self) -> dict[str, int]:
        return {"stable_rank": 0}

    def of_weights(self, unit: nn.Module) -> dict[str, Any]:
        ranks = list(stable_ranks(unit).values())
        return {"stable_rank": sum(ranks) / len(ranks) if ranks else None}


@dataclass(frozen=True)
class PureEntropy(Measure):
    """``pure_entropy`` in bits, and the number of ``pure_cells``; see :func:`~layerwise.probes.pure_voronoi_map`. The search
    is slow, so only `samples` of the subsample take part."""

    samples: int = 500
    pool: int | None = None
    kind: ClassVar[str] = "samples"

    @property
    def trends(self) -> dict[str, int]:
        return {"pure_entropy": FALLS, "pure_cells": 0}

    def of_samples(self, samples: Samples) -> dict[str, Any]:
        found = pure_voronoi_map(samples.Z[: self.samples], samples.y[: self.samples], pool=self.pool)
        return {"pure_entropy": found.entropy, "pure_cells": len(found.labels)}


@dataclass(frozen=True)
class PCAScatter(Measure):
    """The samples on two principal components, for :func:`~layerwise.probes.plot_scatter`, and the ``pca_share`` of the
    variance that these hold; see :func:`~layerwise.probes.project_pca`."""

    pool: int | None = None
    kind: ClassVar[str] = "samples"

    @property
    def trends(self) -> dict[str, int]:
        return {"pca_share": 0}

    def of_samples(self, samples: Samples) -> dict[str, Any]:
        found = project_pca(samples.Z, samples.y, pool=self.pool)
        return {"pca_share": found.share, "projection": found}


MEASURES: dict[str, type[Measure]] = {
    "lsd": LeastSquaresDistance,
    "linear_separability": LinearSeparability,
    "cnn_separability": CNNSeparability,
    "k_redundancy": KRedundancy,
    "conditional_entropy": ConditionalEntropy,
    "stable_rank": StableRank,
    "pure_entropy": PureEntropy,
    "pca": PCAScatter,
}


def make_measures(measures: str | Measure | Sequence[str | Measure]) -> list[Measure]:
    """Measures by name, with their defaults, or as given.

    Raises
    ------
    ValueError
        If there is none, a name is unknown, or two fill the same column.
    """
    given = [measures] if isinstance(measures, (str, Measure)) else list(measures)
    made: list[Measure] = []
    for measure in given:
        if isinstance(measure, Measure):
            made.append(measure)
        elif measure in MEASURES:
            made.append(MEASURES[measure]())
        else:
            raise ValueError(f"unknown measure {measure!r}; there are {', '.join(MEASURES)}, or give a Measure")
    columns = [column for measure in made for column in measure.trends]
    if not columns:
        raise ValueError(f"measures: expected at least one of {', '.join(MEASURES)}, got none")
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise ValueError(f"measures: two of them fill the column {twice[0]!r}")
    return made
