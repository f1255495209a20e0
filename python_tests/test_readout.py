"""Read-outs: leave-one-out errors and scores against refits without each row, and the choice of l2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import brute_leave_one_out, brute_ridge, problem
from platonic import readout
from platonic.readout import (
    LooRows,
    ReadoutOptions,
    choose_l2,
    column_scale,
    fit_readout,
    leave_one_out_scores,
    penalty_unit,
)

ONE = 2**62  # as readout._EXACT_WORK: always from the rows
NONE = -1  # never


def draw(seed, m, p, k=2, noise=0.5):
    rng = np.random.default_rng(seed)
    Z = rng.standard_normal((m, p)) * np.geomspace(0.3, 3, p) + 1
    return Z, Z @ rng.standard_normal((p, k)) + noise * rng.standard_normal((m, k))


def all_rows(m, weights=None, left_out=None):
    ones = torch.ones(m, dtype=torch.float64)
    return LooRows(
        None, ones if weights is None else torch.tensor(weights), ones if left_out is None else torch.tensor(left_out)
    )


def mean_freedom(Z, penalty):
    """Mean over rows of 1 - leverage."""
    Zc = Z - Z.mean(0)
    hat = Zc @ np.linalg.solve(Zc.T @ Zc + np.diag(penalty), Zc.T)
    return 1 - (np.trace(hat) + 1) / len(Z)


def loo_scores(Z, Y, weights, left_out, l2, relative):
    options = ReadoutOptions(l2, "cholesky", None, relative)
    rows = all_rows(len(Z), weights, left_out)
    tensors = torch.tensor(Z), torch.tensor(Y), None if weights is None else torch.tensor(weights)
    made = fit_readout(*tensors, options, rows)
    unit = penalty_unit(problem(Z, Y, weights), made.scale, relative)
    return leave_one_out_scores(*tensors, made, options, rows).numpy(), (l2 * unit).numpy()


@pytest.mark.parametrize("work", [ONE, NONE], ids=["rows", "gram"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("weighted", [None, "whole", "class"])
@pytest.mark.parametrize(("m", "p"), [(25, 4), (12, 11), (10, 25)])
def test_scores_are_those_of_refits(monkeypatch, m, p, weighted, relative, work):
    """`whole`: integer weights, one copy left out. `class`: rows count by class, so that a copy has a weight of its own."""
    monkeypatch.setattr(readout, "_EXACT_WORK", work)
    Z, Y = draw(m + p, m, p)
    weights = left_out = None
    if weighted == "whole":
        weights = np.tile([1.0, 2.0, 3.0], m)[:m]
        left_out = np.ones(m)
    elif weighted == "class":
        left_out = np.where(np.arange(m) % 2, 0.3, 1.7)
        weights = left_out * np.tile([1.0, 2.0, 4.0], m)[:m]
    got, penalty = loo_scores(Z, Y, weights, left_out, 0.05, relative)
    want = brute_leave_one_out(Z, Y, penalty, weights, left_out)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * np.abs(want).max())


@settings(max_examples=40)
@given(m=st.integers(3, 14), p=st.integers(1, 16), l2=st.sampled_from([1e-4, 1e-2, 1.0]), seed=st.integers(0, 10_000))
def test_both_paths_agree(m, p, l2, seed):
    Z, Y = draw(seed, m, p)
    unit = torch.ones(p, dtype=torch.float64)
    results = [
        path(problem(Z, Y), unit, all_rows(m), 1.0).residuals(l2) for path in (readout._ExactPath, readout._GramPath)
    ]
    for exact, gram in zip(*results, strict=True):
        # the Gram matrix loses the square of the condition number of sqrt(|Z|^2 / l2)
        torch.testing.assert_close(exact, gram, rtol=1e-6, atol=1e-8 * float(exact.abs().max()))


@pytest.mark.parametrize("work", [ONE, NONE], ids=["rows", "gram"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(("m", "p", "noise"), [(30, 5, 0.1), (30, 5, 5.0), (15, 12, 1.0), (12, 30, 1.0)])
def test_chosen_l2_has_the_smallest_brute_force_error(monkeypatch, m, p, noise, relative, work):
    monkeypatch.setattr(readout, "_EXACT_WORK", work)
    Z, Y = draw(3 * m + p, m, p, noise=noise)
    case = problem(Z, Y)
    scale = column_scale(case)
    unit = penalty_unit(case, scale, relative)
    chosen = choose_l2(case, unit, all_rows(m))
    average = float((case.moments.zz.diagonal() / unit).mean())
    grid = [10.0**e * average for e in range(-6, 2)]
    grid = [l2 for l2 in grid if mean_freedom(Z, l2 * unit.numpy()) >= readout._LEAST_FREEDOM]
    errors = {l2: ((brute_leave_one_out(Z, Y, l2 * unit.numpy()) - Y) ** 2).sum() for l2 in grid}
    best = min(errors.values())
    ours = ((brute_leave_one_out(Z, Y, chosen * unit.numpy()) - Y) ** 2).sum()
    assert ours <= best * (1 + 1e-6)


@pytest.mark.parametrize("work", [ONE, NONE], ids=["rows", "gram"])
def test_interpolation_is_not_chosen(monkeypatch, work):
    """With many more columns than rows the training error is 0 at small l2, and leave-one-out says little there."""
    monkeypatch.setattr(readout, "_EXACT_WORK", work)
    rng = np.random.default_rng(0)
    Z, Y = rng.standard_normal((40, 400)), rng.standard_normal((40, 1))
    case = problem(Z, Y)
    unit = penalty_unit(case, column_scale(case), True)
    l2 = choose_l2(case, unit, all_rows(40))
    path = readout._path(case, unit, all_rows(40))
    assert np.isfinite(path.error(l2))


def test_interpolated_rows_have_the_limit_of_a_vanishing_penalty(rng):
    """Residual and what is left of a row are both 0 there; what the fit without the row says is not the row's target."""
    Z, Y = draw(2, 12, 30)
    options = ReadoutOptions(0.0, "svd", None, False)
    Zt, Yt = torch.tensor(Z), torch.tensor(Y)
    made = fit_readout(Zt, Yt, None, options, all_rows(12))
    got = leave_one_out_scores(Zt, Yt, None, made, options, all_rows(12))
    want = brute_leave_one_out(Z, Y, 1e-9)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-6)


def test_a_subset_of_rows_measures_the_whole_fit(rng):
    """Rows named by index, also more than once, get the residuals that they have among all."""
    Z, Y = draw(1, 40, 4)
    index = torch.tensor([3, 3, 17, 39, 0])
    ones = torch.ones(5, dtype=torch.float64)
    options = ReadoutOptions(0.1, "cholesky", None, False)
    Zt, Yt = torch.tensor(Z), torch.tensor(Y)
    for rows, pick in ((all_rows(40), slice(None)), (LooRows(index, ones, ones), index.numpy())):
        made = fit_readout(Zt, Yt, None, options, rows)
        got = leave_one_out_scores(Zt, Yt, None, made, options, rows)
        want = brute_leave_one_out(Z, Y, 0.1)[pick]
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_readout_is_ridge_in_its_units(rng, relative, weighted):
    Z, Y = draw(5, 60, 6)
    w = rng.uniform(0.5, 2, 60) if weighted else None
    made = fit_readout(
        torch.tensor(Z),
        torch.tensor(Y),
        None if w is None else torch.tensor(w),
        ReadoutOptions(1e-2, "cholesky", None, relative),
        all_rows(60, w),
    )
    variance = np.average((Z - np.average(Z, axis=0, weights=w)) ** 2, axis=0, weights=w)
    total = 60 if w is None else w.sum()
    coef, intercept = brute_ridge(Z, Y, 1e-2 * total * variance if relative else 1e-2, w)
    np.testing.assert_allclose(made.solution.coef.numpy(), coef, rtol=1e-9, atol=1e-12)
    want = Z @ coef + intercept
    np.testing.assert_allclose(made.fitted.numpy(), want, rtol=0, atol=1e-10)
    assert made.lsd == pytest.approx(np.average(((Y - want) ** 2).sum(1), weights=w), rel=1e-9)


def test_lsd_is_equation_5_3(rng):
    """||Y - Z Z^+ Y||_F^2 / m with Z = [1 Z] and no penalty."""
    Z, Y = draw(6, 50, 5)
    made = fit_readout(
        torch.tensor(Z), torch.tensor(Y), None, ReadoutOptions(0.0, "cholesky", None, False), all_rows(50)
    )
    ones = np.hstack([np.ones((50, 1)), Z])
    assert made.lsd == pytest.approx(np.linalg.norm(Y - ones @ np.linalg.pinv(ones) @ Y) ** 2 / 50, rel=1e-10)


def test_column_scale_has_a_floor():
    """A unit that is active on one row of many keeps a scale beside its neighbours; a constant one has scale 1."""
    Z = np.zeros((1000, 3))
    Z[:, 0] = np.linspace(-1, 1, 1000)
    Z[0, 1] = 1e-9
    Z[:, 2] = 5
    scale = column_scale(problem(Z, np.zeros((1000, 1)))).numpy()
    assert scale[0] == pytest.approx(Z[:, 0].std(), rel=1e-12)
    assert scale[1] > 1e-4 * scale[0] > Z[:, 1].std()
    assert scale[2] == 1


def test_a_single_row_and_dead_columns():
    made = fit_readout(
        torch.ones(1, 2, dtype=torch.float64), torch.full((1, 1), 3.0, dtype=torch.float64), None,
        ReadoutOptions("loo", "cholesky", None, True), all_rows(1),
    )  # fmt: skip
    assert made.fitted.item() == 3
    assert made.lsd == 0
