"""Figures: what is in them, that nothing overlaps, and that a failure leaves no file behind."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sklearn.decomposition import PCA

from platonic import PlatonicMLPClassifier, PlatonicMLPRegressor, datasets, plots


@pytest.fixture(scope="module")
def digits():
    data = datasets.load("digits")
    return data, PlatonicMLPClassifier((20, 15), projection="random", random_state=0).fit(data.X_train, data.y_train)


def visible_axes(figure):
    return [axes for axes in figure.get_axes() if axes.get_visible()]


def titles(figure):
    return [axes.get_title() for axes in visible_axes(figure) if axes.get_title()]


def texts_of(axes):
    """Title, labels, and the tick labels that are in view."""
    yield from (axes.title, axes.xaxis.label, axes.yaxis.label)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for at, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True):
            if low <= at <= high:
                yield label


def assert_legible(figure):
    """No text overlaps another, all lie inside the figure, and none is smaller than 9 points."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for axes in visible_axes(figure) for text in texts_of(axes) if text.get_text()]
    legends = [axes.get_legend() for axes in visible_axes(figure) if axes.get_legend()]
    for part in [figure, *figure.subfigs]:
        texts += part.texts
        legends += part.legends
    boxes = [(str(item), item.get_window_extent(canvas.get_renderer())) for item in [*texts, *legends]]
    assert len(boxes) > 5
    inside = figure.bbox.padded(1)
    for text, box in boxes:
        assert inside.contains(*box.min) and inside.contains(*box.max), text
    for (a, first), (b, second) in combinations(boxes, 2):
        assert not first.padded(-1).overlaps(second.padded(-1)), (a, b)
    for text in figure.findobj(matplotlib.text.Text):
        assert text.get_fontsize() >= 9 or not text.get_text()


def test_a_classifiers_figure(digits):
    data, model = digits
    figure = plots.plot_fit(
        model, data.X_train, data.y_train, data.X_test, data.y_test, test_scores=[0.8, 0.9], name="digits"
    )
    assert titles(figure) == [
        "input, 64 features", "layer 1, 20 units", "layer 2, 15 units", "accuracy by layer",
        "least squares distance by layer",
    ]  # fmt: skip
    assert "digits – test rows" in figure.subfigs[0].get_suptitle()
    legend = figure.subfigs[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [str(i) for i in range(10)]
    scores, lsd = visible_axes(figure)[3:]
    train, test = scores.get_lines()
    assert train.get_ydata().tolist() == [record.score for record in model.layer_scores_]
    assert test.get_ydata().tolist() == [0.8, 0.9]
    assert lsd.get_lines()[0].get_ydata().tolist() == [record.lsd for record in model.layer_scores_]
    assert_legible(figure)


def test_panels_show_principal_components_in_the_colour_of_the_class(digits):
    data, model = digits
    figure = plots.new_figure(9, 3)
    plots.draw_representations(figure, model, data.X_test, data.y_test)
    order = np.random.default_rng(0).permutation(len(data.X_test))
    for axes, Z in zip(figure.get_axes(), (data.X_test, model.hidden(data.X_test, 0)), strict=False):
        points = np.asarray(axes.collections[0].get_offsets())
        expected = PCA(2, random_state=0).fit_transform(Z[order])
        np.testing.assert_allclose(points, expected, atol=1e-6 * np.abs(expected).max())
        colours = axes.collections[0].get_facecolors()[:, :3]
        palette = matplotlib.colors.to_rgba_array(plots.COLOURS)[:, :3]
        np.testing.assert_allclose(colours, palette[data.y_test[order]])


def test_a_regression_on_one_input_shows_its_curve():
    data = datasets.make_sine(200)
    model = PlatonicMLPRegressor((12,), activation="celu", projection="random", random_state=0)
    model.fit(data.X_train, data.y_train)
    figure = plots.plot_fit(model, data.X_train, data.y_train, name="sine")
    assert "fitted curve" in titles(figure)
    assert "training rows" in figure.subfigs[0].get_suptitle()
    curve = next(axes for axes in figure.get_axes() if axes.get_title() == "fitted curve").get_lines()[0]
    x, y = curve.get_data()
    np.testing.assert_allclose(y, model.predict(x[:, None]))
    assert "input, 1 feature" in titles(figure)
    assert_legible(figure)


@pytest.mark.parametrize(("layers", "panels"), [(1, 2), (3, 4), (4, 5), (7, 8), (30, 8)])
def test_many_layers_share_eight_panels(layers, panels):
    data = datasets.load("iris")
    model = PlatonicMLPClassifier((4,) * layers, projection="elm", random_state=0).fit(data.X_train, data.y_train)
    figure = plots.plot_fit(model, data.X_train, data.y_train, data.X_test, data.y_test)
    shown = titles(figure)[:-2]
    assert len(shown) == panels
    assert shown[-1] == f"layer {layers}, 4 units"
    assert_legible(figure)


def test_many_classes_with_long_names(tmp_path):
    rng = np.random.default_rng(0)
    y = np.array([f"a class with a long name {i:02d}" for i in range(45)])[np.arange(450) % 45]
    model = PlatonicMLPClassifier((5,), projection="elm", random_state=0).fit(rng.normal(size=(450, 3)), y)
    figure = plots.plot_fit(model, rng.normal(size=(450, 3)), y)
    assert len(figure.subfigs[0].legends[0].get_texts()) <= 10
    assert_legible(figure)


@pytest.mark.filterwarnings("error")
def test_degenerate_representations():
    X = np.zeros((6, 1))
    X[0] = 1
    y = np.array([1.0, 0, 0, 0, 0, 0])
    model = PlatonicMLPRegressor((1,), projection="elm", random_state=0).fit(X, y)
    figure = plots.plot_fit(model, np.ones((3, 1)), np.ones(3))  # constant in every panel
    FigureCanvasAgg(figure).draw()
    model = PlatonicMLPClassifier((2,), projection="elm", random_state=0).fit(X, y.astype(int))
    figure = plots.plot_fit(model, X, y.astype(int), X[:1], y[:1].astype(int))  # one row
    FigureCanvasAgg(figure).draw()


def test_a_large_set_is_thinned(digits):
    data, model = digits
    X, y = np.tile(data.X_test, (20, 1)), np.tile(data.y_test, 20)
    figure = plots.new_figure(9, 3)
    plots.draw_representations(figure, model, X, y)
    assert len(figure.get_axes()[0].collections[0].get_offsets()) == 1500


def test_widths():
    figure = plots.new_figure(6, 4)
    axes = figure.subplots()
    plots.draw_widths(axes, [1, 10, 100], {"ours": [0.1, 0.5, 0.9], "theirs": [0.1, 0.2, 0.3]}, ("other", 10, 0.4))
    assert [line.get_label() for line in axes.get_lines()] == ["ours", "theirs", "other"]
    assert axes.get_lines()[0].get_ydata().tolist() == [0.1, 0.5, 0.9]
    assert axes.get_lines()[2].get_xydata().tolist() == [[10, 0.4]]
    assert_legible(figure)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "PNG"])
def test_formats(tmp_path, suffix):
    plots.save_figure(plots.new_figure(2, 2), tmp_path / f"f.{suffix}")
    start = (tmp_path / f"f.{suffix}").read_bytes()[:5]
    assert start.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix.lower()])


def test_failures_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"f\.docx: expected a name that ends in .*\.png"):
        plots.save_figure(plots.new_figure(2, 2), tmp_path / "f.docx")
    with pytest.raises(ValueError, match="expected a name"):
        plots.save_figure(plots.new_figure(2, 2), tmp_path / "f")
    with pytest.raises(FileNotFoundError):
        plots.save_figure(plots.new_figure(2, 2), tmp_path / "none" / "f.png")
    figure = plots.new_figure(2, 2)
    figure.text(0, 0, "$\\bad{math}$")
    (tmp_path / "f.png").write_bytes(b"old")
    with pytest.raises(ValueError, match="bad"):
        plots.save_figure(figure, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["f.png"]


def test_matplotlib_is_imported_when_needed_and_missed_by_name(monkeypatch):
    code = "import sys, platonic.plots; sys.exit(any(name.startswith('matplotlib') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"platonic-dl\[plot\]"):
        plots.new_figure(1, 1)
