"""The zoo: sizes against published ones, chains against the models, for images of 28 x 28 and 32 x 32 pixels."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from chains import assert_same
from layerwise import ConvHead, HeadOutput, PredSimHead, SplitError, build_head, split, zoo
from layerwise.units import main_tensor

pytestmark = pytest.mark.usefixtures("one_thread")

TINY: dict[str, dict[str, Any]] = {
    "simcnn1": {"width": 0.02},
    "simcnn2": {"head": ConvHead(k=2, width=4)},
    "simcnn3": {"head": ConvHead(k=3, width=4)},
    "mlp": {"width": 0.01},
    "vit": {"width": 0.1, "depth": 3},
    "cnn4": {"width": 0.1},
    "resnet50": {"hierarchy": (1, 2, 2, 1)},
}


def tiny(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return zoo.make(name, **{"width": 0.05, "in_channels": 1, "image_size": 16, **TINY.get(name, {}), **options})


def batch(channels: int = 1, size: int = 16) -> torch.Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(0))


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- sizes ----


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("vgg8b", {}, 8.90),  # the public PredSim code, CIFAR-10
        ("vgg8b", {"in_channels": 1, "image_size": 28}, 7.33),  # and MNIST
        ("vgg11b", {}, 11.56),
        ("resnet18", {}, 11.17),
        ("resnet50", {}, 23.52),
    ],
)
def test_published_sizes(name, options, millions):
    with torch.device("meta"):
        assert round(parameter_count(zoo.make(name, **options)) / 1e6, 2) == millions


def test_vgg8b_by_hand():
    convolutions = [(3, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 512)]
    expected = sum(9 * a * b + b + 2 * b for a, b in convolutions) + (2 * 2 * 512 + 1) * 1024 + 2 * 1024 + 1025 * 10
    assert parameter_count(zoo.make("vgg8b")) == expected == 8_903_434


@pytest.mark.parametrize(
    ("name", "hierarchy"),
    [
        ("vgg8", "11111"),
        ("vgg11", "11222"),
        ("vgg13", "22222"),
        ("vgg16", "22333"),
        ("vgg19", "22444"),
        ("vgg8b", "2211"),
    ],
)
def test_vgg_hierarchies(name, hierarchy):
    model = tiny(name, image_size=32)
    layers = ["M" if isinstance(m, nn.MaxPool2d) else "C" for m in model.features]
    assert "".join(layers).rstrip("M").split("M") == ["C" * int(n) for n in hierarchy]
    other = tiny(name, hierarchy=[3] * len(hierarchy))
    assert sum(isinstance(m, nn.Conv2d) for m in other.modules()) == 3 * len(hierarchy)


def test_wide_vggs():
    def widths(name):
        return [m.out_channels for m in zoo.make(name).features.modules() if isinstance(m, nn.Conv2d)]

    with torch.device("meta"):
        assert widths("vgg8b") == [128, 256, 256, 512, 512, 512]
        assert widths("vgg11b") == [128, 128, 128, 256, 256, 512, 512, 512, 512]


def test_vgg13_of_the_thesis():
    with torch.device("meta"):
        model = zoo.make("vgg13", hidden=(4096, 4096), hidden_dropout=0.5, image_size=28, in_channels=1)
    affine = [m for m in model.classifier.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in affine] == [(512, 4096), (4096, 4096), (4096, 10)]
    assert [m.p for m in model.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))] == [0.5, 0.5]
    assert len(split(model)) == 12  # the "12 hidden layers" of figure 5.14
    assert len(split(model, re.compile(r"features\..*conv"))) == 10  # the layers of table 6.3


def test_simcnn_configurations():
    def layers(name, **options):
        model = zoo.make(name, **options)
        return [(m.in_channels, m.out_channels) for m in model.layers.modules() if isinstance(m, nn.Conv2d)]

    with torch.device("meta"):
        assert layers("simcnn1") == [(3, 256), (256, 256), (1024, 512), (2048, 1024), (1024, 1024)]
        assert layers("simcnn3") == [(3, 128), (128, 128), (512, 256), (256, 256)]
        assert layers("simcnn3", downsample_input=True)[0] == (12, 128)
        imagenet = {
            "layers": 8,
            "downsample": (2, 3, 4, 6),
            "image_size": 224,
            "downsample_input": True,
            "classes": 1000,
        }
        assert layers("simcnn1", **{**imagenet, "image_size": 256})[-1] == (4096, 4096)
    model = tiny("simcnn3", width=1 / 16, head=ConvHead(k=3, width=256))
    assert model.layers[0].conv.bias is not None and not any(
        isinstance(m, nn.BatchNorm2d) for m in model.layers.modules()
    )
    head = build_head(ConvHead(k=3, width=256), torch.empty(2, 16, 8, 8), 10)
    assert [type(m) for m in model.classifier] == [type(m) for m in head]
    x = batch()
    for unit, shape in zip(split(model).units[:3], [(8, 16, 16), (8, 16, 16), (16, 8, 8)], strict=True):
        x = unit(x)
        assert tuple(x.shape[1:]) == shape


def test_space_to_depth():
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    y = zoo.SpaceToDepth()(x)
    assert y.shape == (2, 12, 2, 3)
    for dh in range(2):
        for dw in range(2):
            assert torch.equal(y[:, 3 * (2 * dh + dw) : 3 * (2 * dh + dw) + 3], x[:, :, dh::2, dw::2])
    shuffled = nn.PixelUnshuffle(2)(x).view(2, 3, 4, 2, 3).transpose(1, 2).reshape(2, 12, 2, 3)
    assert torch.equal(y, shuffled)


def test_resnet_hierarchies():
    sooner = tiny("resnet18", hierarchy=[1, 1, 2, 2])
    assert [len(stage) for stage in sooner.stages] == [1, 1, 2, 2]
    x = sooner.stem(batch())
    sides = [(x := stage(x)).shape[2] for stage in sooner.stages]
    assert sides == [16, 8, 4, 2]
    assert split(sooner).names == ["stem", *(f"stages.{s}.{b}" for s, n in enumerate([1, 1, 2, 2]) for b in range(n))]
    assert zoo.make("resnet50", width=0.1).classifier.in_features == 4 * 51


# ---- chains ----


@pytest.mark.parametrize("name", zoo.names())
def test_chains_are_the_models(name):
    model = tiny(name, dropout=0.2)
    chain = split(model, example=batch())
    assert_same(model, chain, batch())
    first = chain.names[: max(1, len(chain) // 2)]
    assert_same(model, split(model, first[::-1]), batch())
    for by in ("memory", "parameters"):
        assert_same(model, split(model, 3, example=batch(), balance_by=by), batch())


@pytest.mark.parametrize("name", zoo.names())
def test_units(name):
    depths = {"simcnn1": 5, "simcnn2": 4, "simcnn3": 4, "cnn4": 4, "mlp": 3, "vit": 4, "resnet18": 9, "resnet50": 7}
    depths |= {"vgg8": 6, "vgg11": 9, "vgg13": 11, "vgg16": 14, "vgg19": 17, "vgg8b": 7, "vgg11b": 10}
    chain = split(tiny(name, dropout=0.1))
    assert len(chain) == depths[name]
    state = batch()
    for unit in chain.units[:-1]:
        state = unit(state)
        assert isinstance(state, torch.Tensor)
        images = name.startswith(("simcnn", "cnn", "resnet")) or (name.startswith("vgg") and "features" in unit.name)
        assert state.dim() == (4 if images else 3 if name == "vit" else 2)
    assert chain[-1](state).shape == (3, 10)


@pytest.mark.parametrize("name", ["vgg8b", "vgg11", "resnet18", "resnet50", "cnn4", "mlp"])
def test_every_layer_a_unit(name):
    model = tiny(name, dropout=0.3, activation="leaky_relu", **({"batch_norm": True} if name == "mlp" else {}))
    chain = split(model, zoo.layer_names(model), example=batch())
    kinds = (nn.Conv2d, nn.Linear)
    layers = [m for n, m in model.named_modules() if isinstance(m, kinds) and ".shortcut" not in n]
    assert len(chain) == len(layers)
    for unit, layer in zip(chain, layers, strict=True):
        assert [m for m in unit.modules() if m in layers] == [layer]
    assert_same(model, chain, batch())
    state = batch()
    for unit in chain.units[:-1]:
        state = unit.train()(state)
        seen = main_tensor(state)  # right after the activation: neither pooled nor dropped
        assert (seen != 0).all() and (seen < 0).any()
        output = build_head(PredSimHead(), seen, 10)(seen)
        assert isinstance(output, HeadOutput)
    assert layers[-1] is model.get_submodule(list(model.state_dict())[-1].removesuffix(".bias"))


def test_predsim_unit_of_a_residual_block():
    model = tiny("resnet18").eval()
    chain = split(model, zoo.layer_names(model))
    state = chain.run(batch(), 0, 6)  # stem, two blocks of two, the first layer of a block that downsamples
    shortcut, inner = state
    assert shortcut.shape[2] == 16 and inner.shape[2] == 8
    block = model.stages[1][0]
    assert torch.equal(chain[6](state), block(shortcut))
    assert set(block.shortcut.parameters()) <= set(chain[6].parameters())
    assert not set(block.shortcut.parameters()) & set(chain[5].parameters())


def test_layer_names_need_a_model_of_layers():
    with pytest.raises(TypeError, match="got ViT"):
        zoo.layer_names(tiny("vit"))


# ---- options ----


@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_images(name, channels, size):
    model = tiny(name, in_channels=channels, image_size=size, classes=7, activation="tanh")
    assert model(batch(channels, size)).shape == (3, 7)
    assert any(isinstance(m, nn.Tanh) for m in model.modules())
    wider = tiny(name, in_channels=channels, image_size=size, width=2 * TINY.get(name, {}).get("width", 0.05))
    assert parameter_count(wider) > parameter_count(model)
    assert not any(isinstance(m, (nn.Dropout, nn.Dropout2d)) for m in model.modules())
    dropped = tiny(name, in_channels=channels, image_size=size, dropout=0.2)
    assert {m.p for m in dropped.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))} == {0.2}


def test_settings_of_predsim():
    model = tiny("vgg8b", dropout=0.2, activation="leaky_relu")
    assert [type(m) for m in model.features[0]] == [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU, nn.Dropout2d]
    assert [type(m) for m in model.classifier[1]] == [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU, nn.Dropout]
    assert model.features[0].act.negative_slope == 0.01


@pytest.mark.parametrize("activation", ["relu", "tanh", "selu", nn.Softplus])
@pytest.mark.parametrize("init", ["scaled", "orthogonal"])
def test_scaled_init_keeps_the_variance(activation, init):
    torch.manual_seed(0)
    model = zoo.make("mlp", depth=6, hidden=400, in_features=400, init=init, activation=activation)
    with torch.no_grad():
        last = model.layers[-1].linear(model.layers[:-1](torch.randn(50, 400)))
    assert last.square().mean().item() == pytest.approx(1, rel=0.3)  # a deviation of about sqrt(6 / 400)
    assert all(layer.linear.bias.abs().max() == 0 for layer in model.layers)


def test_deep_mlp():
    model = zoo.make("mlp", depth=1000, hidden=8, in_features=6, classes=2)
    chain = split(model)
    assert len(chain) == 1000
    x = torch.randn(4, 6)
    chain.check(x)
    assert torch.equal(chain(x), model(x))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("vgg7", {}, ValueError, "unknown model 'vgg7'; there are simcnn1"),
        ("vgg8", {"depth": 3}, TypeError, "vgg8 has no option 'depth'; there are hierarchy"),
        ("vgg8", {"hierarchy": [1, 1]}, ValueError, "hierarchy: expected 5 numbers"),
        ("vgg8", {"hierarchy": [1, 1, 0, 1, 1]}, ValueError, "of at least 1"),
        ("resnet18", {"hierarchy": []}, ValueError, "hierarchy"),
        ("simcnn1", {"downsample": (5,)}, ValueError, "layers from 0 to 4"),
        ("simcnn1", {"image_size": 30}, ValueError, "multiple of 4, got 30"),
        ("mlp", {"depth": 0}, ValueError, "depth"),
        ("mlp", {"init": "he"}, ValueError, "'scaled' or 'orthogonal'"),
        ("mlp", {"activation": "rel"}, ValueError, "unknown activation 'rel'; there are relu"),
        ("vit", {"patch": 5}, ValueError, "divisor of image_size=32"),
        ("vit", {"heads": 0}, ValueError, "heads"),
        ("cnn4", {"width": 0}, ValueError, "width: expected a factor above 0"),
        ("cnn4", {"dropout": 1.0}, ValueError, "dropout: expected a probability"),
        ("cnn4", {"classes": 0}, ValueError, "classes: expected at least 1"),
    ],
)
def test_bad_options(name, options, error, message):
    with pytest.raises(error, match=message):
        zoo.make(name, **options)


def test_names_inside_a_block_that_is_named():
    with pytest.raises(SplitError, match=r"'stages.0.0' is named, and a module inside it"):
        split(tiny("resnet18"), ["stem", "stages.0.0", "stages.0.0.conv"])
