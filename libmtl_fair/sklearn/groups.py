"""``sensitive_features`` in any form that fairlearn takes -> group ids with names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from libmtl_fair.data.frames import ids_of
from libmtl_fair.errors import DataError


@dataclass(frozen=True)
class Groups:
    """Group ids int64 [N] of each attribute, -1 where missing, and the groups' names, index = id."""

    ids: dict[str, Tensor]
    names: dict[str, list[str]]

    def take(self, rows: Tensor) -> Groups:
        """Return the groups of some rows."""
        return Groups({name: ids[rows] for name, ids in self.ids.items()}, self.names)


def read_groups(values: object, n_rows: int, known: Mapping[str, list[str]] | None = None) -> Groups:
    """Read a Series, DataFrame, dict, list or array of sensitive features; None gives no groups.

    A column without a name becomes ``sensitive_feature`` (several: ``sensitive_feature_0``, ...), as in fairlearn. Missing
    values are unknown groups. ``known`` gives the ids of names seen in training; other names are unknown then.

    Raises
    ------
    DataError : another number of rows than X, or fewer than two groups.
    """
    made = Groups({}, {})
    if values is None:
        return made
    frame = _frame(values)
    if len(frame) != n_rows:
        raise DataError(f"sensitive_features has {len(frame)} rows, X has {n_rows}; give one row for each of X")
    for column in frame:
        text, name = frame[column].astype(object).map(str, na_action="ignore"), str(column)
        names = (known or {}).get(name) or sorted(set(text.dropna()))
        if len(names) < 2:
            raise DataError(
                f"sensitive feature {name!r} has one group ({', '.join(names) or 'none known'}); comparing needs two"
            )
        made.ids[name] = torch.from_numpy(ids_of(text.to_numpy(dtype=object), names))
        made.names[name] = list(names)
    return made


def _frame(values: object) -> pd.DataFrame:
    if isinstance(values, pd.DataFrame):
        return values
    if isinstance(values, pd.Series):
        return values.to_frame(values.name if values.name is not None else "sensitive_feature")
    if isinstance(values, dict):
        return pd.DataFrame({name: np.asarray(column) for name, column in values.items()})
    array = np.asarray(values, dtype=object)
    if array.ndim not in (1, 2):
        raise DataError(f"sensitive_features must be one column or a table, found {array.ndim} dimensions")
    table = array.reshape(len(array), -1)
    one = ["sensitive_feature"] if table.shape[1] == 1 else None
    return pd.DataFrame(table, columns=one or [f"sensitive_feature_{i}" for i in range(table.shape[1])])
