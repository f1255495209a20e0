"""What every loader and generator of data returns."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

PathLike = str | os.PathLike[str]

CLASSIFICATION, REGRESSION = "classification", "regression"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples with targets, and the split they come with.

    Attributes
    ----------
    name : str
        What it is called in tables.
    X_train : ndarray of shape (m, n)
        Training samples, a row each.
    y_train : ndarray of shape (m,)
        Their classes (integers or strings) or their values (floats).
    X_test : ndarray of shape (m_test, n) or None
        Test samples, None if the data has no split.
    y_test : ndarray of shape (m_test,) or None
        Their targets.
    task : {'classification', 'regression'}
        What `y` holds.
    image_shape : tuple of int or None
        (height, width) or (height, width, channels) if a row is an image, flattened in C order.
    feature_names : list of str or None
        Names of the n columns where they have any.
    description : str
        Origin, size and sampling in a sentence or two.
    """

    name: str
    X_train: np.ndarray
    y_train: np.ndarray
    X_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    task: str = CLASSIFICATION
    image_shape: tuple[int, ...] | None = None
    feature_names: list[str] | None = None
    description: str = ""
