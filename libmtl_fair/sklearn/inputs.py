"""X, the rows' weights and ``sensitive_features``, in any form that scikit-learn and fairlearn take, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_array, validate_data
from torch import Tensor

from libmtl_fair.data.features import FeatureEncoder, FeatureKind, feature_kinds, fit_encoder
from libmtl_fair.data.frames import as_numbers, as_text, ids_of, is_date, values_in
from libmtl_fair.data.sensitive import need_groups
from libmtl_fair.data.tables import settled, to_pandas
from libmtl_fair.errors import DataError

Rows = NDArray[np.float64] | pd.DataFrame
"""X: an array, or a DataFrame where it has text columns."""


def check_inputs(estimator: BaseEstimator, x: object, *, reset: bool) -> Rows:
    """Return X as scikit-learn checks it: a float64 array (dense, of a sparse X too), or a DataFrame where it has text columns."""
    x = settled(x)
    if isinstance(x, pd.DataFrame):
        dates = [place for place in range(x.shape[1]) if is_date(x.iloc[:, place])]
        if dates:
            columns = [x.iloc[:, place] for place in range(x.shape[1])]
            for place in dates:
                columns[place] = pd.Series(as_numbers(columns[place], "X"), index=x.index, name=x.columns[place])
            x = pd.concat(columns, axis=1)
    texts = not reset and bool(estimator.encoder_.categories)
    if texts and not isinstance(x, pd.DataFrame):
        raise DataError("fitted on a DataFrame with text columns: give a DataFrame with the same columns")
    if isinstance(x, pd.DataFrame) and (texts or (reset and "categorical" in _table(x)[1].values())):
        frame: pd.DataFrame = validate_data(estimator, x, reset=reset, skip_check_array=True)
        if not len(frame):
            raise DataError("X has no rows")
        numbers = frame.select_dtypes("number", exclude="timedelta")
        if np.isinf(numbers.to_numpy(dtype=np.float64, na_value=np.nan)).any():
            raise DataError("X contains infinity; correct these values or leave the rows out")
        return frame
    checks = {"dtype": np.float64, "ensure_all_finite": "allow-nan", "accept_sparse": "csr", "estimator": estimator}
    found = validate_data(estimator, x, reset=reset, **checks)
    array: NDArray[np.float64] = found.toarray() if issparse(found) else found  # what a network multiplies is dense
    return array


def fit_inputs(x: Rows) -> tuple[FeatureEncoder, NDArray[np.float32]]:
    """Return the encoder fitted on the rows of X, and X encoded, float32 [N, F]."""
    frame, kinds = _table(x)
    return fit_encoder(frame, np.arange(len(frame)), kinds)


def encode_inputs(encoder: FeatureEncoder, x: Rows) -> NDArray[np.float32]:
    """Return X encoded, float32 [N, F]; columns are told by their places."""
    frame = pd.DataFrame(x).set_axis(list(encoder.kinds), axis=1)
    numeric = [name for name, kind in encoder.kinds.items() if kind == "numeric"]
    return encoder.encode(frame.assign(**frame[numeric].infer_objects()))


def _table(x: Rows) -> tuple[pd.DataFrame, dict[str, FeatureKind]]:
    frame = pd.DataFrame(x)
    names = [str(name) for name in frame.columns]
    frame = frame.set_axis(names if len(set(names)) == len(names) else range(len(names)), axis=1).rename(columns=str)
    return frame, feature_kinds(frame, list(frame.columns))


def check_weights(sample_weight: object, x: Rows) -> NDArray[np.float64] | None:
    """Return the rows' weights, float64 [N], at least 0 and not all 0, or None for none given."""
    if sample_weight is None:
        return None
    given = np.full(len(x), sample_weight) if isinstance(sample_weight, Real) else sample_weight
    weights: NDArray[np.float64] = check_array(
        given, ensure_2d=False, dtype=np.float64, copy=True, ensure_non_negative=True, input_name="sample_weight"
    )
    if weights.shape != (len(x),):
        raise ValueError(f"sample_weight.shape == {weights.shape}, expected {(len(x),)}")
    if not weights.any():
        raise ValueError("Sample weights must contain at least one non-zero number.")
    return weights


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
    """
    made = Groups({}, {})
    if values is None:
        return made
    frame = _frame(values)
    if len(frame) != n_rows:
        raise DataError(f"sensitive_features has {len(frame)} rows, X has {n_rows}; give one row for each of X")
    for column in frame:
        name, series = str(column), settled(frame[column])
        if known is None:
            need_groups(series.rename(name), "sensitive_features")
        text = as_text(series)
        names = (known or {}).get(name) or values_in(text)
        if len(names) < 2:
            raise DataError(
                f"sensitive feature {name!r} has one group ({', '.join(names) or 'none known'}); comparing needs two"
            )
        made.ids[name] = torch.from_numpy(ids_of(text, names))
        made.names[name] = list(names)
    return made


def _frame(values: object) -> pd.DataFrame:
    values = to_pandas(values)
    if isinstance(values, pd.DataFrame):
        return values
    if isinstance(values, pd.Series):
        return values.to_frame(values.name if values.name is not None else "sensitive_feature")
    if isinstance(values, dict):
        return pd.DataFrame({name: np.asarray(to_pandas(column)) for name, column in values.items()})
    array = np.asarray(values, dtype=object)
    if array.ndim not in (1, 2):
        raise DataError(f"sensitive_features must be one column or a table, found {array.ndim} dimensions")
    table = array.reshape(len(array), -1)
    one = ["sensitive_feature"] if table.shape[1] == 1 else None
    return pd.DataFrame(table, columns=one or [f"sensitive_feature_{i}" for i in range(table.shape[1])])
