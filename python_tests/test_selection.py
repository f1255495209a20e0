"""Forward selection against a greedy search that refits by least squares for every candidate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import repeated
from platonic import selection
from platonic.moments import compute_moments
from platonic.selection import choose_units, select_forward


def greedy(A, Y, count):
    """Columns of A that lower the least squares distance most, one after another, by refitting."""
    A, Y = A - A.mean(0), Y - Y.mean(0)
    taken: list[int] = []
    for _ in range(count):
        errors = {}
        for j in set(range(A.shape[1])) - set(taken):
            columns = A[:, [*taken, j]]
            errors[j] = np.linalg.norm(Y - columns @ np.linalg.lstsq(columns, Y, rcond=None)[0])
        taken.append(min(errors, key=errors.__getitem__))
    return taken


def moments_of(A, Y, weights=None):
    return compute_moments(torch.tensor(A), torch.tensor(Y), None if weights is None else torch.tensor(weights))


@pytest.mark.parametrize("seed", range(5))
def test_takes_what_a_greedy_search_takes(seed):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((60, 10)) @ rng.standard_normal((10, 10))
    Y = A[:, :4] @ rng.standard_normal((4, 2)) + rng.standard_normal((60, 2))
    assert select_forward(moments_of(A, Y), 6, 0.0).tolist() == greedy(A, Y, 6)


@settings(max_examples=40)
@given(p=st.integers(1, 12), seed=st.integers(0, 10_000), data=st.data())
def test_each_column_once_and_the_first_is_the_most_correlated(p, seed, data):
    count = data.draw(st.integers(0, p))
    rng = np.random.default_rng(seed)
    A, Y = rng.standard_normal((20, p)), rng.standard_normal((20, 1))
    taken = select_forward(moments_of(A, Y), count, 1e-8).tolist()
    assert len(set(taken)) == len(taken) == count
    if count:
        assert taken[0] == np.argmax(np.abs(np.corrcoef(A.T, Y[:, 0])[-1, :-1]))


def test_scale_of_a_column_does_not_matter(rng):
    A, Y = rng.standard_normal((50, 8)), rng.standard_normal((50, 2))
    scaled = A * np.geomspace(1e-2, 1e2, 8)
    assert select_forward(moments_of(A, Y), 5, 1e-8).tolist() == select_forward(moments_of(scaled, Y), 5, 1e-8).tolist()


def test_constant_and_duplicated_columns_come_last(rng):
    A = rng.standard_normal((50, 4))
    Y = A @ rng.standard_normal((4, 1))
    pool = np.hstack([np.ones((50, 1)), A, A])
    taken = select_forward(moments_of(pool, Y), 9, 1e-8).tolist()
    assert sorted((j - 1) % 4 for j in taken[:4]) == [0, 1, 2, 3]
    assert taken[-1] == 0


def test_blocks_of_a_wide_layer(rng, monkeypatch):
    """Several columns a step: still each once, and the best one among the first step's."""
    monkeypatch.setattr(selection, "_STEPS", 4)
    A, Y = rng.standard_normal((200, 30)), rng.standard_normal((200, 1))
    taken = select_forward(moments_of(A, Y), 10, 1e-8).tolist()
    assert len(set(taken)) == 10
    assert taken[0] == greedy(A, Y, 1)[0]


def halves(fold):
    """Positions where `fold` is true, and where it is false."""
    fold = torch.as_tensor(fold)
    return torch.nonzero(fold)[:, 0], torch.nonzero(~fold)[:, 0]


def test_selection_is_used_where_it_predicts_better(rng):
    """Ten informative candidates hide behind forty of noise."""
    A = rng.standard_normal((400, 50))
    Y = A[:, 40:] @ rng.standard_normal((10, 1))
    fold = torch.arange(400) % 2 == 0
    kept, used = choose_units(torch.tensor(A), torch.tensor(Y), None, halves(fold), 10, 1e-8)
    assert used
    assert sorted(kept.tolist()) == list(range(40, 50))


def test_selection_is_not_used_on_noise():
    """Nothing to select: on most draws the first candidates predict no worse, and then they are kept."""
    used = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        A, Y = rng.standard_normal((60, 40)), rng.standard_normal((60, 1))
        kept, selected = choose_units(torch.tensor(A), torch.tensor(Y), None, (slice(30), slice(30, None)), 10, 1e-8)
        assert selected or kept.tolist() == list(range(10))
        used += selected
    assert used < 10


def test_one_fold_or_no_choice(rng):
    A, Y = torch.tensor(rng.standard_normal((10, 5))), torch.tensor(rng.standard_normal((10, 1)))
    same = torch.zeros(10, dtype=torch.bool)
    assert choose_units(A, Y, None, halves(same), 3, 1e-8)[1] is False
    assert choose_units(A, Y, None, halves(torch.arange(10) % 2 == 0), 5, 1e-8)[0].tolist() == [0, 1, 2, 3, 4]


@settings(max_examples=30)
@given(counts=st.lists(st.integers(1, 3), min_size=20, max_size=30), seed=st.integers(0, 999))
def test_weights_are_repetition(counts, seed):
    rng = np.random.default_rng(seed)
    m = len(counts)
    A, Y, fold = rng.standard_normal((m, 8)), rng.standard_normal((m, 2)), np.arange(m) % 2 == 0
    a = choose_units(torch.tensor(A), torch.tensor(Y), torch.tensor(counts, dtype=torch.float64), halves(fold), 4, 1e-8)
    b = choose_units(*map(torch.tensor, repeated(counts, A, Y)), None, halves(np.repeat(fold, counts)), 4, 1e-8)
    assert a[1] == b[1]
    assert a[0].tolist() == b[0].tolist()
