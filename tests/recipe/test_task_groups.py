"""A recipe's method by task groups: one training finds them, a network each follows, and all is one method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import libmtl_fair as lf
from libmtl_fair.deploy.export import export
from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.methods.tag import affinities, group_tasks
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.build import check
from libmtl_fair.recipe.networks import parts_of, task_groups
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import read_run
from libmtl_fair.report.branches import branch_plots, grouping_sheet
from libmtl_fair.report.theme import label
from libmtl_fair.tune.plan import Plan

TASKS = ["bad_credit", "owns_home", "log_amount", "job"]
CONTENT: dict[str, Any] = {
    "name": "groups",
    "data": {"name": "german", "tasks": TASKS, "sensitive": ["age"]},
    "model": {"hidden": [8]},
    "train": {"epochs": 2, "batch_size": 256},
    "methods": {
        "plain": {"weighting": "EW"},
        "tag": {"weighting": "TAG", "networks": 3, "affinity_every": 1, "base": "UW"},
    },
    "metrics": {"n_bootstrap": 0},
    "audit": {"shrinkage": False},
    "output": {"report": False},
}
RECIPE = Recipe.from_dict(CONTENT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(RECIPE, tmp_path_factory.mktemp("runs") / "run", device="cpu")


def test_the_groups_are_those_of_the_joint_training(finished: Path) -> None:
    own = finished / "tag" / "seed0"
    held = task_groups(own)
    found = affinities(pd.read_csv(own / "joint" / "history.csv"), TASKS)
    np.testing.assert_allclose(held["affinity"], found.to_numpy(), rtol=1e-9)
    assert [(tuple(g["tasks"]), tuple(g["serves"])) for g in held["groups"]] == [
        (g.tasks, g.serves) for g in group_tasks(found, 3)
    ]
    parts = parts_of(RECIPE, "tag", TASKS, own)
    assert [part.folder for part in parts] == [own / "single" / str(i) for i in range(len(parts))]
    for part in parts:  # each trained on its group, and plain otherwise
        columns = pd.read_csv(part.folder / "history.csv").columns
        assert {c for c in columns if c.startswith("loss/")} == {f"loss/{task}" for task in part.tasks}
        assert not any(c.startswith("affinity/") for c in columns)
    for folder in (own / "joint", *(part.folder for part in parts)):
        assert (folder / "checkpoint.pt").exists() and not (folder / "last.pt").exists()
    content = json.loads((own / "metrics.json").read_text())
    spent = [pd.read_csv(path)["train_s"].sum() for path in own.rglob("history.csv")]
    assert len(spent) == len(parts) + 1 and content["timing"]["train_s"] == pytest.approx(sum(spent))
    assert content["settings"]["networks"] == 3 and set(content["utility"]["test"]) == {*TASKS, "macro"}
    assert Predictions.load(own / "predictions_test.parquet").scores.keys() == set(TASKS)


def test_the_model_in_use_and_its_export_are_the_networks(finished: Path, tmp_path: Path) -> None:
    predictor = lf.load(finished, "tag")
    held = Predictions.load(finished / "tag" / "seed0" / "predictions_test.parquet")
    data = lf.load_dataset("german", tasks=tuple(TASKS), sensitive=("age",))
    network = predictor.source
    found = {}
    for trainer, served in zip(network.trainers, network.serves, strict=True):
        said = trainer.predict(data.test.only(tuple(trainer.main_tasks)).loader(512, device="cpu"))
        found |= {task: said.outputs[task] for task in served}
    for task in TASKS:
        torch.testing.assert_close(found[task].reshape(held.outputs[task].shape), held.outputs[task])
    files = export(finished, "torch-export", tmp_path, method="tag")
    made = torch.export.load(files[0]).module()(data.test.x)
    for task in data.tasks:
        if task.kind != "regression":  # whose values are in native units
            torch.testing.assert_close(made[task.name], task.probabilities(found[task.name]))


def test_a_run_that_was_cut_goes_on_to_the_same_groups(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_recipe(RECIPE, folder, device="cpu")
    own, whole = folder / "tag" / "seed0", finished / "tag" / "seed0"
    before = (own / "joint" / "checkpoint.pt").stat().st_mtime_ns
    (own / "metrics.json").unlink()
    run_recipe(RECIPE, folder, device="cpu", resume=True)  # after the groups: they are kept
    assert (own / "joint" / "checkpoint.pt").stat().st_mtime_ns == before
    for damage in (b"{}", None):
        (own / "metrics.json").unlink()
        if damage is None:
            (own / "task_groups.json").unlink()
        else:
            (own / "task_groups.json").write_bytes(damage)
            with pytest.raises(CheckpointError, match=r"task_groups\.json"):
                task_groups(own)
        run_recipe(RECIPE, folder, device="cpu", resume=True)  # they are found again, by the training that is there
        assert {k: v for k, v in task_groups(own).items() if k != "train_s"} == {
            k: v for k, v in task_groups(whole).items() if k != "train_s"
        }
        mine, theirs = (json.loads((each / "metrics.json").read_text()) for each in (own, whole))
        assert mine["utility"] == theirs["utility"] and mine["digest"] == theirs["digest"]


def test_the_report_shows_affinities_and_groups(finished: Path) -> None:
    run = read_run(finished)
    table = grouping_sheet(run)
    assert table is not None and len(table.body) == len(task_groups(finished / "tag" / "seed0")["groups"])
    (plot,) = branch_plots(run)
    assert plot.caption.startswith("tag: affinity of each two tasks in the joint training, seed 0")
    assert plot.figure is not None
    axes = plot.figure.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == [label(task, 20) for task in TASKS]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"single_task": True},
            r"methods\.tag\.weighting: TAG trains all tasks with hard sharing .* found single_task",
        ),
        ({"architecture": "MMoE"}, r"methods\.tag\.weighting: TAG .* found MMoE"),
        ({"networks": 0}, r"methods\.tag\.networks: .*at least 1"),
    ],
)
def test_what_does_not_go_together_is_said_before_training(change: dict[str, Any], said: str) -> None:
    methods = {"tag": {"weighting": "TAG", **change}}
    with pytest.raises(RecipeError, match=said):
        check(Recipe.from_dict({**CONTENT, "methods": methods}))


def test_a_study_says_that_it_is_several_models() -> None:
    with pytest.raises(RecipeError, match="a method by task groups, which is several models"):
        Plan.make(Recipe.from_dict({**CONTENT, "tune": {"methods": ["tag"]}}))
