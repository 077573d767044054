"""What a task accumulates: confusion counts per group, and scores where a metric needs them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libmtl_fair.errors import DataError
from libmtl_fair.metrics.arrays import Floats, Ints
from libmtl_fair.metrics.counts import add_counts


@dataclass
class Stored:
    """Kept rows of one task as numpy arrays: values [N] or [N, C], labels, observed, ids by attribute, weights."""

    values: Any
    labels: Any
    observed: Any
    ids: dict[str, Ints]
    weight: Floats | None


class TaskState:
    """Counts of one task for every attribute, on the device of its batches.

    A confusion code counts cells per group: 4 for a binary task, 4 a label, C * C for a multiclass task. Group ids are shifted by
    one, so that unknown ones have a slot of their own; unobserved labels fall into a last, ignored slot.
    """

    def __init__(self, task: Any, threshold: float | str, auc: bool) -> None:
        """Decide what has to be kept."""
        self.task, self.threshold, self.auc = task, threshold, auc
        self.late = threshold == "base_rate" and task.kind in ("binary", "multilabel")
        self.counted = task.kind != "regression" and not self.late
        self.stored = auc or not self.counted
        self.reset({})

    @property
    def cells(self) -> int:
        """Cells per group."""
        width = int(self.task.out_features)
        return {"binary": 4, "multilabel": 4 * width, "multiclass": width * width}.get(self.task.kind, 0)

    def reset(self, sizes: Mapping[str, int]) -> None:
        """Forget everything."""
        self.sizes = dict(sizes)
        self._tables: dict[str, Tensor] = {}
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._ids: dict[str, list[Tensor]] = {a: [] for a in sizes}
        self._weights: list[Tensor | None] = []
        self._bad: list[Tensor] = []

    def update(self, output: Tensor, labels: Any, ids: Mapping[str, Tensor], weight: Tensor | None) -> None:
        """Add one batch."""
        labels = torch.as_tensor(labels, device=output.device).detach()
        values = self.task.probabilities(output)
        size = len(next(iter(ids.values())))
        if not len(values) == len(labels) == size:
            raise DataError(
                f"task {self.task.name!r}: {len(values)} outputs and {len(labels)} labels for {size} group ids"
            )
        observed = torch.isfinite(labels) if labels.is_floating_point() else labels >= 0
        finite = torch.isfinite(values)
        if values.dim() > observed.dim():
            finite = finite.all(-1)
        self._bad.append((~finite & observed).sum())
        if self.counted:
            self._count(values, labels, observed, ids, weight)
        if self.stored:
            self._rows.append((values, labels, observed))
            self._weights.append(weight)
            for attribute, given in ids.items():
                self._ids[attribute].append(given.to(torch.int32))

    def check(self) -> None:
        """Raise for scores that are not finite where there is a label; synchronises."""
        bad = int(sum(int(b) for b in self._bad)) if self._bad else 0
        self._bad = []
        if bad:
            raise DataError(
                f"task {self.task.name!r}: {bad} labelled examples have a score that is not finite (NaN or infinite); "
                "the model has diverged, or its outputs are masked"
            )

    def merge(self, other: TaskState) -> None:
        """Add the counts and rows of another state of the same task."""
        for attribute, table in other._tables.items():
            mine = self._tables.get(attribute)
            self._tables[attribute] = table.clone() if mine is None else mine + table.to(mine.device)
        self._rows += other._rows
        self._weights += other._weights
        self._bad += other._bad
        for attribute, given in other._ids.items():
            self._ids[attribute] += given

    def table(self, attribute: str) -> Floats:
        """Return counts, weights and squared weights [3, G + 1, cells]; slot 0 holds rows of unknown group."""
        groups = self.sizes[attribute] + 1
        table = self._tables.get(attribute)
        if table is None:
            return np.zeros((3, groups, self.cells))
        return np.asarray(table[:, :-1].cpu().numpy().reshape(3, groups, self.cells))

    def counts(self, attribute: str) -> tuple[Floats, float]:
        """Return the rows with a label of each group [G], and of no known group."""
        if self.counted and self.task.kind != "multilabel":
            rows = self.table(attribute)[0].sum(-1)
        elif self.counted:
            # Of a multilabel task the label seen most often: its other labels may be missing.
            table = self.table(attribute)[0]
            rows = table.reshape(len(table), -1, 4).sum(-1).max(-1)
        else:
            kept = self.rows()
            seen = kept.observed if kept.observed.ndim == 1 else kept.observed.any(-1)
            rows = np.bincount(kept.ids[attribute][seen] + 1, minlength=self.sizes[attribute] + 1).astype(np.float64)
        return rows[1:], float(rows[0])

    def rows(self) -> Stored:
        """Return all kept rows on the CPU."""
        width = int(self.task.out_features) if self.task.kind in ("multiclass", "multilabel") else None
        if not self._rows:
            shape = (0,) if width is None else (0, width)
            columns = shape if self.task.kind == "multilabel" else (0,)
            ids = {a: np.zeros(0, dtype=np.int64) for a in self.sizes}
            return Stored(np.zeros(shape), np.zeros(columns), np.zeros(columns, dtype=bool), ids, None)
        values, labels, observed = (torch.cat([r[k].cpu() for r in self._rows]).numpy() for k in range(3))
        ids = {a: torch.cat([i.cpu() for i in given]).numpy().astype(np.int64) for a, given in self._ids.items()}
        weight = None
        if any(w is not None for w in self._weights):
            parts = [torch.ones(len(r[0])) if w is None else w.cpu() for w, r in zip(self._weights, self._rows)]
            weight = torch.cat([p.double() for p in parts]).numpy()
        return Stored(values, labels, observed, ids, weight)

    def _count(
        self, values: Tensor, labels: Tensor, observed: Tensor, ids: Mapping[str, Tensor], weight: Tensor | None
    ) -> None:
        cell = confusion_cells(self.task.kind, values, labels, observed, self.threshold)
        for attribute, given in ids.items():
            size = (self.sizes[attribute] + 1) * self.cells + 1
            if attribute not in self._tables:
                self._tables[attribute] = torch.zeros(3, size, dtype=torch.float64, device=values.device)
            shifted = (given.to(values.device) + 1) * self.cells
            code = (shifted if cell.dim() == 1 else shifted[:, None]) + cell
            code = torch.where(observed, code, size - 1)
            repeated = weight
            if weight is not None and cell.dim() == 2:
                repeated = weight[:, None].expand(cell.shape).reshape(-1)
            add_counts(self._tables[attribute], code.reshape(-1), repeated)


def confusion_cells(kind: str, values: Tensor, labels: Tensor, observed: Tensor, threshold: Any) -> Tensor:
    """Return the cell of each row within its group: [B], or [B, C] for a multilabel task.

    Binary 2 y + yhat with yhat = probability > threshold; multilabel the same plus 4 a label; multiclass C y + argmax.
    """
    truth = torch.where(observed, labels, 0)
    if kind == "multiclass":
        return truth.long() * values.shape[1] + values.argmax(-1)
    cell = 2 * (truth > 0.5).long() + (values > threshold).long()
    if kind == "multilabel":
        cell = cell + 4 * torch.arange(values.shape[1], device=values.device)
    return torch.as_tensor(cell)
