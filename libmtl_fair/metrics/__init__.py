"""Audit, group metrics, drift, comparison of methods, and the bridge to fairlearn."""

from __future__ import annotations

from libmtl_fair.metrics.audit import AuditReport, FixedDeltaAudit
from libmtl_fair.metrics.comparison import (
    delta_m,
    discrimination_gain,
    knowledge_gain,
    mean_rank,
    paired_difference,
    violation,
    worst_and_macro,
)
from libmtl_fair.metrics.consistency import (
    ConsistencyAudit,
    ConsistencyReport,
    consistency_ratio,
    consistency_score,
    consistency_scorer,
)
from libmtl_fair.metrics.decisions import base_rate_thresholds, thresholds_in_use
from libmtl_fair.metrics.drift import drift, induced_thresholds, robust_pairs
from libmtl_fair.metrics.fairlearn_bridge import FairlearnInputs, metric_frame, to_fairlearn
from libmtl_fair.metrics.group_metrics import GroupMetrics
from libmtl_fair.metrics.near_pairs import NearPairs, find_near_pairs, reference_matrix
from libmtl_fair.metrics.post_models import Blend, Offsets, Thresholds, fit_offsets, fit_thresholds
from libmtl_fair.metrics.post_processing import PostProcessed, post_process
from libmtl_fair.metrics.rates import GroupRates, group_rates
from libmtl_fair.metrics.scores import (
    auc_score,
    group_auc,
    group_regression,
    ks_distance,
    step_auc,
    task_utility,
    utility,
)
from libmtl_fair.metrics.shrinkage import below_curve, least_bias, native_error, score_targets, shrinkage_curve
from libmtl_fair.metrics.tolerance import conformal_delta, pair_distances, quantile_delta, reference_pairs
from libmtl_fair.metrics.verdicts import (
    Changes,
    GapVerdict,
    changes,
    counts_from_rows,
    degenerate,
    enough,
    judge,
    levels_down,
    people_needed,
    power,
    smallest_gap,
)

__all__ = [
    "AuditReport",
    "Blend",
    "Changes",
    "ConsistencyAudit",
    "ConsistencyReport",
    "FairlearnInputs",
    "FixedDeltaAudit",
    "GapVerdict",
    "GroupMetrics",
    "GroupRates",
    "NearPairs",
    "Offsets",
    "PostProcessed",
    "Thresholds",
    "auc_score",
    "base_rate_thresholds",
    "below_curve",
    "changes",
    "conformal_delta",
    "consistency_ratio",
    "consistency_score",
    "consistency_scorer",
    "counts_from_rows",
    "degenerate",
    "delta_m",
    "discrimination_gain",
    "drift",
    "enough",
    "find_near_pairs",
    "fit_offsets",
    "fit_thresholds",
    "group_auc",
    "group_rates",
    "group_regression",
    "induced_thresholds",
    "judge",
    "knowledge_gain",
    "ks_distance",
    "least_bias",
    "levels_down",
    "mean_rank",
    "metric_frame",
    "native_error",
    "pair_distances",
    "paired_difference",
    "people_needed",
    "post_process",
    "power",
    "quantile_delta",
    "reference_matrix",
    "reference_pairs",
    "robust_pairs",
    "score_targets",
    "shrinkage_curve",
    "smallest_gap",
    "step_auc",
    "task_utility",
    "thresholds_in_use",
    "to_fairlearn",
    "utility",
    "violation",
    "worst_and_macro",
]
