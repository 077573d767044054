"""Comparisons of columns as labels: read as data, equal to pandas' own, NaN where a compared column is missing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libmtl_fair.data.expressions import evaluate, expression_columns, parse
from libmtl_fair.errors import DataError

FRAME = pd.DataFrame(
    {
        "d.time": [10.0, 200, np.nan, 181, 180],
        "hours-per-week": [40, 41, 50, 10, 99],
        "two words": ["a b", "c", None, "a b", "and"],
        "x > y": [1, 2, 3, 4, 5],
        "flag": [True, False, True, True, False],
    }
)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("d.time <= 180", [1, 0, None, 0, 1]),
        ("hours-per-week > 40", [0, 1, 1, 0, 1]),
        ("hours-per-week>40 and d.time<=200", [0, 1, None, 0, 1]),
        ("two words == 'a b'", [1, 0, None, 1, 0]),
        ('two words != "and"', [1, 1, None, 1, 0]),
        ("two words == a b or hours-per-week == 99", [1, 0, None, 1, 1]),
        ("`x > y` >= 4", [0, 0, 0, 1, 1]),
        ("flag == 1", [1, 0, 1, 1, 0]),
        ("hours-per-week > 45 or hours-per-week < 20 and d.time > 0", [0, 0, None, 1, 1]),
        ("`x > y` > -1e3", [1, 1, 1, 1, 1]),
    ],
)
def test_values(expression, expected) -> None:
    found = evaluate(expression, FRAME, "task 't'")
    assert [None if np.isnan(v) else int(v) for v in found] == expected


@settings(max_examples=60, deadline=None)
@given(
    op=st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
    value=st.integers(-3, 3),
    other=st.integers(-3, 3),
    join=st.sampled_from(["and", "or"]),
    rows=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=20),
)
def test_agrees_with_pandas(op, value, other, join, rows) -> None:
    frame = pd.DataFrame(rows, columns=["a", "b"])
    text = f"a {op} {value} {join} b < {other}"
    np.testing.assert_array_equal(evaluate(text, frame, "t"), frame.eval(text).to_numpy(dtype=np.float32))


def test_columns_and_parsing() -> None:
    assert expression_columns("a > 1 or b == 'x and y' and a < 3") == ("a", "b")
    assert [len(terms) for terms in parse("a > 1 or b == 2 and c == 3")] == [1, 2]


@pytest.mark.parametrize(
    "text", ["", "a", "a >", "> 3", "a = 3", "a > 1 b < 2", "a > 1 and", "a == 'x", "(a > 1)", "f(a) > (1)"]
)
def test_what_cannot_be_read_or_found(text) -> None:
    with pytest.raises(DataError, match=r"cannot read|unknown column|is compared with the text"):
        evaluate(text, pd.DataFrame({"a": [1, 2]}), "task 't'")
