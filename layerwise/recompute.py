"""Activation checkpointing for chains: units in groups, of which only what enters is kept until the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from layerwise.units import Chain, State, Unit

__all__ = ["checkpointed"]


def checkpointed(chain: Chain, starts: Sequence[int]) -> Chain:
    """The same computation with less memory and one more forward pass (:func:`torch.utils.checkpoint.checkpoint`).

    Training gives the same weights bit by bit: random numbers are drawn again as they were, and running statistics are left
    alone the second time (torch alone would update them twice).

    Parameters
    ----------
    chain : Chain
        The units.
    starts : sequence of int
        The first unit of each group; 0 is the first. The last group is not recomputed, since its backward pass comes at once.

    Returns
    -------
    Chain
        A unit per group, with the same parameters.

    Raises
    ------
    ValueError
        If `starts` does not begin with 0 and ascend within the chain.
    """
    ends = [*starts[1:], len(chain)]
    if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, ends, strict=True)):
        raise ValueError(f"starts: expected ascending numbers from 0 to below {len(chain)}, got {list(starts)}")
    groups = [chain.units[a:b] for a, b in zip(starts, ends, strict=True)]
    units = [_joined(group, again=i < len(groups) - 1) for i, group in enumerate(groups)]
    return Chain(units, chain.model, has_output=chain.has_output)


def _joined(units: Sequence[Unit], again: bool) -> Unit:
    def call(state: State) -> State:
        several = isinstance(state, tuple)

        def run(*states: State) -> State:
            inner = states if several else states[0]
            for unit in units:
                inner = unit(inner)
            return inner

        states = state if several else (state,)
        if not again or not torch.is_grad_enabled():
            return run(*states)
        return checkpoint(
            run, *states, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _statistics_at_rest(units))
        )

    return Unit(units[0].name, call, units)


@contextlib.contextmanager
def _statistics_at_rest(units: Sequence[nn.Module]) -> Iterator[None]:
    """Running statistics that a pass in training mode does not change."""
    norms = [m for unit in units for m in unit.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    before = [(m, m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            if batches is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(batches)
