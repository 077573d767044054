"""The tune command, end to end, in processes of its own."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from ruamel.yaml import YAML

from libmtl_fair.errors import RecipeError
from libmtl_fair.recipe import load_recipe
from libmtl_fair.tune.storage import load_study


def test_tune_from_a_question_to_a_recipe_and_back(cli, recipe_file, tmp_path):
    out = tmp_path / "out"
    done = cli("tune", recipe_file, "--trials", 5, "--out", out, "--select", "max_disparity=0.1")
    assert done.returncode == 0, done.stderr
    assert "Pareto front (validation)" in done.stdout
    assert "baseline" in done.stdout
    assert "test" in done.stdout
    assert done.stderr == ""
    result = json.loads((out / "result.json").read_text())
    assert result["states"]["complete"] == 5
    recipe = load_recipe(out / "best.yaml")
    assert list(recipe.methods) == ["plain", "tuned"]
    assert recipe.name == f"small-trial{result['chosen']}"
    page = (out / "study.html").read_text()
    assert "Front on validation data" in page
    assert len(pd.read_csv(out / "trials.csv")) == 5
    _resumes(cli, recipe_file, out)
    _refuses(cli, recipe_file, out)
    _retrains(cli, out, tmp_path)


def _resumes(cli, recipe_file, out):
    done = cli("tune", recipe_file, "--trials", 7, "--out", out, "--select", "knee")
    assert done.returncode == 0, done.stderr
    study = load_study(str(out / "study.journal"), None)
    assert [t.state.name for t in study.get_trials()] == ["COMPLETE"] * 7
    done = cli("tune", recipe_file, "--trials", 7, "--out", out, "--select", "3")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "result.json").read_text())["chosen"] == 3
    assert len(load_study(str(out / "study.journal"), None).get_trials()) == 7


def _refuses(cli, recipe_file, out):
    done = cli("tune", recipe_file, "--trials", 7, "--out", out, "--set", "train.batch_size=128")
    assert done.returncode == 2
    assert "recipe.train.batch_size: 256 -> 128" in done.stderr
    done = cli("tune", recipe_file, "--trials", 1, "--out", out, "--set", "train.batch_size=128", "--new-study")
    assert done.returncode == 0, done.stderr


def _retrains(cli, out, tmp_path):
    journal = out / "study.journal"
    with pytest.raises(RecipeError, match="name one with --study: small, small-2"):
        load_study(str(journal), None)
    done = cli("run", "--from-study", journal, "--study", "small", "--trial", 4, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "validation and test agree?" in done.stdout
    held = YAML(typ="safe").load((tmp_path / "run" / "recipe.yaml").read_text())
    trial = load_study(str(journal), "small").get_trials()[4]
    assert held["methods"]["tuned"]["target"] == pytest.approx(trial.params["target"])
    assert held["seeds"] == [0, 1]
    assert (tmp_path / "run" / "tuned" / "seed1" / "metrics.json").exists()


def test_run_says_what_it_expects(cli, recipe_file):
    done = cli("run", recipe_file, "--trial", 1)
    assert done.returncode == 2
    assert "run expects either a RECIPE, or --from-study STORAGE --trial N" in done.stderr
    with pytest.raises(RecipeError, match="there is no study file"):
        load_study("no.journal", None)


def test_a_storage_that_cannot_be_written_is_a_clear_error(cli, recipe_file, tmp_path):
    (tmp_path / "file").write_text("")
    done = cli("tune", recipe_file, "--out", tmp_path / "o", "--storage", tmp_path / "file" / "j.log")
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "cannot use the study in" in done.stderr


def test_what_cannot_be_stacked_is_said_once(cli, recipe_file, tmp_path):
    changes = ["--set", "methods.relif={weighting: GradNorm}", "--set", "tune.space={lr: builtin}"]
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        done = cli("tune", recipe_file, *changes, "--stacked", 2, "--trials", 4, "--workers", workers, "--out", out)
        assert done.returncode == 0, done.stderr
        assert 1 <= done.stderr.count("is trained alone: weighting GradNorm (stacked: an MLP") <= workers
