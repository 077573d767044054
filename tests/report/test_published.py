"""A source's numbers beside those of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from libmtl_fair.report import read_run
from libmtl_fair.report.compare import compare
from libmtl_fair.report.page import render, render_comparison

SECTION = """
published:
  source: A paper, table 2
  note: Its preprocessing is not published.
  values:
    relif: {macro AUC: 0.8834, fair_delta_m: -9.08, something else: 1, worst: 0.5, macro: 0.6}
    missing: {macro AUC: 0.5}
"""


def test_published_numbers_stand_beside_ours(run_dir: Path) -> None:
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text() + SECTION)
    found = compare([run_dir])
    table = found.published.set_index(["method", "measure"])
    auc = [item.metrics["utility"]["test"]["macro"]["auc"] for item in read_run(run_dir).of("relif")]
    assert table.loc[("relif", "macro AUC"), "published"] == 0.8834
    assert table.loc[("relif", "worst"), "ours"] != table.loc[("relif", "worst"), "ours"]  # hours has no R2 here
    assert table.loc[("relif", "macro AUC"), "ours"] == pytest.approx(sum(auc) / len(auc))
    # GLF's Delta_m is on another scale than ours: never side by side, also in recipes of earlier versions.
    assert table.loc[("relif", "fair_delta_m"), "published"] == -9.08
    assert table.loc[("relif", "fair_delta_m"), "ours"] != table.loc[("relif", "fair_delta_m"), "ours"]
    assert table.loc[("relif", "something else"), "ours"] != table.loc[("relif", "something else"), "ours"]
    assert ("missing", "macro AUC") not in table.index
    note = next(text for text in found.notes if "A paper, table 2" in text)
    assert "preprocessing is not published" in note
    assert "Not in this run: missing." in note
    page = render_comparison(found)
    assert "Beside published numbers" in page
    assert "Beside published numbers" in render(read_run(run_dir))
    assert "0.8834" in page
    assert len(found.to_dict()["published"]) == 5


def test_worst_and_macro_are_of_the_tasks_fixed_scores(builder: Any) -> None:
    run = read_run(builder(groups={}, history=False, tasks={"one": "binary", "two": "binary"}).write())
    overview = compare([run.path]).overview.set_index("method")
    for method in run.methods:
        held = [item.metrics["utility"]["test"] for item in run.of(method)]
        aucs = [sum(one[task]["auc"] for one in held) / len(held) for task in ("one", "two")]
        assert overview.loc[method, ["worst", "macro"]].tolist() == pytest.approx([min(aucs), sum(aucs) / 2])


def test_without_published_numbers(run_dir: Path) -> None:
    found = compare([run_dir])
    assert found.published.empty
    assert "published" not in found.to_dict()
    assert "Beside published numbers" not in render_comparison(found)
