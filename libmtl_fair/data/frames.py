"""Reading tables and their columns, with messages that name the file, the column and the near name."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.errors import DataError, near, unknown
from libmtl_fair.files import atomic_path

Series: TypeAlias = "pd.Series[Any]"
"""A column of a table."""
Values: TypeAlias = NDArray[Any]
"""Labels or classes of any type."""

_LARGEST = 1e30
_PARQUET, _CSV = (".parquet", ".pq"), (".csv", ".csv.gz")


def read_frame(source: str | Path | pd.DataFrame) -> pd.DataFrame:
    """Return a table from a DataFrame, or a .csv, .csv.gz or .parquet file."""
    frame, what = (source, "the frame") if isinstance(source, pd.DataFrame) else (_read_file(Path(source)), str(source))
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
        guess = near(path.name, [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else [])
        hint = f"; did you mean {str(path.parent / guess)!r}?" if guess else "; check the path"
        raise DataError(f"no file {str(path)!r}{hint}")
    try:
        if name.endswith(_PARQUET):
            return pd.read_parquet(path)
        if name.endswith(_CSV):
            return pd.read_csv(path, low_memory=False)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be read as a table: {error}") from error
    raise DataError(f"{str(path)!r}: expected a .csv, .csv.gz or .parquet file")


def need_table_name(path: str | Path) -> None:
    """Refuse a file to write that is named neither .csv, .csv.gz nor .parquet."""
    if not Path(path).name.lower().endswith((*_PARQUET, *_CSV)):
        raise DataError(
            f"a table to write: expected a name that ends with .parquet, .csv or .csv.gz, found {str(path)!r}"
        )


def write_frame(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a table, without its index, to a .csv, .csv.gz or .parquet file, whole or not at all."""
    need_table_name(path)
    with atomic_path(path) as temporary:
        if Path(path).name.lower().endswith(_PARQUET):
            frame.to_parquet(temporary, index=False)
        else:
            frame.to_csv(temporary, index=False, compression="gzip" if str(path).endswith("gz") else None)


def column_of(frame: pd.DataFrame, name: str, where: str) -> Series:
    """Return one column; the error of one that is not there gives the near name."""
    if not isinstance(name, str) or name not in frame.columns:
        raise DataError(f"{where}: {unknown('column', name, map(str, frame.columns))}")
    return frame[name]


def is_numeric(series: Series) -> bool:
    """Return whether the column holds real numbers or booleans."""
    return bool(pd.api.types.is_numeric_dtype(series)) and not pd.api.types.is_complex_dtype(series)


def as_numbers(series: Series, where: str) -> NDArray[np.float64]:
    """Return a numeric column as float64 with NaN where missing; text, dates and numbers beyond 1e30 are refused."""
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


def as_text(series: Series) -> NDArray[np.object_]:
    """Return a column as strings, with None where missing; whole numbers lose their ``.0``.

    >>> as_text(pd.Series([1.0, float("nan"), 2.0])).tolist()
    ['1', None, '2']
    """
    if pd.api.types.is_float_dtype(series):
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
