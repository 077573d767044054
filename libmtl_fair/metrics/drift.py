"""What may move Bias but fairness: a method's own tolerance, and shrinking all scores towards a constant (METHODS.md 1.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from libmtl_fair.arrays import Floats, Values, as_floats
from libmtl_fair.errors import DataError
from libmtl_fair.metrics.audit import (
    AuditReport,
    Embeddings,
    FixedDeltaAudit,
    cosine_distances,
    delta_matrix,
    draw_pool,
    normalise,
    task_embedding,
)
from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import BinarySequence, Multilabel, Regression, Task, with_nan


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


GRID = tuple(np.round(np.linspace(1.0, 0.025, 40), 10))
_FINE = np.linspace(0.0, 1.0, 4001)
MARGIN = 1e-3
"""Share of the plain model's Bias that a method must be below the envelope by (ours): rounding is no gain."""


def score_targets(task: Task, output: Values, labels: Values) -> Floats:
    """Return what the audit score of each example should have been, [N] in [0, 1], NaN without a label (ours).

    Binary: the label; of a sequence the mean of its labels. Regression: the label, squashed as outputs are.
    Multiclass and multilabel, whose score is their highest probability: whether that class was right. Segmentation and sequences of
    classes: the share of places that are right; nothing of other maps, whose score says nothing of their labels. The squared error
    of a score is then its Brier score.
    """
    import torch

    truth, given = torch.as_tensor(labels), torch.as_tensor(output)
    if task.summed:
        known = task.observed(truth)
        native = task.native(task.statistics(given, truth).double())
        right = next((native[name] for name in ("pixAcc", "accuracy") if name in native), None)
        nothing = torch.full(known.shape, torch.nan)
        return as_floats(nothing if right is None else right.where(known, torch.nan))
    if isinstance(task, Regression):
        return as_floats(task.score(task.flat(truth).to(given.dtype)))
    known = with_nan(task.flat(truth)).double()
    if isinstance(task, BinarySequence):
        return as_floats(known.nanmean(-1))
    chances = task.probabilities(given)
    if chances.dim() == 1:
        return as_floats(known)
    top = chances.argmax(-1)
    if isinstance(task, Multilabel):
        return as_floats(known.gather(1, top[:, None])[:, 0])
    return as_floats(torch.where(known.isnan(), known, (known == top).double()))


def targets(predictions: Predictions) -> dict[str, Floats]:
    """Return :func:`score_targets` of every task."""
    return {
        t.name: score_targets(t, predictions.outputs[t.name], predictions.labels[t.name]) for t in predictions.tasks
    }


def native_error(predictions: Predictions) -> float:
    """Return the mean over tasks of the mean squared error of the audit score; the macro Brier if all tasks are binary (ours)."""
    return float(
        _moments({t: as_floats(s) for t, s in predictions.scores.items()}, targets(predictions)) @ [0, 0, 1, -2, 1]
    )


def _moments(scores: Mapping[str, Floats], truth: Mapping[str, Floats]) -> Floats:
    """Return the means of s, y, s^2, s y and y^2, [5], each a mean over tasks of means over labelled examples."""
    found = []
    for task, score in scores.items():
        s, y = score, as_floats(truth[task])
        seen = np.isfinite(s) & np.isfinite(y) & (y >= 0)
        s, y = s[seen], y[seen]
        if len(s):
            found.append([s.mean(), y.mean(), (s * s).mean(), (s * y).mean(), (y * y).mean()])
    return np.mean(found, axis=0) if found else np.full(5, np.nan)


def shrinkage_curve(
    scores: Mapping[str, Values],
    labels: Mapping[str, Values],
    delta: Values,
    *,
    centre: float | None = None,
    grid: Sequence[float] = GRID,
) -> pd.DataFrame:
    """Return what ``s -> c + a (s - c)`` does to a model's scores at its best centre: a row per strength ``a``.

    Shrinking leaves every order of people, hence AUC, as it is. Bias falls with ``a`` and does not depend on ``c``; the mean squared
    error does, so that the lower envelope over both is the curve of (Bias, error at the best c in [0, 1]): the exact optimum for the
    audited data, in place of a grid of centres. Both are convex in ``a``; their slopes are given so that :func:`least_bias` never
    overstates the competitor. Bias is exact, over all pairs. Source: ours (METHODS.md, 1.1).

    Parameters
    ----------
    scores : mapping of str to Values
        Task -> [N] in [0, 1].
    labels : mapping of str to Values
        Task -> [N], what the score should have been (:func:`score_targets`), NaN or negative where missing.
    delta : Values
        Tolerance, a number or [T, T].
    centre : float, optional
        One centre in [0, 1] for all; None takes the best for each ``a``.

    Returns
    -------
    DataFrame
        Columns a, c, bias, violation_rate, brier (the error), bias_slope, brier_slope.

    Raises
    ------
    DataError
        Fewer than two tasks.
    """
    if len(scores) < 2:
        raise DataError(f"a shrinkage curve needs at least two tasks, found {list(scores)}")
    given = {task: as_floats(values) for task, values in scores.items()}
    s, y, ss, sy, yy = _moments(given, {task: as_floats(labels[task]) for task in given})
    rows = []
    for a in map(float, grid):
        per_pair = FixedDeltaAudit(delta, exact=True).run({t: 0.5 + a * (v - 0.5) for t, v in given.items()}).per_pair
        bias, rate = per_pair["bias"].mean(), per_pair["violation_rate"].mean()
        at_once = (per_pair["delta"] * per_pair["violation_rate"]).mean()
        # At a = 1 no centre matters; the slope on the way down is that of the farther end.
        best = np.clip((y - a * s) / (1 - a), 0, 1) if a < 1 else float(s <= y)
        c = best if centre is None else centre
        shift = (1 - a) * c
        error = shift**2 + 2 * shift * (a * s - y) + a * a * ss - 2 * a * sy + yy
        slope = 2 * (shift * (s - c) + a * (ss - c * s) - sy + c * y)
        rows.append((a, c, bias, rate, error, (bias + at_once) / a, slope))
    return pd.DataFrame(rows, columns=["a", "c", "bias", "violation_rate", "brier", "bias_slope", "brier_slope"])


def least_bias(curve: pd.DataFrame, error: float) -> float:
    """Return the least Bias that the shrunk model reaches at no more than ``error``, from its :func:`shrinkage_curve`.

    Between strengths the tangents bound both, so that a shrunk model is never below. Where even the best of them has more
    error, its own point (a = 1) is taken; NaN without slopes (an older run) or ``error``.
    """
    a, bias, brier, *slopes = curve[["a", "bias", "brier", "bias_slope", "brier_slope"]].to_numpy(float).T
    if not len(a) or not np.isfinite([error, *brier, *slopes[0], *slopes[1]]).all():
        return float("nan")
    away = _FINE[:, None] - a
    floor, least = (np.max(value + slope * away, axis=1) for value, slope in zip((bias, brier), slopes))
    reached = np.flatnonzero(least <= error + 1e-9)
    if not len(reached):
        return float(bias[np.argmax(a)])
    return float(max(floor[max(reached[0] - 1, 0)], 0.0))


def below_curve(bias: float, brier: float, curve: pd.DataFrame) -> tuple[bool, float]:
    """Return (whether a method is below the envelope, by how much its Bias is): :func:`least_bias` minus ``bias``.

    Below by :data:`MARGIN` of the plain model's Bias at least; NaN is not below.

    >>> curve = shrinkage_curve({"a": [0.1, 0.9], "b": [0.4, 0.6]}, {"a": [0, 1], "b": [0, 1]}, 0.1)
    >>> below_curve(0.1, 0.3, curve)[0], below_curve(float("nan"), 0.3, curve)[0]
    (False, False)
    """
    gap = least_bias(curve, brier) - bias
    return bool(gap > MARGIN * curve["bias"].max()), gap
