"""The way through *train*: a schedule's stages, one after the other, over batches from the feednet, window by window."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from layerwise.checkpoint import CheckpointError, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from layerwise.feature_cache import FeatureCache
from layerwise.feednet import Batch, Feednet, read_batch
from layerwise.filtering import losses_under
from layerwise.heads import scores_of
from layerwise.history import History
from layerwise.local_losses import make_local_loss
from layerwise.method import Method
from layerwise.schedules import Stage, Window, check_schedule
from layerwise.splitting import Spec, split
from layerwise.subnet import Training, make_training
from layerwise.units import Chain, detach_state, main_tensor

__all__ = ["LayerwiseTrainer", "NonFiniteLossError"]

_LOOK_EVERY = 50  # steps between two looks at the loss on a device that works ahead


class NonFiniteLossError(RuntimeError):
    """A loss that is infinite or not a number."""


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
    distributed : {None, "ddp"} or callable, default=None
        "ddp": every subnet's gradients are averaged by ``DistributedDataParallel`` of its own. A callable is called with the
        subnet and gives an averager, such as ``lambda subnet: CompressedModelAverager(8)`` of
        :mod:`weight_compression.distributed`, whose ``average_parameters(subnet.parameters())`` follows every step.
    cache : FeatureCache, optional
        Where stages with the feed "cached" keep what frozen units gave.
    checkpoint : path, optional
        A file, written after every epoch, from which ``fit(resume=True)`` goes on as if nothing had happened.
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
    trainings : dict
        Windows to :class:`~layerwise.subnet.Training`: heads, optimisers, best accuracies.
    output_window : tuple of int
        The window whose head predicts: the one that reaches highest, or the best if the method ends chains early.
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
        distributed: str | Callable[[nn.Module], Any] | None = None,
        cache: FeatureCache | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        callbacks: Sequence[Callable[[LayerwiseTrainer, list[dict[str, Any]]], Any]] = (),
        progress: bool | None = None,
    ) -> None:
        if amp not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"amp: expected None, torch.float16 or torch.bfloat16, got {amp}")
        if accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1, got {accumulate}")
        if not (distributed in (None, "ddp") or callable(distributed)):
            raise ValueError(f"distributed: expected None, 'ddp' or a callable, got {distributed!r}")
        self.chain = model if isinstance(model, Chain) else split(model, spec)
        self.method = method
        self.classes = classes
        self.amp = amp
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.distributed = distributed
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.callbacks = list(callbacks)
        self.progress = sys.stderr.isatty() if progress is None else progress
        self.device = next(self.chain.parameters()).device
        self.loss = make_local_loss(method.loss, **method.loss_options)
        self.feednet = Feednet(self.chain, self.device, amp)
        self.cache = cache
        self.stages = method.stages(len(self.chain))
        check_schedule(self.stages, len(self.chain))
        if cache is None and any(stage.feed == "cached" for stage in self.stages):
            raise ValueError("the schedule feeds from a cache; give one: cache=FeatureCache(...)")
        filters = [method.filter_of(stage.windows[0][0]) for stage in self.stages]
        if distributed is not None and not all(f is None or f.equal_counts for f in filters):
            raise ValueError(
                "filtering: workers step together, but a filter that leaves differing numbers of samples gives them differing "
                "numbers of batches; use LossFilter, or none"
            )
        self.history = History()
        self.trainings: dict[Window, Training] = {}
        self.averagers: dict[Window, Any] = {}
        self._stage = 0  # in training, or next
        self._epoch = 0  # of that stage, next
        self._stopped = False
        self._example: Any = None

    # ---- training ----

    def fit(self, loader: Iterable[Any], validation: Iterable[Any] | None = None, *, resume: bool = False) -> History:
        """Train through the schedule.

        Parameters
        ----------
        loader : iterable
            Pairs (input, labels) in batches; iterated over once per epoch. To go on exactly after an interruption, its
            order has to come from torch's, NumPy's or Python's global generator or from ``loader.generator``.
        validation : iterable, optional
            The same, for accuracies. Needed by methods that stop early or restore the best weights; not the data on which the
            result is reported.
        resume : bool, default=False
            Go on from the checkpoint, if there is one.

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
        for unit in self.chain:
            unit.freeze()
        if resume and self.checkpoint is not None and self.checkpoint.exists():
            self._load(loader)
        try:
            while self._stage < len(self.stages) and not self._stopped:
                self._run_stage(self.stages[self._stage], loader, validation)
                self._stage, self._epoch = self._stage + 1, 0
                self._save(loader)
        finally:
            for unit in self.chain:
                unit.unfreeze()
                unit.eval()
        return self.history

    def _run_stage(self, stage: Stage, loader: Iterable[Any], validation: Iterable[Any] | None) -> None:
        trainings = [self._enter(window, loader) for window in stage.windows]
        bar = tqdm(
            total=stage.epochs,
            initial=self._epoch,
            desc=self._label(stage),
            unit="epoch",
            disable=not self.progress,
            leave=False,
        )
        with bar:
            while self._epoch < stage.epochs:
                rows = self._run_epoch(stage, trainings, loader, validation)
                for row in rows:
                    self.history.append(row)
                self._epoch += 1
                bar.update()
                bar.set_postfix({k: rows[-1][k] for k in ("loss", "validation_accuracy") if rows[-1][k] is not None})
                ended = [callback(self, rows) for callback in self.callbacks]
                patience = self.method.stopping.patience
                if any(ended) or (patience is not None and all(t.stale >= patience for t in trainings)):
                    self._epoch = stage.epochs
                if self._epoch < stage.epochs:
                    self._save(loader)
        for window in stage.windows:
            self._leave(window, stage, loader, validation)

    def _enter(self, window: Window, loader: Iterable[Any]) -> Training:
        """The window's training, made or taken up again."""
        training = self.trainings.get(window)
        if training is None:
            if self._example is None:
                self._example = self._take_example(loader)
            state = self.feednet.advance(self._example, 0, window[0])
            epochs = sum(stage.epochs for stage in self.stages if window in stage.windows)
            training = make_training(
                self.chain, window, state, self.method, classes=self.classes, epochs=epochs, amp=self.amp
            )
            self.trainings[window] = training
        for unit in training.subnet.units:
            unit.unfreeze()  # type: ignore[operator]
        training.subnet.train()
        for p in training.subnet.head.parameters():
            p.requires_grad_(True)
        if self.distributed == "ddp" and training.parallel is None:
            training.parallel = nn.parallel.DistributedDataParallel(training.subnet)
        elif callable(self.distributed) and window not in self.averagers:
            self.averagers[window] = self.distributed(training.subnet)
        return training

    def _take_example(self, loader: Iterable[Any]) -> Any:
        """A first input, from which sizes are known; the generators are put back."""
        generators = _generators(loader)
        before = rng_state(*generators)
        for batch in loader:
            example = read_batch(batch, self.device)[0]
            set_rng_state(before, *generators)
            self.chain.check(example)
            return example
        raise ValueError("loader: expected at least one batch, got none")

    def _leave(self, window: Window, stage: Stage, loader: Iterable[Any], validation: Iterable[Any] | None) -> None:
        """Freeze a window; if it does not come up again, give its best weights back and forget its optimiser."""
        training = self.trainings[window]
        over = not any(window in later.windows for later in self.stages[self._stage + 1 :])
        if over:
            training.restore_best()
            training.optimizer = None
            training.parallel = None
            self.averagers.pop(window, None)
        for unit in training.subnet.units:
            unit.freeze()  # type: ignore[operator]
        training.subnet.eval()
        for p in training.subnet.head.parameters():
            p.grad = None
        if over:
            self._stopped = self._chain_is_done()

    def _chain_is_done(self) -> bool:
        patience = self.method.stopping.chain_patience
        if patience is None:
            return False
        best, since = -1.0, 0
        for training in self.trainings.values():  # in the order of training
            if training.best > best + self.method.stopping.min_gain:
                best, since = training.best, 0
            else:
                since += 1
        return since >= patience

    # ---- one epoch ----

    def _run_epoch(
        self, stage: Stage, trainings: list[Training], loader: Iterable[Any], validation: Iterable[Any] | None
    ) -> list[dict[str, Any]]:
        start = time.perf_counter()
        for training in trainings:
            training.begin_epoch(self.method)
        counts = [_Counts(self.device) for _ in trainings]
        seen = [0, 0]  # samples that came, samples that passed the filter
        for step, (state, target) in enumerate(self._stream(stage, loader, trainings[0].epoch, seen)):
            self._step(stage, trainings, state, target, step, counts)
            if self.device.type == "cpu" or step % _LOOK_EVERY == 0:
                self._look(trainings, counts, step)
        if counts[0].samples == 0:
            raise ValueError(
                "loader: the epoch had no samples; a loader that can be read only once needs to be made anew"
            )
        self._look(trainings, counts, -1)
        self._finish_accumulation(trainings)
        for training in trainings:
            training.epoch += 1
        accuracies = [None] * len(trainings) if validation is None else self._validate(stage, trainings, validation)
        rows = []
        for training, count, accuracy in zip(trainings, counts, accuracies, strict=True):
            if accuracy is not None:
                training.note(accuracy, self.method.stopping.restore_best)
            assert training.optimizer is not None
            rows.append(
                {
                    "stage": self._stage,
                    "round": stage.round,
                    "first": training.subnet.window[0],
                    "last": training.subnet.window[1],
                    "epoch": training.epoch,
                    "lr": training.optimizer.param_groups[0]["lr"],
                    "loss": count.loss.item() / count.samples,
                    "train_accuracy": count.correct.item() / count.samples,
                    "validation_accuracy": accuracy,
                    "seen": seen[1] / seen[0],
                    "seconds": 0.0,
                }
            )
        for row in rows:
            row["seconds"] = time.perf_counter() - start
        return rows

    def _stream(self, stage: Stage, loader: Iterable[Any], epoch: int, seen: list[int]) -> Iterator[Batch]:
        first = stage.windows[0][0]
        if stage.feed == "cached":
            assert self.cache is not None
            stream = self.cache.stream(self.feednet, loader, first, _generators(loader))
        else:
            stream = self.feednet.stream(loader, first)
        stream = _counted(stream, seen, 0)
        filtering = self.method.filter_of(first)
        if filtering is not None:
            below = next((t for w, t in reversed(self.trainings.items()) if w[1] == first - 1), None)
            loss_of = None if below is None else losses_under(below.subnet.head, self.amp)
            stream = filtering.apply(stream, epoch, loss_of)
        return _counted(stream, seen, 1)

    def _step(
        self, stage: Stage, trainings: list[Training], state: Any, target: Tensor, step: int, counts: list[_Counts]
    ) -> None:
        """One batch through the stage's windows, from the bottom up."""
        at = stage.windows[0][0]
        update = (step + 1) % self.accumulate == 0
        for training, count in zip(trainings, counts, strict=True):
            first, last = training.subnet.window
            state = self.feednet.advance(state, at, first)
            whole = update or training.parallel is None
            with nullcontext() if whole else training.parallel.no_sync():  # type: ignore[union-attr, operator]
                with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                    output, following = training.module(state)
                    loss = self.loss(output, target)
                training.scaler.scale(loss / self.accumulate).backward()
            if update:
                self._update(training)
            observe = getattr(training.subnet.head, "observe", None)
            if observe is not None:
                observe(target)
            count.add(loss.detach(), scores_of(output).detach(), target)
            state, at = detach_state(following), last + 1

    def _update(self, training: Training) -> None:
        assert training.optimizer is not None
        if self.clip_norm is not None:
            training.scaler.unscale_(training.optimizer)
            nn.utils.clip_grad_norm_(training.optimizer_parameters(), self.clip_norm)
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.optimizer.zero_grad(set_to_none=True)
        averager = self.averagers.get(training.subnet.window)
        if averager is not None:
            averager.average_parameters(training.subnet.parameters())

    def _finish_accumulation(self, trainings: list[Training]) -> None:
        """A last step of fewer batches than :attr:`accumulate`."""
        if self.accumulate > 1:
            for training in trainings:
                if any(p.grad is not None for p in training.optimizer_parameters()):
                    self._update(training)

    def _look(self, trainings: list[Training], counts: list[_Counts], step: int) -> None:
        for training, count in zip(trainings, counts, strict=True):
            if not torch.isfinite(count.loss):
                first, last = training.subnet.window
                where = "the epoch's last steps" if step < 0 else f"step {step}"
                saved = (
                    f"; {self.checkpoint} holds the epoch before"
                    if self.checkpoint and self.checkpoint.exists()
                    else ""
                )
                raise NonFiniteLossError(
                    f"units {first} to {last} ({self.chain[first].name}): the loss is not finite at {where} of epoch "
                    f"{training.epoch}; a smaller lr or clip_norm may help{saved}"
                )

    # ---- looking ----

    @torch.no_grad()
    def _validate(self, stage: Stage, trainings: list[Training], loader: Iterable[Any]) -> list[float]:
        """Accuracies of the stage's heads on data, in eval mode."""
        counts = [_Counts(self.device) for _ in trainings]
        for training in trainings:
            training.subnet.eval()
        for batch in loader:
            state, target = read_batch(batch, self.device)
            at = 0
            for training, count in zip(trainings, counts, strict=True):
                state = self.feednet.advance(state, at, training.subnet.window[0])
                with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                    output, state = training.subnet(state)
                count.add(torch.zeros((), device=self.device), scores_of(output), target)
                at = training.subnet.window[1] + 1
        for training in trainings:
            training.subnet.train()
        if counts[0].samples == 0:
            raise ValueError("validation: expected at least one batch, got none")
        return [count.accuracy(self.distributed is not None) for count in counts]

    @property
    def output_window(self) -> Window:
        if not self.trainings:
            raise RuntimeError("nothing has been trained yet; call fit")
        if self.method.stopping.chain_patience is not None:
            return max(self.trainings, key=lambda w: self.trainings[w].best)
        return max(self.trainings, key=lambda w: w[1])

    def window_of(self, unit: int | None = None) -> Window:
        """The window whose head predicts from the output of `unit`; None means :attr:`output_window`."""
        if unit is None:
            return self.output_window
        unit = range(len(self.chain))[unit]
        for window in reversed(self.trainings):
            if window[1] == unit:
                return window
        raise ValueError(f"no head was trained on unit {unit}; there are {sorted(w[1] for w in self.trainings)}")

    @torch.no_grad()
    def scores(self, inputs: Any, unit: int | None = None) -> Tensor:
        """Class scores (B, classes) of a batch, by the head on `unit`, in eval mode."""
        window = self.window_of(unit)
        self.chain.eval()
        head = self.trainings[window].subnet.head.eval()
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            state = self.chain.run(inputs, 0, window[1] + 1)
            return scores_of(head(main_tensor(state)))

    def evaluate(self, loader: Iterable[Any], unit: int | None = None) -> float:
        """Share of the samples that the head on `unit` gets right."""
        count = _Counts(self.device)
        for batch in loader:
            inputs, target = read_batch(batch, self.device)
            count.add(torch.zeros((), device=self.device), self.scores(inputs, unit), target)
        return count.accuracy(self.distributed is not None)

    def export(self, unit: int | None = None) -> nn.Module:
        """The units up to `unit` and its head as one module, in eval mode; None means :attr:`output_window`."""
        window = self.window_of(unit)
        return Exported(self.chain, window[1] + 1, self.trainings[window].subnet.head).eval()

    def _label(self, stage: Stage) -> str:
        first, last = stage.windows[0][0], stage.windows[-1][1]
        return f"stage {self._stage + 1}/{len(self.stages)}, " + (
            f"unit {first}" if first == last else f"units {first}-{last}"
        )

    # ---- checkpoints ----

    def _save(self, loader: Iterable[Any]) -> None:
        if self.checkpoint is None:
            return
        save_checkpoint(
            self.checkpoint,
            {
                "method": self.method.name,
                "units": self.chain.names,
                "stages": len(self.stages),
                "stage": self._stage,
                "epoch": self._epoch,
                "stopped": self._stopped,
                "model": self.chain.state_dict(),
                "trainings": [[list(window), t.state_dict()] for window, t in self.trainings.items()],
                "history": self.history.rows,
                "rng": rng_state(*_generators(loader)),
                "cache": None if self.cache is None else self.cache.state_dict(),
            },
        )

    def _load(self, loader: Iterable[Any]) -> None:
        assert self.checkpoint is not None
        state = load_checkpoint(self.checkpoint, self.device)
        own = {"method": self.method.name, "units": self.chain.names, "stages": len(self.stages)}
        for key, value in own.items():
            if state[key] != value:
                raise CheckpointError(f"{self.checkpoint}: of another run: {key} {state[key]!r}, here {value!r}")
        self.trainings.clear()
        for window, kept in state["trainings"]:
            training = self._enter((window[0], window[1]), loader)
            if kept["optimizer"] is None:
                training.optimizer = None
            training.load_state_dict(kept)
            for unit in training.subnet.units:
                unit.freeze()  # type: ignore[operator]
        self.chain.load_state_dict(state["model"])
        self.history = History(state["history"])
        self._stage, self._epoch, self._stopped = state["stage"], state["epoch"], state["stopped"]
        if self.cache is not None and state["cache"] is not None:
            self.cache.load_state_dict(state["cache"])
        set_rng_state(state["rng"], *_generators(loader))


class Exported(nn.Module):
    """Units and a head as one module."""

    def __init__(self, chain: Chain, stop: int, head: nn.Module) -> None:
        super().__init__()
        self.units = nn.ModuleList(chain.units[:stop])
        self.head = head

    def forward(self, state: Any) -> Tensor:
        for unit in self.units:
            state = unit(state)
        return scores_of(self.head(main_tensor(state)))


class _Counts:
    """Sums over an epoch, on the device, so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.samples = 0

    def add(self, loss: Tensor, scores: Tensor, target: Tensor) -> None:
        self.loss += loss.double() * target.shape[0]
        self.correct += (scores.argmax(1) == target).sum()
        self.samples += target.shape[0]

    def accuracy(self, everywhere: bool) -> float:
        """Share of right answers, of all processes if `everywhere`."""
        if not everywhere:
            return self.correct.item() / self.samples
        both = torch.stack([self.correct, torch.tensor(self.samples, device=self.correct.device)])
        torch.distributed.all_reduce(both)
        return (both[0] / both[1]).item()


def _counted(stream: Iterator[Batch], seen: list[int], slot: int) -> Iterator[Batch]:
    for batch in stream:
        seen[slot] += batch[1].shape[0]
        yield batch


def _generators(loader: Any) -> list[torch.Generator | None]:
    """Generators of its own that decide a loader's order."""
    found = [getattr(loader, "generator", None), getattr(getattr(loader, "sampler", None), "generator", None)]
    return [g if isinstance(g, torch.Generator) else None for g in found]
