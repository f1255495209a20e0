"""Where the units of "auto" begin."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from layerwise.splitting.errors import SplitError
from layerwise.splitting.traces import Trace
from layerwise.splitting.tracing import trace_modes

__all__ = ["find_units"]

_SEVERAL = (
    "more than one tensor crosses to every module where it could be cut, as a mask does; to train it by parts, name them: "
    "split(model, names)"
)
_CONTRACTIONS = {
    *("matmul", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "addmv", "linear", "bilinear", "einsum", "tensordot"),
    *("embedding", "embedding_bag"),
    *(f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3)),
}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_units(model: nn.Module, example: Any = None) -> list[str]:
    """Names of the modules that begin the units of "auto".

    Raises
    ------
    SplitError
        If the model's own forward cannot be traced, or there is nothing to cut at.
    """
    named = getattr(model, "unit_names", None)
    if named is not None:
        return list(named)
    modules = dict(model.named_modules())
    train, evaluation = traces = trace_modes(model, example=example, extend=True)
    around: dict[str, list[str]] = {}  # the modules that a layer lies in, outermost first, itself last
    for node in evaluation.nodes:
        name = _layer_of(node, modules)
        if name is not None and name in train.first:
            around.setdefault(name, Trace.modules_of(node))
    if not around:
        raise SplitError(
            "the model calls no module that has a matrix or kernel among its parameters, so there is nothing to cut at; "
            "put a single layer into an nn.Sequential"
        )

    def is_narrow(name: str) -> bool:
        return all(name in trace.first and trace.is_narrow(name) for trace in traces)

    groups = _timm_groups(model)
    if groups is not None:
        units = _group(around, modules, groups, is_narrow)
    else:
        units = _gather(around, modules, evaluation, is_narrow)
    last = list(around)[-1]
    if len(units) > 1 and isinstance(modules[last], nn.Linear) and list(units.values())[-1] == [last]:
        units.popitem()
    if len(units) == 1:
        hidden = [name for name in evaluation.left if sum(p.dim() > 1 for p in modules[name].parameters()) > 2]
        if hidden or len(around) > 2:
            reason = evaluation.left[hidden[0]] if hidden else _SEVERAL
            warnings.warn(f"{type(model).__name__} is a single unit: {reason}", stacklevel=4)
    return list(units)


def _layer_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The module with a kernel that a node calls, or whose kernel it reads where it was entered: a layer of somebody's own."""
    name = str(node.target)
    if node.op == "call_module":
        return name if _has_kernel(modules[name]) else None
    names = Trace.modules_of(node)
    if node.op != "get_attr" or not names or names[-1] != name.rpartition(".")[0]:
        return None
    inside = any(_has_kernel(child) for child in modules[names[-1]].children())
    return names[-1] if not inside and _is_contracted(node) else None


def _is_contracted(parameter: fx.Node) -> bool:
    """Whether a parameter, or what is made of parameters with it, is multiplied with features as a matrix or kernel."""
    made, todo = {parameter}, [parameter]
    for node in todo:
        for user in node.users:
            if getattr(user.target, "__name__", user.target) in _CONTRACTIONS:
                return True
            if user not in made and all(source in made or source.op == "get_attr" for source in user.all_input_nodes):
                made.add(user)
                todo.append(user)
    return False


def _has_kernel(module: nn.Module) -> bool:
    """A parameter that is more than a scale or shift."""
    return any(isinstance(p, nn.parameter.UninitializedParameter) or p.dim() >= 2 for p in module.parameters())


def _gather(
    around: Mapping[str, list[str]], modules: Mapping[str, nn.Module], trace: Trace, is_narrow: Callable[[str], bool]
) -> dict[str, list[str]]:
    """Units, by the name of the module that begins them, and their layers.

    Where several tensors cross into a layer, the smallest module that only one enters and in which they come together again
    is a block, which stays whole, as do all of its class. A layer that is alone in a module stands for that module. Layers of
    constants, such as an embedding of positions, begin no unit.
    """
    inside: dict[str, list[str]] = defaultdict(list)
    whole: set[type] = set()
    for layer, names in around.items():
        for name in names:
            inside[name].append(layer)
        if not is_narrow(layer) and layer in trace.fed:
            merging = trace.modules_of(trace.merging(layer))
            blocks = [n for n in names if n in merging and type(modules[n]) not in _CONTAINERS and is_narrow(n)]
            whole.update(type(modules[n]) for n in blocks[-1:])

    def is_alone(layer: str, name: str) -> bool:
        if inside[name] != [layer] or not is_narrow(name):
            return False
        node = trace.nodes[trace.first[name]]
        in_class = type(modules[name]) not in _CONTAINERS
        return in_class or (node.op == "call_module" and any(True for _ in modules[str(node.target)].parameters()))

    units: dict[str, list[str]] = {}
    for layer, names in around.items():
        block = next((n for n in names if type(modules[n]) in whole), None)
        name = block or next((n for n in names if is_alone(layer, n)), layer)
        if name not in units and (not units or (is_narrow(name) and (name == block or layer in trace.fed))):
            units[name] = []
        list(units.values())[-1].append(layer)
    return units


def _group(
    around: Mapping[str, list[str]],
    modules: Mapping[str, nn.Module],
    groups: Mapping[str, object],
    is_narrow: Callable[[str], bool],
) -> dict[str, list[str]]:
    """As :func:`_gather`, by the groups of the parameters: a unit begins where the largest module does that holds the group's
    first layer and nothing of another group."""
    units: dict[str, list[str]] = {}
    seen = set()
    for layer, names in around.items():
        group = groups.get(next(f"{layer}.{name}" for name, _ in modules[layer].named_parameters()))
        if group not in seen:
            seen.add(group)
            pure = [n for n in names if all(groups.get(f"{n}.{p}") == group for p, _ in modules[n].named_parameters())]
            name = next((n for n in pure if is_narrow(n)), None) or (None if units else pure[0])
            if name is not None:
                units[name] = []
        list(units.values())[-1].append(layer)
    return units


def _timm_groups(model: nn.Module) -> dict[str, object] | None:
    """The names of parameters to timm's groups, if there is more than one."""
    if not hasattr(model, "group_matcher"):
        return None
    from timm.models import group_parameters

    groups = group_parameters(model, model.group_matcher(coarse=False))  # type: ignore[operator]
    return {name: group for group, names in groups.items() for name in names} if len(groups) > 1 else None
