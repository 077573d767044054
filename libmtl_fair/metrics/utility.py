"""Utility of each task over observed labels, and their means: what fairness is weighed against."""

from __future__ import annotations

import math

import torch

from libmtl_fair import functional as F
from libmtl_fair.metrics.arrays import Values, as_numpy
from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import Regression, Task

Scores = dict[str, float]


def auc_score(scores: Values, positive: Values) -> float:
    """Return the area under the ROC curve of ``scores`` [N] for bool ``positive`` [N]; NaN where one class is empty.

    >>> auc_score([0.1, 0.4, 0.4, 0.8], [False, False, True, True])
    0.875
    """
    return float(F.auc(torch.as_tensor(as_numpy(scores)), torch.as_tensor(as_numpy(positive)).bool()))


def task_utility(task: Task, output: Values, labels: Values) -> Scores:
    """Return metric -> value of one task, over observed labels; NaN where the labels do not define one.

    The metrics are those of :func:`libmtl_fair.functional.task_scores`.

    Parameters
    ----------
    task : what :mod:`libmtl_fair.tasks` defines.
    output : raw outputs of the head, [N], [N, 1] or [N, C].
    labels : [N] or [N, C]; NaN or -100 where missing.
    """
    native = (task.mean, task.std) if isinstance(task, Regression) else (0.0, 1.0)
    return F.task_scores(task.kind, task.probabilities(torch.as_tensor(output)), torch.as_tensor(labels), native=native)


def utility(predictions: Predictions) -> dict[str, Scores]:
    """Return task -> metric -> value, and under ``macro`` the means of auc, accuracy and brier over classification tasks.

    A mean leaves out tasks that do not define the metric. With regression tasks, ``macro`` has their mean r2 too.
    """
    found = {
        t.name: task_utility(t, predictions.outputs[t.name], predictions.labels[t.name]) for t in predictions.tasks
    }
    macro = {}
    for name in ("auc", "accuracy", "brier", "r2"):
        known = [v for scores in found.values() if not math.isnan(v := scores.get(name, math.nan))]
        if known:
            macro[name] = sum(known) / len(known)
    return {**found, "macro": macro}
