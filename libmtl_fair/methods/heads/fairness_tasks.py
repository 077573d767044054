"""Auxiliary fairness tasks: entries of LibMTL's ``task_dict`` whose labels follow from a main task's and the groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, HostError, unknown
from libmtl_fair.methods.heads.group_losses import Compared, GroupLoss, class_count, class_indicator, mean_losses
from libmtl_fair.tasks import Task


class AuxiliaryLabels(NamedTuple):
    """What an auxiliary task is trained on in one step: its main tasks' labels; ids [B] and number of groups by attribute."""

    labels: tuple[Tensor, ...]
    groups: tuple[Tensor, ...]
    n_groups: tuple[int, ...]

    def crossed(self) -> tuple[Tensor, int]:
        """Return ids [B], -1 unknown, and number of groups of all attributes as one."""
        one = len(self.groups) == 1
        return (self.groups[0], self.n_groups[0]) if one else F.cross_groups(self.groups, self.n_groups)


@dataclass(frozen=True)
class AuxiliaryTask(Task):
    """A task that exists in training only. FairTrainer makes its labels by :meth:`labels_from`.

    Parameters
    ----------
    mains : the main tasks whose labels it uses: one, or all for a shared head.
    attributes : sensitive attributes; several are crossed.
    """

    mains: tuple[Task, ...] = ()
    attributes: tuple[str, ...] = ()
    kind: ClassVar[str] = "auxiliary"
    auxiliary: ClassVar[bool] = True

    @property
    def source(self) -> str:
        """The main task whose examples it sees where tasks have inputs of their own.

        Raises
        ------
        HostError : it is shared by main tasks, which then have no examples in common.
        """
        if len(self.mains) > 1:
            raise HostError(
                f"auxiliary task {self.name!r}: heads='shared' needs one input for all tasks; use 'per_task'"
            )
        return self.mains[0].name

    def labels_from(
        self, labels: Mapping[str, Tensor], groups: Mapping[str, Tensor], n_groups: Mapping[str, int]
    ) -> AuxiliaryLabels:
        """Return the labels of a step from the main tasks' labels and attribute -> group ids.

        Raises
        ------
        DataError : an attribute that the loader does not give.
        """
        for name in self.attributes:
            if name not in groups:
                raise DataError(f"auxiliary task {self.name!r}: {unknown('sensitive attribute', name, groups)}")
        ids, counts = tuple(groups[a] for a in self.attributes), tuple(n_groups[a] for a in self.attributes)
        return AuxiliaryLabels(tuple(labels[task.name] for task in self.mains), ids, counts)


@dataclass(frozen=True)
class DisparityTask(AuxiliaryTask):
    """The disparity of the groups' losses (or scores) under the head's outputs, summed over its main tasks.

    ``accuracy=True`` adds the mean task loss, so that the head also learns the task. The output joins those of the
    main tasks, [B, sum of their widths].
    """

    disparity: GroupLoss = field(default_factory=GroupLoss)
    accuracy: bool = False

    @property
    def out_features(self) -> int:
        """Number of outputs of all its main tasks."""
        return sum(task.out_features for task in self.mains)

    def loss(self, output: Tensor, labels: AuxiliaryLabels) -> Tensor:  # type: ignore[override]
        """Return the disparity (scalar); 0 with zero gradient with fewer than two groups in the step."""
        return self.losses([self], [output], [labels])[0]

    @staticmethod
    def losses(tasks: Sequence[DisparityTask], outputs: Sequence[Tensor], labels: Sequence[AuxiliaryLabels]) -> Tensor:
        """Return the losses of several such tasks, [S]; those of one disparity and the same groups are computed at once."""
        alike: dict[object, list[int]] = {}
        for i, task in enumerate(tasks):
            alike.setdefault((task.disparity, task.accuracy, *map(id, labels[i].groups)), []).append(i)
        found: dict[int, Tensor] = {}
        made: dict[object, Compared] = {}  # heads that repeat the main heads say the same for every attribute
        for places in alike.values():
            mains = [main for i in places for main in tasks[i].mains]
            parts = [part for i in places for part in tasks[i]._split(outputs[i])]
            truth = [y for i in places for y in labels[i].labels]
            disparity = tasks[places[0]].disparity
            key = (disparity, *map(id, parts), *map(id, truth))
            if key not in made:
                made[key] = disparity.columns(mains, parts, truth)
            values = disparity.compare(made[key], *labels[places[0]].crossed())
            if tasks[places[0]].accuracy:
                values = values + mean_losses(mains, parts, truth)
            if len(alike) == 1 and len(places) == len(mains):
                return values
            sums = [part.sum() for part in torch.split(values, [len(tasks[i].mains) for i in places])]
            found |= zip(places, sums)
        return torch.stack([found[i] for i in range(len(tasks))])

    def _split(self, output: Tensor) -> Sequence[Tensor]:
        if len(self.mains) == 1:
            return [output]
        return torch.split(output.flatten(1), [task.out_features for task in self.mains], dim=1)


@dataclass(frozen=True)
class AdversaryTask(AuxiliaryTask):
    """Cross-entropy of predicting the group from the representation; its head reverses the gradient.

    ``conditional=True`` gives every class an adversary of its own, as equalised odds asks for. The output is
    [B, K * G]: K classes of the main task (of all main tasks, one after another; 1 if not conditional), G groups.
    """

    conditional: bool = True
    bins: int = 4
    n_groups: int = 2

    @property
    def out_features(self) -> int:
        """Number of classes times number of groups."""
        classes = sum(class_count(task, self.bins) for task in self.mains) if self.conditional else 1
        return classes * self.n_groups

    def labels_from(
        self, labels: Mapping[str, Tensor], groups: Mapping[str, Tensor], n_groups: Mapping[str, int]
    ) -> AuxiliaryLabels:
        """Return the labels of a step, as every auxiliary task.

        Raises
        ------
        DataError : an attribute that the loader does not give, or more groups than the head tells apart.
        """
        made = super().labels_from(labels, groups, n_groups)
        if math.prod(made.n_groups) > self.n_groups:
            raise DataError(
                f"auxiliary task {self.name!r}: its head tells {self.n_groups} groups apart, and the loader has "
                f"{math.prod(made.n_groups)}; give their number to add_fairness_heads"
            )
        return made

    def loss(self, output: Tensor, labels: AuxiliaryLabels) -> Tensor:  # type: ignore[override]
        """Return the mean cross-entropy over known groups (scalar); 0 with zero gradient with fewer than two groups."""
        groups, _ = labels.crossed()
        member = F.group_indicator(groups, self.n_groups, output.dtype)
        weight = member.sum(1, keepdim=True)
        if self.conditional:
            weight = weight * torch.cat(
                [class_indicator(t, y, self.bins) for t, y in zip(self.mains, labels.labels)], 1
            )
        weight = weight / weight.sum().clamp(min=1) * ((member.sum(0) > 0).sum() >= 2)
        logits = output.reshape(len(output), -1, self.n_groups).transpose(1, 2)
        target = groups.clamp(min=0)[:, None].expand(-1, logits.shape[2])
        return (nnf.cross_entropy(logits, target, reduction="none") * weight).sum()
