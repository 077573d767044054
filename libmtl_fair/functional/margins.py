"""Lipschitz margins between task scores and representation distances (ReLiF, arXiv:2606.10632)."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.functional._device import on_host, widest

PROTOTYPES = ("confident", "random")


def huber(u: Tensor, beta: float) -> Tensor:
    """Smooth absolute value ``rho_beta``: ``u^2 / (2 beta)`` where ``|u| <= beta``, else ``|u| - beta / 2``.

    Shape: that of ``u``; values >= 0. Source: ReLiF.

    Raises
    ------
    RecipeError
        If ``beta`` is not positive.

    >>> huber(torch.tensor([0.05, -1.0]), beta=0.1)
    tensor([0.0125, 0.9500])
    """
    _positive("beta", beta)
    return torch.nn.functional.smooth_l1_loss(u, u.new_zeros(()).expand_as(u), reduction="none", beta=beta)


def huberized_hinge(z: Tensor, mu: float) -> Tensor:
    """Smooth hinge ``phi_mu``: 0 below 0, ``z^2 / (2 mu)`` on (0, mu], ``z - mu / 2`` above.

    Shape: that of ``z``; ``0 <= max(z, 0) - phi_mu(z) <= mu / 2``. Source: ReLiF.

    Raises
    ------
    RecipeError
        If ``mu`` is not positive.

    >>> huberized_hinge(torch.tensor([-1.0, 0.05, 1.0]), mu=0.05)
    tensor([0.0000, 0.0250, 0.9750])
    """
    _positive("mu", mu)
    return huber(z.relu(), mu)


def lipschitz_margin(
    gap: Tensor, distance: Tensor, tau: Tensor | float, kappa: Tensor | float, beta: float = 0.1
) -> Tensor:
    """Margin ``z = rho_beta(gap) / tau - distance / kappa`` of each pair; positive where the pair violates.

    ``gap`` and ``distance`` have one shape; ``distance`` is used as it is, so a floor (ReLiF: 1e-3) is the caller's.
    ``tau`` and ``kappa`` are the scales, numbers or scalars. Source: ReLiF.

    >>> lipschitz_margin(torch.tensor([0.55]), torch.tensor([0.1]), tau=1.0, kappa=0.5)
    tensor([0.3000])
    """
    return huber(gap, beta) / tau - distance / kappa


def cosine_distance(u: Tensor, v: Tensor) -> Tensor:
    """Distance ``(1 - cos(u, v)) / 2`` over the last dimension, in [0, 1]; the other dimensions broadcast.

    A zero vector (also one whose norm under- or overflows) has cosine 0, so distance 1/2, and zero gradient **(ours)**.

    >>> cosine_distance(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]]))
    tensor([0.5000, 1.0000, 0.5000])
    """
    cosine = (unit_vectors(u) * unit_vectors(v)).sum(-1)
    return (0.5 - 0.5 * cosine).clamp(0, 1)


def unit_vectors(u: Tensor) -> Tensor:
    """Scale vectors in the last dimension to length 1; a zero vector stays zero, with zero gradient.

    >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    norm: Tensor = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    return u / norm.masked_fill(norm == 0, torch.inf)


@overload
def prototype_pairs(
    scores: Tensor,
    embeddings: Tensor,
    k: int,
    valid: Tensor | None = None,
    *,
    mode: str = "confident",
    generator: torch.Generator | None = None,
    max_task_pairs: int | None = None,
    return_mask: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def prototype_pairs(
    scores: Tensor,
    embeddings: Tensor,
    k: int,
    valid: Tensor | None = None,
    *,
    mode: str = "confident",
    generator: torch.Generator | None = None,
    max_task_pairs: int | None = None,
    return_mask: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def prototype_pairs(
    scores: Tensor,
    embeddings: Tensor,
    k: int,
    valid: Tensor | None = None,
    *,
    mode: str = "confident",
    generator: torch.Generator | None = None,
    max_task_pairs: int | None = None,
    return_mask: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Signed score gaps and embedding distances of all cross-task pairs of ``k`` prototypes a task.

    For tasks i < j and every prototype x of i and y of j: ``gap = p_i(x) - p_j(y)``, ``distance = d(h(x), h(y))``
    (:func:`cosine_distance`, not clamped away from 0). Pairs are ordered by (i, j), then x, then y.
    An example can be a prototype where its score is finite and ``valid`` holds; a task with fewer than ``k`` such examples
    (or a batch smaller than ``k``) contributes those it has. Source: ReLiF; random prototypes and task sampling are ours.

    Parameters
    ----------
    scores : Tensor [T, B]
        Score of each task and example, in [0, 1].
    embeddings : Tensor [B, d] or [T, B, d]
        What the heads receive: shared by all tasks, or one for each.
    k : int
        Prototypes per task.
    valid : Tensor [T, B] of bool, optional
        Examples that may be picked.
    mode : {"confident", "random"}
        The highest scores, or uniform draws without replacement, independent for each task.
    generator : torch.Generator, optional
        Source of the random draws, on any device.
    max_task_pairs : int, optional
        Use only this many task pairs, drawn anew at each call: with T tasks there are T (T - 1) / 2 of them.
    return_mask : bool
        True: fixed shapes and a mask of the pairs that count, without waiting for the device; training uses this.
        False: only the pairs that count, which on an accelerator waits for their number.

    Returns
    -------
    (gap [P], distance [P]), with ``return_mask`` also mask [P] of bool. All are finite, also where the mask is False.

    Raises
    ------
    RecipeError
        For an unknown mode, ``k < 1`` or ``max_task_pairs < 1``.
    DataError
        If the shapes of scores and embeddings do not fit.

    >>> gap, distance = prototype_pairs(torch.tensor([[0.9, 0.1], [0.2, 0.6]]), torch.eye(2), k=1)
    >>> gap, distance
    (tensor([0.3000]), tensor([0.5000]))
    """
    _check_pairs(scores, embeddings, k, mode, max_task_pairs)
    usable = scores.isfinite() if valid is None else scores.isfinite() & valid
    left, right = _task_pairs(scores, generator, max_task_pairs)
    if max_task_pairs is not None and 2 * len(left) < len(scores):
        rows = torch.cat([left, right])  # only the tasks drawn need prototypes
        scores, usable = scores[rows], usable[rows]
        embeddings = embeddings if embeddings.dim() == 2 else embeddings[rows]
        left, right = torch.arange(2 * len(left), device=scores.device).chunk(2)
    index, chosen = _pick(scores, usable, min(k, scores.shape[1]), mode, generator)
    picked = scores.gather(1, index).where(chosen, 0.0)
    units = unit_vectors(_rows(embeddings, index).where(chosen.unsqueeze(-1), 0.0))
    gap = picked[left].unsqueeze(2) - picked[right].unsqueeze(1)
    cosine = torch.bmm(units[left], units[right].transpose(1, 2)).to(gap.dtype)
    distance = (0.5 - 0.5 * cosine).clamp(0, 1)
    mask = chosen[left].unsqueeze(2) & chosen[right].unsqueeze(1)
    if return_mask:
        return gap.flatten(), distance.flatten(), mask.flatten()
    return gap[mask], distance[mask]


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
    counts. Entries that count must not be NaN.

    Raises
    ------
    RecipeError
        If ``q`` is not in [0, 1].

    >>> masked_quantile(torch.tensor([3.0, 1.0, 9.0, 2.0]), 0.5, torch.tensor([True, True, False, True]))
    tensor(2.)
    """
    if not 0 <= q <= 1:
        raise RecipeError(f"masked_quantile: q must be in [0, 1], found {q}.")
    x = x.detach()
    if x.dim() == 1 and (on_host(x) if mask is None else on_host(x, mask)):
        # CPU values: selection by numpy is O(n) and waits for nothing
        values = x.numpy() if mask is None else x.numpy()[mask.numpy()]
        return x.new_tensor(_host_quantile(values, q))
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    ordered = x.masked_fill(~mask, torch.inf).sort(-1).values
    fraction = torch.full((1,), q, dtype=widest(x.device), device=x.device)
    return sorted_quantiles(ordered, mask.sum(-1, keepdim=True), fraction).squeeze(-1)


def sorted_quantiles(ordered: Tensor, count: Tensor, q: Tensor) -> Tensor:
    """Quantiles ``q`` [Q] of the first ``count`` [..., 1] entries of ``ordered`` [..., n]; 0 where count is 0.

    >>> sorted_quantiles(torch.tensor([1.0, 2.0, 3.0, torch.inf]), torch.tensor([3]), torch.tensor([0.25, 1.0]))
    tensor([1.5000, 3.0000])
    """
    position = q.to(widest(q.device)) * (count - 1).clamp(min=0)
    low = position.floor()
    below = ordered.gather(-1, low.long())
    above = ordered.gather(-1, position.ceil().long())
    return torch.lerp(below, above, (position - low).to(ordered.dtype)).where(count > 0, 0.0)


def _host_quantile(values: np.ndarray, q: float) -> float:
    if not values.size:
        return 0.0
    position = q * (values.size - 1)
    low = int(position)
    high = min(low + 1, values.size - 1)
    part = np.partition(values, (low, high))
    return float(part[low] + (part[high] - part[low]) * (position - low))


def _pick(
    scores: Tensor, usable: Tensor, k: int, mode: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return the picked examples' indices [T, k] and which of them are usable [T, k]."""
    if mode == "confident":
        key = scores.detach()
    else:
        device = scores.device if generator is None else generator.device
        key = torch.rand(scores.shape, generator=generator, device=device).to(scores.device)
    best = key.masked_fill(~usable, -torch.inf).topk(k, dim=1)
    return best.indices, best.values > -torch.inf


def _rows(embeddings: Tensor, index: Tensor) -> Tensor:
    """Gather embeddings [T, k, d] of the picked examples; ``index_select``, as its backward is a plain sum of rows."""
    tasks, k = index.shape
    if embeddings.dim() == 3:
        offset = torch.arange(tasks, device=index.device).unsqueeze(1) * embeddings.shape[1]
        embeddings, index = embeddings.flatten(0, 1), index + offset
    return embeddings.index_select(0, index.flatten()).view(tasks, k, -1)


def _task_pairs(scores: Tensor, generator: torch.Generator | None, limit: int | None) -> tuple[Tensor, Tensor]:
    tasks = len(scores)
    pairs = torch.triu_indices(tasks, tasks, 1, device=scores.device)
    if limit is not None and limit < pairs.shape[1]:
        device = scores.device if generator is None else generator.device
        drawn = torch.randperm(pairs.shape[1], generator=generator, device=device)[:limit]
        pairs = pairs[:, drawn.to(scores.device)]
    return pairs[0], pairs[1]


def _check_pairs(scores: Tensor, embeddings: Tensor, k: int, mode: str, max_task_pairs: int | None) -> None:
    if mode not in PROTOTYPES:
        raise RecipeError(unknown("prototype mode", mode, PROTOTYPES))
    if k < 1:
        raise RecipeError(f"prototype_pairs: k must be at least 1, found {k}.")
    if max_task_pairs is not None and max_task_pairs < 1:
        raise RecipeError(f"prototype_pairs: max_task_pairs must be at least 1 or None, found {max_task_pairs}.")
    if scores.dim() != 2:
        raise DataError(f"prototype_pairs: scores must be [tasks, examples], found shape {tuple(scores.shape)}.")
    fits = embeddings.dim() in (2, 3) and tuple(embeddings.shape[:-1]) in (tuple(scores.shape), tuple(scores.shape[1:]))
    if not fits:
        raise DataError(
            f"prototype_pairs: embeddings must be [examples, d] or [tasks, examples, d] for scores of shape "
            f"{tuple(scores.shape)}, found shape {tuple(embeddings.shape)}."
        )


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise RecipeError(f"{name} must be positive, found {value}.")
