"""What the members of a stack ask for in a step: gradients to their logits and representations, for many at once or one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from libmtl_fair.tune.stacked.members import Member


@dataclass(frozen=True)
class Step:
    """One step of some members.

    Attributes
    ----------
    z, h : logits [M, B, C] and what the heads received [M, B, d].
    heads : weights of the heads [M, d, C].
    y : labels of the main tasks [M, B, T], NaN where missing.
    rows : [M, B], in the training data, whose ``groups`` (attribute -> [N]) are looked up by those who need them.
    complete : whether no label is missing in the training data.
    """

    z: Tensor
    h: Tensor
    heads: Tensor
    y: Tensor
    rows: Tensor
    groups: Mapping[str, Tensor]
    complete: bool

    def of(self, places: Sequence[int]) -> Step:
        """Return the step of some members only; of all, without a copy."""
        if len(places) == len(self.z):
            return self
        at = torch.tensor(places, device=self.z.device)
        return Step(self.z[at], self.h[at], self.heads[at], self.y[at], self.rows[at], self.groups, self.complete)


class Part(ABC):
    """Members whose gradients are computed together; ``places`` are theirs in the stack."""

    def __init__(self, places: Sequence[int], members: Sequence[Member]) -> None:
        self.places, self.members = list(places), list(members)

    @abstractmethod
    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return the gradients to the logits [m, B, C] and, past the heads, to the representations [m, B, d]."""

    def save(self) -> None:  # noqa: B027 - most keep nothing
        """Give the members' modules what the part has kept for them in an epoch."""


class Plain(Part):
    """Equal weighting of the tasks' losses."""

    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return the losses' gradient."""
        return loss_gradient(step), None


class Own(Part):
    """One member, whose own weighting computes its gradients."""

    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return what the weighting leaves."""
        (member,) = self.members
        labels = dict(zip(member.trainer.main_tasks, step.y[0].clone().unbind(1)))
        groups = {name: ids.index_select(0, step.rows[0]) for name, ids in step.groups.items()}
        with torch.enable_grad():
            to_z, to_h = member.logit_gradients(step.z[0], step.h[0], labels, groups)
        return to_z.unsqueeze(0), None if to_h is None else to_h.unsqueeze(0)


def loss_gradient(step: Step) -> Tensor:
    """Gradient to the main tasks' logits [M, B, T] of their binary cross-entropies, means over rows with a label."""
    y = step.y
    wrong = torch.sigmoid(step.z[:, :, : y.shape[2]]).sub_(y)
    if step.complete:
        return wrong.div_(y.shape[1])
    seen = y == y
    return torch.where(seen, wrong.div_(seen.sum(1, keepdim=True).clamp_(min=1)), 0.0)
