"""Tables of numbers in CSV files with a header."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from platonic.datasets.base import CLASSIFICATION, REGRESSION, Dataset, PathLike

_MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})  # compared in lower case


def load_csv(path: PathLike, target: str | None = None, *, task: str | None = None, delimiter: str = ",") -> Dataset:
    """Load a table of numbers with a header line and one column to predict.

    Parameters
    ----------
    path : path-like
        Text in UTF-8; quotes as in RFC 4180.
    target : str or None
        Name of the column to predict, None for the last one.
    task : {'classification', 'regression'} or None
        None: regression if the target is numeric with a fractional value somewhere, else classification.
    delimiter : str
        What separates the columns.

    Returns
    -------
    Dataset
        X float64 of shape (m, columns - 1), without a split. y float64 for regression; for classification int64 if
        every target is a whole number, else strings.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        Naming line and column: a value that is missing or infinite, a feature that is not a number, a line of another
        length, no rows, an unknown target.
    """
    path = Path(path)
    if task not in (None, CLASSIFICATION, REGRESSION):
        raise ValueError(f"expected task to be None, 'classification' or 'regression', got {task!r}")
    names, rows, lines = _read_table(path, delimiter)
    if target is None:
        target = names[-1]
    if target not in names:
        raise ValueError(f"{path}: no column {target!r}; its columns are {', '.join(names)}")
    chosen = names.index(target)
    features = [i for i in range(len(names)) if i != chosen]
    X = np.empty((len(rows), len(features)))
    for j, i in enumerate(features):
        X[:, j] = _numeric_column(path, names[i], [row[i] for row in rows], lines)
    y = _target_column(path, target, [row[chosen] for row in rows], lines, task)
    task = REGRESSION if y.dtype.kind == "f" else CLASSIFICATION
    description = f"{len(X)} rows of {path}, predicting {target!r}"
    return Dataset(path.stem, X, y, None, None, task, None, [names[i] for i in features], description)


def load_columns(
    path: PathLike,
    names: Sequence[str] | None,
    target: str | None = None,
    *,
    labels: bool = False,
    delimiter: str = ",",
) -> tuple[np.ndarray, np.ndarray | None]:
    """Load what a fitted model predicts from: named columns of a table, which may have others too.

    Parameters
    ----------
    path : path-like
        As in :func:`load_csv`.
    names : sequence of str or None
        The columns to read, in this order; None for all but the target, in the file's order.
    target : str or None
        A column with the true values, None if there is none.
    labels : bool
        Return the target as the strings in the file rather than as numbers.
    delimiter : str
        What separates the columns.

    Returns
    -------
    X : ndarray of shape (m, columns), float64
    y : ndarray of shape (m,) or None
        Strings (`labels`) or float64.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`load_csv`; also for a column that is not there.
    """
    path = Path(path)
    columns, rows, lines = _read_table(path, delimiter, least=1)
    names = [name for name in columns if name != target] if names is None else list(names)
    for name in [*names, *([] if target is None else [target])]:
        if name not in columns:
            raise ValueError(f"{path}: no column {name!r}; its columns are {', '.join(columns)}")
    X = np.empty((len(rows), len(names)))
    for j, name in enumerate(names):
        i = columns.index(name)
        X[:, j] = _numeric_column(path, name, [row[i] for row in rows], lines)
    if target is None:
        return X, None
    cells = [row[columns.index(target)] for row in rows]
    return X, np.array(cells) if labels else _numeric_column(path, target, cells, lines)


def _read_table(path: Path, delimiter: str, least: int = 2) -> tuple[list[str], list[list[str]], list[int]]:
    """Column names, rows of as many stripped cells, and the line on which each row ends."""
    rows: list[list[str]] = []
    lines: list[int] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            names = _check_header(path, next(reader, []), delimiter, least)
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise ValueError(f"{path}, line {reader.line_num}: {len(cells)} cells, the header has {len(names)}")
                rows.append([cell.strip() for cell in cells])
                lines.append(reader.line_num)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not readable as CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not text in UTF-8: {error}") from error
    if not rows:
        raise ValueError(f"{path}: no rows below the header")
    return names, rows, lines


def _check_header(path: Path, cells: list[str], delimiter: str, least: int) -> list[str]:
    names = [cell.strip() for cell in cells]
    others = [other for other in ";\t|," if other != delimiter and other in "".join(names)]
    if len(names) < least or (len(names) == 1 and others):
        hint = f"; pass delimiter={others[0]!r}?" if others else ""
        wanted = "two or more columns" if least == 2 else "the columns"
        raise ValueError(f"{path}: expected a header naming {wanted}, got {names}{hint}")
    for i, name in enumerate(names):
        if not name:
            raise ValueError(
                f"{path}: column {i + 1} has no name in the header (row numbers? write the file without them)"
            )
        if names.index(name) != i:
            raise ValueError(f"{path}: the header has two columns {name!r}")
    if all(_to_float(name) is not None for name in names):
        raise ValueError(f"{path}: expected a header line of column names, got the numbers {', '.join(names)}"[:400])
    return names


def _to_float(cell: str) -> float | None:
    """The number that `cell` writes, None if it is none. Python's 1_000 is none: in a table it is a label."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _numeric_column(path: Path, name: str, cells: list[str], lines: list[int]) -> np.ndarray:
    """The finite numbers of a column, or an error that names the first cell that is none."""
    values = [_to_float(cell) for cell in cells]
    for value, cell, line in zip(values, cells, lines, strict=True):
        if cell.lower() in _MISSING:
            raise _missing_value(path, name, cell, line)
        if value is None:
            raise ValueError(
                f"{path}, line {line}: column {name!r} is not numeric, it holds {cell!r:.80}: one-hot encode it first, "
                "or drop it"
            )
        if not math.isfinite(value):
            raise ValueError(f"{path}, line {line}: column {name!r} holds {cell!r}, which is not finite")
    return np.array(values, np.float64)


def _missing_value(path: Path, name: str, cell: str, line: int) -> ValueError:
    return ValueError(
        f"{path}, line {line}: column {name!r} has a missing value ({cell!r}): fill it in or drop the row"
    )


def _target_column(path: Path, name: str, cells: list[str], lines: list[int], task: str | None) -> np.ndarray:
    """float64 for regression, else int64 or strings. 'NA' among words is a class, among numbers a missing value."""
    words = [cell for cell in cells if _to_float(cell) is None and cell.lower() not in _MISSING]
    if task == REGRESSION or not words:
        values = _numeric_column(path, name, cells, lines)
        whole = bool(np.all(values == np.floor(values)))
        if task == REGRESSION or (task is None and not whole):
            return values
        if whole and np.abs(values).max() < 2**53:
            return values.astype(np.int64)
    if "" in cells:
        raise _missing_value(path, name, "", lines[cells.index("")])
    return np.array(cells)
