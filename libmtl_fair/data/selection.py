"""What a user chose of a table, and what follows from it: tasks, and the inputs that leak none of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from libmtl_fair.data.labels import task_columns
from libmtl_fair.data.spec import TableSpec, TaskSpec
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.validation import Listed, MissingRule, checked


@dataclass(frozen=True)
class Choice:
    """What a user chose of a table: see :func:`libmtl_fair.data.load_dataset` for the fields."""

    tasks: Sequence[str] | None = None
    sensitive: Sequence[str] | str | None = None
    seed: int = 0
    split: Sequence[float] | str = (0.6, 0.2, 0.2)
    missing: MissingRule = "drop"
    keep_groups: Mapping[str, Any] | None = None
    subset: int | float | None = None
    min_frequency: int | float | None = None
    sensitive_inputs: bool = True

    def __post_init__(self) -> None:
        """Check what scikit-learn and pandas will be given."""
        for name in ("tasks", "sensitive"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checked(Listed, getattr(self, name), name))
        object.__setattr__(self, "keep_groups", checked(dict, self.keep_groups or {}, "keep_groups"))
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


def choose_tasks(spec: TableSpec, tasks: Sequence[str] | str | None) -> dict[str, TaskSpec]:
    """Return the chosen tasks' specs in the order chosen, the default ones without a choice.

    Raises
    ------
    DataError : an unknown task, one that is named twice, or none.
    """
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
    """Return the candidate columns that leak none of the chosen tasks, as one input serves them all.

    Raises
    ------
    DataError : none is left.
    """
    out = {*leaks(tasks), *without}
    inputs = [column for column in spec.candidates if column not in out]
    if not inputs:
        raise DataError(f"dataset {spec.name!r}: tasks {list(tasks)} leave no input column; choose fewer tasks")
    return inputs
