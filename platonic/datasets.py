"""Data to try things on: toy problems by formula, scikit-learn's embedded sets, and the user's own files.

Everything is generated, ships with scikit-learn, or is read from local files; nothing is ever downloaded.
:func:`load` finds any of it by name or path.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets
from sklearn.model_selection import train_test_split

from platonic._data_csv import load_csv
from platonic._data_idx import IDX_NAMES, has_idx_files, load_idx
from platonic._data_images import ARCHIVE_SUFFIXES, load_image_folder
from platonic._dataset import CLASSIFICATION, REGRESSION, Dataset

__all__ = [
    "NAMES",
    "Dataset",
    "load",
    "load_csv",
    "load_embedded",
    "load_idx",
    "load_image_folder",
    "make_checkerboard",
    "make_sine",
    "make_two_spirals",
]


# ----------------------------------------------------------------------------------------------------- toy problems


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
    _check_at_least("noise", noise, 0)
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
    if not value >= least:
        raise ValueError(f"expected {name} to be {least} or more, got {value!r}")


# ---------------------------------------------------------------------------------------------------- embedded sets

_EMBEDDED: dict[str, Callable[..., Any]] = {
    "digits": sklearn.datasets.load_digits,
    "iris": sklearn.datasets.load_iris,
    "wine": sklearn.datasets.load_wine,
    "breast_cancer": sklearn.datasets.load_breast_cancer,
    "diabetes": sklearn.datasets.load_diabetes,
}


def load_embedded(name: str) -> Dataset:
    """Load a data set that installs with scikit-learn, split 80 to 20.

    The split is ``sklearn.model_selection.train_test_split(X, y, test_size=0.2, random_state=0, stratify=y)``, not
    stratified for the regression of diabetes.

    Parameters
    ----------
    name : {'digits', 'iris', 'wine', 'breast_cancer', 'diabetes'}
        Which set; digits are images of 8 x 8 pixels in 0..16.

    Returns
    -------
    Dataset
        X float64 as scikit-learn returns it, y int64 classes, or float64 values for diabetes.
    """
    if name not in _EMBEDDED:
        raise ValueError(f"unknown embedded data set {name!r}; expected one of {', '.join(_EMBEDDED)}")
    bunch = _EMBEDDED[name]()
    task = REGRESSION if name == "diabetes" else CLASSIFICATION
    target = bunch.target.astype(np.float64 if task == REGRESSION else np.int64)
    stratify = target if task == CLASSIFICATION else None
    split = train_test_split(bunch.data, target, test_size=0.2, random_state=0, stratify=stratify)
    X_train, X_test, y_train, y_test = split
    image_shape = (8, 8) if name == "digits" else None
    description = f"scikit-learn's {name}: {len(X_train)} + {len(X_test)} samples of {X_train.shape[1]} features"
    features = [str(feature) for feature in bunch.feature_names]
    return Dataset(name, X_train, y_train, X_test, y_test, task, image_shape, features, description)


# ----------------------------------------------------------------------------------------------------------- by name

_TOYS: dict[str, Callable[..., Dataset]] = {
    "sine": make_sine,
    "spirals": make_two_spirals,
    "checkerboard": make_checkerboard,
}

NAMES = (*_TOYS, *_EMBEDDED, *IDX_NAMES)


def load(
    name_or_path: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None, **options: Any
) -> Dataset:
    """Load a data set by its name, or from a file or folder.

    Parameters
    ----------
    name_or_path : str or path-like
        One of :data:`NAMES`; or a ``.csv`` file (:func:`load_csv`), a folder of IDX files named as MNIST's
        (:func:`load_idx`), or a folder of images or a ``.tar``, ``.tar.gz`` or ``.tar.xz`` archive of one
        (:func:`load_image_folder`). A name wins over a file of that name; write ``./digits`` for the file.
    data_dir : path-like or None
        Where IDX sets are looked for by name, and what relative paths start from; None is the current folder.
    **options
        Passed to the function that makes or reads the data, such as ``turns=2`` or ``target="price"``.

    Returns
    -------
    Dataset
        The data.

    Raises
    ------
    ValueError
        If it is neither a name nor a path, or the file is damaged or of another kind.
    FileNotFoundError
        If files are missing: which ones, where they were looked for, and how to get them.
    TypeError
        If an option does not exist for this data; the message names those that do.
    """
    name = os.fspath(name_or_path)
    folder = Path(data_dir) if data_dir is not None else Path()
    if name in _TOYS:
        return _call(_TOYS[name], name, options)
    if name in _EMBEDDED:
        return _call(load_embedded, name, options, name)
    if name in IDX_NAMES:
        return _call(load_idx, name, options, folder, name)
    return _load_path(name, folder / name, options)


def _load_path(name: str, path: Path, options: dict[str, Any]) -> Dataset:
    kinds = (".csv", *ARCHIVE_SUFFIXES)
    if not path.exists():
        if path.name == name and not name.lower().endswith(kinds):
            raise ValueError(f"unknown data set {name!r}; expected a path, or one of {', '.join(NAMES)}")
        raise FileNotFoundError(f"no such file or folder: {path} (looked for from {Path.cwd()})")
    if path.is_dir() and has_idx_files(path):
        return replace(_call(load_idx, name, options, path), name=path.resolve().name)
    if path.is_dir() or name.lower().endswith(ARCHIVE_SUFFIXES):
        return _call(load_image_folder, name, options, path)
    if name.lower().endswith(".csv"):
        return _call(load_csv, name, options, path)
    raise ValueError(f"{path}: expected a folder or a file that ends in {', '.join(kinds)}")


def _call(function: Callable[..., Dataset], name: str, options: dict[str, Any], *arguments: Any) -> Dataset:
    """`function` of `arguments` and `options`, with an error that names the options there are."""
    code = function.__code__
    known = code.co_varnames[len(arguments) : code.co_argcount + code.co_kwonlyargcount]
    for option in options:
        if option not in known:
            raise TypeError(f"{name} has no option {option!r}; its options are {', '.join(known) or 'none'}")
    return function(*arguments, **options)
