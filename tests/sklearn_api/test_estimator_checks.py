"""scikit-learn's own checks. Expected to fail: those in EXPECTED; ``array_api`` is skipped by scikit-learn itself."""

from __future__ import annotations

from inspect import signature

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from libmtl_fair.sklearn import FairMTLClassifier, FairMTLEstimator

# since scikit-learn 1.8
STRICT = {"xfail_strict": True} if "xfail_strict" in signature(parametrize_with_checks).parameters else {}
EXPECTED = dict.fromkeys(
    ("check_sample_weight_equivalence_on_dense_data", "check_sample_weight_equivalence_on_sparse_data"),
    "trained on mini-batches: a row of weight 2 is drawn twice an epoch, in other batches than a row given twice",
)


@parametrize_with_checks(
    [FairMTLClassifier(epochs=20, random_state=0), FairMTLEstimator(epochs=2, hidden=(8,), random_state=0)],
    expected_failed_checks=lambda estimator: EXPECTED,
    **STRICT,
)
def test_scikit_learn_check(estimator, check):
    if "array_api" in str(check):
        pytest.skip("array API dispatch needs an environment variable set before scipy is imported")
    check(estimator)
