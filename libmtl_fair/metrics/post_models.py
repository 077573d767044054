"""Models made of finished ones along a strength in [0, 1]: lift-only offsets, thresholds per group, blends. Nothing is trained.

Each is fitted on validation predictions and gives the predictions of a new model: ``apply(predictions, ..., strength=s)``. At
strength 0 it is the model that it was made of. They are the competitors of every method that costs a training (METHODS.md, 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import expit, logit
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.arrays import Array, Bools, Floats, as_floats, as_numpy
from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.metrics.fairlearn_bridge import PostProcessed, attributes_of, group_labels, post_process
from libmtl_fair.metrics.rates import group_counts
from libmtl_fair.metrics.scores import Held, thresholds_in_use
from libmtl_fair.metrics.verdicts import judge
from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import Binary, with_nan

STRENGTHS = tuple(i / 20 for i in range(21))
"""The points of a path."""
LIFTED: Mapping[str, str] = {
    "equalized_odds": "true_positive_rate",
    "equal_opportunity": "true_positive_rate",
    "demographic_parity": "selection_rate",
}
"""Constraint of offsets -> the rate that is lifted."""
_LEAST, _MARGIN = 10, 1e-5


Along = Callable[[float], Predictions]
"""Strength -> the predictions of the model of that strength."""


class PostModel:
    """What a path is of: a model made of others' predictions."""

    def along(self, *predictions: Predictions) -> Along:
        """Return the path of models on the people of these predictions, those of the models that it is made of."""
        raise NotImplementedError

    def apply(self, *predictions: Predictions, strength: float = 1.0) -> Predictions:
        """Return the predictions of the model of one strength in [0, 1]."""
        return self.along(*predictions)(strength)


@dataclass(frozen=True)
class Offsets(PostModel):
    """Offsets >= 0 to the logits of groups: ``offsets`` is task -> group -> offset; ``sensitive``: whose groups (crossed).

    Made by :func:`fit_offsets`. A group that is not named, or unknown, keeps its logits.
    """

    sensitive: tuple[str, ...]
    offsets: Mapping[str, Mapping[str, float]]

    def along(self, *predictions: Predictions) -> Along:
        """Return strength -> the predictions with so many times the offsets added."""
        (held,) = predictions
        shown = pd.Series(group_labels(held, self.sensitive))
        logits = {name: _logits(held, name) for name in self.offsets}
        added = {
            name: torch.tensor(shown.map(by_group).fillna(0.0).tolist(), dtype=logits[name].dtype)
            for name, by_group in self.offsets.items()
        }
        return lambda strength: with_outputs(held, {name: z + strength * added[name] for name, z in logits.items()})


def fit_offsets(
    predictions: Predictions,
    sensitive: str | Sequence[str] | None = None,
    constraint: str = "equalized_odds",
    *,
    threshold: float | str = 0.5,
    least: int = _LEAST,
) -> Offsets:
    """Choose offsets on (validation) predictions that lift every group's rate to the best group's (ours).

    A group's offset is the least >= 0 that gives it, at the threshold in use, the highest rate that does not exceed the best
    group's: the rates' differences never grow along the path, and nobody's score falls. The rate is that of true positives, for
    ``demographic_parity`` that of selection. Groups with fewer than ``least`` examples behind the rate stay as they are. Several
    ``sensitive`` attributes mean their intersection.

    ``threshold="base_rate"``: the threshold that selects as many as are positive, taken again from the lifted scores until
    both agree.

    Raises
    ------
    RecipeError
        An unknown constraint.
    DataError
        An unknown attribute.
    """
    if constraint not in LIFTED:
        raise RecipeError(unknown("constraint of offsets", constraint, LIFTED))
    names = tuple(attributes_of(predictions, sensitive))
    shown, known = group_labels(predictions, names), _known(predictions, names)
    found = Offsets(names, {})
    for _ in range(1 if threshold != "base_rate" else 10):
        cut = thresholds_in_use(found.apply(predictions), threshold)
        offsets = {}
        for task in binary_tasks(predictions):
            z, y = _labelled(predictions, task)
            counted = known & ((y == 1) if LIFTED[constraint] == "true_positive_rate" else ~np.isnan(y))
            offsets[task] = _lifts(z[counted], shown[counted], float(logit(np.clip(cut[task], 1e-6, 1 - 1e-6))), least)
        if offsets == found.offsets:
            break
        found = Offsets(names, offsets)
    return found


def _lifts(z: Floats, shown: Array, cut: float, least: int) -> dict[str, float]:
    """Return group -> the least offset that brings its share of z > cut nearest to the highest share, from below."""
    values = {str(g): np.sort(z[shown == g])[::-1] for g in np.unique(shown.astype(str))}
    values = {g: v for g, v in values.items() if len(v) >= least}
    best = max((float((v > cut).mean()) for v in values.values()), default=0.0)
    found = {}
    for group, v in values.items():
        allowed = int(np.floor(best * len(v) + 1e-9))
        if allowed < len(v):  # a tie at the edge would lift too many: stay above it
            allowed = int((v > v[allowed]).sum())
        lower = v[allowed] if allowed < len(v) else -np.inf
        if allowed > (v > cut).sum():
            found[group] = float(cut - v[allowed - 1] + min(_MARGIN, (v[allowed - 1] - lower) / 2))
        else:
            found[group] = 0.0
    return found


@dataclass(frozen=True)
class Thresholds(PostModel):
    """Decisions by thresholds per group: ``fitted`` is task -> :class:`PostProcessed`. Made by :func:`fit_thresholds`.

    Decisions are all that is left of the scores: the outputs of :meth:`apply` are logits whose sign gives the decision, with
    the former order among the selected and among the others, and the tasks are named in ``Predictions.decided``: they decide
    at 0.5 whatever the threshold in use, and AUC, Brier and the fixed-delta audit are not defined of them. ``cut``: thresholds of
    the model itself.
    """

    sensitive: tuple[str, ...]
    fitted: Mapping[str, PostProcessed]
    cut: Held
    seed: int = 0

    def along(self, *predictions: Predictions) -> Along:
        """Return strength -> the predictions where a random share so large (the smaller within the larger) is so decided."""
        (held,) = predictions
        shown, ends = group_labels(held, self.sensitive), {}
        drawn = np.random.default_rng(self.seed).random(len(shown))
        for name, chosen in self.fitted.items():
            p = expit(as_floats(_logits(held, name)))
            by_group = chosen.predict(p, sensitive=shown, random_state=self.seed) == 1
            ends[name] = p, p > self.cut[name], np.where(np.isin(shown, chosen.groups), by_group, p > self.cut[name])

        def made(strength: float) -> Predictions:
            changed = {}
            for name, (p, own, other) in ends.items():
                chosen = np.where(drawn < strength, other, own)
                changed[name] = torch.as_tensor(logit((np.clip(p, 1e-4, 1 - 1e-4) + chosen) / 2), dtype=torch.float64)
            return replace(with_outputs(held, changed), decided=tuple(dict.fromkeys([*held.decided, *changed])))

        return made


def fit_thresholds(
    predictions: Predictions,
    sensitive: str | Sequence[str] | None = None,
    constraint: str = "equalized_odds",
    *,
    objective: str = "accuracy_score",
    threshold: float | str = 0.5,
    least: int = _LEAST,
    seed: int = 0,
) -> Thresholds:
    """Choose thresholds per group on (validation) predictions for every binary task, by :func:`post_process` (fairlearn).

    Groups with fewer than ``least`` positives or negatives are decided at the threshold in use, and so is a task where fewer
    than two groups are left. ``constraint`` and ``objective`` are fairlearn's; several attributes mean their intersection.
    """
    names = tuple(attributes_of(predictions, sensitive))
    shown, known, fitted = group_labels(predictions, names), _known(predictions, names), {}
    for task in binary_tasks(predictions):
        _, y = _labelled(predictions, task)
        groups = [
            str(g)
            for g in np.unique(shown[known].astype(str))
            if min(((shown == g) & (y == label)).sum() for label in (0, 1)) >= least
        ]
        if len(groups) >= 2:
            ids = np.array([groups.index(g) if g in groups else -1 for g in shown])
            held = replace(predictions, groups={"group": torch.from_numpy(ids)}, group_names={"group": groups})
            fitted[task] = post_process(held, task, constraint, objective=objective)
    return Thresholds(names, fitted, thresholds_in_use(predictions, threshold), seed)


@dataclass(frozen=True)
class Blend(PostModel):
    """Outputs of two models mixed: ``(1 - strength) first + strength second``, for tasks of any kind."""

    def along(self, *predictions: Predictions) -> Along:
        """Return strength -> the mixed predictions; DataError for other tasks or other people."""
        first, second = predictions
        if [t.name for t in first.tasks] != [t.name for t in second.tasks] or len(first) != len(second):
            raise DataError("blend needs two models of the same tasks on the same people")
        other = {t.name: second.outputs[t.name].reshape(first.outputs[t.name].shape) for t in first.tasks}
        return lambda s: with_outputs(first, {n: (1 - s) * first.outputs[n] + s * z for n, z in other.items()})


class Point(NamedTuple):
    """One point of a path: the strength and what was measured there."""

    strength: float
    disparity: float


def path(along: Along, disparity: Callable[[Predictions], float]) -> list[Point]:
    """Return the disparity at each of :data:`STRENGTHS`."""
    return [Point(s, disparity(along(s))) for s in STRENGTHS]


def pick(points: Sequence[Point], target: float | None = None) -> Point:
    """Return the least strength whose disparity is at most ``target``, else the full strength.

    Without a target: the least strength with the lowest disparity. Undefined disparities (NaN) are passed over.
    """
    known = [p for p in points if p.disparity == p.disparity]
    if target is None:
        return min(known, key=lambda p: (p.disparity, p.strength), default=points[-1])
    return next((p for p in known if p.disparity <= target), points[-1])


def worst_gap(
    predictions: Predictions,
    sensitive: str | Sequence[str] | None = None,
    metric: str = "equalized_odds",
    thresholds: float | str | Held = 0.5,
    *,
    min_group_size: int = 30,
) -> float:
    """Return the largest difference over binary tasks between groups with enough people; NaN where there is none.

    ``thresholds`` as in :func:`libmtl_fair.metrics.scores.thresholds_in_use`; ``"base_rate"``: those of these predictions.
    """
    names, found, cut = attributes_of(predictions, sensitive), [], thresholds_in_use(predictions, thresholds)
    given = [predictions.groups[name] for name in names]
    ids, n_groups = F.cross_groups(given, [int(each.max().clamp(min=0)) + 1 for each in given])
    for task in binary_tasks(predictions):
        z, y = _labelled(predictions, task)
        seen = ~np.isnan(y)
        decided = expit(z[seen]) > cut[task]
        counts = group_counts(y[seen], decided, ids.numpy()[seen], n_groups)
        found.append(judge(counts, metric, min_group_size=min_group_size, n_bootstrap=0, n_permutations=0).value)
    return max((v for v in found if v == v), default=float("nan"))


def with_outputs(predictions: Predictions, outputs: Mapping[str, Tensor]) -> Predictions:
    """Return the predictions with other outputs of some tasks, [N] or as they were, and the scores that these give."""
    changed = dict(predictions.outputs)
    for name, values in outputs.items():
        changed[name] = values[:, None] if values.dim() == 1 and changed[name].dim() == 2 else values
    return replace(predictions, outputs=changed).rescored(predictions.tasks)


def binary_tasks(predictions: Predictions) -> list[str]:
    """Return the names of the binary tasks."""
    return [task.name for task in predictions.tasks if task.kind == "binary"]


def _logits(predictions: Predictions, name: str) -> Tensor:
    task = predictions.task(name)
    assert isinstance(task, Binary)
    return task.logit(predictions.outputs[name]).detach()


def _labelled(predictions: Predictions, name: str) -> tuple[Floats, Floats]:
    """Return logits and labels of a task, [N] each; NaN where a label is missing."""
    labels = with_nan(predictions.task(name).flat(predictions.labels[name]))
    return as_floats(_logits(predictions, name)), as_floats(labels)


def _known(predictions: Predictions, names: Sequence[str]) -> Bools:
    return np.asarray(np.logical_and.reduce([as_numpy(predictions.groups[name]) >= 0 for name in names]))
