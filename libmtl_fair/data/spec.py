"""What a user declares about a table: its tasks, sensitive attributes, inputs and leaks. Checked when made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

import pandas as pd

from libmtl_fair.data.validation import given_keep, given_mapping, given_names, given_number, given_text
from libmtl_fair.errors import DataError, unknown

TaskKind = Literal["binary", "multiclass", "multilabel", "regression"]
MissingRule = Literal["drop", "group", "error"]
Transform = Literal["log", "log1p"]

_Spec = TypeVar("_Spec", "TaskSpec", "SensitiveSpec")


@dataclass(frozen=True)
class TaskSpec:
    """Where the labels of one task come from, and which columns would give them away.

    Parameters
    ----------
    kind : "binary", "multiclass", "multilabel" or "regression".
    column : the labels' column (``columns`` for multilabel: one 0/1 column a label).
    positive : binary: the value that counts as 1, every other one as 0.
    threshold : binary, numeric column: 1 where the value is at least this.
    expression : binary, instead of ``column``: comparisons of columns, as ``"death == 1 and d.time <= 180"``.
    classes : multiclass: the values in order of their ids, or {value: class name}; other values become unlabelled.
        Without it: all values, sorted.
    transform : regression: "log" or "log1p" of the column.
    standardise : regression: labels in units of the training part's mean and standard deviation.
    forbids : input columns that leak this task, besides its own columns.
    definition : one line for the data card.
    """

    kind: TaskKind
    column: str | None = None
    columns: tuple[str, ...] = ()
    positive: Any = None
    threshold: float | None = None
    expression: str | None = None
    classes: tuple[Any, ...] | Mapping[Any, str] | None = None
    transform: Transform | None = None
    standardise: bool = True
    forbids: tuple[str, ...] = ()
    definition: str = ""

    def __post_init__(self) -> None:
        """Check each field, then that they fit the kind."""
        if not isinstance(self.kind, str) or self.kind not in get_args(TaskKind):
            raise DataError(unknown("task kind", self.kind, get_args(TaskKind)))
        for name in ("columns", "forbids"):
            object.__setattr__(self, name, given_names(getattr(self, name), name))
        for name in ("column", "expression", "transform"):
            if getattr(self, name) is not None:
                given_text(getattr(self, name), name)
        if self.threshold is not None:
            given_number(self.threshold, "threshold")
        if self.positive is not None and not isinstance(self.positive, str | int | float):
            raise DataError(f"positive must be a value of the column, a text or a number, found {self.positive!r}")
        self._check_classes()
        self._check_combination()

    def _check_classes(self) -> None:
        if self.classes is None:
            return
        if isinstance(self.classes, str) or not isinstance(self.classes, Iterable):
            raise DataError(f"classes must be a list of values or a mapping value: name, found {self.classes!r}")
        if not isinstance(self.classes, Mapping):
            object.__setattr__(self, "classes", tuple(self.classes))
        for value in self.classes:
            if not isinstance(value, str | int | float):
                raise DataError(f"classes: each must be a text or a number, found {value!r}")

    def _check_combination(self) -> None:
        allowed = {
            "binary": {"column", "positive", "threshold", "expression"},
            "multiclass": {"column", "classes"},
            "multilabel": {"columns"},
            "regression": {"column", "transform"},
        }[self.kind]
        every = ("column", "columns", "positive", "threshold", "expression", "classes", "transform")
        given = [name for name in every if getattr(self, name) not in (None, ())]
        wrong = [name for name in given if name not in allowed]
        if wrong:
            raise DataError(f"a {self.kind} task takes no {wrong[0]!r}; it takes {', '.join(sorted(allowed))}")
        source = [name for name in given if name in ("column", "columns", "expression")]
        if len(source) != 1:
            wanted = " or ".join(sorted(allowed & {"column", "columns", "expression"}))
            raise DataError(f"a {self.kind} task needs {wanted}, found {source or 'neither'}; give exactly one")
        if len(set(given) & {"positive", "threshold", "expression"}) > 1:
            raise DataError("a binary task takes one of 'positive', 'threshold' and 'expression', found more")
        if self.transform is not None and self.transform not in get_args(Transform):
            raise DataError(unknown("transform", self.transform, get_args(Transform)))


@dataclass(frozen=True)
class SensitiveSpec:
    """Where the groups of one sensitive attribute come from.

    Parameters
    ----------
    column : the column; for an intersection leave it out and name the attributes in ``of``.
    bins : numeric column: ascending edges; k edges make k + 1 groups, an edge belongs to the group above it.
    labels : names of the groups: of the bins in order; for other columns their order (all values must be there).
    merge : {value: group}, for merging small groups; values not named keep their own.
    keep : groups to keep, or how many of the largest; rows of the others get id -1 (unknown), counted in the card.
    of : names of two or more attributes to intersect.
    also_in : input columns, besides ``column``, from which the attribute can be read off.
    """

    column: str | None = None
    bins: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    merge: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] | int | None = None
    of: tuple[str, ...] = ()
    also_in: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check edges and names."""
        for name in ("labels", "of", "also_in"):
            object.__setattr__(self, name, given_names(getattr(self, name), name))
        if isinstance(self.bins, str) or not isinstance(self.bins, Iterable):
            raise DataError(f"bins must be a list of numbers, found {self.bins!r}")
        object.__setattr__(self, "bins", tuple(given_number(edge, "bins: each edge") for edge in self.bins))
        object.__setattr__(self, "merge", given_mapping(self.merge, "merge"))
        if self.column is not None:
            given_text(self.column, "column")
        if self.keep is not None:
            object.__setattr__(self, "keep", given_keep(self.keep, f"sensitive column {self.column!r}"))
        if (self.column is None) == (len(self.of) == 0):
            raise DataError("a sensitive attribute needs either a column or, as an intersection, 'of' other attributes")
        if list(self.bins) != sorted(set(self.bins)):
            raise DataError(f"bins of sensitive column {self.column!r} must ascend, found {list(self.bins)}")
        if self.bins and self.labels and len(self.labels) != len(self.bins) + 1:
            raise DataError(
                f"sensitive column {self.column!r}: {len(self.bins)} edges make {len(self.bins) + 1} groups, "
                f"found {len(self.labels)} labels"
            )


@dataclass(frozen=True)
class TableSpec:
    """A table with everything that is known about it; the built-in datasets are instances.

    Parameters
    ----------
    name, title, source, licence : for the card.
    tasks, sensitive : all that may be chosen; ``default_tasks`` and ``default_sensitive`` are chosen without a choice.
    candidates : columns that may be inputs. What the chosen tasks forbid is taken out of them.
    excluded : {column: why it is never an input}.
    kinds : {candidate: "numeric" or "categorical"}, where it is not to be told from the column's type.
    stratify : name of the task that splits are stratified on, chosen or not, so that rows do not move with the choice.
    keep_rows : frame -> bool mask of the rows to keep, and ``filter`` in words.
    notes : known problems, for the card.
    """

    name: str
    title: str
    source: str
    licence: str
    tasks: Mapping[str, TaskSpec]
    sensitive: Mapping[str, SensitiveSpec]
    candidates: tuple[str, ...]
    default_tasks: tuple[str, ...]
    default_sensitive: tuple[str, ...]
    excluded: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    stratify: str | None = None
    keep_rows: Callable[[pd.DataFrame], pd.Series[bool]] | None = None
    filter: str = ""
    notes: tuple[str, ...] = ()


def make_spec(cls: type[_Spec], value: object, what: str) -> _Spec:
    """Return ``value`` as a spec: it may be one already, a mapping of its fields (as in a recipe), or a column's name.

    Raises
    ------
    DataError : an unknown field, or none of these.

    >>> make_spec(SensitiveSpec, "sex", "sensitive attribute 'sex'").column
    'sex'
    """
    if isinstance(value, cls):
        return value
    if isinstance(value, str) and cls is SensitiveSpec:
        value = {"column": value}
    if not isinstance(value, Mapping):
        raise DataError(f"{what}: expected a {cls.__name__} or a mapping of its fields, found {type(value).__name__}")
    known = [item.name for item in fields(cls)]
    for key in value:
        if key not in known:
            raise DataError(f"{what}: {unknown('field', key, known)}")
    if cls is TaskSpec and "kind" not in value:
        raise DataError(f"{what}: needs a 'kind', one of {', '.join(get_args(TaskKind))}")
    try:
        return cls(**value)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
