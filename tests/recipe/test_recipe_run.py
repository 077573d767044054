"""Running recipes from Python: protocol, single-task methods, partial labels, mixed kinds of task."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.metrics import FixedDeltaAudit, base_rate_thresholds
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.build import keep_labels, make_dataset, utility_of
from libmtl_fair.recipe.measure import Protocol
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import read_run, shrinkage_verdict
from libmtl_fair.report.notes import notes
from libmtl_fair.report.protocol import checklist
from libmtl_fair.tasks import Regression


def recipe(**changes):
    content = {
        "name": "small",
        "data": {"name": "german", "tasks": ["bad_credit", "owns_home"], "sensitive": ["age"]},
        "model": {"hidden": [8]},
        "train": {"epochs": 2, "batch_size": 128},
        "methods": {"plain": {"weighting": "EW"}},
        "metrics": {"n_bootstrap": 20},
        "output": {"report": False},
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) and key != "methods" else value
    return Recipe.from_dict(content)


def numbers(out, method, seed=0):
    return json.loads((out / method / f"seed{seed}" / "metrics.json").read_text())


def test_metrics_agree_with_the_saved_predictions(tmp_path):
    out = run_recipe(recipe(), tmp_path / "run", device="cpu")
    found, saved = numbers(out, "plain"), Predictions.load(out / "plain" / "seed0" / "predictions_test.parquet")
    for entry in found["audit"]["test"]:
        report = FixedDeltaAudit(entry["delta"], exact=True).run(saved.scores)
        assert entry["bias"] == pytest.approx(report.bias, abs=1e-12)
    label, score = saved.labels["bad_credit"].double(), saved.scores["bad_credit"].double()
    assert found["utility"]["test"]["bad_credit"]["brier"] == pytest.approx(
        ((score - label) ** 2).mean().item(), abs=1e-7
    )


def test_base_rate_decisions_use_validation_and_never_test_labels(tmp_path):
    out = run_recipe(recipe(metrics={"threshold": "base_rate"}), tmp_path / "run", device="cpu")
    found, folder = numbers(out, "plain"), out / "plain" / "seed0"
    held = {part: Predictions.load(folder / f"predictions_{part}.parquet") for part in ("val", "test")}
    thresholds = found["thresholds"]["base_rate"]
    assert thresholds == pytest.approx(base_rate_thresholds(held["val"]), abs=1e-6)
    assert found["utility"] == found["utility_base_rate"] and found["groups"] == found["groups_base_rate"]
    for name, threshold in thresholds.items():
        p, y = torch.sigmoid(held["test"].outputs[name].ravel()), held["test"].labels[name]
        assert found["utility"]["test"][name]["accuracy"] == pytest.approx(
            ((p > threshold) == (y > 0.5)).double().mean()
        )
        frame = (
            read_run(out).frame("groups_base_rate").query("task == @name and group == 'overall' and attribute == 'age'")
        )
        shown = frame.set_index("metric")["value"]
        assert shown["accuracy"] == pytest.approx(found["utility"]["test"][name]["accuracy"])
    half = run_recipe(recipe(), tmp_path / "half", device="cpu")
    assert numbers(half, "plain")["utility_base_rate"] == found["utility"]
    assert numbers(half, "plain")["utility"] != found["utility"]
    assert set(read_run(half).frame("utility_base_rate")["task"]) == {"bad_credit", "owns_home", "macro"}


def test_embeddings_are_those_of_the_audit_pool(tmp_path):
    out = run_recipe(recipe(audit={"pool_size": 50}), tmp_path / "run", device="cpu")
    with np.load(out / "plain" / "seed0" / "embeddings.npz", allow_pickle=False) as held:
        assert held["val/rows"].shape == (50,)
        assert held["val/h"].shape == (50, 8)


def test_single_task_models_are_reported_as_one_method(tmp_path):
    methods = {"plain": {"weighting": "EW"}, "alone": {"weighting": "EW", "single_task": True}}
    out = run_recipe(recipe(methods=methods), tmp_path / "run", device="cpu")
    found = numbers(out, "alone")
    assert set(found["utility"]["test"]) == {"bad_credit", "owns_home", "macro"}
    assert found["utility"]["test"]["macro"]["auc"] != numbers(out, "plain")["utility"]["test"]["macro"]["auc"]


@pytest.mark.parametrize("resplit", [False, True])
def test_regression_scores_are_frozen_to_each_seeds_reference_model(tmp_path, resplit):
    tasks = ["bad_credit", "log_amount", "job"]
    methods = {"plain": {"weighting": "EW"}, "other": {"weighting": "UW"}, "offsets": {"post": "offsets"}}
    out = run_recipe(
        recipe(data={"tasks": tasks, "resplit": resplit}, methods=methods, seeds=[0, 1]), tmp_path / "run", device="cpu"
    )
    protocol = json.loads((out / "audit_protocol.json").read_text())
    by_seed, first = protocol["score_ranges_by_seed"], protocol["score_ranges"]
    assert set(by_seed) == {"0", "1"} and by_seed["0"] == first and by_seed["1"] != first
    for seed, ranges in by_seed.items():
        reference = Predictions.load(out / "plain" / f"seed{seed}" / "predictions_val.parquet")
        low, high = np.quantile(reference.outputs["log_amount"].numpy().ravel(), [0.1, 0.9])
        assert ranges["log_amount"] == pytest.approx([low, high], abs=1e-6)
        for method in methods:
            held = Predictions.load(out / method / f"seed{seed}" / "predictions_test.parquet")
            task = held.task("log_amount")
            assert task.score_range == pytest.approx(tuple(ranges["log_amount"]))
            torch.testing.assert_close(held.scores["log_amount"], task.score(held.outputs["log_amount"]))
    assert (
        read_run(out).frame("shrinkage")["a"].eq(1).sum() == 4
    )  # tasks of any kind, both tolerances, a reference a seed
    verdict = shrinkage_verdict(read_run(out))
    assert set(verdict["method"]) == {"other", "offsets"} and verdict["curve_bias"].notna().all()
    told = dict(checklist(read_run(out)))["Score of each task"]
    assert f"each seed's reference: seed 0: log_amount: {first['log_amount'][0]:.6g}" in told


def test_a_run_of_before_goes_on_with_the_ranges_of_its_first_seed(tmp_path):
    """A folder whose protocol holds one range for all seeds keeps it, so that its methods stay comparable."""
    methods = {"plain": {"weighting": "EW"}, "relif": {"weighting": "ReLiF"}}
    made = recipe(data={"tasks": ["bad_credit", "log_amount"]}, methods=methods, seeds=[0, 1])
    out = run_recipe(made, tmp_path / "run", device="cpu")
    protocol = json.loads((out / "audit_protocol.json").read_text())
    del protocol["score_ranges_by_seed"]
    (out / "audit_protocol.json").write_text(json.dumps(protocol))
    (out / "audit_protocol.json.sha256").unlink()  # runs of before had none
    for folder in (out / "plain" / "seed1", out / "relif" / "seed1"):
        (folder / "metrics.json").unlink()
    run_recipe(made, out, device="cpu", resume=True)
    assert json.loads((out / "audit_protocol.json").read_text()) == protocol
    for folder in (out / "plain" / "seed1", out / "relif" / "seed1"):
        task = Predictions.load(folder / "predictions_test.parquet").task("log_amount")
        assert task.score_range == pytest.approx(tuple(protocol["score_ranges"]["log_amount"]))


def test_protocol_survives_its_file():
    ranges = {"hours": (-1.0, 1.5)}
    old = Protocol({"0.275": 0.275}, ranges, {"reference_model": "plain"})
    new = Protocol({"0.275": 0.275}, ranges, {"reference_model": "plain"}, {0: ranges, 3: {"hours": (0.0, 1.0)}})
    for protocol in (old, new):
        assert Protocol.from_dict(json.loads(json.dumps(protocol.to_dict()))) == protocol
    assert (
        new.lacks("plain", 1) and not new.lacks("plain", 3) and not new.lacks("other", 1) and not old.lacks("plain", 1)
    )
    assert [new.freeze((Regression("hours"),), seed)[0].score_range for seed in (3, 7)] == [(0.0, 1.0), (-1.0, 1.5)]


def test_label_fraction_hides_training_labels_only():
    data = make_dataset(recipe(), 0)
    part = keep_labels(data, 0.3, seed=1)
    kept = torch.isfinite(part.train.labels["bad_credit"]).double().mean().item()
    assert 0.2 < kept < 0.4
    assert torch.isfinite(part.val.labels["bad_credit"]).all()
    assert torch.isfinite(data.train.labels["bad_credit"]).all()
    again = keep_labels(data, 0.3, seed=1)
    assert torch.equal(torch.isnan(part.train.labels["bad_credit"]), torch.isnan(again.train.labels["bad_credit"]))


def test_resplit_gives_each_seed_its_own_rows():
    resplit = recipe(data={"resplit": True}, seeds=[0, 1])
    assert not torch.equal(make_dataset(resplit, 0).test.rows, make_dataset(resplit, 1).test.rows)
    assert torch.equal(make_dataset(recipe(), 0).test.rows, make_dataset(recipe(), 1).test.rows)


def test_an_epoch_is_judged_by_what_is_defined():
    data = make_dataset(recipe(), 0)
    judge = utility_of({t.name: t for t in data.tasks})
    results = {"bad_credit": {"AUC": 0.8, "Acc": 0.5}, "owns_home": {"AUC": float("nan"), "Acc": 0.5}}
    assert judge(results) == pytest.approx(0.8)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not empty and holds no run"):
        run_recipe(recipe(), tmp_path, device="cpu")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_bad_setting_is_found_before_training(tmp_path):
    bad = recipe(methods={"plain": {"weighting": "EW"}, "relif": {"weighting": "ReLiF", "lambda_0": 99.0}})
    with pytest.raises(RecipeError, match="lambda_0 must be between"):
        run_recipe(bad, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_same_recipe_gives_the_same_numbers(tmp_path):
    methods = {"plain": {"weighting": "EW"}, "relif": {"weighting": "ReLiF"}}
    first = run_recipe(recipe(methods=methods), tmp_path / "a", device="cpu")
    second = run_recipe(recipe(methods=methods), tmp_path / "b", device="cpu")
    for method in methods:
        one, two = numbers(first, method), numbers(second, method)
        one.pop("timing"), two.pop("timing")
        assert one == two


def test_what_came_of_a_constraint_is_kept_on_training_and_validation_decisions(tmp_path):
    fair = {"weighting": "FairMT", "constraint": "eo <= 0.05", "train": {"epochs": 6, "batch_size": 32}}
    asked = recipe(methods={"plain": {"weighting": "EW"}, "fair": fair})
    out = run_recipe(asked, tmp_path / "run", device="cpu")
    assert "constraint" not in numbers(out, "plain")
    rows = numbers(out, "fair")["constraint"]
    assert [(row["task"], row["attribute"], row["target"]) for row in rows] == [
        (task, "age", "eo <= 0.05") for task in ("bad_credit", "owns_home") for _ in ("half", "base_rate")
    ]
    for row in rows:
        for part in ("train", "val"):
            assert row[f"{part}_met"] == (row[part] <= row["tolerance"] + row[f"{part}_error"])
    # a run that was trained and not measured is measured from its checkpoint
    folder = out / "fair" / "seed0"
    (folder / "checkpoint.pt").rename(folder / "last.pt")
    (folder / "metrics.json").unlink()
    again = run_recipe(asked, out, device="cpu", resume=True)
    assert numbers(again, "fair")["constraint"] == rows
    assert read_run(out).frame("constraint")["target"].tolist() == ["eo <= 0.05"] * 4
    said = [note for note in notes(read_run(out)) if "eo <= 0.05 was asked" in note]
    assert len(said) == 4 and all(" of 1 seeds" in note for note in said)


def test_a_constraint_that_is_none_names_the_place(tmp_path):
    methods = {"plain": {"weighting": "EW"}, "fair": {"weighting": "FairMT", "target": "eo < tiny"}}
    with pytest.raises(RecipeError, match="is no constraint: write"):
        run_recipe(recipe(methods=methods), tmp_path / "run", device="cpu")
