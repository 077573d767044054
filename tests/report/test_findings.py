"""What a run's first screen says, of honest runs and of runs made to fool it: the sentence, and nothing starred, green or chosen."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from libmtl_fair.cli import app
from libmtl_fair.report import card_markdown, judged, read_run, summary, summary_table
from libmtl_fair.report.choice import Rule, choose
from libmtl_fair.report.compare import compare
from libmtl_fair.report.findings import findings
from libmtl_fair.report.page import render, render_comparison
from libmtl_fair.report.tables import GAPS, group_sheet, pays_sheets, summary_sheet, task_sheet

METHODS = {"plain": "EW", "relif": "ReLiF"}
Counts = list[int]


@pytest.fixture
def honest(builder: Any) -> Path:
    """Two methods, two yes/no tasks, two groups of each attribute, in which relif lifts the second group."""
    tasks, groups = (
        {"income": "binary", "long_hours": "binary"},
        {"sex": ["Male", "Female"], "race": ["White", "Black"]},
    )
    made: Path = builder(methods=METHODS, tasks=tasks, groups=groups).write()
    return made


def cells_of(run_dir: Path, method: str = "relif") -> dict[str, Any]:
    """Return column -> cell of a method, as the summary has it."""
    frame = summary(read_run(run_dir))
    return {row.column: row for row in frame[frame["method"] == method].itertuples()}


def said(run_dir: Path) -> str:
    return "\n".join(f"{about}. {text}" for about, text in findings(read_run(run_dir)))


def is_praised(run_dir: Path, columns: tuple[str, ...] = ("EO diff", "DP diff"), method: str = "relif") -> bool:
    """Whether any table or page stars or shades a method's gaps, or a choice takes it."""
    run = read_run(run_dir)
    starred = any(c.best or c.gain for name, c in cells_of(run_dir, method).items() if name.startswith(columns))
    sheets = (summary_sheet(run, "", GAPS), *pays_sheets(run))
    lines = [
        line for sheet in sheets for line in sheet.body if any(cell.text.split(" ")[0] == method for cell in line[:4])
    ]
    assert len(lines) > 1
    shaded = any(cell.best or cell.tone == "good" for line in lines for cell in line)
    measures = [c for c in cells_of(run_dir) if c.startswith(columns)][:2]
    chosen = any(method in set(choose(run, Rule([measure], within=100))["method"]) for measure in measures)
    return starred or chosen or (shaded and columns[0] == "EO diff")


def nobody(task: str, attribute: str, group: str, counts: Counts) -> Counts:
    tn, fp, fn, tp = counts
    return [tn + fp, 0, fn + tp, 0]


def everybody(task: str, attribute: str, group: str, counts: Counts) -> Counts:
    tn, fp, fn, tp = counts
    return [0, tn + fp, 0, fn + tp]


def test_an_honest_gain_is_said_with_its_people_its_size_and_its_interval(honest: Path) -> None:
    text = said(honest)
    assert (
        "relif treats groups more alike: the largest gap in how often they rightly or wrongly get a yes falls by sex from"
        in text
    )
    assert re.search(
        r"by sex from 0\.2\d\d to 0\.1\d\d \(95 % interval of the change over 3 seeds: -0\.\d+ to -0\.\d+\)", text
    )
    assert re.search(
        r"in (income|long_hours), (59|60|61)% instead of (49|50|51)% of Female \(sex\) who should get a yes do", text
    )
    assert is_praised(honest)
    assert "3 seeds, all of one split of the people" in text


@pytest.mark.parametrize(
    ("how", "words"), [(nobody, "selects nobody (0.0 %)"), (everybody, "selects everybody (100.0 %)")]
)
def test_equalised_odds_0_of_a_model_that_selects_nobody_or_everybody_is_never_best(
    honest: Path, tamper: Any, how: Callable[..., Counts], words: str
) -> None:
    tamper(honest, "relif", how)
    cells = cells_of(honest)
    assert cells["EO diff sex"].mean == 0
    assert f"relif is no decision to be judged: income {words}; long_hours {words}." in said(honest)
    assert "No method makes groups, or people who are alike, more alike" in said(honest)
    assert not is_praised(honest)
    assert not cells["macro accuracy"].best
    assert {row[1].text for row in task_sheet(read_run(honest)).body if "⚠" in row[3].text} == {"relif"}
    assert {row[4].text for row in group_sheet(read_run(honest), True).body if words in row[8].text} == {"relif"}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary_table(read_run(honest), 200))
    assert "0.000 ± 0.000 ⚠" in console.export_text()
    for page in (
        render(read_run(honest), interactive=False),
        render_comparison(compare([honest])),
        card_markdown(read_run(honest)),
    ):
        assert f"says nothing: income {words}; long_hours {words}" in page
        assert not re.search('class="[a-z ]*good"', page)


def test_a_shrunk_model_gets_no_praise_for_its_bias(honest: Path) -> None:
    for path in honest.glob("relif/seed*/metrics.json"):
        metrics = json.loads(path.read_text())
        for split in ("val", "test"):
            for row in metrics["audit"][split]:
                row["bias"] = 0.09 if row["delta_name"] == "0.275" else 0.13
            metrics["utility"][split]["macro"]["brier"] = 0.2
        path.write_text(json.dumps(metrics))
    assert (
        "Under relif, scores of different tasks lie closer together (Bias), but no closer than drawing all scores of plain"
        in said(honest)
    )
    assert not is_praised(honest, ("Bias@", "VR@"))


def test_of_many_tasks_a_small_group_is_told_for_the_first_four(builder: Any, tamper: Any) -> None:
    groups, tasks = {"race": ["White", "Eskimo"]}, dict.fromkeys("abcdef", "binary")
    made = builder(methods=METHODS, tasks=tasks, groups=groups, deltas={}).write()
    tamper(made, "*", lambda task, attribute, group, counts: [11, 0, 1, 0] if group == "Eskimo" else counts)
    each = "; ".join(f"{task} 1 with a true yes, 11 with a no" for task in "abcd")
    assert f"race = Eskimo (12 people: {each}; so in 2 more tasks)" in said(made)


def test_a_gap_that_rests_on_one_person_in_a_group_of_12_leaves_headlines_and_choices(
    builder: Any, tamper: Any
) -> None:
    groups = {"race": ["White", "Black", "Eskimo"]}
    made = builder(methods=METHODS, tasks={"income": "binary"}, groups=groups, deltas={}).write()

    def one_person(task: str, attribute: str, group: str, counts: Counts) -> Counts:
        return [11, 0, 1, 0] if group == "Eskimo" else counts

    tamper(made, "*", one_person)
    for path in made.glob("relif/seed*/metrics.json"):
        rows = json.loads(path.read_text())["groups"]["test"]
        assert next(r["value"] for r in rows if r["metric"] == "equalized_odds") > 0.6
    assert cells_of(made, "plain")["EO diff race"].mean < 0.22
    assert "race = Eskimo (12 people: income 1 with a true yes, 11 with a no)" in said(made)
    assert "Eskimo" not in {row[1].text for sheet in pays_sheets(read_run(made)) for row in sheet.body}
    assert (choose(read_run(made), Rule(["EO diff race"], within=100))["disparity"] < 0.22).all()


def test_a_levelled_down_model_is_said_and_marked_not_praised(honest: Path, tamper: Any) -> None:
    def down(task: str, attribute: str, group: str, counts: Counts) -> Counts:
        tn, fp, fn, tp = counts
        lost = tp // 5 if group in ("Male", "White") else tp // 12
        return [tn, fp, fn + lost, tp - lost]

    for path in honest.glob("relif/seed*/metrics.json"):
        plain = json.loads((honest / "plain" / path.parent.name / path.name).read_text())
        path.write_text(json.dumps(json.loads(path.read_text()) | {"groups": plain["groups"]}))
    tamper(honest, "relif", down)
    cells = cells_of(honest)
    assert cells["EO diff sex"].difference < 0
    assert cells["EO diff sex"].down == "income, long_hours"
    text = said(honest)
    assert "relif levels down by sex and race: gaps shrink because those who should get a yes get it less often" in text
    assert "56% instead of 70% of Male (sex) who should get a yes do" in text
    assert "nobody's share rises by more than chance" in text
    assert not is_praised(honest)
    page = render(read_run(honest), interactive=False)
    assert "▽" in page
    assert not re.search('class="[a-z ]*good"', page)


def test_who_pays_says_what_the_quickstart_hid(builder: Any, tamper: Any) -> None:
    """Women's TPR of income from .290 to .237 and F1 of long_hours from .400 to .301 under a smaller gap: said, and not green."""
    tasks, groups = {"income": "binary", "long_hours": "binary"}, {"sex": ["Male", "Female"]}
    made = builder(methods=METHODS, tasks=tasks, groups=groups).write()
    tpr = {"plain": {"Male": 0.45, "Female": 0.29}, "relif": {"Male": 0.36, "Female": 0.237}}
    for method in METHODS:

        def rates(task: str, attribute: str, group: str, counts: Counts, method: str = method) -> Counts:
            right = round(1000 * tpr[method][group])
            return [2850, 150, 1000 - right, right]

        tamper(made, method, rates)
        for path in made.glob(f"{method}/seed*/metrics.json"):
            metrics = json.loads(path.read_text())
            metrics["utility"]["test"]["long_hours"]["f1"] = {"plain": 0.4, "relif": 0.301}[method]
            path.write_text(json.dumps(metrics))
    text = said(made)
    assert "levels down by sex" in text
    assert (
        "36% instead of 45% of Male (sex) who should get a yes do; in income, 24% instead of 29% of Female (sex)"
        in text
    )
    assert "F1 of long_hours falls from 0.400 to 0.301" in text
    assert not is_praised(made)
    (sheet,) = pays_sheets(read_run(made))
    cell = next(row[5] for row in sheet.body if [c.text for c in row[:2]] == ["income", "Female"])
    assert (cell.text, cell.small, cell.tone) == ("-0.053 ± 0.039 loses ▼", "0.290 → 0.237", "bad")


def test_both_thresholds_stand_side_by_side(honest: Path, tamper: Any) -> None:
    def as_it_is(task: str, attribute: str, group: str, counts: Counts) -> Counts:
        return counts

    tamper(honest, "*", as_it_is, "groups_base_rate")
    tamper(honest, "*", nobody)
    cells = cells_of(honest)
    assert cells["EO diff sex"].why
    assert not cells["EO diff sex, base rate"].why
    assert cells["EO diff sex, base rate"].gain
    assert "Look at the columns of the base rate, where as many get a yes as should." in said(honest)
    assert "relif treats groups more alike, when as many get a yes as should: the largest gap" in said(honest)
    found = choose(read_run(honest), Rule(["EO diff sex, base rate"], within=5))
    assert set(found["method"]) == {"relif"}


def test_a_gap_that_chance_makes_is_said_to_be_none(builder: Any, tamper: Any) -> None:
    groups = {"sex": ["Male", "Female"], "race": ["Male", "Female"]}
    made = builder(methods=METHODS, tasks={"income": "binary"}, groups=groups, deltas={}).write()

    def alike(task: str, attribute: str, group: str, counts: Counts) -> Counts:
        return [280, 20, 40, 60] if group == "Male" else [282, 18, 43, 57]

    tamper(made, "*", alike)
    tamper(made, "*", alike, "groups_base_rate")
    tamper(made, "*", alike)
    sentence = "the largest gap of plain is not distinguishable from none"
    assert f"Between groups of sex and groups of race {sentence}" in said(made)
    assert f"Between groups of sex and groups of race, when as many get a yes as should, {sentence}" in said(made)
    assert "not distinguishable from none (p = " in render(read_run(made), interactive=False)
    assert judged.p_values(read_run(made))["plain", "sex", "equalized_odds"] > 0.5


def test_counts_averaged_over_seeds_of_one_split_keep_people_and_true_labels(builder: Any, tamper: Any) -> None:
    groups = {"sex": ["Male", "Female"]}
    made = builder(methods=METHODS, tasks={"income": "binary"}, groups=groups, seeds=[0, 1], deltas={}).write()
    tamper(made, "*", lambda *of: [61, 19, 25, 20])
    for path in made.glob("*/seed1/metrics.json"):
        changed = [
            {**row, **_HALF_MORE.get(row["metric"], {})} for row in json.loads(path.read_text())["groups"]["test"]
        ]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"groups": {"test": changed}}))
    for d in judged.decisions(read_run(made)):
        assert (d.mean.sum(axis=1) == 125).all() and (d.mean["fn"] + d.mean["tp"] == 45).all(), d.mean


_HALF_MORE = {"true_positive_rate": {"value": 21 / 45}, "false_positive_rate": {"value": 20 / 80}}


def test_the_first_screen_needs_no_short_names(honest: Path) -> None:
    text = said(honest)
    for short in ("VR", "EO", "DP", "p75", "TPR", "FPR", "δ"):
        assert not re.search(rf"\b{short}\b", text), short
    page = render(read_run(honest), interactive=False)
    first = page[page.index('id="findings"') : page.index('id="run"')]
    for name in ("VR", "EO diff", "DP diff", "TPR", "FPR", "AUC", "Brier", "Bias"):
        assert f"<dt>{name}</dt>" in first
    assert first.count("<svg") == 1
    assert first.count("<table") == 1


def test_page_comparison_card_and_terminal_share_the_sentences(honest: Path) -> None:
    sentences = [text for _, text in findings(read_run(honest))]
    assert 3 <= len(sentences) <= 5
    card = card_markdown(read_run(honest))
    pages = (render(read_run(honest), interactive=False), render_comparison(compare([honest])))
    for text in sentences:
        assert text in card
        assert all(text.replace("'", "&#39;") in page for page in pages)
    done = CliRunner().invoke(app, ["compare", str(honest)])
    assert done.exit_code == 0, done.output
    assert sentences[0] in " ".join(done.output.split())


def test_like_people_treated_more_alike_are_said_and_only_for_sure(honest: Path) -> None:
    for method, value in (("plain", 0.34), ("relif", 0.24)):
        for seed in (0, 1, 2):
            path = honest / method / f"seed{seed}" / "metrics.json"
            row = {"task": "macro", "metric": "inconsistency", "value": value + 0.01 * seed * (method == "relif")}
            path.write_text(json.dumps(json.loads(path.read_text()) | {"consistency": {"test": {"rows": [row]}}}))
    text = said(honest)
    assert (
        "relif treats like people more alike: their ranks are 25.0% instead of 34.0% as far apart as those of any two people"
        in text
    )
    assert re.search(r"95 % interval of the change over 3 seeds: -0\.1\d\d to -0\.08\d", text)


def test_one_seed_has_no_certainty(builder: Any) -> None:
    made = builder(seeds=[0]).write()
    assert "One seed: nothing shows how much of this another seed, or another split, would repeat." in said(made)


@pytest.mark.parametrize(
    "changes", [{"groups": {}}, {"methods": {"plain": "EW"}}, {"tasks": {"hours": "regression"}, "shrinkage": False}]
)
def test_sparse_runs_have_findings_too(builder: Any, changes: dict[str, Any]) -> None:
    text = said(builder(**changes).write())
    assert text.startswith("What was compared. ")
    assert "nan" not in text


def test_steps_of_sequences_are_called_steps(honest: Path) -> None:
    assert "95 % intervals over people." in str(render(read_run(honest)))
    assert " steps" not in said(honest)
    card = json.loads((honest / "data_card.json").read_text())
    card["tasks"]["long_hours"]["kind"] = "binary_sequence"
    (honest / "data_card.json").write_text(json.dumps(card))
    run = read_run(honest)
    units = judged.who_pays(run).drop_duplicates("task").set_index("task")["unit"]
    assert units.to_dict() == {"income": "people", "long_hours": "steps"}
    assert re.search(r"on [\d,]+ people and [\d,]+ steps that no training saw", said(honest))
    page = str(render(run))
    assert "95 % intervals over people or steps" in page
    assert "Of long_hours every labelled step counts, not every person" in page
    for sheet in pays_sheets(run):
        for task, _, n, *_ in sheet.body:
            assert (" steps (" in n.text) == (task.text == "long_hours")
    card["tasks"]["long_hours"]["kind"] = "multiclass_sequence"  # whose intervals draw people anew
    (honest / "data_card.json").write_text(json.dumps(card))
    assert judged.steps_of(read_run(honest), ["long_hours"]) == "people"
