"""Ways of training side by side: that they are what they say, see the same, and keep the budget; and checkpointed chains."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import layerwise as lw
from layerwise import decision
from layerwise.compare import _Batches
from layerwise_cases import cnn, digits, loader

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 64
BASELINE = lw.backprop(epochs=2, lr=1e-2)


def model() -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(5):
        layers += [nn.Conv2d(12 if i else 1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10))


def data() -> tuple[TensorDataset, TensorDataset]:
    x, y = digits(500).tensors
    return TensorDataset(x[:400], y[:400]), TensorDataset(x[400:], y[400:])


def run(methods, **options) -> lw.Comparison:
    options = {"budget": 0.75, "epochs": 1, "batch_size": BATCH, "baseline": BASELINE, **options}
    return lw.compare(model, data(), methods, classes=10, progress=False, **options)


def greedy(epochs: int = 1) -> lw.Method:
    return lw.greedy(1, epochs=epochs, optimizer=lw.OptimizerSpec("adamw", 2e-3))


@pytest.fixture(scope="module")
def comparison() -> lw.Comparison:
    torch.set_num_threads(1)
    return run(["backprop", "checkpointing", "accumulation", greedy()], seeds=(0, 1))


# ---- the table ----


def test_every_way_has_its_row(comparison):
    rows = {row["method"]: row for row in comparison.rows}
    assert list(rows) == ["backprop", "checkpointing", "accumulation", "greedy1"]
    assert {row["batch"] for row in rows.values()} == {BATCH}
    assert [row["passes"] for row in rows.values()] == [2, 2, 2, 5]
    assert all(0 < row["accuracy"] <= 1 and row["seconds"] > 0 and row["std"] >= 0 for row in rows.values())
    assert len(comparison.runs) == 8
    assert {run["seed"] for run in comparison.runs} == {0, 1}
    accuracies = [run["accuracy"] for run in comparison.runs if run["method"] == "greedy1"]
    assert rows["greedy1"]["accuracy"] == sum(accuracies) / 2
    json.dumps(comparison.rows)


def test_peaks_are_measured_and_held_against_the_budget(comparison):
    assert comparison.budget == int(0.75 * comparison.backprop)
    for row in comparison.rows:
        assert row["peak_mb"] == row["predicted_mb"]
        assert row["kept"] == (row["peak_mb"] * 1e6 <= comparison.budget)
        assert row["of_backprop"] == row["peak_mb"] * 1e6 / comparison.backprop
    backprop, checkpointing, accumulation, _ = comparison.rows
    assert (backprop["kept"], backprop["micro_batch"], backprop["of_backprop"]) == (False, BATCH, 1.0)
    assert (checkpointing["kept"], checkpointing["micro_batch"]) == (True, BATCH)
    assert checkpointing["groups"] > 1
    assert (accumulation["kept"], accumulation["micro_batch"], accumulation["groups"]) == (True, BATCH // 2, None)


def test_checkpointing_is_backpropagation_to_the_bit(comparison):
    by_seed = {(r["method"], r["seed"]): r["accuracy"] for r in comparison.runs}
    for seed in (0, 1):
        assert by_seed["checkpointing", seed] == by_seed["backprop", seed]


def test_a_row_is_what_a_trainer_by_hand_reaches(comparison):
    torch.manual_seed(1)
    trainer = lw.LayerwiseTrainer(model(), BASELINE, classes=10, accumulate=2)
    train, test = data()
    generator = torch.Generator().manual_seed(1)
    batches = _Batches(len(train), BATCH, BATCH // 2, generator)
    trainer.fit(torch.utils.data.DataLoader(train, batch_sampler=batches, generator=generator))
    accuracy = trainer.evaluate([test.tensors])
    assert accuracy in [r["accuracy"] for r in comparison.runs if r["method"] == "accumulation" and r["seed"] == 1]


def test_the_table_says_it_all(comparison):
    lines = str(comparison).splitlines()
    assert lines[0].startswith("budget ")
    assert "75 % of backpropagation's" in lines[0]
    assert lines[1].split()[:3] == ["method", "accuracy", "std"]
    assert [line.split()[0] for line in lines[2:]] == ["backprop", "checkpointing", "accumulation", "greedy1"]


def test_the_plot(comparison, tmp_path):
    comparison.plot(tmp_path / "compared.png")
    assert (tmp_path / "compared.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected a name that ends in"):
        comparison.plot(tmp_path / "compared.nothing")


# ---- methods ----


def test_a_function_of_the_budget_makes_its_method():
    seen = []

    def method(budget: int) -> lw.Method:
        seen.append(budget)
        head = lw.DecisionBlock(budget, convs=1, channels=6)
        return lw.Method("dll", lambda n: lw.bottom_up(2, 1), head=head, optimizer=lw.OptimizerSpec("adam", 2e-3))

    result = run([method], budget=0.8)
    assert seen == [result.budget]
    (row,) = result.rows
    assert (row["method"], row["kept"], row["micro_batch"], row["passes"]) == ("dll", True, BATCH, 2)


def test_heads_are_sized_once(monkeypatch):
    searched = []
    search = decision._Search.run
    monkeypatch.setattr(decision._Search, "run", lambda self: searched.append(self.place.window) or search(self))

    def method(budget: int) -> lw.Method:
        head = lw.DecisionBlock(budget, convs=1, max_channels=12)
        return lw.Method("dll", lambda n: lw.bottom_up(2, 1), head=head, optimizer=lw.OptimizerSpec("adam", 2e-3))

    (row,) = run([method], budget=0.8, seeds=(0, 1)).rows
    assert row["kept"]
    assert searched == [(0, 0), (1, 1)]


def test_what_cannot_fit_is_said_and_not_run():
    result = run(["accumulation", lambda budget: lw.dll(budget, max_convs=0, epochs=1)], budget=1000, batch_size=4)
    for row in result.rows:
        assert (row["accuracy"], row["kept"], row["peak_mb"]) == (None, False, None)
        assert "MB with whatever micro-batch" in row["note"]
    assert str(result).splitlines()[-1].startswith("dll: does not fit: it needs ")
    assert result.runs == []
    with pytest.raises(ValueError, match="nothing to draw"):
        result.plot("never.png")


def test_units_by_method_and_what_compare_cannot_give():
    result = run(["greedy1", "greedy2"], budget=1.0, spec={"greedy1": ["0", "6"]})
    assert [row["passes"] for row in result.rows] == [2, 5]
    for method, message in (
        (lw.greedy(epochs=1, stopping=lw.Stopping(patience=1)), "'greedy1' goes by validation accuracy"),
        (lw.Method("c", lambda n: lw.bottom_up(n, 1, feed="cached")), "'c' feeds from a cache"),
    ):
        with pytest.raises(ValueError, match=message):
            run([method])


def test_small_micro_batches_make_tight_budgets():
    (row,) = run(["accumulation"], budget=0.2).rows
    assert row["kept"]
    assert 2 <= row["micro_batch"] < BATCH // 4


# ---- data ----


def test_all_see_the_same_samples_whatever_the_micro_batch():
    def passes(micro):
        batches = _Batches(100, 24, micro, torch.Generator().manual_seed(3))
        two = [list(batches), list(batches)]
        assert all(len(p) == len(batches) for p in two)
        return [[index for batch in p for index in batch] for p in two]

    assert passes(24) == passes(8) == passes(2)
    first, second = passes(24)
    assert first != second
    assert len(set(first)) == 96  # a batch that is not full is left out


def test_pairs_of_tensors_will_do():
    train, test = data()
    result = lw.compare(
        model, (train.tensors, test.tensors), [greedy()], classes=10, batch_size=BATCH, budget=0.9, progress=False
    )
    assert result.rows[0]["accuracy"] == run([greedy()], budget=0.9).rows[0]["accuracy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["sgd"]}, "expected backprop, checkpointing, accumulation, greedy1, .* got 'sgd'"),
        ({"budget": 2.0}, "expected bytes .* or a fraction above 0 and up to 1"),
        ({"budget": 0}, "expected bytes"),
        ({"batch_size": 1000}, "expected at least a batch of 1000 training samples, got 400"),
        ({"seeds": ()}, "seeds: expected at least one"),
    ],
)
def test_what_cannot_be_compared(options, message):
    with pytest.raises(ValueError, match=message):
        run(options.pop("methods", ["backprop"]), **options)


# ---- checkpointed chains ----


@pytest.mark.parametrize("starts", [(0, 1), (0, 2), (0, 1, 2)])
def test_recomputing_changes_memory_and_nothing_else(starts):
    batches = list(loader(200, shuffle=False))
    states, needs = [], []
    for groups in (None, starts):
        net = cnn(8, dropout=0.3)
        chain = lw.split(net) if groups is None else lw.checkpointed(lw.split(net), groups)
        needs.append(lw.memory_report(chain, lw.backprop(epochs=2), batches[0][0], 10, measure=True).total)
        trainer = lw.LayerwiseTrainer(chain, lw.backprop(epochs=2), classes=10)
        torch.manual_seed(0)
        trainer.fit(batches)
        states.append(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert needs[1] < needs[0]


def test_predicted_as_measured():
    chain = lw.checkpointed(lw.split(cnn(8, dropout=0.3)), (0, 1, 2))
    x = torch.rand(20, 1, 8, 8)
    predicted, measured = (lw.memory_report(chain, lw.backprop(), x, 10, measure=m).rows for m in (False, True))
    assert predicted == measured


def test_states_of_several_tensors_pass_through():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x):
            return self.c(x + self.b(self.a(x).relu()))

    net = Residual()
    x = torch.rand(4, 64)
    chain = lw.checkpointed(lw.split(net, ["a", "b", "c"]), (0, 1, 2))
    assert isinstance(chain.units[0](x), tuple)
    chain.check(x)
    net(x).sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    chain.train()
    chain(x).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))


@pytest.mark.parametrize("starts", [(), (1,), (0, 0), (0, 3), (0, 2, 1)])
def test_groups_ascend_within_the_chain(starts):
    with pytest.raises(ValueError, match="expected ascending numbers from 0 to below 3"):
        lw.checkpointed(lw.split(cnn()), starts)
