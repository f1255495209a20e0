"""Step 3 of *train*: windows made and taken up before a stage, and frozen, pruned and forgotten after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.checkpoint import rng_state, set_rng_state
from layerwise.feednet import Batch, generators_of
from layerwise.initialisation import initialise_window
from layerwise.loop import Loop
from layerwise.method import Method
from layerwise.processes import agree
from layerwise.pruning import filter_importance, prune_unit
from layerwise.schedules import Window
from layerwise.subnet import Training, make_training
from layerwise.units import Chain, State

__all__ = ["Windows"]


class Windows:
    """The windows of a chain that are or have been trained.

    Parameters
    ----------
    method : Method
        Heads, optimisers, noise, pruning.
    loop : Loop
        Whose feednet feeds; the chain is the feednet's.
    classes : int
        Classes of the labels.
    distributed : {None, "ddp"} or callable, default=None
        As of :class:`~layerwise.LayerwiseTrainer`.

    Attributes
    ----------
    trainings : dict
        By window.
    pruned : dict
        Units to the channels that pruning has left them.
    example : Tensor or tuple of Tensor, or None
        A batch as it enters the chain, from which sizes are known; None before the first window.
    target : Tensor or None
        What its labels look like, on the device "meta".
    """

    def __init__(
        self,
        method: Method,
        loop: Loop,
        classes: int,
        distributed: str | Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.method = method
        self.loop = loop
        self.classes = classes
        self.distributed = distributed
        self.trainings: dict[Window, Training] = {}
        self.pruned: dict[int, list[int]] = {}
        self.example: State | None = None
        self.target: Tensor | None = None

    @property
    def chain(self) -> Chain:
        return self.loop.feednet.chain

    def make(self, window: Window, state: State, epochs: int, sizes: dict[str, int] | None = None) -> Training:
        """A training of a window whose units get inputs like `state` at the chain's beginning, for `epochs` in all; `sizes` are
        those of a head that was sized before. It is not among :attr:`trainings`."""
        feednet = self.loop.feednet
        return make_training(
            self.chain,
            window,
            feednet.advance(state, 0, window[0]),
            self.method,
            classes=self.classes,
            epochs=epochs,
            amp=feednet.amp,
            sizes=sizes,
            inputs=state,
            trainings=self.trainings,
            accumulate=self.loop.accumulate,
            clip_norm=self.loop.clip_norm,
            feed_batch=feednet.samples,
            target=self.target,
        )

    def enter(self, window: Window, epochs: int, loader: Iterable[Any], kept: dict[str, Any] | None = None) -> Training:
        """The window's training, made or taken up again; or made as a checkpoint kept it."""
        training = self.trainings.get(window)
        if training is None:
            if self.example is None:
                self.example = self.take_example(loader)
            if self.method.platonic_init and kept is None:
                initialise_window(self.loop.feednet, window, self._look_ahead(loader, window[0]))
            if not self.method.keep_heads:
                self._drop_heads(window)
            training = self.make(window, self.example, epochs, None if kept is None else kept["sizes"])
            self.trainings[window] = training
        if self.distributed == "ddp" and training.parallel is None:
            training.parallel = nn.parallel.DistributedDataParallel(training.subnet)
        elif callable(self.distributed) and window not in self.loop.averagers:
            for tensor in training.subnet.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
            self.loop.averagers[window] = self.distributed(training.subnet)
        return training

    def leave(self, window: Window, loader: Iterable[Any], *, over: bool) -> None:
        """Freeze a window; if it is `over`, does not come up again, give its best weights back, prune it, and forget its
        optimiser."""
        training = self.trainings[window]
        if over:
            training.restore_best()
            if self.method.pruning is not None and not self.is_output(window):
                self._prune(training, loader)
            training.end()
        if self.distributed is not None:  # running statistics are each process's own, and averagers may have left steps
            averaged = over and self.loop.averagers.pop(window, None) is not None
            agree((training.subnet.state_dict() if averaged else dict(training.subnet.named_buffers())).values())
        training.sleep()

    def is_output(self, window: Window) -> bool:
        """Whether a window ends with the model's own output."""
        return self.chain.has_output and window[1] == len(self.chain) - 1

    @property
    def output(self) -> Window:
        """The window whose head predicts: the one that reaches highest, or the best if the method ends chains early."""
        if not self.trainings:
            raise RuntimeError("nothing has been trained yet; call fit")
        if self.method.stopping.chain_patience is not None:
            return max(self.trainings, key=lambda w: self.trainings[w].best)
        return max(self.trainings, key=lambda w: w[1])

    def take_example(self, loader: Iterable[Any]) -> State:
        """A first input; the generators are put back."""
        for state, target in self._look_ahead(loader, 0):
            self.chain.check(state)
            self._check_labels(target)
            self.target = target.to("meta")
            return state
        raise ValueError("loader: expected at least one batch, got none")

    def _check_labels(self, target: Tensor) -> None:
        named = isinstance(self.method.loss, str)
        shape = tuple(target.shape)
        kind = (
            f"labels: the loss {self.method.loss!r} takes class numbers (N,) or probabilities (N, {self.classes}), got "
            f"{target.dtype} {shape}; for others give a callable as loss"
        )
        if target.is_floating_point():
            if named and (target.dim() == 1 or target.shape[1] != self.classes):
                raise ValueError(kind)
            return
        if named and target.dtype != torch.int64:
            raise TypeError(f"labels: expected int64, got {target.dtype}")
        if named and shape[1:] in ((1,), (self.classes,)):
            raise ValueError(kind)
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= self.classes:
            wrong = low if low < 0 else high
            raise ValueError(f"labels: expected 0 to {self.classes - 1}, as classes={self.classes}, got {wrong}")

    def _look_ahead(self, loader: Iterable[Any], boundary: int) -> Iterator[Batch]:
        """Batches at a boundary; afterwards the generators are where they were."""
        generators = generators_of(loader)
        before = rng_state(*generators)
        try:
            yield from self.loop.feednet.stream(loader, boundary)
        finally:
            set_rng_state(before, *generators)

    def _drop_heads(self, window: Window) -> None:
        """Forget heads that nothing needs while `window` trains."""
        filtered = self.method.filter_of(window[0]) is not None
        best = self.output if self.trainings and self.method.stopping.chain_patience is not None else None
        for other, training in self.trainings.items():
            over = training.optimizer is None
            if over and other != best and not (filtered and other[1] == window[0] - 1):
                training.drop_head()

    def _prune(self, training: Training, loader: Iterable[Any]) -> None:
        """Remove filters of the window's last unit, then tune its head to the rest."""
        pruning = self.method.pruning
        assert pruning is not None
        first, last = training.subnet.window
        training.subnet.eval()
        batches = (batch for _, batch in zip(range(pruning.batches), self._look_ahead(loader, first), strict=False))
        with self.loop.autocast():
            importance = filter_importance(training.subnet, self.chain[last], self.loop.loss, batches)
        if self.distributed is not None:
            torch.distributed.all_reduce(importance)  # of each process's batches; all keep the same filters
        training.subnet.zero_grad(set_to_none=True)
        self.narrow(training, importance.topk(pruning.count(len(importance))).indices.sort().values)
        for unit in training.subnet.units:
            unit.freeze()  # type: ignore[operator]
        training.subnet.units.eval()
        parameters = list(training.subnet.head.parameters())
        if not parameters:
            return
        training.optimizer = self.method.optimizer.build(parameters, training.lr, training.weight_decay)
        training.subnet.head.train()
        if training.parallel is not None:  # which knows the parameters that have been replaced
            training.parallel = nn.parallel.DistributedDataParallel(training.subnet)
        for _ in range(pruning.epochs):
            self.loop.train(self.loop.feednet.stream(loader, first), [training])

    def narrow(self, training: Training, keep: Tensor) -> None:
        """Leave the window's last unit these channels alone, and tell all who took its output or held its parameters."""
        unit = training.subnet.window[1]
        state = self.loop.feednet.advance(self.example, 0, unit)
        following = [self.chain[unit + 1]] if unit + 1 < len(self.chain) else []
        with self.loop.autocast():
            prune_unit(self.chain[unit], [*following, training.subnet.head], state, keep)
        for changed in (self.chain[unit], *following):
            changed.renew()
        for (first, last), other in self.trainings.items():  # those whose parameters have been replaced, and that go on
            if other is not training and other.optimizer is not None and first <= unit + 1 and unit <= last:
                other.renew(self.method)
        self.pruned[unit] = keep.tolist()
