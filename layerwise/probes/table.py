"""What a probe found: a row per layer, and where layers do not go the way they should."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from layerwise.history import History, format_table
from layerwise.probes.pca import Projection

__all__ = ["ProbeTable", "Violation"]


class Violation(NamedTuple):
    """A measure that goes the wrong way from one layer to the next.

    Attributes
    ----------
    measure : str
        Column.
    layer : int
        The layer whose value is the worse one.
    name : str
        Its unit's name.
    before, value : float
        The value of the layer below it, and its own.
    """

    measure: str
    layer: int
    name: str
    before: float
    value: float

    def __str__(self) -> str:
        direction = "rises" if self.value > self.before else "falls"
        return f"{self.measure} {direction} at layer {self.layer} ({self.name}): {self.before:.4g} to {self.value:.4g}"


class ProbeTable:
    """Rows by layer, from the input up.

    Columns: ``layer``, 0 for the network's input, 1 for the output of the first unit; ``name`` of the unit; ``shape`` without
    the batch; then those of the measures. A measure that a row does not have is None.

    Parameters
    ----------
    rows : list of dict
        In order.
    trends : mapping
        Columns of measures to 1, -1 or 0: whether they should rise, fall, or neither, from layer to layer.
    projections : mapping, optional
        Layers to samples on principal components, if these were asked for.
    streamed, sampled : int
        Samples that measures of a stream saw, and those of a subsample; 0 if there were none.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        trends: Mapping[str, int],
        projections: Mapping[int, Projection] | None = None,
        *,
        streamed: int = 0,
        sampled: int = 0,
    ) -> None:
        self.rows = rows
        self.trends = dict(trends)
        self.projections = dict(projections or {})
        self.streamed = streamed
        self.sampled = sampled

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, measure: str) -> list[Any]:
        """A measure's values, in order of the rows.

        Raises
        ------
        KeyError
            If it was not taken.
        """
        if measure not in self.trends:
            raise KeyError(f"no measure {measure!r} in this table; there are {', '.join(self.trends)}")
        return [row[measure] for row in self.rows]

    def violations(self, tolerance: float = 0.0) -> list[Violation]:
        """Where a measure goes the wrong way by more than `tolerance`, against the last row below that has it.

        Expected through the layers of a trained network: least squares distance, conditional entropy and pure entropy
        fall (equations 5.2, 5.7 and 5.4 of the thesis), k-redundancy and separability rise.
        """
        found = []
        for measure, trend in self.trends.items():
            before = None
            for row in self.rows if trend else []:
                value = row[measure]
                if value is None or value != value:
                    continue
                if before is not None and trend * (before - value) > tolerance:
                    found.append(Violation(measure, row["layer"], row["name"], before, value))
                before = value
        return found

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """The rows as comma-separated text, also written to `path` if it is given."""
        return History(self.rows).to_csv(path)

    def __str__(self) -> str:
        """The rows as text, and below them the violations."""
        return "\n".join([format_table(self.rows), *map(str, self.violations())])
