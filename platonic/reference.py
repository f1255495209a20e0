"""Plain NumPy references of the kernels in float64: tests hold every device and instruction set to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# ---- fit_narrow ----

_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda u: u,
    "relu": lambda u: np.maximum(u, 0.0),
    "abs": np.abs,
    "tanh": np.tanh,
    "celu": lambda u: np.where(u > 0, u, np.expm1(np.minimum(u, 0.0))),
}


def ridge_readout(Z: np.ndarray, Y: np.ndarray, l2: float, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """B, intercept and LSD of min sum_r w_r |y_r - z_r B - b|^2 + l2 |B|^2, by the pseudoinverse.

    Columns are brought to norm 1 before its tolerance applies.
    """
    z_mean, y_mean = np.average(Z, 0, weight), np.average(Y, 0, weight)
    root = np.sqrt(weight)[:, None]
    Zc, Yc = root * (Z - z_mean), root * (Y - y_mean)
    norm = np.linalg.norm(Zc, axis=0)
    constant = norm <= 32 * np.finfo(float).eps * np.abs(z_mean) * np.sqrt(weight.sum())
    scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, norm))
    stacked = np.vstack([Zc * scale, np.diag(np.sqrt(l2) * scale)])
    B = scale[:, None] * (np.linalg.pinv(stacked) @ np.vstack([Yc, np.zeros((Z.shape[1], Y.shape[1]))]))
    return B, y_mean - z_mean @ B, float(np.sum((Yc - Zc @ B) ** 2) / weight.sum())


def narrow_candidate(
    Z: np.ndarray,
    Y: np.ndarray,
    P: np.ndarray,
    *,
    alpha: float,
    beta: float,
    l2: float,
    relative: bool,
    bias_scale: float,
    weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """W, b of one layer for the draw P = [p_1; P_Z; P_Y] (thesis, equation 7.2; or its relative form)."""
    p_1, P_Z, P_Y = P[0], P[1 : 1 + Z.shape[1]], P[1 + Z.shape[1] :]
    if not relative:
        B, intercept, _ = ridge_readout(Z, Y, l2, weight)
        return alpha * (P_Z + beta * B @ P_Y), alpha * (p_1 + beta * intercept @ P_Y)
    mean = np.average(Z, 0, weight)
    std = np.sqrt(np.average((Z - mean) ** 2, 0, weight))
    constant = std <= 32 * np.finfo(float).eps * np.abs(mean)
    Zt = (Z - mean) * np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))
    B, _, _ = ridge_readout(Zt, Y, l2 * weight.sum(), weight)
    terms = []
    for V in (P_Z, B @ P_Y):
        spread = np.sqrt(np.average((Zt @ V) ** 2, 0, weight))
        terms.append(V * np.where(spread > 0, 1.0 / np.where(spread > 0, spread, 1.0), 0.0))
    Wt = alpha / np.sqrt(1 + beta**2) * (terms[0] + beta * terms[1])
    W = Wt * np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))[:, None]
    return W, alpha * bias_scale * p_1 - mean @ W


def fit_narrow(
    X: np.ndarray,
    Y: np.ndarray,
    draws: list[np.ndarray],
    *,
    activation: str = "celu",
    alpha: float = 1.0,
    beta: float = 1.0,
    l2: float = 0.0,
    relative: bool = True,
    bias_scale: float = 1.0,
    weight: np.ndarray | None = None,
) -> dict[str, Any]:
    """What platonic.fit_narrow computes, from explicit draws [n_tries, 1 + h_in + k, h_out] of each layer."""
    weight = np.ones(len(X)) if weight is None else weight
    act = _ACTIVATIONS[activation]

    def lsd_of(Z: np.ndarray) -> float:
        if not relative:
            return ridge_readout(Z, Y, l2, weight)[2]
        mean = np.average(Z, 0, weight)
        std = np.sqrt(np.average((Z - mean) ** 2, 0, weight))
        constant = std <= 32 * np.finfo(float).eps * np.abs(mean)
        return ridge_readout((Z - mean) / np.where(constant, np.inf, std), Y, l2 * weight.sum(), weight)[2]

    Z, weights, biases, winners, lsd = X, [], [], [], [lsd_of(X)]
    for draw in draws:
        tries = []
        for P in draw:
            W, b = narrow_candidate(
                Z, Y, P, alpha=alpha, beta=beta, l2=l2, relative=relative, bias_scale=bias_scale, weight=weight
            )
            mapped = act(Z @ W + b)
            tries.append((lsd_of(mapped), mapped, W, b))
        winners.append(int(np.argmin([t[0] for t in tries])))
        score, Z, W, b = tries[winners[-1]]
        weights.append(W)
        biases.append(b)
        lsd.append(score)
    return {"weights": weights, "biases": biases, "winners": winners, "lsd": lsd, "representation": Z}


# ---- gram, sorted_pca ----


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


# ---- batched_ridge, rolling_ridge ----


def batched_ridge(
    x: np.ndarray, y: np.ndarray, l2: np.ndarray, fit_intercept: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Ridge of y [B, m, r] on x [B, m, p] for every l2 [L]: weights [B, L, p, r] and intercepts [B, L, r]."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mean_x = x.mean(1, keepdims=True) * fit_intercept
    mean_y = y.mean(1, keepdims=True) * fit_intercept
    weights = gram_ridge(np.swapaxes(x - mean_x, 1, 2) @ (x - mean_x), np.swapaxes(x - mean_x, 1, 2) @ (y - mean_y), l2)
    return weights, (mean_y[:, None] - mean_x[:, None] @ weights)[:, :, 0]


def gram_ridge(gram: np.ndarray, right: np.ndarray, l2: np.ndarray) -> np.ndarray:
    """(G_b + l2 I) W = C_b for the lower triangles of G [B, p, p], C [B, p, r] and every l2 [L]: W [B, L, p, r]."""
    lower = np.tril(np.asarray(gram, np.float64))
    full = lower + np.swapaxes(np.tril(lower, -1), 1, 2)
    shifted = full[:, None] + np.asarray(l2, np.float64)[:, None, None] * np.eye(gram.shape[1])
    return np.linalg.solve(
        shifted, np.broadcast_to(np.asarray(right, np.float64)[:, None], (*shifted.shape[:3], right.shape[2]))
    )


def rolling_ridge(
    x: np.ndarray, y: np.ndarray, window: int, l2: float, fit_intercept: bool, min_periods: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ridge of y [n, r] on x [n, p] in every window of rows, a fit each: weights [n, p, r], intercepts [n, r]."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    weights = np.full((len(x), x.shape[1], y.shape[1]), np.nan)
    intercepts = np.full((len(x), y.shape[1]), np.nan)
    usable = np.isfinite(x).all(1) & np.isfinite(y).all(1)
    for t in range(len(x)):
        rows = np.flatnonzero(usable[max(0, t - window + 1) : t + 1]) + max(0, t - window + 1)
        if len(rows) >= min_periods:
            fit = batched_ridge(x[None, rows], y[None, rows], np.array([l2]), fit_intercept)
            weights[t], intercepts[t] = fit[0][0, 0], fit[1][0, 0]
    return weights, intercepts
