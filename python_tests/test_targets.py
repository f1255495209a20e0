"""Projections: equation 7.2 against explicit pseudoinverses, principal components, scales, rectangles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from platonic import targets
from platonic.readout import LooRows, ReadoutOptions, fit_readout
from platonic.sampling import RowSampler
from platonic.targets import PROJECTIONS, LayerInput, TargetOptions, draw_candidates, draw_rectangles, input_scale


def make_layer(
    Z,
    Y,
    *,
    first=False,
    weights=None,
    importance=None,
    group=None,
    alpha=1.0,
    beta=1.0,
    relative=False,
    l2=0.0,
    image=None,
):
    """A LayerInput with its read-out, as the layer walk makes it."""
    Z, Y = torch.tensor(np.asarray(Z)), torch.tensor(np.asarray(Y))
    weights = None if weights is None else torch.tensor(np.asarray(weights, dtype=np.float64))
    importance = None if importance is None else torch.tensor(importance)
    ones = torch.ones(len(Z), dtype=torch.float64)
    rows = LooRows(None, ones if weights is None else weights, ones)
    group = None if group is None else torch.tensor(group)

    def make_readout():
        scale = input_scale(Z, weights)[1] if first and relative else None
        return fit_readout(Z, Y, weights, ReadoutOptions(l2, "cholesky", None, relative), rows, scale)

    return LayerInput(
        Z, Y, weights, importance, lambda: RowSampler(Z, Y, group, weights), make_readout, first,
        TargetOptions(alpha, beta, relative, image),
    )  # fmt: skip


def draw(seed=0, m=50, n=6, k=2):
    rng = np.random.default_rng(seed)
    Z = np.abs(rng.standard_normal((m, n))) @ rng.standard_normal((n, n)) + 2
    return Z, np.tanh(Z[:, :k]) + 0.1 * rng.standard_normal((m, k))


def outputs(layer, found):
    """Pre-activations (m, width) in NumPy."""
    return layer.Z.double().numpy() @ found.weight.numpy() + found.bias.numpy()


def with_ones(Z):
    return np.hstack([np.ones((len(Z), 1)), Z])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.06, 25.0), (2.0, 0.0)])
def test_random_is_equation_7_2(alpha, beta, weighted):
    """[1 Z]^+ (alpha [1 Z | beta Y] P), with P drawn as one block of 1 + n + k rows: figure 7.3, literally."""
    Z, Y = draw()
    w = np.random.default_rng(1).uniform(0.5, 2, len(Z)) if weighted else np.ones(len(Z))
    layer = make_layer(Z, Y, alpha=alpha, beta=beta, weights=w if weighted else None)
    found = PROJECTIONS["random"](layer, 9, np.random.default_rng(7))
    P = np.random.default_rng(7).standard_normal((1 + 6 + 2, 9))
    root = np.sqrt(w)[:, None]
    T = alpha * np.hstack([with_ones(Z), beta * Y]) @ P
    W = np.linalg.pinv(root * with_ones(Z)) @ (root * T)
    np.testing.assert_allclose(found.weight.numpy(), W[1:], rtol=0, atol=1e-9 * np.abs(W).max())
    np.testing.assert_allclose(found.bias.numpy(), W[0], rtol=0, atol=1e-9 * np.abs(W).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["platonic_pca", "sorted_pca"])
def test_relative_scaling_gives_alpha_as_standard_deviation(name, dtype):
    Z, Y = (a.astype(dtype) for a in draw(m=400))
    for alpha in (1.0, 3.0):
        for weights in (None, np.random.default_rng(0).uniform(0.5, 2, 400)):
            layer = make_layer(Z, Y, alpha=alpha, relative=True, l2=1e-6, weights=weights, first=name == "sorted_pca")
            H = outputs(layer, PROJECTIONS[name](layer, 5, np.random.default_rng(0)))
            mean = np.average(H, axis=0, weights=weights)
            std = np.sqrt(np.average((H - mean) ** 2, axis=0, weights=weights))
            tolerance = 400 * np.finfo(dtype).eps  # products of m rows in the data's dtype
            np.testing.assert_allclose(std, alpha, rtol=tolerance)
            np.testing.assert_allclose(mean, 0, atol=alpha * tolerance * np.abs(Z).max())


@pytest.mark.parametrize("beta", [0.0, 1.0, 10.0])
def test_relative_random_mixes_unit_terms(beta):
    """(z-term + beta y-term) / sqrt(1 + beta^2), each of unit standard deviation; independent, so its square is near 1."""
    Z, Y = draw(m=300, k=2)
    layer = make_layer(Z, Y, beta=beta, relative=True, l2=1e-9)
    rng = np.random.default_rng(3)
    H = outputs(layer, PROJECTIONS["random"](layer, 2000, rng))
    P = np.random.default_rng(3).standard_normal((9, 2000))
    B = layer.readout.solution.coef.numpy()
    terms = [(Z - Z.mean(0)) / layer.readout.scale.numpy() @ P[1:7], (Z - Z.mean(0)) @ B @ P[7:]]
    terms = [t / t.std(0) for t in terms]
    want = (terms[0] + beta * terms[1]) / math.sqrt(1 + beta**2)
    np.testing.assert_allclose(H - H.mean(0), want, rtol=0, atol=1e-8)
    np.testing.assert_allclose(H.mean(0), targets.BIAS_SCALE * P[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_relative_terms_of_the_input_are_ridge_fits(beta):
    """First layer: Z P_Z and Y P_Y fitted by scikit-learn under the stated penalty, each scaled to unit variance."""
    Z, Y = draw(m=300)
    layer = make_layer(Z, Y, beta=beta, relative=True, first=True)
    H = outputs(layer, PROJECTIONS["random"](layer, 9, np.random.default_rng(3)))
    P = np.random.default_rng(3).standard_normal((9, 9))
    standard = (Z - Z.mean(0)) / layer.location[1].numpy()
    penalty = targets.INPUT_L2 * (standard**2).sum() / 6
    terms = [Ridge(penalty).fit(standard, t).predict(standard) for t in (standard @ P[1:7], Y @ P[7:])]
    terms = [(t - t.mean(0)) / t.std(0) for t in terms]
    np.testing.assert_allclose(H - H.mean(0), (terms[0] + beta * terms[1]) / math.sqrt(1 + beta**2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_platonic_pca_takes_scikit_learns_components(beta, weighted):
    Z, Y = draw(2)
    w = np.tile([1, 2, 3, 1, 1], 10) if weighted else np.ones(50, int)
    layer = make_layer(Z, Y, beta=beta, weights=w if weighted else None, alpha=2.0)
    found = PROJECTIONS["platonic_pca"](layer, 8, np.random.default_rng(0))
    A = np.repeat(np.hstack([Z, beta * Y]), w, axis=0)
    P = PCA(8).fit(A).components_.T
    T = 2.0 * A @ P
    Zr = np.repeat(Z, w, axis=0)
    W = np.linalg.pinv(with_ones(Zr)) @ T
    signs = np.sign((found.weight.numpy() * W[1:]).sum(0))
    np.testing.assert_allclose(found.weight.numpy(), signs * W[1:], rtol=0, atol=1e-8)
    # the target has no constant column, so its bias is that of the projection of Y alone
    np.testing.assert_allclose(found.bias.numpy(), signs * W[0], rtol=0, atol=1e-7)


def test_importance_is_used_only_to_find_p():
    """Weighted Platonic PCA (7.8.3): components of [Z | beta d Y], targets from [Z | beta Y]."""
    Z, Y = draw(4)
    d = np.random.default_rng(5).uniform(0.1, 4, 50)
    found = PROJECTIONS["platonic_pca"](make_layer(Z, Y, beta=2.0, importance=d), 8, np.random.default_rng(0))
    P = PCA(8).fit(np.hstack([Z, 2.0 * d[:, None] * Y])).components_.T
    W = np.linalg.pinv(with_ones(Z)) @ (np.hstack([Z, 2.0 * Y]) @ P)
    signs = np.sign((found.weight.numpy() * W[1:]).sum(0))
    np.testing.assert_allclose(found.weight.numpy(), signs * W[1:], rtol=0, atol=1e-8)


def test_too_many_components():
    layer = make_layer(*draw())
    assert PROJECTIONS["platonic_pca"](layer, 8, np.random.default_rng(0)).weight.shape == (6, 8)
    with pytest.raises(ValueError, match=r"width 9 was asked for, but \[Z \| Y\] has only 6 \+ 2 principal components"):
        PROJECTIONS["platonic_pca"](layer, 9, np.random.default_rng(0))


@pytest.mark.parametrize("beta", [0.5, 30.0])
def test_relative_platonic_pca_takes_components_of_standardised_columns(beta):
    """Whatever the units of Z and of the targets; its two terms have unit variance and are mixed by beta."""
    Z, Y = draw(2)
    units = np.array([1, 3, 0.5, 2, 5, 0.7])
    layer = make_layer(Z * units, Y * [100, 0.01], beta=beta, relative=True, l2=1e-9)
    H = outputs(layer, PROJECTIONS["platonic_pca"](layer, 8, np.random.default_rng(0)))

    def standard(A):
        return (A - A.mean(0)) / A.std(0)

    P = PCA(8).fit(np.hstack([standard(Z), standard(Y)])).components_.T
    fitted = with_ones(Z) @ np.linalg.lstsq(with_ones(Z), standard(Y), rcond=None)[0]
    want = standard(standard(standard(Z) @ P[:6]) + beta * standard(fitted @ P[6:]))
    np.testing.assert_allclose(H, np.sign((H * want).sum(0)) * want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_components_along_which_nothing_varies_are_zero(dtype, relative):
    """Any direction would be an eigenvector there: what rounding happens to choose must not become a unit."""
    Z, _ = draw()
    Z = np.hstack([Z, Z @ np.ones((6, 3))]).astype(dtype)
    layer = make_layer(Z, (Z[:, :2]).astype(dtype), relative=relative)
    weight = PROJECTIONS["platonic_pca"](layer, 11, np.random.default_rng(0)).weight
    assert weight[:, :6].abs().amax(0).min() > 0
    assert (weight[:, 6:] == 0).all()


def test_a_large_beta_leaves_components_of_float32_data():
    """Directions of Z count by their own size, however large the variance of beta Y is."""
    Z, Y = (a.astype(np.float32) for a in draw(m=300))
    layer = make_layer(Z, Y, beta=1e4)
    weight = PROJECTIONS["platonic_pca"](layer, 8, np.random.default_rng(0)).weight
    assert weight.abs().amax(0).min() > 0


@pytest.mark.parametrize("relative", [False, True])
def test_sorted_pca_weights_are_centred_samples(relative):
    Z, Y = draw(m=60)
    layer = make_layer(Z, Y, first=True, relative=relative)
    found = PROJECTIONS["sorted_pca"](layer, 7, np.random.default_rng(0))
    np.testing.assert_allclose(outputs(layer, found).mean(0), 0, atol=1e-10)
    mean, scale = (t.numpy() for t in layer.location)
    candidates = (Z - mean) / (scale**2 if relative else 1)
    for column in found.weight.T.numpy():
        cosine = candidates @ column / np.linalg.norm(candidates, axis=1) / np.linalg.norm(column)
        assert cosine.max() > 1 - 1e-12


@pytest.mark.parametrize("relative", [False, True])
def test_pairs_have_opposite_sides_of_a_midpoint(relative):
    """A unit is +c at one row of its pair and -c at the other, and the two are of different classes."""
    Z, _ = draw(m=40)
    group = np.arange(40) % 4
    layer = make_layer(Z, np.eye(4)[group], first=True, relative=relative, group=group, alpha=1.5)
    found = PROJECTIONS["pairs"](layer, 30, np.random.default_rng(9))
    H = outputs(layer, found)
    first, second = layer.sampler().draw_pairs(np.random.default_rng(9).random((2, 30)))
    units = np.arange(30)
    np.testing.assert_allclose(H[first, units], -H[second, units], rtol=0, atol=1e-10)
    assert (H[first, units] > 0).all()
    assert (group[first] != group[second]).all()
    if relative:
        np.testing.assert_allclose(H.std(0), 1.5, rtol=1e-10)


def test_elm_sees_no_targets():
    Z, Y = draw()
    for relative in (False, True):
        a, b = (
            PROJECTIONS["elm"](make_layer(Z, T, first=True, relative=relative), 20, np.random.default_rng(0))
            for T in (Y, -3 * Y + 1)
        )
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.bias, b.bias)
    P = np.random.default_rng(0).standard_normal((7, 20))
    plain = PROJECTIONS["elm"](make_layer(Z, Y, alpha=0.5), 20, np.random.default_rng(0))
    np.testing.assert_array_equal(np.vstack([plain.bias, plain.weight]), 0.5 * P)


@pytest.mark.parametrize("name", sorted(set(PROJECTIONS) - {"sorted_pca"}))
def test_relative_scaling_ignores_units_of_the_input(name):
    """Columns in other units and with other offsets give the same pre-activations."""
    Z, Y = draw(m=80)
    scales, offsets = np.array([1e-3, 1, 10, 1e3, 2, 0.5]), np.array([0, 5, -3, 100, 1, 0])
    rows = [
        outputs(layer, PROJECTIONS[name](layer, 5, np.random.default_rng(2)))
        for layer in (make_layer(A, Y, first=True, relative=True, l2=1e-3) for A in (Z, Z * scales + offsets))
    ]
    if (
        name == "pairs"
    ):  # the canonical order of the rows within equal targets does not depend on Z, targets are all different
        rows = [np.abs(r) for r in rows]
    signs = np.sign((rows[0] * rows[1]).sum(0))  # components of Platonic PCA have no sign
    np.testing.assert_allclose(rows[0], signs * rows[1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_input_scale(rng, dtype, weighted):
    X = rng.standard_normal((1500, 4)).astype(dtype)
    X[:, 1] = 7
    X[:, 2] = 0
    X[3, 2] = 1
    X[:, 3] += 1000
    w = rng.uniform(0.5, 2, 1500) if weighted else None
    mean, scale = input_scale(torch.tensor(X), None if w is None else torch.tensor(w))
    want = np.average(X.astype(np.float64), axis=0, weights=w)
    std = np.sqrt(np.average((X - want) ** 2, axis=0, weights=w))
    tolerance = 100 * np.finfo(dtype).eps
    np.testing.assert_allclose(mean.numpy(), want, rtol=tolerance, atol=tolerance)
    assert scale[1] == 1
    np.testing.assert_allclose(scale.numpy()[[0, 3]], std[[0, 3]], rtol=0.5)  # or a fraction of the farthest
    assert (scale.numpy()[[0, 3]] >= std[[0, 3]] * (1 - tolerance)).all()
    assert scale[2] == pytest.approx(max(std[2], targets.INPUT_SPREAD * (1 - want[2])), rel=1e-4)


@settings(max_examples=60)
@given(
    height=st.integers(1, 12), width=st.integers(1, 12), channels=st.sampled_from([None, 1, 3]), count=st.integers(1, 8),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_rectangles_are_rectangles(height, width, channels, count, seed):
    shape = (height, width) if channels is None else (height, width, channels)
    masks = (
        draw_rectangles(shape, count, np.random.default_rng(seed)).numpy().reshape(count, height, width, channels or 1)
    )
    for mask in masks:
        assert (mask == mask[..., :1]).all()  # all channels alike
        plane = mask[..., 0]
        rows, columns = plane.any(1), plane.any(0)
        np.testing.assert_array_equal(plane, np.outer(rows, columns))
        for side, inside in ((height, rows), (width, columns)):
            assert np.diff(np.flatnonzero(inside), prepend=np.flatnonzero(inside)[0] - 1).tolist() == [1] * inside.sum()
            assert min(targets.LEAST_SIDE, side) <= inside.sum() <= side


def test_rectangles_reach_every_pixel_and_every_size():
    masks = draw_rectangles((6, 9), 3000, np.random.default_rng(0)).numpy().reshape(-1, 6, 9)
    assert masks.any(0).all()
    assert set(masks.any(2).sum(1)) == set(range(targets.LEAST_SIDE, 7))
    assert set(masks.any(1).sum(1)) == set(range(targets.LEAST_SIDE, 10))


def test_pairs_stay_in_their_rectangles():
    rng = np.random.default_rng(0)
    Z, group = rng.standard_normal((30, 64)), np.arange(30) % 2
    layer = make_layer(Z, (2.0 * group - 1)[:, None], first=True, relative=True, group=group, image=(8, 8))
    weight = PROJECTIONS["pairs"](layer, 50, np.random.default_rng(1)).weight.numpy().T.reshape(50, 8, 8) != 0
    sizes = weight.sum((1, 2))
    assert (sizes == weight.any(2).sum(1) * weight.any(1).sum(1)).all()
    assert sizes.min() < 64


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("subset", [True, False])
def test_candidates_and_their_pre_activations(first, subset):
    """What is judged is what the weights give, and each unit is zero at a row."""
    Z, Y = draw(m=60)
    group = np.arange(60) % 2
    layer = make_layer(Z, Y, first=first, relative=True, l2=1e-4, group=group)
    rows = torch.arange(0, 60, 2) if subset else None
    pool, H = draw_candidates(layer, rows, None, 40, np.random.default_rng(0))
    want = outputs(layer, pool)
    want = want[::2] if subset else want
    np.testing.assert_allclose(H.numpy(), want, rtol=0, atol=1e-9)
    assert (np.abs(want).min(0) < 1e-9).all()
    std = want.std(0)
    assert (std > 0).all()
    # later layers mix two terms of unit standard deviation, which together reach at most sqrt 2
    assert subset or std.max() <= targets.ALPHA_RANGE * (1 if first else math.sqrt(2)) * (1 + 1e-9)
