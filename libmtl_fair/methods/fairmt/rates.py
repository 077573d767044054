"""FairMT's disparities: running sums per group for all tasks at once, psi from them, and its slope in closed form.

Every classification column (a binary task, a label, a class one-vs-rest) contributes two *badness* columns,
``(1 - p) 1[y=1]`` and ``p 1[y=0]``, whose group means are 1 - TPR and FPR; a regression task contributes its error, or the
five moments that make CCC. So one matrix product with the group membership gives every rate of every task and attribute,
lifting them is one formula whose slope is known, without an autograd graph: a dozen small tensors, no loop.

Shapes: B examples, A attributes, G groups (the most of any attribute), K classification columns, E error columns,
M = 2K + E (or more moments an error column) summed columns, Q = K + E columns of psi, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.tasks import Binary, Task

TINY = 1e-12
MOMENTS = {"squared": 1, "absolute": 1, "ccc": 5}
"""Summed columns of a regression task: its error, or what CCC is made of."""


@dataclass(frozen=True)
class Lift:
    """How disparities are measured; fields as in :class:`~libmtl_fair.methods.fairmt.fairmt.FairMTSettings`."""

    symmetric: bool = False
    normalise: bool = True
    reference: str = "max"
    min_count: float = 10
    error: str = "squared"
    fpr_weight: float = 1.0
    sharpness: float = 1.0

    @property
    def moments(self) -> int:
        """Summed columns of a regression task; a confidence bound of an error also needs its square."""
        return MOMENTS[self.error] + (self.error != "ccc" and self.reference == "lcb")


class Layout:
    """Which columns belong to which task.

    Parameters
    ----------
    tasks : in order of psi.
    widths : classification columns of each task, 0 for regression.
    n_groups : number of groups of each attribute, in order.
    blocks : tasks that share a batch: one block with all tasks, or one a task with ``multi_input``.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        widths: Sequence[int],
        n_groups: Sequence[int],
        blocks: Sequence[Sequence[int]],
        lift: Lift,
        device: torch.device,
    ) -> None:
        self.tasks, self.widths, self.blocks, self.lift = list(tasks), list(widths), [list(b) for b in blocks], lift
        self.n_attributes, self.n_groups = len(n_groups), max(n_groups)
        self.moments = lift.moments
        self.n_rates, self.n_errors = sum(widths), sum(w == 0 for w in widths)
        self.ids = torch.arange(self.n_groups, device=device)
        owner = [t for t, w in enumerate(widths) for _ in range(w)] + [t for t, w in enumerate(widths) if not w]
        self.one_column_each = owner == list(range(len(tasks)))
        self.simple = self.one_column_each and not self.n_errors and self.n_attributes == 1
        self.single_logits = all(isinstance(task, Binary) for task in tasks)
        self.owner = torch.nn.functional.one_hot(torch.tensor(owner), len(tasks)).to(device, torch.get_default_dtype())
        self.parts = torch.ones(2 * self.n_rates, device=device, dtype=self.owner.dtype)
        self.parts[self.n_rates :] = lift.fpr_weight
        self.columns = self._columns(device)
        self.order = torch.cat(self.columns).argsort() if len(self.blocks) > 1 else None

    @property
    def n_summed(self) -> int:
        """M, the number of summed columns."""
        return 2 * self.n_rates + self.moments * self.n_errors

    def _columns(self, device: torch.device) -> list[Tensor]:
        """Where each block's columns (positives, negatives, errors) lie among all."""
        first, error, start, errors = [], [], 0, 2 * self.n_rates
        for width in self.widths:
            first.append(start)
            error.append(errors)
            start, errors = start + width, errors + (0 if width else self.moments)
        found = []
        for block in self.blocks:
            rates = [first[t] + c for t in block for c in range(self.widths[t])]
            wrong = [error[t] + c for t in block if not self.widths[t] for c in range(self.moments)]
            found.append(torch.tensor(rates + [r + self.n_rates for r in rates] + wrong, device=device))
        return found

    def membership(self, groups: Mapping[str, Tensor], attributes: Sequence[str], crossed: Sequence[int]) -> Tensor:
        """Return which group of which attribute an example is in, [B, A * G]; ``crossed`` intersects the attributes."""
        chosen = [groups[name] for name in attributes]
        if crossed:
            chosen = [F.cross_groups(chosen, crossed)[0]]
        ids = chosen[0].unsqueeze(1) if len(chosen) == 1 else torch.stack(chosen, 1)
        return (ids.unsqueeze(-1) == self.ids).to(self.owner.dtype).flatten(1)

    def by_group(self, flat: Tensor) -> Tensor:
        """View [A * G, ...] as [A, G, ...]."""
        return flat.view(self.n_attributes, self.n_groups, -1)


@dataclass
class Disparity:
    """What one step's rates say.

    Attributes
    ----------
    psi : [T], 0 where absent.
    present : bool [T].
    """

    psi: Tensor
    present: Tensor
    _layout: Layout
    _slope: Tensor
    _column_present: Tensor | None = None
    _share: Tensor | None = None

    def slope(self, weights: Tensor, divisor: Tensor) -> Tensor:
        """Return the gradient of ``weights . psi`` [T] to every summed example value, by group: [A * G, M].

        ``divisor`` [A * G, M] are the counts that a mean divides by: the running ones, or the batch's own. ``weights`` are 0
        where a task is absent.
        """
        layout = self._layout
        if self._share is None or self._column_present is None:
            return (self._slope * weights.repeat(2)).flatten(0, 1) / _above_zero(divisor)
        column = weights * self._share  # [A, T]
        if not layout.one_column_each:
            column = (column @ layout.owner.T) * self._column_present
        k = layout.n_rates
        errors = column[:, k:]
        if layout.moments > 1 and layout.n_errors:
            errors = errors.repeat_interleave(layout.moments, 1)
        per_column = torch.cat([column[:, :k], column[:, :k], errors], 1)
        return (self._slope * per_column.unsqueeze(1)).flatten(0, 1) / _above_zero(divisor)


def disparity(layout: Layout, sums: Tensor, counts: Tensor) -> Disparity:
    """Return psi of every task from sums and counts [A * G, M] (methods.md, 2.1)."""
    count = layout.by_group(counts)
    means = layout.by_group(sums / _above_zero(counts))
    k = 2 * layout.n_rates
    rates, number = (means[..., :k], count[..., :k]) if layout.n_errors else (means, count)
    part, enough, slope = _rates(layout, rates, number)
    if layout.lift.fpr_weight != 1:
        part, enough, slope = part * layout.parts, enough & (layout.parts > 0), slope * layout.parts
    if layout.simple:
        halves = layout.n_rates
        psi, present = part[0].view(2, halves).sum(0), enough[0].view(2, halves).any(0)
        return Disparity(psi, present, layout, slope)
    if layout.n_errors:
        wrong, present, steep = _errors(layout, means[..., k:], count[..., k:])
        part, enough, slope = torch.cat([part, wrong], 1), torch.cat([enough, present], 1), torch.cat([slope, steep], 2)
    return _by_task(layout, part, enough, slope)


def _above_zero(count: Tensor) -> Tensor:
    return count.clamp(min=TINY)


def _rates(layout: Layout, rates: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (psi [A, 2K], present [A, 2K], slope [A, G, 2K]) of the badness rates, as ``F.aeod_from_rates`` does."""
    lift = layout.lift
    known = count >= lift.min_count
    observed = known.sum(1)
    enough = observed >= 2
    low = torch.where(known, rates, torch.inf)
    if lift.symmetric:
        part, slope = _range(rates.masked_fill(~known, -torch.inf), low, known)
        return part.where(enough, 0.0), enough, slope.where(enough.unsqueeze(1), 0.0)
    if lift.reference == "lcb":
        bound = torch.where(known, F.wilson_interval(rates, count)[1], torch.inf)
        best = low.gather(1, bound.argmin(1, keepdim=True))
    else:
        best = low.amin(1, keepdim=True)
    hinge = torch.where(known, rates - best, 0.0).relu()  # with one group known it is the best, with none all is masked
    part, slope = hinge.sum(1), hinge > 0
    if lift.normalise and layout.n_groups > 2:
        scale = 1 / (observed - 1).clamp(min=1)
        return part * scale, enough, slope * scale.unsqueeze(1)
    return part, enough, slope


def _range(high: Tensor, low: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Largest minus smallest; groups that tie share the slope, as autograd's amax has it."""
    most, least = high.amax(1, keepdim=True), low.amin(1, keepdim=True)
    top, bottom = (high == most) & known, (low == least) & known
    slope = top / top.sum(1, keepdim=True).clamp(min=1) - bottom / bottom.sum(1, keepdim=True).clamp(min=1)
    return (most - least).squeeze(1), slope


def _errors(layout: Layout, means: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (psi [A, E], present [A, E], slope [A, G, E * moments]) of regression errors; slopes are to the means."""
    lift, m = layout.lift, layout.moments
    leaf = means.detach().requires_grad_()
    number = count[..., ::m].transpose(1, 2)
    options: dict[str, Any] = {
        "symmetric": lift.symmetric,
        "normalise": lift.normalise,
        "reference": lift.reference,
        "min_count": lift.min_count,
    }
    with torch.enable_grad():
        moments = leaf.view(*leaf.shape[:2], -1, m).transpose(1, 2)  # [A, E, G, m]
        if lift.error == "ccc":
            per_group = torch.cat([torch.ones_like(moments[..., :1]), moments], -1)
            lack, _ = F.ccc_lack_from_sums(per_group.reshape(-1, m + 1))
            psi, present = F.aep_ccc_from_lack(lack.view(moments.shape[:-1]), number, **options)
        else:
            square = moments[..., 1] if m > 1 else None
            psi, present = F.aep_from_means(moments[..., 0], number, square, **options)
        (slope,) = torch.autograd.grad(psi.sum(), leaf)
    return psi.detach(), present, slope


def _by_task(layout: Layout, part: Tensor, enough: Tensor, slope: Tensor) -> Disparity:
    """Add up each column's parts; mean over a task's columns, then over attributes."""
    k = layout.n_rates
    column, seen = part[:, k:], enough[:, k:]
    if k and layout.n_errors:
        column = torch.cat([part[:, :k] + part[:, k : 2 * k], part[:, 2 * k :]], 1)
        seen = torch.cat([enough[:, :k] | enough[:, k : 2 * k], enough[:, 2 * k :]], 1)
    elif k:
        column, seen = part[:, :k] + column, enough[:, :k] | seen
    here = seen.to(column.dtype)
    value, number = column, here
    if not layout.one_column_each:
        value, number = (column * here) @ layout.owner, here @ layout.owner
        value = value / number.clamp(min=1)
    there = (number > 0).to(column.dtype)
    attributes = there.sum(0)
    psi = (value * there).sum(0) / attributes.clamp(min=1)
    share = there / (number.clamp(min=1) * attributes.clamp(min=1))
    return Disparity(psi, attributes > 0, layout, slope, here, share)
