from __future__ import annotations

from pathlib import Path

import pytest

from libmtl_fair.errors import RecipeError
from libmtl_fair.recipe import load_recipe


def test_values_are_yaml_and_later_ones_win(write, recipe_text):
    recipe = load_recipe(
        write(recipe_text),
        [
            "train.epochs=3",
            "train.epochs=5",
            "seeds=[4, 5]",
            "seeds.1=6",
            "train.optimizer.lr=1e-2",
            "train.scheduler={scheduler: cos, T_max: 5}",
            "methods.relif.mu=0.5",
            "methods.relif.train.batch_size=32",
            "methods.mgda={weighting: MGDA}",
            "output.dir=/tmp/a=b",
            "tune.trials=7",
            "data.keep_groups.sex=[Male]",
            "description=",
            "model.hidden=32",
        ],
    )
    assert recipe.train.epochs == 5
    assert recipe.seeds == (4, 6)
    assert recipe.train.optimizer.lr == 0.01
    assert recipe.train.optimizer.weight_decay == 1e-5
    assert recipe.train.scheduler.params() == {"scheduler": "cos", "T_max": 5}
    assert recipe.methods["relif"].args["mu"] == 0.5
    assert recipe.train_for("relif").batch_size == 32
    assert recipe.methods["mgda"].weighting == "MGDA"
    assert recipe.output.dir == "/tmp/a=b"
    assert recipe.tune.trials == 7
    assert recipe.data.keep_groups["sex"] == ("Male",)
    assert recipe.model.hidden == (32,)


def test_method_names_may_have_dots(write, recipe_text):
    recipe = load_recipe(write(recipe_text.replace("relif:", "relif.10:")), ["methods.relif.10.eta=0.5"])
    assert recipe.methods["relif.10"].args["eta"] == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"--set train\.epoch=3: unknown field 'epoch' in train; did you mean 'epochs'\?"),
        ("trian.epochs=3", r"unknown field 'trian' in the recipe; did you mean 'train'\?"),
        ("methods.relfi.eta=3", r"unknown field 'relfi' in methods; did you mean 'relif'\?"),
        (
            "methods.relif.train.epoch=3",
            r"--set .*: methods\.relif\.train\.epoch: unknown field; did you mean 'epochs'",
        ),
        ("train.epochs", r"expected path=value, such as train\.epochs=3"),
        ("=3", r"expected path=value"),
        ("train..epochs=3", r"expected path=value"),
        ("name.x=3", r"--set name\.x=3: name holds a single value, not a section"),
        ("seeds.9=3", r"expected a position from 0 to 1 in the list, found '9'"),
        ("train.epochs=0", r"--set train\.epochs=0: train\.epochs: expected at least 1, found 0"),
        ("train.epochs=[1", r"--set train\.epochs=\[1: expected a YAML value"),
        ("train.epochs=.inf", r"expected a finite number"),
        ("train.epochs=3\nseeds: 1", r"expected one YAML value after '=', found several"),
    ],
)
def test_bad_overrides(write, recipe_text, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(recipe_text), [override])


def test_an_override_mends_the_file(write, recipe_text):
    assert load_recipe(write(recipe_text.replace("epochs: 2", "epochs: 0")), ["train.epochs=1"]).train.epochs == 1


def test_settings_of_a_data_set_can_be_set_where_the_recipe_has_none() -> None:
    path = Path(__file__).resolve().parents[2] / "recipes" / "sources" / "nyuv2.yaml"
    assert load_recipe(path, ["data.args={size: [32, 32]}"]).data.args == {"size": [32, 32]}
    assert load_recipe(path, ["data.args.size=[32, 32]"]).data.args == {"size": [32, 32]}
    with pytest.raises(RecipeError, match="unknown field .rot. in data; did you mean .root."):
        load_recipe(path, ["data.rot=x"])
