"""One task and attribute, from what was accumulated to rows of the long table."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from libmtl_fair.metrics.arrays import Bools, Floats
from libmtl_fair.metrics.counts import add_counts
from libmtl_fair.metrics.gap_rows import GapWriter
from libmtl_fair.metrics.group_auc import GroupAuc, group_auc, weighted_group_auc
from libmtl_fair.metrics.group_classification import accuracy_rows, auc_rows, binary_rows, class_rows
from libmtl_fair.metrics.group_state import Stored, TaskState, confusion_cells
from libmtl_fair.metrics.group_values import regression_rows


def write_task(writer: GapWriter, state: TaskState, attribute: str) -> None:
    """Write every metric of the task for one attribute."""
    kind = state.task.kind
    kept = state.rows() if state.stored else None
    if kind == "regression":
        assert kept is not None
        _write_regression(writer, state.task, kept, attribute)
        return
    table = state.table(attribute) if state.counted else _late_table(state, kept, attribute)
    table = table[:, 1:]
    if kind == "binary":
        binary_rows(writer, table)
    elif kind == "multiclass":
        class_rows(writer, one_vs_rest(table, state.task.out_features), suffixes(state.task))
        accuracy_rows(writer, _right_and_wrong(table, state.task.out_features))
    else:
        per_label = table.reshape(3, table.shape[1], -1, 4).transpose(0, 2, 1, 3)
        class_rows(writer, np.ascontiguousarray(per_label), suffixes(state.task))
    if kept is not None and state.auc:
        _write_auc(writer, state.task, kept, attribute)


def suffixes(task: Any) -> list[str]:
    """Return ``[name]`` of each class or label, its number where the task names none."""
    names = getattr(task, "classes", None) or getattr(task, "labels", None) or range(task.out_features)
    return [f"[{name}]" for name in names]


def one_vs_rest(table: Floats, classes: int) -> Floats:
    """Return [3, C, G, 4] binary tables of each class against the rest from confusion tables [3, G, C * C].

    >>> one_vs_rest(np.array([[[5.0, 1.0, 2.0, 4.0]]]), 2)[0, 1, 0].tolist()
    [5.0, 1.0, 2.0, 4.0]
    """
    square = table.reshape(*table.shape[:2], classes, classes)
    both = np.diagonal(square, axis1=2, axis2=3)
    true, chosen = square.sum(3), square.sum(2)
    every = square.sum((2, 3))[..., None]
    cells = np.stack([every - true - chosen + both, chosen - both, true - both, both], axis=-1)
    return np.ascontiguousarray(cells.transpose(0, 2, 1, 3))


def _right_and_wrong(table: Floats, classes: int) -> Floats:
    square = table.reshape(*table.shape[:2], classes, classes)
    right = np.trace(square, axis1=2, axis2=3)
    return np.stack([square.sum((2, 3)) - right, right], axis=-1)


def base_rate_threshold(values: Floats, positive: Bools) -> float:
    """Return the threshold above which lie as many values as there are positives (fewer, where values tie there).

    >>> base_rate_threshold(np.array([0.1, 0.2, 0.3, 0.9]), np.array([False, True, False, False]))
    0.3
    """
    count = int(positive.sum())
    if not len(values) or count >= len(values):
        return -np.inf
    return float(np.partition(values, len(values) - count - 1)[len(values) - count - 1])


def _late_table(state: TaskState, kept: Stored | None, attribute: str) -> Floats:
    """Count now that all scores are known and with them the thresholds of ``"base_rate"``."""
    assert kept is not None
    columns, labels, seen = (v if v.ndim == 2 else v[:, None] for v in (kept.values, kept.labels, kept.observed))
    found = [base_rate_threshold(columns[s, k], labels[s, k] > 0.5) for k, s in enumerate(seen.T)]
    threshold = torch.tensor(found, dtype=torch.float64) if kept.values.ndim == 2 else found[0]
    arrays = [torch.from_numpy(v) for v in (kept.values.astype(np.float64), kept.labels, kept.observed)]
    cell = confusion_cells(state.task.kind, arrays[0], arrays[1], arrays[2], threshold)
    shifted = (torch.from_numpy(kept.ids[attribute]) + 1) * state.cells
    size = (state.sizes[attribute] + 1) * state.cells + 1
    code = torch.where(arrays[2], (shifted if cell.dim() == 1 else shifted[:, None]) + cell, size - 1)
    total = torch.zeros(3, size, dtype=torch.float64)
    weight = None if kept.weight is None else torch.from_numpy(kept.weight)
    if weight is not None and cell.dim() == 2:
        weight = weight[:, None].expand(cell.shape).reshape(-1)
    add_counts(total, code.reshape(-1), weight)
    return np.asarray(total[:, :-1].numpy().reshape(3, -1, state.cells))


def _write_auc(writer: GapWriter, task: Any, kept: Stored, attribute: str) -> None:
    if task.kind == "binary":
        found = _auc(kept, kept.values, kept.labels > 0.5, kept.observed, kept.ids[attribute], writer)
        auc_rows(writer, "auc", *found)
        return
    parts = []
    for k, suffix in enumerate(suffixes(task)):
        seen = kept.observed if kept.observed.ndim == 1 else kept.observed[:, k]
        positive = kept.labels == k if kept.labels.ndim == 1 else kept.labels[:, k] > 0.5
        parts.append(_auc(kept, kept.values[:, k], positive, seen, kept.ids[attribute], writer))
        auc_rows(writer, f"auc{suffix}", *parts[-1])
    groups, overall = (_macro([part[i] for part in parts]) for i in (0, 1))
    auc_rows(writer, "auc", groups, overall)


def _auc(
    kept: Stored, score: Any, positive: Bools, seen: Bools, ids: Any, writer: GapWriter
) -> tuple[GroupAuc, GroupAuc]:
    rows = np.flatnonzero(seen & (ids >= 0))
    score, positive, ids = score[rows], positive[rows], ids[rows]
    groups, errors = len(writer.rows.names), writer.options.intervals
    if kept.weight is not None:
        weight = kept.weight[rows]
        every = weighted_group_auc(score, positive, np.zeros_like(ids), 1, weight)
        return weighted_group_auc(score, positive, ids, groups, weight), every
    every = group_auc(score, positive, np.zeros_like(ids), 1, errors=errors)
    return group_auc(score, positive, ids, groups, errors=errors), every


def _macro(parts: list[GroupAuc]) -> GroupAuc:
    """Return the mean over classes; its error as if the classes' errors were fully correlated (too wide, never too narrow)."""
    values = np.stack([p.value for p in parts])
    known = ~np.isnan(values)
    count = np.maximum(known.sum(0), 1)
    value = np.where(known.any(0), np.where(known, values, 0).sum(0) / count, np.nan)
    error = np.where(known, np.nan_to_num(np.stack([p.error for p in parts])), 0).sum(0) / count
    return GroupAuc(value, error, parts[0].positives, parts[0].negatives)


def _write_regression(writer: GapWriter, task: Any, kept: Stored, attribute: str) -> None:
    ids = kept.ids[attribute]
    rows = np.flatnonzero(kept.observed & (ids >= 0))
    shown = kept.values[rows].astype(np.float64) * task.std + task.mean
    target = kept.labels[rows].astype(np.float64) * task.std + task.mean
    weight = None if kept.weight is None else kept.weight[rows]
    regression_rows(writer, shown, target, ids[rows], weight)
