"""Predictions: tables that fairlearn and pandas read, and files that give back what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair.errors import CheckpointError, DataError
from libmtl_fair.predictions import Predictions

N = 7
NAN = float("nan")


def make(**changes: Any) -> Predictions:
    tasks: tuple[lf.Task, ...] = (
        lf.Binary("income"),
        lf.Multiclass("job", 3, ("a", "b", "c")),
        lf.Multilabel("codes", 2),
        lf.Regression("hours", mean=40.0, std=12.0, score_range=(-1.0, 1.5)),
    )
    g = torch.Generator().manual_seed(0)
    outputs = {t.name: torch.randn(N, t.out_features, generator=g) for t in tasks}
    labels: dict[str, Tensor] = {
        "income": torch.tensor([0.0, 1, NAN, 1, 0, 0, 1]),
        "job": torch.tensor([0, -100, 2, 1, 1, 0, -100]),
        "codes": torch.tensor([[0.0, 1], [NAN, 1], [1, 1], [0, 0], [NAN, NAN], [1, 0], [0, 1]]),
        "hours": torch.tensor([0.1, -1, NAN, 2, 0, 1, 0.5]),
    }
    groups = {"sex": torch.tensor([0, 1, 1, -1, 0, 1, 0]), "race": torch.tensor([2, 2, 0, 1, -1, 0, 1])}
    values: dict[str, Any] = {
        "tasks": tasks,
        "scores": {t.name: t.score(outputs[t.name]) for t in tasks},
        "outputs": outputs,
        "labels": labels,
        "groups": groups,
        "group_names": {"sex": ["female", "male"], "race": ["x", "y", "z"]},
    }
    return Predictions(**{**values, **changes})


def test_the_table() -> None:
    found = make().frame()
    assert len(found) == N
    assert list(found.columns) == [
        *("row", "income/label", "income/score", "income/prob"),
        *("job/label", "job/score", "job/prob_0", "job/prob_1", "job/prob_2"),
        *("codes/label_0", "codes/label_1", "codes/score", "codes/prob_0", "codes/prob_1"),
        *("hours/label", "hours/score", "hours/value", "sensitive/sex", "sensitive/race"),
    ]
    assert found["sensitive/sex"].fillna("?").tolist() == ["female", "male", "male", "?", "female", "male", "female"]
    assert found["income/label"].isna().tolist() == [False, False, True, False, False, False, False]
    assert found["job/label"].isna().sum() == 2
    np.testing.assert_allclose(found[[f"job/prob_{i}" for i in range(3)]].sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found["income/prob"], torch.sigmoid(make().outputs["income"][:, 0]))


def test_saved_and_loaded(tmp_path: Path) -> None:
    before = make()
    path = before.save(tmp_path / "deep" / "p.parquet")
    after = Predictions.load(path)
    assert after.tasks == before.tasks
    assert after.group_names == before.group_names
    for name in before.outputs:
        assert torch.equal(after.outputs[name], before.outputs[name])
        assert torch.equal(after.scores[name], before.scores[name])
        assert after.labels[name].dtype == before.labels[name].dtype
        torch.testing.assert_close(after.labels[name], before.labels[name], equal_nan=True, rtol=0, atol=0)
    for name in before.groups:
        assert torch.equal(after.groups[name], before.groups[name])
    pd.testing.assert_frame_equal(after.frame(), before.frame())


def test_pandas_reads_the_file(tmp_path: Path) -> None:
    found = pd.read_parquet(make().save(tmp_path / "p.parquet"))
    assert set(make().frame().columns) <= set(found.columns)


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_shapes_of_outputs_come_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    task = lf.Binary("t")
    output = torch.randn(shape)
    labels = torch.tensor([0, 1, -100, 1, 0, 1, 1])
    before = Predictions((task,), {"t": task.score(output)}, {"t": output}, {"t": labels}, {})
    after = Predictions.load(before.save(tmp_path / "p.parquet"))
    assert torch.equal(after.outputs["t"], output)
    assert torch.equal(after.labels["t"], labels)


def test_groups_without_names_come_back(tmp_path: Path) -> None:
    before = make(group_names={})
    assert before.frame()["sensitive/race"].dropna().unique().tolist() == ["2", "0", "1"]
    after = Predictions.load(before.save(tmp_path / "p.parquet"))
    assert torch.equal(after.groups["race"], before.groups["race"])
    nobody = make(group_names={}, groups={"sex": torch.full((N,), -1)})
    assert nobody.frame()["sensitive/sex"].isna().all()


def test_too_few_names() -> None:
    with pytest.raises(
        DataError, match=r"attribute 'race': group ids go to 2, so 3 different names are needed; found \['x'\]"
    ):
        make(group_names={"sex": ["f", "m"], "race": ["x"]}).frame()
    with pytest.raises(DataError, match="3 different names are needed"):
        make(group_names={"race": ["x", "x", "y"]}).frame()


def test_inputs_of_their_own_make_no_table() -> None:
    task = (lf.Binary("a"), lf.Binary("b"))
    scores = {"a": torch.zeros(3), "b": torch.zeros(4)}
    with pytest.raises(DataError, match=r"different examples \{'a': 3, 'b': 4\}, so they make no one table"):
        Predictions(task, scores, scores, scores, {}).frame()


def test_a_task_by_name() -> None:
    assert make().task("job").kind == "multiclass"
    with pytest.raises(DataError, match="no task 'jbo' in these predictions; they hold: income, job"):
        make().task("jbo")


@pytest.mark.parametrize("content", [b"", b"PAR1 nonsense PAR1", None])
def test_a_file_that_is_not_ours(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "p.parquet"
    if content is None:
        pd.DataFrame({"a": [1]}).to_parquet(path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"p\.parquet holds no predictions of libmtl_fair"):
        Predictions.load(path)
    with pytest.raises(CheckpointError, match="holds no predictions"):
        Predictions.load(tmp_path / "absent.parquet")


def test_fairlearn_reads_the_columns() -> None:
    from fairlearn.metrics import MetricFrame, selection_rate

    found = make().frame().dropna(subset=["income/label", "sensitive/sex"])
    frame = MetricFrame(
        metrics=selection_rate, y_true=found["income/label"], y_pred=(found["income/prob"] > 0.5).astype(int),
        sensitive_features=found["sensitive/sex"],
    )  # fmt: skip
    assert set(frame.by_group.index) == {"female", "male"}
