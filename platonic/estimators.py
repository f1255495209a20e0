"""Step 1 of *fit*: the scikit-learn estimators. They validate X and y, call :mod:`platonic.network`, store results.

An estimator knows no linear algebra. Arrays of any supported library come in through :mod:`platonic_core.arrays`,
and every result goes back to the library and device of the input.
"""

from __future__ import annotations

import numbers
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted

from platonic import inputs, network
from platonic.activations import resolve_activation
from platonic.persistence import load_model, save_model
from platonic_core.arrays import Origin

__all__ = ["PlatonicMLP", "PlatonicMLPClassifier", "PlatonicMLPRegressor"]
