"""Data sets that the user has on disk, or that are made on the spot: where they are had, their formats, and small data in these.

A source's module says how its files are read (``open``) and writes small data in the same format (``example``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ValidationError

from libmtl_fair.data.dataset import Dataset, build_dataset
from libmtl_fair.data.selection import Choice, chosen_names
from libmtl_fair.data.spec import TableSpec
from libmtl_fair.data.streamed import Reader
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.files import Json
from libmtl_fair.tasks import Task
from libmtl_fair.validation import STRICT, explain

PART = "(part)"
"""Column of a source's table that says which part a row is of, where that is published."""

_MODULES = {
    "acs": "acs", "mimic3": "mimic3", "eicu": "eicu", "nyuv2": "dense", "cityscapes": "dense", "scenes": "dense",
    "celeba": "faces", "face_folders": "faces",
}  # fmt: skip
"""Source -> module of ``data`` that has it in its ``SOURCES``."""


class Settings(BaseModel):
    """What ``args`` of a source may hold."""

    model_config = STRICT


@dataclass(frozen=True)
class Opened:
    """What a source's files hold.

    Attributes
    ----------
    frame : DataFrame
        One row an example: columns of labels and groups, and :data:`PART` where parts are published.
    reader : Reader, optional
        Reads the inputs of a row by its position; None where they are columns.
    filed : tuple of Task, default ()
        The chosen tasks whose labels the reader gives.
    augment : bool, default False
        Whether examples of the training part are changed at random (the reader is an ``Augmenting``).
    spec : TableSpec, optional
        What is known of these files, where it depends on the settings; None: what the source says.
    """

    frame: pd.DataFrame
    reader: Reader | None = None
    filed: tuple[Task, ...] = ()
    augment: bool = False
    spec: TableSpec | None = None


@dataclass(frozen=True)
class Source:
    """A data set in files, as its publishers lay them out.

    Attributes
    ----------
    spec : TableSpec
        What is known of it; its ``source`` says where it is had, its ``licence`` the terms of use.
    open : callable (Path, Settings, tuple of str) -> Opened
        Takes the folder (None where nothing is read), the settings and the names of the chosen tasks.
    settings : type[Settings]
        What ``args`` may hold.
    example : callable (Path, int, tuple of int, int) -> None, optional
        Writes small data in the format: folder, number of examples, (height, width), seed.
    example_size : tuple of int
        Examples, and height and width of images, of ``example`` without a choice; no height and width for tables and series.
    named : callable (DataFrame) -> DataFrame, optional
        Returns a published table, as any reader of tables gives it, with the columns and codes that ``open`` gives: for new rows.
    """

    spec: TableSpec
    open: Callable[[Path, Any, tuple[str, ...]], Opened]
    settings: type[Settings] = Settings
    example: Callable[[Path, int, tuple[int, ...], int], None] | None = None
    example_size: tuple[int, ...] = (60, 32, 32)
    named: Callable[[pd.DataFrame], pd.DataFrame] | None = None


def source_names() -> tuple[str, ...]:
    """Return the names of the sources."""
    return tuple(_MODULES)


@cache
def source(name: str) -> Source:
    """Return a source by name.

    Raises
    ------
    DataError
        An unknown name.
    """
    if name not in _MODULES:
        raise DataError(unknown("source", name, _MODULES))
    found: Mapping[str, Source] = import_module(f"libmtl_fair.data.{_MODULES[name]}").SOURCES
    return found[name]


def load_source(
    name: str, choice: Choice, root: str | Path | None, args: Mapping[str, object] | None, workers: int = 0
) -> Dataset:
    """Return a source's data; inputs in files are read as a loader goes, by so many ``workers``.

    Raises
    ------
    DataError
        A folder, file, setting, task or attribute that is not there, or does not fit.
    """
    found = source(name)
    names = chosen_names(found.spec, choice.tasks)
    if root is None and found.example is not None:
        raise DataError(
            f"data set {name!r} is read from files that you have: give their folder as root "
            f"({found.spec.source}), or make small data in its format with: libmtl-fair example-data {name} DIR"
        )
    folder = Path("") if root is None else Path(root).expanduser()
    if root is not None and not folder.is_dir():
        raise DataError(f"data set {name!r}: root {folder} is no folder; it is had from: {found.spec.source}")
    opened = found.open(folder, _settings(name, found, args), names)
    frame = opened.frame
    if PART in frame.columns:
        frame, choice = _with_validation(frame, choice, name)
    data = build_dataset(opened.spec or found.spec, frame, choice)
    return data if opened.reader is None else _read_from(data, opened, opened.reader, names, workers)


def need_root(path: Path, what: str, spec: TableSpec) -> Path:
    """Return a path of a source's layout that is there.

    Raises
    ------
    DataError
        It is not.
    """
    if not path.exists():
        raise DataError(f"data set {spec.name!r}: {path} is missing ({what}); the data are had from: {spec.source}")
    return path


def write_example(
    name: str, folder: str | Path, n: int | None = None, size: tuple[int, ...] | None = None, seed: int = 0
) -> Path:
    """Write small made-up data in the format of a source; return the folder.

    Parameters
    ----------
    folder : str or Path
        New or empty.
    n : int, optional
        Number of examples; None: the source's small number.
    size : tuple of int, optional
        Height and width of images.
    seed : int, default 0
        The same seed writes the same files.

    Raises
    ------
    DataError
        An unknown name, a folder that is not empty, or sizes that do not fit.
    """
    found, folder = source(name), Path(folder).expanduser()
    writable = [each for each in source_names() if source(each).example is not None]
    if found.example is None:
        raise DataError(f"data set {name!r} needs no files; {unknown('format', name, writable)}")
    least, size = 12, tuple(size or found.example_size[1:])
    n = found.example_size[0] if n is None else n
    if n < least or any(each < 16 for each in size):
        raise DataError(
            f"example data need at least {least} examples and images of at least 16 x 16, found {n} and {size}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is there and not empty; give a new folder, so that nothing is written over")
    folder.mkdir(parents=True, exist_ok=True)
    found.example(folder, n, size, seed)
    return folder


def _settings(name: str, found: Source, args: Mapping[str, object] | None) -> Settings:
    try:
        return found.settings.model_validate(dict(args or {}))
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        field = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            raise DataError(
                f"data set {name!r}, args: {unknown('setting', field, found.settings.model_fields)}"
            ) from error
        raise DataError(f"data set {name!r}, args: {field}: {explain(item)}") from error


def _with_validation(frame: pd.DataFrame, choice: Choice, name: str) -> tuple[pd.DataFrame, Choice]:
    """Return the table with a validation part, drawn of the training rows in the share of ``split`` where none is published."""
    if isinstance(choice.split, str):
        raise DataError(f"data set {name!r} has published parts; split must be three shares, found {choice.split!r}")
    part = frame[PART].to_numpy(dtype=object, copy=True)
    if not (part == "val").any():
        rows = np.flatnonzero(part == "train")
        share = choice.split[1] / (choice.split[0] + choice.split[1])
        taken = np.random.default_rng(choice.seed).permutation(rows)[: max(1, round(share * len(rows)))]
        part[taken] = "val"
    return frame.assign(**{PART: part}), replace(choice, split=PART)


def _read_from(data: Dataset, opened: Opened, reader: Reader, names: tuple[str, ...], workers: int) -> Dataset:
    """Return the data with what is in files: the inputs, and the labels of some tasks."""
    made = {task.name: task for task in (*data.tasks, *opened.filed)}
    filed = tuple(task.name for task in opened.filed)
    splits: Json = {
        part: replace(each, reader=reader, filed=filed, workers=workers, augment=opened.augment and part == "train")
        for part, each in data.splits().items()
    }
    about, rows = dict(data.card["tasks"]), data.card["rows"]
    definitions = _definitions(data.name)
    for task in opened.filed:
        per_group = {
            attribute: {name: {"rows": group["rows"]} for name, group in entry["groups"].items()}
            for attribute, entry in data.card["groups"].items()
        }
        about[task.name] = {
            "kind": task.kind,
            "definition": definitions[task.name],
            "columns": [],
            "forbids": [],
            "labelled": rows,
            "missing": 0,
            "per_group": per_group,
        }
    card = {**data.card, "inputs": ["read from files"], "tasks": {name: about[name] for name in names}}
    tasks = tuple(made[name] for name in names)
    new_rows = replace(data.new_rows, tasks=tasks, read_shape=reader.shape)
    return replace(data, **splits, tasks=tasks, card=card, new_rows=new_rows)


def _definitions(name: str) -> Mapping[str, str]:
    return source(name).spec.filed or {}
