"""Multilayer perceptrons fitted in closed form: one ridge problem per layer, no gradient descent."""

from platonic import datasets
from platonic.batched import batched_ridge, rolling_ridge
from platonic.estimators import PlatonicMLP, PlatonicMLPClassifier, PlatonicMLPRegressor
from platonic.narrow import NarrowNetwork, fit_narrow
from platonic.pca import sorted_pca
from platonic.persistence import ModelFormatError
from platonic_core import __version__

__all__ = [
    "ModelFormatError",
    "NarrowNetwork",
    "PlatonicMLP",
    "PlatonicMLPClassifier",
    "PlatonicMLPRegressor",
    "__version__",
    "batched_ridge",
    "datasets",
    "fit_narrow",
    "rolling_ridge",
    "sorted_pca",
]
