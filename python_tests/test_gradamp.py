"""The amplify kernel against the plain reference in float64, and what it promises about bits, layouts and extremes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gradamp
from gradamp import reference
from gradamp.amplifier import Amplifier
from platonic_core import _C

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
AMPLIFIERS = {
    "exp": Amplifier("exp", alpha=0.5, target_values=(0.0, 2.0)),
    "exp, all targets": Amplifier("exp", alpha=0.1, max_input=3.0, target_values=(-0.5, 6.0)),
    "pow3": Amplifier("pow3", alpha=0.01, beta=0.4, target_values=(-2.0, 10.0)),
    "linear": Amplifier("linear", target_values=(-1.0, 1.0)),
}
SHAPES = [(1, 1), (3, 15), (5, 33), (2, 2100), (2, 3, 5), (1, 130, 17), (2, 5, 9, 131)]


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    _C.limit_isa(request.param)
    yield request.param
    _C.limit_isa("")


def compute(x, target, amplifier, factor=None, **options):
    """(loss, gradient) of the kernel; `factor` is the gradient that arrives."""
    x = x.detach().requires_grad_()
    inplace = options.pop("inplace", False)
    options = {"weight": None, "ignore_index": -100, "reduction": "mean"} | options
    loss = gradamp.functional.amplified_loss(x, target, amplifier, inplace=inplace, **options)
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss) if factor is None else factor)
    return loss.detach(), grad


def wide(t):
    return None if t is None else t.double() if t.is_floating_point() else t


def assert_like_reference(x, target, amplifier, **options):
    """Loss and gradient against the reference on the same numbers in float64.

    An activation is off by at most 4 ulp (3 of e^x, 1 of alpha), y - t and the factor by 1 each: 6 ulp of
    max(|y|, |t|), twice that for float64, where the reference is as inexact. A 16-bit gradient is rounded once more.
    """
    loss, grad = compute(x, target, amplifier, **options)
    plain = {name: wide(v) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    x64, target64 = x.double(), wide(target)
    expected = reference.gradient(x64, target64, amplifier, **plain)
    assert grad.dtype == x.dtype and grad.shape == x.shape
    # The sum of the samples' weights, of float64, has a rounding for each.
    unit = (12 + x[:, 0].numel()) * 2.0**-53 if x.dtype == torch.float64 else 6 * 2.0**-24 * 2
    t = reference.dense_targets(x64, target64, amplifier, options.get("ignore_index", -100))
    elements, samples, denominator = reference.sample_factors(
        x64, target64, plain.get("weight"), options.get("ignore_index", -100)
    )
    divides = options.get("reduction", "mean") == "mean"
    scale = (samples.unsqueeze(1) * elements).abs() / (denominator if divides else 1)
    y = reference.activate(x64, amplifier)
    bound = unit * (torch.maximum(y.abs(), t.abs()) + amplifier.beta) * scale + 1e-37
    if x.dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(x.dtype)
        expected = expected.clamp(-info.max, info.max)
        bound = bound + info.eps * expected.abs() + 2 * info.smallest_normal * info.eps
    assert ((grad.double() - expected).abs() <= bound).all()

    terms = (elements * reference.element_loss(x64, t, amplifier)).abs()
    size = terms.sum(1) * samples + scale.sum(1) + (t * x64).abs().sum(1) * samples
    expected = reference.loss(x64, target64, amplifier, **plain)
    if options.get("reduction", "mean") != "none":
        size = size.sum() / (denominator if divides else 1)
    assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    # Sums of at most 64 numbers in the type of arithmetic; float64 goes on in the same type, as the reference does.
    length = 64 + 12 + (2 * x.numel() if x.dtype == torch.float64 else 0)
    assert ((loss.double() - expected).abs() <= unit / 6 * length * size + 1e-37).all()


def problem(shape, dtype, seed=0, spread=3.0, ignored=True):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    if ignored and target.numel() > 1:
        target.view(-1)[target.numel() // 2] = -100
    dense = torch.rand(shape, generator=generator, dtype=torch.float64)
    dense[dense < 0.3] = 0
    weight = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 1
    return x, target, dense, weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", AMPLIFIERS)
def test_against_the_reference(isa, device, dtype, name):
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in SHAPES:
        x, target, dense, weight = (t.to(device) for t in problem(shape, dtype))
        weight, dense = weight.to(arithmetic), dense.to(arithmetic)
        for reduction, w in (("mean", weight), ("sum", None), ("none", weight)):
            assert_like_reference(x, target, AMPLIFIERS[name], reduction=reduction, weight=w)
        for reduction, w in (("mean", None), ("none", weight)):
            assert_like_reference(x, dense, AMPLIFIERS[name], reduction=reduction, weight=w)


@settings(max_examples=60)
@given(
    st.integers(0, 5), st.integers(1, 40), st.lists(st.integers(0, 40), max_size=2), st.sampled_from(DTYPES),
    st.sampled_from(list(AMPLIFIERS)), st.sampled_from(["contiguous", "channels-last", "sliced", "expanded"]),
    st.sampled_from(["mean", "sum", "none"]), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_and_layout(n, c, rest, dtype, name, layout, reduction, seed):
    shape = (n, c, *rest)
    x, target, _, _ = problem(shape, dtype, seed)
    if layout == "channels-last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        x = torch.cat([x, x], 1)[:, ::2]
    elif layout == "expanded":
        x = x[:, :1].expand(shape)
    if target.numel() and (target != -100).any():
        assert_like_reference(x, target, AMPLIFIERS[name], reduction=reduction)
    else:
        loss, grad = compute(x, target, AMPLIFIERS[name], reduction=reduction)
        assert (grad == 0).all() and (loss.isnan().all() if reduction == "mean" else (loss == 0).all())


def test_gradient_keeps_the_memory_order_of_the_logits():
    x, target, _, _ = problem((2, 5, 4, 3), torch.float32)
    x = x.to(memory_format=torch.channels_last)
    _, grad = compute(x, target, AMPLIFIERS["exp"])
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("shape", [(70, 1000), (3, 21, 5000), (2, 300, 700), (9, 70000)])
def test_same_bits_for_any_number_of_threads(isa, shape):
    x, target, dense, weight = problem(shape, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for t in (target, dense.float()):
                for reduction in ("mean", "none"):
                    results.append(compute(x, t, AMPLIFIERS["exp"], reduction=reduction, weight=weight.float()))
    finally:
        torch.set_num_threads(before)
    for i, (loss, grad) in enumerate(results):
        assert torch.equal(loss, results[i % 4][0]) and torch.equal(grad, results[i % 4][1])


def test_streamed_and_recycled_gradients_are_right():
    """From 32 MiB on gradients are written past the caches; memory of the last one is used again."""
    x, target, _, _ = problem((2, 9, 500001), torch.float32)
    first = compute(x, target, AMPLIFIERS["exp"], reduction="sum")[1]
    address = first.data_ptr()
    expected = reference.gradient(x, target, AMPLIFIERS["exp"], reduction="sum")
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    kept = compute(-x, target, AMPLIFIERS["exp"], reduction="sum")[1]
    assert kept.data_ptr() != address, "memory in use was handed out"
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)


# ---- conventions of torch.nn.functional.cross_entropy ----


@pytest.mark.parametrize("device", DEVICES)
def test_factors_and_denominators_are_those_of_cross_entropy(device):
    """With y - t replaced by their own, sample factors of both losses agree: ratios of gradients are the same."""
    x, target, _, weight = problem((40, 6, 3), torch.float64, ignored=False)
    x, target, weight = x.to(device), target.to(device), weight.to(device)
    for options in (
        {},
        {"weight": weight},
        {"ignore_index": 2},
        {"weight": weight, "ignore_index": 2, "reduction": "sum"},
    ):
        options = {"ignore_index": -100, "reduction": "mean", "weight": None} | options
        _, ours = compute(x, target, AMPLIFIERS["linear"], **options)
        logits = x.detach().requires_grad_()
        (theirs,) = torch.autograd.grad(F.cross_entropy(logits, target, **options), logits)
        kept = target != options["ignore_index"]
        hot = torch.zeros_like(x).scatter_(1, torch.where(kept, target, 0).unsqueeze(1), 1.0)
        factor = torch.where(kept.unsqueeze(1), theirs / (torch.softmax(x, 1) - hot), 0)
        torch.testing.assert_close(ours, (x - (2 * hot - 1)) * factor, rtol=1e-9, atol=1e-12)


def test_conventions_at_the_edges():
    x, target = torch.randn(3, 4), torch.full((3,), -100)
    for f in (gradamp.exp_ga, gradamp.pow3_ga, gradamp.linear_mse, F.cross_entropy):
        assert f(x, target).isnan() and f(x, target, reduction="sum") == 0
        assert torch.equal(f(x, target, reduction="none"), torch.zeros(3))
        assert f(torch.empty(0, 4), torch.empty(0, dtype=torch.int64)).isnan()
        assert f(x[0], torch.tensor(1)).shape == () and f(x[0], torch.tensor(1), reduction="none").shape == ()
        torch.testing.assert_close(f(x[0], torch.tensor(1)), f(x[:1], torch.tensor([1])))


def test_ignored_samples_do_not_matter_whatever_they_hold():
    for shape in ((4, 5), (2, 5, 70)):
        x, target, _, _ = problem(shape, torch.float32, ignored=False)
        target[1] = 7
        x[1] = math.inf
        loss, grad = compute(x, target, AMPLIFIERS["exp"], ignore_index=7)
        assert loss.isfinite() and (grad[1] == 0).all() and grad.isfinite().all()


# ---- extremes ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", AMPLIFIERS)
def test_finite_logits_give_finite_results(isa, dtype, name):
    largest = 65504.0 if dtype == torch.float16 else 1e8
    values = torch.tensor([0.0, -0.0, 15.9, 16.0, 16.1, 88, 89, 1e3, 1e4, largest], dtype=torch.float64)
    x = torch.cat([values, -values]).to(dtype).repeat(2, 1)
    target = torch.tensor([9, 19])
    for reduction in ("mean", "sum"):
        loss, grad = compute(x, target, AMPLIFIERS[name], reduction=reduction)
        assert loss.isfinite() and grad.isfinite().all()
    assert_like_reference(x, target, AMPLIFIERS[name], reduction="sum")


def test_masked_logits_cost_nothing(isa):
    x = torch.full((2, 40), -math.inf)
    x[:, 3] = 0.5
    loss, grad = compute(x, torch.tensor([3, 3]), AMPLIFIERS["exp"], reduction="sum")
    y = 0.5 * math.exp(0.5)
    assert loss.item() == pytest.approx(2 * (y - 2 * math.log(y)), rel=1e-6)
    assert (grad[:, :3] == 0).all() and (grad[:, 4:] == 0).all()
    loss, _ = compute(x, torch.tensor([4, 3]), AMPLIFIERS["exp"], reduction="none")
    assert loss[0] == math.inf and loss[1].isfinite()


def test_nan_is_not_hidden(isa):
    for dtype in DTYPES:
        x = torch.zeros(1, 35, dtype=dtype)
        x[0, 4] = x[0, 34] = math.nan
        loss, grad = compute(x, torch.tensor([0]), AMPLIFIERS["exp"], reduction="sum")
        assert loss.isnan() and grad.isnan().nonzero()[:, 1].tolist() == [4, 34]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [1.0, 2.0**16])
def test_means_over_many_float16_samples_are_rounded_once(isa, inplace, factor):
    """Neither what the division takes below float16's range nor what it brings back into it is lost."""
    n = 100_000
    x = torch.tensor([-9.0, -3.0, 0.0, 5.0, 11.0, 13.0, 16.0, 20.0], dtype=torch.float16).repeat(n, 1)
    target, factor = torch.arange(n) % 8, torch.tensor(factor)
    loss, grad = compute(x.clone(), target, AMPLIFIERS["exp"], factor=factor, inplace=inplace)
    exact = reference.gradient(x.double(), target, AMPLIFIERS["exp"]) * factor
    largest = torch.finfo(torch.float16).max
    assert (grad[exact.abs() > largest * 1.001] == math.inf).all(), "an overflow must be seen by the GradScaler"
    held = exact.abs() < largest
    bound = 2.0**-11 * 1.01 * exact.abs() + 2.0**-25
    assert ((grad.double() - exact).abs() <= bound)[held].all()
    assert loss.item() == pytest.approx(reference.loss(x.double(), target, AMPLIFIERS["exp"]).item(), rel=1e-6)


def test_what_saturates_and_what_overflows_in_float16():
    x, target = torch.full((1, 1), 16.0, dtype=torch.float16), torch.zeros(1, dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):  # y - t = 4.4 million
        for factor, expected in ((1.0, 65504.0), (0.5, 32752.0), (-1.0, -65504.0), (2.0, math.inf)):
            arriving = torch.tensor([factor] if reduction == "none" else factor)
            _, grad = compute(x, target, AMPLIFIERS["exp"], factor=arriving, reduction=reduction)
            assert grad.item() == expected


# ---- errors ----


@pytest.mark.parametrize("f", [gradamp.exp_ga, gradamp.pow3_ga, gradamp.linear_mse])
def test_bad_input(f):
    x, t = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        f(x, t + 5)
    with pytest.raises(IndexError, match="Target -1"):
        f(x, t - 1)
    with pytest.raises(TypeError, match="float16, bfloat16, float32 or float64"):
        f(x.long(), t)
    with pytest.raises(TypeError, match="int64"):
        f(x, t.int())
    with pytest.raises(ValueError, match=r"class indices of shape \(4,\)"):
        f(x, t[:3])
    with pytest.raises(ValueError, match=r"dense target of shape \(4, 5\)"):
        f(x, torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"weight of shape \(5,\)"):
        f(x, t, weight=torch.ones(4))
    with pytest.raises(ValueError, match="none, sum, mean"):
        f(x, t, reduction="average")
    with pytest.raises(ValueError, match="target_values"):
        f(x, t, target_values=(0.0, math.inf))
    with pytest.raises(NotImplementedError, match=r"no gradient of weight, as in torch"):
        f(x, t, weight=torch.ones(5, requires_grad=True))
    with pytest.raises(RuntimeError, match="weight"):
        F.cross_entropy(x, t, weight=torch.ones(5, requires_grad=True))
    for g in (f, F.cross_entropy):
        with pytest.raises((ValueError, RuntimeError), match="ignore_index"):
            g(x, torch.rand(4, 5), ignore_index=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'weights'"):
        f(x, t, weights=torch.ones(5))


def test_bad_numbers():
    x, t = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    for alpha in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="alpha > 0"):
            gradamp.exp_ga(x, t, alpha=alpha)
    with pytest.raises(ValueError, match="beta >= 0"):
        gradamp.pow3_ga(x, t, beta=-1)
    with pytest.raises(ValueError, match="max_input"):
        gradamp.exp_ga(x, t, max_input=81)
    with pytest.raises(ValueError, match="two different finite numbers"):
        gradamp.linear_mse(x, t, target_values=(1, 1))


def test_predictions_of_what_is_not_finite():
    for name in ("exp_ga", "pow3_ga", "linear_mse", "cross_entropy"):
        assert gradamp.predict_proba(torch.tensor([[float("nan"), 0.0, 0.0]]), name).isnan().any(), name
    for name in ("pow3_ga", "linear_mse"):
        probabilities = gradamp.predict_proba(torch.tensor([[1e30, 0.0, 1.0], [-5.0, -5.0, -5.0]]), name)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
        assert probabilities[0, 0] > 0.99
