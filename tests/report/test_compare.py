from __future__ import annotations

import io
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from libmtl_fair.cli import app
from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.report import read_run
from libmtl_fair.report.compare import compare
from libmtl_fair.report.findings import findings
from libmtl_fair.report.notes import gain_verdict
from libmtl_fair.report.page import comparison_table, render_comparison, write_comparison
from libmtl_fair.report.page import render as render_report
from libmtl_fair.report.summary import delta_m, gains, main_metrics, mean_rank


class Tags(HTMLParser):
    """Refuses a page whose elements do not nest; keeps what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name == "src"]
        if tag not in {"meta", "br", "img", "input", "hr", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_differences_are_paired_by_seed(run_dir):
    found = compare([run_dir])
    runs = {(r.method, r.seed): r.metrics["utility"]["test"]["macro"]["auc"] for r in read_run(run_dir).runs}
    values = [runs["relif", s] - runs["plain", s] for s in (0, 1, 2)]
    row = found.cells.set_index(["column", "method"]).loc[("macro AUC", "relif")]
    assert row["difference"] == pytest.approx(np.mean(values))
    assert row["pairs"] == 3
    assert min(values) - 1e-12 <= row["low"] <= row["difference"] <= row["high"] <= max(values) + 1e-12


def test_delta_m_and_mean_rank_by_hand(run_dir):
    run = read_run(run_dir)
    auc = {
        (m, task): np.mean([r.metrics["utility"]["test"][task]["auc"] for r in run.of(m)])
        for m in run.methods
        for task in ("income", "<script>alert(1)</script>")
    }
    tasks = sorted({task for _, task in auc})
    for method in run.methods:
        lost = np.mean([(auc["plain", t] - auc[method, t]) / auc["plain", t] for t in tasks]) * 100
        assert delta_m(run)[method] == pytest.approx(lost)
        rank = np.mean([1 + sum(auc[other, t] > auc[method, t] for other in run.methods) for t in tasks])
        assert mean_rank(run)[method] == pytest.approx(rank)


def test_gains_against_a_single_task_method(finished_run, run_dir):
    assert gains(read_run(run_dir)).empty
    run = read_run(finished_run)
    found = gains(run).set_index(["method", "task"])
    assert set(found.index.get_level_values("method")) == {"relif"}
    names = ("true_positive_rate", "false_positive_rate")

    def values(metrics, task):
        rows = [r for r in metrics["groups"]["test"] if r["task"] == task and r["group"] in ("Female", "Male")]
        tpr, fpr = (abs(np.subtract(*[r["value"] for r in rows if r["metric"] == name])) for name in names)
        return [metrics["utility"]["test"][task]["accuracy"], tpr, tpr + fpr]

    tasks = ("income", "long_hours")
    runs = {m: {item.seed: [values(item.metrics, t) for t in tasks] for item in run.of(m)} for m in run.methods}
    differences = np.array([np.subtract(runs["relif"][s], runs["plain"][s]) for s in run.seeds])  # seed, task, measure
    for t, task in enumerate(tasks):
        row = found.loc[("relif", task)]
        np.testing.assert_allclose(
            row[["knowledge", "ep", "eo"]].to_numpy(float), differences[:, t].mean(0), atol=1e-12
        )
    overall = found.loc[("relif", "mean")]
    each = differences.mean(1)
    np.testing.assert_allclose(overall[["knowledge", "ep", "eo"]].to_numpy(float), each.mean(0), atol=1e-12)
    sd = overall[["knowledge_sd", "ep_sd", "eo_sd"]].to_numpy(float)
    np.testing.assert_allclose(sd, each.std(0, ddof=1), atol=1e-12)
    html = render_report(run, interactive=False)
    assert "Against plain (each task alone)" in html
    assert gain_verdict(gains(run)) in html


def test_the_verdict_says_where_training_together_does_not_gain():
    table = {"knowledge": [0.1, 0.0, -0.1, 0.2], "ep": [-0.1, 0.0, -0.1, 0.1], "eo": [-0.1, 0.0, 0.1, -0.1]}
    found = pd.DataFrame({"method": ["a", "b", "c", "d"], "task": "mean"} | table)
    assert gain_verdict(found) == (
        "Mean knowledge gain at least 0 and mean discrimination gain at most 0: a, b. "
        "Short of it (in what): c (knowledge, EO); d (EP)."
    )


def test_gains_of_a_multiclass_task_are_the_mean_over_classes(finished_run):
    run = read_run(finished_run)
    for item in run.runs:
        rows = item.metrics["groups"]["test"]
        for row in [r for r in rows if r["task"] == "income" and r["metric"] in ("true_positive_rate", "accuracy")]:
            row["metric"] += "[yes]"
            rows.append(row | {"metric": row["metric"].replace("yes", "no"), "value": 0.5})
    found = gains(run).set_index(["method", "task"])
    halves = gains(read_run(finished_run)).set_index(["method", "task"])["ep"] / 2
    assert found.loc[("relif", "income"), "ep"] == pytest.approx(halves.loc[("relif", "income")])


def test_drift_ranks_and_budgets(finished_run):
    found = compare([finished_run])
    frame = found.drift.set_index(["delta_name", "method"])
    assert set(frame["seeds"]) == {2}
    induced = [np.array(r.metrics["drift"]["test"]["induced"])[np.triu_indices(2, 1)] for r in found.run.of("relif")]
    assert frame.loc[("0.275", "relif"), "budget"] == pytest.approx(
        np.mean([np.abs(d - 0.275).mean() for d in induced])
    )
    apart = abs(frame.loc[("0.275", "relif"), "fixed_bias"] - frame.loc[("0.275", "plain"), "fixed_bias"])
    both = frame.loc[("0.275", "relif"), "budget"] + frame.loc[("0.275", "plain"), "budget"]
    assert frame.loc[("0.275", "relif"), "robust"] == (apart > both)


def test_without_predictions_there_is_no_drift_and_a_note_says_so(run_dir):
    found = compare([run_dir])
    assert found.drift.empty
    assert any("No drift diagnostics" in note for note in found.notes)


def test_several_runs_get_one_yardstick(finished_run, tmp_path):
    other = shutil.copytree(finished_run, tmp_path / "other")
    protocol = json.loads((other / "audit_protocol.json").read_text())
    protocol["deltas"]["p75"] = 0.9
    (other / "audit_protocol.json").write_text(json.dumps(protocol))
    recipe = (other / "recipe.yaml").read_text().replace("name: tiny", "name: other")
    (other / "recipe.yaml").write_text(recipe)
    found = compare([finished_run, other])
    assert found.run.methods == ["tiny/plain", "tiny/relif", "other/plain", "other/relif"]
    assert found.run.reference == "tiny/plain"
    cells = found.cells.set_index(["column", "method"])["mean"]
    assert cells["Bias@p75", "tiny/relif"] == pytest.approx(cells["Bias@p75", "other/relif"], abs=1e-12)
    page, data = write_comparison(found, tmp_path / "page")
    Tags(page.read_text(encoding="utf-8"))
    assert json.loads(data.read_text())["reference"] == "tiny/plain"


def test_the_page_is_self_contained_and_escapes_names(run_dir):
    text = render_comparison(compare([run_dir]))
    page = Tags(text)
    assert page.sources == []
    assert "<script>alert(1)</script>" not in text
    assert "upper left is better" in text
    assert "Ranks and Δm" in text


def test_the_table_has_every_measure_and_interval(run_dir):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(comparison_table(compare([run_dir])))
    text = console.export_text()
    assert "macro AUC" in text
    assert "difference to plain" in text
    assert text.count("[") >= 6


def test_a_method_may_lack_a_measure(builder):
    made = builder(seeds=[0]).write()
    path = made / "relif" / "seed0" / "metrics.json"
    metrics = json.loads(path.read_text())
    del metrics["utility"]["test"]["macro"]["brier"]
    path.write_text(json.dumps(metrics))
    found = compare([made])
    assert pd.isna(found.cells["low"]).all()
    assert any("One seed: nothing shows how much of this" in text for _, text in findings(found.run))


def test_errors(run_dir, tmp_path):
    with pytest.raises(RecipeError, match="at least one run folder"):
        compare([])
    with pytest.raises(CheckpointError, match="no such directory"):
        compare([run_dir, tmp_path / "absent"])
    (run_dir / "relif" / "seed1" / "metrics.json").unlink()
    with pytest.raises(CheckpointError, match="incomplete: missing relif/seed1"):
        compare([run_dir])


def test_the_command(run_dir, tmp_path):
    done = CliRunner().invoke(app, ["compare", str(run_dir), "--out", str(tmp_path / "page")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "page" / "comparison.html").stat().st_size > 10_000
    wrong = CliRunner().invoke(app, ["compare", str(tmp_path / "absent")])
    assert wrong.exit_code == 2
    assert "no such directory" in wrong.output


def test_delta_m_and_ranks_with_differences_between_groups_by_hand(run_dir):
    run = read_run(run_dir)
    values = {}
    for item in run.runs:
        rates = {}
        for row in item.metrics["groups"]["test"]:
            if row["group"] != "difference" and row["n"] >= 30:
                rates.setdefault((row["attribute"], row["task"], row["metric"]), []).append(row["value"])
        gap = {key: max(each) - min(each) for key, each in rates.items()}
        for attribute, task, metric in gap:
            at = (attribute, task)
            both = [gap.get((*at, f"{kind}_positive_rate")) for kind in ("true", "false")]
            found = {"mae": {"mae": gap[*at, metric]}}
            if None not in both:
                found["true_positive_rate"] = {"eo": max(both), "eop": both[0]}
            for name, value in found.get(metric, {}).items():
                values.setdefault((item.method, name, attribute), {}).setdefault(item.seed, []).append(value)
    mean = {key: np.mean([np.mean(v) for v in seeds.values()]) for key, seeds in values.items()}
    assert {key[1] for key in mean} == {"eo", "eop", "mae"}
    base = delta_m(run)
    tasks = main_metrics(run)["task"].nunique()
    for method in run.methods:
        changes = [(mean[key] - mean["plain", *key[1:]]) / mean["plain", *key[1:]] for key in mean if key[0] == method]
        expected = (base[method] * tasks + 100 * sum(changes)) / (tasks + len(changes))
        assert delta_m(run, fair=True)[method] == pytest.approx(expected)
    overview = compare([run_dir]).overview.set_index("method")
    assert overview.loc["relif", "fair_delta_m"] == pytest.approx(delta_m(run, fair=True)["relif"])
    assert overview["fair_rank"].between(1, len(run.methods)).all()
