"""Chains that grow: units are made and trained one by one until a new one no longer helps (thesis, section 6.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.checkpoint import load_checkpoint
from layerwise.feednet import read_batch
from layerwise.method import Method
from layerwise.schedules import Stage
from layerwise.trainer import LayerwiseTrainer
from layerwise.units import Chain, Unit, main_tensor

__all__ = ["grow"]


def grow(
    make_unit: Callable[[int, Tensor], nn.Module],
    method: Method,
    loader: Iterable[Any],
    validation: Iterable[Any],
    *,
    classes: int,
    epochs: int,
    max_units: int,
    device: torch.device | str = "cpu",
    resume: bool = False,
    **options: Any,
) -> LayerwiseTrainer:
    """Add units and train each with its head until `max_units`, or until the last ones have brought no gain.

    Parameters
    ----------
    make_unit : callable
        ``(index, example) -> Module``: the next unit, for inputs like `example`, on its device.
    method : Method
        Heads, losses, optimisers; its schedule is not used. ``method.stopping.chain_patience`` (1 if None) is the number of
        units in a row without a gain of ``min_gain`` in validation accuracy at which growth ends.
    loader, validation : iterable
        As for :meth:`LayerwiseTrainer.fit`.
    classes : int
        Classes of the labels.
    epochs : int
        For each unit.
    max_units : int
        Most units.
    device : device, default="cpu"
        Where to train; `make_unit` makes its modules there.
    resume : bool, default=False
        Go on from the checkpoint in `options`, if there is one.
    **options
        Of :class:`LayerwiseTrainer`.

    Returns
    -------
    LayerwiseTrainer
        Its ``export()`` ends at the best unit.
    """
    if max_units < 1:
        raise ValueError(f"max_units: expected at least 1, got {max_units}")
    patience = method.stopping.chain_patience or 1
    method = replace(
        method, stopping=replace(method.stopping, chain_patience=patience), schedule=[Stage(((0, 0),), epochs)]
    )
    example, _ = read_batch(next(iter(loader)), torch.device(device))
    trainer = LayerwiseTrainer(
        Chain([_unit(make_unit, 0, example)], has_output=False), method, classes=classes, **options
    )
    known = 1
    if resume and trainer.checkpoint is not None and trainer.checkpoint.exists():
        known = len(load_checkpoint(trainer.checkpoint, trainer.device)["units"])
    for index in range(max_units):
        if index > 0:
            state = trainer.feednet.advance(example, 0, index)
            trainer.append(_unit(make_unit, index, main_tensor(state)), epochs)
        if index >= known - 1:
            trainer.fit(loader, validation, resume=resume and index == known - 1)
            if trainer.stopped:
                break
    return trainer


def _unit(make_unit: Callable[[int, Tensor], nn.Module], index: int, example: Tensor) -> Unit:
    module = make_unit(index, example)
    return Unit(f"unit{index}", module, [module])
