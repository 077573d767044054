"""What a recipe's data hold, before anything is trained: rows, features, groups, positives, and what is too small to judge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libmtl_fair.data import Dataset
from libmtl_fair.metrics.verdicts import enough
from libmtl_fair.recipe.build import check, check_data, make_dataset, need_model
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
        need_model(recipe.model_for(method), data.input_shape[0])
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
