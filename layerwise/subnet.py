"""Step 3 of *train*: a window's units with their head, and everything that its training remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.heads import HeadSpec, SizedHeadSpec, build_head
from layerwise.layouts import Watched, as_seen, channel_axis, show_channels, watch
from layerwise.method import Method
from layerwise.regularisers import Regularisation
from layerwise.schedules import Window
from layerwise.units import Chain, State, Unit, detach_state, main_tensor, modes_kept, replace_main

__all__ = ["Place", "Subnet", "Training", "make_training"]


_QUIET = Regularisation()


class Subnet(nn.Module):
    """Units and the head on the last of them. Its forward returns the head's output and the state that goes on, detached."""

    def __init__(self, chain: Chain, window: Window, head: nn.Module, noise: Regularisation) -> None:
        super().__init__()
        self.window = window
        self.units = nn.ModuleList(chain.units[window[0] : window[1] + 1])
        self.head = head
        self.noise = noise
        self.entering: int | None = None  # where its input has channels, if the noise asks
        self.epoch = 0  # of the window, for what decays

    def forward(self, state: State) -> tuple[Any, State]:
        noise = self.noise if self.training else _QUIET
        if noise.input_dropout > 0 and self.window[0] > 0:
            state = replace_main(state, noise.on_input(main_tensor(state), self.epoch, self.entering))
        for unit in self.units:
            state = unit(state)
        out, head = main_tensor(state), self.head
        if noise.on_gradients and not isinstance(head, nn.Identity):
            out = noise.on_output(out)
        return head(out), detach_state(state)


class _NoHead(nn.Module):
    """In place of a head that was not kept."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this head was not kept (keep_heads=False)")


@dataclass
class Training:
    """A window in training.

    Attributes
    ----------
    subnet : Subnet
        What is trained.
    optimizer : Optimizer
        Its own.
    scaler : GradScaler
        Its own; does nothing unless training is in float16.
    lr, weight_decay : float
        At first.
    epochs : int
        In the whole schedule.
    epoch : int
        Done.
    drops : int
        Milestones passed.
    best : float
        Highest accuracy on validation data, -1 before the first.
    best_state : dict or None
        The weights then, if they are to be restored.
    stale : int
        Epochs since then.
    sizes : dict or None
        Those that the head was given, if its specification is sized for its place.
    """

    subnet: Subnet
    optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler
    lr: float
    weight_decay: float
    epochs: int
    epoch: int = 0
    drops: int = 0
    best: float = -1.0
    best_state: dict[str, Tensor] | None = None
    stale: int = 0
    sizes: dict[str, int] | None = None
    parallel: nn.Module | None = field(default=None, repr=False)

    @property
    def module(self) -> nn.Module:
        """What is called: the subnet, or what distributes it."""
        return self.parallel or self.subnet

    @property
    def current_lr(self) -> float:
        assert self.optimizer is not None
        return float(self.optimizer.param_groups[0]["lr"])

    def wake(self) -> None:
        """Units and head in training mode and wanting gradients."""
        for unit in self.subnet.units:
            unit.unfreeze()  # type: ignore[operator]
        self.subnet.train()

    def sleep(self) -> None:
        """Units frozen, everything in eval mode, no gradients kept."""
        for unit in self.subnet.units:
            unit.freeze()  # type: ignore[operator]
        self.subnet.eval()
        for p in self.subnet.head.parameters():
            p.grad = None

    def renew(self, method: Method) -> None:
        """Take note of parameters that have been replaced: a new optimiser, and no best weights yet."""
        asleep = any(unit.frozen for unit in self.subnet.units)
        self.wake()
        self.optimizer = method.optimizer.build(self.optimizer_parameters(), self.lr, self.weight_decay)
        self.best, self.best_state, self.stale = -1.0, None, 0
        self.parallel = None
        if asleep:
            self.sleep()

    def end(self) -> None:
        """Forget what only further training would need."""
        self.optimizer = None
        self.parallel = None

    @property
    def has_head(self) -> bool:
        return not isinstance(self.subnet.head, _NoHead)

    def drop_head(self) -> None:
        """Forget the head, for good."""
        self.subnet.head = _NoHead().eval()

    def begin_epoch(self, method: Method) -> None:
        """Set the learning rate and what decays."""
        self.subnet.epoch = self.epoch
        drops = method.optimizer.drops(self.epoch, self.epochs)
        assert self.optimizer is not None
        if drops != self.drops and method.optimizer.restart:
            self.optimizer = method.optimizer.build(self.optimizer_parameters(), self.lr, self.weight_decay)
        self.drops = drops
        factor = method.optimizer.factor(self.epoch, self.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def optimizer_parameters(self) -> list[Tensor]:
        return [p for p in self.subnet.parameters() if p.requires_grad]

    def note(self, accuracy: float, keep: bool) -> None:
        """Remember the accuracy of an epoch, and the weights if it is the best so far and `keep`."""
        if accuracy > self.best:
            self.best, self.stale = accuracy, 0
            if keep:
                self.best_state = {k: v.detach().clone() for k, v in self.subnet.state_dict().items()}
        else:
            self.stale += 1

    def restore_best(self) -> None:
        if self.best_state is not None:
            self.subnet.load_state_dict(self.best_state)
            self.best_state = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "head": self.subnet.head.state_dict() if self.has_head else None,
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "epoch": self.epoch,
            "drops": self.drops,
            "best": self.best,
            "best_state": self.best_state,
            "stale": self.stale,
            "sizes": self.sizes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["head"] is None:
            self.drop_head()
        else:
            self.subnet.head.load_state_dict(state["head"])
        if state["optimizer"] is None:
            self.optimizer = None
        else:
            assert self.optimizer is not None
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:  # this run's rates, which may be others
                group["initial_lr"] = group.get("initial_lr", group["lr"]) * (self.lr / state["lr"])
                if group.get("weight_decay") == state["weight_decay"]:
                    group["weight_decay"] = self.weight_decay
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.drops = state["epoch"], state["drops"]
        self.best, self.best_state, self.stale = state["best"], state["best_state"], state["stale"]


@dataclass(frozen=True)
class Place:
    """Where a head goes: what a specification needs to size it.

    Attributes
    ----------
    chain, window, method, classes, amp, accumulate, clip_norm, feed_batch
        Of the training.
    inputs : Tensor or tuple of Tensor
        A batch as it enters the chain.
    output : Tensor
        What the head is shown of the window's first samples.
    target : Tensor or None
        What the batch's labels look like; None means class numbers.
    trainings : mapping
        Other windows' trainings so far, whose heads and optimisers stay in memory.
    """

    chain: Chain
    window: Window
    method: Method
    classes: int
    inputs: State
    output: Tensor
    trainings: Mapping[Window, Training] = field(default_factory=dict)
    amp: torch.dtype | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    feed_batch: int | None = None
    target: Tensor | None = None


def make_training(
    chain: Chain,
    window: Window,
    state: State,
    method: Method,
    *,
    classes: int,
    epochs: int,
    amp: torch.dtype | None,
    sizes: dict[str, int] | None = None,
    **place: Any,
) -> Training:
    """A new window: its head sized for what the units make of `state`, and its optimiser.

    `place` are further fields of :class:`Place`; `sizes` those of a head that was sized before.

    The units are left in training mode and want gradients; their running statistics are not touched.
    """
    units = chain.units[window[0] : window[1] + 1]
    with torch.no_grad(), torch.autocast(main_tensor(state).device.type, amp, enabled=amp is not None):
        out, axis, entering = _run(chain, window, state)
    if out.shape[:1] != main_tensor(place["inputs"]).shape[:1]:
        raise ValueError(
            f"unit {units[-1].name!r} gives {tuple(out.shape)} for {len(main_tensor(place['inputs']))} samples, which heads want "
            "along the first axis; cut elsewhere, or let transformers have batch_first=True"
        )
    out = out[:2].clone()  # enough to build on, and the rest can go
    if amp is not None:
        out = out.float()
    del state
    is_output = chain.has_output and window[1] == len(chain) - 1
    spec = method.head_of(window[1], is_output)
    own = not any(
        c.__module__.startswith("layerwise.") for c in type(spec).__mro__ if c not in (HeadSpec, SizedHeadSpec)
    )
    dims = out.dim()
    if not own:
        out = as_seen(out, axis, f"unit {units[-1].name!r}")
    if isinstance(spec, SizedHeadSpec):
        spec = spec.size_for(Place(chain, window, method, classes, output=out, amp=amp, **place), sizes)
        sizes = spec.sizes  # type: ignore[attr-defined]
    head = build_head(spec, out, classes)
    if not own:
        show_channels(head, dims, axis)
    if out.dtype in (torch.float64, torch.float16, torch.bfloat16):  # as the model is
        for tensor in (*head.parameters(), *head.buffers()):
            if tensor.dtype == torch.float32:
                tensor.data = tensor.data.to(out.dtype)
    for unit in units:
        unit.unfreeze()
    subnet = Subnet(chain, window, head, method.regularisation)
    subnet.entering = entering
    subnet.train()
    lr, weight_decay = method.rates(window[0])
    training = Training(
        subnet=subnet,
        optimizer=None,
        scaler=torch.amp.GradScaler(out.device.type, enabled=amp == torch.float16),
        lr=lr,
        weight_decay=weight_decay,
        epochs=epochs,
        sizes=sizes,
    )
    parameters = training.optimizer_parameters()
    if not parameters:
        raise ValueError(f"units {window[0]} to {window[1]}: nothing in them or their head wants gradients")
    training.optimizer = method.optimizer.build(parameters, lr, weight_decay)
    return training


def _run(chain: Chain, window: Window, state: State) -> tuple[Tensor, int | None, int | None]:
    """What a window makes of a state, in eval mode, where it has its channels, and where the state has."""
    first, last = window
    for i in range(first, last + 1):
        chain[i].eval()
        with watch(chain[i]) as calls:
            following = chain[i](state)
        if i == first:
            entering = channel_axis(main_tensor(state), (), partial(list, calls))
        state = following
    out = main_tensor(state)
    return out, channel_axis(out, calls, partial(_calls_of, chain.units[last + 1 : last + 2], state)), entering


def _calls_of(units: Sequence[Unit], state: State) -> list[Watched]:
    """Those in the unit after a window, if there is one."""
    calls: list[Watched] = []
    with modes_kept(units):
        for unit in units:
            unit.eval()
            with watch(unit) as calls:
                unit(state)
    return calls
