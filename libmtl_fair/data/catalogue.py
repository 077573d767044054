"""Datasets by name: those shipped inside the package, and those that fairlearn fetches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from libmtl_fair.data.adult import ADULT
from libmtl_fair.data.build import build_dataset
from libmtl_fair.data.compas import COMPAS
from libmtl_fair.data.dataset import Dataset
from libmtl_fair.data.fetched import FETCHED, fetch_frame
from libmtl_fair.data.frames import read_frame
from libmtl_fair.data.german import GERMAN
from libmtl_fair.data.selection import Choice, choose_inputs, choose_tasks
from libmtl_fair.data.spec import TableSpec
from libmtl_fair.data.support2 import SUPPORT2
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.validation import MissingRule

SHIPPED: Mapping[str, TableSpec] = {spec.name: spec for spec in (ADULT, COMPAS, GERMAN, SUPPORT2)}
"""Datasets whose files are inside the package."""


def dataset_names() -> tuple[str, ...]:
    """Return the names that :func:`load_dataset` knows, the shipped ones first.

    >>> dataset_names()[:4]
    ('adult', 'compas', 'german', 'support2')
    """
    return (*SHIPPED, *FETCHED)


def dataset_spec(name: str) -> TableSpec:
    """Return what is known about a dataset: its tasks, attributes, candidate inputs and leaks.

    Raises
    ------
    DataError : an unknown name, with the near one.
    """
    if name in SHIPPED:
        return SHIPPED[name]
    if name in FETCHED:
        return FETCHED[name].spec
    raise DataError(f"{unknown('dataset', name, dataset_names())}. For a table of your own use load_table")


def describe_dataset(name: str) -> dict[str, Any]:
    """Return a dataset's title, source, licence, tasks, sensitive attributes and default inputs, without loading it.

    Raises
    ------
    DataError : an unknown name.

    >>> describe_dataset("adult")["default_sensitive"]
    ['sex', 'race']
    """
    spec = dataset_spec(name)
    return {
        "name": spec.name,
        "title": spec.title,
        "source": spec.source,
        "licence": spec.licence,
        "shipped": name in SHIPPED,
        "tasks": {
            task: {"kind": item.kind, "definition": item.definition, "forbids": list(item.forbids)}
            for task, item in spec.tasks.items()
        },
        "default_tasks": list(spec.default_tasks),
        "sensitive": list(spec.sensitive),
        "default_sensitive": list(spec.default_sensitive),
        "default_inputs": choose_inputs(spec, choose_tasks(spec, None)),
        "notes": list(spec.notes),
    }


def load_dataset(
    name: str,
    tasks: Sequence[str] | str | None = None,
    sensitive: Sequence[str] | str | None = None,
    seed: int = 0,
    split: Sequence[float] | str = (0.6, 0.2, 0.2),
    missing: MissingRule = "drop",
    keep_groups: Mapping[str, Any] | None = None,
    subset: int | float | None = None,
    *,
    min_frequency: int | float | None = None,
    sensitive_inputs: bool = True,
    frame: pd.DataFrame | str | Path | None = None,
) -> Dataset:
    """Load a dataset by name, ready for multi-task training.

    Parameters
    ----------
    name
        see :func:`dataset_names`.
    tasks
        which of its tasks, in which order; None for the default set. A column that leaks any of them is no input.
    sensitive
        its attributes; ``"race:top2"`` keeps the two largest groups, ``"sex*race"`` intersects. None: default.
    seed
        of subset and split. The same seed gives the same rows whatever tasks are chosen.
    split
        shares of train, val and test, stratified on the dataset's first task.
    missing
        rows without a sensitive value: "drop" (id -1: they train, but leave group statistics), "group" (a group
        "(missing)" of their own) or "error". Counts are in the card.
    keep_groups
        {attribute: groups to keep, or how many of the largest}; other rows get id -1, counted in the card.
    subset
        a number of rows, or a share, drawn before the split.
    min_frequency
        one-hot categories with fewer rows (int) or a smaller share (float) in training become "(rare)".
    sensitive_inputs
        whether the columns of the chosen sensitive attributes may be inputs.
    frame
        the table itself, a DataFrame or a .csv or .parquet path, instead of the shipped or fetched one.

    Raises
    ------
    DataError : unknown name, task, attribute, group or column; a class absent from train; an attribute with one group;
        an empty split; missing sensitive values under "error"; a fetch without network.

    >>> data = load_dataset("german", tasks=["bad_credit", "owns_home"], sensitive=["age"])
    >>> len(data.train), len(data.val), len(data.test), data.groups
    (600, 200, 200, {'age': ['25 and under', 'over 25']})
    """
    spec = dataset_spec(name)
    choice = Choice(tasks, sensitive, seed, split, missing, keep_groups, subset, min_frequency, sensitive_inputs)
    choose_tasks(spec, tasks)
    if frame is not None:
        table = read_frame(frame)
        if name in FETCHED:
            table = FETCHED[name].named(table)
    elif name in FETCHED:
        table = fetch_frame(FETCHED[name])
    else:
        table = _shipped_frame(name)
    return build_dataset(spec, table, choice)


def _shipped_frame(name: str) -> pd.DataFrame:
    with resources.as_file(resources.files("libmtl_fair.data") / "files" / f"{name}.csv.gz") as path:
        return read_frame(path)
