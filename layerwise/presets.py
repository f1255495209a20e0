"""The methods of the source papers with their settings. Every argument can be changed; what a paper's public code does
otherwise is in its ``code`` variant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerwise.heads import ConvHead, HeadSpec, LinearHead
from layerwise.method import Method, OptimizerSpec
from layerwise.schedules import Epochs, bottom_up

__all__ = ["greedy"]


def greedy(k: int = 1, *, width: int | None = None, epochs: Epochs = 50, code: bool = False, **changes: Any) -> Method:
    """Greedy bottom-up training with heads of k - 1 hidden layers (Belilovsky et al. 2019, CIFAR-10 settings).

    SGD with momentum 0.9, batches of 128; a learning rate of 0.1, a fifth of it every 15 epochs; 50 epochs per unit; weight
    decay 5e-4 (of the public code; the paper gives none for CIFAR-10).

    Parameters
    ----------
    k : int, default=1
        Hidden layers of the problem that each unit's training solves; 1 is a linear head on 2 x 2 averages.
    width : int, optional
        Channels of the head's convolutions; None means the unit's.
    epochs : default=50
        Per unit: a number, one for each, or a function of its number.
    code : bool, default=False
        As the public code: the optimiser, and with it momentum, begins anew at every drop of the rate, and even a linear head
        has batch normalisation before it.
    **changes
        Other fields of :class:`~layerwise.Method`.
    """
    head: HeadSpec = LinearHead(pool=2, batch_norm=code) if k == 1 else ConvHead(k=k, width=width)
    method = Method(
        name=f"greedy{k}" + ("_code" if code else ""),
        schedule=lambda units: bottom_up(units, epochs),
        head=head,
        optimizer=OptimizerSpec(
            "sgd", 0.1, 5e-4, {"momentum": 0.9}, milestones=(15, 30, 45), gamma=0.2, absolute=True, restart=code
        ),
    )
    return replace(method, **changes)
