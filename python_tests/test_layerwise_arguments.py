"""What a user of layer-wise training can get wrong, and what the errors say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import layerwise as lw
from layerwise.data import Augmentation
from layerwise_cases import METHODS, cnn, digits, loader, mlp

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = lw.Method("plain", lambda n: lw.bottom_up(n, 1))


def fit(method, model=None, data=None, **options):
    trainer = lw.LayerwiseTrainer(model or cnn(), method, classes=10, **options)
    trainer.fit(data or loader(), loader(100))
    return trainer


# ---- settings ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amp": torch.float64}, "amp: expected None"),
        ({"accumulate": 0}, "accumulate: expected a whole number"),
        ({"accumulate": 1.5}, "accumulate: expected a whole number"),
        ({"clip_norm": -1.0}, "clip_norm: expected a number above 0"),
        ({"clip_norm": 0.0}, "clip_norm: expected a number above 0"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected at least 1"),
        ({"distributed": "fsdp"}, "distributed: expected None"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        lw.LayerwiseTrainer(cnn(), METHODS["greedy"], classes=10, **options)


def test_wrong_methods():
    with pytest.raises(TypeError, match=r"^head: expected a specification such as LinearHead\(\)"):
        replace(PLAIN, head=lw.LinearHead)
    with pytest.raises(TypeError, match=r"^head: "):
        replace(PLAIN, head=nn.Linear(3, 3))
    with pytest.raises(ValueError, match="right below the window"):
        lw.LayerwiseTrainer(cnn(), replace(PLAIN, filtering=lw.LossFilter()), classes=10)
    for name in ("optimizer", "regularisation", "stopping"):
        with pytest.raises(TypeError, match=f"^{name}: expected "):
            replace(PLAIN, **{name: "adam"})
    with pytest.raises(TypeError, match=r"^head: .* got 'linear'"):
        replace(PLAIN, head="linear")
    for method in ("dll", lw.dll):
        with pytest.raises(TypeError, match=r"method: expected a Method such as layerwise.dll\(\)"):
            lw.LayerwiseTrainer(cnn(), method, classes=10)
    with pytest.raises(TypeError, match="cache: expected a FeatureCache, got True"):
        lw.LayerwiseTrainer(cnn(), PLAIN, classes=10, cache=True)
    with pytest.raises(ValueError, match="pruning: the only window ends with the model's output"):
        lw.LayerwiseTrainer(cnn(), lw.backprop(pruning=lw.Pruning()), classes=10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lw.LinearHead(pool=0), "LinearHead: expected a pool"),
        (lambda: lw.ConvHead(width=0), "ConvHead: expected k, width"),
        (lambda: lw.TokenHead(hidden=-1), "TokenHead: expected hidden"),
        (lambda: lw.TokenHead(width=0), "TokenHead: expected hidden"),
        (lambda: lw.PredSimHead(0), "PredSimHead: expected positive"),
        (lambda: lw.AffineHead((0,)), "AffineHead: expected positive widths"),
        (lambda: lw.AffineHead((8,), dropout=2.0), "a dropout from 0 to 1"),
        (lambda: lw.OptimizerSpec(lr=float("nan")), "lr and weight_decay"),
        (lambda: lw.dll(lr=0), "lr and weight_decay"),
        (lambda: lw.transfer(lr=0), "lr and weight_decay"),
        (lambda: lw.dll(variant="first", max_channels=8), "'first' has no decision blocks"),
        (lambda: lw.dll(0.5, variant="first"), "'first' has no decision blocks"),
        (lambda: lw.backprop(epochs=1.5).stages(2), "epochs: expected a whole number"),
        (lambda: lw.greedy(epochs=1.5).stages(2), "epochs: expected a whole number"),
        (
            lambda: lw.memory_report(lw.split(mlp(8)), PLAIN, torch.zeros(4, 64), 10, batch_size=0),
            "batch_size: expected",
        ),
        (lambda: Augmentation(crop=-1), "crop and cutout of at least 0"),
    ],
)
def test_wrong_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_budgets_of_other_kinds_of_numbers():
    assert lw.DecisionBlock(np.int64(1000)) == lw.DecisionBlock(1000)
    for budget in ("0.5", True, [1]):
        with pytest.raises(TypeError, match="budget: expected bytes"):
            lw.dll(budget)
    assert lw.greedy(epochs=np.int64(2)).stages(1)[0].epochs == 2
    assert lw.dll(variant="first", input_dropout=0.5).regularisation.input_dropout == 0.5


def test_filters_of_windows_that_train_together():
    alone = lw.predsim(epochs=1, filtering=lambda unit: lw.KFilter() if unit > 0 else None)
    with pytest.raises(ValueError, match="share their samples, so that they need one filter"):
        lw.LayerwiseTrainer(cnn(), alone, classes=10)
    kept = lw.KFilter(k=3, batch=300, cap=0.4, start_epoch=0)
    trainer = fit(lw.predsim(epochs=1, filtering=kept))
    assert all(row["seen"] < 1 for row in trainer.history)


# ---- data and labels ----


def test_wrong_data():
    def run(batches, validation=None, method=METHODS["greedy"]):
        lw.LayerwiseTrainer(cnn(), method, classes=10).fit(batches, validation)

    with pytest.raises(ValueError, match="at least one batch, got none"):
        run([])
    with pytest.raises(TypeError, match="expected pairs"):
        run([torch.zeros(3, 1, 8, 8)])
    with pytest.raises(TypeError, match="labels in a tensor"):
        run([(torch.zeros(3, 1, 8, 8), [1, 2, 3])])
    with pytest.raises(ValueError, match="stops or restores by validation"):
        run(loader(), method=METHODS["best weights"])
    x, y = digits(50).tensors
    with pytest.raises(ValueError, match="can be read in every epoch"):
        run(iter([(x, y)]))
    with pytest.raises(ValueError, match="validation: expected at least one batch"):
        run(loader(), [])


def test_wrong_units_and_windows():
    trainer = fit(METHODS["bottom up"])
    with pytest.raises(ValueError, match="unit 7 of a chain of 3"):
        trainer.export(7)
    with pytest.raises(RuntimeError, match="nothing has been trained"):
        lw.LayerwiseTrainer(cnn(), METHODS["greedy"], classes=10).export()
    with pytest.raises(ValueError, match="window"):
        lw.LayerwiseTrainer(cnn(), lw.Method("far", [lw.Stage(((5, 5),), 1)]), classes=10)
    with pytest.raises(ValueError, match="labels: expected 0 to 6"):
        lw.LayerwiseTrainer(cnn(), METHODS["greedy"], classes=7).fit(loader())
    with pytest.raises(ValueError, match="OwnHead: expected scores"):
        lw.LayerwiseTrainer(cnn(), METHODS["greedy"], classes=12).fit(loader())


def labelled(target):
    return [(digits(50).tensors[0], target)]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "exp_ga"])
def test_labels_that_named_losses_cannot_take(loss):
    y = digits(50).tensors[1]
    method = replace(PLAIN, loss=loss)
    for target in (y.float(), y[:, None], y[:, None].float(), F.one_hot(y, 10)):
        with pytest.raises(
            ValueError, match=r"labels: the loss .* takes class numbers \(N,\) or probabilities \(N, 10\), got"
        ):
            fit(method, data=labelled(target))
    with pytest.raises(TypeError, match="labels: expected int64"):
        fit(method, data=labelled(y.int()))


def test_labels_that_parts_cannot_take():
    y = digits(50).tensors[1]
    with pytest.raises(ValueError, match=r"predsim: expected class numbers \(N,\) as labels"):
        fit(lw.predsim(epochs=1), data=labelled(F.one_hot(y, 10).float()))
    with pytest.raises(ValueError, match=r"RidgeHead: expected class numbers \(N,\)"):
        fit(
            replace(PLAIN, head=lw.RidgeHead(), loss=lambda scores, y: scores.mean()), data=labelled(y[:, None].float())
        )


def test_dense_labels_train():
    y = digits(50).tensors[1]
    dense = labelled(F.one_hot(y, 10).float())
    for method in (PLAIN, replace(PLAIN, loss="mse"), replace(PLAIN, head=lw.RidgeHead(every=1), loss="mse")):
        by_number = fit(method, data=labelled(y)).history
        assert [r["loss"] for r in fit(method, data=dense).history] == pytest.approx([r["loss"] for r in by_number])


@pytest.mark.parametrize("loss", [F.binary_cross_entropy_with_logits, F.mse_loss])
def test_budgets_with_losses_of_dense_labels(loss):
    """Predictions take steps with labels of the kind that the loss takes."""
    several = (torch.rand(50, 10) < 0.3).float()
    data = labelled(several)
    method = lw.dll(0.9, epochs=1, loss=loss)
    trainer = fit(method, data=data)
    assert trainer.trainings[0, 0].sizes is not None
    x = data[0][0]
    predicted, measured = (
        lw.memory_report(lw.split(cnn()), method, x, 10, target=several, measure=measure) for measure in (False, True)
    )
    number = 0 if loss is not F.mse_loss else 4 * several.numel()  # in whose storage lie all differences
    assert 0 <= measured.total - predicted.total <= 2 * number


def test_inputs_that_are_no_tensors():
    with pytest.raises(TypeError, match=r"loader: expected inputs in a tensor, or a tuple of them .* got dict"):
        fit(PLAIN, data=[({"x": torch.zeros(3, 1, 8, 8)}, torch.zeros(3, dtype=torch.long))])


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x, scale=None):
        h = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(h if scale is None else h * scale)))


def test_optional_arguments_that_the_loader_gives():
    batch = ((torch.randn(9, 64), torch.rand(9, 1)), torch.arange(9))
    with pytest.raises(TypeError, match="the model takes these 2 inputs, its units do not: optional arguments"):
        fit(PLAIN, Optional(), [batch])


class Named(Optional):
    def forward(self, x):
        return {"scores": super().forward(x)}


def test_outputs_that_are_no_tensors():
    with pytest.raises(TypeError, match="got dict; wrap a model that gives something else"):
        lw.LayerwiseTrainer(Named(), PLAIN, classes=10).fit(loader(flat=True))


def test_a_loss_that_is_nan_from_the_start_leaves_a_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    torch.manual_seed(3)
    model = cnn()
    torch.manual_seed(3)
    with pytest.raises(lw.NonFiniteLossError, match="holds what was last saved"):
        fit(replace(PLAIN, optimizer=lw.OptimizerSpec("adamw", 1e30)), model, checkpoint=path)
    assert any(p.isnan().any() for p in model.parameters())
    trainer = lw.LayerwiseTrainer(model, PLAIN, classes=10, checkpoint=path)
    trainer.fit(loader(), loader(100), resume=True)
    again = cnn()
    torch.manual_seed(3)
    assert [row["loss"] for row in fit(PLAIN, again).history] == [row["loss"] for row in trainer.history]


# ---- several inputs ----


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x, z):
        return self.c(torch.relu(self.b(torch.relu(self.a(x + z)))))


def test_networks_of_several_inputs_are_called_as_the_model_is():
    x, y = digits(100, flat=True).tensors
    data = [((x, x.flip(1)), y)]
    model = Two()
    trainer = lw.LayerwiseTrainer(model, PLAIN, classes=10, spec=["a", "b"])
    trainer.fit(data)
    assert lw.accuracy(model, data) == trainer.evaluate(data) == lw.accuracy(trainer.export(), data)
    assert torch.equal(trainer.export()(*data[0][0]), trainer.export()(data[0][0]))
    ensemble = lw.make_ensemble(trainer)
    assert torch.equal(ensemble(*data[0][0]), ensemble(data[0][0]))
    last = lw.make_ensemble(trainer, units=[-1])
    torch.testing.assert_close(last(*data[0][0]), model(*data[0][0]))
    with pytest.raises(ValueError, match="an ascending order"):
        lw.make_ensemble(trainer, units=[1, 0])
