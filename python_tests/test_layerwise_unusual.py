"""Unusual models, labels, loaders and combinations: trained rightly, or refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import layerwise as lw
from layerwise.checkpoint import describe
from layerwise.data import Augmentation, TensorLoader
from layerwise.probes import stable_ranks
from layerwise_cases import ADAM, METHODS, cnn, digits, loader, mlp

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = lw.Method("plain", lambda n: lw.bottom_up(n, 1), optimizer=ADAM)


def fit(model, method=PLAIN, data=None, validation=None, *, classes=10, seed=3, resume=False, **options):
    trainer = lw.LayerwiseTrainer(model, method, classes=classes, **options)
    torch.manual_seed(seed)
    trainer.fit(data or loader(), validation, resume=resume)
    return trainer


# ---- pruning beside other things ----


def test_pruning_lets_what_follows_train_on():
    method = lw.Method(
        "robin", [lw.Stage(((u, u),), 1) for u in (0, 1, 0, 1)], optimizer=ADAM, pruning=lw.Pruning(0.5, 0, 2)
    )
    weights = []

    def watch(trainer, rows):
        weights.append(trainer.chain[1].parts[0].weight.detach().clone())

    trainer = fit(mlp(16, 16, 16), method, loader(flat=True), callbacks=[watch])
    assert trainer.pruned.keys() == {0, 1} and weights[2].shape == (16, 16) and weights[3].shape == (16, 8)
    kept = torch.tensor(trainer.pruned[0])
    assert not torch.equal(weights[3], weights[2][:, kept])


def test_pruning_of_windows_that_trained_together():
    method = lw.Method(
        "together", lambda n: lw.simultaneous(n, 2), head=lw.LinearHead(), optimizer=ADAM,
        stopping=lw.Stopping(restore_best=True), pruning=lw.Pruning(0.5, 1, 2),
    )  # fmt: skip
    trainer = fit(cnn(), method, validation=loader(100, shuffle=False))
    assert [len(kept) for kept in trainer.pruned.values()] == [3, 3]
    assert 0 <= trainer.evaluate(loader(100)) <= 1


def test_pruning_in_mixed_precision():
    trainer = fit(cnn(), replace(METHODS["pruning"]), amp=torch.bfloat16)
    assert len(trainer.pruned) == 2


# ---- types, labels, batches ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_models_of_other_types(dtype):
    x, y = digits(100).tensors
    data = DataLoader(TensorDataset(x.to(dtype), y), 50)
    trainer = fit(cnn().to(dtype), lw.greedy(2, width=5, epochs=1), data)
    assert {p.dtype for t in trainer.trainings.values() for p in t.subnet.parameters()} == {dtype}


def test_labels_that_are_no_classes_have_no_accuracy():
    x, y = digits(100, flat=True).tensors
    data = DataLoader(TensorDataset(x, (y > 4).float()[:, None]), 50)
    method = replace(PLAIN, loss=F.binary_cross_entropy_with_logits)
    trainer = fit(mlp(8, 8)[:-1].append(nn.Linear(8, 1)), method, data, data, classes=1)
    assert {(r["train_accuracy"], r["validation_accuracy"]) for r in trainer.history} == {(None, None)}
    with pytest.raises(ValueError, match=r"^accuracy: expected class numbers"):
        trainer.evaluate(data)
    careful = replace(method, stopping=lw.Stopping(restore_best=True))
    with pytest.raises(ValueError, match="goes by accuracy"):
        fit(mlp(8, 8)[:-1].append(nn.Linear(8, 1)), careful, data, data, classes=1)


def test_probabilities_as_labels_count_by_the_largest():
    x, y = digits(100, flat=True).tensors
    dense = DataLoader(TensorDataset(x, F.one_hot(y, 10).float() * 0.9 + 0.01), 50)
    numbers = DataLoader(TensorDataset(x, y), 50)
    trainer = fit(mlp(8, 8), PLAIN, dense, dense)
    assert trainer.history[-1]["validation_accuracy"] == trainer.evaluate(numbers) == trainer.evaluate(dense)


def test_pixelwise_labels():
    x, _ = digits(100).tensors
    pixels = (x[:, 0] > 0.5).long()
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    class Scores:
        def build(self, example, classes):
            return nn.Conv2d(example.shape[1], classes, 1)

    method = replace(PLAIN, head=Scores(), last_head=Scores(), schedule=lambda n: lw.bottom_up(n, 3))
    trainer = fit(net, method, DataLoader(TensorDataset(x, pixels), 50), classes=2)
    assert 0.5 < trainer.history[-1]["train_accuracy"] <= 1


@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        (torch.tensor([0, 1, -2]), ValueError, "expected 0 to 9, as classes=10, got -2"),
        (torch.tensor([0, 1, 10]), ValueError, "got 10"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), TypeError, "expected int64, got torch.int32"),
        (torch.tensor([], dtype=torch.int64), ValueError, "at least one sample"),
        (torch.tensor(1), ValueError, "at least one sample"),
    ],
)
def test_wrong_labels(labels, error, text):
    with pytest.raises(error, match=text):
        fit(cnn(), PLAIN, [(torch.zeros(3, 1, 8, 8), labels)])


def test_a_batch_of_one_sample_under_batch_normalisation():
    with pytest.raises(ValueError, match="cannot train on a batch of one sample; give the loader drop_last"):
        fit(cnn(), lw.greedy(2, width=4, epochs=1), loader(101))


def test_nothing_to_evaluate():
    trainer = fit(cnn())
    with pytest.raises(ValueError, match="at least one batch"):
        trainer.evaluate([])


def test_accuracy_looks_in_eval_mode_and_leaves_no_trace():
    model = cnn(dropout=0.5).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    first, second = (lw.accuracy(model, loader(100, shuffle=False)) for _ in range(2))
    assert first == second and modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- models ----


def test_units_may_not_share_dropout():
    drop = nn.Dropout(0.5)
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    units = [lw.Unit(f"u{i}", lambda x, layer=layer: drop(layer(x)), [layer, drop]) for i, layer in enumerate(layers)]
    with pytest.raises(ValueError, match="share a Dropout"):
        lw.Chain(units)


def test_lazy_modules_are_named():
    with pytest.raises(lw.SplitError, match=r"'0\.weight' has no size yet"):
        lw.split(nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2)))


def test_parametrized_weights():
    model = mlp(12, 12)
    weight_norm(model[0])
    fit(model, replace(PLAIN, platonic_init=True, optimizer=lw.OptimizerSpec("sgd", 1e-9)), loader(flat=True))
    plain = mlp(12, 12)
    fit(plain, replace(PLAIN, platonic_init=True, optimizer=lw.OptimizerSpec("sgd", 1e-9)), loader(flat=True))
    torch.testing.assert_close(model[0].weight, plain[0].weight, rtol=1e-4, atol=1e-5)
    assert stable_ranks(model)["0.weight"] == pytest.approx(stable_ranks(plain)["0.weight"], rel=1e-3)
    assert not any("original" in name for name in stable_ranks(model))


def test_a_last_unit_that_is_frozen_as_a_whole():
    model = mlp(8, 8)
    for layer in (model[2], model[4]):
        layer.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing in them or their head wants gradients"):
        fit(model, replace(PLAIN, schedule=lambda n: lw.bottom_up(n, 1)), loader(flat=True))


def test_the_models_own_output_gets_no_noise_on_its_gradient():
    noisy = replace(PLAIN, regularisation=lw.Regularisation(gradient_dropout=0.6))
    last = [lw.Stage(((1, 1),), 1)]
    models = [mlp(8, 8), mlp(8, 8)]
    for model, method in zip(models, (PLAIN, noisy), strict=True):
        fit(model, replace(method, schedule=last), loader(flat=True, shuffle=False))
    assert torch.equal(models[0][4].weight, models[1][4].weight)


# ---- loaders, callbacks, options ----


def test_a_distributed_samplers_order_changes_by_epoch():
    data = digits(60, flat=True)
    sampler = DistributedSampler(data, num_replicas=2, rank=0, shuffle=True)
    orders = []

    def watch(trainer, rows):
        orders.append(list(sampler))

    fit(mlp(8, 8), replace(PLAIN, schedule=lambda n: lw.bottom_up(n, 2)), DataLoader(data, 10, sampler=sampler),
        callbacks=[watch])  # fmt: skip
    assert sampler.epoch == 3 and len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(("value", "epochs"), [(True, 2), (1, 4), ("x", 4), (None, 4)])
def test_a_callback_ends_a_stage_by_true_alone(value, epochs):
    method = replace(PLAIN, schedule=lambda n: lw.bottom_up(n, 2))
    assert len(fit(mlp(8, 8), method, loader(flat=True), callbacks=[lambda *_: value]).history) == epochs


def test_isolation_may_be_checked_while_training():
    batch = next(iter(loader()))
    weights = []

    def check(trainer, rows):
        lw.assert_isolated(trainer, batch)
        weights.append([unit.parts[0].weight.detach().clone() for unit in trainer.chain])

    fit(cnn(), replace(PLAIN, schedule=lambda n: lw.bottom_up(n, 2)), callbacks=[check])
    for unit, (before, after) in enumerate([(0, 1), (2, 3), (4, 5)]):
        assert not torch.equal(weights[before][unit], weights[after][unit])


def test_augmentation_by_the_loaders_own_generator_is_not_recorded():
    x, y = digits(128).tensors

    def make():
        shifts = Augmentation(crop=2)
        return TensorLoader(x, y, 64, augmentation=shifts, generator=torch.Generator().manual_seed(5))

    histories = []
    for feed in ("frozen", "cached"):
        stages = [lw.Stage(((0, 0),), 1), lw.Stage(((1, 1),), 3, feed=feed)]
        cache = lw.FeatureCache() if feed == "cached" else None
        if cache is None:
            histories.append(fit(cnn(), replace(PLAIN, schedule=stages), make()))
        else:
            with pytest.warns(RuntimeWarning, match="nothing is recorded"):
                histories.append(fit(cnn(), replace(PLAIN, schedule=stages), make(), cache=cache))
    assert [r["loss"] for r in histories[0].history] == [r["loss"] for r in histories[1].history]


def test_resume_takes_the_rate_that_is_given_now(tmp_path):
    path = tmp_path / "c.pt"

    class Interrupt(Exception):
        pass

    def interrupt(trainer, rows):
        if len(trainer.history) == 3:
            raise Interrupt

    def method(lr, decay=0.0):
        return lw.Method("m", lambda n: lw.bottom_up(n, 2), optimizer=lw.OptimizerSpec("sgd", lr, decay))

    with pytest.raises(Interrupt):
        fit(cnn(), method(0.1), checkpoint=path, callbacks=[interrupt])
    trainer = fit(cnn(), method(0.001, 0.01), checkpoint=path, resume=True)
    assert [row["lr"] for row in trainer.history] == pytest.approx([0.1, 0.1, 0.001, 0.001, 0.001, 0.001])
    for other, text in (
        (replace(method(0.1), schedule=lambda n: lw.bottom_up(n, 3)), r"stages\[0\]"),
        (replace(method(0.1), loss="exp_ga"), "loss 'cross_entropy', here 'exp_ga'"),
        (replace(method(0.1), optimizer=ADAM), "optimizer 'sgd', here 'adam'"),
        (replace(method(0.1), head=lw.ConvHead(2, width=3)), r"heads\[0\] 'LinearHead"),
        (
            replace(method(0.1), head=lw.LinearHead(zero_init=True)),
            r"heads\[0\] .*zero_init=False.* here .*zero_init=True",
        ),
        (
            replace(method(0.1), loss_options={"label_smoothing": 0.1}),
            "loss_options '{}', here '{label_smoothing: 0.1}'",
        ),
        (replace(method(0.1), loss=nn.CrossEntropyLoss(label_smoothing=0.5)), "loss 'cross_entropy', here 'Cross.*0.5"),
        (
            replace(method(0.1), optimizer=lw.OptimizerSpec("sgd", 0.1, options={"momentum": 0.9})),
            "optimizer_options '{}', here '{momentum: 0.9}'",
        ),
    ):
        with pytest.raises(lw.CheckpointError, match=text):
            fit(cnn(), other, checkpoint=path, resume=True)


def test_an_ensemble_of_more_heads_than_a_float_has_exponents():
    unit, head = nn.Identity(), nn.Identity()
    ensemble = lw.HeadEnsemble([unit], [(0, head)] * 1100)
    assert torch.isfinite(ensemble.weights).all() and float(ensemble.weights.sum()) == pytest.approx(1)


def test_what_describes_losses():
    smooth = nn.CrossEntropyLoss(label_smoothing=0.5)
    texts = [describe(loss) for loss in (
        nn.CrossEntropyLoss(), smooth, partial(F.cross_entropy, label_smoothing=0.1), partial(F.mse_loss, reduction="sum"),
        F.mse_loss, lw.PredSimLoss(0.5), lw.PredSimLoss(0.6), lw.ScoresLoss(F.mse_loss), lw.ScoresLoss(smooth), "exp_ga",
    )]  # fmt: skip
    assert len(set(texts)) == len(texts)
    assert describe(smooth) == describe(nn.CrossEntropyLoss(label_smoothing=0.5))
