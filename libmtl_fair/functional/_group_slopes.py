"""Disparities between groups with their derivatives written out, for the handful of numbers that one step compares.

On the CPU, recording the torch operations that compare four group means costs a tenth of a training step. Here they are
plain numbers and the comparison is one node of the graph. The disparities are those of
:mod:`libmtl_fair.functional.groups`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from libmtl_fair.functional._device import on_host

Slope = tuple[float, list[float]]


def _spread(m: Sequence[float]) -> Slope:
    top, low = max(m), min(m)
    n_top, n_low = m.count(top), m.count(low)  # a gradient is shared by those that attain an extreme, as in torch
    return top - low, [(v == top) / n_top - (v == low) / n_low for v in m]


def _worst(m: Sequence[float]) -> Slope:
    top = max(m)
    n_top = m.count(top)
    return top, [(v == top) / n_top for v in m]


def _glf(m: Sequence[float]) -> Slope:
    if len(m) == 2:
        return _spread(m)
    scale = max(abs(v) for v in m)
    if not 0 < scale < math.inf:
        return scale * 0.0, [0.0] * len(m)
    unit = [v / scale for v in m]
    mean = math.fsum(unit) / len(m)
    square = math.fsum(v * v for v in unit)
    unfair = math.fsum((v - mean) ** 2 for v in unit) / square
    return unfair, [2 * (v - mean - v * unfair) / (square * scale) for v in unit]


def _gld(m: Sequence[float]) -> Slope:
    low = min(m)
    if not math.isfinite(low) or not math.isfinite(max(m)):
        return math.nan, [0.0] * len(m)
    weights = [math.exp(low - v) for v in m]
    total = math.fsum(weights)
    logs = [low - v - math.log(total) for v in m]
    inner = math.fsum(w / total * log for w, log in zip(weights, logs))
    value = math.expm1(max(inner + math.log(len(m)), 0.0))
    return value, [(1 + value) * w / total * (inner - log) for w, log in zip(weights, logs)]


_SLOPES: Mapping[str, Callable[[Sequence[float]], Slope]] = {
    "glf": _glf,
    "gld": _gld,
    "bgl": _worst,
    "spread": _spread,
}


def slopes(means: list[list[float]], counts: list[list[float]], kind: str) -> tuple[list[float], list[list[float]]]:
    """Disparity [K] of group means [K, G] over groups with a count, and its derivative [K, G]; 0 with fewer than two.

    >>> slopes([[0.5, 0.2, 9.0]], [[3, 1, 0]], "glf")
    ([0.3], [[1.0, -1.0, 0.0]])
    """
    values, derivatives = [], []
    for row, sizes in zip(means, counts):
        at = [g for g, size in enumerate(sizes) if size > 0]
        value, slope = _SLOPES[kind]([row[g] for g in at]) if len(at) > 1 else (0.0, [0.0] * len(at))
        spread_out = [0.0] * len(row)
        for g, derivative in zip(at, slope):
            spread_out[g] = derivative
        values.append(value)
        derivatives.append(spread_out)
    return values, derivatives


class _Disparity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, condition: Tensor, member: Tensor, count: Tensor, kind: str) -> Tensor:
        size = count.clamp(min=1)
        means = ((condition * values).T @ member) / size
        value, slope = slopes(means.tolist(), count.tolist(), kind)
        ctx.save_for_backward(condition, member, means.new_tensor(slope).div_(size))
        ctx.columns = values.shape[1]
        return means.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        condition, member, slope = ctx.saved_tensors
        grad = condition * (member @ (slope * outer[0].unsqueeze(-1)).T)
        return grad if ctx.columns == grad.shape[1] else grad.sum(1, keepdim=True), None, None, None, None


def cell_disparity(values: Tensor, condition: Tensor, member: Tensor, count: Tensor, kind: str) -> Tensor:
    """Disparity [K] of the groups' means of ``values`` [B, 1] or [B, K] within each condition; one node of the graph.

    ``condition`` [B, K] and ``member`` [B, G] are 0/1 of the values' dtype, ``count`` [K, G]; ``kind`` is ``"glf"``,
    ``"gld"``, ``"bgl"`` or ``"spread"``. Differentiable once.
    """
    out: Tensor = _Disparity.apply(values, condition, member, count, kind)  # type: ignore[no-untyped-call]
    return out


def can_write_out(values: Tensor, count: Tensor) -> bool:
    """Say whether :func:`cell_disparity` pays: on the CPU, outside ``torch.func`` transforms, for a few hundred cells."""
    return count.numel() <= 512 and on_host(values)
