"""Minimum-norm weights on the simplex: an active set on the CPU, all supports or an interior point elsewhere."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.functional._device import as_array, on_cpu, widest

SOLVERS = ("auto", "active-set", "enumeration", "interior-point")
_ENUMERATED = 6
"""Up to so many tasks all supports are tried at once: 63 systems of 7 equations, in about ten device operations."""
_SHRINK = 0.7


def min_norm_weights(
    gram: Tensor, linear: Tensor | None = None, present: Tensor | None = None, *, iters: int = 20, solver: str = "auto"
) -> Tensor:
    """Task weights ``argmin over the simplex of a'Ka + 2 linear'a``; no gradient.

    With ``K`` the Gram matrix of the tasks' gradients and no linear term this is MGDA's minimum-norm point. K is taken as
    positive semidefinite up to rounding; among several minimisers (dependent gradients) one is returned. Solved in the widest
    floating-point type of the device and in units where each gradient has length 1, so that scale does not matter. Ours.

    Parameters
    ----------
    gram : Tensor [..., T, T]
        Symmetric.
    linear : Tensor [..., T], optional
        Linear term.
    present : Tensor [..., T] of bool, optional
        Tasks that take part; the others have weight 0, and so have all where none does.
    iters : int
        Steps of the interior point, of fixed number so as never to wait for the device.
    solver : {"auto", "active-set", "enumeration", "interior-point"}
        "active-set" reads the values (CPU only): T = 2 in closed form, else block pivoting, with the interior point as its
        safety net. "enumeration" tries all supports at once. "auto" is the active set for plain CPU tensors; elsewhere
        enumeration up to 6 tasks, else the interior point.

    Returns
    -------
    Tensor
        [T] or [..., T], of the type of ``gram``, >= 0, sum 1. NaN if an entry of the problem is not finite.

    Raises
    ------
    RecipeError
        For an unknown solver, ``iters < 1``, enumeration of more than 12 tasks, or the active set asked for away from the CPU.
    DataError
        If the shapes do not fit.

    Examples
    --------
    >>> min_norm_weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([0.7500, 0.2500])
    """
    _check(gram, linear, iters, solver)
    gram = gram.detach()
    linear = gram.new_zeros(gram.shape[:-1]) if linear is None else linear.detach()
    readable = on_cpu(gram, linear) and (present is None or on_cpu(present))
    if solver == "active-set" and not readable:
        raise RecipeError("min_norm_weights: solver 'active-set' needs a problem on the CPU; use 'auto'.")
    if readable and gram.dim() > 2:
        options = {"iters": iters, "solver": solver}
        flags = [None] * len(gram) if present is None else present
        return torch.stack([min_norm_weights(g, b, p, **options) for g, b, p in zip(gram, linear, flags)])  # type: ignore[arg-type]
    if present is not None:
        return _among(gram, linear, present, readable, iters, solver)
    ridge = max(2 * torch.finfo(gram.dtype).eps, 1e-13)
    if readable and solver in ("auto", "active-set"):
        found = _solve_cpu(as_array(gram), as_array(linear), ridge)
        if found is not None:
            return torch.as_tensor(found, dtype=gram.dtype)
    enumerate_supports = solver == "enumeration" or (solver == "auto" and gram.shape[-1] <= _ENUMERATED)
    return _solve_device(gram, linear, ridge, iters, enumerate_supports)


def _among(gram: Tensor, linear: Tensor, present: Tensor, readable: bool, iters: int, solver: str) -> Tensor:
    """Solve among the tasks that are present: a smaller problem where values may be read, else behind a barrier."""
    if readable and bool(present.all()):
        return min_norm_weights(gram, linear, iters=iters, solver=solver)
    if readable:
        index = present.nonzero().squeeze(1)
        weights = torch.zeros_like(linear)
        if len(index):
            weights[index] = min_norm_weights(gram[index][:, index], linear[index], iters=iters, solver=solver)
        return weights
    seen = present.to(gram.dtype)
    largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True) + linear.abs().amax(-1, keepdim=True) + 1
    barrier = torch.diag_embed((1 - seen) * 1e12 * largest)
    weights = min_norm_weights(gram + barrier, linear * seen, iters=iters, solver=solver) * seen
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def _check(gram: Tensor, linear: Tensor | None, iters: int, solver: str) -> None:
    if solver not in SOLVERS:
        raise RecipeError(unknown("solver of min_norm_weights", solver, SOLVERS))
    if iters < 1:
        raise RecipeError(f"min_norm_weights: iters must be at least 1, found {iters}.")
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or not gram.shape[-1]:
        raise DataError(f"min_norm_weights: gram must be [T, T] with T >= 1, found shape {tuple(gram.shape)}.")
    if solver == "enumeration" and gram.shape[-1] > 12:
        raise RecipeError(f"min_norm_weights: solver 'enumeration' is for up to 12 tasks, found {gram.shape[-1]}.")
    if linear is not None and linear.shape != gram.shape[:-1]:
        raise DataError(
            f"min_norm_weights: linear must have shape {tuple(gram.shape[:-1])}, found {tuple(linear.shape)}."
        )


def _solve_cpu(gram: np.ndarray, linear: np.ndarray, ridge: float) -> list[float] | np.ndarray | None:
    """Solve on the CPU; None where block pivoting has not settled."""
    n = len(linear)
    if n == 2:
        return _two_tasks(gram.tolist(), linear.tolist())
    gram, linear = gram.astype(np.float64), linear.astype(np.float64)
    if not (math.isfinite(np.add.reduce(gram, None)) and math.isfinite(np.add.reduce(linear))):
        return None if np.isfinite(gram).all() and np.isfinite(linear).all() else np.full(n, np.nan)
    diagonal = gram.diagonal()
    largest = max(np.maximum.reduce(diagonal), np.maximum.reduce(linear), -np.minimum.reduce(linear))
    length = np.sqrt(np.maximum(diagonal, max(1e-24 * largest, 1e-300)))
    shortest = np.minimum.reduce(length)
    unit = shortest / length
    # K x - nu unit = -linear and unit'x = 1, in units where each gradient has length 1
    system = np.zeros((n + 1, n + 1))
    np.divide(gram + gram.T, 2 * length[:, None] * length, out=system[:n, :n])
    system.ravel()[: n * (n + 2) : n + 2] += ridge
    system[:n, n], system[n, :n] = -unit, unit
    right = np.ones(n + 1)
    np.divide(linear, length * -shortest, out=right[:n])
    x = _block_pivoting(system, right)
    if x is None:
        return None
    weights = x / length
    total: np.ndarray = weights / np.add.reduce(weights)
    return total


def _two_tasks(gram: list[list[float]], linear: list[float]) -> list[float]:
    (a, b), (c, d) = gram
    cross = (b + c) / 2
    slope, curvature = d - cross + linear[1] - linear[0], a - 2 * cross + d
    if slope != slope or curvature != curvature:
        return [float("nan")] * 2
    if curvature <= 0:  # equal gradients: only the linear term decides
        return [0.5, 0.5] if slope == 0 else [float(slope > 0), float(slope < 0)]
    first = min(max(slope / curvature, 0.0), 1.0)
    return [first, 1 - first]


def _block_pivoting(system: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """Return x [n] of ``min x'Kx + 2 linear'x over x >= 0, unit'x = 1``, exchanging all violated signs at once.

    ``system`` [n + 1, n + 1] and ``right`` hold ``K x - nu unit = -linear`` and ``unit'x = 1``. After Kim and Park (2011): while
    the number of violations falls, or has failed to only three times, every violated variable changes sides; then one at
    a time. Typically one to six solves, against one a task for a primal active set.
    """
    n = len(right) - 1
    free = np.ones(n + 1, dtype=bool)
    fewest, chances = n + 1, 3
    for _ in range(3 * n + 10):
        x = _solved(system, right, free)
        if x is None:
            return None
        wrong = free & (x < 0)
        wrong[n] = False
        if not free.all():
            slack = system @ x - right
            wrong |= ~free & (slack < -1e-13 * (np.abs(system) @ np.abs(x) + np.abs(right)))
        violations = int(np.count_nonzero(wrong))
        if not violations:
            return x[:n] if np.isfinite(x).all() else None
        if violations < fewest:
            fewest, chances = violations, 3
        elif chances:
            chances -= 1
        else:
            wrong[: np.flatnonzero(wrong)[-1]] = False
        free ^= wrong
        if not free[:n].any():
            free[np.argmin((system.diagonal() - right)[:n] / system[n, :n])] = True
    return None


def _solved(system: np.ndarray, right: np.ndarray, free: np.ndarray) -> np.ndarray | None:
    """Solve the free rows and columns, 0 elsewhere; None if they are singular."""
    if free.all():
        found, failed = lapack.dgesv(system, right)[2:]
        return None if failed else found
    index = np.flatnonzero(free)
    found, failed = lapack.dgesv(system[index][:, index], right[index])[2:]
    if failed:
        return None
    x = np.zeros(len(right))
    x[index] = found
    return x


def _solve_device(gram: Tensor, linear: Tensor, ridge: float, iters: int, enumerate_supports: bool) -> Tensor:
    """Solve by tensor operations of fixed number; batched."""
    dtype = widest(gram.device)
    K, b = gram.to(dtype), linear.to(dtype)
    diagonal = K.diagonal(dim1=-2, dim2=-1)
    largest = torch.maximum(diagonal, b.abs()).amax(-1, keepdim=True)
    smallest = (1e-24 * largest).clamp(min=1e8 * torch.finfo(dtype).tiny)
    length = torch.maximum(diagonal, smallest).sqrt()
    shortest = length.amin(-1, keepdim=True)
    K = (K + K.mT) / (2 * length.unsqueeze(-1) * length.unsqueeze(-2)) + torch.diag_embed(torch.full_like(b, ridge))
    solve = _enumerate if enumerate_supports else partial(_interior_point, iters=iters)
    weights = solve(K, b / (length * shortest), shortest / length) / length
    weights = weights / weights.sum(-1, keepdim=True)
    finite = gram.isfinite().all(-1).all(-1, keepdim=True) & linear.isfinite().all(-1, keepdim=True)
    return weights.where(finite, torch.nan).to(gram.dtype)


def _enumerate(K: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """:func:`_block_pivoting`'s problem by trying every support: ``2^T - 1`` small systems in one batched solve."""
    n = b.shape[-1]
    subset = torch.arange(1, 2**n, device=b.device).unsqueeze(-1) >> torch.arange(n, device=b.device) & 1
    free = subset.to(b.dtype)  # [2^n - 1, n]
    corner = torch.diag_embed(1 - free) + K.unsqueeze(-3) * free.unsqueeze(-1) * free.unsqueeze(-2)
    border = (c.unsqueeze(-2) * free).unsqueeze(-1)
    top = torch.cat([corner, -border], dim=-1)
    bottom = torch.cat([border.mT, torch.zeros_like(border[..., :1, :])], dim=-1)
    right = torch.cat([-b.unsqueeze(-2) * free, torch.ones_like(border[..., 0, :])], dim=-1)
    x: Tensor = torch.linalg.solve_ex(torch.cat([top, bottom], dim=-2), right)[0][..., :n]  # _ex: no check, so no wait
    allowed = (x.isfinite() & (x >= 0)).all(-1)
    value = ((x @ K) * x).sum(-1) + 2 * (x * b.unsqueeze(-2)).sum(-1)
    best = value.where(allowed, torch.inf).argmin(-1, keepdim=True).unsqueeze(-1)
    return x.gather(-2, best.expand(*best.shape[:-1], n)).squeeze(-2)


def _interior_point(K: Tensor, b: Tensor, c: Tensor, iters: int) -> Tensor:
    """:func:`_block_pivoting`'s problem by a primal-dual interior point; vectors are rows [..., 1, T]."""
    b, c = b.unsqueeze(-2), c.unsqueeze(-2)
    scale = 1 + b.abs().amax(-1, keepdim=True)
    K, b = K / scale, b / scale
    x, z, nu = 1 / (c * c.shape[-1]), torch.ones_like(b), torch.zeros_like(scale)  # equal weights
    for _ in range(iters):
        x, z, nu = _interior_step(K, b, c, x, z, nu)
    return x.squeeze(-2)


def _interior_step(K: Tensor, b: Tensor, c: Tensor, x: Tensor, z: Tensor, nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take Mehrotra's step or a plainly centring one, whichever gets further while all ``x z`` stay near their mean.

    Mehrotra's step alone cycles on some badly scaled problems (Salahi, Peng and Terlaky, 2008).
    """
    factor, _ = torch.linalg.cholesky_ex(K + torch.diag_embed((z / x).squeeze(-2)))  # _ex: no check, so no wait
    dual = x @ K + b - nu * c - z
    primal = 1 - (c * x).sum(-1, keepdim=True)
    along = torch.cholesky_solve(c.mT, factor).mT
    weight = (c * along).sum(-1, keepdim=True)

    def direction(complement: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rest = torch.cholesky_solve((complement / x - dual).mT, factor).mT
        d_nu = (primal - (c * rest).sum(-1, keepdim=True)) / weight
        dx = rest + d_nu * along
        dz = (complement - z * dx) / x
        shrinking = torch.cat([-dx / x, -dz / z], dim=-1).amax(-1, keepdim=True)
        return dx, dz, d_nu, 0.995 / shrinking.clamp(min=0.995)

    mu = (x * z).mean(-1, keepdim=True)
    dx, dz, _, far = direction(-x * z)
    reached = ((x + far * dx) * (z + far * dz)).mean(-1, keepdim=True)
    curved = torch.minimum(torch.maximum(dx * dz, -10 * mu), 10 * mu)
    targets = torch.cat([(reached / mu) ** 3 * mu - x * z - curved, 0.3 * mu - x * z], dim=-2)
    dx, dz, d_nu, far = direction(targets)
    step = far * _SHRINK ** torch.arange(8, device=x.device)  # [..., 2, 8]
    tried = [
        (old.unsqueeze(-2) + step.unsqueeze(-1) * d.unsqueeze(-2)).flatten(-3, -2)
        for old, d in ((x, dx), (z, dz), (nu, d_nu))
    ]
    product = tried[0] * tried[1]
    mean = product.mean(-1)
    near = (product > 0).all(-1) & (product.amin(-1) >= 1e-3 * mean)
    best = mean.where(near, torch.inf).argmin(-1, keepdim=True).unsqueeze(-1)
    new = [candidate.gather(-2, best.expand(*best.shape[:-1], candidate.shape[-1])) for candidate in tried]
    sound = near.any(-1, keepdim=True).unsqueeze(-1)
    return new[0].where(sound, x), new[1].where(sound, z), new[2].where(sound, nu)
