"""Labels of one task from a table, with missing ones kept as missing, and the checks that the kind fits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.data.expressions import evaluate, expression_columns
from libmtl_fair.data.frames import (
    Series,
    Values,
    as_numbers,
    as_text,
    column_of,
    ids_of,
    is_numeric,
    values_in,
)
from libmtl_fair.data.spec import TaskSpec
from libmtl_fair.errors import DataError, about, unknown
from libmtl_fair.tasks import IGNORE_INDEX, Binary, Multiclass, Multilabel, Regression, Task

_MOST_CLASSES = 200
_MOST_SHOWN = 12


@dataclass(frozen=True)
class RawLabels:
    """Labels of a whole table: float32 [N] (binary) or [N, C] (multilabel), int64 [N] (multiclass), float64 [N] (regression).

    NaN or -100 where missing, regression in native units. ``classes`` names classes or labels.
    """

    name: str
    spec: TaskSpec
    values: Values
    classes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Return the task for a message."""
        return f"task {self.name!r} ({self.spec.kind})"

    @property
    def observed(self) -> NDArray[np.bool_]:
        """Return which rows have a label, bool [N] (multilabel: at least one)."""
        if self.spec.kind == "multiclass":
            return np.asarray(self.values != IGNORE_INDEX)
        seen = ~np.isnan(self.values)
        return np.asarray(seen.any(axis=1) if seen.ndim == 2 else seen)


def task_columns(spec: TaskSpec) -> tuple[str, ...]:
    """Return the columns that a task's labels are made of."""
    if spec.expression is not None:
        return expression_columns(spec.expression)
    return spec.columns or (str(spec.column),)


@about("tasks")
def raw_labels(name: str, spec: TaskSpec, frame: pd.DataFrame) -> RawLabels:
    """Return the labels of one task for every row of ``frame``; columns or labels that do not fit are refused."""
    where = RawLabels(name, spec, np.empty(0)).where
    classes: tuple[str, ...] = spec.columns
    values: Values
    if spec.expression is not None:
        values = evaluate(spec.expression, frame, where)
    elif spec.kind == "multilabel":
        values = np.stack([_zero_one(column_of(frame, column, where), where) for column in spec.columns], axis=1)
    else:
        series = column_of(frame, str(spec.column), where)
        if spec.kind == "multiclass":
            values, classes = _multiclass(spec, series, where)
        else:
            values = (_binary if spec.kind == "binary" else regression_values)(spec, series, where)
    labels = RawLabels(name, spec, values, classes)
    if not labels.observed.any():
        raise DataError(f"{where}: all {len(frame)} labels are missing; check the column and its values")
    return labels


def _binary(spec: TaskSpec, series: Series, where: str) -> NDArray[np.float32]:
    if spec.threshold is not None:
        values = as_numbers(series, where)
        return np.where(np.isnan(values), np.nan, values >= spec.threshold).astype(np.float32)
    if spec.positive is None:
        return _zero_one(series, where)
    text, positive = as_text(series), as_text(pd.Series([spec.positive]))[0]
    if positive not in text:
        held = values_in(text, _MOST_SHOWN)
        if len(held) == 1:
            raise DataError(
                f"{where}: column {spec.column!r} holds {held[0]!r} alone, and never the positive {positive!r}; leave the task out, or "
                "use more rows"
            )
        raise DataError(f"{where}: column {spec.column!r}: {unknown('value', positive, held)}")
    return np.where(series.isna().to_numpy(), np.nan, text == positive).astype(np.float32)


def _zero_one(series: Series, where: str) -> NDArray[np.float32]:
    if not is_numeric(series):
        raise DataError(
            f"{where}: column {series.name!r} must hold 0 and 1, found "
            f"{', '.join(map(repr, values_in(as_text(series), _MOST_SHOWN)))}; say which value is the positive one (positive=...)"
        )
    values = as_numbers(series, where)
    wrong = np.unique(values[~np.isnan(values) & (values != 0) & (values != 1)])
    if len(wrong):
        raise DataError(
            f"{where}: column {series.name!r} must hold 0 and 1, found {wrong[0]:g} and {len(wrong) - 1} other values; "
            "give positive= or threshold=, or another kind of task"
        )
    return values.astype(np.float32)


def _multiclass(spec: TaskSpec, series: Series, where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    if pd.api.types.is_float_dtype(series):
        values = as_numbers(series, where)
        if not np.all(values[~np.isnan(values)] % 1 == 0):
            raise DataError(
                f"{where}: column {series.name!r} holds fractions; expected classes. Use kind 'regression'?"
            )
    text = as_text(series)
    present = values_in(text)
    if isinstance(spec.classes, dict):
        name_of = spec.classes
    else:
        by_number = is_numeric(series) and series.dtype != bool
        name_of = {value: value for value in spec.classes or (sorted(present, key=float) if by_number else present)}
    for value in name_of:
        if value not in present:
            raise DataError(f"{where}: column {series.name!r}: {unknown('class', value, present[:_MOST_SHOWN])}")
    classes = tuple(dict.fromkeys(name_of.values()))
    if not 2 <= len(classes) <= _MOST_CLASSES:
        raise DataError(
            f"{where}: column {series.name!r} has {len(classes)} classes; expected 2 to {_MOST_CLASSES}: "
            "name them with classes=, or use another kind of task"
        )
    ids = ids_of(pd.Series(text, dtype=object).map(name_of).to_numpy(), classes)
    return np.where(ids < 0, IGNORE_INDEX, ids), classes


def regression_values(spec: TaskSpec, series: Series, where: str) -> NDArray[np.float64]:
    """Return a regression's labels in native units, NaN where missing."""
    values = as_numbers(series, where)
    if spec.transform is None:
        return values
    least, transform = (0, np.log) if spec.transform == "log" else (-1, np.log1p)
    bad = np.flatnonzero(values <= least)
    if len(bad):
        raise DataError(
            f"{where}: {len(bad)} values of column {series.name!r} have no {spec.transform} (the first, "
            f"{values[bad[0]]:g}, in row {bad[0]}); drop the rows or the transform"
        )
    return np.asarray(transform(values))


@about("tasks")
def make_task(labels: RawLabels, train: NDArray[np.int64]) -> tuple[Task, Values]:
    """Return the task and its final labels; a regression's scale is that of the rows in ``train``."""
    if not labels.observed[train].any():
        raise DataError(
            f"{labels.where}: no labelled row in the training part ({len(train)} rows); use more rows or another split"
        )
    if labels.spec.kind == "regression":
        return _scaled(labels, train)
    _need_every_class(labels, labels.values[train])
    if labels.spec.kind == "binary":
        return Binary(labels.name), labels.values
    if labels.spec.kind == "multiclass":
        return Multiclass(labels.name, n_classes=len(labels.classes), classes=labels.classes), labels.values
    return Multilabel(labels.name, n_labels=len(labels.classes), labels=labels.classes), labels.values


def _scaled(labels: RawLabels, train: NDArray[np.int64]) -> tuple[Task, NDArray[np.float32]]:
    mean, std = float(np.nanmean(labels.values[train])), float(np.nanstd(labels.values[train]))
    if not std > 0:
        raise DataError(
            f"{labels.where}: the target is {mean:g} in every row of the training part; there is nothing to learn"
        )
    if not labels.spec.standardise:
        mean, std = 0.0, 1.0
    with np.errstate(over="ignore"):
        scaled = ((labels.values - mean) / std).astype(np.float32)
    if np.isinf(scaled).any():
        row = int(np.flatnonzero(np.isinf(scaled))[0])
        raise DataError(f"{labels.where}: the target in row {row} is too far from the training part's; use a transform")
    return Regression(labels.name, mean=mean, std=std), scaled


def _need_every_class(labels: RawLabels, part: Values) -> None:
    if labels.spec.kind == "multiclass":
        absent = [name for index, name in enumerate(labels.classes) if not (part == index).any()]
    else:
        columns = zip(labels.classes or ("",), part.T if part.ndim == 2 else part[None])
        absent = [f"{name} {v}".strip() for name, column in columns for v in (0, 1) if not (column == v).any()]
    if absent:
        raise DataError(
            f"{labels.where}: class {absent[0]!r} is absent from the training part ({len(part)} rows, "
            f"{int(labels.observed.sum())} labelled in the whole table); merge it, leave it out, or use more rows"
        )
