"""What a user declares about a table: its tasks, sensitive attributes, inputs and leaks. Checked when made.

Recipes validate the same models, and say file and line where Python says a DataError.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from libmtl_fair.errors import DataError, unknown
from libmtl_fair.files import Json
from libmtl_fair.validation import STRICT, Classes, Edges, Keep, OptionalNames, Renames, Text, explain

if TYPE_CHECKING:
    import pandas as pd

TaskKind = Literal["binary", "multiclass", "multilabel", "regression"]
MAX_CATEGORIES = 100
"""One-hot categories of a column, without a choice."""
Transform = Literal["log", "log1p"]

_ALLOWED = {
    "binary": ("column", "expression", "positive", "threshold"),
    "multiclass": ("classes", "column"),
    "multilabel": ("columns",),
    "regression": ("column", "transform"),
}
_SOURCES = ("column", "columns", "expression")


class _Spec(BaseModel):
    model_config = STRICT

    def __init__(self, *values: object, **fields: object) -> None:
        try:
            super().__init__(**dict(zip(type(self).model_fields, values)), **fields)
        except ValidationError as error:
            raise DataError(self._problem(error)) from error
        if not any(getattr(self, name, None) for name in (*_SOURCES, "of")):
            raise DataError(self._no_source())

    # A recipe validates specs without this constructor, so that pydantic tells it where each of the errors is.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def _problem(cls, error: ValidationError) -> str:
        item = min(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
        name = str(item["loc"][0]) if item["loc"] else ""
        if item["type"] == "extra_forbidden":
            return unknown("field", name, cls.model_fields)
        if item["type"] == "missing":
            return f"needs a {name!r}, one of {', '.join(get_args(TaskKind))}"
        if item["type"] == "literal_error":
            options = get_args(TaskKind if name == "kind" else Transform)
            return unknown("task kind" if name == "kind" else name, item["input"], options)
        return f"{name}: {explain(item)}" if name else explain(item)

    def _no_source(self) -> str:
        return "a sensitive attribute needs either a column or, as an intersection, 'of' other attributes"


class TaskSpec(_Spec):
    """Where the labels of one task come from, and which columns would give them away.

    Parameters
    ----------
    kind : TaskKind
        "binary", "multiclass", "multilabel" or "regression".
    column : Text, optional
        The labels' column (``columns`` for multilabel: one 0/1 column a label); in a mapping of tasks it may be left
        out where it has the task's name.
    positive : str or int or float or bool, optional
        Binary: the value that counts as 1, every other one as 0.
    threshold : float, optional
        Binary, numeric column: 1 where the value is at least this.
    expression : Text, optional
        Binary, instead of ``column``: comparisons of columns, as ``"death == 1 and d.time <= 180"``.
    classes : Classes, optional
        Multiclass: the values in order of their ids, or {value: class name}; other values become unlabelled. Without
        it: all values, sorted.
    transform : Transform, optional
        Regression: "log" or "log1p" of the column.
    standardise : bool, default True
        Regression: labels in units of the training part's mean and standard deviation.
    forbids : OptionalNames, default ()
        Input columns that leak this task, besides its own columns.
    definition : str, default ""
        One line for the data card.

    Raises
    ------
    DataError
        An unknown field, a wrong type, or fields that do not fit the kind.
    """

    kind: TaskKind
    column: Text | None = None
    columns: OptionalNames = ()
    positive: str | int | float | bool | None = None
    threshold: float | None = None
    expression: Text | None = None
    classes: Classes = None
    transform: Transform | None = None
    standardise: bool = True
    forbids: OptionalNames = ()
    definition: str = ""

    @model_validator(mode="after")
    def _fits(self) -> TaskSpec:
        allowed = _ALLOWED[self.kind]
        every = (*_SOURCES, "positive", "threshold", "classes", "transform")
        given = [name for name in every if getattr(self, name) not in (None, ())]
        for name in given:
            if name not in allowed:
                raise ValueError(f"a {self.kind} task takes no {name!r}; it takes {', '.join(allowed)}")
        if len(set(given) & set(_SOURCES)) > 1 or (self.kind == "multilabel" and not given):
            raise ValueError(self._no_source())
        if len(set(given) & {"positive", "threshold", "expression"}) > 1:
            raise ValueError("a binary task takes one of 'positive', 'threshold' and 'expression', found more")
        return self

    def _no_source(self) -> str:
        wanted = " or ".join(name for name in _ALLOWED[self.kind] if name in _SOURCES)
        found = [name for name in _SOURCES if getattr(self, name)]
        return f"a {self.kind} task needs {wanted}, found {found or 'neither'}; give exactly one"


class SensitiveSpec(_Spec):
    """Where the groups of one sensitive attribute come from.

    Parameters
    ----------
    column : Text, optional
        The column; for an intersection leave it out and name the attributes in ``of``.
    bins : Edges, default ()
        Numeric column: ascending edges; k edges make k + 1 groups, an edge belongs to the group above it.
    labels : OptionalNames, default ()
        Names of the groups: of the bins in order; for other columns their order (all values must be there).
    merge : Renames
        {value: group}, for merging small groups; values not named keep their own.
    keep : Keep, optional
        Groups to keep, or how many of the largest; rows of the others get id -1 (unknown), counted in the card.
    of : OptionalNames, default ()
        Names of two or more attributes to intersect.
    also_in : OptionalNames, default ()
        Input columns, besides ``column``, from which the attribute can be read off.

    Raises
    ------
    DataError
        An unknown field, a wrong type, edges that do not ascend, or neither column nor intersection.
    """

    column: Text | None = None
    bins: Edges = ()
    labels: OptionalNames = ()
    merge: Renames = Field(default_factory=dict)
    keep: Keep | None = None
    of: OptionalNames = ()
    also_in: OptionalNames = ()

    @model_validator(mode="after")
    def _fits(self) -> SensitiveSpec:
        if self.column is not None and self.of:
            raise ValueError(self._no_source())
        column = f"sensitive column {self.column!r}" if self.column else "this attribute"
        if list(self.bins) != sorted(set(self.bins)):
            raise ValueError(f"bins of {column} must ascend, found {list(self.bins)}")
        if self.bins and self.labels and len(self.labels) != len(self.bins) + 1:
            raise ValueError(
                f"{column}: {len(self.bins)} edges make {len(self.bins) + 1} groups, found {len(self.labels)} labels"
            )
        return self


_AnySpec = TypeVar("_AnySpec", TaskSpec, SensitiveSpec)


@dataclass(frozen=True)
class TableSpec:
    """A table with everything that is known about it; the built-in datasets are instances.

    Parameters
    ----------
    name, title, source, licence : str
        For the card.
    tasks, sensitive : mapping of str to TaskSpec, mapping of str to SensitiveSpec
        All that may be chosen; ``default_tasks`` and ``default_sensitive`` are chosen without a choice.
    candidates : tuple of str
        Columns that may be inputs. What the chosen tasks forbid is taken out of them.
    excluded : mapping of str to str
        {column: why it is never an input}.
    kinds : mapping of str to str
        {candidate: "numeric" or "categorical"}, where it is not to be told from the column's type.
    stratify : str, optional
        Name of the task that splits are stratified on, chosen or not, so that rows do not move with the choice.
    keep_rows : callable (DataFrame) -> pd.Series[bool], optional
        Frame -> bool mask of the rows to keep, and ``filter`` in words.
    notes : tuple of str, default ()
        Known problems, for the card.
    missing_values : tuple of str, default ()
        Words that are missing values in text columns, too.
    filed : mapping of str to str, optional
        Where inputs are read from files and no column is one: {task whose labels are in files, too: definition}.
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
    missing_values: tuple[str, ...] = ()
    filed: Mapping[str, str] | None = None


def make_spec(cls: type[_AnySpec], value: object, what: str, name: str) -> _AnySpec:
    """Return ``value`` as a spec: it may be one already, a mapping of its fields (as in a recipe), or a column's name.

    >>> make_spec(SensitiveSpec, {"keep": 2}, "sensitive attribute", "sex").column
    'sex'
    """
    where = f"{what} {name!r}"
    if isinstance(value, cls):
        fields: Json = {key: item for key, item in value if item not in (None, (), {})}
    elif isinstance(value, str) and cls is SensitiveSpec:
        fields = {"column": value}
    elif isinstance(value, Mapping):
        fields = {str(key): item for key, item in value.items()}
    else:
        raise DataError(f"{where}: expected a {cls.__name__} or a mapping of its fields, found {type(value).__name__}")
    if fields.get("kind") != "multilabel" and not {*_SOURCES, "of"} & set(fields):
        fields["column"] = name
    try:
        return cls(**fields)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def words(text: str) -> tuple[str, ...]:
    """Return the names that a text lists."""
    return tuple(text.split())


def task(kind: TaskKind, column: str, definition: str, forbids: str = "", **more: Any) -> TaskSpec:
    """Return the spec of a task of one column, ``forbids`` being the names of the columns that leak it."""
    return TaskSpec(kind=kind, column=column, definition=definition, forbids=words(forbids), **more)


def comparison(expression: str, definition: str) -> TaskSpec:
    """Return the spec of a binary task that compares columns."""
    return TaskSpec(kind="binary", expression=expression, definition=definition)


def attributes(columns: str) -> dict[str, SensitiveSpec]:
    """Return attributes that are named as their columns."""
    return {name: SensitiveSpec(column=name) for name in words(columns)}


def age_bands(column: str, *edges: int) -> SensitiveSpec:
    """Return age in bands, named by whole years.

    >>> age_bands("age", 25, 60).labels
    ('under 25', '25–59', '60 and over')
    """
    between = [f"{low}–{high - 1}" for low, high in itertools.pairwise(edges)]
    return SensitiveSpec(column=column, bins=edges, labels=(f"under {edges[0]}", *between, f"{edges[-1]} and over"))
