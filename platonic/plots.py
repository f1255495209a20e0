"""Figures of fitted networks. Needs matplotlib, which is imported when a figure is made.

:func:`plot_fit` makes a whole figure; the ``draw_`` functions fill axes (or a figure) of the caller's. Nothing here
touches ``pyplot`` or matplotlib's global settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.utils import _safe_indexing

from platonic.inputs import to_numpy
from platonic_core.figures import check_format, new_figure, save_figure

__all__ = [
    "check_format", "draw_curve", "draw_lsd", "draw_representations", "draw_scores", "draw_widths", "new_figure",
    "plot_fit", "save_figure",
]  # fmt: skip

# Ten colours told apart with the common colour deficiencies: those of Petroff (2021, arXiv 2107.02270), but black for
# the darker of its two greys.
COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#000000", "#92dadd",
)  # fmt: skip
_SEQUENCE = "cividis"  # for values, and for more classes than there are colours
_MOST_POINTS = 1500
_MOST_PANELS = 8  # the input and up to seven layers
_MOST_LEGEND = 10
_PANEL = 2.7  # inches


def plot_fit(
    estimator: Any,
    X: Any,
    y: Any,
    X_test: Any = None,
    y_test: Any = None,
    *,
    test_scores: Sequence[float] | None = None,
    name: str = "",
) -> Any:
    """What the layers of a fitted network do: representations, scores, least squares distances.

    Parameters
    ----------
    estimator : PlatonicMLP, PlatonicMLPClassifier or PlatonicMLPRegressor
        Fitted to X and y.
    X, y : array
        What it was fitted to.
    X_test, y_test : array, optional
        Other rows; the representations shown are theirs if they are given.
    test_scores : sequence of float, optional
        Score of each hidden layer's own read-out on the test rows, where it was measured; else the whole network's
        score on them is drawn at the last layer.
    name : str
        Of the data, for the title.

    Returns
    -------
    matplotlib.figure.Figure
        Upper part: the input and up to seven hidden layers, on their first two principal components. Lower part: score
        and least squares distance by layer, and the fitted curve of a regression on one input.
    """
    shown = _shown_layers(len(estimator.layer_scores_))
    columns = min(4, len(shown) + 1)
    rows = -(-(len(shown) + 1) // columns)
    figure = new_figure(max(9.0, _PANEL * columns + 1.2), _PANEL * rows + 3.4)
    upper, lower = figure.subfigures(2, 1, height_ratios=[_PANEL * rows + 0.4, 3.0])
    has_test = X_test is not None and y_test is not None
    title = " – ".join(filter(None, [name, "test rows" if has_test else "training rows"]))
    upper.suptitle(f"{title} on the first two principal components of each representation", fontsize=12)
    draw_representations(upper, estimator, *((X_test, y_test) if has_test else (X, y)))
    is_curve = estimator.task_ == "regression" and estimator.n_features_in_ == 1 and estimator.n_outputs_ == 1
    axes = lower.subplots(1, 3 if is_curve else 2)
    if test_scores is None and has_test:
        last = len(estimator.layer_scores_) - 1
        test_scores = [float("nan")] * last + [estimator.score(X_test, y_test)]
    draw_scores(axes[0], estimator, test_scores)
    draw_lsd(axes[1], estimator)
    if is_curve:
        draw_curve(axes[2], estimator, X, y)
    return figure


def _shown_layers(count: int) -> list[int]:
    """Indices of the layers that get a panel: all, or the first, the last and others evenly between."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, _MOST_PANELS - 1)).round()})


# ----------------------------------------------------------------------------------------------------- the parts


def draw_representations(figure: Any, estimator: Any, X: Any, y: Any, *, columns: int = 4) -> None:
    """Fill `figure` (or a subfigure) with a panel for the input and for each hidden layer, coloured by y.

    A panel shows up to 1,500 rows, the same in each, on the first two principal components of these rows.
    """
    y = to_numpy(y)
    kept = _sample_rows(len(y))
    X, y = _safe_indexing(X, kept), y[kept]
    shown = _shown_layers(len(estimator.layer_scores_))
    columns = min(columns, len(shown) + 1)
    grid = figure.subplots(-(-(len(shown) + 1) // columns), columns, squeeze=False).ravel()
    paint = _Paint(estimator, y)
    panels = [(f"input, {_count(estimator.n_features_in_, 'feature')}", to_numpy(X))]
    for i in shown:
        title = f"layer {i + 1}, {_count(estimator.layer_scores_[i].width, 'unit')}"
        panels.append((title, to_numpy(estimator.hidden(X, i))))
    for axes, (title, Z) in zip(grid, panels, strict=False):
        _draw_panel(axes, Z, title, paint)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    paint.explain(figure, grid[: len(panels)])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _sample_rows(count: int) -> np.ndarray:
    """All rows in random order, so that no class is always on top, or as many as a panel shows."""
    return np.random.default_rng(0).permutation(count)[:_MOST_POINTS]


def _draw_panel(axes: Any, Z: np.ndarray, title: str, paint: _Paint) -> None:
    Z = np.asarray(Z, dtype=np.float64)
    components = min(2, *Z.shape)
    points = np.zeros((len(Z), 2))
    share = 0.0
    if np.ptp(Z, axis=0).any():
        pca = PCA(components, random_state=0).fit(Z)
        points[:, :components] = pca.transform(Z)
        share = float(pca.explained_variance_ratio_.sum())
    axes.scatter(*points.T, c=paint.colours, s=_point_size(len(Z)), linewidths=0, alpha=0.85, rasterized=True)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(f"{100 * share:.0f} % of variance", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.05)
    for spine in axes.spines.values():
        spine.set_color("0.7")


def _point_size(count: int) -> float:
    return float(np.clip(6000 / max(1, count), 5, 18))


class _Paint:
    """A colour for each row, and the legend or colour bar that explains them."""

    def __init__(self, estimator: Any, y: np.ndarray):
        from matplotlib import colormaps
        from matplotlib.colors import Normalize, to_rgba_array

        self.labels: list[str] = []
        if estimator.task_ == "regression":
            value = y[:, 0] if y.ndim == 2 else y
            self.norm, self.map = Normalize(float(value.min()), float(value.max())), colormaps[_SEQUENCE]
            self.colours = self.map(self.norm(value))
            self.bar_label = "y" if y.ndim == 1 or y.shape[1] == 1 else "first output"
            return
        classes = to_numpy(estimator.classes_)
        self.labels = [str(label) for label in classes]
        if len(classes) <= len(COLOURS):
            palette = to_rgba_array(COLOURS[: len(classes)])
        else:
            palette = colormaps[_SEQUENCE](np.linspace(0, 1, len(classes)))
        at = np.searchsorted(classes, y.ravel()).clip(0, len(classes) - 1)
        self.palette, self.colours = palette, palette[at]

    def explain(self, figure: Any, grid: Sequence[Any]) -> None:
        if not self.labels:
            from matplotlib.cm import ScalarMappable

            bar = figure.colorbar(ScalarMappable(self.norm, self.map), ax=list(grid), pad=0.01, aspect=30)
            bar.set_label(self.bar_label)
            return
        from matplotlib.lines import Line2D

        step = -(-len(self.labels) // _MOST_LEGEND)  # of many classes, some
        handles = [
            Line2D([], [], marker="o", linestyle="", markersize=6, color=colour, label=_shorten(label))
            for label, colour in list(zip(self.labels, self.palette, strict=True))[::step]
        ]
        figure.legend(handles=handles, loc="outside right center", frameon=False, title="class", handletextpad=0.1)


def _shorten(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def draw_scores(axes: Any, estimator: Any, test_scores: Sequence[float] | None = None) -> None:
    """Training score, and test score where given, of each hidden layer's read-out."""
    train = [record.score for record in estimator.layer_scores_]
    at = np.arange(1, len(train) + 1)
    axes.plot(at, train, color=COLOURS[0], **_line_style(len(at)), label="training")
    if test_scores is not None:
        axes.plot(at, test_scores, color=COLOURS[2], **_line_style(len(at), "s"), label="test")
    axes.legend(frameon=False)
    name = "coefficient of determination" if estimator.task_ == "regression" else "accuracy"
    _finish(axes, f"{name} by layer", len(at))


def draw_lsd(axes: Any, estimator: Any) -> None:
    """Least squares distance of each hidden layer to the targets."""
    values = [record.lsd for record in estimator.layer_scores_]
    axes.plot(np.arange(1, len(values) + 1), values, color=COLOURS[4], **_line_style(len(values)))
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    _finish(axes, "least squares distance by layer", len(values))


def _line_style(count: int, marker: str = "o") -> dict[str, Any]:
    return {"linewidth": 1.8, "marker": marker if count <= 40 else "", "markersize": 5}


def _finish(axes: Any, title: str, layers: int) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator

    axes.set_title(title, fontsize=11)
    axes.set_xlabel("hidden layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True) if layers > 10 else FixedLocator(range(1, layers + 1)))
    axes.set_xlim(0.5, layers + 0.5)
    _open_frame(axes)


def _open_frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def draw_curve(axes: Any, estimator: Any, X: Any, y: Any) -> None:
    """A regression on one input: the rows, and the function that was fitted to them."""
    kept = _sample_rows(len(to_numpy(y)))
    x, values = to_numpy(_safe_indexing(X, kept)).ravel(), to_numpy(y)[kept].ravel()
    grid = np.linspace(x.min(), x.max(), 1000, dtype=x.dtype if x.dtype.kind == "f" else np.float64)
    axes.scatter(x, values, s=_point_size(len(x)), color="0.7", linewidths=0, rasterized=True, label="data")
    axes.plot(
        grid, to_numpy(estimator.predict(grid[:, None])).ravel(), color=COLOURS[2], linewidth=1.8, label="network"
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.22 * (high - low))  # room for the legend above the curve
    axes.legend(frameon=False, loc="upper center", ncols=2)
    axes.set_title("fitted curve", fontsize=11)
    axes.set_xlabel("x")
    axes.set_ylabel("y")
    _open_frame(axes)


def draw_widths(
    axes: Any,
    widths: Sequence[int],
    scores: Mapping[str, Sequence[float]],
    reference: tuple[str, int, float] | None = None,
) -> None:
    """Score against width: a line for each name in `scores`, and a star at the `reference` (name, width, score)."""
    for (name, values), colour, marker in zip(
        scores.items(), (COLOURS[0], COLOURS[6], COLOURS[4]), "os^", strict=False
    ):
        axes.plot(widths, values, color=colour, **_line_style(len(widths), marker), label=name)
    if reference is not None:
        name, width, score = reference
        axes.plot([width], [score], color="black", marker="*", markersize=12, linestyle="", label=name)
    axes.set_xscale("log")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set_xlabel("hidden units")
    axes.legend(frameon=False, loc="lower right")
    _open_frame(axes)
