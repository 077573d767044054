"""The gap between near people as a term of a step (METHODS.md, 1.4; ours): of ReLiF, and a further constraint of FairMT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.batch import FairBatch, joined
from libmtl_fair.functional.near import near_price
from libmtl_fair.methods.base import Written

PRICE = 0.14
"""Where no lambda is given: a hundredth less of R is paid with so many hundredths of AUC, times closeness (ours)."""
ENOUGH = 0.25
"""R from which ReLiF pays the whole price; less of it is worth less (ours)."""
REFERENCE = (
    "give the loader one: ResidentLoader(..., reference=features), [N, r] and without sensitive attributes; load_table, "
    "load_dataset, recipes and estimators do so themselves where inputs are columns of which one at least tells no sensitive "
    "attribute, and not where they are read from files"
)


def near_term(
    batch: FairBatch,
    lam: float | None,
    strength: Callable[[Tensor, Tensor], Tensor],
    flip: float = 0.0,
    enough: float | None = None,
) -> tuple[Written, dict[str, Tensor]]:
    """Return the gradient of lambda times the sum over tasks of near people's gaps, and what a step records of it.

    ``strength`` gives lambda, or the price of consistency where ``lam`` is None, from the mean of R over tasks and whether there is
    one. ``flip`` is the weight of the gaps between people and their flip twins. Below ``enough`` of R a task's price falls with R.
    """
    found, near, twins, prices, flipped = [], [], [], [], []
    for column in _columns(batch):
        rows, shares = column.values.detach().mT, column.shares
        gaps = F.near_gaps(rows, column.near.others, logits=column.logits)
        weight = torch.where(gaps.present, shares, 0) if shares is not None else gaps.present.to(rows.dtype)
        if shares is not None:
            weight = weight / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
        near.append((column.values, gaps.slope.mul_(weight.unsqueeze(-1)).mT))
        found.append(torch.stack([gaps.value * weight, weight]))
        if lam is None:
            close, logits = column.near.closeness, column.logits
            price = near_price(rows, close, logits=logits) if column.measured else close.expand(len(rows))
            prices.append(price if enough is None else price * (gaps.value / enough).clamp(max=1))
        if flip and column.twins is not None:
            moved = F.flip_gaps(rows, column.twins.detach().mT, logits=column.logits)
            flipped.append((moved.value * weight).sum())
            weight = (flip * weight).unsqueeze(-1)
            twins += [(column.values, (moved.slope * weight).mT), (column.twins, (moved.slope_twins * weight).mT)]
    value, present = torch.cat(found, 1).sum(1)
    inconsistency = value / present
    used = strength(inconsistency, present > 0)
    own = [(used * price).to(used.dtype) for price in prices] or [used] * len(near)
    trace = {"lambda": torch.cat(own).mean() if prices else used, "inconsistency": inconsistency}
    if flipped:
        trace["flip_gap"] = torch.stack(flipped).sum() / present
    return Written([(values, slope.mul_(each)) for (values, slope), each in zip(near, own)] + twins), trace


class _Column(NamedTuple):
    """Values [B, n] of the step's graph whose near gaps are taken together, and their flip twins' where there are any.

    ``logits``: whether they are log-odds; ``shares``: what each column's gap counts, None where each is a task; ``measured``: whether
    they have the unit of the task's labels, so that what utility is worth of the loss can be told from them.
    """

    values: Tensor
    logits: bool
    shares: Tensor | None
    near: F.Near
    twins: Tensor | None
    measured: bool = True


def _columns(batch: FairBatch) -> Iterator[_Column]:
    """Yield all binary tasks as one, or each task by itself: the classes by their mean probability, labels alike."""
    if batch.matrices is not None:
        twins = None if batch.twins is None else joined(batch.twins, batch.main)
        yield _Column(batch.matrices.logits, True, None, batch.near[batch.main[0]], twins)
        return
    for name in batch.main:
        task = batch.task(name)
        if task.summed:  # a map has no one value: its score, which is not yet squashed
            raw = task.raw_score(batch.outputs[name], batch.labels[name], batch.features.get(name))
            yield _Column(raw.unsqueeze(1), False, raw.new_ones(1), batch.near[name], None, False)
            continue
        values, twins = (
            None if outputs is None else _wide(task.log_odds(outputs[name])) for outputs in (batch.outputs, batch.twins)
        )
        assert values is not None
        shares = torch.sigmoid(values.detach()).mean(0) if task.kind == "multiclass" else torch.ones_like(values[0])
        yield _Column(values, task.kind != "regression", shares, batch.near[name], twins)


def _wide(values: Tensor) -> Tensor:
    return values.unsqueeze(1) if values.dim() == 1 else values
