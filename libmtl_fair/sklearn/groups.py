"""``sensitive_features`` in any form that fairlearn takes -> group ids with names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from libmtl_fair.errors import DataError


@dataclass(frozen=True)
class Groups:
    """Group ids int64 [N] of each attribute, -1 where missing, and the groups' names, index = id."""

    ids: dict[str, Tensor]
    names: dict[str, list[str]]

    def take(self, rows: Any) -> Groups:
        """Return the groups of some rows."""
        return Groups({name: ids[rows] for name, ids in self.ids.items()}, self.names)


def read_groups(values: Any, n_rows: int, known: dict[str, list[str]] | None = None) -> Groups:
    """Read a Series, DataFrame, dict, list or array of sensitive features; None gives no groups.

    A column without a name becomes ``sensitive_feature`` (several: ``sensitive_feature_0``, ...), as in fairlearn. Missing
    values are unknown groups. ``known`` gives the ids of names seen in training; other names are unknown then.

    Raises
    ------
    DataError : another number of rows than X, or fewer than two groups.
    """
    if values is None:
        return Groups({}, {})
    frame = _frame(values)
    if len(frame) != n_rows:
        raise DataError(f"sensitive_features has {len(frame)} rows, X has {n_rows}; give one row for each of X")
    ids, names = {}, {}
    for column in frame:
        series, name = frame[column], str(column)
        text = np.array([None if gone else str(v) for v, gone in zip(series, series.isna())], dtype=object)
        found = sorted({value for value in text if value is not None})
        order = (known or {}).get(name, found)
        if len(order) < 2:
            raise DataError(
                f"sensitive feature {name!r} has one group ({', '.join(order) or 'none known'}); comparing needs two"
            )
        index = {group: i for i, group in enumerate(order)}
        ids[name] = torch.tensor([-1 if v is None else index.get(v, -1) for v in text], dtype=torch.int64)
        names[name] = list(order)
    return Groups(ids, names)


def _frame(values: Any) -> pd.DataFrame:
    if isinstance(values, pd.DataFrame):
        return values
    if isinstance(values, pd.Series):
        return values.to_frame(values.name if values.name is not None else "sensitive_feature")
    if isinstance(values, dict):
        return pd.DataFrame({name: np.asarray(column) for name, column in values.items()})
    array = np.asarray(values, dtype=object)
    if array.ndim not in (1, 2):
        raise DataError(f"sensitive_features must be one column or a table, found {array.ndim} dimensions")
    if array.ndim == 1 or array.shape[1] == 1:
        return pd.DataFrame({"sensitive_feature": array.reshape(len(array))})
    return pd.DataFrame(array, columns=[f"sensitive_feature_{i}" for i in range(array.shape[1])])
