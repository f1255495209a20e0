"""Tracing of a model's forward by torch.fx, and cutting of the trace into units.

Only the containers above the units are traced: a block that torch.fx cannot follow is no obstacle as long as it is a unit
as a whole. The forward is traced in training and in eval mode, since what depends on the mode is fixed in a trace.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from layerwise.units import Chain, Unit

__all__ = ["SplitError", "cut_model", "find_units"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SIZES = {"size", "dim", "numel"}  # methods that give numbers
_ARITHMETIC = {
    getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg")
}


class SplitError(RuntimeError):
    """A model that cannot be cut as asked."""


class _Tracer(fx.Tracer):
    """Remembers which module it was in when tracing failed."""

    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.stack: list[str] = []
        self.failed_in: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves:
            return True
        return super().is_leaf_module(m, module_qualified_name) and type(m) not in _CONTAINERS

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.stack.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = self.stack[-1]
            raise
        finally:
            self.stack.pop()


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Optional arguments of forward, which are fixed at their defaults."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _trace(model: nn.Module, leaves: set[str]) -> fx.Graph:
    tracer = _Tracer(leaves)
    try:
        return tracer.trace(model, concrete_args=_defaults(model) or None)
    except Exception as error:
        raise _Untraceable(tracer.failed_in or "", error) from error


class _Untraceable(Exception):
    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(str(error))
        self.where = where
        self.error = error

    def explain(self, model: nn.Module) -> SplitError:
        frames = traceback.extract_tb(self.error.__traceback__)
        fx_files = torch.fx.__path__[0]
        own = [f for f in frames if not f.filename.startswith(fx_files) and f.filename != __file__]
        line = own[-1] if own else frames[-1]
        source = (line.line or linecache.getline(line.filename, line.lineno or 0)).strip()
        where = f"module {self.where!r}" if self.where else type(model).__name__
        return SplitError(
            f"{where} cannot be traced: {line.filename}:{line.lineno}: `{source}`: {self.error}. Name it, or a module around "
            "it, as one unit, or give units by hand: split(model, [Unit(name, function, modules), ...])"
        )


# ---- finding units ----


def _blocks_of(node: fx.Node) -> list[str]:
    """Names of the modules that a node lies in, outermost first, its own last."""
    stack = [name for name in (node.meta.get("nn_module_stack") or {}) if name]
    names = [str(name).split("@")[0] for name in stack]
    if node.op == "call_module" and (not names or names[-1] != node.target):
        names.append(str(node.target))
    return names


def _is_number(node: fx.Node, numbers: set[fx.Node]) -> bool:
    if node.op == "call_method" and node.target in _SIZES:
        return True
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device"):
        return True
    inputs = node.all_input_nodes
    return node.op == "call_function" and node.target in _ARITHMETIC and bool(inputs) and numbers.issuperset(inputs)


def _crossing(nodes: Sequence[fx.Node], at: int) -> list[fx.Node]:
    """Values made before nodes[at] and used from there on, in the order in which they are made."""
    later = set(nodes[at:])
    return [n for n in nodes[:at] if n.op != "get_attr" and any(user in later for user in n.users)]


def _has_kernel(module: nn.Module) -> bool:
    """A parameter that is more than a scale or shift."""
    return any(isinstance(p, nn.parameter.UninitializedParameter) or p.dim() >= 2 for p in module.parameters())


@dataclass
class _Candidate:
    name: str  # of the module that is called
    at: int
    blocks: list[str]  # modules around it, outermost first, without plain containers


def find_units(model: nn.Module) -> list[str]:
    """Names of the modules that begin the units of "auto"."""
    grouped = _timm_groups(model)
    if grouped is not None:
        return grouped
    leaves: set[str] = set()
    while True:
        try:
            graph = _trace(model, leaves)
            break
        except _Untraceable as failure:
            if not failure.where or failure.where in leaves:
                raise failure.explain(model) from failure.error
            leaves.add(failure.where)
    nodes = list(graph.nodes)
    numbers: set[fx.Node] = set()
    for node in nodes:
        if _is_number(node, numbers):
            numbers.add(node)
    first_in: dict[str, int] = {}
    for at, node in enumerate(nodes):
        for name in _blocks_of(node):
            first_in.setdefault(name, at)
    modules = dict(model.named_modules())
    candidates = []
    for at, node in enumerate(nodes):
        if node.op == "call_module" and _has_kernel(modules[str(node.target)]):
            around = [n for n in _blocks_of(node)[:-1] if type(modules[n]) not in _CONTAINERS]
            candidates.append(_Candidate(str(node.target), at, around))
    if not candidates:
        raise SplitError("the model has no module with a matrix or kernel among its parameters, so nothing to cut at")

    def alone(at: int) -> bool:
        return len([n for n in _crossing(nodes, at) if n not in numbers]) == 1

    # A class is a block as a whole if, in any of its instances, several tensors cross between two of its layers.
    whole: set[type] = set()
    for c in candidates:
        if not alone(c.at):
            whole.update(
                type(modules[name]) for name in c.blocks if first_in[name] < c.at and not _begins(c, name, candidates)
            )
    names: list[str] = []
    for c in candidates:
        block = next((name for name in c.blocks if type(modules[name]) in whole), c.name)
        at = first_in[block] if block != c.name else c.at
        if block not in names and (not names or alone(at)):
            names.append(block)
    if len(names) > 1 and names[-1] == candidates[-1].name and isinstance(modules[names[-1]], nn.Linear):
        names.pop()
    return names


def _begins(candidate: _Candidate, name: str, candidates: Sequence[_Candidate]) -> bool:
    """Whether the candidate is the first in module `name`."""
    return next(c for c in candidates if name in c.blocks) is candidate


def _timm_groups(model: nn.Module) -> list[str] | None:
    """The first module of each of timm's groups, in order of their depth."""
    if not hasattr(model, "group_matcher"):
        return None
    from timm.models import group_parameters

    groups = group_parameters(model, model.group_matcher(coarse=False))  # type: ignore[operator]
    modules = dict(model.named_modules())
    names = []
    for key in sorted(k for k in groups if isinstance(k, (int, float))):
        owners = [name.rpartition(".")[0] for name in groups[key]]
        shared = owners[0].split(".")
        for owner in owners[1:]:
            parts = owner.split(".")
            same = [a == b for a, b in zip(shared, parts, strict=False)]
            shared = shared[: same.index(False) if False in same else len(same)]
        name = ".".join(shared)
        if not name:
            name = next((o for o in owners if o), "")
        if name and any(_has_kernel(modules[o]) for o in owners if o):
            names.append(name)
    return names if len(names) > 1 else None


# ---- cutting ----


def cut_model(model: nn.Module, names: Sequence[str]) -> Chain:
    """The chain whose units begin at the modules called `names`."""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            close = [known for known in modules if known.endswith(name.rsplit(".", 1)[-1]) and known][:3]
            raise SplitError(f"the model has no module {name!r}" + (f"; did you mean {close}?" if close else ""))
    if len(set(names)) < len(names):
        raise SplitError(f"a name is given twice: {sorted(n for n in set(names) if list(names).count(n) > 1)}")
    above = {name.rsplit(".", i)[0] for name in names for i in range(1, name.count(".") + 1)}
    inside = [name for name in names if name in above]
    if inside:
        raise SplitError(f"{inside[0]!r} is named, and a module inside it also; name one or the other")
    leaves = {name for name in modules if name and name not in above}
    modes = [(module, module.training) for module in model.modules()]
    try:
        graphs = []
        for mode in (True, False):
            model.train(mode)
            try:
                graphs.append(_trace(model, leaves))
            except _Untraceable as failure:
                raise failure.explain(model) from failure.error
    finally:
        for module, mode in modes:
            module.training = mode
    plans = [_plan(graph, names) for graph in graphs]
    same = str(graphs[0]) == str(graphs[1])
    pieces = [_pieces(model, graph, plan) for graph, plan in zip(graphs[: 1 if same else 2], plans, strict=False)]
    units = []
    for k, name in enumerate(plans[0].names):
        train = pieces[0][k]
        evaluate = pieces[-1][k]
        if not same and pieces[0][k].arity != pieces[1][k].arity:
            raise SplitError(f"what enters unit {name!r} differs between training and eval mode; cut elsewhere")
        paths = dict.fromkeys(train.paths + evaluate.paths)
        loose = {p: _attribute(model, p) for p in dict.fromkeys(train.attributes + evaluate.attributes)}
        loose = {p: tensor for p, tensor in loose.items() if isinstance(tensor, nn.Parameter)}
        units.append(
            Unit(name, train.call, {p: modules[p] for p in paths}, parameters=loose, eval_function=evaluate.call)
        )
    chain = Chain(units, model)
    owned = {id(p) for p in chain.parameters()}
    unused = [name for name, p in model.named_parameters() if id(p) not in owned]
    if unused:
        raise SplitError(f"{len(unused)} parameters are not used by forward, such as {unused[0]!r}")
    return chain


@dataclass
class _Plan:
    names: list[str]  # in the order of the calls
    nodes: list[fx.Node]
    starts: list[int]


def _plan(graph: fx.Graph, names: Sequence[str]) -> _Plan:
    nodes = list(graph.nodes)
    at: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for name in _blocks_of(node):
            at.setdefault(name, i)
    missing = [name for name in names if name not in at]
    if missing:
        raise SplitError(f"module {missing[0]!r} is never called by the model's forward")
    ordered = sorted(names, key=lambda name: at[name])
    return _Plan(ordered, nodes, [0] + [at[name] for name in ordered[1:]] + [len(nodes)])


@dataclass
class _Piece:
    call: Callable[[Any], Any]
    paths: list[str]  # of the modules that it calls
    attributes: list[str]  # of the parameters and buffers that containers hold themselves
    arity: int


def _attribute(model: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(model)


def _pieces(model: nn.Module, graph: fx.Graph, plan: _Plan) -> list[_Piece]:
    nodes = plan.nodes
    entering = [n for n in nodes if n.op == "placeholder" and n.users]
    pieces = []
    for k, name in enumerate(plan.names):
        start, stop = plan.starts[k], plan.starts[k + 1]
        last = k == len(plan.names) - 1
        leaving = [] if last else _crossing(nodes, stop)
        if not last and not leaving:
            raise SplitError(
                f"nothing crosses from unit {name!r} to the next: {plan.names[k + 1]!r} does not depend on it"
            )
        pieces.append(_piece(model, nodes[start:stop], entering, leaving, last))
        entering = leaving
    return pieces


def _piece(
    model: nn.Module, nodes: Sequence[fx.Node], entering: Sequence[fx.Node], leaving: Sequence[fx.Node], last: bool
) -> _Piece:
    """The nodes as a function of what enters them. Attributes are read from the model when it is called, so that they
    follow it to another device."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in entering}
    used = {source for node in nodes for source in node.all_input_nodes} | set(leaving)
    attributes = []
    for node in sorted((n for n in used if n.op == "get_attr"), key=lambda n: n.name):
        made[node] = graph.placeholder(node.name)
        attributes.append(str(node.target))
    paths = []
    for node in nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            made[node] = graph.node_copy(node, made.__getitem__)
        if node.op == "call_module":
            paths.append(str(node.target))
    if last:
        graph.output(fx.node.map_arg(nodes[-1].args[0], made.__getitem__))
    else:
        outputs = tuple(made[node] for node in leaving)
        graph.output(outputs[0] if len(outputs) == 1 else outputs)
    forward = fx.GraphModule(model, graph).forward
    read = [operator.attrgetter(path) for path in attributes]
    if len(entering) == 1 and not attributes:
        return _Piece(forward, paths, attributes, 1)
    alone = len(entering) == 1

    def call(state: Any) -> Any:
        return forward(*((state,) if alone else state), *(get(model) for get in read))

    return _Piece(call, paths, attributes, len(entering))
