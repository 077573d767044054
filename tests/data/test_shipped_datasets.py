"""The shipped datasets give the counts, rates, inputs and splits that their notes state."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from libmtl_fair.data import Dataset, dataset_names, describe_dataset, load_dataset, shipped
from libmtl_fair.data.shipped import DATA_FOLDER, shipped_file
from libmtl_fair.errors import DataError
from libmtl_fair.tasks import Binary, Multiclass, Regression

INPUTS_A = {
    "age", "workclass", "race", "sex", "capital-gain", "capital-loss", "native-country", "marital-status", "relationship",
}  # fmt: skip
INPUTS_B = {"age", "workclass", "race", "sex", "capital-gain", "capital-loss", "native-country", "education"}
SUPPORT2_INPUTS = {
    "age", "sex", "race", "dzgroup", "num.co", "scoma", "hday", "diabetes", "dementia", "ca", "meanbp", "wblc", "hrt",
    "resp", "temp", "pafi", "alb", "bili", "crea", "sod", "ph", "glucose", "bun", "urine", "adlsc",
}  # fmt: skip


@pytest.fixture(scope="module")
def adult() -> Dataset:
    return load_dataset("adult", sensitive=["sex", "race", "age"])


@pytest.fixture(scope="module")
def adult_b() -> Dataset:
    return load_dataset("adult", tasks=["income", "never_married", "long_hours"], sensitive=["sex", "race", "age"])


def source(name: str) -> pd.DataFrame:
    return pd.read_csv(shipped_file(name))


def rate(data: Dataset, task: str, attribute: str, group: str, what: str = "rate") -> float:
    return round(100 * data.card["tasks"][task]["per_group"][attribute][group][what], 1)


def test_adult_set_a(adult: Dataset) -> None:
    assert set(adult.inputs) == INPUTS_A
    assert adult.task_names == ("income", "college", "hours", "occupation")
    assert [type(task) for task in adult.tasks] == [Binary, Binary, Regression, Multiclass]
    assert adult.card["rows"] == 48_842
    tasks = adult.card["tasks"]
    assert round(tasks["income"]["rate"] * 48_842) == 11_687
    assert round(100 * tasks["income"]["rate"], 1) == 23.9
    assert round(100 * tasks["college"]["rate"], 1) == 24.8
    assert (round(tasks["hours"]["mean"], 1), round(tasks["hours"]["std"], 1)) == (40.4, 12.4)
    assert (tasks["occupation"]["labelled"], tasks["occupation"]["missing"]) == (46_018, 2_809 + 15)
    assert tasks["occupation"]["classes"]["Prof-specialty"] == 6_172
    assert tasks["occupation"]["classes"]["Priv-house-serv"] == 242
    assert adult.card["missing_inputs"] == {"workclass": 2_799, "native-country": 857}


def test_adult_set_b(adult_b: Dataset) -> None:
    assert set(adult_b.inputs) == INPUTS_B
    assert round(100 * adult_b.card["tasks"]["never_married"]["rate"], 1) == 33.0
    assert round(100 * adult_b.card["tasks"]["long_hours"]["rate"], 1) == round(
        100 * float((source("adult")["hours-per-week"] > 40).mean()), 1
    )


@pytest.mark.parametrize(
    ("attribute", "group", "rows", "income", "college", "never_married", "hours", "labelled"),
    [
        ("sex", "Male", 32_650, 30.4, 26.2, 27.3, 42.42, 95.2),
        ("sex", "Female", 16_192, 10.9, 22.0, 44.6, 36.40, 92.1),
        ("race", "White", 41_762, 25.4, 25.5, 31.7, 40.66, 94.4),
        ("race", "Black", 4_685, 12.1, 14.6, 43.4, 38.60, 93.0),
        ("race", "Asian-Pac-Islander", 1_519, 26.9, 42.9, 35.8, 39.88, 93.7),
        ("race", "Amer-Indian-Eskimo", 470, 11.7, 10.0, 34.7, 40.27, 92.3),
        ("race", "Other", 406, 12.3, 17.5, 39.4, 39.20, 92.4),
        ("age", "under 25", 8_432, 1.1, 9.1, 88.0, 32.90, 87.7),
        ("age", "25–59", 36_355, 29.2, 28.6, 23.3, 42.88, 97.2),
        ("age", "60 and over", 4_055, 24.3, 23.2, 5.5, 34.04, 81.6),
    ],
)
def test_adult_tables(
    adult: Dataset, adult_b: Dataset, attribute, group, rows, income, college, never_married, hours, labelled
) -> None:
    assert adult.card["groups"][attribute]["groups"][group]["rows"] == rows
    assert rate(adult, "income", attribute, group) == income
    assert rate(adult, "college", attribute, group) == college
    assert rate(adult_b, "never_married", attribute, group) == never_married
    per_group = adult.card["tasks"]["hours"]["per_group"][attribute][group]
    assert round(per_group["mean"], 2) == hours
    occupation = adult.card["tasks"]["occupation"]["per_group"][attribute][group]
    assert round(100 * occupation["n"] / occupation["rows"], 1) == labelled


def test_groups_are_sorted_and_ids_are_their_positions(adult: Dataset) -> None:
    assert adult.groups["sex"] == ["Female", "Male"]
    assert adult.groups["race"] == ["Amer-Indian-Eskimo", "Asian-Pac-Islander", "Black", "Other", "White"]
    frame = source("adult")
    for part in adult.splits().values():
        rows = part.rows.numpy()
        for attribute in ("sex", "race"):
            names = np.array(adult.groups[attribute])[part.groups[attribute].numpy()]
            assert (names == frame[attribute].to_numpy(dtype=object)[rows]).all()
        assert (part.labels["income"].numpy() == (frame["income"] == ">50K").to_numpy()[rows]).all()


@pytest.mark.parametrize(
    ("tasks", "inputs"),
    [
        (["occupation", "income", "college", "hours"], INPUTS_A),
        (["college"], INPUTS_A),
        (["never_married", "income"], INPUTS_B),
        (["income"], INPUTS_A | {"education"}),
        (["college", "never_married"], INPUTS_A & INPUTS_B),
    ],
)
def test_chosen_tasks_decide_the_inputs(tasks, inputs) -> None:
    data = load_dataset("adult", tasks=tasks, subset=2_000)
    assert set(data.inputs) == inputs
    assert data.task_names == tuple(tasks)
    assert list(data.train.labels) == tasks
    for column in ("fnlwgt", "education-num", "occupation", "hours-per-week", "income"):
        assert column in data.card["dropped"]


@pytest.mark.parametrize("name", ["adult", "compas", "german", "support2"])
@pytest.mark.parametrize("seed", [0, 3])
def test_split_is_the_suggested_one_and_does_not_move_with_the_tasks(name, seed, suggested_split) -> None:
    frame = source(name)
    kept = np.arange(len(frame))
    if name == "compas":
        kept = np.flatnonzero(frame["days_b_screening_arrest"].between(-30, 30))
    column, positive = {
        "adult": ("income", ">50K"),
        "compas": ("two_year_recid", 1),
        "german": ("credit", 2),
        "support2": ("hospdead", 1),
    }[name]
    first = (frame[column] == positive).to_numpy()[kept]
    expected = [kept[rows] for rows in suggested_split(first, seed)]
    last_task = describe_dataset(name)["default_tasks"][-1]
    for tasks in (None, [last_task]):
        data = load_dataset(name, tasks=tasks, seed=seed)
        for part, rows in zip(data.splits().values(), expected):
            assert part.rows.tolist() == rows.tolist()
            assert len(part) == len(part.x) == len(rows)


def test_compas() -> None:
    data = load_dataset("compas", sensitive=["race", "sex", "age"])
    assert (data.card["rows_in_source"], data.card["rows"]) == (7_214, 6_172)
    assert set(data.inputs) == {
        "sex", "age", "race", "juv_fel_count", "juv_misd_count", "juv_other_count", "priors_count", "c_charge_degree",
    }  # fmt: skip
    tasks = data.card["tasks"]
    assert round(100 * tasks["two_year_recid"]["rate"], 1) == 45.5
    assert round(100 * tasks["is_violent_recid"]["rate"], 1) == 11.2
    assert round(tasks["decile_score"]["mean"], 2) == 4.42
    assert tasks["v_score_text"]["classes"] == {"Low": 4_117, "Medium": 1_471, "High": 584}
    expected = {
        ("race", "African-American"): (3_175, 52.3, 13.4),
        ("race", "Caucasian"): (2_103, 39.1, 8.8),
        ("race", "Native American"): (11, 45.5, 18.2),
        ("sex", "Female"): (1_175, 35.1, 7.0),
        ("age", "Less than 25"): (1_347, 56.0, 13.7),
        ("age", "Greater than 45"): (1_293, 32.0, 6.3),
    }
    for (attribute, group), (rows, recid, violent) in expected.items():
        assert data.card["groups"][attribute]["groups"][group]["rows"] == rows
        assert rate(data, "two_year_recid", attribute, group) == recid
        assert rate(data, "is_violent_recid", attribute, group) == violent
    assert data.groups["age"] == ["Less than 25", "25 - 45", "Greater than 45"]
    assert data.card["sensitive_inputs"] == ["race", "sex", "age"]
    assert any("Native American" in note and "noise" in note for note in data.card["notes"])


def test_compas_scores_are_inputs_where_they_are_no_targets() -> None:
    data = load_dataset("compas", tasks=["two_year_recid", "is_violent_recid"])
    assert {"decile_score", "v_decile_score"} < set(data.inputs)
    assert "is_recid" not in data.inputs
    assert "v_decile_score" not in load_dataset("compas", tasks=["two_year_recid", "v_score_text"]).inputs


def test_support2() -> None:
    data = load_dataset("support2", sensitive=["sex", "race", "age"])
    assert set(data.inputs) == SUPPORT2_INPUTS
    tasks = data.card["tasks"]
    assert data.card["rows"] == 9_105
    assert round(100 * tasks["hospdead"]["rate"], 1) == 25.9
    assert round(100 * tasks["death180"]["rate"], 1) == 46.8
    assert tasks["func2m"]["labelled"] == 7_705
    assert tasks["func2m"]["classes"] == {"no disability": 3_061, "disability": 1_521, "dead": 3_123}
    assert (round(tasks["log_slos"]["mean"], 2), round(tasks["log_slos"]["std"], 2)) == (2.48, 0.83)
    assert (tasks["log_charges"]["labelled"], round(tasks["log_charges"]["mean"], 2)) == (8_933, 10.17)
    assert rate(data, "hospdead", "sex", "male") == 25.5
    assert rate(data, "death180", "race", "black") == 46.4
    assert rate(data, "death180", "age", "65 and over") == 51.4
    assert data.card["groups"]["race"]["missing"] == 42
    assert data.card["missing_inputs"]["urine"] == round(0.534 * 9_105)
    assert set(data.card["dropped"]) == set(source("support2").columns) - SUPPORT2_INPUTS


@pytest.mark.parametrize(("rule", "unknown", "groups"), [("drop", 42, 5), ("group", 0, 6)])
def test_support2_missing_race(rule, unknown, groups) -> None:
    data = load_dataset("support2", tasks=["hospdead"], sensitive=["race"], missing=rule)
    ids = torch.cat([part.groups["race"] for part in data.splits().values()])
    assert (int((ids == -1).sum()), len(data.groups["race"])) == (unknown, groups)
    assert len(ids) == 9_105
    entry = data.card["groups"]["race"]
    assert (entry["missing"], entry["missing_rule"]) == (42, rule)
    if rule == "group":
        assert data.groups["race"][-1] == "(missing)"
        assert entry["groups"]["(missing)"]["rows"] == 42
        assert rate(data, "hospdead", "race", "(missing)") == 45.2


def test_support2_missing_race_is_an_error_on_demand() -> None:
    with pytest.raises(DataError, match="'race': 42 of 9105 values are missing; use missing='drop'"):
        load_dataset("support2", sensitive=["race"], missing="error")


def test_german() -> None:
    data = load_dataset("german")
    assert len(data.inputs) == 16
    assert not {"housing", "credit_amount", "job", "credit", "property"} & set(data.inputs)
    tasks = data.card["tasks"]
    assert [round(1000 * tasks[name]["rate"]) for name in ("bad_credit", "owns_home")] == [300, 713]
    assert round(tasks["log_amount"]["mean"], 2) == 7.79
    assert sorted(tasks["job"]["classes"].values()) == [22, 148, 200, 630]
    assert {name: entry["rows"] for name, entry in data.card["groups"]["age"]["groups"].items()} == {
        "25 and under": 190,
        "over 25": 810,
    }
    assert {name: entry["rows"] for name, entry in data.card["groups"]["foreign_worker"]["groups"].items()} == {
        "A201": 963,
        "A202": 37,
    }
    assert rate(data, "bad_credit", "age", "25 and under") == 42.1
    assert rate(data, "owns_home", "foreign_worker", "A202") == 75.7
    assert {"housing", "property"} <= set(load_dataset("german", tasks=["bad_credit"]).inputs)


def test_regression_targets_are_standardised_on_train(adult: Dataset) -> None:
    hours = adult.train.labels["hours"]
    assert abs(float(hours.mean())) < 1e-5
    assert abs(float(hours.std(correction=0)) - 1) < 1e-5
    task = adult.task("hours")
    native = source("adult")["hours-per-week"].to_numpy()[adult.test.rows.numpy()]
    np.testing.assert_allclose(adult.test.labels["hours"].numpy() * task.std + task.mean, native, atol=1e-4)


def test_keeping_groups() -> None:
    top = load_dataset("compas", sensitive=["race:top2"])
    named = load_dataset("compas", sensitive=["race"], keep_groups={"race": ["Caucasian", "African-American"]})
    count = load_dataset("compas", sensitive=["race"], keep_groups={"race": 2})
    for data in (top, named, count):
        assert data.groups == {"race": ["African-American", "Caucasian"]}
        entry = data.card["groups"]["race"]
        assert (entry["missing"], entry["left_out"]) == (0, 6_172 - 3_175 - 2_103)
        assert torch.equal(data.train.groups["race"], top.train.groups["race"])
        assert len(data.train) == 3_703


def test_intersection() -> None:
    data = load_dataset("compas", sensitive=["race*sex"], keep_groups={"race": 2})
    assert data.groups["race*sex"] == [
        "African-American & Female", "African-American & Male", "Caucasian & Female", "Caucasian & Male",
    ]  # fmt: skip
    assert data.card["groups"]["race*sex"]["left_out"] == 894
    assert data.card["sensitive_inputs"] == ["race*sex"]


def test_sensitive_attributes_out_of_the_inputs() -> None:
    data = load_dataset("adult", tasks=["income"], sensitive=["sex", "race"], sensitive_inputs=False, subset=0.05)
    assert not {"sex", "race"} & set(data.inputs)
    assert data.card["sensitive_inputs"] == []
    assert "shows sex" in data.card["dropped"]["sex"]
    assert "age" not in load_dataset("compas", sensitive=["age"], sensitive_inputs=False).inputs


def test_subset_is_seeded_and_stratified() -> None:
    one, two = (load_dataset("adult", subset=1_000, seed=5) for _ in range(2))
    assert one.card["rows"] == sum(len(part) for part in one.splits().values()) == 1_000
    assert torch.equal(one.train.rows, two.train.rows)
    assert abs(one.card["tasks"]["income"]["rate"] - 0.239) < 0.002
    assert load_dataset("adult", tasks=["income"], subset=0.1).card["rows"] == 4_884


def test_loading_adult_is_quick() -> None:
    start = time.process_time()
    load_dataset("adult")
    assert time.process_time() - start < 3  # about 0.5 s on an idle core


def test_splits_give_loaders(adult: Dataset) -> None:
    loader = adult.val.loader(1_000, device="cpu")
    assert loader.n_rows == len(adult.val)
    assert loader.n_groups == {"sex": 2, "race": 5, "age": 3}
    assert loader.task_names == adult.task_names
    x, labels = next(iter(loader))
    assert x.shape == (1_000, adult.n_features)
    assert x.dtype == torch.float32
    assert labels["occupation"].dtype == torch.int64
    assert len(adult.test.torch_dataset()) == len(adult.test)


def test_card_is_json_and_markdown(adult: Dataset) -> None:
    assert json.loads(json.dumps(adult.card)) == adult.card
    text = adult.card_markdown()
    for part in ("# Data card: UCI Adult", "CC BY 4.0", "| Female | 16,192 | 33.2% |", "income above 50K", "| 23.9% |"):
        assert part in text
    assert "Sensitive attributes among the inputs: sex, race, age" in text


def test_catalogue() -> None:
    assert dataset_names()[:4] == ("adult", "compas", "german", "support2")
    assert {"bank_marketing", "acs_income", "credit_card", "diabetes_hospital"} < set(dataset_names())
    for name in dataset_names():
        entry = describe_dataset(name)
        assert set(entry["default_tasks"]) <= set(entry["tasks"])
        assert set(entry["default_sensitive"]) <= set(entry["sensitive"])
        assert entry["licence"]
        assert entry["default_inputs"]
        json.dumps(entry)


def test_licence_notes_are_shipped() -> None:
    """Each data file has its terms beside it."""
    for name in ("adult", "compas", "german", "support2"):
        notes = shipped_file(name).with_name("LICENSES.md").read_text(encoding="utf-8")
        assert f"## {name}.csv.gz" in notes
    for part in ("10.24432/C5XW20", "10.24432/C5NC77"):
        assert part in shipped_file("adult").with_name("LICENSES.md").read_text(encoding="utf-8")
    for part in ("no formal licence", "courtesy of the Vanderbilt"):
        assert part in shipped_file("compas").with_name("LICENSES.md").read_text(encoding="utf-8")


def test_the_package_lacks_what_has_no_clear_licence(tmp_path, monkeypatch) -> None:
    """What the wheel holds is the package's folder; installed elsewhere, the sentence says where the others are to be had."""
    files = Path(shipped.__file__).parent / "files"
    assert {path.name for path in files.iterdir()} == {"adult.csv.gz", "german.csv.gz", "LICENSES.md"}
    shutil.copytree(files, tmp_path / "libmtl_fair" / "data" / "files")
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "libmtl_fair" / "data" / "shipped.py"))
    assert load_dataset("german").card["rows"] == 1000
    for name in ("compas", "support2"):
        with pytest.raises(DataError, match=rf"{name}.csv.gz from the project's repository .*LIBMTL_FAIR_DATA"):
            load_dataset(name)
    monkeypatch.setenv(DATA_FOLDER, str(Path(__file__).parents[2] / "recipes" / "data"))
    assert load_dataset("compas").card["rows"] == 6172


def test_a_data_folder_of_ones_own_comes_first(tmp_path, monkeypatch) -> None:
    source("german").head(500).to_csv(tmp_path / "german.csv.gz", index=False)
    monkeypatch.setenv(DATA_FOLDER, str(tmp_path))
    assert load_dataset("german").card["rows"] == 500
    assert shipped_file("adult").parent.name == "files"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adlut"}, "unknown dataset 'adlut'; did you mean 'adult'"),
        ({"tasks": ["incone"]}, "dataset 'adult': unknown task 'incone'; did you mean 'income'"),
        ({"tasks": []}, "no task chosen"),
        ({"tasks": ["income", "income"]}, "task 'income' is chosen twice"),
        ({"sensitive": ["gender"]}, "unknown sensitive attribute 'gender'"),
        ({"sensitive": ["sxe"]}, "unknown sensitive attribute 'sxe'; did you mean 'sex'"),
        (
            {"sensitive": ["sex*rase"]},
            "intersection 'sex\\*rase': unknown sensitive attribute 'rase'; did you mean 'race'",
        ),
        ({"keep_groups": {"race": ["white"]}}, "'race': keep: unknown group 'white'; did you mean 'White'"),
        ({"keep_groups": {"race": ["White"]}}, "'race' has one group \\(White\\)"),
        ({"keep_groups": {"age": 2}}, "keep_groups: unknown chosen sensitive attribute 'age'"),
        ({"missing": "dorp"}, "missing: unknown rule 'dorp'; did you mean 'drop'"),
        ({"split": (0.6, 0.4, 0.0)}, "split must be three shares above 0"),
        ({"split": (0.6, 0.6, 0.2)}, "split must be three shares above 0"),
        ({"split": (0.8, 0.2)}, "split must be three shares above 0"),
        ({"subset": 0}, "subset must be a number of rows"),
        ({"subset": 1.5}, "subset must be a number of rows"),
        ({"subset": 100}, "is absent from the training part"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"min_frequency": 0}, "min_frequency must be"),
        ({"frame": "/nowhere/adult.csv"}, "no file '/nowhere/adult.csv'; check the path"),
    ],
)
def test_bad_choices(options, message) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(**{"name": "adult"} | options)


def test_a_frame_that_lacks_columns(people) -> None:
    with pytest.raises(DataError, match="unknown column 'income'"):
        load_dataset("adult", frame=people)
    with pytest.raises(DataError, match="filter of compas: unknown column 'days_b_screening_arrest'"):
        load_dataset("compas", frame=people)
