"""What may move Bias but fairness: a method's own tolerance (drift, METHODS.md 1.1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from libmtl_fair.errors import DataError
from libmtl_fair.metrics.arrays import Floats, Values, as_floats
from libmtl_fair.metrics.audit import AuditReport, delta_matrix
from libmtl_fair.metrics.tolerance import Embeddings, cosine_distances, draw_pool, normalise, task_embedding


def induced_thresholds(
    embeddings: Embeddings, scores: Mapping[str, Values], k: int = 8, *, pool_size: int | None = 256, eval_seed: int = 0
) -> Floats:
    """Return a method's own thresholds: distances between the tasks' prototypes, [T, T], zeros on the diagonal.

    A task's prototype is the mean L2-normalised embedding (``embeddings``: [N, d] shared by all tasks, or task -> [N, d]; what the
    heads receive) of its ``k`` most confident pool examples by ``scores``, task -> [N] (ours: k = 8, as in training); the pool is
    the audit's. NaN for a task without valid examples. A diagnostic, never used to rank.
    """
    if k < 1:
        raise DataError(f"k must be at least 1, found {k}")
    prototypes = []
    for task in scores:
        score, space = as_floats(scores[task]), task_embedding(embeddings, task)
        pool = draw_pool(np.isfinite(score), pool_size, eval_seed)
        chosen = pool[np.argsort(-score[pool], kind="stable")[:k]]
        prototypes.append(normalise(space[chosen]).mean(0) if len(chosen) else np.full(space.shape[1], np.nan))
    matrix = cosine_distances(np.array(prototypes)[:, None], np.array(prototypes))
    np.fill_diagonal(matrix, 0.0)
    return np.asarray((matrix + matrix.T) / 2)


def drift(reports: Mapping[str, AuditReport], induced: Mapping[str, Values], reference: Values) -> pd.DataFrame:
    """Return one row a method: Bias and VR under its own thresholds (raw) and under the fixed ones, ranks and budget.

    Columns: method, raw_bias, raw_violation_rate, fixed_bias, fixed_violation_rate, rank_raw, rank_fixed, rank_shift,
    mean_threshold, ratio_to_reference, budget, robust. Rank 1 is the lowest Bias. ``budget`` is
    eps_m = mean over task pairs of ``|delta_m - delta_ref|``; ``robust`` says whether the fixed order against *every* other
    method is, that is ``|Bias_A - Bias_B| > eps_A + eps_B`` (:func:`robust_pairs` has it pair by pair). The ``reports`` are taken again
    under ``induced`` (:func:`induced_thresholds`) and ``reference`` (number or [T, T]), on the same scores and pairs.

    Raises
    ------
    DataError
        No method, or one without thresholds.
    """
    missing = sorted(set(reports) - set(induced))
    if not reports or missing:
        raise DataError(
            f"drift needs reports and the induced thresholds of the same methods; missing: {missing or 'all'}"
        )
    return ranked(pd.DataFrame([_row(m, report, as_floats(induced[m]), reference) for m, report in reports.items()]))


def ranked(frame: pd.DataFrame) -> pd.DataFrame:
    """Return rows of :func:`drift`, or means of such, with their ranks and whether each one's fixed order is robust."""
    ranks = {kind: frame[f"{kind}_bias"].rank(method="min").astype(int) for kind in ("raw", "fixed")}
    pairs = robust_pairs(frame).to_numpy() | np.eye(len(frame), dtype=bool)
    found = frame.assign(rank_raw=ranks["raw"], rank_fixed=ranks["fixed"], rank_shift=ranks["raw"] - ranks["fixed"])
    return found.assign(robust=pd.Series(pairs.all(axis=1), index=frame.index))


def _row(method: str, report: AuditReport, own: Floats, reference: Values) -> dict[str, str | float]:
    fixed, upper = delta_matrix(reference, report.tasks), np.triu_indices(len(report.tasks), 1)
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
        "budget": float(np.nanmean(np.abs(own - fixed)[upper])),
    }


def robust_pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """Return whether the fixed order of each two methods outlasts their drift: bool [methods, methods]."""
    bias, budget = frame["fixed_bias"].to_numpy(), frame["budget"].to_numpy()
    outlasts = np.abs(bias[:, None] - bias) > budget[:, None] + budget
    return pd.DataFrame(outlasts, index=frame["method"], columns=frame["method"])
