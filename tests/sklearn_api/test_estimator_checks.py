"""scikit-learn's own checks. None is expected to fail; ``array_api`` is skipped by scikit-learn itself."""

from __future__ import annotations

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from libmtl_fair.sklearn import FairMTLClassifier, FairMTLEstimator


@parametrize_with_checks(
    [FairMTLClassifier(epochs=20, random_state=0), FairMTLEstimator(epochs=2, hidden=(8,), random_state=0)]
)
def test_scikit_learn_check(estimator, check):
    if "array_api" in str(check):
        pytest.skip("array API dispatch needs an environment variable set before scipy is imported")
    check(estimator)
