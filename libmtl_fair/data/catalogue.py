"""Datasets by name, shipped inside the package or fetched by fairlearn, and tables of one's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd

from libmtl_fair.data.card import Card
from libmtl_fair.data.dataset import Dataset, build_dataset
from libmtl_fair.data.expressions import evaluate
from libmtl_fair.data.fetched import FETCHED
from libmtl_fair.data.frames import column_of
from libmtl_fair.data.loader import SENSITIVE
from libmtl_fair.data.out_of_core import load_on_disk
from libmtl_fair.data.parquet import Parquet
from libmtl_fair.data.selection import Choice, choose_inputs, choose_tasks, leaks
from libmtl_fair.data.shipped import SHIPPED, shipped_file
from libmtl_fair.data.sources import load_source, source, source_names
from libmtl_fair.data.spec import MAX_CATEGORIES, SensitiveSpec, TableSpec, TaskSpec, make_spec
from libmtl_fair.data.tables import Source, read_frame, to_pandas
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.validation import Keep, Listed, MissingRule, checked

Features = Sequence[str] | Mapping[str, str] | None


def dataset_names() -> tuple[str, ...]:
    """Return the names that :func:`load_dataset` knows: shipped, fetched, and those whose files the user has.

    >>> dataset_names()[:4]
    ('adult', 'compas', 'german', 'support2')
    """
    return (*SHIPPED, *FETCHED, *source_names())


def dataset_spec(name: str) -> TableSpec:
    """Return what is known about a dataset: its tasks, attributes, candidate inputs and leaks.

    Raises
    ------
    DataError
        An unknown name, with the near one.
    """
    if name not in dataset_names():
        raise DataError(f"{unknown('dataset', name, dataset_names())}. For a table of your own use load_table")
    if name in source_names():
        return source(name).spec
    return SHIPPED[name] if name in SHIPPED else FETCHED[name].spec


def describe_dataset(name: str) -> Card:
    """Return a dataset's title, source, licence, tasks, sensitive attributes and default inputs, without loading it.

    Raises
    ------
    DataError
        An unknown name.

    Examples
    --------
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
        }
        | {task: {"kind": "in files", "definition": text, "forbids": []} for task, text in (spec.filed or {}).items()},
        "default_tasks": list(spec.default_tasks),
        "sensitive": list(spec.sensitive),
        "default_sensitive": list(spec.default_sensitive),
        "default_inputs": choose_inputs(spec, choose_tasks(spec, None)) or ["read from files"],
        "notes": list(spec.notes),
    }


def renamed(name: str) -> Callable[[pd.DataFrame], pd.DataFrame] | None:
    """Return what gives a published table of a data set the columns and codes that training saw; None where it has them."""
    if name in FETCHED:
        return FETCHED[name].named
    return source(name).named if name in source_names() else None


def load_dataset(
    name: str,
    tasks: Sequence[str] | str | None = None,
    sensitive: Sequence[str] | str | None = None,
    seed: int = 0,
    split: Sequence[float] | str = (0.6, 0.2, 0.2),
    missing: MissingRule = "drop",
    keep_groups: Mapping[str, Keep] | None = None,
    subset: int | float | None = None,
    *,
    min_frequency: int | float | None = None,
    max_categories: int = MAX_CATEGORIES,
    sensitive_inputs: bool = True,
    test_seed: int | None = None,
    frame: Source | None = None,
    root: str | Path | None = None,
    args: Mapping[str, object] | None = None,
    workers: int = 0,
) -> Dataset:
    """Load a dataset by name, ready for multi-task training.

    Parameters
    ----------
    name : str
        See :func:`dataset_names`.
    tasks : sequence of str or str, optional
        Which of its tasks, in which order; None for the default set. A column that leaks any of them is no input.
    sensitive : sequence of str or str, optional
        Its attributes; ``"race:top2"`` keeps the two largest groups, ``"sex*race"`` intersects. None: default.
    seed : int, default 0
        Of subset and split. The same seed gives the same rows whatever tasks are chosen.
    split : sequence of float or str, default (0.6, 0.2, 0.2)
        Shares of train, val and test, stratified on the dataset's first task.
    missing : MissingRule, default "drop"
        Rows without a sensitive value: "drop" (id -1: they train, but leave group statistics), "group" (a group
        "(missing)" of their own) or "error". Counts are in the card.
    keep_groups : mapping of str to Keep, optional
        {attribute: groups to keep, or how many of the largest}; other rows get id -1, counted in the card.
    subset : int or float, optional
        A number of rows, or a share, drawn before the split.
    min_frequency : int or float, optional
        One-hot categories with fewer rows (int) or a smaller share (float) in training become "(other)".
    max_categories : int, default 100
        One-hot categories of a column, at most: the most frequent in training; the rest become "(other)", said in the card.
    sensitive_inputs : bool, default True
        Whether the columns of the chosen sensitive attributes may be inputs.
    test_seed : int, optional
        Of subset and test rows, where they are to stay while ``seed`` divides the other rows; None: ``seed``.
    frame : Source, optional
        The table itself, of pandas, polars, pyarrow, ..., or a .csv or .parquet path, instead of the shipped or fetched one.
    root : str or Path, optional
        Folder of a data set whose files the user has; ``libmtl-fair example-data NAME DIR`` writes a small one. Parts that
        are published are kept; without a published validation part it is drawn of the training rows, by ``split`` and ``seed``.
    args : mapping of str to object, optional
        Settings of such a data set, such as the size of images.
    workers : int, default 0
        Processes that read its files ahead.

    Raises
    ------
    DataError
        Unknown name, task, attribute, group or column; a class absent from train; an attribute with one group; an empty
        split; missing sensitive values under "error"; a fetch without network.

    Examples
    --------
    >>> data = load_dataset("german", tasks=["bad_credit", "owns_home"], sensitive=["age"])
    >>> len(data.train), len(data.val), len(data.test), data.groups
    (600, 200, 200, {'age': ['25 and under', 'over 25']})
    """
    spec = dataset_spec(name)
    choice = Choice(
        tasks, sensitive, seed, split, missing, keep_groups, subset, min_frequency, sensitive_inputs, test_seed,
        max_categories,
    )  # fmt: skip
    choose_tasks(spec, tasks)
    if name in source_names():
        if frame is not None:
            raise DataError(f"data set {name!r} is read from files: give their folder as root, not a frame")
        return load_source(name, choice, root, args, workers)
    if root is not None or args or workers:
        raise DataError(f"data set {name!r} has no files of the user's: it takes no root, args or workers")
    if frame is not None:
        table = read_frame(frame)
        table = FETCHED[name].named(table) if name in FETCHED else table
    elif name in FETCHED:
        table = FETCHED[name].frame()
    else:
        table = read_frame(shipped_file(name))
    return build_dataset(spec, table, choice)


def load_table(
    source: Source,
    *,
    tasks: Mapping[str, TaskSpec | Mapping[str, object]],
    sensitive: Mapping[str, SensitiveSpec | Mapping[str, object] | str] | Sequence[str] = (),
    features: Features = None,
    categorical: Sequence[str] = (),
    seed: int = 0,
    split: Sequence[float] | str = (0.6, 0.2, 0.2),
    stratify: str | bool = True,
    missing: MissingRule = "drop",
    keep_groups: Mapping[str, Keep] | None = None,
    subset: int | float | None = None,
    min_frequency: int | float | None = None,
    max_categories: int = MAX_CATEGORIES,
    sensitive_inputs: bool = True,
    test_seed: int | None = None,
    drop: Sequence[str] = (),
    where: str | None = None,
    missing_values: Sequence[str] = (),
    name: str | None = None,
    title: str | None = None,
    licence: str = "not stated",
    notes: Sequence[str] = (),
    out_of_core: bool = False,
    cache: str | Path | None = None,
) -> Dataset:
    """Load a table with several tasks and sensitive attributes.

    Parameters
    ----------
    source : Source
        A .csv, .csv.gz or .parquet file, or a table of pandas, polars, pyarrow or another library that narwhals reads;
        with ``out_of_core`` a .parquet file, or a folder of such.
    tasks : mapping of str to TaskSpec or mapping of str to object
        {name: TaskSpec or a mapping of its fields}, in order; a recipe gives mappings.
    sensitive : mapping of str to SensitiveSpec or mapping of str to object or str or sequence of str, default ()
        {attribute: SensitiveSpec, a mapping of its fields, or a column}, or a list of columns.
    features : Features, optional
        Input columns, or {column: "numeric" | "categorical" | "auto"}. None: every column that no task reads or
        forbids.
    categorical : sequence of str, default ()
        Input columns that are categories although they hold numbers.
    split : sequence of float or str, default (0.6, 0.2, 0.2)
        Three shares, or the name of a column that holds "train", "val" and "test".
    stratify : str or bool, default True
        True (first task), a task's name, or False.
    seed, missing, keep_groups, subset, min_frequency, max_categories, sensitive_inputs, test_seed : as there
        As for :func:`load_dataset`.
    drop : sequence of str, default ()
        Columns that are no inputs, such as ids.
    where : str, optional
        Rows to keep: comparisons of columns, as ``"age >= 18 and country == 'DE'"``; rows where one is missing are left out.
    missing_values : sequence of str, default ()
        Words that are missing values in text columns, too, besides the empty cell; see :mod:`libmtl_fair.data.tables`.
    name, title, licence, notes : str, str, str, sequence of str, optional
        For the data card.
    out_of_core : bool, default False
        Read the file by row group and keep what was prepared in a cache on disk, which is used again until the file or the choice
        changes: memory does not grow with the rows. ``split`` by shares, and ``subset``, then draw each row by its place, not
        stratified; a split column gives the rows of a table in memory, and the same numbers.
    cache : str or Path, optional
        Folder of caches; None: ``<source>.libmtl_fair`` beside the file.

    Raises
    ------
    DataError
        File or column not there, an input that gives a task away, and all that :func:`load_dataset` raises.

    Examples
    --------
    >>> frame = pd.DataFrame({"age": range(20, 60), "sex": ["f", "m"] * 20, "ill": [0, 0, 1, 1] * 10})
    >>> data = load_table(frame, tasks={"ill": {"kind": "binary", "column": "ill"}}, sensitive=["sex"])
    >>> data.inputs, data.groups, len(data.train)
    (('age', 'sex'), {'sex': ['f', 'm']}, 24)
    """
    table = Parquet.open(source) if out_of_core and isinstance(source, str | Path) else None
    if out_of_core and table is None:
        raise DataError("out_of_core=True needs the path of a .parquet file, or of a folder of such")
    if table is None:
        source = to_pandas(source)
        frame = read_frame(source, missing_values)
    else:
        frame = next(table.raw(rows=1))
    task_specs: dict[str, TaskSpec] = {}
    for key, value in checked(dict, tasks, "tasks").items():
        if checked(str, key, "a task's name") == SENSITIVE:
            raise DataError(
                f"a task may not be named {SENSITIVE!r}: batches hold the group ids under this key; rename it"
            )
        task_specs[key] = make_spec(TaskSpec, value, "task", key)
    columns = {} if isinstance(sensitive, Mapping) else dict.fromkeys(checked(Listed, sensitive, "sensitive"))
    named = dict(sensitive) if isinstance(sensitive, Mapping) else columns
    categories = checked(Listed, categorical, "categorical")
    groups = _attributes(named, set(frame.columns))
    candidates = _candidates(frame, task_specs, features, split, checked(Listed, drop, "drop"))
    for column in categories:
        column_of(frame, column, "categorical")
    if not isinstance(stratify, bool) and stratify not in tuple(task_specs):
        raise DataError(f"stratify: {unknown('task', stratify, task_specs)}")
    name = name or ("table" if isinstance(source, pd.DataFrame) else Path(source).name.split(".")[0])
    kinds = features if isinstance(features, Mapping) else {}
    spec = TableSpec(
        name=name,
        title=title or name,
        source="DataFrame" if isinstance(source, pd.DataFrame) else str(source),
        licence=licence,
        tasks=task_specs,
        sensitive=groups,
        candidates=candidates,
        default_tasks=tuple(task_specs),
        default_sensitive=tuple(named),
        kinds={**kinds, **dict.fromkeys(categories, "categorical")},
        stratify=stratify if isinstance(stratify, str) else None if stratify else "",
        excluded=dict.fromkeys(checked(Listed, drop, "drop"), "dropped, as asked"),
        keep_rows=None if where is None else _filter(checked(str, where, "where")),
        filter=where or "",
        notes=checked(Listed, notes, "notes"),
        missing_values=checked(Listed, missing_values, "missing_values"),
    )
    choice = Choice(
        None, tuple(named), seed, split, missing, keep_groups, subset, min_frequency, sensitive_inputs, test_seed,
        max_categories,
    )  # fmt: skip
    return build_dataset(spec, frame, choice) if table is None else load_on_disk(spec, table, choice, cache)


def _attributes(named: Mapping[str, object], columns: Collection[str]) -> dict[str, SensitiveSpec]:
    """Return the declared specs; a name alone is a column, or shorthand ("race:top2", "sex*race") over columns."""
    specs: dict[str, SensitiveSpec] = {}
    for name, value in named.items():
        if value is not None:
            specs[name] = make_spec(SensitiveSpec, value, "sensitive attribute", name)
            continue
        parts = [name] if name in columns else [part.strip() for part in name.partition(":top")[0].split("*")]
        specs |= {part: SensitiveSpec(column=part) for part in parts if part not in specs}
    return {part: SensitiveSpec(column=part) for spec in specs.values() for part in spec.of} | specs


def _filter(where: str) -> Callable[[pd.DataFrame], pd.Series[bool]]:
    def keep(frame: pd.DataFrame) -> pd.Series[bool]:
        return pd.Series(evaluate(where, frame, "where") == 1)

    return keep


def _candidates(
    frame: pd.DataFrame, tasks: Mapping[str, TaskSpec], features: Features, split: object, drop: Collection[str]
) -> tuple[str, ...]:
    forbidden = leaks(tasks)
    for column in drop:
        column_of(frame, column, "drop")
    if features is None:
        out = {*forbidden, *drop, split} if isinstance(split, str) else {*forbidden, *drop}
        return tuple(str(column) for column in frame.columns if column not in out)
    columns = tuple(features) if isinstance(features, Mapping) else checked(Listed, features, "features")
    for column in columns:
        column_of(frame, column, "features")
        if column in drop:
            raise DataError(f"feature {column!r} is in features and in drop; take it out of one")
        if column in forbidden:
            raise DataError(
                f"feature {column!r} gives away task {forbidden[column][0]!r}; one input serves all tasks, so take it out "
                "of the features (or drop the task)"
            )
    return columns
