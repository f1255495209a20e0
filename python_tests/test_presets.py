"""Presets against the tables that they come from, and each of them in training."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise import presets
from layerwise_cases import cnn, loader

pytestmark = pytest.mark.usefixtures("one_thread")
UNITS = 6


def rates(method: lw.Method, window: int = 0) -> tuple[float, float]:
    return tuple(float(f"{x:.6g}") for x in method.rates(window))


def drops(method: lw.Method, epochs: int) -> list[int]:
    """Epochs after which the learning rate falls."""
    spec = method.optimizer
    return [e for e in range(1, epochs) if spec.drops(e, epochs) > spec.drops(e - 1, epochs)]


# ---- against the papers ----


def test_dll_is_table_6_3():
    method = lw.dll()
    assert [s.epochs for s in method.stages(UNITS)] == [300] * UNITS
    assert [s.windows for s in method.stages(3)] == [((0, 0),), ((1, 1),), ((2, 2),)]
    assert method.optimizer.name == "adamw"
    assert rates(method) == (3e-3, 1e-6)
    assert rates(method, 2) == (1.92e-3, 1.3225e-6)
    assert drops(method, 300) == [150, 225]
    assert method.optimizer.gamma == 0.1
    assert method.regularisation == lw.Regularisation(0.8, 0.95, gradient_dropout=0.6)
    assert method.head == lw.DecisionBlock(0.3, max_convs=4, reference="total")
    assert method.loss == "cross_entropy"
    assert (method.keep_heads, lw.dll(None).keep_heads, lw.dll(keep_heads=True).keep_heads) == (False, True, True)
    assert lw.dll(max_channels=64).head.max_channels == 64


def test_dll_first_is_table_6_1():
    method = lw.dll(variant="first")
    assert [s.epochs for s in method.stages(UNITS)] == [30, 40, 50, 60, 60, 60]
    assert rates(method) == rates(method, 5) == (0.05, 8e-5)
    assert drops(method, 60) == []
    assert method.head == lw.AffineHead()
    assert method.regularisation == lw.Regularisation()
    assert lw.dll(variant="first", epochs=2).stages(2)[1].epochs == 2


def test_segments_move_up_by_what_they_do_not_share():
    method = presets.segments(3)
    assert [s.windows[0] for s in method.stages(UNITS)] == [(0, 2), (1, 3), (2, 4), (3, 5)]
    assert [s.windows[0] for s in presets.segments(2, 0).stages(UNITS)] == [(0, 1), (2, 3), (4, 5)]
    assert (method.optimizer, method.regularisation) == (lw.dll().optimizer, lw.dll().regularisation)
    bare = presets.segments(4, epochs=50, budget=None, input_dropout=0.0, gradient_dropout=0.0)  # figure 6.2
    assert bare.regularisation.input_dropout == bare.regularisation.gradient_dropout == 0
    assert bare.stages(UNITS)[0].epochs == 50
    assert bare.name == "segments4_3"


def test_random_robin_is_algorithm_4():
    stages = lw.random_robin().stages(UNITS)
    assert len(stages) == 30 * UNITS
    orders = [tuple(s.windows[0][0] for s in stages[i : i + UNITS]) for i in range(0, len(stages), UNITS)]
    assert all(sorted(order) == list(range(UNITS)) for order in orders)
    assert len(set(orders)) > 20
    assert all(s.epochs == 10 for s in stages)
    plain = lw.random_robin(2, 1, shuffle=False)
    assert [s.windows[0][0] for s in plain.stages(3)] == [0, 1, 2, 0, 1, 2]
    assert (plain.name, lw.random_robin().name) == ("round_robin", "random_robin")
    assert lw.random_robin().regularisation == replace(lw.dll().regularisation, input_dropout=0.0, gradient_dropout=0.0)
    assert lw.random_robin(input_dropout=0.3).regularisation.input_dropout == 0.3


def test_predsim_is_both_papers():
    method = lw.predsim()
    (stage,) = method.stages(UNITS)
    assert stage.windows == tuple((i, i) for i in range(UNITS))
    assert stage.epochs == 400
    assert rates(method) == rates(method, 5) == (5e-4, 0.0)
    assert drops(method, 400) == [200, 300, 356, 376]
    assert drops(lw.predsim(code=True), 400) == [200, 300, 350, 375]
    assert method.optimizer.gamma == 0.25
    assert lw.make_local_loss(method.loss, **method.loss_options).beta == 0.99
    assert method.regularisation == lw.Regularisation(0.2, 1.0, channelwise=True)
    assert lw.predsim(max_features=1024).head == lw.PredSimHead(1024)


def test_transfer_is_table_6_5():
    method = lw.transfer()
    assert [s.epochs for s in method.stages(12)] == [5, 5, 6, 6, 7, 7, 8, 9, 9, 10, 11, 12]
    assert rates(method, 10) == (6.47677e-05, 4.52191e-04)  # 3e-5 * 1.08**10, 5e-4 * 0.99**10
    assert method.regularisation == lw.Regularisation()
    method = lw.transfer("mobilevit")
    assert [s.epochs for s in method.stages(4)] == [15, 18, 22, 26]
    assert rates(method, 1) == (9.6e-4, 5e-4)
    assert (method.regularisation.input_dropout, method.regularisation.gradient_dropout) == (0.3, 0.3)
    assert drops(method, 26) == []
    assert rates(lw.transfer(lr=5e-6, epochs=2)) == (5e-6, 5e-4)


def test_greedy_is_its_papers_schedule():
    assert drops(lw.greedy(3), 50) == [15, 30, 45]
    assert rates(lw.greedy(3), 4) == (0.1, 5e-4)
    assert lw.greedy(3).head == lw.ConvHead(3)
    assert lw.greedy(code=True).head == lw.LinearHead(batch_norm=True)


def test_backprop_is_one_window():
    method = lw.backprop(lr=1e-2, optimizer="sgd")
    assert [s.windows for s in method.stages(UNITS)] == [((0, UNITS - 1),)]
    assert drops(method, 300) == [150, 225]
    assert method.optimizer.options == {"momentum": 0.9}


# ---- in training ----

SHORT = {
    "backprop": lw.backprop(epochs=2),
    "dll": lw.dll(None, epochs=2),
    "dll first": lw.dll(variant="first", epochs=2),
    "greedy": lw.greedy(2, epochs=2),
    "segments": presets.segments(2, epochs=2, budget=None),
    "random robin": lw.random_robin(2, 1),
    "predsim": lw.predsim(epochs=2),
    "predsim code": lw.predsim(epochs=2, code=True),
    "transfer": lw.transfer(epochs=2),
    "transfer mobilevit": lw.transfer("mobilevit", epochs=1),
}


@pytest.mark.parametrize("name", SHORT)
def test_losses_stay_in_their_windows_and_fall(name):
    trainer = lw.LayerwiseTrainer(cnn(16), SHORT[name], classes=10)
    data = loader(300)
    lw.assert_isolated(trainer, next(iter(data)))
    torch.manual_seed(0)
    rows = trainer.fit(data).rows
    for window in trainer.trainings:
        losses = [row["loss"] for row in rows if (row["first"], row["last"]) == window]
        assert losses[-1] < losses[0] or len(losses) == 1
    assert 0 <= trainer.evaluate(data) <= 1


def test_end_to_end_training_is_a_loop_written_by_hand():
    data = list(loader(200, shuffle=False))
    trainer = lw.LayerwiseTrainer(cnn(), lw.backprop(epochs=2), classes=10)
    trainer.fit(data)
    model = cnn()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-6)
    for epoch in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1.0, 0.1)[epoch]  # half of the epochs are over
        for x, y in data:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(trainer.chain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lw.dll(variant="last"), "expected 'main' or 'first', got 'last'"),
        (lambda: lw.transfer("resnet"), r"expected one of \['efficientnetv2', 'mobilevit'\], got 'resnet'"),
        (lambda: presets.segments(2, 2).stages(4), "expected 0 <= overlap < size"),
    ],
)
def test_what_does_not_exist(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- by name ----


@pytest.mark.parametrize(
    ("name", "options", "method"),
    [
        ("greedy3", {"code": True}, lambda: lw.greedy(3, epochs=7, code=True)),
        ("dll", {"budget": 0.2}, lambda: lw.dll(0.2, epochs=7)),
        ("dll_first", {}, lambda: lw.dll(variant="first", epochs=7)),
        ("segments", {"size": 3, "overlap": 1}, lambda: lw.segments(3, 1, epochs=7)),
        ("round_robin", {"budget": None}, lambda: lw.random_robin(7, 1, shuffle=False)),
        ("random_robin", {}, lambda: lw.random_robin(7, 1)),
        ("predsim", {"dropout": 0.1}, lambda: lw.predsim(epochs=7, dropout=0.1)),
        ("transfer_mobilevit", {}, lambda: lw.transfer("mobilevit", epochs=7)),
        ("backprop", {}, lambda: lw.backprop(epochs=7)),
    ],
)
def test_a_name_is_its_preset(name, options, method):
    named, direct = lw.preset(name, epochs=7, **options), method()
    assert named.stages(UNITS) == direct.stages(UNITS)
    assert replace(named, schedule=[]) == replace(direct, schedule=[])


def test_every_name_makes_a_method():
    for name in presets.PRESETS:
        method = lw.preset(name, epochs=2)
        assert pickle.loads(pickle.dumps(method)).stages(UNITS) == method.stages(UNITS) != []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("magic", {}, "unknown method 'magic'; there are greedy1, "),
        ("predsim", {"budget": 0.3}, "budget: of dll, segments, round_robin, .* not of predsim"),
        ("dll", {"colour": 1}, "colour: of no method, not of dll"),
    ],
)
def test_names_and_options_that_there_are_not(name, options, message):
    with pytest.raises(ValueError, match=message):
        lw.preset(name, epochs=1, **options)
