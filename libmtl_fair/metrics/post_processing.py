"""Fairness after training, learnt on validation predictions: thresholds per group, and scores at the groups' barycentre."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd

from libmtl_fair.errors import DataError, FairMTLError
from libmtl_fair.metrics.arrays import Array, Floats, Values, as_floats, as_numpy
from libmtl_fair.metrics.fairlearn_bridge import attributes_of, to_fairlearn
from libmtl_fair.predictions import Predictions

if TYPE_CHECKING:
    from equipy.fairness import FairWasserstein
    from fairlearn.postprocessing import ThresholdOptimizer
    from sklearn.utils import Tags

_SEPARATOR = " & "


class Predictor(Protocol):
    """A trainer: what it was validated on, and predictions of any loader."""

    validation: object

    def predict(self, loader: object, /) -> Predictions:
        """Return the predictions of a loader's examples."""


class ScorePassThrough:
    """A fitted scikit-learn estimator whose input is its answer: ``X`` [n, 1] holds the probability of the positive class."""

    def __sklearn_tags__(self) -> Tags:
        from sklearn.utils import Tags, TargetTags

        return Tags(estimator_type=None, target_tags=TargetTags(required=False), requires_fit=False)

    def fit(self, X: Array, y: Array | None = None) -> ScorePassThrough:
        """Do nothing."""
        return self

    def predict(self, X: Array) -> Floats:
        """Return the probabilities, [n]."""
        return as_floats(X).reshape(-1)


@dataclass(frozen=True)
class PostProcessed:
    """Decisions of one task by group-wise thresholds; made by :func:`post_process`.

    ``optimizer`` is the fitted ``fairlearn.postprocessing.ThresholdOptimizer``, ``groups`` the names of those that it has thresholds
    for; ``trainer``: whose model it predicts with, None for thresholds of given predictions.
    """

    optimizer: ThresholdOptimizer
    task: str
    sensitive: tuple[str, ...]
    groups: tuple[str, ...]
    trainer: Predictor | None = None

    def predict(
        self,
        predictions: Predictions | Values,
        sensitive: Values | pd.DataFrame | None = None,
        random_state: int | None = None,
    ) -> Array:
        """Return decisions 0/1, [N].

        ``predictions`` is a loader, which goes through the trainer, a ``Predictions`` object, or scores [N] with
        ``sensitive``: group names [N], or a DataFrame with one column per attribute. A row of a group that validation did not
        have (or of none) is decided at 0.5. Thresholds may be random mixtures: ``random_state`` repeats them.

        Raises
        ------
        DataError
            A loader without a trainer, scores without groups, or of another length.
        """
        if not (isinstance(predictions, Predictions | list | tuple) or hasattr(predictions, "__array__")):
            if self.trainer is None:
                raise DataError(
                    f"post_process of task {self.task!r} was made from predictions, so it cannot read a {type(predictions).__name__}; "
                    "give predictions or scores, or make it from the trainer: post_process(trainer, task, constraint)"
                )
            predictions = self.trainer.predict(predictions)
        if isinstance(predictions, Predictions):
            scores, shown = _scores(predictions, self.task), group_labels(predictions, self.sensitive)
        elif sensitive is None:
            raise DataError("predict from scores needs sensitive=: the groups' names, or a DataFrame of them")
        else:
            scores, shown = as_floats(predictions), _joined(sensitive)
        if len(shown) != len(scores):
            raise DataError(f"task {self.task!r}: {len(scores)} scores for {len(shown)} sensitive values")
        decided = (scores > 0.5).astype(int)
        rows = np.flatnonzero(np.isin(shown, self.groups))
        if len(rows):
            known = {"sensitive_features": shown[rows], "random_state": random_state}
            decided[rows] = self.optimizer.predict(scores[rows, None], **known)
        return decided


def post_process(
    source: Predictions | Predictor,
    task: str,
    constraint: str = "equalized_odds",
    *,
    sensitive: str | Sequence[str] | None = None,
    objective: str = "accuracy_score",
    data: object = None,
    **options: object,
) -> PostProcessed:
    """Choose thresholds per group on validation data for a binary task, by fairlearn's ``ThresholdOptimizer``.

    ``source`` is a trainer, and the result keeps predicting through it; its validation loader is what it was trained with,
    or ``data``. Or it is (validation) ``Predictions``.
    ``constraint`` and ``objective`` are fairlearn's; several ``sensitive`` attributes mean their intersection; ``options`` go to
    the optimiser (``grid_size``, ``flip``).

    Raises
    ------
    DataError
        The task is not binary, a trainer without validation data, or a group lacks positives or negatives, for which no
        threshold can be chosen.
    """
    from fairlearn.postprocessing import ThresholdOptimizer

    trainer = None if isinstance(source, Predictions) else source
    if trainer is not None:
        data = trainer.validation if data is None else data
        if data is None:
            raise DataError(
                f"post_process of task {task!r}: the trainer was trained without validation data; give data=, a loader "
                "that neither training nor the test has seen"
            )
        source = trainer.predict(data)
    assert isinstance(source, Predictions)
    if source.task(task).kind != "binary":
        raise DataError(f"post_process needs a binary task, and {task!r} is {source.task(task).kind}")
    found = to_fairlearn(source, task, sensitive)
    shown = _joined(found.sensitive_features)
    groups = sorted(set(shown))
    if not groups:
        raise DataError(f"post_process of task {task!r}: no row has both a label and a known group")
    for group in groups:
        if len(seen := np.unique(found.y_true[shown == group])) < 2:
            raise DataError(
                f"post_process of task {task!r}: group {group!r} has only labels {seen.tolist()}; thresholds need "
                "positives and negatives in every group: merge small groups or take another attribute"
            )
    how = {"prefit": True, "predict_method": "predict", **options}
    optimizer = ThresholdOptimizer(estimator=ScorePassThrough(), constraints=constraint, objective=objective, **how)
    optimizer.fit(found.y_score[:, None], found.y_true, sensitive_features=shown)
    return PostProcessed(optimizer, task, tuple(map(str, found.sensitive_features)), tuple(groups), trainer)


@dataclass(frozen=True)
class Barycentre:
    """Scores of one task that are distributed alike in every group (``groups``: those known); made by :func:`barycentre`."""

    transport: FairWasserstein
    task: str
    sensitive: tuple[str, ...]
    groups: tuple[str, ...]

    def scores(self, predictions: Predictions, epsilon: float = 0.0) -> Floats:
        """Return the task's probabilities (values, for regression), moved: [N].

        ``epsilon`` in [0, 1] is the share of the original that is kept: 0 is parity, 1 changes nothing. A row of a group
        that validation did not have, or of none, keeps its own.
        """
        if not 0 <= epsilon <= 1:
            raise DataError(f"epsilon must be in [0, 1], found {epsilon!r}")
        moved, shown = _scores(predictions, self.task), group_labels(predictions, self.sensitive)
        rows = np.flatnonzero(np.isin(shown, self.groups))
        if len(rows):
            moved[rows] = self.transport.transform(moved[rows], shown[rows].astype(str), epsilon=epsilon)
        return moved


def barycentre(
    predictions: Predictions, task: str, *, sensitive: str | Sequence[str] | None = None, sigma: float = 1e-4
) -> Barycentre:
    """Learn from (validation) predictions of a binary or regression task how to bring the groups' scores together.

    Needs the optional package ``equipy`` (``pip install libmtl_fair[equipy]``). Several ``sensitive`` attributes mean their
    intersection. ``sigma`` is the width of the noise that breaks ties between equal scores. Source: Chzhen et al.,
    NeurIPS 2020.

    Raises
    ------
    FairMTLError
        Equipy is not installed.
    DataError
        Another kind of task, or fewer than two groups.
    """
    try:
        from equipy.fairness import FairWasserstein
    except ImportError as error:
        needed = "barycentre needs equipy, which is not installed: pip install libmtl_fair[equipy]"
        raise FairMTLError(needed) from error
    if (kind := predictions.task(task).kind) not in ("binary", "regression"):
        raise DataError(
            f"barycentre moves one score an example, and task {task!r} is {kind}; take a binary task or a regression"
        )
    names = tuple(attributes_of(predictions, sensitive))
    shown = group_labels(predictions, names)
    known = np.logical_and.reduce([as_numpy(predictions.groups[name]) >= 0 for name in names])
    groups = sorted(set(shown[known]))
    if len(groups) < 2:
        of = ", ".join(names)
        raise DataError(f"barycentre of task {task!r}: expected at least two groups of {of}, found {groups}")
    transport = FairWasserstein(sigma=sigma)
    transport.fit(_scores(predictions, task)[known], shown[known].astype(str))
    return Barycentre(transport, task, names, tuple(groups))


def _scores(predictions: Predictions, task: str) -> Floats:
    """Return the task's probabilities (values, for regression), [N], to be changed."""
    return as_floats(predictions.task(task).probabilities(predictions.outputs[task])).reshape(-1).copy()


def group_labels(predictions: Predictions, attributes: Sequence[str]) -> Array:
    """Return the names of each row's groups as one, [N]; that of an unknown group is empty."""
    return _joined(pd.DataFrame({a: predictions.named_groups(a) for a in attributes}))


def _joined(sensitive: Values | pd.DataFrame) -> Array:
    if isinstance(sensitive, pd.DataFrame):
        columns = [sensitive[c].astype(str).to_numpy(dtype=object) for c in sensitive]
        return np.asarray([_SEPARATOR.join(row) for row in zip(*columns)], dtype=object)
    return np.asarray([str(v) for v in as_numpy(sensitive)], dtype=object)
