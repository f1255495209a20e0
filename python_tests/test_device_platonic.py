"""The CUDA kernels of platonic, their sources run on the CPU, held to what the tests of each kernel ask of the CPU's.

See cuda_emulation/ for how a .cu file runs without a GPU, and what is checked meanwhile. On a GPU the tests that are called
here run the kernels themselves.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

import test_batched_ridge
import test_fit_narrow
import test_gram
import test_rolling_ridge
import test_sorted_pca
from cuda_emulation.platonic import EmulatedPlatonic
from platonic import _ops

FLOATS = [torch.float32, torch.float64]


@pytest.fixture(params=[False, True], ids=["guarded start", "guarded end"])
def kernels(request, emulated_library, monkeypatch):
    """Memory before the first element, or beyond the last, of every buffer cannot be touched."""
    kernels = EmulatedPlatonic(emulated_library)
    kernels.at_end = request.param
    for name in ("gram", "narrow", "ridge", "sorted_pca"):
        monkeypatch.setattr(importlib.import_module(f"platonic._ops.{name}"), "kernels", kernels)
    yield kernels
    assert kernels.calls > 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_gram_by_the_definition(kernels, dtype):
    for shape in [(0, 3, 1), *test_gram.SHAPES[:5], (4100, 70, 3)]:
        test_gram.test_against_the_definition(None, "cpu", dtype, *shape)
    test_gram.test_far_from_zero_stays_positive_definite(None, "cpu")
    test_gram.test_nan_is_not_hidden()
    test_gram.test_weights_of_zero()


@pytest.mark.parametrize("dtype", FLOATS)
def test_gram_of_a_layer(kernels, dtype):
    for activation in _ops.ACTIVATIONS:
        test_gram.test_fused_layer(None, "cpu", dtype, activation, activation == "relu")


@pytest.mark.parametrize("dtype", FLOATS)
def test_products_and_projections(kernels, dtype):
    for i, shape in enumerate([(1, 1, 0), (5, 33, 2), (513, 16, 1), (1025, 47, 17), (0, 3, 0)]):
        for count in (1 + i % 4, 4 - i % 4):
            test_sorted_pca.test_centred_product(None, "cpu", dtype, count, *shape)
    test_sorted_pca.test_equal_rows_tie_wherever_they_lie(None, "cpu", dtype, 130)
    test_sorted_pca.test_direction_and_samples(None, "cpu", np.dtype(str(dtype)[6:]), 500, 129)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ridge_of_gram_matrices(kernels, dtype):
    rng = np.random.default_rng(0)
    for p in (1, 2, 7, 31, 32, 33, 50):
        test_batched_ridge.test_gram_matches_numpy("cpu", dtype, p, rng)
    for batch, p, r in [(1, 3, 1), (17, 8, 3), (9, 6, 19)]:
        test_batched_ridge.test_every_instruction_set_and_tail(None, dtype, batch, p, r, rng)
    for p in (5, 40):
        test_batched_ridge.test_a_refused_system_is_reported_and_touches_no_other(dtype, p, rng)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ridge_of_data(kernels, dtype):
    rng = np.random.default_rng(0)
    for m, p in [(1, 1), (5, 3), (9, 32), (50, 33), (40, 8)]:
        for constant in (False, True):
            test_batched_ridge.test_data_match_scikit_learn("cpu", constant, dtype, m, p, rng)
    test_batched_ridge.test_a_constant_feature_is_singular_beside_an_intercept(rng)
    test_batched_ridge.test_equal_features_without_a_penalty_are_singular(20, rng)


def test_widest_systems(kernels):
    """More shared memory than is granted unasked."""
    rng = np.random.default_rng(0)
    test_batched_ridge.test_gram_matches_numpy("cpu", np.float64, 128, rng)
    test_batched_ridge.test_data_match_scikit_learn("cpu", True, np.float32, 20, 128, rng)


def test_rolling_windows(kernels):
    rng = np.random.default_rng(0)
    for i, shape in enumerate(test_rolling_ridge.SHAPES[:5]):
        test_rolling_ridge.test_matches_a_fit_of_every_window("cpu", i % 2 == 0, *shape, rng)
    test_rolling_ridge.test_rows_that_are_not_finite_are_left_out(None, np.nan, rng)
    test_rolling_ridge.test_singular_windows_are_reported_and_leave_no_trace(None, rng)
    test_rolling_ridge.test_an_outlier_leaves_no_trace(None, rng)
    test_rolling_ridge.test_float32_is_computed_in_float64(rng)


@pytest.mark.parametrize("scaling", ["relative", "absolute"])
def test_narrow_networks(kernels, scaling):
    for activation in _ops.ACTIVATIONS:
        test_fit_narrow.test_agrees_with_the_reference(activation, scaling, 3, 3, 1e-3, True, "cpu")
    test_fit_narrow.test_agrees_with_the_reference("tanh", scaling, 1, 1, 0.0, False, "cpu")


def test_narrow_networks_around_tiles(kernels):
    for m in (1, 2, 31, 33, 128, 129, 513):
        test_fit_narrow.test_row_counts_around_tile_boundaries(m, None)
    for widths in ([1, 1, 2, 3], [8, 13, 17, 12], [64, 64, 31, 64]):
        test_fit_narrow.test_widths_around_tile_boundaries(widths, 2, None)


def test_order_of_threads_does_not_show(kernels):
    def normal(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    l2 = torch.tensor([0.1, 2.0], dtype=torch.float64)
    x, y = normal(700, 70), normal(700, 3)

    def narrow():
        net = test_fit_narrow.fit_narrow(x[:, :6].numpy(), y.numpy(), [7, 5], n_tries=3, random_state=0)
        return [torch.from_numpy(part) for part in (*net.weights, *net.biases, net.lsd, net.representation)]

    problems = [
        narrow,
        lambda: _ops.gram(x, y, weight=normal(70, 90), activation="tanh", z_out=True),
        lambda: _ops.centred_product(x, normal(73), normal(3, 73), y),
        lambda: _ops.batched_ridge_gram(x.reshape(10, 70, 70).mT @ x.reshape(10, 70, 70), normal(10, 70, 20), l2, 0.0),
        lambda: _ops.batched_ridge_data(x.reshape(70, 70, 10), normal(70, 70, 2), l2, True, 0.0),
        lambda: _ops.rolling_ridge(x[:200, :5].float(), y[:200].float(), 30, 0.1, True, 10, 0.0),
    ]
    for problem in problems:
        results = []
        for backwards in (False, True):
            kernels.run_backwards(backwards)
            moments, *rest = problem()
            results.append([*moments, *rest] if isinstance(moments, tuple) else [moments, *rest])
        kernels.run_backwards(False)
        for forwards, backwards in zip(*results, strict=True):
            torch.testing.assert_close(forwards, backwards, rtol=0, atol=0, equal_nan=True)
