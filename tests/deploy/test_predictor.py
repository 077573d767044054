"""A finished run's model for new rows: the numbers of the run, in the user's units, and clear answers to what does not fit."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import libmtl_fair as lf
from libmtl_fair.data.sources import write_example
from libmtl_fair.deploy.in_parts import predict_to_file
from libmtl_fair.errors import CheckpointError, DataError, RecipeError
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe import load_recipe
from libmtl_fair.recipe.build import make_dataset
from libmtl_fair.recipe.run import run_recipe

METHODS = ["plain", "branched", "glf", "by_group", "alone", "blind", "mixed", "lifted", "cut", "reduced", "boosted"]
BY_GROUP = ("by_group", "lifted", "cut")


@pytest.fixture(scope="module")
def data(run):
    return make_dataset(load_recipe(run / "recipe.yaml"), 0)


@pytest.fixture(scope="module")
def rows(data, frame):
    return frame.iloc[data.test.rows.numpy()]


def saved(run, method) -> Predictions:
    return Predictions.load(run / method / "seed0" / "predictions_test.parquet")


@pytest.mark.parametrize("method", METHODS)
def test_new_rows_get_the_numbers_that_the_run_measured(run, rows, data, method):
    predictor, there = lf.load(run, method), saved(run, method)
    inputs = [c for c in ("age", "sex", "race", "job", "score") if c in (*predictor.inputs, *predictor.needs)]
    found = predictor.predict(rows[inputs])
    assert list(found.index) == list(rows.index)
    for task, scores in there.scores.items():
        assert found[f"{task}/score"].to_numpy() == pytest.approx(scores.numpy(), abs=1e-6)
    thresholds = json.loads((run / method / "seed0" / "metrics.json").read_text())["thresholds"]["in_use"]
    assert predictor.thresholds == thresholds
    bar = 0.5 if "rich" in there.decided else thresholds["rich"]
    assert found["rich"].tolist() == (torch.sigmoid(there.outputs["rich"].squeeze(1)) > bar).int().tolist()
    assert found["colour"].tolist() == [("blue", "green", "red")[i] for i in there.outputs["colour"].argmax(1)]
    scale = data.task("pay")
    wanted = np.exp(there.outputs["pay"].squeeze(1).double().numpy() * scale.std + scale.mean)
    assert found["pay"].to_numpy() == pytest.approx(wanted, rel=1e-5)
    chosen = torch.sigmoid(there.outputs["hobbies"]) > torch.tensor(thresholds["hobbies"])
    assert found[["hobbies/reads", "hobbies/sings"]].to_numpy().tolist() == chosen.int().tolist()
    assert [t.name for t in predictor.tasks] == list(there.scores) and predictor.groups == data.groups
    assert predictor.needs == (("sex",) if method in BY_GROUP else ())
    assert found.equals(predictor.predict(rows[inputs])) and method in repr(predictor)


def test_probabilities_are_those_of_the_saved_predictions(run, rows):
    predictor, there = lf.load(run, "plain"), saved(run, "plain").frame()
    found = predictor.predict_proba(rows)
    assert list(found.columns) == [
        ("rich", 0), ("rich", 1), ("colour", "blue"), ("colour", "green"), ("colour", "red"), ("hobbies", "reads"), ("hobbies", "sings")
    ]  # fmt: skip
    assert found["rich"][1].to_numpy() == pytest.approx(there["rich/prob"].to_numpy(), abs=1e-6)
    assert found["rich"].sum(axis=1).to_numpy() == pytest.approx(1)
    assert found["colour"]["red"].to_numpy() == pytest.approx(there["colour/prob_2"].to_numpy(), abs=1e-6)


def test_tables_of_other_libraries(run, rows):
    polars = pytest.importorskip("polars")
    predictor, inputs = lf.load(run, "plain"), rows[["age", "sex", "race", "job", "score"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(predictor.predict(polars.from_pandas(inputs)), predictor.predict(inputs))


def test_decisions_take_other_thresholds(run, rows):
    predictor = lf.load(run, "plain")
    p = predictor.predict_proba(rows)["rich"][1]
    assert predictor.decide(rows, {"rich": 0.2})["rich"].tolist() == (p > 0.2).astype(int).tolist()
    assert predictor.decide(rows)["colour"].tolist() == predictor.predict(rows)["colour"].tolist()
    with pytest.raises(DataError, match="unknown task that a threshold decides 'colour'"):
        predictor.decide(rows, {"colour": 0.2})


def test_embeddings_are_what_the_heads_receive(run, rows, data):
    predictor = lf.load(run, "plain")
    trainer, h = predictor.source.trainers[0], torch.from_numpy(predictor.embed(rows))
    again = trainer.model.decoders["rich"](h)
    assert torch.allclose(again, saved(run, "plain").outputs["rich"], atol=1e-5)
    assert set(lf.load(run, "alone").embed(rows)) == {"rich", "colour", "pay", "hobbies"}
    with pytest.raises(DataError, match="'lifted' was made after training and has no representation"):
        lf.load(run, "lifted").embed(rows)


def test_groups_of_new_rows_are_those_of_training(run, rows, data):
    found = lf.load(run, "plain").predictions(rows)
    for attribute, ids in data.test.groups.items():
        assert found.groups[attribute].tolist() == ids.tolist()
    blind = lf.load(run, "blind")
    assert blind.inputs == ("job", "score")
    assert set(blind.predictions(rows[["job", "score"]]).groups) == set()
    assert set(blind.predictions(rows[["job", "score", "sex"]]).groups) == {"sex"}


def test_no_random_number_is_drawn(run, rows):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    lf.load(run, "plain").predict(rows)
    assert torch.equal(before, torch.get_rng_state())


def test_what_training_did_not_have_is_said_once(run, rows):
    predictor = lf.load(run, "plain")
    strange = rows.assign(job=["astronaut", *rows["job"].iloc[1:]], age=[np.nan, *rows["age"].iloc[1:]])
    with warnings.catch_warnings(record=True, action="always") as said:
        found = predictor.predict(strange)
    assert [str(w.message) for w in said] == predictor.notes
    assert "column 'job': 1 of 140 rows hold a category that training did not have ('astronaut')" in predictor.notes[0]
    assert "column 'age': 1 of 140 rows have no value" in predictor.notes[1]
    with warnings.catch_warnings(action="error"):
        again = predictor.predict(strange)
    assert again.equals(found) and len(predictor.notes) == 2
    x = predictor.rows.encode(strange)
    jobs = [i for i, source in enumerate(predictor.rows.encoder.sources) if source == "job"]
    assert not x[0, jobs].any() and x[1:, jobs].sum(1).eq(1).all()
    predictor.predict(rows)
    assert predictor.notes == []


def test_rows_without_a_known_group_are_said(run, rows):
    predictor = lf.load(run, "lifted")
    with warnings.catch_warnings(action="ignore"):
        predictor.predict(rows.assign(sex=["x", *rows["sex"].iloc[1:]]))
    assert "1 of 140 rows have no known group of 'sex' (known: f, m, (missing))" in predictor.notes[-1]


def test_dates_and_truth_values_of_a_file_with_gaps(tmp_path, frame, recipe):
    """Training saw dates and truth values; a CSV of new rows holds text and, where values are missing, objects."""
    days = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(len(frame)) % 400, "D")
    whole = frame.assign(joined=days, member=np.arange(len(frame)) % 3 == 0)
    whole.to_parquet(tmp_path / "people.parquet")
    data = {"features": ["age", "joined", "member"]}
    chosen = recipe(tmp_path / "people.parquet", {"plain": {"weighting": "EW"}}, data=data)
    predictor = lf.load(run_recipe(chosen, tmp_path / "run", device="cpu"))
    new = whole[["age", "joined", "member"]].head(30)
    new.to_csv(tmp_path / "new.csv", index=False)
    pd.testing.assert_frame_equal(predictor.predict(tmp_path / "new.csv"), predictor.predict(new))
    gaps = new.astype({"member": object})
    gaps.loc[3, "member"] = None
    gaps.to_csv(tmp_path / "gaps.csv", index=False)
    with pytest.warns(UserWarning, match="column 'member': 1 of 30 rows have no value"):
        found = predictor.predict(tmp_path / "gaps.csv")
    pd.testing.assert_frame_equal(found.drop(index=3), predictor.predict(new).drop(index=3))
    with pytest.raises(DataError, match="feature 'joined': column 'joined' must hold numbers"):
        predictor.predict(new.assign(joined="yesterday or so"))


def test_tables_that_do_not_fit_are_refused(run, rows):
    predictor = lf.load(run, "blind")
    with pytest.raises(DataError, match=r"lacks the columns 'job', 'score' \(inputs of the model\); it has: "):
        predictor.predict(rows.drop(columns=["job", "score"]))
    with pytest.raises(DataError, match="feature 'score': column 'score' must hold numbers"):
        predictor.predict(rows.assign(score="much"))
    with pytest.raises(DataError, match="the frame has no rows"):
        predictor.predict(rows[:0])
    with pytest.raises(DataError, match="no file 'nowhere.csv'"):
        predictor.predict("nowhere.csv")
    with pytest.raises(DataError, match="'sex' .the groups of sensitive attribute 'sex', which this method decides by"):
        lf.load(run, "by_group").predict(rows.drop(columns="sex"))


def test_which_method_is_meant(run, tmp_path, frame, recipe):
    with pytest.raises(RecipeError, match=r"several methods: plain, branched, .*--choose MEASURE"):
        lf.load(run)
    with pytest.raises(RecipeError, match="unknown method 'plane'; did you mean 'plain'"):
        lf.load(run, "plane")
    with pytest.raises(RecipeError, match="unknown seed 5"):
        lf.load(run, "plain", 5)
    frame.to_csv(tmp_path / "people.csv", index=False)
    two = {"plain": {"weighting": "EW"}, "lifted": {"post": "offsets", "attribute": "sex"}}
    made = run_recipe(recipe(tmp_path / "people.csv", two), tmp_path / "two", device="cpu")
    assert lf.load(made).method == "lifted" and lf.load(made, "plain").seed == 0
    copied = Path(shutil.copytree(run, tmp_path / "chosen"))
    (copied / "comparison.json").write_text(json.dumps({"choice": [{"seed": 0, "method": "glf"}]}))
    assert lf.load(copied).method == "glf"


@pytest.fixture
def copied(run, tmp_path) -> Path:
    shutil.copytree(run / "plain", tmp_path / "run" / "plain")
    shutil.copytree(run / "cut", tmp_path / "run" / "cut")
    for name in ("recipe.yaml", "audit_protocol.json"):
        shutil.copy(run / name, tmp_path / "run" / name)
    return tmp_path / "run"


@pytest.mark.parametrize("file", ["model.json", "checkpoint.pt"])
@pytest.mark.parametrize("how", ["cut", "flipped", "digit"])
def test_damaged_files_are_refused(copied, rows, file, how):
    path = copied / "plain" / "seed0" / file
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    else:
        at = len(content) // 2 if how == "flipped" else content.index(b"0", len(content) // 3)
        content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(path)):
        lf.load(copied, "plain")


def test_missing_files_are_named(copied, tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        lf.load(tmp_path / "nowhere")
    (copied / "plain" / "seed0" / "predictions_val.parquet").unlink()
    with pytest.raises(CheckpointError, match="predictions_val.parquet"):
        lf.load(copied, "cut")
    (copied / "plain" / "seed0" / "checkpoint.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*checkpoint.pt"):
        lf.load(copied, "plain")
    (copied / "plain" / "seed0" / "metrics.json").unlink()
    with pytest.raises(
        CheckpointError, match="holds no finished training; finish the run with 'libmtl-fair run --resume'"
    ):
        lf.load(copied, "plain")
    (copied / "recipe.yaml").unlink()
    with pytest.raises(CheckpointError, match="not a readable run folder"):
        lf.load(copied, "plain")


def test_a_run_of_an_earlier_version_is_read_by_its_recipe_and_data(run, copied, rows, tmp_path):
    wanted = {name: lf.load(run, name).predict(rows) for name in ("plain", "cut")}
    for name in wanted:
        (copied / name / "seed0" / "model.json").unlink()
        assert lf.load(copied, name).predict(rows).equals(wanted[name])
    text = (copied / "recipe.yaml").read_text().replace("people.csv", "gone.csv")
    (copied / "recipe.yaml").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"made by an earlier version, .*gone.csv.*Put the data back, or run again"
    ):
        lf.load(copied, "plain")


def test_a_shipped_data_set_with_seeds_that_split_anew(tmp_path, recipe):
    from libmtl_fair.data import load_dataset

    methods = {"plain": {"weighting": "EW"}}
    data = {"table": None, "features": None, "missing": "drop", "name": "german", "tasks": ["bad_credit", "owns_home"],
            "sensitive": ["age"], "resplit": True}  # fmt: skip
    chosen = recipe(tmp_path, methods, data=data, seeds=[0, 1])
    out = run_recipe(chosen, tmp_path / "run", device="cpu")
    raw = pd.read_csv(Path(lf.__file__).parent / "data" / "files" / "german.csv.gz")
    for seed in (0, 1):
        rows = load_dataset("german", ["bad_credit", "owns_home"], ["age"], seed).test.rows.numpy()
        there = Predictions.load(out / "plain" / f"seed{seed}" / "predictions_test.parquet")
        with warnings.catch_warnings(action="ignore"):
            found = lf.load(out, seed=seed).predict(raw.iloc[rows])
        assert found["bad_credit/score"].to_numpy() == pytest.approx(there.scores["bad_credit"].numpy(), abs=1e-6)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_the_predict_command(run, rows, tmp_path, ending):
    from libmtl_fair.cli import app

    rows.to_parquet(tmp_path / "new.parquet", index=False)
    target = tmp_path / f"made.{ending}"
    done = CliRunner().invoke(
        app, ["predict", str(run), str(tmp_path / "new.parquet"), "--out", str(target), "--method", "plain"]
    )
    assert done.exit_code == 0 and "predictions of plain, seed 0, for 140 rows" in done.output
    made = pd.read_parquet(target) if ending == "parquet" else pd.read_csv(target, keep_default_na=False)
    wanted = lf.load(run, "plain").predict(rows).reset_index(drop=True)
    pd.testing.assert_frame_equal(made, wanted, check_dtype=False)


def test_the_predict_command_refuses_before_it_predicts(run, rows, tmp_path):
    from libmtl_fair.cli import BAD_INPUT, app

    rows.to_csv(tmp_path / "new.csv", index=False)
    asked = ["predict", str(run), str(tmp_path / "new.csv"), "--method", "plain", "--out"]
    done = CliRunner().invoke(app, [*asked, str(tmp_path / "made.xlsx")])
    assert done.exit_code == BAD_INPUT and "expected a name that ends with .parquet, .csv or .csv.gz" in done.output
    done = CliRunner().invoke(app, [*asked[:4], "brunched", *asked[5:], str(tmp_path / "made.csv")])
    assert done.exit_code == BAD_INPUT and "did you mean 'branched'?" in done.output


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_raw_files_of_a_source_give_the_numbers_of_the_run(tmp_path, ending):
    """A PUMS file as published, of the year of training and of one with other names, codes and leading zeros."""
    root = write_example("acs", tmp_path / "acs", 400)
    light = [
        "seeds=[0]",
        "train.epochs=1",
        "output.report=false",
        "metrics.n_bootstrap=0",
        "methods={plain: {weighting: EW}}",
    ]
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "sources" / "acs.yaml"
    args = "data.args={years: [2018], states: [CA], test_years: [2019], test_states: [TX]}"
    run = run_recipe(load_recipe(recipe, [*light, f"data.root={root}", args]), tmp_path / "run", device="cpu")
    data, predictor = make_dataset(load_recipe(run / "recipe.yaml"), 0), lf.load(run)
    trained = len(data.train) + len(data.val)
    for part, year, state, first in (("val", "2018", "06", 0), ("test", "2019", "48", trained)):
        path = root / year / "1-Year" / f"psam_p{state}.csv"
        if ending == ".parquet":
            pd.read_csv(path, dtype=str).to_parquet(path := tmp_path / f"{year}.parquet")
        predict_to_file(predictor, path, tmp_path / "found.csv", lambda note: None)
        found = pd.read_csv(tmp_path / "found.csv").iloc[data.splits()[part].rows.numpy() - first]
        held = Predictions.load(run / "plain" / "seed0" / f"predictions_{part}.parquet")
        for task, scores in held.scores.items():
            assert found[f"{task}/score"].to_numpy() == pytest.approx(scores.numpy(), abs=1e-6), (part, task)
