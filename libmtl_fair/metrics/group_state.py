"""What a task accumulates: confusion counts per group and scores where a metric needs them all, or (maps) sums over examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.arrays import Floats
from libmtl_fair.errors import DataError
from libmtl_fair.faults import Faults, check_labels
from libmtl_fair.tasks import BinarySequence, Task, decisions, need_known_kinds

_VALUES_AT_ONCE = 1 << 22


class Rows(NamedTuple):
    """Rows of one task: values [N] or [N, C], labels and whether observed, group ids by attribute, weights."""

    values: Tensor
    labels: Tensor
    observed: Tensor
    ids: dict[str, Tensor]
    weight: Tensor | None


class TaskState:
    """Counts of one task for every attribute, on the device of its batches.

    A code counts cells per group: 4 for a binary task, 4 a label, C * C for a multiclass task. Group ids are shifted by one, so that
    unknown ones have a slot; unobserved labels fall into a last, ignored slot.
    """

    def __init__(self, task: Task, threshold: float | str | list[float], auc: bool) -> None:
        """Decide what has to be kept."""
        need_known_kinds("GroupMetrics", [task])
        self.given, self.auc = task, auc
        self.task = task.step if isinstance(task, BinarySequence) else task
        task = self.task
        self.threshold = 0.5 if isinstance(threshold, str) else threshold
        self.late = threshold == "base_rate" and task.kind in ("binary", "multilabel")
        self.counted = task.kind != "regression" and not self.late
        self.stored = auc or not self.counted
        width = int(task.out_features)
        self.cells = {"binary": 4, "multilabel": 4 * width, "multiclass": width * width}.get(task.kind, 0)
        self.reset({})

    def reset(self, sizes: Mapping[str, int]) -> None:
        """Forget everything."""
        self.sizes = dict(sizes)
        self._tables: dict[str, Tensor] = {}
        self._batches: list[Rows] = []
        self.faults = Faults()

    def taken(self, output: Tensor, labels: Tensor, ids: Mapping[str, Tensor], weight: Tensor | None) -> Rows:
        """Return one batch as rows; what does not fit is refused, or noted where its device would have to be waited for."""
        name, size = self.task.name, len(next(iter(ids.values())))
        if self.given is not self.task and len(output) == len(labels) == size:
            _, output, labels, steps = decisions(
                self.given, output, torch.as_tensor(labels, device=output.device).detach()
            )
            ids, size = {a: each.repeat_interleave(steps) for a, each in ids.items()}, size * steps
            weight = None if weight is None else weight.repeat_interleave(steps)
        values = self._values(output)
        labels = self.task.flat(torch.as_tensor(labels, device=output.device).detach())
        labels = labels.float() if labels.is_floating_point() and labels.dtype.itemsize < 4 else labels
        wide = tuple(values.shape) if self.task.kind == "multilabel" else (len(values),)
        if not len(values) == len(labels) == size or labels.shape != wide:
            found = f"{len(values)} outputs and labels of shape {list(labels.shape)} for {size} group ids"
            raise DataError(f"task {name!r}: {found}; expected labels of shape {list(wide)}")
        check_labels(self.faults, self.task, labels)
        observed = torch.isfinite(labels) if labels.is_floating_point() else labels >= 0
        if values.is_cuda or not torch.isfinite(values.sum()):  # on the CPU one sum tells that all is well
            broken = ~torch.isfinite(values)
            seen = observed if broken.dim() == observed.dim() else observed[:, None]
            expected = "finite numbers wherever there is a label: the model has diverged, or its outputs are masked"
            self.faults.note(broken & seen, values, f"task {name!r}: scores", expected)
        return Rows(values, labels, observed, dict(ids), weight)

    def add(self, rows: Rows) -> None:
        """Add one batch."""
        ids = rows.ids
        if self.counted:
            bar = torch.tensor(self.threshold).to(rows.values) if isinstance(self.threshold, list) else self.threshold
            self._add({a: self._count(rows, a, bar) for a in ids})
        if self.stored:
            self._batches.append(rows._replace(ids={a: given.to(torch.int32) for a, given in ids.items()}))

    def _values(self, output: Tensor) -> Tensor:
        """Return probabilities or values, [B] or [B, C], in float32 at least; outputs of another shape are refused."""
        width = int(self.task.out_features)
        widths = {"binary": (1, 2), "regression": (1,)}.get(self.task.kind, (width,))
        flat = output.dim() == 1 and 1 in widths and self.task.kind != "multilabel"
        if not flat and not (output.dim() == 2 and output.shape[1] in widths):
            shapes = " or ".join(f"[B, {each}]" for each in widths)
            raise DataError(
                f"task {self.task.name!r} ({self.task.kind}): outputs of shape {list(output.shape)}; expected {shapes}"
            )
        if not output.is_floating_point():
            raise DataError(
                f"task {self.task.name!r}: outputs are {output.dtype}; expected the head's raw numbers, not decisions"
            )
        return self.task.probabilities(output.float() if output.dtype.itemsize < 4 else output)

    def merge(self, other: TaskState) -> None:
        """Add the counts and rows of another state of the same task."""
        self._add(other._tables)
        self._batches += other._batches
        self.faults.merge(other.faults)

    def rows(self) -> Rows:
        """Return all kept rows on the CPU; ids as int64, weights as float64."""
        if not self._batches:
            wide = (0, int(self.task.out_features)) if self.task.kind in ("multiclass", "multilabel") else (0,)
            labels = torch.zeros(wide if self.task.kind == "multilabel" else 0)
            ids = {a: torch.zeros(0, dtype=torch.int64) for a in self.sizes}
            return Rows(torch.zeros(wide), labels, labels.bool(), ids, None)
        columns = zip(*((b.values.cpu(), b.labels.cpu(), b.observed.cpu()) for b in self._batches))
        values, labels, observed = (torch.cat(column) for column in columns)
        ids = {a: torch.cat([b.ids[a].cpu() for b in self._batches]).long() for a in self.sizes}
        parts = [torch.ones(len(b.values)) if b.weight is None else b.weight.cpu() for b in self._batches]
        weighted = any(b.weight is not None for b in self._batches)
        return Rows(values, labels, observed, ids, torch.cat(parts).double() if weighted else None)

    def table(self, attribute: str, kept: Rows | None) -> Floats:
        """Return counts, weights and squared weights [3, G + 1, cells]; slot 0 holds rows of unknown group."""
        table = self._tables.get(attribute)
        if self.late and kept is not None and len(kept.values):
            table = self._count(kept._replace(values=kept.values.double()), attribute, base_rates(kept))
        if table is None:
            return np.zeros((3, self.sizes[attribute] + 1, self.cells))
        return np.asarray(table[:, :-1].cpu().numpy().reshape(3, -1, self.cells))

    def counts(self, attribute: str, table: Floats, kept: Rows | None) -> Floats:
        """Return the rows with a label of no known group and of each group, [G + 1]."""
        if not self.counted and kept is not None:
            seen = kept.observed if kept.observed.dim() == 1 else kept.observed.any(-1)
            rows = torch.bincount(kept.ids[attribute][seen] + 1, minlength=self.sizes[attribute] + 1)
            return np.asarray(rows.double().numpy())
        if self.task.kind != "multilabel":
            return np.asarray(table[0].sum(-1))
        # Of a multilabel task the label seen most often: its other labels may be missing.
        return np.asarray(table[0].reshape(len(table[0]), -1, 4).sum(-1).max(-1))

    def _add(self, tables: Mapping[str, Tensor]) -> None:
        for attribute, table in tables.items():
            mine = self._tables.get(attribute)
            self._tables[attribute] = table if mine is None else mine + table.to(mine.device)

    def _count(self, rows: Rows, attribute: str, threshold: float | Tensor) -> Tensor:
        """Return rows, weights and squared weights of every code, float64 [3, codes]; on the device, without synchronising."""
        size = (self.sizes[attribute] + 1) * self.cells + 1
        cell = _cells(self.task.kind, rows, threshold, torch.uint8 if size <= 1 << 8 else torch.int64)
        slot = (rows.ids[attribute].to(cell) + 1) * self.cells  # in uint8 as well: -1 comes round to 0
        code = cell.add_(slot if cell.dim() == 1 else slot[:, None]).masked_fill_(~rows.observed, size - 1).reshape(-1)
        if rows.weight is None:
            counts = torch.bincount(code, minlength=size) if code.device.type == "cpu" else _scattered(code, size)
            return counts.double().expand(3, -1)
        weight = rows.weight.to(code.device).double()
        weight = weight if cell.dim() == 1 else weight[:, None].expand(cell.shape).reshape(-1)
        return torch.stack([_scattered(code, size), *(_scattered(code, size, w) for w in (weight, weight * weight))])


def _scattered(code: Tensor, size: int, weight: Tensor | None = None) -> Tensor:
    """Sums by code, in float64, as ``bincount`` but without asking the device for the largest code."""
    total = torch.zeros(size, dtype=torch.float64, device=code.device)
    return total.scatter_add_(0, code.long(), total.new_ones(()).expand(len(code)) if weight is None else weight)


def _cells(kind: str, rows: Rows, threshold: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Return the cell of each row within its group, [B] or [B, labels]: 2 y + yhat (plus 4 a label), or C y + argmax."""
    if kind == "multiclass":
        return (rows.labels * rows.values.shape[1]).to(dtype).add_(rows.values.argmax(-1).to(dtype))
    positive = rows.labels > (0.5 if rows.labels.is_floating_point() else 0)
    cell = (rows.values > threshold).to(dtype).add_(positive.to(dtype), alpha=2)
    return cell.add_(4 * torch.arange(cell.shape[1], device=cell.device, dtype=dtype)) if kind == "multilabel" else cell


def base_rates(rows: Rows) -> Tensor:
    """Return the threshold of each column that selects as many rows as are positive, or where values tie there the nearest number.

    Above or below those who tie it lies halfway to the next value: else rounding would decide who of them is selected elsewhere.
    """
    truth = (rows.labels > 0.5).double().masked_fill(~rows.observed, torch.nan).reshape(len(rows.labels), -1)
    values = rows.values.double().reshape(truth.shape)
    found = F.base_rate_threshold(values, truth)
    values = values.masked_fill(truth.isnan(), torch.nan)
    above = (
        values.masked_fill(~(values > found), torch.inf).amin(0).clamp(max=1.0)
    )  # of probabilities: 1 and 0 where none is next
    below = values.masked_fill(~(values < found), -torch.inf).amax(0).clamp(min=0.0)
    wanted, more, tied = (truth == 1).sum(0), (values > found).sum(0), (values == found).sum(0)
    fewer = (wanted - more).abs() <= (more + tied - wanted).abs()
    found = found.where(tied < 2, (found + above.where(fewer, below)) / 2)
    found = found.masked_fill((truth != 0).all(0), -torch.inf)
    return found if rows.values.dim() == 2 else found[0]


class SummedState:
    """Sums of a task's statistics for every attribute, on the device of its batches; slot 0 holds rows of unknown group.

    The pixels of an image are not independent, so images are the unit of intervals: they are drawn anew within each group **(ours)**.
    Outputs are the head's, or statistics [B, K] already, with shares of labels [B], as predictions without maps keep them.
    """

    auc = False

    def __init__(self, task: Task, intervals: bool) -> None:
        """Take the task; for ``intervals`` every example's statistics are kept."""
        self.task, self.stored = task, intervals
        self.reset({})

    def reset(self, sizes: Mapping[str, int]) -> None:
        """Forget everything."""
        self.sizes = dict(sizes)
        self._tables: dict[str, Tensor] = {}
        self._batches: list[Rows] = []
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
        if self.stored:  # counts of pixels are whole in float32, too
            self._batches.append(rows._replace(values=each[:, 1:].float(), labels=rows.observed))

    def merge(self, other: SummedState) -> None:
        """Add the sums of another state of the same task."""
        for attribute, table in other._tables.items():
            self._add(attribute, table)
        self._batches += other._batches
        self.faults.merge(other.faults)

    def rows(self) -> Rows:
        """Return the statistics of all kept examples on the CPU."""
        if not self._batches:
            none = torch.zeros(0, dtype=torch.bool)
            return Rows(torch.zeros(0, 0), none, none, {a: none.long() for a in self.sizes}, None)
        values, observed = (
            torch.cat([part.cpu() for part in column])
            for column in zip(*((b.values, b.observed) for b in self._batches))
        )
        ids = {a: torch.cat([b.ids[a].cpu() for b in self._batches]) for a in self.sizes}
        return Rows(values, observed, observed, ids, None)

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

    def metrics(self, sums: Floats) -> Floats:
        """Return the values of the task's metrics [M, ...] of sums [..., K]; NaN where nothing was seen."""
        names = [name for name, _ in self.task.shown.values()]
        if not sums.shape[-1]:
            return np.full((len(names), *sums.shape[:-1]), np.nan)
        found = self.task.native(torch.from_numpy(sums))
        return np.stack([found[name].numpy() for name in names])

    def replicates(self, attribute: str, kept: Rows, n: int, rng: np.random.Generator) -> Floats:
        """Return the metrics of ``n`` draws, with replacement, of the examples of each group and last of all of them, [M, n, G + 1].

        NaN where there are fewer than two examples with a label.
        """
        ids = torch.where(kept.observed, kept.ids[attribute].long(), -1)
        which = [*(ids == g for g in range(self.sizes[attribute])), ids >= 0]
        parts = [self._redrawn(kept.values[rows].double().numpy(), n, rng) for rows in which]
        return np.stack(parts, -1)

    def _redrawn(self, rows: Floats, n: int, rng: np.random.Generator) -> Floats:
        size, width = rows.shape
        if size < 2:
            return np.full((len(self.task.shown), n), np.nan)
        found, at_once = [], max(1, _VALUES_AT_ONCE // max(size, width))
        for start in range(0, n, at_once):
            many = min(at_once, n - start)
            chosen = rng.integers(0, size, (many, size)) + np.arange(many)[:, None] * size
            often = np.bincount(chosen.ravel(), minlength=many * size).reshape(many, size)
            found.append(self.metrics(often @ rows))
        return np.concatenate(found, 1)
