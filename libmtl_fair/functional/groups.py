"""Statistics per sensitive group and cell, and disparities between groups (GLF, GLD, bounded group loss, gaps, robust log loss).

Group ids are 0..G-1, -1 is unknown; a statistic over an empty set is absent, never 0 and never NaN. Nothing is read back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.functional._device import widest
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
    values, condition : Tensor [..., B, K], or [..., B, 1] for all K
        The condition is 0 or 1; a value that does not count must be finite.
    member : Tensor [..., B, G]
        0 or 1: see :func:`group_indicator`.

    Examples
    --------
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

    Examples
    --------
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


def spread(values: Tensor, present: Tensor) -> Tensor:
    """Largest minus smallest of ``values`` [..., G] where ``present``; 0 with fewer than two, gradient to both sides.

    >>> spread(torch.tensor([0.2, 0.7, 9.0]), torch.tensor([True, True, False]))
    tensor(0.5000)
    """
    absent = ~present
    if values.shape[-1] == 2:
        first, second = values.masked_fill(absent, 0.0).unbind(-1)
        return (first - second).abs().masked_fill(absent.any(-1), 0.0)
    gap = values.masked_fill(absent, -torch.inf).amax(-1) - values.masked_fill(absent, torch.inf).amin(-1)
    return gap.masked_fill(present.sum(-1) < 2, 0.0)


def norm_violation(rates: Tensor, count: Tensor) -> Tensor:
    """Sum over groups of ``|rate_g / overall rate - 1|`` for ``rates`` [..., G] of ``count`` [..., G] examples; absent where 0.

    The overall rate is that of all groups together, with its gradient. 0 with zero gradient for fewer than two present groups, and
    where the overall rate is 0. Source: the norm violation (p = 1) of a linear-fractional statistic, Buyl et al., ICLR 2024.

    >>> norm_violation(torch.tensor([0.3, 0.1]), torch.tensor([1.0, 1.0]))
    tensor(1.)
    """
    present = count > 0
    overall = (rates * count).sum(-1, keepdim=True) / count.sum(-1, keepdim=True).clamp(min=1)
    defined = (present.sum(-1, keepdim=True) >= 2) & (overall.detach() != 0)
    ratio = rates / overall.where(defined, 1.0)
    return (ratio - 1).abs().masked_fill(~(present & defined), 0.0).sum(-1)


def shortfall(values: Tensor, present: Tensor) -> Tensor:
    """What ``values`` [..., G] lack to the best group, on average over the other present groups; the best is held fixed.

    0 with zero gradient with fewer than two present groups; of two groups it is :func:`spread` with a gradient to the one behind
    only. Source: FairMT's lift-only disparity, normalised by groups **(ours)**.

    >>> shortfall(torch.tensor([0.2, 0.7, 9.0]), torch.tensor([True, True, False]))
    tensor(0.5000)
    """
    best = values.detach().masked_fill(~present, -torch.inf).amax(-1, keepdim=True)
    behind = (best - values).masked_fill(~present, 0.0).relu().sum(-1)
    count = present.sum(-1)
    return behind.masked_fill(count < 2, 0.0) / (count - 1).clamp(min=1)


def glf(group_losses: Tensor, present: Tensor) -> Tensor:
    """Group loss fairness of ``group_losses`` [..., G]: ``|L_1 - L_2|`` for an attribute of two groups, else ``1 - Jain``.

    Jain's index over the n present groups is ``(sum L)^2 / (n sum L^2)``. G decides, not how many groups a batch happens to hold:
    the two formulas are on different scales. 0 with zero gradient for fewer than two present groups, and where all losses
    are 0. Source: GLF.

    >>> glf(torch.tensor([0.5, 0.2]), torch.tensor([True, True]))
    tensor(0.3000)
    >>> glf(torch.tensor([0.5, 0.2, 0.0]), torch.tensor([True, True, False]))
    tensor(0.1552)
    >>> glf(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([True, True, True]))
    tensor(0.6667)
    """
    if group_losses.shape[-1] == 2:
        return spread(group_losses, present)
    count = present.sum(-1, keepdim=True)
    known = group_losses.masked_fill(~present, 0.0)
    scale = known.detach().abs().amax(-1, keepdim=True)
    unit = known / scale.masked_fill(scale == 0, 1.0)
    # 1 - Jain as the share of the squares that lies off the mean: never negative, free of scale and overflow
    off = (unit - unit.sum(-1, keepdim=True) / count.clamp(min=1)).masked_fill(~present, 0.0).square().sum(-1)
    square = unit.square().sum(-1)
    found = off / square.masked_fill(square == 0, 1.0)
    return found.masked_fill(count.squeeze(-1) < 2, 0.0)


def gld(group_losses: Tensor, present: Tensor) -> Tensor:
    """Group loss divergence ``exp(KL(P || U)) - 1`` of ``group_losses`` [..., G], ``P = softmax(-L)`` over present groups.

    In [0, n - 1]; 0 with zero gradient for fewer than two present groups. Source: GLD.

    >>> gld(torch.tensor([0.3, 0.3]), torch.tensor([True, True]))
    tensor(0.)
    """
    count = present.sum(-1)
    used = present | (count < 2).unsqueeze(-1)  # an empty softmax is NaN, and so is its gradient
    losses = group_losses.masked_fill(~present, 0.0)
    log_p = (-losses).masked_fill(~used, -torch.inf).log_softmax(-1).masked_fill(~used, 0.0)
    p = log_p.exp().masked_fill(~used, 0.0)
    divergence = (p * log_p).sum(-1) + count.clamp(min=1).to(losses.dtype).log()
    return (divergence - divergence.detach().clamp(max=0)).expm1().masked_fill(count < 2, 0.0)  # rounding goes below 0


def bounded_group_loss(group_losses: Tensor, present: Tensor) -> Tensor:
    """Worst group loss ``max_g L_g`` of ``group_losses`` [..., G]; 0 with zero gradient for fewer than two present groups.

    >>> bounded_group_loss(torch.tensor([0.5, 0.2]), torch.tensor([True, True]))
    tensor(0.5000)
    """
    return group_losses.masked_fill(~present, -torch.inf).amax(-1).masked_fill(present.sum(-1) < 2, 0.0)


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

    Examples
    --------
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
