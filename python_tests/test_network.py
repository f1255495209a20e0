"""The layer walk: figure 7.3 of the thesis literally, tries, importance, records, row limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from platonic import network
from platonic.activations import ACTIVATIONS, resolve_activation
from platonic.datasets import make_sine
from platonic.narrow import fit_narrow
from platonic.network import FitOptions, LayerPlan, fit_network, with_output_scale
from platonic.readout import ReadoutOptions
from platonic.targets import TargetOptions


def options(alpha=1.0, beta=1.0, relative=False, l2=0.0, n_tries=None, ema=0.2, solver="cholesky"):
    return FitOptions(
        TargetOptions(alpha, beta, relative, None), ReadoutOptions(l2, solver, None, relative), n_tries, ema
    )


def plans(widths, projection, activation="celu"):
    names = [projection] * len(widths) if isinstance(projection, str) else projection
    return [LayerPlan(w, resolve_activation(activation), p) for w, p in zip(widths, names, strict=True)]


def sine(m=500):
    data = make_sine(m)
    return data.X_train, data.y_train[:, None]


def fit(X, Y, layers, opts, seed=0, **rest):
    return fit_network(torch.tensor(X), torch.tensor(Y), rest.pop("group", None), rest.pop("weights", None), layers, opts,
                       np.random.default_rng(seed), **rest)  # fmt: skip


def figure_7_3(x, y, widths, seed, alpha=1.0, beta=1.0, activation=torch.nn.functional.celu):
    """The thesis's listing with explicit pseudoinverses, the scaling factors of 7.5.2, and P from `seed`."""
    rng = np.random.default_rng(seed)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    Z, y = torch.cat([ones, torch.tensor(x)], 1), torch.tensor(y)
    for width in widths:
        P = torch.from_numpy(rng.standard_normal((Z.shape[1] + y.shape[1], width)))
        W = torch.linalg.pinv(Z) @ (alpha * torch.cat([Z, beta * y], 1) @ P)
        Z = torch.cat([ones, activation(Z @ W)], 1)
    return Z @ (torch.linalg.pinv(Z) @ y)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 4.0)])
@pytest.mark.parametrize("solver", ["cholesky", "svd", "lstsq"])
def test_absolute_scaling_is_figure_7_3(solver, alpha, beta):
    """The same draws give the same fitted sine, though no pseudoinverse is formed and only k right-hand sides are solved."""
    X, Y = sine()
    for seed in range(3):
        want = figure_7_3(X, Y, (16, 16), seed, alpha, beta)
        got = fit(X, Y, plans((16, 16), "random"), options(alpha, beta, solver=solver), seed)
        # hidden layers of 16 smooth units have condition numbers near 1e8; errors of one layer move the next one's units
        torch.testing.assert_close(got.readout.fitted, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.network.output(torch.tensor(X)), got.readout.fitted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_native_call_for_deep_thin_networks_is_the_same_method(monkeypatch, weighted):
    """The same draws through the layer walk and through fit_narrow: records and outputs agree."""
    X, Y = sine(400)
    w = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 2, 400)) if weighted else None
    arguments = (torch.tensor(X), torch.tensor(Y), None, w, plans((6,) * 8, "random"), options(0.3, 3.0, n_tries=2))
    walked = fit_network(*arguments, np.random.default_rng(1))
    monkeypatch.setattr(network, "DEEP_LAYERS", 8)
    called = []
    monkeypatch.setattr(network, "fit_narrow", lambda *a, **o: called.append(1) or fit_narrow(*a, **o))
    native = fit_network(*arguments, np.random.default_rng(1))
    assert called
    assert [r.lsd for r in native.records] == pytest.approx([r.lsd for r in walked.records], rel=1e-5)
    assert [r.score for r in native.records] == pytest.approx([r.score for r in walked.records], rel=1e-5)
    torch.testing.assert_close(
        native.network.output(torch.tensor(X)), walked.network.output(torch.tensor(X)), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(native.network.output(torch.tensor(X)), native.readout.fitted, rtol=0, atol=1e-9)


def test_tries_keep_the_lowest_least_squares_distance():
    """One layer, n tries: the same draws one at a time, the best of them."""
    X, Y = sine(200)
    rng = np.random.default_rng(5)
    single = [
        fit_network(torch.tensor(X), torch.tensor(Y), None, None, plans((6,), "random"), options(), rng).records[0].lsd
        for _ in range(5)
    ]
    assert len(set(single)) == 5
    best = fit(X, Y, plans((6,), "random"), options(n_tries=5), 5)
    assert best.records[0].lsd == min(single)
    assert best.readout.lsd == min(single)


def test_deterministic_projections_are_not_tried_again(monkeypatch):
    calls = []
    plain = network.PROJECTIONS["sorted_pca"]
    monkeypatch.setitem(network.PROJECTIONS, "sorted_pca", lambda *args: calls.append(1) or plain(*args))
    X, Y = sine(50)
    fit(np.hstack([X, X**2]), Y, plans((4, 4), ("sorted_pca", "random")), options(n_tries=3))
    assert len(calls) == 1


@pytest.mark.parametrize("ema", [0.0, 0.2, 1.0])
def test_importance_is_the_running_squared_error(monkeypatch, ema):
    seen = []
    plain = network.PROJECTIONS["platonic_pca"]
    monkeypatch.setitem(
        network.PROJECTIONS, "platonic_pca", lambda layer, *rest: seen.append(layer.importance) or plain(layer, *rest)
    )
    X, Y = sine(60)
    errors = []
    fit(
        np.hstack([X, X**3]), Y, plans((3, 4, 4), "platonic_pca", "tanh"), options(ema=ema),
        observe=lambda i, record, found, readout: errors.append((torch.tensor(Y) - readout.fitted).square().sum(1)),
    )  # fmt: skip
    d = torch.ones(60, dtype=torch.float64)
    assert seen[0] is None
    for got, error in zip(seen[1:], errors, strict=False):
        d = ema * d + (1 - ema) * error
        torch.testing.assert_close(got, d, rtol=1e-12, atol=1e-15)


def test_observer_and_records():
    X, Y = sine(100)
    rows = []
    got = fit(X, Y, plans((5, 7), ("elm", "random"), "tanh"), options(), observe=lambda *event: rows.append(event))
    assert [r[0] for r in rows] == [0, 1]
    assert [r[1] for r in rows] == got.records
    assert [(r.width, r.projection) for r in got.records] == [(5, "elm"), (7, "random")]
    for _, record, found, readout in rows:
        assert found.weight.shape[1] == record.width
        residual = (torch.tensor(Y) - readout.fitted).numpy()
        assert record.lsd == pytest.approx((residual**2).mean(), rel=1e-12)
        assert record.score == pytest.approx(1 - (residual**2).sum() / ((Y - Y.mean()) ** 2).sum(), rel=1e-9)


def test_representations_and_output_scale():
    X, Y = sine(50)
    net = fit(X, Y, plans((4, 6), "random", "relu"), options()).network
    Xt = torch.tensor(X)
    before = Xt.clone()
    hidden = list(net.representations(Xt))
    assert [h.shape for h in hidden] == [(50, 4), (50, 6)]
    torch.testing.assert_close(net.hidden(Xt, 0), hidden[0])
    torch.testing.assert_close(net.output(Xt), hidden[1] @ net.weights[2] + net.biases[2])
    scaled = with_output_scale(net, torch.tensor([3.0]), torch.tensor([-1.0]))
    torch.testing.assert_close(scaled.output(Xt), 3 * net.output(Xt) - 1)
    assert torch.equal(Xt, before)
    with pytest.raises(IndexError):
        net.hidden(Xt, 2)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_their_modules(name):
    z = torch.linspace(-3, 3, 50, dtype=torch.float64)
    want = ACTIVATIONS[name].module()(z.clone())
    torch.testing.assert_close(ACTIVATIONS[name].apply_(z.clone()), want, rtol=0, atol=0)


def test_a_weight_of_two_is_two_rows_across_the_row_limits(monkeypatch):
    """60 rows of weight 2 are 120 rows, on the other side of every limit."""
    for name in ("MOST_JUDGED_ROWS", "LOO_ROWS"):
        monkeypatch.setattr(network, name, 100)
    monkeypatch.setattr("platonic.selection._TWO_FOLDS", 100)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 3))
    Y = np.tanh(X[:, :1]) + 0.3 * rng.standard_normal((60, 1))
    opts = options(relative=True, l2="loo")
    a = fit(X, Y, plans((10, 10), "auto", "relu"), opts, weights=torch.full((60,), 2.0, dtype=torch.float64))
    b = fit(np.repeat(X, 2, axis=0), np.repeat(Y, 2, axis=0), plans((10, 10), "auto", "relu"), opts)
    assert [(r.l2, r.projection) for r in a.records] == [
        (pytest.approx(r.l2, rel=1e-9), r.projection) for r in b.records
    ]
    torch.testing.assert_close(a.network.output(torch.tensor(X)), b.network.output(torch.tensor(X)), rtol=0, atol=1e-6)


def test_forward_selection_lowers_the_error_of_a_narrow_layer():
    """`auto` with its pool against `auto` with one candidate per unit, on the sine."""
    X, Y = sine(1000)
    opts = [options(relative=True, l2="loo", n_tries=n) for n in (None, 1)]
    chosen, drawn = ([fit(X, Y, plans((10, 10), "auto"), o, seed).records[-1] for seed in range(5)] for o in opts)
    assert all(r.projection == "auto (drawn)" for r in drawn)
    assert any(r.projection == "auto (selected)" for r in chosen)
    assert np.median([r.lsd for r in chosen]) < np.median([r.lsd for r in drawn])
