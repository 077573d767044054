"""Disparity between groups of one task, psi >= 0: only the groups behind the best are lifted (FairMT, arXiv:2512.00469).

Every measure is :func:`lift` of a cost per group, made from sufficient statistics (rates or means, and counts), so that they
may come from one batch or from decayed sums over many. A measure returns its value and whether it is present (two groups to
compare); an absent value is 0 with zero gradient.
"""

from __future__ import annotations

from typing import TypedDict, Unpack

import torch
from torch import Tensor

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.functional._device import A, at_least, largest, library, with_negative
from libmtl_fair.functional.groups import group_mean, group_sums, soft_rates
from libmtl_fair.functional.quantiles import masked_mean

REFERENCES = ("max", "lcb")
_Z95 = 1.959963984540054


class LiftOptions(TypedDict, total=False):
    """How a disparity is measured.

    symmetric : bool
        The ablation: largest minus smallest cost, gradient to both sides.
    normalise : bool
        Divide the sum by (groups observed - 1) **(ours)**.
    reference : {"max", "lcb"}
        The best observed group, or the one with the best 95 % bound, so that a tiny, lucky group does not set the bar
        **(ours)**.
    min_count : float
        Groups with fewer examples are absent **(ours)**.
    """

    symmetric: bool
    normalise: bool
    reference: str
    min_count: float


def lift(
    cost: A,
    count: A,
    bound: A | None = None,
    *,
    symmetric: bool = False,
    normalise: bool = False,
    min_count: float | A = 0.0,
    smooth: float = 0.0,
) -> tuple[A, A, A]:
    """What the groups' costs exceed the best group's by, summed; the best is detached, so that only the others are moved.

    Parameters
    ----------
    cost, count : Tensor or ndarray [..., G, C]
        Cost of each group (a rate or an error) and the examples behind it, which may be fractions (decayed sums).
    bound : Tensor or ndarray [..., G, C], optional
        The best group is the one whose bound is least, in place of the one whose cost is.
    symmetric, normalise, min_count : bool = False, bool = False, float, Tensor or ndarray = 0.0
        As in :class:`LiftOptions`; a group counts where its count is positive and at least ``min_count``.
    smooth : float = 0.0
        An excess u below it counts u^2 / (2 smooth), one above it u - smooth / 2: groups that are nearly equal are hardly
        moved. Not with ``symmetric`` **(ours)**.

    Returns
    -------
    tuple of (Tensor, Tensor, Tensor) or of ndarrays
        (value [..., C], present bool [..., C], slope [..., G, C]): the slope is the value's derivative to the cost; the
        value is differentiable by autograd too.

    Examples
    --------
    >>> value, present, slope = lift(torch.tensor([[0.1], [0.6]]), torch.ones(2, 1))
    >>> value, slope.squeeze(1)
    (tensor([0.5000]), tensor([0., 1.]))
    """
    xp, fixed = library(cost), _fixed(cost)
    known = _enough(count, min_count)
    observed = known.sum(-2)
    present = observed >= 2
    low = -xp.where(known, fixed, xp.inf)
    if symmetric:
        ends, slope = (xp.where(known, fixed, -xp.inf), low), xp.zeros_like(fixed)
        for sign, end in zip((1, -1), ends):  # groups that tie share the slope, as autograd's amax has it
            at = (end == largest(end, -2)[..., None, :]) & known & present[..., None, :]
            slope += sign * at / at_least(at.sum(-2)[..., None, :], 1)
        return (slope * cost).sum(-2), present, slope
    if bound is not None:
        low = xp.where(_first(-xp.where(known, bound, xp.inf)), low, -xp.inf)
    # with one group known it is the best, with none all is masked
    excess = xp.where(known, cost + largest(low, -2)[..., None, :], 0.0)
    if smooth > 0:
        slope = xp.clip(_fixed(excess) * (1 / smooth), 0.0, 1.0)  # behind a bound's group some are ahead of it
        value = slope * (excess - slope * (smooth / 2))
    else:
        slope = xp.where(_fixed(excess) > 0, xp.ones_like(fixed), 0.0)
        value = slope * excess
    if normalise:
        others = at_least(observed - 1, 1)[..., None, :]
        slope, value = slope / others, value / others
    return value.sum(-2), present, slope


def _enough(count: A, least: float | A) -> A:
    known: A = count >= least if isinstance(least, float | int) and least > 0 else (count > 0) & (count >= least)
    return known


def _fixed(values: A) -> A:
    """Return values that nothing is derived through."""
    return values.detach() if isinstance(values, Tensor) else values


def _first(values: A) -> A:
    """Where the largest of values [..., G, C] is, the first where several are: bool."""
    xp = library(values)
    top = values == largest(values, -2)[..., None, :]
    found: A = top & (xp.cumsum(top, -2) == 1)
    return found


def aeod(
    scores: Tensor,
    labels: Tensor,
    groups: Tensor,
    n_groups: int,
    *,
    symmetric: bool = False,
    normalise: bool = False,
    reference: str = "max",
    min_count: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Asymmetric equalised odds disparity of soft rates: ``sum_g relu(tau - TPR_g) + relu(FPR_g - phi)``.

    ``tau`` and ``phi`` are the best group's rates, detached. A multilabel task (scores and labels [B, C]) averages over the
    labels that are present. Labels other than 0 and 1 (NaN, -100) and groups of -1 are missing. Source: FairMT.

    Parameters
    ----------
    scores, labels : Tensor [B] or [B, C]
        Scores in [0, 1] and 0/1 labels.
    groups : Tensor [B] of int
        Group ids, -1 unknown.
    n_groups : int
        Number of groups G.
    symmetric, normalise, reference, min_count : bool = False, bool = False, str = "max", float = 0.0
        See :class:`LiftOptions`. With ``normalise`` or ``symmetric`` the value lies in [0, 2]; "lcb" takes Wilson's 95
        % bounds (highest lower bound of TPR, lowest upper bound of FPR).

    Returns
    -------
    tuple of (Tensor, Tensor)
        (value scalar, present bool scalar).

    Raises
    ------
    RecipeError
        For an unknown reference, or ``symmetric`` together with "lcb".

    Examples
    --------
    >>> value, present = aeod(torch.tensor([0.9, 0.4]), torch.tensor([1, 1]), torch.tensor([0, 1]), 2)
    >>> value, present
    (tensor(0.5000), tensor(True))
    """
    options = LiftOptions(symmetric=symmetric, normalise=normalise, reference=reference, min_count=min_count)
    value, present = aeod_from_rates(*soft_rates(scores, labels, groups, n_groups), **options)
    return (value, present) if scores.dim() == 1 else (masked_mean(value, present), present.any())


def aeod_from_rates(
    tpr: Tensor, fpr: Tensor, n_pos: Tensor, n_neg: Tensor, **options: Unpack[LiftOptions]
) -> tuple[Tensor, Tensor]:
    """:func:`aeod` from rates and counts [G], or [G, C] for a column a label or task: (value, present), scalars or [C].

    >>> ones = torch.ones(2)
    >>> aeod_from_rates(torch.tensor([0.9, 0.4]), torch.tensor([0.1, 0.1]), ones, ones)[0]
    tensor(0.5000)
    """
    # a miss rate costs as a false positive rate does: 1 - TPR has the differences of TPR
    cost, count = torch.stack([1 - tpr, fpr], -1), torch.stack([n_pos, n_neg], -1)
    bound = rate_bound(cost, count) if _check(options) else None
    value, present = _lifted(
        cost.movedim(0, -2), count.movedim(0, -2), bound if bound is None else bound.movedim(0, -2), options
    )
    return value.sum(-1), present.any(-1)


def caeod(
    probs: Tensor,
    labels: Tensor,
    groups: Tensor,
    n_groups: int,
    *,
    symmetric: bool = False,
    normalise: bool = False,
    reference: str = "max",
    min_count: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Class-wise AEOD of a multiclass task: :func:`aeod` of each class one-vs-rest, averaged over the classes present.

    ``probs`` [B, C] are softmax probabilities, ``labels`` [B] class ids, missing outside 0..C-1 (-100). Source: FairMT.

    >>> probs = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    >>> caeod(probs, torch.tensor([0, 0]), torch.tensor([0, 1]), 2)[0]
    tensor(0.5000)
    """
    one_vs_rest = one_hot_labels(labels, torch.arange(probs.shape[1], device=probs.device))
    options = LiftOptions(symmetric=symmetric, normalise=normalise, reference=reference, min_count=min_count)
    return aeod(probs, one_vs_rest, groups, n_groups, **options)


def one_hot_labels(labels: Tensor, classes: Tensor) -> Tensor:
    """Membership int64 [B, C] of class labels [B]: 1 or 0, or -100 in the whole row where the label is none of ``classes``.

    >>> one_hot_labels(torch.tensor([1, -100]), torch.arange(2))
    tensor([[   0,    1],
            [-100, -100]])
    """
    member = labels.unsqueeze(-1) == classes
    return member.long().where(member.any(-1, keepdim=True), -100)


def aep(
    errors: Tensor,
    groups: Tensor,
    n_groups: int,
    *,
    symmetric: bool = False,
    normalise: bool = False,
    reference: str = "max",
    min_count: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Asymmetric error parity of a regression task: ``sum_g relu(e_g - min_g e_g)``, e_g the group's mean error.

    ``errors`` [B] are per-example errors >= 0 (squared or absolute, of the standardised target), NaN where unobserved.
    With ``reference="lcb"`` the best group is that of the lowest upper 95 % bound of a mean (normal, from the group's own
    variance; **ours**). Options, return and raises as :func:`aeod`. Source: FairMT.

    >>> aep(torch.tensor([1.0, 3.0, 4.0]), torch.tensor([0, 1, 1]), 2)[0]
    tensor(2.5000)
    """
    options = LiftOptions(symmetric=symmetric, normalise=normalise, reference=reference, min_count=min_count)
    mean, count = group_mean(errors, groups, n_groups)
    bound = None
    if _check(options):
        bound = mean_bound(mean, count, group_mean(errors.detach().square(), groups, n_groups)[0])
    return _lifted(mean, count, bound, options)


def aep_ccc(
    predictions: Tensor,
    targets: Tensor,
    groups: Tensor,
    n_groups: int,
    *,
    symmetric: bool = False,
    normalise: bool = False,
    reference: str = "max",
    min_count: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """:func:`aep` of ``1 - CCC_g``, each group's lack of concordance, from predictions and targets [B].

    Source: FairMT. "lcb" takes the group with the highest lower 95 % bound of CCC after Fisher's transform **(ours)**.

    >>> y = torch.tensor([0.0, 1.0, 0.0, 1.0])
    >>> aep_ccc(torch.tensor([0.0, 1.0, 1.0, 0.0]), y, torch.tensor([0, 0, 1, 1]), 2)[0]
    tensor(2.)
    """
    options = LiftOptions(symmetric=symmetric, normalise=normalise, reference=reference, min_count=min_count)
    lack, count = ccc_lack_from_sums(ccc_sums(predictions, targets, groups, n_groups))
    bound = ccc_bound(lack, count) if _check(options) else None
    return _lifted(lack, count, bound, {**options, "min_count": max(min_count, CCC_COUNT)})


CCC_COUNT = 2.0
"""With one example a group has no variance, so no concordance."""


def ccc_sums(predictions: Tensor, targets: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """Sufficient statistics [G, 6] of CCC per group: n and the sums of p, t, p^2, t^2, (p - t)^2; they add up over batches.

    Pairs with a NaN are missing.

    >>> ccc_sums(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), 1)
    tensor([[2., 3., 2., 5., 4., 1.]])
    """
    seen = ~(predictions.isnan() | targets.isnan())
    p, t = predictions.where(seen, 0.0), targets.to(predictions.dtype).where(seen, 0.0)
    columns = torch.stack([seen.to(p.dtype), p, t, p * p, t * t, (p - t).square()], dim=1)
    return group_sums(columns, groups, n_groups)


def ccc_lack_from_sums(sums: Tensor) -> tuple[Tensor, Tensor]:
    """``1 - CCC = mean (p - t)^2 / (var p + var t + (mean p - mean t)^2)`` and n, each [..., G], from :func:`ccc_sums`.

    In [0, 2]; 0 where predictions and targets are one and the same constant.

    >>> ccc_lack_from_sums(torch.tensor([[2.0, 3.0, 2.0, 5.0, 4.0, 1.0]]))
    (tensor([0.3333]), tensor([2.]))
    """
    count = sums[..., 0]
    p, t, pp, tt, error = (sums[..., 1:] / count.clamp(min=torch.finfo(sums.dtype).tiny).unsqueeze(-1)).unbind(-1)
    total = (pp - p * p).clamp(min=0) + (tt - t * t).clamp(min=0) + (p - t).square()
    some = total > 0
    return (error / total.where(some, 1.0)).where(some, 0.0), count


def wilson_interval(rate: A, count: A, z: float = _Z95) -> tuple[A, A]:
    """Wilson interval (low, high) of rates in [0, 1] with their counts, 95 % or ``z`` standard errors; [0, 1] where the count is 0.

    >>> wilson_interval(torch.tensor(1.0), torch.tensor(3.0))
    (tensor(0.4385), tensor(1.))
    """
    square = z**2
    scale = 1 / (count + square)
    centre = (rate * count + square / 2) * scale
    half = z * scale * at_least(count * rate * (1 - rate) + square / 4, 0) ** 0.5
    return (centre - half).clip(0, 1), (centre + half).clip(0, 1)


def rate_bound(rate: A, count: A) -> A:
    """Upper 95 % bound of a rate that costs."""
    return wilson_interval(_fixed(rate), count)[1]


def mean_bound(mean: Tensor, count: Tensor, square_mean: Tensor) -> Tensor:
    """Upper 95 % bound of a mean error, from the mean squared errors; one example has no variance: it sets no bar."""
    variance = (square_mean - mean.square()).detach().clamp(min=0)
    bound = mean.detach() + _Z95 * (variance / (count - 1)).sqrt().where(count > 1, torch.inf)
    return bound.clamp(max=torch.finfo(bound.dtype).max)


def ccc_bound(lack: Tensor, count: Tensor) -> Tensor:
    """Upper 95 % bound of ``1 - CCC``, after Fisher's transform."""
    fisher = (1 - lack.detach()).clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    return 1 - (fisher - _Z95 / (count - 3).clamp(min=0.25).sqrt()).tanh()


def decision_gap(rate: A, count: A, min_count: float | A = 1.0) -> tuple[A, A, A]:
    """Largest minus smallest rate of decisions over groups, freed of what chance adds to it **(ours)**.

    ``sqrt(max(0, gap^2 - n))`` with the noise ``n = r1 (1 - r1) / n1 + r2 (1 - r2) / n2`` of the two extreme groups: a gap
    cannot be negative, so that equal groups of few people show one.

    Parameters
    ----------
    rate, count : Tensor or ndarray [..., G, C]
        Share of decisions in [0, 1] and the examples behind it; groups with fewer than ``min_count`` are absent.

    Returns
    -------
    tuple of (Tensor, Tensor, Tensor) or of ndarrays
        (gap, standard error ``sqrt(n)``, present), each [..., C]: 0, 0 and False with fewer than two groups.

    Examples
    --------
    >>> gap, noise, present = decision_gap(torch.tensor([[0.5], [0.1]]), torch.tensor([[100.0], [100.0]]))
    >>> [round(float(x), 4) for x in (gap, noise)]
    [0.3957, 0.0583]
    """
    xp = library(rate)
    known = _enough(count, min_count)
    ends = xp.where(known, with_negative(rate), -2.0)
    best, variance = largest(ends, -2), rate * (1 - rate) / at_least(count, 1)
    of_best = largest(xp.where(ends == best[..., None, :], variance, 0.0), -2)
    present, gap, noise = known.sum(-2) >= 2, best[0] + best[1], of_best[0] + of_best[1]
    value = at_least(gap * gap - noise, 0) ** 0.5
    return xp.where(present, value, 0.0), xp.where(present, noise, 0.0) ** 0.5, present


def _lifted(cost: Tensor, count: Tensor, bound: Tensor | None, options: LiftOptions) -> tuple[Tensor, Tensor]:
    """:func:`lift` of costs [G] or [..., G, C]."""
    column = cost.dim() == 1
    if column:
        cost, count, bound = cost.unsqueeze(-1), count.unsqueeze(-1), None if bound is None else bound.unsqueeze(-1)
    value, present, _ = lift(
        cost,
        count,
        bound,
        symmetric=options.get("symmetric", False),
        normalise=options.get("normalise", False),
        min_count=options.get("min_count", 0.0),
    )
    return (value.squeeze(-1), present.squeeze(-1)) if column else (value, present)


def _check(options: LiftOptions) -> bool:
    """Whether the reference is that of a bound."""
    reference = options.get("reference", "max")
    if reference not in REFERENCES:
        raise RecipeError(unknown("reference of a disparity", reference, REFERENCES))
    if options.get("symmetric") and reference == "lcb":
        raise RecipeError("disparity: symmetric=True has no reference group; it excludes reference='lcb'.")
    return reference == "lcb"
