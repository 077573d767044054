"""Datasets that are not shipped, on small generated frames of the same columns, and what happens offline."""

from __future__ import annotations

from types import SimpleNamespace
from urllib.error import URLError

import fairlearn.datasets
import numpy as np
import pandas as pd
import pytest

from libmtl_fair.data import describe_dataset, load_dataset
from libmtl_fair.data.fetched import FETCHED
from libmtl_fair.errors import DataError

N = 400


def bank(rng: np.random.Generator) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "age": rng.integers(18, 90, N),
            "job": rng.choice(["admin.", "technician", "retired"], N),
            "marital": rng.choice(["married", "single", "divorced"], N),
            "education": rng.choice(["primary", "secondary", "tertiary", "unknown"], N),
            "default": rng.choice(["no", "yes"], N, p=[0.9, 0.1]),
            "balance": rng.normal(1000, 500, N),
            "housing": rng.choice(["no", "yes"], N),
            "loan": rng.choice(["no", "yes"], N),
            "contact": rng.choice(["cellular", "telephone"], N),
            "day": rng.integers(1, 32, N),
            "month": rng.choice(["may", "jun"], N),
            "duration": rng.integers(1, 900, N),
            "campaign": rng.integers(1, 9, N),
            "pdays": rng.integers(-1, 300, N),
            "previous": rng.integers(0, 5, N),
            "poutcome": rng.choice(["unknown", "success"], N),
            "Class": pd.Categorical(rng.choice(["1", "2"], N, p=[0.8, 0.2])),
        }
    )


def acs(rng: np.random.Generator) -> pd.DataFrame:
    codes = {"COW": 8, "MAR": 5, "OCCP": 500, "POBP": 40, "RELP": 17, "RAC1P": 9, "SCHL": 24}
    frame = pd.DataFrame({name: rng.integers(1, top + 1, N).astype(float) for name, top in codes.items()})
    frame["AGEP"], frame["WKHP"] = rng.integers(17, 95, N).astype(float), rng.integers(1, 99, N).astype(float)
    frame["SEX"] = rng.choice([1.0, 2.0], N)
    frame["PINCP"] = np.exp(rng.normal(10.6, 1, N)).round()
    return frame[list(FETCHED["acs_income"].columns)]


def credit(rng: np.random.Generator) -> pd.DataFrame:
    frame = pd.DataFrame({name: rng.integers(-2, 9, N) for name in FETCHED["credit_card"].columns})
    frame["LIMIT_BAL"], frame["AGE"] = rng.integers(10, 800, N) * 1000, rng.integers(21, 79, N)
    frame["SEX"], frame["EDUCATION"], frame["MARRIAGE"] = (rng.integers(1, k, N) for k in (3, 5, 4))
    frame["y"] = pd.Categorical(rng.choice(["0", "1"], N))
    return frame


def diabetes(rng: np.random.Generator) -> pd.DataFrame:
    numbers = ["time_in_hospital", "num_lab_procedures", "num_procedures", "num_medications", "number_diagnoses"]
    frame = pd.DataFrame({name: rng.integers(1, 15, N) for name in numbers})
    choices = {
        "race": ["Caucasian", "AfricanAmerican", "Unknown"],
        "gender": ["Female", "Male"],
        "age": ["30 years or younger", "30-60 years", "Over 60 years"],
        "insulin": ["No", "Steady", "Up", "Down"],
        "readmitted": ["NO", "<30", ">30"],
    }
    for name in FETCHED["diabetes_hospital"].columns:
        if name not in frame:
            frame[name] = rng.choice(choices.get(name, ["True", "False"]), N)
    frame["readmit_30_days"] = (frame["readmitted"] == "<30").astype(int)
    frame["readmit_binary"] = (frame["readmitted"] != "NO").astype(int)
    return frame


MAKERS = {"bank_marketing": bank, "acs_income": acs, "credit_card": credit, "diabetes_hospital": diabetes}


@pytest.fixture
def frames() -> dict[str, pd.DataFrame]:
    return {name: make(np.random.default_rng(0)) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_default_sets_load_from_a_frame(frames, name) -> None:
    frame = frames[name]
    assert list(frame.columns) == list(FETCHED[name].columns) or set(frame.columns) == set(FETCHED[name].columns)
    data = load_dataset(name, frame=frame, min_frequency=5)
    about = describe_dataset(name)
    assert data.task_names == tuple(about["default_tasks"])
    assert list(data.groups) == about["default_sensitive"]
    assert list(data.inputs) == about["default_inputs"]
    assert sum(len(part) for part in data.splits().values()) == N
    assert not about["shipped"]


@pytest.mark.parametrize("name", MAKERS)
def test_every_task_alone_and_no_leak(frames, name) -> None:
    about = describe_dataset(name)
    for task, entry in about["tasks"].items():
        data = load_dataset(name, tasks=[task], sensitive=about["sensitive"], frame=frames[name])
        columns = {*data.card["tasks"][task]["columns"], *entry["forbids"]}
        assert not columns & set(data.inputs)


def test_leaks_of_each() -> None:
    assert "duration" not in describe_dataset("bank_marketing")["default_inputs"]
    assert not {"housing", "loan"} & set(describe_dataset("bank_marketing")["default_inputs"])
    assert not {"PINCP", "SCHL", "WKHP"} & set(describe_dataset("acs_income")["default_inputs"])
    assert not {"PAY_0", "LIMIT_BAL", "y"} & set(describe_dataset("credit_card")["default_inputs"])
    hospital = set(describe_dataset("diabetes_hospital")["default_inputs"])
    assert not {"readmitted", "readmit_binary", "readmit_30_days", "time_in_hospital"} & hospital


def test_labels(frames) -> None:
    data = load_dataset("acs_income", frame=frames["acs_income"])
    rows = data.train.rows.numpy()
    np.testing.assert_array_equal(
        data.train.labels["income"].numpy(), (frames["acs_income"]["PINCP"] > 50_000).to_numpy()[rows]
    )
    assert data.groups["sex"] == ["Female", "Male"]
    data = load_dataset("bank_marketing", frame=frames["bank_marketing"])
    np.testing.assert_array_equal(
        data.train.labels["deposit"].numpy(),
        (frames["bank_marketing"]["Class"] == "2").to_numpy()[data.train.rows.numpy()],
    )


def test_openml_names_of_older_fairlearn(frames) -> None:
    frame = frames["bank_marketing"].copy()
    same = load_dataset("bank_marketing", frame=frame)
    frame.columns = [*(f"V{i}" for i in range(1, 17)), "Class"]
    assert load_dataset("bank_marketing", frame=frame).inputs == same.inputs


def test_from_a_file(frames, tmp_path) -> None:
    path = tmp_path / "bank.parquet"
    frames["bank_marketing"].to_parquet(path)
    assert load_dataset("bank_marketing", frame=path).card["rows"] == N


@pytest.mark.parametrize("name", MAKERS)
def test_through_the_fetcher(frames, name, monkeypatch) -> None:
    monkeypatch.setattr(fairlearn.datasets, f"fetch_{name}", lambda as_frame: SimpleNamespace(frame=frames[name]))
    assert load_dataset(name).card["rows"] == N


@pytest.mark.parametrize(
    "error", [URLError("no route to host"), ConnectionResetError("reset"), ValueError("not a record")]
)
@pytest.mark.parametrize("name", MAKERS)
def test_offline(name, error, monkeypatch) -> None:
    def fetch(as_frame: bool) -> None:
        raise error

    monkeypatch.setattr(fairlearn.datasets, f"fetch_{name}", fetch)
    with pytest.raises(DataError, match=rf"'{name}' is not shipped and could not be fetched .*frame=DataFrame or path"):
        load_dataset(name)


def test_a_frame_without_the_columns(frames) -> None:
    with pytest.raises(DataError, match="unknown column 'housing'"):
        load_dataset("bank_marketing", frame=frames["bank_marketing"].drop(columns="housing"))
