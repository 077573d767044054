"""ReLiF's Lipschitz term of one step with its running scales, apart from what controls its strength."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import RecipeError
from libmtl_fair.functional import _lipschitz_host as host
from libmtl_fair.functional.margins import host_quantile

if TYPE_CHECKING:
    from libmtl_fair.methods.relif import ReLiFSettings

SCALE_FLOOR = 1e-4
DISTANCE_FLOOR = 1e-3


class Lipschitz(NamedTuple):
    """The term of one step.

    ``value`` L_lip, attached to the graph; ``rate`` share of pairs with a positive margin; ``some`` whether there was a
    pair at all (without one, value and rate are 0); ``tau`` and ``kappa`` the scales in use.
    """

    value: Tensor
    rate: Tensor
    some: Tensor
    tau: Tensor
    kappa: Tensor


class HostLipschitz(NamedTuple):
    """The term of one step beside the CPU, as numbers; ``pairs`` gives its gradients."""

    value: float
    rate: float
    tau: float
    kappa: float
    pairs: host.HostPairs


class LipschitzTerm(nn.Module):
    """L_lip of methods.md, 1.2: huberised hinge of scaled score gaps over scaled distances, across tasks.

    The scales follow the 95 % quantiles of gaps and distances; they are buffers, saved with the model.
    """

    scales: Tensor
    scales_started: Tensor

    def __init__(self, settings: ReLiFSettings) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("scales", torch.ones(2))
        self.register_buffer("scales_started", torch.tensor(False))

    def forward(self, batch: FairBatch) -> Lipschitz:
        """Return the term of this step's prototype pairs, after moving the scales.

        Raises
        ------
        RecipeError : fewer than two tasks.
        """
        s = self.settings
        scores = batch.score_matrix
        _check_tasks(scores.shape[0])
        value, rate, some = F.lipschitz_term(
            scores,
            batch.embedding,
            s.prototypes_per_task,
            self._move_scales,
            mode=s.prototypes,
            max_task_pairs=s.task_pairs,
            beta=s.beta,
            mu=s.mu,
            min_distance=DISTANCE_FLOOR,
            detach_distance=s.detach_distance,
        )
        tau, kappa = self.scales.clone() if s.scaling else torch.ones_like(self.scales)
        return Lipschitz(value, rate, some, tau, kappa)

    def on_host(self, batch: FairBatch) -> HostLipschitz | None:
        """Return the same of plain CPU tensors, at half of the cost and without graph; None where it is not made for them.

        Raises
        ------
        RecipeError : fewer than two tasks.
        """
        s = self.settings
        scores, embeddings = batch.row_scores, batch.embedding.detach()
        _check_tasks(scores.shape[1])
        if not host.fits(scores, embeddings):
            return None
        pairs = host.HostPairs(
            scores,
            embeddings,
            s.prototypes_per_task,
            mode=s.prototypes,
            max_task_pairs=s.task_pairs,
            min_distance=DISTANCE_FLOOR,
        )
        tau, kappa = self._move_numbers(pairs) if s.scaling else (1.0, 1.0)
        found = pairs.violations(tau, kappa, beta=s.beta, mu=s.mu)
        return HostLipschitz(found.loss, found.rate, tau, kappa, pairs)

    def _move_numbers(self, pairs: host.HostPairs) -> tuple[float, float]:
        s = self.settings
        scales, started = self.scales.numpy(), self.scales_started.numpy()
        found = [host_quantile(x.view(-1).numpy(), s.quantile) for x in (pairs.gap.abs(), pairs.distance)]
        if started:
            found = [old + s.scale_ema * (new - old) for old, new in zip(scales.tolist(), found)]
        tau, kappa = (max(value, SCALE_FLOOR) for value in found)
        scales[:] = tau, kappa
        started[()] = True
        return tau, kappa

    @torch.no_grad()
    def _move_scales(self, gap: Tensor, distance: Tensor, mask: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Move tau and kappa towards this step's quantiles; the first step sets them; no pair leaves them."""
        s = self.settings
        if not s.scaling:
            return 1.0, 1.0
        found = torch.stack([F.masked_quantile(x, s.quantile, mask) for x in (gap.abs(), distance)])
        share = torch.where(self.scales_started, s.scale_ema, 1.0).to(self.scales.dtype)
        moved = torch.lerp(self.scales, found.to(self.scales.dtype), share).clamp(min=SCALE_FLOOR)
        some = mask.any()
        self.scales = torch.where(some, moved, self.scales)
        self.scales_started = self.scales_started | some
        return self.scales[0], self.scales[1]


def _check_tasks(tasks: int) -> None:
    if tasks < 2:
        raise RecipeError("the Lipschitz term compares tasks with each other: it needs at least two tasks")
