"""One declaration of tasks and attributes: Python says a DataError, a recipe file and line, of the same checks."""

from __future__ import annotations

import pytest

from libmtl_fair.data import SensitiveSpec, TaskSpec, load_table
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.recipe import load_recipe

RECIPE = """\
name: own
data:
  table: people.csv
  tasks:
    sick: {kind: binary}
    state: STATE
  sensitive:
    race: RACE
methods:
  plain: {weighting: EW}
"""


@pytest.fixture
def recipe_of(tmp_path):
    def make(state: str = "{kind: multiclass}", race: str = "{}"):
        path = tmp_path / "own.yaml"
        path.write_text(RECIPE.replace("STATE", state).replace("RACE", race))
        return load_recipe(path)

    return make


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("column", 3, "column: expected text, found 3"),
        ("columns", [1], "columns: expected text, found 1"),
        ("threshold", "x", "threshold: expected a number, found 'x'"),
        ("threshold", float("inf"), "threshold: expected a finite number, found inf"),
        ("positive", [], "positive: expected text, found"),
        ("standardise", 1, "standardise: expected true or false, found 1"),
        ("classes", ["a"], r"classes: expected at least 2 value\(s\), found \['a'\]"),
        ("forbids", ["a", "a"], "forbids: expected distinct values, found a more than once"),
    ],
)
def test_wrong_types_of_a_task(field, value, message) -> None:
    with pytest.raises(DataError, match=message):
        TaskSpec("binary", **{"column": "a", field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bins", ["x"], "bins: expected a number, found 'x'"),
        ("merge", ["a"], "merge: expected a mapping, found"),
        ("keep", "a", "keep: expected names of groups, or how many"),
        ("colour", 1, "unknown field 'colour'; did you mean 'column'"),
    ],
)
def test_wrong_types_of_an_attribute(field, value, message) -> None:
    with pytest.raises(DataError, match=message):
        SensitiveSpec("a", **{field: value})


def test_values_are_spelt_as_the_column_has_them() -> None:
    assert TaskSpec("multiclass", column="a", classes=[0, 1.0, 2.5]).classes == ("0", "1", "2.5")
    assert TaskSpec("multiclass", column="a", classes={True: "yes", False: 0}).classes == {"True": "yes", "False": "0"}
    assert SensitiveSpec("a", merge={1: "one", 2.0: 3}).merge == {"1": "one", "2": "3"}
    assert TaskSpec("multilabel", columns="a", forbids=(), definition="").columns == ("a",)


def test_a_spec_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TaskSpec("binary", column="a").column = "b"


def test_a_column_is_that_of_the_name(people) -> None:
    data = load_table(people, tasks={"sick": {"kind": "binary"}}, sensitive={"race": {"keep": 2}, "sex": "sex"})
    assert data.card["tasks"]["sick"]["columns"] == ["sick"]
    assert data.card["groups"]["race"]["column"] == "race"


def test_a_recipe_holds_the_same_specs(recipe_of, people) -> None:
    recipe = recipe_of("{kind: multiclass, classes: {good: fine, fair: fine, poor: bad}}", "{keep: 2, bins: null}")
    assert isinstance(recipe.data.tasks["state"], TaskSpec)
    assert isinstance(recipe.data.sensitive["race"], SensitiveSpec)
    data = load_table(people, tasks=recipe.data.tasks, sensitive=recipe.data.sensitive)
    assert data.task("state").classes == ("fine", "bad")
    assert list(data.groups) == ["race"]
    assert type(recipe).from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("state", "race", "message"),
    [
        (
            "{kind: regression, positive: 1}",
            "{}",
            r"own.yaml:6: data.tasks.state: a regression task takes no 'positive'",
        ),
        ("{kind: multilabel}", "{}", r"own.yaml:6: data.tasks.state: a multilabel task needs columns, found neither"),
        (
            "{kind: binary, colunm: a}",
            "{}",
            r"own.yaml:6: data.tasks.state.colunm: unknown field; did you mean 'column'",
        ),
        ("{kind: binary}", "{bins: [3, 1]}", r"own.yaml:8: data.sensitive.race: bins of this attribute must ascend"),
        ("{kind: binary}", "{of: [a, b], column: c}", r"own.yaml:8: data.sensitive.race: .* needs either a column or"),
        ("{kind: binary}", "{merge: {a: [1]}}", r"own.yaml:8: data.sensitive.race.merge.a: expected text, found \[1\]"),
    ],
)
def test_a_recipe_says_the_line(recipe_of, state, race, message) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(state, race)
