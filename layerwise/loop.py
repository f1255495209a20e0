"""Step 6 of *train*: batches through a stage's windows: forward, local loss, backward, step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.feednet import Batch, Feednet, read_batch
from layerwise.heads import scores_of
from layerwise.schedules import Window
from layerwise.subnet import Training
from layerwise.units import State, detach_state

__all__ = ["Counts", "Loop", "NonFiniteLossError"]

_LOOK_EVERY = 50  # steps between two looks at the loss on a device that works ahead


class NonFiniteLossError(RuntimeError):
    """A loss that is infinite or not a number."""


class Counts:
    """Sums over an epoch, on the device, so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.samples = 0

    def add(self, scores: Tensor, target: Tensor, loss: Tensor | None = None) -> None:
        if loss is not None:
            self.loss += loss.detach().double() * target.shape[0]
        self.correct += (scores.detach().argmax(1) == target).sum()
        self.samples += target.shape[0]

    def accuracy(self, everywhere: bool = False) -> float:
        """Share of right answers, of all processes if `everywhere`."""
        if not everywhere:
            return self.correct.item() / self.samples
        both = torch.stack([self.correct, torch.tensor(self.samples, device=self.correct.device)])
        torch.distributed.all_reduce(both)
        return (both[0] / both[1]).item()

    def mean_loss(self) -> float:
        return self.loss.item() / self.samples


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
        self.feednet = feednet
        self.loss = loss
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.averagers: dict[Window, Any] = {}

    @property
    def device(self) -> torch.device:
        return self.feednet.device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.feednet.amp, enabled=self.feednet.amp is not None)

    def losses(
        self, trainings: list[Training], state: State, target: Tensor, *, at: int = 0, synchronise: bool = True
    ) -> Iterator[tuple[Training, Tensor, Tensor]]:
        """One batch, which stands at unit `at`, through the windows from the bottom up: each window's training, loss and
        scores. What a window gives is detached before the next one gets it."""
        for training in trainings:
            first, last = training.subnet.window
            state = self.feednet.advance(state, at, first)
            with self._whether_to_synchronise(training, synchronise), self.autocast():
                output, state = training.module(state)
                loss = self.loss(output, target)
            scores = scores_of(output)
            state = None if training is trainings[-1] else detach_state(state)
            del output  # from here to the next window, only what the backward pass needs is in memory
            yield training, loss, scores
            at = last + 1

    @staticmethod
    def _whether_to_synchronise(training: Training, yes: bool) -> Any:
        return nullcontext() if yes or training.parallel is None else training.parallel.no_sync()  # type: ignore[operator]

    def train(self, stream: Iterable[Batch], trainings: list[Training]) -> list[Counts]:
        """One epoch.

        Raises
        ------
        NonFiniteLossError
            At the first loss that is not finite; on a device that works ahead, some steps later.
        """
        counts = [Counts(self.device) for _ in trainings]
        at = trainings[0].subnet.window[0]
        step = -1
        for state, target in stream:
            step += 1
            update = (step + 1) % self.accumulate == 0
            losses = self.losses(trainings, state, target, at=at, synchronise=update)
            del state  # before the next one comes
            for count, (training, loss, scores) in zip(counts, losses, strict=True):
                with self._whether_to_synchronise(training, update):
                    training.scaler.scale(loss / self.accumulate).backward()
                if update:
                    self.update(training)
                observe = getattr(training.subnet.head, "observe", None)
                if observe is not None:
                    observe(target)
                count.add(scores, target, loss)
            if self.device.type == "cpu" or step % _LOOK_EVERY == 0:
                self._look(trainings, counts, step)
        if step < 0:
            raise ValueError("loader: the epoch had no samples; what can be read only once has to be made anew")
        self._look(trainings, counts, step)
        for training in trainings:  # a last step of fewer batches
            if (step + 1) % self.accumulate:
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
        optimizer.zero_grad(set_to_none=True)
        averager = self.averagers.get(training.subnet.window)
        if averager is not None:
            averager.average_parameters(training.subnet.parameters())

    def _look(self, trainings: list[Training], counts: list[Counts], step: int) -> None:
        for training, count in zip(trainings, counts, strict=True):
            if not torch.isfinite(count.loss):
                first, last = training.subnet.window
                raise NonFiniteLossError(
                    f"units {first} to {last}: the loss is not finite at or before step {step} of epoch {training.epoch}; "
                    "a smaller lr or clip_norm may help"
                )

    @torch.no_grad()
    def validate(self, trainings: list[Training], loader: Iterable[Any], everywhere: bool = False) -> list[float]:
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
