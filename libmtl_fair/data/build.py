"""From a table and its spec to a dataset: rows, labels, groups, splits, inputs, card, in this order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from libmtl_fair.data.card import dataset_card
from libmtl_fair.data.dataset import Dataset, Split
from libmtl_fair.data.features import FeatureEncoder, feature_kinds, fit_encoder
from libmtl_fair.data.frames import column_of
from libmtl_fair.data.labels import RawLabels, make_task, raw_labels
from libmtl_fair.data.selection import Choice, choose_inputs, choose_tasks
from libmtl_fair.data.sensitive import Groups, choose_sensitive, make_groups, tell_tale_columns
from libmtl_fair.data.spec import TableSpec
from libmtl_fair.data.splits import Rows, check_parts, draw_subset, split_by_column, split_rows, strata
from libmtl_fair.errors import DataError


@dataclass(frozen=True)
class _Table:
    """The rows in use, ``rows`` being their positions in the source, with labels, groups and strata."""

    frame: pd.DataFrame
    rows: Rows
    labels: tuple[RawLabels, ...]
    groups: tuple[Groups, ...]
    stratum: np.ndarray[Any, Any] | None
    tell_tale: dict[str, set[str]]

    def take(self, rows: Rows) -> _Table:
        return replace(
            self,
            frame=self.frame.iloc[rows].reset_index(drop=True),
            rows=self.rows[rows],
            labels=tuple(item.take(rows) for item in self.labels),
            groups=tuple(item.take(rows) for item in self.groups),
            stratum=None if self.stratum is None else self.stratum[rows],
        )


def build_dataset(spec: TableSpec, frame: pd.DataFrame, choice: Choice) -> Dataset:
    """Return the dataset that ``choice`` asks for.

    Raises
    ------
    DataError : see :func:`libmtl_fair.data.load_dataset`.
    """
    table = _read(spec, frame, choice)
    parts = _parts(table, choice)
    for item in table.labels:
        check_parts(parts, item)
    tasks, targets = {}, {}
    for item in table.labels:
        tasks[item.name], targets[item.name] = make_task(item, parts["train"])
    hidden: set[str] = set() if choice.sensitive_inputs else set().union(*table.tell_tale.values())
    inputs = choose_inputs(spec, {item.name: item.spec for item in table.labels}, hidden)
    kinds = feature_kinds(table.frame, inputs, spec.kinds)
    encoder, x = fit_encoder(table.frame, parts["train"], kinds, choice.min_frequency)
    splits = {part: _split(table, x, targets, rows, encoder) for part, rows in parts.items()}
    return Dataset(
        name=spec.name,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        tasks=tuple(tasks.values()),
        groups=splits["train"].group_names,
        feature_names=encoder.names,
        card=dataset_card(
            spec, choice, table.frame, len(frame), table.labels, table.groups, parts, encoder, table.tell_tale
        ),
        encoder=encoder,
    )


def _read(spec: TableSpec, frame: pd.DataFrame, choice: Choice) -> _Table:
    chosen = choose_tasks(spec, choice.tasks)
    rows = _kept_rows(spec, frame)
    frame = frame.iloc[rows].reset_index(drop=True)
    names = spec.default_sensitive if choice.sensitive is None else choice.sensitive
    attributes, known = choose_sensitive(names, spec.sensitive, choice.keep_groups)
    stratify = next(iter(chosen)) if spec.stratify is None else spec.stratify
    table = _Table(
        frame=frame,
        rows=rows,
        labels=tuple(raw_labels(name, task, frame) for name, task in chosen.items()),
        groups=tuple(make_groups(name, item, frame, choice.missing, known) for name, item in attributes.items()),
        stratum=strata(raw_labels(stratify, spec.tasks[stratify], frame)) if stratify else None,
        tell_tale={name: tell_tale_columns(item, known) for name, item in attributes.items()},
    )
    taken = draw_subset(table.stratum, len(frame), choice.subset, choice.seed)
    return table if len(taken) == len(frame) else table.take(taken)


def _kept_rows(spec: TableSpec, frame: pd.DataFrame) -> Rows:
    if spec.keep_rows is None:
        return np.arange(len(frame))
    rows = np.flatnonzero(spec.keep_rows(frame).to_numpy(dtype=bool, na_value=False))
    if len(rows) == 0:
        raise DataError(f"dataset {spec.name!r}: no row passes the filter ({spec.filter})")
    return rows


def _parts(table: _Table, choice: Choice) -> dict[str, Rows]:
    if isinstance(choice.split, str):
        return split_by_column(column_of(table.frame, choice.split, "split"))
    return split_rows(table.stratum, len(table.frame), tuple(choice.split), choice.seed)


def _split(
    table: _Table,
    x: np.ndarray[Any, Any],
    targets: dict[str, np.ndarray[Any, Any]],
    rows: Rows,
    encoder: FeatureEncoder,
) -> Split:
    return Split(
        x=torch.from_numpy(x[rows]),
        labels={task: torch.from_numpy(values[rows]) for task, values in targets.items()},
        groups={item.attribute: torch.from_numpy(item.ids[rows]) for item in table.groups},
        rows=torch.from_numpy(table.rows[rows]),
        group_names={item.attribute: list(item.names) for item in table.groups},
        feature_names=encoder.names,
    )
