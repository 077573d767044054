"""A run whose saved predictions were replaced: the numbers read are those of the predictions that are there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from libmtl_fair.errors import CheckpointError
from libmtl_fair.metrics import FixedDeltaAudit, GroupMetrics, counts_from_rows, degenerate, judge, utility
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import read_run, shrinkage_verdict
from libmtl_fair.report.compare import compare
from libmtl_fair.report.notes import notes
from libmtl_fair.report.summary import glf_delta_m, summary

RECIPE = {
    "name": "small",
    "data": {"name": "german", "tasks": ["bad_credit", "owns_home"], "sensitive": ["age", "foreign_worker"]},
    "model": {"hidden": [16]},
    "train": {"epochs": 6, "batch_size": 64},
    "methods": {"plain": {"weighting": "EW"}, "other": {"weighting": "UW"}},
    "metrics": {"n_bootstrap": 20},
    "output": {"report": False},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_recipe(Recipe.from_dict(RECIPE), tmp_path_factory.mktemp("made") / "run", device="cpu")


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def tamper(run_dir, change, method="other", parts=("test",), rescore=True):
    """Replace saved predictions by what ``change`` makes of the plain model's probabilities (task -> [N])."""
    for part in parts:
        plain = Predictions.load(run_dir / "plain" / "seed0" / f"predictions_{part}.parquet")
        path = run_dir / method / "seed0" / f"predictions_{part}.parquet"
        held = Predictions.load(path)
        p = {t: torch.sigmoid(z.double().reshape(-1)) for t, z in plain.outputs.items()}
        logits = {t: torch.logit(change(values).clamp(1e-6, 1 - 1e-6))[:, None] for t, values in p.items()}
        made = replace(held, outputs=logits)
        (made.rescored(made.tasks) if rescore else made).save(path)


def found(run_dir):
    run = read_run(run_dir)
    (item,) = [item for item in run.runs if item.method == "other"]
    return run, item


def of_others_file(run_dir, part="test"):
    held = Predictions.load(run_dir / "other" / "seed0" / f"predictions_{part}.parquet")
    return held.rescored(held.tasks)


CHANGES = {
    "constant": lambda p: torch.full_like(p, 0.2),
    "shrunk": lambda p: 0.3 + 0.5 * (p - 0.3),
    "everybody": lambda p: 0.97 + 0.02 * p,
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("rescore", [True, False])
def test_numbers_are_those_of_the_replaced_predictions(run_dir, kind, rescore):
    tamper(run_dir, CHANGES[kind], rescore=rescore)
    run, item = found(run_dir)
    held = of_others_file(run_dir)
    assert item.again == ("test",)
    want = utility(held)
    assert item.metrics["utility"]["test"]["bad_credit"]["accuracy"] == pytest.approx(want["bad_credit"]["accuracy"])
    audits = run.frame("audit").query("method == 'other'")
    for row in audits.itertuples():
        assert row.bias == pytest.approx(FixedDeltaAudit(row.delta, exact=True).run(held.scores).bias, abs=1e-9)
    table = GroupMetrics(held.tasks, {"age": 2, "foreign_worker": 2}, confidence=None, group_names=held.group_names)
    table = (
        table.update(held.outputs, held.labels, held.groups)
        .compute()
        .query("task == 'bad_credit' and attribute == 'age'")
    )
    rows = run.frame("groups").query("method == 'other' and task == 'bad_credit' and attribute == 'age'")
    np.testing.assert_array_equal(counts_from_rows(rows), counts_from_rows(table))
    assert notes(run)[0].startswith("Measured again: the saved predictions of other, seed 0 (test) are not those")


def test_constant_and_everybody_are_degenerate_at_the_run_s_decisions(run_dir):
    for kind, said in (("constant", "selects nobody (0.0 %)"), ("everybody", "selects everybody (100.0 %)")):
        tamper(run_dir, CHANGES[kind])
        rows = (
            found(run_dir)[0].frame("groups").query("method == 'other' and task == 'bad_credit' and attribute == 'age'")
        )
        counts = counts_from_rows(rows)
        assert judge(counts).value == 0 and degenerate(counts) == said


@pytest.mark.parametrize("centre", [0.1, 0.3, 0.5, 0.9])
def test_lower_bias_of_a_shrunk_plain_model_is_never_certified(run_dir, centre):
    tamper(run_dir, lambda p: centre + 0.7 * (p - centre), parts=("val", "test"))
    run, item = found(run_dir)
    bias = run.frame("audit").groupby(["delta_name", "method"])["bias"].first().unstack()
    assert (bias["other"] < bias["plain"]).all() and item.again == ("val", "test")
    verdict = shrinkage_verdict(run)
    assert len(verdict) == 2 and not verdict["below"].any() and verdict["curve_bias"].notna().all()


def test_the_base_rate_threshold_follows_the_validation_predictions(run_dir):
    old = found(run_dir)[1].metrics["thresholds"]["base_rate"]
    tamper(run_dir, CHANGES["constant"])
    assert found(run_dir)[1].metrics["thresholds"]["base_rate"] == pytest.approx(old, abs=1e-6)
    tamper(run_dir, CHANGES["constant"], parts=("val",))
    # all are tied at .2: nobody of the few who are positive, everybody where most are; halfway to 0 and 1, not at the tie
    beside = {"bad_credit": 0.6, "owns_home": 0.1}
    assert found(run_dir)[1].metrics["thresholds"]["base_rate"] == pytest.approx(beside, abs=1e-6)


def test_changed_reference_moves_its_envelope(run_dir):
    before = shrinkage_verdict(read_run(run_dir))
    tamper(run_dir, lambda p: 0.4 + 0.2 * (p - 0.4), method="plain")
    after = shrinkage_verdict(read_run(run_dir))
    assert (after["curve_bias"] < before["curve_bias"]).all()


def test_untouched_and_older_folders_are_taken_as_they_are(run_dir):
    run, item = found(run_dir)
    raw = json.loads((item.folder / "metrics.json").read_text())
    assert item.metrics == raw and not any(i.again for i in run.runs)
    held = Predictions.load(item.folder / "predictions_test.parquet")
    held.save(item.folder / "predictions_test.parquet")
    assert found(run_dir)[1].metrics["groups"] == raw["groups"]
    tamper(run_dir, CHANGES["constant"])
    del raw["digest"]
    (item.folder / "metrics.json").write_text(json.dumps(raw))
    assert found(run_dir)[1].metrics == raw and not found(run_dir)[1].again
    (item.folder / "predictions_test.parquet").unlink()
    assert not found(run_dir)[1].again


def test_predictions_that_cannot_be_measured_are_an_error(run_dir):
    (run_dir / "other" / "seed0" / "predictions_test.parquet").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not those that metrics.json was measured on"):
        read_run(run_dir)


def test_delta_m_beside_glfs_is_on_its_scale(run_dir):
    rng, gaps, aucs = np.random.default_rng(0), {}, {}
    for item in read_run(run_dir).runs:
        raw = json.loads((item.folder / "metrics.json").read_text())
        for row in raw["groups"]["test"]:
            if row["group"] == "difference":
                row["value"] = rng.uniform(0.05, 0.3)
                gaps.setdefault((row["metric"], row["attribute"], item.method), []).append(row["value"])
        aucs[item.method] = raw["utility"]["test"]["macro"]["auc"]
        (item.folder / "metrics.json").write_text(json.dumps(raw))
    by_hand = 2 * 100 * (aucs["plain"] - aucs["other"]) / aucs["plain"]
    for attribute in ("age", "foreign_worker"):
        for metric in ("equalized_odds_mean", "equal_opportunity", "auc"):
            old, new = (np.mean(gaps[metric, attribute, method]) for method in ("plain", "other"))
            by_hand += 100 * (new - old) / old
    assert glf_delta_m(read_run(run_dir))["other"] == pytest.approx(by_hand / 2)
    found = compare([run_dir]).overview.set_index("method")["glf_delta_m"]
    assert found["plain"] == 0 and found["other"] == pytest.approx(by_hand / 2)


def test_a_constant_model_is_best_in_no_gap(run_dir):
    """Nor in differences of AUC: a model that ranks nobody ranks nobody alike in every group."""
    tamper(run_dir, CHANGES["constant"])
    run, item = found(run_dir)
    cells = summary(run, further=True)
    gaps = cells[(cells["method"] == item.method) & cells["column"].str.contains(" diff ")]
    assert gaps["column"].str.startswith("mean AUC diff").any()
    assert not gaps["best"].any() and (gaps["why"] != "").all()
