"""The JSON schema of recipes: shipped as generated, takes every recipe of ours, marks what the recipe refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from libmtl_fair.cli import app
from libmtl_fair.recipe import load_recipe
from libmtl_fair.recipe.json_schema import as_text, recipe_schema, shipped_schema, with_settings
from libmtl_fair.recipe.yaml_source import read_yaml

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").rglob("*.yaml"))


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    return jsonschema.Draft202012Validator(json.loads(shipped_schema()))


def test_the_shipped_file_is_what_the_code_generates():
    assert shipped_schema() == as_text(recipe_schema()), "run python -m libmtl_fair.recipe.json_schema"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits(validator, path):
    assert [error.message for error in validator.iter_errors(read_yaml(path).data)] == []
    complete = json.loads(json.dumps(load_recipe(path).to_dict()))
    assert [error.message for error in validator.iter_errors(complete)] == []


def test_an_editor_is_told_each_weightings_settings():
    wide = with_settings(json.loads(shipped_schema()))
    jsonschema.Draft202012Validator.check_schema(wide)
    cases = wide["$defs"]["Method"]["allOf"]
    told = {case["if"]["properties"]["weighting"]["const"]: case["then"]["properties"] for case in cases}
    assert "default: 0.02" in told["FairMT"]["floor"]["description"]
    assert told["DWA"]["T"]["description"] == "of LibMTL (default: 2.0)"
    assert "EW" not in told
    for recipe in (TABLE, read_yaml(RECIPES[0]).data):
        assert [error.message for error in jsonschema.Draft202012Validator(wide).iter_errors(recipe)] == []
    assert "T (float; default: 2.0; LibMTL)" in CliRunner().invoke(app, ["methods", "DWA"]).output


TABLE = {
    "name": "r",
    "data": {
        "table": "t.csv",
        "tasks": {"y": {"kind": "multiclass", "classes": [0, 1]}, "z": {"kind": "multilabel", "columns": ["a", "b"]}},
        "sensitive": {"sex": {"merge": {"1": 2}, "keep": 2, "bins": 3}},
        "drop": "id",
        "where": "x > 1",
    },
    "methods": {"plain": {"weighting": "EW", "any": 1}, "post": {"post": "thresholds"}},
    "seeds": 3,
}


def test_short_forms_fit(validator):
    assert [error.message for error in validator.iter_errors(TABLE)] == []


@pytest.mark.parametrize(
    "change",
    [
        {"mehods": {}},
        {"data": {"tabel": "t.csv"}},
        {"train": {"epochs": 0}},
        {"train": {"optimizer": {"optim": "adamm"}}},
        {"data": {"table": "t.csv", "tasks": {"y": {"kind": "bin"}}}},
        {"methods": {}},
        {"metrics": {"confidence": 2}},
    ],
)
def test_what_a_recipe_refuses_is_marked(validator, change):
    assert list(validator.iter_errors(TABLE | change))


def test_the_command_prints_and_writes_it(tmp_path):
    expected = as_text(with_settings(json.loads(shipped_schema())))
    assert CliRunner().invoke(app, ["schema"]).output == expected
    CliRunner().invoke(app, ["schema", "--out", str(tmp_path / "s.json")])
    assert (tmp_path / "s.json").read_text(encoding="utf-8") == expected


def test_the_shell_completes():
    done = subprocess.run(
        [sys.executable, "-m", "libmtl_fair", "--show-completion", "bash"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "COMPLETE" in done.stdout, done.stderr
