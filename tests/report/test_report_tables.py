from __future__ import annotations

import json
import math
import statistics

import pytest
from rich.console import Console

from libmtl_fair.report import read_run, shrinkage_verdict, summary, summary_table, write_summary
from libmtl_fair.report.notes import notes
from libmtl_fair.report.summary import with_sd
from libmtl_fair.report.tables import audit_sheet, group_sheet, show


def raw(run_dir, method, seed):
    return json.loads((run_dir / method / f"seed{seed}" / "metrics.json").read_text())


def cell(frame, method, column):
    return frame[(frame["method"] == method) & (frame["column"] == column)].iloc[0]


def test_summary_equals_numbers_gathered_by_hand(run_dir):
    frame = summary(read_run(run_dir))
    auc = {m: [raw(run_dir, m, s)["utility"]["test"]["macro"]["auc"] for s in range(3)] for m in ("plain", "relif")}
    found = cell(frame, "relif", "macro AUC")
    assert found["mean"] == pytest.approx(statistics.mean(auc["relif"]), abs=1e-12)
    assert found["sd"] == pytest.approx(statistics.stdev(auc["relif"]), abs=1e-12)
    assert found["n"] == 3
    paired = [b - a for a, b in zip(auc["plain"], auc["relif"])]
    assert found["difference"] == pytest.approx(statistics.mean(paired), abs=1e-12)
    assert math.isnan(cell(frame, "plain", "macro AUC")["difference"])
    bias = [raw(run_dir, "fairmt", s)["audit"]["test"][1]["bias"] for s in range(3)]
    assert cell(frame, "fairmt", "Bias@p75")["mean"] == pytest.approx(statistics.mean(bias), abs=1e-12)


def worst_gap(metrics, attribute):
    """EO difference of the worst binary task, from the rows of groups with 30 people, 10 true yes and 10 true no."""
    rows = [
        r
        for r in metrics["groups"]["test"]
        if r["attribute"] == attribute and r["group"] not in ("difference", "overall")
    ]
    found = []
    for task in {r["task"] for r in rows}:
        rates = {}
        for r in rows:
            if r["task"] == task:
                rates.setdefault(r["metric"], {})[r["group"]] = (r["value"], r["n"])
        if "base_rate" in rates:
            used = [g for g, (b, n) in rates["base_rate"].items() if n >= 30 and b * n >= 9.99 and (1 - b) * n >= 9.99]
            each = [[rates[m][g][0] for g in used] for m in ("true_positive_rate", "false_positive_rate")]
            found.append(max(max(one) - min(one) for one in each))
    return found


def test_one_name_is_one_quantity_eo_diff_is_that_of_the_worst_binary_task(run_dir):
    frame = summary(read_run(run_dir), further=True)
    gaps = [worst_gap(raw(run_dir, "relif", seed), "race") for seed in range(3)]
    assert {len(each) for each in gaps} == {2}
    assert cell(frame, "relif", "EO diff race")["mean"] == pytest.approx(statistics.mean(map(max, gaps)), abs=1e-12)
    mean = statistics.mean(map(statistics.mean, gaps))
    assert cell(frame, "relif", "mean EO diff race")["mean"] == pytest.approx(mean, abs=1e-12)


def test_best_marks_follow_the_direction(run_dir):
    frame = summary(read_run(run_dir))
    assert cell(frame, "plain", "macro AUC")["best"]
    assert cell(frame, "plain", "macro Brier")["best"]
    assert cell(frame, "fairmt", "Bias@0.275")["best"]
    assert not frame[frame["column"] == "KS sex"]["best"].any()
    assert frame.groupby("column")["best"].sum().max() == 1


def test_one_seed_has_no_sd_and_one_method_no_difference(builder):
    run = read_run(builder(seeds=[7], methods={"plain": "EW"}).write())
    frame = summary(run)
    assert frame["sd"].isna().all()
    assert frame["difference"].isna().all()
    assert not frame["best"].any()
    assert "±" not in show(0.5)


def test_regression_only_and_one_attribute(builder):
    run = read_run(builder(tasks={"hours": "regression"}, groups={"sex": ["Male", "Female"]}, shrinkage=False).write())
    assert set(summary(run)["column"]) == {"macro RMSE", "KS sex"}
    assert shrinkage_verdict(run).empty
    table = summary_table(run, width=100)
    assert [str(column.header) for column in table.columns] == ["method", "macro RMSE", "KS sex"]


@pytest.mark.parametrize("width", [None, 60, 400])
def test_console_table_shows_every_number(run_dir, width, tmp_path):
    run = read_run(run_dir)
    with (tmp_path / "out").open("w") as stream:
        console = Console(width=width or 400, record=True, file=stream)
        console.print(summary_table(run, width=width))
    text = console.export_text()
    frame = summary(run)
    for row in frame.itertuples():
        assert f"{row.mean:.3f}" in text
    assert "…" not in text
    assert "* best mean; small: difference to plain" in text


def test_tidy_frames(run_dir):
    run = read_run(run_dir)
    utility = run.frame("utility")
    assert set(utility["task"]) == {"income", "hours", "<script>alert(1)</script>", "macro"}
    assert utility[(utility["task"] == "hours") & (utility["metric"] == "r2")]["value"].isna().all()
    groups = run.frame("groups")
    assert set(groups[groups["flag"] != ""]["group"]) == {"Other & <b>x</b>"}
    means = with_sd(utility, ["method", "task", "metric"], ["value"])
    assert len(means) == len(utility) / 3


def test_shrinkage_verdict(run_dir):
    frame = shrinkage_verdict(read_run(run_dir)).set_index(["method", "delta_name"])
    assert frame.loc[("relif", "0.275"), "below"]
    assert "plain" not in frame.index.get_level_values("method")
    for file in run_dir.glob("relif/seed*/metrics.json"):
        metrics = json.loads(file.read_text())
        metrics["audit"]["test"][0]["bias"] = 0.095
        file.write_text(json.dumps(metrics))
    frame = shrinkage_verdict(read_run(run_dir)).set_index(["method", "delta_name"])
    assert not frame.loc[("relif", "0.275"), "below"]
    assert frame.loc[("relif", "p75"), "below"]


def test_a_run_without_the_envelope_certifies_nothing(run_dir):
    for file in run_dir.glob("plain/seed*/metrics.json"):
        metrics = json.loads(file.read_text())
        for row in metrics["shrinkage"]["test"]:
            del row["bias_slope"], row["brier_slope"]
        file.write_text(json.dumps(metrics))
    run = read_run(run_dir)
    assert not shrinkage_verdict(run)["below"].any()
    assert notes(run)[0].startswith("The run was measured by an earlier version, without the shrinkage envelope")


def test_a_curve_of_other_tasks_is_not_used(run_dir):
    for file in run_dir.glob("plain/seed*/metrics.json"):
        metrics = json.loads(file.read_text())
        for row in metrics["shrinkage"]["test"]:
            row["bias"] *= 2
        file.write_text(json.dumps(metrics))
    run = read_run(run_dir)
    assert shrinkage_verdict(run).empty
    assert (
        notes(run)[0]
        == "The score-shrinkage envelope covers other tasks than the audit, so no method is compared with it."
    )


def test_cells_of_the_sheets_are_numbers_as_a_reader_wants_them(run_dir):
    run = read_run(run_dir)
    rows = {between: [[c.text for c in line] for line in group_sheet(run, between).body] for between in (True, False)}
    values = [
        row["value"]
        for seed in range(3)
        for row in raw(run_dir, "relif", seed)["groups"]["test"]
        if (row["task"], row["attribute"], row["metric"]) == ("income", "sex", "equalized_odds")
    ]
    value, spread = statistics.mean(values), statistics.stdev(values)
    whole = [line for line in rows[True] if line[:5] == ["income", "sex", "equalized odds", "difference", "relif"]]
    assert whole == [
        [*whole[0][:5], f"{value:.3f} ± {spread:.3f}", f"[{value - 0.03:.3f}, {value + 0.03:.3f}]", "9769", ""]
    ]
    small = [line for line in rows[False] if line[3] == "Other & <b>x</b>"]
    assert {tuple(line[-2:]) for line in small} == {("21", "small")}
    audit = [[c.text for c in line] for line in audit_sheet(run).body]
    bias = [raw(run_dir, "relif", s)["audit"]["test"][1]["bias"] for s in range(3)]
    shown = [f"{statistics.mean(bias):.4f} ± {statistics.stdev(bias):.4f}", "yes (3 of 3 seeds)"]
    assert [[line[3], line[-1]] for line in audit if line[:3] == ["p75", "0.2120", "relif"]] == [shown]


def test_summary_file(run_dir):
    content = json.loads(write_summary(run_dir).read_text())
    assert content["reference"] == "plain"
    found = content["methods"]["relif"]["Bias@p75"]
    assert found["mean"] == pytest.approx(cell(summary(read_run(run_dir)), "relif", "Bias@p75")["mean"], abs=1e-15)
    assert not found["higher_is_better"]
    assert content["methods"]["plain"]["macro AUC"]["difference"] is None
