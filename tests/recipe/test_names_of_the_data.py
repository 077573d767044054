"""Tasks and attributes that a recipe names and its data do not have: refused with field, file and line before anything is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import libmtl_fair as lf
from libmtl_fair import metrics
from libmtl_fair.errors import FairMTLError, RecipeError
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe import load_recipe
from libmtl_fair.recipe.checked import check_recipe
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.tune.plan import Plan

TABLE = """\
name: names
data:
  table: t.csv
  tasks:
    paid: {{kind: binary}}
    cls: {{kind: multiclass}}
    hours: {{kind: {hours}}}
  sensitive:
    sex: {{column: sex}}
    age: {age}
methods:
  plain: {{weighting: EW}}
  fair:
{fair}
"""
AGE = "{column: age, bins: [40]}"


@pytest.fixture
def read(tmp_path: Path):
    draw = np.random.default_rng(0)
    columns = {"x": draw.normal(size=80), "age": draw.integers(20, 60, 80), "paid": draw.integers(0, 2, 80)}
    columns |= {"sex": draw.choice(["f", "m"], 80), "cls": draw.choice(["a", "b", "c"], 80), "one": "same"}
    pd.DataFrame(columns | {"hours": draw.normal(size=80), "two": 2}).to_csv(tmp_path / "t.csv", index=False)

    def made(fair: str, age: str = AGE, hours: str = "regression"):
        text = "\n".join(f"    {line}" for line in fair.splitlines())
        (tmp_path / "r.yaml").write_text(TABLE.format(fair=text, age=age, hours=hours))
        return load_recipe(tmp_path / "r.yaml")

    return made


WRONG = [  # the method's settings, and what the message says
    ("weighting: FairMT\ntargets:\n  paid:\n    sxe: eo <= 0.05", "r.yaml:17: methods.fair.targets.paid.sxe: .*did you mean 'sex'"),
    ("weighting: FairMT\ntargets:\n  paid: eo <= 0.1\n  piad: eo <= 0.05", "r.yaml:17: methods.fair.targets.piad: .*'paid'"),
    ("weighting: FairMT\nconstraints: {cls: {sex: dp <= 0.05}}", r"r.yaml:15: methods.fair.constraints.cls: .*unknown binary task 'cls'"),
    ("weighting: FairMT\ntargets:\n  paid:\n    sex: eo <= 130%", "r.yaml:17: methods.fair.targets.paid.sex: .*at most 100%"),
    ("weighting: FairMT\ntargets: {paid: {}}", "r.yaml:15: methods.fair.targets.paid: .*no attribute"),
    ("weighting: FairMT\nconstraint: ''", "r.yaml:15: methods.fair.constraint: .*no constraint"),
    ("weighting: FairMT\nattributes: [sxe]", "r.yaml:15: methods.fair.attributes: .*'sex'"),
    ("weighting: FairMT\nintersectional: true\ntargets: {paid: {sex: eo <= 0.1}}", r"r.yaml:16: .*targets.paid.sex: .*Known: sex\*age"),
    ("weighting: FairMT\nsingle_task: true", r"r.yaml:14: methods.fair.weighting: .*none of the tasks is binary.*cls"),
    ("weighting: FBGrad\nsensitive: [race]", "r.yaml:15: methods.fair.sensitive: .*'race'"),
    ("weighting: GroupRegulariser\ntasks: [piad]", "r.yaml:15: methods.fair.tasks: .*'paid'"),
    ("weighting: LambdaMix\nheads: {loss: glf, sensitive: [sxe]}", "r.yaml:15: methods.fair.heads.sensitive: .*'sex'"),
    ("weighting: LambdaMix\nheads: {loss: glf, tasks: [piad]}", "r.yaml:15: methods.fair.heads.tasks: .*'paid'"),
    ("weighting: FBGrad\narchitecture: FairBranch\nmodel: {hidden: [8]}", "r.yaml:13: methods.fair: FairBranch: the encoder has one block"),
    ("post: offsets\nattributes: [sxe]", "r.yaml:14: methods.fair: |r.yaml:15: methods.fair.attributes: .*'sex'"),
]  # fmt: skip


@pytest.mark.parametrize(("fair", "message"), WRONG)
def test_what_a_method_names_is_checked_before_the_first_training(read, tmp_path, fair, message) -> None:
    def refused(work) -> None:
        with pytest.raises(RecipeError, match=message):
            work(read(fair))

    refused(check_recipe)
    refused(lambda recipe: run_recipe(recipe, tmp_path / "out", device="cpu"))
    assert not list(tmp_path.rglob("*.pt"))
    if "post:" not in fair and "single_task" not in fair:
        refused(Plan.make)


@pytest.mark.parametrize(
    ("age", "hours", "message"),
    [
        ("{column: one}", "regression", r"r.yaml:10: data.sensitive.age: sensitive attribute 'age' has one group \(same\)"),
        ("{column: x}", "regression", "r.yaml:10: data.sensitive.age: .*different numbers"),
        ("{column: agee}", "regression", "r.yaml:10: data.sensitive.age: .*'age'"),
        ("{column: age, bins: [40], labels: [young, overall]}", "regression", "r.yaml:10: data.sensitive.age: .*'overall'"),
        ("{of: [sex, one]}", "regression", "r.yaml:8: data.sensitive.one: .*one group"),
        (AGE, "{kind: binary, column: two}", "r.yaml:7: data.tasks.hours: .*"),
        (AGE, "regression, column: two", "r.yaml:7: data.tasks.hours: .*is 2 in every row"),
        (AGE, "binary", "r.yaml:7: data.tasks.hours: "),
    ],
)  # fmt: skip
def test_what_the_table_does_not_hold_is_said_at_its_line(read, age, hours, message) -> None:
    hours = hours.removeprefix("{kind: ").removesuffix("}")
    with pytest.raises(FairMTLError, match=message):
        check_recipe(read("weighting: ReLiF", age, hours))


def test_a_task_that_is_named_as_the_mean_over_tasks_would_be_overwritten_by_it(read, tmp_path) -> None:
    read("weighting: ReLiF")
    text = (tmp_path / "r.yaml").read_text().replace("hours: {", "macro: {column: hours, ")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(
        RecipeError, match="r.yaml:7: data.tasks.macro: the name 'macro' is that of the mean over tasks"
    ):
        check_recipe(load_recipe(tmp_path / "r.yaml"))
    (task, scores), ids = (lf.Binary("macro"), torch.tensor([0.2, 0.8])), {"sex": torch.tensor([0, 1])}
    held = Predictions((task,), {"macro": scores}, {"macro": scores}, {"macro": torch.tensor([0.0, 1.0])}, ids)
    with pytest.raises(RecipeError, match="a task is named 'macro'"):
        metrics.utility(held)


def test_what_is_right_is_taken(read) -> None:
    for fair in (
        "weighting: FBGrad",  # which warns of an architecture without branches when it is trained
        "weighting: FairMT\ntargets: {paid: {sex: eo <= 0.05, age: dp <= 20%}}",
        "weighting: FairMT\nintersectional: true\ntargets: {paid: {'sex*age': eo <= 0.1}}",
        "weighting: FairMT\nform: phi\nsingle_task: true",
        "weighting: GroupRegulariser\ntasks: [paid]\nsensitive: [age]",
        "weighting: LambdaMix\nheads: {loss: glf, tasks: [paid], sensitive: [age]}",
    ):
        assert check_recipe(read(fair)).data.groups == {"sex": ["f", "m"], "age": ["under 40", "40 and over"]}
