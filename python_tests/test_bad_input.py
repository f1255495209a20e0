"""Every kind of bad input, and the words that say what was expected, what came, and what to do."""

from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.exceptions import NotFittedError

from platonic import PlatonicMLP, PlatonicMLPClassifier, PlatonicMLPRegressor

X = np.random.default_rng(0).standard_normal((20, 4))
Y = np.arange(20) % 3


def with_value(value):
    bad = X.copy()
    bad[3, 1] = value
    return bad


BAD_X = {
    "nan": (with_value(np.nan), ValueError, "Input X contains NaN"),
    "inf": (with_value(np.inf), ValueError, "Input X contains infinity"),
    "1-D": (X[:, 0], ValueError, "Expected 2D array, got 1D array instead"),
    "3-D": (X[:, :, None], ValueError, "dim 3|got 3D array"),
    "no rows": (X[:0], ValueError, r"Found array with 0 sample\(s\)"),
    "no columns": (
        X[:, :0],
        ValueError,
        r"(Found array with )?0 feature\(s\) \(shape=\(20, 0\)\) while a minimum of 1 is required",
    ),
    "complex": (X + 1j, ValueError, "Complex data not supported"),
}


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("name", BAD_X)
def test_bad_x(name, convert):
    bad, error, words = BAD_X[name]
    with pytest.raises(error, match=words):
        PlatonicMLPClassifier(5).fit(convert(bad), Y[: len(bad)])


def test_sparse_strings_and_lengths():
    with pytest.raises(TypeError, match=r"(?i)sparse data was passed"):
        PlatonicMLPClassifier(5).fit(scipy.sparse.csr_matrix(X), Y)
    with pytest.raises(
        TypeError, match=r"expects a dense array, got a tensor of layout torch.sparse_coo. Use X.to_dense\(\)"
    ):
        PlatonicMLPClassifier(5).fit(torch.tensor(X).to_sparse(), Y)
    with pytest.raises(ValueError, match="could not convert string to float"):
        PlatonicMLPClassifier(5).fit([["a", "b"]] * 20, Y)
    for data in (X, torch.tensor(X)):
        with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[20, 19\]"):
            PlatonicMLPClassifier(5).fit(data, Y[:19])


def test_prediction():
    model = PlatonicMLPClassifier(5)
    for method in ("predict", "predict_proba", "decision_function", "hidden"):
        with pytest.raises(NotFittedError):
            getattr(model, method)(X)
    for method in ("to_torch", "save"):
        with pytest.raises(NotFittedError):
            getattr(model, method)(*(["x"] if method == "save" else []))
    model.fit(X, Y)
    for data in (X[:, :3], torch.tensor(X[:, :3])):
        with pytest.raises(
            ValueError, match="X has 3 features, but PlatonicMLPClassifier is expecting 4 features as input"
        ):
            model.predict(data)
    with pytest.raises(ValueError, match="contains NaN"):
        model.predict(with_value(np.nan))


BAD_Y = [
    (
        PlatonicMLPClassifier,
        np.zeros(20, int),
        "Classifier can't train when only one class is present. y holds only the class",
    ),
    (PlatonicMLP, np.array(["a"] * 20), "only one class is present"),
    (PlatonicMLPClassifier, X[:, 0], "Unknown label type: continuous"),
    (PlatonicMLPClassifier, np.stack([Y, Y], 1), "fit one classifier per column"),
    (PlatonicMLPClassifier, np.where(Y == 0, np.nan, Y), "Input (y )?contains NaN"),
    (PlatonicMLPRegressor, np.where(Y == 0, np.nan, 1.0), "Input y contains NaN"),
    (PlatonicMLPRegressor, np.where(Y == 0, np.inf, 1.0), "Input y contains infinity"),
    (PlatonicMLPRegressor, np.array(["a"] * 20), "Regression needs numeric targets, got y of dtype"),
    (PlatonicMLPRegressor, X[:, 0] + 1j, "[Cc]omplex"),
    (PlatonicMLPRegressor, X[:, :, None], "y should be a 1d array or a 2d array of outputs"),
    (PlatonicMLPClassifier, None, "requires y to be passed, but the target y is None"),
]


@pytest.mark.parametrize(("kind", "y", "words"), BAD_Y, ids=range(len(BAD_Y)))
def test_bad_y(kind, y, words):
    with pytest.raises(ValueError, match=words):
        kind(5).fit(X, y)


BAD_WEIGHTS = [
    (np.zeros(20), "must have at least one positive entry|Sample weights must contain at least one non-zero number"),
    (np.where(Y == 0, -1.0, 1.0), "Negative values"),
    (np.where(Y == 0, np.nan, 1.0), "contains NaN"),
    (np.where(Y == 0, np.inf, 1.0), "contains infinity"),
    (np.ones((20, 2)), "[Ss]ample weights must be 1D array or scalar"),
    (np.ones(19), r"sample_weight.shape == \(19,\), expected \(20,\)"),
    ((Y == 0).astype(float), "only one class is present"),
]


@pytest.mark.parametrize(("weights", "words"), BAD_WEIGHTS, ids=range(len(BAD_WEIGHTS)))
def test_bad_weights(weights, words):
    for convert in (np.asarray, torch.as_tensor):
        with pytest.raises(ValueError, match=words):
            PlatonicMLPClassifier(5).fit(X, Y, sample_weight=convert(weights))


def test_class_weights_of_unknown_classes():
    with pytest.raises(ValueError, match="class_weight"):
        PlatonicMLPClassifier(5, class_weight="even").fit(X, Y)


BAD_PARAMETERS = [
    (
        {"hidden_layer_sizes": ()},
        "hidden_layer_sizes must name at least one layer, got none. For a linear model use Ridge",
    ),
    ({"hidden_layer_sizes": (5, 0)}, "hidden_layer_sizes must be positive integers, got (5, 0)"),
    ({"hidden_layer_sizes": 2.5}, "hidden_layer_sizes must be positive integers, got 2.5"),
    ({"hidden_layer_sizes": True}, "hidden_layer_sizes must be positive integers, got True"),
    ({"hidden_layer_sizes": "10"}, "hidden_layer_sizes must be positive integers, got '10'"),
    (
        {"activation": "sin"},
        "activation must be one of ['abs', 'celu', 'identity', 'relu', 'tanh'] or a callable, got 'sin'",
    ),
    ({"activation": 3}, "or a callable, got 3"),
    ({"activation": lambda z: z.sum(1)}, "activation must map a tensor to a tensor of the same shape and dtype"),
    ({"activation": lambda z: z > 0}, "it returned torch.bool of shape"),
    ({"activation": lambda z: 3}, "it returned int"),
    ({"projection": "pca"}, "projection must be one of ['auto', 'random',"),
    ({"projection": ("auto", "auto")}, "projection names 2 layers, but hidden_layer_sizes has 1"),
    ({"projection": "platonic_pca", "hidden_layer_sizes": 8}, "[Z | Y] has only 4 + 3 principal components"),
    ({"alpha": 0}, "alpha must be a number in (0, inf), got 0"),
    ({"alpha": float("nan")}, "alpha must be a number in (0, inf), got nan"),
    ({"beta": -1}, "beta must be a number in [0, inf), got -1"),
    ({"l2": -1e-3}, "l2 must be a number in [0, inf) or 'loo', got -0.001"),
    ({"l2": "auto"}, "l2 must be a number in [0, inf) or 'loo', got 'auto'"),
    ({"tol": 2}, "tol must be a number in [0, 1] or None, got 2"),
    ({"ema": 1.5}, "ema must be a number in [0, 1], got 1.5"),
    ({"solver": "lu"}, "solver must be one of ['cholesky', 'eig', 'svd', 'pinv', 'lstsq'], got 'lu'"),
    ({"scaling": "none"}, "scaling must be one of ['relative', 'absolute'], got 'none'"),
    ({"n_tries": 0}, "n_tries must be an integer of at least 1, got 0"),
    (
        {"n_tries": 3, "projection": "sorted_pca"},
        "n_tries=3 needs a projection that draws: every try of ['sorted_pca'] is the same",
    ),
    ({"image_shape": (3, 3)}, "image_shape=(3, 3) has 9 pixels, but X has 4 features"),
    ({"image_shape": (4,)}, "image_shape must be (height, width) or (height, width, channels), got (4,)"),
    ({"image_shape": 4}, "image_shape must be (height, width) or (height, width, channels), got (4,)"),
    ({"image_shape": (2.0, 2)}, "image_shape must be an integer of at least 1, got 2.0"),
    (
        {"image_shape": (2, 2), "projection": "elm"},
        "image_shape is used where the first layer's projection is 'auto' or 'pairs'",
    ),
    (
        {"image_shape": (2, 2), "hidden_layer_sizes": (3, 3), "projection": ["elm", "pairs"]},
        "image_shape is used where the first",
    ),
    ({"projection": None}, "projection must be a name or a name for each layer, got None"),
    ({"projection": 3}, "projection must be a name or a name for each layer, got 3"),
    ({"class_weight": {0: -5}}, "class_weight must hold finite numbers of at least 0, got {0: -5}"),
    ({"class_weight": {0: float("nan")}}, "class_weight must hold finite numbers of at least 0"),
    ({"class_weight": {0: float("inf")}}, "class_weight must hold finite numbers of at least 0"),
    ({"dtype": "float16"}, "dtype must be 'float32', 'float64' or None, got 'float16'"),
    ({"dtype": "shoe"}, "dtype must be 'float32', 'float64' or None, got 'shoe'"),
    ({"device": "shoe"}, "device must name a device that torch can use here, got 'shoe'"),
    ({"random_state": "x"}, "cannot be used to seed"),
]


@pytest.mark.parametrize(
    ("parameters", "words"), BAD_PARAMETERS, ids=[f"{i}-{next(iter(p))}" for i, (p, _) in enumerate(BAD_PARAMETERS)]
)
def test_bad_parameters(parameters, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        PlatonicMLPClassifier(**{"hidden_layer_sizes": 5, **parameters}).fit(X, Y)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_absent():
    with pytest.raises(ValueError, match="device must name a device that torch can use here, got 'cuda'"):
        PlatonicMLPClassifier(5, device="cuda").fit(X, Y)


def test_unknown_task():
    with pytest.raises(
        ValueError, match=re.escape("task must be one of ['classification', 'regression'], got 'sorting'")
    ):
        PlatonicMLP(5, task="sorting").fit(X, Y)


@pytest.mark.parametrize("projection", ["auto", "random", "elm"])
@pytest.mark.parametrize("solver", ["cholesky", "svd"])
def test_overflow(projection, solver):
    """An activation that leaves the range of floats ends in an error, not in a loop or in weights that are not numbers."""
    model = PlatonicMLPClassifier(
        5, activation=lambda z: torch.exp(1e4 * z.abs()), projection=projection, solver=solver
    )
    with pytest.raises(ValueError, match=r"overflowed. Scale X, or lower alpha or beta"):
        model.fit(X, Y)


def test_a_failed_fit_of_a_later_layer_names_its_widths():
    with pytest.raises(ValueError, match=re.escape("a layer of width 30 was asked for, but [Z | Y] has only 6 + 3")):
        PlatonicMLPClassifier((6, 30), projection=("random", "platonic_pca")).fit(X, Y)


def test_pairs_with_an_image_shape_in_later_layers():
    assert PlatonicMLPClassifier((9, 7), projection="pairs", image_shape=(2, 2)).fit(X, Y).coefs_[1].shape == (9, 7)
