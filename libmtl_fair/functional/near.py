"""Gaps between near examples in units of any two examples' (METHODS.md, 1.4; ours), with leading dimensions ``[...]``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from libmtl_fair.errors import DataError
from libmtl_fair.functional._device import on_cpu
from libmtl_fair.functional._written import written


@torch.no_grad()
def nearest_others(features: Tensor) -> Tensor:
    """Return each example's nearest other one by Euclidean distance, int64 [..., B], for features [..., B, r].

    Of several at one distance the first (up to rounding); an example that is alone is its own.

    >>> nearest_others(torch.tensor([[0.0], [1.0], [5.0], [1.5]]))
    tensor([1, 3, 3, 1])
    """
    squares = features.square().sum(-1).unsqueeze(-2)
    if features.dim() == 2:
        distances = torch.addmm(squares, features, features.mT, alpha=-2)
    else:
        rows = features.flatten(0, -3)
        distances = torch.baddbmm(squares.flatten(0, -3), rows, rows.mT, alpha=-2).view(*features.shape[:-1], -1)
    distances.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    if on_cpu(distances):  # a fifth of torch's time
        return torch.as_tensor(distances.numpy().argmin(-1))
    return distances.argmin(-1)


class NearGaps(NamedTuple):
    """How far apart near examples are, of one batch: all [...], ``slope`` [..., B].

    ``value`` is 1 on average where nearness says nothing; ``ranks`` the same of the values' ranks, without a slope;
    ``present`` is False where all values are one: value, ranks and slope are 0 there.
    """

    value: Tensor
    ranks: Tensor
    present: Tensor
    slope: Tensor

    def attached(self, values: Tensor) -> Tensor:
        """Return the value as one node of the graph of the values that it was made from."""
        return written(self.value, (values, self.slope))


@torch.no_grad()
def near_gaps(values: Tensor, nearest: Tensor, *, logits: bool = False) -> NearGaps:
    """Return R = mean_i |f(x_i) - f(x_n(i))| / G(f) of values [..., B] and its derivative, by one sort and no B x B matrix.

    G is the Gini mean difference, the mean of |f_i - f_j| over all pairs of different examples; the derivative is of both, so
    that scaling the values about any centre changes nothing. Where two values are equal their gap has derivative 0.

    Parameters
    ----------
    values : f, or with ``logits`` log-odds z: f is then half z and half sigmoid(z), each divided by its own G.
    nearest : n(i), int64 [..., B]; leading dimensions broadcast.

    Raises
    ------
    DataError : shapes that do not fit.

    >>> found = near_gaps(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1, 0, 1]))
    >>> round(found.value.item(), 4), round(found.ranks.item(), 4)  # 4 / 3 by a Gini mean difference of 2; ranks 1 by 4 / 3
    (0.6667, 0.75)
    """
    size = values.shape[-1]
    if nearest.shape[-1:] != (size,) or nearest.dim() > values.dim():
        raise DataError(f"near_gaps: nearest must be [..., {size}], found shape {list(nearest.shape)}")
    near = nearest.expand(values.shape)
    pairs = max(size - 1, 1) * size
    ramp = torch.arange(1 - size, size, 2, device=values.device, dtype=values.dtype) * (2 / pairs)
    spread = torch.empty_like(values).scatter_(-1, values.argsort(-1), ramp.expand(values.shape))  # of G, by its value
    sign = torch.sub(values, values.gather(-1, near)).sign_()
    gap = torch.scatter_add(sign, -1, near, -sign).div_(size)
    ranks = torch.linalg.vecdot(gap, spread) * (0.75 * pairs / (size + 1))
    value, slope, present = _ratio(values, gap, spread)
    if logits:
        p = torch.sigmoid(values)
        of_p, slope_p, _ = _ratio(p, gap, spread)
        value, slope = (value + of_p) / 2, slope.add_(slope_p.mul_(p * (1 - p))).div_(2)
    return NearGaps(value, ranks * present, present, slope)


def _ratio(values: Tensor, gap: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (values'gap) / (values'spread), its derivative and whether there is any spread; 0 where there is none."""
    top, below = torch.linalg.vecdot(values, gap), torch.linalg.vecdot(values, spread)
    present = below > 1e-6 * values.abs().amax(-1)
    share = torch.where(present, 1 / below, 0)
    value = top * share
    return value, (gap - spread * value.unsqueeze(-1)).mul_(share.unsqueeze(-1)), present
