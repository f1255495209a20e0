"""Ways of training within one memory budget, side by side: accuracy, peak memory, seconds."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from tqdm.auto import tqdm

from layerwise import presets
from layerwise.borrowing import batch_of
from layerwise.costs import balance, unit_costs
from layerwise.decision import BudgetError
from layerwise.feednet import read_batch
from layerwise.heads import HeadSpec, SizedHeadSpec
from layerwise.history import format_table
from layerwise.memory import measure_memory
from layerwise.memory_report import MemoryReport, memory_report
from layerwise.method import Method
from layerwise.recompute import checkpointed
from layerwise.splitting import Spec, split
from layerwise.trainer import LayerwiseTrainer
from layerwise.units import Chain, State
from platonic.plots import COLOURS
from platonic_core.figures import new_figure, save_figure

__all__ = ["Comparison", "compare"]

_MB = 1e6
_COLUMNS = (
    "method", "accuracy", "std", "peak_mb", "predicted_mb", "of_backprop", "kept", "batch", "micro_batch", "groups", "passes",
    "seconds",
)  # fmt: skip

Data = Dataset[Any] | tuple[Tensor, Tensor]
MethodOf = Callable[[int], Method]

ENDS_TO_END = ("backprop", "checkpointing", "accumulation")


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns; printed, a table.

    Attributes
    ----------
    rows : list of dict
        A row per method: ``method``; ``accuracy`` on the test data, mean over the seeds, and ``std`` (None with one seed);
        ``peak_mb``, measured, and ``predicted_mb``, in 10^6 bytes; ``of_backprop``, the measured peak over the predicted one of
        backpropagation with whole batches; ``kept``, whether it is within the budget; ``batch``, samples per step of the
        optimiser, and ``micro_batch``, samples that are in memory at once; ``groups`` of units between which activations are
        kept (None without checkpointing); ``passes`` over the training data; ``seconds`` of training, mean over the
        seeds; heads are sized before.
        Where a method does not fit at all, a ``note`` says why, and the rest is None.
    runs : list of dict
        ``method``, ``seed``, ``accuracy``, ``seconds`` of every run.
    budget : int
        Bytes.
    backprop : int
        Bytes that backpropagation with whole batches is predicted to take.
    """

    rows: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    budget: int
    backprop: int

    def __str__(self) -> str:
        share = 100 * self.budget / self.backprop
        lines = [
            f"budget {self.budget / _MB:.4g} MB, {share:.3g} % of backpropagation's {self.backprop / _MB:.4g} MB",
            format_table(self.rows, list(_COLUMNS)),
            *(f"{row['method']}: {row['note']}" for row in self.rows if row["note"]),
        ]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Accuracies with their standard deviations, peaks beside the budget, and seconds; what exceeds the budget is grey.

        Raises
        ------
        ValueError
            If no method fits the budget.
        ImportError
            Without matplotlib, which the extra 'plot' installs.
        """
        rows = [row for row in self.rows if row["accuracy"] is not None]
        if not rows:
            raise ValueError("no method fits the budget, so that there is nothing to draw")
        names = [row["method"] for row in rows]
        colours = [COLOURS[0] if row["kept"] else COLOURS[3] for row in rows]
        figure = new_figure(11, 1.5 + 0.4 * len(rows))
        accuracy, memory, seconds = figure.subplots(1, 3, sharey=True)
        for row, colour in zip(rows, colours, strict=True):
            spread = None if row["std"] is None else 100 * row["std"]
            accuracy.errorbar(100 * row["accuracy"], row["method"], xerr=spread, marker="o", color=colour, capsize=3)
        accuracy.set(xlabel="test accuracy, %", title="Accuracy")
        memory.barh(names, [row["peak_mb"] for row in rows], color=colours)
        memory.axvline(self.budget / _MB, color="black", linestyle="--", linewidth=1)
        memory.set(xlabel="MB; dashed: the budget", title="Peak memory")
        seconds.barh(names, [row["seconds"] for row in rows], color=colours)
        seconds.set(xlabel="s", title="Training time")
        accuracy.invert_yaxis()
        save_figure(figure, path)


def compare(
    make_model: Callable[[], nn.Module],
    data: tuple[Data, Data],
    methods: Sequence[str | Method | MethodOf] = (*ENDS_TO_END, "dll"),
    *,
    classes: int,
    budget: int | float = 0.3,
    epochs: int = 10,
    batch_size: int = 128,
    seeds: Sequence[int] = (0,),
    feed_batch: int | None = None,
    baseline: Method | None = None,
    spec: Spec | Mapping[str, Spec] = "auto",
    amp: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool | None = None,
) -> Comparison:
    """Train the same model in several ways within one memory budget.

    All see the same samples in the same order in each pass, in batches of the same size per step, and are tested in the same
    way. Backpropagation itself runs with whole batches whatever it takes, as the reference. Everything else gets the largest
    micro-batch, a divisor of the batch whose gradients add up to one step, with which it is predicted to keep the budget;
    micro-batches of less than 2 are not tried. A micro-batch is what batch normalisation normalises over.

    Parameters
    ----------
    make_model : callable
        A new model, with weights from the global generator, which is seeded before.
    data : pair
        Training and test data: each a data set of (input, label), or a pair of tensors.
    methods : sequence
        "backprop"; "checkpointing": backpropagation that recomputes activations between groups of units, as many groups as take
        the least memory; "accumulation": backpropagation in micro-batches that fit; "dll", "greedy1" to "greedy3", "predsim",
        "segments": presets with `epochs` per window; a :class:`~layerwise.Method`; or a function that makes one of the budget
        in bytes.
    classes : int
        Classes of the labels.
    budget : int or float, default=0.3
        Bytes, or a fraction of what backpropagation with whole batches takes.
    epochs : int, default=10
        Of backpropagation, and of each window of a method given by name.
    batch_size : int, default=128
        Samples per step of the optimiser. What is left over in a pass is left out, for all alike.
    seeds : sequence of int, default=(0,)
        Runs of each method.
    baseline : Method, optional
        The end-to-end training of the first three; None means ``backprop(epochs=epochs)``.
    spec, amp, feed_batch
        As of :class:`~layerwise.LayerwiseTrainer`; `spec` also by the method's name, "auto" for those not named.
    device : device, default="cpu"
        Where to train.
    workers : int, default=0
        Processes that load data.
    progress : bool, optional
        Whether bars are shown; None means if a person watches.

    Returns
    -------
    Comparison
        Table and plot. Peaks are measured: on CUDA by the allocator over the whole training of the first seed, elsewhere by
        counting storages in a few steps of every window (:func:`~layerwise.memory_report`).

    Raises
    ------
    ValueError
        If there are fewer training samples than in a batch, or a name or the budget is none.
    """
    setting = _Setting(
        make_model,
        _dataset(data[0]),
        _dataset(data[1]),
        classes,
        batch_size,
        {"amp": amp, "feed_batch": feed_batch},
        torch.device(device),
        workers,
    )
    if len(setting.train) < batch_size:
        raise ValueError(f"data: expected at least a batch of {batch_size} training samples, got {len(setting.train)}")
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")
    baseline = presets.backprop(epochs=epochs) if baseline is None else baseline
    whole = setting.predict(_Plan("backprop", baseline), batch_size).total
    limit = _bytes(budget, whole)
    plans = [_plan(method, baseline, epochs, limit) for method in methods]
    specs = spec if isinstance(spec, Mapping) else dict.fromkeys([plan.name for plan in plans], spec)
    plans = [replace(plan, spec=specs.get(plan.name, "auto")) for plan in plans]
    for plan in plans:
        if plan.method.stopping.needs_validation:
            raise ValueError(f"methods: {plan.name!r} goes by validation accuracy, and compare has no validation data")
        if any(stage.feed == "cached" for stage in plan.method.stages(len(setting.chain(plan)))):
            raise ValueError(f"methods: {plan.name!r} feeds from a cache, and compare has none; feed='frozen'")
    rows, runs = [], []
    bar = tqdm(total=len(plans) * len(seeds), unit="run", disable=None if progress is None else not progress)
    with bar:
        for plan in plans:
            bar.set_description(plan.name)
            fitted, note = setting.fit_to(plan, limit)
            results = []
            for seed in seeds:
                if fitted is not None:
                    results.append(setting.run(fitted, seed, measure=seed == seeds[0]))
                bar.update()
            rows.append(_row(fitted or plan, note, results, limit, whole, batch_size))
            runs += [
                {"method": plan.name, **{k: result[k] for k in ("seed", "accuracy", "seconds")}} for result in results
            ]
    return Comparison(rows, runs, limit, whole)


def _row(plan: _Plan, note: str, results: list[dict[str, Any]], limit: int, whole: int, batch: int) -> dict[str, Any]:
    row: dict[str, Any] = {**dict.fromkeys(_COLUMNS), "method": plan.name, "kept": False, "batch": batch, "note": note}
    if results:
        accuracies = [result["accuracy"] for result in results]
        peak = results[0]["peak"]
        row.update(
            accuracy=statistics.fmean(accuracies),
            std=statistics.stdev(accuracies) if len(results) > 1 else None,
            peak_mb=peak / _MB,
            predicted_mb=plan.predicted / _MB,
            of_backprop=peak / whole,
            kept=peak <= limit,
            micro_batch=plan.micro,
            groups=len(plan.starts) or None,
            passes=results[0]["passes"],
            seconds=statistics.fmean(result["seconds"] for result in results),
        )
    return row


def _bytes(budget: int | float, whole: int) -> int:
    if isinstance(budget, float) and 0 < budget <= 1:
        return int(budget * whole)
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    raise ValueError(f"budget: expected bytes (an int) or a fraction above 0 and up to 1 (a float), got {budget!r}")


def _dataset(data: Data) -> Any:
    if isinstance(data, (tuple, list)):
        return TensorDataset(*data)
    return data


@dataclass(frozen=True)
class _Plan:
    """What is to be trained, and how it is made to fit."""

    name: str
    method: Method
    fits: bool = True  # whether micro-batches are sought
    recompute: bool = False
    micro: int = 0
    starts: tuple[int, ...] = ()
    predicted: int = 0
    spec: Spec = "auto"


def _plan(method: str | Method | MethodOf, baseline: Method, epochs: int, limit: int) -> _Plan:
    if isinstance(method, Method):
        return _Plan(method.name, method)
    if callable(method):
        made = method(limit)
        return _Plan(made.name, made)
    if method in ENDS_TO_END:
        return _Plan(method, baseline, fits=method != "backprop", recompute=method == "checkpointing")
    if method in presets.PRESETS:
        budget = {"budget": limit} if presets.takes(method, "budget") else {}
        return _Plan(method, presets.preset(method, epochs=epochs, **budget))
    names = dict.fromkeys((*ENDS_TO_END, *presets.PRESETS))
    raise ValueError(f"methods: expected {', '.join(names)}, a Method or a function of the budget, got {method!r}")


def _sized(method: Method, report: MemoryReport) -> Method:
    """The method with heads of the sizes that were found, so that they are not searched again."""
    sizes = {row.window[1]: row.sizes for row in report.rows}

    def head(unit: int) -> HeadSpec:
        spec = method.head_of(unit, is_output=False)
        return spec.size_for(None, sizes[unit]) if isinstance(spec, SizedHeadSpec) and sizes[unit] else spec

    return replace(method, head=head)


class _Batches(Sampler[list[int]]):
    """Micro-batches whose runs of `batch` samples are the same whatever their size."""

    def __init__(self, samples: int, batch: int, micro: int, generator: torch.Generator) -> None:
        self.samples, self.batch, self.micro, self.generator = samples, batch, micro, generator

    def __len__(self) -> int:
        return self.samples // self.batch * (self.batch // self.micro)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.samples, generator=self.generator).tolist()
        for start in range(0, len(self) * self.micro, self.micro):
            yield order[start : start + self.micro]


@dataclass
class _Setting:
    """Everything that is the same for all methods."""

    make_model: Callable[[], nn.Module]
    train: Any
    test: Any
    classes: int
    batch: int
    options: dict[str, Any]
    device: torch.device
    workers: int
    _batch: tuple[State, Tensor] | None = field(default=None, repr=False)

    def loader(self, micro: int, seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            self.train,
            batch_sampler=_Batches(len(self.train), self.batch, micro, generator),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=generator,
        )

    def example(self) -> tuple[State, Tensor]:
        """A batch: input and labels."""
        if self._batch is None:
            self._batch = read_batch(next(iter(self.loader(self.batch, 0))), self.device)
        return self._batch

    def chain(self, plan: _Plan, seed: int = 0) -> Chain:
        torch.manual_seed(seed)
        chain = split(self.make_model().to(self.device), plan.spec, example=batch_of(self.example()[0], 2))
        return checkpointed(chain, plan.starts) if plan.starts else chain

    def predict(self, plan: _Plan, micro: int, measure: bool = False) -> MemoryReport:
        inputs, target = self.example()
        return memory_report(
            self.chain(plan),
            plan.method,
            inputs,
            self.classes,
            target=target,
            batch_size=micro,
            accumulate=self.batch // micro,
            measure=measure,
            **self.options,
        )

    def fit_to(self, plan: _Plan, limit: int) -> tuple[_Plan | None, str]:
        """The plan with sizes that keep the limit, or why there are none."""
        if plan.recompute:
            plan = min((replace(plan, starts=starts) for starts in self.groupings(plan)), key=self.need)
        if not plan.fits:
            return replace(plan, micro=self.batch, predicted=self.need(plan)), ""
        needs = []
        for micro in (m for m in range(self.batch, min(self.batch, 2) - 1, -1) if self.batch % m == 0):
            try:
                report = self.predict(plan, micro)
            except BudgetError as error:
                needs.append(error.smallest)
                continue
            needs.append(report.total)
            if report.total <= limit:
                return replace(plan, micro=micro, predicted=report.total, method=_sized(plan.method, report)), ""
        return None, f"does not fit: it needs {min(needs) / _MB:.4g} MB with whatever micro-batch"

    def need(self, plan: _Plan) -> int:
        return self.predict(plan, self.batch).total

    def groupings(self, plan: _Plan) -> list[tuple[int, ...]]:
        """Ways to cut the chain into groups that keep alike much, from two groups up to one per unit."""
        chain = self.chain(plan)
        costs = unit_costs(chain, batch_of(self.example()[0], min(self.batch, 2)), "memory")
        counts = sorted({min(len(chain), round(1.5**i)) for i in range(2, 20)})
        return [tuple(balance(costs, count)) for count in counts]

    def run(self, plan: _Plan, seed: int, measure: bool) -> dict[str, Any]:
        """Train and test; of the first seed, also the peak."""
        peak = None
        if measure and self.device.type != "cuda":
            peak = self.predict(plan, plan.micro, measure=True).total
        chain, loader = self.chain(plan, seed), self.loader(plan.micro, seed)
        trainer = LayerwiseTrainer(
            chain,
            plan.method,
            classes=self.classes,
            accumulate=self.batch // plan.micro,
            progress=False,
            **self.options,
        )
        start = time.perf_counter()
        if self.device.type == "cuda":
            resident = [*chain.parameters(), *(b for m in chain.modules() for b in m.buffers())]
            peak = measure_memory(lambda: trainer.fit(loader), resident, device=self.device).total
        else:
            trainer.fit(loader)
        seconds = time.perf_counter() - start
        test = DataLoader(self.test, self.batch, num_workers=self.workers)
        return {
            "seed": seed,
            "accuracy": trainer.evaluate(test),
            "seconds": seconds,
            "peak": peak,
            "passes": sum(stage.epochs for stage in trainer.stages),
        }
