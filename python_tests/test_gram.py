"""The gram kernel against NumPy in float64 on the same numbers, and what it promises about bits, order and memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from platonic import reference
from platonic._ops import gram, merge_moments, use_gram_kernel
from platonic_core import _C

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DTYPES = [torch.float32, torch.float64]
BLOCK_ROWS = 128  # gram_block_rows of gram.h
SHAPES = [(1, 1, 0), (7, 3, 2), (127, 16, 1), (128, 31, 0), (129, 33, 10), (5000, 65, 3)]


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    _C.limit_isa(request.param)
    yield request.param
    _C.limit_isa("")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_moments(got, z, y=None, w=None):
    """`got` against the definition on v = [z | y], within the bound of gram.h.

    Rows are in no order, so sums about a shift are at most 4 times those about the mean, and by Cauchy-Schwarz those
    are at most the product of the two columns' spreads.
    """
    v = z.double() if y is None else torch.cat([z.double(), y.double()], 1)
    matrix, mean, total, _ = reference.gram(v.cpu(), sample_weight=None if w is None else w.cpu())
    relative = 4 * (BLOCK_ROWS + 3) * torch.finfo(z.dtype).eps / 2
    spread = np.sqrt(np.diag(matrix))
    # The reference centres in float64 and loses what the mean has over the spread.
    own = 8 * 2.0**-53 * total * np.outer(np.abs(mean) + 1, np.abs(mean) + 1)
    assert (np.abs(got.gram.cpu().numpy() - matrix) <= relative * np.outer(spread, spread) + own).all()
    scale = spread / np.sqrt(max(total, 1e-300))
    assert (np.abs(got.mean.cpu().numpy() - mean) <= relative * scale + 1e-13 * (np.abs(mean) + 1)).all()
    assert float(got.total) == pytest.approx(total, rel=1e-13)
    assert torch.equal(got.gram, got.gram.T)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_against_the_definition(isa, device, dtype, m, n, k):
    x = normal(m, n, dtype=dtype).to(device)
    y = normal(m, k, seed=1, dtype=dtype).to(device) if k else None
    w = normal(m, seed=2, dtype=dtype).abs().to(device)
    assert_moments(gram(x, y), x, y)
    assert_moments(gram(x, y, sample_weight=w), x, y, w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(_C.platonic.activations))
@pytest.mark.parametrize("standardise", [False, True])
def test_fused_layer(isa, device, dtype, activation, standardise):
    m, n, h = 700, 13, 37
    x = (3 * normal(m, n) + (100 if standardise else 0)).to(dtype).to(device)
    y = normal(m, 2, seed=1, dtype=dtype).to(device)
    layer = {"weight": normal(n, h, seed=2, dtype=dtype).to(device), "bias": normal(h, seed=3, dtype=dtype).to(device)}
    scales = {"x_mean": x.mean(0), "x_scale": x.std(0)} if standardise else {}
    moments, z = gram(x, y, z_out=True, activation=activation, **layer, **scales)
    on_cpu = {name: tensor.cpu() for name, tensor in (layer | scales).items()}
    exact = reference.gram(x.cpu(), activation=activation, **on_cpu)[3]
    # Each z sums n + 1 rounded terms; no activation stretches an error.
    inputs = x.double() if not standardise else (x.double() - scales["x_mean"]) / scales["x_scale"]
    size = inputs.abs() @ layer["weight"].double().abs() + layer["bias"].double().abs()
    unit = torch.finfo(dtype).eps / 2
    assert (np.abs(z.cpu().numpy() - exact) <= ((n + 8) * unit * size).cpu().numpy()).all()
    assert_moments(moments, z, y)
    assert torch.equal(moments.gram, gram(x, y, activation=activation, **layer, **scales).gram)


@pytest.mark.parametrize("device", DEVICES)
def test_far_from_zero_stays_positive_definite(isa, device):
    x = (1e4 + normal(20_000, 24)).float().to(device)
    got = gram(x)
    assert_moments(got, x)
    exact = np.linalg.eigvalsh(reference.gram(x.cpu())[0])
    np.testing.assert_allclose(torch.linalg.eigvalsh(got.gram).cpu(), exact, rtol=24 * 4 * 131 * 2.0**-24)


def test_low_rank_stays_semidefinite_to_rounding(isa):
    x = (1e4 + normal(9000, 3) @ normal(3, 40, seed=1)).float()
    eigenvalues = torch.linalg.eigvalsh(gram(x).gram)
    assert eigenvalues.min() > -4 * (BLOCK_ROWS + 3) * 2.0**-24 * eigenvalues.sum()


@pytest.mark.parametrize("order", ["sorted", "outliers first"])
def test_rows_in_order(isa, order):
    x = normal(30_000, 5).float()
    if order == "sorted":
        x = x[x[:, 0].argsort()].contiguous()
    else:
        x[:4000] += 1e4
    matrix, mean, _, _ = reference.gram(x)
    got = gram(x)
    # Segments have shifts of their own, so a wandering mean costs nothing beyond the overall spread.
    spread = np.sqrt(np.diag(matrix))
    bound = 4 * (BLOCK_ROWS + 3) * 2.0**-24 * np.outer(spread, spread)
    assert (np.abs(got.gram.numpy() - matrix) <= bound).all()
    np.testing.assert_allclose(got.mean, mean, atol=1e-4 * spread.max() / np.sqrt(30_000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(isa, dtype):
    x, y = normal(20_011, 19, dtype=dtype), normal(20_011, 3, seed=1, dtype=dtype)
    layer = {"weight": normal(19, 21, seed=2, dtype=dtype), "bias": normal(21, seed=3, dtype=dtype)}
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            moments, z = gram(x, y, z_out=True, activation="celu", **layer)
            results.append((*moments, z))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 400), n=st.integers(1, 40), cut=st.floats(0, 1), seed=st.integers(0, 99))
def test_merging_parts_equals_the_whole(m, n, cut, seed):
    x = normal(m, n, seed=seed) + 50
    at = int(cut * m)
    merged, whole = merge_moments(gram(x[:at]), gram(x[at:])), gram(x)
    size = float(whole.gram.diagonal().max())
    torch.testing.assert_close(merged.gram, whole.gram, rtol=0, atol=1e-11 * size + 1e-10)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=0)
    assert merged.total == whole.total


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 20), seed=st.integers(0, 99))
def test_integer_weights_equal_repeated_rows(n, seed):
    x = normal(60, n, seed=seed)
    times = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(seed))
    weighted, repeated = gram(x, sample_weight=times.double()), gram(x.repeat_interleave(times, 0))
    torch.testing.assert_close(weighted.gram, repeated.gram, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(weighted.mean, repeated.mean, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "every second column", "repeated row"])
def test_layouts(layout):
    x = normal(300, 24).float()
    view = {
        "rows apart": x[::3, :17],
        "transposed": x.T,
        "every second column": x[:, ::2],
        "repeated row": x[:1].expand(40, 24),
    }[layout]
    expected = gram(view.clone(memory_format=torch.contiguous_format))
    assert torch.equal(gram(view).gram, expected.gram)


def test_nothing_is_read_beyond_the_rows(isa):
    whole = normal(200, 40).float()
    whole[:, 17:] = float("nan")
    whole[150:] = float("nan")
    assert torch.isfinite(gram(whole[:150, :17]).gram).all()


@pytest.mark.parametrize("m", [0, 1])
def test_few_rows(m):
    got = gram(torch.ones(m, 3))
    assert float(got.total) == m
    assert torch.equal(got.gram, torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(got.mean, torch.full((3,), float(m), dtype=torch.float64))


def test_weights_of_zero():
    got = gram(torch.ones(5, 2), sample_weight=torch.zeros(5))
    assert float(got.total) == 0
    assert not got.gram.any()
    assert not got.mean.any()


def test_nan_is_not_hidden():
    x = normal(500, 4)
    x[333, 2] = float("nan")
    got = gram(x)
    assert torch.isnan(got.gram[2]).all()
    assert torch.isfinite(got.gram[[0, 1, 3]][:, [0, 1, 3]]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 3, dtype=torch.int64)}, "float32 or float64"),
        ({"x": torch.ones(4)}, "2 dimensions"),
        ({"x": torch.ones(4, 0)}, "at least one column"),
        ({"y": torch.ones(3, 1)}, r"y of shape \(4, 1\)"),
        ({"y": torch.ones(4, 1, dtype=torch.float64)}, r"torch.float32"),
        ({"sample_weight": torch.ones(4, 1)}, "sample_weight"),
        ({"weight": torch.ones(2, 5)}, r"weight of shape \(3, 5\)"),
        ({"bias": torch.ones(3)}, "need weight"),
        ({"activation": "relu"}, "need weight"),
        ({"weight": torch.ones(3, 2), "activation": "gelu"}, "'gelu'"),
        ({"x_mean": torch.ones(3)}, "both x_mean and x_scale"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        gram(**({"x": torch.ones(4, 3)} | change))


def test_opcheck():
    x, y = normal(40, 5).float(), normal(40, 2).float()
    torch.library.opcheck(torch.ops.platonic.gram, (x, y))
    layer = (x, None, torch.rand(40), normal(5, 4).float(), None, "tanh", None, None, True)
    torch.library.opcheck(torch.ops.platonic.gram, layer)


def test_dispatch_depends_on_shape_and_dtype_only():
    assert use_gram_kernel(60_000, 64, torch.float32)
    assert use_gram_kernel(60_000, 64, torch.float64, inputs=200)
    assert not use_gram_kernel(60_000, 4096, torch.float32)
    assert not use_gram_kernel(60_000, 64, torch.float32, inputs=784)
    assert not use_gram_kernel(60_000, 64, torch.float16)
