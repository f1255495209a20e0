"""The CUDA kernels of gradamp, their sources run on the CPU, against the plain reference and the CPU's kernels.

See cuda_emulation/ for how a .cu file runs without a GPU, and what is checked meanwhile. On a GPU test_gradamp*.py run them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import gradamp
from cuda_emulation.amplify import EmulatedAmplify
from gradamp import _ops, reference
from test_gradamp import AMPLIFIERS, DTYPES, assert_like_reference, compute, problem

SHAPES = [(1, 1), (3, 15), (5, 33), (60, 300), (1, 130, 17), (2, 5, 9, 131)]


@pytest.fixture
def kernels(emulated_library, monkeypatch):
    kernels = EmulatedAmplify(emulated_library)
    monkeypatch.setattr(_ops, "_kernels", kernels)
    return kernels


def misaligned(x):
    """The same values, of which no 16 bytes begin at a multiple of 16."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", AMPLIFIERS)
def test_against_the_reference(kernels, dtype, name):
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    for i, shape in enumerate(SHAPES):
        x, target, dense, weight = problem(shape, dtype)
        weight, dense = weight.to(arithmetic), dense.to(arithmetic)
        if len(shape) == 4:
            x = x.to(memory_format=torch.channels_last)
        kernels.at_end = i % 2 == 0  # what is beyond the end, or before the start, cannot be touched
        for reduction, w in (("mean", weight), ("sum", None), ("none", weight)):
            assert_like_reference(x, target, AMPLIFIERS[name], reduction=reduction, weight=w)
        for reduction, w in (("mean", None), ("none", weight)):
            assert_like_reference(x, dense, AMPLIFIERS[name], reduction=reduction, weight=w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(kernels, dtype):
    for shape in ((6, 37), (2, 5, 33)):
        x, target, dense, _ = problem(shape, dtype)
        for values in (misaligned(x), torch.cat([x, x], 1)[:, ::2], x[:, :1].expand(shape)):
            for t in (target, dense.to(_ops.arithmetic(dtype))):
                for reduction in ("mean", "none"):
                    assert_like_reference(values, t, AMPLIFIERS["exp, all targets"], reduction=reduction)
        expected = compute(x, target, AMPLIFIERS["pow3"])
        for values in (x.clone(), misaligned(x)):
            found = compute(values * 1, target, AMPLIFIERS["pow3"], inplace=True)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_outputs_have_the_bits_of_the_cpu(dtype, emulated_library, monkeypatch):
    """Without e^x or products to contract, and with the denominator a power of two, every operation is the same."""
    for shape in ((64, 131), (2, 7, 32)):
        x, target, dense, _ = problem(shape, dtype, ignored=False)
        for t in (target, dense.to(_ops.arithmetic(dtype))):
            results = []
            for kernels in (_ops._kernels, EmulatedAmplify(emulated_library)):
                with monkeypatch.context() as patch:
                    patch.setattr(_ops, "_kernels", kernels)
                    results.append(compute(x, t, AMPLIFIERS["linear"], factor=torch.tensor(4.0)))
            assert torch.equal(results[0][1], results[1][1])
            torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)


def test_order_of_threads_does_not_show(kernels):
    x, target, dense, weight = problem((9, 700), torch.float32)
    for t in (target, dense.float()):
        for reduction in ("mean", "none"):
            options = {"reduction": reduction, "weight": weight.float()}
            forwards = compute(x, t, AMPLIFIERS["exp"], **options)
            kernels.run_backwards(True)
            backwards = compute(x, t, AMPLIFIERS["exp"], **options)
            kernels.run_backwards(False)
            assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_empty_and_ignored(kernels):
    for shape in ((0, 5), (2, 5, 0)):
        x = torch.empty(shape)
        for t in (torch.empty((shape[0], *shape[2:]), dtype=torch.int64), torch.empty(shape)):
            assert compute(x, t, AMPLIFIERS["exp"])[0].isnan()
            assert compute(x, t, AMPLIFIERS["exp"], reduction="sum")[0] == 0
            assert compute(x, t, AMPLIFIERS["exp"], reduction="none")[0].shape == (shape[0], *shape[2:])
    x = torch.full((3, 40), torch.inf)
    x[0] = 0
    for reduction in ("mean", "none"):
        loss, grad = compute(x, torch.tensor([2, 7, 7]), AMPLIFIERS["exp"], ignore_index=7, reduction=reduction)
        assert loss.isfinite().all() and grad.isfinite().all() and (grad[1:] == 0).all() and (grad[0] != 0).all()


def test_indices_out_of_range_fail_an_assertion(kernels):
    for target in (5, -1):
        for reduction in ("mean", "none"):
            with pytest.raises(RuntimeError, match="Target is out of bounds"):
                gradamp.exp_ga(torch.zeros(2, 5), torch.tensor([0, target]), reduction=reduction)


def test_extremes(kernels):
    x = torch.tensor([[-torch.inf, -1e8, 16.1, 1e8, torch.nan, 0.5]])
    for dtype in DTYPES:
        values = x.to(dtype) if dtype != torch.float16 else x.clamp(-65504, 65504).half()
        for reduction in ("sum", "none"):
            _, grad = compute(values, torch.tensor([5]), AMPLIFIERS["exp"], reduction=reduction)
            assert grad.isnan().nonzero()[:, 1].tolist() == [4]
            assert grad[0, [0, 1, 2, 3, 5]].isfinite().all() and (grad[0, :2] == 0).all()


def test_means_over_float16_samples_are_rounded_once(kernels):
    x, target = torch.tensor([-9.0, 0.0, 13.0, 16.0]).half().repeat(5000, 1), torch.zeros(5000, dtype=torch.int64)
    for factor in (1.0, 2.0**16):
        _, grad = compute(x, target, AMPLIFIERS["exp"], factor=torch.tensor(factor))
        exact = (reference.gradient(x.double(), target, AMPLIFIERS["exp"]) * factor).half()
        torch.testing.assert_close(grad, exact, rtol=2.0**-10, atol=2.0**-24)
        assert grad.isinf().any() == (factor > 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_in_place(kernels, dtype):
    for grad in (torch.randn(3, 5, 37).to(dtype), torch.randn(2, 3, 4, 5).to(dtype, memory_format=torch.channels_last)):
        for values in (grad, misaligned(grad)):
            for factor in (torch.tensor(1.5), torch.tensor(1.0), torch.rand(values[:, 0].shape)):
                expected = (values.double() * (factor.unsqueeze(1) if factor.ndim else factor)).to(dtype)
                scaled = values.clone() if values is grad else misaligned(grad)
                _ops.scale_(scaled, factor)
                torch.testing.assert_close(scaled, expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_linear_layer_in_chunks(kernels):
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((9, 6), (300, 6), (300,))]
    target, class_weight = torch.randint(300, (9,)), torch.rand(300, dtype=torch.float64)
    loss = gradamp.linear_pow3_ga(*inputs, target, class_weight=class_weight)
    plain = gradamp.pow3_ga(F.linear(*inputs), target, weight=class_weight)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(plain, inputs))
