"""Temperatures against a scalar minimiser, and probabilities."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch

from oracles import brute_leave_one_out
from platonic.calibration import fit_temperature, log_probabilities, probabilities
from platonic.readout import LooRows, ReadoutOptions, fit_readout


def fit_of(Z, Y, weights, l2=0.1):
    """What fit_temperature reads of a fit, with a read-out of Y from Z."""
    m = len(Z)
    w = torch.ones(m, dtype=torch.float64) if weights is None else torch.tensor(weights)
    rows = LooRows(None, w, torch.ones(m, dtype=torch.float64))
    options = ReadoutOptions(l2, "cholesky", None, False)
    tensors = torch.tensor(Z), torch.tensor(Y), None if weights is None else w
    made = fit_readout(*tensors, options, rows)
    fit = SimpleNamespace(
        representation=tensors[0], targets=tensors[1], weights=tensors[2], readout=made, loo_rows=rows
    )
    return fit, options


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
def test_minimises_the_leave_one_out_log_loss(rng, classes, weighted):
    m = 40
    group = np.arange(m) % classes
    Z = rng.standard_normal((m, 3)) + group[:, None]
    Y = np.where(group == 1, 1.0, -1.0)[:, None] if classes == 2 else np.eye(3)[group]
    weights = np.tile([1.0, 2.0], m // 2) if weighted else None
    fit, options = fit_of(Z, Y, weights)
    ours = fit_temperature(fit, torch.tensor(group), options)
    scores = brute_leave_one_out(Z, Y, 0.1, weights)
    scores = np.hstack([-scores, scores]) if classes == 2 else scores

    def loss(log_temperature):
        logs = scipy.special.log_softmax(scores / np.exp(log_temperature), axis=1)
        return -np.average(logs[np.arange(m), group], weights=weights)

    best = scipy.optimize.minimize_scalar(loss, bounds=(-8, 6), method="bounded", options={"xatol": 1e-10})
    assert ours == pytest.approx(np.exp(best.x), rel=1e-5)  # a minimiser finds its argument to the root of eps


def test_separable_and_hopeless_scores_stay_finite():
    """Classes that no score gets wrong want a temperature of 0, scores that are all wrong an infinite one: both bounded."""
    group = np.arange(20) % 2
    Y = (2.0 * group - 1)[:, None]
    for Z in (Y * 1.0, np.zeros((20, 1))):
        fit, options = fit_of(Z, Y, None, 1e-9)
        temperature = fit_temperature(fit, torch.tensor(group), options)
        assert 0 < temperature < np.inf


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("temperature", [1e-4, 1.0, 1e3])
def test_probabilities(rng, columns, temperature):
    scores = torch.tensor(rng.standard_normal((50, columns)))
    p = probabilities(scores, temperature)
    assert p.shape == (50, max(2, columns))
    torch.testing.assert_close(p.sum(1), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(log_probabilities(scores, temperature).exp(), p, rtol=1e-12, atol=1e-300)
    expected = (scores[:, 0] > 0).long() if columns == 1 else scores.argmax(1)
    assert torch.equal(p.argmax(1), expected)
    if columns == 1:  # a logistic function of twice the score
        np.testing.assert_allclose(p[:, 1], scipy.special.expit(2 * scores[:, 0].numpy() / temperature), rtol=1e-12)
