"""Scores of tasks and where they decide; of every group with standard errors: AUC (DeLong), regression (influence functions)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from libmtl_fair import functional as F
from libmtl_fair.arrays import Array, Floats, Ints, Values, as_floats, as_ids, as_numpy, as_weights, divide
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.faults import Faults, check_labels
from libmtl_fair.metrics.group_state import Rows, base_rates
from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import BinarySequence, Regression, Task, decisions, with_nan

if TYPE_CHECKING:
    import pandas as pd

MACRO = "macro"
"""In place of a task's name: the mean over tasks."""
Held = Mapping[str, float | list[float]]
"""Task -> the threshold of its probabilities, or one for each label of a multilabel task."""
DECIDED = ("binary", "multilabel", "binary_sequence")
"""Kinds of task whose decisions a threshold makes; multiclass tasks decide for the likeliest class."""


def base_rate_thresholds(predictions: Predictions) -> dict[str, float | list[float]]:
    """Return task -> the threshold above which as many are selected as are positive, of binary and multilabel tasks.

    ``predictions`` are those on *validation* data; the thresholds are then held (METHODS.md, 5): on test data they would use what
    is not known yet. Where probabilities tie there, the nearest number that can be is selected. A task without labels is not in
    it, a label without any has 0.5, and so has a task of which decisions alone are meant (``Predictions.decided``).
    """
    found: dict[str, float | list[float]] = {}
    for task in predictions.tasks:
        if task.kind in DECIDED:
            unit, made, truth, _ = decisions(task, predictions.outputs[task.name], predictions.labels[task.name])
            labels, values = with_nan(unit.flat(truth)), unit.probabilities(made)
            observed = labels.isfinite()
            if observed.any():
                least = base_rates(Rows(values, labels, observed, {}, None)).clamp(min=0)
                meant = observed.any(0) & (task.name not in predictions.decided)
                found[task.name] = torch.where(meant, least, 0.5).tolist()
    return found


def thresholds_in_use(predictions: Predictions, threshold: float | str | Held = 0.5) -> dict[str, float | list[float]]:
    """Return task -> threshold of every binary and multilabel task: a number for all, ``"base_rate"`` of these predictions, or as held.

    Tasks that are not named keep 0.5, and so do those of which decisions alone are meant (``Predictions.decided``).
    """
    if threshold == "base_rate":
        given: Held = base_rate_thresholds(predictions)
    else:
        given = threshold if isinstance(threshold, Mapping) else {t.name: float(threshold) for t in predictions.tasks}
    decided = dict.fromkeys(predictions.decided, 0.5)
    return {t.name: decided.get(t.name, given.get(t.name, 0.5)) for t in predictions.tasks if t.kind in DECIDED}


REGRESSION = ("mae", "rmse", "r2", "ccc", "mean_prediction", "mean_error")
"""Metrics of a regression task; ``mean_error`` is that of prediction minus target."""

_OF_SCORES = {"auc", "brier", "log_loss"}
_CELLS_AT_ONCE = 1 << 18


def auc_score(scores: Values, positive: Values) -> float:
    """Return the area under the ROC curve of ``scores`` [N] for bool ``positive`` [N]; NaN where one class is empty.

    Raises
    ------
    DataError
        Shapes differ, a score is not finite, or a label neither 0 nor 1.

    Examples
    --------
    >>> auc_score([0.1, 0.4, 0.4, 0.8], [False, False, True, True])
    0.875
    """
    score, label = as_numpy(scores), as_numpy(positive)
    _need_scores("auc_score", score, label)
    return float(F.auc(torch.from_numpy(score.astype(np.float64)), torch.from_numpy(label.astype(bool))))


def _need_scores(what: str, score: Array, label: Array) -> None:
    """Raise DataError for scores that are not finite numbers [N], and labels that are not 0 and 1."""
    if score.ndim != 1 or score.shape != label.shape or score.dtype.kind not in "iuf" or label.dtype.kind not in "iufb":
        found = f"{score.dtype} {list(score.shape)} and {label.dtype} {list(label.shape)}"
        raise DataError(f"{what}: expected scores [N] and as many labels of 0 and 1, found {found}")
    if not np.isfinite(score).all():
        raise DataError(f"{what}: {int((~np.isfinite(score)).sum())} scores are not finite; leave them out")
    wrong = np.flatnonzero((label != 0) & (label != 1))
    if len(wrong):
        raise DataError(
            f"{what}: found label {label[wrong[0]]:g} in row {wrong[0]}; expected 0 and 1, missing ones left out"
        )


def task_utility(task: Task, output: Values, labels: Values) -> dict[str, float]:
    """Return metric -> value of one task, over observed labels; NaN where the labels do not define one.

    ``output`` is the head's, [N], [N, 1] or [N, C]; ``labels`` [N] or [N, C], NaN or -100 where missing. The metrics are those of
    :func:`libmtl_fair.functional.task_scores`; of a sequence those of all its steps.
    """
    native = (task.mean, task.std) if isinstance(task, Regression) else (0.0, 1.0)
    if task.summed:
        sums = task.statistics(torch.as_tensor(output), torch.as_tensor(labels)).double().sum(0)
        return {name: float(value) for name, value in task.native(sums).items()}
    truth, faults = torch.as_tensor(labels), Faults()
    check_labels(faults, task, truth)
    faults.check()
    task, made, truth, _ = decisions(task, torch.as_tensor(output), truth)
    return F.task_scores(task.kind, task.probabilities(made), truth, native=native)


def utility(predictions: Predictions, threshold: float | str | Held = 0.5) -> dict[str, dict[str, float]]:
    """Return task -> metric -> value, and under ``macro`` the means of auc, accuracy and brier over classification tasks.

    A mean leaves out tasks that do not define the metric. With regression tasks, ``macro`` has their mean r2 too, with maps
    their mIoU, RMSE and mean angle. Where decisions
    alone are meant (``Predictions.decided``) auc, brier and log_loss are NaN, and ``macro`` has no auc and brier. Accuracy and F1
    are of the decisions at ``threshold`` (:func:`libmtl_fair.metrics.scores.thresholds_in_use`).
    """
    if any(task.name == MACRO for task in predictions.tasks):
        raise RecipeError(f"a task is named {MACRO!r}, as the mean over tasks is; rename it")
    given = [(t, predictions.outputs[t.name], predictions.labels[t.name]) for t in predictions.tasks]
    found = {task.name: task_utility(task, *each) for task, *each in given}
    for name, bar in thresholds_in_use(predictions, threshold).items():
        decides, made, labels, _ = decisions(
            predictions.task(name), predictions.outputs[name], predictions.labels[name]
        )
        chosen = decides.probabilities(made)
        found[name] |= F.task_scores(
            decides.kind, (chosen > torch.tensor(bar).to(chosen)).double(), labels, ["accuracy", "f1"]
        )
    for task in predictions.decided:
        found[task] |= dict.fromkeys(_OF_SCORES & found[task].keys(), math.nan)
    names = [name for name in ("auc", "accuracy", "brier", "r2") if not (predictions.decided and name in _OF_SCORES)]
    names += dict.fromkeys(task.headline for task in predictions.tasks if task.summed)
    known = {name: [v for s in found.values() if not math.isnan(v := s.get(name, math.nan))] for name in names}
    return {**found, MACRO: {name: sum(values) / len(values) for name, values in known.items() if values}}


def step_auc(predictions: Predictions, task: str) -> pd.DataFrame:
    """Return the AUC at each step of a sequence: over the examples that have a label there.

    Parameters
    ----------
    predictions : Predictions
        Of a model with a :class:`libmtl_fair.BinarySequence`.
    task : str
        Its name.

    Returns
    -------
    DataFrame
        step (from 0), labelled, positive, auc (NaN where one class is empty).

    Raises
    ------
    DataError
        A task that is no sequence, or not in the predictions.
    """
    import pandas as pd

    found = predictions.task(task)
    if not isinstance(found, BinarySequence):
        raise DataError(f"step_auc: task {task!r} is {found.kind}; expected a binary_sequence")
    values, labels = found.probabilities(predictions.outputs[task]), with_nan(predictions.labels[task])
    rows = []
    for step, (p, y) in enumerate(zip(values.unbind(1), labels.unbind(1))):
        seen = y.isfinite() & p.isfinite()
        rows.append((step, int(seen.sum()), int(y[seen].sum()), float(F.auc(p[seen], y[seen] > 0.5))))
    return pd.DataFrame(rows, columns=["step", "labelled", "positive", "auc"])


@dataclass(frozen=True)
class GroupAuc:
    """AUC of G groups, each [G]: NaN where a group lacks a class, DeLong's error where fewer than two; positives, negatives."""

    value: Floats
    error: Floats
    positives: Ints
    negatives: Ints


def group_auc(
    scores: Values,
    y_true: Values,
    groups: Values,
    n_groups: int,
    *,
    errors: bool = True,
    sample_weight: Values | None = None,
) -> GroupAuc:
    """Return the AUC of each group: the probability that a positive scores above a negative, ties counted half.

    ``scores`` [N] finite; ``y_true`` [N] of 0/1; ``groups`` [N] ids, rows outside of 0..G-1 are left out. O(n log n) for any
    G, at most 20 bytes a row. ``sample_weight`` [N] weighs as scikit-learn does.

    Raises
    ------
    DataError
        Lengths differ, or a score is not finite.

    Examples
    --------
    >>> group_auc([0.1, 0.9, 0.5, 0.5], [0, 1, 0, 1], [0, 0, 1, 1], 2).value.tolist()
    [1.0, 0.5]
    """
    columns = [as_numpy(scores), as_numpy(y_true), as_ids(groups)]
    sizes, group = [len(column) for column in columns], columns[2]
    if len(set(sizes)) > 1:
        raise DataError("scores, y_true and groups must have one length, found {}, {} and {}".format(*sizes))
    if sample_weight is not None:
        columns.append(as_weights(sample_weight, len(group)))
    if len(group) and (group.min() < 0 or group.max() >= n_groups):
        columns = [column[(group >= 0) & (group < n_groups)] for column in columns]
    score, label, group, *weight = columns
    _need_scores("group_auc", score, label)
    tensor = torch.from_numpy
    weights = tensor(weight[0]) if weight else None
    found = F.group_auc(tensor(score), tensor(label > 0), tensor(group), n_groups, weight=weights, errors=errors)
    return GroupAuc(*(values.numpy() for values in found))


@dataclass(frozen=True)
class GroupRegression:
    """Regression metrics of G groups, in the order of :data:`REGRESSION`: [6, G], standard errors [6, G], and rows [G].

    NaN for an empty group, r2 and ccc where targets do not vary; errors from influence functions (no normality assumed).
    """

    values: Floats
    errors: Floats
    counts: Ints


def group_regression(
    prediction: Values, target: Values, groups: Values, n_groups: int, sample_weight: Values | None = None
) -> GroupRegression:
    """Return MAE, RMSE, R2, CCC, mean prediction and mean error of each group; linear in n, for any G.

    ``groups`` [N] are ids in 0..G-1. CCC = 2 cov / (var y + var p + (mean y - mean p)^2), population moments.

    >>> found = group_regression([1.0, 2.0, 5.0], [1.0, 3.0, 5.0], [0, 0, 1], 2)
    >>> found.values[0].tolist()
    [0.5, 0.0]
    """
    p, y, group = as_floats(prediction), as_floats(target), as_ids(groups).astype(np.int64)
    w = np.ones(len(p)) if sample_weight is None else as_weights(sample_weight, len(p))
    weight = np.bincount(group, w, minlength=n_groups)

    def mean(values: Floats) -> Floats:
        return divide(np.bincount(group, w * values, minlength=n_groups), weight)

    error = p - y
    mean_y, mean_p, bias = mean(y), mean(p), mean(error)
    dy, dp = y - mean_y[group], p - mean_p[group]
    mae, mse = mean(np.abs(error)), mean(error**2)
    var_y, var_p, cov = mean(dy * dy), mean(dp * dp), mean(dy * dp)
    rmse, r2, scale = np.sqrt(mse), 1 - divide(mse, var_y), var_y + var_p + (mean_y - mean_p) ** 2
    ccc = np.where(var_y > 0, divide(2 * cov, scale), np.nan)
    influences = (
        np.abs(error) - mae[group],
        divide(error**2 - mse[group], 2 * rmse[group]),
        divide((1 - r2)[group] * dy * dy - error**2, var_y[group]),
        divide(2 * dy * dp - ccc[group] * (dy * dy + dp * dp + ((mean_y - mean_p) ** 2)[group]), scale[group])
        - divide(2 * ccc[group] * (mean_y - mean_p)[group] * (dy - dp), scale[group]),
        dp,
        error - bias[group],
    )
    spread = [np.bincount(group, (w * np.nan_to_num(f)) ** 2, minlength=n_groups) for f in influences]
    values = np.stack([mae, rmse, r2, ccc, mean_p, bias])
    errors = np.where(np.isnan(values), np.nan, np.sqrt(divide(np.stack(spread), weight**2)))
    return GroupRegression(values, errors, np.bincount(group, minlength=n_groups))


def ks_distance(prediction: Values, groups: Values, n_groups: int) -> float:
    """Return the largest Kolmogorov-Smirnov distance between two groups' predictions, in [0, 1]; NaN with one group.

    The largest over pairs of groups of ``sup |F_g - F_h|`` is sup of ``max_g F_g - min_g F_g``: one sort and O(n G) in all. Row
    weights are not used.

    >>> ks_distance([0.0, 1.0, 2.0, 3.0], [0, 0, 1, 1], 2)
    1.0
    """
    values, group = as_floats(prediction), as_ids(groups).astype(np.int64)
    counts = np.bincount(group, minlength=n_groups)
    present = np.flatnonzero(counts)
    if len(present) < 2:
        return float("nan")
    order = np.argsort(values)
    values, column = values[order], np.searchsorted(present, group[order])
    last = np.append(values[1:] != values[:-1], True)
    passed, largest = np.zeros(len(present)), 0.0
    step = max(1, _CELLS_AT_ONCE // len(present))
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        seen = (column[rows, None] == np.arange(len(present))).cumsum(0) + passed
        passed = seen[-1]
        shares = seen[last[rows]] / counts[present]
        largest = max(largest, float(np.ptp(shares, axis=1).max(initial=0.0)))
    return largest


def binned_shares(prediction: Values, groups: Values, n_groups: int, n_bins: int) -> Floats:
    """Return F_g at quantiles of all predictions, [n_bins, G]: what intervals of the KS distance are drawn from."""
    values, group = as_floats(prediction), as_numpy(groups).astype(np.int64)
    edges = np.quantile(values, np.arange(1, n_bins + 1) / (n_bins + 1))
    bins = np.searchsorted(edges, values, side="left")
    table = np.bincount(bins * n_groups + group, minlength=(n_bins + 1) * n_groups).reshape(n_bins + 1, n_groups)
    return divide(table.cumsum(0)[:-1], table.sum(0))
