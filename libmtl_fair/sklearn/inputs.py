"""X -> one float32 matrix. What was learnt from the training rows is plain data, so that it can be stored as such."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils.validation import _check_sample_weight, validate_data

from libmtl_fair.errors import DataError

MISSING_CATEGORY = "(missing)"


@dataclass(frozen=True)
class TableEncoder:
    """Numbers: median where missing, then standardised, and a 0/1 column where training had gaps. Text: one-hot.

    Attributes
    ----------
    numeric, categorical : positions of the columns of X.
    fill, centre, scale : of the numeric columns.
    gaps : which numeric columns (positions in ``numeric``) had missing values in training.
    categories : values of each categorical column; others, and missing ones that training lacks, are all zeros.
    """

    numeric: tuple[int, ...]
    categorical: tuple[int, ...]
    fill: tuple[float, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    gaps: tuple[int, ...]
    categories: tuple[tuple[str, ...], ...]

    @classmethod
    def fit(cls, x: NDArray[np.float64] | pd.DataFrame) -> TableEncoder:
        """Learn from training rows.

        Raises
        ------
        DataError : a numeric column without any value.
        """
        numeric, categorical = _kinds(x)
        numbers = _numbers(x, numeric)
        seen = ~np.isnan(numbers)
        empty = np.flatnonzero(~seen.any(0))
        if len(empty):
            raise DataError(
                f"column {_name(x, numeric[empty[0]])} of X has no value in {len(numbers)} rows; leave it out"
            )
        fill = np.nanmedian(numbers, axis=0) if len(numeric) else np.zeros(0)
        whole = np.where(seen, numbers, fill)
        with np.errstate(over="ignore", invalid="ignore"):
            centre, scale = whole.mean(0), whole.std(0)
        scale = np.where(scale > 1e-12 * np.maximum(np.abs(centre), 1), scale, 1.0)
        categories = tuple(tuple(sorted(set(_texts(x, i)))) for i in categorical)
        gaps = tuple(int(i) for i in np.flatnonzero((~seen).any(0)))
        return cls(numeric, categorical, _plain(fill), _plain(centre), _plain(scale), gaps, categories)

    def encode(self, x: NDArray[np.float64] | pd.DataFrame) -> NDArray[np.float32]:
        """Return float32 [N, F].

        Raises
        ------
        DataError : a value too far from those in training.
        """
        numbers = _numbers(x, self.numeric)
        missing = np.isnan(numbers)
        with np.errstate(over="ignore", invalid="ignore"):
            values = (np.where(missing, np.array(self.fill), numbers) - np.array(self.centre)) / np.array(self.scale)
            parts = [values.astype(np.float32), missing[:, list(self.gaps)].astype(np.float32)]
        if not np.isfinite(parts[0]).all():
            row, column = np.argwhere(~np.isfinite(parts[0]))[0]
            raise DataError(
                f"column {_name(x, self.numeric[column])} of X, row {row}: {numbers[row, column]} is too far from the "
                "training values to be scaled as float32; correct it, or transform the column first (a logarithm, say)"
            )
        for i, known in zip(self.categorical, self.categories):
            parts.append((np.array(_texts(x, i), dtype=object)[:, None] == np.array(known, object)).astype(np.float32))
        return np.hstack(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TableEncoder:
        """Read what :meth:`to_dict` gave, from JSON too."""
        categories = tuple(tuple(found) for found in values["categories"])
        return cls(**{k: tuple(v) for k, v in values.items() if k != "categories"}, categories=categories)


def check_inputs(estimator: Any, x: Any, *, reset: bool) -> NDArray[np.float64] | pd.DataFrame:
    """Return X as scikit-learn checks it: a float64 array, or a DataFrame where it has text columns.

    Raises
    ------
    ValueError : X is not 2-D, empty, sparse, infinite, or differs from the X of ``fit``.
    """
    if not reset and estimator.encoder_.categorical and not isinstance(x, pd.DataFrame):
        raise DataError("fitted on a DataFrame with text columns: give a DataFrame with the same columns")
    if isinstance(x, pd.DataFrame) and (_kinds(x)[1] if reset else estimator.encoder_.categorical):
        frame: pd.DataFrame = validate_data(estimator, x, reset=reset, skip_check_array=True)
        if not len(frame):
            raise DataError("X has no rows")
        if np.isinf(_numbers(frame, _kinds(frame)[0])).any():
            raise DataError("X contains infinity; correct these values or leave the rows out")
        return frame
    array: NDArray[np.float64] = validate_data(
        estimator, x, dtype=np.float64, ensure_all_finite="allow-nan", reset=reset, estimator=estimator
    )
    return array


def check_weights(sample_weight: Any, x: NDArray[np.float64] | pd.DataFrame) -> NDArray[np.float64] | None:
    """Return the rows' weights, float64 [N], or None for none given.

    Raises
    ------
    ValueError : another length than X, a negative weight, one that is not finite, or none above 0.
    """
    if sample_weight is None:
        return None
    rows = np.zeros((len(x), 1))
    weights: NDArray[np.float64] = _check_sample_weight(
        sample_weight, rows, dtype=np.float64, copy=True, ensure_non_negative=True
    )
    return weights


def _kinds(x: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not isinstance(x, pd.DataFrame):
        return tuple(range(x.shape[1])), ()
    numeric = [pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype) for dtype in x.dtypes]
    dates = [i for i, dtype in enumerate(x.dtypes) if pd.api.types.is_datetime64_any_dtype(dtype)]
    if dates:
        raise DataError(f"column {_name(x, dates[0])} of X holds dates; make a number of it (a year, an age)")
    return tuple(i for i, yes in enumerate(numeric) if yes), tuple(i for i, yes in enumerate(numeric) if not yes)


def _numbers(x: Any, columns: tuple[int, ...]) -> NDArray[np.float64]:
    if not isinstance(x, pd.DataFrame):
        return np.asarray(x[:, list(columns)], dtype=np.float64)
    try:
        found = [pd.to_numeric(x.iloc[:, i]).to_numpy(dtype=np.float64, na_value=np.nan) for i in columns]
    except (TypeError, ValueError) as error:
        raise DataError(f"X: a column that held numbers in fit holds something else now ({error})") from error
    return np.column_stack(found) if found else np.zeros((len(x), 0))


def _plain(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _texts(x: Any, column: int) -> list[str]:
    series = x.iloc[:, column]
    return [MISSING_CATEGORY if gone else str(value) for value, gone in zip(series, series.isna())]


def _name(x: Any, column: int) -> str:
    return repr(x.columns[column]) if isinstance(x, pd.DataFrame) else str(column)
