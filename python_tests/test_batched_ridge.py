"""platonic.batched_ridge against numpy.linalg, scikit-learn, autograd and its own reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from platonic import reference
from platonic.batched import batched_ridge
from platonic_core import _C

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")),
]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    _C.limit_isa(request.param)
    yield request.param
    _C.limit_isa("")


def spd(rng, batch, p, dtype=np.float64, condition=50.0):
    """Symmetric positive definite matrices of a known condition number."""
    q = np.linalg.qr(rng.standard_normal((batch, p, p)))[0]
    gram = (q * np.geomspace(1, 1 / condition, p)) @ np.swapaxes(q, 1, 2)
    return ((gram + np.swapaxes(gram, 1, 2)) / 2).astype(dtype)


def relative_error(got, expected):
    """Per system, in the norm that the perturbation bounds of linear systems are stated in."""
    size = np.linalg.norm(expected, axis=(-2, -1))
    return (np.linalg.norm(got - expected, axis=(-2, -1)) / np.where(size > 0, size, 1)).max()


def bound(p, condition, dtype):
    """Cholesky's error bound (Higham, Accuracy and Stability, theorem 10.4) is of the order of p^2 u times the
    condition number; with p in place of p^2, since rounding errors of a sum partly cancel."""
    return 8 * (p + 1) * condition * np.finfo(dtype).eps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 64, 100, 127, 128])
def test_gram_matches_numpy(device, dtype, p, rng):
    gram, right = spd(rng, 19, p, dtype), rng.standard_normal((19, p, 2)).astype(dtype)
    fit = batched_ridge(torch.tensor(gram, device=device), torch.tensor(right, device=device), 0.1, gram=True)
    expected = np.linalg.solve(gram.astype(np.float64) + 0.1 * np.eye(p), right.astype(np.float64))
    assert fit.intercept is None
    assert fit.status.dtype == torch.int32 and not fit.status.any()
    assert relative_error(fit.coef.cpu().numpy(), expected) < bound(p, 1.1 / 0.1, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch", [1, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize(("p", "r"), [(3, 1), (8, 3), (18, 2), (6, 9)])
def test_every_instruction_set_and_tail(isa, dtype, batch, p, r, rng):
    gram, right = spd(rng, batch, p, dtype), rng.standard_normal((batch, p, r)).astype(dtype)
    l2 = np.array([0.05, 1.0, 30.0])
    fit = batched_ridge(gram, right, l2, gram=True)
    assert fit.coef.dtype == dtype and fit.coef.shape == (batch, 3, p, r) and fit.status.shape == (batch, 3)
    assert relative_error(fit.coef, reference.gram_ridge(gram, right, l2)) < bound(p, 21, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("m", "p"), [(1, 1), (5, 3), (40, 8), (300, 17), (9, 32), (50, 33), (200, 128)])
def test_data_match_scikit_learn(device, fit_intercept, dtype, m, p, rng):
    x = (rng.standard_normal((5, m, p)) + 10).astype(dtype)
    y = (rng.standard_normal((5, m, 2)) - 3).astype(dtype)
    fit = batched_ridge(
        torch.tensor(x, device=device), torch.tensor(y, device=device), 2.0, fit_intercept=fit_intercept
    )
    for b in range(5):
        expected = Ridge(2.0, fit_intercept=fit_intercept, solver="svd").fit(x[b].astype(np.float64), y[b])
        # Solved in float64: what is left is the rounding of the result, and the squared condition number of the data,
        # at most p m (10 + 5)^2 / 2, times float64's epsilon.
        tolerance = np.finfo(dtype).eps + bound(p, 1 + p * m * 113, np.float64)
        assert relative_error(fit.coef[b].cpu().numpy(), expected.coef_.T) < tolerance
        if fit_intercept:
            scale = np.abs(expected.coef_).sum() * 15 + np.abs(expected.intercept_).max()
            np.testing.assert_allclose(fit.intercept[b].cpu(), expected.intercept_, rtol=0, atol=tolerance * scale)


def test_data_on_every_instruction_set(isa, rng):
    for batch, m, p, r in [(3, 600, 5, 1), (17, 21, 9, 2), (9, 33, 31, 3)]:
        x, y = rng.standard_normal((batch, m, p)), rng.standard_normal((batch, m, r))
        fit = batched_ridge(x, y, [0.5, 5.0], fit_intercept=True)
        weights, intercepts = reference.batched_ridge(x, y, np.array([0.5, 5.0]), True)
        assert relative_error(fit.coef, weights) < bound(p, 1e4, np.float64)
        np.testing.assert_allclose(fit.intercept, intercepts, rtol=0, atol=1e-10)


def test_float32_data_lose_nothing_to_the_squared_condition_number(rng):
    """Columns that agree to 1e-4: the Gram matrix's condition number is near 1e8, beyond float32."""
    base = rng.standard_normal((4, 500, 1))
    x = (base + 1e-4 * rng.standard_normal((4, 500, 3))).astype(np.float32)
    y = x.sum(2, dtype=np.float64).astype(np.float32)
    fit = batched_ridge(x, y, 0.0)
    expected = np.stack([np.linalg.lstsq(a.astype(np.float64), b, rcond=None)[0] for a, b in zip(x, y, strict=True)])
    assert not fit.status.any()
    np.testing.assert_allclose(fit.coef, expected, rtol=1e-5)


@given(
    st.integers(1, 20),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_system_does_not_depend_on_its_neighbours(batch, p, r, seed, dtype):
    rng = np.random.default_rng(seed)
    gram, right = spd(rng, batch, p, dtype), rng.standard_normal((batch, p, r)).astype(dtype)
    together = batched_ridge(gram, right, 0.2, gram=True)
    order = rng.permutation(batch)
    shuffled = batched_ridge(gram[order], right[order], 0.2, gram=True)
    np.testing.assert_array_equal(together.coef[order], shuffled.coef)
    alone = batched_ridge(gram[:1], right[:1], 0.2, gram=True)
    np.testing.assert_array_equal(together.coef[:1], alone.coef)


@given(st.integers(1, 10), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_weights_shrink_as_the_penalty_grows(p, seed):
    rng = np.random.default_rng(seed)
    grid = np.geomspace(0.01, 100, 6)
    fit = batched_ridge(spd(rng, 3, p), rng.standard_normal((3, p)), grid, gram=True)
    norms = np.linalg.norm(fit.coef, axis=-1)
    assert (np.diff(norms, axis=1) < 0).all()


@pytest.mark.parametrize("p", [1, 5, 16, 40, 128, 130])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_refused_system_is_reported_and_touches_no_other(dtype, p, rng):
    gram, right = spd(rng, 20, p, dtype), rng.standard_normal((20, p)).astype(dtype)
    good = batched_ridge(gram, right, 0.1, gram=True)
    bad = gram.copy()
    bad[3, p - 1, p - 1] = -1
    bad[7, 0, 0] = np.nan
    bad[8, p // 2, p // 2] = np.inf
    bad[11] = 0
    bad[11, 0, 0] = -0.1  # cancels the penalty exactly
    fit = batched_ridge(bad, right, 0.1, gram=True)
    expected = np.zeros(20, np.int32)
    expected[[3, 7, 8, 11]] = [p, 1, p // 2 + 1, 1]
    np.testing.assert_array_equal(fit.status, expected)
    refused = expected != 0
    assert np.isnan(fit.coef[refused]).all()
    np.testing.assert_array_equal(fit.coef[~refused], good.coef[~refused])


@pytest.mark.parametrize("p", [3, 20, 140])
def test_equal_features_without_a_penalty_are_singular(p, rng):
    x = rng.standard_normal((4, 300, p))
    x[2, :, p - 1] = x[2, :, p - 2]
    fit = batched_ridge(x, rng.standard_normal((4, 300)), 0.0, fit_intercept=True)
    assert fit.status.tolist() == [0, 0, p, 0]
    assert np.isnan(fit.coef[2]).all() and np.isnan(fit.intercept[2])
    assert np.isfinite(np.delete(fit.coef, 2, 0)).all()


def test_a_constant_feature_is_singular_beside_an_intercept(rng):
    x = rng.standard_normal((2, 30, 4))
    x[1, :, 1] = 7
    assert batched_ridge(x, x[..., 0], 0.0, fit_intercept=True).status.tolist() == [0, 2]
    assert batched_ridge(x, x[..., 0], 0.1, fit_intercept=True).status.tolist() == [0, 0]


def test_nan_in_right_hand_sides_is_no_failure_of_the_matrix(rng):
    gram, right = spd(rng, 3, 4), rng.standard_normal((3, 4, 2))
    right[1, 2, 0] = np.nan
    fit = batched_ridge(gram, right, 0.1, gram=True)
    assert not fit.status.any()
    assert np.isnan(fit.coef[1, :, 0]).any() and np.isfinite(fit.coef[1, :, 1]).all() and np.isfinite(fit.coef[2]).all()


def test_only_the_lower_triangle_is_read(rng):
    gram, right = spd(rng, 5, 37), rng.standard_normal((5, 37))
    rubbish = np.tril(gram) + np.triu(np.full_like(gram, np.nan), 1)
    np.testing.assert_array_equal(
        batched_ridge(rubbish, right, 0.1, gram=True).coef, batched_ridge(gram, right, 0.1, gram=True).coef
    )


def test_rtol_decides_what_is_singular():
    gram = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0 + 1e-6]]])
    right = np.ones((2, 2))
    assert batched_ridge(gram, right, 0.0, gram=True).status.tolist() == [0, 0]
    assert batched_ridge(gram, right, 0.0, gram=True, rtol=1e-5).status.tolist() == [0, 2]


@pytest.mark.parametrize("data", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(data, rng):
    x, y = torch.tensor(rng.standard_normal((1003, 12, 7))), torch.tensor(rng.standard_normal((1003, 12, 2)))
    arrays = (x, y) if data else (x.mT @ x, x.mT @ y)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(batched_ridge(*arrays, [0.1, 1.0], gram=not data).coef)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_layouts_strides_and_kinds(rng):
    x, y = rng.standard_normal((4, 10, 6)), rng.standard_normal((4, 10))
    expected = batched_ridge(x, y, 1.0)
    assert isinstance(expected.coef, np.ndarray) and expected.coef.shape == (4, 6)
    fortran = batched_ridge(np.asfortranarray(x), y[:, :, None][..., 0], 1.0)
    reverse = batched_ridge(x[::-1], y[::-1], 1.0)
    swapped = batched_ridge(x.astype(">f8"), y, 1.0)
    tensors = batched_ridge(torch.tensor(x).mT.contiguous().mT, torch.tensor(y), torch.tensor(1.0))
    np.testing.assert_array_equal(fortran.coef, expected.coef)
    np.testing.assert_array_equal(reverse.coef[::-1], expected.coef)
    np.testing.assert_array_equal(swapped.coef, expected.coef)
    assert isinstance(tensors.coef, torch.Tensor)
    np.testing.assert_array_equal(tensors.coef, expected.coef)
    integers = batched_ridge(np.arange(24).reshape(1, 6, 4) ** 2 % 11, np.arange(6)[None], 1)
    assert integers.coef.dtype == np.float64
    assert batched_ridge(x.astype(np.float16), y.astype(np.float16), 1.0).coef.dtype == np.float32


def test_empty_sizes(rng):
    assert batched_ridge(np.zeros((0, 5, 3)), np.zeros((0, 5)), 1.0).coef.shape == (0, 3)
    assert batched_ridge(np.zeros((2, 5, 3)), np.zeros((2, 5, 0)), 1.0).coef.shape == (2, 3, 0)
    assert batched_ridge(np.zeros((2, 5, 3)), np.zeros((2, 5)), []).coef.shape == (2, 0, 3)
    no_rows = batched_ridge(np.zeros((2, 0, 3)), np.zeros((2, 0)), [0.0, 1.0])
    assert no_rows.status.tolist() == [[1, 0], [1, 0]]
    np.testing.assert_array_equal(no_rows.coef[:, 1], 0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.zeros((2, 3)), np.zeros((2, 3)), 1.0), {}, r"expected X \[B, m, p\]"),
        ((np.zeros((2, 3, 4)), np.zeros((2, 4)), 1.0), {}, r"got \(2, 3, 4\) and \(2, 4\)"),
        ((np.zeros((2, 3, 4)), np.zeros((2, 3)), 1.0), {"gram": True}, r"expected X \[B, p, p\]"),
        ((np.zeros((2, 3, 0)), np.zeros((2, 3)), 1.0), {}, "at least one feature"),
        ((np.zeros((2, 3, 3)), np.zeros((2, 3)), 1.0), {"gram": True, "fit_intercept": True}, "needs data"),
        ((np.zeros((2, 0, 3)), np.zeros((2, 0)), 1.0), {"fit_intercept": True}, "at least one row"),
        ((np.zeros((2, 3, 4)), np.zeros((2, 3)), -1.0), {}, "l2 to be finite and >= 0"),
        ((np.zeros((2, 3, 4)), np.zeros((2, 3)), [1.0, np.nan]), {}, "l2 to be finite and >= 0"),
        ((np.zeros((2, 3, 4)), np.zeros((2, 3)), [[1.0]]), {}, "1-D grid"),
        ((np.zeros((2, 3, 4)), np.zeros((2, 3)), 1.0), {"rtol": -1.0}, "rtol >= 0"),
    ],
)
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        batched_ridge(*arguments, **options)


def test_bad_dtypes_are_named():
    with pytest.raises(TypeError, match="real"):
        batched_ridge(np.zeros((1, 2, 2), complex), np.zeros((1, 2)), 1.0)
    with pytest.raises(TypeError, match=r"right to be torch\.float64"):
        torch.ops.platonic.batched_ridge_gram(
            torch.eye(2).double()[None], torch.ones(1, 2, 1), torch.ones(1, dtype=torch.float64), 0.0
        )


def inputs(rng, device, requires_grad, batch=3, m=9, p=4, r=2):
    def leaf(*shape):
        return torch.tensor(rng.standard_normal(shape), device=device, requires_grad=requires_grad)

    return leaf(batch, m, p), leaf(batch, m, r), torch.tensor([0.3, 2.0], dtype=torch.float64, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_gradients_from_data(device, fit_intercept, rng):
    x, y, l2 = inputs(rng, device, True)
    l2.requires_grad_()

    def outputs(x, y, l2):
        fit = batched_ridge(x, y, l2, fit_intercept=fit_intercept)
        return (fit.coef, fit.intercept) if fit_intercept else fit.coef

    torch.autograd.gradcheck(outputs, (x, y, l2))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_from_gram(device, rng):
    gram = torch.tensor(spd(rng, 3, 5), device=device, requires_grad=True)
    right = torch.tensor(rng.standard_normal((3, 5, 2)), device=device, requires_grad=True)
    l2 = torch.tensor([0.3, 2.0], dtype=torch.float64, device=device, requires_grad=True)
    torch.autograd.gradcheck(lambda g, c, k: batched_ridge(g, c, k, gram=True).coef, (gram, right, l2))


@pytest.mark.parametrize("p", [5, 130])
def test_refused_systems_have_no_gradient(p, rng):
    gram = torch.tensor(spd(rng, 3, p))
    gram[1] = 0
    gram.requires_grad_()
    right = torch.ones(3, p, dtype=torch.float64, requires_grad=True)
    l2 = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    fit = batched_ridge(gram, right, l2, gram=True)
    fit.coef[fit.status == 0].sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (gram, right, l2))
    assert not gram.grad[1].any()


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("p", [4, 130])
def test_refused_data_have_no_gradient(p, fit_intercept, rng):
    """Not even where they are NaN, and the others have theirs."""
    clean = torch.tensor(rng.standard_normal((3, 140, p)))
    y = torch.tensor(rng.standard_normal((3, 140, 2)), requires_grad=True)
    x = clean.clone()
    x[1, 0, 0] = float("nan")
    x.requires_grad_()
    fit = batched_ridge(x, y, 0.1, fit_intercept=fit_intercept)
    assert (fit.status != 0).tolist() == [False, True, False] and fit.coef[1].isnan().all()
    fit.coef[fit.status == 0].square().sum().backward()
    assert not x.grad[1].any() and not y.grad[1].any()
    alone, other = clean[[0, 2]].requires_grad_(), y.detach()[[0, 2]].requires_grad_()
    batched_ridge(alone, other, 0.1, fit_intercept=fit_intercept).coef.square().sum().backward()
    torch.testing.assert_close(x.grad[[0, 2]], alone.grad)
    torch.testing.assert_close(y.grad[[0, 2]], other.grad)


def test_wide_systems_have_gradients_too(rng):
    x = torch.tensor(rng.standard_normal((2, 140, 130)), requires_grad=True)
    y = torch.tensor(rng.standard_normal((2, 140)))
    fit = batched_ridge(x, y, 50.0, fit_intercept=True)
    weights, intercepts = reference.batched_ridge(x.detach(), y[..., None], np.array([50.0]), True)
    np.testing.assert_allclose(fit.coef.detach(), weights[:, 0, :, 0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(fit.intercept.detach(), intercepts[:, 0, 0], rtol=1e-9, atol=1e-12)
    fit.coef.square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device, rng):
    x, y, l2 = inputs(rng, device, True)
    gram = torch.tensor(spd(rng, 3, 4), device=device, requires_grad=True)
    right = torch.ones(3, 4, 2, dtype=torch.float64, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.platonic.batched_ridge_gram.default, (gram, right, l2, 1e-15))
    for constant in (False, True):
        torch.library.opcheck(torch.ops.platonic.batched_ridge_data.default, (x, y, l2, constant, 1e-15))
