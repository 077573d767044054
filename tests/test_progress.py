"""How far a training is, in epochs and steps, stands behind the bar that is open; one bar at a time."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

from libmtl_fair import Binary, FairTrainer, ResidentLoader, progress, task_dict, tune
from libmtl_fair.recipe import Recipe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def said(monkeypatch):
    """What stands behind an open bar; every step is told."""
    texts: list[str] = []
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    monkeypatch.setattr(progress, "_open", [texts.append])
    return texts


def trainer(**options) -> FairTrainer:
    encoder = lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU())  # noqa: E731
    heads = {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}
    tasks = task_dict([Binary("a"), Binary("b")])
    optim = {"optim": "sgd", "lr": 0.1}
    return FairTrainer(
        tasks, "EW", "HPS", encoder, heads, False, False, optim, None, device="cpu", select="last", **options
    )


def loader() -> ResidentLoader:
    x = torch.randn(30, 3)
    labels = {"a": (x[:, 0] > 0).float(), "b": (x[:, 1] > 0).float()}
    return ResidentLoader(x, labels, batch_size=10, shuffle=True, seed=0, device="cpu")


@pytest.mark.parametrize("own", [True, False])
def test_epochs_and_steps_stand_behind_the_bar_that_is_open(said, own):
    trainer(progress=own).train(loader(), None, 2)
    assert said[:4] == ["epoch 1/2", "epoch 1/2, step 0/3", "epoch 1/2, step 1/3", "epoch 1/2, step 2/3"]
    assert said[-1] == "epoch 2/2" and "epoch 2/2, step 2/3" in said


def test_a_bar_shows_itself_and_what_is_told(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.bar("runs", 2) as advance:
        advance("relif, seed 1")
        progress.tell("epoch 3/20")
        with progress.bar("training", 20) as inner:
            inner("epoch 4/20")
    assert "relif, seed 1: epoch 4/20" in terminal.getvalue() and "training" not in terminal.getvalue()
    assert progress._open == []


def test_nothing_is_shown_where_the_error_stream_is_no_terminal(capsys):
    trainer().train(loader(), None, 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stacked", [1, 3])
def test_a_study_tells_epochs_before_its_first_trial_ends(said, tmp_path, stacked):
    content = {
        "name": "told",
        "data": {"name": "german", "tasks": ["bad_credit", "owns_home"], "sensitive": ["age"]},
        "model": {"hidden": [4]},
        "train": {"epochs": 2, "batch_size": 256},
        "methods": {"plain": {"weighting": "EW"}, "relif": {"weighting": "ReLiF"}},
        "audit": {"delta": [0.2], "people": "off", "shrinkage": False},
        "metrics": {"n_bootstrap": 0},
    }
    ended: list[int] = []
    study = tune.tune(
        Recipe.from_dict(content), 3, stacked=stacked, device="cpu", note=lambda text: ended.append(len(said))
    )
    assert len(study.get_trials()) == 3 and said.index(next(t for t in said if "epoch 2/2" in t)) < ended[0]
    if stacked > 1:
        assert any(text.endswith("at once, the youngest in epoch 1/2") for text in said)
