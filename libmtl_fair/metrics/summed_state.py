"""What a task accumulates whose metrics are made of sums over examples (maps): those sums, per group."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from libmtl_fair.errors import DataError
from libmtl_fair.faults import Faults, check_labels
from libmtl_fair.metrics.arrays import Floats
from libmtl_fair.metrics.group_state import Rows
from libmtl_fair.tasks import Task


class SummedState:
    """Sums of a task's statistics for every attribute, on the device of its batches; slot 0 holds rows of unknown group.

    Outputs are the head's, or statistics [B, K] already, with shares of labels [B], as predictions without maps keep them.
    """

    stored = auc = False

    def __init__(self, task: Task, *_: object) -> None:
        """Take the task."""
        self.task = task
        self.reset({})

    def reset(self, sizes: Mapping[str, int]) -> None:
        """Forget everything."""
        self.sizes = dict(sizes)
        self._tables: dict[str, Tensor] = {}
        self.faults = Faults()

    def taken(self, output: Tensor, labels: Tensor, ids: Mapping[str, Tensor], weight: Tensor | None) -> Rows:
        """Return one batch as rows of statistics; what does not fit is refused, or noted."""
        labels, size = labels.to(output.device).detach(), len(next(iter(ids.values())))
        if not len(output) == len(labels) == size:
            found = f"{len(output)} outputs and {len(labels)} labels for {size} group ids"
            raise DataError(f"task {self.task.name!r}: {found}; expected one of each an example")
        if labels.dim() > 1:
            check_labels(self.faults, self.task, labels)
        observed = self.task.observed(labels)
        values = self.task.statistics(output.float() if output.dtype.itemsize < 4 else output, labels).double()
        expected = "finite numbers wherever there is a label: the model has diverged"
        self.faults.note(~values.isfinite() & observed[:, None], values, f"task {self.task.name!r}: outputs", expected)
        return Rows(values, labels, observed, dict(ids), weight)

    def add(self, rows: Rows) -> None:
        """Add one batch."""
        weight = rows.observed.double() if rows.weight is None else rows.observed * rows.weight.to(rows.values)
        each = torch.cat(
            [rows.observed.double()[:, None], torch.where(rows.observed[:, None], rows.values, 0) * weight[:, None]], 1
        )
        for attribute, ids in rows.ids.items():
            table = each.new_zeros(self.sizes[attribute] + 1, each.shape[1]).index_add_(
                0, ids.to(each.device) + 1, each
            )
            self._add(attribute, table)

    def merge(self, other: SummedState) -> None:
        """Add the sums of another state of the same task."""
        for attribute, table in other._tables.items():
            self._add(attribute, table)
        self.faults.merge(other.faults)

    def _add(self, attribute: str, table: Tensor) -> None:
        mine = self._tables.get(attribute)
        self._tables[attribute] = table if mine is None else mine + table.to(mine.device)

    def table(self, attribute: str, _: Rows | None) -> Floats:
        """Return the examples with a label and the sums, [1, G + 1, 1 + K]; without a batch K is 0."""
        table = self._tables.get(attribute)
        return np.zeros((1, self.sizes[attribute] + 1, 1)) if table is None else np.asarray(table[None].cpu().numpy())

    def counts(self, _: str, table: Floats, __: Rows | None) -> Floats:
        """Return the examples with a label of no known group and of each group, [G + 1]."""
        return np.asarray(table[0, :, 0])

    def metrics(self, sums: Floats) -> tuple[list[str], Floats]:
        """Return the names of the metrics and their values [M, G + 1], all groups' together last, of sums [G, K]."""
        names = [name for name, _ in self.task.shown.values()]
        if not sums.shape[1]:
            return names, np.full((len(names), len(sums) + 1), np.nan)
        found = self.task.native(torch.from_numpy(np.concatenate([sums, sums.sum(0, keepdims=True)])))
        return names, np.stack([found[name].numpy() for name in names])
