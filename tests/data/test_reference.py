"""Reference features: what is left out of them, their distance by loops, and how a loader hands them on."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from libmtl_fair.data import ResidentLoader, TableDataset, collate, load_dataset, load_table
from libmtl_fair.data.reference import narrowed, tells
from libmtl_fair.errors import DataError
from libmtl_fair.libmtl import batches


def frame(n: int = 400) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    sex = rng.choice(["f", "m"], n)
    return pd.DataFrame(
        {
            "passed": rng.integers(0, 2, n),
            "sex": sex,
            "title": np.where(rng.random(n) < 0.9, np.where(sex == "f", "Ms", "Mr"), "Dr"),
            "age": rng.normal(40, 10, n),
            "income": np.where(rng.random(n) < 0.01, 1e6, rng.normal(10, 3, n)),
            "town": rng.choice(["a", "b", "c"], n),
        }
    )


def test_sensitive_columns_and_those_that_tell_them_are_left_out() -> None:
    data = load_table(frame(), tasks={"passed": {"kind": "binary", "positive": 1}}, sensitive={"sex": "sex"}, seed=0)
    reference = data.reference
    assert reference is not None
    assert reference.inputs == ("age", "income", "town")
    assert set(reference.left_out) == {"sex", "title"}
    assert "shows sex" in reference.left_out["sex"] and "tells sex" in reference.left_out["title"]
    adult = load_dataset("adult", tasks=["income"], sensitive=["sex", "race"], subset=3000).reference
    assert adult is not None
    assert {"sex", "race", "relationship"} <= set(adult.left_out)
    assert {"age", "education"} <= set(adult.inputs)


def test_the_distance_is_that_of_the_definition() -> None:
    data = load_table(frame(), tasks={"passed": {"kind": "binary", "positive": 1}}, sensitive={"sex": "sex"}, seed=0)
    split, reference = data.train, data.reference
    assert reference is not None
    features = reference.features(split.x).double()
    table, names = frame().iloc[split.rows.numpy()].reset_index(drop=True), list(split.feature_names)
    numbers = {name: split.x[:, names.index(name)].double().clamp(-5, 5) for name in ("age", "income")}
    assert float(split.x[:, names.index("income")].max()) > 5
    for i, j in itertools.combinations(range(0, len(split), 37), 2):
        expected = sum(float(v[i] - v[j]) ** 2 for v in numbers.values()) + (table["town"][i] != table["town"][j])
        assert float((features[i] - features[j]).square().sum()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("values", "ids", "expected"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 1.0),
        ([0, 1, 0, 1], [0, 0, 1, 1], 0.0),
        ([0, 0, 0, 1, 1, 1], [0, 0, -1, 1, 1, -1], 1.0),
        ([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], 2 / 3),
        ([0, 1, 2, 3], [0, 0, 1, 1], 0.0),
        (list(range(400)), [0] * 200 + [1] * 200, 1.0),
        ([0, 1], [0, 0], 0.0),
        ([0, 1], [-1, -1], 0.0),
    ],
)
def test_how_well_a_column_tells_an_attribute(values: list[int], ids: list[int], expected: float) -> None:
    column = np.array(values, dtype=np.float32)[:, None]
    assert tells(column, np.array(ids)) == pytest.approx(expected)
    if len(values) < 9:
        one_hot = (column == np.unique(column)).astype(np.float32)
        assert tells(one_hot, np.array(ids)) == pytest.approx(expected)


def make(n: int = 23, reference: object = "own", **options: object) -> ResidentLoader:
    x = torch.arange(n * 2, dtype=torch.float32).view(n, 2)
    given = x * 10 if reference == "own" else reference
    return ResidentLoader(
        x, {"t": x[:, 0] % 2}, batch_size=5, shuffle=True, seed=1, device="cpu", reference=given, **options
    )  # type: ignore[arg-type]


def test_every_batch_has_its_rows_reference() -> None:
    for x, labels in make():
        assert torch.equal(labels["reference"], x * 10)
    for packed in batches.drawn(make()):
        assert torch.equal(batches.split(packed, torch.device("cpu"), ["t"]).reference(), packed.x * 10)
    x = torch.randn(7, 2)
    rows = TableDataset(x, {"t": torch.arange(7)}, reference=x + 1)
    loader = DataLoader(rows, batch_size=3, collate_fn=collate)
    for batch in loader:
        assert torch.equal(batches.split(batch, torch.device("cpu"), ["t"]).reference(), batch[0] + 1)
    assert all("reference" not in labels for _, labels in make(reference=None))


def test_a_table_split_hands_its_reference_on() -> None:
    data = load_table(frame(), tasks={"passed": {"kind": "binary", "positive": 1}}, sensitive={"sex": "sex"}, seed=0)
    assert data.reference is not None
    for loader in (
        data.train.loader(64, shuffle=True, seed=0, device="cpu"),
        DataLoader(data.train.torch_dataset(), 50),
    ):
        x, labels = next(iter(loader))
        torch.testing.assert_close(labels["reference"], data.reference.features(x))


def test_a_wide_reference_keeps_its_principal_components() -> None:
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(300, 20, generator=g) @ torch.randn(20, 200, generator=g)
    found = narrowed(wide)
    assert found.shape == (300, 32)
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(wide, wide), rtol=1e-3, atol=1e-1)
    assert make(300, wide).reference.shape == (300, 32)  # type: ignore[union-attr]
    assert narrowed(found) is found


@pytest.mark.parametrize(
    ("reference", "match"),
    [
        (torch.zeros(22, 3), "reference: expected 23 rows"),
        (torch.zeros(23), r"reference: expected finite features \[N, r\]"),
        (torch.full((23, 1), float("nan")), "not finite"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(reference: torch.Tensor, match: str) -> None:
    with pytest.raises(DataError, match=match):
        make(reference=reference)


def test_a_task_named_reference_works_where_there_is_none() -> None:
    x = torch.zeros(4, 1)
    with pytest.raises(DataError, match="a task may not be named 'reference' where there is a reference"):
        TableDataset(x, {"reference": torch.ones(4)}, reference=x)
    batch = next(iter(ResidentLoader(x, {"reference": torch.ones(4)}, batch_size=4, shuffle=False, device="cpu")))
    assert batches.split(batch, torch.device("cpu"), ["reference"]).reference() is None
