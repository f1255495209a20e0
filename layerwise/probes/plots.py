"""Figures of probes: by layer, by epoch, scatters of representations, Voronoi maps. Needs matplotlib, the extra "plot"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from scipy.spatial import Voronoi

from layerwise.probes.table import ProbeTable
from layerwise.probes.voronoi import PureVoronoiMap
from platonic.plots import COLOURS
from platonic_core.figures import new_figure

__all__ = ["plot_by_epoch", "plot_by_layer", "plot_scatter", "plot_voronoi"]

_LABELS = {
    "lsd": "least squares distance",
    "lsd_intercept": "least squares distance, with intercept",
    "conditional_entropy": "H(Y|Z), bits",
    "empty_features": "features that select nothing",
    "linear_separability": "linear separability (test accuracy)",
    "stable_rank": "stable rank",
    "pure_entropy": "pure entropy, bits",
    "pure_cells": "cells of the pure map",
    "mse": "mean squared error",
}
_MOST_POINTS = 2000
_RING = "0.25"
_LIGHT = ("#9fc8ee", "#ffd584", "#e0918a")  # cells behind the points of the first three classes


class Recorded(Protocol):
    """What :class:`~layerwise.probes.ProbeCallback` records."""

    tables: dict[int, ProbeTable]
    scalars: dict[int, dict[str, Any]]


def _label(measure: str) -> str:
    if measure.startswith("k_redundancy_"):
        return f"k-redundancy, k = {measure.removeprefix('k_redundancy_')}"
    return _LABELS.get(measure, measure.replace("_", " "))


def _colours(count: int) -> list[Any]:
    """As many colours told apart as there are lines, or, of many lines, a sequence from the first to the last."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.95, count)))


def _open_frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_by_layer(tables: ProbeTable | Mapping[str, ProbeTable], measures: str | Sequence[str]) -> Any:
    """Measures by layer (figures 5.14 and 6.3).

    Parameters
    ----------
    tables : ProbeTable or mapping of str to ProbeTable
        A line for each, under its name: of several epochs, or of networks trained in different ways.
    measures : str or sequence of str
        A panel for each.

    Returns
    -------
    matplotlib.figure.Figure
        Values that go against the measure's trend have a ring around them.
    """
    lines = {"_": tables} if isinstance(tables, ProbeTable) else dict(tables)
    measures = [measures] if isinstance(measures, str) else list(measures)
    if not lines or not measures:
        raise ValueError("expected at least one table and one measure, got none")
    ringed = any(v.measure in measures for table in lines.values() for v in table.violations())
    beside = 1.9 if ringed or len(lines) > 1 or "_" not in lines else 0.0  # room for the legend, in inches
    figure = new_figure(0.6 + 4.0 * len(measures) + beside, 3.6)
    from matplotlib.ticker import MaxNLocator

    shares = all(measure.startswith("k_redundancy") for measure in measures)
    panels = figure.subplots(1, len(measures), squeeze=False, sharey=shares)[0]
    for axes, measure in zip(panels, measures, strict=True):
        with_input = False
        for (name, table), colour in zip(lines.items(), _colours(len(lines)), strict=True):
            values = table.column(measure)
            points = [(row["layer"], v) for row, v in zip(table.rows, values, strict=True) if v is not None]
            at, heights = zip(*points, strict=True) if points else ((), ())
            with_input |= 0 in at
            marker = "o" if len(points) <= 40 else ""
            axes.plot(at, heights, color=colour, marker=marker, markersize=4, linewidth=1.6, label=name)
            wrong = [(v.layer, v.value) for v in table.violations() if v.measure == measure]
            if wrong:
                axes.scatter(*zip(*wrong, strict=True), s=70, facecolors="none", edgecolors=_RING, zorder=3)
        axes.set(xlabel="layer (0: input)" if with_input else "layer", ylabel=_label(measure))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _open_frame(axes)
    if beside:
        _explain(figure, axes, ringed)
    return figure


def _explain(figure: Any, axes: Any, ringed: bool) -> None:
    """A legend of the lines that have names, and of the rings."""
    from matplotlib.lines import Line2D

    handles = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    if ringed:
        ring = Line2D([], [], marker="o", markersize=8, linestyle="", label="against the trend")
        ring.set(markerfacecolor="none", markeredgecolor=_RING)
        handles.append(ring)
    figure.legend(handles=handles, loc="outside right upper", frameon=False)


def plot_by_epoch(
    record: Recorded, measure: str, *, scalar: str | None = None, layers: Iterable[int] | None = None
) -> Any:
    """A measure of layers against the epoch (figure 5.6), and beside it a scalar recorded with it (figure 5.21).

    Parameters
    ----------
    record : ProbeCallback
        With at least one table.
    measure : str
        Column.
    scalar : str, optional
        Name of a scalar.
    layers : iterable of int, optional
        Which, 0 being the input; all that have the measure if left out.
    """
    if not record.tables:
        raise ValueError("nothing has been recorded yet")
    figure = new_figure(6.4 if scalar is None else 10.4, 3.8)
    from matplotlib.ticker import MaxNLocator

    panels = figure.subplots(1, 1 if scalar is None else 2, squeeze=False)[0]
    epochs = list(record.tables)
    columns = [table.column(measure) for table in record.tables.values()]
    rows = next(iter(record.tables.values())).rows
    wanted = {row["layer"] for row in rows} if layers is None else set(layers)
    shown = [i for i, row in enumerate(rows) if row["layer"] in wanted and any(c[i] is not None for c in columns)]
    if not shown:
        raise ValueError(f"{measure} was recorded of none of the layers {sorted(wanted)}")
    marker = "o" if len(epochs) <= 25 else ""
    for i, colour in zip(shown, _colours(len(shown)), strict=True):
        name = rows[i]["name"] if rows[i]["layer"] == 0 else f"{rows[i]['layer']}: {rows[i]['name']}"
        values = [np.nan if column[i] is None else column[i] for column in columns]
        panels[0].plot(epochs, values, color=colour, marker=marker, markersize=4, linewidth=1.6, label=name)
    panels[0].legend(title="layer", frameon=False, ncols=1 if len(shown) <= 8 else 2, fontsize=9)
    panels[0].set_ylabel(_label(measure))
    if scalar is not None:
        known = {epoch: s[scalar] for epoch, s in record.scalars.items() if s.get(scalar) is not None}
        if not known:
            raise ValueError(f"no scalar {scalar!r} was recorded; pass it to record({scalar}=...)")
        panels[1].plot(list(known), list(known.values()), color="black", marker=marker, markersize=4, linewidth=1.6)
        panels[1].set_ylabel(_label(scalar))
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _open_frame(axes)
    return figure


def plot_scatter(
    table: ProbeTable,
    *,
    layers: Iterable[int] | None = None,
    class_names: Sequence[str] | None = None,
    columns: int = 3,
) -> Any:
    """Representations on their first two principal components, a panel per layer (figure 5.9).

    Parameters
    ----------
    table : ProbeTable
        Taken with the measure "pca".
    layers : iterable of int, optional
        Which, 0 being the input; all if left out.
    class_names : sequence of str, optional
        Of classes 0, 1, ...; numbers if left out.
    columns : int, default=3
        Panels in a row.
    """
    if not table.projections:
        raise ValueError("the table has no projections; take it with measures='pca'")
    chosen = sorted(table.projections) if layers is None else list(layers)
    missing = [layer for layer in chosen if layer not in table.projections]
    if missing or not chosen:
        raise ValueError(f"no projections of layers {missing}; there are {sorted(table.projections)}")
    names = {row["layer"]: row["name"] for row in table.rows}
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    columns = min(columns, len(chosen))
    down = -(-len(chosen) // columns)
    figure = new_figure(2.7 * columns + 1.3, 2.8 * down)
    grid = figure.subplots(down, columns, squeeze=False).ravel()
    classes = torch.unique(table.projections[chosen[0]].labels).tolist()
    colours = dict(zip(classes, _colours(len(classes)), strict=True))
    for axes, layer in zip(grid, chosen, strict=False):
        found = table.projections[layer]
        points, labels = found.points[:_MOST_POINTS].numpy(), found.labels[:_MOST_POINTS].tolist()
        paint = [colours[c] for c in labels]
        axes.scatter(*points.T[:2], c=paint, s=float(np.clip(6000 / len(points), 4, 16)), linewidths=0, alpha=0.8)
        axes.set_title("input" if layer == 0 else f"{layer}: {names[layer]}", fontsize=11)
        axes.set_xlabel(f"{100 * found.share:.0f} % of variance", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.margins(0.05)
    for axes in grid[len(chosen) :]:
        axes.set_visible(False)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colours[c], label=str(c) if class_names is None else class_names[c])
        for c in classes[:: -(-len(classes) // 20)]  # of many classes, some
    ]
    for handle in handles:
        handle.set(marker="o", linestyle="", markersize=6)
    figure.legend(handles=handles, loc="outside right center", frameon=False, title="class", handletextpad=0.1)
    return figure


def plot_voronoi(problems: Mapping[str, tuple[Any, Any, PureVoronoiMap]]) -> Any:
    """Pure Voronoi maps of points in the plane (figures 5.11 and 5.12): samples, cells with samples, cells with centroids.

    Parameters
    ----------
    problems : mapping of str to (Z (N, 2), y (N,), PureVoronoiMap)
        A row of panels for each, under its name.
    """
    if not problems:
        raise ValueError("expected at least one problem, got none")
    figure = new_figure(7.9, 2.75 * len(problems))
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    grid = figure.subplots(len(problems), 3, squeeze=False)
    for panels, (name, (Z, y, found)) in zip(grid, problems.items(), strict=True):
        points, labels = np.asarray(Z, dtype=np.float64), np.asarray(y)
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"Z: expected points (N, 2) to draw, got {points.shape}")
        low, high = points.min(0), points.max(0)
        low, high = low - 0.02 * (high - low), high + 0.02 * (high - low)
        classes = found.labels.numpy()
        dark = [COLOURS[c % len(COLOURS)] for c in labels]
        light = [_LIGHT[c] if c < len(_LIGHT) else to_rgba(COLOURS[c % len(COLOURS)], 0.45) for c in classes]
        cells = _bounded_cells(found.centroids.numpy(), low, high)
        for axes, title in zip(panels, (name, "pure Voronoi map", "its centroids"), strict=True):
            if axes is not panels[0]:
                axes.add_collection(PolyCollection(cells, facecolors=light, linewidths=0))
                axes.add_collection(
                    PolyCollection(cells, facecolors="none", edgecolors="white", linewidths=0.7, zorder=3)
                )
            if axes is not panels[2]:
                axes.scatter(*points.T, c=dark, s=float(np.clip(4000 / len(points), 2, 12)), linewidths=0)
            axes.set_title(title, fontsize=11)
            axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[], aspect="equal")
        count = f"{len(classes)} cells" if len(classes) != 1 else "1 cell"
        panels[1].set_xlabel(f"{count}, {found.entropy:.2f} bits", fontsize=10)
        panels[2].scatter(*found.centroids.numpy().T, c="black", s=8, linewidths=0, zorder=4)
    return figure


def _bounded_cells(centroids: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[np.ndarray]:
    """Polygons of the Voronoi cells within a box. Mirrored at its sides, the centroids bound one another's cells there."""
    inside = np.clip(centroids, low, high)
    if not np.array_equal(inside, centroids):
        raise ValueError("centroids lie outside the samples' bounds")
    mirrored = [centroids]
    for axis in (0, 1):
        for edge in (low[axis], high[axis]):
            image = centroids.copy()
            image[:, axis] = 2 * edge - image[:, axis]
            mirrored.append(image)
    diagram = Voronoi(np.vstack(mirrored))
    return [diagram.vertices[diagram.regions[diagram.point_region[i]]] for i in range(len(centroids))]
