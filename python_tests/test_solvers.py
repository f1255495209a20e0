"""Ridge solvers against NumPy, SciPy and scikit-learn, up to condition 1e12, and rank-deficient problems."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from oracles import brute_ridge, problem, repeated, spread_columns
from platonic.solvers import SOLVERS, solve_ridge

ALL = sorted(SOLVERS)
EPS = {np.float32: 6e-8, np.float64: 1.1e-16}


def solve(name, Z, Y, l2=0.0, weights=None, tol=None):
    return solve_ridge(
        torch.tensor(Z),
        torch.tensor(Y),
        l2,
        weights=None if weights is None else torch.tensor(weights),
        solver=name,
        tol=tol,
    )


def fitted(solution, Z):
    return np.asarray(Z, np.float64) @ solution.coef.numpy() + solution.intercept.numpy()


def draw(rng, m, p, k=2, dtype=np.float64):
    Z = rng.standard_normal((m, p)).astype(dtype)
    Y = (Z @ rng.standard_normal((p, k)) + rng.standard_normal((m, k))).astype(dtype)
    return Z, Y


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("l2", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ALL)
def test_against_scikit_learn(rng, name, dtype, l2, weighted):
    Z, Y = draw(rng, 200, 12, dtype=dtype)
    weights = rng.uniform(0.2, 3, 200) if weighted else None
    want = Ridge(l2, solver="svd").fit(Z.astype(np.float64), Y.astype(np.float64), weights)
    got = solve(name, Z, Y, l2, weights)
    # condition about 2; moments in the data's dtype keep relative errors near its rounding unit times sqrt(m)
    tolerance = 100 * EPS[dtype]
    np.testing.assert_allclose(got.coef.numpy(), want.coef_.T, rtol=0, atol=tolerance * np.abs(want.coef_).max())
    np.testing.assert_allclose(
        got.intercept.numpy(), want.intercept_, rtol=0, atol=tolerance * np.abs(want.coef_).max()
    )
    assert got.coef.dtype == got.intercept.dtype == torch.float64
    assert (got.rank, got.jitter) == (12, 0)


@pytest.mark.parametrize("name", ALL)
def test_a_penalty_per_column(rng, name):
    Z, Y = draw(rng, 60, 5)
    penalty = np.array([0.0, 1e-2, 1.0, 100.0, 1e4])
    got = SOLVERS[name](problem(Z, Y), torch.tensor(penalty))
    coef, intercept = brute_ridge(Z, Y, penalty)
    np.testing.assert_allclose(got.coef.numpy(), coef, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(got.intercept.numpy(), intercept, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [1e-7, 1e-8, 1e-12])
def test_a_small_column_under_a_penalty(rng, name, size):
    """Its penalty is huge in its own units; the others are solved as if it were not there."""
    Z, Y = draw(rng, 90, 6)
    Z[:, 2] *= size
    got = solve(name, Z, Y, 1.0)
    np.testing.assert_allclose(got.coef.numpy(), brute_ridge(Z, Y, 1.0)[0], rtol=1e-9, atol=1e-13)
    assert got.rank == 6


@pytest.mark.parametrize("name", ALL)
def test_more_columns_than_rows(rng, name):
    """Without penalty every solver interpolates; with one there is a single answer."""
    Z, Y = draw(rng, 20, 50)
    np.testing.assert_allclose(fitted(solve(name, Z, Y), Z), Y, rtol=0, atol=1e-9)
    coef, _ = brute_ridge(Z, Y, 0.5)
    np.testing.assert_allclose(solve(name, Z, Y, 0.5).coef.numpy(), coef, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"cholesky"}))
def test_rank_revealing_solvers_find_the_minimum_norm(rng, name):
    """Of the standardised problem: columns here have equal scale up to a common factor."""
    Z, _ = draw(rng, 30, 4)
    Z = np.hstack([Z, Z])
    Y = rng.standard_normal((30, 2))
    got = solve(name, Z, Y)
    assert got.rank == 4
    np.testing.assert_allclose(got.coef.numpy(), brute_ridge(Z, Y)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ALL)
def test_duplicated_and_dependent_columns(rng, name, dtype):
    """Fitted values of a singular problem are those of the columns that span it."""
    A, Y = draw(rng, 80, 4, dtype=dtype)
    Z = np.hstack([A, A[:, :2], A[:, :1] + A[:, 1:2]]).astype(dtype)
    coef, intercept = brute_ridge(A, Y)
    got = solve(name, Z, Y, tol=1e-5 if dtype == np.float32 else None)
    # a float32 sum of two columns is a new direction of size eps: 1e-5 leaves it out; cholesky may use it
    np.testing.assert_allclose(fitted(got, Z), A @ coef + intercept, rtol=0, atol=2e-3 if dtype == np.float32 else 1e-9)
    assert np.abs(got.coef.numpy()).max() < 1e4
    if name == "cholesky":
        assert got.jitter > 0 or dtype == np.float32
    else:
        assert got.rank == 4


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8, 1e10, 1e12])
def test_ill_conditioned_fits_as_well_as_a_decomposition_of_the_rows(rng, name, condition):
    """The residual is as small as NumPy's (SVD of the rows), although cholesky and eig start from the Gram matrix.

    For cholesky this is what the conjugate gradients on the rows are for. eig drops directions whose square is under
    the tolerance, so it is held to the residual of a least squares fit that drops the same.
    """
    m, p = 300, 12
    Z = spread_columns(rng, m, p, condition)
    Y = Z @ rng.standard_normal((p, 2)) * condition**0.5 + 1e-6 * rng.standard_normal((m, 2))
    got = solve(name, Z, Y)
    ours = np.linalg.norm(fitted(got, Z) - Y)
    cut = np.sqrt(m * EPS[np.float64]) if name == "eig" else None
    Zc = Z - Z.mean(0)
    scaled = Zc / np.linalg.norm(Zc, axis=0)
    coef = np.linalg.lstsq(scaled, Y - Y.mean(0), rcond=cut)[0]
    numpys = np.linalg.norm(scaled @ coef - (Y - Y.mean(0)))
    assert ours <= 1.01 * numpys + 1e-12 * np.linalg.norm(Y)


def test_conjugate_gradients_are_what_reaches_it(rng):
    """The same problem from the Gram matrix alone (SciPy's Cholesky) misses by orders of magnitude."""
    Z = spread_columns(rng, 300, 12, 1e7)
    Y = Z @ rng.standard_normal((12, 1)) * 1e7
    Zc, Yc = Z - Z.mean(0), Y - Y.mean(0)
    gram_only = scipy.linalg.solve(Zc.T @ Zc, Zc.T @ Yc, assume_a="pos")
    ours = np.linalg.norm(fitted(solve("cholesky", Z, Y), Z) - Y)
    assert ours < 1e-3 * np.linalg.norm(Zc @ gram_only - Yc)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dead_columns_get_zero(rng, name, dtype):
    Z, Y = draw(rng, 50, 6, dtype=dtype)
    Z[:, 1] = 0
    Z[:, 4] = np.asarray(1e6 / 3, dtype)
    live = [0, 2, 3, 5]
    for l2 in (0.0, 1e-2):
        got = solve(name, Z, Y, l2)
        assert (got.coef[[1, 4]] == 0).all()
        coef, _ = brute_ridge(Z[:, live], Y, l2)
        np.testing.assert_allclose(got.coef[live].numpy(), coef, rtol=0, atol=1000 * EPS[dtype])


@pytest.mark.parametrize("name", ALL)
def test_nothing_but_dead_columns(name):
    """The intercept alone: the weighted mean."""
    Y, weights = np.array([[1.0], [2.0], [6.0]]), np.array([1.0, 1.0, 2.0])
    got = solve(name, np.full((3, 2), 7.0), Y, 0.0, weights)
    assert (got.coef == 0).all()
    np.testing.assert_allclose(got.intercept.numpy(), [15 / 4], rtol=1e-15)
    assert got.rank == 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_offsets(rng, name, dtype):
    """In float32 such data keep 7 bits after the point; the fit to *these* data is as good as float64's."""
    Z, Y = draw(rng, 400, 5, dtype=np.float64)
    offset = 1e6 if dtype == np.float64 else 1e5
    Z = (Z + offset).astype(dtype)
    Y = (Y - offset).astype(dtype)
    want_coef, want_intercept = brute_ridge(Z, Y)
    want = np.linalg.norm(Z.astype(np.float64) @ want_coef + want_intercept - Y)
    assert np.linalg.norm(fitted(solve(name, Z, Y), Z) - Y) <= 1.001 * want


@pytest.mark.parametrize("name", ALL)
def test_columns_of_very_different_scale(rng, name):
    scales = np.array([1e-9, 1e-3, 1.0, 1e5, 1e9])
    Z, Y = draw(rng, 100, 5)
    base = solve(name, Z, Y).coef.numpy()
    np.testing.assert_allclose(solve(name, Z * scales, Y).coef.numpy() * scales[:, None], base, rtol=1e-9)


def test_jitter_is_reported_and_small(rng):
    Z, Y = draw(rng, 40, 3)
    singular = solve("cholesky", np.hstack([Z, Z]), Y)
    assert 0 < singular.jitter < 1e-9
    assert singular.rank == 3
    assert solve("cholesky", np.hstack([Z, Z]), Y, 1.0).jitter == 0


@settings(max_examples=60)
@given(
    name=st.sampled_from(ALL), m=st.integers(1, 30), p=st.integers(1, 10), k=st.integers(1, 3),
    l2=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]), weighted=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_the_gradient_of_the_objective_is_zero(name, m, p, k, l2, weighted, seed):
    """Z' W (Z B + b - Y) + l2 B = 0 and the weighted residuals sum to 0: the definition, for any shape."""
    rng = np.random.default_rng(seed)
    Z, Y = rng.standard_normal((m, p)), rng.standard_normal((m, k))
    w = rng.uniform(0.1, 3, m) if weighted else np.ones(m)
    got = solve(name, Z, Y, l2, w if weighted else None)
    residual = w[:, None] * (fitted(got, Z) - Y)
    size = (w[:, None] * np.abs(Y)).sum() * (1 + np.abs(Z).max()) + l2 * np.abs(got.coef.numpy()).max()
    assert np.abs(residual.sum(0)).max() <= 1e-10 * size
    assert np.abs(Z.T @ residual + l2 * got.coef.numpy()).max() <= 1e-8 * size


@settings(max_examples=40)
@given(name=st.sampled_from(ALL), counts=st.lists(st.integers(1, 4), min_size=6, max_size=15), seed=st.integers(0, 999))
def test_weights_are_repetition(name, counts, seed):
    rng = np.random.default_rng(seed)
    Z, Y = rng.standard_normal((len(counts), 3)), rng.standard_normal((len(counts), 2))
    a = solve(name, Z, Y, 0.1, np.array(counts, float))
    b = solve(name, *repeated(counts, Z, Y), 0.1)
    torch.testing.assert_close(a.coef, b.coef, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(a.intercept, b.intercept, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_not_changed(rng, name):
    Z, Y = (torch.tensor(a) for a in draw(rng, 30, 4))
    w = torch.rand(30, dtype=torch.float64)
    copies = [t.clone() for t in (Z, Y, w)]
    solve_ridge(Z, Y, 1e-14, weights=w, solver=name)
    assert all(torch.equal(a, b) for a, b in zip((Z, Y, w), copies, strict=True))
