"""The engine against loops written by hand, isolation of gradients, exact resume."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import layerwise as lw
from layerwise_cases import ADAM, METHODS, cnn, digits, loader, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def fit(method, model=None, *, seed=3, data=None, validation=None, resume=False, **options):
    trainer = lw.LayerwiseTrainer(model or cnn(), method, classes=10, **options)
    torch.manual_seed(seed)
    trainer.fit(data or loader(), validation or loader(100, shuffle=False), resume=resume)
    return trainer


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# ---- against loops written by hand ----


def test_bottom_up_is_a_loop_written_by_hand():
    data = list(loader(200, shuffle=False))
    trainer = fit(METHODS["bottom up"], data=data, validation=data)

    model = cnn()
    parts = [model[:3], model[3:6], model[6:]]
    torch.manual_seed(3)
    example = data[0][0]
    for i, part in enumerate(parts):
        model.eval()
        with torch.no_grad():
            out = example
            for below in parts[: i + 1]:
                out = below(out)
        head = nn.Identity() if i == 2 else lw.build_head(lw.ConvHead(2, width=5), out, 10)
        part.train()
        optimizer = torch.optim.Adam([*part.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.0)
        for _ in range(2):
            for x, y in data:
                with torch.no_grad():
                    for below in parts[:i]:
                        x = below(x)
                F.cross_entropy(head(part(x)), y).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert same(trainer.chain.state_dict(), model.state_dict())


def test_local_errors_are_a_loop_written_by_hand():
    data = list(loader(200, shuffle=False))
    trainer = fit(METHODS["simultaneous"], data=data, validation=data)

    model = cnn()
    parts = [model[:3], model[3:6], model[6:]]
    torch.manual_seed(3)
    model.eval()
    heads, out = [], data[0][0]
    for i, part in enumerate(parts):
        with torch.no_grad():
            out = part(out)
        heads.append(nn.Identity() if i == 2 else lw.build_head(lw.PredSimHead(64), out, 10))
    model.train()
    optimizers = [
        torch.optim.Adam([*part.parameters(), *head.parameters()], lr=2e-3)
        for part, head in zip(parts, heads, strict=True)
    ]
    for _ in range(4):
        for x, y in data:
            for part, head, optimizer in zip(parts, heads, optimizers, strict=True):
                h = part(x)
                output = head(h)
                scores = output if isinstance(output, torch.Tensor) else output.scores
                loss = 0.01 * F.cross_entropy(scores, y)
                if scores is not output:
                    target = torch.where(y[:, None] == y[None, :], 1.0, -1 / 9)
                    loss = loss + 0.99 * F.mse_loss(lw.similarity_matrix(output.similarity), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                x = h.detach()
    expected = model.state_dict()
    for name, value in trainer.chain.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_one_window_over_all_units_is_backpropagation():
    method = lw.Method("all", [lw.Stage(((0, 2),), 2)], optimizer=ADAM)
    data = loader(200, shuffle=False)
    trainer = fit(method, data=data)
    model = cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(2):
        for x, y in data:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(trainer.chain.state_dict(), model.state_dict())


def test_accumulated_batches_are_one_batch():
    method = lw.Method("sums", lambda n: lw.bottom_up(n, 2), optimizer=lw.OptimizerSpec("sgd", 0.1))
    whole = fit(method, cnn(norm=False), data=loader(200, 50, shuffle=False))
    parts = fit(method, cnn(norm=False), data=loader(200, 25, shuffle=False), accumulate=2)
    for a, b in zip(whole.chain.state_dict().values(), parts.chain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_last_step_takes_what_is_left_of_the_batches():
    method = lw.Method("one", [lw.Stage(((0, 2),), 1)], optimizer=lw.OptimizerSpec("sgd", 0.1))
    trainer = fit(method, cnn(norm=False), data=loader(75, 25, shuffle=False), accumulate=2)
    model = cnn(norm=False)
    batches = list(loader(75, 25, shuffle=False))
    for group in (batches[:2], batches[2:]):
        model.zero_grad()
        for x, y in group:
            (F.cross_entropy(model(x), y) / 2).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    for a, b in zip(trainer.chain.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_rates_fall_with_the_unit_and_at_milestones():
    spec = lw.OptimizerSpec("sgd", 0.1, 1e-3, milestones=(0.5, 0.75), gamma=0.1)
    method = lw.Method("rates", lambda n: lw.bottom_up(n, 4), optimizer=spec, lr_factor=0.8, weight_decay_factor=1.15)
    trainer = fit(method)
    rates = [row["lr"] for row in trainer.history]
    one = [0.1, 0.1, 0.01, 0.001]
    assert rates == pytest.approx([r * 0.8**i for i in range(3) for r in one])
    assert [t.weight_decay for t in trainer.trainings.values()] == pytest.approx([1e-3, 1.15e-3, 1.15**2 * 1e-3])


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        ("cosine", [1, 0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        (lambda epoch, epochs: (epoch + 1) / epochs, [0.25, 0.5, 0.75, 1]),
    ],
    ids=["cosine", "linear", "function"],
)
def test_rates_fall_in_other_ways(decay, factors):
    spec = lw.OptimizerSpec("sgd", 0.1, decay=decay)
    trainer = fit(lw.Method("rates", lambda n: lw.bottom_up(n, 4), optimizer=spec))
    assert [row["lr"] for row in trainer.history] == pytest.approx([0.1 * f for f in factors] * 3)


def test_rates_of_groups_keep_their_ratio():
    def groups(parameters, lr, weight_decay):
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 10 * lr}, {"params": others}], lr)

    seen = []

    def watch(trainer, rows):
        training = trainer.trainings[0, 0]
        seen.append([group["lr"] for group in training.optimizer.param_groups])

    spec = lw.OptimizerSpec(groups, 0.1, decay="linear")
    fit(lw.Method("groups", lambda n: [lw.Stage(((0, 0),), 2)], optimizer=spec), callbacks=[watch])
    assert seen == [pytest.approx([1, 0.1]), pytest.approx([0.5, 0.05])]


@pytest.mark.parametrize("options", [{"decay": "step"}, {"decay": "cosine", "milestones": (0.5,)}])
def test_bad_decays(options):
    with pytest.raises(ValueError, match=r"^decay: |^milestones and restart: "):
        lw.OptimizerSpec(**options)


def test_tensorboard_gets_every_row():
    written = []
    writer = SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar))
    trainer = fit(METHODS["bottom up"], callbacks=[lw.TensorBoardCallback(writer)])
    rows = [row for row in trainer.history if row["first"] == 1]
    assert [s for s in written if s[0] == "units 1/loss"] == [("units 1/loss", r["loss"], r["epoch"]) for r in rows]
    names = {"lr", "loss", "train_accuracy", "validation_accuracy", "seen", "seconds"}
    assert {tag.split("/")[1] for tag, _, _ in written} == names


def test_gradients_are_clipped_to_a_norm():
    norms = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
            return super().step(closure)

    method = replace(METHODS["bottom up"], optimizer=lw.OptimizerSpec(Watching, 0.1))
    fit(method, clip_norm=0.01)
    assert max(norms) <= 0.0101 and norms


# ---- isolation ----


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_local(name):
    trainer = lw.LayerwiseTrainer(cnn(dropout=0.1), METHODS[name], classes=10)
    batch = next(iter(loader()))
    before = copy.deepcopy(trainer.chain.state_dict())
    rng = torch.get_rng_state()
    lw.assert_isolated(trainer, batch)
    assert same(before, trainer.chain.state_dict())
    assert torch.equal(rng, torch.get_rng_state())
    assert not trainer.trainings


def test_a_leak_is_found(monkeypatch):
    trainer = lw.LayerwiseTrainer(cnn(), METHODS["simultaneous"], classes=10)
    monkeypatch.setattr("layerwise.subnet.detach_state", lambda state: state)
    monkeypatch.setattr("layerwise.loop.detach_state", lambda state: state)
    with pytest.raises(lw.IsolationError, match="which is not theirs"):
        lw.assert_isolated(trainer, next(iter(loader())))


def test_frozen_units_do_not_change_at_all():
    trainer = lw.LayerwiseTrainer(cnn(dropout=0.2), METHODS["bottom up"], classes=10)
    seen = {}

    def watch(t, rows):
        first = rows[0]["first"]
        for i in range(first):
            values = {k: v.clone() for k, v in t.chain[i].named_tensors()}
            if (i, first) in seen:
                assert same(values, seen[i, first])
            seen[i, first] = values
            if first > 0 and (i, i + 1) in seen:
                assert same(values, seen[i, i + 1])

    trainer.callbacks.append(watch)
    trainer.fit(loader())
    assert len(seen) == 3


def test_a_stray_train_call_does_not_reach_the_feednet():
    trainer = lw.LayerwiseTrainer(cnn(dropout=0.5), METHODS["bottom up"], classes=10)
    statistics = []

    def stray(t, rows):
        if rows[0]["first"] == 1:
            statistics.append(t.chain[0].parts[1].running_mean.clone())
            t.chain.model.train()

    trainer.callbacks.append(stray)
    trainer.fit(loader())
    assert torch.equal(statistics[0], statistics[1])
    assert torch.equal(statistics[0], trainer.chain[0].parts[1].running_mean)


def test_units_end_as_they_were_meant_to():
    model = cnn()
    model[0].bias.requires_grad_(False)
    trainer = fit(METHODS["bottom up"], model)
    assert not model[0].bias.requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "0.bias")
    assert not any(m.training for m in model.modules() if not list(m.children()))
    x = next(iter(loader(shuffle=False)))[0]
    assert torch.equal(trainer.export()(x), model.eval()(x))


# ---- resume ----


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_run(name, tmp_path):
    method = METHODS[name]
    data = loader(150)
    whole = fit(method, cnn(dropout=0.1), data=data)
    epochs = len({(row["stage"], row["epoch"]) for row in whole.history})
    for stop in (1, epochs // 2 + 1, epochs - 1):
        path = tmp_path / f"{stop}.pt"

        def interrupt(trainer, rows, stop=stop):
            if len({(row["stage"], row["epoch"]) for row in trainer.history}) == stop + 1:
                raise Interrupt

        with pytest.raises(Interrupt):
            fit(method, cnn(dropout=0.1), data=data, checkpoint=path, callbacks=[interrupt])
        torch.manual_seed(99)
        model = cnn(dropout=0.1, seed=5)
        resumed = fit(method, model, seed=98, data=data, checkpoint=path, resume=True)
        assert same(whole.chain.state_dict(), resumed.chain.state_dict())
        for window, training in whole.trainings.items():
            assert same(training.subnet.head.state_dict(), resumed.trainings[window].subnet.head.state_dict())
        assert [{**row, "seconds": 0} for row in whole.history] == [{**row, "seconds": 0} for row in resumed.history]


def test_resume_with_the_loaders_own_generator(tmp_path):
    def make():
        return DataLoader(digits(150), 50, shuffle=True, generator=torch.Generator().manual_seed(1))

    whole = fit(METHODS["bottom up"], data=make())

    def interrupt(trainer, rows):
        if len(trainer.history) == 4:
            raise Interrupt

    with pytest.raises(Interrupt):
        fit(METHODS["bottom up"], data=make(), checkpoint=tmp_path / "c.pt", callbacks=[interrupt])
    resumed = fit(METHODS["bottom up"], data=make(), checkpoint=tmp_path / "c.pt", resume=True)
    assert same(whole.chain.state_dict(), resumed.chain.state_dict())


def test_resume_from_a_checkpoint_of_some_epochs_ago(tmp_path):
    def interrupt(trainer, rows):
        if len(trainer.history) == 6:
            raise Interrupt

    method, path = METHODS["bottom up"], tmp_path / "c.pt"
    with pytest.raises(Interrupt):
        fit(method, checkpoint=path, checkpoint_every=3, callbacks=[interrupt])
    assert len(torch.load(path)["history"]) == 3
    resumed = fit(method, checkpoint=path, resume=True)
    assert same(fit(method).chain.state_dict(), resumed.chain.state_dict())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    fit(METHODS["bottom up"], checkpoint=path)
    with pytest.raises(lw.CheckpointError, match="method 'bottom up', here 'greedy1'"):
        fit(METHODS["greedy"], checkpoint=path, resume=True)
    path.write_bytes(b"something else")
    with pytest.raises(lw.CheckpointError, match="not a checkpoint"):
        fit(METHODS["bottom up"], checkpoint=path, resume=True)
    with pytest.raises(ValueError, match="no checkpoint file"):
        fit(METHODS["bottom up"], resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_loss_that_is_not_finite_leaves_a_checkpoint_to_resume_from(tmp_path):
    path = tmp_path / "c.pt"
    calls = []

    def loss(scores, target):
        calls.append(1)
        return F.cross_entropy(scores, target) * (float("nan") if len(calls) == 10 else 1.0)

    method = replace(METHODS["bottom up"], loss=loss)
    with pytest.raises(lw.NonFiniteLossError, match=r"units 0 to 0: the loss is not finite .*c\.pt holds"):
        fit(method, checkpoint=path)
    resumed = fit(method, cnn(), seed=8, checkpoint=path, resume=True)
    assert same(resumed.chain.state_dict(), fit(METHODS["bottom up"]).chain.state_dict())


# ---- stopping ----


def scripted(monkeypatch, accuracies):
    """Validation accuracies from a list."""
    left = iter(accuracies)
    monkeypatch.setattr(
        "layerwise.loop.Loop.validate", lambda self, trainings, loader, everywhere=False: [next(left)] * len(trainings)
    )


def test_a_window_stops_early_and_goes_back_to_its_best_weights(monkeypatch):
    scripted(monkeypatch, [0.1, 0.5, 0.4, 0.4, *[0.6, 0.1, 0.1], *[0.7, 0.1, 0.1]])
    kept = {}

    def keep(trainer, rows):
        if rows[0]["validation_accuracy"] == 0.5:
            kept.update({k: v.clone() for k, v in trainer.chain[0].named_tensors()})

    method = lw.Method(
        "stop", lambda n: lw.bottom_up(n, 10), optimizer=ADAM, stopping=lw.Stopping(patience=2, restore_best=True)
    )
    trainer = fit(method, callbacks=[keep])
    assert [row["epoch"] for row in trainer.history] == [1, 2, 3, 4, 1, 2, 3, 1, 2, 3]
    assert same(dict(trainer.chain[0].named_tensors()), kept)


def test_a_chain_ends_when_units_bring_no_gain(monkeypatch):
    scripted(monkeypatch, [0.5, 0.8, 0.8, 0.9])
    method = lw.Method(
        "prune", lambda n: lw.bottom_up(n, 1), optimizer=ADAM, stopping=lw.Stopping(chain_patience=1, min_gain=0.01)
    )
    trainer = fit(method)
    assert trainer.stopped and len(trainer.trainings) == 3
    assert trainer.output_window == (1, 1)
    assert len(trainer.export().units) == 2


def test_a_growing_chain_ends_at_its_best_unit(monkeypatch, tmp_path):
    def make_unit(index, example):
        return nn.Sequential(nn.Linear(example.flatten(1).shape[1], 12), nn.ReLU())

    method = lw.Method("grow", lambda n: lw.bottom_up(n, 1), optimizer=ADAM)
    options = {"classes": 10, "epochs": 2, "max_units": 6}
    scripted(monkeypatch, [0.5, 0.6, 0.7, 0.8, 0.8, 0.7])
    torch.manual_seed(0)
    grown = lw.grow(make_unit, method, loader(flat=True), loader(flat=True), checkpoint=tmp_path / "c.pt", **options)
    assert len(grown.chain) == 3 and grown.output_window == (1, 1) and grown.stopped
    scripted(monkeypatch, [0.5, 0.6, 0.7])

    torch.manual_seed(0)
    with pytest.raises(StopIteration):
        lw.grow(make_unit, method, loader(flat=True), loader(flat=True), checkpoint=tmp_path / "d.pt", **options)
    scripted(monkeypatch, [0.8, 0.8, 0.7])
    torch.manual_seed(0)
    again = lw.grow(
        make_unit, method, loader(flat=True), loader(flat=True), checkpoint=tmp_path / "d.pt", resume=True, **options
    )
    assert same(grown.chain.state_dict(), again.chain.state_dict())


# ---- precision ----


def test_bfloat16_trains():
    trainer = fit(METHODS["bottom up"], amp=torch.bfloat16)
    assert trainer.history.last_rows()[-1]["loss"] < trainer.history.rows[4]["loss"]
    assert all(p.dtype == torch.float32 for p in trainer.chain.parameters())


def test_float16_scales_every_windows_losses_by_itself():
    trainer = lw.LayerwiseTrainer(cnn(), METHODS["simultaneous"], classes=10, amp=torch.float16)
    trainer.fit(loader(100))
    scalers = [t.scaler for t in trainer.trainings.values()]
    assert len({id(s) for s in scalers}) == 3 and all(s.is_enabled() for s in scalers)


# ---- results ----


def test_accuracies_are_those_of_the_exported_network():
    trainer = fit(METHODS["bottom up"])
    data = loader(100, shuffle=False)
    for unit in range(3):
        network = trainer.export(unit)
        right = sum((network(x).argmax(1) == y).sum().item() for x, y in data)
        assert trainer.evaluate(data, unit) == right / 100
    rows = trainer.history.last_rows()
    assert [row["validation_accuracy"] for row in rows] == [trainer.evaluate(data, unit) for unit in range(3)]


def test_history_as_a_table(tmp_path):
    trainer = fit(METHODS["simultaneous"])
    assert len(trainer.history) == 12
    assert str(trainer.history).splitlines()[0].split()[:4] == ["stage", "round", "first", "last"]
    text = trainer.history.to_csv(tmp_path / "h.csv")
    assert (tmp_path / "h.csv").read_text() == text and len(text.splitlines()) == 13
    assert [(row["first"], row["epoch"]) for row in trainer.history.last_rows()] == [(0, 4), (1, 4), (2, 4)]


def test_closed_form_weights_to_begin_with():
    method = lw.Method(
        "platonic", lambda n: lw.bottom_up(n, 1), optimizer=lw.OptimizerSpec("sgd", 1e-9), platonic_init=True
    )
    data = loader(1500, flat=True)
    trainer = lw.LayerwiseTrainer(mlp(60, 40), method, classes=10)
    torch.manual_seed(0)
    trainer.fit(data)
    x, y = digits(1797, flat=True).tensors
    Z = trainer.chain[0](x)
    random = mlp(60, 40)[:2](x)
    fit_of = [torch.linalg.lstsq(z[:1500], F.one_hot(y[:1500]).float()).solution for z in (Z, random)]
    better, worse = (
        (z[1500:] @ w).argmax(1).eq(y[1500:]).float().mean() for z, w in zip((Z, random), fit_of, strict=True)
    )
    assert better > worse
    with pytest.raises(ValueError, match=r"needs exactly one nn\.Linear"):
        lw.LayerwiseTrainer(cnn(), method, classes=10).fit(loader())


def test_states_of_several_tensors_train():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x):
            h = torch.relu(self.a(x))
            return self.c(torch.relu(self.b(h)) + h)

    torch.manual_seed(0)
    model = Skip()
    data = DataLoader(TensorDataset(*digits(300, flat=True).tensors), 50, shuffle=True)
    trainer = lw.LayerwiseTrainer(
        model, lw.Method("skip", lambda n: lw.bottom_up(n, 15), optimizer=ADAM), classes=10, spec=["a", "b", "c"]
    )
    trainer.fit(data)
    lw.assert_isolated(trainer, next(iter(data)))
    assert trainer.evaluate(data) > 0.9
