"""Y -> tasks with masked labels, and outputs -> labels and numbers in the user's own units."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from libmtl_fair.data.frames import Series, Values, ids_of
from libmtl_fair.data.tables import settled
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.tasks import AUXILIARY_PREFIX, IGNORE_INDEX, Binary, Multiclass, Regression, Task

KINDS = ("binary", "multiclass", "regression")
_MOST_CLASSES = 20
Declared = Mapping[Hashable, str]


@dataclass(frozen=True)
class Target:
    """One column of Y; ``name`` is the task's inside the model, ``classes`` are sorted, ``mean`` and ``std`` of training."""

    column: Hashable
    name: str
    kind: str
    classes: Values | None = None
    mean: float = 0.0
    std: float = 1.0

    @property
    def task(self) -> Task:
        """The task that the model learns."""
        if self.kind == "regression":
            return Regression(self.name, mean=self.mean, std=self.std)
        if self.kind == "binary":
            return Binary(self.name)
        return Multiclass(self.name, len(self._values), classes=tuple(str(value) for value in self._values))

    @property
    def _values(self) -> Values:
        assert self.classes is not None
        return self.classes

    def encode(self, series: Series) -> Tensor:
        """Return the labels [N] as the task takes them; a class that training lacked is refused."""
        if self.kind == "regression":
            return torch.from_numpy(((_floats(series) - self.mean) / self.std).astype(np.float32))
        known = self._values.tolist()
        ids = ids_of(series.to_numpy(dtype=object), known)
        strange = np.flatnonzero((ids < 0) & series.notna().to_numpy())
        if len(strange):
            value = series.iloc[strange[0]]
            raise DataError(f"target {self.column!r} holds {value!r}, which is no class that fit saw: {known}")
        if self.kind == "binary":
            return torch.from_numpy(np.where(ids < 0, np.nan, ids).astype(np.float32))
        return torch.from_numpy(np.where(ids < 0, IGNORE_INDEX, ids))

    def probabilities(self, output: Tensor) -> NDArray[np.float64]:
        """Return [N, C] probabilities of a classification target."""
        values = self.task.probabilities(output).double().numpy()
        if self.kind == "multiclass":
            return np.asarray(values / values.sum(1, keepdims=True))
        return np.ones((len(values), 1)) if len(self._values) == 1 else np.column_stack([1 - values, values])

    def predict(self, output: Tensor) -> Values:
        """Return classes, or numbers in native units, [N]."""
        if self.kind == "regression":
            return np.asarray(self.task.probabilities(output).double().numpy() * self.std + self.mean)
        return np.asarray(self._values[self.probabilities(output).argmax(1)])


def read_table(y: object) -> pd.DataFrame:
    """Return Y as a DataFrame; one column is one task."""
    y = settled(y)
    if isinstance(y, pd.DataFrame):
        frame = y
    elif isinstance(y, pd.Series):
        frame = y.to_frame(y.name if y.name is not None else 0)
    else:
        array = np.asarray(y)
        if array.ndim not in (1, 2):
            raise DataError(f"Y must be one column or a table of targets, found shape {array.shape}")
        frame = pd.DataFrame(array).infer_objects()
    if not frame.shape[1] or not frame.columns.is_unique:
        raise DataError("Y needs at least one column, and columns of different names")
    return frame


def make_targets(frame: pd.DataFrame, declared: Declared | None) -> list[Target]:
    """Return one target a column, of the declared kind or the one that its values suggest."""
    declared = dict(declared or {})
    for column, kind in declared.items():
        if column not in frame:
            raise DataError(f"tasks: {unknown('column of Y', column, map(str, frame.columns))}")
        if kind not in KINDS:
            raise DataError(f"tasks: {unknown('kind', kind, KINDS)}")
    return [_target(frame[column], column, _safe(column, i), declared.get(column)) for i, column in enumerate(frame)]


def _target(series: Series, column: Hashable, name: str, kind: str | None) -> Target:
    seen = series[series.notna()]
    if not len(seen):
        raise DataError(f"target {column!r} has no label in {len(series)} rows; leave the column out")
    if pd.api.types.is_numeric_dtype(seen) and not np.isfinite(_floats(seen)).all():
        raise DataError(
            f"Input Y contains infinity or a value too large for dtype('float64'), in target {column!r}; missing labels "
            "are NaN"
        )
    kind = kind or _kind(series, seen, column)
    if kind == "regression":
        values = _floats(seen)
        return Target(column, name, kind, None, float(values.mean()), float(values.std()) or 1.0)
    classes = _classes(seen, column)
    if kind == "binary" and len(classes) > 2:
        raise DataError(f"target {column!r} is declared binary and has {len(classes)} classes: {classes[:5].tolist()}")
    return Target(column, name, "multiclass" if kind == "multiclass" and len(classes) > 1 else "binary", classes)


def _kind(series: Series, seen: Series, column: Hashable) -> str:
    """Text, categories, booleans and up to 20 integers are classes, two values are binary, other numbers regression."""
    distinct = seen.nunique()
    if not pd.api.types.is_numeric_dtype(seen) or pd.api.types.is_bool_dtype(seen):
        return "binary" if distinct <= 2 else "multiclass"
    values = _floats(seen)
    whole = bool((values == np.round(values)).all())
    if distinct <= 2 and whole:
        return "binary"
    if not pd.api.types.is_float_dtype(series):
        return "multiclass" if distinct <= _MOST_CLASSES else "regression"
    if whole and distinct <= _MOST_CLASSES and len(seen) < len(series):
        raise DataError(
            f"target {column!r} holds {distinct} whole numbers and gaps: classes or quantities? Say which: "
            f"tasks={{{column!r}: 'multiclass'}} or 'regression'"
        )
    return "regression"


def _classes(seen: Series, column: Hashable) -> Values:
    values = sorted({v.item() if isinstance(v, np.generic) else v for v in seen}, key=lambda v: (isinstance(v, str), v))
    kinds = {type(v) for v in values}
    if kinds <= {str}:
        return np.array(values, dtype=object)
    if str in kinds:
        raise DataError(f"target {column!r} mixes text and numbers; make its classes one or the other")
    array = np.array(values)
    dtype = getattr(seen.dtype, "numpy_dtype", seen.dtype)
    return array.astype(dtype) if isinstance(dtype, np.dtype) and dtype.kind in "iufb" else array


def _floats(series: Series) -> NDArray[np.float64]:
    try:
        return np.asarray(pd.to_numeric(series).to_numpy(dtype=np.float64, na_value=np.nan))
    except (TypeError, ValueError) as error:
        raise DataError(f"target {series.name!r} is declared regression and holds no numbers ({error})") from error


def _safe(column: Hashable, position: int) -> str:
    """Return a name that a torch module may have: the column's own where that is possible."""
    name = str(column)
    fine = isinstance(column, str) and name and "." not in name and not name.startswith(AUXILIARY_PREFIX)
    return name if fine and not hasattr(nn.ModuleDict, name) and name != "sensitive" else f"task_{position}"
