"""A model's forward as traces, in training and in eval mode, since what depends on the mode is fixed in a trace."""

from __future__ import annotations

import copy
import linecache
import traceback
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx, nn

from layerwise.checkpoint import rng_state, set_rng_state
from layerwise.splitting.errors import SplitError
from layerwise.splitting.metadata import two_sizes
from layerwise.splitting.tracer import Tracer, own_frames
from layerwise.splitting.traces import Trace
from layerwise.units import modes_kept

__all__ = ["trace_modes"]


class _Untraceable(Exception):
    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(str(error))
        self.where = where
        self.error = error

    def explain(self, model: nn.Module, example: Any) -> SplitError:
        where = f"module {self.where!r}" if self.where else type(model).__name__
        own = own_frames(traceback.extract_tb(self.error.__traceback__))
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


def _trace(model: nn.Module, leaves: Collection[str], examples: Sequence[tuple[Any, ...]]) -> tuple[fx.Graph, set[str]]:
    """The graph, and the encoders that have to be leaves, for one call has a mask and another has none. What the forward
    writes into its modules while it is traced is undone."""
    tracer = Tracer(leaves, examples)
    rng = rng_state()
    kept = _contents(model)
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
        for container, content in kept:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        set_rng_state(rng)


def _contents(model: nn.Module) -> list[tuple[Any, Any]]:
    """The attributes of all modules, and the lists, dictionaries and sets among them, each with a copy."""
    plain = [module.__dict__ for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    inside = [value for names in plain for value in names.values() if isinstance(value, (list, dict, set))]
    return [(container, copy.copy(container)) for container in [*inside, *plain]]


def trace_modes(
    model: nn.Module, leaves: Collection[str] = (), example: Any = None, *, extend: bool = False
) -> list[Trace]:
    """The forward in training and in eval mode. Modules called `leaves` are not entered; nor, if `extend`, are those that
    torch.fx cannot follow. With an example, an input or a tuple of all, conditions on shapes, types and devices are decided."""
    leaves = set(leaves)
    examples = [] if example is None else two_sizes(example if isinstance(example, tuple) else (example,))
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
