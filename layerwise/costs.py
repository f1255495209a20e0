"""What units cost, and consecutive units grouped so that the costliest group is as cheap as can be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from layerwise.memory import saved_bytes
from layerwise.units import Chain, State, detach_state, main_tensor

__all__ = ["balance", "unit_costs"]

_TIMED_PASSES = 5


def unit_costs(chain: Chain, example: Any, by: str) -> list[float]:
    """Per unit, the bytes that autograd keeps of a forward pass ("memory") or the median seconds of a forward and backward
    pass ("time"). Buffers, such as running statistics, are put back."""
    if by not in ("memory", "time"):
        raise ValueError(f"balance_by: expected 'memory', 'time' or 'parameters', got {by!r}")
    buffers = [
        (b, b.clone()) for unit in chain for name, b in unit.named_tensors() if not isinstance(b, torch.nn.Parameter)
    ]
    costs: list[float] = []
    state: State = example
    for unit in chain:
        if by == "memory":
            costs.append(float(saved_bytes(lambda: unit(state), exclude=unit.parameters())))  # noqa: B023
        else:
            costs.append(_seconds(unit, state))
        with torch.no_grad():
            state = detach_state(unit(state))
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return costs


def _seconds(unit: Any, state: State) -> float:
    taken = []
    device = main_tensor(state).device
    parameters = list(unit.parameters())
    for _ in range(_TIMED_PASSES + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.autograd.grad(main_tensor(unit(state)).float().sum(), parameters, allow_unused=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[_TIMED_PASSES // 2]


def balance(costs: Sequence[float], count: int) -> list[int]:
    """Where each of `count` groups of consecutive items begins, the largest sum as small as can be."""
    n = len(costs)
    if not 1 <= count <= n:
        raise ValueError(f"expected 1 to {n} groups, got {count}")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    best = [[float("inf")] * (n + 1) for _ in range(count + 1)]
    cut = [[0] * (n + 1) for _ in range(count + 1)]
    best[0][0] = 0.0
    for k in range(1, count + 1):
        for stop in range(k, n - (count - k) + 1):
            for start in range(k - 1, stop):
                largest = max(best[k - 1][start], total[stop] - total[start])
                if largest < best[k][stop]:
                    best[k][stop], cut[k][stop] = largest, start
    starts, stop = [], n
    for k in range(count, 0, -1):
        stop = cut[k][stop]
        starts.append(stop)
    return starts[::-1]
