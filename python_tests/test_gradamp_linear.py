"""The linear layer and its loss in chunks of classes, alone and sharded over processes, against the unfused path."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing import spawn

import gradamp
from gradamp import linear
from gradamp.parallel import parallel_linear_exp_ga, parallel_linear_pow3_ga, shard_of_classes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
PAIRS = [(gradamp.linear_exp_ga, gradamp.exp_ga), (gradamp.linear_pow3_ga, gradamp.pow3_ga)]


def problem(n=9, d=6, c=700, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((n, d), (c, d), (c,)))
    target = torch.randint(c, (n,), generator=generator)
    target[2] = -100
    weight *= 0.5
    class_weight = torch.rand(c, generator=generator, dtype=torch.float64) + 0.1
    tensors = [t.to(device, dtype).requires_grad_() for t in (hidden, weight, bias)]
    return *tensors, target.to(device), class_weight.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("fused", "plain"), PAIRS)
@pytest.mark.parametrize("c", [1, 200, 257, 700])
def test_equals_the_unfused_path(device, fused, plain, c):
    hidden, weight, bias, target, class_weight = problem(c=c, device=device)
    for b in (bias, None):
        for options in ({}, {"reduction": "sum"}, {"class_weight": class_weight}):
            inputs = [t for t in (hidden, weight, b) if t is not None]
            loss = fused(hidden, weight, b, target, **options)
            plain_options = {"weight" if k == "class_weight" else k: v for k, v in options.items()}
            expected = plain(F.linear(hidden, weight, b), target, **plain_options)
            torch.testing.assert_close(loss, expected)
            for factor in (1.0, 2.5):
                grads = torch.autograd.grad(fused(hidden, weight, b, target, **options) * factor, inputs)
                torch.testing.assert_close(grads, torch.autograd.grad(expected * factor, inputs, retain_graph=True))


def test_leading_dimensions_and_gradients_that_nobody_needs():
    hidden, weight, bias, target, _ = problem(n=8)
    shaped = hidden.detach().view(2, 4, 6)
    loss = gradamp.linear_exp_ga(shaped, weight, bias.detach(), target.view(2, 4))
    expected = gradamp.linear_exp_ga(hidden, weight, bias, target)
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight))
    assert gradamp.linear_exp_ga(hidden.detach(), weight.detach(), None, target).requires_grad is False


def test_chunks_hold_a_sixteenth_of_the_classes_at_most():
    assert linear.chunk_classes(4096, 32000, 4) == 1024
    assert linear.chunk_classes(128, 32000, 4) == 2000
    assert linear.chunk_classes(1 << 20, 32000, 4) == 256
    assert linear.chunk_classes(0, 10, 4) == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype):
    hidden, weight, bias, target, _ = problem(n=40, c=900, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    grads = torch.autograd.grad(gradamp.linear_exp_ga(hidden, weight, bias, target), (hidden, weight, bias))
    expected = torch.autograd.grad(gradamp.exp_ga(F.linear(*exact), target), exact)
    # e^x turns an error of x into a relative one: logits of up to 10, rounded, and a gradient rounded once more.
    for grad, e in zip(grads, expected, strict=True):
        assert grad.dtype == dtype and (grad.double() - e).norm() <= 20 * torch.finfo(dtype).eps * e.norm()


def test_means_over_many_float16_samples():
    """A gradient of y - t divided by N is below float16's range, one of the sum above it."""
    torch.manual_seed(0)
    n, d, c = 20_000, 8, 300
    hidden, weight = (torch.rand(*s) for s in ((n, d), (c, d)))
    bias, target = torch.full((c,), -6.0), torch.randint(c, (n,))
    half = [t.half().requires_grad_() for t in (hidden, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in half]
    (gradamp.linear_exp_ga(*half, target) * 2.0**16).backward()
    (gradamp.exp_ga(F.linear(*exact), target) * 2.0**16).backward()
    for ours, theirs in zip(half, exact, strict=True):
        assert (ours.grad - theirs.grad).norm() <= 4 * torch.finfo(torch.float16).eps * theirs.grad.norm()


def test_backward_twice():
    hidden, weight, bias, target, _ = problem(n=40)
    for dtype in (torch.float64, torch.float16):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        loss = gradamp.linear_exp_ga(*inputs, target)
        first = torch.autograd.grad(loss * 2, inputs, retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.zero_()
        torch.testing.assert_close(torch.autograd.grad(loss * 4, inputs), tuple(2 * g for g in kept))


def test_autocast():
    hidden, weight, bias, target, _ = problem(n=40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(gradamp.linear_exp_ga(hidden, weight, bias, target), (hidden, weight, bias))
        expected = torch.autograd.grad(gradamp.exp_ga(F.linear(hidden, weight, bias), target), (hidden, weight, bias))
    for grad, e in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32 and (grad - e).norm() <= 0.02 * e.norm()


def test_as_part_of_torch():
    hidden, weight, bias, target, class_weight = problem(n=4, d=3, c=300)
    arguments = (hidden, weight, bias, target, class_weight, "exp", [0.5, 0.0, 16.0, 0.0, 2.0], "mean", -100, 0, 300)
    torch.library.opcheck(linear.linear_amplify, (*arguments, [True, True, True]))
    small = problem(n=3, d=2, c=4)
    f = lambda *inputs: gradamp.linear_exp_ga(*inputs, small[3] % 4)  # noqa: E731
    assert torch.autograd.gradcheck(f, small[:3]) and torch.autograd.gradgradcheck(f, small[:3])
    expected = torch.autograd.grad(f(*small[:3]), small[:3])
    torch.testing.assert_close(torch.func.grad(f, (0, 1, 2))(*(t.detach() for t in small[:3])), expected)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*small[:3]), small[:3]), expected)


def test_bad_input():
    hidden, weight, bias, target, _ = problem()
    with pytest.raises(ValueError, match=r"hidden \[..., D\] and weight \[C, D\]"):
        gradamp.linear_exp_ga(hidden[:, 1:], weight, bias, target)
    with pytest.raises(ValueError, match="bias of shape"):
        gradamp.linear_exp_ga(hidden, weight, bias[1:], target)
    with pytest.raises(TypeError, match="one floating-point dtype"):
        gradamp.linear_exp_ga(hidden, weight.float(), bias, target)
    with pytest.raises(TypeError, match="int64"):
        gradamp.linear_exp_ga(hidden, weight, bias, target.float())
    with pytest.raises(ValueError, match="expected target of shape"):
        gradamp.linear_exp_ga(hidden, weight, bias, target[1:])
    with pytest.raises(IndexError, match="out of bounds: expected 0 <= target < 700"):
        gradamp.linear_exp_ga(hidden, weight, bias, target + 800)
    with pytest.raises(ValueError, match="sum, mean"):
        gradamp.linear_exp_ga(hidden, weight, bias, target, reduction="none")
    with pytest.raises(ValueError, match="class"):
        gradamp.linear_exp_ga(hidden, weight, bias, target, class_weight=torch.ones(3))


# ---- sharded over processes ----


def test_shards_cover_the_classes():
    for classes, world in ((10, 3), (2, 4), (7, 7)):
        shards = [shard_of_classes(classes, rank, world) for rank in range(world)]
        assert [c for shard in shards for c in shard] == list(range(classes))
    with pytest.raises(ValueError, match="rank"):
        shard_of_classes(10, 3, 3)


def compare_shards(rank, world_size, store):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    torch.set_num_threads(1)
    c = 701
    hidden, weight, bias, target, class_weight = problem(c=c)
    shard = shard_of_classes(c, rank, world_size)
    here = slice(shard.start, shard.stop)
    for parallel, plain in ((parallel_linear_exp_ga, gradamp.exp_ga), (parallel_linear_pow3_ga, gradamp.pow3_ga)):
        for options in ({}, {"reduction": "sum"}, {"class_weight": class_weight}):
            parts = [hidden.detach(), weight[here].detach(), bias[here].detach()]
            parts = [p.clone().requires_grad_() for p in parts]
            loss = parallel(*parts, target, num_classes=c, **options)
            (loss * 3).backward()
            plain_options = {"weight" if k == "class_weight" else k: v for k, v in options.items()}
            expected = plain(F.linear(hidden, weight, bias), target, **plain_options)
            grads = torch.autograd.grad(expected * 3, (hidden, weight, bias))
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(parts[0].grad, grads[0])
            torch.testing.assert_close(parts[1].grad, grads[1][here])
            torch.testing.assert_close(parts[2].grad, grads[2][here])
    for dtype in (torch.float16, torch.bfloat16):
        parts = [p.detach().to(dtype).requires_grad_() for p in (hidden, weight[here], bias[here])]
        parallel_linear_exp_ga(*parts, target, num_classes=c).backward()
        (exact,) = torch.autograd.grad(gradamp.exp_ga(F.linear(hidden, weight, bias), target), hidden)
        assert parts[0].grad.dtype == dtype
        assert (parts[0].grad - exact).norm() <= 20 * torch.finfo(dtype).eps * exact.norm()
    parts = [p.detach().float().requires_grad_() for p in (hidden, weight[here], bias[here])]
    with torch.autocast("cpu", torch.bfloat16):
        loss = parallel_linear_exp_ga(*parts, target, num_classes=c)
    first = torch.autograd.grad(loss, parts, retain_graph=True)
    assert first[0].dtype == torch.float32 and (first[0] - exact).norm() <= 0.05 * exact.norm()
    torch.testing.assert_close(torch.autograd.grad(loss * 2, parts), tuple(2 * g for g in first))
    with torch.no_grad():
        assert not parallel_linear_exp_ga(*parts, target, num_classes=c).requires_grad
    with pytest.raises(NotImplementedError, match=r"gradamp\.reference"):
        torch.autograd.grad(parallel_linear_exp_ga(*parts, target, num_classes=c), parts, create_graph=True)
    with pytest.raises(NotImplementedError, match="class_weight"):
        parallel_linear_exp_ga(*parts, target, num_classes=c, class_weight=torch.ones(c, requires_grad=True))
    with pytest.raises(ValueError, match="expected weight of classes"):
        parallel_linear_exp_ga(hidden, weight, bias, target, num_classes=c)
    dist.destroy_process_group()


def test_sharded_over_two_processes(tmp_path):
    spawn(compare_shards, (2, str(tmp_path / "store")), nprocs=2)
