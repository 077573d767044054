"""GroupMetrics in any order of update, merge and reset: the numbers of everything that went in, at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, rule

import libmtl_fair as lf
from libmtl_fair.metrics import GroupMetrics

TASKS = [lf.Binary("a"), lf.Multiclass("b", 3), lf.Regression("c")]


def fresh() -> GroupMetrics:
    return GroupMetrics(TASKS, {"sex": 2, "race": 3}, n_bootstrap=0)


def batch(seed: int, n: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return outputs, labels (some missing) and groups (some unknown) of n people; scores of few values, so that there are ties."""
    g = torch.Generator().manual_seed(seed)
    outputs = {
        "a": torch.randint(-3, 4, (n, 1), generator=g) / 2,
        "b": torch.randn(n, 3, generator=g),
        "c": torch.randn(n, 1, generator=g),
    }
    labels = {
        "a": torch.where(torch.rand(n, generator=g) < 0.1, torch.nan, torch.randint(0, 2, (n,), generator=g).float()),
        "b": torch.where(torch.rand(n, generator=g) < 0.1, -100, torch.randint(0, 3, (n,), generator=g)),
        "c": torch.randn(n, generator=g),
    }
    return (
        outputs,
        labels,
        {"sex": torch.randint(-1, 2, (n,), generator=g), "race": torch.randint(-1, 3, (n,), generator=g)},
    )


class Metrics(RuleBasedStateMachine):
    """Several accumulators, each with the list of batches that it must be worth."""

    held = Bundle("held")

    @rule(target=held)
    def make(self) -> Any:
        return fresh(), []

    @rule(one=held, seed=st.integers(0, 50), n=st.integers(1, 60))
    def update(self, one: Any, seed: int, n: int) -> None:
        metrics, batches = one
        metrics.update(*batch(seed, n))
        batches.append((seed, n))

    @rule(target=held, one=consumes(held), other=consumes(held))
    def merge(self, one: Any, other: Any) -> Any:
        return one[0].merge(other[0]), one[1] + other[1]

    @rule(one=held)
    def reset(self, one: Any) -> None:
        one[0].reset()
        one[1].clear()

    @rule(one=held)
    def compute(self, one: Any) -> None:
        metrics, batches = one
        if not batches:
            return
        parts = [batch(*each) for each in batches]
        joined = [{name: torch.cat([p[k][name] for p in parts]) for name in parts[0][k]} for k in range(3)]
        expected, found = fresh().update(*joined).compute(), metrics.compute()
        numbers = ["value", "n", "low", "high"]
        pd.testing.assert_frame_equal(found.drop(columns=numbers), expected.drop(columns=numbers))
        np.testing.assert_allclose(found[numbers].astype(float), expected[numbers].astype(float), rtol=1e-5, atol=1e-6)


TestMetrics = Metrics.TestCase
TestMetrics.settings = settings(max_examples=20, stateful_step_count=12, deadline=None, derandomize=True)
