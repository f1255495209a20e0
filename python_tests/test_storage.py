"""Estimators in files: every kind of parameter and class comes back, damaged and forged files are refused."""

from __future__ import annotations

import copy

import numpy as np
import pandas
import pytest
import torch

from platonic import ModelFormatError, PlatonicMLP, PlatonicMLPClassifier, PlatonicMLPRegressor
from platonic.persistence import load_model, save_model


def blobs(m=40):
    rng = np.random.default_rng(0)
    y = np.arange(m) % 3
    return rng.standard_normal((m, 4)) + 3 * np.eye(3, 4)[y], y


PARAMETERS = {
    "defaults": {},
    "lists": {"hidden_layer_sizes": [7, 5], "projection": ["pairs", "random"]},
    "tuples": {"hidden_layer_sizes": (7, 5), "projection": ("elm", "random"), "image_shape": None},
    "numbers": {"hidden_layer_sizes": np.int64(6), "alpha": np.float32(2), "beta": 3, "l2": 1e-3, "ema": 1.0, "n_tries": 2},
    "names": {"activation": "celu", "solver": "svd", "tol": 1e-9, "scaling": "absolute", "projection": "random"},
    "torch objects": {"dtype": torch.float32, "device": torch.device("cpu")},
    "numpy type": {"dtype": np.float32},
    "python type": {"dtype": float},
    "numpy dtype": {"dtype": "float64", "device": "cpu", "verbose": False, "random_state": 7},
    "image": {"image_shape": (2, 2), "projection": "pairs"},
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_round_trip_of_parameters(tmp_path, name):
    X, y = blobs()
    model = PlatonicMLPClassifier(
        **{"hidden_layer_sizes": (6,), "random_state": 0, "class_weight": {0: 1.0, 1: 2.0, 2: 1}, **PARAMETERS[name]}
    )
    path = tmp_path / "model.safetensors"
    model.fit(X, y).save(path)
    loaded = PlatonicMLPClassifier.load(path)
    assert all(w.flags.c_contiguous for w in model.coefs_)  # or products would round otherwise than after loading
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
    for key, value in model.get_params().items():
        if key in ("dtype", "device") and value is not None:
            value = np.dtype(value).name if isinstance(value, type) else str(value).removeprefix("torch.")
        assert getattr(loaded, key) == value, key
        assert type(getattr(loaded, key)) is type(value), key
    assert loaded.layer_scores_ == model.layer_scores_
    np.testing.assert_allclose(loaded.fit(X, y).predict_proba(X), model.predict_proba(X), atol=1e-9)


@pytest.mark.parametrize(
    "labels",
    [[0, 1, 2], ["a", "bc", "déf"], [-1.0, 0.0, 7.0], np.array(["x", "y", "zz"], object), np.uint8([3, 4, 9])],
    ids=str,
)
def test_classes_come_back(tmp_path, labels):
    X, y = blobs()
    labels = np.asarray(labels)
    model = PlatonicMLPClassifier(5, random_state=0).fit(X, labels[y])
    model.save(tmp_path / "m")
    loaded = PlatonicMLPClassifier.load(tmp_path / "m")
    assert loaded.classes_.dtype == model.classes_.dtype
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))


def test_booleans_regression_names_and_torch(tmp_path):
    X, y = blobs()
    for model, data, target in (
        (PlatonicMLP(5, random_state=0), X, y > 0),
        (PlatonicMLPRegressor(5, random_state=0), pandas.DataFrame(X, columns=list("abcd")), X[:, 0]),
        (PlatonicMLPRegressor(5, random_state=0), X, X[:, :1]),
        (PlatonicMLP(5, random_state=0), torch.tensor(X), torch.tensor(y)),
    ):
        model.fit(data, target).save(tmp_path / "m")
        loaded = type(model).load(tmp_path / "m")
        ours, theirs = loaded.predict(data), model.predict(data)
        assert type(ours) is type(theirs)
        assert ours.shape == theirs.shape
        assert (ours == theirs).all()
        assert type(loaded.coefs_[0]) is type(model.coefs_[0])
        assert getattr(loaded, "feature_names_in_", "none") is not None
        assert hasattr(loaded, "feature_names_in_") == hasattr(model, "feature_names_in_")


def test_what_cannot_be_saved(tmp_path):
    X, y = blobs()
    path = tmp_path / "m"
    with pytest.raises(TypeError, match="activation"):
        PlatonicMLPClassifier(5, activation=torch.sigmoid).fit(X, y).save(path)
    with pytest.raises(TypeError, match="random_state is a RandomState instance"):
        PlatonicMLPClassifier(5, random_state=np.random.RandomState(0)).fit(X, y).save(path)
    assert not path.exists()


def test_the_wrong_class(tmp_path):
    X, y = blobs()
    PlatonicMLPClassifier(5).fit(X, y).save(tmp_path / "m")
    with pytest.raises(
        ModelFormatError,
        match=r"holds a PlatonicMLPClassifier, not a PlatonicMLPRegressor. Use PlatonicMLPClassifier.load",
    ):
        PlatonicMLPRegressor.load(tmp_path / "m")


def test_truncated_and_missing_files(tmp_path):
    X, y = blobs()
    path = tmp_path / "m"
    PlatonicMLPClassifier(5).fit(X, y).save(path)
    content = path.read_bytes()
    for size in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ModelFormatError):
            PlatonicMLPClassifier.load(path)
    with pytest.raises(FileNotFoundError):
        PlatonicMLPClassifier.load(tmp_path / "none")


def drop(key):
    return lambda arrays, meta: meta["attributes"].pop(key)


def assign(key, value):
    return lambda arrays, meta: meta["attributes"].update({key: value})


FORGERIES = {
    "bias": lambda arrays, meta: arrays.update({"intercepts.0": np.zeros(4)}),
    "width": lambda arrays, meta: arrays.update({"coefs.1": np.zeros((6, 3))}),
    "dimensions": lambda arrays, meta: arrays.update({"coefs.0": np.zeros((4, 5, 1))}),
    "no weights": lambda arrays, meta: arrays.pop("coefs.1"),
    "no layers": lambda arrays, meta: meta.update(layers=0),
    "layers": lambda arrays, meta: meta.update(layers="two"),
    "more layers": lambda arrays, meta: meta.update(layers=10**9),
    "scores": lambda arrays, meta: meta.update(layer_scores=[]),
    "score": lambda arrays, meta: meta.update(layer_scores=[{"width": 1}]),
    "parameter": lambda arrays, meta: meta["params"].update(shoes=1),
    "random state": lambda arrays, meta: meta["params"].update(random_state="x"),
    "classes": lambda arrays, meta: arrays.update(classes=np.arange(7)),
    "no classes": lambda arrays, meta: arrays.pop("classes"),
    "class dtype": lambda arrays, meta: meta.update(classes={"dtype": "nonsense", "values": ["a", "b", "c"]}),
    "names": lambda arrays, meta: meta.update(feature_names_in=["a"]),
    "no temperature": drop("temperature_"),
    "temperature": assign("temperature_", -1.0),
    "no task": drop("task_"),
    "task": assign("task_", "sorting"),
    "activation": assign("activation_", "sin"),
    "features": assign("n_features_in_", 9),
    "outputs": assign("n_outputs_", "3"),
    "no attributes": lambda arrays, meta: meta.pop("attributes"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_files(tmp_path, name):
    """Whatever does not fit together is found when it is read, not in a prediction."""
    X, y = blobs()
    path = tmp_path / "m"
    PlatonicMLPClassifier(5).fit(X, y).save(path)
    arrays, meta = load_model(path)
    meta = copy.deepcopy(meta)
    FORGERIES[name](arrays, meta)
    save_model(path, arrays, meta)
    with pytest.raises(ModelFormatError):
        PlatonicMLPClassifier.load(path)
