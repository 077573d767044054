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

from libmtl_fair.libmtl import weighting_names
from libmtl_fair.libmtl.registry import BILEVEL

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
