"""Binary labels from comparisons of columns: ``"death == 1 and d.time <= 180"``. Read as data, never run as code."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from libmtl_fair.data.frames import column_of, is_numeric
from libmtl_fair.errors import DataError

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_TERM = re.compile(
    r"""\s*(?:`(?P<quoted>[^`]+)`|(?P<name>[^\s=<>!`'"][^=<>!`'"]*?))\s*
        (?P<op>==|!=|>=|<=|>|<)\s*
        (?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<bare>[^\s'"=<>!](?:(?!\s(?:and|or)(?:\s|$))[^'"=<>!])*?))\s*
        (?:\s(?P<join>and|or)\s|$)""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Comparison:
    """``column op value``; a quoted value is text, a bare one a number if it reads as one."""

    column: str
    op: str
    value: str | float


def parse(expression: str) -> list[list[Comparison]]:
    """Return the expression as an *or* of *ands* of comparisons ("and" binds closer, there are no brackets).

    Column names with ``=``, ``<``, ``>`` or the word "and" go in back-ticks, text values in quotes.

    Raises
    ------
    DataError : it cannot be read.

    >>> parse("death == 1 and d.time <= 180")
    [[Comparison(column='death', op='==', value=1.0), Comparison(column='d.time', op='<=', value=180.0)]]
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
        value: str | float = text if text is not None else _number(match["bare"])
        alternatives[-1].append(Comparison(match["quoted"] or match["name"], match["op"], value))
        if match["join"] is None:
            return alternatives
        if match["join"] == "or":
            alternatives.append([])
        position = match.end()


def expression_columns(expression: str) -> tuple[str, ...]:
    """Return the columns that the expression compares.

    >>> expression_columns("age >= 65 or sex == 'male' and age < 30")
    ('age', 'sex')
    """
    return tuple(dict.fromkeys(term.column for terms in parse(expression) for term in terms))


def evaluate(expression: str, frame: pd.DataFrame, where: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return 1, 0, or NaN where any column that is compared is missing: float32 [N].

    Raises
    ------
    DataError : unknown column, a text column ordered or compared with a number, or an expression that cannot be read.
    """
    result = np.zeros(len(frame), dtype=bool)
    missing = np.zeros(len(frame), dtype=bool)
    for terms in parse(expression):
        every = np.ones(len(frame), dtype=bool)
        for term in terms:
            series = column_of(frame, term.column, where)
            gap = series.isna().to_numpy()
            every &= _compare(series, term, where) & ~gap
            missing |= gap
        result |= every
    labels = result.astype(np.float32)
    labels[missing] = np.nan
    return labels


def _compare(series: pd.Series[Any], term: Comparison, where: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    numeric = is_numeric(series)
    value: Any = term.value
    if numeric and isinstance(value, str):
        raise DataError(f"{where}: column {term.column!r} holds numbers, but is compared with the text {value!r}")
    if not numeric:
        if term.op not in ("==", "!="):
            raise DataError(f"{where}: column {term.column!r} holds text; it can be compared with == and != only")
        value = str(value) if isinstance(value, str) else f"{value:g}"
        series = series.astype(object).map(str)
    values = series.to_numpy(dtype=float, na_value=np.nan) if numeric else series.to_numpy(dtype=object)
    return np.asarray(_OPERATORS[term.op](values, value), dtype=bool)


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
