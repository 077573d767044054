"""Pairs of prototypes across tasks: score gaps and embedding distances (ReLiF, arXiv:2606.10632)."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.functional.margins import unit_vectors_and_norms

PROTOTYPES = ("confident", "random")


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
    pairing = choose_pairs(scores, embeddings, k, valid, mode, generator, max_task_pairs)
    gap, distance, _, _ = pairing.geometry(scores, embeddings)
    distance.detach().copy_(distance.detach().clamp(0, 1))  # of the values only: rounding needs no place in the graph
    gap, distance, mask = gap.flatten(), distance.flatten(), pairing.mask().flatten()
    return (gap, distance, mask) if return_mask else (gap[mask], distance[mask])


class Pairing(NamedTuple):
    """Which examples are prototypes and which tasks' prototypes are paired; u tasks in use, n pairs of them."""

    score_at: Tensor
    """Position [u, k] of each prototype in the flattened scores."""
    row_at: Tensor
    """Position [u, k] in the embeddings, flattened to rows."""
    chosen: Tensor
    """Whether the prototype is one [u, k]: its example is valid."""
    left: Tensor
    """First task [n] of each pair, among the tasks in use."""
    right: Tensor
    """Second task [n] of each pair."""

    def geometry(self, scores: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gaps and distances [n, k, k] of the pairs, and the prototypes' unit vectors [u, k, d] and norms [u, k, 1]."""
        shape = self.chosen.shape
        picked = scores.flatten().index_select(0, self.score_at.flatten()).view(shape).masked_fill(~self.chosen, 0.0)
        # index_select throughout: its backward is a plain sum of rows, that of indexing a scattered one
        rows = embeddings.flatten(0, -2).index_select(0, self.row_at.flatten()).view(*shape, embeddings.shape[-1])
        if embeddings.dim() == 3:  # a task's own embedding may be undefined where it has no input
            rows = rows.masked_fill(~self.chosen.unsqueeze(-1), 0.0)
        units, norm = unit_vectors_and_norms(rows)
        gap = picked.index_select(0, self.left).unsqueeze(2) - picked.index_select(0, self.right).unsqueeze(1)
        halves = (units * -0.5).index_select(0, self.left)
        distance = torch.bmm(halves, units.index_select(0, self.right).mT).add_(0.5).to(gap.dtype)
        return gap, distance, units, norm

    def mask(self) -> Tensor:
        """Pairs [n, k, k] that count."""
        return self.chosen.index_select(0, self.left).unsqueeze(2) & self.chosen.index_select(0, self.right).unsqueeze(
            1
        )


def choose_pairs(
    scores: Tensor,
    embeddings: Tensor,
    k: int,
    valid: Tensor | None,
    mode: str,
    generator: torch.Generator | None,
    max_task_pairs: int | None,
) -> Pairing:
    """Pick prototypes and task pairs; the arguments are those of :func:`prototype_pairs`."""
    _check_pairs(scores, embeddings, k, mode, max_task_pairs)
    scores = scores.detach()
    usable = scores.isfinite() if valid is None else scores.isfinite() & valid
    tasks, batch = scores.shape
    left, right = _task_pairs(scores, generator, max_task_pairs)
    used = None
    if 2 * len(left) < tasks:  # only the tasks drawn need prototypes
        used = torch.cat([left, right])
        scores, usable = scores[used], usable[used]
        left, right = torch.arange(len(used), device=scores.device).chunk(2)
    index, chosen = _pick(scores, usable, min(k, batch), mode, generator)
    offset = (torch.arange(tasks, device=scores.device) if used is None else used).unsqueeze(1) * batch
    score_at = index + offset
    return Pairing(score_at, index if embeddings.dim() == 2 else score_at, chosen, left, right)


def _pick(
    scores: Tensor, usable: Tensor, k: int, mode: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return the picked examples' indices [T, k] and which of them are usable [T, k]."""
    key = scores
    if mode == "random":
        device = scores.device if generator is None else generator.device
        key = torch.rand(scores.shape, generator=generator, device=device).to(scores.device)
    best = key.masked_fill(~usable, -torch.inf).topk(k, dim=1)
    return best.indices, best.values > -torch.inf


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
