"""ReLiF of many members at once: :class:`~libmtl_fair.methods.ReLiF`'s step with a dimension for the members.

Members differ in every number (k, beta, mu, target, eta, bounds, ...). Prototypes are padded to the largest k, and pairs of
padding count for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.functional._device import widest
from libmtl_fair.functional.margins import unit_vectors_and_norms
from libmtl_fair.methods.lipschitz_term import DISTANCE_FLOOR, SCALE_FLOOR
from libmtl_fair.tune.stacked.members import Member
from libmtl_fair.tune.stacked.parts import Part, Step, loss_gradient


def key(member: Member) -> tuple[Any, ...] | None:
    """Return what members of one part have in common; None where a member's own weighting has to do it."""
    trainer = member.trainer
    if trainer.weighting != "ReLiF" or trainer.auxiliary:
        return None
    s, tasks = trainer.model.settings, len(trainer.task_name)
    if not s.lipschitz or tasks < 2 or (s.task_pairs is not None and s.task_pairs < tasks * (tasks - 1) // 2):
        return None
    return ("ReLiF", s.prototypes, s.quantile, s.scaling, s.detach_distance)


class ReLiFPart(Part):
    """Members under ReLiF that compare all pairs of tasks."""

    def __init__(self, places: Sequence[int], members: Sequence[Member]) -> None:
        super().__init__(places, members)
        models = [member.trainer.model for member in members]
        self.settings = models[0].settings
        device = members[0].device
        self.k = [model.settings.prototypes_per_task for model in models]
        tasks = len(members[0].trainer.task_name)
        self.left, self.right = torch.triu_indices(tasks, tasks, 1, device=device)
        self.control = Controllers([model.controller for model in models])
        self.scales = torch.stack([model.term.scales for model in models])
        self.started = torch.stack([model.term.scales_started for model in models])

        def column(name: str) -> Tensor:
            values = [getattr(model.settings, name) for model in models]
            return torch.tensor(values, dtype=torch.get_default_dtype(), device=device).view(-1, 1, 1, 1)

        self.beta, self.mu, self.share = column("beta"), column("mu"), column("scale_ema").view(-1, 1)

    def save(self) -> None:
        """Give the members' modules their controllers and scales."""
        self.control.save()
        for m, member in enumerate(self.members):
            member.trainer.model.term.scales.copy_(self.scales[m])
            member.trainer.model.term.scales_started.copy_(self.started[m])

    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the losses plus lambda times the Lipschitz term."""
        scores = torch.sigmoid(step.z).mT.contiguous()
        index, chosen = self._prototypes(scores)
        mask = (chosen.unsqueeze(-1) & chosen.unsqueeze(-2)).unsqueeze(1)
        picked = scores.gather(2, index).masked_fill_(~chosen.unsqueeze(1), 0.0)
        start = torch.arange(len(index), device=index.device).view(-1, 1, 1) * step.h.shape[1]
        at = (index + start).flatten()
        units, norm = unit_vectors_and_norms(step.h.flatten(0, 1).index_select(0, at).view(*index.shape, -1))
        gap = picked[:, self.left].unsqueeze(3) - picked[:, self.right].unsqueeze(2)
        distance = (units[:, self.left] * -0.5) @ units[:, self.right].mT
        distance = distance.add_(0.5)
        to_gap, to_distance = self._derivatives(gap, distance, mask)
        to_scores = torch.zeros_like(scores).scatter_add_(2, index, self._to_picked(to_gap, picked))
        to_z = loss_gradient(step).add_((to_scores * (scores - scores * scores)).mT)
        if self.settings.detach_distance:
            return to_z, None
        to_rows = self._to_rows(to_distance, units, norm).flatten(0, 2)
        return to_z, torch.zeros_like(step.h).flatten(0, 1).index_add_(0, at, to_rows).view_as(step.h)

    def _prototypes(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prototypes' places in the batch [m, T, k], and which of them a member has [m, k]."""
        most = min(max(self.k), scores.shape[2])
        keys = scores
        if self.settings.prototypes == "random":
            keys = torch.empty(scores.shape, dtype=torch.get_default_dtype(), device=scores.device)
            for own, member in zip(keys, self.members):
                torch.rand(own.shape, generator=member.generator, out=own)
        sizes = torch.tensor([min(k, most) for k in self.k], device=scores.device)
        return keys.topk(most, dim=2).indices, torch.arange(most, device=scores.device) < sizes.unsqueeze(1)

    def _derivatives(self, gap: Tensor, distance: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Move scales and controllers; return lambda times the term's derivatives to gaps and distances [m, n, k, k]."""
        floored = distance.clamp(min=DISTANCE_FLOOR)
        tau, kappa = self._move_scales(gap, floored, mask)
        size = gap.abs()
        bend = torch.where(size < self.beta, gap * gap / (2 * self.beta), size - self.beta / 2)
        bent = torch.minimum((bend / tau - floored / kappa).relu_(), self.mu).mul_(mask)
        count = mask.sum((1, 2, 3)) * gap.shape[1]
        strength = self.control.update((bent > 0).sum((1, 2, 3)) / count)
        bent.mul_(strength.to(bent.dtype).view(-1, 1, 1, 1) / (self.mu * count.view(-1, 1, 1, 1)))
        to_gap = torch.maximum(torch.minimum(gap, self.beta), -self.beta).mul_(bent).div_(self.beta * tau)
        return to_gap, bent.mul_(distance >= DISTANCE_FLOOR).div_(-kappa)

    def _move_scales(self, gap: Tensor, distance: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.settings.scaling:
            found = torch.stack([self._quantiles(x, mask) for x in (gap.abs(), distance)], 1)
            share = torch.where(self.started.unsqueeze(1), self.share, 1.0).to(self.scales.dtype)
            self.scales = torch.lerp(self.scales, found.to(self.scales.dtype), share).clamp_(min=SCALE_FLOOR)
            self.started = torch.ones_like(self.started)
            return self.scales[:, 0].view(-1, 1, 1, 1), self.scales[:, 1].view(-1, 1, 1, 1)
        one = torch.ones_like(self.mu)
        return one, one

    def _quantiles(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.settings.quantile
        if x.device.type != "cpu":
            return F.masked_quantile(x.flatten(1), q, mask.expand_as(x).flatten(1))
        return torch.stack([F.masked_quantile(own[:, :k, :k].flatten(), q) for own, k in zip(x, self.k)])

    def _to_picked(self, to_gap: Tensor, picked: Tensor) -> Tensor:
        found = torch.zeros_like(picked).index_add_(1, self.left, to_gap.sum(3))
        return found.index_add_(1, self.right, to_gap.sum(2), alpha=-1)

    def _to_rows(self, to_distance: Tensor, units: Tensor, norm: Tensor) -> Tensor:
        """Derivative through ``1/2 - u'v / 2`` and the scaling to unit vectors, ``(g - u (u'g)) / |x|``."""
        to_units = torch.zeros_like(units)
        to_units.index_add_(1, self.left, to_distance @ units[:, self.right], alpha=-0.5)
        to_units.index_add_(1, self.right, to_distance.mT @ units[:, self.left], alpha=-0.5)
        return (to_units - units * (units * to_units).sum(-1, keepdim=True)) / norm


class Controllers:
    """The :class:`~libmtl_fair.methods.controllers.ViolationController` of many members: one lambda each, [m]."""

    def __init__(self, controllers: Sequence[Any]) -> None:
        self._modules = list(controllers)
        device = self._modules[0].value.device
        self._dtype = self._modules[0].value.dtype
        self._wide = widest(device)

        def vector(name: str) -> Tensor:
            return torch.tensor([float(getattr(c, name)) for c in controllers], dtype=self._wide, device=device)

        self._target, self._gain, self._smoothing = vector("target"), vector("step_size"), vector("smoothing")
        self._low, self._high, self._warmup = vector("minimum"), vector("maximum"), vector("warmup")
        self._static = vector("static") > 0
        self.value, self.smoothed, self.steps = vector("value"), vector("smoothed"), vector("steps")

    def update(self, rate: Tensor) -> Tensor:
        """Take in the members' violation rates; return the new lambdas."""
        rate = rate.to(self._wide)
        ok = rate.isfinite()
        moved = torch.where(self.steps > 0, self.smoothed + self._smoothing * (rate - self.smoothed), rate)
        self.steps = self.steps + ok
        scaled = (self.value * (1 + self._gain * (moved - self._target))).clamp_(self._low, self._high)
        active = ok & (self.steps > self._warmup) & ~self._static
        # kept as the modules keep them, which round
        self.value = torch.where(active, scaled, self.value).to(self._dtype).to(self._wide)
        self.smoothed = torch.where(ok, moved, self.smoothed).to(self._dtype).to(self._wide)
        return self.value

    def save(self) -> None:
        """Give the modules their state."""
        for m, module in enumerate(self._modules):
            for name in ("value", "smoothed", "steps"):
                getattr(module, name).copy_(getattr(self, name)[m])
