"""Vector exp, expm1, tanh and activations against NumPy in extended precision, on every instruction set."""

import numpy as np
import pytest

from platonic import reference
from platonic_core import _C

EXP, EXPM1, TANH, VECTOR_ACTIVATION, SCALAR_ACTIVATION = range(5)
ULPS = {"exp": (EXP, 2.0), "expm1": (EXPM1, 4.0), "tanh": (TANH, 4.0)}


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    _C.limit_isa(request.param)
    yield request.param
    _C.limit_isa("")


def evaluate(function, x, kind=0):
    x = np.ascontiguousarray(x)
    y = np.empty_like(x)
    _C.platonic.probe_math(function, kind, x.dtype == np.float64, x.ctypes.data, y.ctypes.data, x.size)
    return y


def arguments(dtype, low, high):
    """The whole range, its middle, and magnitudes down to the smallest normal numbers."""
    rng = np.random.default_rng(0)
    small = np.log10(np.finfo(dtype).tiny) + 1
    magnitudes = np.sign(rng.normal(size=100_000)) * 10.0 ** rng.uniform(small, 0, 100_000)
    return np.concatenate([rng.uniform(low, high, 200_001), rng.uniform(-3, 3, 200_001), magnitudes]).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ULPS)
def test_error_in_ulps(isa, name, dtype):
    if np.finfo(np.longdouble).nmant <= np.finfo(dtype).nmant:
        pytest.skip("long double is no wider than the type under test on this machine")
    function, bound = ULPS[name]
    low, high = (-103.5, 88.7) if dtype == np.float32 else (-744.0, 709.7)
    x = arguments(dtype, low, high)
    exact = getattr(np, name)(x.astype(np.longdouble))
    got = evaluate(function, x)
    ulp = np.spacing(np.abs(exact.astype(dtype))).astype(np.longdouble)
    error = np.abs(got.astype(np.longdouble) - exact) / ulp
    assert error.max() <= bound, (x[error.argmax()], got[error.argmax()])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(isa, dtype):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 800.0, -800.0], dtype)
    np.testing.assert_array_equal(evaluate(EXP, x), np.array([np.nan, np.inf, 0, 1, 1, np.inf, 0], dtype))
    np.testing.assert_array_equal(evaluate(EXPM1, x), np.array([np.nan, np.inf, -1, 0, 0, np.inf, -1], dtype))
    tanh = evaluate(TANH, x)
    np.testing.assert_array_equal(tanh, np.array([np.nan, 1, -1, 0, 0, 1, -1], dtype))
    np.testing.assert_array_equal(np.signbit(tanh[3:5]), [False, True])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", sorted(_C.platonic.activations))
def test_vector_and_scalar_activations_agree_with_the_reference(isa, name, dtype):
    kind = _C.platonic.activations[name]
    x = np.concatenate([arguments(dtype, -20, 20), np.array([np.nan, np.inf, -np.inf, 0.0], dtype)])
    exact = reference.activation(name, x.astype(np.float64)).astype(dtype)
    for function in (VECTOR_ACTIVATION, SCALAR_ACTIVATION):
        got = evaluate(function, x, kind)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(exact))
        finite = np.isfinite(exact)
        np.testing.assert_array_equal(got[np.isinf(exact)], exact[np.isinf(exact)])
        # 4 ulp of the vector function, 1 of the reference's own float64.
        np.testing.assert_array_almost_equal_nulp(got[finite], exact[finite], nulp=5)


@pytest.mark.parametrize("n", range(0, 40, 3))
def test_tails(isa, n):
    x = np.linspace(-1, 1, n, dtype=np.float32)
    np.testing.assert_allclose(evaluate(EXP, x), np.exp(x), rtol=4 * np.finfo(np.float32).eps)
