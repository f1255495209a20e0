"""Outputs with one or three axes of positions: which of three axes holds the channels, heads and probes on them."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise as lw
from layerwise.layouts import is_sequence, takes_sequence
from layerwise.probes import LeastSquaresDistance
from layerwise_cases import ADAM, digits

pytestmark = pytest.mark.usefixtures("one_thread")

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
AVERAGES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
SHAPES = ((64,), (8, 8), (4, 4, 4))


def network(dims: int, batch: int = 25) -> tuple[nn.Module, DataLoader]:
    """Two convolutions of so many dimensions, and digits for them."""
    conv, average = CONVOLUTIONS[dims - 1], AVERAGES[dims - 1]
    layers = [conv(1, 8, 3, padding=1), nn.ReLU(), conv(8, 8, 3, padding=1), nn.ReLU()]
    x, y = digits(50, flat=True).tensors
    x = x.reshape(-1, 1, *SHAPES[dims - 1])
    return nn.Sequential(*layers, average(1), nn.Flatten(), nn.Linear(8, 10)), DataLoader(TensorDataset(x, y), batch)


# ---- which axis ----


@pytest.mark.parametrize(
    ("modules", "shape", "expected"),
    [
        ([nn.Conv1d(2, 8, 3)], (5, 8, 20), True),
        ([nn.Conv1d(2, 8, 3)], (5, 20, 8), False),  # swapped since
        ([nn.Conv1d(2, 8, 3)], (5, 8, 8), True),
        ([nn.ConvTranspose1d(2, 8, 3), nn.BatchNorm1d(8), nn.ReLU()], (5, 8, 20), True),
        ([nn.Conv1d(2, 8, 3), nn.Linear(8, 2), nn.Linear(2, 8)], (5, 8, 20), True),  # squeezed and excited
        ([nn.Conv1d(2, 8, 3), nn.LayerNorm(8)], (5, 20, 8), False),
        ([nn.Conv1d(2, 8, 3), nn.LSTM(8, 6, bidirectional=True)], (5, 20, 12), False),
        ([nn.Embedding(30, 8), nn.MultiheadAttention(8, 2)], (5, 8, 8), False),
        ([nn.Linear(4, 8), nn.GroupNorm(2, 20)], (5, 20, 8), True),
        ([nn.Linear(4, 8)], (5, 20, 8), False),
        ([nn.Conv1d(2, 8, 3)], (5, 8), False),
        ([nn.Conv2d(2, 8, 3)], (5, 8, 4, 4), False),
        ([], (5, 8, 20), False),
    ],
)
def test_the_last_module_whose_channels_fit_an_axis_tells(modules, shape, expected):
    assert is_sequence(modules, torch.zeros(shape)) is expected


def test_what_a_network_takes():
    x = torch.zeros(5, 2, 20)
    assert takes_sequence([nn.ReLU(), nn.Conv1d(2, 8, 3), nn.Linear(8, 8)], x)
    assert not takes_sequence([nn.Linear(20, 2), nn.Conv1d(2, 8, 3)], x)
    assert not takes_sequence([nn.Conv1d(20, 8, 3)], x)
    assert not takes_sequence([nn.Conv1d(2, 8, 3)], x[0])


# ---- heads ----


@pytest.mark.parametrize(
    "spec",
    [
        lw.LinearHead(), lw.LinearHead(batch_norm=True), lw.ConvHead(3, width=6), lw.ConvHead(2, downsample=2, padding=False),
        lw.DecisionBlock(convs=2, channels=5, pool=2), lw.PredSimHead(), lw.PredSimHead(max_features=20), lw.RidgeHead(),
    ],
    ids=lambda spec: type(spec).__name__,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(8, 1, 24), (8, 6, 6, 5), (8, 1, 6, 5)], ids=str)
def test_heads_on_rows_and_volumes(spec, shape):
    head = lw.build_head(spec, torch.randn(2, *shape), 3)
    out = head(torch.randn(4, *shape))
    scores, *similarity = out if isinstance(out, lw.HeadOutput) else [out]
    assert scores.shape == (4, 3)
    assert [part.shape for part in similarity] in ([], [(4, *shape)])


def test_kernels_are_as_flat_as_what_they_see():
    row = lw.build_head(lw.ConvHead(3), torch.randn(2, 8, 1, 24), 3)
    assert [m.kernel_size for m in row if isinstance(m, nn.Conv2d)] == [(1, 3)] * 2
    point = lw.build_head(lw.ConvHead(2), torch.randn(2, 8, 1, 1), 3)
    assert point[0].kernel_size == (3, 3)  # as in the papers' networks, whose last images are points
    # a row's head is the one-dimensional one
    x = torch.randn(4, 8, 24)
    flat = nn.functional.conv1d(x, row[0].weight[:, :, 0], padding=1)
    torch.testing.assert_close(row[0](x[:, :, None])[:, :, 0], flat)


def test_other_forms_are_refused():
    for spec in (lw.LinearHead(), lw.ConvHead(2), lw.DecisionBlock(), lw.PredSimHead(), lw.RidgeHead()):
        with pytest.raises(ValueError, match=r"expected features \(B, C\), tokens .*, got \(2, 8, 2, 2, 2, 2\)"):
            lw.build_head(spec, torch.randn(2, 8, 2, 2, 2, 2), 3)


# ---- training and probes ----


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize(
    "method",
    [
        lw.greedy(1, epochs=1),
        lw.greedy(3, width=6, epochs=1),
        lw.dll(0.95, epochs=1),
        lw.predsim(epochs=1),
        lw.Method("ridge", lambda n: lw.bottom_up(n, 1), head=lw.RidgeHead(), optimizer=ADAM),
        replace(lw.greedy(2, width=6, epochs=1), pruning=lw.Pruning(keep=0.5, epochs=1)),
    ],
    ids=["greedy1", "greedy3", "dll", "predsim", "ridge", "pruning"],
)
def test_methods_on_other_positions(method, dims):
    model, data = network(dims)
    trainer = lw.LayerwiseTrainer(model, method, classes=10)
    torch.manual_seed(0)
    trainer.fit(data)
    x = next(iter(data))[0]
    lowest = trainer.export(trainer.heads[0])
    torch.testing.assert_close(pickle.loads(pickle.dumps(lowest))(x), lowest(x))
    assert lowest(x).shape == (25, 10) and trainer.export()(x).shape == (25, 10)
    assert lw.make_ensemble(trainer)(x).shape == (25, 10)


def test_a_sequence_is_averaged_over_its_positions():
    """Classes differ by the sign of a channel beside which another has the other sign, so that the mean over channels is 0."""
    y = torch.arange(200) % 2
    x = (2.0 * y - 1)[:, None, None] + 0.1 * torch.randn(200, 1, 12, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(
        nn.Conv1d(2, 12, 1), nn.Conv1d(12, 12, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 2)
    )
    with torch.no_grad():  # as many channels as positions, in pairs of opposite signs
        model[0].weight[1::2] = -model[0].weight[::2]
        model[0].bias.zero_()
    model[0].requires_grad_(False)
    data = DataLoader(TensorDataset(torch.cat([x, -x], 1), y), 50)
    method = lw.Method("one", [lw.Stage(((0, 0),), 1)], head=lw.LinearHead(pool=1), optimizer=ADAM)
    trainer = lw.LayerwiseTrainer(model, method, classes=2)
    trainer.fit(data)
    assert trainer.trainings[0, 0].subnet.head[-1].in_features == 12
    table = lw.probe(trainer.chain, data, measures=LeastSquaresDistance(intercept=True))
    assert [row["shape"] for row in table.rows][:2] == ["2x1x12", "12x1x12"]
    assert max(row["lsd_intercept"] for row in table.rows[:2]) < 0.05  # 1 of the means over channels


@pytest.mark.parametrize("dims", [1, 3])
def test_probes_of_other_positions(dims):
    model, data = network(dims)
    measures = ("lsd", "k_redundancy", "conditional_entropy", "linear_separability", "cnn_separability", "pca")
    table = lw.probe(model, data, measures=measures, test_loader=data)
    assert [row["shape"] for row in table.rows] == [["1x1x64", "8x1x64", "10"], [], ["1x4x4x4", "8x4x4x4", "10"]][
        dims - 1
    ]


# ---- what is cut ----


class Encoder(nn.Module):
    def __init__(self, norm: bool = False, masked: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(8) if norm else None)
        self.classifier = nn.Linear(8, 4)
        self.masked = masked

    def forward(self, x):
        mask = x == 0 if self.masked else None
        return self.classifier(self.encoder(self.embedding(x), src_key_padding_mask=mask).mean(1))


@pytest.mark.parametrize("norm", [False, True])
def test_an_encoder_is_its_layers(norm):
    x = torch.randint(1, 20, (6, 5))
    chain = lw.split(Encoder(norm), example=x)
    assert chain.names == ["embedding", *(f"encoder.layers.{i}" for i in range(3))]
    assert lw.split(Encoder(norm), ["embedding", "encoder"], example=x).names == ["embedding", "encoder"]
    data = DataLoader(TensorDataset(x, torch.arange(6) % 4), 3)
    trainer = lw.LayerwiseTrainer(Encoder(norm), lw.dll(0.9, epochs=1), classes=4)
    trainer.fit(data)
    lw.assert_isolated(trainer, next(iter(data)))


def test_an_encoder_with_a_mask_stays_whole():
    x = torch.randint(0, 20, (6, 5))
    x[:, 0] = 1
    assert "encoder.layers.0" not in lw.split(Encoder(masked=True), example=x).names


@pytest.mark.parametrize(
    ("wrap", "inner"),
    [(nn.DataParallel, "model.module"), (lambda m: torch.compile(m, backend="eager"), "model._orig_mod")],
    ids=["parallel", "compiled"],
)
def test_wrappers_are_named(wrap, inner):
    with pytest.raises(lw.SplitError, match=rf"cannot be cut; give the network in it, {inner}"):
        lw.split(wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))))
