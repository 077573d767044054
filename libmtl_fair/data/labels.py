"""Labels of one task from a table, with missing ones kept as missing, and the checks that the kind fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd

from libmtl_fair.data.expressions import evaluate, expression_columns
from libmtl_fair.data.frames import as_numbers, as_text, column_of, is_numeric
from libmtl_fair.data.spec import TaskSpec
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.tasks import IGNORE_INDEX, Binary, Multiclass, Multilabel, Regression, Task

_MOST_CLASSES = 200


@dataclass(frozen=True)
class RawLabels:
    """Labels of a whole table before it is split.

    ``values``: float32 [N] (binary), int64 [N] (multiclass), float32 [N, C] (multilabel) or float64 [N] in native
    units (regression); NaN or -100 where missing. ``classes`` names classes or labels.
    """

    name: str
    spec: TaskSpec
    values: np.ndarray[Any, Any]
    classes: tuple[str, ...] = ()

    @property
    def observed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which rows have a label, bool [N] (multilabel: at least one)."""
        if self.spec.kind == "multiclass":
            return np.asarray(self.values != IGNORE_INDEX)
        seen = ~np.isnan(self.values)
        return np.asarray(seen.any(axis=1) if seen.ndim == 2 else seen)

    def take(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> RawLabels:
        """Return the labels of some rows."""
        return replace(self, values=self.values[rows])


def task_columns(spec: TaskSpec) -> tuple[str, ...]:
    """Return the columns that a task's labels are made of."""
    if spec.expression is not None:
        return expression_columns(spec.expression)
    return spec.columns or (cast(str, spec.column),)


def raw_labels(name: str, spec: TaskSpec, frame: pd.DataFrame) -> RawLabels:
    """Return the labels of one task for every row of ``frame``.

    Raises
    ------
    DataError : unknown column, no label at all, or labels that do not fit the task's kind.
    """
    where = f"task {name!r} ({spec.kind})"
    classes: tuple[str, ...] = ()
    values: np.ndarray[Any, Any]
    if spec.kind == "binary":
        values = _binary(spec, frame, where)
    elif spec.kind == "multiclass":
        values, classes = _multiclass(spec, column_of(frame, str(spec.column), where), where)
    elif spec.kind == "multilabel":
        values = np.stack([_zero_one(column_of(frame, column, where), where) for column in spec.columns], axis=1)
        classes = spec.columns
    else:
        values = _number(spec, column_of(frame, str(spec.column), where), where)
    labels = RawLabels(name, spec, values, classes)
    if not labels.observed.any():
        raise DataError(f"{where}: all {len(frame)} labels are missing; check the column and its values")
    return labels


def _binary(spec: TaskSpec, frame: pd.DataFrame, where: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    if spec.expression is not None:
        return evaluate(spec.expression, frame, where)
    series = column_of(frame, str(spec.column), where)
    if spec.threshold is not None:
        values = as_numbers(series, where)
        return np.where(np.isnan(values), np.nan, values >= spec.threshold).astype(np.float32)
    if spec.positive is None:
        return _zero_one(series, where)
    text, positive = as_text(series), as_text(pd.Series([spec.positive]))[0]
    present = set(text) - {None}
    if positive not in present:
        raise DataError(f"{where}: column {spec.column!r}: {unknown('value', positive, _some(present))}")
    gap = series.isna().to_numpy()
    return np.where(gap, np.nan, text == positive).astype(np.float32)


def _zero_one(series: pd.Series[Any], where: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    if not is_numeric(series):
        found = _some(set(as_text(series)) - {None})
        raise DataError(
            f"{where}: column {series.name!r} must hold 0 and 1, found {', '.join(map(repr, found))}; "
            "say which value is the positive one (positive=...)"
        )
    values = as_numbers(series, where)
    wrong = np.unique(values[~np.isnan(values) & (values != 0) & (values != 1)])
    if len(wrong):
        raise DataError(
            f"{where}: column {series.name!r} must hold 0 and 1, found {wrong[0]:g} and {len(wrong) - 1} other values; "
            "give positive= or threshold=, or another kind of task"
        )
    return values.astype(np.float32)


def _multiclass(
    spec: TaskSpec, series: pd.Series[Any], where: str
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], tuple[str, ...]]:
    if pd.api.types.is_float_dtype(series):
        values = as_numbers(series, where)
        if not np.all(values[~np.isnan(values)] % 1 == 0):
            raise DataError(
                f"{where}: column {series.name!r} holds fractions; expected classes. Use kind 'regression'?"
            )
    codes, found = pd.factorize(as_text(series))
    present = [str(value) for value in found]
    mapping = _class_of_value(spec, series, present, where)
    classes = tuple(dict.fromkeys(mapping.values()))
    if not 2 <= len(classes) <= _MOST_CLASSES:
        raise DataError(
            f"{where}: column {series.name!r} has {len(classes)} classes; expected 2 to {_MOST_CLASSES}: "
            "name them with classes=, or use another kind of task"
        )
    ids = {name: index for index, name in enumerate(classes)}
    table = [ids[mapping[value]] if value in mapping else IGNORE_INDEX for value in present] + [IGNORE_INDEX]
    return np.asarray(table, dtype=np.int64)[codes], classes


def _class_of_value(spec: TaskSpec, series: pd.Series[Any], present: list[str], where: str) -> dict[str, str]:
    if spec.classes is None:
        order = sorted(present, key=float) if is_numeric(series) and series.dtype != bool else sorted(present)
        return {value: value for value in order}
    named = spec.classes if isinstance(spec.classes, Mapping) else {value: value for value in spec.classes}
    for value in named:
        if value not in present:
            raise DataError(f"{where}: column {series.name!r}: {unknown('class', value, _some(set(present)))}")
    return dict(named)


def _number(spec: TaskSpec, series: pd.Series[Any], where: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    values = as_numbers(series, where)
    if spec.transform is None:
        return values
    bad = values <= (0 if spec.transform == "log" else -1)
    if bad.any():
        raise DataError(
            f"{where}: {int(bad.sum())} values of column {series.name!r} have no {spec.transform} "
            f"(the first, {values[bad][0]:g}, in row {int(np.flatnonzero(bad)[0])}); drop the rows or the transform"
        )
    return cast(
        "np.ndarray[Any, np.dtype[np.float64]]", np.log(values) if spec.transform == "log" else np.log1p(values)
    )


def make_task(labels: RawLabels, train: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Task, np.ndarray[Any, Any]]:
    """Return the task and its final labels; a regression's scale is that of the rows in ``train``.

    Raises
    ------
    DataError : the training part lacks a class, or a target is constant there.
    """
    where = f"task {labels.name!r} ({labels.spec.kind})"
    part = labels.values[train]
    if not labels.observed[train].any():
        raise DataError(
            f"{where}: no labelled row in the training part ({len(train)} rows); use more rows or another split"
        )
    if labels.spec.kind == "regression":
        mean, std = float(np.nanmean(part)), float(np.nanstd(part))
        if not std > 0:
            raise DataError(
                f"{where}: the target is {mean:g} in every row of the training part; there is nothing to learn"
            )
        if not labels.spec.standardise:
            mean, std = 0.0, 1.0
        with np.errstate(over="ignore"):
            scaled = ((labels.values - mean) / std).astype(np.float32)
        if np.isinf(scaled).any():
            row = int(np.flatnonzero(np.isinf(scaled))[0])
            raise DataError(f"{where}: the target in row {row} is too far from the training part's; use a transform")
        return Regression(labels.name, mean=mean, std=std), scaled
    _need_every_class(labels, part, where)
    if labels.spec.kind == "binary":
        return Binary(labels.name), labels.values
    if labels.spec.kind == "multiclass":
        return Multiclass(labels.name, n_classes=len(labels.classes), classes=labels.classes), labels.values
    return Multilabel(labels.name, n_labels=len(labels.classes)), labels.values


def _need_every_class(labels: RawLabels, part: np.ndarray[Any, Any], where: str) -> None:
    if labels.spec.kind == "multiclass":
        counts = np.bincount(part[part >= 0], minlength=len(labels.classes))
        absent = [labels.classes[index] for index in np.flatnonzero(counts == 0)]
    else:
        columns = part if part.ndim == 2 else part[:, None]
        names = labels.classes or ("",)
        absent = [
            f"{name} {v}".strip() for j, name in enumerate(names) for v in (0, 1) if not (columns[:, j] == v).any()
        ]
    if absent:
        raise DataError(
            f"{where}: class {absent[0]!r} is absent from the training part ({len(part)} rows, "
            f"{int(labels.observed.sum())} labelled in the whole table); merge it, leave it out, or use more rows"
        )


def _some(values: set[Any], most: int = 12) -> list[str]:
    return sorted(str(value) for value in values)[:most]
