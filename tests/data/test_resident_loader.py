"""The loader: every row once an epoch, seeded orders, exact resume, independent iterators, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from libmtl_fair.data import ResidentLoader, TableDataset, collate, resolve_device
from libmtl_fair.errors import DataError

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


def tables(n: int, n_tasks: int = 3) -> tuple[torch.Tensor, dict, dict]:
    generator = torch.Generator().manual_seed(n)
    x = torch.cat([torch.arange(n, dtype=torch.float32)[:, None], torch.randn(n, 4, generator=generator)], dim=1)
    labels = {f"b{k}": (torch.rand(n, generator=generator) < 0.4).float() for k in range(n_tasks)}
    labels["b0"][::5] = float("nan")
    labels["m"] = torch.randint(-1, 4, (n,), generator=generator)
    labels["m"][labels["m"] < 0] = -100
    labels["multi"] = torch.randint(0, 2, (n, 3), generator=generator).float()
    groups = {
        "sex": torch.randint(-1, 2, (n,), generator=generator),
        "race": torch.randint(0, 5, (n,), generator=generator),
    }
    return x, labels, groups


def make(n: int = 23, **options) -> ResidentLoader:
    x, labels, groups = tables(n)
    settings_ = {"batch_size": 5, "shuffle": True, "seed": 3, "device": "cpu"} | options
    return ResidentLoader(x, labels, groups, **settings_)


def rows_of(loader) -> list[int]:
    return [int(row) for x, _ in loader for row in x[:, 0]]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60),
    batch=st.integers(1, 70),
    shuffle=st.booleans(),
    drop=st.booleans(),
    seed=st.integers(-5, 2**63),
)
def test_every_row_once_with_its_own_labels(n: int, batch: int, shuffle: bool, drop: bool, seed: int) -> None:
    x, labels, groups = tables(n)
    drop = drop and n >= batch
    loader = ResidentLoader(
        x, labels, groups, batch_size=batch, shuffle=shuffle, seed=seed, device="cpu", drop_last=drop
    )
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == (n // batch if drop else -(-n // batch))
        seen = torch.cat([b[0] for b in batches])[:, 0].long()
        assert len(set(seen.tolist())) == len(seen) == (n - n % batch if drop else n)
        if not shuffle:
            assert seen.tolist() == sorted(seen.tolist())
        for features, found in batches:
            rows = features[:, 0].long()
            torch.testing.assert_close(features, x[rows])
            assert set(found) == {*labels, "sensitive"}
            for task in labels:
                torch.testing.assert_close(found[task], labels[task][rows], equal_nan=True)
            for attribute in groups:
                assert torch.equal(found["sensitive"][attribute], groups[attribute][rows])


def test_on_each_device(device: str) -> None:
    loader = make(device=device)
    assert sorted(rows_of(loader)) == list(range(23))
    x, labels = next(iter(loader))
    assert {x.device.type, labels["b0"].device.type, labels["sensitive"]["sex"].device.type} == {device}
    state = loader.state_dict()
    expected = rows_of(loader)
    other = make(device=device, seed=99)
    other.load_state_dict(state)
    assert rows_of(other) == expected


def test_orders_depend_on_seed_and_epoch_only() -> None:
    first, again, other = make(), make(), make(seed=4)
    epochs = [rows_of(first) for _ in range(3)]
    torch.randperm(1000)  # the global generator plays no part
    assert [rows_of(again) for _ in range(3)] == epochs
    assert len({tuple(order) for order in epochs}) == 3
    assert rows_of(other) not in epochs


def test_no_seed_draws_one_from_torchs_global_generator() -> None:
    torch.manual_seed(11)
    first = make(seed=None)
    second = make(seed=None)
    torch.manual_seed(11)
    assert make(seed=None).seed == first.seed != second.seed


def test_first_position_is_uniform() -> None:
    loader = make(n=10, batch_size=10)
    first = [rows_of(loader)[0] for _ in range(2000)]
    counts = np.bincount(first, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees of freedom, p = .001


def test_state_resumes_the_next_epoch_exactly() -> None:
    whole = make()
    orders = [rows_of(whole) for _ in range(5)]
    stopped = make()
    for _ in range(2):
        rows_of(stopped)
    state = stopped.state_dict()
    resumed = make(seed=1234)
    resumed.load_state_dict(state)
    assert resumed.epoch == 2
    assert [rows_of(resumed) for _ in range(3)] == orders[2:]


def test_iterators_are_independent() -> None:
    loader = make(batch_size=4)
    one, two = iter(loader), iter(loader)
    rows_one = [int(r) for r in next(one)[0][:, 0]]
    rows_two = [int(r) for r in next(two)[0][:, 0]]
    rows_one += [int(r) for x, _ in one for r in x[:, 0]]
    rows_two += [int(r) for x, _ in two for r in x[:, 0]]
    assert sorted(rows_one) == sorted(rows_two) == list(range(23))
    assert rows_one != rows_two
    with pytest.raises(StopIteration):
        next(one)


def test_libmtl_calls_next_as_a_method_and_writes_into_labels() -> None:
    loader = make(shuffle=False)
    iterator = iter(loader)
    _, labels = iterator.next()
    labels["b1"] = "overwritten"
    assert torch.is_tensor(next(iter(loader))[1]["b1"])


def test_attributes() -> None:
    loader = make(group_names={"sex": ["f", "m"], "race": list("abcde")}, drop_last=True)
    assert (loader.n_rows, loader.batch_size, len(loader)) == (23, 5, 4)
    assert loader.task_names == ("b0", "b1", "b2", "m", "multi")
    assert loader.n_groups == {"sex": 2, "race": 5}
    assert loader.group_names["sex"] == ["f", "m"]
    assert loader.device == torch.device("cpu")
    assert make().group_names["race"] == ["0", "1", "2", "3", "4"]


def test_many_tasks_are_gathered_as_one_matrix() -> None:
    x, labels, groups = tables(30, n_tasks=40)
    loader = ResidentLoader(x, labels, groups, batch_size=10, shuffle=True, device="cpu")
    assert len(loader._labels) == 3  # 40 binary tasks, one multiclass, one multilabel
    assert len(loader._groups) == 1


def test_numpy_and_dtypes() -> None:
    x = np.arange(12.0).reshape(6, 2)[::-1]
    labels = {"a": np.array([True, False] * 3), "b": np.arange(6, dtype=np.int32), "c": np.arange(6.0)}
    loader = ResidentLoader(
        x, labels, {"g": np.array([0, 1, -1] * 2, dtype=np.int8)}, batch_size=6, shuffle=False, device="cpu"
    )
    features, found = next(iter(loader))
    assert features.dtype == found["a"].dtype == found["c"].dtype == torch.float32
    assert found["b"].dtype == found["sensitive"]["g"].dtype == torch.int64
    np.testing.assert_array_equal(features.numpy(), x)
    double = ResidentLoader(
        torch.ones(2, 1, dtype=torch.float64), {"a": torch.ones(2)}, batch_size=2, shuffle=False, device="cpu"
    )
    assert next(iter(double))[0].dtype == torch.float64
    assert next(iter(double))[1]["sensitive"] == {}


def test_images_and_sequences_pass() -> None:
    loader = ResidentLoader(
        torch.randn(4, 3, 8, 8), {"t": torch.zeros(4)}, batch_size=3, shuffle=True, device="cpu", seed=0
    )
    assert [x.shape for x, _ in loader] == [(3, 3, 8, 8), (1, 3, 8, 8)]


@pytest.mark.parametrize("collation", [None, collate])
def test_ordinary_dataloader_gives_equal_batches(collation) -> None:
    x, labels, groups = tables(23)
    rows = TableDataset(x, labels, groups, group_names={"sex": ["f", "m"]})
    ours = ResidentLoader(x, labels, groups, batch_size=7, shuffle=False, device="cpu")
    batches = list(DataLoader(rows, batch_size=7, collate_fn=collation))
    assert len(batches) == len(ours)
    for (x1, y1), (x2, y2) in zip(batches, ours):
        assert torch.equal(x1, x2)
        assert set(y1) == set(y2)
        for task in labels:
            torch.testing.assert_close(y1[task], y2[task], equal_nan=True)
        for attribute in groups:
            assert torch.equal(y1["sensitive"][attribute], y2["sensitive"][attribute])
    assert rows.n_groups == {"sex": 2, "race": 5}
    assert rows.task_names == tuple(labels)


def test_dataloader_without_groups() -> None:
    rows = TableDataset(torch.eye(3), {"t": torch.zeros(3)})
    assert next(iter(DataLoader(rows, batch_size=2)))[1]["sensitive"] == {}


X = torch.ones(4, 2)
Y = {"t": torch.zeros(4)}


def test_feature_that_is_not_finite_is_named() -> None:
    bad = X.clone()
    bad[2, 1] = float("nan")
    with pytest.raises(DataError, match=r"1 values that are NaN or infinite, the first in column 1 \('bmi'\), row 2"):
        ResidentLoader(bad, Y, batch_size=2, shuffle=True, device="cpu", feature_names=["age", "bmi"])
    with pytest.raises(DataError, match=r"the first in column 1, row 2"):
        TableDataset(bad, Y)


@pytest.mark.parametrize(
    ("x", "labels", "groups", "options", "message"),
    [
        (torch.ones(0, 2), {"t": torch.zeros(0)}, {}, {}, "x has no rows"),
        (X, {"t": torch.zeros(3)}, {}, {}, "labels of task 't': expected 4 rows, as x has, found 3"),
        (X, {}, {}, {}, "labels of at least one task"),
        (X, {"sensitive": torch.zeros(4)}, {}, {}, "a task may not be named 'sensitive'"),
        (X, {"t": torch.full((4,), float("inf"))}, {}, {}, "task 't': 4 labels are infinite"),
        (X, {"t": np.array(["a"] * 4)}, {}, {}, "labels of task 't': expected a tensor or a numeric array"),
        (X, Y, {"sex": torch.zeros(5, dtype=torch.long)}, {}, "attribute 'sex': expected 4 rows, as x has, found 5"),
        (X, Y, {"sex": torch.zeros(4)}, {}, r"'sex': expected integer ids \[N\], found torch.float32"),
        (X, Y, {"sex": torch.tensor([0, 1, -2, 0])}, {}, "'sex': found id -2; ids are 0..G-1, and -1"),
        (
            X,
            Y,
            {"sex": torch.tensor([0, 1, 2, 0])},
            {"group_names": {"sex": ["f", "m"]}},
            "group id 2, but only 2 group",
        ),
        (X, Y, {}, {"group_names": {"sex": ["f", "m"]}}, "group_names has 'sex', which is no sensitive attribute"),
        (X, Y, {}, {"batch_size": 0}, "batch_size must be an integer of at least 1, found 0"),
        (X, Y, {}, {"batch_size": 5, "drop_last": True}, "no batch: 4 rows, batch_size=5"),
        (X, Y, {}, {"device": "cdua"}, "found 'cdua'; did you mean 'cuda'"),
    ],
)
def test_bad_input(x, labels, groups, options, message) -> None:
    with pytest.raises(DataError, match=message):
        ResidentLoader(x, labels, groups, **{"batch_size": 2, "shuffle": True, "device": "cpu"} | options)


def test_state_of_other_data_is_refused() -> None:
    loader = make()
    with pytest.raises(DataError, match="loader state: n_rows is 24, expected 23"):
        loader.load_state_dict(make(n=24).state_dict())
    with pytest.raises(DataError, match="loader state: batch_size is 6, expected 5"):
        loader.load_state_dict(make(batch_size=6).state_dict())
    with pytest.raises(DataError, match="expected 'seed' and 'epoch'"):
        loader.load_state_dict({"n_rows": 23, "batch_size": 5})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there() -> None:
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(DataError, match="torch finds no CUDA device here; use device='cpu'"):
        resolve_device("cuda")


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda w: sum(w) > 1e-6),
    seed=st.integers(0, 2**31),
)
def test_weighted_rows_are_drawn_floor_or_ceil_of_their_share(weights, seed):
    n = len(weights)
    loader = ResidentLoader(
        torch.arange(n)[:, None], {"t": torch.zeros(n)}, batch_size=7, shuffle=True, seed=seed, device="cpu",
        weights=np.array(weights),
    )  # fmt: skip
    drawn = torch.cat([x.flatten() for x, _ in loader])
    assert len(drawn) == n
    counts = np.bincount(drawn.numpy(), minlength=n)
    share = n * np.array(weights) / np.sum(weights)
    assert (counts >= np.floor(share - 1e-5)).all()
    assert (counts <= np.ceil(share + 1e-5)).all()


def test_equal_weights_keep_the_order_of_no_weights():
    x, labels = torch.arange(1000)[:, None], {"t": torch.zeros(1000)}
    options = {"batch_size": 64, "shuffle": True, "seed": 3, "device": "cpu"}
    for value in (1.0, 0.1, 1e9):
        plain = ResidentLoader(x, labels, **options)
        weighted = ResidentLoader(x, labels, **options, weights=torch.full((1000,), value))
        for _ in range(3):
            assert torch.equal(torch.cat([x for x, _ in plain]), torch.cat([x for x, _ in weighted]))


@pytest.mark.parametrize(
    ("weights", "shuffle", "match"),
    [
        ([1.0, 1.0], False, "needs shuffle=True"),
        ([1.0], True, "expected 2 rows"),
        ([0.0, 0.0], True, "not all of them 0"),
        ([1.0, -1.0], True, "at least 0"),
        ([1.0, float("nan")], True, "finite"),
    ],
)
def test_bad_weights_of_rows(weights, shuffle, match):
    with pytest.raises(DataError, match=match):
        ResidentLoader(
            torch.eye(2), {"t": torch.zeros(2)}, batch_size=1, shuffle=shuffle, device="cpu", weights=weights
        )
