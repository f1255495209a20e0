"""sorted_pca against scikit-learn's PCA and the plain reference."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning

from platonic import _ops, reference
from platonic.pca import first_component, sorted_pca
from platonic_core import _C

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    _C.limit_isa(request.param)
    yield request.param
    _C.limit_isa("")


def spectrum(m, p, seed=0):
    """Rows with standard deviations 1, 0.8, 0.64, ... along random directions, around a mean of 3."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(p, p)))[0]
    return (rng.normal(size=(m, p)) * 0.8 ** np.minimum(np.arange(p), 40)) @ axes + 3


def assert_same_samples(got, X, n, **options):
    """Indices equal the reference's, except where its projections differ by < 1e-5 of their range."""
    expected, projection = reference.sorted_pca(X, n, **options)
    assert len(got) == n
    assert np.abs(projection[np.asarray(got)] - projection[expected]).max() < 1e-5 * np.ptp(projection)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("m", "p"), [(60, 5), (500, 127), (500, 128), (400, 129), (100, 300), (9001, 200)])
def test_direction_and_samples(isa, device, dtype, m, p):
    X = spectrum(m, p).astype(dtype)
    x = torch.from_numpy(X).to(device)
    component = first_component(x)
    fitted = PCA(2, svd_solver="full").fit(X.astype(np.float64))
    exact = fitted.components_[0] * np.sign(fitted.components_[0][np.abs(fitted.components_[0]).argmax()])
    # The default tol; float32 sums add their bound over the gap.
    first, second = fitted.explained_variance_
    rounding = 4 * 131 * np.finfo(dtype).eps / 2 * first / (first - second)
    assert np.linalg.norm(component.direction.numpy() - exact) < 2e-5 + rounding
    np.testing.assert_allclose(component.mean, X.mean(0, dtype=np.float64), atol=1e-5)
    assert_same_samples(sorted_pca(x, 37).cpu(), X, 37)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "kind", ["misleading sample", "blind sample", "heavy tails", "low rank", "close values", "rank 1"]
)
def test_hard_spectra(kind, dtype):
    """What the evenly spaced rows suggest may be wrong, useless or all there is."""
    rng = np.random.default_rng(0)
    m, p = 9001, 200
    if kind == "misleading sample":  # every fourth row, which is the sample, varies along another axis
        X = rng.normal(size=(m, p)) * np.where(np.arange(p) == 3, 5.0, 1.0)
        X[::4] = rng.normal(size=(len(X[::4]), p)) * np.where(np.arange(p) == 7, 8.0, 0.1)
    elif kind == "blind sample":  # of rank 3, and without any correlation with what varies most
        X = np.zeros((m, p))
        X[:, 100:] = rng.normal(size=(m, 100)) * np.where(np.arange(100) == 3, 5.0, 1.0)
        X[::4] = 0
        X[::4, :100] = rng.normal(size=(len(X[::4]), 3)) @ rng.normal(size=(3, 100)) * 0.1
    elif kind == "heavy tails":
        X = rng.standard_t(2.5, size=(m, p)) * np.linspace(1, 0.3, p)
    elif kind == "low rank":
        X = (rng.normal(size=(m, 3)) * [3, 2, 1]) @ rng.normal(size=(3, p)) + 5
    elif kind == "close values":
        X = rng.normal(size=(m, p)) * np.array([1, 0.97, 0.95, 0.93, *0.8 ** np.arange(p - 4)])
    else:
        X = rng.normal(size=(m, 1)) @ rng.normal(size=(1, p)) - 2
    X = X.astype(dtype)
    fitted = PCA(2, svd_solver="full").fit(X.astype(np.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        component = first_component(X)
    assert component.error <= 2e-5
    first, second = fitted.explained_variance_
    rounding = 4 * 131 * np.finfo(dtype).eps / 2 * first / (first - second)
    cosine = min(1.0, abs(component.direction.numpy() @ fitted.components_[0]))
    assert np.sqrt(1 - cosine**2) < 4e-5 + rounding
    assert_same_samples(sorted_pca(X, 37), X, 37)


def test_digits_as_scikit_learn():
    X = load_digits().data
    projection = PCA(1, svd_solver="full").fit_transform(X)[:, 0]
    ranks = (2 * np.arange(100) + 1) * len(X) // 200
    picked, close = sorted_pca(X, 100), 1e-5 * np.ptp(projection)
    errors = [np.abs(sign * projection[picked] - np.sort(sign * projection)[ranks]).max() for sign in (1, -1)]
    assert min(errors) < close


@pytest.mark.parametrize("p", [6, 150])
def test_with_targets(isa, p):
    X, y = spectrum(700, p), 4 * np.random.default_rng(1).normal(size=(700, 3))
    assert_same_samples(sorted_pca(X, 50, y=y), X, 50, y=y)
    assert_same_samples(sorted_pca(X, 50, y=y[:, 0]), X, 50, y=y[:, :1])


@pytest.mark.parametrize("p", [6, 150])
def test_with_weights(isa, p):
    X, w = spectrum(700, p), np.random.default_rng(1).gamma(0.5, size=700)
    assert_same_samples(sorted_pca(X, 50, sample_weight=w), X, 50, sample_weight=w)


@settings(max_examples=20, deadline=None)
@given(p=st.sampled_from([4, 150]), m=st.integers(2, 300), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_weights_of_one_change_nothing(p, m, share, seed):
    X, n = spectrum(m, p, seed), 1 + int(share * (m - 1))
    np.testing.assert_array_equal(sorted_pca(X, n), sorted_pca(X, n, sample_weight=np.ones(m)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_integer_weights_equal_repeated_rows(seed):
    rng = np.random.default_rng(seed)
    X, times = spectrum(50, 4, seed), rng.integers(0, 4, 50)
    times[0] = 1
    repeated = X.repeat(times, 0)
    n = min(20, len(repeated))
    np.testing.assert_array_equal(X[sorted_pca(X, n, sample_weight=times)], repeated[sorted_pca(repeated, n)])


@settings(max_examples=20, deadline=None)
@given(m=st.integers(2, 200), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_distinct_and_in_order(m, share, seed):
    X, n = spectrum(m, 3, seed), 1 + int(share * (m - 1))
    picked, (_, projection) = sorted_pca(X, n), reference.sorted_pca(X, n)
    assert len(set(picked.tolist())) == n
    assert (np.diff(projection[picked]) >= -1e-9 * np.ptp(projection)).all()
    assert sorted(sorted_pca(X, m).tolist()) == list(range(m))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1, 17, 130])
def test_equal_rows_tie_wherever_they_lie(isa, device, dtype, p):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(5, p))).to(dtype)[rng.integers(0, 5, 1031)].to(device)
    shift, direction = torch.from_numpy(rng.normal(size=(2, p))).to(device)
    assert len(_ops.project_rows(x, shift, direction).unique()) == 5
    dots = _ops.centred_product(x, shift.to(dtype), direction.to(dtype)[None])[0]
    assert len(dots.unique()) == 5


def test_same_bits_for_any_number_of_threads(isa):
    x, before, results = torch.from_numpy(spectrum(9001, 140)).float(), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            product = _ops.centred_product(x, x[0], x[:3].contiguous())
            results.append((*product, _ops.project_rows(x, x[0].double(), x[1].double())))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 0), (5, 33, 2), (513, 16, 1), (1025, 47, 17), (0, 3, 0)])
def test_centred_product(isa, device, dtype, count, m, n, k):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(m, n + k, generator=generator, dtype=torch.float64).to(dtype)
    w = torch.rand(m, generator=generator, dtype=torch.float64).to(dtype)
    shift, vectors = torch.randn(count + 1, n + k, generator=generator, dtype=torch.float64).to(dtype).split([1, count])
    y = v[:, n:].to(device) if k else None
    x, shift, vectors = v[:, :n].to(device), shift[0], vectors
    arguments = x, shift.to(device), vectors.to(device), y, w.to(device)
    dots, product, sums = _ops.centred_product(*arguments)
    without = _ops.centred_product(*arguments, sums=False)
    assert torch.equal(without[0], dots)
    assert torch.equal(without[1], product)
    assert len(without[2]) == 0
    centred = (v - shift).double()
    weighted = centred * w.double()[:, None]
    exact = (weighted @ vectors.double().T).T @ centred
    # Sums of n + k terms and then of at most 512 rows, in dtype.
    size = (weighted.abs() @ vectors.double().abs().T).T @ centred.abs()
    eps = torch.finfo(dtype).eps
    dot_size = centred.abs() @ vectors.double().abs().T
    assert ((dots.cpu() - centred @ vectors.double().T).abs() <= (n + k + 2) * eps * dot_size).all()
    assert ((product.cpu() - exact).abs() <= (512 + n + k + 8) * eps * size).all()
    assert ((sums.cpu() - weighted.sum(0)).abs() <= 520 * eps * weighted.abs().sum(0)).all()


def test_no_gap_falls_back_to_the_exact_matrix():
    X = np.random.default_rng(0).normal(size=(2000, 200))
    component = first_component(X, max_passes=2)
    assert component.error == 0
    assert component.passes == 3
    assert_same_samples(sorted_pca(X, 20, max_passes=2), X, 20)


def test_cap_warns_where_no_matrix_is_formed(monkeypatch):
    monkeypatch.setattr("platonic.pca._MATRIX_WIDTH", 100)
    with pytest.warns(ConvergenceWarning, match="did not converge in 2 passes"):
        first_component(np.random.default_rng(0).normal(size=(500, 200)), max_passes=2)


@pytest.mark.parametrize("p", [3, 200])
def test_constant_rows(p):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picked = sorted_pca(np.full((40, p), 2.0, np.float32), 8)
    np.testing.assert_array_equal(picked, (2 * np.arange(8) + 1) * 40 // 16)


def test_kinds_of_arrays():
    X = spectrum(90, 5)
    expected = sorted_pca(X, 10)
    assert isinstance(expected, np.ndarray)
    assert expected.dtype == np.int64
    assert torch.equal(sorted_pca(torch.from_numpy(X), 10), torch.from_numpy(expected))
    np.testing.assert_array_equal(sorted_pca(np.asfortranarray(X), 10), expected)
    np.testing.assert_array_equal(sorted_pca(X[::-1].copy()[::-1], 10), expected)
    assert len(sorted_pca((10 * X).astype(np.int32), 10)) == 10


@pytest.mark.parametrize(
    ("X", "n", "options", "message"),
    [
        (np.ones((5, 2)), 6, {}, "1 <= n <= 5"),
        (np.ones((5, 2)), 0, {}, "1 <= n <= 5"),
        (np.ones(5), 1, {}, "samples, features"),
        (np.ones((0, 2)), 1, {}, "samples, features"),
        (np.full((5, 2), np.nan), 1, {}, "finite"),
        (np.full((5, 200), np.inf), 1, {}, "finite"),
        (np.random.default_rng(0).normal(size=(1000, 200)).astype(np.float32) * 1e25, 1, {}, "overflow"),
        (np.ones((5, 2)), 1, {"y": np.ones(4)}, "y of 5 rows"),
        (np.ones((5, 2)), 1, {"y": np.full(5, np.nan)}, "finite"),
        (np.ones((5, 2)), 1, {"sample_weight": np.ones(4)}, "sample_weight of shape"),
        (np.ones((5, 2)), 1, {"sample_weight": -np.ones(5)}, "not negative"),
        (np.ones((5, 2)), 1, {"sample_weight": np.zeros(5)}, "not all 0"),
        (np.ones((5, 2), complex), 1, {}, "real"),
    ],
)
def test_bad_arguments(X, n, options, message):
    with pytest.raises(ValueError, match=message):
        sorted_pca(X, n, **options)


def test_opcheck():
    x, y = torch.randn(30, 4), torch.randn(30, 2)
    for sums in (True, False):
        arguments = (x, torch.zeros(6), torch.randn(2, 6), y, torch.rand(30), sums)
        torch.library.opcheck(torch.ops.platonic.centred_product, arguments)
    double = torch.zeros(6, dtype=torch.float64)
    torch.library.opcheck(torch.ops.platonic.project_rows, (x, double, double + 1, y))
