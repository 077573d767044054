"""The door for tables: files and frames of any library become one kind of pandas frame, by one rule.

Text columns of a file, CSV or parquet, are numbers, truth values (true, false) or dates (2024-05-31) where every value but
missing ones reads as that; of numbers with leading zeros (``007``), or of more than 18 digits, none is. In such columns the
words ``NA``, ``NaN``, ``N/A``, ``null``, ``None``, ``?`` and ``.`` are missing; in text only the empty cell is, as they may
be categories there, and what ``missing_values`` names. ``frame.attrs["taken_as_missing"]`` counts what was taken.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import narwhals.stable.v1 as nw
import numpy as np
import pandas as pd

from libmtl_fair.errors import DataError, near
from libmtl_fair.files import atomic_path
from libmtl_fair.validation import Listed, checked

Source: TypeAlias = Any
"""A path, or a table of pandas, polars, pyarrow or any other library that narwhals reads."""
Taken: TypeAlias = "dict[str, dict[str, int]]"
"""{column: {what was taken as missing: how often}}."""

TAKEN = "taken_as_missing"
_MISSING = {"", "na", "n/a", "#n/a", "nan", "null", "none", "?", "."}
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_NUMBER = re.compile(r"[+-]?(?!0\d)(?:\d{1,18}(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?|[+-]?inf(?:inity)?", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?")
_EXACT = 2**53
_ENDINGS = (".csv", ".csv.gz", ".parquet", ".pq")


def to_pandas(values: object) -> Any:
    """Return a table or a column of any library that narwhals reads as pandas's own; anything else as it is.

    >>> import polars
    >>> to_pandas(polars.Series("sex", ["f", "m"])).tolist()
    ['f', 'm']
    """
    if isinstance(values, pd.DataFrame | pd.Series | np.ndarray):
        return values
    found = nw.from_native(values, pass_through=True, allow_series=True)
    if isinstance(found, nw.LazyFrame):
        found = found.collect()
    return found.to_pandas() if isinstance(found, nw.DataFrame | nw.Series) else values


def settled(values: object) -> Any:
    """Return :func:`to_pandas` of a table or column, columns of objects (truth values, numbers, dates, with gaps) as their kind.

    Labels of rows and columns stay; empty text is missing.
    """
    found = to_pandas(values)
    if isinstance(found, pd.Series):
        return settle(found, str(found.name), {})
    if not isinstance(found, pd.DataFrame):
        return found
    columns = [settle(found.iloc[:, place], str(name), {}) for place, name in enumerate(found.columns)]
    if all(column is found.iloc[:, place] for place, column in enumerate(columns)):
        return found
    return pd.concat(columns, axis=1).set_axis(found.columns, axis=1) if columns else found


def read_frame(source: Source, missing_values: Collection[str] = ()) -> pd.DataFrame:
    """Return a table as a pandas frame with settled types.

    Parameters
    ----------
    source : Source
        A .csv, .csv.gz or .parquet file, or a table of any library that narwhals reads.
    missing_values : collection of str, default ()
        Words that are missing values in text columns, too, besides the empty cell.

    Raises
    ------
    DataError
        No such file, not a table, no rows, or a column that is there twice.
    """
    words = {"", *checked(Listed, missing_values, "missing_values")}
    source = to_pandas(source)
    from_file = not isinstance(source, pd.DataFrame)
    if from_file and not isinstance(source, str | Path):
        raise DataError(
            f"expected a table (pandas, polars, pyarrow, ...) or the path of one, found {type(source).__name__}"
        )
    frame, what = (_read_file(Path(source)), str(source)) if from_file else (source, "the frame")
    if len(frame) == 0:
        raise DataError(f"{what} has no rows")
    names = [str(column) for column in frame.columns]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise DataError(f"{what}: column {repeated[0]!r} is there twice; rename one")
    frame = frame.reset_index(drop=True)
    taken: Taken = {}
    settled = {
        name: settle(frame.iloc[:, place], name, taken, words, reads=from_file) for place, name in enumerate(names)
    }
    made = pd.DataFrame(settled, index=frame.index, columns=names)
    made.attrs[TAKEN] = taken
    return made


def _read_file(path: Path) -> pd.DataFrame:
    name = path.name.lower()
    if not path.is_file():
        guess = near(path.name, [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else [])
        hint = f"; did you mean {str(path.parent / guess)!r}?" if guess else "; check the path"
        raise DataError(f"no file {str(path)!r}{hint}")
    if not name.endswith(_ENDINGS):
        raise DataError(f"{str(path)!r}: expected a .csv, .csv.gz or .parquet file")
    try:
        return pd.read_parquet(path) if name.endswith((".parquet", ".pq")) else _read_csv(path)
    except (OSError, ValueError, EOFError, csv.Error, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be read as a table: {error}") from error


def _read_csv(path: Path) -> pd.DataFrame:
    """Return the cells as text; the separator is the comma, semicolon or tab that the first line has most of."""
    with (
        gzip.open(path, "rt", encoding="utf-8-sig")
        if path.name.lower().endswith(".gz")
        else path.open(encoding="utf-8-sig") as file
    ):
        first = file.readline()
    separator = max(",;\t", key=first.count)
    frame = pd.read_csv(
        path, sep=separator, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig", low_memory=False
    )
    header = [str(name) or f"Unnamed: {place}" for place, name in enumerate(frame.iloc[0].fillna(""))]
    return frame.iloc[1:].set_axis(header, axis=1).reset_index(drop=True)


def settle(
    series: pd.Series[Any], name: str, taken: Taken, words: Collection[str] = ("",), *, reads: bool = False
) -> pd.Series[Any]:
    """Return a column with its type settled; ``reads`` text as what it spells, as for files.

    Objects of one kind (truth values, numbers, dates, with gaps) become a column of that kind; ``words`` in text become missing.
    """
    if not (pd.api.types.is_object_dtype(series.dtype) or pd.api.types.is_string_dtype(series.dtype)):
        return series
    kind = pd.api.types.infer_dtype(series, skipna=True)
    if kind == "string":
        codes, values = pd.factorize(series)
        own = [str(value) for value in values]
        if not reads:
            return _text(series, codes, own, name, taken, words) if set(own) & set(words) else series
        return _read(series, codes, own, name, taken, words)
    if kind == "boolean":
        return series.astype("boolean" if series.isna().any() else bool)
    if kind in ("date", "datetime", "datetime64"):
        return pd.to_datetime(series, errors="coerce") if _in_range(series) else series
    if kind in ("integer", "floating", "mixed-integer-float", "decimal"):
        return _as_float(series)
    return series


def _in_range(series: pd.Series[Any]) -> bool:
    try:
        pd.to_datetime(series)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def _as_float(series: pd.Series[Any]) -> pd.Series[Any]:
    try:
        return series.infer_objects() if not series.isna().any() else series.astype("Float64").astype("float64")
    except (TypeError, ValueError, OverflowError):
        return series


def _read(
    series: pd.Series[Any], codes: Any, own: list[str], name: str, taken: Taken, words: Collection[str]
) -> pd.Series[Any]:
    """Return a file's column of text as what its values spell."""
    spelt = [value.strip() for value in own]
    gaps = [text.lower() in _MISSING or value in words for text, value in zip(spelt, own)]
    real = [text for text, gap in zip(spelt, gaps) if not gap]
    made: pd.Series[Any] | None = None
    if real and all(map(_NUMBER.fullmatch, real)):
        whole = all(map(_INTEGER.fullmatch, real))
        numbers = [None if gap else int(text) if whole else float(text) for text, gap in zip(spelt, gaps)]
        complete = not any(gaps) and (codes >= 0).all()
        large = whole and any(number is not None and abs(number) > _EXACT for number in numbers)
        dtype = "int64" if whole and complete else "Int64" if large else "float64"
        made = pd.Series(numbers, dtype=dtype)
    elif real and {text.lower() for text in real} <= {"true", "false"}:
        flags = [None if gap else text.lower() == "true" for text, gap in zip(spelt, gaps)]
        made = pd.Series(flags, dtype="boolean" if any(gaps) or (codes < 0).any() else "bool")
    elif real and all(map(_DATE.fullmatch, real)):
        try:
            made = pd.to_datetime(
                pd.Series([None if gap else text for text, gap in zip(spelt, gaps)]), format="ISO8601", utc=_zoned(real)
            )
        except ValueError:
            made = None
    if made is None:
        return _text(series, codes, own, name, taken, words)
    _count(taken, name, codes, own, gaps)
    found = made.reindex(codes) if (codes < 0).any() else made.take(codes)
    return found.set_axis(series.index)


def _zoned(texts: list[str]) -> bool:
    return any(text.endswith("Z") or re.search(r"[+-]\d\d:?\d\d$", text[10:]) for text in texts)


def _text(
    series: pd.Series[Any], codes: Any, own: list[str], name: str, taken: Taken, words: Collection[str]
) -> pd.Series[Any]:
    gaps = [value in words for value in own]
    _count(taken, name, codes, own, gaps)
    values = np.array([*(None if gap else value for value, gap in zip(own, gaps)), None], dtype=object)
    return pd.Series(values[codes], index=series.index, dtype=object)


def _count(taken: Taken, name: str, codes: Any, own: list[str], gaps: list[bool]) -> None:
    counts = np.bincount(codes[codes >= 0], minlength=len(own))
    found = {value: int(count) for value, gap, count in zip(own, gaps, counts) if gap and count}
    if found:
        taken[name] = found


def taken_as_missing(frame: pd.DataFrame) -> Mapping[str, Mapping[str, int]]:
    """Return what :func:`read_frame` took as missing, by column."""
    return dict(frame.attrs.get(TAKEN, {}))


def need_table_name(path: str | Path) -> None:
    """Refuse a file to write that is named neither .csv, .csv.gz nor .parquet."""
    if not Path(path).name.lower().endswith(_ENDINGS):
        raise DataError(
            f"a table to write: expected a name that ends with .parquet, .csv or .csv.gz, found {str(path)!r}"
        )


def write_frame(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a table, without its index, to a .csv, .csv.gz or .parquet file, whole or not at all."""
    need_table_name(path)
    with atomic_path(path) as temporary:
        if Path(path).name.lower().endswith(_ENDINGS[2:]):
            frame.to_parquet(temporary, index=False)
        else:
            frame.to_csv(temporary, index=False, compression="gzip" if str(path).endswith("gz") else None)
