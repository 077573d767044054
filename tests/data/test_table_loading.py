"""A user's own table: encoding fitted on train only, labels and groups kept as missing, splits, files, card."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libmtl_fair.data import SensitiveSpec, TaskSpec, load_table
from libmtl_fair.data.labels import raw_labels
from libmtl_fair.data.selection import split_rows, strata
from libmtl_fair.tasks import Binary, Multiclass, Multilabel, Regression

TASKS = {
    "sick": {"kind": "binary"},
    "state": {"kind": "multiclass", "classes": ["poor", "fair", "good"]},
    "signs": {"kind": "multilabel", "columns": ["pain", "cough"]},
    "cost": TaskSpec("regression", column="cost", transform="log"),
}
FEATURES = ["age", "height", "job", "sex", "race"]


def test_every_kind_of_task(people) -> None:
    data = load_table(people, tasks=TASKS, sensitive=["sex", "race"])
    assert [type(task) for task in data.tasks] == [Binary, Multiclass, Multilabel, Regression]
    assert data.inputs == tuple(FEATURES)
    for part in data.splits().values():
        rows = part.rows.numpy()
        sick = people["sick"].to_numpy()[rows]
        np.testing.assert_array_equal(part.labels["sick"].numpy(), sick.astype(np.float32))
        names = [None if k < 0 else ("poor", "fair", "good")[k] for k in part.labels["state"].tolist()]
        assert names == [None if pd.isna(v) else v for v in people["state"].to_numpy(object)[rows]]
        np.testing.assert_array_equal(part.labels["signs"].numpy(), people[["pain", "cough"]].to_numpy()[rows])
        cost = data.task("cost")
        np.testing.assert_allclose(
            part.labels["cost"].numpy() * cost.std + cost.mean, np.log(people["cost"].to_numpy()[rows]), rtol=1e-4
        )
    assert data.task("state").classes == ("poor", "fair", "good")
    assert (
        int((torch.cat([p.labels["state"] for p in data.splits().values()]) == -100).sum())
        == people["state"].isna().sum()
    )
    assert data.card["tasks"]["sick"]["missing"] == people["sick"].isna().sum()


def test_splits_are_a_partition_and_repeat(people) -> None:
    one = load_table(people, tasks=TASKS, sensitive=["sex"], seed=4)
    two = load_table(people, tasks=TASKS, sensitive=["sex"], seed=4)
    other = load_table(people, tasks=TASKS, sensitive=["sex"], seed=5)
    rows = torch.cat([part.rows for part in one.splits().values()])
    assert sorted(rows.tolist()) == list(range(len(people)))
    for part in ("train", "val", "test"):
        assert torch.equal(one.splits()[part].x, two.splits()[part].x)
    assert not torch.equal(one.train.rows, other.train.rows)
    assert (len(one.train), len(one.val), len(one.test)) == (120, 40, 40)


def expected_features(frame: pd.DataFrame, train: np.ndarray) -> dict[str, np.ndarray]:
    """Encode by hand: median, mean and standard deviation of the training rows."""
    columns = {}
    for name in ("age", "height"):
        values = frame[name].to_numpy(float)
        filled = np.where(np.isnan(values), np.nanmedian(values[train]), values)
        columns[name] = (filled - filled[train].mean()) / filled[train].std()
    columns["height=(missing)"] = frame["height"].isna().to_numpy(float)
    for name in ("job", "sex", "race"):
        text = frame[name].to_numpy(object)
        for value in sorted({v for v in text[train] if not pd.isna(v)}):
            columns[f"{name}={value}"] = np.array([v == value for v in text], dtype=float)
        if frame[name].isna().any():
            columns[f"{name}=(missing)"] = frame[name].isna().to_numpy(float)
    return columns


def test_encoding_equals_one_by_hand(people) -> None:
    data = load_table(people, tasks=TASKS, sensitive=["sex"], features=FEATURES)
    expected = expected_features(people, data.train.rows.numpy())
    assert set(data.feature_names) == set(expected)
    assert data.n_features == len(expected)
    for part in data.splits().values():
        for index, name in enumerate(data.feature_names):
            np.testing.assert_allclose(part.x[:, index], expected[name][part.rows.numpy()], atol=1e-5, err_msg=name)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 1e6]))
def test_held_out_rows_cannot_change_training_features(people_of, seed: int, scale: float) -> None:
    people = people_of(80, seed)
    tasks = {"cost": {"kind": "regression"}}
    options = {"tasks": tasks, "sensitive": ["sex"], "features": FEATURES, "stratify": False, "seed": seed}
    before = load_table(people, **options)
    held_out = np.concatenate([before.val.rows.numpy(), before.test.rows.numpy()])
    changed = people.copy()
    rng = np.random.default_rng(seed)
    changed["age"] = changed["age"].astype(float)
    changed.loc[held_out, "age"] = rng.normal(0, scale, len(held_out))
    changed.loc[held_out, "height"] = np.where(rng.random(len(held_out)) < 0.5, np.nan, scale)
    changed.loc[held_out, "job"] = "unheard of"
    changed.loc[held_out, "cost"] = rng.normal(0, scale, len(held_out))
    after = load_table(changed, **options)
    assert torch.equal(before.train.x, after.train.x)
    assert torch.equal(before.train.labels["cost"], after.train.labels["cost"])
    assert before.tasks == after.tasks
    assert before.feature_names == after.feature_names


def test_unknown_categories_are_all_zero_and_missing_ones_too_if_training_has_none() -> None:
    fold = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    frame = pd.DataFrame(
        {
            "job": ["a", "b"] * 3 + ["a", "new", None] * 2,
            "x": [1.0, 2, 3, 4, 5, 6, None, 1, 1, 1, 1, 1],
            "y": [0, 1] * 6,
            "g": ["f", "f", "m", "m"] * 3,
            "fold": fold,
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_table(frame, tasks={"y": {"kind": "binary"}}, sensitive=["g"], features=["job", "x"], split="fold")
    assert data.feature_names == ("x", "job=a", "job=b")
    assert data.val.x[:, 1:].tolist() == [[1, 0], [0, 0], [0, 0]]
    assert float(data.val.x[0, 0]) == 0.0  # the training median, 3.5, is also its mean
    assert data.train.rows.tolist() == list(range(6))
    assert data.card["split"]["shares"] == "fold"


def test_rare_categories(people) -> None:
    people.loc[people.index[:4], "job"] = ["p", "q", "r", "s"]
    data = load_table(people, tasks=TASKS, sensitive=["sex"], features=["job", "age"], min_frequency=10)
    assert "job=(other)" in data.feature_names
    assert not {"job=p", "job=q"} & set(data.feature_names)
    assert len(data.feature_names) == data.train.x.shape[1]


def test_declared_kinds(people) -> None:
    by_mapping = load_table(
        people, tasks=TASKS, sensitive=["sex"], features={"age": "categorical", "height": "numeric", "job": "auto"}
    )
    assert by_mapping.encoder.kinds == {"age": "categorical", "height": "numeric", "job": "categorical"}
    by_list = load_table(people, tasks=TASKS, sensitive=["sex"], features=["age", "height", "job"], categorical=["age"])
    assert by_list.encoder.kinds == by_mapping.encoder.kinds
    assert any(name.startswith("age=") for name in by_list.feature_names)


def test_new_rows_are_encoded_alike(people) -> None:
    data = load_table(people, tasks=TASKS, sensitive=["sex"], features=FEATURES)
    torch.testing.assert_close(data.encode(people.iloc[data.test.rows.numpy()]), data.test.x)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
def test_files(people, tmp_path, ending) -> None:
    path = tmp_path / f"people.{ending}"
    people.to_parquet(path) if ending == "parquet" else people.to_csv(path, index=False)
    data = load_table(path, tasks=TASKS, sensitive=["sex", "race"])
    same = load_table(people, tasks=TASKS, sensitive=["sex", "race"])
    torch.testing.assert_close(data.train.x, same.train.x)
    assert data.name == "people"
    assert data.card["source"] == str(path)
    assert "people" in data.card_markdown()


@pytest.mark.parametrize(
    "convert",
    [
        lambda f: f.convert_dtypes(),
        lambda f: f.astype({"job": "category", "sex": "category", "race": "category"}),
        lambda f: f.astype({"job": object, "sex": object, "race": object, "state": object}),
        lambda f: f.astype(object),
        lambda f: f.set_index(np.zeros(len(f), dtype=int)),
    ],
    ids=["nullable", "category", "object", "all object", "repeated index"],
)
def test_column_types_make_no_difference(people, convert) -> None:
    options = {"tasks": TASKS, "sensitive": ["sex", "race"], "features": FEATURES}
    one, two = load_table(people, **options), load_table(convert(people), **options)
    for part in ("train", "val", "test"):
        torch.testing.assert_close(one.splits()[part].x, two.splits()[part].x)
        for task in TASKS:
            torch.testing.assert_close(one.splits()[part].labels[task], two.splits()[part].labels[task], equal_nan=True)
        assert torch.equal(one.splits()[part].groups["race"], two.splits()[part].groups["race"])


def test_stratified_on_each_kind(people) -> None:
    for task in TASKS:
        data = load_table(people, tasks=TASKS, sensitive=["sex"], stratify=task)
        assert data.card["split"]["stratified_on"] == task
    data = load_table(people, tasks=TASKS, sensitive=["sex"], stratify="state")
    shares = [float((part.labels["state"] == 0).float().mean()) for part in data.splits().values()]
    assert max(shares) - min(shares) < 0.03


def test_small_strata_do_not_stop_a_split(people) -> None:
    people["state"] = ["rare"] * 3 + ["common"] * (len(people) - 3)
    lacking = 0
    for seed in range(20):
        _, codes = np.unique(
            strata(raw_labels("state", TaskSpec("multiclass", column="state"), people)), return_inverse=True
        )
        train = split_rows(codes, len(people), (0.6, 0.2, 0.2), seed)["train"]
        lacking += not (people["state"].to_numpy()[train] == "rare").any()
    assert 0 < lacking < 10  # 0.4 ** 3 = 6 % of the seeds: an error of its own, not of the split


def test_native_units_on_demand(people) -> None:
    data = load_table(people, tasks={"cost": {"kind": "regression", "standardise": False}}, sensitive=["sex"])
    assert data.task("cost") == Regression("cost", mean=0.0, std=1.0)
    np.testing.assert_allclose(
        data.train.labels["cost"].numpy(), people["cost"].to_numpy()[data.train.rows.numpy()], rtol=1e-6
    )


def test_binary_labels_from_values_thresholds_and_expressions(people) -> None:
    tasks = {
        "clerk": TaskSpec("binary", column="job", positive="clerk"),
        "old": TaskSpec("binary", column="age", threshold=60),
        "both": TaskSpec("binary", expression="age >= 60 and sex == 'male'"),
    }
    data = load_table(people, tasks=tasks, sensitive=["race"])
    assert not {"job", "age", "sex"} & set(data.inputs)
    rows = data.train.rows.numpy()
    job = people["job"].to_numpy(object)[rows]
    expected = [np.nan if pd.isna(v) else float(v == "clerk") for v in job]
    np.testing.assert_array_equal(data.train.labels["clerk"].numpy(), np.array(expected, dtype=np.float32))
    np.testing.assert_array_equal(data.train.labels["old"].numpy(), (people["age"] >= 60).to_numpy()[rows])
    both = ((people["age"] >= 60) & (people["sex"] == "male")).to_numpy()[rows]
    np.testing.assert_array_equal(data.train.labels["both"].numpy(), both)
    assert data.card["tasks"]["old"]["definition"] == "age >= 60"


def test_forbidden_columns_leave_for_all_tasks(people) -> None:
    tasks = {"sick": TaskSpec("binary", column="sick", forbids=("pain", "cough")), "state": TASKS["state"]}
    data = load_table(people, tasks=tasks, sensitive=["sex"])
    assert data.inputs == ("age", "height", "job", "sex", "race", "cost")
    assert data.card["dropped"]["pain"] == "gives away the task sick"


def test_no_sensitive_attribute_at_all(people) -> None:
    data = load_table(people, tasks=TASKS)
    assert data.groups == data.train.groups == {}
    assert next(iter(data.train.loader(10, device="cpu")))[1]["sensitive"] == {}


def test_card_counts(people) -> None:
    data = load_table(
        people, tasks=TASKS, sensitive={"sex": "sex", "age": SensitiveSpec("age", bins=(40,))}, licence="own"
    )
    card = data.card
    assert card["licence"] == "own"
    assert card["missing_inputs"] == {
        "height": int(people["height"].isna().sum()),
        "job": int(people["job"].isna().sum()),
        "race": int(people["race"].isna().sum()),
    }
    for attribute, values in (("sex", people["sex"]), ("age", np.where(people["age"] < 40, "under 40", "40 and over"))):
        for group, entry in card["groups"][attribute]["groups"].items():
            inside = np.asarray(values == group)
            assert entry["rows"] == inside.sum() == sum(entry["split"].values())
            per_group = card["tasks"]["sick"]["per_group"][attribute][group]
            assert per_group["rate"] == pytest.approx(people["sick"][inside].mean())
            assert per_group["n"] == people["sick"][inside].notna().sum()
    assert card["sensitive_inputs"] == ["sex", "age"]
