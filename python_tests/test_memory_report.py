"""Memory by item: predictions against measurements and whole trainings, items by hand, and a chain that is left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import layerwise as lw
from layerwise.borrowing import borrowed
from layerwise.memory_report import Replay, end_to_end
from layerwise_cases import ADAM, METHODS, cnn, loader, mlp

FLOAT = 4


def report(method, model=None, example=None, *, measure=False, **options):
    x = torch.rand(50, 1, 8, 8) if example is None else example
    return lw.memory_report(lw.split(model or cnn(8)), method, x, 10, measure=measure, **options)


# ---- predicted, measured, done ----

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["bottom up", "segments", "simultaneous", "random robin", "best weights"])
def test_prediction_measurement_and_training_agree_to_the_byte(name):
    method = METHODS[name]
    predicted = report(method)
    assert predicted.rows == report(method, measure=True).rows
    assert (predicted.measured, predicted.batch_size) == (False, 50)
    trainer = lw.LayerwiseTrainer(cnn(8), method, classes=10)
    data, validation = loader(100), loader(100) if method.stopping.needs_validation else None
    resident = [*trainer.chain.parameters(), *trainer.chain.model.buffers()]
    assert lw.measure_memory(lambda: trainer.fit(data, validation), resident).total == predicted.total


def test_heads_in_closed_form_are_predicted_without_their_solving():
    predicted, measured = report(METHODS["ridge"]), report(METHODS["ridge"], measure=True)
    assert predicted.total <= measured.total <= 1.01 * predicted.total


@pytest.mark.parametrize(
    "options",
    [{"accumulate": 3, "clip_norm": 1.0}, {"batch_size": 7}, {"batch_size": 120}, {"window": (1, 2)}, {"caches": 1000}],
    ids=str,
)
def test_options_too(options):
    method = METHODS["bottom up"]
    predicted, measured = report(method, **options), report(method, measure=True, **options)
    assert predicted.rows == measured.rows
    assert predicted.rows != report(method).rows


def test_bfloat16_saves_memory_and_is_predicted_but_for_statistics():
    predicted = report(METHODS["bottom up"], amp=torch.bfloat16)
    measured = report(METHODS["bottom up"], amp=torch.bfloat16, measure=True)
    assert abs(predicted.total - measured.total) <= 1024  # means and deviations of batch norm, in float32
    assert predicted.total < 0.8 * report(METHODS["bottom up"]).total


@settings(max_examples=6)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(2, 64), st.sampled_from(["sgd", "adamw"]))
def test_perceptrons_of_any_shape(widths, batch, optimizer):
    method = lw.Method("m", lambda n: lw.bottom_up(n, 1), optimizer=lw.OptimizerSpec(optimizer))
    x = torch.rand(batch, 64)
    predicted = report(method, mlp(*widths), x)
    assert predicted.rows == report(method, mlp(*widths), x, measure=True).rows


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"amsgrad": True}], ids=str)
def test_optimisers_of_several_tensors_at_once(options):
    method = lw.Method("m", lambda n: lw.bottom_up(n, 1), optimizer=lw.OptimizerSpec("adamw", options=options))
    x = torch.rand(4, 64)
    predicted = report(method, mlp(200, 300), x)
    assert predicted.rows == report(method, mlp(200, 300), x, measure=True).rows


def test_attention_and_its_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(8, 16)
            self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.out = nn.Linear(16, 10)

        def forward(self, x):
            return self.out(self.block(self.embed(x)).mean(1))

    method = lw.Method("m", lambda n: lw.bottom_up(n, 1), optimizer=ADAM)
    x = torch.rand(6, 8, 8)
    predicted = report(method, Tokens(), x)
    assert len(predicted.rows) == 2
    assert predicted.rows == report(method, Tokens(), x, measure=True).rows


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "feed_batch": 7}], ids=str)
@pytest.mark.parametrize("window", [(1, 1), (1, 2), (2, 2)])
def test_a_replayed_feednet_takes_the_same(window, options):
    x = torch.rand(50, 1, 8, 8)
    chain = lw.split(cnn(8))
    whole = lw.memory_report(chain, METHODS["segments"], x, 10, window=window, **options)
    with borrowed(chain):
        replay = Replay(chain, x, window[0], None, options.get("feed_batch"))
        again = lw.memory_report(chain, METHODS["segments"], x, 10, window=window, replay=replay, **options)
    assert again.rows == whole.rows


# ---- items ----


def test_items_by_hand():
    model = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    method = lw.Method("m", lambda n: lw.bottom_up(n, 1), optimizer=lw.OptimizerSpec("sgd", options={"momentum": 0.9}))
    first, second = report(method, model, torch.rand(16, 64)).rows
    layers = [FLOAT * (a * b + b) for a, b in ((64, 20), (20, 30), (30, 10), (20, 10))]
    assert (first.units, first.head, first.feednet) == (layers[0], layers[3], 0)
    assert first.above == layers[1] + layers[2]
    assert (first.other_heads, second.other_heads) == (0, layers[3])
    assert first.gradients == first.optimizer == layers[0] + layers[3]
    assert (second.units, second.head, second.feednet) == (layers[1] + layers[2], 0, layers[0])
    batch = 16 * 64 * FLOAT + 16 * 8
    before = 16 * 10 * FLOAT + FLOAT + 16 * 8 + 16  # scores, loss and labels of the step before, the sums of the epoch
    assert first.feednet_peak == batch + before
    assert second.feednet_peak == batch + 2 * 16 * 20 * FLOAT + before  # a layer, and its ReLU
    assert first.kept_units == 16 * 20 * FLOAT  # ReLU keeps its output, the linear layer its input, which is the batch
    assert first.kept_head == 16 * 10 * FLOAT
    stays = sum(layers[:3]) + first.head + first.optimizer + 16 * 64 * FLOAT  # and the example batch
    assert first.total == first.step_peak + stays
    assert first.use == lw.MemoryUse(first.step_peak, stays)


def test_best_weights_are_kept_twice():
    first = report(METHODS["best weights"]).rows[0]
    assert first.best_weights == first.units + first.head
    assert report(METHODS["greedy"]).rows[0].best_weights == 0


def test_the_report_knows_its_largest_row_and_prints_itself():
    r = report(METHODS["segments"])
    assert r.total == max(row.total for row in r.rows) == r.largest.total
    assert r.step_peak == max(row.step_peak for row in r.rows)
    lines = str(r).splitlines()
    assert lines[0] == "megabytes, predicted, batches of 50"
    assert lines[2].split()[0] == "0-1"
    assert r.as_dicts()[0]["total"] == r.rows[0].total


def test_full_backpropagation_is_the_chain_as_one_window():
    x = torch.rand(50, 1, 8, 8)
    use = lw.backprop_memory(lw.split(cnn(8)), METHODS["bottom up"], x, 10)
    assert use == lw.backprop_memory(lw.split(cnn(8)), METHODS["bottom up"], x, 10, measure=True)
    model = cnn(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    y = torch.zeros(50, dtype=torch.long)

    def step():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [v for values in optimizer.state.values() for v in values.values()]
    by_hand = lw.measure_memory(step, [*model.parameters(), *model.buffers(), *state, x])
    batches = 2 * (x.nbytes + y.nbytes)  # this one and the next, which by_hand has not
    assert by_hand.resident == use.resident
    assert by_hand.peak <= use.peak <= by_hand.peak + batches + 1024  # and the sums of an epoch
    assert end_to_end(METHODS["simultaneous"]).loss == "cross_entropy"


# ---- heads that are thrown away ----


def test_heads_that_are_not_kept_take_nothing():
    method = replace(METHODS["bottom up"], keep_heads=False)
    x = torch.rand(50, 1, 8, 8)
    kept = report(METHODS["bottom up"], example=x)
    thrown = report(method, example=x)
    assert [row.other_heads for row in thrown.rows] == [0, 0, 0]
    assert [k.total - t.total for k, t in zip(kept.rows, thrown.rows, strict=True)] == [
        r.other_heads for r in kept.rows
    ]
    trainer = lw.LayerwiseTrainer(cnn(8), method, classes=10)
    data = loader(100)
    resident = [*trainer.chain.parameters(), *trainer.chain.model.buffers()]
    assert lw.measure_memory(lambda: trainer.fit(data), resident).total == thrown.total
    assert trainer.heads == [2]
    assert trainer.evaluate(data) == trainer.evaluate(data, 2)
    with pytest.raises(ValueError, match=r"there is no head on unit 0; there are \[2\]"):
        trainer.evaluate(data, 0)
    with pytest.raises(RuntimeError, match=r"this head was not kept \(keep_heads=False\)"):
        trainer.trainings[0, 0].subnet.head(x)


def test_the_best_head_is_kept_where_chains_end_early():
    method = replace(METHODS["bottom up"], keep_heads=False, stopping=lw.Stopping(chain_patience=3))
    trainer = lw.LayerwiseTrainer(cnn(8), method, classes=10)
    trainer.fit(loader(100), loader(100))
    assert trainer.output_window[1] in trainer.heads
    assert set(trainer.heads) <= {trainer.output_window[1], 2}


def test_a_resumed_training_goes_on_without_the_heads(tmp_path):
    method = replace(METHODS["bottom up"], keep_heads=False)
    data = loader(100, shuffle=False)

    def train(resume=False, **options):
        torch.manual_seed(0)
        trainer = lw.LayerwiseTrainer(cnn(8), method, classes=10, **options)
        trainer.fit(data, resume=resume)
        return trainer

    def stop(trainer, rows):
        if rows[-1]["first"] == 2:
            raise KeyboardInterrupt

    whole = train()
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=tmp_path / "run.pt", callbacks=[stop])
    resumed = train(checkpoint=tmp_path / "run.pt", resume=True)
    assert resumed.heads == [2]
    for a, b in zip(resumed.chain.parameters(), whole.chain.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- frozen units that take a batch in parts ----


def test_parts_of_a_batch_need_less_and_give_the_same():
    method = lw.greedy(1)
    x = torch.rand(64, 1, 8, 8)
    whole, parts = (lw.memory_report(lw.split(cnn(16)), method, x, 10, feed_batch=n, measure=True) for n in (None, 10))
    assert parts.rows == lw.memory_report(lw.split(cnn(16)), method, x, 10, feed_batch=10).rows
    assert parts.rows[0].feednet_peak == whole.rows[0].feednet_peak
    assert all(p.feednet_peak < 0.8 * w.feednet_peak for p, w in zip(parts.rows[1:], whole.rows[1:], strict=True))
    trainers = [lw.LayerwiseTrainer(cnn(16), method, classes=10, feed_batch=n) for n in (None, 10, 64, 100)]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        outputs = []
        for trainer in trainers:
            trainer.chain.model.to(memory_format=memory_format)
            outputs.append(trainer.feednet.advance(x, 0, 2))
        for out in outputs:
            torch.testing.assert_close(out, outputs[0])
            assert out.is_contiguous(memory_format=memory_format)


def test_states_of_several_tensors_come_in_parts_too():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 20), nn.Linear(20, 20), nn.Linear(20, 10)

        def forward(self, x):
            h = self.a(x)
            return self.c(h + self.b(h.relu()))

    net = Residual()
    chain = lw.split(net, ["a", "b", "c"])
    x = torch.rand(11, 64)
    whole = lw.LayerwiseTrainer(chain, lw.greedy(1), classes=10).feednet.advance(x, 0, 1)
    parts = lw.LayerwiseTrainer(chain, lw.greedy(1), classes=10, feed_batch=4).feednet.advance(x, 0, 1)
    assert isinstance(whole, tuple)
    torch.testing.assert_close(parts, whole)


def test_sums_over_the_batch_cannot_come_in_parts():
    net = nn.Sequential(nn.Linear(64, 20), nn.Linear(20, 10))
    units = [lw.Unit("a", lambda x: net[0](x).sum(0, keepdim=True), [net[0]]), lw.Unit("b", net[1], [net[1]])]
    trainer = lw.LayerwiseTrainer(lw.split(net, units), lw.greedy(1), classes=10, feed_batch=4)
    with pytest.raises(ValueError, match="feed_batch: what passes from unit to unit depends on the size of the batch"):
        trainer.feednet.advance(torch.rand(9, 64), 0, 1)
    with pytest.raises(ValueError, match="feed_batch: expected at least 1, got 0"):
        lw.LayerwiseTrainer(net, lw.greedy(1), classes=10, feed_batch=0)


# ---- what is left behind ----


@pytest.mark.parametrize("measure", [False, True])
def test_the_chain_stays_as_it_was(measure):
    model = cnn(8, dropout=0.2)
    chain = lw.split(model)
    chain[0].freeze()
    model[4].weight.grad = torch.ones_like(model[4].weight)
    model[4].weight.requires_grad_(False)
    model[1].eval()
    x = torch.rand(20, 1, 8, 8)

    def picture():
        return (
            {k: v.clone() for k, v in model.state_dict().items()},
            [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
            [m.training for m in model.modules()],
            [(u.training, u.frozen, len(u._trainable)) for u in chain],
            torch.get_rng_state(),
            [sorted(m.__dict__) for m in model.modules()],
            [id(p) for p in (*model.parameters(), *model.buffers())],
        )

    before = picture()
    method = replace(METHODS["segments"], regularisation=lw.Regularisation(0.5, gradient_noise=0.1))
    lw.memory_report(chain, method, x, 10, measure=measure)
    for now, then in zip(tree_leaves(picture()), tree_leaves(before), strict=True):
        assert torch.equal(now, then) if isinstance(then, torch.Tensor) else now == then


def test_what_a_module_remembers_is_forgotten():
    class Remembers(nn.Linear):
        def forward(self, x):
            self.seen = super().forward(x)
            return self.seen

    model = nn.Sequential(Remembers(64, 10), nn.ReLU(), nn.Linear(10, 10))
    chain = lw.split(model, ["0", "2"])
    lw.memory_report(chain, METHODS["greedy"], torch.rand(4, 64), 10)
    assert not hasattr(model[0], "seen")


def test_an_error_leaves_the_chain_as_it_was():
    model = cnn(8)
    before = list(model.parameters())
    with pytest.raises(ValueError, match=r"PredSimHead: 8 channels exceed max_features=2"):
        report(replace(METHODS["greedy"], head=lw.PredSimHead(2)), model)
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_a_step_that_depends_on_values_has_to_be_measured():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            return self.linear(x)[x[:, 0] >= 0]

    unit = Picky()
    model = nn.Sequential(unit, nn.Linear(10, 10))
    with pytest.raises(lw.PredictionError, match=r"measure it \(measure=True\), and give heads fixed sizes"):
        report(METHODS["greedy"], model, torch.rand(4, 64))
    assert report(METHODS["greedy"], model, torch.rand(4, 64), measure=True).total > 0
