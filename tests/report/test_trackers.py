from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from libmtl_fair import Binary, ResidentLoader
from libmtl_fair.errors import HostError, RecipeError
from libmtl_fair.libmtl.loggers import MLflow, TensorBoard, WandB
from tests.harness.trainers import quiet


def make(tmp_path=None, **options):
    heads = {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}
    encoder = lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU())  # noqa: E731
    how = {"lr": 0.1, "optim": "sgd", "decoders": heads, "run_dir": tmp_path, **options}
    trainer = quiet(encoder, 4, [Binary("a"), Binary("b")], **how)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator)
    labels = {"a": (x[:, 0] > 0).float(), "b": (x[:, 1] > 0).float()}
    loader = ResidentLoader(x, labels, batch_size=16, shuffle=True, seed=0, device="cpu")
    return trainer, loader


def lines(folder):
    return [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]


class Kept:
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def start(self, trainer):
        self.calls.append(("start", trainer.epoch))

    def log_epoch(self, epoch, values):
        self.calls.append((epoch, dict(values)))

    def finish(self):
        self.calls.append(("finish",))


def test_json_lines_hold_the_epochs_of_the_history(tmp_path):
    trainer, loader = make(tmp_path)
    trainer.train(loader, None, 3, loader)
    found = lines(tmp_path)
    assert [line["epoch"] for line in found] == [0, 1, 2]
    epochs = trainer.epochs
    for name in ("loss/a", "val/b/AUC"):
        np.testing.assert_allclose([line[name] for line in found], epochs[name])


def test_a_resumed_run_logs_each_epoch_once(tmp_path):
    trainer, loader = make(tmp_path)
    trainer.train(loader, None, 2)
    before = lines(tmp_path)
    with (tmp_path / "epochs.jsonl").open("a") as stream:
        stream.write('{"epoch": 2, "loss/a": 9}\n{"epoch"')  # an epoch that was killed before its checkpoint
    again, loader = make(tmp_path, resume=True)
    again.train(loader, None, 4)
    assert [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert lines(tmp_path)[:2] == before
    assert lines(tmp_path)[2]["loss/a"] != 9


def test_a_users_own_logger():
    kept = Kept()
    trainer, loader = make(loggers=[kept])
    trainer.train(loader, None, 2)
    assert kept.calls[0] == ("start", 0)
    assert kept.calls[-1] == ("finish",)
    assert [call[0] for call in kept.calls[1:-1]] == [0, 1]
    assert kept.calls[1][1]["loss/a"] > 0


def test_logging_changes_no_number():
    plain, loader = make()
    plain.train(loader, None, 2)
    logged, loader = make(loggers=[Kept()])
    logged.train(loader, None, 2)
    np.testing.assert_array_equal(plain.history["loss/a"], logged.history["loss/a"])


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, loader = make(tmp_path, loggers=["tensorboard"])
    trainer.train(loader, None, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    np.testing.assert_allclose([e.value for e in events.Scalars("loss/a")], trainer.epochs["loss/a"], rtol=1e-6)


@pytest.mark.parametrize(("name", "tracker"), [("tensorboard", TensorBoard), ("mlflow", MLflow), ("wandb", WandB)])
def test_without_the_extra_it_says_what_to_install(monkeypatch, name, tracker):
    for module in [m for m in sys.modules if m.split(".")[0] == name or m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(HostError, match=rf"libmtl_fair\[{name}\]"):
        tracker()
    trainer, loader = make()
    trainer.train(loader, None, 1)


def test_mlflow_gets_settings_and_epochs(monkeypatch):
    calls: list[tuple[object, ...]] = []
    fake = SimpleNamespace(
        active_run=lambda: None,
        set_experiment=lambda name: calls.append(("experiment", name)),
        start_run=lambda run_name: calls.append(("run", run_name)),
        log_params=lambda values: calls.append(("params", values)),
        log_metrics=lambda values, step: calls.append((step, values)),
        end_run=lambda: calls.append(("end",)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    trainer, loader = make(loggers=[MLflow("fairness", "first")])
    trainer.train(loader, None, 2)
    assert calls[:2] == [("experiment", "fairness"), ("run", "first")]
    assert calls[2][1]["weighting"] == "EW"
    assert [call[0] for call in calls[3:5]] == [0, 1]
    assert all(isinstance(v, float) for v in calls[3][1].values())
    assert calls[-1] == ("end",)


def test_wandb_gets_settings_and_epochs_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer, loader = make(tmp_path, loggers=[WandB("fairness", "first")])
    trainer.train(loader, None, 2)
    assert wandb.run is None and list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    with wandb.init(project="fairness", dir=tmp_path) as own:
        trainer, loader = make(loggers=["wandb"])
        trainer.train(loader, None, 2)
        assert own.config["weighting"] == "EW" and own.summary["epoch"] == 1
        assert own.summary["loss/a"] == pytest.approx(trainer.epochs["loss/a"].iloc[-1])


def test_a_recipe_names_its_loggers(tmp_path):
    pytest.importorskip("tensorboard")
    from libmtl_fair.recipe import Recipe
    from libmtl_fair.recipe.run import run_recipe

    content = {
        "name": "logged",
        "data": {"name": "adult", "tasks": ["income", "long_hours"], "sensitive": ["sex"], "subset": 400},
        "model": {"hidden": [4]},
        "train": {"epochs": 2, "batch_size": 64},
        "methods": {"plain": {"weighting": "EW"}},
        "metrics": {"n_bootstrap": 10},
        "output": {"report": False, "loggers": ["tensorboard"]},
    }
    folder = run_recipe(Recipe.from_dict(content), tmp_path / "run", device="cpu") / "plain" / "seed0"
    assert [line["epoch"] for line in lines(folder)] == [0, 1]
    assert list((folder / "tensorboard").glob("events*"))
    with pytest.raises(RecipeError, match="output.loggers"):
        Recipe.from_dict({**content, "output": {"loggers": ["neptune"]}})


@pytest.mark.parametrize(
    ("loggers", "match"),
    [
        (["tensorbord"], "did you mean 'tensorboard'"),
        ("mlflow", "loggers must be a list"),
        ([3], "needs log_epoch"),
    ],
)
def test_wrong_loggers(loggers, match):
    with pytest.raises(RecipeError, match=match):
        make(loggers=loggers)
