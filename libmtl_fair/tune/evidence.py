"""What a trial keeps of its validation predictions: counts and utilities, so that verdicts and guards need no predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch

from libmtl_fair import metrics
from libmtl_fair.arrays import Floats
from libmtl_fair.errors import FairMTLError
from libmtl_fair.metrics.rates import group_counts
from libmtl_fair.metrics.scores import Held
from libmtl_fair.metrics.verdicts import degenerate
from libmtl_fair.predictions import Predictions

Counts = dict[str, dict[str, dict[str, list[int]]]]
"""Binary task -> attribute -> group -> (tn, fp, fn, tp) on people whose label is known; attribute and group "" are everybody."""
Utility = dict[str, list[float]]
"""``task/metric`` -> its value, then without each fold of the people."""
FOLDS = 10
GUARDED = ("auc", "accuracy", "r2")
"""Utilities that a choice may not lose, of each task that defines them."""


def counts_of(predictions: Predictions, bars: Held) -> Counts:
    """Return the confusion counts of every binary task's decisions at ``bars``, of each group and of everybody."""
    found: Counts = {}
    for name in (task.name for task in predictions.tasks if task.kind == "binary"):
        about, labels = predictions.task(name), predictions.labels[name]
        seen = about.observed(labels)
        chances = about.probabilities(predictions.outputs[name])[seen]
        truth, decision = labels[seen].double() > 0.5, chances > torch.tensor(bars[name]).to(chances)
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


def utilities(predictions: Predictions, bars: Held) -> Utility:
    """Return AUC, accuracy (of the decisions at ``bars``) or R2 of each task that defines them, and the same without each fold."""
    full, *parts = (metrics.utility(part, bars) for part in (predictions, *without_folds(predictions)))
    names = [(t.name, m) for t in predictions.tasks for m in GUARDED if not math.isnan(full[t.name].get(m, math.nan))]
    return {f"{task}/{metric}": [part[task][metric] for part in (full, *parts)] for task, metric in names}


def without_folds(predictions: Predictions, folds: int = FOLDS) -> Iterator[Predictions]:
    """Yield the predictions without each fold of the people in turn; every ``folds``-th row is one."""
    p = predictions
    for fold in range(folds):
        rows = torch.arange(len(p)) % folds != fold
        parts = (p.scores, p.outputs, p.labels, p.groups)
        scores, outputs, labels, groups = ({name: value[rows] for name, value in part.items()} for part in parts)
        yield replace(p, scores=scores, outputs=outputs, labels=labels, groups=groups, embeddings=None)


def jackknife(values: Sequence[float] | Floats) -> float:
    """Return the standard deviation over draws of people of a statistic whose values without each fold are given."""
    return float(math.sqrt(len(values) - 1) * np.nanstd(values))


def sampling_deviation(
    predictions: Predictions, statistic: Callable[[Predictions], float], folds: int = FOLDS
) -> float:
    """Return the standard deviation of a statistic over draws of people, by the jackknife over the ``folds`` that define it."""
    found = []
    for part in without_folds(predictions, folds):
        with suppress(FairMTLError):
            found.append(statistic(part))
    return jackknife(found) if found else math.nan
