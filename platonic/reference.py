"""Plain NumPy references of the kernels in float64: tests hold every device and instruction set to them."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["activation", "gram", "sorted_pca"]

# --- gram, sorted_pca -------------------------------------------------------------------------------------------------

_ACTIVATIONS = {
    "identity": lambda a: a,
    "relu": lambda a: np.maximum(a, 0),
    "abs": np.abs,
    "tanh": np.tanh,
    "celu": lambda a: np.where(a > 0, a, np.expm1(np.minimum(a, 0))),
}


def activation(name: str, a: np.ndarray) -> np.ndarray:
    """act(a), elementwise."""
    return _ACTIVATIONS[name](a)


def gram(
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    weight: Any = None,
    bias: Any = None,
    activation: str = "identity",
    x_mean: Any = None,
    x_scale: Any = None,
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """(gram [p, p], mean [p], total, z [m, width]) of ``platonic._ops.gram``, by its definition in two passes."""
    z = np.asarray(x, np.float64)
    if x_mean is not None:
        z = (z - np.asarray(x_mean, np.float64)) / np.asarray(x_scale, np.float64)
    if weight is not None:
        z = z @ np.asarray(weight, np.float64)
        z = _ACTIVATIONS[activation](z if bias is None else z + np.asarray(bias, np.float64))
    v = z if y is None else np.concatenate([z, np.asarray(y, np.float64)], 1)
    w = np.ones(len(v)) if sample_weight is None else np.asarray(sample_weight, np.float64)
    total = w.sum()
    mean = w @ v / total if total > 0 else np.zeros(v.shape[1])
    centred = v - mean
    return (centred * w[:, None]).T @ centred, mean, float(total), z


def sorted_pca(X: Any, n: int, sample_weight: Any = None, y: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """(indices [n], projections [m]): thesis figure 7.14 with the ranks that ``platonic.sorted_pca`` documents."""
    X = np.asarray(X, np.float64)
    matrix, mean, _, _ = gram(X, None if y is None else np.asarray(y), sample_weight=sample_weight)
    v = X if y is None else np.concatenate([X, np.asarray(y, np.float64)], 1)
    direction = np.linalg.eigh(matrix)[1][:, -1]
    direction *= np.sign(direction[np.abs(direction).argmax()])
    projection = (v - mean) @ direction
    order = np.argsort(projection, kind="stable")
    w = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight, np.float64)[order]
    reached = np.cumsum(w)
    return order[np.searchsorted(reached, (2 * np.arange(n) + 1) * reached[-1] / (2 * n), side="right")], projection
