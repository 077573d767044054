"""The consistency audit of a model's predictions: what of each kind of task is ranked, and where decisions fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from libmtl_fair.metrics.consistency import ConsistencyAudit, ConsistencyReport
from libmtl_fair.metrics.decisions import Held, thresholds_in_use
from libmtl_fair.metrics.ranks import Scores
from libmtl_fair.predictions import Predictions

_SEVERAL = ("multilabel", "binary_sequence")
"""Kinds of task that decide several times about a person: none of these is the person's decision."""


def audit_people(
    audit: ConsistencyAudit,
    predictions: Predictions,
    reference: Predictions | None = None,
    twins: Mapping[str, Sequence[Predictions]] | None = None,
    threshold: float | str | Held = 0.5,
) -> ConsistencyReport:
    """Return the consistency audit of predictions.

    Ranked are probabilities (of each class or label), predicted values of a regression, else audit scores.

    Parameters
    ----------
    audit : ConsistencyAudit
        Of the same people.
    reference : Predictions, optional
        The model's validation predictions: ranks refer to them, and their labels calibrate; None: the audit's own, or
        the predictions themselves.
    twins : mapping of str to sequence of Predictions, optional
        Attribute -> predictions of the same people with each other sensitive value; who has no known group has no twin.
    threshold : float or str or Held, default 0.5
        Of decisions of binary tasks: a number, task -> number, or "base_rate": of the reference's labels.
    """
    base = reference or predictions
    several = {task.name for task in predictions.tasks if task.kind in _SEVERAL}
    held = thresholds_in_use(base, threshold)
    bars = {name: bar for name, bar in held.items() if isinstance(bar, float) and name not in several}
    none = np.full(len(predictions), np.nan)
    lacking = {attribute: predictions.groups[attribute].numpy() < 0 for attribute in twins or {}}
    return audit.run(
        scores_of(predictions),
        reference_scores=None if reference is None else scores_of(reference),
        twins={a: [_hidden(scores_of(p), lacking[a]) for p in each] for a, each in (twins or {}).items()} or None,
        labels={
            name: labels.numpy() for name, labels in base.labels.items() if base.task(name).kind != "binary_sequence"
        }
        if reference is not None
        else None,
        thresholds=bars,
        decisions=dict.fromkeys(several, none),
    )


def scores_of(predictions: Predictions) -> dict[str, Tensor]:
    """Return what is ranked of every task, [N] or [N, C]."""
    ranked = ("multiclass", "multilabel", "regression", "binary")
    return {
        task.name: task.probabilities(predictions.outputs[task.name])
        if task.kind in ranked
        else predictions.scores[task.name]
        for task in predictions.tasks
    }


def _hidden(scores: Mapping[str, Tensor], lacking: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Scores:
    found = {}
    for task, values in scores.items():
        held = values.double().numpy().copy()
        held[lacking] = np.nan
        found[task] = held
    return found
