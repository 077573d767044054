"""A method chosen on validation data in each seed, and reported as one method more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from libmtl_fair.cli import app
from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.report import read_run
from libmtl_fair.report.choice import Rule, choose, with_choice
from libmtl_fair.report.compare import compare
from libmtl_fair.report.notes import CHOSEN, choice_sentence

AUC = {"plain": 0.90, "relif": 0.896, "fairmt": 0.88}


def write(builder: Any, gaps: dict[str, list[float]], auc: dict[str, float] = AUC) -> Path:
    """A run of three seeds with known AUC, and known equalised odds of sex on validation; those on test are 1 minus them."""
    builds = builder()
    made: Path = builds.write()
    for method, values in gaps.items():
        for seed, gap in enumerate(values):
            path = made / method / f"seed{seed}" / "metrics.json"
            metrics = json.loads(path.read_text())
            for split, value in (("val", gap), ("test", 1 - gap)):
                for task, found in metrics["utility"][split].items():
                    found["auc" if "auc" in found else "rmse"] = auc[method] if split == "val" else 0.5
                    found |= {"accuracy": 0.8} if "accuracy" in found and task != "macro" else {}
                rows = [r for r in metrics["groups"][split] if r["task"] == "hours" or r["attribute"] != "sex"]
                for task in ("income", "<script>alert(1)</script>"):
                    fallen = round(600 * value)
                    counts = {"Male": [2520, 280, 0, 1200], "Female": [1260, 140, fallen, 600 - fallen]}
                    rows += builds.rows(counts, task=task, attribute="sex")
                metrics["groups"][split] = rows
            path.write_text(json.dumps(metrics))
    return made


GAPS = {"plain": [0.3, 0.3, 0.1], "relif": [0.2, 0.4, 0.2], "fairmt": [0.0, 0.0, 0.0]}


def test_the_fairest_that_loses_little_is_taken_in_each_seed(builder: Any) -> None:
    made = choose(read_run(write(builder, GAPS)), Rule(["EO diff sex"], within=0.5))
    assert list(made["method"]) == ["relif", "plain", "plain"]
    assert list(made["disparity"]) == pytest.approx([0.2, 0.3, 0.1])
    assert list(made["reference_disparity"]) == pytest.approx([0.3, 0.3, 0.1])
    assert [*made["refused"]][2] == {"fairmt": "loses 2.00 points of AUC in income"}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(["EO diff sex"], within=2.5), ["fairmt"] * 3),
        (Rule(["EO diff sex"], within=2.5, among=("re*",)), ["relif", "plain", "plain"]),
        (Rule(["EO diff sex"], within=0.3), ["plain"] * 3),
        (Rule(["EO diff sex"], within=0.41), ["relif", "plain", "plain"]),
    ],
)
def test_rules(builder: Any, rule: Rule, expected: list[str]) -> None:
    assert list(choose(read_run(write(builder, GAPS)), rule)["method"]) == expected


def test_a_pooled_rule_takes_one_method_by_means(builder: Any) -> None:
    gaps = {"plain": [0.3, 0.3, 0.1], "relif": [0.2, 0.2, 0.2], "fairmt": [0.0, 0.0, 0.0]}
    run = read_run(write(builder, gaps))
    assert list(choose(run, Rule(["EO diff sex"]))["method"]) == ["relif", "relif", "plain"]
    made = choose(run, Rule(["EO diff sex"], pooled=True))
    assert list(made["method"]) == ["relif"] * 3
    assert list(made["reference_disparity"]) == pytest.approx([0.7 / 3] * 3)
    assert "for all seeds" in choice_sentence(Rule(["EO diff sex"], pooled=True), made)


def test_test_data_has_no_say(builder: Any) -> None:
    run = read_run(write(builder, GAPS))
    for item in run.runs:
        for part in ("utility", "groups"):
            item.metrics[part].pop("test")
    assert list(choose(run, Rule(["EO diff sex"]))["method"]) == ["relif", "plain", "plain"]


def test_the_choice_is_one_method_more(builder: Any) -> None:
    made = write(builder, GAPS)
    run, taken = with_choice(read_run(made), Rule(["EO diff sex"]))
    assert run.methods == ["plain", "relif", "fairmt", CHOSEN]
    assert [item.folder.parent.name for item in run.of(CHOSEN)] == list(taken["method"])
    found = compare([made], rule=Rule(["EO diff sex"]))
    row = found.cells.set_index(["column", "method"]).loc[("EO diff sex", CHOSEN)]
    assert row["mean"] == pytest.approx((0.8 + 0.7 + 0.9) / 3)
    assert row["difference"] == pytest.approx((0.1 + 0 + 0) / 3)
    assert found.notes[0] == choice_sentence(Rule(["EO diff sex"]), taken)
    assert "plain (2 of 3), relif (1 of 3)" in found.notes[0]
    assert [row["method"] for row in found.to_dict()["choice"]] == ["relif", "plain", "plain"]
    assert "choice" not in compare([made]).to_dict()


def test_several_measures_count_by_their_mean(builder: Any) -> None:
    made = write(builder, GAPS)
    both = choose(read_run(made), Rule(["EO diff sex", "EO diff race"], within=100))
    assert (both["disparity"] > 0).all()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(["EO diff sx"]), "unknown measure 'EO diff sx'; did you mean 'EO diff sex'"),
        (Rule(["macro AUC"]), "'macro AUC' is better when higher"),
        (Rule(["EO diff sex"], among=("glf*",)), "no method fits glf"),
    ],
)
def test_rules_that_do_not_fit(builder: Any, rule: Rule, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        choose(read_run(write(builder, GAPS)), rule)


def test_bad_rules(builder: Any) -> None:
    with pytest.raises(RecipeError, match="at least one measure"):
        Rule([])
    with pytest.raises(RecipeError, match="unknown thing to allow 'degenerat'; did you mean 'degenerate'"):
        Rule(["EO diff sex"], allow=("degenerat",))
    for within in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="points of at least 0"):
            Rule(["EO diff sex"], within=within)
    run = read_run(write(builder, GAPS))
    with pytest.raises(RecipeError, match="has a method 'plain' already"):
        with_choice(run, Rule(["EO diff sex"]), "plain")
    for item in run.runs:
        item.metrics["utility"].pop("val")
        item.metrics["groups"].pop("val")
        item.metrics["audit"].pop("val", None)
    with pytest.raises(CheckpointError, match="no validation results"):
        choose(run, Rule(["EO diff sex"]))


def test_on_the_command_line(builder: Any) -> None:
    made = write(builder, GAPS)
    runner = CliRunner()
    done = runner.invoke(app, ["compare", str(made), "--choose", "EO diff sex", "--within", "0.5", "--among", "*"])
    assert done.exit_code == 0, done.output
    assert CHOSEN in done.output
    assert CHOSEN in (made / "comparison.html").read_text(encoding="utf-8")
    wrong = runner.invoke(app, ["compare", str(made), "--among", "re*"])
    assert wrong.exit_code == 2


def everyone(task: str, attribute: str, group: str, counts: list[int]) -> list[int]:
    tn, fp, fn, tp = counts
    return [0, tn + fp, 0, fn + tp]


def test_a_choice_within_half_a_point_does_not_take_a_model_that_passes_everyone(builder: Any, tamper: Any) -> None:
    made = write(builder, {"plain": [0.3] * 3, "relif": [0.2] * 3, "fairmt": [0.0] * 3}, dict.fromkeys(AUC, 0.9))
    tamper(made, "fairmt", everyone)
    rule = Rule(["EO diff sex"], within=0.5)
    found = choose(read_run(made), rule)
    assert list(found["method"]) == ["relif"] * 3
    said = choice_sentence(rule, found)
    assert "Refused, though lower: fairmt (income selects everybody (100.0 %); " in said
    assert said.endswith("3 of 3).")
    allowed = choose(read_run(made), Rule(["EO diff sex"], within=0.5, allow=("degenerate",)))
    assert list(allowed["method"]) == ["fairmt"] * 3


def test_a_choice_that_costs_2_95_points_of_accuracy_does_not_pass(builder: Any) -> None:
    made = write(builder, {"plain": [0.3] * 3, "relif": [0.2] * 3, "fairmt": [0.1] * 3}, dict.fromkeys(AUC, 0.9))
    for path in made.glob("fairmt/seed*/metrics.json"):
        metrics = json.loads(path.read_text())
        metrics["utility"]["val"]["income"]["accuracy"] -= 0.0295
        path.write_text(json.dumps(metrics))
    rule = Rule(["EO diff sex"], within=0.5)
    found = choose(read_run(made), rule)
    assert list(found["method"]) == ["relif"] * 3
    assert "fairmt (loses 2.95 points of accuracy in income; 3 of 3)" in choice_sentence(rule, found)


def test_a_method_that_levels_down_is_refused_unless_told(builder: Any, tamper: Any) -> None:
    made = write(builder, {"plain": [0.3] * 3, "relif": [0.2] * 3, "fairmt": [0.3] * 3}, dict.fromkeys(AUC, 0.9))

    def down(task: str, attribute: str, group: str, counts: list[int]) -> list[int]:
        return [2520, 280, 360, 840] if group == "Male" and attribute == "sex" else counts

    tamper(made, "fairmt", down)
    found = choose(read_run(made), Rule(["EO diff sex"]))
    assert list(found["method"]) == ["relif"] * 3
    assert found["refused"][0] == {"fairmt": "levels down by sex in income, <script>alert(1)</script>"}
    allowed = choose(read_run(made), Rule(["EO diff sex"], allow=("levelling-down",)))
    assert list(allowed["method"]) == ["fairmt"] * 3


def test_a_low_bias_that_shrinking_gives_as_well_is_not_chosen(builder: Any) -> None:
    made = builder().write()
    for path in made.glob("relif/seed*/metrics.json"):
        metrics = json.loads(path.read_text())
        metrics["audit"]["val"][0]["bias"] = 0.095
        path.write_text(json.dumps(metrics))
    found = choose(read_run(made), Rule(["Bias@0.275"], within=5, among=("relif",)))
    assert list(found["method"]) == ["plain"] * 3
    assert set(found["refused"][0].values()) <= {"shrinking the reference gives as low a Bias"}


def test_an_attribute_that_is_nobodys_on_validation_data_judges_no_accuracy(builder: Any) -> None:
    made, nobody = (
        write(builder, GAPS),
        {"value": None, "low": None, "high": None, "flag": "undefined", "attribute": "race"},
    )
    rates = ("true_positive_rate", "false_positive_rate", "selection_rate", "accuracy", "base_rate")
    for path in made.glob("*/seed*/metrics.json"):
        metrics = json.loads(path.read_text())
        kept = [r for r in metrics["groups"]["val"] if r["task"] == "hours" or r["attribute"] != "race"]
        for task in ("income", "<script>alert(1)</script>"):
            kept += [
                {**nobody, "task": task, "metric": m, "group": g, "n": 0} for g in ("White", "Black") for m in rates
            ]
        path.write_text(json.dumps(metrics | {"groups": {**metrics["groups"], "val": kept}}))
    assert list(choose(read_run(made), Rule(["EO diff sex"], within=0.5))["method"]) == ["relif", "plain", "plain"]
