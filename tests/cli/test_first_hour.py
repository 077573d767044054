"""From a table of one's own to a report and predictions of new rows: init, check, run, predict."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from libmtl_fair.cli import app
from libmtl_fair.data.tables import read_frame
from libmtl_fair.errors import RecipeError
from libmtl_fair.recipe import load_recipe
from libmtl_fair.recipe.build import make_dataset
from libmtl_fair.recipe.draft import draft
from libmtl_fair.recipe.look import look

SHORT = ["--set", "train.epochs=2", "--set", "seeds=[0]", "--set", "metrics.n_bootstrap=20"]


def people(n: int, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "person_id": [f"P{i:05d}" for i in range(n)],
            "row": range(n),
            "Age": draw.integers(18, 90, n),
            "sex": draw.choice(["female", "male"], n),
            "ethnicity": draw.choice(["A", "B", "C", "D", "NA"], n, p=[0.5, 0.4, 0.05, 0.03, 0.02]),
            "hours": draw.integers(10, 60, n),
            "job": draw.choice(["clerk", "nurse", "smith", ""], n),
            "country": "DE",
            "notes": [*[""] * (n - 3), "late", "sick", "gone"],
            "admitted": pd.Timestamp("2020-01-01") + pd.to_timedelta(draw.integers(0, 900, n), "D"),
        }
    )
    skill = draw.normal(size=n) + 0.8 * (frame["sex"] == "male")
    frame["skill"] = skill.round(3)
    frame["income"] = np.where(draw.random(n) < 1 / (1 + np.exp(-skill - 0.03 * (frame["Age"] - 45))), ">50K", "<=50K")
    frame["tax_class"] = np.where(frame["income"] == ">50K", 5, 2)
    frame["readmitted"] = (draw.random(n) < 1 / (1 + np.exp(-0.5 * skill + 0.05 * (frame["hours"] - 20)))).astype(float)
    frame.loc[::37, "readmitted"] = np.nan
    frame["discharged"] = frame["admitted"] + pd.to_timedelta(draw.integers(1, 30, n), "D")
    return frame


def libmtl_fair(*args: object) -> str:
    done = CliRunner().invoke(app, [str(each) for each in args])
    assert done.exit_code == 0, done.output
    return done.output


def test_from_a_table_to_predictions_in_four_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    people(900).to_csv("people.csv", index=False)
    new = people(30, seed=1).drop(columns=["income", "readmitted", "tax_class"])
    new.to_csv("new.csv", index=False)

    said = libmtl_fair("init", "people.csv")
    assert "tasks: income, readmitted; sensitive: Age, sex, ethnicity" in said
    said = libmtl_fair("check", "recipe.yaml")
    assert "train 540, val 180, test 180" in said and "nothing was trained" in said
    assert "too small: ethnicity: other has" in said
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    libmtl_fair("run", "recipe.yaml", "--out", "run", *SHORT)
    assert (tmp_path / "run" / "report.html").is_file()
    libmtl_fair("predict", "run", "new.csv", "--out", "predictions.csv")
    found = pd.read_csv("predictions.csv")
    assert len(found) == len(new) and set(found["income"]) <= {0, 1}
    assert found[["income/score", "readmitted/score"]].apply(lambda scores: scores.between(0, 1).all()).all()


def test_init_says_why(tmp_path):
    people(900).to_parquet(tmp_path / "people.parquet")
    found = look(read_frame(tmp_path / "people.parquet"))
    assert found.tasks == {
        "income": {"kind": "binary", "positive": ">50K", "forbids": ["tax_class"]},
        "readmitted": {"kind": "binary"},
    }
    assert found.sensitive == {
        "Age": {"bins": [30, 45, 60]},
        "sex": {},
        "ethnicity": {"merge": {"C": "other", "D": "other", "NA": "other"}},
    }
    assert set(found.drop) == {"person_id", "row", "country", "notes", "admitted", "discharged"}
    assert "an id" in found.why["person_id"] and "an id" in found.why["row"]
    assert "one value" in found.why["country"] and "missing" in found.why["notes"]
    assert "a date after admitted in 100% of the rows" in found.why["discharged"]
    assert found.inputs == ["Age", "sex", "ethnicity", "hours", "job", "skill"]


def test_a_column_that_shows_an_attribute_is_named(tmp_path):
    frame = people(600)
    frame["title"] = np.where(frame["sex"] == "male", "Mr", "Ms")
    assert look(read_frame(frame), ["income"], ["sex"]).sensitive == {"sex": {"also_in": ["title"]}}


def test_people_are_found_in_other_words(tmp_path):
    draw, n = np.random.default_rng(0), 300
    named = {
        "Geschlecht": ["x", "y"],
        "Âge": ["jung", "alt"],
        "native-country": ["A", "B"],
        "place of birth": ["C", "D"],
    }
    filled = {"a": ["Männlich", "weiblich"], "b": ["m", "w"], "c": ["evangelisch", "Katholisch"]}
    frame = pd.DataFrame({name: draw.choice(values, n) for name, values in (named | filled).items()})
    frame["Geburtsdatum"] = pd.date_range("1950-01-01", periods=n, freq="30D")
    found = look(frame.assign(y=draw.integers(0, 2, n)))
    assert set(found.sensitive) == {*named, *filled}
    assert found.why["sensitive place of birth"].startswith("named like nationality")
    assert found.why["Geburtsdatum"].startswith("named like age; a date")
    with pytest.raises(RecipeError, match="target 'y' holds one value; a task needs .* say which with --target"):
        look(frame.assign(y=1, z=2))


def test_bins_of_large_numbers_stay_apart(tmp_path):
    values = np.arange(1_234_000, 1_234_400) + 0.5
    frame = pd.DataFrame({"salary": values, "x": values % 7, "y": np.arange(400) % 2})
    frame.to_csv(tmp_path / "t.csv", index=False)
    libmtl_fair("init", tmp_path / "t.csv", "--target", "y", "--sensitive", "salary", "--out", tmp_path / "r.yaml")
    data = make_dataset(load_recipe(tmp_path / "r.yaml"), 0)
    assert data.groups["salary"] == [
        "under 1234100", "1234100 to under 1234200", "1234200 to under 1234300", "1234300 and over",
    ]  # fmt: skip
    assert sum((data.train.groups["salary"] == g).sum() for g in range(4)) == len(data.train)


def odd(seed: int) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    n = int(draw.choice([60, 200, 700]))
    names = ["a: b", "# c", "yes", "1", " x ", "ü'\"", "{d}", "sensitive", "null", "e\nf", "-", "Age (years)"]
    makers = [
        lambda: draw.normal(size=n),
        lambda: draw.integers(0, 2, n),
        lambda: draw.integers(0, 5, n),
        lambda: draw.choice(["no", "yes", "n/a"], n),
        lambda: draw.choice(list("abcdefghijklmnopqrstuvwxyz"), n),
        lambda: np.where(draw.random(n) < 0.1, np.nan, draw.normal(size=n)),
        lambda: pd.date_range("2020-01-01", periods=n).strftime("%d/%m/%Y"),
        lambda: [f"{i}-{draw.integers(9)}" for i in range(n)],
        lambda: draw.choice([True, False], n),
    ]
    frame = pd.DataFrame({name: makers[draw.integers(len(makers))]() for name in names})
    frame["gender"] = draw.choice(["m", "f", "x"], n, p=[0.5, 0.45, 0.05])
    kinds = [draw.integers(0, 2, n), draw.normal(size=n), draw.choice(["low: 1", "high", "#"], n)]
    return frame.assign(**{"out come: y": kinds[seed % 3]})


@pytest.mark.parametrize("seed", range(12))
def test_what_init_writes_loads_as_it_is(tmp_path, seed):
    frame = odd(seed)
    table = tmp_path / "odd table.csv"
    frame.to_csv(table, index=False)
    (tmp_path / "sub").mkdir()
    target = tmp_path / "sub" / "r.yaml"
    found = look(read_frame(table), ["out come: y"])
    target.write_text(draft(found, table, target), encoding="utf-8")
    recipe = load_recipe(target)
    data = make_dataset(recipe, 0)
    assert "gender" in data.groups and list(data.inputs) == found.inputs
    assert data.task_names == ("out come: y",)


@pytest.mark.parametrize(
    ("change", "args", "message"),
    [
        ({"income": "x"}, ["--target", "income"], "target 'income' holds one value"),
        ({}, ["--target", "incme"], "unknown column 'incme'; did you mean 'income'"),
        ({}, ["--target", "admitted"], "target 'admitted' holds dates"),
        ({}, ["--sensitive", "admitted"], "sensitive column 'admitted' holds dates"),
        ({}, ["--target", "person_id"], "holds text with 100 values"),
        ({"sex": "A1", "Age": "A1", "ethnicity": "A1"}, [], "no column looks like one whose groups are to be compared"),
    ],
)
def test_what_init_cannot_use_is_said(tmp_path, monkeypatch, change, args, message):
    monkeypatch.chdir(tmp_path)
    people(100).assign(**change).to_csv("t.csv", index=False)
    done = CliRunner().invoke(app, ["init", "t.csv", *args])
    assert done.exit_code == 2 and message in done.output
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_recipe_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    people(100).to_csv("t.csv", index=False)
    (tmp_path / "recipe.yaml").write_text("mine")
    done = CliRunner().invoke(app, ["init", "t.csv"])
    assert done.exit_code == 2 and "is there" in done.output and (tmp_path / "recipe.yaml").read_text() == "mine"
    libmtl_fair("init", "t.csv", "--yes")
    assert load_recipe(tmp_path / "recipe.yaml").name == "t"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("answers", "dropped"),
    [
        (b"income, hours\nsex\nperson_id, skill\n", ("person_id", "skill")),
        (b"income, hours\nsex\n\n", ("person_id", "row", "country", "notes, late", "admitted", "discharged")),
    ],
)
def test_on_a_terminal_init_asks(tmp_path, answers, dropped):
    import pty

    people(100).rename(columns={"notes": "notes, late"}).to_csv(tmp_path / "t.csv", index=False)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "libmtl_fair", "init", "t.csv"]
    started = subprocess.Popen(command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, answers)
    assert started.wait(timeout=300) == 0
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "Columns to predict" in shown and "Columns that are no inputs" in shown
    data = load_recipe(tmp_path / "recipe.yaml").data
    assert list(data.tasks) == ["income", "hours"] and list(data.sensitive) == ["sex"]
    assert data.drop == dropped


def test_a_warning_is_one_printable_line_without_its_place_in_the_source():
    warned = "import warnings, libmtl_fair.cli as c; c.app = lambda: warnings.warn('odd \\x1b[2J [b]name'); c.main()"
    done = subprocess.run([sys.executable, "-c", warned], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "note: odd \\x1b[2J [b]name\n")
