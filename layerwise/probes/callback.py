"""Probes while a network trains: a table per epoch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from layerwise.history import History
from layerwise.probes.measures import Measure
from layerwise.probes.probing import probe
from layerwise.probes.table import ProbeTable
from layerwise.splitting import Spec, split
from layerwise.units import Chain

__all__ = ["ProbeCallback"]


class ProbeCallback:
    """Probes a network every few epochs; for ``LayerwiseTrainer(..., callbacks=[...])`` or a loop of one's own.

    >>> watch = ProbeCallback(loader, measures="lsd")
    >>> watch.record(model)  # before training
    >>> for epoch in range(10):
    ...     mse = train(model)
    ...     watch.record(model, mse=mse)
    >>> plot_by_epoch(watch, "lsd", scalar="mse")

    Training goes on as if nothing had been looked at: see :func:`~layerwise.probes.probe`. A trainer's checkpoint does not hold
    what was recorded.

    Parameters
    ----------
    loader : iterable
        What is probed with. Its order should not change: then every epoch is measured on the same samples.
    measures : str, Measure or sequence of these, default="lsd"
        See :func:`~layerwise.probes.probe`, as for the further options.
    every : int, default=1
        A trainer's epochs, over all its stages, from one probe to the next.
    spec : default="auto"
        How :meth:`record` cuts a module into units.
    **options
        ``test_loader``, ``max_samples``, ``include_input``, ``seed``.

    Attributes
    ----------
    tables : dict of int to ProbeTable
        By epoch.
    scalars : dict of int to dict
        By epoch: what :meth:`record` was given, or a trainer's ``loss`` and ``validation_accuracy`` of the window trained last.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        measures: str | Measure | Sequence[str | Measure] = "lsd",
        every: int = 1,
        spec: Spec = "auto",
        **options: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        unknown = set(options) - {"test_loader", "max_samples", "include_input", "seed"}
        if unknown:
            raise TypeError(f"ProbeCallback has no options {', '.join(sorted(unknown))}; see layerwise.probes.probe")
        self.loader = loader
        self.measures = measures
        self.every = every
        self.spec = spec
        self.options = options
        self.tables: dict[int, ProbeTable] = {}
        self.scalars: dict[int, dict[str, Any]] = {}
        self._epochs = 0  # of a trainer
        self._model: nn.Module | None = None
        self._chain: Chain | None = None

    def __call__(self, trainer: Any, rows: list[dict[str, Any]]) -> None:
        self._epochs += 1
        if self._epochs % self.every == 0:
            last = {key: rows[-1][key] for key in ("loss", "validation_accuracy")}
            self.record(trainer.chain, epoch=self._epochs, **last)

    def record(self, model: nn.Module | Chain, *, epoch: int | None = None, **scalars: Any) -> ProbeTable:
        """Probe now.

        Parameters
        ----------
        model : Module or Chain
        epoch : int, optional
            Under which the table is kept; None: one after the last one, 0 at first.
        **scalars
            Numbers to keep beside it, such as the loss.

        Raises
        ------
        ValueError
            If there is a table of this epoch already.
        """
        if epoch is None:
            epoch = max(self.tables, default=-1) + 1
        if epoch in self.tables:
            raise ValueError(f"epoch {epoch} has been recorded already")
        table = probe(self._chain_of(model), self.loader, measures=self.measures, **self.options)
        self.tables[epoch], self.scalars[epoch] = table, scalars
        return table

    def _chain_of(self, model: nn.Module | Chain) -> Chain:
        if isinstance(model, Chain):
            return model
        if self._chain is None or self._model is not model:
            self._model, self._chain = model, split(model, self.spec)
        return self._chain

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row per epoch and layer: ``epoch``, the table's columns, and the scalars."""
        names = dict.fromkeys(name for scalars in self.scalars.values() for name in scalars)
        return [
            {"epoch": epoch, **row, **{name: self.scalars[epoch].get(name) for name in names}}
            for epoch, table in self.tables.items()
            for row in table.rows
        ]

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """:attr:`rows` as comma-separated text, also written to `path` if it is given."""
        return History(self.rows).to_csv(path)
