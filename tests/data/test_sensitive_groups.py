"""Groups: order, bins, merging, keeping, intersections, and the three rules for missing values."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libmtl_fair.data.sensitive import Groups, choose_sensitive, make_groups
from libmtl_fair.data.spec import SensitiveSpec
from libmtl_fair.errors import DataError

FRAME = pd.DataFrame(
    {
        "sex": ["m", "f", None, "f", "m", "f"],
        "race": ["x", "y", "x", "z", None, "x"],
        "age": [20.0, 40, 60, None, 39.9, 25],
        "code": [2.0, 1.0, 2.0, np.nan, 1.0, 10.0],
    }
)


def counts(groups: Groups) -> tuple[int, int]:
    """Rows without a value, and rows of groups that are not kept."""
    return int(groups.gap.sum()), int(((groups.ids < 0) & ~groups.gap).sum())


def groups(spec: SensitiveSpec, missing: str = "drop", known: dict | None = None):
    made = make_groups("attribute", spec, FRAME, missing, known or {})
    return made, [None if k < 0 else made.names[k] for k in made.ids]


def test_sorted_by_name_with_missing_unknown() -> None:
    made, found = groups(SensitiveSpec("sex"))
    assert made.names == ("f", "m")
    assert made.ids.tolist() == [1, 0, -1, 0, 1, 0]
    assert counts(made) == (1, 0)
    assert found == ["m", "f", None, "f", "m", "f"]


def test_a_group_of_the_missing() -> None:
    made, found = groups(SensitiveSpec("sex"), "group")
    assert made.names == ("f", "m", "(missing)")
    assert found[2] == "(missing)"
    assert counts(made)[0] == 1


def test_bins_hold_their_lower_edge_and_keep_their_order() -> None:
    _, found = groups(SensitiveSpec("age", bins=(25, 40)))
    assert found == ["under 25", "40 and over", "40 and over", None, "25 to under 40", "25 to under 40"]
    made, _ = groups(SensitiveSpec("age", bins=(25, 40), labels=("young", "middle", "a lot")))
    assert made.names == ("young", "middle", "a lot")


def test_numbers_are_named_without_a_fraction() -> None:
    made, _ = groups(SensitiveSpec("code"))
    assert made.names == ("1", "10", "2")


def test_a_merge_of_all_codes_may_name_some_that_nobody_has() -> None:
    codes = {"x": "one", "y": "two", "z": "two", "w": "nobody"}
    assert groups(SensitiveSpec("race", merge=codes))[0].names == ("one", "two")
    with pytest.raises(DataError, match="merge: unknown value 'w'"):
        groups(SensitiveSpec("race", merge={"x": "one", "w": "nobody"}))  # it may be meant for one of the others


def test_merge_and_labels() -> None:
    made, found = groups(SensitiveSpec("race", merge={"y": "other", "z": "other"}))
    assert made.names == ("other", "x")
    assert found == ["x", "other", "x", "other", None, "x"]
    assert groups(SensitiveSpec("race", labels=("z", "x", "y")))[0].names == ("z", "x", "y")
    codes = {"1": "one", "2": "two"}
    assert groups(SensitiveSpec("code", merge=codes))[0].names == ("10", "one", "two")


@pytest.mark.parametrize("keep", [("x", "y"), 2])
def test_keep(keep) -> None:
    made, found = groups(SensitiveSpec("race", keep=keep))
    assert made.names == ("x", "y")
    assert found == ["x", "y", "x", None, None, "x"]
    assert counts(made) == (1, 1)


def test_intersection_has_cells_that_occur_only() -> None:
    known = {"sex": SensitiveSpec("sex"), "race": SensitiveSpec("race")}
    made, found = groups(SensitiveSpec(of=("sex", "race")), known=known)
    assert made.names == ("f & x", "f & y", "f & z", "m & x")
    assert found == ["m & x", "f & y", None, "f & z", None, "f & x"]
    assert counts(made) == (2, 0)
    made, found = groups(SensitiveSpec(of=("sex", "race")), "group", known)
    assert found[2] == "(missing) & x"
    assert None not in found
    known["race"] = SensitiveSpec("race", keep=2)
    made, _ = groups(SensitiveSpec(of=("sex", "race")), known=known)
    assert counts(made) == (2, 1)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=2, max_size=40),
    rule=st.sampled_from(["drop", "group"]),
    keep=st.sampled_from([None, 2]),
)
def test_ids_name_the_values(values, rule, keep) -> None:
    frame = pd.DataFrame({"g": pd.Series(values, dtype=object)})
    present = {v for v in values if v is not None} | ({"(missing)"} if rule == "group" and None in values else set())
    if len(present) < 2:
        with pytest.raises(DataError, match="'g' has one group"):
            make_groups("g", SensitiveSpec("g", keep=keep), frame, rule, {})
        return
    made = make_groups("g", SensitiveSpec("g", keep=keep), frame, rule, {})
    assert counts(made)[0] == values.count(None)
    assert len(made.names) == (min(2, len(present)) if keep else len(present))
    for value, index in zip(values, made.ids):
        name = "(missing)" if value is None else value
        assert (made.names[index] == name) if index >= 0 else name not in made.names


def test_choosing() -> None:
    known = {"sex": SensitiveSpec("sex"), "race": SensitiveSpec("race"), "a*b": SensitiveSpec("ab")}
    chosen, _ = choose_sensitive(["sex", "race:top3", "sex*race", "a*b"], known, {"sex": ("f", "m")})
    assert list(chosen) == ["sex", "race", "sex*race", "a*b"]
    assert (chosen["sex"].keep, chosen["race"].keep) == (("f", "m"), 3)
    assert chosen["sex*race"].of == ("sex", "race")
    assert chosen["a*b"].column == "ab"
    with pytest.raises(DataError, match="unknown sensitive attribute 'race:best2'"):
        choose_sensitive("race:best2", known)
