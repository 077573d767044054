"""Quantiles and means over entries of which some do not count; they never wait for a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from libmtl_fair.errors import RecipeError
from libmtl_fair.functional._device import as_array, on_cpu, widest


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension of the entries where ``mask`` holds; 0, with zero gradient, where there are none.

    Entries outside the mask may be anything, NaN included.

    >>> masked_mean(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    return x.where(mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def masked_quantile(x: Tensor, q: float, mask: Tensor | None = None) -> Tensor:
    """Quantile over the last dimension of the entries where ``mask`` holds, linear as ``torch.quantile``; no gradient.

    Never waits for the device, has no limit on size (``torch.quantile`` stops at 16 million entries), and is 0 where no entry
    counts. Entries that count must not be NaN. On the CPU, where values may be read, selection takes a tenth of a sort.

    Raises
    ------
    RecipeError
        If ``q`` is not in [0, 1].

    Examples
    --------
    >>> masked_quantile(torch.tensor([3.0, 1.0, 9.0, 2.0]), 0.5, torch.tensor([True, True, False, True]))
    tensor(2.)
    """
    return masked_quantiles([x], q, mask).squeeze(-1)


def masked_quantiles(values: Sequence[Tensor], q: float, mask: Tensor | None = None) -> Tensor:
    """:func:`masked_quantile` of each of several tensors [..., n] of one shape, [..., number of tensors]."""
    if not 0 <= q <= 1:
        raise RecipeError(f"masked_quantile: q must be in [0, 1], found {q}.")
    x = values[0]
    if on_cpu(*values) and (mask is None or on_cpu(mask)):
        columns = [as_array(value.reshape(-1, x.shape[-1])) for value in values]
        kept = None if mask is None else mask.expand_as(x).reshape(columns[0].shape).numpy()
        found = [
            [_quantile(rows[i] if kept is None else rows[i][kept[i]], q) for rows in columns]
            for i in range(len(columns[0]))
        ]
        return torch.tensor(found, dtype=x.dtype).view(*x.shape[:-1], len(values))
    return torch.stack([_by_sorting(value.detach(), q, mask) for value in values], -1)


def _by_sorting(x: Tensor, q: float, mask: Tensor | None) -> Tensor:
    held = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    ordered, share = (
        x.masked_fill(~held, torch.inf).sort(-1).values,
        torch.full((1,), q, dtype=widest(x.device), device=x.device),
    )
    return sorted_quantiles(ordered, held.sum(-1, keepdim=True), share).squeeze(-1)


def sorted_quantiles(ordered: Tensor, count: Tensor, q: Tensor) -> Tensor:
    """Quantiles ``q`` [Q] of the first ``count`` [..., 1] entries of ``ordered`` [..., n]; 0 where count is 0.

    >>> sorted_quantiles(torch.tensor([1.0, 2.0, 3.0, torch.inf]), torch.tensor([3]), torch.tensor([0.25, 1.0]))
    tensor([1.5000, 3.0000])
    """
    if not ordered.shape[-1]:  # an empty batch
        ordered = ordered.new_zeros(*ordered.shape[:-1], 1)
    position = q.to(widest(q.device)) * (count - 1).clamp(min=0)
    low = position.floor()
    below = ordered.gather(-1, low.long())
    above = ordered.gather(-1, position.ceil().long())
    return torch.lerp(below, above, (position - low).to(ordered.dtype)).where(count > 0, 0.0)


def _quantile(values: np.ndarray, q: float) -> float:
    """Quantile of the values [n], linear as ``np.quantile``; 0 without any."""
    if not values.size:
        return 0.0
    position = q * (values.size - 1)
    low = int(position)
    share = position - low
    if q >= 0.75 and values.size >= 1024:
        # all but the largest fall away, by a bound that a sample gives: selection among few
        sample = values[:: values.size // 256 | 1]  # an odd step: the values may be rows of a power of 2
        place = int((q - 0.06) * sample.size)
        largest = values.compress(values >= np.partition(sample, place)[place])
        if values.size - largest.size <= low:
            values, low = largest, low - (values.size - largest.size)
    part = np.partition(values, low)  # selects one entry; asked for two it is half as slow again
    below = float(part[low])
    above = float(part[low + 1 :].min()) if low + 1 < values.size else below
    return below + (above - below) * share
