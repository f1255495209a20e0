"""Memory of a step, counted: against torch's profiler, against sums by hand, and where counting could go wrong."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from layerwise.memory import _CudaMeter, measure_memory, open_meter, saved_bytes, tensor_bytes

KB = 1024
FLOAT = 4


def profiled_peak(step) -> int:
    """Running sum of the profiler's allocations, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def training_step(model, x, make_optimizer=torch.optim.SGD):
    """A step of training, after a first one, and everything that is there before it."""
    optimizer = make_optimizer(model.parameters(), lr=0.1)
    y = torch.zeros(len(x), dtype=torch.long)

    def step():
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    return step, [*model.parameters(), *model.buffers(), x, y, *state]


def images(n: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16)


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32 * 64, 10),
    )  # fmt: skip


def transformer() -> nn.Sequential:
    return nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Flatten(), nn.Linear(320, 10))


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(128, 256),
        nn.Tanh(),
        nn.Linear(256, 10),
    )


# ---- against others ----


@pytest.mark.parametrize(
    ("make", "x", "scratch"),
    [
        (perceptron, torch.randn(96, 64), 0),
        (transformer, torch.randn(16, 10, 32), 0),
        (convolutions, images(), 0.05),  # convolutions lay kernels out anew for themselves
        (convolutions, images().to(memory_format=torch.channels_last), 0.05),
    ],
    ids=["perceptron", "transformer", "convolutions", "channels last"],
)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_profiler_sees_the_same_peak(make, x, scratch, optimizer):
    torch.manual_seed(0)
    model = make()
    if x.dim() == 4 and not x.is_contiguous():
        model = model.to(memory_format=torch.channels_last)
    step, resident = training_step(model, x, optimizer)
    counted = measure_memory(step, resident).peak
    assert 0 <= profiled_peak(step) - counted <= scratch * counted


def test_a_forward_pass_leaves_what_autograd_keeps():
    torch.manual_seed(0)
    model, x = perceptron(), torch.randn(96, 64)
    resident = [*model.parameters(), *model.buffers(), x]
    kept = saved_bytes(lambda: model(x).square().sum(), exclude=resident)
    with open_meter(resident) as meter:
        loss = model(x).square().sum()
        assert meter.live == kept + loss.nbytes
        loss.backward()
        del loss
        assert meter.live == tensor_bytes(model.parameters())  # the gradients
    batch = 96
    # the input of batch norm, the outputs of ReLU and dropout and its mask in float; what tanh gives and square gets; batch
    # norm's means and deviations
    assert kept == FLOAT * (4 * batch * 128 + batch * (256 + 10) + 2 * 128)


def test_a_first_step_makes_gradients_and_state_a_second_finds_the_state():
    model, x = nn.Linear(100, 50, bias=False), torch.randn(1, 100)
    optimizer = torch.optim.Adam(model.parameters())

    def step():
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    size = 100 * 50 * FLOAT
    first = measure_memory(step, [model.weight, x])
    second = measure_memory(step, [model.weight, x, *optimizer.state[model.weight].values()])
    assert first.resident == size + x.nbytes
    assert second.resident == 3 * size + x.nbytes + FLOAT
    assert first.peak - second.peak == 2 * size + FLOAT
    assert first.total == second.total


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 50)), max_size=40))
def test_any_order_of_making_and_freeing(events):
    held: list[torch.Tensor] = []
    live = peak = 0
    with open_meter() as meter:
        for make, number in events:
            if make:
                held.append(torch.zeros(number, dtype=torch.uint8))
                live += number
                peak = max(peak, live)
            elif held:
                live -= held.pop(number % len(held)).numel()
            assert (meter.live, meter.peak) == (live, peak)


# ---- what could be counted twice, or not at all ----


def test_views_and_changes_in_place_take_nothing():
    with open_meter() as meter:
        x = torch.zeros(KB, dtype=torch.uint8)
        views = [x[3:], x.view(2, -1), x.expand(5, -1), x.detach(), x.t(), x.unsqueeze(0).transpose(0, 1)]
        x.add_(1).mul_(2)
        views[1].zero_()
        assert meter.live == meter.peak == KB
        del x
        assert meter.live == KB  # the views hold it
        del views
        assert meter.live == 0


def test_a_storage_that_changes_its_size():
    with open_meter() as meter:
        x = torch.zeros(KB, dtype=torch.uint8)
        x.resize_(5 * KB)
        assert meter.live == 5 * KB
        x.untyped_storage().resize_(2 * KB)
        x.resize_(KB).add_(1)
        assert (meter.live, meter.peak) == (2 * KB, 5 * KB)


def test_what_was_there_before_counts_once_it_is_freed():
    before = [torch.zeros(3 * KB, dtype=torch.uint8)]
    with open_meter(before) as meter:
        after = torch.zeros(KB, dtype=torch.uint8)
        before.clear()
        assert meter.live == -2 * KB
        del after
        assert meter.live == -3 * KB
    assert meter.peak == KB


def test_an_address_that_is_used_again_is_another_storage():
    x = torch.zeros(KB, dtype=torch.uint8)
    with open_meter([x]) as meter:
        for _ in range(50):
            x = x + 1  # the next one may lie where the last but one lay
        assert meter.live == 0
        assert meter.peak == KB


def test_cycles_and_other_threads_free_too():
    class Node:
        pass

    with open_meter() as meter:
        node = Node()
        node.me, node.tensor = node, torch.zeros(KB, dtype=torch.uint8)
        del node
        gc.collect()
        assert meter.live == 0
        box = [torch.zeros(KB, dtype=torch.uint8)]
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
        assert meter.live == 0


def test_numbers_that_become_tensors_count():
    with open_meter() as meter:
        x = torch.tensor([1.0] * 100)
        assert meter.live == 400
        del x
        assert meter.live == 0


def test_sparse_tensors_lie_in_several_storages():
    indices, values = torch.tensor([[0, 1], [1, 0]]), torch.tensor([1.0, 2.0])
    sparse = torch.sparse_coo_tensor(indices, values, (2, 2), check_invariants=True)
    assert tensor_bytes([sparse]) == 32 + 8
    with open_meter([sparse]) as meter:
        other = sparse * 2.0
        assert meter.live >= tensor_bytes([other])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_keep_what_enters_them(reentrant):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)])
    x = torch.randn(256, 64, requires_grad=True)

    def plain():
        return model(x).sum()

    def checkpointed():
        h = x
        for part in (model[:4], model[4:]):
            h = checkpoint(part, h, use_reentrant=reentrant)
        return h.sum()

    exclude = [*model.parameters(), x]
    assert saved_bytes(plain, exclude) == 8 * 256 * 64 * FLOAT
    assert saved_bytes(checkpointed, exclude) == 256 * 64 * FLOAT  # the input is excluded, the middle is kept
    with_all, with_few = (measure_memory(lambda f=f: f().backward(), exclude).peak for f in (plain, checkpointed))
    assert with_few < 0.8 * with_all


def test_an_error_ends_the_count():
    def fail():
        torch.zeros(KB)
        raise KeyError("x")

    with pytest.raises(KeyError):
        measure_memory(fail)
    assert measure_memory(lambda: torch.zeros(KB, dtype=torch.uint8)).peak == KB


def test_meters_inside_meters():
    with open_meter() as outer:
        x = torch.zeros(KB, dtype=torch.uint8)
        with open_meter([x]) as inner:
            y = torch.zeros(2 * KB, dtype=torch.uint8)
            del x
        assert (inner.live, inner.peak) == (KB, 2 * KB)
        assert (outer.live, outer.peak) == (2 * KB, 3 * KB)
        del y


def test_marks_cut_the_time():
    with open_meter() as meter:
        x = torch.zeros(3 * KB, dtype=torch.uint8)
        del x
        assert meter.mark() == 3 * KB
        y = torch.zeros(KB, dtype=torch.uint8)
        assert meter.mark() == KB
        assert (meter.mark(), meter.peak) == (y.nbytes, 3 * KB)


# ---- CUDA's counts, on an allocator that is a number ----


class Allocator:
    def __init__(self):
        self.now = self.most = 7 * KB

    def use(self, size):
        self.now += size
        self.most = max(self.most, self.now)

    def reset(self, *_):
        self.most = self.now


def test_cuda_meters_share_one_peak(monkeypatch):
    allocator = Allocator()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: allocator.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: allocator.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", allocator.reset)
    device = torch.device("cuda", 0)
    with _CudaMeter(device) as outer:
        allocator.use(5 * KB)
        allocator.use(-4 * KB)
        with _CudaMeter(device) as inner:
            allocator.use(2 * KB)
            assert inner.mark() == 2 * KB
            allocator.use(-KB)
            assert (inner.live, inner.mark(), inner.peak) == (KB, 2 * KB, 2 * KB)
        assert (outer.live, outer.peak) == (2 * KB, 5 * KB)
        allocator.use(6 * KB)
        assert outer.mark() == 8 * KB
        allocator.use(-6 * KB)
    assert (outer.peak, outer._open) == (8 * KB, [])
