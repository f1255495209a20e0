"""Multilayer perceptrons fitted in closed form: one ridge problem per layer, no gradient descent."""

from platonic import datasets
from platonic.estimators import PlatonicMLP, PlatonicMLPClassifier, PlatonicMLPRegressor
from platonic.pca import sorted_pca
from platonic.persistence import ModelFormatError
from platonic_core import __version__

__all__ = [
    "ModelFormatError",
    "PlatonicMLP",
    "PlatonicMLPClassifier",
    "PlatonicMLPRegressor",
    "__version__",
    "datasets",
    "sorted_pca",
]
