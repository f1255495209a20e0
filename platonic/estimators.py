"""Step 1 of *fit*: the scikit-learn estimators. They validate X and y, call :mod:`platonic.network`, store results.

An estimator knows no linear algebra. Arrays of any supported library come in through :mod:`platonic_core.arrays`,
and every result goes back to the library and device of the input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import DataConversionWarning
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import Tags, check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from platonic import calibration, estimator_docs, network, parameters, storage
from platonic.activations import resolve_activation
from platonic.inputs import (
    check_same_library,
    to_numpy,
    validate_features,
    validate_regression_targets,
    validate_targets,
    validate_weights,
)
from platonic_core.arrays import Origin, to_torch

__all__ = ["PlatonicMLP", "PlatonicMLPClassifier", "PlatonicMLPRegressor"]

_PREDICT_NUMBERS = 2**26  # numbers of the widest representation that a prediction holds at a time


def _is_classification(estimator: _BasePlatonicMLP) -> bool:
    if getattr(estimator, "task_", estimator._task()) == "classification":
        return True
    raise AttributeError(f"{type(estimator).__name__} has this method only when it fits classes")


class _BasePlatonicMLP(BaseEstimator):
    """Everything the three estimators share; a subclass says what its task is."""

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        *,
        activation: Any = "relu",
        projection: Any = "auto",
        alpha: float = 1.0,
        beta: float = 10.0,
        n_tries: int | None = None,
        l2: float | str = "loo",
        solver: str = "cholesky",
        tol: float | None = None,
        ema: float = 0.2,
        scaling: str = "relative",
        image_shape: Any = None,
        dtype: Any = None,
        device: Any = None,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.projection = projection
        self.alpha = alpha
        self.beta = beta
        self.n_tries = n_tries
        self.l2 = l2
        self.solver = solver
        self.tol = tol
        self.ema = ema
        self.scaling = scaling
        self.image_shape = image_shape
        self.dtype = dtype
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def _task(self) -> str | None:
        raise NotImplementedError

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.array_api_support = True
        tags.input_tags.sparse = False
        return tags

    # ---- fitting ----

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Fit the network.

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
            NumPy, torch or CuPy array, data frame or list; finite numbers.
        y : array of shape (n_samples,) or (n_samples, n_outputs)
            Class labels (integers, booleans, strings) or regression targets.
        sample_weight : array of shape (n_samples,), optional
            Non-negative; a weight of 2 is the same as the row twice, 0 the same as no row, but for its class, which stays one of
            ``classes_``.

        Returns
        -------
        self
        """
        return self._fit(X, y, sample_weight, observe=None)

    def _fit(self, X: Any, y: Any, sample_weight: Any, observe: network.Observer | None) -> Any:
        settings = parameters.check_parameters(self)
        features, origin = validate_features(self, X, reset=True)
        targets, targets_origin = validate_targets(y, len(features))
        weights = validate_weights(sample_weight, features)
        left_out = None if weights is None else weights.clamp_max(1.0)
        task = self._resolve_task(targets)
        group = shift = scale = None
        if task == "classification":
            Y, group, classes = self._encode_classes(to_numpy(targets))
            class_factor = self._class_factor(weights, group, classes)
            if class_factor is not None:
                class_factor = class_factor.to(features.device)
                weights = class_factor if weights is None else weights * class_factor
                left_out = class_factor if left_out is None else left_out * class_factor
        else:
            Y, shift, scale = self._encode_values(targets, weights, settings)
        parameters.check_against_data(settings, self.n_features_in_)
        device = parameters.compute_device(self.device, features)
        dtype = settings.compute_dtype(features)
        keep = None if weights is None else weights > 0

        def enter(tensor: Tensor) -> Tensor:
            return (tensor if keep is None else tensor[keep.to(tensor.device)]).to(device)

        X_t, Y_t = enter(features).to(dtype), enter(Y).to(dtype)
        group, weights, left_out = (None if t is None else enter(t) for t in (group, weights, left_out))
        if group is not None and len(torch.unique(group)) < 2:
            raise ValueError("Classifier can't train when only one class is present (in the rows of positive weight).")
        fit = network.fit_network(
            X_t, Y_t, group, weights, settings.plans, settings.options,
            np.random.default_rng(check_random_state(self.random_state).randint(0, 2**31 - 1, 4)),
            observe, left_out, parameters.progress(self.verbose, settings.plans),
        )  # fmt: skip
        fitted = fit.network
        if scale is not None and shift is not None:
            fitted = network.with_output_scale(fitted, scale.to(device), shift.to(device))
        self.task_ = task
        self.activation_ = self.activation
        self.n_outputs_ = fitted.weights[-1].shape[1]
        self.coefs_ = [origin.back(w.contiguous()) for w in fitted.weights]
        self.intercepts_ = [origin.back(b) for b in fitted.biases]
        self.layer_scores_ = fit.records
        if group is not None:
            self.classes_ = targets_origin.asarray(classes)
            self.temperature_ = calibration.fit_temperature(fit, group, settings.options.readout)
        else:
            self._one_dimensional = targets.ndim == 1
            for name in ("classes_", "temperature_"):
                self.__dict__.pop(name, None)
        return self

    def _resolve_task(self, targets: np.ndarray | Tensor) -> str:
        task = self._task()
        if task is not None:
            return task
        if isinstance(targets, Tensor):
            return "regression" if targets.is_floating_point() else "classification"
        return "regression" if targets.dtype.kind == "f" else "classification"

    def _encode_classes(self, labels: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
        """Targets (m, k) of the classes, class indices (m,), and the classes."""
        if labels.ndim == 2 and labels.shape[1] == 1:
            warnings.warn(
                "A column-vector y was passed when a 1d array was expected. Please change the shape of y to "
                "(n_samples,), for example using ravel().",
                DataConversionWarning,
                stacklevel=4,
            )
            labels = labels[:, 0]
        if labels.ndim != 1:
            raise ValueError(
                f"y should be a 1d array of class labels, got an array of shape {labels.shape} instead. "
                "Multilabel and multi-output classification are not supported: fit one classifier per column."
            )
        check_classification_targets(labels)
        classes, group = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"Classifier can't train when only one class is present. y holds only the class {classes[0]!r}."
            )
        index = torch.from_numpy(np.ascontiguousarray(group))
        if len(classes) == 2:
            Y = (2.0 * index - 1.0)[:, None].double()
        else:
            Y = torch.nn.functional.one_hot(index, len(classes)).double()
        return Y, index, classes

    def _encode_values(
        self, targets: np.ndarray | Tensor, weights: Tensor | None, settings: parameters.Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Targets (m, k), standardised under relative scaling; and the shift and scale that undo it."""
        Y = validate_regression_targets(targets)
        if not settings.options.readout.relative:
            return Y, Y.new_zeros(Y.shape[1]), Y.new_ones(Y.shape[1])
        w = torch.ones(len(Y), dtype=torch.float64, device=Y.device) if weights is None else weights.to(Y.device)
        mean = (w @ Y) / w.sum()
        most = (Y - mean).abs().amax(0)
        most = torch.where(most > 0, most, 1.0)  # squares of numbers of any size
        std = ((w @ ((Y - mean) / most).square()) / w.sum()).sqrt() * most
        std = torch.where(std > 32 * torch.finfo(torch.float64).eps * mean.abs(), std, 1.0)
        return (Y - mean) / std, mean, std

    def _class_factor(self, weights: Tensor | None, group: Tensor, classes: np.ndarray) -> Tensor | None:
        """(m,): the class weight of each row, or None."""
        class_weight = getattr(self, "class_weight", None)
        if class_weight is None:
            return None
        per_class = compute_class_weight(
            class_weight, classes=classes, y=classes[group.numpy()],
            sample_weight=None if weights is None else weights.cpu().numpy(),
        )  # fmt: skip
        factors = np.asarray(per_class, dtype=np.float64)
        if not (np.isfinite(factors).all() and (factors >= 0).all()):
            raise ValueError(f"class_weight must hold finite numbers of at least 0, got {class_weight!r}.")
        return torch.from_numpy(factors)[group]

    # ---- predicting ----

    def _network(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> network.Network:
        activation = resolve_activation(self.activation_)
        weights = [to_torch(w)[0].to(device=device, dtype=dtype) for w in self.coefs_]
        biases = [to_torch(b)[0].to(device=device, dtype=dtype) for b in self.intercepts_]
        return network.Network(weights, biases, [activation] * (len(weights) - 1))

    def _forward(self, X: Any, method: str, run: Callable[[network.Network, Tensor], Tensor]) -> tuple[Tensor, Origin]:
        """`run` over blocks of rows of X, in the dtype the network was fitted in."""
        check_is_fitted(self)
        check_same_library(self, X, method)
        features, origin = validate_features(self, X, reset=False)
        device = parameters.compute_device(self.device, features)
        net = self._network(device=device)
        widest = max(w.shape[1] for w in net.weights)
        block = max(1, _PREDICT_NUMBERS // max(1, widest))
        dtype = net.weights[0].dtype
        out = torch.cat([run(net, rows.to(device=device, dtype=dtype)) for rows in features.split(block)])
        return out.to(features.dtype), origin

    def _output(self, X: Any, method: str) -> tuple[Tensor, Origin]:
        return self._forward(X, method, lambda net, rows: net.output(rows))

    @available_if(_is_classification)
    def decision_function(self, X: Any) -> Any:
        """Output of the network: (n_samples,) for two classes, positive for the second; else (n_samples, n_classes)."""
        output, origin = self._output(X, "decision_function")
        return origin.back(output[:, 0] if output.shape[1] == 1 else output)

    @available_if(_is_classification)
    def predict_proba(self, X: Any) -> Any:
        """Class probabilities (n_samples, n_classes): the softmax of the outputs divided by ``temperature_``.

        The temperature minimises the log loss of the training samples' leave-one-out outputs (of up to 4096 of them): what
        the output layer would have predicted for a sample had it been fitted without it. It is one positive number, so
        probabilities order the classes as `decision_function` does.
        """
        output, origin = self._output(X, "predict_proba")
        return origin.back(calibration.probabilities(output, self.temperature_))

    @available_if(_is_classification)
    def predict_log_proba(self, X: Any) -> Any:
        """Logarithm of the class probabilities (n_samples, n_classes)."""
        output, origin = self._output(X, "predict_log_proba")
        return origin.back(calibration.log_probabilities(output, self.temperature_))

    def predict(self, X: Any) -> Any:
        """Class labels (n_samples,), or regression values in the shape that y had."""
        output, origin = self._output(X, "predict")
        if self.task_ == "classification":
            index = (output[:, 0] > 0).long() if output.shape[1] == 1 else output.argmax(1)
            return origin.asarray(to_numpy(self.classes_)[index.cpu().numpy()])
        return origin.back(output[:, 0] if self._one_dimensional else output)

    def hidden(self, X: Any, layer: int = -1) -> Any:
        """Representation (n_samples, width) of X after hidden layer `layer` (0 is the first; negative counts from the last)."""
        check_is_fitted(self)
        count = len(self.coefs_) - 1
        if not isinstance(layer, int | np.integer) or not -count <= layer < count:
            raise ValueError(f"layer must be an integer in [{-count}, {count}), got {layer!r}.")
        output, origin = self._forward(X, "hidden", lambda net, rows: net.hidden(rows, int(layer) % count))
        return origin.back(output)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy (classes) or coefficient of determination (regression) of the predictions for X."""
        predicted = to_numpy(self.predict(X))
        weight = None if sample_weight is None else to_numpy(sample_weight)
        measure = accuracy_score if self.task_ == "classification" else r2_score
        return float(measure(to_numpy(y), predicted, sample_weight=weight))

    # ---- other forms ----

    def to_torch(self) -> nn.Sequential:
        """The fitted network as ``nn.Sequential`` of ``nn.Linear`` and activation modules.

        Its output is that of the output layer, (n_samples, n_outputs): for classes the decision scores (one column for two
        classes), for regression the predictions. Weights are copies in the dtype the network was fitted in.
        """
        check_is_fitted(self)
        net = self._network()
        modules: list[nn.Module] = []
        for i, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta", dtype=weight.dtype).to_empty(
                device=weight.device
            )
            with torch.no_grad():
                linear.weight.copy_(weight.T)
                linear.bias.copy_(bias)
            modules.append(linear)
            if i < len(net.activations):
                modules.append(net.activations[i].module())
        return nn.Sequential(*modules)

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator to one safetensors file, without pickle. See :mod:`platonic.persistence`.

        Raises
        ------
        TypeError
            If a parameter has no JSON form, such as a callable activation: use one of the named ones, or pickle.
        """
        check_is_fitted(self)
        storage.save_estimator(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Any:
        """Read an estimator that :meth:`save` wrote.

        Raises
        ------
        ModelFormatError
            If the file is not such a model, or holds another kind of estimator.
        """
        return storage.load_estimator(cls, path)


class PlatonicMLPClassifier(ClassifierMixin, _BasePlatonicMLP):
    __doc__ = estimator_docs.CLASSIFIER

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        *,
        activation: Any = "relu",
        projection: Any = "auto",
        alpha: float = 1.0,
        beta: float = 10.0,
        n_tries: int | None = None,
        l2: float | str = "loo",
        solver: str = "cholesky",
        tol: float | None = None,
        ema: float = 0.2,
        scaling: str = "relative",
        image_shape: Any = None,
        class_weight: Any = None,
        dtype: Any = None,
        device: Any = None,
        random_state: Any = None,
        verbose: bool = False,
    ):
        super().__init__(
            hidden_layer_sizes, activation=activation, projection=projection, alpha=alpha, beta=beta, n_tries=n_tries,
            l2=l2, solver=solver, tol=tol, ema=ema, scaling=scaling, image_shape=image_shape, dtype=dtype, device=device,
            random_state=random_state, verbose=verbose,
        )  # fmt: skip
        self.class_weight = class_weight

    score = _BasePlatonicMLP.score  # not the mixin's, which takes NumPy arrays only

    def _task(self) -> str:
        return "classification"


class PlatonicMLPRegressor(RegressorMixin, _BasePlatonicMLP):
    __doc__ = estimator_docs.REGRESSOR

    score = _BasePlatonicMLP.score  # not the mixin's, which takes NumPy arrays only

    def _task(self) -> str:
        return "regression"

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class PlatonicMLP(_BasePlatonicMLP):
    __doc__ = estimator_docs.EITHER

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        *,
        task: str | None = None,
        activation: Any = "relu",
        projection: Any = "auto",
        alpha: float = 1.0,
        beta: float = 10.0,
        n_tries: int | None = None,
        l2: float | str = "loo",
        solver: str = "cholesky",
        tol: float | None = None,
        ema: float = 0.2,
        scaling: str = "relative",
        image_shape: Any = None,
        class_weight: Any = None,
        dtype: Any = None,
        device: Any = None,
        random_state: Any = None,
        verbose: bool = False,
    ):
        super().__init__(
            hidden_layer_sizes, activation=activation, projection=projection, alpha=alpha, beta=beta, n_tries=n_tries,
            l2=l2, solver=solver, tol=tol, ema=ema, scaling=scaling, image_shape=image_shape, dtype=dtype, device=device,
            random_state=random_state, verbose=verbose,
        )  # fmt: skip
        self.task = task
        self.class_weight = class_weight

    def _task(self) -> str | None:
        return self.task

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        if self.task == "classification":
            tags.estimator_type = "classifier"
            tags.classifier_tags = PlatonicMLPClassifier().__sklearn_tags__().classifier_tags
        elif self.task == "regression":
            tags.estimator_type = "regressor"
            tags.regressor_tags = PlatonicMLPRegressor().__sklearn_tags__().regressor_tags
        return tags
