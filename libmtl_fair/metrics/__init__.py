"""Audit, group metrics, drift and comparison of methods."""

from __future__ import annotations

from libmtl_fair.metrics.audit import AuditReport, FixedDeltaAudit
from libmtl_fair.metrics.deltas import conformal_delta, pair_distances, quantile_delta, reference_pairs

__all__ = [
    "AuditReport",
    "FixedDeltaAudit",
    "conformal_delta",
    "pair_distances",
    "quantile_delta",
    "reference_pairs",
]
