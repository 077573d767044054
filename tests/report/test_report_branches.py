from __future__ import annotations

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from libmtl_fair.errors import CheckpointError
from libmtl_fair.methods.fairbranch.conflicts import ConflictRecord
from libmtl_fair.methods.fairbranch.tree import BranchTree
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import read_run, write_report
from libmtl_fair.report.branches import branchings, conflict_plot, conflict_table, event_sheet, tree_texts
from libmtl_fair.report.page import render
from libmtl_fair.report.plots import plots_of
from libmtl_fair.report.transfer import angle_boxes, gain_triangles, task_conflicts

TASKS = ["income", "hours", "<script>alert(1)</script>"]


def structure(tree, events=()):
    return {"tree": tree.to_dict(), "events": list(events)}


@pytest.fixture
def branched(builder):
    """A made-up run without groups and history, with branches and conflicts for its method relif."""
    run_dir = builder(groups={}, history=False, methods={"plain": "EW", "relif": "FBGrad"}).write()
    start = BranchTree.start(TASKS, 3)
    trees = [start.branch([(0, 2), (1,)]), start.branch([(0, 2), (1,)]), start.branch([(0,), (1,), (2,)])]
    likeness = [[1.0, 0.1, 0.6], [0.1, 1.0, 0.2], [0.6, 0.2, 1.0]]
    compared = [[task] for task in TASKS]
    event = {"block": 3, "compared": compared, "similarity": likeness, "groups": [], "epoch": 1, "step": 9}
    for seed, tree in enumerate(trees):
        groups = [list(group) for group in tree.groups]
        content = {"last": structure(tree, [{**event, "groups": groups}]), "chosen": structure(tree if seed else start)}
        folder = run_dir / "relif" / f"seed{seed}"
        (folder / "structure.json").write_text(json.dumps(content))
        cosines = torch.full((2, 2, 3, 3, 3), 0.5)
        cosines[0, 0, 0] = -0.5 if seed == 0 else 0.5
        cosines[1, :, 2] = torch.nan
        record = ConflictRecord(tuple(TASKS), ("block 1", "block 2", "block 10"), (0, 1), cosines)
        record.frame().to_csv(folder / "conflicts.csv", index=False)
    return run_dir


def test_trees_of_all_seeds_and_the_chosen_checkpoint(branched):
    texts = dict(tree_texts(read_run(branched)))
    assert list(texts) == ["relif, seed 0", "relif, seed 1", "relif, seed 2"]
    assert texts["relif, seed 1"].splitlines()[0] == "blocks 1-2: all tasks"
    assert (
        "chosen checkpoint, which the numbers are of:\nblocks 1-3: all tasks (not branched)" in texts["relif, seed 0"]
    )
    assert "chosen" not in texts["relif, seed 1"]
    assert branchings(read_run(branched), "plain") == []


def test_seeds_with_the_same_tree_stand_together(branched):
    content = (branched / "relif" / "seed1" / "structure.json").read_text()
    (branched / "relif" / "seed2" / "structure.json").write_text(content)
    assert [whose for whose, _ in tree_texts(read_run(branched))] == ["relif, seed 0", "relif, seeds 1, 2"]


def test_events_say_when_what_and_why(branched):
    found = event_sheet(read_run(branched))
    assert found is not None
    cells = [[cell.text for cell in line] for line in found.body]
    assert cells[0][:4] == ["relif", "0", "1", "3"]
    assert cells[0][4] == "income + <script>alert(1)</script>; hours"
    assert cells[0][5] == "income and <script>alert(1)</script>: 0.60"
    assert len(cells) == 3


def test_conflicts_are_counted_over_seeds(branched):
    table = conflict_table(read_run(branched), "relif")
    assert table is not None
    cell = table.set_index(["kind", "layer", "epoch"])
    assert cell.loc[("accuracy", "block 1", 0), "pairs"] == 9
    assert cell.loc[("accuracy", "block 1", 0), "share"] == pytest.approx(1 / 3)
    assert cell.loc[("accuracy", "block 1", 0), "angle"] == pytest.approx((120 + 60 + 60) / 3)
    assert cell.loc[("fairness", "block 2", 1), "share"] == 0
    assert ("accuracy", "block 10", 1) not in cell.index
    assert conflict_table(read_run(branched), "plain") is None


def test_heat_maps_have_layers_up_and_leave_unshared_cells_empty(branched):
    table = conflict_table(read_run(branched), "relif")
    figure = conflict_plot(table, "angle")
    accuracy, fairness, bar = figure.axes
    assert [text.get_text() for text in accuracy.get_yticklabels()] == ["block 1", "block 2", "block 10"]
    assert not accuracy.yaxis_inverted()
    assert [axes.get_title() for axes in (accuracy, fairness)] == ["accuracy gradients", "fairness gradients"]
    assert len(accuracy.texts) == 5
    assert bar.get_ylabel() == "mean angle (degrees)"
    low, high = accuracy.collections[0].get_clim()
    assert low + high == 180


def test_a_long_training_is_drawn_without_numbers():
    rows = [
        (kind, f"block {b}", e, 3, 0.5, 80.0) for kind in ("accuracy", "fairness") for b in (1, 2) for e in range(60)
    ]
    table = pd.DataFrame(rows, columns=["kind", "layer", "epoch", "pairs", "share", "angle"])
    figure = conflict_plot(table)
    assert not figure.axes[0].texts
    assert len(figure.axes[1].get_xticklabels()) <= 12
    assert np.allclose(figure.axes[0].collections[0].get_clim(), (0, 1))


def test_only_one_kind_recorded_is_drawn():
    rows = [("accuracy", "block 1", 0, 3, 0.5, 80.0)]
    figure = conflict_plot(pd.DataFrame(rows, columns=["kind", "layer", "epoch", "pairs", "share", "angle"]), "angle")
    assert not figure.axes[1].texts


def test_the_page_shows_branches_and_conflicts(branched):
    path = write_report(branched, interactive=False)
    text = path.read_text(encoding="utf-8")
    assert '<a href="#branches">' in text
    assert "branch tree as it ended, seed 0; 2 more below as text" in text
    assert text.count("accuracy gradients") == 4
    assert "<script>alert(1)" not in text
    for name in ("tree_relif", "conflicts_share_relif", "conflicts_angle_relif"):
        assert (branched / "plots" / f"{name}.png").exists()


def test_a_run_without_branches_has_no_such_section(builder):
    run_dir = builder(groups={}, history=False).write()
    text = render(read_run(run_dir), interactive=False)
    assert "branches" not in text
    assert all(plot.section != "branches" for plot in plots_of(read_run(run_dir)))


@pytest.mark.parametrize(
    "content", ['{"last": {}}', "[]", '{"last": {"tree": 3}, "chosen": {}}', "{", '{"last": {"tree": {"tasks": []}}}']
)
def test_damaged_branches_are_named(branched, content):
    (branched / "relif" / "seed1" / "structure.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"relif/seed1/structure\.json is damaged"):
        write_report(branched)


def test_damaged_conflicts_are_named(branched):
    (branched / "relif" / "seed1" / "conflicts.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CheckpointError, match=r"relif/seed1/conflicts\.csv is damaged"):
        write_report(branched)


def test_a_branching_run_writes_its_tree_and_conflicts(tmp_path):
    recipe = Recipe.from_dict(
        {
            "name": "branching",
            "data": {"name": "german", "tasks": ["bad_credit", "owns_home", "job"], "sensitive": ["age"]},
            "model": {"hidden": [8, 8]},
            "train": {"epochs": 3, "batch_size": 256},
            "methods": {
                "plain": {"weighting": "EW"},
                "branch": {
                    "weighting": "FBGrad",
                    "record_conflicts": True,
                    "architecture": "FairBranch",
                    "arch_args": {"threshold": 1.0},
                },
            },
            "metrics": {"n_bootstrap": 20},
            "output": {"report": False},
        }
    )
    out = run_recipe(recipe, tmp_path / "run", device="cpu")
    assert not (out / "plain" / "seed0" / "structure.json").exists()
    [found] = branchings(read_run(out), "branch")
    assert len(found.last.leaves) == 3
    assert [event["epoch"] for event in found.events] == [0]
    held = torch.load(out / "branch" / "seed0" / "checkpoint.pt", weights_only=True)
    assert BranchTree.from_dict(held["structure"]["tree"]) == found.last
    table = conflict_table(read_run(out), "branch")
    assert set(table["epoch"]) == {0, 1, 2}
    names = [plot.name for plot in plots_of(read_run(out)) if plot.section == "branches"]
    maps = ["tree_branch", "conflicts_share_branch", "conflicts_angle_branch"]
    assert names == [*maps, "angles_branch", "task_conflicts_branch"]


def test_conflicts_task_by_task_are_those_counted_by_hand(branched):
    frame = pd.concat([item.conflicts() for item in read_run(branched).of("relif")])
    counts = task_conflicts(frame, "accuracy", TASKS)
    by_hand = pd.DataFrame(0, index=TASKS, columns=TASKS)
    for row in frame.itertuples():
        if row.kind == "accuracy" and row.cosine < 0:
            by_hand.loc[row.task_a, row.task_b] += 1
            by_hand.loc[row.task_b, row.task_a] += 1
    assert counts.to_numpy().tolist() == by_hand.to_numpy().tolist()
    assert counts.to_numpy().sum() == 2 * 3  # three pairs, in one epoch and layer of one seed
    assert (task_conflicts(frame, "fairness", TASKS).to_numpy() == 0).all()


def test_boxes_hold_the_angles_above_90_of_each_epoch(branched):
    frame = pd.concat([item.conflicts() for item in read_run(branched).of("relif")])
    accuracy, fairness = angle_boxes(frame).axes
    assert len(accuracy.patches) == 1  # of two epochs the first alone has conflicts
    assert [text.get_text() for text in accuracy.texts] == ["3"]
    assert not fairness.patches


def test_triangles_point_and_are_coloured_by_good_and_bad():
    rows = [("a", "one", 0.02, 0.01, -0.01), ("a", "two", -0.03, -0.02, -0.04), ("a", "mean", -0.005, -0.005, -0.025)]
    found = pd.DataFrame(rows, columns=["method", "task", "knowledge", "ep", "eo"])
    panels = gain_triangles(found, ["a"]).axes
    green, red = (matplotlib.colors.to_rgba(colour) for colour in ("#009E73", "#D55E00"))
    drawn = {}
    for name, axes in zip(("knowledge", "ep", "eo"), panels):
        drawn[name] = {
            float(y): tuple(points.get_facecolors()[0])
            for points in axes.collections[:-1]
            if len(points.get_offsets())
            for _, y in points.get_offsets()
        }
        assert axes.collections[-1].get_segments()[0][0][1] == found.loc[2, name]
    assert drawn["knowledge"] == {0.02: green, -0.03: red}
    assert drawn["ep"] == {0.01: red, -0.02: green}
    assert drawn["eo"] == {-0.01: green, -0.04: green}


def test_all_of_fairbranchs_figures_are_on_the_page(branched):
    names = {plot.name for plot in plots_of(read_run(branched))}
    assert {"angles_relif", "task_conflicts_relif", "conflicts_share_relif", "tree_relif"} <= names
    text = render(read_run(branched), interactive=False)
    assert "accumulated over the first batch of each epoch, all layers and 3 seeds" in text
