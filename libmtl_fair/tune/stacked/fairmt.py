"""FairMT of many members at once: the method's own constraint, task weights and dual variable, stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.functional._gram import head_products
from libmtl_fair.methods.controllers import stack, unstack
from libmtl_fair.methods.fairmt.constraint import BinaryColumns, Constraint, evaluate
from libmtl_fair.methods.fairmt.task_weights import uniform
from libmtl_fair.tasks import Binary
from libmtl_fair.tune.stacked.members import Member
from libmtl_fair.tune.stacked.parts import Part, Step, loss_gradient


def key(member: Member) -> tuple[Any, ...] | None:
    """Return what members of one part have in common; None where a member's own weighting has to do it."""
    trainer = member.trainer
    if trainer.weighting != "FairMT" or trainer.auxiliary:
        return None
    s = trainer.model.settings
    if s.lipschitz or s.weighing == "base" or any(name not in trainer.n_groups for name in s.attributes or ()):
        return None
    same = ("normalise", "symmetric", "reference", "solver", "intersectional", "ema_gradient", "weighing", "rank_one")
    return ("FairMT", tuple(s.attributes or trainer.n_groups), *(getattr(s, name) for name in same))


class FairMTPart(Part):
    """Members under FairMT with linear heads."""

    def __init__(self, places: Sequence[int], members: Sequence[Member]) -> None:
        super().__init__(places, members)
        trainer, device = members[0].trainer, members[0].device
        self.models = [member.trainer.model for member in members]
        self.settings = self.models[0].settings
        tasks = [Binary(name) for name in trainer.task_name]
        counts = {name: trainer.n_groups[name] for name in self.settings.attributes or trainer.n_groups}
        layout = (tasks, [1] * len(tasks), counts, [range(len(tasks))], device)
        self.rule = stack([Constraint(model.settings, *layout) for model in self.models], device)
        self.dual = stack([model.dual for model in self.models])
        empty = torch.zeros((self.rule.n_attributes * self.rule.n_groups, 4 * len(tasks)), device=device)
        self.running = torch.stack([empty if model.running is None else model.running for model in self.models])
        self.presence = torch.zeros((len(members), len(tasks)), device=device)
        self._members: Tensor | None = None

    def save(self) -> None:
        """Give the members' modules their dual variables, running sums, and how often tasks were compared."""
        unstack(self.dual, [model.dual for model in self.models])
        for m, model in enumerate(self.models):
            model.running, model.presence = self.running[m].clone(), self.presence[m].clone()
        self.presence.zero_()

    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of the Lagrangian; move the running sums and the dual variables."""
        if self._members is None:
            self._members = self.rule.membership(step.groups)
        member = self._members.index_select(0, step.rows.flatten()).view(*step.rows.shape, -1)
        sharpness: Any = self.rule.sharpness
        block = BinaryColumns(step.z, step.y, sharpness.to(step.z.dtype).view(-1, 1, 1))
        found, self.running = evaluate(self.rule, self.rule.sums([block], [member]), self.running)
        (fairness,) = self.rule.pull_back([block], [member], found.to_sums)
        losses, observed = loss_gradient(step), (step.y == step.y).any(1)
        eta = self.dual.value.clone().to(losses.dtype).unsqueeze(1)
        if self.settings.weighing == "uniform" or observed.shape[1] == 1:
            alpha = uniform(observed, losses.dtype)
        else:
            gram, linear = head_products(losses, fairness, step.heads.mT, rank_one=self.settings.rank_one)
            alpha = F.min_norm_weights(gram, eta * linear, observed)
        count = observed.sum(1, keepdim=True).to(losses.dtype)
        self.dual.update(found.phi, found.present.any(1))
        self.presence += found.present
        return torch.addcmul(losses * (alpha * count).unsqueeze(1), fairness, (eta * count).unsqueeze(1)), None
