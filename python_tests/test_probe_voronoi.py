"""Pure Voronoi maps: purity as an invariant, entropy by its definition, and how far the search gets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import entropy
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from layerwise.probes import PureVoronoiMap, pure_entropy, pure_voronoi_map


def sinusoid(n, frequency, seed=0):
    """Points of the square, and the side of a sine curve that they lie on."""
    X = np.random.default_rng(seed).uniform(-1, 1, (n, 2))
    return X, (X[:, 1] > 0.5 * np.sin(np.pi * frequency * X[:, 0])).astype(np.int64)


def split_map(X, y):
    """The thesis's way: every impure cell gives way to the means of its classes. Sizes of the cells."""
    centroids = np.stack([X[y == c].mean(0) for c in np.unique(y)])
    labels = np.unique(y)
    while True:
        cell = cdist(X, centroids).argmin(1)
        impure = np.unique(cell[labels[cell] != y])
        if not len(impure):
            return np.bincount(cell)
        parts = [(X[(cell == j) & (y == c)].mean(0), c) for j in impure for c in np.unique(y[cell == j])]
        kept = np.setdiff1d(np.arange(len(labels)), impure)
        centroids = np.vstack([centroids[kept], [p for p, _ in parts]])
        labels = np.append(labels[kept], [c for _, c in parts])


def assert_pure(found: PureVoronoiMap, X, y):
    distances = cdist(X, found.centroids.numpy())
    own = found.labels.numpy()[None] == y[:, None]
    nearest_own = np.where(own, distances, np.inf).min(1)
    assert (nearest_own < np.where(own, np.inf, distances).min(1)).all()
    assert distances[np.arange(len(X)), found.cells].tolist() == pytest.approx(nearest_own.tolist(), abs=1e-7)
    assert found.sizes.sum() == len(X) and (found.sizes > 0).all()


points = st.lists(
    st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.integers(0, 2)),
    min_size=1,
    max_size=40,
    unique_by=lambda point: point[:2],
)


@given(points, st.booleans())
def test_maps_are_pure_and_cannot_spare_a_centroid(samples, lifted):
    """On grids, full of ties, also in more dimensions than there are samples."""
    table = np.array(samples, dtype=np.float64)
    X, y = table[:, :2], table[:, 2].astype(np.int64)
    if lifted:
        X = X @ np.random.default_rng(0).normal(size=(2, 50))
    found = pure_voronoi_map(X, y)
    assert_pure(found, X, y)
    assert len(np.unique(y)) <= len(found.labels) <= len(X)
    split = pure_voronoi_map(X, y, method="split")
    assert_pure(split, X, y)
    assert found.entropy <= split.entropy + 1e-12
    again = pure_voronoi_map(X, y)
    assert torch.equal(found.centroids, again.centroids) and torch.equal(found.cells, again.cells)
    for left_out in range(len(found.labels)):
        rest = np.delete(np.arange(len(found.labels)), left_out)
        label = found.labels.numpy()[rest]
        if len(np.unique(label)) < len(np.unique(y)):
            continue
        distances = cdist(X, found.centroids.numpy()[rest])
        own = label[None] == y[:, None]
        own_d, other_d = np.where(own, distances, np.inf), np.where(own, np.inf, distances)
        if (own_d.min(1) ** 2 < other_d.min(1) ** 2 * (1 - 1e-8)).all():
            assert entropy(np.bincount(own_d.argmin(1)), base=2) > found.entropy - 1e-9


def test_entropy_by_hand():
    """Cells of 4, 2 and 2 of 8 samples: 1/2 log 2 + 2 (1/4 log 4) = 1.5 bits."""
    cells = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    found = PureVoronoiMap(torch.zeros(3, 1), torch.tensor([0, 1, 0]), cells)
    assert found.sizes.tolist() == [4, 2, 2] and found.entropy == pytest.approx(1.5)


def test_maps_by_hand():
    """Three runs of a line need three cells; two classes side by side need one each; one class needs one."""
    X = np.arange(8.0)[:, None]
    assert pure_voronoi_map(X, np.array([0, 0, 0, 1, 1, 0, 0, 0])).sizes.sort().values.tolist() == [2, 3, 3]
    found = pure_voronoi_map(X, np.array([1, 1, 1, 1, 0, 0, 0, 0]))
    assert found.entropy == pytest.approx(1) and sorted(found.labels.tolist()) == [0, 1]
    assert sorted(found.centroids.flatten().tolist()) == pytest.approx([1.5, 5.5])
    assert pure_entropy(X, np.full(8, 3)) == 0
    assert str(pure_entropy(X, np.full(8, 3))) == "0.0"


@pytest.mark.parametrize("frequency", [1, 2, 4])
def test_better_than_splitting_alone(frequency):
    X, y = sinusoid(300, frequency)
    sizes, found = split_map(X, y), pure_voronoi_map(X, y)
    assert_pure(found, X, y)
    assert pure_voronoi_map(X, y, method="split").entropy == pytest.approx(entropy(sizes, base=2))
    assert len(found.labels) < 0.7 * len(sizes)
    assert found.entropy < entropy(sizes, base=2) - 0.4


def test_entropy_rises_with_frequency_and_density():
    """Figures 5.11 and 5.12."""
    by_frequency = [pure_entropy(*sinusoid(300, f)) for f in (1, 2, 4, 8)]
    by_samples = [pure_entropy(*sinusoid(n, 1)) for n in (50, 200, 600)]
    assert by_frequency == sorted(by_frequency) and by_samples == sorted(by_samples)


def test_digits_and_pooled_images():
    X, y = load_digits(return_X_y=True)
    X, y = X[:400], y[:400]
    found = pure_voronoi_map(X, y)
    assert_pure(found, X, y)
    nearest = KNeighborsClassifier(1).fit(found.centroids, found.labels)
    assert nearest.score(X, y) == 1
    images = torch.tensor(X).reshape(-1, 1, 8, 8)
    assert pure_voronoi_map(images, y).centroids.shape[1] == 64
    assert pure_voronoi_map(images, y, pool=4).centroids.shape[1] == 16


def test_equal_samples():
    X = np.array([[0.0, 1.0], [2.0, 2.0], [0.0, 1.0], [0.0, 1.0]])
    assert pure_voronoi_map(X, np.array([0, 1, 0, 0])).sizes.tolist() == [3, 1]
    with pytest.raises(ValueError, match=r"samples 0 and 3 are equal, and their classes 0 and 1 are not.*1 such"):
        pure_voronoi_map(X, np.array([0, 1, 0, 1]))


def test_bad_method():
    with pytest.raises(ValueError, match="'greedy' or 'split', got 'best'"):
        pure_voronoi_map(np.eye(2), np.arange(2), method="best")


def test_close_samples():
    """Distances of 1e-12 beside 1; far from the origin."""
    X = np.array([[0.0], [1e-12], [1.0], [1.0 + 1e-12]]) + np.array([[0.0], [0.0], [0.0], [0.0]])
    y = np.array([0, 1, 0, 1])
    assert_pure(pure_voronoi_map(X, y), X, y)
    X, y = sinusoid(100, 2)
    found = pure_voronoi_map(X + 1e6, y)
    assert_pure(found, X + 1e6, y)


def test_labels_without_pattern():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(80, 2)), rng.integers(0, 4, 80)
    found = pure_voronoi_map(X, y)
    assert_pure(found, X, y)
    assert len(found.labels) > 40
