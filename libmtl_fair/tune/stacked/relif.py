"""ReLiF of many members at once: the method's own term and controller, stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from libmtl_fair.methods.controllers import stack, unstack
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
        self.models = [member.trainer.model for member in members]
        self.term = stack([model.term for model in self.models])
        self.controller = stack([model.controller for model in self.models])
        self.generators = [member.generator for member in members]

    def save(self) -> None:
        """Give the members' modules their controllers and scales."""
        unstack(self.term, [model.term for model in self.models])
        unstack(self.controller, [model.controller for model in self.models])

    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the losses plus lambda times the Lipschitz term."""
        scores = torch.sigmoid(step.z.mT)
        term = self.term(scores, step.h, generator=self.generators).term
        strength = self.controller.update(term.rate, term.some).to(scores.dtype).view(-1, 1, 1)
        to_z = torch.ops.aten.sigmoid_backward(term.to_scores.mul_(strength), scores).mT
        to_h = None if term.to_embeddings is None else term.to_embeddings.mul_(strength)
        return loss_gradient(step).add_(to_z), to_h
