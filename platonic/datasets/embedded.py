"""The data sets that install with scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import sklearn.datasets
from sklearn.model_selection import train_test_split

from platonic.datasets.base import CLASSIFICATION, REGRESSION, Dataset

EMBEDDED: dict[str, Callable[..., Any]] = {
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
    if name not in EMBEDDED:
        raise ValueError(f"unknown embedded data set {name!r}; expected one of {', '.join(EMBEDDED)}")
    bunch = EMBEDDED[name]()
    task = REGRESSION if name == "diabetes" else CLASSIFICATION
    target = bunch.target.astype(np.float64 if task == REGRESSION else np.int64)
    stratify = target if task == CLASSIFICATION else None
    split = train_test_split(bunch.data, target, test_size=0.2, random_state=0, stratify=stratify)
    X_train, X_test, y_train, y_test = split
    image_shape = (8, 8) if name == "digits" else None
    description = f"scikit-learn's {name}: {len(X_train)} + {len(X_test)} samples of {X_train.shape[1]} features"
    features = [str(feature) for feature in bunch.feature_names]
    return Dataset(name, X_train, y_train, X_test, y_test, task, image_shape, features, description)
