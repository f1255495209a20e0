"""Measures of representations and weights, against NumPy, SciPy, scikit-learn and values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn

from layerwise.probes import (
    THRESHOLDS,
    LeastSquares,
    Selections,
    as_features,
    cnn_separability,
    least_squares_distance,
    linear_separability,
    project_pca,
    selection_entropy,
    stable_rank,
    stable_ranks,
)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X / 16), torch.tensor(y)


def blobs(n=60, p=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    return torch.randn(n, p, generator=generator, dtype=torch.float64) + y[:, None], y


def lsd_by_pinv(Z, y, intercept=False):
    """Equation 5.3 as it stands."""
    Z, Y = np.asarray(Z, dtype=np.float64), np.eye(int(y.max()) + 1)[np.asarray(y)]
    if intercept:
        Z = np.column_stack([np.ones(len(Z)), Z])
    return np.square(Y - Z @ np.linalg.pinv(Z) @ Y).sum() / len(Z)


# ---------------------------------------------------------------------------------------------- least squares distance


@pytest.mark.parametrize("intercept", [False, True])
def test_lsd_is_that_of_the_pseudoinverse(digits, intercept):
    X, y = digits
    for Z in (
        X,
        X.float(),
        X[:40],
        X[:, :1],
        X + 100,
    ):  # rank 61 of 64; fewer samples than features; one feature; far off
        expected = lsd_by_pinv(Z.double(), y[: len(Z)], intercept)
        assert least_squares_distance(Z, y[: len(Z)], intercept=intercept) == pytest.approx(expected, abs=1e-9)


def test_lsd_by_hand():
    """Z'Z = 3, Z'Y = (1, 2): the two columns keep 1 - 1/3 and 2 - 4/3 of their squares; centred, the classes are Z's own."""
    Z, y = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([0, 1, 1])
    assert least_squares_distance(Z, y) == pytest.approx((1 - 1 / 3 + 2 - 4 / 3) / 3)
    assert least_squares_distance(Z, y, intercept=True) == pytest.approx((1 - 1 / 3 + 2 - 4 / 3) / 3)
    Z = torch.tensor([[5.0], [7.0], [7.0]])
    assert least_squares_distance(Z, y, intercept=True) == pytest.approx(0, abs=1e-14)
    assert least_squares_distance(Z, y) > 1e-3


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 5), st.booleans())
def test_lsd_does_not_depend_on_batches(sizes, seed, intercept):
    """Also where classes come late, and before there are more rows than columns."""
    Z, y = blobs(sum(sizes), 7, classes=4, seed=seed)
    y, order = y.sort()
    Z = Z[order]
    sums = LeastSquares()
    at = 0
    for size in sizes:
        sums.update(Z[at : at + size], y[at : at + size])
        sums.distance()  # looking changes nothing
        at += size
    assert sums.samples == at
    assert sums.distance(intercept=intercept) == pytest.approx(lsd_by_pinv(Z, y, intercept), abs=1e-10)


def test_lsd_holds_as_many_rows_as_columns():
    sums = LeastSquares()
    for seed in range(40):
        sums.update(*blobs(100, 5, seed=seed))
    assert sums._factor is not None and sums._factor.shape == (9, 9)
    assert sum(map(len, sums._waiting)) < 256


@settings(max_examples=30)
@given(st.integers(0, 50))
def test_lsd_sees_the_span_alone(seed):
    """Not scales, even of features that are 1e-150 of others; not the basis; not copies and sums of features."""
    Z, y = blobs(50, 4, seed=seed)
    distance = least_squares_distance(Z, y)
    scales = torch.tensor([1e-150, 1.0, 1e6, -3.0], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    copies = torch.cat([Z, Z[:, :2], Z.sum(1, keepdim=True), torch.zeros(50, 2)], 1)
    for same in (Z * scales, Z @ basis, copies):
        assert least_squares_distance(same, y) == pytest.approx(distance, abs=1e-10)
    assert least_squares_distance(Z[:, :3], y) >= distance - 1e-12
    assert least_squares_distance(Z + 7, y, intercept=True) == pytest.approx(
        least_squares_distance(Z, y, intercept=True), abs=1e-10
    )
    assert 0 <= least_squares_distance(Z, y, intercept=True) <= distance <= 1


def test_lsd_of_rounded_copies():
    """A float32 sum of two features is no third one, though its rounding errors are."""
    Z, y = blobs(2000, 6)
    Z = Z.float()
    copies = torch.cat([Z, (Z[:, :3] * 1.7 + Z[:, 3:] * 0.3)], 1)
    assert least_squares_distance(copies, y) == pytest.approx(least_squares_distance(Z, y), abs=1e-9)


def test_lsd_of_ill_conditioned_features_needs_no_squares():
    """A feature that differs from another by 1e-9 of it still counts; in Z'Z the difference would be gone."""
    Z, y = blobs(200, 2)
    near = torch.cat([Z[:, :1], Z[:, :1] + 1e-9 * Z[:, 1:]], 1)
    assert least_squares_distance(near, y) == pytest.approx(least_squares_distance(Z, y), abs=1e-6)


def test_lsd_of_nothing_but_zeros():
    y = torch.tensor([0, 1, 1, 2])
    assert least_squares_distance(torch.zeros(4, 3), y) == 1
    assert least_squares_distance(torch.zeros(4, 3), y, intercept=True) == pytest.approx(1 - (1 + 4 + 1) / 16)
    assert least_squares_distance(torch.ones(1, 1), torch.tensor([0])) == pytest.approx(0, abs=1e-15)


# --------------------------------------------------------------------------------------------------------- selections


def test_selection_entropy_is_scipys():
    Z, y = blobs(200, 5, classes=4)
    Z[:, 3] = -1  # a dead unit
    found = selection_entropy(Z - 2, y)
    expected = [scipy.stats.entropy(np.bincount(y[(Z[:, j] > 2).numpy()], minlength=4), base=2) for j in (0, 1, 2, 4)]
    np.testing.assert_allclose(found.by_feature[[0, 1, 2, 4]], expected)
    assert found.by_feature[3].isnan() and found.empty == pytest.approx(1 / 5)
    assert found.mean == pytest.approx(np.mean(expected))


def test_selection_entropy_by_hand():
    """Feature 0 selects classes 0, 0, 1, feature 1 class 2 alone; 0 itself is not selected."""
    Z = torch.tensor([[1.0, 0.0], [2.0, -1.0], [0.5, 0.0], [0.0, 3.0]])
    found = selection_entropy(Z, torch.tensor([0, 0, 1, 2]))
    h = -(2 / 3) * math.log2(2 / 3) - (1 / 3) * math.log2(1 / 3)
    assert found.by_feature.tolist() == pytest.approx([h, 0.0])
    assert found.mean == pytest.approx(h / 2) and found.empty == 0
    assert math.isnan(selection_entropy(-Z.abs(), torch.tensor([0, 0, 1, 2])).mean)


def test_selections_of_positions():
    """An image selects with each of its positions, or with its largest."""
    Z = torch.tensor([[[[1.0, 1.0, -1.0]]], [[[-1.0, -1.0, 1.0]]]])
    y = torch.tensor([0, 1])
    assert selection_entropy(Z, y).mean == pytest.approx(-(2 / 3) * math.log2(2 / 3) - (1 / 3) * math.log2(1 / 3))
    assert selection_entropy(Z, y, spatial="max").mean == pytest.approx(1)
    tokens = Z.reshape(2, 3, 1)  # (N, T, C)
    for spatial in ("positions", "max"):
        assert selection_entropy(tokens, y, spatial=spatial).mean == selection_entropy(Z, y, spatial=spatial).mean


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_are_what_activations_give_for_zero(name):
    modules = {"silu": nn.SiLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "linear": nn.Identity}
    modules |= {m.__name__.lower(): m for m in (nn.ReLU, nn.ELU, nn.SELU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus)}
    modules["hardsigmoid"] = nn.Hardsigmoid
    assert THRESHOLDS[name] == pytest.approx(modules[name]()(torch.zeros(1, dtype=torch.float64)).item())
    Z, y = blobs(100, 3)
    expected = selection_entropy(Z - 1, y).mean
    assert selection_entropy(modules[name]()(Z - 1), y, threshold=name).mean == pytest.approx(expected)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 9))
def test_selections_do_not_depend_on_batches_and_are_bounded(sizes, seed):
    Z, y = blobs(sum(sizes), 3, classes=5, seed=seed)
    y = y.sort().values  # classes come late
    selections = Selections()
    for part, labels in zip(Z.split(sizes), y.split(sizes), strict=True):
        selections.update(part, labels)
    found, whole = selections.entropy(), selection_entropy(Z, y)
    torch.testing.assert_close(found.by_feature, whole.by_feature, equal_nan=True)
    kept = found.by_feature[~found.by_feature.isnan()]
    assert bool(((kept >= 0) & (kept <= math.log2(5) + 1e-12)).all())


# ------------------------------------------------------------------------------------------------------- separability


@pytest.mark.parametrize("multi_class", ["multinomial", "one_vs_rest"])
def test_linear_separability_is_scikit_learns(digits, multi_class):
    X, y = digits[0].reshape(-1, 1, 8, 8), digits[1]
    found = linear_separability(X[:400], y[:400], X[400:800], y[400:800], pool=4, multi_class=multi_class)
    averaged = X.numpy().reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    scale = StandardScaler().fit(averaged[:400])
    model = LogisticRegression(max_iter=1000)
    model = (model if multi_class == "multinomial" else OneVsRestClassifier(model)).fit(
        scale.transform(averaged[:400]), y[:400]
    )
    for (a, b), accuracy in zip(((0, 400), (400, 800)), found, strict=True):
        assert accuracy == pytest.approx(model.score(scale.transform(averaged[a:b]), y[a:b]))


def test_separability_of_labels_and_of_noise():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (400,), generator=generator)
    noise = torch.randn(400, 3, generator=generator)
    split = (slice(0, 200), slice(200, 400))
    for call in (linear_separability, lambda *a: cnn_separability(*a, width=8, epochs=3, batch_size=10, lr=1e-2)):
        known, unknown = ([part for s in split for part in (Z[s], y[s])] for Z in (noise + 9 * y[:, None], noise))
        assert call(*known) == (1.0, 1.0)
        assert 0.35 < call(*unknown).test < 0.65


def xor(n, seed):
    """Images whose class is whether the two halves agree in sign: no linear matter."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (n, 2), generator=generator) * 2.0 - 1
    images = signs[:, None, None, :].expand(n, 2, 2, 2) + 0.3 * torch.randn(n, 2, 2, 2, generator=generator)
    return images, (signs[:, 0] == signs[:, 1]).long()


def test_cnn_separability_sees_what_a_linear_classifier_cannot():
    train, test = xor(300, 0), xor(300, 1)
    assert linear_separability(*train, *test).test < 0.65
    state = torch.get_rng_state()
    found = cnn_separability(*train, *test, width=16, epochs=8, lr=1e-2)
    assert found.test > 0.95 and found == cnn_separability(*train, *test, width=16, epochs=8, lr=1e-2)
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        assert found == cnn_separability(*train, *test, width=16, epochs=8, lr=1e-2)
    tokens = [(Z.flatten(2).transpose(1, 2), y) for Z, y in (train, test)]
    assert cnn_separability(*tokens[0], *tokens[1], p=2, width=16, epochs=2).train > 0.4


def test_bad_separability():
    Z, y = blobs()
    with pytest.raises(ValueError, match="shaped"):
        linear_separability(Z, y, Z[:, :2], y)
    with pytest.raises(ValueError, match="two classes"):
        cnn_separability(Z, y * 0 + 2, Z, y)
    with pytest.raises(ValueError, match="multi_class"):
        linear_separability(Z, y, Z, y, multi_class="softmax")
    with pytest.raises(ValueError, match="batch_size"):
        cnn_separability(Z, y, Z, y, batch_size=1)


# -------------------------------------------------------------------------------------------------- stable rank, PCA


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_stable_rank_is_that_of_singular_values(rows, columns, seed):
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    s = np.linalg.svd(W.double().numpy(), compute_uv=False)
    assert stable_rank(W) == pytest.approx(np.square(s).sum() / s[0] ** 2)
    assert 1 - 1e-9 <= stable_rank(W) <= min(rows, columns) + 1e-9
    assert stable_rank(W.double() * 1e200) == pytest.approx(stable_rank(W))


def test_stable_rank_by_hand():
    assert stable_rank(torch.eye(7)) == pytest.approx(7)
    assert stable_rank(torch.ones(3, 5)) == pytest.approx(1)
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(1.5)
    assert stable_rank(torch.zeros(2, 2)) == 0
    kernel = torch.randn(4, 3, 2, 2)
    assert stable_rank(kernel) == pytest.approx(stable_rank(kernel.reshape(4, 12)))
    for bad in (torch.ones(3), torch.full((2, 2), torch.nan)):
        with pytest.raises(ValueError, match="weight"):
            stable_rank(bad)


def test_stable_ranks_of_a_module():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.randn(1, 5, 8))
            self.table = nn.Embedding(9, 8)
            self.attention = nn.MultiheadAttention(8, 2)
            self.norm = nn.BatchNorm2d(4)
            self.up = nn.ConvTranspose2d(4, 6, 3)
            self.narrow = nn.Linear(8, 1)

    block = Block()
    ranks = stable_ranks(block)
    assert list(ranks) == ["attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "narrow.weight"]
    assert ranks["up.weight"] == pytest.approx(stable_rank(block.up.weight.transpose(0, 1)))
    assert ranks["narrow.weight"] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(300, 64), (30, 64)])
def test_pca_is_scikit_learns(digits, shape):
    X = digits[0][: shape[0]]
    found = project_pca(X, digits[1][: shape[0]])
    oracle = PCA(2, svd_solver="full").fit(X)
    expected = oracle.transform(X.numpy())
    expected *= np.sign(expected[np.abs(expected).argmax(0), [0, 1]])
    np.testing.assert_allclose(found.points, expected, atol=1e-10)
    assert found.share == pytest.approx(oracle.explained_variance_ratio_.sum())


def test_pca_of_too_little():
    found = project_pca(torch.arange(3.0)[:, None], torch.arange(3))
    assert found.points[:, 1].eq(0).all() and found.points[:, 0].abs().tolist() == pytest.approx([1, 0, 1])
    assert found.share == pytest.approx(1)
    assert project_pca(torch.ones(4, 2), torch.arange(4)).share == 0
    with pytest.raises(ValueError, match="components"):
        project_pca(torch.ones(4, 2), torch.arange(4), components=0)


# ------------------------------------------------------------------------------------------------------ what comes in


def test_features():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)
    expected = images.reshape(2, 3, 2, 2, 2, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(as_features(images, 2), expected)
    assert torch.equal(as_features(images, None), images.flatten(1))
    assert as_features(images[..., :1, :], 2).shape == (2, 6)
    assert torch.equal(as_features(images[:, 0], 2), images[:, 0].mean(1))
    with pytest.raises(ValueError, match="pool"):
        as_features(images, 0)
    with pytest.raises(ValueError, match="grid"):
        as_features(images[..., None, None], 2)


@pytest.mark.parametrize("call", [least_squares_distance, selection_entropy, project_pca])
def test_bad_samples(call):
    Z, y = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    call(Z.numpy(), y.numpy())
    for bad_Z, bad_y, error, match in [
        (Z.long(), y, TypeError, "floating-point"),
        (Z[:, 0], y, ValueError, "features"),
        (Z[:0], y[:0], ValueError, "size 0"),
        (Z, y[:3], ValueError, "one label"),
        (Z, y.float(), TypeError, "class numbers"),
        (Z, y > 0, TypeError, "class numbers"),
        (Z, y - 1, ValueError, "from 0"),
        (Z, y * 2**40, ValueError, "65536"),
        (Z / 0, y, ValueError, "finite"),
    ]:
        with pytest.raises(error, match=match):
            call(bad_Z, bad_y)


def test_bad_streams():
    for sums in (LeastSquares(), Selections()):
        with pytest.raises(ValueError, match="no samples"):
            sums.distance() if isinstance(sums, LeastSquares) else sums.entropy()
        sums.update(*blobs(p=4))
        with pytest.raises(ValueError, match="4 features as before, got 3"):
            sums.update(*blobs(p=3))
    with pytest.raises(ValueError, match="spatial"):
        Selections(spatial="mean")
    with pytest.raises(ValueError, match="swish"):
        Selections(threshold="swish")
