"""Step 2 of *fit*: X, y and sample weights as checked tensors, with errors in scikit-learn's words.

NumPy arrays, lists and data frames go through scikit-learn's own validation; torch tensors, CuPy arrays and other array
API libraries are checked here, on their device, so that nothing is copied to the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn import get_config
from sklearn.base import BaseEstimator
from sklearn.utils.validation import _check_sample_weight, validate_data

from platonic_core.arrays import Origin, library_of, to_torch

__all__ = [
    "check_same_library",
    "to_numpy",
    "validate_features",
    "validate_regression_targets",
    "validate_targets",
    "validate_weights",
]


def is_foreign(array: Any) -> bool:
    """Whether `array` belongs to an array library other than NumPy (data frames and lists do not)."""
    return isinstance(array, torch.Tensor) or (
        hasattr(array, "__array_namespace__") and not isinstance(array, np.ndarray | np.generic)
    )


def to_numpy(array: Any) -> np.ndarray:
    """`array`, of any supported library and device, as a NumPy array."""
    if isinstance(array, np.ndarray) or not is_foreign(array):
        return np.asarray(array)
    tensor = to_torch(array)[0].cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # NumPy has no such type


def validate_features(estimator: BaseEstimator, X: Any, *, reset: bool) -> tuple[torch.Tensor, Origin]:
    """X (m, n) as a finite float32 or float64 tensor; sets (`reset`) or checks ``n_features_in_``.

    Integers and booleans become float64, half precision float32.
    """
    if is_foreign(X):
        tensor, origin = to_torch(X)
        _check_tensor(estimator, tensor, reset)
        return _floating(tensor), origin
    X = validate_data(estimator, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=1)
    return to_torch(X)


def check_same_library(estimator: BaseEstimator, X: Any, method: str) -> None:
    """Under scikit-learn's array API dispatch, X must be of the library and on the device that the estimator was fitted with.

    Without dispatch any supported library may be used for prediction.
    """
    if not get_config()["array_api_dispatch"]:
        return
    fitted = estimator.coefs_[0]
    if library_of(fitted) != library_of(X) or (
        library_of(X) == "torch" and (not isinstance(X, torch.Tensor) or fitted.device != X.device)
    ):
        raise ValueError(
            f"Inputs passed to {type(estimator).__name__}.{method}() must use the same namespace and the same device as "
            f"those passed to fit(): it was fitted with {library_of(fitted)} arrays, this is an array of {library_of(X)}."
        )


def _floating(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.to(torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else torch.float64)


def _check_tensor(estimator: BaseEstimator, tensor: torch.Tensor, reset: bool) -> None:
    name = type(estimator).__name__
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} expects a dense array, got a tensor of layout {tensor.layout}. Use X.to_dense().")
    if tensor.dtype.is_complex:
        raise ValueError("Complex data not supported")
    if tensor.ndim != 2:
        raise ValueError(
            f"Expected 2D array, got {tensor.ndim}D array instead (shape {tuple(tensor.shape)}). Reshape your data "
            "either using array.reshape(-1, 1) if your data has a single feature or array.reshape(1, -1) if it "
            "contains a single sample."
        )
    for count, what in zip(tensor.shape, ("sample", "feature"), strict=True):
        if count == 0:
            raise ValueError(
                f"Found array with 0 {what}(s) (shape={tuple(tensor.shape)}) while a minimum of 1 is required by {name}."
            )
    if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
        what = "NaN" if torch.isnan(tensor).any() else f"infinity or a value too large for {tensor.dtype}"
        raise ValueError(f"Input X contains {what}.")
    if reset:
        estimator.n_features_in_ = tensor.shape[1]
        if hasattr(estimator, "feature_names_in_"):
            del estimator.feature_names_in_
    elif tensor.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {tensor.shape[1]} features, but {name} is expecting {estimator.n_features_in_} features as input."
        )


def validate_targets(y: Any, n_samples: int) -> tuple[np.ndarray | torch.Tensor, Origin]:
    """y as a 1-D or 2-D array with `n_samples` rows (a tensor if it is of an array library, else NumPy), and its origin."""
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None")
    if is_foreign(y):
        y, origin = to_torch(y)
    else:
        y, origin = np.asarray(y), Origin("numpy", torch.device("cpu"))
    if y.ndim not in (1, 2):
        raise ValueError(
            f"y should be a 1d array or a 2d array of outputs, got an array of shape {tuple(y.shape)} instead."
        )
    if len(y) != n_samples:
        raise ValueError(f"Found input variables with inconsistent numbers of samples: [{n_samples}, {len(y)}]")
    return y, origin


def validate_regression_targets(y: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Regression targets as a finite float64 tensor (m, k)."""
    if isinstance(y, np.ndarray):
        if y.dtype.kind not in "biufc":
            try:
                y = y.astype(np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"Regression needs numeric targets, got y of dtype {y.dtype}: {error}") from None
        y = to_torch(y)[0]
    if y.dtype.is_complex:
        raise ValueError("Complex data not supported")
    y = y.double()
    if not torch.isfinite(y).all():
        raise ValueError("Input y contains NaN." if torch.isnan(y).any() else "Input y contains infinity.")
    return y[:, None] if y.ndim == 1 else y


def validate_weights(sample_weight: Any, X: torch.Tensor) -> torch.Tensor | None:
    """Sample weights (m,) as float64 on the device of `X`, or None. All zero, negative or non-finite ones are errors."""
    if sample_weight is None:
        return None
    if is_foreign(sample_weight):
        sample_weight = to_numpy(sample_weight)
    weights = _check_sample_weight(sample_weight, np.empty((len(X), 1)), dtype=np.float64, ensure_non_negative=True)
    if not weights.any():
        raise ValueError("sample_weight must have at least one positive entry, all are zero.")
    return torch.from_numpy(np.array(weights)).to(X.device)
