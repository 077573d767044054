"""Auxiliary fairness tasks: entries of LibMTL's ``task_dict`` whose labels follow from a main task's and the groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, HostError, unknown
from libmtl_fair.methods.heads.group_losses import Cells, GroupLoss, class_count, class_indicator
from libmtl_fair.tasks import Task


@dataclass(frozen=True)
class AuxiliaryLabels:
    """What an auxiliary task is trained on in one step.

    Attributes
    ----------
    labels : those of its main tasks.
    groups : int64 [B], -1 unknown.
    cells : of its main tasks; empty for an adversary.
    weight : [B, K] for an adversary, what each example counts in each class's mean; None else.
    """

    labels: tuple[Tensor, ...]
    groups: Tensor
    cells: tuple[Cells, ...] = ()
    weight: Tensor | None = None


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
        ids, count = [groups[a] for a in self.attributes], [n_groups[a] for a in self.attributes]
        crossed, total = F.cross_groups(ids, count) if len(ids) > 1 else (ids[0], count[0])
        return self._pack(tuple(labels[task.name] for task in self.mains), crossed, total)

    def _pack(self, labels: tuple[Tensor, ...], groups: Tensor, n_groups: int) -> AuxiliaryLabels:
        raise NotImplementedError


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

    def _pack(self, labels: tuple[Tensor, ...], groups: Tensor, n_groups: int) -> AuxiliaryLabels:
        cells = tuple(self.disparity.cells(task, y, groups, n_groups) for task, y in zip(self.mains, labels))
        return AuxiliaryLabels(labels, groups, cells)

    def loss(self, output: Tensor, labels: AuxiliaryLabels) -> Tensor:  # type: ignore[override]
        """Return the disparity (scalar); 0 with zero gradient with fewer than two groups in the step."""
        parts = [output] if len(self.mains) == 1 else self._split(output)
        terms = [
            self.disparity.value(task, part, y, cells)
            for task, part, y, cells in zip(self.mains, parts, labels.labels, labels.cells)
        ]
        if self.accuracy:
            terms += [task.loss(part, y) for task, part, y in zip(self.mains, parts, labels.labels)]
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum()

    def _split(self, output: Tensor) -> list[Tensor]:
        return list(torch.split(output.flatten(1), [task.out_features for task in self.mains], dim=1))


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

    def _pack(self, labels: tuple[Tensor, ...], groups: Tensor, n_groups: int) -> AuxiliaryLabels:
        if n_groups > self.n_groups:
            raise DataError(
                f"auxiliary task {self.name!r}: its head tells {self.n_groups} groups apart, and the loader has {n_groups}; "
                "give their number to add_fairness_heads"
            )
        member = F.group_indicator(groups, self.n_groups)
        weight = member.sum(1, keepdim=True) * self._classes(labels, member)
        compared = (member.sum(0) > 0).sum() >= 2
        return AuxiliaryLabels(labels, groups, weight=weight / weight.sum().clamp(min=1) * compared)

    def _classes(self, labels: tuple[Tensor, ...], like: Tensor) -> Tensor:
        if not self.conditional:
            return torch.ones_like(like[:, :1])
        return torch.cat([class_indicator(t, y, self.bins) for t, y in zip(self.mains, labels)], dim=1).to(like.dtype)

    def loss(self, output: Tensor, labels: AuxiliaryLabels) -> Tensor:  # type: ignore[override]
        """Return the mean cross-entropy over known groups (scalar); 0 with zero gradient with fewer than two groups."""
        assert labels.weight is not None
        logits = output.reshape(len(output), -1, self.n_groups).transpose(1, 2)
        target = labels.groups.clamp(min=0)[:, None].expand(-1, logits.shape[2])
        losses = nnf.cross_entropy(logits, target, reduction="none")
        return (losses * labels.weight.to(losses.dtype)).sum()
