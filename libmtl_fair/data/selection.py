"""What a user chose of a table, and what follows from it: rows, tasks, groups, and the inputs that leak no task."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.data.frames import column_of
from libmtl_fair.data.labels import RawLabels, raw_labels, task_columns
from libmtl_fair.data.sensitive import Groups, choose_sensitive, make_groups, tell_tale_columns
from libmtl_fair.data.spec import TableSpec, TaskSpec
from libmtl_fair.data.splits import Rows, draw_subset, split_by_column, split_rows, strata
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.validation import Keep, Listed, MissingRule, checked


@dataclass(frozen=True)
class Choice:
    """What a user chose of a table: see :func:`libmtl_fair.data.load_dataset` for the fields."""

    tasks: Sequence[str] | str | None
    sensitive: Sequence[str] | str | None
    seed: int
    split: Sequence[float] | str
    missing: MissingRule
    keep_groups: Mapping[str, Sequence[str] | int] | None
    subset: int | float | None
    min_frequency: int | float | None
    sensitive_inputs: bool

    def __post_init__(self) -> None:
        """Check what scikit-learn and pandas will be given."""
        checked(Listed | None, self.tasks, "tasks")
        checked(Listed | None, self.sensitive, "sensitive")
        if not isinstance(self.split, str | Sequence):
            raise DataError(f"split must be three shares or a column's name, found {self.split!r}")
        if not isinstance(self.sensitive_inputs, bool):
            raise DataError(f"sensitive_inputs must be true or false, found {self.sensitive_inputs!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise DataError(f"seed must be an integer from 0 to 2**32 - 1, found {self.seed!r}")
        rare = self.min_frequency
        counts = isinstance(rare, int) and not isinstance(rare, bool) and rare >= 1
        if not (rare is None or counts or (isinstance(rare, float) and 0 < rare < 1)):
            raise DataError(f"min_frequency must be a number of rows or a share between 0 and 1, found {rare!r}")

    def kept_groups(self) -> dict[str, tuple[str, ...] | int]:
        """Return which groups of which attribute to keep."""
        given = checked(dict, self.keep_groups or {}, "keep_groups")
        return {name: checked(Keep, value, f"keep_groups of {name!r}") for name, value in given.items()}


@dataclass(frozen=True)
class Table:
    """The rows in use, ``rows`` being their positions in the source, with labels, groups and strata.

    ``stratified_on`` is the task of the strata, "" for none; ``tell_tale`` the columns that show each attribute.
    """

    frame: pd.DataFrame
    rows: Rows
    labels: tuple[RawLabels, ...]
    groups: tuple[Groups, ...]
    stratified_on: str
    stratum: NDArray[np.int64] | None
    tell_tale: Mapping[str, set[str]]

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """Return the specs of the chosen tasks, in order."""
        return {item.name: item.spec for item in self.labels}

    def parts(self, choice: Choice) -> dict[str, Rows]:
        """Return the rows of each part; one without a labelled row of a task is refused."""
        if isinstance(choice.split, str):
            parts = split_by_column(column_of(self.frame, choice.split, "split"))
        else:
            parts = split_rows(self.stratum, len(self.frame), choice.split, choice.seed)
        for labels in self.labels:
            for part, rows in parts.items():
                if not labels.observed[rows].any():
                    raise DataError(
                        f"task {labels.name!r}: no labelled row in the {part} split ({len(rows)} rows); use more rows or "
                        "other shares"
                    )
        return parts


def read_table(spec: TableSpec, frame: pd.DataFrame, choice: Choice) -> Table:
    """Return the chosen rows of ``frame`` with their labels and groups."""
    chosen = choose_tasks(spec, choice.tasks)
    rows = np.arange(len(frame))
    if spec.keep_rows is not None:
        rows = np.flatnonzero(spec.keep_rows(frame).to_numpy(dtype=bool, na_value=False))
        if len(rows) == 0:
            raise DataError(f"dataset {spec.name!r}: no row passes the filter ({spec.filter})")
        frame = frame.iloc[rows]
    frame = frame.reset_index(drop=True)
    names = spec.default_sensitive if choice.sensitive is None else choice.sensitive
    attributes, known = choose_sensitive(names, spec.sensitive, choice.kept_groups())
    stratify = next(iter(chosen)) if spec.stratify is None else spec.stratify
    table = Table(
        frame=frame,
        rows=rows,
        labels=tuple(raw_labels(name, task, frame) for name, task in chosen.items()),
        groups=tuple(make_groups(name, item, frame, choice.missing, known) for name, item in attributes.items()),
        stratified_on=stratify,
        stratum=strata(raw_labels(stratify, spec.tasks[stratify], frame)) if stratify else None,
        tell_tale={name: tell_tale_columns(item, known) for name, item in attributes.items()},
    )
    taken = draw_subset(table.stratum, len(frame), choice.subset, choice.seed)
    if len(taken) == len(frame):
        return table
    return replace(
        table,
        frame=frame.iloc[taken].reset_index(drop=True),
        rows=rows[taken],
        labels=tuple(item.take(taken) for item in table.labels),
        groups=tuple(item.take(taken) for item in table.groups),
        stratum=None if table.stratum is None else table.stratum[taken],
    )


def choose_tasks(spec: TableSpec, tasks: Sequence[str] | str | None) -> dict[str, TaskSpec]:
    """Return the chosen tasks' specs in the order chosen, the default ones without a choice."""
    names = spec.default_tasks if tasks is None else checked(Listed, tasks, "tasks")
    if not names:
        raise DataError(f"dataset {spec.name!r}: no task chosen; choose some of {', '.join(spec.tasks)}")
    for name in names:
        if name not in spec.tasks:
            raise DataError(f"dataset {spec.name!r}: {unknown('task', name, spec.tasks)}")
        if names.count(name) > 1:
            raise DataError(f"dataset {spec.name!r}: task {name!r} is chosen twice")
    return {name: spec.tasks[name] for name in names}


def leaks(tasks: Mapping[str, TaskSpec]) -> dict[str, list[str]]:
    """Return {column: the chosen tasks that it gives away}: their own columns and those that they forbid."""
    found: dict[str, list[str]] = {}
    for name, task in tasks.items():
        for column in dict.fromkeys((*task_columns(task), *task.forbids)):
            found.setdefault(column, []).append(name)
    return found


def choose_inputs(spec: TableSpec, tasks: Mapping[str, TaskSpec], without: Collection[str] = ()) -> list[str]:
    """Return the candidate columns that leak none of the chosen tasks, as one input serves them all."""
    out = {*leaks(tasks), *without}
    inputs = [column for column in spec.candidates if column not in out]
    if not inputs:
        raise DataError(f"dataset {spec.name!r}: tasks {list(tasks)} leave no input column; choose fewer tasks")
    return inputs
