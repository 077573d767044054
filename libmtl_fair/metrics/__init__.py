"""Audit, group metrics, drift and comparison of methods."""

from __future__ import annotations

from libmtl_fair.metrics.audit import AuditReport, FixedDeltaAudit
from libmtl_fair.metrics.deltas import conformal_delta, pair_distances, quantile_delta, reference_pairs
from libmtl_fair.metrics.drift import drift, induced_thresholds, robust_pairs
from libmtl_fair.metrics.group_auc import group_auc
from libmtl_fair.metrics.groups import GroupMetrics
from libmtl_fair.metrics.rates import GroupRates, group_rates
from libmtl_fair.metrics.shrinkage import below_curve, shrinkage_curve
from libmtl_fair.metrics.utility import auc_score, task_utility, utility

__all__ = [
    "AuditReport",
    "FixedDeltaAudit",
    "GroupMetrics",
    "GroupRates",
    "auc_score",
    "below_curve",
    "conformal_delta",
    "drift",
    "group_auc",
    "group_rates",
    "induced_thresholds",
    "pair_distances",
    "quantile_delta",
    "reference_pairs",
    "robust_pairs",
    "shrinkage_curve",
    "task_utility",
    "utility",
]
