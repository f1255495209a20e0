"""Pure Voronoi maps and their entropy (thesis, definitions 5 to 7).

A pure map with the fewest cells is a smallest set of prototypes for an error-free nearest-neighbour classifier, which is
intractable. The thesis splits impure cells until none is left. Here two pure maps are made, that one and one that grows by
a centroid at a time; each is reduced by merging and leaving out (the merging is C.-L. Chang's, "Finding prototypes for
nearest neighbor classifiers", 1974), and the one of lower entropy is kept. Nothing is random.

N: samples; K: centroids; p: features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist
from torch import Tensor

from layerwise.probes.representation import as_features, check_samples
from layerwise.probes.selections import entropy_bits

__all__ = ["PureVoronoiMap", "pure_entropy", "pure_voronoi_map"]

_MARGIN = 1e-9  # by which a squared distance must be the smaller one: purity does not hang on rounding

Array = np.ndarray


@dataclass(frozen=True)
class PureVoronoiMap:
    """Labelled centroids such that every sample is nearer to one of its own class than to any of another.

    Attributes
    ----------
    centroids : Tensor
        (K, p), float64.
    labels : Tensor
        (K,): their classes.
    cells : Tensor
        (N,): the centroid nearest to each sample; the first of several.
    """

    centroids: Tensor
    labels: Tensor
    cells: Tensor

    @property
    def sizes(self) -> Tensor:
        """(K,): samples in each cell; they add up to N."""
        return torch.bincount(self.cells, minlength=len(self.labels))

    @property
    def entropy(self) -> float:
        """Of the distribution of samples over cells, in bits (definition 7)."""
        return float(entropy_bits(self.sizes))


def pure_voronoi_map(Z: Any, y: Any, *, pool: int | None = None, method: str = "greedy") -> PureVoronoiMap:
    """A pure Voronoi map of few cells (definition 6), by a greedy search.

    Cells by the definition leave out a sample whose nearest centroid is of another class; of the maps made here none is, so
    that the cells partition the samples. The map's entropy is an upper bound of H*, the least there is. It is no higher
    than that of splitting alone, and leaving out any one centroid would make the map impure or raise it.

    Parameters
    ----------
    Z : array (N, C), (N, T, C) or (N, C, H, W)
        Representation of the samples.
    y : array (N,)
        Class numbers from 0.
    pool : int or None
        See :func:`~layerwise.probes.as_features`.
    method : {"greedy", "split"}, default="greedy"
        "split" stops where the thesis does: impure cells are split, and nothing is merged. Faster, with a worse bound.

    Raises
    ------
    ValueError
        If two samples are equal and their classes are not: no map is pure then.

    Notes
    -----
    Time grows as N K^2 in practice, memory as N K: seconds for a thousand samples. Runs on the CPU.
    """
    if method not in ("greedy", "split"):
        raise ValueError(f"method: expected 'greedy' or 'split', got {method!r}")
    Z, y = check_samples(Z, y)
    rows, classes = as_features(Z, pool).cpu().double().numpy(), y.cpu().numpy()
    _check_consistent(rows, classes)
    origin = rows.mean(0)
    X, basis = rows - origin, None
    if X.shape[1] > len(X):  # distances are the same within the samples' span
        basis = np.linalg.qr(X.T)[0]
        X = X @ basis
    best = _Map(X, classes, *_split(X, classes))
    best.keep(best.sizes > 0)
    if method == "greedy":
        grown = _Map(X, classes, *_grow(X, classes))
        best = min(_reduce(best), _reduce(grown), key=lambda m: (m.entropy, len(m.labels)))
    centroids = origin + (best.centroids if basis is None else best.centroids @ basis.T)
    return PureVoronoiMap(torch.from_numpy(centroids), torch.from_numpy(best.labels), torch.from_numpy(best.own))


def pure_entropy(Z: Any, y: Any, *, pool: int | None = None) -> float:
    """Entropy in bits of :func:`pure_voronoi_map`: an upper bound of the pure entropy H*(Z; y) (definition 7)."""
    return pure_voronoi_map(Z, y, pool=pool).entropy


def _check_consistent(rows: Array, y: Array) -> None:
    _, first, group = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    group = group.reshape(-1)  # NumPy 2.0 gives a column
    clash = np.flatnonzero(y != y[first[group]])
    if len(clash):
        a, b = first[group[clash[0]]], clash[0]
        raise ValueError(
            f"samples {a} and {b} are equal, and their classes {y[a]} and {y[b]} are not, so that no Voronoi map is pure "
            f"({len(clash)} such samples); leave out one of each pair"
        )


class _Map:
    """Centroids, squared distances (N, K), and what follows from them: the nearest own centroid and the margins."""

    def __init__(self, X: Array, y: Array, centroids: Array, labels: Array) -> None:
        self.X, self.y = X, y
        self.centroids, self.labels = centroids.copy(), labels.copy()
        self.D = cdist(X, centroids, "sqeuclidean")
        self._refresh()

    def _refresh(self) -> None:
        same = self.labels[None] == self.y[:, None]
        own = np.where(same, self.D, np.inf)
        other = np.where(same, np.inf, self.D)
        self.own, self.foe = own.argmin(1), other.argmin(1)
        self.d_own, self.d_other = own.min(1), other.min(1)
        self.sizes = np.bincount(self.own, minlength=len(self.labels))

    @property
    def wrong(self) -> Array:
        """(N,): samples that are not nearest to a centroid of their class."""
        return ~_nearer(self.d_own, self.d_other)

    @property
    def entropy(self) -> float:
        return _entropy(self.sizes)

    def keep(self, mask: Array) -> None:
        self.centroids, self.labels, self.D = self.centroids[mask], self.labels[mask], self.D[:, mask]
        self._refresh()

    def add(self, centroids: Array, labels: Array) -> None:
        self.centroids, self.labels = np.vstack([self.centroids, centroids]), np.append(self.labels, labels)
        self.D = np.hstack([self.D, cdist(self.X, centroids, "sqeuclidean")])
        self._refresh()

    def centre(self) -> None:
        """Move every centroid to the mean of the samples of its class that are nearest to it; leave out those without."""
        K = len(self.labels)
        sums = csr_array((np.ones(len(self.own)), (self.own, np.arange(len(self.own)))), (K, len(self.own))) @ self.X
        means = sums / np.maximum(self.sizes, 1)[:, None]
        moved = (means != self.centroids).any(1) & (self.sizes > 0)
        self.centroids[moved] = means[moved]
        self.D[:, moved] = cdist(self.X, means[moved], "sqeuclidean")
        self.keep(self.sizes > 0)

    def allows(self, gone: list[int], d: Array | None) -> bool:
        """Whether the map stays pure if the centroids `gone`, of one class, give way to one with distances `d`, or to none."""
        label = self.labels[gone[0]]
        rows = np.flatnonzero(np.isin(self.own, gone))
        left = np.flatnonzero(self.labels == label)
        left = left[~np.isin(left, gone)]
        best = self.D[np.ix_(rows, left)].min(1, initial=np.inf)
        if d is not None:
            best = np.minimum(best, d[rows])
            foes = self.y != label
            if not _nearer(self.d_own[foes], d[foes]).all():
                return False
        return bool(_nearer(best, self.d_other[rows]).all())

    def replace(self, gone: list[int], centroid: Array | None) -> bool:
        """Let `centroid`, or nothing, take the place of `gone`, unless that makes the map impure or raises its entropy."""
        d = None if centroid is None else cdist(self.X, centroid[None], "sqeuclidean")[:, 0]
        if not self.allows(gone, d):
            return False
        before = self.centroids[gone[0]].copy(), self.D[:, gone].copy(), self.entropy
        self.D[:, gone] = np.inf
        if centroid is not None:
            self.centroids[gone[0]], self.D[:, gone[0]] = centroid, d
        self._refresh()
        if self.entropy <= before[2]:
            return True
        self.centroids[gone[0]], self.D[:, gone] = before[:2]
        self._refresh()
        return False


def _nearer(a: Array, b: Array) -> Array:
    return a < b * (1 - _MARGIN)


def _entropy(sizes: Array) -> float:
    return float(entropy_bits(torch.from_numpy(sizes)))


def _class_means(X: Array, y: Array) -> tuple[Array, Array]:
    labels = np.unique(y)
    return np.stack([X[y == c].mean(0) for c in labels]), labels


def _distinct(X: Array, y: Array) -> tuple[Array, Array]:
    """Every distinct sample as a centroid: pure without fail."""
    first = np.sort(np.unique(X, axis=0, return_index=True)[1])
    return X[first], y[first]


def _split(X: Array, y: Array) -> tuple[Array, Array]:
    """The thesis's map: impure cells give way to the means of the classes in them until none is left."""
    now = _Map(X, y, *_class_means(X, y))
    while len(now.labels) < len(X):
        wrong = now.wrong
        if not wrong.any():
            return now.centroids, now.labels
        cell = np.where(wrong, now.foe, now.own)
        impure = np.unique(cell[wrong])
        parts = [_class_means(X[cell == j], y[cell == j]) for j in impure]
        kept = np.ones(len(now.labels), dtype=bool)
        kept[impure] = False
        centroids = np.vstack([now.centroids[kept], *(c for c, _ in parts)])
        labels = np.concatenate([now.labels[kept], *(l for _, l in parts)])
        if len(labels) == len(now.labels) and len(impure) == sum(len(l) for _, l in parts):
            break  # no cell was split: it would go on for ever
        now = _Map(X, y, centroids, labels)
    return _distinct(X, y)


def _grow(X: Array, y: Array) -> tuple[Array, Array]:
    """From the classes' means: add the mean of the largest group of one class in a cell of another, centre, and so on."""
    now = _Map(X, y, *_class_means(X, y))
    for _ in range(len(X)):
        now.centre()
        wrong = np.flatnonzero(now.wrong)
        if not len(wrong):
            return now.centroids, now.labels
        group = np.unique(y[wrong] * len(now.labels) + now.foe[wrong], return_inverse=True)[1]
        rows = wrong[group == np.bincount(group).argmax()]
        now.add(X[rows].mean(0, keepdims=True), y[rows[:1]])
    return _distinct(X, y)


def _reduce(now: _Map) -> _Map:
    """Merge and leave out centroids for as long as the map stays pure and its entropy does not rise."""
    while _merge(now) + _leave_out(now):
        pass
    return now


def _merge(now: _Map) -> int:
    """Pairs of one class, nearest first, give way to their mean, weighted by their cells. Returns how many did."""
    first, second = np.triu_indices(len(now.labels), 1)
    alike = now.labels[first] == now.labels[second]
    first, second = first[alike], second[alike]
    apart = np.square(now.centroids[first] - now.centroids[second]).sum(1)
    order = np.argsort(apart, kind="stable")
    gone = np.zeros(len(now.labels), dtype=bool)
    for p, q in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if gone[p] or gone[q]:
            continue
        t = now.sizes[p] / max(1, now.sizes[p] + now.sizes[q])
        between = np.square(now.centroids[p] - now.centroids[q]).sum()
        d = t * now.D[:, p] + (1 - t) * now.D[:, q] - t * (1 - t) * between  # Stewart's theorem
        if now.allows([p, q], d) and now.replace([p, q], t * now.centroids[p] + (1 - t) * now.centroids[q]):
            gone[q] = True
    now.keep(~gone)
    return int(gone.sum())


def _leave_out(now: _Map) -> int:
    """Centroids whose samples have others of their class near enough, smallest cells first. Returns how many."""
    gone = np.zeros(len(now.labels), dtype=bool)
    for q in np.argsort(now.sizes, kind="stable").tolist():
        gone[q] = (now.labels[~gone] == now.labels[q]).sum() > 1 and now.replace([q], None)
    now.keep(~gone)
    return int(gone.sum())
