"""Redundant samples: held to scikit-learn's neighbours and to whole-number distances, also where float32 products fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from layerwise import k_filter, k_redundancy, k_redundant
from layerwise.neighbours import _Samples

KS = [1, 2, 3, 5, 10, 20]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def by_sklearn(Z, y, ks):
    """Row by row of the definition; right where no two distances are equal."""
    found = (
        NearestNeighbors(n_neighbors=max(ks), algorithm="kd_tree").fit(np.asarray(Z, dtype=np.float64)).kneighbors()[1]
    )
    same = y[found] == y[:, None]
    return np.stack([same[:, :k].all(1) for k in ks])


def by_integers(Z, y, ks):
    """Exact, for whole numbers: k of the class strictly closer than the nearest of another."""
    Z = np.asarray(Z, dtype=np.int64)
    distances = ((Z[:, None] - Z[None]) ** 2).sum(2)
    same = y[:, None] == y[None]
    nearest = np.where(same, np.iinfo(np.int64).max, distances).min(1)
    np.fill_diagonal(same, False)
    closer = (same & (distances < nearest[:, None])).sum(1)
    return np.stack([closer >= k for k in ks])


@pytest.fixture(scope="module")
def digits():
    X, y = (part[:900] for part in load_digits(return_X_y=True))
    return X.astype(np.float32) + np.random.default_rng(0).normal(0, 1e-3, X.shape).astype(np.float32), y


# ---- outside oracles ----


@pytest.mark.parametrize("device", DEVICES)
def test_digits_as_scikit_learn(digits, device):
    X, y = digits
    got = k_redundant(torch.from_numpy(X).to(device), torch.from_numpy(y), KS)
    assert got.device.type == device
    np.testing.assert_array_equal(got.cpu().numpy(), by_sklearn(X, y, KS))


def clusters(rng, scale, dtype=np.float64):
    """Two classes mixed in every one of eight groups, whose distance is `scale` times their size."""
    centres = rng.normal(size=(8, 1, 5)) * scale
    Z = (centres + rng.normal(size=(8, 40, 5))).reshape(-1, 5).astype(dtype)
    return Z, rng.integers(0, 2, len(Z))


NASTY = {
    "offset": lambda rng: (rng.normal(size=(300, 20)).astype(np.float32) + np.float32(1e4), rng.integers(0, 2, 300)),
    "offset of float64": lambda rng: (rng.normal(size=(300, 6)) * 1e-6 + 1e6, rng.integers(0, 2, 300)),
    "groups far apart": lambda rng: clusters(rng, 1e3),
    "groups farther apart than float32 products resolve": lambda rng: clusters(rng, 1e5, np.float32),
    "groups farther apart than float64 products resolve": lambda rng: clusters(rng, 1e9),
    "an outlier": lambda rng: (
        np.concatenate([rng.normal(size=(299, 4)), [[1e12, 0, 0, 0]]]),
        rng.integers(0, 2, 300),
    ),
    "one feature much larger than the rest": lambda rng: (
        rng.normal(size=(300, 4)) * [1e8, 1, 1, 1],
        rng.integers(0, 3, 300),
    ),
    "tiny numbers": lambda rng: (rng.normal(size=(200, 3)) * 1e-300, rng.integers(0, 2, 200)),
    "huge numbers": lambda rng: (rng.normal(size=(200, 3)) * 1e300, rng.integers(0, 2, 200)),
    "one dimension": lambda rng: (rng.normal(size=(300, 1)), rng.integers(0, 2, 300)),
    "more features than samples": lambda rng: (rng.normal(size=(50, 3000)).astype(np.float32), rng.integers(0, 2, 50)),
    "a class per sample": lambda rng: (rng.normal(size=(100, 3)), np.arange(100)),
    "one class": lambda rng: (rng.normal(size=(100, 3)), np.zeros(100, dtype=int)),
    "a rare class": lambda rng: (rng.normal(size=(300, 3)), (np.arange(300) == 7).astype(int)),
}


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("device", DEVICES)
def test_nasty_data_as_scikit_learn(rng, name, device):
    Z, y = NASTY[name](rng)
    reference = Z / np.abs(Z).max() if "numbers" in name else Z  # scikit-learn's squares over- and underflow
    got = k_redundant(torch.from_numpy(Z).to(device), torch.from_numpy(y), KS)
    np.testing.assert_array_equal(got.cpu().numpy(), by_sklearn(reference, y, KS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_ties_count_against_redundancy(rng, device, dtype):
    Z = rng.integers(0, 4, (400, 4))  # a lattice of 256 points: duplicates, and ties everywhere
    y = (Z.sum(1) > 6).astype(int) ^ (rng.random(400) < 0.02)
    got = k_redundant(torch.from_numpy(Z).to(device, dtype), torch.from_numpy(y), KS).cpu().numpy()
    expected = by_integers(Z, y, KS)
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(got, expected)


def test_ties_far_from_the_origin(rng):
    Z = rng.integers(0, 3, (300, 5)) + 10**9  # in float64, not in float32
    y = (Z[:, 0] > 10**9).astype(int)
    np.testing.assert_array_equal(k_redundant(Z.astype(np.float64), y, KS), by_integers(Z, y, KS))


def test_distances_that_only_rounding_tells_apart(rng):
    """The same differences in another order have the same sum, but for its rounding."""
    for _ in range(20):
        v = rng.normal(size=500)
        Z, y = np.stack([0 * v, v, rng.permutation(v), 9 * v]), np.array([0, 0, 1, 1])
        assert not k_redundant(Z, y, 1)[0]


def test_many_identical_samples(rng):
    """As after a layer most of whose outputs are 0: ties everywhere, and few distinct pairs among them."""
    Z = rng.integers(-2, 3, (600, 3)) * (rng.random((600, 1)) < 0.4)
    y = rng.integers(0, 2, 600) * (rng.random(600) < 0.1)
    expected = by_integers(Z, y, KS)
    assert expected.any()
    np.testing.assert_array_equal(k_redundant(Z, y, KS), expected)
    np.testing.assert_array_equal(k_redundant(Z * 0.1 + 1e3, y, KS), expected)


def test_identical_samples():
    Z = torch.full((50, 7), 0.1)
    y = torch.arange(50) % 2
    assert not k_redundant(Z, y, [1, 5]).any()  # the other class is as close
    assert k_redundant(Z, torch.zeros(50), [1, 49]).all()
    pairs = torch.tensor([[0.0], [0.0], [1.0], [1.0], [1.5]])
    labels = torch.tensor([0, 0, 1, 1, 0])
    assert k_redundant(pairs, labels, 1).tolist() == [True, True, True, True, False]
    assert k_redundant(pairs, labels, 2).tolist() == [False] * 5


def test_by_hand():
    # On a line: 0 1 2 of class a, 10 of class b, 11.5 12 of class a; a tie for 11 is left out.
    Z = torch.tensor([0.0, 1, 2, 10, 11.5, 12])[:, None]
    y = torch.tensor([0, 0, 0, 1, 0, 0])
    assert k_redundant(Z, y, [1, 2, 3]).tolist() == [
        [True, True, True, False, True, True],
        [True, True, True, False, False, False],
        [False, False, False, False, False, False],
    ]
    assert k_redundancy(Z, y, [1, 2]) == [5 / 6, 3 / 6]
    assert k_redundancy(Z, y, 1) == 5 / 6


# ---- invariants ----


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 4), st.integers(1, 4))
def test_a_lattice_in_any_order_and_place(seed, m, d, classes):
    rng = np.random.default_rng(seed)
    Z, y = rng.integers(-3, 4, (m, d)), rng.integers(0, classes, m)
    ks = list(range(1, m))
    got = k_redundant(Z, y, ks)
    np.testing.assert_array_equal(got, by_integers(Z, y, ks))
    assert not (got[1:] & ~got[:-1]).any()  # redundant for k + 1, so for k
    order = rng.permutation(m)
    moved = (Z[order] * 0.5 + 1000).astype(np.float32)
    np.testing.assert_array_equal(k_redundant(moved, y[order], ks), got[:, order])


@pytest.mark.parametrize("memory_limit", [1, 1 << 15, 1 << 20])
def test_memory_limit_and_threads_do_not_matter(digits, memory_limit):
    X, y = digits[0][:200], digits[1][:200]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        np.testing.assert_array_equal(k_redundant(X, y, KS, memory_limit=memory_limit), k_redundant(X, y, KS))
    finally:
        torch.set_num_threads(threads)


def test_reduced_precision_does_not_matter(digits):
    X, y = map(torch.from_numpy, digits)
    expected = k_redundant(X, y, KS)
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert torch.equal(k_redundant(X, y, KS), expected)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(k_redundant(X, y, KS), expected)


def test_few_samples_are_gone_through_twice(digits, monkeypatch):
    """The bound of the error leaves few open; were it far too wide, the answer would be right but slow."""
    rows = []
    exactly = _Samples.count_exactly
    monkeypatch.setattr(_Samples, "count_exactly", lambda self, r: (rows.append(len(r)), exactly(self, r))[1])
    k_redundant(*digits, KS)
    assert sum(rows) < 0.02 * len(digits[0])


def test_forms_of_input(digits):
    X, y = digits[0][:300], digits[1][:300]
    expected = k_redundant(X, y, 5)
    assert isinstance(expected, np.ndarray) and expected.dtype == bool
    images = torch.from_numpy(X).view(-1, 1, 8, 8)
    assert torch.equal(k_redundant(images, y - 3.5, 5), torch.from_numpy(expected))  # any numbers serve as labels
    strided = torch.from_numpy(np.repeat(X, 2, axis=1))[:, ::2].requires_grad_()
    found = k_redundant(strided, torch.from_numpy(y), 5)
    assert torch.equal(found, torch.from_numpy(expected)) and not found.requires_grad


# ---- k_filter ----


def test_filter_keeps_what_is_not_redundant(digits):
    X, y = digits
    kept = k_filter(X, y, [5, 10])
    for k, index in zip([5, 10], kept, strict=True):
        np.testing.assert_array_equal(index, np.flatnonzero(~k_redundant(X, y, k)))
    assert torch.equal(k_filter(torch.from_numpy(X), torch.from_numpy(y), 5), torch.from_numpy(kept[0]))


def test_filter_in_parts(digits):
    X, y = map(torch.from_numpy, digits)
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    kept = k_filter(X, y, 5, batch=250, generator=draw())
    parts = torch.randperm(len(X), generator=draw()).tensor_split(4)
    expected = torch.cat([p[~k_redundant(X[p], y[p], 5)] for p in parts]).sort().values
    assert torch.equal(kept, expected)
    assert torch.equal(kept, k_filter(X, y, 5, batch=250, generator=draw()))
    assert not torch.equal(kept, k_filter(X, y, 5, batch=250, generator=torch.Generator().manual_seed(4)))
    assert len(k_filter(X, y, 5)) < len(kept)  # fewer samples, farther neighbours


def test_filter_up_to_a_cap(digits):
    X, y = map(torch.from_numpy, digits)
    free = k_filter(X, y, 2)
    assert len(free) < 0.2 * len(X)
    kept = k_filter(X, y, 2, cap=0.6)
    assert len(kept) == len(X) - int(0.6 * len(X))
    assert torch.isin(free, kept).all()
    assert len(k_filter(X, y, 2, cap=0.0)) == len(X)
    torch.manual_seed(0)
    first = k_filter(X, y, 2, cap=0.6)
    assert not torch.equal(first, kept)
    torch.manual_seed(0)
    assert torch.equal(k_filter(X, y, 2, cap=0.6), first)


# ---- bad input ----


@pytest.mark.parametrize(
    ("Z", "y", "k", "message"),
    [
        (np.zeros((5, 2)), np.zeros(4), 1, r"samples \(m, ...\) and classes \(m,\), got \(5, 2\) and \(4,\)"),
        (np.zeros(5), np.zeros(5), 1, "samples"),
        (np.zeros((5, 0)), np.zeros(5), 1, "at least one feature"),
        (np.zeros((5, 2)), np.zeros(5), 5, "1 to 4 neighbours among 5 samples, got 5"),
        (np.zeros((5, 2)), np.zeros(5), 0, "got 0"),
        (np.zeros((5, 2)), np.zeros(5), [], "neighbours"),
        (np.zeros((5, 2)), np.zeros(5), True, "neighbours"),
        (np.array([[1.0], [np.nan], [2.0]]), np.zeros(3), 1, "finite"),
        (np.array([[1.0], [np.inf], [2.0]]), np.zeros(3), 1, "finite"),
        (np.zeros((5, 2), dtype=complex), np.zeros(5), 1, "real"),
    ],
)
def test_bad_input(Z, y, k, message):
    with pytest.raises(ValueError, match=message):
        k_redundant(Z, y, k)


def test_bad_options(digits):
    with pytest.raises(ValueError, match="more than k=10"):
        k_filter(*digits, [5, 10], batch=10)
    with pytest.raises(ValueError, match="cap: expected a share from 0 to 1"):
        k_filter(*digits, 5, cap=1.5)
    with pytest.raises(TypeError, match="dtype"):
        k_redundant(digits[0], digits[1].astype(str), 5)
