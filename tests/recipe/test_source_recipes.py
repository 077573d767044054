"""Recipes of data that the user must have, each on small made-up data in its format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from libmtl_fair.data.sources import source, source_names, write_example
from libmtl_fair.errors import RecipeError
from libmtl_fair.recipe import Recipe, load_recipe
from libmtl_fair.recipe.build import check
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import read_run
from libmtl_fair.report.compare import compare

SOURCES = Path(__file__).resolve().parents[2] / "recipes" / "sources"
RECIPES = [path for path in sorted(SOURCES.glob("*.yaml")) if load_recipe(path).data.name in source_names()]
SMALL = {"mimic3": 60, "eicu": 60}
LIGHT = ["seeds=[0]", "train.epochs=1", "output.report=false", "metrics.n_bootstrap=0"]


TINY = {
    "lstm": ["model.encoder_args.hidden=8", "data.args.hours=12"],
    "cnn": [
        "model.encoder_args.channels=[4, 8]",
        "train.batch_size=16",
        "data.args={size: [16, 16]}",
        "data.workers=0",
    ],
    "resnet50": [
        "model.encoder=cnn",
        "model.encoder_args={}",
        "model.head=conv",
        "train.batch_size=4",
        "data.workers=0",
    ],
}


@pytest.mark.filterwarnings("ignore:FairMT. no step of epoch")  # few rows
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_on_its_example_data(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.data.name is not None
    own, held = list(TINY.get(recipe.model.encoder, ())), source(recipe.data.name)
    if held.example is None:
        own.append("data.args={n: 30, size: [16, 16]}")
    else:
        size = (24, 32) if len(held.example_size) == 3 else None
        root = write_example(recipe.data.name, tmp_path / "data", SMALL.get(recipe.data.name), size)
        own.append(f"data.root={root}")
    own += ["model.hidden=[16, 8]"] if path.stem == "fairbranch_acs" else []
    out = run_recipe(load_recipe(path, [*LIGHT, *own]), tmp_path / "run", device="cpu")
    for method in recipe.methods:
        found = json.loads((out / method / "seed0" / "metrics.json").read_text())
        assert set(found["utility"]["test"]) == {*(recipe.data.tasks or held.spec.default_tasks), "macro"}
    if recipe.published is not None:
        assert compare([out]).published["ours"].notna().all()


@pytest.mark.parametrize("name", ["glf_adult", "glf_compas"])
def test_glf_table_1(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(SOURCES / f"{name}.yaml", [*LIGHT, "data.subset=600"])
    check(recipe)
    kept = ["single_task", "aux_gld", "aux_glf"]
    recipe = recipe.model_copy(update={"methods": {k: recipe.methods[k] for k in kept}})
    found = compare([run_recipe(recipe, tmp_path / name, device="cpu")])
    assert found.published["ours"].notna().all()
    assert any("is_recid" in note or "-9.08" in note for note in found.notes)
    if name == "glf_compas":  # an outcome among the inputs: what the published AUC needs
        assert "is_recid" in str(read_run(tmp_path / name).data_card)


def test_settings_of_a_data_set_may_stand_beside_its_name() -> None:
    data = {"name": "acs", "root": "data", "years": [2019], "states": ["CA"]}
    recipe = Recipe.from_dict({"name": "r", "data": data, "methods": {"EW": {"weighting": "EW"}}})
    assert recipe.data.args == {"years": [2019], "states": ["CA"]}
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(RecipeError, match=r"data.yeers: unknown field"):
        Recipe.from_dict({"name": "r", "data": {**data, "yeers": 1}, "methods": {"EW": {"weighting": "EW"}}})
