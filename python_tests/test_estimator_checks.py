"""scikit-learn's own checks: nothing fails, nothing is expected to, and skips are for libraries and devices that are absent."""

from __future__ import annotations

import pytest
from sklearn.exceptions import SkipTestWarning
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks

from platonic import PlatonicMLP, PlatonicMLPClassifier, PlatonicMLPRegressor

ESTIMATORS = [
    PlatonicMLPClassifier(),
    PlatonicMLPRegressor(),
    PlatonicMLP(),
    # 10 units: a hundred interpolate the 50 noisy samples of check_class_weight_classifiers, whatever their weights
    PlatonicMLPClassifier(10, scaling="absolute", projection="random", l2=1e-3),
    PlatonicMLPRegressor((20, 20), projection=("pairs", "platonic_pca")),
    PlatonicMLP(20, projection="random", n_tries=3, task="classification"),
]

ABSENT = ("is not installed", "requires cuda, which is not available", "no XPU device is available", "MPS")


@parametrize_with_checks(ESTIMATORS)
def test_check(estimator, check):
    """`check` is one of about 80; a skip must say that a library or a device is absent."""
    try:
        check(estimator)
    except pytest.skip.Exception as skip:
        assert any(words in str(skip) for words in ABSENT), skip
        raise
    except BaseException as error:
        if type(error).__name__ == "SkipTest":
            assert any(words in str(error) for words in ABSENT), error
        raise


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.parametrize("estimator", ESTIMATORS[:3], ids=lambda e: type(e).__name__)
def test_array_libraries_are_among_the_checks(estimator):
    """The checks that need array-api-strict and torch are generated, so that they cannot go missing unnoticed."""
    names = [getattr(check, "func", check).__name__ for _, check in estimator_checks_generator(estimator)]
    assert "check_array_api_input" in names
    assert "check_sample_weight_equivalence_on_dense_data" in names
    assert issubclass(SkipTestWarning, UserWarning)
