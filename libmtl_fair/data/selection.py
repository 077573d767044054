"""What a user chose of a table, and what follows from it: rows, tasks, groups, splits, inputs that leak no task."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.data.frames import Series, column_of
from libmtl_fair.data.labels import RawLabels, raw_labels, task_columns
from libmtl_fair.data.sensitive import Groups, choose_sensitive, make_groups, tell_tale_columns
from libmtl_fair.data.spec import MAX_CATEGORIES, SensitiveSpec, TableSpec, TaskSpec
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.validation import Keep, Listed, MissingRule, checked

Rows = NDArray[np.int64]
PARTS = ("train", "val", "test")
_SMALLEST_STRATUM = 10


@dataclass(frozen=True)
class Choice:
    """What a user chose of a table: see :func:`libmtl_fair.data.load_dataset` for the fields."""

    tasks: Sequence[str] | str | None
    sensitive: Sequence[str] | str | None
    seed: int
    split: Sequence[float] | str
    missing: MissingRule
    keep_groups: Mapping[str, Keep] | None
    subset: int | float | None
    min_frequency: int | float | None
    sensitive_inputs: bool
    test_seed: int | None = None
    max_categories: int = MAX_CATEGORIES

    def __post_init__(self) -> None:
        """Check what scikit-learn and pandas will be given."""
        if not isinstance(self.split, str | Sequence):
            raise DataError(f"split must be three shares or a column's name, found {self.split!r}")
        if not isinstance(self.sensitive_inputs, bool):
            raise DataError(f"sensitive_inputs must be true or false, found {self.sensitive_inputs!r}")
        for name, seed in (("seed", self.seed), ("test_seed", self.of_test)):
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
                raise DataError(f"{name} must be an integer from 0 to 2**32 - 1, found {seed!r}")
        rare = self.min_frequency
        counts = isinstance(rare, int) and not isinstance(rare, bool) and rare >= 1
        if not (rare is None or counts or (isinstance(rare, float) and 0 < rare < 1)):
            raise DataError(f"min_frequency must be a number of rows or a share between 0 and 1, found {rare!r}")

        if isinstance(self.max_categories, bool) or not isinstance(self.max_categories, int) or self.max_categories < 1:
            raise DataError(f"max_categories must be a whole number of at least 1, found {self.max_categories!r}")

    @property
    def of_test(self) -> int:
        """The seed of subset and test rows."""
        return self.seed if self.test_seed is None else self.test_seed


@dataclass(frozen=True)
class Table:
    """The rows in use, ``rows`` being their positions in the source, with labels, groups and strata.

    ``stratified_on`` is the task of the strata, "" for none; ``tell_tale`` the columns that show each attribute; ``known``: the specs
    of all attributes, of which intersections are made.
    """

    spec: TableSpec
    choice: Choice
    frame: pd.DataFrame
    rows: Rows
    labels: tuple[RawLabels, ...]
    groups: tuple[Groups, ...]
    stratified_on: str
    stratum: Rows | None
    tell_tale: Mapping[str, set[str]]
    known: Mapping[str, SensitiveSpec]

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """Return the specs of the chosen tasks, in order."""
        return {item.name: item.spec for item in self.labels}

    @property
    def inputs(self) -> list[str]:
        """Return the input columns, which leak no chosen task and, where so chosen, show no sensitive attribute."""
        shown: set[str] = set() if self.choice.sensitive_inputs else set().union(*self.tell_tale.values())
        return choose_inputs(self.spec, self.tasks, shown)

    def parts(self) -> dict[str, Rows]:
        """Return the rows of each part; one without a labelled row of a task is refused."""
        split = self.choice.split
        if isinstance(split, str):
            parts = split_by_column(column_of(self.frame, split, "split"))
        else:
            parts = split_rows(self.stratum, len(self.frame), split, self.choice.seed, self.choice.of_test)
        for part, rows in parts.items():
            for labels in self.labels:
                if not labels.observed[rows].any():
                    where = f"task {labels.name!r}: no labelled row in the {part} split ({len(rows)} rows)"
                    raise DataError(f"{where}; use more rows or other shares")
        return parts


def read_table(spec: TableSpec, frame: pd.DataFrame, choice: Choice) -> Table:
    """Return the chosen rows of ``frame`` with their labels and groups."""
    chosen = choose_tasks(spec, choice.tasks)
    rows = np.arange(len(frame))
    if spec.keep_rows is not None:
        rows = np.flatnonzero(spec.keep_rows(frame).to_numpy(dtype=bool, na_value=False))
        if len(rows) == 0:
            raise DataError(f"dataset {spec.name!r}: no row passes the filter ({spec.filter})")
    frame = frame.iloc[rows].reset_index(drop=True)
    keep = checked(dict, choice.keep_groups or {}, "keep_groups")
    keep = {name: checked(Keep, value, f"keep_groups of {name!r}") for name, value in keep.items()}
    sensitive = spec.default_sensitive if choice.sensitive is None else choice.sensitive
    attributes, known = choose_sensitive(sensitive, spec.sensitive, keep)
    stratify = next(iter(chosen)) if spec.stratify is None else spec.stratify
    table = Table(
        spec=spec,
        choice=choice,
        frame=frame,
        rows=rows,
        labels=tuple(raw_labels(name, task, frame) for name, task in chosen.items()),
        groups=tuple(make_groups(name, item, frame, choice.missing, known) for name, item in attributes.items()),
        stratified_on=stratify,
        stratum=strata(raw_labels(stratify, spec.tasks[stratify], frame)) if stratify else None,
        tell_tale={name: tell_tale_columns(item, known) for name, item in attributes.items()},
        known=known,
    )
    taken = draw_subset(table.stratum, len(frame), choice.subset, choice.of_test)
    if len(taken) == len(frame):
        return table
    return replace(
        table,
        frame=frame.iloc[taken].reset_index(drop=True),
        rows=rows[taken],
        labels=tuple(replace(item, values=item.values[taken]) for item in table.labels),
        groups=tuple(item.take(taken) for item in table.groups),
        stratum=None if table.stratum is None else table.stratum[taken],
    )


def choose_tasks(spec: TableSpec, tasks: Sequence[str] | str | None) -> dict[str, TaskSpec]:
    """Return the specs of the chosen tasks (:func:`chosen_names`) whose labels are columns, in order."""
    return {name: spec.tasks[name] for name in chosen_names(spec, tasks) if name in spec.tasks}


def chosen_names(spec: TableSpec, tasks: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the names of the chosen tasks in the order chosen, the default ones without a choice."""
    names = spec.default_tasks if tasks is None else checked(Listed, tasks, "tasks")
    known = (*spec.tasks, *(spec.filed or ()))
    if not names:
        raise DataError(f"dataset {spec.name!r}: no task chosen; choose some of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise DataError(f"dataset {spec.name!r}: {unknown('task', name, known)}")
        if names.count(name) > 1:
            raise DataError(f"dataset {spec.name!r}: task {name!r} is chosen twice")
    return names


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
    if not inputs and spec.filed is None:
        raise DataError(f"dataset {spec.name!r}: tasks {list(tasks)} leave no input column; choose fewer tasks")
    return inputs


def strata(labels: RawLabels) -> Rows:
    """Return the stratum of each row: its class, the tenth its target is in, or "missing"; small ones are merged.

    Strata of fewer than 10 rows become one, and that one joins the largest if it is still smaller than that.
    """
    values = labels.values if labels.values.ndim == 1 else labels.values[:, 0]
    if labels.spec.kind == "regression":
        values = pd.qcut(pd.Series(values), 10, labels=False, duplicates="drop").to_numpy()
    _, codes, counts = np.unique(np.where(np.isnan(values), -1, values), return_inverse=True, return_counts=True)
    small = counts[codes] < _SMALLEST_STRATUM
    if small.any():
        codes = np.where(small, -1 if small.sum() >= _SMALLEST_STRATUM else int(np.argmax(counts)), codes)
    return np.asarray(codes, dtype=np.int64)


def split_rows(
    y: Rows | None, n_rows: int, split: Sequence[float], seed: int, test_seed: int | None = None
) -> dict[str, Rows]:
    """Return the rows of train, val and test: scikit-learn's ``train_test_split`` twice, stratified on ``y`` if given.

    With another ``test_seed`` the test rows are those of that seed, and ``seed`` divides the others anew.
    """
    from sklearn.model_selection import train_test_split

    shares = tuple(split)
    numbers = all(isinstance(share, int | float) and 0 < share < 1 for share in shares)
    if len(shares) != 3 or not numbers or abs(sum(shares) - 1) > 1e-6:
        raise DataError(
            f"split must be three shares above 0 that sum to 1 (train, val, test), found {shares}; none may be empty"
        )
    within = round(shares[1] / (shares[1] + shares[2]), 12)
    try:
        first = seed if test_seed is None else test_seed
        train, rest = train_test_split(np.arange(n_rows), train_size=shares[0], random_state=first, stratify=y)
        left = None if y is None else y[rest]
        val, test = train_test_split(rest, train_size=within, random_state=first, stratify=left)
        if seed != first:
            others, size = np.sort(np.concatenate([train, val])), len(train)
            again = None if y is None else y[others]
            train, val = train_test_split(others, train_size=size, random_state=seed, stratify=again)
    except ValueError as error:
        message = f"{n_rows} rows cannot be split {shares}, an empty or too small part would result: {error}"
        raise DataError(message) from error
    return {"train": train, "val": val, "test": test}


def split_by_column(series: Series) -> dict[str, Rows]:
    """Return the rows of each part as a column of "train", "val" and "test" says; rows with no value are left out."""
    wrong = sorted({str(value) for value in series.dropna()} - set(PARTS))
    if wrong:
        raise DataError(f"split column {series.name!r}: expected 'train', 'val' and 'test', found {wrong[0]!r}")
    parts = {part: np.flatnonzero((series == part).to_numpy(dtype=bool, na_value=False)) for part in PARTS}
    for part, rows in parts.items():
        if len(rows) == 0:
            raise DataError(f"split column {series.name!r}: the {part} split is empty; give it rows")
    return parts


def draw_subset(y: Rows | None, n_rows: int, subset: int | float | None, seed: int) -> Rows:
    """Return the sorted rows of a stratified random subset: a number of rows (int), or a share (float in (0, 1))."""
    from sklearn.model_selection import train_test_split

    if subset is None or subset == n_rows:
        return np.arange(n_rows)
    a_count = isinstance(subset, int) and not isinstance(subset, bool) and 0 < subset <= n_rows
    if not (a_count or (isinstance(subset, float) and 0 < subset < 1)):
        raise DataError(f"subset must be a number of rows (1 to {n_rows}) or a share between 0 and 1, found {subset!r}")
    try:
        rows, _ = train_test_split(np.arange(n_rows), train_size=subset, random_state=seed, stratify=y)
    except ValueError as error:
        raise DataError(f"subset={subset!r} of {n_rows} rows: {error}; take more rows") from error
    return np.sort(rows)
