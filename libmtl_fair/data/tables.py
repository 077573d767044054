"""The door for tables: files and frames of any library become one kind of pandas frame, by one rule.

Text columns of a file, CSV or parquet, are numbers, truth values (true, false) or dates (2024-05-31) where every value but
missing ones reads as that; of numbers with leading zeros (``007``), or of more than 18 digits, none is. In such columns the
words ``NA``, ``NaN``, ``N/A``, ``null``, ``None``, ``?`` and ``.`` are missing; in text only the empty cell is, as they may
be categories there, and what ``missing_values`` names. ``frame.attrs["taken_as_missing"]`` counts what was taken.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import narwhals.stable.v1 as nw
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.compute as pc
import pyarrow.csv

from libmtl_fair.errors import DataError, near
from libmtl_fair.files import atomic_path
from libmtl_fair.validation import Listed, checked

Source: TypeAlias = Any
"""A path, or a table of pandas, polars, pyarrow or any other library that narwhals reads."""
Series: TypeAlias = "pd.Series[Any]"
"""A column of a table."""
Taken: TypeAlias = "dict[str, dict[str, int]]"
"""{column: {what was taken as missing: how often}}."""

TAKEN = "taken_as_missing"
MISSING_WORDS = ["", "na", "n/a", "#n/a", "nan", "null", "none", "?", "."]
_TRUTH = {"true", "false"}
_INTEGER = r"^[+-]?[0-9]{1,18}$"
_NUMBER = r"^(?i)[+-]?(([0-9]{1,18}([.][0-9]*)?|[.][0-9]+)(e[+-]?[0-9]{1,3})?|inf(inity)?)$"
_LEADING_ZERO = r"^[+-]?0[0-9]"
_DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([ T][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]+)?)?(Z|[+-][0-9]{2}:?[0-9]{2})?)?$"
_ZONE = r"(Z|[ T].*[+-][0-9]{2}:?[0-9]{2})$"
_BLOCK = 2**24
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
    words = ("", *checked(Listed, missing_values, "missing_values"))
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
    open_text = gzip.open if path.name.lower().endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        separator = max(",;\t", key=first.count)
        header = next(csv.reader(file, delimiter=separator), [])
    places = [str(place) for place in range(len(header))]
    cells = pyarrow.csv.read_csv(
        path,
        pyarrow.csv.ReadOptions(column_names=places, skip_rows_after_names=1, block_size=_BLOCK),
        pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(places, pyarrow.string()), strings_can_be_null=False),
    )
    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]
    return pd.DataFrame({place: cells[place].to_pandas() for place in places}).set_axis(names, axis=1)


def settle(series: Series, name: str, taken: Taken, words: Collection[str] = ("",), *, reads: bool = False) -> Series:
    """Return a column with its type settled; ``reads`` text as what it spells, as for files.

    Objects of one kind (truth values, numbers, dates, with gaps) become a column of that kind; ``words`` in text become missing.
    """
    if not (pd.api.types.is_object_dtype(series.dtype) or pd.api.types.is_string_dtype(series.dtype)):
        return series
    kind = pd.api.types.infer_dtype(series, skipna=True)
    if kind == "string":
        found = _read(series, name, taken, words) if reads else None
        return _text(series, name, taken, words) if found is None else found
    if kind == "boolean":
        return series.astype("boolean" if series.isna().any() else bool)
    if kind in ("date", "datetime", "datetime64"):
        return pd.to_datetime(series, errors="coerce") if _in_range(series) else series
    if kind in ("integer", "floating", "mixed-integer-float", "decimal"):
        return _as_float(series)
    return series


def _in_range(series: Series) -> bool:
    try:
        pd.to_datetime(series)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def _as_float(series: Series) -> Series:
    try:
        return series.infer_objects() if not series.isna().any() else series.astype("Float64").astype("float64")
    except (TypeError, ValueError, OverflowError):
        return series


def _read(series: Series, name: str, taken: Taken, words: Collection[str]) -> Series | None:
    """Return a file's column of text as what its values spell; None for text."""
    cells = pyarrow.array(series, pyarrow.string(), from_pandas=True)
    trimmed = pc.utf8_trim_whitespace(cells)
    gaps = pc.or_(
        pc.is_in(pc.utf8_lower(trimmed), pyarrow.array(MISSING_WORDS)),
        pc.is_in(cells, pyarrow.array(words, pyarrow.string())),
    )
    gaps = pc.or_(gaps, pc.is_null(cells))
    real = trimmed.filter(pc.invert(gaps))
    complete = len(real) == len(cells)
    held = pc.if_else(gaps, None, trimmed)
    made: Series | None = None
    if not len(real):
        return None
    if _all_match(real, _NUMBER) and not _any_match(real, _LEADING_ZERO):
        plain = pc.replace_substring_regex(held, r"^\+", "")
        if not _all_match(real, _INTEGER):
            made = pd.Series(pc.cast(plain, pyarrow.float64()).to_numpy(zero_copy_only=False))
        else:
            whole = pc.cast(plain, pyarrow.int64())
            extremes = pc.min_max(whole).as_py()
            large = max(abs(extremes["min"]), abs(extremes["max"])) > _EXACT
            made = pd.Series(
                whole.to_pandas(types_mapper=None if complete or not large else {pyarrow.int64(): pd.Int64Dtype()}.get)
            )
    elif set(pc.unique(pc.utf8_lower(real.slice(0, 10_000))).to_pylist()) <= _TRUTH and _all_match(
        pc.utf8_lower(real), "^(true|false)$"
    ):
        flags = pc.equal(pc.utf8_lower(held), "true")
        made = pd.Series(flags.to_numpy(zero_copy_only=False), dtype="bool" if complete else "boolean")
    elif _all_match(real, _DATE):
        zoned = _any_match(real, _ZONE)
        try:
            made = pd.to_datetime(pd.Series(held.to_numpy(zero_copy_only=False)), format="ISO8601", utc=zoned)
        except ValueError:
            return None
    if made is None:
        return None
    counted = pc.value_counts(cells.filter(pc.and_(gaps, pc.is_valid(cells)))).to_pylist()
    _note(taken, name, {item["values"]: item["counts"] for item in counted})
    return made.set_axis(series.index)


def _all_match(values: pyarrow.StringArray, pattern: str) -> bool:
    head = pc.match_substring_regex(values.slice(0, 100), pattern)
    return bool(pc.all(head).as_py()) and bool(pc.all(pc.match_substring_regex(values, pattern)).as_py())


def _any_match(values: pyarrow.StringArray, pattern: str) -> bool:
    return bool(pc.any(pc.match_substring_regex(values, pattern)).as_py())


def _text(series: Series, name: str, taken: Taken, words: Collection[str]) -> Series:
    """Return text with ``words`` as missing; the column itself where it has none."""
    gaps = series.isin(list(words))
    if not gaps.any():
        return series
    _note(taken, name, {str(word): int(count) for word, count in series[gaps].value_counts(sort=False).items()})
    return series.astype(object).where(~gaps, None)


def _note(taken: Taken, name: str, counts: dict[str, int]) -> None:
    if counts:
        taken[name] = dict(sorted(counts.items()))


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
    """Write a table, without its index, to a .csv, .csv.gz or .parquet file, whole or not at all; a .csv for spreadsheets, too."""
    from libmtl_fair.shown import for_spreadsheets

    need_table_name(path)
    with atomic_path(path) as temporary:
        if Path(path).name.lower().endswith(_ENDINGS[2:]):
            frame.to_parquet(temporary, index=False)
        else:
            for_spreadsheets(frame).to_csv(
                temporary, index=False, compression="gzip" if str(path).endswith("gz") else None
            )
