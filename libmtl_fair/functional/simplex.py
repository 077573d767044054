"""Weights on the simplex: projection, worst-case aggregation of disparities, and minimum-norm task weights.

Each problem here has T unknowns, the number of tasks, and any leading dimensions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.functional._device import on_cpu
from libmtl_fair.functional._gram import head_gram
from libmtl_fair.functional._min_norm import SOLVERS, min_norm_weights

__all__ = [
    "AGGREGATION_SOLVERS",
    "SOLVERS",
    "aggregate_disparities",
    "head_gram",
    "min_norm_weights",
    "project_to_simplex",
]

AGGREGATION_SOLVERS = ("exact", "frank-wolfe")
_FRANK_WOLFE_GAP = 1e-9
_FRANK_WOLFE_STEPS = 100
"""Frank-Wolfe steps a task: the limit where it may stop early, half of it taken where it may not."""


def project_to_simplex(v: Tensor) -> Tensor:
    """Euclidean projection of ``v`` [..., T] on the simplex: ``(v - theta)+`` with theta such that it sums to 1.

    Exact, by sorting, in O(T log T); differentiable. Entries of -inf get 0, as long as one is finite.

    >>> project_to_simplex(torch.tensor([0.9, 0.5, -1.0]))
    tensor([0.7000, 0.3000, 0.0000])
    """
    v = v - v.detach().amax(-1, keepdim=True)  # only differences matter, and near 0 they are exact
    excess = v.sort(-1, descending=True).values.cumsum(-1) - 1
    # the threshold of the k largest rises until k is the support, and falls from there
    return (v - (excess / _ranks(v.shape[-1], v.device)).amax(-1, keepdim=True)).relu()


@lru_cache(maxsize=64)
def _ranks(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(1, count + 1, device=device)


def aggregate_disparities(
    psi: Tensor, mu: float, present: Tensor | None = None, solver: str = "exact"
) -> tuple[Tensor, Tensor]:
    """Smooth worst case of the tasks' disparities: ``Phi = max over w of w.psi - (mu/2) (|w|^2 - 1/T_p)`` on the simplex.

    ``w* = ((psi - nu) / mu)+``: small ``mu`` puts all weight on the worst task, large ``mu`` spreads it evenly; ``mean psi <=
    Phi <= max psi`` over the T_p tasks present (centring by 1/T_p is ours). The gradient of Phi is ``sum_t w*_t grad psi_t``
    (Danskin), w* detached. Source: FairMT (AHFDA).

    Parameters
    ----------
    psi : Tensor [..., T]
        Disparity of each task; anything where absent.
    mu : float
        Smoothing, > 0.
    present : Tensor [..., T] of bool, optional
        Tasks that take part; with none, Phi = 0 and w = 0.
    solver : {"exact", "frank-wolfe"}
        Projection by sorting, or pairwise Frank-Wolfe steps with exact line search (the source is projection-free), to a
        duality gap of 1e-9 min(mu, 1) where values can be read without waiting, else 50 T steps.

    Returns
    -------
    tuple of (Tensor, Tensor)
        (phi [...], w [..., T] detached).

    Raises
    ------
    RecipeError
        If ``mu`` is not positive or the solver is unknown.

    Examples
    --------
    >>> phi, w = aggregate_disparities(torch.tensor([0.5, 0.1]), mu=0.5)
    >>> phi, w
    (tensor(0.3800), tensor([0.9000, 0.1000]))
    """
    if not mu > 0:
        raise RecipeError(f"aggregate_disparities: mu must be positive, found {mu}.")
    if solver not in AGGREGATION_SOLVERS:
        raise RecipeError(unknown("solver of aggregate_disparities", solver, AGGREGATION_SOLVERS))
    if present is None or (on_cpu(present) and bool(present.all())):
        target = psi.detach() / mu
        everywhere = torch.ones_like(psi, dtype=torch.bool) if solver != "exact" else None
        w = project_to_simplex(target) if everywhere is None else _frank_wolfe(target, everywhere, min(1.0, 1 / mu))
        return (w * (psi - (mu / 2) * w)).sum(-1) + mu / (2 * psi.shape[-1]), w
    psi, count = psi.where(present, 0.0), present.sum(-1, keepdim=True)
    allowed = present | (count == 0)
    target = (psi.detach() / mu).masked_fill(~allowed, -torch.inf)
    w = project_to_simplex(target) if solver == "exact" else _frank_wolfe(target, allowed, min(1.0, 1 / mu))
    w = w.where(present, 0.0)
    count = count.squeeze(-1)
    centred = (w * w).sum(-1) - 1 / count.clamp(min=1).to(w.dtype)
    return (w * psi).sum(-1) - (mu / 2) * centred.where(count > 0, 0.0), w


def _frank_wolfe(target: Tensor, allowed: Tensor, unit: float) -> Tensor:
    """Pairwise Frank-Wolfe for ``max w.v - |w|^2 / 2``: move weight from the worst used entry to the best entry.

    Where reading waits for nothing it stops at the gap (in units of mu, where it keeps w within 5e-5), else after a fixed
    number of steps; at the optimum a step moves nothing.
    """
    w = allowed.to(target.dtype)
    w = w / w.sum(-1, keepdim=True)
    readable = on_cpu(target)
    for _ in range(_FRANK_WOLFE_STEPS * target.shape[-1] // (1 if readable else 2)):
        slope = target - w
        high, best = slope.max(-1, keepdim=True)
        if readable and bool(
            (high.squeeze(-1) - (w * slope.where(allowed, 0.0)).sum(-1)).max() <= _FRANK_WOLFE_GAP * unit
        ):
            break
        low, worst = slope.masked_fill(w <= 0, torch.inf).min(-1, keepdim=True)
        step = torch.minimum(w.gather(-1, worst), (high - low) / 2)
        w = w.scatter_add(-1, best, step).scatter_add(-1, worst, -step)
    return w
