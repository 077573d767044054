"""Conflicts between tasks' gradients: finding, counting and projecting them off one another (FBGrad; PCGrad)."""

from __future__ import annotations

import torch
from torch import Tensor

from libmtl_fair.functional._device import widest
from libmtl_fair.functional.lipschitz import unit_vectors


def project_conflicts(grads: Tensor) -> Tensor:
    """Project each gradient of ``grads`` [..., T, P] off the others' *original* gradients that it conflicts with.

    For each i, and j != i in order of index: if ``<g_i, g_j> < 0`` then ``g_i <- g_i - <g_i, g_j> / |g_j|^2 g_j``, with g_i the
    running and g_j the original gradient; zero gradients are skipped. For T = 2 this is FairBranch's correction, for more
    PCGrad's in fixed order **(ours)**. Every result is a combination of the originals, so all steps run on the
    [T, T] Gram matrix and two products with ``grads`` are all that P costs.

    >>> project_conflicts(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    return conflict_coefficients(grads @ grads.mT) @ grads


def conflict_coefficients(gram: Tensor) -> Tensor:
    """Combinations C [..., T, T] with ``project_conflicts(G) = C G``, from Gram matrices ``G G'`` [..., T, T]; no gradient.

    For gradients held in several tensors sum their Gram matrices, and apply C to each.

    >>> conflict_coefficients(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    tensor([[1.0000, 0.5000],
            [1.0000, 1.0000]])
    """
    running = wide = gram.detach().to(widest(gram.device))
    square = wide.diagonal(dim1=-2, dim2=-1)
    itself = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    factor = (itself - 1) / square.where(square > 0, torch.inf).unsqueeze(-2)  # 0 on the diagonal: never off itself
    steps = []
    for j in range(wide.shape[-1]):
        steps.append(running[..., j].clamp(max=0) * factor[..., j])
        running = running + steps[-1].unsqueeze(-1) * wide[..., j, None, :]
    return (torch.stack(steps, dim=-1) + itself).to(gram.dtype)


def gradient_cosines(grads: Tensor) -> Tensor:
    """Cosines [..., T, T] between the gradients ``grads`` [..., T, P]; 0 for a zero gradient, also with itself.

    >>> gradient_cosines(torch.tensor([[2.0, 0.0], [-3.0, 0.0], [0.0, 0.0]]))
    tensor([[ 1., -1.,  0.],
            [-1.,  1.,  0.],
            [ 0.,  0.,  0.]])
    """
    units = unit_vectors(grads)
    return (units @ units.mT).clamp(-1, 1)


def conflict_count(cosines: Tensor) -> Tensor:
    """Number of conflicting pairs i < j (negative cosine, or inner product) in ``cosines`` [..., T, T], as int64 [...].

    >>> conflict_count(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    tensor(1)
    """
    return (cosines < 0).triu(1).sum((-2, -1))


def conflict_angles(cosines: Tensor) -> Tensor:
    """Angles in degrees, in [0, 180], of all pairs i < j of ``cosines`` [..., T, T]: [..., T (T - 1) / 2] in row-major order.

    >>> conflict_angles(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([90.])
    """
    i, j = torch.triu_indices(cosines.shape[-1], cosines.shape[-1], 1, device=cosines.device)
    return cosines[..., i, j].clamp(-1, 1).arccos().rad2deg()
