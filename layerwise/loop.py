"""Step 6 of *train*: batches through a stage's windows: forward, local loss, backward, step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.feednet import Batch, Feednet, read_batch
from layerwise.heads import scores_of
from layerwise.processes import agree
from layerwise.schedules import Window
from layerwise.subnet import Training
from layerwise.units import State, detach_state

__all__ = ["Counts", "Loop", "NonFiniteLossError", "accuracy", "checked_accuracy"]

_LOOK_EVERY = 16  # steps between two looks at the loss


class NonFiniteLossError(RuntimeError):
    """A loss that is infinite or not a number."""


class Counts:
    """Losses and right answers over an epoch. They are added up on the device, some steps at a time: every operation on a few
    numbers costs as much as a small layer."""

    def __init__(self, device: torch.device) -> None:
        self.samples = 0
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.float64, device=device)
        self._of_classes = True
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def add(self, scores: Tensor, target: Tensor, loss: Tensor | None = None) -> None:
        self._waiting.append((scores.detach(), target, None if loss is None else loss.detach()))
        self.samples += target.shape[0]

    @torch.no_grad()
    def settle(self) -> None:
        """Add up what is waiting."""
        if not self._waiting:
            return
        scores, targets, losses = zip(*self._waiting, strict=True)
        if self._of_classes:
            right = _right(torch.cat(scores), torch.cat(targets))
            self._of_classes = right is not None
            if right is not None:
                self._correct += right
        if losses[0] is not None:
            means = torch.stack([loss for loss in losses if loss is not None]).double()
            sizes = [len(t) for t in targets]
            if min(sizes) == max(sizes):
                self._loss += means.sum() * sizes[0]
            else:
                self._loss += means @ means.new_tensor(sizes)
        self._waiting.clear()

    def is_finite(self) -> bool:
        self.settle()
        return bool(torch.isfinite(self._loss))

    def accuracy(self, everywhere: bool = False) -> float | None:
        """Share of right answers, of all processes if `everywhere`; None if labels are no classes."""
        self.settle()
        if not self._of_classes:
            return None
        if not everywhere:
            return self._correct.item() / self.samples
        both = torch.stack([self._correct, self._correct.new_tensor(self.samples)])
        torch.distributed.all_reduce(both)
        return (both[0] / both[1]).item()

    def mean_loss(self) -> float:
        self.settle()
        return self._loss.item() / self.samples


def _right(scores: Tensor, target: Tensor) -> Tensor | None:
    """Right answers among class numbers (N,), or probabilities (N, classes) whose largest counts; of class numbers with further
    axes, such as pixels, the sum of each sample's share. None if these are neither."""
    if not target.is_floating_point() and target.shape == scores.shape[:1] + scores.shape[2:]:
        right = (scores.argmax(1) == target).double()
        return right.sum() if right.dim() == 1 else right.flatten(1).mean(1).sum()
    dense = target.is_floating_point() and target.shape == scores.shape and target.dim() == 2 and target.shape[1] > 1
    if dense and bool(((target >= 0).all(1) & ((target.sum(1) - 1).abs() <= 1e-3)).all()):
        return (scores.argmax(1) == target.argmax(1)).double().sum()
    return None


@torch.no_grad()
def accuracy(network: Callable[[Any], Any], loader: Iterable[Any], device: torch.device | str = "cpu") -> float:
    """Share of the loader's samples whose largest score by `network`, a module in eval mode meanwhile, is their class's.
    Several inputs in a tuple are its arguments."""
    modes = [(m, m.training) for m in network.modules()] if isinstance(network, nn.Module) else []
    count = Counts(torch.device(device))
    try:
        for module, _ in modes:
            module.training = False
        for batch in loader:
            inputs, target = read_batch(batch, torch.device(device))
            output = network(*inputs) if isinstance(inputs, tuple) else network(inputs)
            count.add(scores_of(output), target)
    finally:
        for module, mode in modes:
            module.training = mode
    return checked_accuracy(count)


def checked_accuracy(count: Counts, everywhere: bool = False) -> float:
    """The accuracy, or an error that says why there is none."""
    if count.samples == 0:
        raise ValueError("loader: expected at least one batch, got none")
    found = count.accuracy(everywhere)
    if found is None:
        raise ValueError("accuracy: expected class numbers (N,) or probabilities (N, classes) as labels")
    return found


class Loop:
    """What is the same for every stage: the feednet, the loss, precision, accumulation, clipping, and averaging.

    Parameters
    ----------
    feednet : Feednet
        Runs what is frozen.
    loss : callable
        Local loss.
    accumulate : int
        Batches per step.
    clip_norm : float or None
        Largest norm of a window's gradients.
    """

    def __init__(
        self,
        feednet: Feednet,
        loss: Callable[[Any, Tensor], Tensor],
        accumulate: int = 1,
        clip_norm: float | None = None,
    ) -> None:
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate: expected a whole number of at least 1, got {accumulate}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm: expected a number above 0, got {clip_norm}")
        self.feednet = feednet
        self.loss = loss
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.averagers: dict[Window, Any] = {}

    @property
    def device(self) -> torch.device:
        return self.feednet.device

    def autocast(self) -> AbstractContextManager[Any]:
        amp = self.feednet.amp
        return nullcontext() if amp is None else torch.autocast(self.device.type, amp)

    def losses(
        self, trainings: list[Training], state: State, target: Tensor, *, at: int = 0, synchronise: bool = True
    ) -> Iterator[tuple[Training, Tensor, Tensor]]:
        """One batch, which stands at unit `at`, through the windows from the bottom up: each window's training, loss and
        scores. What a window gives is detached before the next one gets it."""
        for training in trainings:
            first, last = training.subnet.window
            if first > at:
                state = self.feednet.advance(state, at, first)
            with self._around(training, synchronise):
                try:
                    output, state = training.module(state)
                except ValueError as error:
                    if len(target) == 1 and "more than 1 value per channel" in str(error):
                        raise ValueError(
                            f"units {first} to {last}: batch normalisation cannot train on a batch of one sample; give the "
                            "loader drop_last=True, or another batch size"
                        ) from None
                    raise
                loss = self.loss(output, target)
            scores = scores_of(output)
            state = None if training is trainings[-1] else detach_state(state)
            del output  # from here to the next window, only what the backward pass needs is in memory
            yield training, loss, scores
            at = last + 1

    def _around(self, training: Training, synchronise: bool) -> AbstractContextManager[Any]:
        """Of a forward pass: autocast, and whether gradients will be averaged."""
        if self.feednet.amp is None and (synchronise or training.parallel is None):
            return nullcontext()  # one, and not two, because every microsecond is a part of a small layer's time
        both = ExitStack()
        both.enter_context(self._whether_to_synchronise(training, synchronise))
        both.enter_context(self.autocast())
        return both

    @staticmethod
    def _whether_to_synchronise(training: Training, yes: bool) -> Any:
        return nullcontext() if yes or training.parallel is None else training.parallel.no_sync()  # type: ignore[operator]

    def train(self, stream: Iterable[Batch], trainings: list[Training]) -> list[Counts]:
        """One epoch.

        Raises
        ------
        NonFiniteLossError
            At a loss that is not finite, or some steps later.
        """
        counts = [Counts(self.device) for _ in trainings]
        observers = [getattr(training.subnet.head, "observe", None) for training in trainings]
        at = trainings[0].subnet.window[0]
        step = -1
        for state, target in stream:
            step += 1
            update = (step + 1) % self.accumulate == 0
            losses = self.losses(trainings, state, target, at=at, synchronise=update)
            del state  # before the next one comes
            for count, observe, (training, loss, scores) in zip(counts, observers, losses, strict=True):
                with self._whether_to_synchronise(training, update):
                    part = loss / self.accumulate if self.accumulate > 1 else loss
                    training.scaler.scale(part).backward()
                if update:
                    self.update(training)
                if observe is not None:
                    observe(target)
                count.add(scores, target, loss)
            if (step + 1) % _LOOK_EVERY == 0:
                self._look(trainings, counts, step)
        if step < 0:
            raise ValueError("loader: the epoch had no samples; what can be read only once has to be made anew")
        self._look(trainings, counts, step)
        for training in trainings:  # a last step of fewer batches
            if (step + 1) % self.accumulate:
                if training.parallel is not None:  # which was waiting for more of them
                    agree(p.grad for p in training.subnet.parameters() if p.grad is not None)
                self.update(training)
        return counts

    def update(self, training: Training) -> None:
        """Unscale, clip, step."""
        optimizer = training.optimizer
        assert optimizer is not None
        if self.clip_norm is not None:
            training.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(training.optimizer_parameters(), self.clip_norm)
        training.scaler.step(optimizer)
        training.scaler.update()
        if type(optimizer).zero_grad is torch.optim.Optimizer.zero_grad:
            for group in optimizer.param_groups:  # what zero_grad does, in a tenth of its time
                for p in group["params"]:
                    p.grad = None
        else:
            optimizer.zero_grad(set_to_none=True)
        averager = self.averagers.get(training.subnet.window)
        if averager is not None:
            averager.average_parameters(training.subnet.parameters())

    def _look(self, trainings: list[Training], counts: list[Counts], step: int) -> None:
        for training, count in zip(trainings, counts, strict=True):
            if not count.is_finite():
                first, last = training.subnet.window
                raise NonFiniteLossError(
                    f"units {first} to {last}: the loss is not finite at or before step {step} of epoch {training.epoch}; "
                    "a smaller lr or clip_norm may help"
                )

    @torch.no_grad()
    def validate(
        self, trainings: list[Training], loader: Iterable[Any], everywhere: bool = False
    ) -> list[float | None]:
        """Accuracies of the windows' heads in eval mode; training mode is put back."""
        counts = [Counts(self.device) for _ in trainings]
        for training in trainings:
            training.subnet.eval()
        for batch in loader:
            state, target = read_batch(batch, self.device)
            at = 0
            for training, count in zip(trainings, counts, strict=True):
                first, last = training.subnet.window
                state = self.feednet.advance(state, at, first)
                with self.autocast():
                    output, state = training.subnet(state)
                count.add(scores_of(output), target)
                at = last + 1
        for training in trainings:
            training.subnet.train()
        if counts[0].samples == 0:
            raise ValueError("validation: expected at least one batch, got none")
        return [count.accuracy(everywhere) for count in counts]
