"""From predictions of a multi-task model to fairlearn: one task, one MetricFrame; thresholds per group, and groups' barycentres."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import pandas as pd

from libmtl_fair.arrays import Array, Bools, Floats, Values, as_floats, as_numpy
from libmtl_fair.errors import DataError, FairMTLError, unknown
from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import Multiclass, Regression, Task

if TYPE_CHECKING:
    from equipy.fairness import FairWasserstein
    from fairlearn.metrics import MetricFrame
    from fairlearn.postprocessing import ThresholdOptimizer
    from sklearn.utils import Tags

Metric = Callable[..., float]
_DROPPED = "libmtl_fair_dropped"
"""Where :func:`metric_frame` and :func:`to_fairlearn` leave the counts of rows left out."""


class FairlearnInputs(NamedTuple):
    """What fairlearn's functions take; the rows left out are counted in ``sensitive_features.attrs``."""

    y_true: Array
    y_pred: Array
    y_score: Array
    sensitive_features: pd.DataFrame


def to_fairlearn(
    predictions: Predictions, task: str, sensitive: str | Sequence[str] | None = None, label: int | None = None
) -> FairlearnInputs:
    """Return (y_true, y_pred, y_score, sensitive_features) of one task, ready for fairlearn and scikit-learn.

    Rows with a missing label or an unknown group are left out (fairlearn takes neither); their counts are in
    ``sensitive_features.attrs["libmtl_fair_dropped"]``. Decisions: probability > 0.5, the likeliest class, or the predicted
    value in native units. ``label`` picks one class or label of a multiclass or multilabel task, one against the rest: fairlearn
    takes one binary target at a time. ``sensitive`` names the attributes, all by default, shown by their groups' names.

    Raises
    ------
    DataError
        Unknown task or attribute, or a multilabel task without ``label``.
    """
    found = predictions.task(task)
    attributes = attributes_of(predictions, sensitive)
    values = as_numpy(found.probabilities(predictions.outputs[task]))
    *columns, seen = _columns(found, values, as_numpy(predictions.labels[task]), label)
    known = np.logical_and.reduce([as_numpy(predictions.groups[a]) >= 0 for a in attributes])
    rows = np.flatnonzero(seen & known)
    features = pd.DataFrame({a: predictions.named_groups(a)[rows] for a in attributes})
    features.attrs[_DROPPED] = {"missing_label": int((~seen).sum()), "unknown_group": int((seen & ~known).sum())}
    y_true, y_pred, y_score = (column[rows] for column in columns)
    return FairlearnInputs(y_true, y_pred, y_score, features)


def metric_frame(
    predictions: Predictions,
    task: str,
    sensitive: str | Sequence[str] | None = None,
    metrics: Mapping[str, Metric] | Metric | None = None,
    label: int | None = None,
) -> MetricFrame:
    """Return fairlearn's ``MetricFrame`` of one task; several ``sensitive`` attributes give their intersections.

    Default metrics: count, selection rate, TPR, FPR and accuracy for a binary task; count, accuracy and balanced accuracy for a
    multiclass task; count, MAE, RMSE, R2 and mean prediction for regression. The frame's attribute ``libmtl_fair_dropped`` counts
    the rows left out. Arguments are those of :func:`to_fairlearn`.

    Raises
    ------
    DataError
        As :func:`to_fairlearn`, or no row is left.
    """
    from fairlearn.metrics import MetricFrame

    data = to_fairlearn(predictions, task, sensitive, label)
    dropped = data.sensitive_features.attrs[_DROPPED]
    if not len(data.y_true):
        raise DataError(f"task {task!r}: no row has both a label and a known group ({dropped})")
    kind = "binary" if label is not None else predictions.task(task).kind
    wanted = metrics if callable(metrics) else dict(metrics or _default_metrics(kind))
    y_true, y_pred, _, features = data
    frame = MetricFrame(metrics=wanted, y_true=y_true, y_pred=y_pred, sensitive_features=features)
    setattr(frame, _DROPPED, dropped)
    return frame


def _default_metrics(kind: str) -> dict[str, Metric]:
    """Return the metrics that make sense for a task kind; they never raise for a small or one-sided group."""
    import fairlearn.metrics as flm
    from sklearn import metrics as skm

    def r2(y_true: Array, y_pred: Array) -> float:
        return float(skm.r2_score(y_true, y_pred)) if len(np.unique(y_true)) > 1 else float("nan")

    def balanced_accuracy(y_true: Array, y_pred: Array) -> float:
        return float(np.mean([np.mean(y_pred[y_true == c] == c) for c in np.unique(y_true)]))

    if kind == "regression":
        errors = {"mae": skm.mean_absolute_error, "rmse": skm.root_mean_squared_error, "r2": r2}
        return {"count": flm.count, **errors, "mean_prediction": flm.mean_prediction}
    if kind == "multiclass":
        return {"count": flm.count, "accuracy": skm.accuracy_score, "balanced_accuracy": balanced_accuracy}
    names = ("selection_rate", "true_positive_rate", "false_positive_rate")
    return {"count": flm.count, **{name: getattr(flm, name) for name in names}, "accuracy": skm.accuracy_score}


def attributes_of(predictions: Predictions, sensitive: str | Sequence[str] | None) -> list[str]:
    """Return the names of the attributes asked for, all where None; DataError for an unknown one, or none at all."""
    names = list(predictions.groups if sensitive is None else [sensitive] if isinstance(sensitive, str) else sensitive)
    for name in names:
        if name not in predictions.groups:
            raise DataError(unknown("sensitive attribute", name, predictions.groups))
    if not names:
        raise DataError("these predictions have no sensitive attribute; run the loader with one")
    return names


def _columns(task: Task, values: Array, labels: Array, label: int | None) -> tuple[Array, Array, Array, Bools]:
    """Return (y_true, y_pred, y_score, observed) of all rows."""
    if label is not None and not (task.kind in ("multiclass", "multilabel") and 0 <= label < values.shape[1]):
        raise DataError(f"task {task.name!r} ({task.kind}) has no label {label!r} to pick out")
    if task.kind == "multilabel":
        if label is None:
            one = f"fairlearn takes one target at a time: pass label=0..{values.shape[1] - 1}"
            raise DataError(f"task {task.name!r} is multilabel, and {one}")
        labels, values = labels[:, label], values[:, label]
    seen = np.asarray(np.isfinite(labels) if labels.dtype.kind == "f" else labels >= 0)
    truth = np.where(seen, labels, 0)
    if isinstance(task, Regression):
        shown, truth = (part.astype(np.float64) * task.std + task.mean for part in (values, truth))
        return truth, shown, shown, seen
    if not isinstance(task, Multiclass):
        return (truth > 0.5).astype(int), (values > 0.5).astype(int), values, seen
    of, chosen = truth.astype(np.int64), values.argmax(1)
    if label is not None:
        return (of == label).astype(int), (chosen == label).astype(int), values[:, label], seen
    classes = np.asarray(task.classes) if task.classes else np.arange(values.shape[1])
    return classes[of], classes[chosen], values, seen


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
