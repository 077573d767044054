"""A table of one's own: a CSV or parquet file, or a DataFrame, with declared inputs, tasks and sensitive columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from libmtl_fair.data.build import build_dataset
from libmtl_fair.data.checks import SENSITIVE
from libmtl_fair.data.dataset import Dataset
from libmtl_fair.data.frames import column_of, read_frame
from libmtl_fair.data.selection import Choice, leaks
from libmtl_fair.data.spec import SensitiveSpec, TableSpec, TaskSpec, make_spec
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.validation import Listed, MissingRule, checked


def load_table(
    source: str | Path | pd.DataFrame,
    *,
    tasks: Mapping[str, TaskSpec | Mapping[str, Any]],
    sensitive: Mapping[str, SensitiveSpec | Mapping[str, Any] | str] | Sequence[str] = (),
    features: Sequence[str] | Mapping[str, str] | None = None,
    categorical: Sequence[str] = (),
    seed: int = 0,
    split: Sequence[float] | str = (0.6, 0.2, 0.2),
    stratify: str | bool = True,
    missing: MissingRule = "drop",
    keep_groups: Mapping[str, Any] | None = None,
    subset: int | float | None = None,
    min_frequency: int | float | None = None,
    sensitive_inputs: bool = True,
    name: str | None = None,
    title: str | None = None,
    licence: str = "not stated",
    notes: Sequence[str] = (),
) -> Dataset:
    """Load a table with several tasks and sensitive attributes.

    Parameters
    ----------
    source
        a .csv, .csv.gz or .parquet file, or a DataFrame.
    tasks
        {name: TaskSpec or a mapping of its fields}, in order; a recipe gives mappings.
    sensitive
        {attribute: SensitiveSpec, a mapping of its fields, or a column}, or a list of columns.
    features
        input columns, or {column: "numeric" | "categorical" | "auto"}. None: every column that no task reads or
        forbids.
    categorical
        input columns that are categories although they hold numbers.
    split
        three shares, or the name of a column that holds "train", "val" and "test".
    stratify
        True (first task), a task's name, or False.
    seed, missing, keep_groups, subset, min_frequency, sensitive_inputs
        as for :func:`load_dataset`.
    name, title, licence, notes
        for the data card.

    Raises
    ------
    DataError : file or column not there, an input that gives a task away, and all that :func:`load_dataset` raises.

    >>> frame = pd.DataFrame({"age": range(20, 60), "sex": ["f", "m"] * 20, "ill": [0, 0, 1, 1] * 10})
    >>> data = load_table(frame, tasks={"ill": {"kind": "binary", "column": "ill"}}, sensitive=["sex"])
    >>> data.inputs, data.groups, len(data.train)
    (('age', 'sex'), {'sex': ['f', 'm']}, 24)
    """
    frame = read_frame(source)
    task_specs = {key: _task_spec(key, value) for key, value in checked(dict, tasks, "tasks").items()}
    named = (
        dict(sensitive) if isinstance(sensitive, Mapping) else dict.fromkeys(checked(Listed, sensitive, "sensitive"))
    )
    categorical = checked(Listed, categorical, "categorical")
    groups = _sensitive_specs(named, set(frame.columns))
    candidates = _candidates(frame, task_specs, features, split)
    for column in categorical:
        column_of(frame, column, "categorical")
    where = "DataFrame" if isinstance(source, pd.DataFrame) else str(source)
    name = name or ("table" if isinstance(source, pd.DataFrame) else Path(source).name.split(".")[0])
    kinds = features if isinstance(features, Mapping) else {}
    spec = TableSpec(
        name=name,
        title=title or name,
        source=where,
        licence=licence,
        tasks=task_specs,
        sensitive=groups,
        candidates=candidates,
        default_tasks=tuple(task_specs),
        default_sensitive=tuple(named),
        kinds={**kinds, **dict.fromkeys(categorical, "categorical")},
        stratify=_stratify(stratify, task_specs),
        notes=checked(Listed, notes, "notes"),
    )
    choice = Choice(None, tuple(named), seed, split, missing, keep_groups, subset, min_frequency, sensitive_inputs)
    return build_dataset(spec, frame, choice)


def _task_spec(name: str, value: TaskSpec | Mapping[str, Any]) -> TaskSpec:
    """Return a task's spec; a mapping that names no column means the column of the task's own name."""
    if checked(str, name, "a task's name") == SENSITIVE:
        raise DataError(f"a task may not be named {SENSITIVE!r}: batches hold the group ids under this key; rename it")
    return make_spec(TaskSpec, value, "task", name)


def _sensitive_specs(named: Mapping[str, Any], columns: Collection[str]) -> dict[str, SensitiveSpec]:
    """Return the declared specs; a name alone is a column, or shorthand ("race:top2", "sex*race") over columns."""
    specs: dict[str, SensitiveSpec] = {}
    for name, value in named.items():
        if value is not None:
            specs[name] = make_spec(SensitiveSpec, value, "sensitive attribute", name)
        elif name in columns:
            specs.setdefault(name, SensitiveSpec(column=name))
        else:
            for part in name.partition(":top")[0].split("*"):
                specs.setdefault(part.strip(), SensitiveSpec(column=part.strip()))
    for spec in list(specs.values()):
        for part in spec.of:
            specs.setdefault(part, SensitiveSpec(column=part))
    return specs


def _candidates(
    frame: pd.DataFrame,
    tasks: Mapping[str, TaskSpec],
    features: Sequence[str] | Mapping[str, str] | None,
    split: object,
) -> tuple[str, ...]:
    forbidden = leaks(tasks)
    if features is None:
        return tuple(str(column) for column in frame.columns if column not in forbidden and column != split)
    columns: tuple[str, ...] = checked(
        Listed, list(features) if isinstance(features, Mapping) else features, "features"
    )
    for column in columns:
        column_of(frame, column, "features")
        if column in forbidden:
            raise DataError(
                f"feature {column!r} gives away task {forbidden[column][0]!r}; one input serves all tasks, so take it out "
                "of the features (or drop the task)"
            )
    return columns


def _stratify(stratify: str | bool, tasks: Mapping[str, TaskSpec]) -> str | None:
    if isinstance(stratify, bool):
        return None if stratify else ""
    if not isinstance(stratify, str) or stratify not in tasks:
        raise DataError(f"stratify: {unknown('task', stratify, tasks)}")
    return stratify
