"""From a table and its spec to a dataset: rows, labels, groups, splits, inputs, card, in this order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from libmtl_fair.data.card import group_card, small_group_notes, task_card
from libmtl_fair.data.dataset import Dataset, Split
from libmtl_fair.data.features import FeatureEncoder, feature_kinds, fit_encoder
from libmtl_fair.data.frames import column_of
from libmtl_fair.data.labels import RawLabels, make_task, raw_labels, task_columns
from libmtl_fair.data.sensitive import Groups, choose_sensitive, make_groups
from libmtl_fair.data.spec import MissingRule, TableSpec, TaskSpec
from libmtl_fair.data.splits import Rows, check_parts, draw_subset, split_by_column, split_rows, strata
from libmtl_fair.errors import DataError, unknown


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
        """Check the numbers that scikit-learn will be given."""
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise DataError(f"seed must be an integer from 0 to 2**32 - 1, found {self.seed!r}")
        rare = self.min_frequency
        counts = isinstance(rare, int) and not isinstance(rare, bool) and rare >= 1
        if not (rare is None or counts or (isinstance(rare, float) and 0 < rare < 1)):
            raise DataError(f"min_frequency must be a number of rows or a share between 0 and 1, found {rare!r}")


def build_dataset(spec: TableSpec, frame: pd.DataFrame, choice: Choice) -> Dataset:
    """Return the dataset that ``choice`` asks for.

    Raises
    ------
    DataError : see :func:`libmtl_fair.data.load_dataset`.
    """
    chosen = choose_tasks(spec, choice.tasks)
    n_source = len(frame)
    rows = _kept_rows(spec, frame)
    frame = frame.iloc[rows].reset_index(drop=True)
    stratum = _strata(spec, frame, chosen)
    taken = draw_subset(stratum, len(frame), choice.subset, choice.seed)
    if len(taken) < len(frame):
        rows, frame = rows[taken], frame.iloc[taken].reset_index(drop=True)
        stratum = None if stratum is None else stratum[taken]
    labels = [raw_labels(name, task, frame) for name, task in chosen.items()]
    groups = _groups(spec, frame, choice)
    parts = _parts(frame, stratum, choice)
    for item in labels:
        check_parts(parts, item)
    made = [make_task(item, parts["train"]) for item in labels]
    inputs = choose_inputs(spec, chosen, () if choice.sensitive_inputs else groups)
    kinds = feature_kinds(frame, _declared(spec, inputs), spec.categorical)
    encoder = fit_encoder(frame.iloc[parts["train"]], kinds, choice.min_frequency)
    x = encoder.encode(frame)
    names = {item.attribute: list(item.names) for item in groups}
    targets = {item.name: values for item, (_, values) in zip(labels, made)}
    splits = {part: _split(x, targets, groups, rows, index, names, encoder) for part, index in parts.items()}
    card = _card(spec, frame, n_source, choice, labels, groups, parts, encoder)
    return Dataset(spec.name, **splits, tasks=tuple(task for task, _ in made), groups=names,
                   feature_names=encoder.names, card=card, encoder=encoder)  # fmt: skip


def choose_tasks(spec: TableSpec, tasks: Sequence[str] | str | None) -> dict[str, TaskSpec]:
    """Return the chosen tasks' specs in the order chosen, the default ones without a choice.

    Raises
    ------
    DataError : an unknown task, one that is named twice, or none.
    """
    names = list(spec.default_tasks) if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
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


def choose_inputs(spec: TableSpec, tasks: Mapping[str, TaskSpec], without: Sequence[Groups] = ()) -> list[str]:
    """Return the candidate columns that leak none of the chosen tasks, as one input serves them all.

    Raises
    ------
    DataError : none is left.
    """
    out = set(leaks(tasks))
    for item in without:
        out |= {str(item.spec.column), *item.spec.also_in}
        out |= {str(spec.sensitive[part].column) for part in item.spec.of}
    inputs = [column for column in spec.candidates if column not in out]
    if not inputs:
        raise DataError(f"dataset {spec.name!r}: tasks {list(tasks)} leave no input column; choose fewer tasks")
    return inputs


def _declared(spec: TableSpec, inputs: Sequence[str]) -> dict[str, str]:
    return {name: "numeric" if name in spec.numeric else "auto" for name in inputs}


def _kept_rows(spec: TableSpec, frame: pd.DataFrame) -> Rows:
    if spec.keep_rows is None:
        return np.arange(len(frame))
    rows = np.flatnonzero(spec.keep_rows(frame).to_numpy(dtype=bool, na_value=False))
    if len(rows) == 0:
        raise DataError(f"dataset {spec.name!r}: no row passes the filter ({spec.filter})")
    return rows


def _strata(spec: TableSpec, frame: pd.DataFrame, chosen: Mapping[str, TaskSpec]) -> np.ndarray[Any, Any] | None:
    if spec.stratify == "":
        return None
    name = spec.stratify or next(iter(chosen))
    return strata(raw_labels(name, spec.tasks[name], frame))


def _groups(spec: TableSpec, frame: pd.DataFrame, choice: Choice) -> list[Groups]:
    chosen = spec.default_sensitive if choice.sensitive is None else choice.sensitive
    specs, known = choose_sensitive(chosen, spec.sensitive, choice.keep_groups)
    return [make_groups(name, item, frame, choice.missing, known) for name, item in specs.items()]


def _parts(frame: pd.DataFrame, stratum: np.ndarray[Any, Any] | None, choice: Choice) -> dict[str, Rows]:
    if isinstance(choice.split, str):
        return split_by_column(column_of(frame, choice.split, "split"))
    return split_rows(stratum, len(frame), tuple(choice.split), choice.seed)


def _split(
    x: np.ndarray[Any, Any],
    targets: Mapping[str, np.ndarray[Any, Any]],
    groups: Sequence[Groups],
    rows: Rows,
    index: Rows,
    names: dict[str, list[str]],
    encoder: FeatureEncoder,
) -> Split:
    return Split(
        x=torch.from_numpy(x[index]),
        labels={task: torch.from_numpy(values[index]) for task, values in targets.items()},
        groups={item.attribute: torch.from_numpy(item.ids[index]) for item in groups},
        rows=torch.from_numpy(rows[index]),
        group_names=names,
        feature_names=encoder.names,
    )


def _card(
    spec: TableSpec,
    frame: pd.DataFrame,
    n_source: int,
    choice: Choice,
    labels: Sequence[RawLabels],
    groups: Sequence[Groups],
    parts: Mapping[str, Rows],
    encoder: FeatureEncoder,
) -> dict[str, Any]:
    used = np.sort(np.concatenate(list(parts.values())))
    inputs = list(encoder.kinds)
    by_leak = {
        column: f"gives away the task{'s' if len(names) > 1 else ''} {', '.join(names)}"
        for column, names in leaks({item.name: item.spec for item in labels}).items()
    }
    group_cards = {item.attribute: group_card(item, parts, choice.missing, used, inputs) for item in groups}
    gaps = {name: int(frame[name].isna().to_numpy()[used].sum()) for name in inputs}
    stratified = spec.stratify or ("nothing" if spec.stratify == "" else labels[0].name)
    return {
        "name": spec.name,
        "title": spec.title,
        "source": spec.source,
        "licence": spec.licence,
        "rows_in_source": n_source,
        "rows": len(used),
        "filter": spec.filter,
        "subset": choice.subset,
        "split": {
            "shares": choice.split if isinstance(choice.split, str) else list(choice.split),
            "seed": choice.seed,
            "stratified_on": stratified if not isinstance(choice.split, str) else "nothing",
            "rows": {part: len(index) for part, index in parts.items()},
        },
        "inputs": inputs,
        "n_features": len(encoder.names),
        "missing_inputs": {name: count for name, count in gaps.items() if count},
        "dropped": {**spec.excluded, **by_leak},
        "tasks": {item.name: task_card(item, _definition(item), groups, used) for item in labels},
        "groups": group_cards,
        "sensitive_inputs": [name for name, entry in group_cards.items() if entry["is_input"]],
        "notes": [*spec.notes, *small_group_notes(group_cards)],
    }


def _definition(labels: RawLabels) -> str:
    spec = labels.spec
    if spec.definition:
        return spec.definition
    columns = ", ".join(task_columns(spec))
    if spec.expression:
        return spec.expression
    if spec.positive is not None:
        return f"{columns} = {spec.positive}"
    if spec.threshold is not None:
        return f"{columns} >= {spec.threshold:g}"
    return f"{spec.transform} of {columns}" if spec.transform else columns
