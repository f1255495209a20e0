"""Second moments against NumPy's float64 products of centred rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import repeated
from platonic import moments as moments_module
from platonic.moments import compute_moments, merge_moments

FIELDS = ("zz", "zy", "yy", "mean_z", "mean_y")


def direct(Z, Y, w):
    """Moments in NumPy's longest float, two passes."""
    Z, Y = np.asarray(Z, np.longdouble), np.asarray(Y, np.longdouble)
    w = np.ones(len(Z), np.longdouble) if w is None else w.astype(np.longdouble)
    mean_z, mean_y = w @ Z / w.sum(), w @ Y / w.sum()
    Zc, Yc = Z - mean_z, Y - mean_y
    return {
        "zz": np.einsum("ij,ik,i->jk", Zc, Zc, w), "zy": np.einsum("ij,ik,i->jk", Zc, Yc, w),
        "yy": np.einsum("ij,ik,i->jk", Yc, Yc, w), "mean_z": mean_z, "mean_y": mean_y,
    }  # fmt: skip


def assert_moments(got, want, eps):
    """An entry of a second moment within 128 roundings of its Cauchy-Schwarz bound, a mean within the same of its
    standard error and four of its own: errors of a sum of up to 8,192 products grow as the square root of their number."""
    std_z, std_y = np.sqrt(want["zz"].diagonal()), np.sqrt(want["yy"].diagonal())
    for name, a, b in (("zz", std_z, std_z), ("zy", std_z, std_y), ("yy", std_y, std_y)):
        error = np.abs(getattr(got, name).numpy() - want[name])
        assert (error <= 128 * eps * np.outer(a, b)).all(), name
    for name, std in (("mean_z", std_z), ("mean_y", std_y)):
        error = np.abs(getattr(got, name).numpy() - want[name])
        bound = 128 * eps * std / np.sqrt(got.total) + 4 * np.finfo(np.float64).eps * np.abs(want[name])
        assert (error <= bound).all(), name


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", [1, 2, 37, 8191, 8192, 8193, 20000])
def test_against_numpy(rng, m, dtype, weighted):
    Z = (rng.standard_normal((m, 5)) * [1, 10, 1e-3, 1, 1] + [0, 3, 1, -2, 0]).astype(dtype)
    Y = (Z[:, :2] + rng.standard_normal((m, 2))).astype(dtype)
    w = rng.uniform(0.1, 3, m) if weighted else None
    got = compute_moments(torch.tensor(Z), torch.tensor(Y), None if w is None else torch.tensor(w))
    # weights are taken in the dtype of the rows
    rounding = 1e-14 if w is None else max(1e-14, float(np.finfo(dtype).eps))
    assert got.total == pytest.approx(m if w is None else w.sum(), rel=rounding)
    assert all(getattr(got, name).dtype == torch.float64 for name in FIELDS)
    if m > 1:
        assert_moments(got, direct(Z, Y, w), np.finfo(dtype).eps)


def test_large_offset_in_float32(rng):
    """With a mean of 1e6 a naive float32 Gram matrix has no digit left; shifted products lose none."""
    Z = (1e6 + rng.standard_normal((9000, 3))).astype(np.float32)
    Y = rng.standard_normal((9000, 1)).astype(np.float32)
    assert_moments(
        compute_moments(torch.tensor(Z), torch.tensor(Y), None), direct(Z, Y, None), np.finfo(np.float32).eps
    )


def test_drift_away_from_the_first_chunk(rng):
    """Rows sorted by size: the first chunk's mean is a bad shift, and what is left of the mean is taken out at the end."""
    Z = np.sort(rng.standard_normal((20000, 2)), axis=0) * [1.0, 100.0] + [50, 0]
    Y = rng.standard_normal((20000, 1))
    assert_moments(
        compute_moments(torch.tensor(Z), torch.tensor(Y), None), direct(Z, Y, None), np.finfo(np.float64).eps
    )


@settings(max_examples=30)
@given(counts=st.lists(st.integers(1, 4), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_weights_are_repetition(counts, seed):
    rng = np.random.default_rng(seed)
    Z, Y = rng.standard_normal((len(counts), 3)), rng.standard_normal((len(counts), 2))
    a = compute_moments(torch.tensor(Z), torch.tensor(Y), torch.tensor(counts, dtype=torch.float64))
    b = compute_moments(*map(torch.tensor, repeated(counts, Z, Y)), None)
    assert a.total == b.total
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-12)


@settings(max_examples=30)
@given(m=st.integers(2, 40), cut=st.floats(0.01, 0.99), weighted=st.booleans(), seed=st.integers(0, 99))
def test_merged_halves_are_the_whole(m, cut, weighted, seed):
    rng = np.random.default_rng(seed)
    Z, Y = torch.tensor(rng.standard_normal((m, 3)) + 5), torch.tensor(rng.standard_normal((m, 2)))
    w = torch.tensor(rng.uniform(0.5, 2, m)) if weighted else None
    at = max(1, int(cut * m))
    parts = [compute_moments(Z[s], Y[s], None if w is None else w[s]) for s in (slice(0, at), slice(at, m))]
    whole, merged = compute_moments(Z, Y, w), merge_moments(*parts)
    assert merged.total == pytest.approx(whole.total, rel=1e-14)
    for name in FIELDS:
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-11)


def test_standard_deviation(rng):
    Z, w = rng.standard_normal((50, 3)), rng.uniform(0, 1, 50)
    got = compute_moments(torch.tensor(Z), torch.zeros(50, 1, dtype=torch.float64), torch.tensor(w)).std_z()
    want = np.sqrt(np.average((Z - np.average(Z, axis=0, weights=w)) ** 2, axis=0, weights=w))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-13)


def test_overflow_is_an_error():
    Z = torch.full((4, 2), 1e200, dtype=torch.float64)
    Z[0] = -1e200
    with pytest.raises(ValueError, match=r"overflowed.*Scale X, or lower alpha or beta"):
        compute_moments(Z, torch.zeros(4, 1, dtype=torch.float64), None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("m", "p", "k"), [(1, 1, 1), (99, 7, 2), (100, 9, 1), (257, 23, 3), (50, 0, 2)])
def test_blocked_products(monkeypatch, m, p, k, weighted, dtype):
    """The path of wide representations, with blocks of few columns and rows: exact, and symmetric to the last bit."""
    monkeypatch.setattr(moments_module, "_BLOCK", 4)
    monkeypatch.setattr(moments_module, "_CHUNK", 50)
    rng = np.random.default_rng(0)
    Z, Y = (rng.standard_normal((m, p)) + 3).astype(dtype), rng.standard_normal((m, k)).astype(dtype)
    w = rng.uniform(0.5, 2, m) if weighted else np.ones(m)
    got = moments_module._by_blas(torch.tensor(Z), torch.tensor(Y), torch.tensor(w) if weighted else None)
    V = np.hstack([Z, Y]).astype(np.float64)
    mean = w @ V / w.sum()
    want = (V - mean).T @ (w[:, None] * (V - mean))
    tolerance = 200 * np.finfo(dtype).eps * m
    np.testing.assert_allclose(got.zz, want[:p, :p], rtol=0, atol=tolerance)
    np.testing.assert_allclose(got.zy, want[:p, p:], rtol=0, atol=tolerance)
    np.testing.assert_allclose(got.yy, want[p:, p:], rtol=0, atol=tolerance)
    np.testing.assert_allclose(np.concatenate([got.mean_z, got.mean_y]), mean, rtol=0, atol=tolerance)
    assert torch.equal(got.zz, got.zz.T)
