"""Toy problems by formula."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import numpy as np

from platonic.datasets.base import REGRESSION, Dataset


def make_sine(n_samples: int = 5000, periods: float = 2) -> Dataset:
    """Regression of a sine on one variable, without noise.

    For i = 1, ..., m, evenly spaced in the open interval (-1, 1)::

        x_i = 2 i / (m + 1) - 1
        y_i = sin(periods * pi * x_i)

    Parameters
    ----------
    n_samples : int
        m, at least 1.
    periods : float
        Periods of the sine between -1 and 1.

    Returns
    -------
    Dataset
        X of shape (m, 1), y of shape (m,), float64, no split.

    References
    ----------
    Chapter 7.5 of the thesis: "two periods, normalized to the domain (-1, 1), 5000 samples".
    """
    _check_at_least("n_samples", n_samples, 1)
    x = 2 * np.arange(1, n_samples + 1) / (n_samples + 1) - 1
    y = np.sin(periods * np.pi * x)
    description = f"{n_samples} samples of sin({periods} pi x), x evenly spaced in (-1, 1)"
    return Dataset("sine", x[:, None], y, task=REGRESSION, feature_names=["x"], description=description)


def make_two_spirals(
    n_samples: int = 5000,
    turns: float = 1.0,
    noise: float = 0.0,
    random_state: int | np.random.Generator | None = None,
    sampling: str = "arc",
) -> Dataset:
    """Classification of two interleaved Archimedean spirals.

    The class c in {0, 1} has the sign s = 2 c - 1 and m_c samples: m_1 = ceil(m / 2), m_0 = floor(m / 2). For
    i = 1, ..., m_c, from (almost) the centre to the unit circle::

        t_i = sqrt(i / m_c)    sampling="arc"
        t_i = i / m_c          sampling="radius"
        X_i = s t_i (cos(2 pi turns t_i), sin(2 pi turns t_i)) + noise * e_i,    e_i ~ N(0, I)

    so one spiral is the other turned by pi. The length of a spiral up to radius t grows as t^2 (but near the centre),
    so "arc" spaces samples evenly along the curve, while "radius" crowds them at the centre. Class 1 comes first.

    Parameters
    ----------
    n_samples : int
        m, at least 2.
    turns : float
        Revolutions from the centre to the end: the difficulty of the problem.
    noise : float
        Standard deviation of the normal noise on both coordinates.
    random_state : int, numpy.random.Generator or None
        Where the noise comes from; without noise nothing is drawn.
    sampling : {'arc', 'radius'}
        How the samples are spaced, see above.

    Returns
    -------
    Dataset
        X of shape (m, 2), float64; y of 0 and 1, int64; no split.

    References
    ----------
    Chapter 7.6 of the thesis, which does not give its generator: "arc" with 1.4 turns comes closest to the accuracies
    of its table 7.1. The problem is due to Wieland (Lang and Witbrock, 1988).
    """
    _check_at_least("n_samples", n_samples, 2)
    _check_at_least("noise", noise, 0.0)
    if sampling not in _SPIRAL_POWER:
        raise ValueError(f"expected sampling to be one of {', '.join(_SPIRAL_POWER)}, got {sampling!r}")
    sizes = {1: (n_samples + 1) // 2, 0: n_samples // 2}
    X = np.concatenate([(2 * c - 1) * _spiral(size, turns, _SPIRAL_POWER[sampling]) for c, size in sizes.items()])
    y = np.repeat(list(sizes), list(sizes.values()))
    if noise:
        X += noise * np.random.default_rng(random_state).standard_normal(X.shape)
    description = f"{n_samples} samples of two Archimedean spirals of {turns} turns, evenly spaced by {sampling}"
    return Dataset("spirals", X, y, feature_names=["x", "y"], description=description)


_SPIRAL_POWER = {"arc": 0.5, "radius": 1.0}


def _spiral(n_samples: int, turns: float, power: float) -> np.ndarray:
    t = (np.arange(1, n_samples + 1) / n_samples) ** power
    angle = 2 * np.pi * turns * t
    return np.stack([t * np.cos(angle), t * np.sin(angle)], axis=1)


def make_checkerboard(
    n_samples: int = 5000, squares: int = 8, random_state: int | np.random.Generator | None = 0
) -> Dataset:
    """Classification of the colours of a checkerboard.

    With X_i uniform on the square (-1, 1)^2 and q the number of squares along a side::

        y_i = (floor(q (X_i1 + 1) / 2) + floor(q (X_i2 + 1) / 2)) mod 2

    Parameters
    ----------
    n_samples : int
        m, at least 1.
    squares : int
        q, at least 1.
    random_state : int, numpy.random.Generator or None
        Where the points come from.

    Returns
    -------
    Dataset
        X of shape (m, 2), float64; y of 0 and 1, int64; no split.

    References
    ----------
    Chapters 5.4.2 and 7.7 of the thesis: 5,000 points on 8 x 8 squares.
    """
    _check_at_least("n_samples", n_samples, 1)
    _check_at_least("squares", squares, 1)
    X = np.random.default_rng(random_state).uniform(-1, 1, (n_samples, 2))
    y = np.floor(squares * (X + 1) / 2).astype(np.int64).sum(axis=1) % 2
    description = f"{n_samples} samples uniform on a board of {squares} x {squares} squares"
    return Dataset("checkerboard", X, y, feature_names=["x", "y"], description=description)


def _check_at_least(name: str, value: float, least: float) -> None:
    if isinstance(least, int) and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise ValueError(f"expected {name} to be a whole number, got {value!r}")
    if not value >= least:
        raise ValueError(f"expected {name} to be {least:g} or more, got {value!r}")


TOYS: dict[str, Callable[..., Dataset]] = {
    "sine": make_sine,
    "spirals": make_two_spirals,
    "checkerboard": make_checkerboard,
}
