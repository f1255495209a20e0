"""Step 3 of *train*: what a window gets to see: batches run through the units below it, without a graph and in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from layerwise.units import Chain, State, Unit, join_constants, main_tensor, resize_constants, split_constants

__all__ = ["Batch", "Feednet", "counted", "generators_of", "read_batch", "to_device"]

Batch = tuple[State, Tensor]


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a batch on `device`; from pinned memory without waiting."""
    if isinstance(value, Tensor):  # the usual case, and trees take as long as a small layer
        return value.to(device, non_blocking=True)
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
    if not isinstance(batch[0], (Tensor, tuple, list)):
        raise TypeError(
            "loader: expected inputs in a tensor, or a tuple of them in the order of the forward's arguments, got "
            f"{type(batch[0]).__name__}"
        )
    inputs, target = (to_device(part, device) for part in batch)
    if not isinstance(target, Tensor):
        raise TypeError(f"loader: expected labels in a tensor, got {type(target).__name__}")
    if target.dim() == 0 or len(target) == 0:
        raise ValueError(
            f"loader: expected a label for each of at least one sample, got a tensor {tuple(target.shape)}"
        )
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
    samples : int or None
        How many samples of a batch go through the units at a time; None means all.
    """

    def __init__(
        self, chain: Chain, device: torch.device, amp: torch.dtype | None = None, samples: int | None = None
    ) -> None:
        if amp not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"amp: expected None, torch.float16 or torch.bfloat16, got {amp}")
        if samples is not None and samples < 1:
            raise ValueError(f"feed_batch: expected at least 1, got {samples}")
        self.chain = chain
        self.device = device
        self.amp = amp
        self.samples = samples

    def advance(self, state: State, first: int, stop: int) -> State:
        """The state after units first to stop - 1, which are frozen."""
        if first == stop:
            return state
        units = self.chain.units[first:stop]
        for unit in units:
            unit.guard()
        autocast = nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)
        with torch.no_grad(), autocast:
            size = main_tensor(state).shape[0]
            if self.samples is None or size <= self.samples:
                return _through(units, state)
            constants, features = split_constants(state, units[0].constants)
            leaving = self.chain[stop].constants if stop < len(self.chain) else 0
            whole: State = None
            kept: tuple[Any, ...] | None = None
            for start in range(0, size, self.samples):
                rows = slice(start, min(start + self.samples, size))
                count = rows.stop - rows.start
                part = tree_map(lambda x: x[rows] if _has_rows(x, size) else x, features)  # noqa: B023
                part = _through(units, join_constants(resize_constants(constants, size, count), part))
                these, part = split_constants(part, leaving)
                kept = resize_constants(these, count, size) if kept is None else kept
                whole = _put(whole, part, rows, size)
            return join_constants(kept or (), whole)

    def stream(self, loader: Iterable[Any], boundary: int) -> Iterator[Batch]:
        """Every batch of the loader as it enters unit `boundary`."""

        def feed(batch: Any) -> Batch:
            state, target = read_batch(batch, self.device)
            return self.advance(state, 0, boundary), target

        return map(feed, loader)  # which keeps no batch, as a loop would


def counted(stream: Iterator[Batch], seen: list[int], slot: int) -> Iterator[Batch]:
    """The same batches; their samples are added to seen[slot]."""

    def count(batch: Batch) -> Batch:
        seen[slot] += batch[1].shape[0]
        return batch

    return map(count, stream)  # which keeps no batch, as a loop would


def generators_of(loader: Any) -> list[torch.Generator | None]:
    """Generators of its own that decide a loader's order."""
    found = [getattr(loader, "generator", None), getattr(getattr(loader, "sampler", None), "generator", None)]
    return [g if isinstance(g, torch.Generator) else None for g in found]


def _through(units: Sequence[Unit], state: State) -> State:
    for unit in units:
        state = unit(state)
    return state


def _has_rows(x: Any, size: int) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == size


def _put(whole: State, part: State, rows: slice, size: int) -> State:
    """Some rows of a state, into one that is made for the first of them."""
    count = rows.stop - rows.start

    def make(x: Any) -> Any:
        if _has_rows(x, count):
            dense = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if dense else torch.contiguous_format
            return torch.empty((size, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout)
        if isinstance(x, Tensor) or (isinstance(x, int) and x == count):
            raise ValueError(
                "feed_batch: what passes from unit to unit depends on the size of the batch otherwise than by a row for each "
                "sample; leave feed_batch out, or cut the model elsewhere"
            )
        return x

    whole = tree_map(make, part) if whole is None else whole
    for target, source in zip(tree_leaves(whole), tree_leaves(part), strict=True):
        if isinstance(target, Tensor):
            target[rows] = source
    return whole
