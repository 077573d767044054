"""ReLiF's whole term in one call, its derivative written out: what a training step uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from libmtl_fair.functional._device import has_values
from libmtl_fair.functional._prototypes import Pairing, choose_pairs, prototype_pairs
from libmtl_fair.functional.margins import lipschitz_derivatives, lipschitz_loss

Scales = Callable[[Tensor, Tensor, Tensor], tuple[Tensor | float, Tensor | float]]


def lipschitz_term(
    scores: Tensor,
    embeddings: Tensor,
    k: int,
    scales: Scales,
    valid: Tensor | None = None,
    *,
    mode: str = "random",
    generator: torch.Generator | None = None,
    max_task_pairs: int | None = None,
    beta: float = 0.1,
    mu: float = 0.05,
    min_distance: float = 1e-3,
    detach_distance: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """ReLiF's term of a batch: (loss, violation rate, whether any pair counts), scalars; gradients to scores and embeddings.

    The same as :func:`prototype_pairs`, then :func:`lipschitz_loss`, at about half of the cost: the derivative to scores and
    embeddings is computed here, without recording a graph, so there is a first derivative only. Never waits for the device.

    Parameters
    ----------
    scores, embeddings, k, valid, mode, generator, max_task_pairs
        As for :func:`prototype_pairs`.
    scales : callable
        Given gap [P], distance [P] (floored) and mask [P] of the pairs, detached, returns (tau, kappa): the place for moving
        quantiles.
    beta, mu, min_distance : float
        As for :func:`lipschitz_loss`.
    detach_distance : bool
        No gradient to the embeddings.

    Raises
    ------
    RecipeError, DataError
        As :func:`prototype_pairs` and :func:`lipschitz_loss`.

    >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.6]])
    >>> loss, rate, valid = lipschitz_term(scores, torch.eye(2), 1, lambda *pairs: (0.1, 1.0), mode="confident")
    >>> loss, rate, valid
    (tensor(1.9750), tensor(1.), tensor(True))
    """
    settings = {"beta": beta, "mu": mu, "min_distance": min_distance}
    if not has_values(scores, embeddings):  # a transform of torch.func needs the graph
        gap, distance, mask = prototype_pairs(
            scores,
            embeddings,
            k,
            valid,
            mode=mode,
            generator=generator,
            max_task_pairs=max_task_pairs,
            return_mask=True,
        )
        distance = distance.detach() if detach_distance else distance
        tau, kappa = scales(gap.detach(), distance.detach().clamp(min=min_distance), mask)
        return *lipschitz_loss(gap, distance, tau, kappa, mask, **settings), mask.any()
    with torch.no_grad():
        pairing = choose_pairs(scores, embeddings, k, valid, mode, generator, max_task_pairs)
        gap, distance, units, norm = pairing.geometry(scores, embeddings)
        mask = pairing.mask().flatten()
        tau, kappa = scales(gap.flatten(), distance.flatten().clamp(min=min_distance), mask)
        loss, rate, to_gap, to_distance = lipschitz_derivatives(
            gap.flatten(), distance.flatten(), tau, kappa, mask, **settings
        )
        to_scores = _to_scores(pairing, to_gap.view_as(gap), scores)
        move = embeddings.requires_grad and not detach_distance
        to_embeddings = _to_embeddings(pairing, to_distance.view_as(gap), units, norm, embeddings) if move else None
    value: Tensor = _WithGradient.apply(loss, scores, embeddings, to_scores, to_embeddings)  # type: ignore[no-untyped-call]
    return value, rate, mask.any()


def _to_scores(pairing: Pairing, to_gap: Tensor, scores: Tensor) -> Tensor:
    per_prototype = scores.new_zeros(pairing.chosen.shape)
    per_prototype.index_add_(0, pairing.left, to_gap.sum(2)).index_add_(0, pairing.right, to_gap.sum(1), alpha=-1)
    flat = scores.new_zeros(scores.numel())
    return flat.index_add_(0, pairing.score_at.flatten(), per_prototype.flatten()).view(scores.shape)


def _to_embeddings(pairing: Pairing, to_distance: Tensor, units: Tensor, norm: Tensor, embeddings: Tensor) -> Tensor:
    """Derivative through ``1/2 - u'v / 2`` and the scaling to unit vectors, ``(g - u (u'g)) / |x|``."""
    to_distance = to_distance.to(units.dtype)
    per_unit = torch.zeros_like(units)
    per_unit.index_add_(0, pairing.left, torch.bmm(to_distance, units.index_select(0, pairing.right)), alpha=-0.5)
    per_unit.index_add_(0, pairing.right, torch.bmm(to_distance.mT, units.index_select(0, pairing.left)), alpha=-0.5)
    per_row = (per_unit - units * (units * per_unit).sum(-1, keepdim=True)) / norm
    rows = embeddings.new_zeros((embeddings.shape[:-1].numel(), embeddings.shape[-1]))
    return rows.index_add_(0, pairing.row_at.flatten(), per_row.flatten(0, 1)).view(embeddings.shape)


class _WithGradient(torch.autograd.Function):
    """A value whose derivatives to scores and embeddings are known."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, scores: Tensor, embeddings: Tensor, to_scores: Tensor, to_embeddings: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(to_scores, to_embeddings)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_scores, to_embeddings = ctx.saved_tensors
        return None, grad * to_scores, None if to_embeddings is None else grad * to_embeddings, None, None
