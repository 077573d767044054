"""Weights on the simplex: projection, worst-case aggregation of disparities, and minimum-norm task weights.

Each problem here has T unknowns, the number of tasks. For plain CPU tensors it is solved on Python numbers or by numpy, which
waits for nothing there and costs a fraction of as many small tensor operations; elsewhere by tensor operations of fixed
number, which never wait for the device.
"""

from __future__ import annotations

import itertools

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
    ordered = v.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, v.shape[-1] + 1, device=v.device)
    support = (ordered * rank > excess).sum(-1, keepdim=True)
    return (v - excess.gather(-1, support - 1) / support).relu()


def aggregate_disparities(
    psi: Tensor, mu: float, present: Tensor | None = None, solver: str = "exact"
) -> tuple[Tensor, Tensor]:
    """Smooth worst case of the tasks' disparities: ``Phi = max over w of w.psi - (mu/2) (|w|^2 - 1/T_p)`` on the simplex.

    ``w* = ((psi - nu) / mu)+``: small ``mu`` puts all weight on the worst task, large ``mu`` spreads it evenly; ``mean psi <=
    Phi <= max psi`` over the T_p tasks present (centring by 1/T_p is ours). The gradient of Phi is ``sum_t w*_t grad psi_t``
    (Danskin), w* detached. Source: FairMT (AHFDA).

    Parameters
    ----------
    psi : Tensor [T]
        Disparity of each task; anything where absent.
    mu : float
        Smoothing, > 0.
    present : Tensor [T] of bool, optional
        Tasks that take part; with none, Phi = 0 and w = 0.
    solver : {"exact", "frank-wolfe"}
        Projection by sorting, or pairwise Frank-Wolfe steps with exact line search (the source is projection-free), to a
        duality gap of 1e-9 min(mu, 1) where values can be read without waiting, else 50 T steps.

    Returns
    -------
    (phi scalar, w [T] detached).

    Raises
    ------
    RecipeError
        If ``mu`` is not positive or the solver is unknown.

    >>> phi, w = aggregate_disparities(torch.tensor([0.5, 0.1]), mu=0.5)
    >>> phi, w
    (tensor(0.3800), tensor([0.9000, 0.1000]))
    """
    if not mu > 0:
        raise RecipeError(f"aggregate_disparities: mu must be positive, found {mu}.")
    if solver not in AGGREGATION_SOLVERS:
        raise RecipeError(unknown("solver of aggregate_disparities", solver, AGGREGATION_SOLVERS))
    if psi.dim() == 1 and (on_cpu(psi) if present is None else on_cpu(psi, present)):
        return _aggregate_host(psi, mu, present, solver)
    if present is not None:
        psi = psi.where(present, 0.0)
    else:
        present = torch.ones_like(psi, dtype=torch.bool)
    count = present.sum(-1, keepdim=True)
    allowed = present | (count == 0)
    target = (psi.detach() / mu).masked_fill(~allowed, -torch.inf)
    w = project_to_simplex(target) if solver == "exact" else _frank_wolfe_device(target, allowed)
    w = w.where(present, 0.0)
    centred = w.square().sum(-1) - 1 / count.squeeze(-1).clamp(min=1)
    return (w * psi).sum(-1) - (mu / 2) * centred.where(count.squeeze(-1) > 0, 0.0), w


def _aggregate_host(psi: Tensor, mu: float, present: Tensor | None, solver: str) -> tuple[Tensor, Tensor]:
    seen = None if present is None or bool(present.all()) else present.tolist()
    weights = worst_case_weights(psi.tolist(), mu, seen, solver)
    if seen is not None:
        if not any(seen):
            return psi.where(present, 0.0).sum() * 0, torch.zeros_like(psi)  # type: ignore[arg-type]
        psi = psi.where(present, 0.0)  # type: ignore[arg-type]
    w = torch.tensor(weights, dtype=psi.dtype)
    return torch.dot(w, psi) - centring(weights, mu, len(weights) if seen is None else sum(seen)), w


def worst_case_weights(psi: list[float], mu: float, present: list[bool] | None, solver: str) -> list[float]:
    """Return the weights of :func:`aggregate_disparities` for Python numbers; ``present`` None is all."""
    target = [value / mu for value in psi]
    if present is not None:
        target = [value for value, here in zip(target, present, strict=True) if here]
        if not target:
            return [0.0] * len(psi)
    gap = _FRANK_WOLFE_GAP * min(1.0, 1 / mu)  # in units of mu, where it keeps w within 5e-5
    weights = _water_filling(target) if solver == "exact" else _frank_wolfe_host(target, gap)
    if present is None:
        return weights
    rest = iter(weights)
    return [next(rest) if here else 0.0 for here in present]


def centring(weights: list[float], mu: float, count: int) -> float:
    """Return ``(mu/2) (|w|^2 - 1/count)``, what :func:`aggregate_disparities` takes off; 0 without a task."""
    return (mu / 2) * (sum(weight * weight for weight in weights) - 1 / count) if count else 0.0


def _water_filling(target: list[float]) -> list[float]:
    """Projection on the simplex, on Python numbers; from the top, so that only differences matter."""
    top = max(target)
    theta = 0.0
    for rank, (value, total) in enumerate(_prefix_sums(sorted((v - top for v in target), reverse=True)), start=1):
        if value * rank <= total - 1:
            break
        theta = (total - 1) / rank
    return [max(v - top - theta, 0.0) for v in target]


def _prefix_sums(values: list[float]) -> zip[tuple[float, float]]:
    return zip(values, itertools.accumulate(values), strict=True)


def _frank_wolfe_host(target: list[float], gap: float) -> list[float]:
    """Pairwise Frank-Wolfe for ``max w.v - |w|^2 / 2``: move weight from the worst used entry to the best entry."""
    w = [1 / len(target)] * len(target)
    for _ in range(_FRANK_WOLFE_STEPS * len(target)):
        slope = [v - x for v, x in zip(target, w, strict=True)]
        best = max(range(len(w)), key=slope.__getitem__)
        if slope[best] - sum(x * s for x, s in zip(w, slope, strict=True)) <= gap:
            break
        worst = min((i for i, x in enumerate(w) if x > 0), key=slope.__getitem__)
        step = min(w[worst], (slope[best] - slope[worst]) / 2)
        w[best] += step
        w[worst] -= step
    return w


def _frank_wolfe_device(target: Tensor, allowed: Tensor) -> Tensor:
    """Run as :func:`_frank_wolfe_host`, a fixed number of steps; at the optimum a step moves nothing."""
    w = allowed / allowed.sum(-1, keepdim=True)
    w = w.to(target.dtype)
    for _ in range(_FRANK_WOLFE_STEPS // 2 * target.shape[-1]):
        slope = target - w
        high, best = slope.max(-1, keepdim=True)
        low, worst = slope.masked_fill(w <= 0, torch.inf).min(-1, keepdim=True)
        step = torch.minimum(w.gather(-1, worst), (high - low) / 2)
        w = w.scatter_add(-1, best, step).scatter_add(-1, worst, -step)
    return w
