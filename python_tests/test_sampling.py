"""Draws by cumulative weight over a canonical order: weights are repetition, and the order of rows does not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import repeated
from platonic import sampling
from platonic.sampling import RowSampler

MODES = ["classes", "one target", "two targets"]


def draw(seed, m, mode, ties=False):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((m, 3))
    if mode == "classes":
        Y = np.eye(3)[np.arange(m) % 3]
    else:
        y = rng.integers(0, 4, m).astype(float) if ties else rng.standard_normal(m)
        Y = y[:, None] if mode == "one target" else np.stack([y, -y + 0.5 * rng.standard_normal(m)], 1)
    return X, Y


def sampler(X, Y, mode, weights=None):
    group = torch.tensor(np.asarray(Y).argmax(1)) if mode == "classes" else None
    weights = None if weights is None else torch.tensor(np.asarray(weights, dtype=float))
    return RowSampler(torch.tensor(X), torch.tensor(Y), group, weights)


@settings(max_examples=60)
@given(
    mode=st.sampled_from(MODES),
    ties=st.booleans(),
    counts=st.lists(st.integers(1, 4), min_size=4, max_size=25),
    seed=st.integers(0, 999),
)
def test_weights_are_repetition(mode, ties, counts, seed):
    X, Y = draw(seed, len(counts), mode, ties)
    X2, Y2 = repeated(counts, X, Y)
    a, b = sampler(X, Y, mode, counts), sampler(X2, Y2, mode)
    assert a.total == b.total
    rng = np.random.default_rng(seed)
    uniforms = rng.random(40)
    np.testing.assert_array_equal(X[a.draw(uniforms)], X2[b.draw(uniforms)])
    for ours, theirs in zip(a.draw_pairs(rng.random((2, 40))), b.draw_pairs(rng.random((2, 40))), strict=True):
        assert ours.shape == theirs.shape
    uniforms = rng.random((2, 40))
    for ours, theirs in zip(a.draw_pairs(uniforms), b.draw_pairs(uniforms), strict=True):
        np.testing.assert_array_equal(X[ours], X2[theirs])
    np.testing.assert_array_equal(X[a.spread(7)], X2[b.spread(7)])
    np.testing.assert_array_equal(np.repeat(a.fold().numpy(), counts), b.fold().numpy())


@settings(max_examples=40)
@given(mode=st.sampled_from(MODES), m=st.integers(4, 40), seed=st.integers(0, 999))
def test_the_order_of_rows_does_not_matter(mode, m, seed):
    X, Y = draw(seed, m, mode)
    order = np.random.default_rng(seed + 1).permutation(m)
    a, b = sampler(X, Y, mode), sampler(X[order], Y[order], mode)
    np.testing.assert_array_equal(X[a.order], X[order][b.order])
    np.testing.assert_array_equal(a.fold().numpy()[order], b.fold().numpy())


@pytest.mark.parametrize("mode", MODES)
def test_order_is_by_class_or_target(mode):
    X, Y = draw(0, 30, mode)
    order = sampler(X, Y, mode).order.numpy()
    first = Y.argmax(1) if mode == "classes" else Y[:, 0]
    if mode == "two targets":
        standard = (Y - Y.mean(0)) / Y.std(0)
        first = standard[:, 0] - standard[:, 1]  # they are negatively correlated
    assert (np.diff(first[order]) >= -1e-12).all() or (mode == "two targets" and (np.diff(first[order]) <= 1e-12).all())


@settings(max_examples=30)
@given(seed=st.integers(0, 999), classes=st.integers(2, 6), m=st.integers(6, 30))
def test_pairs_are_of_different_classes(seed, classes, m):
    rng = np.random.default_rng(seed)
    group = np.concatenate([np.arange(classes), rng.integers(0, classes, m)])
    X = rng.standard_normal((len(group), 2))
    rows = RowSampler(
        torch.tensor(X), torch.zeros(len(X), 1), torch.tensor(group), torch.tensor(rng.uniform(0.01, 5, len(X)))
    )
    near = 1 - 1e-12  # within rounding of 1 a draw may fall on the edge between two classes
    first, second = rows.draw_pairs(np.hstack([rng.random((2, 200)), [[0, 0, near, near], [0, near, 0, near]]]))
    assert (group[first] != group[second]).all()


def test_pairs_cover_the_other_classes_by_weight():
    """Partners are spread over the other classes in proportion to their weight."""
    group = torch.tensor([0, 1, 2])
    rows = RowSampler(torch.eye(3), torch.eye(3), group, torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    grid = (np.arange(900) + 0.5) / 900
    first, second = rows.draw_pairs(np.stack([grid, np.roll(grid * 37 % 1, 3)]))
    assert np.bincount(first, minlength=3).tolist() == [100, 200, 600]
    share = (second[first == 0] == 2).double().mean()
    assert share == pytest.approx(6 / 8, abs=0.05)


def test_regression_partners_are_a_quarter_to_three_quarters_away():
    y = np.arange(100.0)
    rows = RowSampler(torch.tensor(y[:, None]), torch.tensor(y[:, None]), None, None)
    first, second = rows.draw_pairs(np.random.default_rng(0).random((2, 2000)))
    away = (second - first) % 100
    assert away.min() >= 24
    assert away.max() <= 76
    assert away.min() < 27
    assert away.max() > 73


@pytest.mark.parametrize("u", [0.0, np.nextafter(1, 0)])
def test_edges_of_the_unit_interval(u):
    """Cumulative weights that rounding leaves short of the total still hit the last row."""
    weights = np.full(7, 0.1)
    rows = RowSampler(torch.arange(7.0)[:, None], torch.arange(7.0)[:, None], None, torch.tensor(weights))
    assert rows.draw(np.array([u])).tolist() == [0 if u == 0 else 6]


@pytest.mark.parametrize("layout", ["C", "F"])
@pytest.mark.parametrize(("m", "n"), [(33, 17), (4097, 5), (5, 33000)])
def test_equal_rows_have_equal_keys(rng, m, n, layout):
    """Wherever they stand: in the last rows of a block, or in a last block that would have held one row."""
    row = rng.standard_normal(n)
    X = torch.tensor(np.asarray(np.tile(row, (m, 1)), order=layout))
    assert len(sampling._row_key(X).unique()) == 1


def test_negatively_correlated_targets_have_one_direction():
    """Their leading direction is (1, -1) / sqrt 2: which of the two is the larger is a matter of rounding."""
    for seed in range(20):
        _, Y = draw(seed, 50, "two targets")
        direction = sampling._leading_direction(torch.tensor(Y), None)
        assert np.corrcoef(direction, Y[:, 0])[0, 1] > 0


def test_equal_rows_are_in_one_fold():
    X = np.repeat(np.arange(5.0), 3)[:, None]
    fold = sampler(X, X, "one target").fold().numpy().reshape(5, 3)
    assert (fold == fold[:, :1]).all()
    assert 0 < fold[:, 0].sum() < 5
