"""Looking at a network, unit by unit, without a trace: modes, random generators and gradients stay as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from layerwise.checkpoint import rng_state, set_rng_state
from layerwise.feednet import Batch, generators_of, read_batch
from layerwise.layouts import as_seen, channel_axes
from layerwise.probes.measures import Measure, Samples, Stream, make_measures
from layerwise.probes.pca import Projection
from layerwise.probes.table import ProbeTable
from layerwise.splitting import Spec, split
from layerwise.units import Chain, State, main_tensor

__all__ = ["probe"]


def probe(
    model: nn.Module | Chain,
    loader: Iterable[Any],
    *,
    measures: str | Measure | Sequence[str | Measure] = ("lsd", "k_redundancy", "conditional_entropy", "stable_rank"),
    test_loader: Iterable[Any] | None = None,
    max_samples: int = 2000,
    include_input: bool = True,
    spec: Spec = "auto",
    seed: int = 0,
) -> ProbeTable:
    """Measure the output of every unit of a network on the same samples, in eval mode.

    Measures that can do with sums (least squares distance, conditional entropy) see the whole loader, once. For the others,
    at most `max_samples` inputs are drawn from it at random and led through the units one after the other, so that no more
    than one unit's representation of them is held.

    Parameters
    ----------
    model : Module or Chain
        Of units, as a trainer has (``trainer.chain``), or to be cut into units.
    loader : iterable
        Pairs (input, labels) in batches; labels (B,) are class numbers.
    measures : str, Measure or sequence of these
        Names, with default settings: "lsd", "linear_separability", "cnn_separability", "k_redundancy",
        "conditional_entropy", "stable_rank", "pure_entropy", "pca"; or measures with settings of their own, such as
        ``KRedundancy(k=(5, 10, 20))``.
    test_loader : iterable, optional
        Samples that separability is scored on; needed by it alone. At most `max_samples` are drawn.
    max_samples : int, default=2000
        Of each loader, for measures that need them at once.
    include_input : bool, default=True
        Whether the network's input, if it is of floating point, makes the first row.
    spec : default="auto"
        How a module is cut into units; see :func:`~layerwise.split`. "auto" leaves the last linear layer with the unit below it.
    seed : int, default=0
        Of the draws.

    Returns
    -------
    ProbeTable
        A row per unit, and one of the input.

    Raises
    ------
    ValueError
        If a measure is unknown, needs a test loader that is not there, or a loader is empty.
    """
    chosen = make_measures(measures)
    if max_samples < 1:
        raise ValueError(f"max_samples: expected a positive number, got {max_samples}")
    if test_loader is None and any(measure.needs_test for measure in chosen):
        wanting = next(type(measure).__name__ for measure in chosen if measure.needs_test)
        raise ValueError(f"{wanting} is scored on samples that it was not fitted to; give test_loader")
    chain = model if isinstance(model, Chain) else split(model, spec)
    with _unchanged(chain, loader, test_loader):
        return _Probe(chain, chosen, max_samples, include_input, seed).run(loader, test_loader)


@contextmanager
def _unchanged(chain: Chain, *loaders: Any) -> Iterator[None]:
    """Eval mode, no gradients; afterwards modes and random generators are what they were."""
    modes = [(module, module.training) for unit in chain for module in unit.modules()]
    generators = [g for loader in loaders for g in generators_of(loader)]
    before = rng_state(*generators)
    chain.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        set_rng_state(before, *generators)


class _Probe:
    """One probe: the measures sorted by kind, and the rows as they fill."""

    def __init__(self, chain: Chain, measures: list[Measure], max_samples: int, include_input: bool, seed: int) -> None:
        self.chain = chain
        self.device = next(chain.parameters()).device
        self.measures = measures
        self.kinds = {kind: [m for m in measures if m.kind == kind] for kind in ("stream", "samples", "weights")}
        self.max_samples = max_samples
        self.include_input = include_input
        self.generator = torch.Generator().manual_seed(seed)
        self.axes: list[int | None] = []  # where the input and what leaves each unit have channels
        self.rows: list[dict[str, Any]] = []
        self.projections: dict[int, Projection] = {}

    def run(self, loader: Iterable[Any], test_loader: Iterable[Any] | None) -> ProbeTable:
        drawn = _Draw(self.max_samples, self.generator)
        tested = _Draw(self.max_samples, self.generator)
        streamed = self._stream(loader, drawn)
        if self.kinds["samples"]:
            if test_loader is not None and any(m.needs_test for m in self.kinds["samples"]):
                for batch in self._read(test_loader):
                    tested.add(batch)
                if not tested.seen:
                    raise ValueError("test_loader: expected at least one batch, got none")
            self._samples(drawn, tested if tested.seen else None)
        for row in self.rows:
            for measure in self.kinds["weights"]:
                if row["layer"]:
                    row.update(measure.of_weights(self.chain[row["layer"] - 1]))
        trends = {column: trend for measure in self.measures for column, trend in measure.trends.items()}
        ordered = [{key: row.get(key) for key in ("layer", "name", "shape", *trends)} for row in self.rows]
        return ProbeTable(
            ordered,
            trends,
            self.projections,
            streamed=streamed if self.kinds["stream"] else 0,
            sampled=len(drawn) if self.kinds["samples"] else 0,
        )

    def _read(self, loader: Iterable[Any]) -> Iterator[Batch]:
        for batch in loader:
            state, target = read_batch(batch, self.device)
            if target.dim() != 1 or target.is_floating_point():
                raise ValueError(
                    f"loader: expected class numbers (B,) as labels, got {target.dtype} {tuple(target.shape)}"
                )
            yield state, target

    def _begin_rows(self, states: Iterable[tuple[int, Tensor]]) -> None:
        names = ["input", *self.chain.names]
        for number, Z in states:
            self.rows.append({"layer": number, "name": names[number], "shape": "x".join(map(str, Z.shape[1:]))})

    def _outputs(self, state: State) -> Iterator[tuple[int, Tensor]]:
        """Layers and what leaves them, the input as layer 0 if it makes a row."""
        if self.include_input and main_tensor(state).is_floating_point():
            yield 0, main_tensor(state)
        for number, unit in enumerate(self.chain, 1):
            state = unit(state)
            yield number, main_tensor(state)

    def _seen(self, number: int, Z: Tensor) -> Tensor:
        """What measures see of what leaves a layer."""
        return as_seen(Z, self.axes[number], self.chain.names[number - 1] if number else "input")

    def _stream(self, loader: Iterable[Any], drawn: _Draw) -> int:
        """One pass over the loader: sums of every unit, and inputs for the measures that need them at once."""
        sums: dict[int, list[Stream]] = {}
        samples = 0
        for state, target in self._read(loader):
            if not samples:
                self._begin_rows(self._outputs(state))
                self.axes = channel_axes(self.chain, state)
            samples += len(target)
            if self.kinds["samples"]:
                drawn.add((state, target))
            if not self.kinds["stream"]:
                if not self.kinds["samples"]:
                    break  # the weights are enough
                continue
            for number, Z in self._outputs(state):
                if number not in sums:
                    sums[number] = [m.stream() for m in self.kinds["stream"] if number or m.of_input]
                for each in sums[number]:
                    each.update(self._seen(number, Z), target)
        if not samples:
            raise ValueError("loader: expected at least one batch, got none")
        for row in self.rows:
            for each in sums.get(row["layer"], []):
                row.update(each.values())
        return samples

    def _samples(self, drawn: _Draw, tested: _Draw | None) -> None:
        walks = [self._walk(draw) for draw in (drawn, tested) if draw is not None]
        labels = [draw.labels for draw in (drawn, tested) if draw is not None]
        for row, outputs in zip(self.rows, zip(*walks, strict=True), strict=True):
            samples = Samples(*(part for pair in zip(outputs, labels, strict=True) for part in pair))
            for measure in self.kinds["samples"]:
                if row["layer"] or measure.of_input:
                    found = measure.of_samples(samples)
                    if "projection" in found:
                        self.projections[row["layer"]] = found.pop("projection")
                    row.update(found)
            del samples, outputs

    def _walk(self, draw: _Draw) -> Iterator[Tensor]:
        """Every row's representation of the drawn samples, one alive at a time beside the states that go on."""
        states = draw.batches()
        if self.rows[0]["layer"] == 0:
            yield self._seen(0, torch.cat([main_tensor(state) for state in states]))
        for number, unit in enumerate(self.chain, 1):
            for i, state in enumerate(states):
                states[i] = unit(state)
            yield self._seen(number, torch.cat([main_tensor(state) for state in states]))


class _Draw:
    """A random subset of a stream of batches, of at most so many samples (reservoir sampling), in random order."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size = size
        self.generator = generator
        self.seen = 0
        self.batch = 0  # samples in the first one
        self.spec: Any = None
        self.kept: list[Tensor] = []  # the leaves of (input, labels), a sample in every place
        self._order: Tensor | None = None

    def __len__(self) -> int:
        return min(self.seen, self.size)

    def add(self, batch: Batch) -> None:
        leaves, self.spec = tree_flatten(batch)
        count = len(batch[1])
        if not all(isinstance(leaf, Tensor) and leaf.shape[:1] == (count,) for leaf in leaves):
            raise ValueError(f"loader: expected an input of tensors with a row for each of {count} labels")
        if not self.kept:
            self.batch, self.kept = count, [leaf[:0] for leaf in leaves]
        for kept, leaf in zip(self.kept, leaves, strict=True):
            if kept.shape[1:] != leaf.shape[1:]:
                raise ValueError(
                    f"loader: expected samples of one shape, got {tuple(kept.shape[1:])} and {tuple(leaf.shape[1:])}"
                )
        new = min(count, self.size - len(self))  # go to new places
        if new:
            self.kept = [torch.cat([kept, leaf[:new]]) for kept, leaf in zip(self.kept, leaves, strict=True)]
        numbers = torch.arange(self.seen + new + 1, self.seen + count + 1)
        draws = (torch.rand(count - new, generator=self.generator, dtype=torch.float64) * numbers).long().tolist()
        taken = {place: row for row, place in enumerate(draws, new) if place < self.size}  # the last one stays
        if taken:
            places, rows = torch.tensor(list(taken)), torch.tensor(list(taken.values()))
            for kept, leaf in zip(self.kept, leaves, strict=True):
                kept[places.to(kept.device)] = leaf[rows.to(leaf.device)]
        self.seen += count

    @property
    def order(self) -> Tensor:
        if self._order is None:
            self._order = torch.randperm(len(self), generator=self.generator)
        return self._order

    @property
    def labels(self) -> Tensor:
        return self.kept[-1][self.order.to(self.kept[-1].device)]

    def batches(self) -> list[State]:
        """The inputs in batches as large as the first one that came."""
        return [
            tree_unflatten([kept[rows.to(kept.device)] for kept in self.kept], self.spec)[0]
            for rows in self.order.split(max(1, self.batch))
        ]
