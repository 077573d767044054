"""A step of every method on torch's ``meta`` device: no value is ever read back; and what a step counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import libmtl_fair as lf
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl.history import StepLog
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS
from libmtl_fair.models import MLP, linear_heads

BINARY = (lf.Binary("a"), lf.Binary("b"))
MIXED = (*BINARY, lf.Regression("c"), lf.Multiclass("d", 3))
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("EW", {}),
    ("ReLiF", {}),
    ("ReLiF", {"share": 0.5}),
    ("ReLiF", {"base": "UW"}),
    ("ReLiF", {"pairs": "random"}),
    ("ReLiF", {"prototypes": "confident"}),
    ("ReLiF", {"pairs": "random", "base": "UW"}),
    ("FairMT", {}),
    ("FairMT", {"alpha": "proxy"}),
    ("FairMT", {"target": "dp <= 0.1", "lipschitz": True, "threshold": "base_rate"}),
    ("FairMT", {"form": "phi"}),
    ("FairMT", {"form": "phi", "alpha": "uniform"}),
    ("FBGrad", {}),
    ("GroupRegulariser", {"tasks": ("a", "b")}),
    ("LambdaMix", {}),
    ("TAG", {"affinity_every": 1}),
]


@pytest.mark.parametrize("tasks", [BINARY, MIXED], ids=["binary", "mixed"])
@pytest.mark.parametrize(("method", "args"), METHODS)
def test_a_step_reads_no_value(method: str, args: dict[str, Any], tasks: tuple[lf.Task, ...]) -> None:
    entries, heads = lf.task_dict(tasks), linear_heads(tasks, 8)
    if method == "LambdaMix":
        entries, heads = lf.add_fairness_heads(entries, heads, sensitive=("sex",))
    trainer = lf.FairTrainer(
        entries, method, "FairBranch" if method == "FBGrad" else "HPS", lambda: MLP(6, (12, 8)), heads, False, False,
        {"optim": "adam", "lr": 1e-3}, None, device="meta", progress=False, select="last", weight_args=args,
    )  # fmt: skip
    trainer.n_groups, trainer.model.epoch = {"sex": 2}, 0
    trainer.epoch_steps, trainer.model.epochs = 1, 4  # the first step of FairMT is plain
    trainer.model.train_loss_buffer = torch.ones(len(tasks), 1).numpy()
    trainer.model.train()
    labels: dict[str, Any] = {
        t.name: torch.zeros(16, device="meta", dtype=torch.long if t.kind == "multiclass" else torch.float)
        for t in tasks
    }
    labels["sensitive"] = {"sex": torch.zeros(16, dtype=torch.long, device="meta")}
    labels["reference"] = torch.zeros(16, 3, device="meta")
    log = StepLog()
    for _ in range(2):
        stepping.step(trainer, (torch.zeros(16, 6, device="meta"), labels), 0, log)
    assert (len(log), trainer.global_step) == (2, 2)
    assert all(p.grad is not None for p in trainer.model.encoder.parameters())


@pytest.mark.parametrize(("method", "args"), [(m, a) for m, a in METHODS if a.get("tasks") is None])
def test_a_step_on_maps_reads_no_value(method: str, args: dict[str, Any]) -> None:
    tasks = (lf.Segmentation("s", 3), lf.Depth("d"), lf.Normals("n"), lf.Binary("a"))
    entries = lf.task_dict(tasks)
    heads: Any = {t.name: nn.Conv2d(4, t.out_features, 1) for t in tasks[:3]}
    heads["a"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    if method == "LambdaMix":
        entries, heads = lf.add_fairness_heads(entries, heads, sensitive=("sex",))
    trainer = lf.FairTrainer(
        entries, method, "FairBranch" if method == "FBGrad" else "HPS", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)),
        heads, False, False, {"optim": "adam", "lr": 1e-3}, None, device="meta", progress=False, select="last",
        weight_args={**args, "proxy": "representation"} if "alpha" in args or "form" in args else args,
    )  # fmt: skip
    trainer.n_groups, trainer.model.epoch = {"sex": 2}, 0
    trainer.epoch_steps, trainer.model.epochs = 1, 4
    trainer.model.train_loss_buffer = torch.ones(len(tasks), 1).numpy()
    trainer.model.train()
    shapes = {"s": (16, 5, 6), "d": (16, 1, 5, 6), "n": (16, 3, 5, 6), "a": (16,)}
    labels: dict[str, Any] = {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()}
    labels["sensitive"] = {"sex": torch.zeros(16, dtype=torch.long, device="meta")}
    labels["reference"] = torch.zeros(16, 3, device="meta")
    log = StepLog()
    for _ in range(2):
        stepping.step(trainer, (torch.zeros(16, 3, 5, 6, device="meta"), labels), 0, log)
    assert (len(log), trainer.global_step) == (2, 2)


def test_every_method_of_ours_is_among_them() -> None:
    assert {method for method, _ in METHODS} >= set(OUR_WEIGHTINGS)
