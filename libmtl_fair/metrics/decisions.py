"""Which scores are positive decisions: 0.5, a number, or the threshold of the base rate, chosen on validation data and then held."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from libmtl_fair.metrics.group_state import Rows, base_rates
from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import decisions, with_nan

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
