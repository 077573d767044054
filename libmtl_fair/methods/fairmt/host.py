"""FairMT's constraint beside the CPU: binary tasks and one attribute, by numpy and Python numbers at a third of the cost.

The formulas are those of :mod:`libmtl_fair.methods.fairmt.rates`; on so few numbers nearly all of a tensor operation's cost is
dispatch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from libmtl_fair.functional._device import on_cpu
from libmtl_fair.functional.simplex import centring, worst_case_weights
from libmtl_fair.methods.fairmt.rates import TINY, Layout


class Constraint(NamedTuple):
    """psi [T] and whether it is defined, bool [T]; Phi; w* [T]; the gradient of Phi to the summed values, [G, 2T]."""

    psi: Tensor
    present: Tensor
    phi: Tensor
    w: Tensor
    slope: Tensor


def fits(layout: Layout, sums: Tensor) -> bool:
    """Whether :func:`constraint` is made for this problem."""
    lift = layout.lift
    return layout.simple and lift.reference == "max" and not lift.symmetric and on_cpu(sums)


def constraint(layout: Layout, sums: Tensor, counts: Tensor, divisor: Tensor, mu: float, solver: str) -> Constraint:
    """Return what ``disparity``, ``F.aggregate_disparities`` and ``Disparity.slope`` say, from tensors [G, 2T]."""
    lift, k = layout.lift, layout.n_rates
    number = counts.numpy()
    rates = sums.numpy() / np.maximum(number, TINY)
    known = number >= lift.min_count
    if known.all():
        hinge = rates - np.minimum.reduce(rates, 0)
        enough = np.full(2 * k, layout.n_groups >= 2)
        observed = np.full(2 * k, layout.n_groups)
    else:
        hinge = np.where(known, rates - np.minimum.reduce(np.where(known, rates, np.inf), 0), 0)
        observed = np.add.reduce(known, 0)
        enough = observed >= 2
    part, slope = np.add.reduce(hinge, 0), hinge > 0
    if lift.normalise and layout.n_groups > 2:
        scale = (1 / np.maximum(observed - 1, 1)).astype(part.dtype)
        part, slope = part * scale, slope * scale
    if lift.fpr_weight != 1:
        parts = layout.parts.numpy()
        part, enough, slope = part * parts, enough & (parts > 0), slope * parts
    psi, present = part[:k] + part[k:], enough[:k] | enough[k:]
    here = None if present.all() else present.tolist()
    values = psi.tolist()
    weights = worst_case_weights(values, mu, here, solver)
    phi = sum(weight * value for weight, value in zip(weights, values) if weight)
    phi -= centring(weights, mu, k if here is None else sum(here))
    w = np.array(weights, psi.dtype)
    slope = slope * np.concatenate((w, w)) / np.maximum(divisor.numpy(), TINY)
    return Constraint(
        torch.from_numpy(psi),
        torch.from_numpy(present),
        torch.tensor(phi, dtype=sums.dtype),
        torch.from_numpy(w),
        torch.from_numpy(slope),
    )
