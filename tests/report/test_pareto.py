"""The Pareto front of utility and the difference between groups, and sweeps of one setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libmtl_fair.report import read_run, write_plots
from libmtl_fair.report.plots import disparities, front, pareto_plot, sweeps

SWEEP = {
    "plain": "EW",
    "glf_90": "LambdaMix",
    "glf_98": "LambdaMix",
    "glf_95.5": "LambdaMix",
    "dpl": "GroupRegulariser",
}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(values: list[tuple[int, int]]) -> None:
    frame = pd.DataFrame(values, columns=["x", "y"])
    found = {(int(row.x), int(row.y)) for row in front(frame).itertuples()}
    beaten = {a for a in values for b in values if b != a and b[0] <= a[0] and b[1] >= a[1]}
    assert found == set(values) - beaten
    assert front(frame)["x"].is_monotonic_increasing


def test_sweeps_are_methods_that_differ_in_a_last_number() -> None:
    assert sweeps(list(SWEEP)) == {"glf": ["glf_90", "glf_95.5", "glf_98"]}
    assert sweeps(["gld_1", "gld_2"]) == {}
    assert sweeps(["m 1", "m 10", "m 2", "7"]) == {"m": ["m 1", "m 2", "m 10"]}


def test_a_plot_for_each_attribute(builder: Any) -> None:
    made: Path = builder(methods=SWEEP).write()
    run = read_run(made)
    assert {"EO diff sex", "EO diff race"} <= set(disparities(run))
    figure = pareto_plot(run, "EO diff sex")
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xlabel() == "EO diff sex (lower is better)"
    named = {text.get_text() for text in axes.texts}
    assert "plain" in named <= {"plain", "dpl", "90", "98"}
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"Pareto front", "glf"}
    names = {path.stem for path in write_plots(made)}
    assert {"pareto_EO_diff_sex", "pareto_EO_diff_race"} <= names


@pytest.mark.parametrize("methods", [{"plain": "EW"}, {"plain": "EW", "dpl": "GroupRegulariser"}])
def test_too_few_methods_make_no_front(builder: Any, methods: dict[str, str]) -> None:
    run = read_run(builder(methods=methods).write())
    assert pareto_plot(run, "EO diff sex") is None
    assert pareto_plot(run, "no such column") is None
