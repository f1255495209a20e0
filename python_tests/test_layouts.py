"""Outputs with one or three axes of positions: which of three axes holds the channels, heads and probes on them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import layerwise as lw
from layerwise.layouts import LayoutError, channel_axes
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


class Parameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(()))

    def forward(self, x):
        return x + self.shift


class Swap(nn.Module):
    def __init__(self, a: int = 1, b: int = -1) -> None:
        super().__init__()
        self.axes = a, b

    def forward(self, x):
        return x.movedim(*self.axes)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Squeezed(nn.Module):
    """Excites channels by their means over positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(channels, channels, 3, padding=1), nn.BatchNorm1d(channels)
        self.squeeze, self.excite = nn.Linear(channels, 4), nn.Linear(4, channels)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return torch.relu(x + y * self.excite(self.squeeze(y.mean(2)))[:, :, None])


class NormOfImages(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def separable(channels: int) -> nn.Module:
    """A block with its channels last inside."""
    inner = [
        Swap(),
        nn.LayerNorm(channels),
        nn.Linear(channels, 4 * channels),
        nn.Linear(4 * channels, channels),
        Swap(-1, 1),
    ]
    return Residual(nn.Conv1d(channels, channels, 3, padding=1, groups=channels), *inner)


def swapped(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv, Swap())


def mixer(channels: int) -> nn.Module:
    return Residual(nn.LayerNorm(channels), nn.Linear(channels, channels))


def attention(channels: int) -> nn.Module:
    return nn.TransformerEncoderLayer(channels, 2, 8, batch_first=True)


SECOND, LAST = 1, -1
CHAINS = {
    "convolutions": ([nn.Conv1d(2, 8, 3), nn.Conv1d(8, 6, 3)], (2, 20), [SECOND] * 3),
    "as many channels as positions": ([nn.Conv1d(2, 8, 3, padding=1), Squeezed(8), nn.Conv1d(8, 8, 1)], (2, 8), [SECOND] * 4),
    "squeezed to as many": ([nn.Conv1d(2, 8, 3, padding=1), Squeezed(8)], (2, 4), [SECOND] * 3),
    "up": ([nn.Conv1d(2, 8, 3), nn.Sequential(nn.ConvTranspose1d(8, 6, 3), nn.GroupNorm(2, 6), nn.ReLU())], (2, 9), [SECOND] * 3),
    "text": ([nn.Sequential(nn.Embedding(9, 6), Swap()), nn.Conv1d(6, 4, 3)], (20,), [None, SECOND, SECOND]),
    "patches": ([swapped(nn.Conv1d(1, 16, 4, 4)), attention(16)], (1, 40), [SECOND, LAST, LAST]),
    "as many patches": ([swapped(nn.Conv1d(1, 16, 4, 4)), attention(16)], (1, 64), [SECOND, LAST, LAST]),
    "channels last inside": ([nn.Conv1d(1, 4, 1), separable(4), separable(4), nn.Conv1d(4, 4, 1)], (1, 16), [SECOND] * 5),
    "square": ([nn.Conv1d(1, 8, 1), separable(8), separable(8), nn.Conv1d(8, 8, 1)], (1, 8), [SECOND] * 5),
    "along time": ([nn.Sequential(nn.Linear(20, 20), nn.ReLU()), nn.Conv1d(8, 8, 3)], (8, 20), [LAST, SECOND, SECOND]),
    "tokens": ([nn.Linear(6, 8), nn.Linear(8, 8)], (20, 6), [LAST] * 3),
    "square tokens": ([nn.Linear(6, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8))], (8, 6), [LAST] * 3),
    "images": ([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)], (3, 10, 10), [SECOND] * 4),
    "square images": ([nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), nn.Conv2d(8, 8, 3)], (3, 8, 8), [SECOND] * 3),
    "norm of images": ([nn.Conv2d(3, 8, 3), NormOfImages(8), NormOfImages(8)], (3, 9, 12), [SECOND] * 4),
    "images, channels last": ([swapped(nn.Conv2d(3, 8, 4, 4)), mixer(8)], (3, 32, 32), [SECOND, LAST, LAST]),
    "volumes": ([nn.Conv3d(1, 4, 3), nn.Conv3d(4, 4, 3)], (1, 8, 8, 8), [SECOND] * 3),
    "volumes, channels last": ([swapped(nn.Conv3d(3, 8, 4, 4)), mixer(8)], (3, 8, 16, 16), [SECOND, LAST, LAST]),
    "sums": ([Parameters(), Parameters()], (5, 6), [LAST] * 3),
    "images of sums": ([Parameters()], (5, 6, 7), [SECOND] * 2),
    "volumes of sums": ([Parameters()], (5, 6, 7, 8), [None] * 2),
    "features": ([nn.Linear(6, 4), nn.BatchNorm1d(4)], (6,), [None] * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_where_the_channels_are(name):
    modules, shape, expected = CHAINS[name]
    chain = lw.Chain([lw.Unit(str(i), module, [module]) for i, module in enumerate(modules)])
    chain.eval()
    x = torch.randint(9, (6, *shape)) if name == "text" else torch.randn(6, *shape)
    assert channel_axes(chain, x) == expected


def test_where_nothing_tells_house_heads_are_refused():
    layer = Parameters()
    chain = lw.Chain([lw.Unit("sum", layer, [layer])], has_output=False)
    data = DataLoader(TensorDataset(torch.randn(6, 2, 3, 4, 5), torch.arange(6) % 2), 6)
    method = lw.Method("one", lambda n: lw.bottom_up(n, 1), head=lw.LinearHead())
    with pytest.raises(LayoutError, match=r"unit 'sum': \(2, 3, 4, 5\) for a sample, and nothing tells"):
        lw.LayerwiseTrainer(chain, method, classes=2).fit(data)
    with pytest.raises(LayoutError, match=r"input: \(2, 3, 4, 5\)"):
        lw.probe(chain, data, measures="lsd")
    lw.LayerwiseTrainer(chain, replace(method, head=Flat()), classes=2).fit(data)


@dataclass(frozen=True)
class Flat:
    def build(self, example, classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(example[0].numel(), classes))


@dataclass(frozen=True)
class Wider(lw.LinearHead):
    """A user's own, of a house kind."""


def test_images_with_channels_last_train_as_images():
    torch.manual_seed(0)
    layers = [swapped(nn.Conv2d(3, 8, 4, 4)), mixer(8)]
    chain = lw.Chain([lw.Unit(str(i), layer, [layer]) for i, layer in enumerate(layers)], has_output=False)
    data = DataLoader(TensorDataset(torch.randn(20, 3, 16, 12), torch.arange(20) % 2), 10)
    for head in (lw.LinearHead(), Wider()):
        method = lw.Method("one", lambda n: lw.bottom_up(n, 1), head=head)
        trainer = lw.LayerwiseTrainer(chain, method, classes=2)
        trainer.fit(data)
        assert trainer.trainings[1, 1].subnet.head[-1].in_features == 8 * 4


def test_samples_along_another_axis_are_noticed():
    layer = nn.Sequential(Swap(0, 1), nn.Linear(6, 8))
    chain = lw.Chain([lw.Unit("swap", layer, [layer])], has_output=False)
    data = DataLoader(TensorDataset(torch.randn(20, 5, 6), torch.arange(20) % 2), 10)
    with pytest.raises(ValueError, match=r"unit 'swap' gives \(5, 10, 8\) for 10 samples"):
        lw.LayerwiseTrainer(chain, lw.Method("one", lambda n: lw.bottom_up(n, 1)), classes=2).fit(data)


def test_noise_takes_whole_channels_of_sequences():
    noise = lw.Regularisation(0.5, channelwise=True)
    x = torch.ones(30, 8, 20)
    dropped = noise.on_input(x, 0, 1)
    assert bool((dropped.std(2) == 0).all()) and set(dropped.unique().tolist()) == {0.0, 2.0}
    last = noise.on_input(torch.ones(30, 5, 6, 8), 0, -1)
    assert bool((last.std((1, 2)) == 0).all()) and not bool((last.std(3) == 0).all())
    assert not bool((noise.on_input(x, 0, -1).std(2) == 0).all())  # tokens
    model, data = network(1)
    method = lw.Method("one", lambda n: lw.bottom_up(n, 1), regularisation=noise)
    trainer = lw.LayerwiseTrainer(model, method, classes=10)
    trainer.fit(data)
    assert [t.subnet.entering for t in trainer.trainings.values()] == [1, 1]


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
    assert [row["shape"] for row in table.rows][:2] == ["2x12", "12x12"]
    assert max(row["lsd_intercept"] for row in table.rows[:2]) < 0.05  # 1 of the means over channels


@pytest.mark.parametrize("dims", [1, 3])
def test_probes_of_other_positions(dims):
    model, data = network(dims)
    measures = ("lsd", "k_redundancy", "conditional_entropy", "linear_separability", "cnn_separability", "pca")
    table = lw.probe(model, data, measures=measures, test_loader=data)
    assert [row["shape"] for row in table.rows] == [["1x64", "8x64", "10"], [], ["1x4x4x4", "8x4x4x4", "10"]][dims - 1]


# ---- what is cut ----


class Encoder(nn.Module):
    def __init__(self, norm: bool = False, masked: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        norms = nn.LayerNorm(8) if norm else None
        self.encoder = nn.TransformerEncoder(layer, 3, norm=norms, enable_nested_tensor=not masked)
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


def test_an_encoder_by_itself():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    chain = lw.split(nn.TransformerEncoder(layer, 2), example=torch.randn(3, 5, 8))
    assert chain.names == ["layers.0", "layers.1"]


class Strict(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask, src_key_padding_mask, is_causal):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)


LAYER = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # which encoders copy


class Around(nn.Module):
    def __init__(self, encoder, call) -> None:
        super().__init__()
        self.first, self.encoder, self.call, self.last = nn.Linear(8, 8), encoder, call, nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.call(self.encoder, self.first(x)).mean(1))


@pytest.mark.parametrize(
    ("call", "layer", "inside"),
    [
        (lambda encoder, x: encoder(src=x), LAYER, True),
        (lambda encoder, x: encoder(x, None, None), LAYER, True),
        (lambda encoder, x: encoder(encoder(x), torch.zeros(5, 5)), LAYER, False),
        (lambda encoder, x: encoder(encoder(x, torch.zeros(5, 5))), LAYER, False),
        (lambda encoder, x: encoder(x), Strict(8, 2, 16, batch_first=True), True),
        (lambda encoder, x: encoder(x.movedim(0, 1)).movedim(0, 1), nn.TransformerEncoderLayer(8, 2, 16), False),
        (lambda encoder, x: encoder(x, torch.zeros(5, 5)), LAYER, False),
    ],
    ids=[
        "named",
        "no masks",
        "masked the second time",
        "masked the first time",
        "strict layers",
        "samples second",
        "masked",
    ],
)
def test_calls_of_an_encoder(call, layer, inside):
    model = Around(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), call)
    chain = lw.split(model, example=torch.randn(6, 5, 8))
    assert ("encoder.layers.1" in chain.names) is inside


def test_an_encoder_with_a_mask_stays_whole():
    x = torch.randint(0, 20, (6, 5))
    x[:, 0] = 1
    with pytest.warns(UserWarning, match="Encoder is a single unit: more than one tensor crosses"):
        assert lw.split(Encoder(masked=True), example=x).names == ["embedding"]
    assert lw.split(Encoder(masked=True), ["embedding", "encoder"], example=x).names == ["embedding", "encoder"]


class Padded(Encoder):
    """Which gets its mask, and makes nested tensors of it in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x, mask):
        return self.classifier(self.encoder(self.embedding(x), src_key_padding_mask=mask)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_makes_nested_tensors():
    torch.manual_seed(0)
    x = torch.randint(0, 20, (8, 5))
    x[:, 0] = 1
    data = [((x, x == 0), torch.arange(8) % 4)]
    for method in (lw.backprop(epochs=2), lw.greedy(epochs=2)):
        trainer = lw.LayerwiseTrainer(Padded(), method, classes=4, spec=["embedding", "encoder"])
        trainer.fit(data)
        assert 0 <= trainer.evaluate(data) <= 1
    table = lw.probe(trainer.chain, data, measures="lsd")
    assert [row["name"] for row in table.rows][-2:] == ["embedding", "encoder"]


def test_a_linear_head_on_tokens_is_as_it_is_described():
    tokens = torch.randn(6, 5, 8)
    head = lw.build_head(lw.LinearHead(zero_init=True, batch_norm=True), tokens, 4)
    assert not head(tokens).any() and any(isinstance(m, nn.BatchNorm1d) for m in head)


@pytest.mark.parametrize(
    ("wrap", "inner"),
    [
        (nn.DataParallel, "model.module"),
        (AveragedModel, "model.module"),
        (lambda m: torch.compile(m, backend="eager"), "model._orig_mod"),
    ],
    ids=["parallel", "averaged", "compiled"],
)
def test_wrappers_are_named(wrap, inner):
    wrapped = wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(lw.SplitError, match=rf"cannot be cut; give the network in it, {inner}"):
        lw.split(wrapped)
    model = getattr(wrapped, inner.partition(".")[2])
    assert len(lw.split(wrapped, [lw.Unit("0", model[0], [model[0]]), lw.Unit("1", model[1:], [model[1:]])])) == 2
