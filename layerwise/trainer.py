"""The way through *train*: a schedule's stages, one after the other, over batches from the feednet, window by window."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from layerwise.checkpoint import CheckpointError, describe, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from layerwise.ensembles import Truncated
from layerwise.feature_cache import FeatureCache
from layerwise.feednet import Batch, Feednet, counted, generators_of, read_batch
from layerwise.filtering import check_filters, filtered, losses_under
from layerwise.history import History
from layerwise.local_losses import make_local_loss
from layerwise.loop import Counts, Loop, NonFiniteLossError, checked_accuracy
from layerwise.method import Method
from layerwise.processes import own_path
from layerwise.schedules import Stage, Window, check_schedule
from layerwise.splitting import Spec, split
from layerwise.subnet import Training
from layerwise.units import Chain, Unit
from layerwise.windows import Windows

__all__ = ["LayerwiseTrainer"]


class LayerwiseTrainer:
    """Trains a chain of units, each window with its own head, loss and optimiser.

    Parameters
    ----------
    model : Module or Chain
        What is trained, in place; on the device where it is to be trained.
    method : Method
        How; a preset such as ``layerwise.dll()``.
    classes : int
        Classes of the labels.
    spec : default="auto"
        How a module is cut into units; see :func:`~layerwise.split`.
    amp : dtype, optional
        bfloat16 or float16: autocast in the units and heads. float16 scales each window's losses by a scaler of its own.
    accumulate : int, default=1
        Batches whose gradients make one step.
    clip_norm : float, optional
        Largest norm of a window's gradients.
    feed_batch : int, optional
        Samples that frozen units take at a time; None means the whole batch. Fewer need less memory, and may give other last
        bits.
    distributed : {None, "ddp"} or callable, default=None
        "ddp": every subnet's gradients are averaged by ``DistributedDataParallel`` of its own. A callable is called with the
        subnet and gives an averager, such as ``lambda subnet: CompressedModelAverager(8)`` of
        :mod:`weight_compression.distributed`, whose ``average_parameters(subnet.parameters())`` follows every step.
    cache : FeatureCache, optional
        Where stages with the feed "cached" keep what frozen units gave.
    checkpoint : path, optional
        A file, written after every epoch, from which ``fit(resume=True)`` goes on as if nothing had happened. With several
        processes each has its own, with its rank in the name.
    checkpoint_every : int, default=1
        Epochs between two of them; the end of training is always kept.
    callbacks : sequence of callable
        Called with the trainer and the new rows of the history after every epoch. One that returns True ends the stage.
    progress : bool, optional
        Whether a bar is shown; None means if a person watches.

    Attributes
    ----------
    chain : Chain
        The units.
    history : History
        A row per window and epoch.
    windows : Windows
        Makes trainings, and puts them away.
    trainings : dict
        Windows to :class:`~layerwise.subnet.Training`: heads, optimisers, best accuracies.
    pruned : dict
        Units to the channels that pruning has left them.
    stopped : bool
        Whether the method has ended the chain early.
    """

    def __init__(
        self,
        model: nn.Module | Chain,
        method: Method,
        *,
        classes: int,
        spec: Spec = "auto",
        amp: torch.dtype | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        feed_batch: int | None = None,
        distributed: str | Callable[[nn.Module], Any] | None = None,
        cache: FeatureCache | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1,
        callbacks: Sequence[Callable[[LayerwiseTrainer, list[dict[str, Any]]], Any]] = (),
        progress: bool | None = None,
    ) -> None:
        if not isinstance(method, Method):
            raise TypeError(
                f"method: expected a Method such as layerwise.dll() or preset('dll', epochs=10), got {method!r}"
            )
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every: expected at least 1, got {checkpoint_every}")
        if not (distributed in (None, "ddp") or callable(distributed)):
            raise ValueError(f"distributed: expected None, 'ddp' or a callable, got {distributed!r}")
        if cache is not None and not isinstance(cache, FeatureCache):
            raise TypeError(f"cache: expected a FeatureCache, got {cache!r}")
        self.chain = model if isinstance(model, Chain) else split(model, spec)
        self.method = method
        self.classes = classes
        self.distributed = distributed
        self.checkpoint = None if checkpoint is None else own_path(Path(checkpoint), distributed is not None)
        self.checkpoint_every = checkpoint_every
        self.callbacks = list(callbacks)
        self.progress = sys.stderr.isatty() if progress is None else progress
        self.device = next(self.chain.parameters()).device
        self.feednet = Feednet(self.chain, self.device, amp, feed_batch)
        self.loop = Loop(self.feednet, make_local_loss(method.loss, **method.loss_options), accumulate, clip_norm)
        self.windows = Windows(method, self.loop, classes, distributed)
        self.cache = cache
        self.stages = method.stages(len(self.chain))
        check_schedule(self.stages, len(self.chain))
        if cache is None and any(stage.feed == "cached" for stage in self.stages):
            raise ValueError("the schedule feeds from a cache; give one: cache=FeatureCache(...)")
        check_filters(self.stages, method.filter_of, distributed is not None)
        inner = any(not self.windows.is_output(window) for stage in self.stages for window in stage.windows)
        if method.pruning is not None and not inner:
            raise ValueError("pruning: the only window ends with the model's output, whose filters are its scores")
        self.history = History()
        self.trainings, self.pruned = self.windows.trainings, self.windows.pruned
        self.stopped = False
        self._stage = 0  # in training, or next
        self._epoch = 0  # of that stage, next
        self._unsaved = 0  # epochs since the last checkpoint

    # ---- training ----

    def fit(self, loader: Iterable[Any], validation: Iterable[Any] | None = None, *, resume: bool = False) -> History:
        """Train through the schedule, or through what of it is left.

        Parameters
        ----------
        loader : iterable
            Pairs (input, labels) in batches; iterated over once per epoch. To go on exactly after an interruption, its
            order has to come from torch's, NumPy's or Python's global generator or from ``loader.generator``.
        validation : iterable, optional
            The same, for accuracies. Needed by methods that stop early or restore the best weights; not the data on which the
            result is reported.
        resume : bool, default=False
            Go on from the checkpoint, if there is one. Learning rate, weight decay and noise may be other than before.

        Returns
        -------
        History
            Also :attr:`history`.

        Raises
        ------
        NonFiniteLossError
            If a loss is infinite or not a number. The checkpoint is that of the last epoch that ended.
        CheckpointError
            If the checkpoint is of another model or method.
        """
        if self.method.stopping.needs_validation and validation is None:
            raise ValueError(
                f"method {self.method.name!r} stops or restores by validation accuracy; give validation data"
            )
        if resume and self.checkpoint is None:
            raise ValueError("resume: the trainer has no checkpoint file; give checkpoint=path")
        if isinstance(loader, Iterator):
            raise ValueError("loader: expected one that can be read in every epoch, got an iterator")
        for unit in self.chain:
            unit.freeze()
        if resume and self.checkpoint is not None and self.checkpoint.exists():
            self._load(loader)
        else:
            self._save(loader)  # to begin anew from, should the first epoch fail
        try:
            while self._stage < len(self.stages) and not self.stopped:
                self._run_stage(self.stages[self._stage], loader, validation)
                self._stage, self._epoch = self._stage + 1, 0
                self._save_when_due(loader)
        except NonFiniteLossError as error:
            if self.checkpoint is not None and self.checkpoint.exists():
                raise NonFiniteLossError(f"{error}. {self.checkpoint} holds what was last saved before") from None
            raise
        finally:
            for unit in self.chain:
                unit.unfreeze()
                unit.eval()
            if self.chain.model is not None:
                self.chain.model.eval()
        return self.history

    def append(self, unit: Unit, epochs: int) -> None:
        """Put a unit on top of the chain, to be trained by itself for some epochs by the next :meth:`fit`."""
        self.chain = Chain([*self.chain.units, unit], self.chain.model, has_output=False)
        self.feednet.chain = self.chain
        top = len(self.chain) - 1
        self.stages.append(Stage(((top, top),), epochs))

    def _run_stage(self, stage: Stage, loader: Iterable[Any], validation: Iterable[Any] | None) -> None:
        trainings = [self.windows.enter(window, self._epochs_of(window), loader) for window in stage.windows]
        label = f"stage {self._stage + 1}/{len(self.stages)}, unit {stage.windows[0][0]}"
        bar = tqdm(
            total=stage.epochs, initial=self._epoch, desc=label, unit="epoch", disable=not self.progress, leave=False
        )
        with bar:
            while self._epoch < stage.epochs:
                rows = self.run_epoch(stage, trainings, loader, validation)
                for row in rows:
                    self.history.append(row)
                self._epoch += 1
                self._unsaved += 1
                bar.update()
                bar.set_postfix({k: rows[-1][k] for k in ("loss", "validation_accuracy") if rows[-1][k] is not None})
                ended = [callback(self, rows) for callback in self.callbacks]
                patience = self.method.stopping.patience
                if any(end is True for end in ended) or (
                    patience is not None and all(t.stale >= patience for t in trainings)
                ):
                    self._epoch = stage.epochs
                if self._epoch < stage.epochs:
                    self._save_when_due(loader)
        for window in stage.windows:  # all of them before pruning replaces parameters
            if self._is_over(window):
                self.trainings[window].restore_best()
        for window in stage.windows:
            self.windows.leave(window, loader, over=self._is_over(window))
        if any(self._is_over(window) for window in stage.windows):
            self.stopped = self.method.stopping.ends_chain(t.best for t in self.trainings.values())

    def run_epoch(
        self, stage: Stage, trainings: list[Training], loader: Iterable[Any], validation: Iterable[Any] | None
    ) -> list[dict[str, Any]]:
        """One epoch of the windows of a stage, which have been entered: a row of the history for each."""
        start = time.perf_counter()
        self._set_epoch(loader)
        for training in trainings:
            training.wake()
            training.begin_epoch(self.method)
        seen = [0, 0]  # samples that came, samples that passed the filter
        counts = self.loop.train(self._stream(stage, loader, trainings[0].epoch, seen), trainings)
        for training in trainings:
            training.epoch += 1
        accuracies: list[Any] = [None] * len(trainings)
        if validation is not None:
            accuracies = self.loop.validate(trainings, validation, self.distributed is not None)
        rows = []
        for training, count, accuracy in zip(trainings, counts, accuracies, strict=True):
            if accuracy is None and self.method.stopping.needs_validation:
                raise ValueError(
                    "method.stopping: goes by accuracy, which needs class numbers (N,) or probabilities (N, classes) as labels"
                )
            if accuracy is not None:
                training.note(accuracy, self.method.stopping.restore_best)
            rows.append(
                {
                    "stage": self._stage,
                    "round": stage.round,
                    "first": training.subnet.window[0],
                    "last": training.subnet.window[1],
                    "epoch": training.epoch,
                    "lr": training.current_lr,
                    "loss": count.mean_loss(),
                    "train_accuracy": count.accuracy(),
                    "validation_accuracy": accuracy,
                    "seen": seen[1] / seen[0],
                    "seconds": time.perf_counter() - start,
                }
            )
        return rows

    def _set_epoch(self, loader: Iterable[Any]) -> None:
        """Another order of a DistributedSampler in every pass."""
        passes = sum(stage.epochs for stage in self.stages[: self._stage]) + self._epoch
        for holder in (loader, getattr(loader, "batch_sampler", None)):
            set_epoch = getattr(getattr(holder, "sampler", None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(passes)

    def _stream(self, stage: Stage, loader: Iterable[Any], epoch: int, seen: list[int]) -> Iterator[Batch]:
        first = stage.windows[0][0]
        if stage.feed == "cached":
            assert self.cache is not None
            stream = self.cache.stream(self.feednet, loader, first, generators_of(loader))
        else:
            stream = self.feednet.stream(loader, first)
        stream = counted(stream, seen, 0)
        filtering = self.method.filter_of(first)
        if filtering is not None:
            below = next((t for w, t in reversed(self.trainings.items()) if w[1] == first - 1), None)
            loss_of = None if below is None else losses_under(below.subnet.head, self.feednet.amp)
            stream = filtered(filtering, stream, epoch, loss_of, self.chain[first].constants)
        return counted(stream, seen, 1)

    def _epochs_of(self, window: Window) -> int:
        return sum(stage.epochs for stage in self.stages if window in stage.windows)

    def _is_over(self, window: Window) -> bool:
        return not any(window in later.windows for later in self.stages[self._stage + 1 :])

    # ---- results ----

    @property
    def output_window(self) -> Window:
        """The window whose head predicts: the one that reaches highest, or the best if the method ends chains early."""
        return self.windows.output

    def window_of(self, unit: int | None = None) -> Window:
        """The window whose head predicts from the output of `unit`; None means :attr:`output_window`."""
        if unit is None:
            return self.output_window
        if not -len(self.chain) <= unit < len(self.chain):
            raise ValueError(f"unit {unit} of a chain of {len(self.chain)}")
        unit %= len(self.chain)
        for window, training in reversed(self.trainings.items()):
            if window[1] == unit and training.has_head:
                return window
        raise ValueError(f"there is no head on unit {unit}; there are {self.heads}")

    @property
    def heads(self) -> list[int]:
        """Units with a head, ascending."""
        return sorted({window[1] for window, training in self.trainings.items() if training.has_head})

    def export(self, unit: int | None = None) -> nn.Module:
        """The units up to `unit` and its head as one module, in eval mode; None means :attr:`output_window`."""
        window = self.window_of(unit)
        return Truncated(self.chain, window[1] + 1, self.trainings[window].subnet.head).eval()

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Any], unit: int | None = None) -> float:
        """Share of the samples that the head on `unit` gets right, in eval mode."""
        network = self.export(unit)
        count = Counts(self.device)
        for batch in loader:
            inputs, target = read_batch(batch, self.device)
            with self.loop.autocast():
                count.add(network(inputs), target)
        return checked_accuracy(count, self.distributed is not None)

    # ---- checkpoints ----

    def _identity(self) -> dict[str, Any]:
        top = len(self.chain) - 1
        ends = sorted({last for stage in self.stages for _, last in stage.windows})
        return {
            "method": self.method.name,
            "units": self.chain.names,
            "stages": [repr(stage) for stage in self.stages],
            "classes": self.classes,
            "heads": [describe(self.method.head_of(i, self.chain.has_output and i == top)) for i in ends],
            "loss": describe(self.method.loss),
            "loss_options": describe(dict(self.method.loss_options)),
            "optimizer": describe(self.method.optimizer.name),
            "optimizer_options": describe(dict(self.method.optimizer.options)),
        }

    def _save_when_due(self, loader: Iterable[Any]) -> None:
        over = self._stage == len(self.stages) or self.stopped
        if over or self._unsaved >= self.checkpoint_every:
            self._save(loader)

    def _save(self, loader: Iterable[Any]) -> None:
        if self.checkpoint is None:
            return
        self._unsaved = 0
        state = {
            **self._identity(),
            "stage": self._stage,
            "epoch": self._epoch,
            "stopped": self.stopped,
            "pruned": self.pruned,
            "model": self.chain.state_dict(),
            "trainings": [[list(window), t.state_dict()] for window, t in self.trainings.items()],
            "averagers": [
                [list(window), averager.state_dict()]
                for window, averager in self.loop.averagers.items()
                if hasattr(averager, "state_dict")
            ],
            "history": self.history.rows,
            "rng": rng_state(*generators_of(loader)),
            "cache": None if self.cache is None else self.cache.state_dict(),
        }
        save_checkpoint(self.checkpoint, state)

    def _load(self, loader: Iterable[Any]) -> None:
        assert self.checkpoint is not None
        state = load_checkpoint(self.checkpoint, self.device)
        for key, value in self._identity().items():
            there = state.get(key)
            if there != value:
                if isinstance(value, list) and isinstance(there, list):  # the first of them that differs
                    pairs = itertools.zip_longest(there, value)
                    key, there, value = next((f"{key}[{i}]", a, b) for i, (a, b) in enumerate(pairs) if a != b)
                raise CheckpointError(f"{self.checkpoint}: of another run: {key} {there!r}, here {value!r}")
        self.windows.example = self.windows.take_example(loader)
        self.trainings.clear()
        for (first, last), kept in state["trainings"]:
            training = self.windows.enter((first, last), self._epochs_of((first, last)), loader, kept)
            if last in state["pruned"]:
                self.windows.narrow(training, torch.tensor(state["pruned"][last], device=self.device))
        for (first, last), kept in state["trainings"]:
            training = self.trainings[first, last]
            try:
                training.load_state_dict(kept)
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(
                    f"{self.checkpoint}: of another run: head or optimiser of units {first} to {last}: {error}"
                ) from None
            training.sleep()
        self.chain.load_state_dict(state["model"])
        for (first, last), kept in state["averagers"]:
            self.loop.averagers[first, last].load_state_dict(kept)
        self.history = History(state["history"])
        self._stage, self._epoch, self.stopped = state["stage"], state["epoch"], state["stopped"]
        if self.cache is not None and state["cache"] is not None:
            self.cache.load_state_dict(state["cache"])
        set_rng_state(state["rng"], *generators_of(loader))
