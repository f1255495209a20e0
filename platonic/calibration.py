"""Step 6 of *fit*: class probabilities from decision scores, calibrated on leave-one-out scores of training rows."""

from __future__ import annotations

import torch
from torch import Tensor

from platonic.network import Fit
from platonic.readout import ReadoutOptions, leave_one_out_scores

__all__ = ["fit_temperature", "log_probabilities", "probabilities"]

_INVERSE_RANGE = (1e-3, 1e4)  # of 1 / temperature: scores are of order 1
_STEPS = 40  # bisections; each halves the interval of log(1 / temperature)


def log_probabilities(scores: Tensor, temperature: float) -> Tensor:
    """(m, classes): log-softmax of ``scores / temperature``; one column s means the two classes' scores -s and s."""
    return torch.log_softmax(_both_classes(scores) / temperature, 1)


def probabilities(scores: Tensor, temperature: float) -> Tensor:
    """(m, classes): softmax of ``scores / temperature``."""
    return torch.softmax(_both_classes(scores) / temperature, 1)


def _both_classes(scores: Tensor) -> Tensor:
    return torch.cat([-scores, scores], 1) if scores.shape[1] == 1 else scores


def fit_temperature(fit: Fit, group: Tensor, options: ReadoutOptions) -> float:
    """The temperature with the smallest log loss of leave-one-out scores.

    The loss is convex in 1 / temperature, so its minimum is where the derivative changes sign: bisection.
    """
    rows = fit.loo_rows
    scores = leave_one_out_scores(fit.representation, fit.targets, fit.weights, fit.readout, options, rows)
    labels = group if rows.index is None else group[rows.index]
    scores = _both_classes(scores)
    own = scores.gather(1, labels[:, None])[:, 0]

    def slope(inverse: float) -> float:
        expected = (torch.softmax(scores * inverse, 1) * scores).sum(1)
        return float(rows.weight @ (expected - own))

    low, high = _INVERSE_RANGE
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / (low * high) ** 0.5
