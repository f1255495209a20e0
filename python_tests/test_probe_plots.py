"""Figures of probes: what is in them, and that the text in them is legible."""

from __future__ import annotations

import builtins
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from layerwise.probes import (
    ProbeCallback,
    ProbeTable,
    Projection,
    plot_by_epoch,
    plot_by_layer,
    plot_scatter,
    plot_voronoi,
    project_pca,
    pure_voronoi_map,
    save_figure,
)


def table(values, measure="lsd", trend=-1, **others):
    rows = [{"layer": i, "name": f"features.{i}", "shape": "4", measure: value} for i, value in enumerate(values)]
    return ProbeTable(rows, {measure: trend}, **others)


def recorded(epochs=4, layers=5):
    watch = ProbeCallback([])
    for epoch in range(epochs):
        watch.tables[epoch] = table([None, *(1 / (i + epoch) for i in range(1, layers))])
        watch.scalars[epoch] = {"mse": 1 / (1 + epoch)} if epoch else {}
    return watch


def assert_legible(figure):
    """No text overlaps another, and all lie inside the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = []
    for axes in figure.get_axes():
        if axes.get_visible():
            texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
            texts += [axes.get_legend()] * (axes.get_legend() is not None)
    texts += figure.legends
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    boxes = [box for box in boxes if box.width > 1]
    for box in boxes:
        assert figure.bbox.padded(1).contains(*box.min) and figure.bbox.padded(1).contains(*box.max)
    for first, second in combinations(boxes, 2):
        assert not first.padded(-1).overlaps(second.padded(-1))


def test_by_layer(tmp_path):
    lines = {"epoch 0": table([0.5, 0.6, 0.4]), "epoch 9": table([0.5, 0.3, 0.1])}
    figure = plot_by_layer(lines, "lsd")
    (axes,) = figure.get_axes()
    assert [line.get_label() for line in axes.get_lines()] == list(lines)
    assert axes.get_lines()[1].get_ydata().tolist() == [0.5, 0.3, 0.1]
    (rings,) = axes.collections
    assert rings.get_offsets().tolist() == [[1, 0.6]]  # the violation is shown
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*lines, "against the trend"]
    assert axes.get_ylabel() == "least squares distance" and axes.get_xlabel() == "layer (0: input)"
    assert_legible(figure)
    save_figure(figure, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"


def test_by_layer_of_one_table_and_several_measures():
    figure = plot_by_layer(table([None, 0.3, 0.2]), "lsd")
    assert not figure.legends and figure.get_axes()[0].get_xlabel() == "layer"
    assert plot_by_layer(table([None, None]), "lsd").get_axes()[0].get_lines()[0].get_xdata().size == 0
    rows = [{"layer": i, "name": "a", "shape": "4", "k_redundancy_5": 0.1 * i, "stable_rank": 2.0} for i in range(60)]
    figure = plot_by_layer(ProbeTable(rows, {"k_redundancy_5": 1, "stable_rank": 0}), ["k_redundancy_5", "stable_rank"])
    assert [axes.get_ylabel() for axes in figure.get_axes()] == ["k-redundancy, k = 5", "stable rank"]
    assert_legible(figure)


def test_by_epoch():
    watch = recorded()
    (axes,) = plot_by_epoch(watch, "lsd").get_axes()
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels == [f"{i}: features.{i}" for i in range(1, 5)]  # the first layer has no values
    assert axes.get_lines()[1].get_ydata() == pytest.approx([1 / 2, 1 / 3, 1 / 4, 1 / 5])
    (line,) = plot_by_epoch(watch, "lsd", layers=[2]).get_axes()[0].get_lines()
    assert line.get_label() == "2: features.2"
    figure = plot_by_epoch(watch, "lsd", scalar="mse")
    curve = figure.get_axes()[1].get_lines()[0]
    assert curve.get_xdata().tolist() == [1, 2, 3] and curve.get_ydata().tolist() == [1 / 2, 1 / 3, 1 / 4]
    assert_legible(figure)
    assert_legible(plot_by_epoch(recorded(layers=20), "lsd"))


def test_scatter():
    y = torch.arange(40) % 4
    found = {i: project_pca(torch.randn(40, 3), y) for i in range(4)}
    figure = plot_scatter(table([0.1] * 4, projections=found), class_names=["cat", "dog", "deer", "frog"])
    panels = [axes for axes in figure.get_axes() if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["input", "1: features.1", "2: features.2", "3: features.3"]
    np.testing.assert_allclose(panels[2].collections[0].get_offsets(), found[2].points)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "dog", "deer", "frog"]
    assert_legible(figure)
    figure = plot_scatter(table([0.1] * 4, projections=found), layers=[3])
    assert [axes.get_title() for axes in figure.get_axes()] == ["3: features.3"]
    many = {0: Projection(torch.randn(60, 2, dtype=torch.float64), torch.arange(60), 1.0)}
    assert len(plot_scatter(table([0.1], projections=many)).legends[0].get_texts()) == 20


def test_voronoi():
    Z = np.random.default_rng(0).uniform(size=(60, 2))
    problems = {
        "a": (Z, y := (Z.sum(1) > 1).astype(int), pure_voronoi_map(Z, y)),
        "b": (Z, y * 0, pure_voronoi_map(Z, y * 0)),
    }
    figure = plot_voronoi(problems)
    axes = figure.get_axes()
    assert len(axes) == 6 and axes[0].get_title() == "a" and axes[4].get_xlabel() == "1 cell, 0.00 bits"
    cells = axes[1].collections[0].get_paths()
    found = problems["a"][2]
    assert len(cells) == len(found.labels)
    for i, cell in enumerate(cells):  # each polygon holds the samples of its cell
        assert cell.contains_points(Z[(found.cells == i).numpy()], radius=1e-9).all()
    low, high = (
        np.concatenate([cell.vertices for cell in cells]).min(0),
        np.concatenate([c.vertices for c in cells]).max(0),
    )
    np.testing.assert_allclose([low, high], [[a for a, _ in (axes[1].get_xlim(), axes[1].get_ylim())],
                                             [b for _, b in (axes[1].get_xlim(), axes[1].get_ylim())]])  # fmt: skip
    assert_legible(figure)


def test_bad_figures(monkeypatch):
    good = table([0.5, 0.4])
    for call, match in [
        (lambda: plot_by_layer({}, "lsd"), "at least one table"),
        (lambda: plot_by_epoch(ProbeCallback([]), "lsd"), "nothing has been recorded"),
        (lambda: plot_by_epoch(recorded(), "lsd", scalar="loss"), "scalar 'loss'"),
        (lambda: plot_by_epoch(recorded(), "lsd", layers=[0, 9]), r"none of the layers \[0, 9\]"),
        (lambda: plot_scatter(good), "measures='pca'"),
        (lambda: plot_scatter(table([1], projections={0: None}), layers=[7]), r"layers \[7\]; there are \[0\]"),
        (lambda: plot_voronoi({}), "at least one"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(KeyError, match="no measure 'pca'"):
        plot_by_layer(good, "pca")
    Z = np.random.default_rng(0).normal(size=(10, 3))
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        plot_voronoi({"a": (Z, np.arange(10), pure_voronoi_map(Z, np.arange(10)))})
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    flat = {"a": (Z[:, :2], np.arange(10), pure_voronoi_map(Z[:, :2], np.arange(10)))}
    for call in (
        lambda: plot_by_layer(good, "lsd"),
        lambda: plot_by_epoch(recorded(), "lsd"),
        lambda: plot_scatter(table([1], projections={0: project_pca(torch.ones(3, 2), torch.arange(3))})),
        lambda: plot_voronoi(flat),
    ):
        with pytest.raises(ImportError, match=r"platonic-dl\[plot\]"):
            call()
