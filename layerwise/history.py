"""What happened, a row per window and epoch."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["History", "TensorBoardCallback", "format_table"]

_SCALARS = ("lr", "loss", "train_accuracy", "validation_accuracy", "seen", "seconds")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def format_table(rows: list[dict[str, Any]], columns: list[str] | None = None) -> str:
    """Rows as aligned text under their names; numbers to four digits."""
    if not rows:
        return "(empty)"
    columns = columns or list(rows[0])
    cells = [columns, *([_text(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in cells)


class History:
    """Rows of what each window reached in each epoch.

    Columns: ``stage``, ``round``, ``first`` and ``last`` unit of the window, ``epoch`` of the window, ``lr``, ``loss`` (mean
    over the samples it saw), ``train_accuracy`` (in training mode, while it changed), ``validation_accuracy`` (None without
    validation data), ``seen`` (share of the data that filtering let through) and ``seconds`` (of the whole pass over the data,
    which its stage's windows share).
    """

    def __init__(self, rows: list[dict[str, Any]] | None = None) -> None:
        self.rows = rows or []

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def last_rows(self) -> list[dict[str, Any]]:
        """The last row of every window, in order of the units."""
        latest = {(row["first"], row["last"]): row for row in self.rows}
        return [latest[key] for key in sorted(latest)]

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """The rows as comma-separated text, also written to `path` if it is given."""
        out = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(out, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        if path is not None:
            Path(path).write_text(out.getvalue())
        return out.getvalue()

    def __str__(self) -> str:
        return format_table(self.rows)


class TensorBoardCallback:
    """Writes every new row of the history to TensorBoard; for ``LayerwiseTrainer(..., callbacks=[...])``.

    A window has scalars of its own, such as ``units 3/loss`` or, of several units, ``units 3 to 4/loss``: learning rate, loss,
    accuracies in training and validation, share of samples seen and seconds, against the window's epochs.

    >>> from torch.utils.tensorboard import SummaryWriter
    >>> callbacks = [TensorBoardCallback(SummaryWriter("runs/dll"))]

    Parameters
    ----------
    writer : torch.utils.tensorboard.SummaryWriter
        Or anything else with ``add_scalar(tag, value, step)``.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __call__(self, _trainer: Any, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            first, last = row["first"], row["last"]
            units = f"units {first}" if first == last else f"units {first} to {last}"
            for name in _SCALARS:
                if row[name] is not None:
                    self.writer.add_scalar(f"{units}/{name}", row[name], row["epoch"])
