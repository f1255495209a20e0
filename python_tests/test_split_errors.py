"""What cannot be split says why, and units given by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from chains import Branching, Residuals, assert_same
from layerwise import SplitError, Unit, split

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- units by hand ----


def test_units_by_hand():
    model = Branching()
    twice = nn.Sequential(model, nn.Linear(6, 3))
    units = [Unit("first", twice[0], [twice[0]]), Unit("second", lambda x: twice[1](F.relu(x)), {"1": twice[1]})]
    chain = split(twice, units)
    assert [name for name, _ in chain[1].named_tensors()] == ["1.weight", "1.bias"]
    with pytest.raises(AssertionError, match="do not reproduce the model's output: largest difference"):
        chain.check(torch.randn(5, 6))
    units[1] = Unit("second", twice[1], [twice[1]])
    assert_same(twice, split(twice, units, example=torch.randn(5, 6)), torch.randn(5, 6))


def test_units_by_hand_are_copied_only_if_the_copy_uses_its_own_modules():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    chain = split(model, [Unit("a", model[0], [model[0]]), Unit("b", model[1].forward, [model[1]])])
    other = copy.deepcopy(chain)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert other(torch.ones(1, 6)).abs().sum() > 0 and chain(torch.ones(1, 6)).abs().sum() == 0
    closed = split(model, [Unit("a", lambda x: model[0](x), [model[0]]), Unit("b", model[1], [model[1]])])
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"unit 'a' cannot be copied or pickled.*Give a module or a method"):
            copied(closed)


def test_parameters_in_no_unit():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"2 parameters of the model are in no unit, such as '1.weight'"):
        split(model, [Unit("a", model, [model[0]])])
    model[1].requires_grad_(False)
    assert len(split(model, [Unit("a", model, [model[0]])])) == 1
    with pytest.raises(TypeError, match="a mixture"):
        split(model, [Unit("a", model, [model]), "1"])


# ---- what cannot be split says why ----


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(torch.tanh(self.b(torch.tanh(self.a(x)))))


class NormsTwice(Repeated):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        return self.norm(self.b(self.norm(self.a(x))))


@pytest.mark.parametrize(
    ("make", "names", "message"),
    [
        (Tied, ["a", "b", "c"], "parameter '[ac].weight' is used by units 'a' and 'c'.*Make one unit"),
        (Repeated, ["a", "b"], "parameter 'a.weight' is used by units 'a' and 'b'"),
        (NormsTwice, ["a", "b"], "buffer 'norm.running_mean' is used by units 'a' and 'b'"),
    ],
)
def test_sharing(make, names, message):
    with pytest.raises(ValueError, match=message):
        split(make(), names)
    model = make()
    assert_same(model, split(model, ["a"]), torch.randn(5, 4))


class Counting(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(()))
        self.body = body

    def forward(self, x):
        return self.c(self.body(self, self.b(self.a(x))))


def branch(model, x):
    if x.sum() > 0:
        x = -x
    return x


def count(model, x):
    model.count += 1
    return x


def count_by_method(model, x):
    model.count.add_(1)
    return x


def derived(model, x):
    return x + torch.as_tensor([1.0, 2.0, 3.0, 4.0]).exp()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (branch, r"if x.sum\(\) > 0:"),
        (derived, "register it as a buffer"),
    ],
)
def test_what_tracing_cannot_follow(body, message):
    model = Counting(body)
    line = body.__code__.co_firstlineno + 1
    for spec in ("auto", ["a", "b"], 2):
        with pytest.raises(SplitError, match=message) as raised:
            split(model, spec, balance_by="parameters" if isinstance(spec, int) else "memory")
        assert "Counting cannot be traced" in str(raised.value) and f"{__file__}:{line}" in str(raised.value)
        assert "split(model, [Unit(name, function, modules), ...])" in str(raised.value)
    assert model.count == 0 and isinstance(model.count, torch.Tensor)
    inner = nn.Sequential(nn.Linear(4, 4), model, nn.Linear(2, 2))
    assert split(inner).names == ["0", "1"]  # a block as a whole
    with pytest.raises(SplitError, match=r"module '1' cannot be traced.*name '1', or a module around it, as one unit"):
        split(inner, ["1.a", "1.b"])


def test_buffers_that_are_changed():
    model = Counting(count)
    with pytest.raises(SplitError, match=r"Counting cannot be traced: its forward assigns to the buffer 'count'.*add_"):
        split(model)
    assert split(nn.Sequential(nn.Linear(4, 4), model)).names == ["0", "1"]
    model = Counting(count_by_method)
    assert_same(model, split(model), torch.randn(5, 4))
    assert model.count == 0
    split(model)(torch.randn(5, 4))
    assert model.count == 1


class Messy(nn.Module):
    """Writes into itself what tracing must not leave there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.features = None
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.features = self.a(x)
        return self.b(self.features)


def test_tracing_leaves_the_model_as_it_was():
    model = Messy()
    chain = split(model)
    assert model.features is None and model.calls == 0
    copy.deepcopy(model)
    assert_same(model, chain, torch.randn(5, 4))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.extra = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(3, 3)

    def forward(self, x, use_extra=False):
        return self.b(torch.relu(self.extra(x) if use_extra else self.a(x)))


def test_unused_parameters():
    model = Unused()
    with pytest.raises(
        SplitError, match=r"2 parameters are not used by forward, such as 'extra.weight'.*requires_grad_"
    ):
        split(model)
    with pytest.raises(SplitError, match="module 'extra' is never called by the model's forward in training mode"):
        split(model, ["a", "extra"])
    model.extra.requires_grad_(False)
    assert_same(model, split(model, example=torch.randn(5, 4)), torch.randn(5, 4))


class Star(nn.Module):
    def forward(self, *xs):
        return xs[0]


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        if self.training:
            return self.b(self.a(x))
        x = self.a(x)
        return self.b(x), x


def test_bad_names():
    model = Residuals()
    for spec, error, message in [
        ([], SplitError, "at least one name"),
        (["stem", "blocks.9"], SplitError, "no module 'blocks.9'"),
        (["stem", "conv2"], SplitError, r"did you mean \['blocks.0.conv2'"),
        (["stem", "stem"], SplitError, r"given twice: \['stem'\]"),
        (["blocks.0", "blocks.0.conv1"], SplitError, "'blocks.0' is named, and a module inside it"),
        (["stem", "blocks"], SplitError, "'blocks' is never called"),
        ("stem", ValueError, "for one name write a list"),
        (True, TypeError, "got a bool"),
        (None, TypeError, "expected 'auto', a pattern, names, a number or units, got None"),
        (2.0, TypeError, "got 2.0"),
        (0, ValueError, "positive number of blocks"),
        (9, ValueError, "9 blocks of 5 units"),
    ]:
        with pytest.raises(error, match=message):
            split(model, spec, balance_by="parameters" if isinstance(spec, int) else "memory")
    with pytest.raises(ValueError, match="need an example input"):
        split(model, 2)
    for options in ({"balance_by": "parameters"}, {"within": ["stem"]}):
        with pytest.raises(ValueError, match="only with a number of blocks"):
            split(model, "auto", **options)
    with pytest.raises(ValueError, match="expected 'memory', 'time' or 'parameters', got 'cost'"):
        split(model, 2, balance_by="cost")
    with pytest.raises(TypeError, match="within: expected"):
        split(model, 2, within=3)
    with pytest.raises(SplitError, match=r"Star cannot be traced: forward takes \*args"):
        split(Star())
    with pytest.raises(SplitError, match="nothing to cut at"):
        split(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="unit '1' has no parameters"):
        split(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), ["0", "1"])
    assert len(split(Parallel(), ["a", "b"])) == 2  # its output may depend on the mode
