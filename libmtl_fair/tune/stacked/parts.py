"""What members ask for in a step: gradients to logits and representations, of many by one formula, or of one by its own weighting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.functional._gram import head_products
from libmtl_fair.functional.near import near_price
from libmtl_fair.methods.controllers import stack, unstack
from libmtl_fair.methods.fairmt.constraint import BinaryColumns, Constraint, evaluate
from libmtl_fair.methods.fairmt.task_weights import uniform
from libmtl_fair.methods.near_pairs import ENOUGH, PRICE
from libmtl_fair.tasks import Binary
from libmtl_fair.tune.stacked.members import Member

Key = tuple[object, ...]


@dataclass(frozen=True)
class Step:
    """One step: logits z [M, B, C], what the heads received h [M, B, d], their weights [M, d, C], labels y [M, B, T] (NaN: missing).

    ``rows`` [M, B] index the training data, its ``groups`` and its ``reference`` [N, r]; ``complete``: no label is missing there.
    """

    z: Tensor
    h: Tensor
    heads: Tensor
    y: Tensor
    rows: Tensor
    groups: Mapping[str, Tensor]
    complete: bool
    reference: Tensor | None = None

    def loss_gradient(self) -> Tensor:
        """Return the gradient of the main tasks' losses to their logits, [M, B, T]."""
        labelled = None if self.complete else (self.y == self.y).sum(1)
        return F.mean_cross_entropy_gradient(torch.sigmoid(self.z[:, :, : self.y.shape[2]]), self.y, labelled)

    def of(self, places: Sequence[int]) -> Step:
        """Return the step of some members only; of all, without a copy."""
        if len(places) == len(self.z):
            return self
        at = torch.tensor(places, device=self.z.device)
        taken = self.z[at], self.h[at], self.heads[at], self.y[at], self.rows[at]
        return Step(*taken, self.groups, self.complete, self.reference)


class Part(ABC):
    """Members whose gradients are computed together; ``places`` are theirs in the stack."""

    @staticmethod
    def key(member: Member) -> Key | None:
        """Return what members of one part have in common; None where this part is not made for a member."""
        return None

    def __init__(self, places: Sequence[int], members: Sequence[Member]) -> None:
        self.places, self.members = list(places), list(members)

    @abstractmethod
    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return the gradients to the logits [m, B, C] and, past the heads, to the representations [m, B, d]."""

    def save(self) -> None:  # noqa: B027 - most keep nothing
        """Give the members' modules what the part has kept for them in an epoch."""


class Plain(Part):
    """Equal weighting of the tasks' losses."""

    @staticmethod
    def key(member: Member) -> Key | None:
        """Return the same for all."""
        return ("EW",) if member.plain else None

    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return the losses' gradient."""
        return step.loss_gradient(), None


class Own(Part):
    """One member, whose own weighting computes its gradients."""

    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return what the weighting leaves."""
        (member,) = self.members
        labels = dict(zip(member.trainer.main_tasks, step.y[0].clone().unbind(1)))
        groups = {name: ids.index_select(0, step.rows[0]) for name, ids in step.groups.items()}
        reference = None if step.reference is None else step.reference.index_select(0, step.rows[0])
        with torch.enable_grad():
            to_z, to_h = member.logit_gradients(step.z[0], step.h[0], labels, groups, reference)
        return to_z.unsqueeze(0), None if to_h is None else to_h.unsqueeze(0)


class NearPart(Part):
    """Members under ReLiF that compare near people."""

    @staticmethod
    def key(member: Member) -> Key | None:
        """Return what members of one part have in common; None where a member's own weighting has to do it."""
        model, trainer = member.trainer.model, member.trainer
        if trainer.weighting != "ReLiF" or not member.near:
            return None
        if model.share is not None and model.settings.pace(0, 1) is not None:
            return None  # its controller goes by the length of its own run
        return ("near", model.settings.lam is None, model.share is None)

    def __init__(self, places: Sequence[int], members: Sequence[Member]) -> None:
        super().__init__(places, members)
        self.models = [member.trainer.model for member in members]
        self.auto = self.models[0].settings.lam is None
        lam = [PRICE if self.auto else model.settings.lam for model in self.models]
        self.lam = torch.tensor(lam, device=members[0].device)
        self.share = None if self.models[0].share is None else stack([model.share for model in self.models])

    def save(self) -> None:
        """Give the members' modules their controllers."""
        if self.share is not None:
            unstack(self.share, [model.share for model in self.models])

    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the losses plus lambda times near people's gaps."""
        assert step.reference is not None
        people = step.reference.index_select(0, step.rows.flatten()).view(*step.rows.shape, -1)
        main = step.z[:, :, : step.y.shape[2]].mT.contiguous()
        near = F.near_others(people)
        gaps = F.near_gaps(main, near.others.unsqueeze(1), logits=True)
        strength, present = self.lam, gaps.present.sum(1)
        if self.share is not None:
            strength = self.share.update(gaps.value.sum(1) / present, present > 0)
        strength = strength.to(main.dtype).view(-1, 1, 1)
        if self.auto:
            price = near_price(main, near.closeness.unsqueeze(-1), logits=True) * (gaps.value / ENOUGH).clamp(max=1)
            strength = strength * price.unsqueeze(-1)
        return step.loss_gradient().add_(gaps.slope.mul_(strength).mT), None


class ReLiFPart(Part):
    """Members under ReLiF that compare all pairs of tasks."""

    @staticmethod
    def key(member: Member) -> Key | None:
        """Return what members of one part have in common; None where a member's own weighting has to do it."""
        trainer = member.trainer
        if trainer.weighting != "ReLiF" or trainer.auxiliary or member.near:
            return None
        s, tasks = trainer.model.settings, len(trainer.task_name)
        if not s.lipschitz or tasks < 2 or (s.task_pairs is not None and s.task_pairs < tasks * (tasks - 1) // 2):
            return None
        return ("ReLiF", s.prototypes, s.quantile, s.scaling, s.detach_distance)

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
        return step.loss_gradient().add_(to_z), to_h


class FairMTPart(Part):
    """Members under FairMT with linear heads."""

    @staticmethod
    def key(member: Member) -> Key | None:
        """Return what members of one part have in common; None where a member's own weighting has to do it."""
        trainer = member.trainer
        if trainer.weighting != "FairMT" or trainer.auxiliary:
            return None
        s = trainer.model.settings
        if (
            s.form != "phi"
            or s.lipschitz
            or s.weighing == "base"
            or any(name not in trainer.n_groups for name in s.attributes or ())
        ):
            return None
        same = [
            "normalise",
            "symmetric",
            "reference",
            "solver",
            "intersectional",
            "ema_gradient",
            "weighing",
            "rank_one",
        ]
        return ("FairMT", tuple(s.attributes or trainer.n_groups), *(getattr(s, name) for name in same))

    def __init__(self, places: Sequence[int], members: Sequence[Member]) -> None:
        super().__init__(places, members)
        trainer, device = members[0].trainer, members[0].device
        self.models = [member.trainer.model for member in members]
        self.settings, tasks = self.models[0].settings, [Binary(name) for name in trainer.task_name]
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
        losses, observed = step.loss_gradient(), (step.y == step.y).any(1)
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


class HeadsPart(Part):
    """Members under LambdaMix whose fairness heads repeat the main heads, or are linear heads of their own."""

    @staticmethod
    def key(member: Member) -> Key | None:
        """Return what members of one part have in common; None where a member's own weighting has to do it."""
        trainer = member.trainer
        if trainer.weighting != "LambdaMix":
            return None
        return ("LambdaMix", *(trainer.tasks[name] for name in trainer.auxiliary))

    def __init__(self, places: Sequence[int], members: Sequence[Member]) -> None:
        super().__init__(places, members)
        trainer = members[0].trainer
        self.mains = list(trainer.main_tasks)
        self.tasks: list[Any] = [trainer.tasks[name] for name in trainer.auxiliary]
        self.n_groups, self._fair = dict(trainer.n_groups), torch.func.vmap(torch.func.grad(self._disparity))
        lam = [float(member.trainer.model.lam) for member in members]
        self.lam = torch.tensor(lam, dtype=torch.get_default_dtype(), device=members[0].device).view(-1, 1, 1)
        own = [name for name in trainer.task_name if type(trainer.model.decoders[name]) is nn.Linear]
        self.columns = [
            [own.index(task.name)] if task.name in own else [own.index(main.name) for main in task.mains]
            for task in self.tasks
        ]
        self.detached = len(own) == len(self.mains)

    def gradients(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Return lambda times the losses' gradient and (1 - lambda) times the disparities', past main heads held fixed."""
        groups = {name: ids[step.rows] for name, ids in step.groups.items()}
        fair = self._fair(step.z, step.y, groups).mul_(1 - self.lam)
        main = step.loss_gradient().mul_(self.lam)
        if self.detached:
            return main, fair @ step.heads.mT
        fair[:, :, : len(self.mains)] += main
        return fair, None

    def _disparity(self, z: Tensor, y: Tensor, groups: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of one member's fairness losses from its logits [B, C]."""
        labels = dict(zip(self.mains, y.unbind(1)))
        made = [task.labels_from(labels, groups, self.n_groups) for task in self.tasks]
        parts = zip(self.tasks, self.columns, made)
        return torch.stack([task.loss(z[:, columns], own) for task, columns, own in parts]).sum()


def parts_of(members: Sequence[Member]) -> list[Part]:
    """Return the parts of a stack, each with the places of its members."""
    groups: dict[Key, tuple[type[Part], list[int]]] = {}
    for place, member in enumerate(members):
        found = (
            (key, kind) for kind in (Plain, NearPart, ReLiFPart, FairMTPart, HeadsPart) if (key := kind.key(member))
        )
        key, kind = next(found, (("own", place), Own))
        groups.setdefault(key, (kind, []))[1].append(place)
    return [kind(places, [members[m] for m in places]) for kind, places in groups.values()]
