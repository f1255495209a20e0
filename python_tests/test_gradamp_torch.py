"""The losses as part of torch: autograd, opcheck, torch.compile, torch.func, autocast, in place, modules and names."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import gradamp
from gradamp import _ops, reference
from gradamp.amplifier import Amplifier

LOSSES = {"exp_ga": gradamp.exp_ga, "pow3_ga": gradamp.pow3_ga, "linear_mse": gradamp.linear_mse}
AMPLIFIERS = {
    "exp_ga": Amplifier("exp", alpha=0.5, target_values=(0.0, 2.0)),
    "pow3_ga": Amplifier("pow3", alpha=0.001, target_values=(0.0, 2.0)),
    "linear_mse": Amplifier("linear", target_values=(-1.0, 1.0)),
}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 4, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (6, 4), generator=generator)
    target[0, 0] = -100
    return x.requires_grad_(), target


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name, batch):
    x, target = batch
    f = LOSSES[name]
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(lambda x, r=reduction: f(x, target, reduction=r), x)
        assert torch.autograd.gradgradcheck(lambda x, r=reduction: f(x, target, reduction=r), x)
    dense = torch.rand_like(x)
    assert torch.autograd.gradcheck(lambda x: f(x, dense), x)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_dense_targets_and_their_weight(name, batch):
    x, dense, weight = batch[0], torch.rand(6, 5, 4, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    dense[dense < 0.3] = 0
    inputs = (x, dense.requires_grad_(), weight.requires_grad_())
    for reduction in ("mean", "none"):
        f = lambda x, t, w, r=reduction: LOSSES[name](x, t, weight=w, reduction=r)  # noqa: E731
        assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)
    loss = LOSSES[name](*inputs[:2], weight=weight)
    expected = torch.autograd.grad(reference.loss(*inputs[:2], AMPLIFIERS[name], weight=weight), inputs)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), expected)
    step = torch.compile(lambda *inputs: torch.autograd.grad(f(*inputs).sum(), inputs), backend="aot_eager")
    torch.testing.assert_close(step(*inputs), torch.autograd.grad(f(*inputs).sum(), inputs))
    (alone,) = torch.autograd.grad(LOSSES[name](x.detach(), dense), dense)  # the logits need none
    torch.testing.assert_close(alone, torch.autograd.grad(reference.loss(x, dense, AMPLIFIERS[name]), dense)[0])
    with pytest.raises(NotImplementedError, match="the logits are gone"):
        LOSSES[name](x * 1, dense, inplace=True)


@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_is_differentiable_and_its_gradient_is_its_own(name, batch):
    x, target = batch
    amplifier = AMPLIFIERS[name]
    (auto,) = torch.autograd.grad(reference.loss(x, target, amplifier), x)
    torch.testing.assert_close(auto, reference.gradient(x, target, amplifier))
    beyond = torch.tensor([[15.9, 16.5, 40.0]], dtype=torch.float64, requires_grad=True)
    one = torch.tensor([1])
    assert torch.autograd.gradcheck(lambda x: reference.loss(x, one, amplifier), beyond)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, one), beyond)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction):
    target = torch.tensor([[0, 2], [1, -100]])
    for x in (torch.randn(2, 3, 2), torch.randn(2, 2, 3).movedim(-1, 1)):
        for t in (target, torch.rand(2, 3, 2)):
            for with_gradient in (True, False):
                arguments = (torch.ones(3), None, "exp", reduction, -100, [0.5, 0.0, 16.0, 0.0, 2.0], with_gradient)
                x = x.detach().requires_grad_(with_gradient)
                torch.library.opcheck(_ops.amplify, (x, t, *arguments))
    torch.library.opcheck(torch.ops.gradamp.scale_.default, (torch.randn(2, 3, 2), torch.rand(2, 2)))


def test_compile(batch):
    x, target = batch
    for dtype in (torch.float64, torch.float16):
        eager, compiled = (x.detach().to(dtype).requires_grad_() for _ in range(2))

        def step(x, target):
            return gradamp.exp_ga(x * 2, target, inplace=True) * 3

        step(eager, target).backward()
        torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, target).backward()
        torch.testing.assert_close(compiled.grad, eager.grad)


def test_compile_with_inductor():
    x, target = torch.randn(8, 5, requires_grad=True), torch.randint(5, (8,))
    loss = gradamp.make_loss("exp_ga")
    net = nn.Linear(5, 5)
    (expected,) = torch.autograd.grad(loss(net(x), target), x)
    (grad,) = torch.autograd.grad(torch.compile(lambda x: loss(net(x), target), fullgraph=True)(x), x)
    torch.testing.assert_close(grad, expected)


def test_torch_func(batch):
    x, target = batch
    x = x.detach()
    loss = lambda x, t: gradamp.exp_ga(x, t)  # noqa: E731
    expected = reference.gradient(x, target, AMPLIFIERS["exp_ga"])
    torch.testing.assert_close(torch.func.grad(loss)(x, target), expected)
    one = lambda x, t: gradamp.exp_ga(x.unsqueeze(0), t.unsqueeze(0))  # noqa: E731
    each = torch.func.vmap(torch.func.grad(one))(x, target.clamp(min=0))
    alone = reference.gradient(x[1:2], target[1:2], AMPLIFIERS["exp_ga"])
    torch.testing.assert_close(each[1:2], alone)
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), expected)
    hessian = torch.func.hessian(lambda x: gradamp.exp_ga(x, target[1:2, 0]))(x[1:2, :, 0])
    torch.testing.assert_close(hessian.reshape(5, 5), torch.diag(0.5 * x[1, :, 0].exp()))


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_make_fx(batch, tracing_mode):
    x, target = batch
    step = lambda x, t: torch.autograd.grad(gradamp.exp_ga(x, t) * 3, x)[0]  # noqa: E731
    traced = make_fx(step, tracing_mode=tracing_mode)(x, target)
    torch.testing.assert_close(traced(x * 2, target), step(x * 2, target))


def test_checkpointed_loss(batch):
    x, target = batch
    loss = torch.utils.checkpoint.checkpoint(lambda x: gradamp.exp_ga(x * 2, target), x, use_reentrant=False)
    expected = torch.autograd.grad(gradamp.exp_ga(x * 2, target), x)
    torch.testing.assert_close(torch.autograd.grad(loss, x), expected)


def test_autocast_and_grad_scaler():
    torch.manual_seed(0)
    x, target = torch.randn(64, 20), torch.randint(10, (64,))
    for dtype in (torch.bfloat16, torch.float16):
        net = nn.Linear(20, 10)
        (exact,) = torch.autograd.grad(gradamp.exp_ga(net(x), target), net.weight)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        with torch.autocast("cpu", dtype):
            logits = net(x)
            loss = gradamp.exp_ga(logits, target)
        assert logits.dtype == dtype and loss.dtype == torch.float32
        scaler.scale(loss).backward()
        grad = net.weight.grad / scaler.get_scale()
        assert (grad - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


# ---- what backward does with the saved gradient ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_backward_twice_and_with_any_factor(batch, dtype, reduction):
    x, target = batch[0].detach().to(dtype).requires_grad_(), batch[1]
    loss = gradamp.exp_ga(x, target, reduction=reduction)
    ones = torch.ones_like(loss)
    (first,) = torch.autograd.grad(loss, x, ones * 2, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, x, ones * 3, retain_graph=True)
    torch.testing.assert_close(second, kept * 1.5)
    assert torch.equal(first, kept), "a second pass changed the first one's result"
    first.zero_()
    second.zero_()
    (third,) = torch.autograd.grad(loss, x, ones)
    torch.testing.assert_close(third, kept / 2)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x, ones)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("last", [False, True])
def test_scaling_in_place(dtype, last):
    grad = torch.randn(3, 5, 37).to(dtype)
    grad = grad.movedim(1, -1).contiguous().movedim(-1, 1) if last else grad
    for factor in (torch.tensor(1.5), torch.tensor(1.0), torch.rand(3, 37)):
        expected = (grad.double() * (factor.unsqueeze(1) if factor.ndim else factor)).to(dtype)
        scaled = grad.clone()
        assert scaled.stride() == grad.stride()
        _ops.scale_(scaled, factor)
        torch.testing.assert_close(scaled, expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_no_gradient_is_computed_without_need(batch):
    x, target = batch
    with torch.no_grad():
        assert gradamp.exp_ga(x, target, inplace=True).requires_grad is False
    before = x.detach().clone()
    gradamp.exp_ga(x.detach(), target, inplace=True)
    assert torch.equal(x, before)


def test_in_place(batch):
    x, target = batch
    expected = torch.autograd.grad(gradamp.exp_ga(x * 2, target) * 3, x)[0]
    logits = x * 2
    address = logits.data_ptr()
    loss = gradamp.exp_ga(logits, target, inplace=True)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, x)[0], expected)
    assert logits.data_ptr() == address and not torch.equal(logits, x * 2)
    with pytest.raises(ValueError, match="contiguous or channels-last"):
        gradamp.exp_ga((x * 2)[:, ::2], target.clamp(0, 2), inplace=True)


def test_in_place_misuse_is_noticed(batch):
    x, target = batch
    logits = torch.exp(x)  # saves its output, which the loss then overwrites
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradamp.exp_ga(logits, target, inplace=True).backward()
    for once in ({"create_graph": True}, {"retain_graph": True}):
        loss = gradamp.exp_ga(x * 1, target, inplace=True)
        with pytest.raises(NotImplementedError, match=r"gradamp\.reference"):
            torch.autograd.grad(loss, x, **once)
            torch.autograd.grad(loss, x)


def test_four_losses_swap_by_name():
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 2, -1])
    for name in ("cross_entropy", "exp_ga", "pow3_ga", "linear_mse"):
        loss = gradamp.make_loss(name, ignore_index=-1, weight=torch.ones(3), reduction="sum")
        assert loss(x, target).shape == () and "weight" in loss.state_dict()
    with pytest.raises(ValueError, match="unknown loss 'mse'; there are cross_entropy, exp_ga, pow3_ga, linear_mse"):
        gradamp.make_loss("mse")
    assert repr(gradamp.ExpGALoss()) == ("ExpGALoss(alpha=0.5, max_input=16, target_values=(0, 2), reduction='mean')")
    torch.testing.assert_close(gradamp.Pow3GALoss(alpha=0.1, beta=1)(x, target.clamp(0)),
                               gradamp.pow3_ga(x, target.clamp(0), alpha=0.1, beta=1))  # fmt: skip


def test_defaults_and_texts_are_the_same_everywhere():
    for kind, functions in {
        "exp": (gradamp.exp_ga, gradamp.linear_exp_ga, gradamp.parallel_linear_exp_ga, gradamp.ExpGALoss),
        "pow3": (gradamp.pow3_ga, gradamp.linear_pow3_ga, gradamp.parallel_linear_pow3_ga, gradamp.Pow3GALoss),
        "linear": (gradamp.linear_mse, gradamp.LinearMSELoss),
    }.items():
        defaults = []
        for f in functions:
            named = inspect.signature(f).parameters.values()
            defaults.append({p.name: p.default for p in named if p.kind is p.KEYWORD_ONLY})
            assert not re.search(r"\{[a-z0-9 ]+\}", f.__doc__)
        assert all(d == defaults[0] for d in defaults), kind
        for name, value in defaults[0].items():
            shown = f"({value[0]:g}, {value[1]:g})" if isinstance(value, tuple) else f"{value:g}"
            texts = [line for f in functions if not inspect.isclass(f) for line in f.__doc__.splitlines()]
            assert sum(
                line.strip().startswith(f"{name} : ") and line.endswith(f"default {shown}") for line in texts
            ) == (len(functions) - 1)


def test_presets():
    for name, preset in gradamp.PRESETS.items():
        loss = preset.make_loss(reduction="sum")
        assert name.endswith("/" + preset.loss)
        assert loss(torch.randn(4, 10), torch.arange(4)).isfinite()
    a = gradamp.PRESETS["cnn10/pow3_ga"].make_loss().amplifier
    assert (a.alpha, a.beta, a.target_values) == (0.001, 0.4, (-2.0, 10.0))
    assert gradamp.PRESETS["pyramidnet110-cifar10/exp_ga"].learning_rate == 0.2


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 5, 3)])
def test_predict_proba(shape):
    logits = torch.randn(shape) * 8
    axis = 0 if len(shape) == 1 else 1
    for loss in ("cross_entropy", "exp_ga", "pow3_ga", "linear_mse", gradamp.ExpGALoss(max_input=2.0)):
        p = gradamp.predict_proba(logits, loss)
        assert p.shape == logits.shape and (p >= 0).all()
        torch.testing.assert_close(p.sum(axis), torch.ones(p.sum(axis).shape))
        if loss != "linear_mse":
            assert torch.equal(p.argmax(axis), logits.argmax(axis))
    torch.testing.assert_close(
        gradamp.predict_proba(logits.clamp(max=16), "exp_ga"), logits.clamp(max=16).softmax(axis)
    )


def test_predict_proba_by_hand():
    loss = gradamp.LinearMSELoss()
    p = gradamp.predict_proba(torch.tensor([[1.0, -1.0, -3.0], [0.0, 1.0, 0.0], [-2.0, -2.0, -2.0]]), loss)
    torch.testing.assert_close(p, torch.tensor([[1.0, 0, 0], [0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]]))
    y = np.array([0.5 * math.e**2 * 2, 0.5])  # max_input 2: x = 3 is on the line
    p = gradamp.predict_proba(torch.tensor([[3.0, 0.0]], dtype=torch.float64), gradamp.ExpGALoss(max_input=2))
    np.testing.assert_allclose(p[0].numpy(), y / y.sum(), rtol=1e-12)
    far = torch.tensor([[-1000.0, -1001.0]])
    torch.testing.assert_close(gradamp.predict_proba(far, "exp_ga"), far.softmax(1))
    with pytest.raises(TypeError, match="expected a loss of gradamp"):
        gradamp.predict_proba(far, nn.MSELoss())


def test_checks_hold_under_transforms():
    x, target = torch.randn(4, 5), torch.tensor([0, 1, 4, 2])

    def value(target, **options):
        return torch.func.grad_and_value(lambda x: gradamp.exp_ga(x, target, **options))(x)

    assert torch.isfinite(value(target)[1]) and torch.isfinite(value(torch.tensor([0, -100, 4, 2]))[1])
    with pytest.raises(IndexError, match="expected class indices from 0 to 4 or -100, got 99"):
        value(torch.tensor([0, 1, 4, 99]))
    for wrong in (torch.tensor([0]), torch.rand(1, 5)):
        with pytest.raises(ValueError, match="expected"):
            value(wrong)
    with pytest.raises(TypeError, match="int64"):
        value(target.int())
    with pytest.raises(ValueError, match="expected weight of shape"):
        value(target, weight=torch.rand(9))
    w = torch.randn(5, 7)
    with pytest.raises(IndexError, match="got 99"):
        torch.func.grad(lambda h: gradamp.linear_exp_ga(h, w, None, torch.tensor([99, 0])))(torch.randn(2, 7))
    for each in (torch.vmap(gradamp.exp_ga), torch.vmap(torch.func.grad(gradamp.exp_ga))):
        assert each(x[:, None], target[:, None]).isfinite().all()
        with pytest.raises(IndexError, match="got 99"):
            each(x[:, None], torch.tensor([[0], [1], [99], [2]]))
    with pytest.raises(IndexError, match="got 99"):
        torch.func.functionalize(gradamp.exp_ga)(x, torch.tensor([0, 1, 4, 99]))


def test_forward_mode():
    x, v, target = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 4, 2])
    wanted = (torch.func.grad(lambda x: gradamp.exp_ga(x, target))(x) * v).sum()
    for given in (x, x.clone().requires_grad_()):
        with forward_ad.dual_level():
            loss = gradamp.exp_ga(forward_ad.make_dual(given, v), target)
            torch.testing.assert_close(forward_ad.unpack_dual(loss).tangent, wanted)


def test_targets_of_another_shape_than_hidden():
    hidden, w = torch.randn(2, 3, 7), torch.randn(5, 7)
    target = torch.tensor([[0, 1, 2], [3, 4, 0]])
    assert torch.isfinite(gradamp.linear_exp_ga(hidden, w, None, target))
    with pytest.raises(ValueError, match=r"expected target of shape \(2, 3\) for hidden \(2, 3, 7\), got \(3, 2\)"):
        gradamp.linear_exp_ga(hidden, w, None, target.t())
