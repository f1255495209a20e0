"""Proof that losses are local."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layerwise.checkpoint import rng_state, set_rng_state
from layerwise.feednet import read_batch
from layerwise.trainer import LayerwiseTrainer

__all__ = ["IsolationError", "assert_isolated"]


class IsolationError(AssertionError):
    """A gradient beyond the window whose loss it is of."""


def assert_isolated(trainer: LayerwiseTrainer, batch: Any) -> None:
    """Check, with one batch, that the loss of every window of every stage reaches its own units and head and nothing else.

    All parameters are made to want gradients, so that a missing detachment shows even where training would have frozen what
    lies below. Weights, gradients, running statistics, modes and random generators are afterwards what they were.

    Parameters
    ----------
    trainer : LayerwiseTrainer
        Whose stages are run, one step each, without the steps of optimisers.
    batch : tuple
        Input and labels.

    Raises
    ------
    IsolationError
        With the window and the name of the first parameter that a foreign loss reached, or of one of its own that it did not.
    """
    state, target = read_batch(batch, trainer.device)
    rng = rng_state()
    chain = trainer.chain
    saved = [(p, p.requires_grad, p.grad) for p in chain.parameters()]
    states = [(unit, unit.frozen, unit._trainable) for unit in chain]
    modes = [(unit, m, m.training) for unit in chain for m in unit.modules()]
    buffers = [(t, t.clone()) for unit in chain for _, t in unit.named_tensors() if not isinstance(t, nn.Parameter)]
    trainings = dict(trainer.trainings)
    try:
        for windows in dict.fromkeys(stage.windows for stage in trainer.stages):
            _check_windows(trainer, windows, state, target)
    finally:
        trainer.trainings.clear()
        trainer.trainings.update(trainings)
        for unit, frozen, trainable in states:
            unit.frozen, unit._trainable = frozen, trainable
        for p, requires_grad, grad in saved:
            p.requires_grad_(requires_grad)
            p.grad = grad
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for _, module, mode in modes:
            module.training = mode
        set_rng_state(rng)


def _check_windows(trainer: LayerwiseTrainer, windows: Any, state: Any, target: torch.Tensor) -> None:
    chain = trainer.chain
    trainings = [trainer.windows.make(window, state, 1) for window in windows]
    everything = {name: p for unit in chain for name, p in unit.named_tensors() if isinstance(p, nn.Parameter)}
    for t in trainings:
        t.wake()
        everything |= {f"head of {t.subnet.window}: {name}": p for name, p in t.subnet.head.named_parameters()}
    for p in everything.values():
        p.requires_grad_(True)
        p.grad = None
    if any(hasattr(t.subnet.head, "observe") for t in trainings):  # a closed-form head is 0 before its first solution
        for training, _, _ in trainer.loop.losses(trainings, state, target):
            if hasattr(training.subnet.head, "observe"):
                training.subnet.head.observe(target)  # type: ignore[operator]
    for training, loss, _ in trainer.loop.losses(trainings, state, target):
        loss.backward(retain_graph=True)
        own = {id(p) for p in training.subnet.parameters()}
        for name, p in everything.items():
            if p.grad is not None and id(p) not in own:
                raise IsolationError(
                    f"the loss of units {training.subnet.window} reaches {name!r}, which is not theirs"
                )
            if p.grad is None and id(p) in own:
                raise IsolationError(f"the loss of units {training.subnet.window} does not reach their own {name!r}")
        for p in everything.values():
            p.grad = None
