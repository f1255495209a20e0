"""Estimators in files: what of a fitted estimator goes into :mod:`platonic.persistence`, and how it comes back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state

from platonic.activations import resolve_activation
from platonic.inputs import to_numpy
from platonic.network import LayerRecord
from platonic.persistence import ModelFormatError, load_model, save_model

__all__ = ["load_estimator", "save_estimator"]

_SCALARS = ("n_features_in_", "n_outputs_", "task_", "activation_", "temperature_", "_one_dimensional")


def save_estimator(estimator: Any, path: str | Path) -> None:
    params = estimator.get_params(deep=False)
    for name in ("dtype", "device"):  # objects of torch and NumPy, by name
        value = params[name]
        if value is not None and not isinstance(value, str):
            numpys = name == "dtype" and not isinstance(value, torch.dtype)
            params[name] = np.dtype(value).name if numpys else str(value).removeprefix("torch.")
    if isinstance(params["random_state"], np.random.RandomState):
        raise TypeError("random_state is a RandomState instance, which a file cannot hold: use an integer seed.")
    arrays: dict[str, Any] = {}
    for i, (weight, bias) in enumerate(zip(estimator.coefs_, estimator.intercepts_, strict=True)):
        arrays[f"coefs.{i}"], arrays[f"intercepts.{i}"] = _portable(weight), _portable(bias)
    metadata: dict[str, Any] = {
        "estimator": type(estimator).__name__,
        "params": params,
        "layers": len(estimator.coefs_),
        "layer_scores": [asdict(record) for record in estimator.layer_scores_],
        "attributes": {name: getattr(estimator, name) for name in _SCALARS if hasattr(estimator, name)},
    }
    if hasattr(estimator, "feature_names_in_"):
        metadata["feature_names_in"] = [str(name) for name in estimator.feature_names_in_]
    if hasattr(estimator, "classes_"):
        classes = estimator.classes_
        if isinstance(classes, np.ndarray) and classes.dtype.kind not in "biuf":
            metadata["classes"] = {"dtype": classes.dtype.str, "values": [str(c) for c in classes]}
        else:
            arrays["classes"] = _portable(classes)
    save_model(path, arrays, metadata)


def _portable(array: Any) -> Any:
    return array.cpu() if isinstance(array, torch.Tensor) else to_numpy(array)


def load_estimator(cls: type, path: str | Path) -> Any:
    arrays, metadata = load_model(path)
    try:
        kind = metadata["estimator"]
        if kind != cls.__name__:
            raise ModelFormatError(f"{path}: holds a {kind}, not a {cls.__name__}. Use {kind}.load.")
        estimator = cls(**metadata["params"])
        layers = int(metadata["layers"])
        estimator.coefs_ = [arrays[f"coefs.{i}"] for i in range(layers)]
        estimator.intercepts_ = [arrays[f"intercepts.{i}"] for i in range(layers)]
        estimator.layer_scores_ = [LayerRecord(**record) for record in metadata["layer_scores"]]
        for name in set(metadata["attributes"]) & set(_SCALARS):
            setattr(estimator, name, metadata["attributes"][name])
        if "feature_names_in" in metadata:
            estimator.feature_names_in_ = np.array(metadata["feature_names_in"], dtype=object)
        if "classes" in metadata:
            estimator.classes_ = np.array(metadata["classes"]["values"], dtype=metadata["classes"]["dtype"])
        elif "classes" in arrays:
            estimator.classes_ = arrays["classes"]
        _check_shapes(estimator)
    except ModelFormatError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, MemoryError) as error:
        raise ModelFormatError(f"{path}: not a complete {cls.__name__}: {error!r}.") from error
    return estimator


def _check_shapes(estimator: Any) -> None:
    """Layers must fit one another: a damaged or forged file fails here, not in a prediction."""
    width = estimator.n_features_in_
    for i, (weight, bias) in enumerate(zip(estimator.coefs_, estimator.intercepts_, strict=True)):
        if weight.ndim != 2 or weight.shape[0] != width or tuple(bias.shape) != (weight.shape[1],):
            raise ModelFormatError(f"layer {i}: weights {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit.")
        width = weight.shape[1]
    if not estimator.layer_scores_ or len(estimator.layer_scores_) != len(estimator.coefs_) - 1:
        raise ModelFormatError(f"{len(estimator.coefs_)} layers do not go with {len(estimator.layer_scores_)} scores.")
    if width != estimator.n_outputs_:
        raise ModelFormatError(f"the last layer has {width} outputs, not n_outputs_ = {estimator.n_outputs_}.")
    if estimator.task_ not in ("classification", "regression"):
        raise ModelFormatError(f"the task is {estimator.task_!r}.")
    if estimator.task_ == "classification":
        if estimator.classes_.ndim != 1 or len(estimator.classes_) != max(2, width):
            raise ModelFormatError(
                f"classes of shape {tuple(estimator.classes_.shape)} do not go with {width} outputs."
            )
        if not 0 < estimator.temperature_ < float("inf"):
            raise ModelFormatError(f"the temperature is {estimator.temperature_}.")
    elif not isinstance(estimator._one_dimensional, bool):
        raise ModelFormatError("the number of dimensions of y is missing.")
    if hasattr(estimator, "feature_names_in_") and len(estimator.feature_names_in_) != estimator.n_features_in_:
        raise ModelFormatError(
            f"{len(estimator.feature_names_in_)} feature names for {estimator.n_features_in_} features."
        )
    resolve_activation(estimator.activation_)
    check_random_state(estimator.random_state)
