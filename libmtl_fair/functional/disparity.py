"""Disparity between groups of one task, psi >= 0: only the groups behind the best are lifted (FairMT, arXiv:2512.00469).

Every measure is a function of sufficient statistics per group (rates or means, and counts), so that they may come from one
batch or from decayed sums over many. A measure returns its value and whether it is present (two groups to compare);
an absent value is 0 with zero gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.functional.groups import group_mean, group_sums, soft_rates
from libmtl_fair.functional.quantiles import masked_mean

REFERENCES = ("max", "lcb")
_Z95 = 1.959963984540054


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
    symmetric : bool
        The ablation: largest minus smallest rate, gradient to both sides; in [0, 2].
    normalise : bool
        Divide each sum by (groups observed - 1), so that the value lies in [0, 2] **(ours)**.
    reference : {"max", "lcb"}
        The best observed rate, or the rate of the group with the best Wilson 95 % bound (highest lower bound of TPR,
        lowest upper bound of FPR), so that a tiny, lucky group does not set the bar **(ours)**.
    min_count : float
        Groups with fewer positives (negatives) are absent from the TPR (FPR) part **(ours)**.

    Returns
    -------
    (value scalar, present bool scalar).

    Raises
    ------
    RecipeError
        For an unknown reference, or ``symmetric`` together with "lcb".

    >>> value, present = aeod(torch.tensor([0.9, 0.4]), torch.tensor([1, 1]), torch.tensor([0, 1]), 2)
    >>> value, present
    (tensor(0.5000), tensor(True))
    """
    value, present = aeod_from_rates(
        *soft_rates(scores, labels, groups, n_groups),
        symmetric=symmetric,
        normalise=normalise,
        reference=reference,
        min_count=min_count,
    )
    return (value, present) if scores.dim() == 1 else (masked_mean(value, present), present.any())


def aeod_from_rates(
    tpr: Tensor,
    fpr: Tensor,
    n_pos: Tensor,
    n_neg: Tensor,
    *,
    symmetric: bool = False,
    normalise: bool = False,
    reference: str = "max",
    min_count: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """:func:`aeod` from rates and counts [G], or [G, C] for a column a label or task: (value, present), scalars or [C].

    Counts may be fractions (decayed sums); a group counts where its count is positive and at least ``min_count``.

    >>> ones = torch.ones(2)
    >>> aeod_from_rates(torch.tensor([0.9, 0.4]), torch.tensor([0.1, 0.1]), ones, ones)[0]
    tensor(0.5000)
    """
    _check(reference, symmetric)
    tpr, fpr, n_pos, n_neg = (x.movedim(0, -1) for x in (tpr, fpr, n_pos, n_neg))
    bounds: tuple[Tensor | None, Tensor | None] = (None, None)
    if reference == "lcb":
        bounds = 1 - wilson_interval(tpr.detach(), n_pos)[0], wilson_interval(fpr.detach(), n_neg)[1]
    # a miss rate costs as a false positive rate does: 1 - TPR has the differences of TPR
    missed, in_tpr = _lift(1 - tpr, _counts(n_pos, min_count), bounds[0], symmetric, normalise)
    alarm, in_fpr = _lift(fpr, _counts(n_neg, min_count), bounds[1], symmetric, normalise)
    return missed + alarm, in_tpr | in_fpr


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
    classes = torch.arange(probs.shape[1], device=probs.device)
    one_vs_rest = one_hot_labels(labels, classes)
    return aeod(
        probs,
        one_vs_rest,
        groups,
        n_groups,
        symmetric=symmetric,
        normalise=normalise,
        reference=reference,
        min_count=min_count,
    )


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
    variance; **ours**). Other options, return and raises as :func:`aeod`. Source: FairMT.

    >>> aep(torch.tensor([1.0, 3.0, 4.0]), torch.tensor([0, 1, 1]), 2)[0]
    tensor(2.5000)
    """
    mean, count = group_mean(errors, groups, n_groups)
    square = group_mean(errors.detach().square(), groups, n_groups)[0] if reference == "lcb" else None
    return aep_from_means(
        mean,
        count,
        square,
        symmetric=symmetric,
        normalise=normalise,
        reference=reference,
        min_count=min_count,
    )


def aep_from_means(
    mean: Tensor,
    count: Tensor,
    square_mean: Tensor | None = None,
    *,
    symmetric: bool = False,
    normalise: bool = False,
    reference: str = "max",
    min_count: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """:func:`aep` from the groups' mean errors and counts [G]; "lcb" also needs the mean squared errors [G].

    Raises
    ------
    RecipeError
        As :func:`aeod`, and for "lcb" without ``square_mean``.

    >>> aep_from_means(torch.tensor([1.0, 3.5]), torch.tensor([1.0, 2.0]))[0]
    tensor(2.5000)
    """
    _check(reference, symmetric)
    bound = None
    if reference == "lcb":
        if square_mean is None:
            raise RecipeError("aep_from_means: reference 'lcb' needs the groups' mean squared errors (square_mean).")
        variance = (square_mean - mean.square()).detach().clamp(min=0)
        # one example has no variance of its own: it may not set the bar
        bound = mean.detach() + _Z95 * (variance / (count - 1)).sqrt().where(count > 1, torch.inf)
        bound = bound.clamp(max=torch.finfo(bound.dtype).max)
    return _lift(mean, _counts(count, min_count), bound, symmetric, normalise)


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
    _check(reference, symmetric)
    lack, count = ccc_lack_from_sums(ccc_sums(predictions, targets, groups, n_groups))
    return aep_ccc_from_lack(
        lack, count, symmetric=symmetric, normalise=normalise, reference=reference, min_count=min_count
    )


def aep_ccc_from_lack(
    lack: Tensor,
    count: Tensor,
    *,
    symmetric: bool = False,
    normalise: bool = False,
    reference: str = "max",
    min_count: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """:func:`aep_ccc` from ``1 - CCC`` and counts [G] (:func:`ccc_lack_from_sums`).

    >>> aep_ccc_from_lack(torch.tensor([0.2, 0.5]), torch.tensor([9.0, 9.0]))[0]
    tensor(0.3000)
    """
    _check(reference, symmetric)
    bound = None
    if reference == "lcb":
        fisher = (1 - lack.detach()).clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        bound = 1 - (fisher - _Z95 / (count - 3).clamp(min=0.25).sqrt()).tanh()
    # with one example a group has no variance, so no concordance
    return _lift(lack, _counts(count, max(min_count, 2.0)), bound, symmetric, normalise)


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
    """``1 - CCC = mean (p - t)^2 / (var p + var t + (mean p - mean t)^2)`` and n, each [G], from :func:`ccc_sums`.

    In [0, 2]; 0 where predictions and targets are one and the same constant.

    >>> ccc_lack_from_sums(torch.tensor([[2.0, 3.0, 2.0, 5.0, 4.0, 1.0]]))
    (tensor([0.3333]), tensor([2.]))
    """
    count = sums[:, 0]
    p, t, pp, tt, error = (sums[:, 1:] / count.clamp(min=torch.finfo(sums.dtype).tiny).unsqueeze(1)).unbind(1)
    total = (pp - p * p).clamp(min=0) + (tt - t * t).clamp(min=0) + (p - t).square()
    some = total > 0
    return (error / total.where(some, 1.0)).where(some, 0.0), count


def wilson_interval(rate: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Wilson 95 % interval (low, high) of rates in [0, 1] with their counts; [0, 1] where the count is 0.

    >>> wilson_interval(torch.tensor(1.0), torch.tensor(3.0))
    (tensor(0.4385), tensor(1.))
    """
    square = _Z95**2
    scale = 1 / (count + square)
    centre = (rate * count + square / 2) * scale
    half = _Z95 * scale * (count * rate * (1 - rate) + square / 4).clamp(min=0).sqrt()
    return (centre - half).clamp(0, 1), (centre + half).clamp(0, 1)


def _lift(
    cost: Tensor, present: Tensor, bound: Tensor | None, symmetric: bool, normalise: bool
) -> tuple[Tensor, Tensor]:
    """Sum over groups [..., G] of what their cost exceeds the best group's, detached; and whether there are two groups."""
    count = present.sum(-1)
    enough = count >= 2
    if symmetric:
        high = cost.masked_fill(~present, -torch.inf).amax(-1)
        value = high - cost.masked_fill(~present, torch.inf).amin(-1)
        return value.where(enough, 0.0), enough
    if bound is None:
        best = cost.detach().masked_fill(~present, torch.inf).amin(-1, keepdim=True)
    else:
        chosen = bound.masked_fill(~present, torch.inf).argmin(-1, keepdim=True)
        best = cost.detach().gather(-1, chosen)
    value = (cost - best).relu().where(present, 0.0).sum(-1)
    if normalise:
        value = value / (count - 1).clamp(min=1)
    return value.where(enough, 0.0), enough


def _counts(count: Tensor, min_count: float) -> Tensor:
    return (count > 0) & (count >= min_count)


def _check(reference: str, symmetric: bool) -> None:
    if reference not in REFERENCES:
        raise RecipeError(unknown("reference of a disparity", reference, REFERENCES))
    if symmetric and reference == "lcb":
        raise RecipeError("disparity: symmetric=True has no reference group; it excludes reference='lcb'.")
