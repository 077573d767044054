"""Statistics per sensitive group and cell, and disparities between groups (GLF, GLD, bounded group loss, gaps, robust log loss).

Group ids are 0..G-1, -1 is unknown; a statistic over an empty set is absent, never 0 and never NaN. Disparities take
[..., G] and carry their derivative written out, checked against autograd: on the few numbers that a step compares, recording
each operation would cost more than the operations. They are differentiable once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.functional._device import has_values, widest
from libmtl_fair.functional.quantiles import sorted_quantiles

_DENSE_GROUPS = 64
"""Up to so many groups a one-hot product is the cheapest sum by group; beyond, scattered addition is."""


def group_indicator(groups: Tensor, n_groups: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One-hot membership [..., B, G] of group ids [..., B]; the row of an unknown group is zero.

    >>> group_indicator(torch.tensor([1, -1]), 2)
    tensor([[0., 1.],
            [0., 0.]])
    """
    return (groups.unsqueeze(-1) == torch.arange(n_groups, device=groups.device)).to(dtype)


def group_sums(values: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """Sum ``values`` [..., B] or [..., B, K] by group: [..., G] or [..., G, K]. NaN counts as 0; unknown groups drop out.

    >>> group_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 1, -1]), 2)
    tensor([0., 3.])
    """
    if values.dim() == groups.dim():
        return group_sums(values.unsqueeze(-1), groups, n_groups).squeeze(-1)
    if not values.is_floating_point():
        values = values.to(torch.get_default_dtype())
    values = values.where(~values.isnan(), 0.0)
    if n_groups <= _DENSE_GROUPS:
        return group_indicator(groups, n_groups, values.dtype).mT @ values
    known = groups.where((groups >= 0) & (groups < n_groups), n_groups).long()
    sums = values.new_zeros((*values.shape[:-2], n_groups + 1, values.shape[-1]))
    return sums.scatter_add(-2, known.unsqueeze(-1).expand_as(values), values)[..., :n_groups, :]


def group_mean(values: Tensor, groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and count of ``values`` by group, shaped as :func:`group_sums`; the mean is 0 where the count is 0. NaN is unobserved.

    >>> group_mean(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 1, -1]), 2)
    (tensor([0.0000, 1.5000]), tensor([0., 2.]))
    """
    if not values.is_floating_point():
        values = values.to(torch.get_default_dtype())
    count = group_sums((~values.isnan()).to(values.dtype), groups, n_groups)
    return group_sums(values, groups, n_groups) / count.clamp(min=1), count


def cell_means(values: Tensor, condition: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and count [..., K, G] of ``values`` in each cell, the rows that meet a condition and are of a group; 0 in an empty one.

    Parameters
    ----------
    values, condition : [..., B, K], or [..., B, 1] for all K
        The condition is 0 or 1; a value that does not count must be finite.
    member : [..., B, G]
        0 or 1: see :func:`group_indicator`.

    >>> one = torch.tensor([[1.0], [1.0], [0.0]])
    >>> cell_means(torch.tensor([[1.0], [2.0], [4.0]]), one, group_indicator(torch.tensor([1, 1, 0]), 2))
    (tensor([[0.0000, 1.5000]]), tensor([[0., 2.]]))
    """
    count = condition.mT @ member
    return (condition * values).mT @ member / count.clamp(min=1), count


def cross_groups(groups: Sequence[Tensor], n_groups: Sequence[int]) -> tuple[Tensor, int]:
    """Cross several attributes into one of intersections: ids [..., B] (-1 if any is unknown) and their number.

    The id is row-major: the last attribute changes fastest.

    Raises
    ------
    DataError
        If there is no attribute, or not one number of groups for each.

    >>> cross_groups([torch.tensor([0, 1, 1]), torch.tensor([2, 0, -1])], [2, 3])
    (tensor([ 2,  3, -1]), 6)
    """
    if not groups or len(groups) != len(n_groups):
        raise DataError(
            f"cross_groups: expected one number of groups per attribute, found {len(groups)} and {len(n_groups)}."
        )
    crossed = torch.zeros_like(groups[0], dtype=torch.int64)
    known = torch.ones_like(groups[0], dtype=torch.bool)
    total = 1
    for ids, size in zip(groups, n_groups, strict=True):
        crossed = crossed * size + ids
        known = known & (ids >= 0) & (ids < size)
        total *= size
    return crossed.where(known, -1), total


# -- disparities ------------------------------------------------------------------------------------------------------

_Formula = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Value [..., 1] and slope [..., G] from numbers [..., G], whether they are there, and how many are [..., 1]."""


class _WrittenOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, present: Tensor, formula: _Formula) -> Tensor:
        value, slope = _of_two(formula, values, present)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        return outer.unsqueeze(-1) * ctx.saved_tensors[0], None, None


def _of_two(formula: _Formula, values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Value [...] and slope [..., G] of a formula; 0 with fewer than two groups."""
    count = present.to(values.dtype).sum(-1, keepdim=True)
    value, slope = formula(values, present, count)
    few = count < 2
    return value.masked_fill(few, 0.0).squeeze(-1), slope.masked_fill(few, 0.0)


def _disparity(formula: _Formula, values: Tensor, present: Tensor) -> Tensor:
    if not has_values(values):  # a transform of torch.func needs the graph
        return _of_two(formula, values, present)[0]
    value: Tensor = _WrittenOut.apply(values, present, formula)  # type: ignore[no-untyped-call]
    return value


def spread(values: Tensor, present: Tensor) -> Tensor:
    """Largest minus smallest of ``values`` [..., G] where ``present``; 0 with fewer than two, gradient to both sides.

    >>> spread(torch.tensor([0.2, 0.7, 9.0]), torch.tensor([True, True, False]))
    tensor(0.5000)
    """
    return _disparity(_spread, values, present)


def glf(group_losses: Tensor, present: Tensor) -> Tensor:
    """Group loss fairness of ``group_losses`` [..., G]: ``|L_1 - L_2|`` for two present groups, else ``1 - Jain``.

    0 with zero gradient for fewer than two present groups, and where all losses are 0. Source: GLF.

    >>> glf(torch.tensor([0.5, 0.2, 0.0]), torch.tensor([True, True, False]))
    tensor(0.3000)
    >>> glf(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([True, True, True]))
    tensor(0.6667)
    """
    return _disparity(_spread if group_losses.shape[-1] == 2 else _glf, group_losses, present)


def gld(group_losses: Tensor, present: Tensor) -> Tensor:
    """Group loss divergence ``exp(KL(P || U)) - 1`` of ``group_losses`` [..., G], ``P = softmax(-L)`` over present groups.

    In [0, n - 1]; 0 with zero gradient for fewer than two present groups. Source: GLD.

    >>> gld(torch.tensor([0.3, 0.3]), torch.tensor([True, True]))
    tensor(0.)
    """
    return _disparity(_gld, group_losses, present)


def bounded_group_loss(group_losses: Tensor, present: Tensor) -> Tensor:
    """Worst group loss ``max_g L_g`` of ``group_losses`` [..., G]; 0 with zero gradient for fewer than two present groups.

    >>> bounded_group_loss(torch.tensor([0.5, 0.2]), torch.tensor([True, True]))
    tensor(0.5000)
    """
    return _disparity(_worst, group_losses, present)


def _worst(v: Tensor, present: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    there = v.masked_fill(~present, -torch.inf)
    top = there.amax(-1, keepdim=True)
    share = (there == top).to(v.dtype)  # those that attain an extreme share its gradient, as in torch
    return top, share / share.sum(-1, keepdim=True)


def _spread(v: Tensor, present: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    if v.shape[-1] == 2:
        gap = v[..., 1:] - v[..., :1]
        up = gap.sign()
        return gap.abs(), torch.cat([-up, up], -1)
    (high, up), (low, down) = _worst(v, present, count), _worst(-v, present, count)
    return high + low, up - down


def _unfairness(v: Tensor, present: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """``1 - Jain``, as the share of the squares that lies off the mean: never negative, free of scale and overflow."""
    v = v.where(present, 0.0)
    scale = v.detach().abs().amax(-1, keepdim=True)
    scale = scale.where(scale != 0, 1.0)
    unit = v / scale
    off = (unit - unit.sum(-1, keepdim=True) / count).where(present, 0.0)
    square = unit.square().sum(-1, keepdim=True)
    square = square.where(square != 0, 1.0)
    unfair = off.square().sum(-1, keepdim=True) / square
    return unfair, 2 * (off - unit * unfair) / (square * scale)


def _glf(v: Tensor, present: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    pairs = zip(_spread(v, present, count), _unfairness(v, present, count))
    value, slope = (of_two.where(count == 2, of_many) for of_two, of_many in pairs)
    return value, slope


def _gld(v: Tensor, present: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (-v).masked_fill(~present, -torch.inf).log_softmax(-1)
    p, log_p = log_p.exp(), log_p.masked_fill(~present, 0.0)
    inner = (p * log_p).sum(-1, keepdim=True)
    divergence = inner + count.log()
    value = (divergence - divergence.detach().clamp(max=0)).expm1()  # rounding goes below 0
    return value, (1 + value) * p * (inner - log_p)


# -- losses and rates within classes ----------------------------------------------------------------------------------


def robust_log_loss(losses: Tensor, labels: Tensor, groups: Tensor, n_groups: int, n_classes: int = 2) -> Tensor:
    """Robust log loss ``sum over y of max_g L | y, g`` over present cells, from per-example losses [..., B]; 0 without any.

    A label outside 0..n_classes-1 (NaN, -100) and a loss that is NaN are missing; for regression pass :func:`quantile_bins` of the
    target as labels **(ours)**. Source: Rezaei et al., AAAI 2020, as FairBranch uses it.

    >>> robust_log_loss(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2)
    tensor(7.)
    """
    classes, member = (group_indicator(*ids, losses.dtype) for ids in ((labels, n_classes), (groups, n_groups)))
    seen = ~losses.isnan().unsqueeze(-1)
    mean, count = cell_means(losses.unsqueeze(-1).where(seen, 0.0), classes * seen, member)
    worst = mean.masked_fill(count == 0, -torch.inf).amax(-1)
    return worst.where((count > 0).any(-1), 0.0).sum(-1)


def quantile_bins(target: Tensor, n_bins: int = 4) -> Tensor:
    """Bin a regression target [..., B] at its own quantiles: ids 0..n_bins-1, -1 where the target is not finite.

    Equal targets share a bin, so bins may be empty. No gradient. Ours.

    Raises
    ------
    RecipeError
        If ``n_bins`` is below 1.

    >>> quantile_bins(torch.tensor([5.0, 1.0, torch.nan, 3.0, 4.0]), 2)
    tensor([ 1,  0, -1,  0,  1])
    """
    if n_bins < 1:
        raise RecipeError(f"quantile_bins: n_bins must be at least 1, found {n_bins}.")
    target = target.detach()
    target = target if target.is_floating_point() else target.to(torch.get_default_dtype())
    observed = target.isfinite()
    ordered = target.masked_fill(~observed, torch.inf).sort(-1).values
    fractions = torch.arange(1, n_bins, device=target.device) / n_bins
    edges = sorted_quantiles(ordered, observed.sum(-1, keepdim=True), fractions)
    return torch.searchsorted(edges.contiguous(), target.contiguous(), right=True).where(observed, -1)


def base_rate_threshold(logits: Tensor, labels: Tensor) -> Tensor:
    """Threshold [..., K] above which as many rows of ``logits`` [..., B, K] lie as are positive in ``labels``. No gradient.

    Labels are [..., B, K] (or [..., B] for one column); those other than 0 and 1 are missing; 0 where all of a column are. Ours.

    >>> base_rate_threshold(torch.tensor([[1.0], [2.0], [3.0], [4.0], [9.0]]), torch.tensor([0.0, 1, 0, 0, torch.nan]))
    tensor([3.2500])
    """
    truth = labels.reshape(logits.shape)
    positive = truth == 1
    seen = (truth == 0) | positive
    count = seen.sum(-2).unsqueeze(-1)
    rate = positive.sum(-2).unsqueeze(-1).to(widest(logits.device)) / count.clamp(min=1)
    ordered = logits.detach().masked_fill(~seen, torch.inf).mT.sort(-1).values
    return sorted_quantiles(ordered, count, 1 - rate).squeeze(-1)


def soft_rates(scores: Tensor, labels: Tensor, groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Soft rates of each group: (tpr, fpr, n_pos, n_neg), each [..., G], or [..., G, C] for scores and labels [..., B, C].

    ``TPR_g = sum s 1[y=1, g] / sum 1[y=1, g]``, FPR_g likewise on y = 0; a rate is 0 where its count is 0. Labels other than 0
    and 1 and scores that are NaN are missing. Source: FairMT.

    >>> soft_rates(torch.tensor([0.8, 0.4, 0.1]), torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0]), 1)
    (tensor([0.6000]), tensor([0.1000]), tensor([2.]), tensor([1.]))
    """
    tpr, n_pos = group_mean(scores.where(labels == 1, torch.nan), groups, n_groups)
    fpr, n_neg = group_mean(scores.where(labels == 0, torch.nan), groups, n_groups)
    return tpr, fpr, n_pos, n_neg
