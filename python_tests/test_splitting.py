"""Splitting any module into units: the chain is the model, and what cannot be split says why."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from chains import MODELS, Nested, Residuals, assert_same, images
from layerwise import split
from layerwise.units import detach_state

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_equal(a, b) -> None:
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kind", MODELS)
def test_auto(kind):
    make, example, units, _ = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    before = {**model.state_dict()}, dict(model.__dict__), torch.get_rng_state()
    chain = split(model, example=example)
    assert chain.names == units
    assert list(model.state_dict()) == list(before[0]) and model.__dict__.keys() == before[1].keys()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert model.training and chain[0].training
    assert sum(unit.parameter_count for unit in chain) == sum(p.numel() for p in model.parameters())
    assert_same(model, chain, example)


@pytest.mark.parametrize("kind", MODELS)
def test_names(kind):
    make, example, _, names = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    chain = split(model, names, example=example)
    assert sorted(chain.names) == sorted(names)
    assert_same(model, chain, example)


@pytest.mark.filterwarnings("ignore:.* is a single unit")
@pytest.mark.parametrize(
    ("kind", "by"), [*((kind, "memory") for kind in MODELS), ("nested", "time"), ("two inputs", "parameters")]
)
def test_blocks(kind, by):
    make, example, units, _ = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    for count in {1, len(units)}:
        chain = split(model, count, example=example, balance_by=by)
        assert len(chain) == count and set(chain.names) <= set(units)
    assert_same(model, chain, example)


def test_pattern():
    model = Residuals()
    chain = split(model, re.compile(r"stem|blocks\.\d+\..*"), example=images())
    assert chain.names == ["stem", *(f"blocks.{i}.{m}" for i in range(3) for m in ("conv1", "norm", "conv2"))]
    assert_same(model, chain, images())
    assert split(model, re.compile(r"stem|blocks\.\d+(\..*)?")).names == ["stem", "blocks.0", "blocks.1", "blocks.2"]
    with pytest.raises(ValueError, match="as a whole"):
        split(model, re.compile("conv"))


def test_names_of_the_model():
    class Named(Residuals):
        unit_names = ("blocks.1",)

    assert split(Named()).names == ["blocks.1"]


# ---- states ----


def test_what_crosses_within_a_residual_block():
    model = Residuals()
    chain = split(model, ["stem", "blocks.0.conv2", "blocks.1"])
    state = chain[0](images())
    assert isinstance(state, tuple) and len(state) == 2  # the shortcut, then what the unit computed last
    assert torch.equal(state[1], F.relu(model.blocks[0].norm(model.blocks[0].conv1(state[0]))))
    assert isinstance(chain.run(images(), 0, 2), torch.Tensor)


def test_a_shared_dropout_is_in_training_for_one_unit_and_not_for_another():
    chain = split(Nested())
    chain.train()
    chain[0].freeze()
    chain[0].guard()
    assert chain[0].parts[-1].training is False and isinstance(chain[0].parts[-1], nn.Dropout)
    assert chain[1].training and all(part.training for part in chain[1].parts)


def test_gradients_reach_the_models_parameters():
    model = Residuals()
    chain = split(model)
    chain(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {id(p) for p in chain.parameters()} == {id(p) for p in model.parameters()}


# ---- the model goes on living ----


def test_state_dict_loads_and_saves():
    model, other = Residuals(), Residuals()
    chain = split(model)
    assert chain.state_dict().keys() == other.state_dict().keys()
    chain.load_state_dict(other.state_dict())
    chain.check(images())
    other.eval(), chain.eval()
    assert torch.equal(chain(images()), other(images()))


@pytest.mark.parametrize("kind", ["rooted", "nested", "residuals"])
def test_another_type(kind):
    make, example, _, _ = MODELS[kind]
    model = make()
    chain = split(model)
    model.to(torch.float64)
    if kind == "rooted":
        model.constant = model.constant.double()
    assert_same(model, chain, example.double())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", MODELS)
def test_copies(kind, copied):
    make, example, _, names = MODELS[kind]
    torch.manual_seed(0)
    chain = split(make(), names)
    chain[0].freeze()
    other = copied(chain)
    assert other.names == chain.names and [u.frozen for u in other] == [u.frozen for u in chain]
    other[0].unfreeze()
    assert not any(p.requires_grad for p in chain[0].parameters()) and all(p.requires_grad for p in other.parameters())
    assert_same(other.model, other, example)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    chain.check(example)
    other.check(example)
    torch.manual_seed(0)
    fresh = split(make())
    fresh.eval(), chain.eval()
    with torch.no_grad():
        torch.manual_seed(1)
        expected = fresh(example)
        torch.manual_seed(1)
        assert_equal(chain(example), expected)


def test_a_copied_unit_is_apart_from_the_original():
    chain = split(Residuals())
    unit = copy.deepcopy(chain[1])
    state = chain[0].eval()(images())
    expected = chain[1].eval()(state)
    assert torch.equal(unit.eval()(state), expected)
    with torch.no_grad():
        for p in chain[1].parameters():
            p.zero_()
    assert torch.equal(unit(state), expected)


@pytest.mark.parametrize(("kind", "training"), [("residuals", True), ("rooted", False)])
def test_compiled_units(kind, training):
    make, state, _, names = MODELS[kind]
    for unit in split(make(), names):
        torch._dynamo.reset()
        unit.train(training)
        compiled = torch.compile(unit, backend="eager", fullgraph=True)
        torch.manual_seed(0)
        expected = unit(state)
        torch.manual_seed(0)
        assert_equal(compiled(state), expected)
        state = detach_state(expected)
