"""From predictions of a multi-task model to fairlearn: one task, one MetricFrame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from libmtl_fair.errors import DataError, unknown
from libmtl_fair.metrics.arrays import Array, Bools, as_numpy
from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import Multiclass, Regression, Task

if TYPE_CHECKING:
    from fairlearn.metrics import MetricFrame

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
