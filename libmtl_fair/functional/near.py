"""Gaps between near examples in units of any two examples' (METHODS.md, 1.4; ours), with leading dimensions ``[...]``."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from libmtl_fair.errors import DataError
from libmtl_fair.functional._device import as_array, on_cpu
from libmtl_fair.functional._written import written

_ROWS = 512
"""Rows whose distances to all others are looked at together."""


class Near(NamedTuple):
    """Each example's nearest other one of a batch.

    Attributes
    ----------
    others : Tensor of int64 [..., B]
        Where it is; of several at one distance the first (up to rounding); an example that is alone is its own.
    closeness : Tensor [...]
        ``(1 - rho)^2``, ``rho^2`` the mean squared distance to it in units of that of any two: 1 where the nearest are the same,
        0 where they are no nearer than any two (ours).
    """

    others: Tensor
    closeness: Tensor


@torch.no_grad()
def near_others(features: Tensor) -> Near:
    """Return each example's nearest other one by Euclidean distance and how near they are, for features [..., B, r].

    >>> found = near_others(torch.tensor([[0.0], [1.0], [5.0], [1.5]]))
    >>> found.others, round(found.closeness.item(), 4)  # squared distances 1, .25, 12.25, .25; of any two 9.46
    (tensor([1, 3, 3, 1]), 0.1577)
    """
    if features.dim() > 2:  # one by one: another product may round otherwise, and so part who is equally near
        parts = [near_others(part) for part in features]
        return Near(torch.stack([part.others for part in parts]), torch.stack([part.closeness for part in parts]))
    return nearness(features, *near_rows(features, 0, len(features)))


@torch.no_grad()
def near_rows(features: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return the nearest other one of some rows of features [B, r], int64 [n], and its squared distance less the row's own square [n]."""
    squares, found = features.square().sum(-1), []
    for first in range(start, max(stop, start + 1), _ROWS):  # what is looked through stays in the processor's cache
        some = features[first : min(first + _ROWS, stop)]
        distances = torch.addmm(squares, some, features.mT, alpha=-2)
        distances.diagonal(first).fill_(torch.inf)
        # numpy takes a fifth of torch's time
        others = torch.as_tensor(as_array(distances).argmin(-1)) if on_cpu(distances) else distances.argmin(-1)
        found.append((others, distances.gather(-1, others.unsqueeze(-1)).squeeze(-1)))
    return found[0] if len(found) == 1 else (torch.cat([o for o, _ in found]), torch.cat([d for _, d in found]))


@torch.no_grad()
def nearness(features: Tensor, others: Tensor, nearest: Tensor) -> Near:
    """Return how near each example's nearest other one is, from what :func:`near_rows` found of all rows."""
    size, squares = len(features), features.square().sum(-1)
    total = squares.sum()
    if size < 2:
        return Near(others, torch.zeros_like(total))
    near = nearest.sum().add_(total).clamp_(min=0)
    any_two = (total - features.sum(0).square().sum() / size).mul_(2 * size / (size - 1))
    rho = torch.where(any_two > 1e-12 * total, near / any_two, 0).sqrt_()
    return Near(others, (1 - rho).clamp_(min=0).square_())


def nearest_others(features: Tensor) -> Tensor:
    """Return each example's nearest other one, int64 [..., B]: :func:`near_others` without how near they are.

    >>> nearest_others(torch.tensor([[0.0], [1.0], [5.0], [1.5]]))
    tensor([1, 3, 3, 1])
    """
    return near_others(features).others


class NearGaps(NamedTuple):
    """How far apart near examples are, of one batch: all [...], ``slope`` [..., B].

    ``value`` is 1 on average where nearness says nothing, 0 where near values are one; ``present`` is False where all values
    are one: value and slope are 0 there.
    """

    value: Tensor
    present: Tensor
    slope: Tensor

    def attached(self, values: Tensor) -> Tensor:
        """Return the value as one node of the graph of the values that it was made from."""
        return written(self.value, (values, self.slope))


@torch.no_grad()
def near_gaps(values: Tensor, nearest: Tensor, *, logits: bool = False) -> NearGaps:
    """Return ``R = mean_i |f(x_i) - f(x_n(i))| / G(f)`` of values [..., B] and its derivative, by one sort and no B x B matrix.

    G is the Gini mean difference, the mean of ``|f_i - f_j|`` over all pairs of different examples; the derivative is of both, so
    that scaling the values about any centre changes nothing. Where two values are equal their gap has derivative 0.

    Parameters
    ----------
    values : Tensor
        f, or with ``logits`` log-odds z: f is then half z and half sigmoid(z), each divided by its own G.
    nearest : Tensor
        n(i), int64 [..., B]; leading dimensions broadcast.

    Raises
    ------
    DataError
        Shapes that do not fit.

    Examples
    --------
    >>> found = near_gaps(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1, 0, 1]))
    >>> round(found.value.item(), 4)  # a mean gap of 4 / 3 by a Gini mean difference of 2
    0.6667
    """
    size = values.shape[-1]
    if nearest.shape[-1:] != (size,) or nearest.dim() > values.dim():
        raise DataError(f"near_gaps: nearest must be [..., {size}], found shape {list(nearest.shape)}")
    near = nearest.expand(values.shape)
    sign = torch.sub(values, values.gather(-1, near)).sign_()
    gap = torch.scatter_add(sign, -1, near, -sign).div_(size)
    parts, spread, present, share = _by_spread(values, logits)
    value = torch.linalg.vecdot(parts, gap).mul_(share)
    slope = torch.addcmul(gap, spread, value.unsqueeze(-1), value=-1).mul_(share.unsqueeze(-1))
    if logits:
        slope[1].mul_(parts[1]).mul_(1 - parts[1])
    return NearGaps(value.mean(0), present, slope.mean(0))


_PER_AUC = 2 * math.pi**0.5


def near_price(values: Tensor, closeness: Tensor, *, logits: bool = False) -> Tensor:
    """Return what utility is worth of the loss times the closeness, [...], of values [..., B]: the unit of lambda (ours).

    A whole point of AUC (``logits``) is worth ``2 sqrt(pi) sd(p)`` near chance: normal scores d apart have ``AUC = Phi(d / sqrt 2)``,
    hold ``d^2 p (1 - p) / 2`` nats and have ``sd(p) = d p (1 - p)``. One of R² is worth the target's variance, at least that of what
    is predicted, which is taken. So a task that knows little, or has learned little yet, is asked for little, and a unit of any
    task's R has one price.

    >>> near_price(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor(0.5), logits=True)
    tensor(0.4471)
    """
    worth = torch.sigmoid(values).std(-1, correction=0).mul_(_PER_AUC) if logits else values.var(-1, correction=0)
    return worth.mul_(closeness)


class FlipGaps(NamedTuple):
    """How far the values of flip twins are from people's own, of one batch: all [...], slopes [..., B]; as :class:`NearGaps`."""

    value: Tensor
    present: Tensor
    slope: Tensor
    slope_twins: Tensor

    def attached(self, values: Tensor, twins: Tensor) -> Tensor:
        """Return the value as one node of the graph of the values that it was made from."""
        return written(self.value, (values, self.slope), (twins, self.slope_twins))


@torch.no_grad()
def flip_gaps(values: Tensor, twins: Tensor, *, logits: bool = False) -> FlipGaps:
    """Return ``F = mean_i |f(x_i) - f(x'_i)| / G(f)`` of values and their twins', [..., B], and its derivatives to both.

    f and G are those of :func:`near_gaps`, of the people themselves.

    Raises
    ------
    DataError
        Shapes that do not fit.

    Examples
    --------
    >>> found = flip_gaps(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1.0, 1.0, 2.0]))
    >>> round(found.value.item(), 4)  # a mean gap of 2 / 3 by a Gini mean difference of 2
    0.3333
    """
    if twins.shape != values.shape:
        raise DataError(f"flip_gaps: twins must be {list(values.shape)}, found shape {list(twins.shape)}")
    gap = torch.sub(values, twins).sign_().div_(values.shape[-1])
    parts, spread, present, share = _by_spread(values, logits)
    others = torch.stack((twins, torch.sigmoid(twins))) if logits else twins.unsqueeze(0)
    value = torch.linalg.vecdot(parts - others, gap).mul_(share)
    scale = share.unsqueeze(-1)
    slope = torch.addcmul(gap, spread, value.unsqueeze(-1), value=-1).mul_(scale)
    slope_twins = -gap * scale
    if logits:
        slope[1].mul_(parts[1]).mul_(1 - parts[1])
        slope_twins[1].mul_(others[1]).mul_(1 - others[1])
    return FlipGaps(value.mean(0), present, slope.mean(0), slope_twins.mean(0))


def _by_spread(values: Tensor, logits: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return f [1 or 2, ..., B], G's derivative to it [..., B], where there is any spread, and 1 / G [1 or 2, ...], else 0."""
    spread = torch.empty_like(values).scatter_(
        -1, _order(values), _ramp(values.shape[-1], values.dtype, values.device).expand(values.shape)
    )
    parts = torch.stack((values, torch.sigmoid(values))) if logits else values.unsqueeze(0)
    below = torch.linalg.vecdot(parts, spread)
    present = below[0] > 1e-6 * values.abs().amax(-1)
    return parts, spread, present, torch.where(present & (below > 0), below.reciprocal(), 0)


@lru_cache(maxsize=16)
def _ramp(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the derivative of the Gini mean difference to the values in ascending order, [size]."""
    with torch.inference_mode(False):
        ramp = torch.arange(1 - size, size, 2, device=device, dtype=dtype)
        return ramp * (2 / (max(size - 1, 1) * size))


def _order(values: Tensor) -> Tensor:
    """Return the places of the values in ascending order; beside the CPU numpy sorts many rows in a third of torch's time."""
    if on_cpu(values):
        return torch.from_numpy(as_array(values).argsort(-1))
    return values.argsort(-1)
