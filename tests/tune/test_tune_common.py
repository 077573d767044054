"""Trials differ in their settings alone: one set of seeds and rows for all, and what is promised is what comes out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from libmtl_fair import tune
from libmtl_fair.errors import FairMTLError, RecipeError
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe import load_recipe
from libmtl_fair.recipe.build import make_dataset
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.tune.objectives import parse_measure, value_of
from libmtl_fair.tune.plan import COMMON, DESCRIBED, Plan
from libmtl_fair.tune.results import best_recipe, hand_back


def rows(data, part):
    return set(getattr(data, part).rows.tolist())


def test_every_trial_and_the_baseline_have_the_same_seeds(small):
    study = tune.tune(small("tune.seeds_per_trial=3"), 3)
    assert [t.user_attrs["seeds"] for t in study.get_trials()] == [[0, 1, 2]] * 3
    assert Plan.make(small("seeds=[4294967295, 7]", "tune.seeds_per_trial=4")).seeds == [4294967295, 7, 8, 9]
    twice = tune.tune(small("tune.enqueue=[relif, relif]"), 6).get_trials()
    assert twice[4].values == twice[5].values == twice[1].values


@pytest.mark.parametrize("change", ["data.subset=900", "data.subset=null"])
def test_with_resplit_no_row_that_chooses_is_one_that_is_reported(small, change):
    recipe = small("data.resplit=true", "tune.seeds_per_trial=2", "seeds=[3, 1, 2]", change)
    plan = Plan.make(recipe)
    assert plan.seeds == [3, 1]
    own = {seed: plan.dataset(seed) for seed in plan.seeds}
    chose, reported = (set().union(*(rows(data, part) for data in own.values())) for part in ("val", "test"))
    assert rows(own[3], "val") != rows(own[1], "val")
    assert rows(own[3], "test") == rows(own[1], "test") == reported
    assert not chose & reported
    for data in own.values():
        parts = [rows(data, part) for part in ("train", "val", "test")]
        assert (
            sum(map(len, parts))
            == len(set().union(*parts))
            == len(set().union(*(rows(own[3], p) for p in data.splits())))
        )
    # the first seed's rows are those that a run of the recipe gives it
    assert rows(own[3], "val") == rows(make_dataset(recipe, 3), "val")


def test_with_resplit_the_recipe_of_a_trial_reports_on_the_same_people_with_any_seed(small):
    study = tune.tune(small("data.resplit=true"), 2)
    baseline, other = study.get_trials()
    recipes = [tune.to_recipe(baseline), tune.to_recipe(other), best_recipe(study, other)]
    parts = [
        (rows(d, "val"), rows(d, "test")) for r in recipes for seed in (*r.seeds, 9) for d in [make_dataset(r, seed)]
    ]
    assert len({frozenset(test) for _, test in parts}) == 1
    assert not any(val & parts[0][1] for val, _ in parts)


def test_a_test_part_that_stays_needs_resplit(small):
    with pytest.raises(RecipeError, match="test_seed keeps the test rows while resplit: true"):
        small("data.test_seed=1")


def test_a_study_made_before_is_refused_in_words(small, tmp_path):
    study = tune.tune(small(), 1, storage=tmp_path / "j.log")
    about = study.user_attrs[DESCRIBED]
    study.set_user_attr(DESCRIBED, {key: value for key, value in about.items() if key != COMMON})
    study.set_user_attr("fingerprint", "another")
    with pytest.raises(RecipeError, match="an earlier version, in which each trial had seeds of its own.*--new-study"):
        tune.tune(small(), 2, storage=tmp_path / "j.log")
    assert tune.tune(small(), 1, storage=tmp_path / "j.log", new_study=True).study_name == "small-2"


def test_where_every_trial_fails_the_error_is_shown(small, cli, recipe_file, tmp_path):
    changes = ["tune.space={target: builtin}", "train.optimizer.lr=1.0e+30"]
    study = tune.tune(small(*changes), 2)
    for ask in (tune.knee, tune.front, tune.select, tune.chosen):
        with pytest.raises(FairMTLError, match="no complete trial yet: 2 of 2 failed; the last: .*finite"):
            ask(study)
    done = cli("tune", recipe_file, "--trials", 2, "--out", tmp_path / "o", *(x for c in changes for x in ("--set", c)))
    assert done.returncode != 0
    assert "finite" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("changes", [[], ["data.resplit=true", "tune.seeds_per_trial=2"], ["audit.delta=[p75]"]])
def test_best_yaml_gives_the_numbers_that_were_promised(small, tmp_path, changes):
    recipe = small("train.epochs=2", "train.select=best", "tune.objectives=[macro_auc, eo_difference, bias]", *changes)
    study = tune.tune(recipe, 5)
    trial = study.get_trials()[4]
    shown = list(map(str, hand_back(study, trial, recipe, tmp_path, "cpu")))
    assert any("trained again, it gives the same numbers" in text for text in shown)
    best = load_recipe(tmp_path / "best.yaml")
    assert list(best.methods) == ["plain", "tuned"]
    assert list(best.seeds) == trial.user_attrs["seeds"]
    run = run_recipe(best, tmp_path / "run", device="cpu")
    assert found_in(run, "tuned", best) == trial.user_attrs["validation"]
    assert found_in(run, "plain", best) == study.get_trials()[0].user_attrs["validation"]
    promised = json.loads((tmp_path / "result.json").read_text())
    assert promised["validation"]["4"] == trial.user_attrs["validation"]
    text = (tmp_path / "best.yaml").read_text()
    assert f"macro_auc {np.mean(trial.user_attrs['validation']['macro_auc']):.6g}" in text


def found_in(run, method, recipe):
    """Each measure of each seed from what the run has written."""
    found = {}
    for seed in recipe.seeds:
        folder = run / method / f"seed{seed}"
        held = json.loads((folder / "metrics.json").read_text())
        kept = Predictions.load(folder / "predictions_val.parquet")
        eo = parse_measure("eo_difference", {t.name: t.kind for t in kept.tasks}, ["sex"], [])
        each = (held["utility"]["val"]["macro"]["auc"], value_of(eo, kept, {}, recipe), held["audit"]["val"][0]["bias"])
        for name, value in zip(("macro_auc", "eo_difference", "bias"), each):
            found.setdefault(name, []).append(value)
    return found


def test_a_chosen_baseline_is_trained_once(small, tmp_path):
    study = tune.tune(small(), 1)
    list(hand_back(study, study.get_trials()[0], small(), tmp_path, "cpu"))
    assert list(load_recipe(tmp_path / "best.yaml").methods) == ["plain"]


def test_a_recipe_that_misses_what_was_promised_says_by_how_much(small, tmp_path):
    study = tune.tune(small(), 2)
    trial = study.get_trials()[1]
    held = trial.user_attrs["validation"]
    changed = {**held, "macro_auc": [held["macro_auc"][0] - 0.01]}
    trial._user_attrs["validation"] = changed
    shown = list(map(str, hand_back(study, trial, small(), tmp_path, "cpu")))
    assert any("misses what the study found on validation data by macro_auc +0.01" in text for text in shown)
    assert "macro_auc +0.01" in (tmp_path / "best.yaml").read_text()
