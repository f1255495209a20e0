"""Tracing of a model's forward by torch.fx, and cutting of the trace into units.

Only the containers above the units are traced: a block that torch.fx cannot follow is no obstacle as long as it is a unit
as a whole. The forward is traced in training and in eval mode, since what depends on the mode is fixed in a trace.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import linecache
import operator
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from layerwise.borrowing import batch_of
from layerwise.metadata import Metadata, Unknown
from layerwise.units import Chain, Unit, main_tensor, modes_kept

__all__ = ["SplitError", "Trace", "cut_model", "trace_modes"]

_FACTORIES = {
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.tensor,
    torch.zeros,
}
_SIZES = {"size", "dim", "numel"}  # methods that give numbers
_ARITHMETIC = {
    getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg")
}


class SplitError(RuntimeError):
    """A model that cannot be cut as asked."""


# ---- tracing ----


class _Tracer(fx.Tracer):
    """Goes into every module but the leaves, and remembers which one it was in when it failed.

    Optional arguments of the model's forward have their defaults, and are no inputs of the trace. Tensors that the forward
    makes of nothing, random ones among them, are made anew at every call. torch's own transformer encoder, whose forward looks at
    sizes, is followed layer by layer where it has samples first and is given no mask. With examples, of two sizes of batch, the
    forward learns what they agree on: conditions on shapes and types, lengths, numbers.
    """

    proxy_buffer_attributes = True

    def __init__(self, leaves: Collection[str] = (), examples: Sequence[Sequence[Any]] = ()) -> None:
        super().__init__()
        self.leaves = leaves
        self.examples = examples
        self.metadata: list[Metadata] = []
        self.stack: list[str] = []
        self.failed_in: str | None = None
        self.encoders: dict[str, set[bool]] = {}  # by name, whether its calls so far could be followed

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self.installed = set(root.modules())
        with _Factories(self):
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.encoders.get(module_qualified_name) == {True}:
            return False
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m not in self.installed and not _has_state(m):
            return forward(*args, **kwargs)  # made by the forward itself, as in nn.ReLU()(x)
        path = self.path_of_module(m)
        self.stack.append(path)
        if isinstance(m, nn.TransformerEncoder) and path not in self.leaves:
            plain = _is_plain(m, args, kwargs)
            self.encoders.setdefault(path, set()).add(plain)
            forward = functools.partial(_encode, m) if plain else forward
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = self.stack[-1]
            raise
        finally:
            self.stack.pop()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        taken = list(inspect.signature(root_fn).parameters.values())[1:]
        if any(p.kind is p.VAR_POSITIONAL or (p.kind is p.KEYWORD_ONLY and p.default is p.empty) for p in taken):
            raise TypeError("forward takes *args or arguments that have to be named; its inputs have to be positional")
        positional = [p for p in taken if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        inputs = [p for p in positional if p.default is p.empty] or positional[:1]
        if isinstance(self.root, nn.TransformerEncoder) and _is_plain(self.root, (None,), {}):
            root_fn = _encode
        self.metadata = [Metadata(self.root, batch) for batch in self.examples if len(batch) >= len(inputs)]
        return root_fn, [self.root, *(self.create_proxy("placeholder", p.name, (), {}) for p in inputs)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def ask(self, proxy: fx.Proxy, question: Callable[[Any], Any]) -> Any:
        """What the answer is for the example and for another size of batch; None if they differ or it is not known."""
        try:
            values = [metadata.of(proxy.node) for metadata in self.metadata]
            answers = [question(value) for value in values if not isinstance(value, Tensor)]
        except (Unknown, TypeError):
            return None
        return answers[0] if len(answers) == 2 and answers[0] == answers[1] else None

    def to_bool(self, obj: fx.Proxy) -> bool:
        answer = self.ask(obj, bool)
        return super().to_bool(obj) if answer is None else answer

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        length = self.ask(obj, len)
        return super().iter(obj) if length is None else iter([operator.getitem(obj, i) for i in range(length)])

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and a not in self.tensor_attrs:
            kept = itertools.chain(self.root.parameters(), self.root.buffers())
            if all(a is not tensor for tensor in kept):
                raise ValueError("a tensor is computed without the input; register it as a buffer")
        return super().create_arg(a)


class _Proxy(fx.Proxy):
    """It can be a number, or have a length, where that is known."""

    tracer: _Tracer

    def _number(self, kind: type) -> Any:
        answer = self.tracer.ask(self, lambda value: kind(value) if isinstance(value, (int, float)) else None)
        if answer is None:
            raise TypeError(f"symbolically traced variables cannot be used as {kind.__name__}")
        return answer

    def __len__(self) -> int:
        length: int | None = self.tracer.ask(self, len)
        if length is None:
            raise TypeError("the length of a symbolically traced variable is not known")
        return length

    def __index__(self) -> int:
        number: int = self._number(int)
        return number

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    __int__ = __index__

    def __float__(self) -> float:
        number: float = self._number(float)
        return number


class _Attribute(_Proxy, fx.proxy.Attribute):
    pass


def _two_sizes(example: Sequence[Any]) -> list[Sequence[Any]]:
    """The example, and one with a sample more."""
    first = main_tensor(example)
    return [example, batch_of(example, len(first) + 1) if first.dim() else example]


def _is_plain(encoder: Any, args: Any, kwargs: Any) -> bool:
    """Whether torch's own forward is called without masks, on samples along the first axis."""
    ours = type(encoder).forward is nn.TransformerEncoder.forward
    first = all(getattr(getattr(layer, "self_attn", None), "batch_first", False) for layer in encoder.layers)
    if not (ours and first):
        return False
    given = inspect.signature(encoder.forward).bind(*args, **kwargs).arguments
    return all(value is None or value is False for name, value in given.items() if name != "src")


def _encode(encoder: Any, src: Any, *_masks: Any, **_more: Any) -> Any:
    """What that forward computes then."""
    for layer in encoder.layers:
        src = layer(src, src_mask=None, is_causal=False, src_key_padding_mask=None)
    return src if encoder.norm is None else encoder.norm(src)


class _Factories(TorchFunctionMode):
    """Functions that make tensors of nothing become part of the trace; also of sizes that are traced, which the functions'
    own check of their arguments turns down before a mode can see them."""

    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORIES and not types:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        for function in _FACTORIES:
            setattr(torch, function.__name__, functools.partial(self._call, function))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for function in _FACTORIES:
            setattr(torch, function.__name__, function)

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            return self.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)


class _Untraceable(Exception):
    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(str(error))
        self.where = where
        self.error = error

    def explain(self, model: nn.Module, example: Any) -> SplitError:
        where = f"module {self.where!r}" if self.where else type(model).__name__
        library = str(Path(torch.__file__).parent)
        frames = traceback.extract_tb(self.error.__traceback__)
        own = [f for f in frames if not f.filename.startswith(library) and f.filename != __file__]
        at = ""
        if own:
            source = (own[-1].line or linecache.getline(own[-1].filename, own[-1].lineno or 0)).strip()
            at = f"{own[-1].filename}:{own[-1].lineno}: `{source}`: "
        ways = ["change that"]
        if example is None:
            ways.append(
                "give an example of the input, by whose shape and type conditions are decided: split(model, example=x)"
            )
        if self.where:
            ways.append(f"name {self.where!r}, or a module around it, as one unit")
        ways.append("give units by hand: split(model, [Unit(name, function, modules), ...])")
        return SplitError(f"{where} cannot be traced: {at}{self.error}. Ways out: {'; '.join(ways)}")


def _trace(model: nn.Module, leaves: Collection[str], examples: Sequence[Sequence[Any]]) -> tuple[fx.Graph, set[str]]:
    """The graph, and the encoders that have to be leaves, for one call has a mask and another has none. What the forward
    writes into its modules while it is traced is undone."""
    tracer = _Tracer(leaves, examples)
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    try:
        graph = tracer.trace(model)
        for name, module in model.named_modules():
            for buffer, value in module._buffers.items():
                if isinstance(value, fx.Proxy):
                    message = (
                        f"its forward assigns to the buffer {buffer!r} instead of changing it by a method such as add_"
                    )
                    raise _Untraceable(name, ValueError(message))
        return graph, {path for path, ways in tracer.encoders.items() if len(ways) > 1}
    except _Untraceable:
        raise
    except Exception as error:
        raise _Untraceable(tracer.failed_in or "", error) from error
    finally:
        for module, attributes, buffers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.update(buffers)


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
        numbers: set[fx.Node] = set()
        self._constants: set[fx.Node] = set()
        self.fed: set[str] = set()
        change = [0] * (len(self.nodes) + 1)
        for i, node in enumerate(self.nodes):
            for name in self.modules_of(node):
                self.first.setdefault(name, i)
            for source in node.all_input_nodes:
                if source.op != "get_attr" and source not in self._constants:
                    self.fed.update(set(self.modules_of(node)).difference(self.modules_of(source)))
            if _is_number(node, numbers):
                numbers.add(node)
            if node in numbers or _is_constant(node, self._constants, trained):
                self._constants.add(node)
            elif node.op != "get_attr" and self._last_use[i] > i:
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
    return node.op == "call_function" and node.target in _ARITHMETIC and bool(inputs) and numbers.issuperset(inputs)


def _is_constant(node: fx.Node, constants: set[fx.Node], trained: Collection[str]) -> bool:
    if node.op == "get_attr":
        return node.target not in trained
    return node.op in ("call_function", "call_method") and constants.issuperset(node.all_input_nodes)


def trace_modes(
    model: nn.Module, leaves: Collection[str] = (), example: Any = None, *, extend: bool = False
) -> list[Trace]:
    """The forward in training and in eval mode. Modules called `leaves` are not entered; nor, if `extend`, are those that
    torch.fx cannot follow. With an example, an input or a tuple of all, conditions on shapes, types and devices are decided."""
    leaves = set(leaves)
    examples = [] if example is None else _two_sizes(example if isinstance(example, tuple) else (example,))
    graphs: list[fx.Graph] = []
    left: dict[str, str] = {}
    with modes_kept([model]):
        while len(graphs) < 2:
            model.train(not graphs)
            try:
                graph, whole = _trace(model, leaves, examples)
            except _Untraceable as failure:
                if not extend or not failure.where or failure.where in leaves:
                    raise failure.explain(model, example) from failure.error
                whole = {failure.where}
                left[failure.where] = str(failure.explain(model, example))
            if whole:
                leaves |= whole
                graphs.clear()
            else:
                graphs.append(graph)
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [Trace(graph, trained, left) for graph in graphs]


# ---- cutting ----


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
            p: copy.deepcopy(modules[p]) if callers[p] > 1 and not _has_state(modules[p]) else modules[p] for p in paths
        }
        read = {path: operator.attrgetter(path)(model) for piece in both for path in piece.attributes}
        parameters = {path: tensor for path, tensor in read.items() if isinstance(tensor, nn.Parameter)}
        functions = [piece.function(model, own) for piece in both]
        unit = Unit(name, functions[0], own, parameters=parameters, eval_function=functions[-1])
        unit.training = unit.parts.training = model.training
        units.append(unit)
    chain = Chain(units, model)
    owned = {id(p) for p in chain.parameters()}
    unused = [name for name, p in model.named_parameters() if id(p) not in owned and p.requires_grad]
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


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in itertools.chain(module.parameters(), module.buffers()))


def _pieces(trace: Trace, names: Sequence[str]) -> list[_Piece]:
    nodes = trace.nodes
    starts = [0] + [trace.first[name] for name in names[1:]] + [len(nodes)]
    entering = [n for n in nodes if n.op == "placeholder"]
    pieces = []
    for name, following, start, stop in zip(names, [*names[1:], ""], starts, starts[1:], strict=False):
        leaving = trace.crossing(stop)
        if following and not leaving:
            raise SplitError(f"nothing crosses from unit {name!r} to the next: {following!r} does not depend on it")
        pieces.append(_Piece(nodes[start:stop], entering, leaving))
        entering = leaving
    return pieces


class _Piece:
    """Nodes from one cut to the next.

    Attributes
    ----------
    entering : list of Node
        What they need of the nodes before.
    paths : list of str
        Modules that they call.
    attributes : list of str
        Parameters and buffers that the modules around them hold themselves.
    graph : Graph
        They as a function of what enters them and of the attributes.
    """

    def __init__(self, nodes: Sequence[fx.Node], entering: Sequence[fx.Node], leaving: Sequence[fx.Node]) -> None:
        self.entering = entering
        self.paths = [str(node.target) for node in nodes if node.op == "call_module"]
        self.graph = fx.Graph(tracer_cls=_Tracer)
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
