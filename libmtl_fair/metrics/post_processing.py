"""fairlearn's threshold optimiser on one task's scores: thresholds per group, chosen on validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from libmtl_fair.errors import DataError
from libmtl_fair.metrics.arrays import as_floats, as_numpy
from libmtl_fair.metrics.fairlearn_bridge import FairlearnInputs, to_fairlearn

if TYPE_CHECKING:
    from libmtl_fair.predictions import Predictions

_SEPARATOR = " & "


class ScorePassThrough(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted classifier whose input is its answer: ``X`` [n, 1] holds the probability of the positive class."""

    def __init__(self) -> None:
        """Nothing to set."""
        self.classes_ = np.array([0, 1])

    def fit(self, X: Any, y: Any = None) -> ScorePassThrough:
        """Do nothing."""
        return self

    def __sklearn_is_fitted__(self) -> bool:
        """Say that there is nothing to fit."""
        return True

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Return [n, 2] probabilities."""
        positive = np.asarray(X, dtype=np.float64).reshape(-1)
        return np.stack([1 - positive, positive], axis=1)

    def predict(self, X: Any) -> NDArray[Any]:
        """Return probability > 0.5."""
        return (self.predict_proba(X)[:, 1] > 0.5).astype(int)


class PostProcessed:
    """Decisions of one task by group-wise thresholds; made by :func:`post_process`.

    Attributes
    ----------
    optimizer : the fitted ``fairlearn.postprocessing.ThresholdOptimizer``.
    task, sensitive : what it decides, and by which attributes.
    groups : names of the groups that it has thresholds for.
    trainer : whose model it predicts with; None for thresholds of given predictions.
    """

    def __init__(
        self, optimizer: Any, task: str, sensitive: Sequence[str], groups: Sequence[str], trainer: Any = None
    ) -> None:
        """Keep the fitted optimiser."""
        self.optimizer, self.task, self.trainer = optimizer, task, trainer
        self.sensitive, self.groups = tuple(sensitive), tuple(groups)

    def predict(self, predictions: Any, sensitive: Any = None, random_state: int | None = None) -> NDArray[Any]:
        """Return decisions 0/1, [N].

        ``predictions`` is a loader, which goes through the trainer, a ``Predictions`` object, or scores [N] with
        ``sensitive``: group names [N], or a DataFrame with one column per attribute. A row of a group that validation did not
        have (or of none) is decided at 0.5. Thresholds may be random mixtures: ``random_state`` repeats them.

        Raises
        ------
        DataError : a loader without a trainer, scores without groups, or of another length.
        """
        predictions = self._read(predictions)
        if hasattr(predictions, "outputs"):
            task = predictions.task(self.task)
            scores = as_floats(task.probabilities(predictions.outputs[self.task]))
            shown = _group_names(predictions, self.sensitive)
        else:
            scores, shown = as_floats(predictions), _joined(sensitive)
        if len(shown) != len(scores):
            raise DataError(f"task {self.task!r}: {len(scores)} scores for {len(shown)} sensitive values")
        decided = (scores > 0.5).astype(int)
        rows = np.flatnonzero(np.isin(shown, self.groups))
        if len(rows):
            decided[rows] = self.optimizer.predict(
                scores[rows, None], sensitive_features=shown[rows], random_state=random_state
            )
        return decided

    def _read(self, found: Any) -> Any:
        if hasattr(found, "outputs") or hasattr(found, "__array__") or isinstance(found, list | tuple):
            return found
        if self.trainer is None:
            raise DataError(
                f"post_process of task {self.task!r} was made from predictions, so it cannot read a {type(found).__name__}; "
                "give predictions or scores, or make it from the trainer: post_process(trainer, task, constraint)"
            )
        return self.trainer.predict(found)


def post_process(
    source: Predictions | Any,
    task: str,
    constraint: str = "equalized_odds",
    *,
    sensitive: str | Sequence[str] | None = None,
    objective: str = "accuracy_score",
    data: Any = None,
    **options: Any,
) -> PostProcessed:
    """Choose thresholds per group on validation data for a binary task, by fairlearn's ``ThresholdOptimizer``.

    ``source`` is a trainer, and the result keeps predicting through it; its validation loader is what it was trained with,
    or ``data``. Or it is (validation) ``Predictions``.
    ``constraint`` and ``objective`` are fairlearn's; several ``sensitive`` attributes mean their intersection; ``options`` go to
    the optimiser (``grid_size``, ``flip``).

    Raises
    ------
    DataError : the task is not binary, a trainer without validation data, or a group lacks positives or negatives, for which
        no threshold can be chosen.
    """
    from fairlearn.postprocessing import ThresholdOptimizer

    trainer: Any = None if hasattr(source, "outputs") else source
    predictions: Any = source if trainer is None else trainer.predict(_validation(trainer, task, data))
    if predictions.task(task).kind != "binary":
        raise DataError(f"post_process needs a binary task, and {task!r} is {predictions.task(task).kind}")
    found = to_fairlearn(predictions, task, sensitive)
    shown = _joined(found.sensitive_features)
    groups = sorted(set(shown))
    _need_both_classes(task, found, shown, groups)
    optimizer = ThresholdOptimizer(
        estimator=ScorePassThrough(),
        constraints=constraint,
        objective=objective,
        prefit=True,
        predict_method="predict_proba",
        **options,
    )
    optimizer.fit(found.y_score[:, None], found.y_true, sensitive_features=shown)
    return PostProcessed(optimizer, task, list(found.sensitive_features.columns), groups, trainer)


def _validation(trainer: Any, task: str, data: Any) -> Any:
    loader = getattr(trainer, "validation", None) if data is None else data
    if loader is None:
        raise DataError(
            f"post_process of task {task!r}: the trainer was trained without validation data; give data=, a loader that "
            "neither training nor the test has seen"
        )
    return loader


def _need_both_classes(task: str, data: FairlearnInputs, shown: NDArray[Any], groups: Sequence[str]) -> None:
    if not groups:
        raise DataError(f"post_process of task {task!r}: no row has both a label and a known group")
    for group in groups:
        found = np.unique(data.y_true[shown == group])
        if len(found) < 2:
            raise DataError(
                f"post_process of task {task!r}: group {group!r} has only labels {found.tolist()}; thresholds need "
                "positives and negatives in every group: merge small groups or take another attribute"
            )


def _joined(sensitive: Any) -> NDArray[Any]:
    if sensitive is None:
        raise DataError("predict from scores needs sensitive=: the groups' names, or a DataFrame of them")
    if isinstance(sensitive, pd.DataFrame):
        columns = [sensitive[c].astype(str).to_numpy(dtype=object) for c in sensitive]
        return np.asarray([_SEPARATOR.join(row) for row in zip(*columns)], dtype=object)
    return np.asarray([str(v) for v in as_numpy(sensitive)], dtype=object)


def _group_names(predictions: Any, attributes: Sequence[str]) -> NDArray[Any]:
    parts = []
    for attribute in attributes:
        ids = as_numpy(predictions.groups[attribute])
        names = predictions.group_names.get(attribute) or [str(i) for i in range(int(ids.max(initial=-1)) + 1)]
        parts.append(np.asarray([*names, ""], dtype=object)[ids])  # id -1 takes the last, which is no group's name
    return np.asarray([_SEPARATOR.join(row) for row in zip(*parts)], dtype=object)
