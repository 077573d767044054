"""Audit, group metrics, drift and comparison of methods."""

from __future__ import annotations

from libmtl_fair.metrics.audit import AuditReport, FixedDeltaAudit
from libmtl_fair.metrics.deltas import conformal_delta, pair_distances, quantile_delta, reference_pairs
from libmtl_fair.metrics.shrinkage import below_curve, shrinkage_curve
from libmtl_fair.metrics.utility import auc_score, task_utility, utility

__all__ = [
    "AuditReport",
    "FixedDeltaAudit",
    "auc_score",
    "below_curve",
    "conformal_delta",
    "pair_distances",
    "quantile_delta",
    "reference_pairs",
    "shrinkage_curve",
    "task_utility",
    "utility",
]
