"""The door for tables: one rule for every file and library; what cannot be told apart is refused, what was taken is said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import libmtl_fair as lf
from libmtl_fair.data import ResidentLoader, load_table
from libmtl_fair.data.expressions import evaluate
from libmtl_fair.data.tables import read_frame, taken_as_missing
from libmtl_fair.errors import DataError
from libmtl_fair.memory import need_memory
from libmtl_fair.metrics import ConsistencyAudit, FixedDeltaAudit, GroupMetrics
from libmtl_fair.metrics.rates import group_rates
from libmtl_fair.recipe.build import need_model
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.recipe.sections import Model
from libmtl_fair.sklearn import FairMTLClassifier

N = 120


def make(**columns: object) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    base = {"y": draw.integers(0, 2, N), "x": draw.normal(size=N), "sex": draw.choice(["f", "m"], N)}
    return pd.DataFrame(base | columns)


def load(source: object, **options: object):
    options = {"tasks": {"y": {"kind": "binary"}}, "sensitive": ["sex"]} | options
    return load_table(source, **options)


# --- expressions ---------------------------------------------------------------------------------------------------


def met(series: object, expression: str) -> list[float]:
    return evaluate(expression, pd.DataFrame({"c": series}), "where").tolist()


@pytest.mark.parametrize(
    ("values", "expression", "expected"),
    [
        (["1234567", "1"], "c == 1234567", [1, 0]),
        (["007", "7"], "c == 007", [1, 0]),
        (["1e5", "100000"], "c == 1e5", [1, 0]),
        (["nan", "inf"], "c == nan", [1, 0]),
        ([2**53, 2**53 + 1], f"c == {2**53 + 1}", [0, 1]),
        (pd.array([2**53 + 1, None], dtype="Int64"), f"c == {2**53}", [0, np.nan]),
        (pd.to_datetime(["2020-01-31", "2020-02-01"]), "c >= 2020-02-01", [0, 1]),
        (pd.to_datetime(["2020-01-31", "2020-02-01"]).tz_localize("UTC"), "c < '2020-02-01'", [1, 0]),
        ([True, False], "c == true", [1, 0]),
        (pd.Categorical([10, 20]), "c > 15", [0, 1]),
    ],
)
def test_a_value_is_compared_as_its_columns_type(values, expression, expected):
    np.testing.assert_array_equal(met(values, expression), expected)


@pytest.mark.parametrize(
    ("values", "expression"),
    [
        ([1.0, 2.0], "c == nan"),
        ([1.0, 2.0], "c < inf"),
        ([1, 2], "c == '1'"),
        (pd.to_datetime(["2020-01-31"]), "c > 5"),
        (pd.to_datetime(["2020-01-31"]), "c > soon"),
        ([True, False], "c == yes"),
        ([True, False], "c > 0"),
        (["a", "b"], "c > a"),
    ],
)
def test_what_cannot_be_compared_is_refused(values, expression):
    with pytest.raises(DataError, match="column 'c' holds"):
        met(values, expression)


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_header_that_is_there_twice_is_refused(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("y,x,y\n1,2,1\n")
    with pytest.raises(DataError, match="column 'y' is there twice"):
        read_frame(file)


WORDS = ["None", "NA", "nan", "null", "n/a", "", "a", "007", "7", "1.50", "true", "?", "-"]
COLUMNS = st.one_of(
    st.lists(st.sampled_from([*WORDS, None]), min_size=4, max_size=8),
    st.lists(st.sampled_from(["1", "2", "NA", "", "nan"]), min_size=4, max_size=8),
    st.lists(st.one_of(st.none(), st.integers(-(2**62), 2**62)), min_size=4, max_size=8).map(
        lambda v: pd.array(v, dtype="Int64")
    ),
    st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=4, max_size=8).map(
        lambda v: np.array(v, dtype=float)
    ),
    st.lists(st.sampled_from([True, False]), min_size=4, max_size=8),
    st.lists(
        st.dates(pd.Timestamp("1990-01-01").date(), pd.Timestamp("2020-01-01").date()), min_size=4, max_size=8
    ).map(pd.to_datetime),
)


@settings(max_examples=120, deadline=None)
@given(column=COLUMNS)
def test_csv_and_parquet_give_the_same_values(tmp_path_factory, column):
    from libmtl_fair.data.frames import as_text

    folder = tmp_path_factory.mktemp("t")
    frame = pd.DataFrame({"c": column, "keep": range(len(column))})
    frame.to_csv(folder / "t.csv", index=False)
    frame.to_parquet(folder / "t.parquet")
    one, other = read_frame(folder / "t.csv"), read_frame(folder / "t.parquet")
    assert as_text(one["c"]).tolist() == as_text(other["c"]).tolist()


def test_what_was_taken_as_missing_is_in_the_card(tmp_path):
    frame = make(pay=[*["NA", "?"], *map(str, range(N - 2))], kind=["None", "NA", ""] * 40)
    frame.to_csv(tmp_path / "t.csv", index=False)
    data = load(tmp_path / "t.csv", sensitive=["sex", "kind"])
    assert data.groups["kind"] == ["NA", "None"]
    assert data.card["taken_as_missing"] == {"pay": {"NA": 1, "?": 1}, "kind": {"": 40}}
    assert "pay: '?' 1 times, 'NA' 1 times" in data.card_markdown()
    named = load(tmp_path / "t.csv", sensitive=["sex"], missing_values=["NA"])
    assert named.card["taken_as_missing"]["kind"] == {"": 40, "NA": 40}


@pytest.mark.parametrize("text", ["a,b\n1,2\n3\n", "a,b\n1,2,3\n", "", "a,b\n", 'a,b\n"1,2\n'])
def test_a_damaged_file_is_refused(tmp_path, text):
    file = tmp_path / "t.csv"
    file.write_text(text)
    with pytest.raises(DataError, match="cannot be read as a table|has no rows"):
        read_frame(file)


def test_numbers_are_read_exactly(tmp_path):
    draw = np.random.default_rng(3)
    frame = pd.DataFrame(
        {"f": draw.normal(size=500) * 10.0 ** draw.integers(-300, 300, 500), "i": 10**17 - np.arange(500)}
    )
    frame.to_csv(tmp_path / "t.csv.gz", index=False)
    pd.testing.assert_frame_equal(read_frame(tmp_path / "t.csv.gz"), frame, check_exact=True)


def test_other_separators_an_index_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "t.csv"
    file.write_bytes("\ufeff;a;b c\n0;1;x,y\n1;2;z\n".encode())
    frame = read_frame(file)
    assert frame.to_dict("list") == {"Unnamed: 0": [0, 1], "a": [1, 2], "b c": ["x,y", "z"]}


# --- limits --------------------------------------------------------------------------------------------------------


def test_many_categories_become_one_and_the_card_says_so():
    draw = np.random.default_rng(1)
    frame = pd.concat([make()] * 20, ignore_index=True)
    frame["zip"] = [f"z{i}" for i in draw.integers(0, 300, len(frame))]
    data = load(frame)
    assert sum(name.startswith("zip=") for name in data.feature_names) == 101
    assert "zip=(other)" in data.feature_names
    seen = frame.loc[data.train.rows.numpy(), "zip"].nunique()
    assert data.card["other_categories"] == {"zip": seen - 100} and "of zip" in data.card_markdown()
    few = load(frame, max_categories=10)
    assert sum(name.startswith("zip=") for name in few.feature_names) == 11
    counts = frame.loc[few.train.rows.numpy(), "zip"].value_counts()
    kept = dict(few.encoder.categorical())["zip"]
    assert counts[list(kept)].min() >= counts.drop(list(kept)).max()


def test_an_id_is_refused_with_the_way_out():
    frame = make(person=[f"p{i}" for i in range(N)])
    with pytest.raises(DataError, match=r"feature 'person' looks like an id.*drop: \[person\]"):
        load(frame)
    data = load(frame, drop=["person"])
    assert "person" not in data.inputs and data.card["dropped"]["person"] == "dropped, as asked"
    with pytest.raises(DataError, match="drop: unknown column 'persn'; did you mean 'person'"):
        load(frame, drop=["persn"])


def test_memory_is_estimated_before_it_is_taken():
    need_memory(1e6, "this", "nothing")
    with pytest.raises(DataError, match=r"this would take .* GB of memory, of which .* GB is free; take less"):
        need_memory(1e18, "this", "take less")
    with pytest.raises(DataError, match=r"a model of widths \[3, 1000000, 1000000\] would take"):
        need_model(Model(hidden=(1_000_000, 1_000_000)), (3,))
    with pytest.raises(DataError, match="pairs of an audit would take"):
        FixedDeltaAudit(0.1, n_pairs=10**13).run({"a": [0.1, 0.2], "b": [0.1, 0.3]})
    x, y = torch.zeros(3, 1), {"t": torch.zeros(3)}
    with pytest.raises(DataError, match="found id 1000000000000000"):
        ResidentLoader(x, y, {"a": torch.tensor([0, 1, 10**15])}, batch_size=2, shuffle=False)
    with pytest.raises(DataError, match="found id 1000000000000000"):
        group_rates([0, 1], [0, 1], [0, 10**15])


@pytest.mark.parametrize("age", [np.linspace(18, 90, N), np.arange(N), pd.date_range("1950-01-01", periods=N)])
def test_numbers_are_no_groups_at_any_door(age):
    frame = make(age=age)
    with pytest.raises(DataError, match=r"column 'age' holds .*one group a value compares nobody"):
        load(frame, sensitive=["sex", "age"])
    with pytest.raises(DataError, match="'age' holds .*one group a value compares nobody"):
        FairMTLClassifier("fairmt").fit(frame[["x"]], frame["y"], sensitive_features=frame["age"])


def test_ages_are_no_group_ids():
    x, y = torch.zeros(3, 1), {"t": torch.zeros(3)}
    for ages in (np.array([18, 44, -1]), np.array([18.5, 44, 61]), torch.tensor([18, 44, 90])):
        with pytest.raises(DataError, match="sensitive attribute 'age': "):
            ResidentLoader(x, y, {"age": ages}, batch_size=2, shuffle=False)
    ResidentLoader(x, y, {"age": torch.tensor([5, 11, -1])}, batch_size=2, shuffle=False, device="cpu")


def test_the_proposed_bins_work():
    frame = make(age=np.linspace(18, 90, N))
    with pytest.raises(DataError, match=r"bins: \[36, 54, 72\]"):
        load(frame, sensitive=["age"])
    data = load(frame, sensitive={"age": {"bins": [36, 54, 72]}})
    assert data.groups["age"] == ["under 36", "36 to under 54", "54 to under 72", "72 and over"]


# --- rows and dates ------------------------------------------------------------------------------------------------


def test_a_row_filter():
    frame = make(country=["DE", "FR", None] * 40, seen=pd.date_range("2020-01-01", periods=N))
    data = load(frame, where="country == 'DE' and seen >= 2020-02-01", drop=["country"])
    rows = np.concatenate([part.rows.numpy() for part in data.splits().values()])
    assert sorted(rows) == [i for i in range(N) if i % 3 == 0 and i >= 31]
    assert data.card["filter"].startswith("country ==")
    with pytest.raises(DataError, match="where: unknown column 'contry'; did you mean 'country'"):
        load(frame, where="contry == 'DE'")
    with pytest.raises(DataError, match="no row passes"):
        load(frame, where="x > 1000")


def test_dates_are_days():
    frame = make(seen=pd.date_range("2020-01-01", periods=N))
    data = load(frame)
    days = data.train.x[:, data.feature_names.index("seen")]
    order = data.train.rows.argsort()
    assert (days[order].diff() > 0).all()


def test_recipes_take_what_load_table_takes(tmp_path):
    frame = make(person=[f"p{i}" for i in range(N)])
    frame.to_csv(tmp_path / "t.csv", index=False)
    data = {"table": str(tmp_path / "t.csv"), "tasks": {"y": {"kind": "binary"}}, "sensitive": ["sex"]}
    plain = Recipe.from_dict({"name": "r", "data": data, "methods": {"plain": {"weighting": "EW"}}})
    assert not {"drop", "where", "max_categories", "missing_values"} & set(plain.to_dict()["data"])
    data |= {"drop": ["person"], "where": "x > -1", "max_categories": 5, "missing_values": ["?"]}
    recipe = Recipe.from_dict({"name": "r", "data": data, "methods": {"plain": {"weighting": "EW"}}})
    assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.fingerprint() != plain.fingerprint()
    from libmtl_fair.recipe.build import make_dataset

    assert make_dataset(recipe, 0).card["rows"] == int((frame["x"] > -1).sum())
    with pytest.raises(lf.RecipeError if hasattr(lf, "RecipeError") else ValueError, match=r"data\.where.*cannot read"):
        Recipe.from_dict(recipe.to_dict() | {"data": data | {"where": "x >"}})


# --- libraries -----------------------------------------------------------------------------------------------------

LIBRARIES = {
    "pandas": lambda frame: frame,
    "nullable": lambda frame: frame.convert_dtypes(),
    "polars": pl.from_pandas,
    "lazy": lambda frame: pl.from_pandas(frame).lazy(),
    "pyarrow": pa.Table.from_pandas,
}


@pytest.fixture
def table() -> pd.DataFrame:
    frame = make(flag=[True, False] * 60, seen=pd.date_range("2020-01-01", periods=N))
    frame["some"] = pd.array([True, None, False] * 40, dtype="boolean")
    return frame


@pytest.mark.parametrize("library", LIBRARIES)
def test_tables_of_every_library_are_one_data_set(table, library):
    expected, found = load(table), load(LIBRARIES[library](table))
    assert found.feature_names == expected.feature_names and found.groups == expected.groups
    torch.testing.assert_close(found.train.x, expected.train.x)


@pytest.mark.parametrize("library", [name for name in LIBRARIES if name != "lazy"])
def test_estimators_take_every_library(table, library):
    convert = LIBRARIES[library]
    columns = ["x", "flag", "some", "seen", "sex"]

    def fitted(change):
        model = FairMTLClassifier("relif", epochs=1, hidden=(4,), random_state=0)
        y = change(table[["y"]])
        model.fit(change(table[columns]), y["y"], sensitive_features=change(table[["sex"]]))
        return model.predict_proba(change(table[columns]))

    np.testing.assert_allclose(fitted(convert), fitted(lambda frame: frame), atol=1e-6)


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_metrics_take_every_library_and_text(table, library):
    native = LIBRARIES[library](table)
    sex, y = native["sex"], native["y"]
    rates = group_rates(y, native["flag"], sex)
    ids = (table["sex"] == "m").to_numpy().astype(int)
    expected = group_rates(table["y"].to_numpy(), table["flag"].to_numpy(), ids, 2)
    assert rates.names == ("f", "m")
    np.testing.assert_array_equal(rates.counts, expected.counts)
    audit = ConsistencyAudit(LIBRARIES[library](table[["x", "sex"]]), k=3, sensitive={"sex": sex})
    report = audit.run({"y": native["x"]})
    assert set(report.split["attribute"]) == {"sex"}
    metrics = GroupMetrics([lf.Binary("y")], {"sex": 2}, group_names={"sex": ["f", "m"]}, confidence=None)
    got = metrics.update({"y": native["x"]}, {"y": y}, {"sex": sex}).compute()
    metrics.reset()
    args = torch.tensor(table["x"].to_numpy()), torch.tensor(table["y"].to_numpy()), torch.tensor(ids)
    want = metrics.update({"y": args[0]}, {"y": args[1]}, {"sex": args[2]}).compute()
    pd.testing.assert_frame_equal(got, want)
    with pytest.raises(DataError, match="attribute 'sex': unknown group 'x'"):
        metrics.update({"y": args[0][:1]}, {"y": args[1][:1]}, {"sex": ["x"]})


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_loaders_take_every_library_and_text(table, library):
    native = LIBRARIES[library](table[["x", "flag"]])
    groups = LIBRARIES[library](table[["sex"]])["sex"]
    labels = LIBRARIES[library](table[["y"]])["y"]
    loader = ResidentLoader(native, {"y": labels}, {"sex": groups}, batch_size=N, shuffle=False, device="cpu")
    x, found = next(iter(loader))
    assert loader.group_names == {"sex": ["f", "m"]} and x.shape == (N, 2)
    assert found["sensitive"]["sex"].tolist() == (table["sex"] == "m").astype(int).tolist()


def test_an_empty_text_is_missing_and_counted():
    frame = read_frame(pd.DataFrame({"c": ["a", "", None]}))
    assert frame["c"].isna().tolist() == [False, True, True] and taken_as_missing(frame) == {"c": {"": 1}}
