"""Statistics per sensitive group, and disparities of group losses (GLF, GLD, robust log loss; soft rates).

Group ids are 0..G-1, -1 is unknown; a statistic over an empty set is absent, never 0 and never NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.functional.margins import sorted_quantiles

_DENSE_GROUPS = 64
"""Up to so many groups a one-hot product is the cheapest sum by group; beyond, scattered addition is."""


def group_indicator(groups: Tensor, n_groups: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One-hot membership [B, G] of group ids [B]; the row of an unknown group is zero.

    >>> group_indicator(torch.tensor([1, -1]), 2)
    tensor([[0., 1.],
            [0., 0.]])
    """
    return (groups.unsqueeze(-1) == torch.arange(n_groups, device=groups.device)).to(dtype)


def group_sums(values: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """Sum ``values`` [B] or [B, K] by group: [G] or [G, K]. NaN counts as 0; rows of unknown groups drop out.

    >>> group_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 1, -1]), 2)
    tensor([0., 3.])
    """
    if not values.is_floating_point():
        values = values.to(torch.get_default_dtype())
    values = values.where(~values.isnan(), 0.0)
    if n_groups <= _DENSE_GROUPS:
        return group_indicator(groups, n_groups, values.dtype).T @ values
    known = groups.where((groups >= 0) & (groups < n_groups), n_groups).long()
    sums = values.new_zeros((n_groups + 1, *values.shape[1:]))
    return sums.index_add(0, known, values)[:n_groups]


def group_mean(values: Tensor, groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Mean [G] and count [G] of ``values`` [B] by group; the mean is 0 where the count is 0. NaN values are unobserved.

    >>> group_mean(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 1, -1]), 2)
    (tensor([0.0000, 1.5000]), tensor([0., 2.]))
    """
    if not values.is_floating_point():
        values = values.to(torch.get_default_dtype())
    observed = (~values.isnan()).to(values.dtype)
    total, count = group_sums(torch.stack([values, observed], dim=1), groups, n_groups).unbind(1)
    return total / count.clamp(min=1), count


def cross_groups(groups: Sequence[Tensor], n_groups: Sequence[int]) -> tuple[Tensor, int]:
    """Cross several attributes into one of intersections: ids [B] (-1 if any is unknown) and their number.

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


def spread(values: Tensor, present: Tensor) -> Tensor:
    """Largest minus smallest of ``values`` [..., G] where ``present``; 0 with fewer than two, gradient to both sides.

    >>> spread(torch.tensor([0.2, 0.7, 9.0]), torch.tensor([True, True, False]))
    tensor(0.5000)
    """
    high = values.masked_fill(~present, -torch.inf).amax(-1)
    low = values.masked_fill(~present, torch.inf).amin(-1)
    return (high - low).where(present.sum(-1) >= 2, 0.0)


def jain_index(values: Tensor, present: Tensor) -> Tensor:
    """Jain's fairness index ``(sum v)^2 / (n sum v^2)`` of ``values`` [..., G] where ``present``, in [1/n, 1].

    1 where all present values are 0 or none is present.

    >>> jain_index(torch.tensor([1.0, 0.0]), torch.tensor([True, True]))
    tensor(0.5000)
    """
    return 1 - _unfairness(values, present)


def glf(group_losses: Tensor, present: Tensor) -> Tensor:
    """Group loss fairness of ``group_losses`` [..., G]: ``|L_1 - L_2|`` for two present groups, else ``1 - Jain``.

    0 with zero gradient for fewer than two present groups, and where all losses are 0. Source: GLF.

    >>> glf(torch.tensor([0.5, 0.2, 0.0]), torch.tensor([True, True, False]))
    tensor(0.3000)
    >>> glf(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([True, True, True]))
    tensor(0.6667)
    """
    count = present.sum(-1)
    many = _unfairness(group_losses, present).where(count > 2, 0.0)
    return spread(group_losses, present).where(count == 2, many)


def gld(group_losses: Tensor, present: Tensor) -> Tensor:
    """Group loss divergence ``exp(KL(P || U)) - 1`` of ``group_losses`` [..., G], ``P = softmax(-L)`` over present groups.

    In [0, n - 1]; 0 with zero gradient for fewer than two present groups. Source: GLD.

    >>> gld(torch.tensor([0.3, 0.3]), torch.tensor([True, True]))
    tensor(0.)
    """
    count = present.sum(-1)
    enough = count >= 2
    used = present | ~enough.unsqueeze(-1)  # an empty softmax is NaN, and so is its gradient
    losses = group_losses.where(present, 0.0)
    log_p = (-losses).masked_fill(~used, -torch.inf).log_softmax(-1).where(used, 0.0)
    divergence = (log_p.exp() * log_p).where(used, 0.0).sum(-1) + count.clamp(min=1).to(losses.dtype).log()
    divergence = divergence - divergence.detach().clamp(max=0)  # rounding below 0
    return divergence.expm1().where(enough, 0.0)


def bounded_group_loss(group_losses: Tensor, present: Tensor) -> Tensor:
    """Worst group loss ``max_g L_g`` of ``group_losses`` [..., G]; 0 with zero gradient for fewer than two present groups.

    >>> bounded_group_loss(torch.tensor([0.5, 0.2]), torch.tensor([True, True]))
    tensor(0.5000)
    """
    worst = group_losses.masked_fill(~present, -torch.inf).amax(-1)
    return worst.where(present.sum(-1) >= 2, 0.0)


def conditional_group_losses(
    losses: Tensor, labels: Tensor, groups: Tensor, n_groups: int, n_classes: int = 2
) -> tuple[Tensor, Tensor]:
    """Mean loss of each class and group: (group_losses [K, G], present [K, G]); 0 where absent.

    ``losses``, ``labels``, ``groups`` are [B]; a label outside 0..K-1 (NaN, -100) is missing. For regression pass
    :func:`quantile_bins` of the target as labels **(ours)**.

    >>> conditional_group_losses(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), torch.tensor([0, 0]), 2)[1]
    tensor([[ True, False],
            [ True, False]])
    """
    classes = labels.nan_to_num(-1.0).long() if labels.is_floating_point() else labels
    usable = (classes >= 0) & (classes < n_classes) & (groups >= 0) & (groups < n_groups)
    cell = (classes * n_groups + groups).where(usable, -1)
    mean, count = group_mean(losses, cell, n_classes * n_groups)
    return mean.view(n_classes, n_groups), count.view(n_classes, n_groups) > 0


def robust_log_loss(losses: Tensor, labels: Tensor, groups: Tensor, n_groups: int, n_classes: int = 2) -> Tensor:
    """Robust log loss ``sum over y of max_g L | y, g`` over present cells, from per-example losses [B]; 0 without any.

    Source: Rezaei et al., AAAI 2020, as FairBranch uses it.

    >>> robust_log_loss(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2)
    tensor(7.)
    """
    mean, present = conditional_group_losses(losses, labels, groups, n_groups, n_classes)
    worst = mean.masked_fill(~present, -torch.inf).amax(-1)
    return worst.where(present.any(-1), 0.0).sum()


def quantile_bins(target: Tensor, n_bins: int = 4) -> Tensor:
    """Bin a regression target [B] at its own quantiles: ids 0..n_bins-1, -1 where the target is not finite.

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
    ordered = target.masked_fill(~observed, torch.inf).sort().values
    fractions = torch.arange(1, n_bins, device=target.device) / n_bins
    edges = sorted_quantiles(ordered, observed.sum(0, keepdim=True), fractions)
    return torch.bucketize(target.contiguous(), edges, right=True).where(observed, -1)


def base_rate_threshold(logits: Tensor, labels: Tensor) -> Tensor:
    """Threshold [K] above which as many rows of ``logits`` [B, K] lie as are positive in ``labels`` [B, K] (or [B]). No gradient.

    Labels other than 0 and 1 are missing; 0 where all of a column are. Ours.

    >>> base_rate_threshold(torch.tensor([[1.0], [2.0], [3.0], [4.0], [9.0]]), torch.tensor([0.0, 1, 0, 0, torch.nan]))
    tensor([3.2500])
    """
    truth = labels.reshape(len(logits), -1)
    seen = (truth == 0) | (truth == 1)
    count = seen.sum(0).unsqueeze(-1)
    rate = (truth == 1).sum(0).unsqueeze(-1) / count.clamp(min=1)
    ordered = logits.detach().masked_fill(~seen, torch.inf).T.sort(-1).values
    return sorted_quantiles(ordered, count, 1 - rate).squeeze(-1)


def rate_sums(scores: Tensor, labels: Tensor, groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sufficient statistics of :func:`soft_rates`: sums of scores over positives and negatives, and their counts.

    ``scores`` and ``labels`` are [B] or [B, C] (a column a label, or a binary task each); all four results are [G] or [G, C].
    Labels other than 0 and 1 and scores that are NaN are missing. They add up over batches.

    >>> rate_sums(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), 1)
    (tensor([0.5000]), tensor([1.]), tensor([1.]), tensor([1.]))
    """
    seen = ~scores.isnan()
    clean = scores.where(seen, 0.0)
    positive = ((labels == 1) & seen).to(scores.dtype)
    negative = ((labels == 0) & seen).to(scores.dtype)
    columns = torch.stack([clean * positive, clean * negative, positive, negative], dim=1)
    sums = group_sums(columns.flatten(1), groups, n_groups).view(n_groups, 4, *scores.shape[1:])
    s_pos, s_neg, n_pos, n_neg = sums.unbind(1)
    return s_pos, s_neg, n_pos, n_neg


def soft_rates(scores: Tensor, labels: Tensor, groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Soft rates of each group: (tpr, fpr, n_pos, n_neg), each [G], or [G, C] for scores and labels [B, C].

    ``TPR_g = sum s 1[y=1, g] / sum 1[y=1, g]``, FPR_g likewise on y = 0; a rate is 0 where its count is 0.
    See :func:`rate_sums` for missing values. Source: FairMT.

    >>> soft_rates(torch.tensor([0.8, 0.4, 0.1]), torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0]), 1)
    (tensor([0.6000]), tensor([0.1000]), tensor([2.]), tensor([1.]))
    """
    s_pos, s_neg, n_pos, n_neg = rate_sums(scores, labels, groups, n_groups)
    return s_pos / n_pos.clamp(min=1), s_neg / n_neg.clamp(min=1), n_pos, n_neg


def demographic_parity_gap(scores: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """Largest difference between groups' mean scores [B]; 0 with zero gradient for fewer than two groups.

    >>> demographic_parity_gap(torch.tensor([0.9, 0.1, 0.3]), torch.tensor([0, 1, 1]), 2)
    tensor(0.7000)
    """
    mean, count = group_mean(scores, groups, n_groups)
    return spread(mean, count > 0)


def tpr_gap(scores: Tensor, labels: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """Largest difference between groups' soft true positive rates; 0 with zero gradient for fewer than two groups.

    Scores and labels are [B], or [B, C] for one gap a column.

    >>> tpr_gap(torch.tensor([0.9, 0.1, 0.3]), torch.tensor([1, 1, 0]), torch.tensor([0, 1, 1]), 2)
    tensor(0.8000)
    """
    tpr, _, n_pos, _ = soft_rates(scores, labels, groups, n_groups)
    return spread(tpr.movedim(0, -1), n_pos.movedim(0, -1) > 0)


def fpr_gap(scores: Tensor, labels: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """Largest difference between groups' soft false positive rates; 0 with zero gradient for fewer than two groups.

    Scores and labels are [B], or [B, C] for one gap a column.

    >>> fpr_gap(torch.tensor([0.9, 0.1, 0.3]), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]), 2)
    tensor(0.6000)
    """
    _, fpr, _, n_neg = soft_rates(scores, labels, groups, n_groups)
    return spread(fpr.movedim(0, -1), n_neg.movedim(0, -1) > 0)


def _unfairness(values: Tensor, present: Tensor) -> Tensor:
    """``1 - Jain``, as the share of the squares that lies off the mean: never negative, free of scale and overflow."""
    values = values.where(present, 0.0)
    scale = values.detach().abs().amax(-1, keepdim=True)
    values = values / scale.where(scale > 0, 1.0)
    mean = values.sum(-1, keepdim=True) / present.sum(-1, keepdim=True).clamp(min=1)
    off = (values - mean).where(present, 0.0).square().sum(-1)
    square = values.square().sum(-1)
    return (off / square.where(square > 0, 1.0)).where(square > 0, 0.0)
