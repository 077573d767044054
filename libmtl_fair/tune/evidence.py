"""What a trial keeps of its validation predictions: counts and utilities, so that verdicts and guards need no predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from libmtl_fair import metrics
from libmtl_fair.metrics.arrays import Floats
from libmtl_fair.metrics.rates import group_counts
from libmtl_fair.metrics.verdicts import degenerate
from libmtl_fair.predictions import Predictions

Counts = dict[str, dict[str, dict[str, list[int]]]]
"""Binary task -> attribute -> group -> (tn, fp, fn, tp) on people whose label is known; attribute and group "" are everybody."""
Utility = dict[str, list[float]]
"""``task/metric`` -> its value, then without each fold of the people."""
FOLDS = 10
GUARDED = ("auc", "accuracy", "r2")
"""Utilities that a choice may not lose, of each task that defines them."""


def base_rate_thresholds(predictions: Predictions) -> dict[str, float]:
    """Stand in for metrics.decisions."""
    found = {}
    for task in predictions.tasks:
        if task.kind == "binary":
            seen = task.observed(predictions.labels[task.name])
            p = task.probabilities(predictions.outputs[task.name])[seen].double().sort(descending=True).values
            k = int((predictions.labels[task.name][seen] > 0.5).sum())
            found[task.name] = float((p[max(k - 1, 0)] + p[min(k, len(p) - 1)]) / 2) if len(p) else 0.5
    return found


def bars_of(predictions: Predictions, threshold: float | str) -> dict[str, float]:
    """Return the threshold of each binary task's decisions; ``base_rate``: what selects as many of these people as are positive."""
    if threshold == "base_rate":
        return base_rate_thresholds(predictions)
    return {task.name: float(threshold) for task in predictions.tasks if task.kind == "binary"}


def counts_of(predictions: Predictions, bars: Mapping[str, float]) -> Counts:
    """Return the confusion counts of every binary task, of each group and of everybody."""
    found: Counts = {}
    for name, bar in bars.items():
        truth, decision, seen = _decided(predictions, name, bar)
        groups = {"": (torch.zeros(len(truth), dtype=torch.int64), [""])}
        groups |= {a: (ids[seen], predictions.group_names[a]) for a, ids in predictions.groups.items()}
        found[name] = {
            attribute: dict(zip(names, group_counts(truth, decision, ids, len(names)).tolist()))
            for attribute, (ids, names) in groups.items()
        }
    return found


def degenerate_tasks(counts: Counts, threshold: float | str) -> dict[str, str]:
    """Return task -> why its decisions are none that a disparity could be asked of, for tasks where that is so."""
    why = {task: degenerate(of[""][""], half=threshold == 0.5) for task, of in counts.items()}
    return {task: reason for task, reason in why.items() if reason}


def utilities(predictions: Predictions, bars: Mapping[str, float]) -> Utility:
    """Return AUC and accuracy (of the decisions at ``bars``) or R2 of each task, of all people and without each fold."""
    found: Utility = {}
    for part in (predictions, *without_folds(predictions)):
        for task, scores in metrics.utility(part).items():
            if task in bars:
                truth, decision, _ = _decided(part, task, bars[task])
                scores = scores | {"accuracy": float((truth == decision).double().mean())}
            for metric in GUARDED if task != "macro" else ():
                if metric in scores:
                    found.setdefault(f"{task}/{metric}", []).append(scores[metric])
    return found


def _decided(predictions: Predictions, task: str, bar: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return labels and decisions of those whose label is known, bool [n] each, and who they are, bool [N]."""
    about, labels = predictions.task(task), predictions.labels[task]
    seen = about.observed(labels)
    return labels[seen].double() > 0.5, about.probabilities(predictions.outputs[task])[seen] > bar, seen


def without_folds(predictions: Predictions, folds: int = FOLDS) -> Iterator[Predictions]:
    """Yield the predictions without each fold of the people in turn; every ``folds``-th row is one."""
    p = predictions
    for fold in range(folds):
        rows = torch.arange(len(p)) % folds != fold
        parts = (p.scores, p.outputs, p.labels, p.groups)
        scores, outputs, labels, groups = ({name: value[rows] for name, value in part.items()} for part in parts)
        yield Predictions(p.tasks, scores, outputs, labels, groups, p.group_names)


def jackknife(values: Sequence[float] | Floats) -> float:
    """Return the standard deviation over draws of people of a statistic whose values without each fold are given."""
    return float(math.sqrt(len(values) - 1) * np.nanstd(values))


def sampling_deviation(
    predictions: Predictions, statistic: Callable[[Predictions], float], folds: int = FOLDS
) -> float:
    """Return the standard deviation of a statistic over draws of people, by the jackknife over ``folds``."""
    return jackknife([statistic(part) for part in without_folds(predictions, folds)])
