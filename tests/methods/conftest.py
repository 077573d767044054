"""What the tests of branching share: a small problem with four tasks of three kinds, and trainers for it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import libmtl_fair as lf
from libmtl_fair.models import MLP
from tests.harness.trainers import quiet

N, FEATURES = 96, 6
TASKS = (lf.Binary("a"), lf.Binary("b"), lf.Multiclass("c", 3), lf.Regression("d"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_loader(n: int = N, **options: Any) -> lf.ResidentLoader:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, FEATURES, generator=g)
    labels = {
        "a": (x[:, 0] > 0).float(),
        "b": (x[:, 0] + x[:, 1] > 0).float(),
        "c": torch.randint(0, 3, (n,), generator=g),
        "d": x[:, 2] - x[:, 1],
    }
    labels["b"][::5] = torch.nan
    groups = {"sex": (x[:, 3] > 0).long(), "race": torch.randint(-1, 3, (n,), generator=g)}
    return lf.ResidentLoader(
        x, labels, groups, **{"batch_size": 32, "shuffle": True, "seed": 1, "device": "cpu", **options}
    )


def make_trainer(weighting: Any = "EW", tasks: tuple[lf.Task, ...] = TASKS, **changes: Any) -> Any:
    torch.manual_seed(5)  # heads are made before the trainer seeds
    given = {"architecture": "FairBranch", "arch_args": {"threshold": 0.05, "branch_every": 1}, **changes}
    given.setdefault("rep_grad", weighting == "GradDrop")
    return quiet(lambda: MLP(FEATURES, (12, 10, 8), norm="batch", dropout=0.1), 8, tasks, weighting, **given)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Bitwise equality of state dicts."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def branching() -> SimpleNamespace:
    """Helper functions and constants of this folder."""
    return SimpleNamespace(
        tasks=TASKS, features=FEATURES, loader=make_loader, trainer=make_trainer, assert_same=assert_same, nn=nn
    )


@pytest.fixture
def double() -> Iterator[None]:
    """Make double precision torch's default."""
    held = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(held)
