"""What may move Bias but fairness: a method's own tolerance (drift, METHODS.md 1.1), and scores merely pulled together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from libmtl_fair.errors import DataError
from libmtl_fair.metrics.arrays import Floats, Values, as_floats
from libmtl_fair.metrics.audit import AuditReport, FixedDeltaAudit, delta_matrix
from libmtl_fair.metrics.scores import auc_score
from libmtl_fair.metrics.tolerance import Embeddings, cosine_distances, draw_pool, normalise, task_embedding

GRID = tuple(np.round(np.linspace(1.0, 0.05, 20), 10))


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
    eps_m = mean over task pairs of |delta_m - delta_ref|; ``robust`` says whether the fixed order against *every* other
    method is, that is |Bias_A - Bias_B| > eps_A + eps_B (:func:`robust_pairs` has it pair by pair). The ``reports`` are taken again
    under ``induced`` (:func:`induced_thresholds`) and ``reference`` (number or [T, T]), on the same scores and pairs.

    Raises
    ------
    DataError : no method, or one without thresholds.
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


def shrinkage_curve(
    probabilities: Mapping[str, Values],
    labels: Mapping[str, Values],
    delta: Values,
    *,
    centre: float = 0.5,
    grid: Sequence[float] = GRID,
) -> pd.DataFrame:
    """Return what ``p -> c + a (p - c)`` does to binary tasks: a row per ``a``, with Bias, violation rate, Brier, AUC.

    AUC does not change with ``a > 0``, nor does accuracy at ``centre``: a method has gained consistency only where its
    (Brier, Bias) lies below this curve of the *plain* model. Bias is exact, over all pairs. Source: ours (METHODS.md, 1.1).
    ``probabilities`` and ``labels`` map a task to [N], in [0, 1], and 0/1 (NaN or negative: missing); ``delta``: number or [T, T].

    Raises
    ------
    DataError : fewer than two tasks.
    """
    if len(probabilities) < 2:
        raise DataError(f"a shrinkage curve needs at least two binary tasks, found {list(probabilities)}")
    scores = {task: as_floats(values) for task, values in probabilities.items()}
    truth = {task: as_floats(labels[task]) for task in scores}
    seen = {task: np.isfinite(values) & (values >= 0) for task, values in truth.items()}
    auc = float(np.nanmean([auc_score(scores[t][seen[t]], truth[t][seen[t]] > 0.5) for t in scores]))
    rows = []
    for a in grid:
        shrunk = {task: centre + a * (values - centre) for task, values in scores.items()}
        report = FixedDeltaAudit(delta, exact=True).run(shrunk)
        brier = np.nanmean([((shrunk[t][seen[t]] - truth[t][seen[t]]) ** 2).mean() for t in scores])
        rows.append((float(a), report.bias, report.violation_rate, float(brier), auc))
    return pd.DataFrame(rows, columns=["a", "bias", "violation_rate", "brier", "auc"])


def below_curve(bias: float, brier: float, curve: pd.DataFrame) -> tuple[bool, float]:
    """Return (whether a method lies below the curve, curve's Bias at the method's Brier minus its Bias).

    Only the part of the curve after its lowest Brier counts (shrinking an overconfident model improves Brier at first).
    A Brier below that lowest is compared with the Bias there; one beyond the curve's end with the Bias at the end.

    >>> curve = pd.DataFrame({"a": [1.0, 0.5], "bias": [0.1, 0.0], "brier": [0.10, 0.20]})
    >>> below, gap = below_curve(0.04, 0.15, curve)
    >>> below, round(gap, 6)
    (True, 0.01)
    """
    brier_of, bias_of = curve.sort_values("a", ascending=False)[["brier", "bias"]].to_numpy().T
    start = int(np.argmin(brier_of))
    there = float(np.interp(brier, brier_of[start:], bias_of[start:]))
    return bias < there, there - bias
