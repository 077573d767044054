"""Conflicts between tasks' gradients: finding, counting and projecting them off one another (FBGrad; PCGrad)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from libmtl_fair.functional._device import on_cpu, widest
from libmtl_fair.functional.lipschitz import unit_vectors


def project_conflicts(grads: Tensor) -> Tensor:
    """Project each gradient of ``grads`` [T, P] off the others' *original* gradients that it conflicts with.

    For each i, and j != i in order of index: if ``<g_i, g_j> < 0`` then ``g_i <- g_i - <g_i, g_j> / |g_j|^2 g_j``, with g_i the
    running and g_j the original gradient; zero gradients are skipped. For T = 2 this is FairBranch's correction, for more
    PCGrad's in fixed order **(ours)**. Every result is a combination of the originals, so all steps run on the
    [T, T] Gram matrix and two products with ``grads`` are all that P costs.

    >>> project_conflicts(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    return conflict_coefficients(grads @ grads.T).to(grads.dtype) @ grads


def conflict_coefficients(gram: Tensor) -> Tensor:
    """Combinations C [T, T] with ``project_conflicts(G) = C G``, from the Gram matrix ``G G'`` [T, T]; no gradient.

    For gradients held in several tensors sum their Gram matrices, and apply C to each.

    >>> conflict_coefficients(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    tensor([[1.0000, 0.5000],
            [1.0000, 1.0000]])
    """
    wide = gram.detach().to(widest(gram.device))
    square = wide.diagonal()
    itself = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    factor = (itself - 1) / square.where(square > 0, torch.inf)  # 0 on the diagonal: never off itself
    host = on_cpu(gram)
    steps = torch.from_numpy(_host_steps(wide.numpy(), factor.numpy())) if host else _device_steps(wide, factor)
    return (steps + itself).to(gram.dtype)


def _host_steps(gram: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Sequential projections on numpy: column j holds how much of g_j each gradient was given."""
    running, steps = gram.copy(), np.zeros_like(gram)
    for j in range(len(gram)):
        steps[:, j] = np.minimum(running[:, j], 0) * factor[:, j]
        if steps[:, j].any():
            running += steps[:, j, None] * gram[j]
    return steps


def _device_steps(gram: Tensor, factor: Tensor) -> Tensor:
    """Run as :func:`_host_steps`, without looking at the values."""
    running, steps = gram, []
    for j in range(len(gram)):
        step = running[:, j].clamp(max=0) * factor[:, j]
        running = torch.addr(running, step, gram[j])
        steps.append(step)
    return torch.stack(steps, dim=1)


def gradient_cosines(grads: Tensor) -> Tensor:
    """Cosines [T, T] between the gradients ``grads`` [T, P]; 0 for a zero gradient, also with itself.

    >>> gradient_cosines(torch.tensor([[2.0, 0.0], [-3.0, 0.0], [0.0, 0.0]]))
    tensor([[ 1., -1.,  0.],
            [-1.,  1.,  0.],
            [ 0.,  0.,  0.]])
    """
    units = unit_vectors(grads)
    return (units @ units.T).clamp(-1, 1)


def conflict_count(cosines: Tensor) -> Tensor:
    """Number of conflicting pairs i < j (negative cosine, or inner product) in ``cosines`` [T, T], as an int64 scalar.

    >>> conflict_count(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    tensor(1)
    """
    return (cosines < 0).triu(1).sum()


def conflict_angles(cosines: Tensor) -> Tensor:
    """Angles in degrees, in [0, 180], of all pairs i < j of ``cosines`` [T, T]: [T (T - 1) / 2] in row-major order.

    >>> conflict_angles(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([90.])
    """
    i, j = torch.triu_indices(len(cosines), len(cosines), 1, device=cosines.device)
    return cosines[i, j].clamp(-1, 1).arccos().rad2deg()
