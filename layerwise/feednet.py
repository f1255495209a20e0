"""Step 3 of *train*: what a window gets to see: batches run through the units below it, without a graph and in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from layerwise.units import Chain, State

__all__ = ["Batch", "Feednet", "counted", "generators_of", "read_batch", "to_device"]

Batch = tuple[State, Tensor]


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a batch on `device`; from pinned memory without waiting."""
    return tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, value)


def read_batch(batch: Any, device: torch.device) -> Batch:
    """Input and labels of what a loader yields.

    Raises
    ------
    TypeError
        If it is no pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(f"loader: expected pairs (input, labels), got {type(batch).__name__}{size}")
    inputs, target = to_device(batch, device)
    if not isinstance(target, Tensor):
        raise TypeError(f"loader: expected labels in a tensor, got {type(target).__name__}")
    return (tuple(inputs) if isinstance(inputs, list) else inputs), target


class Feednet:
    """The units below a boundary as a source of data.

    Parameters
    ----------
    chain : Chain
        Whose units feed.
    device : device
        Where batches go.
    amp : dtype or None
        Of autocast.
    """

    def __init__(self, chain: Chain, device: torch.device, amp: torch.dtype | None = None) -> None:
        self.chain = chain
        self.device = device
        self.amp = amp

    def advance(self, state: State, first: int, stop: int) -> State:
        """The state after units first to stop - 1, which are frozen."""
        if first == stop:
            return state
        units = self.chain.units[first:stop]
        for unit in units:
            unit.guard()
        autocast = nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)
        with torch.no_grad(), autocast:
            for unit in units:
                state = unit(state)
        return state

    def stream(self, loader: Iterable[Any], boundary: int) -> Iterator[Batch]:
        """Every batch of the loader as it enters unit `boundary`."""
        for batch in loader:
            state, target = read_batch(batch, self.device)
            yield self.advance(state, 0, boundary), target


def counted(stream: Iterator[Batch], seen: list[int], slot: int) -> Iterator[Batch]:
    """The same batches; their samples are added to seen[slot]."""
    for batch in stream:
        seen[slot] += batch[1].shape[0]
        yield batch


def generators_of(loader: Any) -> list[torch.Generator | None]:
    """Generators of its own that decide a loader's order."""
    found = [getattr(loader, "generator", None), getattr(getattr(loader, "sampler", None), "generator", None)]
    return [g if isinstance(g, torch.Generator) else None for g in found]
