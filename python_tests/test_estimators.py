"""Estimators: tasks, weights, classes, probabilities, small and degenerate data, precision, tools around them."""

from __future__ import annotations

import pickle

import numpy as np
import pandas
import polars
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_digits, load_wine
from sklearn.exceptions import DataConversionWarning
from sklearn.metrics import log_loss, r2_score
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from oracles import repeated
from platonic import PlatonicMLP, PlatonicMLPClassifier, PlatonicMLPRegressor

PROJECTIONS = ["auto", "random", "pairs", "elm"]


def blobs(seed=0, m=90, n=4, classes=3, spread=1.0):
    rng = np.random.default_rng(seed)
    y = np.arange(m) % classes
    return rng.standard_normal((m, n)) * spread + 3 * np.eye(classes, n)[y], y


# ---------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("convert", "task"),
    [
        (lambda y: y.astype(np.float64), "regression"),
        (lambda y: y.astype(np.float32), "regression"),
        (lambda y: [float(v) for v in y], "regression"),
        (lambda y: torch.tensor(y, dtype=torch.float32), "regression"),
        (lambda y: y.astype(np.int8), "classification"),
        (lambda y: y.astype(np.uint16), "classification"),
        (lambda y: y > 0, "classification"),
        (lambda y: np.array(["a", "bc", "d"])[y], "classification"),
        (lambda y: np.array(["a", "bc", "d"])[y].astype(object), "classification"),
        (lambda y: pandas.Series(np.array(["a", "bc", "d"])[y], dtype="category"), "classification"),
        (lambda y: polars.Series(np.array(["a", "bc", "d"])[y]), "classification"),
        (lambda y: torch.tensor(y), "classification"),
        (lambda y: torch.tensor(y) > 0, "classification"),
    ],
    ids=[
        "f8",
        "f4",
        "floats",
        "torch f4",
        "i1",
        "u2",
        "bool",
        "str",
        "objects",
        "category",
        "polars",
        "torch i8",
        "torch bool",
    ],
)
def test_y_decides_the_task(convert, task):
    X, y = blobs()
    y = convert(y)
    model = PlatonicMLP(10, random_state=0).fit(X, y)
    assert model.task_ == task
    predicted = model.predict(X)
    assert type(predicted) is (torch.Tensor if isinstance(X, torch.Tensor) else np.ndarray)
    assert hasattr(model, "predict_proba") == hasattr(model, "classes_") == (task == "classification")
    if task == "classification":
        expected = np.unique(np.asarray(y))
        np.testing.assert_array_equal(np.asarray(model.classes_), expected)
        assert (predicted == np.asarray(y)).mean() > 0.9
    assert model.score(X, y) > 0.6


def test_task_overrides_the_dtype():
    X, y = blobs()
    assert PlatonicMLP(5, task="regression").fit(X, y).predict(X).dtype == np.float64
    assert PlatonicMLP(5, task="classification").fit(X, y.astype(float)).classes_.tolist() == [0, 1, 2]


def test_a_second_fit_forgets_the_first():
    X, y = blobs()
    frame = pandas.DataFrame(X, columns=list("abcd"))
    model = PlatonicMLP(5, random_state=0).fit(frame, y)
    model.fit(X[:, :2], y.astype(float))
    assert model.n_features_in_ == 2
    for name in ("classes_", "temperature_", "feature_names_in_"):
        assert not hasattr(model, name)
    assert not hasattr(model, "decision_function")


def test_column_vector_of_labels_warns():
    X, y = blobs()
    with pytest.warns(DataConversionWarning, match=r"A column-vector y was passed when a 1d array was expected"):
        PlatonicMLPClassifier(5).fit(X, y[:, None])


def test_regression_of_several_outputs():
    """Each of its own scale, one constant. Absolute scaling wants them of order 1 around 0: offsets become biases."""
    rng = np.random.default_rng(0)
    X = rng.uniform(-1, 1, (400, 2))
    Y = np.stack([1000 * X[:, 0] ** 2, 1e-3 * X[:, 1] + 5, np.full(400, 2.5)], 1)
    plain = np.stack([X[:, 0] ** 2 - 1 / 3, X[:, 1] * X[:, 0]], 1)
    predicted = PlatonicMLPRegressor(40, random_state=0).fit(X, Y).predict(X)
    assert predicted.shape == (400, 3)
    assert r2_score(Y[:, :2], predicted[:, :2], multioutput="raw_values").min() > 0.95
    np.testing.assert_allclose(predicted[:, 2], 2.5, rtol=1e-9)
    absolute = PlatonicMLPRegressor(40, scaling="absolute", l2=1e-6, random_state=0).fit(X, plain)
    assert r2_score(plain, absolute.predict(X), multioutput="raw_values").min() > 0.95
    assert PlatonicMLPRegressor(5).fit(X, Y[:, :1]).predict(X).shape == (400, 1)
    assert PlatonicMLPRegressor(5).fit(X, Y[:, 0]).predict(X).shape == (400,)


# -------------------------------------------------------------------------------------------------------------- weights


@settings(max_examples=15)
@given(
    counts=st.lists(st.integers(0, 3), min_size=30, max_size=30).filter(lambda c: sum(map(bool, c)) > 20),
    projection=st.sampled_from(PROJECTIONS), regression=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_weights_are_repetition(counts, projection, regression, seed):
    X, y = blobs(seed, 30)
    y = X[:, 0] ** 2 + X[:, 1] if regression else y
    make = lambda: PlatonicMLP((8, 8), projection=projection, l2=1e-3, random_state=0)  # noqa: E731
    weighted = make().fit(X, y, sample_weight=counts)
    copied = make().fit(*repeated(counts, X, y))
    for a, b in ((weighted.predict, copied.predict), (weighted.hidden, copied.hidden)):
        np.testing.assert_allclose(a(X), b(X), rtol=0, atol=1e-6)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_order_of_rows_does_not_matter(projection):
    X, y = blobs()
    order = np.random.default_rng(1).permutation(len(X))
    a, b = (
        PlatonicMLPClassifier((12, 8), projection=projection, random_state=0).fit(X[p], y[p]).decision_function(X)
        for p in (slice(None), order)
    )
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)


def test_class_weight():
    X, y = blobs(spread=2.5, classes=2)
    w = {0: 3.0, 1: 0.5}
    make = lambda **k: PlatonicMLPClassifier(10, random_state=0, l2=1e-3, **k)  # noqa: E731
    as_classes = make(class_weight=w).fit(X, y).decision_function(X)
    as_samples = make().fit(X, y, sample_weight=np.where(y == 0, 3.0, 0.5)).decision_function(X)
    np.testing.assert_allclose(as_classes, as_samples, rtol=0, atol=1e-9)
    assert (as_classes < 0).mean() > (make().fit(X, y).decision_function(X) < 0).mean()


def test_balanced_class_weight():
    X, y = blobs(spread=2.5, classes=2)
    keep = (y == 0) | (np.arange(len(y)) % 9 == 0)
    X, y = X[keep], y[keep]
    counts = np.bincount(y)
    fits = [
        PlatonicMLPClassifier(10, random_state=0, l2=1e-3, class_weight=w).fit(X, y).decision_function(X)
        for w in ("balanced", {c: len(y) / (2 * counts[c]) for c in (0, 1)})
    ]
    np.testing.assert_allclose(fits[0], fits[1], rtol=0, atol=1e-9)


def test_a_class_of_weight_zero():
    X, y = blobs()
    model = PlatonicMLPClassifier(10, random_state=0, class_weight={0: 1, 1: 1, 2: 0}).fit(X, y)
    assert model.classes_.tolist() == [0, 1, 2]
    assert set(model.predict(X)) == {0, 1}


# -------------------------------------------------------------------------------------------------------- probabilities


@pytest.mark.parametrize("classes", [2, 4])
def test_probabilities_and_scores(classes):
    X, y = blobs(classes=classes, spread=2)
    labels = np.array(["w", "x", "y", "z"])[y]
    model = PlatonicMLPClassifier(15, random_state=0).fit(X, labels)
    scores, p = model.decision_function(X), model.predict_proba(X)
    assert scores.shape == ((90,) if classes == 2 else (90, 4))
    assert p.shape == (90, classes)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)
    np.testing.assert_array_equal(model.classes_[p.argmax(1)], model.predict(X))
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), p, rtol=1e-9)
    if classes == 2:
        np.testing.assert_array_equal(model.predict(X), model.classes_[(scores > 0).astype(int)])


def test_calibration_lowers_the_log_loss_of_held_out_data():
    """On noisy blobs: fitted temperatures against taking scores of order 1 for logits."""
    better = 0
    for seed in range(5):
        X, y = blobs(seed, 600, spread=2.0)
        model = PlatonicMLPClassifier(30, random_state=0).fit(X[:300], y[:300])
        calibrated = log_loss(y[300:], model.predict_proba(X[300:]))
        model.temperature_ = 1.0
        better += calibrated < log_loss(y[300:], model.predict_proba(X[300:]))
    assert better == 5


# ------------------------------------------------------------------------------------------------ small, degenerate data


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("m", [2, 3, 4, 5, 7, 10])
def test_few_samples(m, projection):
    """Far more units than samples: everything is finite, and separable classes are separated."""
    X, y = blobs(m=m, classes=2, spread=0.1)
    model = PlatonicMLPClassifier((30, 10), projection=projection, random_state=0).fit(X, y)
    assert np.isfinite(model.predict_proba(X)).all()
    if projection != "elm":
        assert model.score(X, y) == 1
    reg = PlatonicMLPRegressor((30, 10), projection=projection, random_state=0).fit(X, X[:, 0])
    assert np.isfinite(reg.predict(X)).all()


def test_a_single_sample():
    assert PlatonicMLPRegressor(5, random_state=0).fit([[1.0, 2.0]], [3.0]).predict([[5.0, 5.0]]) == pytest.approx(3.0)


@pytest.mark.parametrize("solver", ["cholesky", "eig", "svd", "lstsq"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_constant_and_duplicated_columns(projection, solver):
    X, y = blobs()
    wide = np.hstack([X, X, np.full((90, 2), 1e6), np.zeros((90, 1))])
    for scaling in ("relative", "absolute"):
        l2 = "loo" if scaling == "relative" else 1e-6
        model = PlatonicMLPClassifier(12, projection=projection, scaling=scaling, l2=l2, solver=solver, random_state=0)
        if projection == "elm" and scaling == "absolute":
            wide = wide[:, :8]  # plain random weights times 1e6 saturate nothing, but bury the other columns
        assert model.fit(wide, y).score(wide, y) > 0.85


def test_all_columns_constant():
    y = np.array([0, 0, 0, 1, 1])
    model = PlatonicMLPClassifier(5, random_state=0).fit(np.ones((5, 3)), y)
    assert model.predict(np.ones((2, 3))).tolist() == [0, 0]
    assert PlatonicMLPRegressor(5, random_state=0).fit(np.ones((4, 1)), [1.0, 2, 3, 6]).predict(
        [[1.0]]
    ) == pytest.approx(3)


def test_constant_regression_target():
    X, _ = blobs()
    assert PlatonicMLPRegressor(5, random_state=0).fit(X, np.full(90, 1e6)).predict(X) == pytest.approx(1e6, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("projection", ["auto", "random"])
@pytest.mark.parametrize("dataset", ["iris", "wine", "digits"])
def test_float32_scores_as_float64(dataset, projection, iris):
    """Held-out accuracy within two standard errors of a difference between two classifiers (mean of two seeds)."""
    X, y = {
        "iris": lambda: iris,
        "wine": lambda: load_wine(return_X_y=True),
        "digits": lambda: load_digits(return_X_y=True),
    }[dataset]()
    X, y = X[:800], y[:800]
    train, test, a, b = train_test_split(X, y, random_state=0, stratify=y)
    score = {
        (dtype, fit_dtype): np.mean([
            PlatonicMLPClassifier((40, 20), projection=projection, dtype=fit_dtype, random_state=s)
            .fit(train.astype(dtype), a).score(test.astype(dtype), b) for s in range(2)
        ])
        for dtype, fit_dtype in (("f8", None), ("f4", None), ("f4", "float32"))
    }  # fmt: skip
    best = score["f8", None]
    assert best > 0.85
    margin = 2 * np.sqrt(2 * best * (1 - best) / len(b) + 1 / len(b) ** 2)
    assert min(score.values()) >= best - margin


def test_dtypes_of_results():
    X, y = blobs()
    for dtype in (np.float32, np.float64):
        model = PlatonicMLPClassifier(5, random_state=0).fit(X.astype(dtype), y)
        assert model.predict_proba(X.astype(dtype)).dtype == model.hidden(X.astype(dtype)).dtype == dtype
    assert PlatonicMLPClassifier(5, dtype="float32").fit(X, y).coefs_[0].dtype == np.float32
    assert PlatonicMLPClassifier(5, dtype=torch.float64).fit(X.astype(np.float32), y).coefs_[0].dtype == np.float64


def test_integers_and_half_precision():
    X, y = blobs()
    rounded = np.round(X * 10).astype(np.int16)
    assert PlatonicMLPClassifier(10, random_state=0).fit(rounded, y).score(rounded, y) > 0.9
    half = torch.tensor(X, dtype=torch.float16)
    assert PlatonicMLPClassifier(10, random_state=0).fit(half, torch.tensor(y)).score(half, y) > 0.9


# ------------------------------------------------------------------------------------------- arrays, attributes, modules


def test_torch_in_torch_out():
    X, y = blobs()
    a = PlatonicMLPClassifier((10, 5), random_state=0).fit(X, y)
    b = PlatonicMLPClassifier((10, 5), random_state=0).fit(torch.tensor(X, requires_grad=True), torch.tensor(y))
    Xt = torch.tensor(X)
    for name in ("predict", "predict_proba", "decision_function", "hidden"):
        ours = getattr(b, name)(Xt)
        assert isinstance(ours, torch.Tensor)
        assert not ours.requires_grad
        np.testing.assert_allclose(ours.numpy(), getattr(a, name)(X), rtol=0, atol=1e-12)
    for array in [*b.coefs_, *b.intercepts_, b.classes_]:
        assert isinstance(array, torch.Tensor)
    assert b.score(Xt, torch.tensor(y), sample_weight=torch.ones(90)) == a.score(X, y)
    np.testing.assert_allclose(b.predict_proba(X), a.predict_proba(X), atol=1e-12)  # another library is welcome


def test_array_api_arrays_on_another_device():
    import array_api_strict as xp

    X, y = blobs()
    device = xp.Device("device1")
    X_xp, y_xp = xp.asarray(X, device=device), xp.asarray(y, device=device)
    for model in (PlatonicMLPClassifier(10, random_state=0), PlatonicMLPRegressor(10, random_state=0)):
        predicted = model.fit(X_xp, y_xp).predict(X_xp)
        assert predicted.device == model.coefs_[0].device == device
        assert model.score(X_xp, y_xp) == pytest.approx(clone(model).fit(X, y).score(X, y), abs=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_draws_as_the_cpu_does():
    X, y = blobs(m=500)
    here = PlatonicMLPClassifier((20, 10), random_state=0).fit(X, y)
    there = PlatonicMLPClassifier((20, 10), random_state=0).fit(
        torch.tensor(X, device="cuda"), torch.tensor(y, device="cuda")
    )
    assert there.coefs_[0].is_cuda
    np.testing.assert_allclose(
        there.decision_function(torch.tensor(X, device="cuda")).cpu(), here.decision_function(X), atol=1e-5
    )
    assert isinstance(PlatonicMLPClassifier(5, device="cuda").fit(X, y).predict(X), np.ndarray)


def test_hidden_layers_and_attributes():
    X, y = blobs()
    model = PlatonicMLPClassifier((10, 7, 5), activation="tanh", random_state=0).fit(X, y)
    Z = X
    for i, width in enumerate((10, 7, 5)):
        Z = np.tanh(Z @ model.coefs_[i] + model.intercepts_[i])
        np.testing.assert_allclose(model.hidden(X, i), Z, rtol=0, atol=1e-12)
        assert model.layer_scores_[i].width == width
        assert 0 <= model.layer_scores_[i].lsd < 1
        assert 0 <= model.layer_scores_[i].score <= 1
    np.testing.assert_array_equal(model.hidden(X), model.hidden(X, 2))
    np.testing.assert_allclose(
        model.decision_function(X), Z @ model.coefs_[3] + model.intercepts_[3], rtol=0, atol=1e-12
    )
    assert model.layer_scores_[-1].score == pytest.approx(model.score(X, y))
    assert model.n_outputs_ == 3
    with pytest.raises(ValueError, match=r"layer must be an integer in \[-3, 3\), got 3"):
        model.hidden(X, 3)


@pytest.mark.parametrize(
    "activation",
    ["relu", "abs", "tanh", "celu", "identity", torch.sigmoid, torch.nn.PReLU(init=0.3).double(), torch.nn.Softplus()],
    ids=str,
)
def test_to_torch_is_the_same_function(activation):
    X, y = blobs()
    model = PlatonicMLPClassifier((10, 6), activation=activation, random_state=0).fit(X, y)
    module = model.to_torch().double()
    with torch.no_grad():
        out = module(torch.tensor(X)).numpy()
    np.testing.assert_allclose(out, model.decision_function(X), rtol=0, atol=1e-10)
    assert len(module) == 5
    with torch.no_grad():
        module[0].weight.zero_()
    assert np.abs(model.coefs_[0]).max() > 0  # a copy
    reg = PlatonicMLPRegressor((10, 6), activation=activation, random_state=0).fit(X, 100 * X[:, 0] + 7)
    with torch.no_grad():
        np.testing.assert_allclose(
            reg.to_torch().double()(torch.tensor(X))[:, 0].numpy(), reg.predict(X), rtol=0, atol=1e-8
        )


# ------------------------------------------------------------------------------------------------------ tools around them


def test_random_state_repeats_a_fit():
    X, y = blobs()
    make = lambda seed: PlatonicMLPClassifier((10, 5), random_state=seed).fit(X, y).decision_function(X)  # noqa: E731
    np.testing.assert_array_equal(make(3), make(3))
    np.testing.assert_array_equal(make(np.random.RandomState(3)), make(3))
    assert np.abs(make(3) - make(4)).max() > 1e-3


@pytest.mark.parametrize(
    "transport", [lambda e: pickle.loads(pickle.dumps(e)), lambda e: clone(e).fit(*blobs())], ids=["pickle", "clone"]
)
def test_pickle_and_clone(transport):
    X, y = blobs()
    model = PlatonicMLPClassifier((10, 5), activation="abs", class_weight="balanced", random_state=0).fit(X, y)
    np.testing.assert_array_equal(transport(model).predict_proba(X), model.predict_proba(X))


def test_pipeline_grid_search_and_processes(iris):
    X, y = iris
    pipe = make_pipeline(StandardScaler(), PlatonicMLPClassifier(20, random_state=0))
    search = GridSearchCV(
        pipe, {"platonicmlpclassifier__l2": ["loo", 1e-2], "platonicmlpclassifier__activation": ["relu", "tanh"]}, cv=3
    )
    assert search.fit(X, y).best_score_ > 0.9
    alone = cross_val_score(pipe, X, y, cv=4)
    np.testing.assert_allclose(cross_val_score(pipe, X, y, cv=4, n_jobs=2), alone, atol=0.03)
    np.testing.assert_array_equal(
        cross_val_score(PlatonicMLP(20, task="classification", random_state=0), X, y, cv=4).shape, (4,)
    )


@pytest.mark.parametrize("frame", [pandas.DataFrame, polars.DataFrame], ids=["pandas", "polars"])
def test_feature_names(frame, iris):
    X, y = iris
    data = frame({name: X[:, i] for i, name in enumerate("abcd")})
    model = PlatonicMLPClassifier(10, random_state=0).fit(data, y)
    assert model.feature_names_in_.tolist() == list("abcd")
    np.testing.assert_array_equal(model.predict(data), PlatonicMLPClassifier(10, random_state=0).fit(X, y).predict(X))
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame({name: X[:, i] for i, name in enumerate("abce")}))


def test_device_and_verbose(capsys):
    X, y = blobs()
    PlatonicMLPClassifier((5, 4), device="cpu", verbose=True).fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["layer 1/2", "layer 2/2"]
    assert "LSD" in lines[0]
    assert "training score" in lines[0]
    PlatonicMLPClassifier((3,) * 25, device=torch.device("cpu"), verbose=True).fit(X, y)
    written = capsys.readouterr()
    assert written.out == ""
    assert "25/25" in written.err


def test_inputs_are_not_changed():
    X, y = blobs()
    w = np.linspace(0, 2, 90)
    copies = [a.copy() for a in (X, y, w)]
    for projection in PROJECTIONS:
        model = PlatonicMLPClassifier((8, 8), projection=projection, activation="abs").fit(X, y, w)
        model.predict_proba(X)
        model.hidden(X, 0)
        model.score(X, y, w)
    for array, copy in zip((X, y, w), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("solver", ["cholesky", "eig", "svd", "lstsq"])
def test_solvers_agree(solver):
    """Units that are next to nothing on the training rows have a huge penalty in their own units."""
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, train_size=200, stratify=y, random_state=0)
    model = PlatonicMLPClassifier((400,), solver=solver, random_state=0).fit(X, y)
    assert model.score(X_test, y_test) > 0.93 and model.layer_scores_[0].rank == 400


def test_temperature_of_a_fit_that_interpolates():
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, train_size=200, stratify=y, random_state=0)
    exact, nearly = (PlatonicMLPClassifier((400,), l2=l2, random_state=0).fit(X, y) for l2 in (0.0, 1e-14))
    assert exact.temperature_ == pytest.approx(nearly.temperature_, rel=0.05)
    assert log_loss(y_test, exact.predict_proba(X_test)) < 1


def test_weights_of_sum_one_choose_as_weights_of_one_do():
    X, y = load_digits(return_X_y=True)
    X, y = X[:400], y[:400]
    plain = PlatonicMLPClassifier((50,), random_state=0).fit(X, y)
    small = PlatonicMLPClassifier((50,), random_state=0).fit(X, y, np.full(400, 1 / 400))
    assert [s.projection for s in small.layer_scores_] == [s.projection for s in plain.layer_scores_]


def test_numbers_of_any_size():
    X, y = blobs()
    target = X @ np.ones(X.shape[1])
    plain, huge = (PlatonicMLPRegressor((8,), random_state=0).fit(X, target * size) for size in (1, 1e160))
    np.testing.assert_allclose(huge.predict(X), plain.predict(X) * 1e160, rtol=1e-6)
    with pytest.raises(ValueError, match=r"X: some numbers are too large to be squared in torch\.float32"):
        PlatonicMLPClassifier((8,), dtype="float32").fit(X * 1e20, y)
