"""A trace: which values cross from one of its nodes to the next, and which of them are features."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Mapping, Sequence

from torch import fx

from layerwise.splitting.metadata import is_in_place
from layerwise.splitting.questions import without_gradient

__all__ = ["Trace"]


_SIZES = {"size", "dim", "numel"}  # methods that give numbers
_ARITHMETIC = {
    getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg")
}


class Trace:
    """A traced forward.

    Attributes
    ----------
    graph : Graph
        The trace.
    nodes : list of Node
        In the order of execution.
    first : dict
        Names of modules to the index of the first node inside.
    fed : set of str
        Names of modules which something enters that is computed from the input, not only constants.
    left : mapping
        Names of modules that were not entered, for torch.fx cannot follow them, to why.

    Numbers, and tensors made of numbers and buffers alone, such as masks of a size, are constants: they cross a cut beside what
    is computed from the input, and are not counted. `trained` are the names of parameters, of which nothing is constant.
    """

    def __init__(self, graph: fx.Graph, trained: Collection[str], left: Mapping[str, str]) -> None:
        self.graph = graph
        self.left = left
        self.nodes = list(graph.nodes)
        self.first: dict[str, int] = {}
        index = {node: i for i, node in enumerate(self.nodes)}
        self._last_use = [max((index[user] for user in node.users), default=-1) for node in self.nodes]
        self._constants = _find_constants(self.nodes, trained)
        self.fed: set[str] = set()
        change = [0] * (len(self.nodes) + 1)
        for i, node in enumerate(self.nodes):
            for name in self.modules_of(node):
                self.first.setdefault(name, i)
            for source in node.all_input_nodes:
                if source.op != "get_attr" and source not in self._constants:
                    self.fed.update(set(self.modules_of(node)).difference(self.modules_of(source)))
            if node not in self._constants and node.op != "get_attr" and self._last_use[i] > i:
                change[i + 1] += 1
                change[self._last_use[i] + 1] -= 1
        self._tensors_crossing = list(itertools.accumulate(change))

    @staticmethod
    def modules_of(node: fx.Node) -> list[str]:
        """Names of the modules that a node lies in, outermost first, its own last."""
        names = [str(name).split("@")[0] for name in node.meta.get("nn_module_stack") or {} if name]
        if node.op == "call_module" and (not names or names[-1] != node.target):
            names.append(str(node.target))
        return names

    def crossing(self, at: int) -> list[fx.Node]:
        """Values made before node `at` and used from there on, in the order in which they are made, constants first."""
        used = [
            n for n, last in zip(self.nodes[:at], self._last_use, strict=False) if last >= at and n.op != "get_attr"
        ]
        return sorted(used, key=lambda n: n not in self._constants)

    def constants_among(self, nodes: Sequence[fx.Node]) -> int:
        return sum(node in self._constants for node in nodes)

    def is_narrow(self, name: str) -> bool:
        """Whether one tensor alone crosses to where module `name` begins, beside constants."""
        return self._tensors_crossing[self.first[name]] == 1

    def merging(self, name: str) -> fx.Node:
        """The node after which, from the beginning of module `name` on, no more than one tensor crosses."""
        narrow = (i for i in range(self.first[name] + 1, len(self.nodes)) if self._tensors_crossing[i] <= 1)
        return self.nodes[next(narrow, len(self.nodes)) - 1]


def _is_number(node: fx.Node, numbers: set[fx.Node]) -> bool:
    if node.op == "call_method" and node.target in _SIZES:
        return True
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device"):
        return True
    inputs = node.all_input_nodes
    known = node.target in _ARITHMETIC or node.target is without_gradient
    return node.op == "call_function" and known and bool(inputs) and numbers.issuperset(inputs)


def _find_constants(nodes: Sequence[fx.Node], trained: Collection[str]) -> set[fx.Node]:
    """Numbers, and what is made of numbers, buffers and constants alone, and not changed in place by anything else."""
    changed: set[fx.Node] = set()
    while True:
        numbers: set[fx.Node] = set()
        constants: set[fx.Node] = set()
        for node in nodes:
            if node.op == "get_attr":
                found = node.target not in trained
            else:
                found = node.op in ("call_function", "call_method") and constants.issuperset(node.all_input_nodes)
            if _is_number(node, numbers):
                numbers.add(node)
            if node in numbers or (found and node not in changed):
                constants.add(node)
        new = {
            source
            for node in nodes
            if not constants.issuperset(node.all_input_nodes)
            for source in constants.intersection(node.all_input_nodes)
            if is_in_place(node, source)
        }
        new -= changed
        if not new:
            return constants
        while new:  # and what these are views of, as far as can be told
            changed |= new
            new = (
                {source for node in new for source in constants.intersection(node.all_input_nodes)} - numbers - changed
            )
