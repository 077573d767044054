"""Gaps between near examples in units of any two examples' (METHODS.md, 1.4; ours), with leading dimensions ``[...]``."""

from __future__ import annotations

from functools import lru_cache
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
    if features.dim() > 2:  # one by one: another product may round otherwise, and so part who is equally near
        return torch.stack([nearest_others(part) for part in features])
    distances = torch.addmm(features.square().sum(-1), features, features.mT, alpha=-2)
    distances.fill_diagonal_(torch.inf)
    if on_cpu(distances):  # a fifth of torch's time
        return torch.as_tensor(distances.numpy().argmin(-1))
    return distances.argmin(-1)


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
    spread = torch.empty_like(values).scatter_(
        -1, _order(values), _ramp(size, values.dtype, values.device).expand(values.shape)
    )
    sign = torch.sub(values, values.gather(-1, near)).sign_()
    gap = torch.scatter_add(sign, -1, near, -sign).div_(size)
    parts = torch.stack((values, torch.sigmoid(values))) if logits else values.unsqueeze(0)
    below = torch.linalg.vecdot(parts, spread)
    present = below[0] > 1e-6 * values.abs().amax(-1)
    share = torch.where(present & (below > 0), below.reciprocal(), 0)
    value = torch.linalg.vecdot(parts, gap).mul_(share)
    slope = torch.addcmul(gap, spread, value.unsqueeze(-1), value=-1).mul_(share.unsqueeze(-1))
    if logits:
        slope[1].mul_(parts[1]).mul_(1 - parts[1])
    return NearGaps(value.mean(0), present, slope.mean(0))


@lru_cache(maxsize=16)
def _ramp(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the derivative of the Gini mean difference to the values in ascending order, [size]."""
    with torch.inference_mode(False):
        ramp = torch.arange(1 - size, size, 2, device=device, dtype=dtype)
        return ramp * (2 / (max(size - 1, 1) * size))


def _order(values: Tensor) -> Tensor:
    """Return the places of the values in ascending order; beside the CPU numpy sorts many rows in a third of torch's time."""
    if on_cpu(values):
        return torch.from_numpy(values.numpy().argsort(-1))
    return values.argsort(-1)
