"""The first screen: three findings, one figure, one table with its names; short however many methods there are. Its page in a browser."""

from __future__ import annotations

import importlib.util
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from libmtl_fair.report import read_run
from libmtl_fair.report.compare import compare
from libmtl_fair.report.findings import findings, headline
from libmtl_fair.report.page import render, write_comparison
from libmtl_fair.report.plots import first_plots, trace_plot
from libmtl_fair.report.tables import glance_sheet, summary_sheet

TASKS = {"income": "binary", "long_hours": "binary"}
GROUPS = {"sex": ["Male", "Female"]}
CHECK = Path(__file__).resolve().parents[2] / "docs" / "check_pages.py"


def nobody(task: str, attribute: str, group: str, counts: list[int]) -> list[int]:
    tn, fp, fn, tp = counts
    return [tn + fp, 0, fn + tp, 0]


@pytest.fixture
def honest(builder: Any) -> Path:
    made: Path = builder(methods={"plain": "EW", "relif": "ReLiF"}, tasks=TASKS, groups=GROUPS).write()
    return made


@pytest.fixture
def crowded(builder: Any, tamper: Any) -> Path:
    """Twelve methods beside plain; all but the first of them select nobody."""
    methods = {"plain": "EW", "relif": "ReLiF"} | {f"strong_{letter}": "ReLiF" for letter in "abcdefghijk"}
    made: Path = builder(methods=methods, tasks=TASKS, groups=GROUPS).write()
    for method in [*methods][2:]:
        tamper(made, method, nobody)
    return made


def test_three_findings_of_an_honest_gain(honest: Path) -> None:
    found = dict(headline(read_run(honest)))
    assert list(found) == ["Compared", "Improved", "Cost"]
    assert found["Compared"].startswith("relif with plain, the reference, in 2 tasks")
    assert re.search(
        r"relif treats groups more alike.*from 0\.\d+ to 0\.\d+ \(95 % interval of the change", found["Improved"]
    )
    assert "of Female (sex) who should get a yes do" in found["Improved"]
    assert found["Cost"] in dict(findings(read_run(honest)))["What it cost"] or found["Cost"].startswith(
        "Under relif no group"
    )


def test_many_degenerate_methods_leave_the_first_screen_short(crowded: Path) -> None:
    run = read_run(crowded)
    cost = dict(headline(run))["Cost"]
    assert len(run.methods) == 13
    assert sum(len(text) for _, text in headline(run)) < 1000
    assert "strong_a, strong_b, strong_c and 8 more give the same answer for (nearly) all in some task" in cost
    glance = glance_sheet(run)
    assert glance is not None
    assert [row[0].text for row in glance.body] == ["plain", "relif"]
    assert "Left out, because no gap of theirs says anything (⚠): strong_a, strong_b" in glance.note
    full = summary_sheet(run, "", ("EO diff",))
    assert full is not None
    assert len(full.body) == 13  # nothing is hidden further down
    figure = next(first_plots(run)).figure
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["relif"]


def test_nothing_gained_is_said_first(honest: Path, tamper: Any) -> None:
    tamper(honest, "relif", nobody)
    found = dict(headline(read_run(honest)))
    assert found["Improved"].startswith("No method makes groups")
    assert "relif gives the same answer for (nearly) all in some task" in found["Cost"]


class Page(HTMLParser):
    """What a reader without eyes finds: levels of headings, and pictures without words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.levels: list[int] = []
        self.mute: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        picture = tag in ("svg", "img") or "plot" in (given.get("class") or "").split()
        if picture and not (given.get("aria-label") or given.get("alt")):
            self.mute.append(tag)


@pytest.mark.parametrize("interactive", [False, True])
def test_headings_are_in_order_and_every_picture_has_words(crowded: Path, interactive: bool) -> None:
    text = re.sub(r"<script.*?</script>", "", render(read_run(crowded), interactive=interactive), flags=re.DOTALL)
    page = Page(text)
    assert page.levels[:2] == [1, 2]
    assert all(after - before <= 1 for before, after in zip(page.levels, page.levels[1:]))
    assert not page.mute
    parts = ("Compared.", "At a glance", "Names in this table", "<h2>In more words")
    assert sorted(map(text.index, parts)) == [*map(text.index, parts)]


def test_a_multiplier_is_read_off_its_axis() -> None:
    step = np.arange(100)
    for values, scale in (
        (np.full(100, 0.05), "linear"),
        (np.geomspace(0.01, 10, 100), "log"),
        (0.5 + step / 1e3, "linear"),
    ):
        figure = trace_plot({"seed 0": pd.DataFrame({"step": step, "lambda": values})}, {"lambda": "λ"})
        assert figure is not None
        figure.canvas.draw()
        (axes,) = figure.axes
        assert axes.get_yscale() == scale
        assert axes.yaxis.get_offset_text().get_text() == ""
        if np.ptp(values) == 0:
            assert axes.get_ylim() == (0, 0.1)  # no zoom into rounding


def test_no_grave_fault_in_a_browser(honest: Path) -> None:
    spec = importlib.util.spec_from_file_location("check_pages", CHECK)
    assert spec is not None
    assert spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    axe, browser = os.environ.get("LIBMTL_FAIR_AXE"), check.chromium()
    if browser is None or not axe:
        pytest.skip("needs chromium, and axe-core at LIBMTL_FAIR_AXE (npm install axe-core)")
    run = read_run(honest)
    report = honest / "report.html"
    report.write_text(render(run), encoding="utf-8")
    comparison, _ = write_comparison(compare([honest]), honest)
    assert check.main(["--axe", axe, "--views", "desk", "--", str(report), str(comparison)]) == 0
    broken = honest / "broken.html"
    broken.write_text(report.read_text(encoding="utf-8").replace("<h2>", '<img src="x.png"><h2>', 1), encoding="utf-8")
    assert check.main(["--axe", axe, "--views", "desk", "--", str(broken)]) == 1
