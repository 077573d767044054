"""What shrinking all scores of a model towards a constant does to its Bias: the competitor of every claim on Bias (METHODS.md 1.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from libmtl_fair.errors import DataError
from libmtl_fair.metrics.arrays import Floats, Values, as_floats
from libmtl_fair.metrics.audit import FixedDeltaAudit
from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import BinarySequence, Multilabel, Regression, Task, with_nan

GRID = tuple(np.round(np.linspace(1.0, 0.025, 40), 10))
_FINE = np.linspace(0.0, 1.0, 4001)
MARGIN = 1e-3
"""Share of the plain model's Bias that a method must be below the envelope by (ours): rounding is no gain."""


def score_targets(task: Task, output: Values, labels: Values) -> Floats:
    """Return what the audit score of each example should have been, [N] in [0, 1], NaN without a label (ours).

    Binary: the label; of a sequence the mean of its labels. Regression: the label, squashed as outputs are.
    Multiclass and multilabel, whose score is their highest probability: whether that class was right. Segmentation: the share of
    pixels that are right; nothing of other maps, whose score says nothing of their labels. The squared error of a score is then
    its Brier score.
    """
    import torch

    truth, given = torch.as_tensor(labels), torch.as_tensor(output)
    if task.summed:
        known = task.observed(truth)
        found = task.native(task.statistics(given, truth).double()).get("pixAcc", torch.full(known.shape, torch.nan))
        return as_floats(found.where(known, torch.nan))
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
