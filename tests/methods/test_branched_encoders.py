"""FairBranch with every encoder of recipes: trained over a branch event, and stopped after it and resumed, on tiny inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import libmtl_fair as lf
from libmtl_fair.models.encoders import torchvision_models
from libmtl_fair.recipe.build import build_trainer
from libmtl_fair.recipe.sections import Model, Optimizer, Train

ROWS = (lf.Binary("flag"), lf.Binary("dark"))
MAPS = (lf.Segmentation("seg", 3), lf.Depth("depth"))
STEPS = (lf.BinarySequence("worse"), lf.Binary("died"))
SHAPES = {"lstm": (5, 4), "convnext_tiny": (3, 32, 32)}  # others: images of 32 x 24
needs_torchvision = pytest.mark.skipif(torchvision_models()[0] is None, reason="torchvision does not import here")

CASES = {
    "resnet34": (Model(encoder="resnet34"), ROWS, 4),
    "resnet50": (Model(encoder="resnet50"), ROWS, 4),
    "dilated resnet50, ASPP": (
        Model(encoder="resnet50", encoder_args={"dilated": 8}, head="aspp"),
        MAPS,
        4,
    ),
    "cnn": (Model(encoder="cnn", encoder_args={"channels": [4, 6, 8]}), ROWS, 3),
    "cnn, maps": (Model(encoder="cnn", encoder_args={"channels": [4, 6, 8]}), MAPS, 3),
    "lstm": (Model(encoder="lstm", encoder_args={"hidden": 6}), STEPS, 2),
    "lstm, last step": (Model(encoder="lstm", encoder_args={"hidden": 6, "layers": 3, "every_step": False}), ROWS, 3),
    "convnext_tiny": (Model(encoder="convnext_tiny"), ROWS, 8),
    "convnext_tiny, maps": (Model(encoder="convnext_tiny"), MAPS, 8),
}


def loader(tasks: Any, shape: tuple[int, ...]) -> lf.ResidentLoader:
    g = torch.Generator().manual_seed(1)
    n = 4
    x = torch.rand(n, *shape, generator=g)
    if len(shape) == 2:
        x[::2, 3:] = 0  # sequences of three steps
    labels = {
        "flag": (torch.arange(n) % 3 == 0).float(),
        "dark": (torch.arange(n) % 4 == 0).float(),
        "died": (torch.arange(n) % 3 == 1).float(),
        "worse": (torch.rand(n, shape[0], generator=g) < 0.4).float(),
    }
    if len(shape) == 3:
        labels = labels | {"seg": x.argmax(1), "depth": x.mean(1, keepdim=True) + 0.5}
    groups = {"light": torch.arange(n) % 2}
    own = {task.name: labels[task.name] for task in tasks}
    return lf.ResidentLoader(x, own, groups, batch_size=4, shuffle=False, device="cpu")


def trained(case: str, epochs: int, folder: Path | None = None, resume: bool = False) -> lf.FairTrainer:
    model, tasks, _ = CASES[case]
    shape = SHAPES.get(model.encoder, (3, 32, 24))
    branched = {"architecture": "FairBranch", "arch_args": {"branch_every": 1, "threshold": 1.0, "max_events": 1}}
    train = Train(select="last", optimizer=Optimizer(optim="sgd", lr=0.01))
    trainer = build_trainer(
        "FBGrad", model.model_copy(update=branched), train, tasks, shape, {"light": ["0", "1"]}, 0,
        device="cpu", progress=False, run_dir=folder, resume=resume,
    )  # fmt: skip
    trainer.train(loader(tasks, shape), epochs=epochs)
    return trainer


@pytest.mark.parametrize("case", [pytest.param(c, marks=needs_torchvision if "convnext" in c else ()) for c in CASES])
def test_it_branches_trains_on_and_resumes(case: str, tmp_path: Path) -> None:
    model, tasks, blocks = CASES[case]
    whole = trained(case, 2)
    tree = whole.model.tree
    assert tree.n_blocks == blocks
    assert [event.epoch for event in whole.model.events] == [0]
    assert [len(level) for level in tree.levels] == [1] * (blocks - 1) + [2]
    last = [p for copy in whole.model.encoder.copies(blocks - 1) for p in copy.parameters()]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in last)
    assert any(not torch.equal(a, b) for a, b in zip(last[: len(last) // 2], last[len(last) // 2 :]))
    held = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in whole.model.parameters()}

    trained(case, 1, tmp_path)
    resumed = trained(case, 2, tmp_path, resume=True)
    assert resumed.model.tree == tree
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    found = resumed.predict(loader(tasks, SHAPES.get(model.encoder, (3, 32, 24))))
    assert all(torch.isfinite(found.scores[task.name]).all() for task in tasks)
