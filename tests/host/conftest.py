"""What the host's tests share: small tasks, data, encoders and trainers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair.models import MLP, linear_heads

N, FEATURES = 96, 6
TASKS = (lf.Binary("a"), lf.Binary("b"), lf.Regression("c"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_data(n: int = N, seed: int = 0) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return features, labels of three related tasks, and two attributes' groups."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=g)
    signal = x[:, 0] + 0.5 * x[:, 1]
    labels = {
        "a": (signal > 0).float(),
        "b": (signal + x[:, 2] > 0).float(),
        "c": signal - x[:, 2] + 0.1 * torch.randn(n, generator=g),
    }
    groups = {"sex": (x[:, 3] > 0).long(), "race": torch.randint(-1, 3, (n,), generator=g)}
    return x, labels, groups


def make_loader(n: int = N, seed: int = 0, **options: Any) -> lf.ResidentLoader:
    x, labels, groups = make_data(n, seed)
    return lf.ResidentLoader(
        x, labels, groups, **{"batch_size": 32, "shuffle": True, "seed": 1, "device": "cpu", **options}
    )


def make_trainer(
    weighting: Any = "EW", tasks: tuple[Any, ...] = TASKS, cls: type[Any] = lf.FairTrainer, **changes: Any
) -> Any:
    settings: dict[str, Any] = {
        "architecture": "HPS",
        "encoder_class": lambda: MLP(FEATURES, (16, 8)),
        "decoders": linear_heads(tasks, 8),
        "rep_grad": False,
        "multi_input": False,
        "optim_param": {"optim": "adam", "lr": 1e-2},
        "scheduler_param": None,
        "device": "cpu",
        "seed": 0,
        "progress": False,
        "select": "last",
    }
    if changes.get("seed", 0) is not None and "decoders" not in changes:
        torch.manual_seed(5)  # heads are made before the trainer seeds
        changes["decoders"] = linear_heads(tasks, 8)
    return cls(lf.task_dict(tasks), weighting, **{**settings, **changes})


def parameters_of(trainer: Any) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise equality, NaN equal to NaN."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape, name
        assert bool(((a[name] == b[name]) | (a[name].isnan() & b[name].isnan())).all()), name


@pytest.fixture
def kit() -> SimpleNamespace:
    """Helper functions and constants of this folder."""
    return SimpleNamespace(
        tasks=TASKS,
        features=FEATURES,
        data=make_data,
        loader=make_loader,
        trainer=make_trainer,
        parameters=parameters_of,
        assert_same=assert_same,
        nn=nn,
    )
