"""Utility of each task over observed labels, and their means: what fairness is weighed against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.stats import rankdata

from libmtl_fair.metrics.arrays import Bools, Floats, as_floats, as_numpy

Scores = dict[str, float]


def auc_score(scores: Any, positive: Any) -> float:
    """Return the area under the ROC curve of ``scores`` [N] for bool ``positive`` [N]; NaN where one class is empty.

    >>> auc_score([0.1, 0.4, 0.4, 0.8], [False, False, True, True])
    0.875
    """
    values, truth = as_floats(scores), as_numpy(positive).astype(bool)
    n_pos, n_neg = int(truth.sum()), int((~truth).sum())
    if not n_pos or not n_neg:
        return math.nan
    ranks = rankdata(values)
    return float((ranks[truth].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def task_utility(task: Any, output: Any, labels: Any) -> Scores:
    """Return metric -> value of one task, over observed labels; NaN where the labels do not define one.

    Binary: auc, accuracy, brier, log_loss, f1. Multiclass: accuracy, macro_f1, auc (macro one-vs-rest), brier, log_loss.
    Multilabel: means over labels of the binary ones. Regression: mae, rmse, r2, ccc, in native units.

    Parameters
    ----------
    task : what :mod:`libmtl_fair.tasks` defines.
    output : raw outputs of the head, [N], [N, 1] or [N, C].
    labels : [N] or [N, C]; NaN or -100 where missing.
    """
    values = as_numpy(task.probabilities(output)).astype(np.float64)
    return _KINDS[task.kind](task, values, as_numpy(labels))


def utility(predictions: Any) -> dict[str, Scores]:
    """Return task -> metric -> value, and under ``macro`` the means of auc, accuracy and brier over classification tasks.

    A mean leaves out tasks that do not define the metric. With regression tasks, ``macro`` has their mean r2 too.
    """
    found = {
        t.name: task_utility(t, predictions.outputs[t.name], predictions.labels[t.name]) for t in predictions.tasks
    }
    names = ("auc", "accuracy", "brier", "r2")
    macro = {name: _mean([scores[name] for scores in found.values() if name in scores]) for name in names}
    return {**found, "macro": {name: value for name, value in macro.items() if not math.isnan(value)}}


def _mean(values: list[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


def _observed(labels: Any) -> Bools:
    return np.asarray(np.isfinite(labels) if labels.dtype.kind == "f" else labels != -100)


def _binary(task: Any, values: Floats, labels: Any) -> Scores:
    seen = _observed(labels)
    return binary_utility(values[seen], labels[seen] > 0.5)


def binary_utility(values: Floats, truth: Bools) -> Scores:
    """Return auc, accuracy at 0.5, brier, log_loss and f1 of probabilities [N] for bool labels [N]."""
    if not len(values):
        return dict.fromkeys(("auc", "accuracy", "brier", "log_loss", "f1"), math.nan)
    chosen = values > 0.5
    inside = np.clip(values, np.finfo(np.float64).eps, 1 - np.finfo(np.float64).eps)
    hits, errors = int((chosen & truth).sum()), int((chosen != truth).sum())
    return {
        "auc": auc_score(values, truth),
        "accuracy": float((chosen == truth).mean()),
        "brier": float(((values - truth) ** 2).mean()),
        "log_loss": float(-np.where(truth, np.log(inside), np.log1p(-inside)).mean()),
        "f1": 2 * hits / (2 * hits + errors) if hits + errors else math.nan,
    }


def _multiclass(task: Any, values: Floats, labels: Any) -> Scores:
    seen = _observed(labels)
    values, truth = values[seen], labels[seen].astype(int)
    if not len(values):
        return dict.fromkeys(("auc", "accuracy", "brier", "log_loss", "macro_f1"), math.nan)
    chosen, classes = values.argmax(1), np.arange(values.shape[1])
    one_hot = truth[:, None] == classes
    hits = (one_hot & (chosen[:, None] == classes)).sum(0)
    sizes = one_hot.sum(0) + (chosen[:, None] == classes).sum(0)
    inside = np.clip(values[np.arange(len(truth)), truth], np.finfo(np.float64).eps, 1)
    return {
        "auc": _mean([auc_score(values[:, c], one_hot[:, c]) for c in classes]),
        "accuracy": float((chosen == truth).mean()),
        "brier": float(((values - one_hot) ** 2).sum(1).mean()),
        "log_loss": float(-np.log(inside).mean()),
        "macro_f1": float((2 * hits[sizes > 0] / sizes[sizes > 0]).mean()),
    }


def _multilabel(task: Any, values: Floats, labels: Any) -> Scores:
    seen = _observed(labels)
    parts = [binary_utility(values[seen[:, c], c], labels[seen[:, c], c] > 0.5) for c in range(values.shape[1])]
    return {name: _mean([part[name] for part in parts]) for name in parts[0]}


def _regression(task: Any, values: Floats, labels: Any) -> Scores:
    seen = _observed(labels)
    shown = values[seen] * task.std + task.mean
    truth = labels[seen].astype(np.float64) * task.std + task.mean
    if not len(truth):
        return dict.fromkeys(("mae", "rmse", "r2", "ccc"), math.nan)
    error, spread = shown - truth, float(((truth - truth.mean()) ** 2).mean())
    covariance = float(((shown - shown.mean()) * (truth - truth.mean())).mean())
    scale = spread + float(shown.var()) + (shown.mean() - truth.mean()) ** 2
    return {
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "r2": 1 - float((error**2).mean()) / spread if spread > 0 else math.nan,
        "ccc": 2 * covariance / scale if scale > 0 else math.nan,
    }


_KINDS: Mapping[str, Callable[[Any, Floats, Any], Scores]] = {
    "binary": _binary,
    "multiclass": _multiclass,
    "multilabel": _multilabel,
    "regression": _regression,
}
