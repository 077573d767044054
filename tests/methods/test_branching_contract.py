"""One contract for every weighting of the installed LibMTL, and ours: FairBranch before, across and after two events.

The loss falls in every phase, every parameter that can be trained gets a finite gradient, and a run that is interrupted
before, between or after the events goes on to the same numbers, bit by bit.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from libmtl_fair.libmtl import weighting_names

NEEDS = {"Nash_MTL": "cvxpy", "UPGrad": "qpsolvers"}
ELSEWHERE = {"LambdaMix", "TAG"}
"""Mixes auxiliary heads with main ones: it has tests with them; refuses all but hard sharing."""
EPOCHS = 4


def weightings() -> list[Any]:
    found = []
    for name in weighting_names():
        lacking = NEEDS.get(name)
        marks = (
            [pytest.mark.skip(reason=f"needs {lacking}")] if lacking and not importlib.util.find_spec(lacking) else []
        )
        if name not in ELSEWHERE:
            found.append(pytest.param(name, marks=marks))
    return found


class PowerCutError(Exception):
    """What stops a run in an epoch, when those before are saved."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def log_epoch(self, epoch: int, values: Any) -> None:
        if epoch == self.epoch:
            raise self


def run(branching: SimpleNamespace, weighting: str, folder: Path, resume: bool = False, stop: int = EPOCHS) -> Any:
    """Train, all epochs planned (FairMT's pace is in units of the run), or until the power is cut in the epoch ``stop``."""
    trainer = branching.trainer(
        weighting,
        run_dir=folder,
        resume=resume,
        scheduler_param={"scheduler": "step", "step_size": 2, "gamma": 0.5},
        loggers=[PowerCutError(stop)],
    )
    with pytest.raises(PowerCutError) if stop < EPOCHS else nullcontext():
        trainer.train(branching.loader(), epochs=EPOCHS)
    return trainer


@pytest.mark.parametrize("weighting", weightings())
def test_trains_before_across_and_after_two_events_and_resumes(
    branching: SimpleNamespace, weighting: str, tmp_path: Path
) -> None:
    whole = run(branching, weighting, tmp_path / "whole")
    model = whole.model
    assert [event.epoch for event in model.events] == [0, 1]
    assert model.tree.depth == 1
    assert whole.scheduler.last_epoch == EPOCHS
    assert all(torch.isfinite(p).all() for p in model.parameters())
    losses = whole.epochs[[f"loss/{task.name}" for task in branching.tasks]].sum(axis=1)
    assert losses.iloc[-1] < losses.iloc[0]
    held = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in encoder)
    stuck = [p.shape for p in encoder if not bool((p.grad != 0).any())]
    assert not stuck or weighting in ("MGDA", "GradDrop")  # a task may get no weight, or a whole layer be dropped
    for stop in (1, 2, 3):
        run(branching, weighting, tmp_path / str(stop), stop=stop)
        resumed = run(branching, weighting, tmp_path / str(stop), resume=True)
        assert resumed.model.tree == model.tree
        branching.assert_same(model.state_dict(), resumed.model.state_dict())
        assert resumed.model.events == model.events
        columns = [c for c in whole.history if c != "train_s"]
        assert whole.history[columns].equals(resumed.history[columns])
