"""Heads, local losses, noise, schedules, ensembles and pruning, by themselves."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional as F

import layerwise as lw
from layerwise_cases import ADAM, METHODS, cnn, digits, loader

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- heads ----

SHAPES = [(4, 6, 7, 5), (4, 6, 1, 1), (4, 9, 12), (4, 10)]
SPECS = [
    lw.LinearHead(), lw.LinearHead(1, True, True), lw.ConvHead(1), lw.ConvHead(2), lw.ConvHead(3, width=4, batch_norm=False),
    lw.ConvHead(2, downsample=2), lw.PredSimHead(64), lw.RidgeHead(),
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_head_fits_every_kind_of_output(spec, shape):
    x = torch.randn(shape)
    head = lw.build_head(spec, x, 3)
    output = head(x)
    scores = output.scores if isinstance(output, lw.HeadOutput) else output
    assert scores.shape == (4, 3) and bool(torch.isfinite(scores).all())
    other = head(torch.randn(2, *shape[1:]))
    assert (other.scores if isinstance(other, lw.HeadOutput) else other).shape == (2, 3)


def test_a_linear_head_is_a_linear_function_of_means_over_quadrants():
    x = torch.randn(5, 3, 8, 6)
    head = lw.build_head(lw.LinearHead(), x, 4)
    means = torch.stack([x[:, :, a : a + 4, b : b + 3].mean((2, 3)) for a in (0, 4) for b in (0, 3)], 2).flatten(1)
    torch.testing.assert_close(head(x), head[-1](means))


def test_a_convolutional_head_has_the_layers_of_the_paper():
    head = lw.build_head(lw.ConvHead(3, width=16), torch.randn(2, 8, 8, 8), 10)
    kinds = [type(m).__name__ for m in head]
    assert kinds == [
        "Conv2d",
        "BatchNorm2d",
        "ReLU",
        "Conv2d",
        "BatchNorm2d",
        "ReLU",
        "Pool",
        "Flatten",
        "BatchNorm1d",
        "Linear",
    ]
    assert head[0].in_channels == 8 and head[3].out_channels == 16 and head[-1].in_features == 64


def test_unpadded_convolutions_after_halving():
    head = lw.build_head(lw.ConvHead(3, downsample=2, padding=False, width=4), torch.randn(2, 3, 14, 14), 5)
    assert head[:7](torch.randn(2, 3, 14, 14)).shape == (2, 4, 3, 3)
    with pytest.raises(ValueError, match="do not fit"):
        lw.build_head(lw.ConvHead(3, downsample=2, padding=False), torch.randn(2, 3, 8, 8), 5)


@given(c=st.integers(1, 70), h=st.integers(1, 33), w=st.integers(1, 33), most=st.integers(70, 600))
def test_predsim_pools_until_there_are_few_enough_features(c, h, w, most):
    head = lw.build_head(lw.PredSimHead(most), torch.zeros(2, c, h, w), 3)
    features = head.classifier.in_features
    assert features <= most
    down = head.pool.kernel_size if isinstance(head.pool, nn.AvgPool2d) else (1, 1)
    assert features == c * math.ceil(h / down[0]) * math.ceil(w / down[1])
    assert down[0] in (down[1], 2 * down[1]) or down[0] == h or down[1] == w
    before = [(math.ceil(down[0] / 2), down[1]), (down[0], math.ceil(down[1] / 2))]
    if down != (1, 1):
        assert any(c * math.ceil(h / a) * math.ceil(w / b) > most for a, b in before)
    assert head(torch.randn(2, c, h, w)).scores.shape == (2, 3)


def test_predsim_begins_with_no_opinion():
    output = lw.build_head(lw.PredSimHead(), torch.zeros(2, 8, 6, 6), 3)(torch.randn(2, 8, 6, 6))
    assert bool((output.scores == 0).all()) and output.similarity.shape == (2, 8, 6, 6)


def test_token_heads():
    x = torch.randn(3, 5, 8)
    for pool, features in (("mean", 8), ("cls", 8), ("both", 16)):
        head = lw.build_head(lw.TokenHead(pool, hidden=1, width=4), x, 2)
        assert head[2].in_features == features and head(x).shape == (3, 2)
    with pytest.raises(ValueError, match="expected pool"):
        lw.TokenHead("max")
    with pytest.raises(ValueError, match=r"expected tokens \(B, T, C\)"):
        lw.build_head(lw.TokenHead(), torch.zeros(2, 3), 2)


def test_a_ridge_head_has_scikit_learns_solution():
    torch.manual_seed(0)
    x, y = torch.randn(500, 12), torch.randint(3, (500,))
    head = lw.build_head(lw.RidgeHead(l2=0.1, every=1, memory=1e12), x, 3).train()
    for begin in range(0, 500, 100):
        head(x[begin : begin + 100])
        head.observe(y[begin : begin + 100])
    centred = x - x.mean(0)
    alpha = 0.1 * centred.square().sum(0).mean().item()
    oracle = Ridge(alpha).fit(x.numpy(), np.eye(3)[y.numpy()])
    torch.testing.assert_close(head.weight, torch.tensor(oracle.coef_, dtype=torch.float32), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.bias, torch.tensor(oracle.intercept_, dtype=torch.float32), rtol=1e-4, atol=1e-6)
    assert not list(head.parameters())


def test_a_ridge_head_forgets():
    head = lw.build_head(lw.RidgeHead(memory=2, every=3), torch.zeros(2, 4), 2).train()
    x, y = torch.randn(50, 4), torch.zeros(50, dtype=torch.long)
    weights = []
    for label in (0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1):
        head(x)
        head.observe(y + label)
        weights.append(head.bias.clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[3], weights[6])
    assert head.bias[1] > 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lw.build_head("linear", torch.zeros(2, 3), 2), "expected a specification"),
        (lambda: lw.build_head(lw.LinearHead(), torch.zeros(2, 3), 0), "classes: expected a positive"),
        (lambda: lw.build_head(lw.LinearHead(), torch.zeros(2, 3, 4, 5, 6, 7), 2), "expected features"),
        (lambda: lw.ConvHead(0), "expected k"),
        (lambda: lw.build_head(lw.PredSimHead(8), torch.zeros(2, 9, 2, 2), 2), "9 channels exceed"),
        (lambda: lw.RidgeHead(l2=0), "expected l2 > 0"),
    ],
)
def test_heads_that_cannot_be(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


# ---- local losses ----


def test_similarities_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [2.0, 4.0, 6.0]])
    expected = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
    torch.testing.assert_close(lw.similarity_matrix(x), expected)


def test_similarities_of_images_are_of_standard_deviations():
    x = torch.randn(5, 4, 3, 3)
    std = torch.tensor(x.numpy().reshape(5, 4, 9).std(2, ddof=1))
    torch.testing.assert_close(
        lw.similarity_matrix(x), torch.tensor(np.corrcoef(std), dtype=torch.float32), rtol=1e-4, atol=1e-5
    )
    few = torch.randn(5, 3, 3, 3)
    expected = torch.tensor(np.corrcoef(few.flatten(1)), dtype=torch.float32)
    torch.testing.assert_close(lw.similarity_matrix(few), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_one_hot_labels_have_a_similarity_of_minus_one_over_the_others(classes):
    y = torch.arange(classes).repeat(2)
    from layerwise.local_losses import label_similarity

    torch.testing.assert_close(label_similarity(y, classes), lw.similarity_matrix(F.one_hot(y, classes).float()))
    assert label_similarity(y, classes).min().item() == pytest.approx(-1 / (classes - 1))


def test_predsim_weights_both_parts():
    scores, features, y = torch.randn(6, 3), torch.randn(6, 7), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = lw.make_local_loss("predsim", beta=0.7)
    S, T = lw.similarity_matrix(features), lw.similarity_matrix(F.one_hot(y).float())
    expected = 0.3 * F.cross_entropy(scores, y) + 0.7 * (S - T).square().mean()
    torch.testing.assert_close(loss(lw.HeadOutput(scores, features), y), expected)
    torch.testing.assert_close(loss(scores, y), 0.3 * F.cross_entropy(scores, y))


@pytest.mark.parametrize("name", ["cross_entropy", "exp_ga", "pow3_ga", "linear_mse", "mse"])
def test_named_losses_have_gradients(name):
    scores = torch.randn(6, 3, requires_grad=True)
    lw.make_local_loss(name)(lw.HeadOutput(scores, scores), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    assert scores.grad is not None and bool(scores.grad.abs().sum() > 0)


def test_unknown_losses():
    with pytest.raises(ValueError, match="unknown loss 'hinge'; there are"):
        lw.make_local_loss("hinge")
    with pytest.raises(TypeError, match="belong to a named loss"):
        lw.make_local_loss(F.cross_entropy, beta=1)
    with pytest.raises(ValueError, match="beta"):
        lw.make_local_loss("predsim", beta=2.0)


# ---- noise ----


@pytest.mark.parametrize("rescale", [True, False])
def test_gradient_dropout_leaves_values_and_drops_gradients(rescale):
    torch.manual_seed(0)
    x = torch.randn(200, 200, requires_grad=True)
    y = lw.gradient_dropout(x, 0.6, rescale)
    assert torch.equal(x, y)
    y.sum().backward()
    kept = x.grad != 0
    assert kept.float().mean().item() == pytest.approx(0.4, abs=0.01)
    assert x.grad[kept].unique().tolist() == pytest.approx([2.5 if rescale else 1.0])


def test_gradient_noise_is_relative():
    torch.manual_seed(0)
    x = torch.randn(300, 300, requires_grad=True)
    (lw.gradient_noise(x, 0.5) * 4).sum().backward()
    noise = x.grad - 4
    assert noise.std().item() == pytest.approx(2.0, rel=0.02) and noise.mean().item() == pytest.approx(0, abs=0.03)


def test_input_dropout_decays_and_spares_channels_as_a_whole():
    noise = lw.Regularisation(0.8, 0.5)
    torch.manual_seed(0)
    x = torch.ones(100, 100)
    for epoch, p in enumerate([0.8, 0.4, 0.2]):
        assert (noise.on_input(x, epoch) == 0).float().mean().item() == pytest.approx(p, abs=0.02)
    whole = lw.Regularisation(0.5, channelwise=True).on_input(torch.ones(8, 50, 4, 4), 0)
    assert set(whole.mean((2, 3)).flatten().tolist()) == {0.0, 2.0}


def test_the_models_own_input_and_evaluation_are_spared():
    method = lw.Method(
        "noise",
        lambda n: lw.bottom_up(n, 1),
        optimizer=ADAM,
        regularisation=lw.Regularisation(0.9, gradient_dropout=0.5),
    )
    trainer = lw.LayerwiseTrainer(cnn(), method, classes=10)
    seen = []
    for unit in trainer.chain:
        unit.register_forward_pre_hook(
            lambda m, inputs: seen.append((m.name, m.training, (inputs[0] == 0).float().mean().item()))
        )
    data = [(torch.rand(50, 1, 8, 8) + 0.1, torch.arange(50) % 10)]
    trainer.fit(data, data)
    trained = {name: zeros for name, training, zeros in seen if training}
    assert trained["0"] == 0 and trained["3"] > 0.8
    with pytest.raises(ValueError, match="input_dropout"):
        lw.Regularisation(1.0)


# ---- schedules ----


def test_schedules_are_data():
    assert [s.windows for s in lw.bottom_up(3, 5)] == [((0, 0),), ((1, 1),), ((2, 2),)]
    assert [s.epochs for s in lw.bottom_up(4, (30, 40, 50))] == [30, 40, 50, 50]
    assert [s.epochs for s in lw.bottom_up(3, lambda i: 5 * 1.2**i)] == [5, 6, 7]
    assert [s.windows[0] for s in lw.sliding_windows(7, 1, size=3, overlap=2)] == [
        (0, 2),
        (1, 3),
        (2, 4),
        (3, 5),
        (4, 6),
    ]
    assert [s.windows[0] for s in lw.sliding_windows(5, 1, size=2)] == [(0, 1), (2, 3), (4, 4)]
    assert lw.simultaneous(3, 9) == [lw.Stage(((0, 0), (1, 1), (2, 2)), 9)]
    assert [s.windows[0][0] for s in lw.robin(3, 2)] == [0, 1, 2, 0, 1, 2]


@given(units=st.integers(1, 12), size=st.integers(1, 6), overlap=st.integers(0, 5))
def test_segments_cover_the_chain(units, size, overlap):
    if overlap >= size:
        with pytest.raises(ValueError, match="overlap < size"):
            lw.sliding_windows(units, 1, size=size, overlap=overlap)
        return
    windows = [s.windows[0] for s in lw.sliding_windows(units, 1, size=size, overlap=overlap)]
    assert {i for a, b in windows for i in range(a, b + 1)} == set(range(units))
    assert windows[-1][1] == units - 1 and all(b[0] - a[0] == size - overlap for a, b in pairwise(windows))


@given(units=st.integers(1, 9), rounds=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_random_robin_trains_every_unit_once_a_round(units, rounds, seed):
    stages = lw.robin(units, rounds, shuffle=True, seed=seed)
    for r in range(rounds):
        assert sorted(s.windows[0][0] for s in stages if s.round == r) == list(range(units))
    assert stages == lw.robin(units, rounds, shuffle=True, seed=seed)


@pytest.mark.parametrize(
    ("windows", "epochs", "feed"),
    [
        ((), 1, "frozen"),
        (((0, 1), (1, 2)), 1, "frozen"),
        (((2, 1),), 1, "frozen"),
        (((0, 0),), 0, "frozen"),
        (((0, 0),), 1, "x"),
    ],
)
def test_stages_that_cannot_be(windows, epochs, feed):
    with pytest.raises(ValueError):
        lw.Stage(windows, epochs, feed)


# ---- ensembles ----


@pytest.mark.parametrize("over", ["logits", "probabilities"])
def test_an_ensemble_weighs_heads_by_powers_of_two(over):
    trainer = lw.LayerwiseTrainer(cnn(), METHODS["bottom up"], classes=10)
    trainer.fit(loader(100))
    x = next(iter(loader(shuffle=False)))[0]
    heads = [trainer.export(i)(x) for i in range(3)]
    if over == "probabilities":
        heads = [z.softmax(1) for z in heads]
    expected = (heads[0] + 2 * heads[1] + 4 * heads[2]) / 7
    torch.testing.assert_close(lw.make_ensemble(trainer, over=over)(x), expected)
    torch.testing.assert_close(
        lw.make_ensemble(trainer, units=[0, 2], weights=[1, 3], over=over)(x), (heads[0] + 3 * heads[2]) / 4
    )
    with pytest.raises(ValueError, match="expected 2, one per head, got 1"):
        lw.make_ensemble(trainer, units=[0, 2], weights=[1])
    with pytest.raises(ValueError, match="over: expected"):
        lw.make_ensemble(trainer, over="votes")


# ---- pruning ----


def test_importance_is_the_change_of_a_linear_loss():
    torch.manual_seed(0)
    unit, w = nn.Conv2d(1, 5, 3), torch.randn(5)

    def subnet(x):
        h = unit(x)
        return h.mean((2, 3)) @ w, h

    x = torch.randn(6, 1, 7, 7)
    importance = lw.filter_importance(
        subnet, unit, lambda out, y: out.mean(), [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(2))]
    )
    expected = (unit(x).mean((2, 3)) * w).abs().mean(0) / unit(x)[0, 0].numel()
    torch.testing.assert_close(importance, expected.detach())


@pytest.mark.parametrize("norm", [True, False])
def test_pruned_filters_are_those_whose_absence_nobody_sees(norm):
    torch.manual_seed(0)
    model = cnn(8, norm)
    chain = lw.split(model)
    x = torch.randn(10, 1, 8, 8)
    chain.eval()
    dead = torch.tensor([1, 4, 6])
    with torch.no_grad():
        layer = model[0]
        layer.weight[dead] = 0
        layer.bias[dead] = 0
        if norm:
            model[1].bias[dead] = 0
        model[3 if norm else 2].weight[:, dead] = 0
    before = chain(x)
    keep = torch.tensor([0, 2, 3, 5, 7])
    lw.prune_unit(chain[0], [chain[1]], x, keep)
    assert model[0].out_channels == 5 and model[3 if norm else 2].in_channels == 5
    torch.testing.assert_close(chain(x), before, rtol=1e-4, atol=1e-5)
    head = lw.build_head(lw.ConvHead(3, width=4), chain[0](x), 10)
    lw.prune_unit(chain[0], [chain[1], head], x, torch.tensor([0, 3]))
    assert head(chain[0](x)).shape == (10, 10)


def test_pruning_follows_channels_through_space_to_depth_and_flattening():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(24, 3, 1)), nn.Flatten(), nn.Linear(48, 2)
    )  # fmt: skip
    chain = lw.split(model, ["0", "1", "3"])
    x = torch.randn(2, 1, 8, 8)
    head = lw.build_head(lw.LinearHead(batch_norm=True), chain[0](x), 10).eval()
    chain.eval()
    with torch.no_grad():
        model[0].weight[[0, 2]] = 0
        model[0].bias[[0, 2]] = 0
    before, scores = chain(x), head(chain[0](x))
    lw.prune_unit(chain[0], [chain[1], head], x, torch.tensor([1, 3, 4, 5]))
    assert model[1][1].in_channels == 16 and head[-1].in_features == 16
    torch.testing.assert_close(chain(x), before)
    torch.testing.assert_close(head(chain[0](x)), scores)


def test_a_residual_unit_cannot_be_pruned_and_stays_as_it_was():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.a(x)

    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Linear(4, 3))
    chain = lw.split(model, ["0", "1"])
    x = torch.randn(5, 4)
    before = chain(x)
    with pytest.raises(lw.PruningError):
        lw.prune_unit(chain[0], [chain[1]], x, torch.tensor([0, 1]))
    assert torch.equal(chain(x), before) and model[0].a.out_features == 4


class Shortcut(nn.Module):
    def __init__(self, channels: int, leaving: int = 0) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, leaving or channels, 3, padding=1)
        self.way = nn.Conv2d(channels, leaving, 1) if leaving else nn.Identity()

    def forward(self, x):
        return torch.relu(self.conv(torch.relu(self.norm(x))) + self.way(x))


def with_shortcut(leaving: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
    last = nn.Linear(leaving or 4, 10)
    return nn.Sequential(stem, Shortcut(4, leaving), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)


@pytest.mark.parametrize("keep", [[2], [0, 3]])
def test_what_a_shortcut_adds_cannot_be_pruned_and_stays_as_it_was(keep):
    model = with_shortcut()
    chain = lw.split(model)
    chain.eval()
    x = torch.randn(6, 1, 8, 8)
    before, modes = chain(x), [m.training for m in model.modules()]
    with pytest.raises(lw.PruningError):
        lw.prune_unit(chain[0], [chain[1]], x, torch.tensor(keep))
    assert torch.equal(chain(x), before) and [m.training for m in model.modules()] == modes
    assert model[0][0].out_channels == model[1].conv.in_channels == 4


def test_every_reader_of_pruned_channels_is_narrowed():
    model = with_shortcut(leaving=7)
    chain = lw.split(model)
    x = torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        model[0][0].weight[1] = model[0][0].bias[1] = 0
        model[1].conv.weight[:, 1] = 0
    head = lw.build_head(lw.PredSimHead(64), chain[0](x), 10)
    nn.init.normal_(head.classifier.weight)
    chain.eval()
    before, scores = chain(x), head(chain[0](x))
    lw.prune_unit(chain[0], [chain[1], head], x, torch.tensor([0, 2, 3]))
    assert model[1].norm.num_features == model[1].conv.in_channels == model[1].way.in_channels == 3
    torch.testing.assert_close(chain(x), before)
    after = head(chain[0](x))
    torch.testing.assert_close(after.scores, scores.scores)
    assert after.similarity.shape == scores.similarity.shape


@pytest.mark.parametrize(
    "head", [lw.LinearHead(), lw.PredSimHead(), lw.ConvHead(3), lw.AffineHead((8,)), lw.DecisionBlock()]
)
def test_pruning_beside_every_head(head):
    method = lw.Method(
        "pruning", lambda n: lw.bottom_up(n, 1), head=head, optimizer=ADAM, pruning=lw.Pruning(0.5, 1, 2)
    )
    trainer = lw.LayerwiseTrainer(cnn(), method, classes=10)
    trainer.fit(loader(100))
    assert {k: len(v) for k, v in trainer.pruned.items()} == {0: 3, 1: 3}


def test_a_trained_chain_keeps_half_of_its_filters():
    method = replace(METHODS["pruning"], schedule=lambda n: lw.bottom_up(n, 15))
    trainer = lw.LayerwiseTrainer(cnn(8), method, classes=10)
    trainer.fit(loader(300), loader(100))
    assert [m.out_channels for m in trainer.chain.model if isinstance(m, nn.Conv2d)] == [4, 4, 8]
    assert {k: len(v) for k, v in trainer.pruned.items()} == {0: 4, 1: 4}
    assert trainer.evaluate(loader(300)) > 0.5
    assert all(trainer.export(i)(digits(20).tensors[0]).shape == (20, 10) for i in range(3))
