"""Estimators for users of scikit-learn and fairlearn: ``fit(X, Y, *, sensitive_features=..., sample_weight=...)``, ``predict``.

They pass scikit-learn's ``check_estimator`` except ``check_sample_weight_equivalence_on_dense_data``: networks are trained on
mini-batches, and a row of weight 2 is drawn twice an epoch, in other batches than a row given twice. Under fairlearn:
``ThresholdOptimizer(prefit=True)`` and, for the reductions, ``ExponentiatedGradient``, which needs ``sample_weight``.
"""

from __future__ import annotations

from libmtl_fair.sklearn.estimators import FairMTLClassifier, FairMTLEstimator
from libmtl_fair.sklearn.methods import method_names

__all__ = ["FairMTLClassifier", "FairMTLEstimator", "method_names"]
