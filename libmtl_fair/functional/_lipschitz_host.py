"""ReLiF's term of plain CPU tensors with finite scores: the formulas of :mod:`._lipschitz` in half as many operations.

A step's term is small, so nearly all of its cost is the number of operations. With no example to leave out there is no mask;
the scales are Python numbers, so they need no operations of their own; what all terms of a sum share multiplies it once.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from libmtl_fair.functional._device import on_host

_where_above = torch.ops.aten.threshold_backward.default
"""(x, y, least) -> x where y is above ``least``, else 0, in one operation."""


def fits(scores: Tensor, embeddings: Tensor) -> bool:
    """Whether :class:`HostPairs` are made for these: plain CPU tensors of a type, an embedding an example, finite scores."""
    return (
        embeddings.dim() == 2
        and scores.dtype == embeddings.dtype
        and on_host(scores, embeddings)
        and math.isfinite(float(scores.sum()))
    )


class Violations(NamedTuple):
    """Loss (mean huberised hinge) and rate of violated pairs."""

    loss: float
    rate: float


class HostPairs:
    """Pairs of prototypes of scores [B, T], contiguous, and embeddings [B, d], and the term that they make; no graph.

    Prototypes and task pairs are those that :func:`~libmtl_fair.functional.prototype_pairs` would draw.

    Attributes
    ----------
    scores : as given.
    gap, distance : [n, k, k], n pairs of tasks; distances are floored at ``min_distance``.
    at, picked : where in ``scores.flatten()`` the prototypes are, [2nk], a place maybe twice, and their scores.

    >>> pairs = HostPairs(torch.tensor([[0.9, 0.2], [0.1, 0.6]]), torch.eye(2), 1, mode="confident")
    >>> round(pairs.violations(0.1, 1.0, beta=0.1, mu=0.05).loss, 4)
    1.975
    >>> pairs.at, pairs.gradients(1.0)[0].round()
    (tensor([0, 3]), tensor([ 10., -10.]))
    """

    def __init__(
        self,
        scores: Tensor,
        embeddings: Tensor,
        k: int,
        *,
        mode: str = "random",
        max_task_pairs: int | None = None,
        min_distance: float = 1e-3,
    ) -> None:
        rows, at = _prototypes(scores, min(k, len(scores)), mode, max_task_pairs)
        self.scores = scores
        self._rows, self.at = rows.view(-1), at.view(-1)
        n = self._n = len(rows) // 2
        self.picked = scores.view(-1).index_select(0, self.at)
        picked = self.picked.view(at.shape)
        self.gap = picked[:n].unsqueeze(2) - picked[n:].unsqueeze(1)
        norm = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
        self._inverse = norm.reciprocal_().nan_to_num_(posinf=0.0)
        self._units = embeddings * self._inverse
        chosen = self._units.index_select(0, self._rows).view(*rows.shape, -1)
        self._left, self._right = chosen[:n], chosen[n:]
        distance = torch.baddbmm(_half(scores.dtype), self._left, self._right.mT, alpha=-0.5)
        self._floor, self.distance = min_distance, distance.clamp_(min=min_distance)

    def violations(self, tau: float, kappa: float, *, beta: float, mu: float) -> Violations:
        """Return loss and violation rate under these scales."""
        # with c = clip(gap), huber(gap) = c (gap - c / 2) / beta; -kappa z is below 0 where a pair violates
        self._clipped = self.gap.clamp(-beta, beta)
        short = torch.add(self.gap, self._clipped, alpha=-0.5)
        minus = torch.addcmul(self.distance, short, self._clipped, value=-kappa / (beta * tau))
        self._bent = minus.clamp(-kappa * mu, 0)
        pairs = minus.numel()
        self._to_bent = -1 / (kappa * mu * pairs)
        self._to_gap, self._to_distance = self._to_bent / (beta * tau), self._to_bent / kappa
        bent = self._bent.view(-1)
        bulge = float(torch.dot(bent, minus.view(-1))) - float(torch.dot(bent, bent)) / 2
        return Violations(-bulge * self._to_distance, int(np.count_nonzero(bent.numpy() < 0)) / pairs)

    def gradients(self, strength: float, embeddings: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return ``strength`` times the loss's derivatives to ``picked`` [2nk] and to the embeddings [B, d], if wanted; once."""
        n, units = self._n, self._units
        to_gap = self._clipped.mul_(self._bent).mul_(self._to_gap * strength)
        to_picked = torch.cat((to_gap.sum(2), to_gap.sum(1).neg_())).view(-1)
        if not embeddings:
            return to_picked, None
        to_distance = _where_above(self._bent, self.distance, self._floor)
        to_chosen = units.new_empty((2 * n, *self._left.shape[1:]))
        torch.bmm(to_distance, self._right, out=to_chosen[:n])
        torch.bmm(to_distance.mT, self._left, out=to_chosen[n:])
        to_units = torch.zeros_like(units)
        scale = 0.5 * strength * self._to_distance
        to_units.index_add_(0, self._rows, to_chosen.view(-1, units.shape[1]), alpha=scale)
        along = (to_units * units).sum(1, keepdim=True)
        return to_picked, torch.addcmul(to_units, units, along, value=-1).mul_(self._inverse)


def _prototypes(scores: Tensor, k: int, mode: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Return examples [2n, k], of the first task of each pair and then of the second, and their places in the flat scores."""
    tasks = scores.shape[1]
    used = _all_pairs(tasks)
    n_pairs = used.shape[1]
    if limit is not None and limit < n_pairs:
        used = used.index_select(1, torch.randperm(n_pairs)[:limit])
    used = used.view(-1)
    few = len(used) < tasks  # only the tasks drawn need prototypes
    held = scores.T.index_select(0, used) if few else scores.T
    key = torch.rand(held.shape) if mode == "random" else held
    rows = key.topk(k, dim=1, sorted=False).indices
    if not few and tasks > 2:  # of two tasks, the one pair has them in order
        rows = rows.index_select(0, used)
    return rows, torch.add(used.unsqueeze(1), rows, alpha=tasks)


@lru_cache(maxsize=64)
def _all_pairs(tasks: int) -> Tensor:
    return torch.triu_indices(tasks, tasks, 1)


@lru_cache(maxsize=8)
def _half(dtype: torch.dtype) -> Tensor:
    return torch.full((1, 1, 1), 0.5, dtype=dtype)
