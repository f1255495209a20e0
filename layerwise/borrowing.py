"""A chain to try things on: trained at will, with or without values, and put back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from layerwise.checkpoint import rng_state, set_rng_state
from layerwise.units import Chain, State, Unit, main_tensor

__all__ = ["PredictionError", "batch_of", "borrowed", "chain_tensors", "tensors_in", "tensors_of"]

_VALUES_NEEDED = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
)


class PredictionError(RuntimeError):
    """A step whose course depends on values, so that it cannot be followed without them."""


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list({id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}.values())


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _roots(chain: Chain) -> list[nn.Module]:
    return [*chain.units, *([chain.model] if chain.model is not None else [])]


def chain_tensors(chain: Chain) -> list[Tensor]:
    """Parameters and buffers of the units and of the model that they are made of."""
    return tensors_of(_roots(chain))


def batch_of(example: State, size: int) -> State:
    """The example with `size` samples: its own over and over."""
    samples = main_tensor(example).shape[0]

    def resize(x: Any) -> Any:
        if not isinstance(x, Tensor) or size == samples or x.dim() == 0 or x.shape[0] != samples:
            return x
        return x[torch.arange(size, device=x.device) % samples]

    return tree_map(resize, example)


class _Numbers(TorchDispatchMode):
    """Where code asks a fake tensor for its value (an optimiser for its step count, the trainer whether a loss is finite),
    the answer is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            (tensor,) = args
            if isinstance(tensor, FakeTensor) and tensor.constant is None:
                return 1.0 if tensor.is_floating_point() else 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def borrowed(chain: Chain, with_data: Sequence[nn.Module] | None = None) -> Iterator[FakeTensorMode | None]:
    """The chain on fake tensors, which have shapes and storages but no values; or on its own, to train the modules listed.

    At the end, weights, running statistics, gradients, modes, what modules keep in attributes, and random generators are what
    they were. Yields the mode of the fake tensors, which is on inside. Inside another such block, the chain stays on that
    one's.

    Raises
    ------
    PredictionError
        If what is done on fake tensors depends on values.
    """
    modules = list({id(module): module for root in _roots(chain) for module in root.modules()}.values())
    tensors = chain_tensors(chain)
    mode = next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)
    nested = mode is not None
    if not nested and with_data is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
    values = [(t, t.detach().cpu().clone()) for t in tensors_of(with_data or ())] if mode is None else []
    flags = [(t, t.requires_grad, t.grad) for t in tensors]
    attributes = [(module, dict(module.__dict__)) for module in modules]
    generators = None if nested else rng_state()
    stand_ins = {id(t): t if nested or mode is None else mode.from_tensor(t) for t in tensors}
    try:
        for tensor in (*tensors, *stand_ins.values()):
            tensor.grad = None
        for module in modules:
            for name in ("_parameters", "_buffers"):
                own = module.__dict__[name]
                module.__dict__[name] = {key: None if t is None else stand_ins[id(t)] for key, t in own.items()}
            if isinstance(module, Unit):
                module._trainable = tuple(stand_ins[id(t)] for t in module._trainable)
        with contextlib.nullcontext() if nested or mode is None else _without_values(mode):
            yield mode
    finally:
        for module, before in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for tensor, wanted, grad in flags:
            tensor.requires_grad_(wanted)
            tensor.grad = grad
        if generators is not None:
            set_rng_state(generators)


@contextlib.contextmanager
def _without_values(mode: FakeTensorMode) -> Iterator[None]:
    try:
        with mode, _Numbers():
            yield
    except _VALUES_NEEDED as error:
        raise PredictionError(
            f"the step depends on values and cannot be followed without them: {str(error).splitlines()[0]}; measure it "
            "(measure=True), and give heads fixed sizes"
        ) from error
