"""Estimators for users of scikit-learn and fairlearn: ``fit(X, Y, *, sensitive_features=...)``, ``predict``."""

from __future__ import annotations

from libmtl_fair.sklearn.classifier import FairMTLClassifier
from libmtl_fair.sklearn.estimator import FairMTLEstimator
from libmtl_fair.sklearn.methods import method_names

__all__ = ["FairMTLClassifier", "FairMTLEstimator", "method_names"]
