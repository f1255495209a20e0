"""What a chain of units is held to: the model's own output, gradients, buffers and use of random numbers, bit for bit; and
models of all kinds to hold it to."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from layerwise import Chain


def traces_of(call, model, example):
    """Everything that running `call` leaves behind, with the model's buffers put back."""
    before = [b.clone() for b in model.buffers()]
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    outputs = tree_leaves(call(example))
    wanted = [t for t in outputs if t.requires_grad]
    if wanted:
        torch.manual_seed(2)
        sum((t * torch.randn_like(t)).sum() for t in wanted).backward()
        torch.manual_seed(1)
        call(example)  # again, so that the state of the generator is the forward's alone
    left = {
        "output": [t.detach().clone() for t in outputs],
        "gradient": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "buffer": [b.clone() for b in model.buffers()],
        "generator": [torch.get_rng_state()],
    }
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.data.copy_(value)
    return left


def assert_same(model: nn.Module, chain: Chain, example) -> None:
    """The chain leaves what the model leaves, in training and in eval mode."""
    for mode in (True, False):
        model.train(mode)
        chain.train(mode)
        expected = traces_of(lambda x: model(*x) if isinstance(x, tuple) else model(x), model, example)
        got = traces_of(chain, model, example)
        for kind, values in expected.items():
            assert len(got[kind]) == len(values)
            for a, b in zip(got[kind], values, strict=True):
                assert (a is None) == (b is None), kind
                assert a is None or torch.equal(a, b), f"{kind}, {'training' if mode else 'eval'} mode"
        assert any(g is not None and g.abs().sum() > 0 for g in got["gradient"])


def images(batch: int = 4, channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


# ---- models of all kinds ----


class Residual(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.norm(self.conv1(x)))))


class Residuals(nn.Module):
    """Functional residuals, pooling and dropout in the top-level forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        for block in self.blocks:
            x = F.dropout(block(x), 0.3, training=self.training)
        x = x + self.last(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Rooted(nn.Module):
    """Parameters and buffers on the root, some of them used by several units, one updated in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 6)
        self.fc2 = nn.Linear(6, 6)
        self.fc3 = nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.randn(6))
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.constant = torch.randn(6)

    def forward(self, x):
        x = F.tanh(self.fc1(x - self.mean) + self.shift)
        self.calls.add_(1)
        x = F.tanh(self.fc2(x * self.constant) - self.mean)
        return self.fc3(x) / self.temperature


class Tokens(nn.Module):
    """Class token and positions on the root, positions of a table that are counted from nothing, noise on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.table = nn.Embedding(5, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = x + self.table(torch.arange(x.shape[1])) + 0.1 * torch.randn(8)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


class Two(nn.Module):
    """Several inputs, one of them used late, one optional."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(3, 4)
        self.both = nn.Linear(8, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x, y, scale=2.0, mask=None):
        z = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(y))], 1)
        z = torch.relu(self.both(z * scale))
        if mask is not None:
            z = z * mask
        return self.out(z) + y.sum(1, keepdim=True)


class Nested(nn.Module):
    """Containers in containers, a ModuleDict, a dropout that all share, a result with a name."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "stem": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)),
                "body": nn.Sequential(
                    nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
                    nn.Sequential(nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())),
                ),
            }
        )
        self.towers = nn.ModuleList(nn.ModuleList([nn.Linear(8, 8), nn.ReLU()]) for _ in range(2))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.dropout(self.parts["stem"](x))
        x = self.dropout(self.parts["body"](x)).mean((2, 3))
        for linear, act in self.towers:
            x = self.dropout(act(linear(x)))
        return {"scores": self.fc(x), "features": x}


class Branching(nn.Module):
    """A block that torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)

    def forward(self, x):
        if x.mean() > 0:
            return self.fc(x)
        return self.other(x)


def around_branching() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(), Branching(), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    )


class PerMode(nn.Module):
    """What is computed depends on the mode: stochastic depth and a batch norm of its own above the units."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 6)
        self.fc2 = nn.Linear(6, 6)
        self.fc3 = nn.Linear(6, 3)
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("running_var", torch.ones(6))

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = F.batch_norm(x, self.running_mean, self.running_var, training=self.training)
        if self.training:
            x = x * (torch.rand(x.shape[0], 1) > 0.2)
        return self.fc3(F.relu(self.fc2(x)))


MODELS = {
    "residuals": (
        Residuals,
        images(),
        ["stem", "blocks.0", "blocks.1", "blocks.2", "last"],
        ["stem", "blocks.0.conv2", "blocks.1.norm", "last", "fc"],
    ),
    "rooted": (Rooted, torch.randn(5, 6), ["fc1", "fc2"], ["fc3", "fc1", "fc2"]),
    "tokens": (Tokens, images(), ["embed", "layers.0", "layers.1"], ["embed", "layers.1", "head"]),
    "two inputs": (
        Two,
        (torch.randn(5, 4), torch.randn(5, 3)),
        ["left"],  # `y` is needed to the end
        ["left", "right", "out"],
    ),
    "nested": (
        Nested,
        images(),
        ["parts.stem", "parts.body.0", "parts.body.1.0.1", "towers.0.0", "towers.1.0"],
        ["parts.stem", "parts.body.1", "towers.1.0", "fc"],
    ),
    "untraceable block": (around_branching, torch.randn(5, 6), ["0", "2", "4"], ["0", "2", "6"]),
    "modes": (PerMode, torch.randn(5, 6), ["fc1", "fc2"], ["fc1", "fc2", "fc3"]),
}
