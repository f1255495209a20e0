"""A method of training, as data: what is trained when, with which heads, losses, optimisers and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.filtering import Filter
from layerwise.heads import HeadSpec, LinearHead, OwnHead, SizedHeadSpec
from layerwise.pruning import Pruning
from layerwise.regularisers import Regularisation
from layerwise.schedules import Schedule, Stage

__all__ = ["Method", "OptimizerSpec", "Stopping"]

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}

_DECAYS: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda epoch, epochs: (1 + math.cos(math.pi * epoch / epochs)) / 2,
    "linear": lambda epoch, epochs: 1 - epoch / epochs,
}


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimiser and how its learning rate goes; a window gets one of its own.

    Attributes
    ----------
    name : str or callable
        "sgd", "adam", "adamw", or a callable ``(parameters, lr, weight_decay, **options) -> Optimizer``.
    lr, weight_decay : float
        Of the first unit; :class:`Method` scales them for the others.
    options : mapping
        Such as ``{"momentum": 0.9}``.
    milestones : tuple of float
        Fractions of a window's epochs after which the rate is multiplied by `gamma`; with ``absolute``, epochs.
    gamma : float
        That factor.
    absolute : bool
        Whether milestones count epochs.
    restart : bool
        Whether a milestone also makes the optimiser anew, so that momentum is lost (as the public code of Belilovsky et al.
        does).
    decay : {"milestones", "cosine", "linear"} or callable
        The rate's course over a window's epochs: by `milestones`; from 1 towards 0, which the epoch after the last would have,
        as half a cosine or a line; or a function of the epoch, counted from 0, and their number that gives a factor.
    """

    name: str | Callable[..., torch.optim.Optimizer] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    absolute: bool = False
    restart: bool = False
    decay: str | Callable[[int, int], float] = "milestones"

    def __post_init__(self) -> None:
        if not callable(self.decay) and self.decay not in ("milestones", *_DECAYS):
            raise ValueError(f"decay: expected milestones, {', '.join(_DECAYS)} or a function, got {self.decay!r}")
        if self.decay != "milestones" and (self.milestones or self.restart):
            raise ValueError("milestones and restart: only with decay='milestones'")
        if isinstance(self.name, str) and self.name not in _OPTIMIZERS:
            raise ValueError(f"unknown optimiser {self.name!r}; there are {', '.join(_OPTIMIZERS)}, or give a callable")
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"lr and weight_decay: expected numbers above 0 and of at least 0, got {self.lr}, {self.weight_decay}"
            )

    def build(self, parameters: Iterable[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        make = _OPTIMIZERS[self.name] if isinstance(self.name, str) else self.name
        return make(parameters, lr=lr, weight_decay=weight_decay, **self.options)

    def drops(self, epoch: int, epochs: int) -> int:
        """Milestones that lie behind when a window's `epoch`-th epoch of `epochs` begins."""
        return sum(epoch >= (m if self.absolute else m * epochs) for m in self.milestones)

    def factor(self, epoch: int, epochs: int) -> float:
        """Of the learning rate, in a window's `epoch`-th epoch of `epochs`."""
        if self.decay == "milestones":
            return self.gamma ** self.drops(epoch, epochs)
        decay = self.decay if callable(self.decay) else _DECAYS[self.decay]
        return decay(epoch, epochs)


@dataclass(frozen=True)
class Stopping:
    """When a window, or the whole chain, has trained enough. All of it goes by the accuracy on validation data.

    Attributes
    ----------
    patience : int or None
        Epochs without a new best accuracy after which a window's stage ends.
    restore_best : bool
        Whether a window, once trained, goes back to its weights at its best accuracy.
    chain_patience : int or None
        Windows in a row that bring no gain after which no further ones are trained; the chain then ends at the best.
    min_gain : float
        Accuracy, from 0 to 1, that counts as a gain over the best window so far.
    """

    patience: int | None = None
    restore_best: bool = False
    chain_patience: int | None = None
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        for name in ("patience", "chain_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    @property
    def needs_validation(self) -> bool:
        return self.patience is not None or self.restore_best or self.chain_patience is not None

    def ends_chain(self, accuracies: Iterable[float]) -> bool:
        """Whether the last windows, of these best accuracies in the order of training, have brought no gain."""
        best, since = -1.0, 0
        for accuracy in accuracies:
            if accuracy > best + self.min_gain:
                best, since = accuracy, 0
            else:
                since += 1
        return self.chain_patience is not None and since >= self.chain_patience


@dataclass(frozen=True)
class Method:
    """Everything about layer-wise training but model and data. The presets make these.

    Attributes
    ----------
    name : str
        For tables.
    schedule : list of Stage or callable
        What is trained when, or a function of the number of units that says so.
    head : HeadSpec or callable
        The head of every window but one that ends with the model's output; or a function of the unit's number.
    last_head : HeadSpec
        The head where the model's own output is the end of a window.
    loss : str or callable
        See :func:`~layerwise.make_local_loss`.
    loss_options : mapping
        Of a named loss.
    optimizer : OptimizerSpec
        With the first unit's learning rate and weight decay.
    lr_factor, weight_decay_factor : float
        Unit i has lr * lr_factor**i and weight_decay * weight_decay_factor**i (0.8 and 1.15 in table 6.3).
    regularisation : Regularisation
        Noise between units.
    filtering : Filter, callable or None
        Which samples reach a window; or a function of its first unit's number that says so.
    pruning : Pruning or None
        Filters that are removed from a unit once it is trained.
    stopping : Stopping
        When to stop.
    platonic_init : bool
        Whether a unit of fully connected layers begins with weights in closed form (:mod:`platonic`).
    keep_heads : bool
        Whether heads are kept once another window begins. If not, only the last one's is there in the end, and the best one's
        if chains end early. (A filter by the losses of the head below keeps that one as long as it needs it.)
    """

    name: str
    schedule: Schedule | Callable[[int], Schedule]
    head: HeadSpec | Callable[[int], HeadSpec] = field(default_factory=LinearHead)
    last_head: HeadSpec = field(default_factory=OwnHead)
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy"
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    lr_factor: float = 1.0
    weight_decay_factor: float = 1.0
    regularisation: Regularisation = field(default_factory=Regularisation)
    filtering: Filter | Callable[[int], Filter | None] | None = None
    pruning: Pruning | None = None
    stopping: Stopping = field(default_factory=Stopping)
    platonic_init: bool = False
    keep_heads: bool = True

    def __post_init__(self) -> None:
        for name in ("head", "last_head"):
            value = getattr(self, name)
            fits = isinstance(value, (HeadSpec, SizedHeadSpec)) or (name == "head" and callable(value))
            if isinstance(value, (type, nn.Module)) or not fits:
                raise TypeError(f"{name}: expected a specification such as LinearHead(), got {value!r}")
        kinds = {"optimizer": OptimizerSpec, "regularisation": Regularisation, "stopping": Stopping}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name}: expected {kind.__name__}(...), got {getattr(self, name)!r}")

    def stages(self, units: int) -> list[Stage]:
        """The schedule of a chain of so many units."""
        return list(self.schedule(units) if callable(self.schedule) else self.schedule)

    def head_of(self, unit: int, is_output: bool) -> HeadSpec:
        if is_output:
            return self.last_head
        if isinstance(self.head, HeadSpec):
            return self.head
        return self.head(unit)

    def filter_of(self, unit: int) -> Filter | None:
        """The filter of a window that begins at `unit`."""
        return self.filtering(unit) if callable(self.filtering) else self.filtering

    def rates(self, unit: int) -> tuple[float, float]:
        """Learning rate and weight decay of a window that begins at `unit`."""
        return self.optimizer.lr * self.lr_factor**unit, self.optimizer.weight_decay * self.weight_decay_factor**unit
