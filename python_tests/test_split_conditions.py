"""Models whose forward looks at shapes and types: with an example these are known, what tensors hold is not."""

import math
import warnings

import pytest
import torch
from torch import nn

from layerwise import LayerwiseTrainer, SplitError, compare, greedy, split
from layerwise.isolation import assert_isolated
from layerwise.units import main_tensor


class Affine(nn.Module):
    """A layer with a matrix of its own."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x):
        return torch.matmul(x, self.weight)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        self.wide, self.narrow = Affine(width, 2 * width), Affine(2 * width, width)

    def forward(self, x, mask):
        y = self.norm(x)
        if y.dtype != self.norm.weight.dtype:
            raise TypeError(y.dtype)
        x = x + self.mix(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.narrow(nn.GELU()(self.wide(x)))


class Network(nn.Module):
    """A network of tokens as they are written: with checks of sizes, positions, and a mask that all of its blocks read."""

    def __init__(self, width=8, blocks=3, length=12):
        super().__init__()
        self.words, self.positions = nn.Embedding(20, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.scores = nn.Linear(width, 4)
        self.length = length

    def forward(self, x):
        if len(x.shape) != 2 or x.shape[1] > self.length:
            raise ValueError(f"expected (B, T) of at most {self.length} tokens, got {tuple(x.shape)}")
        tokens = x.shape[1]
        h = self.words(x) + self.positions(torch.arange(tokens))
        scale = 1.0
        for _ in range(h.shape[-1] // 4):
            scale = scale * 0.9
        mask = torch.full((tokens, tokens), -math.inf).triu(1) if tokens > 1 else None
        for block in self.blocks:
            h = block(h * scale, mask)
        return self.scores(h.mean(1))


def tokens(samples=4, length=12):
    return torch.randint(20, (samples, length))


def test_conditions_on_sizes():
    torch.manual_seed(0)
    model, x = Network(), tokens()
    before = torch.get_rng_state()
    chain = split(model, example=x)
    assert torch.equal(torch.get_rng_state(), before)
    assert chain.names == ["words", "blocks.0", "blocks.1", "blocks.2"]
    for other in (tokens(1), tokens(7, 5)):  # sizes are not fixed by the example
        torch.testing.assert_close(chain(other), model(other), rtol=0, atol=0)
    assert split(model, ["blocks.1", "blocks.2"], example=x).names == ["blocks.1", "blocks.2"]
    assert split(model, 2, example=x).names[0] == "words"


def test_without_an_example():
    model = Network()
    with pytest.warns(
        UserWarning, match=r"a single unit: .*len.*give an example of the input.*split\(model, example=x\)"
    ):
        assert len(split(nn.Sequential(model))) == 1
    with pytest.raises(SplitError, match="give an example of the input"):
        split(model)
    with pytest.raises(SplitError, match="give an example of the input"):
        split(model, ["blocks.1"])


def test_masks_are_no_features():
    chain = split(Network(), example=tokens())
    state = chain[0](tokens())
    assert isinstance(state, tuple) and main_tensor(state).shape == (4, 12, 8)
    loader = [(tokens(16), torch.randint(4, (16,))) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = LayerwiseTrainer(chain, greedy(epochs=1), classes=4)
        trainer.fit(loader)
    assert_isolated(trainer, loader[0])
    assert all(math.isfinite(row["loss"]) for row in trainer.history.rows) and len(trainer.history.rows) == 4


def test_tensors_of_parameters_are_features():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.randn(1, 9, 6))
            self.register_buffer("fixed", torch.randn(1, 9, 6))
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            parts = (self.shift if self.trained else self.fixed)[:, : x.shape[1]]
            for layer in self.layers:
                x = layer(x + parts).relu()
            return x.mean(1)

    model = Shifted()
    x = torch.randn(2, 5, 6)
    for model.trained, names in ((False, ["layers.0", "layers.1"]), (True, ["layers.0"])):
        model.shift.requires_grad_(model.trained)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert split(model, example=x).names == names


@pytest.mark.parametrize(
    "condition",
    [
        lambda x: x.sum() > 0,  # what a tensor holds
        lambda x: x.shape[0] == 4,  # how many samples there are
        lambda x: int(x.shape[0] * 2) == 8,
        lambda x: len(x.nonzero()) > 3,
    ],
)
def test_what_differs_from_batch_to_batch_is_refused(condition):
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(x)
            return self.second(-x if condition(x) else x)

    with pytest.raises(
        SplitError, match=rf"Conditional cannot be traced: {__file__}:\d+: .*Ways out: change that; give units"
    ):
        split(Conditional(), example=torch.randn(4, 6))


def test_nothing_is_left_behind():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(
                nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5)) for _ in range(2)
            )

        def forward(self, x):
            for conv in self.convs:
                x = conv(x)
                self.seen = x
                if x.shape[2:] != (8, 8):
                    raise ValueError(x.shape)
            return x.mean((2, 3))

    model, x = Normed(), torch.randn(2, 3, 8, 8)
    model.eval()
    model(x)
    seen, state, rng = model.seen, {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    chain = split(model, example=x)
    assert chain.names == ["convs.0", "convs.1"]
    assert torch.equal(torch.get_rng_state(), rng) and not model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert type(seen) is torch.Tensor and torch.equal(model.seen, seen)


def test_compare_knows_an_example():
    data = torch.utils.data.TensorDataset(tokens(64), torch.randint(4, (64,)))
    comparison = compare(Network, (data, data), ["backprop", greedy(epochs=1)], classes=4, epochs=1, batch_size=32)
    assert [row["passes"] for row in comparison.rows] == [1, 4]  # a pass over the data for each unit
