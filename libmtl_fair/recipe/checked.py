"""What a recipe's data hold, before anything is trained: rows, features, groups, positives, and what is too small to judge."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libmtl_fair.data import Dataset
from libmtl_fair.errors import HostError, RecipeError
from libmtl_fair.libmtl.checkpoint import random_state_kept
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS
from libmtl_fair.methods.base import Declared, unknown_names
from libmtl_fair.metrics import GroupMetrics
from libmtl_fair.metrics.scores import MACRO
from libmtl_fair.metrics.verdicts import enough
from libmtl_fair.processes import alone
from libmtl_fair.recipe.build import check, data_for, make_dataset, make_trainer, need_model
from libmtl_fair.recipe.networks import weighting_of
from libmtl_fair.recipe.post import POST_SETTINGS
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.tasks import IGNORE_INDEX, Task


@dataclass(frozen=True)
class Checked:
    """What :func:`check_recipe` found.

    Attributes
    ----------
    data : Dataset
        The recipe's data, as its first seed sees them.
    tasks, groups : list of tuple of str
        Rows of two tables: task, kind, labels in each part; attribute, group, rows in each part, test positives a task.
    too_small : list of str
        One sentence for each group and measure that cannot be judged.
    """

    data: Dataset
    tasks: list[tuple[str, ...]]
    groups: list[tuple[str, ...]]
    too_small: list[str]


def check_data(recipe: Recipe, data: Dataset) -> None:
    """Check what is trained against the data, before the first training: tasks and attributes by name, and models by their shapes.

    Raises
    ------
    RecipeError
        With file and line.
    """
    for task in data.tasks:
        if task.name == MACRO:
            raise recipe.error(
                ("data", "tasks", MACRO),
                f"the name {MACRO!r} is that of the mean over tasks; rename it, with column: {MACRO}",
            )
    for attribute, names in data.groups.items():
        try:
            GroupMetrics(
                data.tasks[:1], {attribute: len(names)}, group_names={attribute: names}, missing=recipe.metrics.missing
            )
        except RecipeError as error:
            raise recipe.error(("data", "sensitive", attribute), str(error)) from error
    ours: dict[str, type[Declared]] = {n: cls.settings_class for n, cls in OUR_WEIGHTINGS.items()} | {**POST_SETTINGS}
    for name, method in recipe.methods.items():
        heads = unknown_names(method.heads, data.tasks, data.groups) if method.heads else ()
        for field, message in heads:
            raise recipe.error(("methods", name, "heads", field), message)
        if method.post and not any(task.kind == "binary" for task in data.tasks):
            raise recipe.error(("methods", name, "post"), "decides binary tasks, and the recipe has none")
        if (settings := ours.get(method.weighting)) is None:
            continue
        try:
            given = settings.from_args(method.weighting, method.args)
            for tasks in [(task,) for task in data.tasks] if method.single_task else [data.tasks]:
                given.check_names(tasks, data.groups)
        except RecipeError as error:
            raise recipe.error(("methods", name, *settings.written(error.where, method.args)), str(error)) from error
    _check_models(recipe, data)


def _check_models(recipe: Recipe, data: Dataset) -> None:
    """Make the model of every method that is trained, without its weights."""
    for name, method in recipe.methods.items():
        if method.post:
            continue
        seen, options = data_for(recipe, name, data), {"device": "meta", "pretrained": False, "loggers": ()}
        try:
            with alone(), random_state_kept(), warnings.catch_warnings(action="ignore"):  # they come with the training
                for tasks in [(task,) for task in data.tasks] if method.single_task else [data.tasks]:
                    make_trainer(recipe, name, seen, tasks, recipe.seeds[0], **options, **weighting_of(recipe, name))
        except (HostError, RecipeError) as error:
            raise recipe.error(("methods", name), str(error)) from error


def check_recipe(recipe: Recipe) -> Checked:
    """Read everything that a recipe names and train nothing.

    Raises
    ------
    RecipeError
        A name or setting that does not fit.
    DataError
        Data that cannot be used as the recipe says.
    """
    check(recipe)
    data = make_dataset(recipe, recipe.seeds[0])
    check_data(recipe, data)
    for method in recipe.methods:
        need_model(recipe.model_for(method), data.input_shape)
    parts = data.splits()
    tasks = [
        (
            t.name,
            t.kind,
            *(_labels(t, part.labels[t.name]) if t.name in part.labels else "in files" for part in parts.values()),
        )
        for t in data.tasks
    ]
    binary = [task for task in data.tasks if task.kind == "binary"]
    groups, too_small = [], []
    for attribute, names in data.groups.items():
        ids = {name: part.groups[attribute] for name, part in parts.items()}
        sizes = {name: _count(each, len(names)) for name, each in ids.items()}
        tables = {task.name: _outcomes(data.test.labels[task.name], ids["test"], len(names)) for task in binary}
        for place, group in enumerate(names):
            rows = (f"{sizes[name][place]:,}" for name in parts)
            positives = (f"{table[place, 3]:,.0f}" for table in tables.values())
            groups.append((attribute, group, *rows, *positives))
        unknown = {name: int((each < 0).sum()) for name, each in ids.items()}
        if any(unknown.values()):
            groups.append((attribute, "(none)", *(f"{count:,}" for count in unknown.values()), *("" for _ in binary)))
        too_small += _too_small(attribute, names, sizes["test"], tables, recipe.metrics.min_group_size)
    return Checked(data, tasks, groups, too_small)


def _labels(task: Task, labels: Tensor) -> str:
    """Return the labels of one part in words."""
    if task.kind == "multiclass":
        seen = labels[labels != IGNORE_INDEX]
        return f"{len(seen):,} labelled, {len(set(seen.tolist()))} classes"
    seen = labels[~torch.isnan(labels)] if labels.dim() == 1 else labels[~torch.isnan(labels).all(1)]
    if task.kind == "binary":
        return f"{int(seen.sum()):,} of {len(seen):,} positive"
    return f"{len(seen):,} labelled"


def _count(ids: Tensor, n_groups: int) -> NDArray[np.int64]:
    return torch.bincount(ids[ids >= 0], minlength=n_groups).numpy()


def _outcomes(labels: Tensor, ids: Tensor, n_groups: int) -> NDArray[np.int64]:
    """Return [G, 4] of people by label: negatives as true negatives, positives as true positives."""
    negative, positive = (_count(torch.where(labels == value, ids, -1), n_groups) for value in (0, 1))
    empty = np.zeros_like(negative)
    return np.stack([negative, empty, empty, positive], axis=1)


def _too_small(
    attribute: str, names: list[str], sizes: NDArray[np.int64], tables: dict[str, NDArray[np.int64]], least: int
) -> list[str]:
    found = [
        f"{attribute}: {name} has {size} test rows, under {least}: no measure of this group can be judged"
        for name, size in zip(names, sizes)
        if size < max(least, 1)
    ]
    for task, table in tables.items():
        for metric, column, what in (("true_positive_rate", 3, "positives"), ("false_positive_rate", 0, "negatives")):
            fine = enough(table, metric, min_group_size=least)
            few = [place for place in np.flatnonzero(~fine) if sizes[place] >= max(least, 1)]
            found += [
                f"{attribute}: {names[place]} has {table[place, column]} test {what} of {task}, under 10: its "
                f"{metric.replace('_', ' ')} cannot be judged"
                for place in few
            ]
    return found
