"""How much memory a method takes on a chain, item by item: predicted on tensors without data, or measured.

Both run the trainer's own windows and loop, so that what is counted is what will be done. The prediction does it on fake tensors,
which have shapes and storages but no values: nothing is computed, nothing is allocated, and any batch size can be asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from layerwise.borrowing import batch_of, borrowed, chain_tensors, tensors_in, tensors_of
from layerwise.feednet import Feednet
from layerwise.history import format_table
from layerwise.local_losses import make_local_loss
from layerwise.loop import Loop
from layerwise.memory import MemoryUse, Meter, open_meter, tensor_bytes
from layerwise.method import Method
from layerwise.regularisers import Regularisation
from layerwise.schedules import Stage, Window, check_schedule, whole
from layerwise.subnet import Training
from layerwise.units import Chain, State, main_tensor
from layerwise.windows import Windows

__all__ = ["MemoryReport", "Replay", "WindowMemory", "backprop_memory", "end_to_end", "memory_report", "stays"]

_BYTES_PER_MB = 1e6


@dataclass(frozen=True)
class WindowMemory:
    """Bytes that training a window takes, each item by itself. They do not peak together, so they do not add up.

    Attributes
    ----------
    window : tuple of int
        First and last unit.
    units, head : int
        Parameters and buffers of what is trained.
    feednet, above : int
        Those of the units below and above the window.
    other_heads : int
        Those of the heads, and the state of the optimisers, of other windows trained so far.
    gradients, optimizer : int
        Of the window's parameters: the gradients, and what its optimiser keeps.
    best_weights : int
        What is kept to go back to, if the method restores the best weights.
    feednet_peak : int
        Most that was alive while batches were brought in and went through the units below, beyond what stays.
    kept_units, kept_head : int
        Activations that the forward pass of the units and of the head left alive for the backward pass.
    step_peak : int
        Most that was alive at once in an epoch beyond what stays from one step to the next (weights, optimiser state, the
        example batch): activations, temporaries, gradients, batches.
    caches : int
        As given.
    total : int
        `step_peak` and all that stays.
    sizes : dict or None
        Of a head that was sized for its place, such as a decision block.
    """

    window: Window
    units: int
    head: int
    feednet: int
    above: int
    other_heads: int
    gradients: int
    optimizer: int
    best_weights: int
    feednet_peak: int
    kept_units: int
    kept_head: int
    step_peak: int
    caches: int
    total: int
    sizes: dict[str, int] | None = None

    @property
    def use(self) -> MemoryUse:
        """`step_peak` and what stays."""
        return MemoryUse(self.step_peak, self.total - self.step_peak)


@dataclass(frozen=True)
class MemoryReport:
    """What :func:`memory_report` returns; printed, a table in megabytes (10^6 bytes).

    Attributes
    ----------
    rows : tuple of WindowMemory
        In the order of training.
    batch_size : int
        Samples in a batch.
    measured : bool
        Whether it was measured, or else predicted.
    """

    rows: tuple[WindowMemory, ...]
    batch_size: int
    measured: bool

    @property
    def largest(self) -> WindowMemory:
        """The row with the highest total."""
        return max(self.rows, key=lambda row: row.total)

    @property
    def total(self) -> int:
        """The highest total: the memory that the method needs."""
        return self.largest.total

    @property
    def step_peak(self) -> int:
        """The highest peak of a step."""
        return max(row.step_peak for row in self.rows)

    def __str__(self) -> str:
        names = [f.name for f in fields(WindowMemory) if f.name not in ("window", "sizes")]
        rows = [
            {"window": f"{r.window[0]}-{r.window[1]}", **{n: getattr(r, n) / _BYTES_PER_MB for n in names}}
            for r in self.rows
        ]
        kind = "measured" if self.measured else "predicted"
        return f"megabytes, {kind}, batches of {self.batch_size}\n{format_table(rows)}"

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows with their names, for JSON."""
        return [asdict(row) for row in self.rows]


def memory_report(
    chain: Chain,
    method: Method,
    example: State,
    classes: int,
    *,
    window: Window | None = None,
    batch_size: int | None = None,
    amp: torch.dtype | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    feed_batch: int | None = None,
    caches: int = 0,
    target: Tensor | None = None,
    measure: bool = False,
    replay: Replay | None = None,
) -> MemoryReport:
    """The memory that `method` takes on `chain`, window by window.

    Parameters
    ----------
    chain : Chain
        The units. They are left as they were: weights, running statistics, gradients, modes, random numbers.
    method : Method
        Its heads, loss, optimiser and schedule. Left out are filtering, which only takes samples away, and what happens
        before and after a window's training: closed-form weights, pruning, validation.
    example : Tensor or tuple of Tensor
        An input of the model, of any values.
    classes : int
        Classes of the labels.
    window : tuple of int, optional
        Report on this window alone; None means all of the method's schedule, in its order.
    batch_size : int, optional
        Samples of a batch; None means as many as `example` has.
    amp, accumulate, clip_norm, feed_batch
        As of :class:`~layerwise.LayerwiseTrainer`.
    caches : int, default=0
        Bytes on the same device that a feature cache takes.
    target : Tensor, optional
        What labels of `example` look like, whatever their values; None means class numbers.
    measure : bool, default=False
        Run the steps with data and measure them. This takes the memory and the time of a few training steps per window.
    replay : Replay, optional
        Of the units below `window`, so that many predictions run them once.

    Returns
    -------
    MemoryReport
        The figures of a step after the first, when the optimiser has its state.

    Raises
    ------
    PredictionError
        If a step depends on values, so that it has to be measured.

    Notes
    -----
    In float32, predictions agree with measurements on the CPU to the byte; under autocast some statistics of batch
    normalisation differ in precision, and the one number that torch's mse_loss, smooth_l1_loss and huber_loss give lies in a
    storage as large as the scores. Measurements on CUDA also hold what kernels need for themselves, such as the workspaces
    of convolutions, and sizes rounded up by the allocator, neither of which can be predicted. Buckets of distributed
    training are in neither.
    """
    size = main_tensor(example).shape[0] if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {size}")
    schedule = _reduced(method.stages(len(chain)) if window is None else [Stage((window,), 1)])
    check_schedule(schedule, len(chain))
    plain = replace(method, schedule=schedule, filtering=None, pruning=None, platonic_init=False)
    rows: list[WindowMemory] = []
    trained = {i for stage in schedule for first, last in stage.windows for i in range(first, last + 1)}
    with borrowed(chain, [chain[i] for i in trained] if measure else None) as mode:
        feednet = Feednet(chain, chain_tensors(chain)[0].device, amp, feed_batch)
        most = min(accumulate, 2)  # the first of several batches, and those after it
        loop = Loop(feednet, make_local_loss(method.loss, **method.loss_options), most, clip_norm)
        windows = Windows(plain, loop, classes)
        if mode is not None:
            example = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, example)
        windows.example = batch_of(example, size)
        windows.target = None if target is None else target.to("meta")
        if replay is not None:
            feednet.advance = replay.over(feednet.advance)  # type: ignore[method-assign, assignment]
        if target is None:
            labels = torch.arange(size, device=feednet.device) % classes
        else:
            labels = torch.zeros(size, *target.shape[1:], dtype=target.dtype, device=feednet.device)
        for unit in chain:
            unit.freeze()
        for number in range(len(schedule)):
            rows += _run_stage(windows, schedule[number:], labels, caches)
    return MemoryReport(tuple(rows), size, measure)


def end_to_end(method: Method, epochs: int = 1) -> Method:
    """Backpropagation through all units at once, with the method's optimiser and without noise: what it is compared with."""
    return replace(
        method,
        name="backprop",
        schedule=partial(whole, epochs=epochs),
        loss="cross_entropy",
        loss_options={},
        regularisation=Regularisation(),
    )


def backprop_memory(
    chain: Chain, method: Method, example: State, classes: int, *, measure: bool = False, **options: Any
) -> MemoryUse:
    """What full backpropagation takes with the method's optimiser, the reference for budgets that are fractions.

    Arguments as in :func:`memory_report`.
    """
    return memory_report(chain, end_to_end(method), example, classes, measure=measure, **options).rows[0].use


class Replay:
    """What the units below a boundary give, made once on fake tensors, and the memory that this took, taken again each time.

    Parameters
    ----------
    chain : Chain
        Borrowed.
    example : Tensor or tuple of Tensor
        A batch as it enters the chain.
    boundary : int
        The unit that is fed.
    amp, feed_batch
        As of :class:`~layerwise.LayerwiseTrainer`.
    """

    def __init__(
        self, chain: Chain, example: State, boundary: int, amp: torch.dtype | None, feed_batch: int | None
    ) -> None:
        self.boundary = boundary
        tensors = chain_tensors(chain)
        mode = next(t.fake_mode for t in tensors if isinstance(t, FakeTensor))
        inputs = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, example)
        feednet = Feednet(chain, tensors[0].device, amp, feed_batch)
        for unit in chain.units[:boundary]:
            unit.freeze()
        with open_meter([*tensors, *tensors_in(inputs)]) as meter:
            self.state = feednet.advance(inputs, 0, boundary)
            self.peak = meter.peak

    def over(self, advance: Callable[[State, int, int], State]) -> Callable[[State, int, int], State]:
        """`advance`, but for the way to the boundary."""

        def replayed(state: State, first: int, stop: int) -> State:
            if (first, stop) != (0, self.boundary):
                return advance(state, first, stop)
            device = main_tensor(self.state).device
            torch.empty(self.peak, dtype=torch.uint8, device=device)
            return tree_map(lambda x: torch.empty_like(x) if isinstance(x, Tensor) else x, self.state)

        return replayed


# ---- one stage ----


def _reduced(stages: Sequence[Stage]) -> list[Stage]:
    """Stages for one epoch each; of those that come up again and again the first two and the last: from the second on, all
    heads and optimisers are there."""
    times: dict[tuple[Window, ...], list[int]] = {}
    for i, stage in enumerate(stages):
        times.setdefault(stage.windows, []).append(i)
    kept = sorted({i for found in times.values() for i in (*found[:2], found[-1])})
    return [replace(stages[i], epochs=1, feed="frozen") for i in kept]


def _run_stage(windows: Windows, stages: Sequence[Stage], target: Tensor, caches: int) -> list[WindowMemory]:
    """Train the windows of the first of what stages are left for a few batches, the first of which make the optimisers' state,
    and count the others."""
    loop, chain, stage = windows.loop, windows.chain, stages[0]
    times = Counter(window for each in stages for window in each.windows)
    trainings = [windows.enter(window, times[window], ()) for window in stage.windows]
    for training in trainings:
        training.scaler = torch.amp.GradScaler(enabled=False)  # its doubts about infinities would skip steps
        assert training.optimizer is not None
        for group in training.optimizer.param_groups:
            if loop.device.type == "cuda" and group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True  # the default there, which fake tensors do not get
    first = loop.accumulate
    others = [t for t in windows.trainings.values() if not any(t is own for own in trainings)]
    resident = [
        *chain_tensors(chain),
        *tensors_in(windows.example),
        *(t for training in trainings for t in tensors_of([training.subnet.head])),
        *_kept_by(others),
    ]
    known = [*resident, target, *(t for training in trainings for t in _state_of(training))]
    with open_meter(known) as meter, _Marks(meter, trainings, first) as marks:
        made = -tensor_bytes(known)
        for training in trainings:
            training.wake()
            training.begin_epoch(windows.method)
        batches = marks.copies([(windows.example, target)] * (2 * first))
        loop.train(loop.feednet.stream(batches, stage.windows[0][0]), trainings)
        states = [t for training in trainings for t in _state_of(training)]
        made += tensor_bytes([*known, *states])  # by the first batches, to stay
        peak = max(marks.peak, meter.mark()) - made
    keep_best = windows.method.stopping.restore_best
    best = [tensor_bytes(tensors_of([training.subnet])) if keep_best else 0 for training in trainings]
    total = tensor_bytes([*resident, *states]) + peak + sum(best) + caches
    rows = []
    for training, best_bytes, (kept_units, kept_head) in zip(trainings, best, marks.kept, strict=True):
        first, last = training.subnet.window
        units = chain.units
        rows.append(
            WindowMemory(
                window=(first, last),
                units=tensor_bytes(tensors_of(units[first : last + 1])),
                head=tensor_bytes(tensors_of([training.subnet.head])),
                feednet=tensor_bytes(tensors_of(units[:first])),
                above=tensor_bytes(tensors_of(units[last + 1 :])),
                other_heads=stays(others),
                gradients=tensor_bytes(training.optimizer_parameters()),
                optimizer=tensor_bytes(_state_of(training)),
                best_weights=best_bytes,
                feednet_peak=marks.feednet_peak - made,
                kept_units=kept_units,
                kept_head=kept_head,
                step_peak=peak,
                caches=caches,
                total=total,
                sizes=training.sizes,
            )
        )
        training.epoch += 1
        training.note(len(windows.trainings), keep_best)  # as if every window brought a gain
    for window in stage.windows:
        windows.leave(window, (), over=times[window] == 1)
    return rows


class _Marks:
    """Reads the meter when a batch is asked for, and when a window's forward pass begins, reaches the head, and ends.

    Attributes
    ----------
    peak : int
        Most from the batch number `first` on, up to the last mark.
    feednet_peak : int
        Most between the last batch's being asked for and its reaching the first window.
    kept : list of (int, int)
        What the last batch left alive in each window's units and head.
    """

    def __init__(self, meter: Meter, trainings: Sequence[Training], first: int) -> None:
        self.meter = meter
        self.trainings = trainings
        self.first = first
        self.peak = self.feednet_peak = 0
        self.kept = [(0, 0) for _ in trainings]
        self._handles: list[Any] = []
        self._begin = self._at_head = 0

    def copies(self, batches: Iterable[tuple[State, Tensor]]) -> Iterator[tuple[State, Tensor]]:
        """Batches that take memory of their own, as those of a loader do."""
        for number, (inputs, target) in enumerate(batches):
            if number <= self.first:
                self.meter.mark()
                self.peak = 0
            self._mark()
            yield tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs), target.clone()

    def _mark(self) -> int:
        since = self.meter.mark()
        self.peak = max(self.peak, since)
        return since

    def __enter__(self) -> _Marks:
        for number, training in enumerate(self.trainings):
            self._handles += [
                training.subnet.register_forward_pre_hook(self._before(number)),
                training.subnet.head.register_forward_pre_hook(self._reach_head),
                training.subnet.register_forward_hook(self._after(number)),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, number: int) -> Callable[..., None]:
        def note(*_: object) -> None:
            since = self._mark()
            if number == 0:
                self.feednet_peak = since
            self._begin = self.meter.live

        return note

    def _reach_head(self, *_: object) -> None:
        self._at_head = self.meter.live

    def _after(self, number: int) -> Callable[..., None]:
        def note(*_: object) -> None:
            self.kept[number] = (self._at_head - self._begin, self.meter.live - self._at_head)

        return note


def _state_of(training: Training) -> list[Tensor]:
    return [] if training.optimizer is None else tensors_in(list(training.optimizer.state.values()))


def _kept_by(trainings: Iterable[Training]) -> list[Tensor]:
    """Heads, the state of optimisers, the best weights."""
    return [
        t
        for training in trainings
        for t in (*tensors_of([training.subnet.head]), *_state_of(training), *tensors_in(training.best_state))
    ]


def stays(trainings: Iterable[Training]) -> int:
    """Bytes of what trainings keep beside the units."""
    return tensor_bytes(_kept_by(trainings))
