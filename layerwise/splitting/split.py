"""Step 1 of *train*: cut any module into a chain of units, by names, by a pattern, by what crosses, or by cost.

A unit begins where a named module is first called and ends where the next one begins; what lies between (activations,
pooling, reshapes) belongs to the unit before it, and what precedes the first name to the first unit. Where the model cannot
be traced, units are given by hand: a sequence of :class:`~layerwise.Unit`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch.optim.swa_utils
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
from torch.nn.parameter import is_lazy

from layerwise.costs import balance, unit_costs
from layerwise.splitting.cutting import cut_model
from layerwise.splitting.errors import SplitError
from layerwise.splitting.finding import find_units
from layerwise.units import Chain, Unit

__all__ = ["split"]

Spec = str | re.Pattern[str] | int | Sequence[str] | Sequence[Unit]


def split(
    model: nn.Module,
    spec: Spec = "auto",
    *,
    example: Any = None,
    balance_by: str = "memory",
    within: Spec = "auto",
) -> Chain:
    """Cut `model` into a chain of units that computes the same.

    Parameters
    ----------
    model : Module
        Any module. It is not changed: the units use its parameters under their names, so that ``model.state_dict()`` is
        what it was.
    spec : str, pattern, int, sequence of str or sequence of Unit, default="auto"
        "auto": the names in the model's attribute ``unit_names`` where it has one; else timm's groups where it has a
        ``group_matcher``; else every module at which one tensor alone crosses and which has a matrix or kernel among its
        parameters; masks and positions, which depend on sizes alone, may cross beside it. Residual blocks and modules that
        torch.fx cannot follow stay whole, normalisations join the unit before them, and the last linear layer, the classifier,
        joins the last unit. If that leaves a single unit, there is a warning that says why.
        A pattern (``re.compile``): the modules whose whole name it matches, without those inside another that it matches.
        Names: fully qualified names of modules, in any order; each begins a unit, inside residual blocks also.
        A number: as many blocks of consecutive units of `within`, the costliest as cheap as can be.
        Units: taken as they are.
    example : Tensor or tuple of Tensor, optional
        An input, or a tuple of all; needed for a number of blocks balanced by memory or time. With it, the chain's output is
        compared with the model's, bit by bit, and the model's forward may ask for shapes, types and devices in conditions, loops
        and numbers, as those of Hugging Face's transformers do: the answers are those for the example, as long as they are the
        same for a batch of another size. The chain raises SplitError for an input to which they do not apply.
    balance_by : {"memory", "time", "parameters"}, default="memory"
        What blocks are balanced by: bytes that autograd keeps for the backward pass, seconds of a forward and backward
        pass, both in training mode, or the number of parameters.
    within : default="auto"
        The units that blocks are made of.

    Returns
    -------
    Chain
        The units. It can be copied and pickled, and follows the model to another device or type.

    Raises
    ------
    SplitError
        If the model cannot be traced, with the line where that failed; if a name is not among its modules or is never
        called; if a trainable parameter is in no unit; if a lazy module has not seen its first batch; if the model is the
        wrapper that ``torch.compile``, DataParallel, DistributedDataParallel or AveragedModel put around it.
    ValueError
        If the chain would have fewer units than asked for, if two units would share a parameter, or a unit would have
        none.
    AssertionError
        If the chain's output for `example` is not the model's: its forward does not do the same twice.

    Notes
    -----
    Optional arguments of the model's forward have their defaults. Modules without parameters that several units call, such as
    one dropout for all, are copied, so that a unit in training does not share them with one in eval mode. What a forward above
    the units writes into attributes is not written by the chain.
    """
    if isinstance(spec, bool):
        raise TypeError("spec: expected 'auto', a pattern, names, a number or units, got a bool")
    if not isinstance(spec, (int, str, re.Pattern, Sequence)):
        raise TypeError(f"spec: expected 'auto', a pattern, names, a number or units, got {spec!r}")
    if not isinstance(spec, int) and (balance_by, within) != ("memory", "auto"):
        raise ValueError("balance_by and within: only with a number of blocks as spec")
    _check_initialised(model)
    by_hand = not isinstance(spec, (int, str, re.Pattern)) and any(isinstance(part, Unit) for part in spec)
    if not by_hand:
        _check_unwrapped(model)
    if isinstance(spec, int):
        chain = cut_model(model, _blocks(model, spec, example, balance_by, within), example)
    elif by_hand:
        chain = _of_units(model, cast("Sequence[Unit]", spec))
    else:
        chain = cut_model(model, _names(model, cast("str | re.Pattern[str] | Sequence[str]", spec), example), example)
    if example is not None:
        try:
            chain.check(example)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
            raise SplitError(
                "a function that the model calls keeps what it has computed, as with functools.lru_cache, and has kept what it "
                "computed while the model was traced; empty it (cache_clear), and keep such tensors in buffers"
            ) from error
    return chain


def _check_unwrapped(model: nn.Module) -> None:
    outer = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    inner = "module" if isinstance(model, outer) else "_orig_mod" if hasattr(model, "_orig_mod") else None
    if inner is not None:
        raise SplitError(f"model: a {type(model).__name__} cannot be cut; give the network in it, model.{inner}")


def _check_initialised(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise SplitError(f"{name!r} has no size yet, as of a lazy module; run the model on one batch first")


def _of_units(model: nn.Module, units: Sequence[Any]) -> Chain:
    if not all(isinstance(unit, Unit) for unit in units):
        raise TypeError("spec: expected units alone or names alone, got a mixture")
    chain = Chain(units, model)
    left = chain.missing(model)
    if left:
        raise ValueError(
            f"{len(left)} parameters of the model are in no unit, such as {left[0]!r}; list the modules that hold them in a "
            "unit's `modules`, or say that they are not to be trained: requires_grad_(False)"
        )
    return chain


def _names(model: nn.Module, spec: str | re.Pattern[str] | Sequence[str], example: Any) -> list[str]:
    if isinstance(spec, str):
        if spec != "auto":
            raise ValueError(
                f"spec: expected 'auto', a compiled pattern, names, a number or units, got {spec!r}; "
                "for one name write a list, for a pattern re.compile"
            )
        return find_units(model, example)
    if isinstance(spec, re.Pattern):
        names: list[str] = []
        for name, module in model.named_modules():
            inside = any(name.startswith(outer + ".") for outer in names)
            if name and not inside and spec.fullmatch(name) and any(True for _ in module.parameters()):
                names.append(name)
        if not names:
            raise ValueError(f"no module with parameters has a name that matches {spec.pattern!r} as a whole")
        return names
    return list(spec)


def _blocks(model: nn.Module, count: int, example: Any, by: str, within: Spec) -> list[str]:
    if count < 1:
        raise ValueError(f"spec: expected a positive number of blocks, got {count}")
    if isinstance(within, int) or not (
        isinstance(within, (str, re.Pattern)) or all(isinstance(w, str) for w in within)
    ):
        raise TypeError("within: expected 'auto', a pattern or names, got a number or units")
    finest = cut_model(model, _names(model, cast("str | re.Pattern[str] | Sequence[str]", within), example), example)
    if count > len(finest):
        raise ValueError(f"spec: {count} blocks of {len(finest)} units; give a finer `within`, or fewer blocks")
    if by not in ("memory", "time", "parameters"):
        raise ValueError(f"balance_by: expected 'memory', 'time' or 'parameters', got {by!r}")
    if by == "parameters":
        costs = [float(unit.parameter_count) for unit in finest]
    elif example is None:
        raise ValueError(f"spec: blocks balanced by {by} need an example input; or balance_by='parameters'")
    else:
        costs = unit_costs(finest, example, by)
    return [finest[first].name for first in balance(costs, count)]
