"""FairMT's constraint: running rates per group of all tasks at once, psi from them, Phi, and the way back to the outputs.

Every classification column (a binary task, a label, a class one-vs-rest) contributes two *cost* columns,
``(1 - p) 1[y=1]`` and ``p 1[y=0]``, whose group means are 1 - TPR and FPR; a regression task contributes its error, or the
five moments that make CCC. So one matrix product with the group membership gives every rate of every task and attribute, and
:func:`~libmtl_fair.functional.lift` is all that is made of them; its slope is known, so there is no autograd graph.

Shapes: B examples, A attributes, G groups (the most of any attribute), K classification columns, E error columns,
M = 2K + E (or more moments an error column) summed columns, T tasks; leading dimensions ``[...]`` are trainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.functional._device import A, at_least, library
from libmtl_fair.functional.disparity import CCC_COUNT, ccc_bound, mean_bound, rate_bound
from libmtl_fair.methods.controllers import Controller
from libmtl_fair.methods.fairmt.settings import FairMTSettings
from libmtl_fair.tasks import Binary, Multiclass, Multilabel, Regression, Task

_TINY = 1e-12
_CCC_MOMENTS = 5


def at_least_single(values: Tensor) -> Tensor:
    """Return half-precision values as float32; sums over people do not fit into less."""
    return values.float() if values.dtype.itemsize < 4 else values


class BinaryColumns:
    """Binary columns of one logit each, as matrices [..., B, K]: their costs, and the gradient back to the logits.

    Attributes
    ----------
    table : Tensor
        [..., B, (4 + 2C) K]: misses, then false alarms: the costs; 1 where a column's label is positive, and where it is negative, else
        0; and misses and alarms of the decisions at each of ``decided``, thresholds of the logits. Of the logits' type, at least
        float32.
    """

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        sharpness: float | Tensor,
        cut: Tensor | None = None,
        decided: Sequence[Tensor | float] = (),
    ) -> None:
        self.sharpness, self._plain = sharpness, isinstance(sharpness, float) and sharpness == 1
        self.logits = logits = at_least_single(logits)
        shifted = logits if cut is None else logits - cut
        self.p = p = torch.sigmoid(shifted if self._plain else shifted * sharpness)
        positive, negative = (torch.eq(labels, y, out=torch.empty_like(p)) for y in (1, 0))
        self.positive, self.negative, self.width = positive, negative, 2 * p.shape[-1]
        parts = [torch.addcmul(positive, p, positive, value=-1), p * negative, positive, negative]
        for at in decided:
            passed = torch.ge(logits, at, out=torch.empty_like(p))
            parts += [torch.addcmul(positive, passed, positive, value=-1), passed * negative]
        self.table = torch.cat(parts, -1)

    def people(self) -> tuple[Tensor, Tensor]:
        """Return the table's sums over everybody, [4 + 2C, K], and the spread of each column's logits, [K]."""
        away = self.logits - self.logits.mean(0)
        return self.table.sum(0).view(-1, self.logits.shape[-1]), away.mul_(away).mean(0)

    def pull_back(self, gradient: Tensor) -> list[Tensor]:
        """Return the gradient to the logits from that to the costs, [..., B, 2K]."""
        k = self.p.shape[-1]
        alarms, misses = gradient[..., k:] * self.negative, gradient[..., :k]
        found = torch.ops.aten.sigmoid_backward(torch.addcmul(alarms, misses, self.positive, value=-1), self.p)
        return [found if self._plain else found * self.sharpness]


class OutputColumns(BinaryColumns):
    """Binary columns that are made of the outputs of binary and multilabel tasks that share a batch."""

    def __init__(
        self, tasks: Sequence[Task], outputs: Sequence[Tensor], labels: Sequence[Tensor], *args: Any, **options: Any
    ) -> None:
        self._outputs = outputs
        wide = [at_least_single(z) for z in outputs]
        logits = [t.logit(z).unsqueeze(1) if isinstance(t, Binary) else z for t, z in zip(tasks, wide)]
        self._widths = [z.shape[1] for z in logits]
        truth = torch.cat([_targets(task, y) for task, y in zip(tasks, labels)], 1)
        super().__init__(torch.cat(logits, 1), truth, *args, **options)

    def pull_back(self, gradient: Tensor) -> list[Tensor]:
        """Return the gradient to each task's output."""
        parts = torch.split(super().pull_back(gradient)[0], self._widths, 1)
        # two outputs of a binary task: their difference is the logit
        pairs = ((g, z, z.dim() == 2 and z.shape[1] == 2 and g.shape[1] == 1) for g, z in zip(parts, self._outputs))
        return [torch.cat([-g, g], 1) if two else g.reshape(z.shape) for g, z, two in pairs]


class MixedColumns:
    """Tasks of any kind that share a batch; autograd goes from the costs to the outputs, and no further."""

    def __init__(
        self, rule: Constraint, tasks: Sequence[Task], outputs: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> None:
        self._leaves = [output.detach().requires_grad_() for output in outputs]
        dtype = torch.promote_types(rule.dtype, torch.float32)
        with torch.enable_grad():
            costs, seen = rule.costs(tasks, self._leaves, labels)
            self._costs = torch.cat(costs, 1).to(dtype)
        self.table = torch.cat([self._costs.detach(), *(part.to(dtype) for part in seen)], -1)
        self.width = self._costs.shape[1]

    def pull_back(self, gradient: Tensor) -> list[Tensor]:
        """Return the gradient to each task's output."""
        found = torch.autograd.grad(self._costs, self._leaves, gradient, allow_unused=True)
        return [
            torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(self._leaves, found, strict=True)
        ]


class Psi(NamedTuple):
    """Disparities [..., T], 0 where absent; which are present; each task's derivative to the columns' group means.

    ``slope`` [..., A, G, M] is that of a column's own disparity, ``share`` [..., A, Q] what a column adds to its task's psi.
    """

    value: Tensor
    present: Tensor
    slope: Tensor
    share: Tensor


class Constraint(Controller):
    """How disparities are measured, and which columns belong to which task.

    Parameters
    ----------
    settings : FairMTSettings
        Of FairMT.
    tasks, widths : sequence of Task, sequence of int
        In order of psi; how many classification columns each has, 0 for regression.
    n_groups : mapping of str to int
        Number of groups of each attribute, in order.
    blocks : sequence of sequence of int
        Indices of the tasks that share a batch: one block with all tasks, or one a task with ``multi_input``.
    crossed : sequence of int
        The attributes' numbers of groups where they are intersected, else empty.
    """

    numbers: ClassVar[tuple[str, ...]] = ("mu", "ema", "sharpness", "min_count", "fpr_weight")

    def __init__(
        self,
        settings: FairMTSettings,
        tasks: Sequence[Task],
        widths: Sequence[int],
        n_groups: Mapping[str, int],
        blocks: Sequence[Sequence[int]],
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        s = self.settings = settings
        self.mu: float | Tensor = s.mu
        self.ema: float | Tensor = s.ema or 0.0
        self.sharpness: float | Tensor = s.sharpness
        self.min_count: float | Tensor = s.min_count
        self.fpr_weight: float | Tensor = s.fpr_weight
        self.tasks, self.blocks = list(tasks), [list(block) for block in blocks]
        self.attributes, counts = tuple(n_groups), list(n_groups.values())
        self.crossed = counts if s.intersectional and len(counts) > 1 else []
        self.n_attributes = 1 if self.crossed else len(counts)
        self.n_groups = torch.Size(self.crossed).numel() if self.crossed else max(counts)
        # a confidence bound of an error also needs its square
        self.moments = _CCC_MOMENTS if s.error == "ccc" else 1 + (s.reference == "lcb")
        self.n_rates, self.n_errors = sum(widths), sum(w == 0 for w in widths)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.parity: Tensor | None = None
        self.weights: Tensor | None = None
        self._ids = torch.arange(self.n_groups, device=device)
        owner = [t for t, w in enumerate(widths) for _ in range(w)] + [t for t, w in enumerate(widths) if not w]
        self._one_column_each = owner == list(range(len(self.tasks)))
        self._owner = torch.nn.functional.one_hot(torch.tensor(owner), len(self.tasks)).to(device, self.dtype)
        self._order = self._column_order(widths, device)

    def _column_order(self, widths: Sequence[int], device: torch.device) -> Tensor | None:
        """Where a column of the blocks, one block after another, lies among all: misses, then alarms, then errors."""
        if len(self.blocks) == 1:
            return None
        starts = torch.tensor([0, *widths]).cumsum(0).tolist()
        errors = [sum(not w for w in widths[:t]) * self.moments + 2 * self.n_rates for t in range(len(widths))]
        found: list[int] = []
        for block in self.blocks:
            rates = [starts[t] + c for t in block for c in range(widths[t])]
            found += [*rates, *(r + self.n_rates for r in rates)]
            found += [errors[t] + c for t in block if not widths[t] for c in range(self.moments)]
        return torch.tensor(found, device=device)

    # -- from batches to sums and back -----------------------------------------------------------------------------

    def membership(self, groups: Mapping[str, Tensor]) -> Tensor:
        """Return which group of which attribute an example is in, [B, A * G]."""
        if lacking := [name for name in self.attributes if name not in groups]:
            raise DataError(
                f"the first batch had groups of {lacking[0]!r}, and this one has them of: {', '.join(groups) or 'nothing'}"
            )
        chosen = [groups[name] for name in self.attributes]
        if self.crossed:
            chosen = [F.cross_groups(chosen, self.crossed)[0]]
        ids = chosen[0].unsqueeze(1) if len(chosen) == 1 else torch.stack(chosen, 1)
        found = torch.empty((*ids.shape, self.n_groups), dtype=self.dtype, device=ids.device)
        return torch.eq(ids.unsqueeze(-1), self._ids, out=found).flatten(1)

    def sums(self, blocks: Sequence[BinaryColumns | MixedColumns], members: Sequence[Tensor]) -> Tensor:
        """Return sums and counts by group of all blocks, [..., A * G, 2M]; sums of decisions after them, if there are any."""
        parts = [torch.matmul(member.mT, block.table) for block, member in zip(blocks, members)]
        if self._order is None:
            return parts[0]
        kinds = [torch.split(part, block.width, 1) for block, part in zip(blocks, parts)]
        return torch.cat([torch.cat(kind, 1)[:, self._order.argsort()] for kind in zip(*kinds)], 1)

    def pull_back(
        self, blocks: Sequence[BinaryColumns | MixedColumns], members: Sequence[Tensor], to_sums: Tensor
    ) -> list[Tensor]:
        """Return the gradient to the blocks' tensors from that to the sums [..., A * G, M]."""
        sizes = [block.width for block in blocks]
        parts = [to_sums] if self._order is None else torch.split(to_sums[:, self._order], sizes, 1)
        return [
            g
            for block, member, part in zip(blocks, members, parts)
            for g in block.pull_back(torch.matmul(member, part))
        ]

    # -- psi ------------------------------------------------------------------------------------------------------

    def rates(self, sums: A, counts: A) -> tuple[A, A]:
        """Return means and counts of each attribute and group [..., A, G, M] from those of all, tensors or arrays.

        Where demographic parity is asked for, a miss is to be refused and an alarm to be passed, whatever the label.
        """
        shape, k = (self.n_attributes, self.n_groups, sums.shape[-1]), self.n_rates
        total, count = (x.reshape(*x.shape[:-2], *shape) for x in (sums, counts))
        if self.parity is not None:
            xp = library(sums)
            parity = self.parity if isinstance(sums, Tensor) else self.parity.numpy()
            people = count[..., :k] + count[..., k:]
            passed = count[..., :k] - total[..., :k] + total[..., k:]
            total = xp.where(parity, xp.concatenate([people - passed, passed], -1), total)
            count = xp.where(parity, xp.concatenate([people, people], -1), count)
        return total / at_least(count, _TINY), count

    def lifted(self, rates: A, number: A, least: float | A) -> tuple[A, A, A]:
        """Return the disparity [..., A, 2K] of misses and alarms, which are present, and slopes to the rates [..., A, G, 2K]."""
        s = self.settings
        bound = rate_bound(rates, number) if s.reference == "lcb" else None
        part, enough, slope = F.lift(
            rates, number, bound, symmetric=s.symmetric, normalise=s.normalise and self.n_groups > 2, min_count=least,
            smooth=s.smooth if s.form == "constraints" and not s.symmetric else 0.0,
        )  # fmt: skip
        if isinstance(self.fpr_weight, Tensor) or self.fpr_weight != 1 or self.weights is not None:
            parts = library(part).ones_like(part)
            if self.weights is not None:
                parts = parts * (self.weights if isinstance(part, Tensor) else self.weights.numpy())
            if isinstance(self.fpr_weight, Tensor) or self.fpr_weight != 1:
                parts[..., self.n_rates :] *= _at(self.fpr_weight, 2, part)
            part, enough, slope = part * parts, enough & (parts > 0), slope * parts[..., None, :]
        return part, enough, slope

    def psi(self, sums: Tensor, counts: Tensor) -> Psi:
        """Return psi of every task from sums and counts [..., A * G, M] (METHODS.md, 2.1)."""
        k = 2 * self.n_rates
        means, count = self.rates(sums, counts)
        rates, number = (means[..., :k], count[..., :k]) if self.n_errors else (means, count)
        part, enough, slope = self.lifted(rates, number, _at(self.min_count, 3, sums))
        half = self.n_rates
        column, seen = part[..., :half] + part[..., half:], enough[..., :half] | enough[..., half:]
        if self.n_errors:
            wrong, present, steep = self._errors(means[..., k:], count[..., k:])
            column, seen = torch.cat([column, wrong], -1), torch.cat([seen, present], -1)
            slope = torch.cat([slope, steep], -1)
        here = seen.to(column.dtype)
        if self._one_column_each and self.n_attributes == 1:
            return Psi(column.sum(-2), seen.any(-2), slope, here)
        value, columns = column * here, here
        if not self._one_column_each:
            owner = self._owner.to(column.dtype)
            value, columns = value @ owner, here @ owner
        there = (columns > 0).to(column.dtype)
        attributes = there.sum(-2)
        per_task = there / (columns.clamp(min=1) * attributes.clamp(min=1).unsqueeze(-2))
        share = per_task if self._one_column_each else (per_task @ owner.mT) * here
        return Psi((value * per_task).sum(-2), attributes > 0, slope, share)

    def _errors(self, means: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return psi [A, E], present [A, E] and slope [A, G, E * moments] of regression errors; slopes are to the means."""
        s, m = self.settings, self.moments
        number = count[..., ::m]
        leaf = means.detach().requires_grad_()
        with torch.enable_grad():
            moments = leaf.view(*leaf.shape[:-1], -1, m)  # [A, G, E, m]
            cost, least, bound = moments[..., 0], self.min_count, None
            if s.error == "ccc":
                one = torch.ones_like(cost).unsqueeze(-1)
                cost, _ = F.ccc_lack_from_sums(torch.cat([one, moments], -1))
                least = max(s.min_count, CCC_COUNT)
            if s.reference == "lcb":
                bound = ccc_bound(cost, number) if s.error == "ccc" else mean_bound(cost, number, moments[..., 1])
            psi, present, _ = F.lift(cost, number, bound, symmetric=s.symmetric, normalise=s.normalise, min_count=least)
            (slope,) = torch.autograd.grad(psi.sum(), leaf)
        return psi.detach(), present, slope

    def to_sums(self, psi: Psi, weights: Tensor, divisor: Tensor) -> Tensor:
        """Return the gradient of ``weights . psi`` [..., T] to every summed cost, by group: [..., A * G, M].

        ``divisor`` [..., A * G, M] are the counts that a mean divides by: the running ones, or the batch's own. ``weights``
        are 0 where a task is absent.
        """
        k = self.n_rates
        spread = weights if self._one_column_each else weights @ self._owner.to(weights.dtype).mT
        column = spread.unsqueeze(-2) * psi.share  # [..., A, Q]
        errors = column[..., k:]
        if self.moments > 1 and self.n_errors:
            errors = errors.repeat_interleave(self.moments, -1)
        each = torch.cat([column[..., :k], column[..., :k], errors], -1).unsqueeze(-2)
        return (psi.slope * each).flatten(-3, -2) / divisor.clamp(min=_TINY)

    # -- columns of tasks of any kind ------------------------------------------------------------------------------

    def costs(
        self, tasks: Sequence[Task], outputs: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the costs of tasks that share a batch, and where they count: misses and alarms of all, then errors."""
        costs: list[Tensor] = []
        seen: list[Tensor] = []
        rates = [i for i, task in enumerate(tasks) if task.has_rates]
        if rates:
            p = torch.cat([_as_columns(tasks[i].probabilities(outputs[i])) for i in rates], 1)
            if self.sharpness != 1:
                p = torch.sigmoid(self.sharpness * torch.logit(p, eps=1e-6))
            y = torch.cat([_targets(tasks[i], labels[i]) for i in rates], 1)
            positive, negative = (y == 1).to(p.dtype), (y == 0).to(p.dtype)
            costs, seen = [(1 - p) * positive, p * negative], [positive, negative]
        for task, output, label in zip(tasks, outputs, labels):
            if not task.has_rates:
                values, mask = self._error_columns(task, output, label)
                costs.append(values)
                seen.append(mask.expand_as(values))
        return costs, seen

    def _error_columns(self, task: Task, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        known = task.observed(labels)
        if not isinstance(task, Regression):
            if self.settings.error == "ccc":
                raise RecipeError(
                    f"FairMT: error='ccc' is of one number an example, and task {task.name!r} is {task.kind}"
                )
            size = task.example_losses(output, labels)
            return torch.stack([size, size.detach().square()][: self.moments], 1), known.to(size.dtype).unsqueeze(1)
        f = torch.where(known, task.value(output), 0.0)
        y = torch.where(known, labels, 0.0).to(f.dtype)
        wrong = f - y
        if self.settings.error == "ccc":
            values = [f, y, f * f, y * y, wrong.square()]
        else:
            size = wrong.abs() if self.settings.error == "absolute" else wrong.square()
            values = [size, size.detach().square()][: self.moments]
        return torch.stack(values, 1), known.to(f.dtype).unsqueeze(1)


class Found(NamedTuple):
    """psi and presence [..., T] (and the Lipschitz term's); Phi [...]; w* [..., T]; its gradient to the sums [..., A * G, M]."""

    psi: Tensor
    present: Tensor
    phi: Tensor
    w: Tensor
    to_sums: Tensor


def evaluate(
    rule: Constraint, now: Tensor, running: Tensor | None, lipschitz: F.LipschitzTerm | None = None
) -> tuple[Found, Tensor]:
    """Return what the constraint says after a batch's sums [..., A * G, 2M], and the running sums moved by them.

    ``lipschitz`` is one more disparity.
    """
    s, half = rule.settings, now.shape[-1] // 2
    running = (
        now
        if running is None or (not isinstance(rule.ema, Tensor) and not rule.ema)
        else now + _at(rule.ema, 2, now) * running
    )
    sums, counts = running[..., :half], running[..., half:]
    psi = rule.psi(sums, counts)
    value, present, tasks = psi.value, psi.present, psi.value.shape[-1]
    if lipschitz is not None:
        some = torch.ones_like(lipschitz.rate, dtype=torch.bool) if lipschitz.some is None else lipschitz.some
        value = torch.cat([value, lipschitz.value.to(value.dtype).unsqueeze(-1)], -1)
        present = torch.cat([present, some.unsqueeze(-1)], -1)
    if isinstance(rule.mu, Tensor):  # in units of mu, one of each training
        phi, w = F.aggregate_disparities(value / _at(rule.mu, 1, value), 1.0, present, s.solver)
        phi = phi * rule.mu.to(phi.dtype)
    else:
        phi, w = F.aggregate_disparities(value, rule.mu, present, s.solver)
    if not s.centred:
        phi = phi - _at(rule.mu, 0, phi) / (2 * present.sum(-1).clamp(min=1))
    divisor = counts if s.ema_gradient == "decayed" else now[..., half:]
    return Found(value, present, phi, w, rule.to_sums(psi, w[..., :tasks], divisor)), running


def _at(number: float | Tensor, dims: int, like: Any) -> Any:
    """Return a number, or one of each training [...] with ``dims`` dimensions after it."""
    return number if not isinstance(number, Tensor) else number.to(like.dtype).view(*number.shape, *(1,) * dims)


def _as_columns(p: Tensor) -> Tensor:
    return p.unsqueeze(1) if p.dim() == 1 else p


def _targets(task: Task, labels: Tensor) -> Tensor:
    """Labels as 0/1 columns [B, C]; anything else is missing."""
    if isinstance(task, Multiclass):
        return F.one_hot_labels(labels, torch.arange(task.n_classes, device=labels.device))
    return labels if isinstance(task, Multilabel) else task.flat(labels).unsqueeze(1)
