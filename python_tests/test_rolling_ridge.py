"""platonic.rolling_ridge against a fit of every window, scikit-learn and hard series."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from platonic import reference
from platonic.batched import rolling_ridge
from platonic_core import _C

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")),
]
SHAPES = [(1, 1, 1), (5, 2, 9), (63, 1, 5), (300, 3, 20), (700, 6, 64), (520, 9, 300), (140, 34, 70)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    _C.limit_isa(request.param)
    yield request.param
    _C.limit_isa("")


def series(rng, n, p, r=1):
    x = rng.standard_normal((n, p)) + 5
    return x, x @ rng.standard_normal((p, r)) + rng.standard_normal((n, r))


def assert_matches(fit, x, y, window, l2, fit_intercept, min_periods, tolerance=1e-9):
    """The tolerance: windows' condition numbers here are below 1e5, errors add up over at most max(window, 256) rows
    of 2e-16 each."""
    weights, intercepts = reference.rolling_ridge(x, y, window, l2, fit_intercept, min_periods)
    coef = np.asarray(fit.coef)
    np.testing.assert_array_equal(np.isnan(coef), np.isnan(weights))
    np.testing.assert_array_equal(np.asarray(fit.status) != 0, np.isnan(weights).any((1, 2)))
    scale = np.abs(np.nan_to_num(weights)).max(initial=1)
    np.testing.assert_allclose(coef, weights, rtol=0, atol=tolerance * scale)
    if fit_intercept:
        np.testing.assert_allclose(
            fit.intercept, intercepts, rtol=0, atol=tolerance * scale * (1 + np.abs(x[np.isfinite(x)]).max())
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize(("n", "p", "window"), SHAPES)
def test_matches_a_fit_of_every_window(device, fit_intercept, n, p, window, rng):
    x, y = series(rng, n, p, 2)
    for min_periods in {window, (window + 1) // 2}:
        fit = rolling_ridge(
            torch.tensor(x, device=device),
            torch.tensor(y, device=device),
            window,
            0.5,
            fit_intercept=fit_intercept,
            min_periods=min_periods,
        )
        fit = type(fit)(*(None if t is None else t.cpu() for t in fit))
        assert_matches(fit, x, y, window, 0.5, fit_intercept, min_periods)


@pytest.mark.parametrize(("n", "p", "window"), SHAPES)
def test_every_instruction_set(isa, n, p, window, rng):
    x, y = series(rng, n, p, 3)
    assert_matches(rolling_ridge(x, y, window, 0.5), x, y, window, 0.5, True, window)


def test_matches_scikit_learn(rng):
    x, y = series(rng, 200, 4)
    fit = rolling_ridge(x, y[:, 0], 40, 3.0)
    assert fit.coef.shape == (200, 4) and fit.intercept.shape == (200,)
    for t in (39, 40, 127, 128, 199):
        expected = Ridge(3.0).fit(x[t - 39 : t + 1], y[t - 39 : t + 1, 0])
        np.testing.assert_allclose(fit.coef[t], expected.coef_, rtol=0, atol=1e-11)
        np.testing.assert_allclose(fit.intercept[t], expected.intercept_, rtol=0, atol=1e-10)


def test_first_rows_are_nan_and_counted(rng):
    x, y = series(rng, 50, 2)
    fit = rolling_ridge(x, y[:, 0], 20, 0.0)
    assert fit.status.dtype == np.int32
    assert fit.status.tolist() == [-1] * 19 + [0] * 31
    assert np.isnan(fit.coef[:19]).all() and np.isnan(fit.intercept[:19]).all()
    early = rolling_ridge(x, y[:, 0], 20, 0.0, min_periods=4)
    assert early.status.tolist() == [-1] * 3 + [0] * 47
    np.testing.assert_allclose(early.coef[19:], fit.coef[19:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_left_out(isa, bad, rng):
    x, y = series(rng, 400, 3)
    x[100, 1] = bad
    y[250] = bad
    strict = rolling_ridge(x, y, 30, 0.1)
    assert set(np.flatnonzero(strict.status)) == {*range(29), *range(100, 130), *range(250, 280)}
    assert_matches(strict, x, y, 30, 0.1, True, 30)
    assert_matches(rolling_ridge(x, y, 30, 0.1, min_periods=10), x, y, 30, 0.1, True, 10)


def test_singular_windows_are_reported_and_leave_no_trace(isa, rng):
    x, y = series(rng, 500, 3)
    x[200:260, 1] = 4.0  # constant: singular beside the intercept, once it fills the window
    x[350:420, 2] = x[350:420, 0]
    fit = rolling_ridge(x, y, 40, 0.0)
    singular = np.zeros(500, bool)
    singular[239:260] = singular[389:420] = True
    np.testing.assert_array_equal(fit.status[39:] > 0, singular[39:])
    assert set(fit.status[239:260]) == {2} and set(fit.status[389:420]) == {3}
    assert np.isnan(fit.coef[singular]).all() and np.isnan(fit.intercept[singular]).all()
    for t in (238, 260, 300, 388, 420, 499):
        expected = Ridge(0.0, solver="svd").fit(x[t - 39 : t + 1], y[t - 39 : t + 1])
        # Beside a singular window there is one with a single row that tells the features apart.
        np.testing.assert_allclose(fit.coef[t, :, 0], expected.coef_.ravel(), rtol=1e-6, atol=1e-6)


def test_an_outlier_leaves_no_trace(isa, rng):
    """Row 150 is 10^7 times the others: a factor that it had only been taken out of would keep errors of its size."""
    x, y = series(rng, 400, 4)
    clean = rolling_ridge(x, y, 50, 0.1)
    x[150], y[150] = x[150] * 1e7, y[150] * 1e7
    spoilt = rolling_ridge(x, y, 50, 0.1)
    outside = np.r_[49:150, 200:400]
    np.testing.assert_allclose(spoilt.coef[outside], clean.coef[outside], rtol=0, atol=1e-9)
    np.testing.assert_allclose(spoilt.intercept[outside], clean.intercept[outside], rtol=0, atol=1e-8)


def test_errors_do_not_grow_with_time(rng):
    x, y = series(rng, 20_000, 3)
    fit = rolling_ridge(x, y, 100, 0.01)
    for t in (99, 5_000, 19_999):
        expected = Ridge(0.01, solver="svd").fit(x[t - 99 : t + 1], y[t - 99 : t + 1])
        np.testing.assert_allclose(fit.coef[t, :, 0], expected.coef_.ravel(), rtol=0, atol=1e-11)


def test_far_from_zero(rng):
    """Prices: the level is 10^6 times the changes. Relative to the segment's first row, centring loses little."""
    x = 1e6 + rng.standard_normal((600, 3))
    y = x @ np.array([1.0, -2.0, 0.5]) + rng.standard_normal(600)
    fit = rolling_ridge(x, y, 60, 0.1)
    for t in (59, 300, 599):
        expected = Ridge(0.1, solver="svd").fit(x[t - 59 : t + 1], y[t - 59 : t + 1])
        np.testing.assert_allclose(fit.coef[t], expected.coef_, rtol=0, atol=1e-8)


@given(st.integers(1, 90), st.integers(1, 5), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(n, p, window, fit_intercept, seed):
    rng = np.random.default_rng(seed)
    x, y = series(rng, n, p)
    x[rng.random(n) < 0.1, 0] = np.nan
    least = int(rng.integers(1, window + 1))
    fit = rolling_ridge(x, y, window, 1.0, fit_intercept=fit_intercept, min_periods=least)
    assert_matches(fit, x, y, window, 1.0, fit_intercept, least)


def test_results_do_not_depend_on_the_number_of_threads(rng):
    x, y = map(torch.tensor, series(rng, 5_000, 4))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(rolling_ridge(x, y, 30, 0.1, min_periods=5))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_float32_is_computed_in_float64(rng):
    x, y = series(rng, 300, 3)
    x, y = x.astype(np.float32), y.astype(np.float32)
    fit, wide = rolling_ridge(x, y, 30, 0.1), rolling_ridge(x.astype(np.float64), y.astype(np.float64), 30, 0.1)
    assert fit.coef.dtype == np.float32
    np.testing.assert_array_equal(fit.coef, wide.coef.astype(np.float32))


def test_layouts_and_empty(rng):
    x, y = series(rng, 60, 3)
    expected = rolling_ridge(x, y, 10, 0.1)
    np.testing.assert_array_equal(rolling_ridge(np.asfortranarray(x), y, 10, 0.1).coef, expected.coef)
    np.testing.assert_array_equal(rolling_ridge(np.repeat(x, 2, 0)[::2], y, 10, 0.1).coef, expected.coef)
    assert isinstance(rolling_ridge(torch.tensor(x), torch.tensor(y), 10, 0.1).coef, torch.Tensor)
    empty = rolling_ridge(np.zeros((0, 3)), np.zeros(0), 10, 0.1)
    assert empty.coef.shape == (0, 3) and empty.intercept.shape == (0,) and empty.status.shape == (0,)
    assert rolling_ridge(x, y, 1_000_000_000, 0.1).status.tolist() == [-1] * 60


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.zeros((5, 2)), np.zeros(4), 3, 0.1), {}, r"got \(5, 2\) and \(4, 1\)"),
        ((np.zeros(5), np.zeros(5), 3, 0.1), {}, r"expected x \[n, p\]"),
        ((np.zeros((5, 129)), np.zeros(5), 3, 0.1), {}, "1 <= p <= 128, got p = 129"),
        ((np.zeros((5, 0)), np.zeros(5), 3, 0.1), {}, "got p = 0"),
        ((np.zeros((5, 2)), np.zeros((5, 0)), 3, 0.1), {}, "r >= 1"),
        ((np.zeros((5, 2)), np.zeros(5), 0, 0.1), {}, "window to be an integer of at least 1, got 0"),
        ((np.zeros((5, 2)), np.zeros(5), 2.5, 0.1), {}, "window to be an integer of at least 1, got 2.5"),
        ((np.zeros((5, 2)), np.zeros(5), True, 0.1), {}, "window to be an integer"),
        ((np.zeros((5, 2)), np.zeros(5), 3, "1"), {}, "l2 to be finite and >= 0"),
        ((np.zeros((5, 2)), np.zeros(5), 3, 0.1), {"fit_intercept": "no"}, "fit_intercept to be True or False"),
        ((np.zeros((5, 2)), np.zeros(5), 3, 0.1), {"min_periods": 4}, "min_periods = 4, window = 3"),
        (
            (np.zeros((5, 2)), np.zeros(5), 3, 0.1),
            {"min_periods": 0},
            "min_periods to be an integer of at least 1, got 0",
        ),
        ((np.zeros((5, 2)), np.zeros(5), 3, -0.1), {}, "l2 to be finite and >= 0"),
        ((np.zeros((5, 2)), np.zeros(5), 3, 0.1), {"rtol": float("nan")}, "rtol >= 0"),
    ],
)
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        rolling_ridge(*arguments, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device, rng):
    x, y = (torch.tensor(a, device=device) for a in series(rng, 40, 3, 2))
    for constant in (False, True):  # min_periods = 1: opcheck holds NaN to be unequal to itself
        torch.library.opcheck(torch.ops.platonic.rolling_ridge.default, (x, y, 9, 0.5, constant, 1, 1e-15))
