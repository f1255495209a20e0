"""Models whose forward looks at shapes and types: with an example these are known, what tensors hold is not."""

import functools
import math
import pickle
import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from layerwise import KFilter, LayerwiseTrainer, SplitError, compare, greedy, split
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
        lambda x: len(x) > 3 and any(row.sum() > 0 for row in x),
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


class Asking(nn.Module):
    """Two layers, and a function between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


ANSWERS = {
    "loop": (lambda m, h: sum(h[:, t] for t in range(h.shape[1])), (3, 8, 6)),
    "steps": (lambda m, h: sum(step for step in h.transpose(0, 1)), (3, 8, 6)),
    "unbound": (lambda m, h: sum(h.unbind(1)), (3, 8, 6)),
    "number": (lambda m, h: h.sum(1) / float(h.shape[1]), (3, 8, 6)),
    "root": (lambda m, h: h[:, : int(math.sqrt(h.shape[1]))].sum(1), (3, 9, 6)),
    "condition": (lambda m, h: h[:, -6:].sum(1) if h.shape[1] > 6 else h.sum(1), (3, 8, 6)),
    "in training": (lambda m, h: h[:, -6:].sum(1) if m.training and h.shape[1] > 6 else h.sum(1), (3, 8, 6)),
    "samples": (lambda m, h: h.sum(1) if h.shape[0] > 1 else h.sum(1).neg(), (1, 5, 6)),
    "layout": (lambda m, h: h.sum(1) if h.dtype == torch.float32 else h.mean(1), torch.float64),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_do_not_hold_for_an_input(name):
    between, other = ANSWERS[name]
    model, x = Asking(between), torch.randn(4, 5, 6)
    chain = split(model, ["first", "second"], example=x)
    for kind in (True, False):
        chain.train(kind)
        model.train(kind)
        torch.testing.assert_close(chain(x), model(x), rtol=0, atol=0)
    model.train()
    chain.train()
    y = torch.randn(other) if isinstance(other, tuple) else x.to(other)
    if y.dtype != x.dtype:
        model.to(y.dtype)
    with pytest.raises(
        SplitError, match=r"the model was cut by an example for which the (bool|len|int|float) asked for at .*"
    ):
        chain(y)


def test_answers_are_kept_by_pickle():
    chain = split(Network(), example=tokens())
    copy, x = pickle.loads(pickle.dumps(chain)), tokens(2, 7)
    torch.testing.assert_close(copy(x), chain(x), rtol=0, atol=0)
    with pytest.raises(SplitError, match="the model was cut by an example"):
        copy(tokens(2, 13))


@pytest.mark.parametrize(
    "between", [lambda m, h: h.flip(1) if h.requires_grad else h, lambda m, h: h if h.is_leaf else -h]
)
def test_what_autograd_knows_is_refused(between):
    with pytest.raises(SplitError, match="is not a thing of shape or type"):
        split(Asking(between), ["first", "second"], example=torch.randn(4, 6))


def test_what_a_block_keeps_is_put_back():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.masks, self.seen = nn.Linear(6, 6), {}, []

        def forward(self, x):
            if x.shape[1] not in self.masks:
                self.masks[x.shape[1]] = torch.arange(x.shape[1])[:, None] * torch.ones(6)
                self.register_buffer("table", torch.ones(6))
            self.seen.append(x)
            return self.layer(x + self.masks[x.shape[1]])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Keeping() for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
                if x.shape[2] != 6:
                    raise ValueError(x.shape)
            return x

    model, x = Model(), torch.randn(4, 5, 6)
    names = list(model.state_dict())
    chain = split(model, ["blocks.0", "blocks.1", "blocks.2"], example=x)
    assert all(
        type(tensor) is torch.Tensor for block in model.blocks for tensor in [*block.seen, *block.masks.values()]
    )
    fresh = Model()
    with pytest.raises(SplitError, match="cannot be traced"):  # its blocks are entered
        split(fresh, re.compile(r"blocks\.[0-9]\.layer"))
    assert list(fresh.state_dict()) == names and not any(block.seen or block.masks for block in fresh.blocks)
    torch.testing.assert_close(chain(x), model(x), rtol=0, atol=0)


def test_a_function_that_keeps_is_told():
    @functools.lru_cache
    def mask(size):
        return torch.arange(size) * 1.0

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            y = mask(x.shape[1])[:, None] + self.layer(x)
            return y if y.shape[-1] == 6 else -y

    class Model(nn.Sequential):
        def forward(self, x):
            for block in self:
                x = block(x)
                if x.shape[2] != 6:
                    raise ValueError(x.shape)
            return x

    model = Model(Masked(), Masked())
    with pytest.raises(SplitError, match="lru_cache"):
        split(model, ["0", "1"], example=torch.randn(4, 5, 6))
    mask.cache_clear()
    model(torch.randn(4, 5, 6))


@pytest.mark.parametrize("samples", [8, 12])
def test_filters_leave_masks_alone(samples):
    """Also where there are as many samples as tokens."""
    torch.manual_seed(0)
    model = Network()
    chain = split(model, example=tokens())
    assert [unit.constants > 0 for unit in chain] == [False, True, True, True]
    loader = [(tokens(samples), torch.zeros(samples, dtype=torch.long)) for _ in range(4)]
    expected = torch.full((12, 12), -math.inf).triu(1)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append(torch.equal(inputs[1], expected)))
    method = greedy(epochs=2, filtering=KFilter(k=2, batch=2 * samples, cap=0.5, start_epoch=0))
    LayerwiseTrainer(chain, method, classes=4, feed_batch=5).fit(loader)
    assert seen and all(seen)
    odd = [(tokens(samples, length), torch.zeros(samples, dtype=torch.long)) for length in (12, 9)]
    above = replace(method, filtering=lambda unit: method.filtering if unit == 1 else None)
    for wrong, message in ((method, "states of one form in all batches"), (above, "what crosses beside the features")):
        with pytest.raises(TypeError, match=message):
            LayerwiseTrainer(chain, wrong, classes=4).fit(odd)


@pytest.mark.parametrize("example", [(torch.randn(4, 6), torch.tensor(2.0)), (torch.randn(4, 6), torch.randn(5, 5))])
def test_the_second_size_is_of_the_samples(example):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x, other):
            h = self.first(x)
            return self.second(h if x.shape[0] == 4 else -h) * other.sum()

    with pytest.raises(SplitError, match="it differs from batch to batch: True, and with a sample more False"):
        split(Two(), ["first", "second"], example=example)
    with pytest.raises(SplitError, match="the example has 1 of the 2 inputs"):
        split(Two(), ["first", "second"], example=example[0])


def test_examples_of_all_kinds():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.second(self.first(x["x"]))

    assert split(Named(), example={"x": torch.randn(3, 6)}).names == ["first"]
    assert split(Asking(lambda m, h: h), ["first", "second"], example=torch.randn(0, 6)).names == ["first", "second"]
    with torch.device("meta"):
        assert split(Network(), example=tokens()).names == ["words", "blocks.0", "blocks.1", "blocks.2"]


def test_changes_in_place():
    def deeper(m, h):
        h.unsqueeze_(1)
        return h.flip(2)[:, 0] if h.dim() == 3 else h

    x = torch.randn(3, 6)
    chain = split(Asking(deeper), ["first", "second"], example=torch.randn(4, 6))
    torch.testing.assert_close(chain(x), chain.model(x), rtol=0, atol=0)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            kept = torch.zeros(x.shape[0], 6)
            h = self.a(x)
            kept.add_(h)
            return self.c(self.b(h.relu()) + kept)

    assert split(Residual(), example=x).names == ["a"]


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        with torch.no_grad():
            h = self.b(self.a(x))
        return self.c(h)


def test_no_grad_is_followed():
    model, x = Frozen(), torch.randn(3, 6, requires_grad=True)
    chain = split(model, ["a", "c"], example=x)
    chain(x).sum().backward()
    assert x.grad is None and model.a.weight.grad is None and model.c.weight.grad is not None
    copy = pickle.loads(pickle.dumps(chain))
    assert not copy[0](x).requires_grad

    class Cast(Frozen):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                h = self.b(self.a(x))
            return self.c(h.float())

    with pytest.raises(SplitError, match=r"torch\.autocast within a model is not followed"):
        split(Cast(), ["a", "c"])


def test_scripted_modules_stay_whole():
    model = nn.Sequential(torch.jit.script(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 2))
    assert split(model, ["0", "2"], example=torch.randn(3, 6)).names == ["0", "2"]


def test_layers_of_ones_own():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 4, 1, 1))

        def forward(self, x):
            return x * self.weight

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.norm = nn.Parameter(torch.randn(6, 6)), nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(x @ self.weight.t())

    class Scaled(nn.Module):
        """A convolution with weights of equal size."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight * 0.5, padding=1)

    images = nn.Sequential(Scaled(), Norm(), Scaled(), Norm(), nn.Flatten(), nn.LazyLinear(2))
    images(torch.randn(2, 4, 5, 5))
    assert split(images).names == ["0", "2"]
    assert split(nn.Sequential(Normed(), Normed(), Normed(), nn.Linear(6, 2))).names == ["0", "1", "2"]


def test_many_conditions():
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(4, 4)

        def forward(self, x):
            if x.shape[-1] != 4:
                raise ValueError(x.shape)
            return self.w(x).relu()

    layers = nn.Sequential(*(Checked() for _ in range(200)))
    assert len(split(layers, re.compile(r"\d+\.w"), example=torch.randn(2, 4))) == 200
