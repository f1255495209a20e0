"""What is known of the values in a trace for an example of the input: shapes, types and devices, not what tensors hold."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map

__all__ = ["Metadata", "Unknown"]

_call, _getattr = nn.Module.__call__, nn.Module.__getattr__


class Unknown(LookupError):
    """A value depends on what a tensor holds, or cannot be computed without."""


class Metadata:
    """The values of a graph's nodes, computed when they are asked for, on tensors without memory.

    Parameters
    ----------
    root : Module
        What is traced.
    inputs : sequence
        The example, an item for each placeholder.
    """

    def __init__(self, root: nn.Module, inputs: Sequence[Any]) -> None:
        self._root = root
        self._inputs = inputs
        self._fakes: dict[int, Tensor] = {}
        self._values: dict[fx.Node, Any] = {}
        self._failed: set[fx.Node] = set()

    @functools.cached_property
    def _mode(self) -> FakeTensorMode:
        return FakeTensorMode(allow_non_fake_inputs=True)  # made when it is needed: the first one takes a second

    def _fake(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._fakes:
            self._fakes[id(value)] = self._mode.from_tensor(value)
        return self._fakes[id(value)]

    def _call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Its tensors are left alone: what a forward adds to them, as a normalisation does, is added to others."""
        own = itertools.chain(module.named_parameters(), module.named_buffers())
        return functional_call(module, {name: self._fake(tensor) for name, tensor in own}, args, kwargs)

    def of(self, node: fx.Node) -> Any:
        """What `node` gives; raises Unknown."""
        needed, reached = [node], {node}
        for there in needed:
            new = [n for n in there.all_input_nodes if n not in reached and n not in self._values]
            needed += new
            reached.update(new)
        with _outside_of_traces(), self._mode, torch.no_grad():
            for there in (n for n in node.graph.nodes if n in reached):
                if there not in self._values:
                    self._values[there] = self._compute(there)
        return self._values[node]

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        if node in self._failed:
            raise Unknown(node.name)
        try:
            if node.op == "placeholder":
                position = [n for n in node.graph.nodes if n.op == "placeholder"].index(node)
                return tree_map(self._fake, self._inputs[position])
            if node.op == "get_attr":
                return self._fake(operator.attrgetter(str(node.target))(self._root))
            if node.op == "call_module":
                return self._call(self._root.get_submodule(str(node.target)), args, kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            function: Callable[..., Any] = node.target  # type: ignore[assignment]
            return function(*args, **kwargs)
        except Exception as error:
            self._failed.add(node)
            raise Unknown(str(error)) from error


@contextmanager
def _outside_of_traces() -> Iterator[None]:
    """Modules are called, and functions that make tensors give tensors, as if nothing were traced."""
    patched = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__, nn.Module.__getattr__ = _call, _getattr  # type: ignore[method-assign]
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = patched  # type: ignore[method-assign]
