"""Columns of tables as numbers, text and ids, with messages that name the column and the near name."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.data.tables import Series as Series
from libmtl_fair.data.tables import settled
from libmtl_fair.errors import DataError, unknown

Values: TypeAlias = NDArray[Any]
"""Labels or classes of any type."""

_LARGEST = 1e30
_FEW_ROWS = 1000


def column_of(frame: pd.DataFrame, name: str, where: str) -> Series:
    """Return one column; the error of one that is not there gives the near name."""
    if not isinstance(name, str) or name not in frame.columns:
        raise DataError(f"{where}: {unknown('column', name, map(str, frame.columns))}")
    return frame[name]


def is_numeric(series: Series) -> bool:
    """Return whether the column holds real numbers or booleans."""
    return bool(pd.api.types.is_numeric_dtype(series)) and not pd.api.types.is_complex_dtype(series)


def as_numbers(series: Series, where: str) -> NDArray[np.float64]:
    """Return a numeric column as float64 with NaN where missing; text and numbers beyond 1e30 are refused.

    Dates are days since 1970-01-01 (UTC), durations are days.
    """
    if is_date(series):
        return _days(series)
    if isinstance(series.dtype, pd.CategoricalDtype) and pd.api.types.is_numeric_dtype(series.cat.categories):
        series = series.astype(np.float64)
    if not is_numeric(series):
        example = series.dropna().iloc[0] if series.notna().any() else None
        raise DataError(
            f"{where}: column {series.name!r} must hold numbers, found {series.dtype} (such as {example!r})"
        )
    values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    beyond = np.flatnonzero(np.abs(values) > _LARGEST)
    if len(beyond):
        raise DataError(
            f"{where}: column {series.name!r} is {values[beyond[0]]:g} in row {beyond[0]}; expected numbers up to "
            f"{_LARGEST:g}: replace it by a number or leave it empty"
        )
    return values


def is_date(series: Series) -> bool:
    """Return whether the column holds dates or durations."""
    return series.dtype.kind in "mM"


def _days(series: Series) -> NDArray[np.float64]:
    if getattr(series.dt, "tz", None) is not None:
        series = series.dt.tz_convert(None)
    passed = series.to_numpy(dtype="m8[ms]" if series.dtype.kind == "m" else "M8[ms]")
    return np.where(np.isnat(passed), np.nan, passed.astype(np.int64) / 86_400_000)


def as_text(series: Series) -> NDArray[np.object_]:
    """Return a column as strings, with None where missing; whole numbers lose their ``.0``.

    >>> as_text(pd.Series([1.0, float("nan"), 2.0])).tolist()
    ['1', None, '2']
    """
    if isinstance(series.dtype, pd.CategoricalDtype) and pd.api.types.is_string_dtype(series.cat.categories.dtype):
        known = np.array([*as_text(pd.Series(series.cat.categories)), None], dtype=object)
        return np.asarray(known[series.cat.codes])
    if len(series) > _FEW_ROWS and is_numeric(series):
        codes, found = pd.factorize(series)
        if len(found) < len(series) / 4:
            known = np.array([*as_text(pd.Series(found)), None], dtype=object)
            return np.asarray(known[codes])
    if series.dtype.kind == "M":
        values = series.astype(str).tolist()
    elif pd.api.types.is_float_dtype(series):
        numbers = series.to_numpy(dtype=float, na_value=0).tolist()
        values = [str(int(number)) if number.is_integer() else str(number) for number in numbers]
    else:
        values = [str(value) for value in series.astype(object).to_numpy()]
    text = np.array(values, dtype=object)
    text[series.isna().to_numpy()] = None
    return text


def values_in(text: NDArray[np.object_], most: int | None = None) -> list[str]:
    """Return the values of a column of text, sorted; ``most`` of them, for a message."""
    return sorted(set(text) - {None})[:most]


def ids_of(values: NDArray[np.object_], names: Sequence[Hashable]) -> NDArray[np.int64]:
    """Return the position of each value among ``names``, -1 where it is none of them: int64 [N]."""
    return pd.Index(list(names), dtype=object).get_indexer(pd.Index(values, dtype=object)).astype(np.int64)


def as_array(values: object, where: str) -> NDArray[Any]:
    """Return a table or column of any library as an array; of nullable numbers and dates float64, NaN where missing."""
    found = settled(values)
    if isinstance(found, pd.Series) and (is_numeric(found) or is_date(found)):
        return (
            found.to_numpy()
            if isinstance(found.dtype, np.dtype) and found.dtype.kind in "iub"
            else as_numbers(found, where)
        )
    if isinstance(found, pd.DataFrame) and all(is_numeric(found[name]) or is_date(found[name]) for name in found):
        return np.column_stack([as_numbers(found[name], where) for name in found])
    return np.asarray(found)


def group_ids(values: object, where: str, names: Sequence[str] | None = None) -> tuple[NDArray[Any], list[str] | None]:
    """Return group ids [N] and the groups' names: of text, truth values and categories; numbers are ids already.

    Parameters
    ----------
    values : object
        Group labels or ids [N] in any container; missing labels are -1.
    where : str
        For the error.
    names : sequence of str, optional
        Names in the order of ids; without it, those that occur, sorted.

    Raises
    ------
    DataError
        A label that is none of the names.

    Examples
    --------
    >>> group_ids(["m", "f", None], "sex")
    (array([ 1,  0, -1]), ['f', 'm'])
    """
    found = settled(values)
    column = found if isinstance(found, pd.Series) else None
    if column is None:
        array = np.asarray(found)
        if array.ndim != 1 or array.dtype.kind not in "OUSTb":
            return array, None
        column = settled(pd.Series(array.astype(object)))
    if is_numeric(column) and not pd.api.types.is_bool_dtype(column):
        if pd.api.types.is_integer_dtype(column):
            return column.to_numpy(dtype=np.int64, na_value=-1), None
        return column.to_numpy(dtype=np.float64, na_value=np.nan), None
    text = as_text(column)
    known = values_in(text) if names is None else [str(name) for name in names]
    ids = ids_of(text, known)
    strange = np.flatnonzero((ids < 0) & ~pd.isna(text))
    if len(strange):
        raise DataError(f"{where}: {unknown('group', str(text[strange[0]]), known)}")
    return ids, known


def number_text(value: float) -> str:
    """Return a number as text that reads back as itself: short where short is exact, without an exponent where it is whole.

    Examples
    --------
    >>> number_text(30.0), number_text(0.25), number_text(1234567), number_text(2930560.5)
    ('30', '0.25', '1234567', '2930560.5')
    """
    short = f"{value:g}"
    if float(short) == value and "e" not in short:
        return short
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
