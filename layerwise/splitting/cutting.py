"""A trace cut into units."""

from __future__ import annotations

import copy
import itertools
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from layerwise.splitting.errors import SplitError
from layerwise.splitting.tracer import Tracer, has_state
from layerwise.splitting.traces import Trace
from layerwise.splitting.tracing import trace_modes
from layerwise.units import Chain, Unit

__all__ = ["cut_model"]


def cut_model(model: nn.Module, names: Sequence[str], example: Any = None) -> Chain:
    """The chain whose units begin at the modules called `names`."""
    modules = dict(model.named_modules())
    above = _check_names(modules, names)
    traces = trace_modes(model, {name for name in modules if name and name not in above}, example)
    for trace in traces:
        missing = [name for name in names if name not in trace.first]
        if missing:
            mode = "training" if trace is traces[0] else "eval"
            raise SplitError(f"module {missing[0]!r} is never called by the model's forward in {mode} mode")
    orders = [sorted(names, key=trace.first.__getitem__) for trace in traces]
    if orders[0] != orders[1]:
        raise SplitError(f"units come in one order in training and in another in eval mode: {orders[0]}, {orders[1]}")
    if str(traces[0].graph) == str(traces[1].graph):
        traces = traces[:1]
    pieces = [_pieces(trace, orders[0]) for trace in traces]
    for name, *both in zip(orders[0], *pieces, strict=True):
        if len({len(piece.entering) for piece in both}) > 1:
            raise SplitError(f"what enters unit {name!r} differs between training and eval mode; cut elsewhere")
    calls = [dict.fromkeys(path for piece in both for path in piece.paths) for both in zip(*pieces, strict=True)]
    callers = Counter(itertools.chain.from_iterable(calls))
    units = []
    for name, paths, *both in zip(orders[0], calls, *pieces, strict=True):
        # A module without state, such as a dropout, may be in training for one of its units and not for another.
        own = {
            p: copy.deepcopy(modules[p]) if callers[p] > 1 and not has_state(modules[p]) else modules[p] for p in paths
        }
        read = {path: operator.attrgetter(path)(model) for piece in both for path in piece.attributes}
        parameters = {path: tensor for path, tensor in read.items() if isinstance(tensor, nn.Parameter)}
        functions = [piece.function(model, own) for piece in both]
        constants = min(piece.constants for piece in both)
        unit = Unit(name, functions[0], own, parameters=parameters, eval_function=functions[-1], constants=constants)
        unit.training = unit.parts.training = model.training
        units.append(unit)
    chain = Chain(units, model)
    unused = chain.missing(model)
    if unused:
        raise SplitError(
            f"{len(unused)} parameters are not used by forward, such as {unused[0]!r}; delete them, or say that they are not "
            "to be trained: requires_grad_(False)"
        )
    return chain


def _check_names(modules: dict[str, nn.Module], names: Sequence[str]) -> set[str]:
    """The names of the modules around those called `names`."""
    if not names:
        raise SplitError("expected at least one name, got none")
    for name in names:
        if name not in modules or not name:
            close = [known for known in modules if known.endswith(name.rsplit(".", 1)[-1]) and known][:3]
            raise SplitError(f"the model has no module {name!r}" + (f"; did you mean {close}?" if close else ""))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SplitError(f"a name is given twice: {twice}")
    above = {name.rsplit(".", i)[0] for name in names for i in range(1, name.count(".") + 1)}
    inside = [name for name in names if name in above]
    if inside:
        raise SplitError(f"{inside[0]!r} is named, and a module inside it also; name one or the other")
    return above


def _pieces(trace: Trace, names: Sequence[str]) -> list[_Piece]:
    nodes = trace.nodes
    starts = [0] + [trace.first[name] for name in names[1:]] + [len(nodes)]
    entering = [n for n in nodes if n.op == "placeholder"]
    pieces = []
    for name, following, start, stop in zip(names, [*names[1:], ""], starts, starts[1:], strict=False):
        leaving = trace.crossing(stop)
        if following and not leaving:
            raise SplitError(f"nothing crosses from unit {name!r} to the next: {following!r} does not depend on it")
        pieces.append(_Piece(nodes[start:stop], entering, leaving, trace.constants_among(entering)))
        entering = leaving
    return pieces


class _Piece:
    """Nodes from one cut to the next.

    Attributes
    ----------
    entering : list of Node
        What they need of the nodes before.
    constants : int
        How many of these, the first, are constants.
    paths : list of str
        Modules that they call.
    attributes : list of str
        Parameters and buffers that the modules around them hold themselves.
    graph : Graph
        They as a function of what enters them and of the attributes.
    """

    def __init__(
        self, nodes: Sequence[fx.Node], entering: Sequence[fx.Node], leaving: Sequence[fx.Node], constants: int
    ) -> None:
        self.entering = entering
        self.constants = constants
        self.paths = [str(node.target) for node in nodes if node.op == "call_module"]
        self.graph = fx.Graph(tracer_cls=Tracer)
        made = {node: self.graph.placeholder(node.name) for node in entering}
        used = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source.op == "get_attr")
        made.update({node: self.graph.placeholder(node.name) for node in used})
        self.attributes = [str(node.target) for node in used]
        for node in nodes:
            if node.op == "output":
                self.graph.output(fx.node.map_arg(node.args[0], made.__getitem__))
            elif node.op not in ("placeholder", "get_attr"):
                made[node] = self.graph.node_copy(node, made.__getitem__)
                made[node].meta.clear()
        if leaving:
            outputs = tuple(made[node] for node in leaving)
            self.graph.output(outputs[0] if len(outputs) == 1 else outputs)

    def function(self, model: nn.Module, modules: dict[str, nn.Module]) -> _Function:
        """The piece with the modules that it calls, `modules`, and those of `model` whose attributes it reads."""
        reads = [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in self.attributes]
        return _Function(fx.GraphModule(modules, self.graph), len(self.entering), reads)


class _Function:
    """A piece as a function of a state. Attributes are read when it is called, so that they follow the model to another
    device."""

    def __init__(self, module: fx.GraphModule, arity: int, reads: list[tuple[nn.Module, str]]) -> None:
        self.forward = module.forward
        self.arity = arity
        self.reads = reads

    def __call__(self, state: Any) -> Any:
        values = (state,) if self.arity == 1 else state
        return self.forward(*values, *[getattr(owner, name) for owner, name in self.reads])
