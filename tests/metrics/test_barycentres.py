"""Scores at the groups' Wasserstein barycentre: parity, the rows left alone, and what happens without equipy."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import libmtl_fair as lf
from libmtl_fair.errors import DataError, FairMTLError
from libmtl_fair.metrics.fairlearn_bridge import barycentre


def made(seed: int, n: int = 2000, unknown: int = 10) -> lf.Predictions:
    g = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 2, (n,), generator=g)
    logit = torch.randn(n, generator=g) + groups
    groups[:unknown] = -1
    tasks = (lf.Binary("a"), lf.Multiclass("b", 3))
    outputs = {"a": logit[:, None], "b": torch.randn(n, 3, generator=g)}
    return lf.Predictions(
        tasks=tasks,
        scores={task.name: task.score(outputs[task.name]) for task in tasks},
        outputs=outputs,
        labels={"a": (logit > 0).float(), "b": torch.zeros(n, dtype=torch.int64)},
        groups={"sex": groups},
        group_names={"sex": ["f", "m"]},
    )


def test_groups_end_up_alike_and_order_within_them_stays() -> None:
    pytest.importorskip("equipy")
    val, test = made(0), made(1)
    before = torch.sigmoid(test.outputs["a"]).squeeze(1).numpy()
    moved = barycentre(val, "a", sensitive="sex").scores(test)
    sex = test.groups["sex"].numpy()
    gap = [v[sex == 1].mean() - v[sex == 0].mean() for v in (before, moved)]
    assert gap[0] > 0.15
    assert abs(gap[1]) < 0.03
    assert np.array_equal(moved[sex == -1], before[sex == -1].astype(np.float64))
    ranks = np.corrcoef(before[sex == 0].argsort().argsort(), moved[sex == 0].argsort().argsort())[0, 1]
    assert ranks > 0.999
    np.testing.assert_allclose(barycentre(val, "a").scores(test, epsilon=1.0), before, rtol=1e-6)


def test_bad_input() -> None:
    pytest.importorskip("equipy")
    with pytest.raises(DataError, match="task 'b' is multiclass"):
        barycentre(made(0), "b")
    with pytest.raises(DataError, match="at least two groups of sex, found"):
        barycentre(made(0, n=10, unknown=10), "a")
    with pytest.raises(DataError, match=r"epsilon must be in \[0, 1\], found 2"):
        barycentre(made(0), "a").scores(made(1), epsilon=2)


def test_without_equipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "equipy", None)
    monkeypatch.setitem(sys.modules, "equipy.fairness", None)
    with pytest.raises(FairMTLError, match=r"pip install libmtl_fair\[equipy\]"):
        barycentre(made(0), "a")
