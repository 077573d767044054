"""Every kind of bad table, task, attribute or feature is refused with what, where, and what to do."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from libmtl_fair.data import SensitiveSpec, TaskSpec, load_table
from libmtl_fair.errors import DataError

SICK = {"sick": {"kind": "binary"}}


def load(frame, tasks=None, sensitive=("sex",), **options):
    return load_table(frame, tasks=SICK if tasks is None else tasks, sensitive=sensitive, **options)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "binary", "column": "sikc"}, r"task 't' \(binary\): unknown column 'sikc'; did you mean 'sick'"),
        ({"kind": "binary", "column": "job"}, "must hold 0 and 1, found 'clerk', 'nurse', 'smith'; say which value"),
        ({"kind": "binary", "column": "age"}, "column 'age' must hold 0 and 1, found 18"),
        ({"kind": "binary", "column": "job", "positive": "clark"}, "unknown value 'clark'; did you mean 'clerk'"),
        ({"kind": "binary", "column": "job", "threshold": 3}, "column 'job' must hold numbers, found"),
        (
            {"kind": "binary", "expression": "job >= 3"},
            "column 'job' holds text; it can be compared with == and != only",
        ),
        ({"kind": "binary", "expression": "age == 'old'"}, "'age' holds numbers, but is compared with the text 'old'"),
        ({"kind": "binary", "expression": "aeg > 3"}, "unknown column 'aeg'; did you mean 'age'"),
        ({"kind": "binary", "expression": "age >"}, "cannot read 'age >'"),
        ({"kind": "binary", "expression": "age > 3 and"}, "cannot read"),
        ({"kind": "binary", "expression": "__import__('os')"}, "cannot read"),
        ({"kind": "binary", "expression": "age > 500"}, "class '1' is absent from the training part"),
        ({"kind": "multiclass", "column": "height"}, "column 'height' holds fractions; expected classes"),
        ({"kind": "multiclass", "column": "one"}, "column 'one' has 1 classes; expected 2 to 200"),
        (
            {"kind": "multiclass", "column": "job", "classes": ["clerk", "nrse"]},
            "unknown class 'nrse'; did you mean 'nurse'",
        ),
        ({"kind": "multilabel", "columns": ["pain", "job"]}, "column 'job' must hold 0 and 1"),
        ({"kind": "multilabel", "columns": ["pain", "one"]}, "class 'one 0' is absent from the training part"),
        ({"kind": "regression", "column": "job"}, r"task 't' \(regression\): column 'job' must hold numbers"),
        ({"kind": "regression", "column": "one"}, "the target is 1 in every row of the training part"),
        ({"kind": "regression", "column": "sick", "transform": "log"}, "values of column 'sick' have no log"),
        ({"kind": "regression", "column": "endless"}, "column 'endless' is -?inf in row 3"),
        ({"kind": "binary", "column": "empty", "positive": 1}, "unknown value '1'"),
        ({"kind": "binary", "column": "empty"}, "all 200 labels are missing"),
        ({"kind": "bnary", "column": "sick"}, "task 't': unknown task kind 'bnary'; did you mean 'binary'"),
        ({"column": "sick"}, "task 't': needs a 'kind'"),
        ({"kind": "binary", "colunm": "sick"}, "task 't': unknown field 'colunm'; did you mean 'column'"),
        ({"kind": "regression", "column": "cost", "positive": 1}, "a regression task takes no 'positive'"),
        ({"kind": "regression", "column": "cost", "transform": "lgo"}, "unknown transform 'lgo'; did you mean 'log'"),
        ({"kind": "binary", "column": "age", "positive": 1, "threshold": 2}, "one of 'positive', 'threshold'"),
        ({"kind": "binary", "column": "age", "expression": "age > 1"}, "give exactly one"),
        (3, "task 't': expected a TaskSpec or a mapping of its fields, found int"),
    ],
)
def test_bad_tasks(people, task, message) -> None:
    people["one"], people["empty"] = 1, np.nan
    people["endless"] = people["cost"].where(people.index != 3, np.inf)
    with pytest.raises(DataError, match=message):
        load(people, {"t": task}, features=["height"] if "height" not in str(task) else ["age"])


@pytest.mark.parametrize(
    ("sensitive", "message"),
    [
        (["sxe"], "sensitive attribute 'sxe': unknown column 'sxe'; did you mean 'sex'"),
        ({"one": "one"}, r"sensitive attribute 'one' has one group \(1\)"),
        ({"age": {"column": "age", "bins": [200]}}, "sensitive attribute 'age' has one group"),
        ({"job": {"column": "job", "bins": [1]}}, "sensitive attribute 'job': column 'job' must hold numbers"),
        ({"age": {"column": "age", "bins": [60, 30]}}, "bins of sensitive column 'age' must ascend"),
        ({"age": {"column": "age", "bins": [60], "labels": ["x"]}}, "1 edges make 2 groups, found 1 labels"),
        ({"race": {"merge": {"z": "b"}}}, "merge: unknown value 'z'"),
        ({"race": {"labels": ["a", "b"]}}, "column 'race' holds 'c', which is not among the labels"),
        ({"race": {"keep": ["a", "d"]}}, "keep: unknown group 'd'"),
        ({"race": {"keep": 1}}, "keep must be at least 2 groups, found 1"),
        ({"race": {"keeep": 2}}, "sensitive attribute 'race': unknown field 'keeep'; did you mean 'keep'"),
        ({"x": {"of": ["race", "sxe"]}}, "sensitive attribute 'sxe': unknown column 'sxe'"),
        ({"x": {"of": ["race"], "column": "sex"}}, "needs either a column or"),
    ],
)
def test_bad_attributes(people, sensitive, message) -> None:
    people["one"] = 1
    with pytest.raises(DataError, match=message):
        load(people, sensitive=sensitive)


def test_missing_rule(people) -> None:
    count = int(people["race"].isna().sum())
    with pytest.raises(DataError, match=f"'race': {count} of 200 values are missing; use missing='drop'"):
        load(people, sensitive=["race"], missing="error")
    assert load(people, sensitive=["sex"], missing="error").groups == {"sex": ["female", "male"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ["agee"]}, "features: unknown column 'agee'; did you mean 'age'"),
        ({"features": ["age", "sick"]}, "feature 'sick' gives away task 'sick'"),
        ({"features": {"job": "numeric"}}, "feature 'job': column 'job' must hold numbers"),
        ({"features": {"job": "text"}}, "feature 'job': unknown kind 'text'"),
        ({"features": []}, "leave no input column"),
        ({"features": ["empty"]}, "feature 'empty' has no value in the training part"),
        ({"features": ["endless"]}, "feature 'endless': column 'endless' is -?inf in row 3"),
        ({"categorical": ["jbo"]}, "categorical: unknown column 'jbo'; did you mean 'job'"),
        ({"stratify": "sikc"}, "stratify: unknown task 'sikc'; did you mean 'sick'"),
        ({"split": "flod"}, "split: unknown column 'flod'"),
        ({"split": "job"}, "split column 'job': expected 'train', 'val' and 'test', found 'clerk'"),
        ({"split": "fold"}, "split column 'fold': the test split is empty"),
        ({"split": (1.0, 0.0, 0.0)}, "three shares above 0"),
        ({"tasks": {"sensitive": {"kind": "binary", "column": "sick"}}}, "a task may not be named 'sensitive'"),
    ],
)
def test_bad_features_and_splits(people, options, message) -> None:
    people["empty"] = np.nan
    people["endless"] = people["cost"].where(people.index != 3, -np.inf)
    people["fold"] = ["train", "val"] * 100
    with pytest.raises(DataError, match=message):
        load(people, **options)


def test_values_that_float32_cannot_hold(people) -> None:
    people["fold"] = np.where(people.index < 120, "train", np.where(people.index < 160, "val", "test"))
    people["tight"] = 1 + 1e-12 * (people.index % 2)
    people.loc[199, "tight"] = 1e29
    with pytest.raises(DataError, match="feature 'tight' is too far from its training values in row 199"):
        load(people, split="fold", features=["tight"])
    with pytest.raises(DataError, match="task 'tight' .*the target in row 199 is too far from the training part's"):
        load(people, {"tight": {"kind": "regression"}}, split="fold", features=["age"])
    people["age"] = people["age"].astype(float)
    people.loc[7, "age"] = 1e300
    with pytest.raises(
        DataError, match=r"feature 'age': column 'age' is 1e\+300 in row 7; expected numbers up to 1e\+30"
    ):
        load(people, features=["age"])


def test_too_few_rows(people) -> None:
    with pytest.raises(DataError, match="2 rows cannot be split"):
        load(people[["age", "sex", "pain"]].iloc[:2], {"pain": {"kind": "binary"}}, sensitive=())


def test_class_that_training_lacks(people) -> None:
    people["fold"] = np.where(people["state"] == "poor", "test", np.where(people.index % 2 == 0, "train", "val"))
    with pytest.raises(DataError, match="task 'state' .*class 'poor' is absent from the training part"):
        load(people, {"state": {"kind": "multiclass"}}, split="fold")


def test_part_without_a_label(people) -> None:
    people["fold"] = np.where(people["sick"].isna(), "val", np.where(people.index % 2 == 0, "train", "test"))
    with pytest.raises(DataError, match="task 'sick': no labelled row in the val split"):
        load(people, split="fold")


def test_files_that_cannot_be_read(people, tmp_path) -> None:
    people.to_csv(tmp_path / "people.csv", index=False)
    with pytest.raises(DataError, match="no file .*did you mean .*people.csv"):
        load(tmp_path / "poeple.csv")
    (tmp_path / "table.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"expected a .csv, .csv.gz or .parquet file"):
        load(tmp_path / "table.xlsx")
    for name in ("broken.parquet", "broken.csv.gz", "nothing.csv"):
        (tmp_path / name).write_bytes(b"" if name == "nothing.csv" else b"not a table")
        with pytest.raises(DataError, match="cannot be read as a table"):
            load(tmp_path / name)
    with pytest.raises(DataError, match="the frame has no rows"):
        load(people.iloc[:0])
    with pytest.raises(DataError, match="column 'age' is there twice"):
        load(pd.concat([people, people[["age"]]], axis=1))


def test_specs_check_themselves() -> None:
    with pytest.raises(DataError, match="a multilabel task needs columns, found neither"):
        TaskSpec("multilabel")
    with pytest.raises(DataError, match="needs either a column or"):
        SensitiveSpec()


def test_unknown_task_of_a_dataset(people) -> None:
    with pytest.raises(DataError, match="unknown task 'sikc'; did you mean 'sick'"):
        load(people).task("sikc")
