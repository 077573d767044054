"""Auxiliary fairness heads of many members at once: LambdaMix's step, its disparities mapped over the members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from libmtl_fair.tune.stacked.members import Member
from libmtl_fair.tune.stacked.parts import Part, Step, loss_gradient


def key(member: Member) -> tuple[Any, ...] | None:
    """Return what members of one part have in common; None where a member's own weighting has to do it."""
    trainer = member.trainer
    if trainer.weighting != "LambdaMix":
        return None
    return ("LambdaMix", *(trainer.tasks[name] for name in trainer.auxiliary))


class HeadsPart(Part):
    """Members under LambdaMix whose fairness heads repeat the main heads, or are linear heads of their own."""

    def __init__(self, places: Sequence[int], members: Sequence[Member]) -> None:
        super().__init__(places, members)
        trainer = members[0].trainer
        self.mains = list(trainer.main_tasks)
        self.tasks: list[Any] = [trainer.tasks[name] for name in trainer.auxiliary]
        self.n_groups = dict(trainer.n_groups)
        lam = [float(member.trainer.model.settings.lam) for member in members]
        self.lam = torch.tensor(lam, dtype=torch.get_default_dtype(), device=members[0].device).view(-1, 1, 1)
        own = [name for name in trainer.task_name if type(trainer.model.decoders[name]) is nn.Linear]
        self.columns = [
            [own.index(task.name)] if task.name in own else [own.index(main.name) for main in task.mains]
            for task in self.tasks
        ]
        self.detached = len(own) == len(self.mains)
        self._fair = torch.func.vmap(torch.func.grad(self._disparity))

    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return lambda times the losses' gradient and (1 - lambda) times that of the disparities.

        Heads that repeat the main heads hold them fixed: their gradient goes on to the representation only.
        """
        groups = {name: ids[step.rows] for name, ids in step.groups.items()}
        fair = self._fair(step.z, step.y, groups).mul_(1 - self.lam)
        main = loss_gradient(step).mul_(self.lam)
        if self.detached:
            return main, fair @ step.heads.mT
        fair[:, :, : len(self.mains)] += main
        return fair, None

    def _disparity(self, z: Tensor, y: Tensor, groups: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of one member's fairness losses from its logits [B, C]."""
        labels = dict(zip(self.mains, y.unbind(1)))
        terms = [
            task.loss(z[:, columns], task.labels_from(labels, groups, self.n_groups))
            for task, columns in zip(self.tasks, self.columns)
        ]
        return torch.stack(terms).sum()
