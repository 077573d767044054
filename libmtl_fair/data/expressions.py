"""Comparisons of columns, ``"death == 1 and d.time <= 180"``: read as data, never run as code."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.data.frames import Series, as_text, column_of, is_date, is_numeric
from libmtl_fair.errors import DataError

_OPERATORS: dict[str, Callable[[Any, Any], object]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_TRUTH = {"true": True, "false": False, "1": True, "0": False}
_WHOLE = re.compile(r"[+-]?\d+")
_TERM = re.compile(
    r"""\s*(?:`(?P<quoted>[^`]+)`|(?P<name>[^\s=<>!`'"][^=<>!`'"]*?))\s*
        (?P<op>==|!=|>=|<=|>|<)\s*
        (?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<bare>[^\s'"=<>!](?:(?!\s(?:and|or)(?:\s|$))[^'"=<>!])*?))\s*
        (?:\s(?P<join>and|or)\s|$)""",
    re.VERBOSE,
)


class Comparison(NamedTuple):
    """``column op value``, the value as it is written; it is read as the column's type says, a quoted one as text or a date."""

    column: str
    op: str
    value: str
    quoted: bool = False


def parse(expression: str) -> list[list[Comparison]]:
    """Return the expression as an *or* of *ands* of comparisons ("and" binds closer, there are no brackets).

    Column names with ``=``, ``<``, ``>`` or the word "and" go in back-ticks, text values in quotes. A value is compared as the
    column's type: a number, ``true`` or ``false``, a date such as ``2024-05-31``, or text as it is written (``007`` is not ``7``).

    >>> parse("death == 1 and d.time <= 180")
    [[Comparison(column='death', op='==', value='1', quoted=False), Comparison(column='d.time', op='<=', value='180', quoted=False)]]
    """
    alternatives: list[list[Comparison]] = [[]]
    position = 0
    while True:
        match = _TERM.match(expression, position)
        if match is None:
            raise DataError(
                f"expression {expression!r}: cannot read {expression[position:].strip()!r}; expected comparisons such as "
                "\"age >= 65\" or \"job == 'clerk'\", joined by 'and' or 'or'"
            )
        text = match["single"] if match["single"] is not None else match["double"]
        value = match["bare"] if text is None else text
        alternatives[-1].append(Comparison(match["quoted"] or match["name"], match["op"], value, text is not None))
        if match["join"] is None:
            return alternatives
        if match["join"] == "or":
            alternatives.append([])
        position = match.end()


def expression_columns(expression: str) -> tuple[str, ...]:
    """Return the columns that the expression compares."""
    return tuple(dict.fromkeys(term.column for terms in parse(expression) for term in terms))


def evaluate(expression: str, frame: pd.DataFrame, where: str) -> NDArray[np.float32]:
    """Return 1, 0, or NaN where any column that is compared is missing: float32 [N]."""
    columns = {name: column_of(frame, name, where) for name in expression_columns(expression)}
    met = [
        np.all([_compare(columns[term.column], term, where) for term in terms], axis=0) for terms in parse(expression)
    ]
    missing = np.any([series.isna() for series in columns.values()], axis=0)
    return np.where(missing, np.nan, np.any(met, axis=0)).astype(np.float32)


def _compare(series: Series, term: Comparison, where: str) -> NDArray[np.bool_]:
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(series.cat.categories.dtype)
    column, value = f"{where}: column {term.column!r}", term.value
    compare = _OPERATORS[term.op]
    if is_date(series):
        dates = series.ffill().bfill()  # gaps are left out by the caller
        return np.asarray(compare(dates, _date(series, value, column)), dtype=bool)
    if pd.api.types.is_bool_dtype(series):
        if term.quoted or value.lower() not in _TRUTH or term.op not in ("==", "!="):
            raise DataError(
                f"{column} holds true and false; compare it with == true or == false, found {term.op} {value!r}"
            )
        return np.asarray(compare(series.fillna(False).to_numpy(dtype=bool), _TRUTH[value.lower()]), dtype=bool)
    if is_numeric(series):
        number = None if term.quoted else _number(value)
        if number is None:
            raise DataError(f"{column} holds numbers, but is compared with the text {value!r}")
        if isinstance(number, int) and pd.api.types.is_integer_dtype(series):
            return np.asarray(compare(series.fillna(0).to_numpy(dtype=object), number), dtype=bool)
        return np.asarray(compare(series.to_numpy(dtype=float, na_value=np.nan), number), dtype=bool)
    if term.op not in ("==", "!="):
        raise DataError(f"{column} holds text; it can be compared with == and != only")
    return np.asarray(compare(as_text(series), value), dtype=bool)


def _number(text: str) -> int | float | None:
    """Return a number as it is written, whole ones exactly; None for what is none, or not finite."""
    if _WHOLE.fullmatch(text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) and "_" not in text else None


def _date(series: Series, text: str, column: str) -> pd.Timestamp | pd.Timedelta:
    """Return the moment or duration that a text spells, with the column's time zone where it names none."""
    try:
        if series.dtype.kind == "m":
            return pd.Timedelta(text)
        if not text.isdigit() and isinstance(found := pd.Timestamp(text), pd.Timestamp):
            zone = getattr(series.dt, "tz", None)
            if zone is None:
                return found if found.tzinfo is None else found.tz_convert(None)
            return found.tz_localize(zone) if found.tzinfo is None else found
    except ValueError:
        pass
    raise DataError(f"{column} holds dates, but is compared with {text!r}; expected a date such as 2024-05-31")
