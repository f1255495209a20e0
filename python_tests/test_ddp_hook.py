"""The hook of DistributedDataParallel, against the same scheme in one process."""

import copy
import itertools
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from ddp_cases import (
    compare_with_slow_scheme,
    loss_of,
    make_batch,
    make_model,
    make_optimizer,
    parameters_of,
    train,
    wrap,
)
from ranks import run_ranks
from test_distributed import bits_of
from weight_compression import CompressionConfig
from weight_compression.distributed import (
    CompressedProcessGroup,
    EntropyCompressionState,
    entropy_compression_hook,
    plot_stats,
    write_stats,
)


def train_as_the_slow_scheme(rank):
    seen, last = [], torch.zeros(())
    for error_feedback, start, named in itertools.product((True, False), (0, 2), (True, False)):
        model = make_model()
        state = EntropyCompressionState(
            config=CompressionConfig(floor_bits=2), error_feedback=error_feedback, start_iteration=start,
            module=model if named else None,
        )  # fmt: skip
        ddp = wrap(model, state, gradient_as_bucket_view=named)
        train(ddp, make_optimizer(model), rank, range(6))
        assert state.iteration == 6
        seen.append(bits_of(parameters_of(model)))
        if not named:  # numbers are those of another order, in which owners differ
            assert (parameters_of(model) - last).norm() < 0.05 * last.norm()
            continue
        last = parameters_of(model)
        scheme = compare_with_slow_scheme(rank, model, state, range(6))
        if rank == 0:
            kept = state.state_dict()["residuals"]
            assert bool(kept) == error_feedback
            for (name, _), residual in zip(model.named_parameters(), scheme.residuals[0], strict=True):
                if error_feedback:
                    assert torch.equal(kept[name], residual)
        assert (scheme is None) == (rank > 0)
    return seen


def test_training_is_that_of_the_slow_scheme():
    seen = run_ranks(train_as_the_slow_scheme, 2)
    assert seen[0] == seen[1]


def error_feedback_recovers(rank):
    """With two bits of quantisation, means over many steps are right with error feedback alone."""
    errors = {}
    for error_feedback in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(100, 400, bias=False)
        state = EntropyCompressionState(
            config=CompressionConfig(bits=2), error_feedback=error_feedback, start_iteration=0, module=model
        )
        ddp = wrap(model, state)
        total, exact, steps = torch.zeros(400, 100), torch.zeros(400, 100), 40
        for _ in range(steps):
            ddp.zero_grad()
            weights = [torch.randn(400, 100, generator=torch.Generator().manual_seed(r)) for r in range(2)]
            x = torch.eye(100)
            (ddp(x) * weights[rank].T).sum().backward()
            total += model.weight.grad
            exact += (weights[0] + weights[1]) / 2
        errors[error_feedback] = float((total - exact).norm() / exact.norm())
    assert errors[True] < 0.1 < errors[False], errors
    return True


def test_error_feedback_makes_up_for_coarse_levels():
    run_ranks(error_feedback_recovers, 2)


def train_with_features(rank):
    seen = {}

    # join(): ranks that have run out of batches send zeros.
    model = make_model()
    state = EntropyCompressionState(module=model, start_iteration=1)
    ddp, optimizer = wrap(model, state), make_optimizer(model)
    counts = (6, 3)
    with ddp.join():
        train(ddp, optimizer, rank, range(counts[rank]))
    compare_with_slow_scheme(
        rank, model, state, range(6), lambda m, r, step: loss_of(m, r, step) if step < counts[r] else None
    )
    assert state.iteration == 6
    seen["join"] = bits_of(parameters_of(model))

    # no_sync(): gradients of two batches are reduced once.
    model = make_model()
    state = EntropyCompressionState(module=model, start_iteration=1)
    ddp, optimizer = wrap(model, state), make_optimizer(model)
    for step in range(4):
        optimizer.zero_grad()
        with ddp.no_sync():
            loss_of(ddp, rank, 2 * step).backward()
        loss_of(ddp, rank, 2 * step + 1).backward()
        optimizer.step()
    assert state.iteration == 4

    def two_batches(m, r, step):
        loss_of(m, r, 2 * step).backward()
        return loss_of(m, r, 2 * step + 1)

    compare_with_slow_scheme(rank, model, state, range(4), two_batches)
    seen["no_sync"] = bits_of(parameters_of(model))

    # A frozen layer, which DDP leaves out of its buckets.
    model = make_model()
    model[2].requires_grad_(False)
    frozen = model[2].weight.clone()
    state = EntropyCompressionState(module=model)
    train(wrap(model, state), make_optimizer(model), rank, range(5))
    assert torch.equal(model[2].weight, frozen)
    assert "2.weight" not in state.state_dict()["residuals"]
    seen["frozen"] = bits_of(parameters_of(model))

    # Layers that not every step uses, on one rank or on all.
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = make_model(), make_model()

        def forward(self, x, both):
            return self.a(x) + self.b(x) if both else self.a(x)

    model = Branches()
    state = EntropyCompressionState(module=model, start_iteration=0)
    ddp, optimizer = wrap(model, state, find_unused_parameters=True), make_optimizer(model)
    for step in range(6):
        x, y = make_batch(rank, step)
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(x, step >= 4 or (step % 2 == 0 and rank == 0)), y).backward()
        if step % 2 == 1 and step < 4:
            assert all(p.grad is None for p in model.b.parameters())
        else:
            assert all(bool(p.grad.any()) for p in model.b.parameters())
        optimizer.step()
    seen["unused"] = bits_of(parameters_of(model))

    # Buckets of several dtypes.
    model = make_model()
    model[2].to(torch.float64)
    model[4].to(torch.bfloat16)

    def mixed_loss(m, r, step):
        x, y = make_batch(r, step)
        return nn.functional.mse_loss(m(x), y)

    class Mixed(nn.Sequential):
        def forward(self, x):
            for layer in self:
                dtype = next((p.dtype for p in layer.parameters()), None)
                x = layer(x if dtype is None else x.to(dtype))
            return x

    model = Mixed(*model)
    state = EntropyCompressionState(module=model)
    ddp, optimizer = wrap(model, state), make_optimizer(model)
    train(ddp, optimizer, rank, range(5), mixed_loss)
    residuals = state.state_dict()["residuals"]
    assert residuals["2.weight"].dtype == torch.float64
    assert residuals["4.weight"].dtype == residuals["0.weight"].dtype == torch.float32
    assert bool(residuals["2.weight"].any())
    assert bool(residuals["4.weight"].any())
    seen["mixed"] = bits_of(parameters_of(model))

    # Two models in one backward pass, and parameters of no and of one element.
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.empty, self.scale = (
                make_model(),
                nn.Parameter(torch.zeros(0)),
                nn.Parameter(torch.ones(())),
            )

        def forward(self, x):
            return self.inner(x) * self.scale + self.empty.sum()

    models = [Odd(), make_model()]
    ddps = [wrap(m, EntropyCompressionState(module=m, start_iteration=0), static_graph=True) for m in models]
    optimizers = [make_optimizer(m) for m in models]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(loss_of(ddp, rank, step) for ddp in ddps).backward()
        for optimizer in optimizers:
            optimizer.step()
    seen["two"] = bits_of(torch.cat([parameters_of(m) for m in models]))

    # Autocast and a scaler, with an overflow on one rank: all ranks skip that step.
    model = make_model()
    state = EntropyCompressionState(module=model)
    ddp, optimizer = wrap(model, state), make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    scales = []
    for step in range(6):
        before = parameters_of(model)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(ddp, rank, step)
        if step == 3 and rank == 1:
            loss = loss * 3e38
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert torch.equal(parameters_of(model), before) == (step == 3)
    assert scales == [2.0**10] * 3 + [2.0**9] * 3
    assert all(bool(torch.isfinite(r).all()) for r in state.state_dict()["residuals"].values())
    seen["amp"] = bits_of(parameters_of(model))
    return seen


def test_features_of_ddp():
    seen = run_ranks(train_with_features, 2)
    assert seen[0] == seen[1]


def train_in_groups(rank):
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    model = make_model()
    state = EntropyCompressionState(group, module=model, start_iteration=1)
    train(wrap(model, state, process_group=group), make_optimizer(model), rank, range(4))
    return bits_of(parameters_of(model))


def test_groups_train_by_themselves():
    seen = run_ranks(train_in_groups, 4)
    assert seen[0] == seen[1] != seen[2] == seen[3]


def train_compiled(rank):
    seen = []
    for backend in (None, "aot_eager"):
        model = make_model()
        state = EntropyCompressionState(module=model, start_iteration=0)
        ddp = wrap(model, state, bucket_cap_mb=None)
        train(ddp if backend is None else torch.compile(ddp, backend=backend), make_optimizer(model), rank, range(3))
        seen.append(parameters_of(model))
    model = make_model()
    state = EntropyCompressionState(module=model, start_iteration=0)
    ddp = wrap(torch.compile(model, backend="aot_eager"), state, bucket_cap_mb=None)
    train(ddp, make_optimizer(model), rank, range(3))
    seen.append(parameters_of(model))
    for compiled in seen[1:]:
        assert (compiled - seen[0]).norm() < 1e-3 * seen[0].norm()
    return [bits_of(x) for x in seen]


def test_compiled_models():
    seen = run_ranks(train_compiled, 2)
    assert seen[0] == seen[1]


def train_with_the_compiled_reducer(rank):
    torch._dynamo.config.optimize_ddp = "python_reducer"
    model = make_model()
    ddp = wrap(model, EntropyCompressionState(module=model), bucket_cap_mb=None)
    compiled = torch.compile(ddp, backend="eager")
    with pytest.raises(NotImplementedError, match="optimize_ddp at its default"):
        train(compiled, make_optimizer(model), rank, [0])
    return True


def test_the_compiled_reducer_is_refused():
    run_ranks(train_with_the_compiled_reducer, 2)


def make_run(rank, model=None, named=True, **options):
    model = make_model() if model is None else model
    state = EntropyCompressionState(config=CompressionConfig(floor_bits=3), module=model if named else None, **options)
    return model, state, wrap(model, state), make_optimizer(model)


def resume_training(rank):
    for named, options in itertools.product((True, False), ({}, {"mode": "auto", "start_iteration": 1})):
        model, state, ddp, optimizer = make_run(rank, named=named, **options)
        train(ddp, optimizer, rank, range(9))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), state.state_dict()))
        pickled = pickle.dumps(state)
        # Two more, so that what was saved is seen not to share memory.
        train(ddp, optimizer, rank, range(9, 18))
        expected = parameters_of(model)
        modes = [step["mode"] for step in state.stats()["by_step"]]
        if options:
            assert modes[:1] == ["raw"] and len(set(modes)) > 1
            options = {**options, "decisions": state.decisions}

        resumed, again, ddp, optimizer = make_run(rank, named=named, **options)
        resumed.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))  # it does not copy momentum
        again.load_state_dict(saved[2])
        train(ddp, optimizer, rank, range(9, 18))
        assert [step["mode"] for step in again.stats()["by_step"]] == modes[9:]
        assert torch.equal(parameters_of(resumed), expected), (named, options)
        assert again.iteration == 18

        if options:
            continue
        unpickled = pickle.loads(pickled)
        resumed = make_model()
        resumed.load_state_dict(saved[0])
        if named:
            unpickled.name_parameters(resumed)
        optimizer = make_optimizer(resumed)
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        train(wrap(resumed, unpickled), optimizer, rank, range(9, 18))
        assert torch.equal(parameters_of(resumed), expected)
        assert len(unpickled.stats()["by_step"]) == 18

    model, state, ddp, optimizer = make_run(rank)
    train(ddp, optimizer, rank, range(3))
    saved = state.state_dict()
    other = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="parameters of this model"):
        EntropyCompressionState(module=other).load_state_dict(saved)
    with pytest.raises(ValueError, match="made with module in the same way"):
        EntropyCompressionState().load_state_dict(saved)
    return bits_of(expected)


def test_resumed_training_is_the_same_bit_by_bit():
    seen = run_ranks(resume_training, 2)
    assert seen[0] == seen[1]


def reject_nonfinite(rank, mode):
    model = make_model()
    state = EntropyCompressionState(module=model, nonfinite="raise", start_iteration=0, mode=mode)
    ddp, optimizer = wrap(model, state), make_optimizer(model)
    train(ddp, optimizer, rank, range(2))
    before = parameters_of(model)
    for step in range(2, 22, 2):  # all ranks may go on, and nothing of the last step may get into the next one
        with pytest.raises(RuntimeError, match="NonFiniteError"):
            train(ddp, optimizer, rank, [step], lambda m, r, s: loss_of(m, r, s) * (math.inf if r == 0 else 1.0))
        assert torch.equal(parameters_of(model), before)
        train(ddp, optimizer, rank, [step + 1])
        before = parameters_of(model)
    assert bool(torch.isfinite(parameters_of(model)).all())
    return bits_of(parameters_of(model))


@pytest.mark.parametrize("mode", ["coded", "raw"])
def test_nonfinite_gradients_raise_on_all_ranks(mode):
    seen = run_ranks(reject_nonfinite, 2, mode)
    assert seen[0] == seen[1]


def compose(rank):
    """With torch's own wrappers and hooks; all come close to training without compression."""
    seen = {}
    plain = make_model()
    ddp = DistributedDataParallel(plain, bucket_cap_mb=0.1)
    train(ddp, make_optimizer(plain), rank, range(8))
    expected = parameters_of(plain)
    moved = (expected - parameters_of(make_model())).norm()

    model = make_model()
    hook = default_hooks.fp16_compress_wrapper(entropy_compression_hook)
    train(wrap(model, EntropyCompressionState(module=model), hook), make_optimizer(model), rank, range(8))
    assert (parameters_of(model) - expected).norm() < 0.05 * moved
    seen["fp16"] = bits_of(parameters_of(model))

    for mode in ("raw", "bf16", "coded"):
        model = make_model()
        train(wrap(model, EntropyCompressionState(mode=mode)), make_optimizer(model), rank, range(8))
        difference = (parameters_of(model) - expected).norm()
        assert difference == 0 if mode == "raw" else 0 < difference < 0.05 * moved, (mode, difference, moved)
        seen[mode] = bits_of(parameters_of(model))

    models = []
    for group in (None, CompressedProcessGroup(config=CompressionConfig(floor_bits=8))):
        model = make_model()
        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=2, start_powerSGD_iter=2)
        # One bucket: of several, over gloo, this hook's callbacks call all_reduce in an order that timing decides.
        train(wrap(model, state, powerSGD_hook.powerSGD_hook, bucket_cap_mb=100), make_optimizer(model), rank, range(8))
        models.append(parameters_of(model))
    difference = (models[0] - models[1]).norm()
    assert 0 < difference < 0.05 * moved, (difference, moved)
    seen["powersgd"] = bits_of(models[1])

    # Whatever else takes a group.
    group = CompressedProcessGroup()
    x = torch.linspace(-1, 1, 5000) * (1 + rank)
    coded, plain, whole = x.clone(), x.clone(), torch.arange(5000)
    dist.all_reduce(coded, group=group)
    dist.all_reduce(plain)
    assert not torch.equal(coded, plain)
    torch.testing.assert_close(coded, plain, rtol=0, atol=0.05)
    dist.all_reduce(whole, group=group)  # not floating point
    assert torch.equal(whole, 2 * torch.arange(5000))
    dist.all_reduce(x, dist.ReduceOp.MAX, group)
    assert torch.equal(x[-1], torch.tensor(2.0))
    outs = [torch.empty(3) for _ in range(2)]
    dist.all_gather(outs, torch.full((3,), float(rank)), group)
    assert outs[1].tolist() == [1.0] * 3
    seen["group"] = bits_of(coded)
    return seen


def test_composes_with_torchs_wrappers_hooks_and_groups():
    seen = run_ranks(compose, 2)
    assert seen[0] == seen[1]


def count(rank, path):
    model = make_model()
    state = EntropyCompressionState(module=model, start_iteration=1, keep_steps=4)
    train(wrap(model, state), make_optimizer(model), rank, range(6))
    stats = state.stats()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert stats["steps"] == 6
    assert [step["step"] for step in stats["by_step"]] == [2, 3, 4, 5]
    assert stats["bytes_before"] == 6 * 4 * sum(sizes.values())
    assert stats["ratio"] == stats["bytes_before"] / stats["bytes_sent"]
    for step in stats["by_step"]:
        assert step["mode"] == "coded"
        assert {name: layer["numel"] for name, layer in step["layers"].items()} == sizes
        assert step["layers"]["0.bias"]["bits_per_weight"] == 32
        assert 4 < step["layers"]["4.weight"]["bits_per_weight"] < 9
        assert 1 < step["layers"]["4.weight"]["entropy"] < 4
        assert 3.5 < step["bytes_before"] / step["bytes_sent"] < 8
        assert step["seconds_coding"] > 0
    if rank == 0:
        plot_stats(stats, path)
        written = []
        write_stats(stats, SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar)))
        tags = {tag for tag, _, _ in written}
        assert {"traffic/bytes_sent", "bits_per_weight/4.weight", "entropy/4.weight"} <= tags
    with pytest.raises(ValueError, match="got none"):
        plot_stats(EntropyCompressionState().stats(), path)
    return [step["layers"] for step in stats["by_step"]]


def test_stats(tmp_path):
    seen = run_ranks(count, 2, str(tmp_path / "stats.png"))
    assert seen[0] == seen[1]
    assert (tmp_path / "stats.png").stat().st_size > 1000


def choose(rank):
    """'auto' on all ranks alike, and never anything but what it says."""
    model = make_model()
    state = EntropyCompressionState(module=model, mode="auto", start_iteration=2)
    train(wrap(model, state), make_optimizer(model), rank, range(20))
    modes = [step["mode"] for step in state.stats()["by_step"]]
    assert modes[:6] == ["raw"] * 6
    assert modes[6:10] == ["bf16"] * 4
    assert len(set(modes[-4:])) == 1
    return modes, state.decisions, bits_of(parameters_of(model))


def test_auto_is_the_same_choice_on_all_ranks():
    seen = run_ranks(choose, 2)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"start_iteration": -1}, "start_iteration"),
        ({"mode": "fp8"}, "mode"),
        ({"decisions": [(0, "raw")]}, "expected mode 'auto'"),
        ({"mode": "auto", "decisions": [(0, "fp8")]}, "decisions"),
        ({"nonfinite": "ignore"}, "nonfinite"),
        ({"keep_steps": 0}, "keep_steps"),
        ({"config": CompressionConfig(nonfinite="raw")}, "nonfinite"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=text):
        EntropyCompressionState(**options)


def test_no_group():
    with pytest.raises(ValueError, match="init_process_group"):
        CompressedProcessGroup()
