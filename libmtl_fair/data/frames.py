"""Reading tables and their columns, with messages that name the file, the column and the near name."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from libmtl_fair.errors import DataError, near, unknown

_LARGEST = 1e30


def read_frame(source: str | Path | pd.DataFrame) -> pd.DataFrame:
    """Return a table from a DataFrame, or a .csv, .csv.gz or .parquet file.

    Raises
    ------
    DataError : no such file, an ending that is not known, a file that cannot be parsed, or no rows.
    """
    if isinstance(source, pd.DataFrame):
        frame, what = source, "the frame"
    else:
        path = Path(source)
        frame, what = _read_file(path), str(path)
    if len(frame) == 0:
        raise DataError(f"{what} has no rows")
    if not all(isinstance(column, str) for column in frame.columns):
        frame = frame.rename(columns=str)
    repeated = frame.columns[frame.columns.duplicated()]
    if len(repeated):
        raise DataError(f"{what}: column {repeated[0]!r} is there twice; rename one")
    return frame.infer_objects()


def _read_file(path: Path) -> pd.DataFrame:
    name = path.name.lower()
    if not path.is_file():
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = near(path.name, siblings)
        hint = f"; did you mean {str(path.parent / guess)!r}?" if guess else "; check the path"
        raise DataError(f"no file {str(path)!r}{hint}")
    try:
        if name.endswith((".parquet", ".pq")):
            return pd.read_parquet(path)
        if name.endswith((".csv", ".csv.gz")):
            return pd.read_csv(path, low_memory=False)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be read as a table: {error}") from error
    raise DataError(f"{str(path)!r}: expected a .csv, .csv.gz or .parquet file")


def column_of(frame: pd.DataFrame, name: str, where: str) -> pd.Series[Any]:
    """Return one column.

    Raises
    ------
    DataError : no such column, with the near name.
    """
    if not isinstance(name, str) or name not in frame.columns:
        raise DataError(f"{where}: {unknown('column', name, map(str, frame.columns))}")
    return frame[name]


def is_numeric(series: pd.Series[Any]) -> bool:
    """Return whether the column holds real numbers or booleans."""
    return bool(pd.api.types.is_numeric_dtype(series)) and not pd.api.types.is_complex_dtype(series)


def as_numbers(series: pd.Series[Any], where: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a numeric column as float64 with NaN where missing.

    Raises
    ------
    DataError : the column holds text or dates, or a number that is infinite or beyond 1e30.
    """
    if isinstance(series.dtype, pd.CategoricalDtype) and pd.api.types.is_numeric_dtype(series.cat.categories):
        series = series.astype(np.float64)
    if not is_numeric(series):
        example = series.dropna().iloc[0] if series.notna().any() else None
        raise DataError(
            f"{where}: column {series.name!r} must hold numbers, found {series.dtype} (such as {example!r})"
        )
    values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    if (np.abs(values) > _LARGEST).any():
        row = int(np.flatnonzero(np.abs(values) > _LARGEST)[0])
        raise DataError(
            f"{where}: column {series.name!r} is {values[row]:g} in row {row}; expected numbers up to {_LARGEST:g}: "
            "replace it by a number or leave it empty"
        )
    return values


def as_text(series: pd.Series[Any]) -> np.ndarray[Any, np.dtype[np.object_]]:
    """Return a column as strings, with None where missing; whole numbers lose their ``.0``.

    >>> as_text(pd.Series([1.0, float("nan"), 2.0])).tolist()
    ['1', None, '2']
    """
    gap = series.isna().to_numpy()
    if pd.api.types.is_float_dtype(series):
        numbers = series.to_numpy(dtype=float, na_value=0).tolist()
        values = [str(int(number)) if number.is_integer() else str(number) for number in numbers]
    else:
        values = [str(value) for value in series.astype(object).to_numpy()]
    text = np.array(values, dtype=object)
    text[gap] = None
    return text
