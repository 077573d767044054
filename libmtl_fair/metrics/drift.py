"""Threshold drift: how far each method moves the tolerance that its own representation suggests (methods.md, 1.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from libmtl_fair.errors import DataError
from libmtl_fair.metrics.arrays import Floats, as_floats, delta_matrix
from libmtl_fair.metrics.audit import AuditReport
from libmtl_fair.metrics.deltas import cosine_distances, normalise, task_embedding
from libmtl_fair.metrics.sampling import draw_pools


def induced_thresholds(
    embeddings: Any, scores: Mapping[str, Any], k: int = 8, *, pool_size: int | None = 256, eval_seed: int = 0
) -> Floats:
    """Return a method's own thresholds: distances between the tasks' prototypes, [T, T], zeros on the diagonal.

    A task's prototype is the mean L2-normalised embedding of its ``k`` most confident pool examples (ours: k = 8, as in
    training); the pool is the audit's. NaN for a task without valid examples. A diagnostic, never used to rank.

    Parameters
    ----------
    embeddings : [N, d] shared by all tasks, or task -> [N, d]; what the heads receive.
    scores : task -> [N] audit scores, in task order.
    """
    if k < 1:
        raise DataError(f"k must be at least 1, found {k}")
    values = {task: as_floats(s) for task, s in scores.items()}
    pools = draw_pools({task: np.isfinite(v) for task, v in values.items()}, pool_size, eval_seed)
    prototypes = []
    for task, found in values.items():
        space = task_embedding(embeddings, task)
        pool = pools.get(task, np.array([], dtype=int))
        chosen = pool[np.argsort(-found[pool], kind="stable")[:k]]
        prototypes.append(normalise(space[chosen]).mean(0) if len(chosen) else np.full(space.shape[1], np.nan))
    matrix = np.array([cosine_distances(np.tile(p, (len(prototypes), 1)), np.array(prototypes)) for p in prototypes])
    np.fill_diagonal(matrix, 0.0)
    return np.asarray((matrix + matrix.T) / 2)


def drift(reports: Mapping[str, AuditReport], induced: Mapping[str, Any], reference: Any) -> pd.DataFrame:
    """Return one row a method: Bias and VR under its own thresholds (raw) and under the fixed ones, ranks and budget.

    Columns: method, raw_bias, raw_violation_rate, fixed_bias, fixed_violation_rate, rank_raw, rank_fixed, rank_shift,
    mean_threshold, ratio_to_reference, budget, robust. Rank 1 is the lowest Bias. ``budget`` is
    eps_m = mean over task pairs of |delta_m - delta_ref|; ``robust`` says whether the fixed order against *every* other
    method is, that is |Bias_A - Bias_B| > eps_A + eps_B (:func:`robust_pairs` has it pair by pair).

    Parameters
    ----------
    reports : method -> audit; it is taken again at ``reference``, on the same scores, pools and pairs.
    induced : method -> thresholds [T, T], from :func:`induced_thresholds`.
    reference : the fixed tolerance, a number or [T, T].

    Raises
    ------
    DataError : no method, or one without thresholds.
    """
    if not reports or set(reports) - set(induced):
        missing = sorted(set(reports) - set(induced))
        raise DataError(
            f"drift needs reports and the induced thresholds of the same methods; missing: {missing or 'all'}"
        )
    rows = [_row(method, report, as_floats(induced[method]), reference) for method, report in reports.items()]
    frame = pd.DataFrame(rows)
    frame["rank_raw"] = frame["raw_bias"].rank(method="min").astype(int)
    frame["rank_fixed"] = frame["fixed_bias"].rank(method="min").astype(int)
    frame["rank_shift"] = frame["rank_raw"] - frame["rank_fixed"]
    pairs = robust_pairs(frame).to_numpy() | np.eye(len(frame), dtype=bool)
    frame["robust"] = pd.Series(pairs.all(axis=1), index=frame.index)
    return frame


def _row(method: str, report: AuditReport, own: Floats, reference: Any) -> dict[str, Any]:
    fixed = delta_matrix(reference, report.tasks)
    upper = np.triu_indices(len(report.tasks), 1)
    gaps = np.abs(own - fixed)[upper]
    raw, held = report.at(np.clip(np.nan_to_num(own, nan=1.0), 0, 1)), report.at(fixed)
    mean, base = float(np.nanmean(own[upper])), float(fixed[upper].mean())
    return {
        "method": method,
        "raw_bias": raw.bias,
        "raw_violation_rate": raw.violation_rate,
        "fixed_bias": held.bias,
        "fixed_violation_rate": held.violation_rate,
        "mean_threshold": mean,
        "ratio_to_reference": mean / base if base > 0 else float("nan"),
        "budget": float(np.nanmean(gaps)),
    }


def robust_pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """Return whether the fixed order of each two methods outlasts their drift: bool [methods, methods]."""
    bias, budget = frame["fixed_bias"].to_numpy(), frame["budget"].to_numpy()
    outlasts = np.abs(bias[:, None] - bias) > budget[:, None] + budget
    return pd.DataFrame(outlasts, index=frame["method"], columns=frame["method"])
