"""Lipschitz margins between task scores and representation distances (ReLiF, arXiv:2606.10632)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from libmtl_fair.errors import RecipeError
from libmtl_fair.functional._device import on_host, widest


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


def lipschitz_loss(
    gap: Tensor,
    distance: Tensor,
    tau: Tensor | float,
    kappa: Tensor | float,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    mu: float = 0.05,
    min_distance: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """ReLiF's term ``mean phi_mu(z)`` and violation rate ``mean 1[z > 0]`` of pairs [P], over the pairs where ``mask`` holds.

    ``z`` is :func:`lipschitz_margin` of the gaps and of the distances, floored at ``min_distance``. The same as composing the
    functions of this module, with the first derivative written out, at a third of the cost. No gradient for ``tau`` and
    ``kappa``, no second derivatives. Both are 0 without any pair. Source: ReLiF.

    Raises
    ------
    RecipeError
        If ``beta`` or ``mu`` is not positive.

    >>> lipschitz_loss(torch.tensor([0.55, 0.0]), torch.tensor([0.1, 0.2]), tau=1.0, kappa=0.5)
    (tensor(0.1375), tensor(0.5000))
    """
    with torch.no_grad():
        loss, rate, to_gap, to_distance = lipschitz_derivatives(
            gap, distance, tau, kappa, mask, beta=beta, mu=mu, min_distance=min_distance
        )
        offset = loss - torch.dot(gap, to_gap) - torch.dot(distance, to_distance)
    # the derivative is at hand, so the graph needs only its products with gap and distance
    return torch.dot(gap, to_gap) + torch.dot(distance, to_distance) + offset, rate


def lipschitz_derivatives(
    gap: Tensor,
    distance: Tensor,
    tau: Tensor | float,
    kappa: Tensor | float,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    mu: float = 0.05,
    min_distance: float = 1e-3,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value and rate of :func:`lipschitz_loss`, and the loss's derivatives to gap [P] and distance [P]; itself no graph.

    >>> one = torch.tensor([1.0])
    >>> lipschitz_derivatives(one, one, 1.0, 2.0)[2:]
    (tensor([1.]), tensor([-0.5000]))
    """
    _positive("beta", beta)
    _positive("mu", mu)
    weight = torch.ones_like(gap) if mask is None else mask.to(gap.dtype)
    count = weight.sum().clamp(min=1)
    z = huber(gap, beta) / tau - distance.clamp(min=min_distance) / kappa
    bent = z.clamp(0, mu) * weight  # mu phi'
    loss = (torch.dot(bent, z) - torch.dot(bent, bent) / 2) / (mu * count)
    rate = (bent > 0).sum() / count
    bent = bent / (mu * count)
    to_gap = gap.clamp(-beta, beta) * bent / (beta * tau)
    return loss, rate, to_gap, bent * (distance >= min_distance) / -kappa


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
    return unit_vectors_and_norms(u)[0]


def unit_vectors_and_norms(u: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`unit_vectors`, and the norms [..., 1] that they were divided by: inf for a zero vector.

    >>> unit_vectors_and_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))[1]
    tensor([[5.],
            [inf]])
    """
    norm: Tensor = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    norm = norm.masked_fill(norm == 0, torch.inf)
    return u / norm, norm


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
        return x.new_tensor(host_quantile(values, q))
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


def host_quantile(values: np.ndarray, q: float) -> float:
    """Return a quantile of the values [n], linear as ``np.quantile``; 0 without any.

    >>> host_quantile(np.array([3.0, 1.0, 2.0]), 0.75)
    2.5
    """
    if not values.size:
        return 0.0
    position = q * (values.size - 1)
    low = int(position)
    share = position - low
    if q >= 0.75 and values.size >= 1024:
        # all but the largest fall away, by a bound that a sample gives: selection among few
        sample = values[:: values.size // 256 | 1]  # an odd step: the values may be rows of a power of 2
        place = int((q - 0.06) * sample.size)
        largest = values.compress(values >= np.partition(sample, place)[place])
        if values.size - largest.size <= low:
            values, low = largest, low - (values.size - largest.size)
    part = np.partition(values, low)  # selects one entry; asked for two it is half as slow again
    below = float(part[low])
    above = float(part[low + 1 :].min()) if low + 1 < values.size else below
    return below + (above - below) * share


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise RecipeError(f"{name} must be positive, found {value}.")
