"""Lipschitz margins between tasks' scores and the distances of representations (ReLiF, arXiv:2606.10632).

Every function takes leading dimensions ``[...]``: one training, or many at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.functional._device import on_cpu
from libmtl_fair.functional._written import written

_where_above = torch.ops.aten.threshold_backward.default
"""(x, y, least) -> x where y is above ``least``, else 0, in one operation."""
PROTOTYPES = ("confident", "random")
Generators = torch.Generator | Sequence[torch.Generator] | None
Scales = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor | float, Tensor | float]]


def huber(u: Tensor, beta: float) -> Tensor:
    """Smooth absolute value ``rho_beta``: ``u^2 / (2 beta)`` where ``|u| <= beta``, else ``|u| - beta / 2``.

    Shape: that of ``u``; values >= 0. Source: ReLiF.

    Raises
    ------
    RecipeError
        If ``beta`` is not positive.

    Examples
    --------
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

    Examples
    --------
    >>> huberized_hinge(torch.tensor([-1.0, 0.05, 1.0]), mu=0.05)
    tensor([0.0000, 0.0250, 0.9750])
    """
    _positive("mu", mu)
    return huber(z.relu(), mu)


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
    return u / _norms(u)


def _norms(u: Tensor) -> Tensor:
    """Norms [..., 1]; inf for a zero vector."""
    norm: Tensor = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    return norm.masked_fill(norm == 0, torch.inf)


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
        True: fixed shapes and a mask of the pairs that count, without waiting for the device.
        False: only the pairs that count, which on an accelerator waits for their number.

    Returns
    -------
    tuple of (Tensor, Tensor) or tuple of (Tensor, Tensor, Tensor)
        (gap [P], distance [P]), with ``return_mask`` also mask [P] of bool. All are finite, also where the mask is
        False.

    Raises
    ------
    RecipeError
        For an unknown mode, ``k < 1`` or ``max_task_pairs < 1``.
    DataError
        If the shapes of scores and embeddings do not fit.

    Examples
    --------
    >>> gap, distance = prototype_pairs(torch.tensor([[0.9, 0.1], [0.2, 0.6]]), torch.eye(2), k=1)
    >>> gap, distance
    (tensor([0.3000]), tensor([0.5000]))
    """
    pairs = _draw(scores, embeddings, k, valid, mode, generator, max_task_pairs, None)
    gap, distance = pairs.geometry(scores, embeddings)[:2]
    distance.detach().copy_(distance.detach().clamp(0, 1))  # of the values only: rounding needs no place in the graph
    gap, distance, mask = gap.flatten(), distance.flatten(), pairs.mask()
    mask = torch.ones_like(gap, dtype=torch.bool) if mask is None else mask.flatten()
    return (gap, distance, mask) if return_mask else (gap[mask], distance[mask])


class LipschitzTerm(NamedTuple):
    """ReLiF's term of one batch: loss and violation rate [...], the loss's derivatives.

    ``some`` says whether any pair counts [...]; None where all do.
    """

    value: Tensor
    rate: Tensor
    some: Tensor | None
    to_scores: Tensor
    to_embeddings: Tensor | None

    def attached(self, scores: Tensor, embeddings: Tensor) -> Tensor:
        """Return the loss as one node of the graph of these, which it was made from."""
        return written(self.value, (scores, self.to_scores), (embeddings, self.to_embeddings))


def lipschitz_derivatives(
    scores: Tensor,
    embeddings: Tensor,
    k: int,
    scales: Scales,
    valid: Tensor | None = None,
    *,
    mode: str = "random",
    generator: Generators = None,
    max_task_pairs: int | None = None,
    sizes: Tensor | None = None,
    beta: float | Tensor = 0.1,
    mu: float | Tensor = 0.05,
    min_distance: float = 1e-3,
    detach_distance: bool = False,
) -> LipschitzTerm:
    """Value and written-out derivatives of ReLiF's term for scores [..., T, B]; no graph, and no wait for the device.

    The term is the mean of ``phi_mu(z)``, ``z = rho_beta(gap) / tau - distance / kappa``, over the pairs of
    :func:`prototype_pairs`, distances floored at ``min_distance``; the rate the share of ``z > 0``. Both are 0 without a pair.

    Parameters
    ----------
    scores, embeddings, k, valid, mode, max_task_pairs : Tensor or int or None or str
        As for :func:`prototype_pairs`, with leading dimensions; embeddings are [..., B, d] or [..., T, B, d].
    scales : callable
        Given ``|gap|`` [..., P], floored distance [..., P] and mask [..., P] (None where all pairs count), returns tau and kappa
        [...]: the place for moving quantiles.
    generator : torch.Generator or a sequence of them
        One for all, or one for each of the leading dimension's trainings.
    sizes : Tensor [...], optional
        Prototypes of each training where they differ; ``k`` is then the largest.
    beta, mu : float or Tensor [...]
        Of the two Huber functions.
    min_distance : float
        Distances are at least this.
    detach_distance : bool
        No derivative to the embeddings.

    Raises
    ------
    RecipeError, DataError
        As :func:`prototype_pairs`; also if ``beta`` or ``mu`` is a number that is not positive.
    """
    _positive("beta", beta)
    _positive("mu", mu)
    with torch.no_grad():
        pairs = _draw(scores, embeddings, k, valid, mode, generator, max_task_pairs, sizes)
        at, mask = pairs.geometry(scores, embeddings), pairs.mask()
        flat = (*scores.shape[:-2], at.gap.shape[-3:].numel())
        gap, distance = at.gap.view(flat), at.distance.clamp_(min=min_distance).view(flat)
        mask = None if mask is None else mask.view(flat)
        per_tau, per_kappa = (_reciprocal(scale) for scale in scales(gap.abs(), distance, mask))
        beta, mu = _column(beta), _column(mu)
        clipped = gap.clamp(-beta, beta)  # type: ignore[arg-type]
        short = torch.add(gap, clipped, alpha=-0.5)
        slope = clipped.mul_(per_tau / beta)  # of rho_beta(gap) / tau, which is short times slope
        z = short.mul_(slope).sub_(distance * per_kappa)
        bent = torch.minimum(z.relu(), mu) if isinstance(mu, Tensor) else z.clamp(0, mu)  # mu phi'
        count: Tensor | int = flat[-1]
        if mask is not None:
            bent, count = bent.mul_(mask), mask.sum(-1, dtype=gap.dtype)
        share = 1 / (mu * _column(count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)))
        value = torch.linalg.vecdot(bent, z.sub_(bent, alpha=0.5)) * _scalar(share)
        violated = (
            torch.count_nonzero(bent, -1) if bent.dim() > 1 else torch.count_nonzero(bent)
        )  # fast without a dimension
        rate = violated.to(value.dtype) * _scalar(share * mu)
        to_gap = slope.mul_(bent).mul_(share).view_as(at.gap)
        to_scores, to_embeddings = pairs.to_scores(to_gap, scores), None
        if not detach_distance:
            to_distance = _where_above(bent, distance, min_distance).view_as(at.gap)
            to_embeddings = pairs.to_embeddings(to_distance, per_kappa * share, at, embeddings)
    some = count > 0 if isinstance(count, Tensor) else None if count else torch.zeros_like(rate, dtype=torch.bool)
    return LipschitzTerm(value, rate, some, to_scores, to_embeddings)


def lipschitz_term(
    scores: Tensor, embeddings: Tensor, k: int, scales: Scales, valid: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """ReLiF's term [...] of a batch, attached to the graph, its violation rate [...] and whether any pair counts [...].

    :func:`lipschitz_derivatives` as one node of the graph, with a first derivative only; the arguments are the same.

    >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.6]])
    >>> loss, rate, valid = lipschitz_term(scores, torch.eye(2), 1, lambda *pairs: (0.1, 1.0), mode="confident")
    >>> loss, rate, valid
    (tensor(1.9750), tensor(1.), tensor(True))
    """
    found = lipschitz_derivatives(scores, embeddings, k, scales, valid, **options)
    some = torch.ones_like(found.rate, dtype=torch.bool) if found.some is None else found.some
    return found.attached(scores, embeddings), found.rate, some


class _Pairs(NamedTuple):
    """Which examples are prototypes and which tasks' prototypes are paired; u tasks in use, n pairs of them."""

    at: Tensor
    """Example of each prototype, [..., u, k]."""
    chosen: Tensor | None
    """Whether it is one [..., u, k]; None where all are."""
    used: Tensor | None
    """Tasks in use [u]; None where all are."""
    sides: Tensor | None
    """First tasks of the pairs, then second ones, among those in use [2n]; None where these are 0, 1, ..., 2n - 1."""

    def _of_pairs(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return what belongs to the first and to the second task of each pair, from what belongs to tasks in use."""
        first, second = (x if self.sides is None else x.index_select(dim, self.sides)).chunk(2, dim)
        return first, second

    def _to_tasks(self, first: Tensor, second: Tensor, dim: int) -> Tensor:
        """Add up what belongs to the pairs' sides by task in use."""
        both = torch.cat((first, second), dim)
        if self.sides is None:
            return both
        shape = list(both.shape)
        shape[dim] = self.at.shape[-2]
        return both.new_zeros(shape).index_add_(dim, self.sides, both)

    def mask(self) -> Tensor | None:
        """Pairs that count, [..., n, k, k]; None where all do."""
        if self.chosen is None:
            return None
        first, second = self._of_pairs(self.chosen, -2)
        return first.unsqueeze(-1) & second.unsqueeze(-2)

    def geometry(self, scores: Tensor, embeddings: Tensor) -> _Geometry:
        """Return gaps and distances of the pairs, and what the distances were made of."""
        picked = (scores if self.used is None else scores.index_select(-2, self.used)).gather(-1, self.at)
        row_at = self._row_at(scores, embeddings)
        rows = (
            embeddings.reshape(-1, embeddings.shape[-1])
            .index_select(0, row_at)
            .view(*self.at.shape, embeddings.shape[-1])
        )
        if self.chosen is not None:
            picked, rows = picked.masked_fill(~self.chosen, 0.0), rows.masked_fill(~self.chosen.unsqueeze(-1), 0.0)
        norm = _norms(rows)
        units = rows / norm
        (first, second), (left, right) = self._of_pairs(picked, -2), self._of_pairs(units, -3)
        gap = first.unsqueeze(-1) - second.unsqueeze(-2)
        distance = torch.rsub(_products(left, right.mT), 0.5, alpha=0.5)
        return _Geometry(gap, distance.to(gap.dtype), units, norm, row_at)

    def _row_at(self, scores: Tensor, embeddings: Tensor) -> Tensor:
        """Position of each prototype among the rows of all embeddings, flat."""
        batch, row_at, own = scores.shape[-1], self.at, embeddings.dim() == scores.dim() + 1
        if own:
            tasks = torch.arange(scores.shape[-2], device=scores.device) if self.used is None else self.used
            row_at = row_at + tasks.unsqueeze(-1) * batch
        if scores.dim() > 2:
            trainings = torch.arange(scores.shape[:-2].numel(), device=scores.device)
            start = trainings * (batch * scores.shape[-2] if own else batch)
            row_at = row_at + start.view(*scores.shape[:-2], 1, 1)
        return row_at.reshape(-1)

    def to_scores(self, to_gap: Tensor, scores: Tensor) -> Tensor:
        """Derivative to the scores [..., T, B] from that to the gaps."""
        per_prototype = self._to_tasks(to_gap.sum(-1), to_gap.sum(-2).neg_(), -2)
        found = scores.new_zeros((*per_prototype.shape[:-1], scores.shape[-1])).scatter_add_(-1, self.at, per_prototype)
        return found if self.used is None else torch.zeros_like(scores).index_add_(-2, self.used, found)

    def to_embeddings(self, to_distance: Tensor, scale: float | Tensor, at: _Geometry, embeddings: Tensor) -> Tensor:
        """Derivative through ``1/2 - u'v / 2`` and the scaling to unit vectors, ``(g - u (u'g)) / |x|``, times ``-scale``."""
        (left, right), to_distance = self._of_pairs(at.units, -3), to_distance.to(at.units.dtype)
        per_unit = self._to_tasks(_products(to_distance, right), _products(to_distance.mT, left), -3)
        along = (at.units * per_unit).sum(-1, keepdim=True)
        scale = scale.view(*scale.shape, 1, 1) if isinstance(scale, Tensor) else scale
        per_row = per_unit.addcmul_(at.units, along, value=-1).div_(at.norm).mul_(0.5 * scale)
        rows = embeddings.new_zeros((embeddings.shape[:-1].numel(), embeddings.shape[-1]))
        return rows.index_add_(0, at.row_at, per_row.flatten(0, -2)).view(embeddings.shape)


class _Geometry(NamedTuple):
    """Gaps and distances [..., n, k, k]; the prototypes' unit vectors [..., u, k, d], norms [..., u, k, 1] and rows, flat."""

    gap: Tensor
    distance: Tensor
    units: Tensor
    norm: Tensor
    row_at: Tensor


def _draw(
    scores: Tensor,
    embeddings: Tensor,
    k: int,
    valid: Tensor | None,
    mode: str,
    generator: Generators,
    max_task_pairs: int | None,
    sizes: Tensor | None,
) -> _Pairs:
    """Pick prototypes and task pairs; the arguments are those of :func:`lipschitz_derivatives`."""
    _check_pairs(scores, embeddings, k, mode, max_task_pairs)
    scores, tasks = scores.detach(), scores.shape[-2]
    sides, used = _all_pairs(tasks, scores.device), None
    if max_task_pairs is not None and max_task_pairs < sides.shape[1]:
        (order,) = _drawn(torch.randperm, sides.shape[1], generator, scores.device)
        sides = sides.index_select(1, order[:max_task_pairs])
    if 2 * sides.shape[1] < tasks:  # only the tasks drawn need prototypes
        used = sides.flatten()
        scores = scores.index_select(-2, used)
        valid = None if valid is None else valid.index_select(-2, used)
    keys = scores
    if mode == "random":
        shape = scores.shape if isinstance(generator, torch.Generator | None) else scores.shape[1:]
        drawn = _drawn(torch.rand, shape, generator, scores.device)
        keys = drawn[0] if len(drawn) == 1 and scores.dim() == drawn[0].dim() else torch.stack(drawn)
    if valid is None and on_cpu(scores) and math.isfinite(float(scores.sum())):
        usable = None  # as nearly always: then nothing needs a mask
    else:
        usable = scores.isfinite() if valid is None else scores.isfinite() & valid
    best = (keys if usable is None else keys.masked_fill(~usable, -torch.inf)).topk(
        min(k, scores.shape[-1]), -1, sorted=sizes is not None or mode == "confident"
    )
    chosen = None if usable is None else best.values > -torch.inf
    if sizes is not None:
        few = torch.arange(best.values.shape[-1], device=scores.device) < sizes.view(*sizes.shape, 1, 1)
        chosen = few.expand_as(best.indices) if chosen is None else chosen & few
    in_order = used is not None or (tasks == 2 and sides.shape[1] == 1)
    return _Pairs(best.indices, chosen, used, None if in_order else sides.flatten())


@lru_cache(maxsize=64)
def _all_pairs(tasks: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.triu_indices(tasks, tasks, 1, device=device)


def _drawn(draw: Callable[..., Tensor], size: object, generator: Generators, device: torch.device) -> list[Tensor]:
    """Draw once, or once from each generator, where the generator lives."""
    each = [generator] if isinstance(generator, torch.Generator | None) else generator
    return [draw(size, generator=g, device=device if g is None else g.device).to(device) for g in each]


def _check_pairs(scores: Tensor, embeddings: Tensor, k: int, mode: str, max_task_pairs: int | None) -> None:
    if mode not in PROTOTYPES:
        raise RecipeError(unknown("prototype mode", mode, PROTOTYPES))
    if k < 1:
        raise RecipeError(f"prototype_pairs: k must be at least 1, found {k}.")
    if max_task_pairs is not None and max_task_pairs < 1:
        raise RecipeError(f"prototype_pairs: max_task_pairs must be at least 1 or None, found {max_task_pairs}.")
    if scores.dim() < 2:
        raise DataError(f"prototype_pairs: scores must be [tasks, examples], found shape {tuple(scores.shape)}.")
    if embeddings.shape[:-1] not in (scores.shape, (*scores.shape[:-2], scores.shape[-1])):
        raise DataError(
            f"prototype_pairs: embeddings must be [examples, d] or [tasks, examples, d] for scores of shape "
            f"{tuple(scores.shape)}, found shape {tuple(embeddings.shape)}."
        )


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Matrix products over all leading dimensions; ``torch.matmul`` copies what is transposed."""
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).view(*a.shape[:-1], b.shape[-1])


def _reciprocal(x: float | Tensor) -> float | Tensor:
    return x.reciprocal().unsqueeze(-1) if isinstance(x, Tensor) else 1 / x


def _scalar(x: float | Tensor) -> float | Tensor:
    return x.squeeze(-1) if isinstance(x, Tensor) else x


def _column(x: float | Tensor) -> float | Tensor:
    return x.unsqueeze(-1) if isinstance(x, Tensor) else x


def _positive(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor) and not value > 0:
        raise RecipeError(f"{name} must be positive, found {value}.")
