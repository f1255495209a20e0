"""What is known of the values in a trace for an example of the input: shapes, types and devices, not what tensors hold."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Metadata", "Unknown", "is_in_place", "two_sizes"]

_OF_AUTOGRAD = {"grad", "grad_fn", "is_leaf", "requires_grad", "_version"}
_OF_MEMORY = {"data_ptr", "untyped_storage", "storage"}
_OF_CONTENTS = (DataDependentOutputException, DynamicOutputShapeException)


class Unknown(LookupError):
    """A value that cannot be told; the message says why."""


class Metadata:
    """The values of a graph's nodes, computed when they are asked for, on tensors without memory.

    Modules are run on copies, whose parameters have no memory either: what a forward keeps, it keeps in these.

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
        self._copies: dict[str, nn.Module] = {}
        self._order: dict[fx.Node, int] = {}
        self._values: dict[fx.Node, Any] = {}

    @functools.cached_property
    def _mode(self) -> FakeTensorMode:
        return FakeTensorMode(allow_non_fake_inputs=True)  # made when it is needed: the first one takes a second

    def _fake(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._fakes:
            self._fakes[id(value)] = self._mode.from_tensor(value)
        return self._fakes[id(value)]

    def of(self, node: fx.Node) -> Any:
        """What `node` gives; raises Unknown."""
        with torch._C.DisableTorchFunction(), self._mode, torch.no_grad():
            for there in self._needed(node):
                self._values[there] = self._compute(there)
        return self._values[node]

    def _needed(self, node: fx.Node) -> list[fx.Node]:
        """It and what it depends on, by computing or by a change in place, as far as it has not been computed; in order."""
        new = list(itertools.takewhile(lambda n: n not in self._order, reversed(node.graph.nodes)))
        for n in reversed(new):
            self._order[n] = len(self._order)
        reached = {node}
        todo = [node]
        for there in todo:
            changes = (user for source in there.all_input_nodes for user in source.users if is_in_place(user, source))
            before = (user for user in changes if self._order[user] < self._order[there])
            found = {n for n in (*there.all_input_nodes, *before) if n not in reached and n not in self._values}
            reached |= found
            todo += found
        return sorted(reached.difference(self._values), key=self._order.__getitem__)

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        asked = args[1] if node.target is getattr and node.op == "call_function" else node.target
        if asked in _OF_AUTOGRAD or asked in _OF_MEMORY:
            raise Unknown(f"{asked} is not a thing of shape or type")
        try:
            if node.op == "placeholder":
                position = [n for n in self._order if n.op == "placeholder"].index(node)
                return tree_map(self._fake, self._inputs[position])
            if node.op == "get_attr":
                return self._fake(operator.attrgetter(str(node.target))(self._root))
            if node.op == "call_module":
                return self._copy(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            function: Callable[..., Any] = node.target  # type: ignore[assignment]
            return function(*args, **kwargs)
        except _OF_CONTENTS:
            raise Unknown("depends on what a tensor holds") from None
        except Exception as error:
            raise Unknown(f"computing it for the example failed: {type(error).__name__}: {error}") from error

    def _copy(self, name: str) -> nn.Module:
        if name not in self._copies:
            module = self._root.get_submodule(name)
            own = itertools.chain(module.parameters(), module.buffers())
            made = copy.deepcopy(module, {id(tensor): self._fake(tensor) for tensor in own})
            for inner in made.modules():
                inner._forward_hooks.clear()  # which may keep what they see
            self._copies[name] = made
        return self._copies[name]


def is_in_place(node: fx.Node, target: fx.Node) -> bool:
    """Whether a node changes what another has given."""
    if node.kwargs.get("out") is target:
        return True
    if not node.args or node.args[0] is not target or node.op not in ("call_method", "call_function"):
        return False
    if node.target is operator.setitem:
        return True
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True


def two_sizes(example: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The example, and one with a sample more; nothing if it has no samples."""
    samples = next((len(x) for x in tree_leaves(example) if isinstance(x, Tensor) and x.dim() > 0), 0)
    if samples == 0:
        return []

    def enlarge(x: Any) -> Any:
        has_rows = isinstance(x, Tensor) and x.dim() > 0 and len(x) == samples
        return torch.cat([x, x[:1]]) if has_rows else x

    return [example, tree_map(enlarge, example)]
