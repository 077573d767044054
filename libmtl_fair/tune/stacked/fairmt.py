"""FairMT of many members at once: :class:`~libmtl_fair.methods.FairMT`'s step with a dimension for the members.

Shapes: m members, B examples, A attributes, G groups (the most of any attribute), T tasks; 2T columns are the groups' mean
badness, 1 - TPR of each task and then FPR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.functional._device import widest
from libmtl_fair.methods.fairmt.proxies import min_norm_of
from libmtl_fair.tune.stacked.members import Member
from libmtl_fair.tune.stacked.parts import Part, Step, loss_gradient

_TINY = 1e-12


def key(member: Member) -> tuple[Any, ...] | None:
    """Return what members of one part have in common; None where a member's own weighting has to do it."""
    trainer = member.trainer
    if trainer.weighting != "FairMT" or trainer.auxiliary:
        return None
    s = trainer.model.settings
    unusual = s.symmetric or s.lipschitz or s.rank_one or s.intersectional
    if unusual or s.reference != "max" or s.solver != "exact" or s.weighing == "base":
        return None
    attributes = tuple(s.attributes or trainer.n_groups)
    if any(name not in trainer.n_groups for name in attributes):
        return None
    return ("FairMT", s.normalise, s.ema_gradient, s.weighing, attributes)


class FairMTPart(Part):
    """Members under FairMT with linear heads."""

    def __init__(self, places: Sequence[int], members: Sequence[Member]) -> None:
        super().__init__(places, members)
        models = [member.trainer.model for member in members]
        self.settings, self.device = models[0].settings, members[0].device
        counts = members[0].trainer.n_groups
        self.attributes = tuple(self.settings.attributes or counts)
        self.n_groups = max(counts[name] for name in self.attributes)
        self.tasks = len(members[0].trainer.task_name)
        self._membership: Tensor | None = None

        def column(name: str) -> Tensor:
            values = [float(getattr(model.settings, name)) for model in models]
            return torch.tensor(values, dtype=torch.get_default_dtype(), device=self.device).view(-1, 1, 1)

        self.mu, self.ema, self.sharpness = column("mu").view(-1, 1), column("ema"), column("sharpness")
        self.min_count = column("min_count").unsqueeze(3)
        self.parts = torch.ones_like(self.mu).repeat(1, 2 * self.tasks)
        self.parts[:, self.tasks :] = column("fpr_weight").view(-1, 1)
        self.duals = Duals([model.dual for model in models])
        empty = self.mu.new_zeros((len(self.attributes) * self.n_groups, 4 * self.tasks))
        self.running = torch.stack([empty if model.running is None else model.running for model in models])
        self.presence = torch.zeros((len(models), self.tasks), device=self.device)

    def save(self) -> None:
        """Give the members' modules their dual variables, running sums, and how often tasks were compared."""
        self.duals.save()
        for m, member in enumerate(self.members):
            member.trainer.model.running = self.running[m].clone()
            member.trainer.model.presence = self.presence[m].clone()
        self.presence.zero_()

    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of the Lagrangian; move the running sums and the dual variables."""
        known = step.y == step.y
        observed = known.any(1)
        losses = loss_gradient(step)
        fairness, phi, present = self._fairness(step)
        eta = self.duals.value.to(losses.dtype).unsqueeze(1)
        alpha = self._alpha(step, losses, fairness, eta, observed)
        count = observed.sum(1, keepdim=True).to(losses.dtype)
        self.duals.update(phi, present.any(1))
        self.presence += present
        return torch.addcmul(losses * (alpha * count).unsqueeze(1), fairness, (eta * count).unsqueeze(1)), None

    def _fairness(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient of Phi to the logits [m, B, T], Phi [m] and which tasks are present [m, T]."""
        t = self.tasks
        member = self._members(step.groups).index_select(0, step.rows.flatten()).view(*step.rows.shape, -1)
        p = torch.sigmoid(step.z * self.sharpness)
        positive, negative = (step.y == 1).to(p.dtype), (step.y == 0).to(p.dtype)
        now = member.mT @ torch.cat([(1 - p) * positive, p * negative, positive, negative], 2)
        self.running = now + self.ema * self.running
        sums, counts = self.running[:, :, : 2 * t], self.running[:, :, 2 * t :]
        psi, present, share, slope = self._disparities(sums, counts)
        phi, w = F.aggregate_disparities(psi / self.mu, 1.0, present)
        per_column = (w.unsqueeze(1) * share).repeat(1, 1, 2).unsqueeze(2)  # [m, A, 1, 2T]
        divisor = counts if self.settings.ema_gradient == "decayed" else now[:, :, 2 * t :]
        to_values = member @ ((slope * per_column).flatten(1, 2) / divisor.clamp(min=_TINY))
        signed = to_values[:, :, t:] * negative - to_values[:, :, :t] * positive
        return signed * (p - p * p) * self.sharpness, phi * self.mu.squeeze(1), present

    def _members(self, groups: Mapping[str, Tensor]) -> Tensor:
        """Return which group of which attribute a row of the data is in, [N, A * G]."""
        if self._membership is None:
            ids = torch.stack([groups[name] for name in self.attributes], 1).unsqueeze(2)
            each = ids == torch.arange(self.n_groups, device=self.device)
            self._membership = each.to(self.mu.dtype).flatten(1)
        return self._membership

    def _disparities(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return psi and presence [m, T], each attribute's share of psi [m, A, T], slope to the means [m, A, G, 2T]."""
        shape = (len(sums), len(self.attributes), self.n_groups, -1)
        count, rates = counts.view(shape), (sums / counts.clamp(min=_TINY)).view(shape)
        known = count >= self.min_count
        observed = known.sum(2)  # [m, A, 2T]
        best = torch.where(known, rates, torch.inf).amin(2, keepdim=True)
        hinge = torch.where(known, rates - best, 0.0).relu()
        part, slope = hinge.sum(2), (hinge > 0).to(rates.dtype)
        if self.settings.normalise and self.n_groups > 2:
            scale = 1 / (observed - 1).clamp(min=1)
            part, slope = part * scale, slope * scale.unsqueeze(2)
        weight = self.parts.unsqueeze(1)
        part, slope = part * weight, slope * weight.unsqueeze(2)
        enough = (observed >= 2) & (weight > 0)
        t = self.tasks
        there = (enough[:, :, :t] | enough[:, :, t:]).to(part.dtype)
        attributes = there.sum(1)
        psi = ((part[:, :, :t] + part[:, :, t:]) * there).sum(1) / attributes.clamp(min=1)
        return psi, attributes > 0, there / attributes.clamp(min=1).unsqueeze(1), slope

    def _alpha(self, step: Step, losses: Tensor, fairness: Tensor, eta: Tensor, observed: Tensor) -> Tensor:
        """Return the tasks' weights [m, T], on the simplex of the observed ones (methods.md, 2.4)."""
        seen = observed.to(losses.dtype)
        if self.settings.weighing == "uniform" or self.tasks == 1:
            return seen / seen.sum(1, keepdim=True).clamp(min=1)
        overlap = step.heads.mT @ step.heads
        cross = losses.mT @ torch.cat([losses, fairness], 2)
        gram = cross[:, :, : self.tasks] * overlap
        linear = eta * (cross[:, :, self.tasks :] * overlap).sum(2)
        if gram.device.type == "cpu":
            return torch.stack([min_norm_of(*own) for own in zip(gram, linear, observed)])
        return min_norm_rows(gram, linear, seen)


def min_norm_rows(gram: Tensor, linear: Tensor, seen: Tensor) -> Tensor:
    """Return minimum-norm weights [m, T] over the tasks that are ``seen`` (1, else 0), without waiting for the device."""
    largest = gram.diagonal(dim1=1, dim2=2).amax(1, keepdim=True) + linear.abs().amax(1, keepdim=True) + 1
    alpha = F.min_norm_weights(gram + torch.diag_embed((1 - seen) * 1e12 * largest), linear * seen) * seen
    return alpha / alpha.sum(1, keepdim=True).clamp(min=torch.finfo(alpha.dtype).tiny)


class Duals:
    """The :class:`~libmtl_fair.methods.controllers.DualAscent` of many members: one eta each, [m]."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = list(modules)
        device = self._modules[0].value.device
        self._dtype, self._wide = self._modules[0].value.dtype, widest(device)

        def vector(name: str) -> Tensor:
            return torch.tensor([float(getattr(d, name)) for d in modules], dtype=self._wide, device=device)

        self._rho, self._epsilon, self._maximum = vector("rho"), vector("epsilon"), vector("maximum")
        self.value = vector("value")

    def update(self, phi: Tensor, present: Tensor) -> None:
        """Take in the members' disparities; where none is present, eta stays."""
        phi = phi.to(self._wide)
        moved = (self.value + self._rho * (phi - self._epsilon)).clamp(min=0).minimum(self._maximum)
        self.value = torch.where(present & phi.isfinite(), moved, self.value).to(self._dtype).to(self._wide)

    def save(self) -> None:
        """Give the modules their state."""
        for m, module in enumerate(self._modules):
            module.value.copy_(self.value[m])
