"""A trainer's model is saved and copied whole: ``torch.save(trainer.model)``, pickle, deepcopy."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import libmtl_fair as lf
from libmtl_fair.libmtl import weighting_names
from libmtl_fair.libmtl.registry import BILEVEL
from libmtl_fair.models import MLP, linear_heads

TOGETHER = {"FBGrad", "LambdaMix", *BILEVEL, "Nash_MTL", "UPGrad", "MoDo", "SDMGrad"}
"""Which need more than a weighting's name here."""
EXPERTS = {"img_size": (6,), "num_experts": [2]}


def outputs(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return dict(model(x))


def through(how: str, model: Any) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CASES = [
    *((name, "HPS", name == "GradDrop") for name in weighting_names() if name not in TOGETHER),
    *(("EW", "HPS", True), ("ReLiF", "MMoE", False), ("FairMT", "MMoE", False), ("FBGrad", "FairBranch", False)),
]


@pytest.mark.parametrize(("weighting", "architecture", "rep_grad"), CASES)
def test_saved_whole(kit: SimpleNamespace, weighting: str, architecture: str, rep_grad: bool) -> None:
    trainer = kit.trainer(
        weighting, architecture=architecture, rep_grad=rep_grad, arch_args=EXPERTS if architecture == "MMoE" else {}
    )
    trainer.train(kit.loader(), epochs=1)
    x = kit.data()[0]
    expected = outputs(trainer.model, x)
    for how in ("torch", "pickle", "deepcopy"):
        loaded = through(how, trainer.model)
        found = outputs(loaded, x)
        assert all(torch.equal(found[t], expected[t]) for t in expected), how
        kit.assert_same(loaded.state_dict(), trainer.model.state_dict())
        assert isinstance(loaded, type(trainer.model).made_of)
        assert not any(head._forward_pre_hooks for head in loaded.decoders.values())
    trainer.train(kit.loader(), epochs=2)  # and the trainer's own goes on


@pytest.mark.parametrize("how", ["torch", "pickle", "deepcopy"])
def test_with_fairness_heads_that_listen_to_their_main_heads(kit: SimpleNamespace, how: str) -> None:
    """Representations are each task's own (MMoE): what a copy's fairness head takes is what the copy's main head received."""
    entries, heads = lf.add_fairness_heads(
        lf.task_dict(kit.tasks), linear_heads(kit.tasks, 8), loss="gap", sensitive=("sex",)
    )
    adam = {"optim": "adam", "lr": 1e-2}
    trainer = lf.FairTrainer(
        entries, "LambdaMix", "MMoE", lambda: MLP(kit.features, (16, 8)), heads, False, False, adam, None,
        device="cpu", progress=False, select="last", arch_args=EXPERTS,
    )  # fmt: skip
    trainer.train(kit.loader(), epochs=1)
    loaded, x = through(how, trainer.model), kit.data()[0]
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(1)  # the copy's is its own
        found = dict(loaded.train()(x))
    fair = [task for task in found if task.startswith("fair:")]
    assert fair
    for task in fair:
        main = entries[task]["task"].source
        assert torch.equal(found[task].flatten(), found[main].flatten()), how


class Net(nn.Module):
    """A user's model: heads of two layers, and the step in it, as a Lightning module has it."""

    def __init__(self, tasks: Any, method: str, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = MLP(6, (16, 8))
        self.heads = nn.ModuleDict({t.name: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)) for t in tasks})
        self.fair = lf.FairStep(method, tasks, self.heads, n_groups={"sex": 2, "race": 3}, **settings)

    def step(self, x: Any, labels: Any) -> list[torch.Tensor]:
        self.zero_grad()
        h = self.encoder(x)
        outputs = {task: head(h) for task, head in self.heads.items()}
        self.fair.backward(representation=h, outputs=outputs, labels=labels)
        with torch.no_grad():
            for p in self.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
        return [p.detach().clone() for p in self.parameters()]


@pytest.mark.parametrize("how", ["torch", "pickle", "deepcopy"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("UW", {}), ("FairMT", {"form": "phi", "min_count": 1}), ("ReLiF", {"pairs": "random", "k": 4})],
)
@pytest.mark.filterwarnings("ignore:FairMT. proxy=.head. cannot be used")
def test_a_users_model_and_its_step(kit: SimpleNamespace, method: str, settings: dict[str, Any], how: str) -> None:
    net, (x, labels) = Net(kit.tasks, method, **settings), next(iter(kit.loader()))
    net.step(x, labels)
    loaded = through(how, net)
    assert type(loaded.fair.model).__name__ == method
    assert loaded.fair.global_step == 1
    torch.manual_seed(0)
    expected = net.step(x, labels)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(expected, loaded.step(x, labels)))
    assert loaded.fair.trace == pytest.approx(net.fair.trace, nan_ok=True)
    heads = through(how, net.heads)  # by themselves
    assert torch.equal(heads["a"](torch.ones(2, 8)), net.heads["a"](torch.ones(2, 8)))


def test_in_another_process(kit: SimpleNamespace, tmp_path: Path) -> None:
    trainer = kit.trainer("FairMT")
    trainer.train(kit.loader(), epochs=1)
    torch.save(trainer.model, tmp_path / "model.pt")
    x = torch.ones(2, kit.features)
    code = f"""
import json, torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False).eval()
print(json.dumps(model(torch.ones(2, {kit.features}))["a"].flatten().tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == pytest.approx(outputs(trainer.model, x)["a"].flatten().tolist(), rel=1e-6)
