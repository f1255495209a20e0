"""What units cost, and consecutive units grouped so that the costliest group is as cheap as can be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from layerwise.memory import saved_bytes
from layerwise.units import Chain, State, Unit, detach_state, modes_kept

__all__ = ["balance", "unit_costs"]

_TIMED_PASSES = 5
_BISECTIONS = 100  # more than a double's bits


def unit_costs(chain: Chain, example: Any, by: str) -> list[float]:
    """Per unit, the bytes that autograd keeps of a forward pass ("memory") or the median seconds of a forward and backward
    pass ("time"), in training mode. Modes, random numbers and buffers, such as running statistics, are put back."""
    device = next(chain.parameters()).device
    buffers = [(b, b.clone()) for unit in chain for _, b in unit.named_tensors() if not isinstance(b, nn.Parameter)]
    costs: list[float] = []
    state: State = example
    devices = [device] if device.type == "cuda" else []
    with modes_kept(chain.units), torch.random.fork_rng(devices), torch.enable_grad():
        chain.train()
        for unit in chain:
            if by == "memory":
                kept = [tensor for _, tensor in unit.named_tensors()]
                costs.append(float(saved_bytes(lambda: unit(state), exclude=kept)))  # noqa: B023
            else:
                costs.append(_seconds(unit, state))
            with torch.no_grad():
                state = detach_state(unit(state))
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return costs


def _seconds(unit: Unit, state: State) -> float:
    taken = []
    device = next(unit.parameters()).device
    parameters = [p for p in unit.parameters() if p.requires_grad]
    for _ in range(_TIMED_PASSES + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        out = [t for t in tree_leaves(unit(state)) if isinstance(t, torch.Tensor) and t.requires_grad]
        if out:
            torch.autograd.grad([t.float().sum() for t in out], parameters, allow_unused=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[_TIMED_PASSES // 2]


def balance(costs: Sequence[float], count: int) -> list[int]:
    """Where each of `count` groups of consecutive items begins, the largest sum as small as can be."""
    n = len(costs)
    if not 1 <= count <= n:
        raise ValueError(f"expected 1 to {n} groups, got {count}")
    starts = _fill(costs, count, float("inf"))
    low, high = 0.0, float(sum(costs))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        filled = _fill(costs, count, middle)
        low, high = (middle, high) if filled is None else (low, middle)
        starts = filled or starts
    assert starts is not None
    return starts


def _fill(costs: Sequence[float], count: int, limit: float) -> list[int] | None:
    """Groups filled from the left up to `limit`, none empty; None if they do not hold everything."""
    starts, held = [0], costs[0]
    for i, cost in enumerate(costs[1:], 1):
        if held + cost > limit or len(costs) - i == count - len(starts):
            starts.append(i)
            held = 0.0
        held += cost
    return starts if len(starts) == count else None
