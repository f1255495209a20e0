"""Decision blocks: their layers, the budget that they keep and fill, and what happens where none can."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import layerwise as lw
from layerwise import decision
from layerwise.decision import _largest
from layerwise_cases import ADAM, cnn, loader

CLASSES = 10

pytestmark = pytest.mark.usefixtures("one_thread")


def dll(head, units: int = 3, **changes) -> lw.Method:
    method = lw.Method("dll", lambda n: lw.bottom_up(min(n, units), 1), head=head, optimizer=ADAM)
    return replace(method, **changes)


def images(n: int = 64) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8)


def sized(head, model=None, window=(1, 1), example=None, **changes) -> tuple[dict[str, int], lw.Chain]:
    """The sizes that a block is given in a window."""
    chain = lw.split(model or cnn(16))
    trainer = lw.LayerwiseTrainer(chain, dll(head, **changes), classes=CLASSES)
    return trainer.windows.make(window, images() if example is None else example, 1).sizes, chain


def measured(chain, sizes, window) -> lw.WindowMemory:
    """What a block of given sizes takes."""
    method = dll(lw.DecisionBlock(**sizes))
    return lw.memory_report(chain, method, images(), CLASSES, window=window, measure=True).rows[0]


# ---- layers ----


def kinds(module: nn.Module) -> list[str]:
    return [type(m).__name__ for m in module.modules() if not list(m.children())]


def test_of_images():
    head = lw.build_head(lw.DecisionBlock(convs=3, channels=7), torch.rand(4, 5, 16, 16), CLASSES)
    assert kinds(head) == ["Conv2d", "BatchNorm2d", "ReLU"] * 3 + ["Pool", "Flatten", "Linear"]
    assert [m.stride for m in head if isinstance(m, nn.Conv2d)] == [(2, 2)] * 3
    assert head[:9](torch.rand(4, 5, 16, 16)).shape == (4, 7, 2, 2)
    assert head(torch.rand(4, 5, 16, 16)).shape == (4, CLASSES)
    head = lw.build_head(lw.DecisionBlock(convs=1, channels=7, pool=2), torch.rand(4, 5, 16, 16), CLASSES)
    assert head[-1].in_features == 28


def test_of_tokens_and_features():
    tokens = torch.rand(4, 9, 32)
    head = lw.build_head(lw.DecisionBlock(convs=2, channels=24), tokens, CLASSES)
    assert [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, nn.Linear)] == [
        (32, 24), (24, 12), (12, 10),
    ]  # fmt: skip
    assert head(tokens).shape == (4, CLASSES)
    features = torch.rand(4, 64)
    head = lw.build_head(lw.DecisionBlock(convs=3, channels=32), features, CLASSES)
    assert [m.out_features for m in head if isinstance(m, nn.Linear)] == [32, 16, CLASSES, CLASSES]
    assert head(features).shape == (4, CLASSES)


def test_defaults_without_a_budget():
    head = lw.build_head(lw.DecisionBlock(), torch.rand(2, 6, 6, 6), CLASSES)
    assert sum(isinstance(m, nn.Conv2d) for m in head) == 3  # 6, 3, 2, 1
    assert head[0].out_channels == 6
    assert sized(lw.DecisionBlock())[0] == {"convs": 3, "channels": 16}


def test_affine_heads_see_everything():
    head = lw.build_head(lw.AffineHead(), torch.rand(2, 3, 4, 4), CLASSES)
    assert kinds(head) == ["Flatten", "Linear"]
    assert head[1].in_features == 48
    head = lw.build_head(lw.AffineHead((20, 30), 0.4), torch.rand(2, 3, 4, 4), CLASSES)
    assert [m.out_features for m in head if isinstance(m, nn.Linear)] == [20, 30, CLASSES]
    assert [m.p for m in head if isinstance(m, nn.Dropout)] == [0.4, 0.4]


# ---- budgets, in earnest ----


@pytest.mark.parametrize(
    ("budget", "reference", "window"),
    [(0.9, "total", (1, 1)), (1_700_000, "total", (0, 1)), (0.9, "activations", (0, 0))],
)
def test_a_budget_is_kept_and_filled(budget, reference, window):
    sizes, chain = sized(lw.DecisionBlock(budget, convs=2, reference=reference), window=window)
    assert sizes["convs"] == 2
    if isinstance(budget, float):
        whole = lw.backprop_memory(chain, dll(lw.LinearHead()), images(), CLASSES)
        budget *= whole.total if reference == "total" else whole.peak
    wider = {**sizes, "channels": sizes["channels"] + 1}
    need, more = (
        row.total if reference == "total" else row.step_peak
        for row in (measured(chain, sizes, window), measured(chain, wider, window))
    )
    assert need <= budget < more


def test_heads_that_were_trained_before_count():
    budget = lw.DecisionBlock(0.95, convs=1)
    chain = lw.split(cnn(16))
    whole = lw.backprop_memory(chain, dll(budget), images(), CLASSES).total
    trainer = lw.LayerwiseTrainer(cnn(16), dll(budget, 2), classes=CLASSES)
    resident = [*trainer.chain.parameters(), *trainer.chain.model.buffers()]
    data = loader(128, 64)
    use = lw.measure_memory(lambda: trainer.fit(data), resident)
    report = lw.memory_report(chain, dll(budget, 2), images(), CLASSES)
    assert report.rows[1].other_heads == report.rows[0].head
    assert 0.93 * whole <= report.total <= 0.95 * whole
    # the verification puts the unit's weights aside, while two samples of its output are there
    assert report.total <= use.total <= 0.95 * whole + report.rows[1].units + 2 * 16 * 64 * 4 + 4096
    assert trainer.trainings[1, 1].sizes["channels"] < trainer.trainings[0, 0].sizes["channels"]


def test_weights_to_go_back_to_count():
    method = dll(lw.DecisionBlock(0.95, convs=1), 2, stopping=lw.Stopping(restore_best=True))
    chain = lw.split(cnn(16))
    whole = lw.backprop_memory(chain, method, images(), CLASSES).total
    trainer = lw.LayerwiseTrainer(cnn(16), method, classes=CLASSES)
    trainer.fit(loader(128, 64), loader(64, 64))
    report = lw.memory_report(chain, method, images(), CLASSES)
    assert 0.93 * whole <= report.total <= 0.95 * whole
    assert [row.sizes for row in report.rows] == [trainer.trainings[i, i].sizes for i in (0, 1)]


def test_the_smallest_need_is_named_and_can_be_reached():
    message = (
        r"unit 1 \(3\): the budget is 20 % of full backpropagation's memory \(0\.\d+ MB\), and no decision block needs"
    )
    with pytest.raises(lw.BudgetError, match=message) as caught:
        sized(lw.DecisionBlock(0.2, max_convs=1))
    smallest = caught.value.smallest
    assert f"{smallest / 1e6:.4g} MB" in str(caught.value)
    assert sized(lw.DecisionBlock(smallest, max_convs=0))[0]["convs"] == 0
    with pytest.raises(lw.BudgetError):
        sized(lw.DecisionBlock(smallest - 1, max_convs=1))


def test_training_without_a_head_that_fits_ends_before_it_begins():
    model = cnn(16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = lw.LayerwiseTrainer(model, dll(lw.DecisionBlock(1000, max_convs=0)), classes=CLASSES)
    with pytest.raises(lw.BudgetError, match=r"the budget is 0.001 MB, and no decision block needs less than"):
        trainer.fit(loader(128, 64))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- the search, on costs that are a formula ----


class Costs:
    """A window of 1,000,000 bytes, a full backpropagation of 10,000,000, blocks by their sizes; measured, `workspace` more."""

    def __init__(self, monkeypatch, of_block, workspace=0):
        self.of_block, self.workspace, self.calls = of_block, workspace, 0
        monkeypatch.setattr(decision, "memory_report", self.report)
        monkeypatch.setattr(decision, "backprop_memory", lambda *a, **k: lw.MemoryUse(8_000_000, 2_000_000))

    def report(self, chain, method, *args, measure=False, **options):
        self.calls += 1
        total = 1_000_000 + self.of_block(method.head.convs, method.head.channels) + measure * self.workspace
        row = lw.WindowMemory((1, 1), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, total - 500_000, 0, total)
        return lw.MemoryReport((row,), 64, measure)


def quadratic(convs, channels):
    return convs * (3_000 * channels + 40 * channels**2)


def test_as_many_convolutions_as_come_close(monkeypatch):
    costs = Costs(monkeypatch, quadratic)
    assert sized(lw.DecisionBlock(0.3))[0] == {"convs": 3, "channels": 96}
    assert costs.calls <= 12
    assert sized(lw.DecisionBlock(0.3, max_convs=2))[0] == {"convs": 2, "channels": 125}
    # of 10,000,000, what three leave is less than half a point; of 3,000,000, it is more than half a percent
    assert sized(lw.DecisionBlock(3_000_000))[0] == {"convs": 2, "channels": 125}
    assert sized(lw.DecisionBlock(0.3, convs=1, channels=11))[0] == {"convs": 1, "channels": 11}
    # of the steps, 8,000,000 are for full backpropagation and 500,000 without a block
    assert sized(lw.DecisionBlock(0.3, reference="activations"))[0] == {"convs": 3, "channels": 93}


def test_the_closest_where_steps_are_coarse(monkeypatch):
    Costs(monkeypatch, lambda convs, channels: convs * (channels // 50) * 400_000)
    assert sized(lw.DecisionBlock(0.3))[0] == {"convs": 1, "channels": 299}  # 2,000,000; with three it is 1,200,000


def test_fewer_convolutions_where_narrow_ones_would_not_do(monkeypatch):
    Costs(monkeypatch, quadratic)
    assert sized(lw.DecisionBlock(0.3, min_channels=98))[0]["convs"] == 2
    assert sized(lw.DecisionBlock(0.3, min_channels=150))[0]["convs"] == 1
    assert sized(lw.DecisionBlock(0.3, min_channels=1000))[0]["convs"] == 0


def test_a_limit_on_the_width(monkeypatch):
    costs = Costs(monkeypatch, quadratic)
    assert sized(lw.DecisionBlock(0.3, max_channels=40))[0] == {"convs": 3, "channels": 40}
    assert costs.calls <= 5  # fewer convolutions are not tried


def test_linear_layers_narrow(monkeypatch):
    Costs(monkeypatch, quadratic)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    assert sized(lw.DecisionBlock(0.9), model, (0, 0), torch.rand(16, 64))[0] == {"convs": 4, "channels": 48}


def test_kernels_that_need_more_make_the_block_smaller(monkeypatch):
    Costs(monkeypatch, quadratic, workspace=500_000)
    assert sized(lw.DecisionBlock(0.3))[0] == {"convs": 3, "channels": 80}
    assert sized(lw.DecisionBlock(0.3, verify=False))[0] == {"convs": 3, "channels": 96}
    with pytest.raises(lw.BudgetError, match=r"no decision block needs less than 1.5 MB"):
        sized(lw.DecisionBlock(1_400_000))


def test_a_resumed_training_takes_the_sizes_of_its_checkpoint(tmp_path, monkeypatch):
    Costs(monkeypatch, lambda convs, channels: convs * channels * 50_000)
    method, path = dll(lw.DecisionBlock(0.3), 2), tmp_path / "run.pt"
    data = loader(128, 64, shuffle=False)

    def stop(trainer, rows):
        if rows[-1]["first"] == 1:
            raise KeyboardInterrupt

    def train(resume=False, **options):
        torch.manual_seed(0)
        trainer = lw.LayerwiseTrainer(cnn(16), method, classes=CLASSES, **options)
        trainer.fit(data, resume=resume)
        return trainer

    whole = train()
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=path, callbacks=[stop])
    searched = []
    search = decision._Search.run
    monkeypatch.setattr(decision._Search, "run", lambda self: searched.append(self.place.window) or search(self))
    resumed = train(checkpoint=path, resume=True)
    assert searched == [(1, 1)]  # the first window's sizes were known
    assert [t.sizes for t in resumed.trainings.values()] == [t.sizes for t in whole.trainings.values()]
    for a, b in zip(resumed.chain.parameters(), whole.chain.parameters(), strict=True):
        assert torch.equal(a, b)


@given(st.integers(0, 300), st.integers(0, 300), st.none() | st.integers(1, 400), st.integers(1, 50))
def test_the_search_finds_the_largest(limit, start, most, least):
    most = None if most is None else max(most, least)
    tried = []

    def excess(width):
        tried.append(width)
        return (width + (width // 7) ** 2) - limit

    found = _largest(excess, least, max(start, least), most)
    widths = range(least, (most or 1000) + 1)
    assert found == max((w for w in widths if w + (w // 7) ** 2 <= limit), default=None)
    assert all(w in widths or most is None for w in tried)
    assert len(tried) < 20


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "expected a positive number of bytes, got 0"),
        ({"budget": 1.5}, r"expected bytes \(an int\) or a fraction above 0 and up to 1, got 1.5"),
        ({"reference": "peak"}, "expected 'total' or 'activations', got 'peak'"),
        ({"channels": 0}, "expected positive channels"),
        ({"convs": -1}, "convs: expected at least 0"),
        ({"max_convs": -1}, "expected max_convs of at least 0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lw.DecisionBlock(**options)


def test_a_budget_needs_a_place():
    with pytest.raises(ValueError, match=r"a budget needs to be sized for a place in a chain \(size_for\)"):
        lw.build_head(lw.DecisionBlock(0.3), images(), CLASSES)
    with pytest.raises(ValueError, match="has not been sized yet"):
        _ = lw.DecisionBlock(0.3).sizes
    with pytest.raises(ValueError, match=r"expected features \(B, C\), tokens"):
        lw.build_head(lw.DecisionBlock(), torch.rand(2, 3, 4, 4, 4, 4), CLASSES)
