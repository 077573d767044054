"""The robust log loss of every task in one step: FairBranch's fairness loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.tasks import Binary, Multiclass, Multilabel, Regression, Task


def robust_losses(batch: FairBatch, tasks: Sequence[str], attributes: Sequence[str] | None = None) -> Tensor:
    r"""Return :math:`F_t = \sum_y \max_g L_t | y, g` for each of ``tasks``, [M], attached to the graph.

    Over observed labels and known groups; a cell without examples is absent. Several sensitive attributes: the sum.
    Multiclass: y runs over the classes. Multilabel: the mean over labels of the binary loss **(ours)**. Regression, and
    kinds without classes: the worst group's mean error. Single-logit binary tasks are computed at once.

    Parameters
    ----------
    attributes : sensitive attributes that count; None for all.

    Raises
    ------
    RecipeError : an attribute that the batch does not have.
    """
    together = [name for name in tasks if _single_logit(batch, name)] if not batch.multi_input else []
    found: dict[str, Tensor] = {}
    if len(together) > 1:
        logits = torch.cat([batch.outputs[name].reshape(-1, 1) for name in together], dim=1)
        labels = torch.stack([batch.labels[name].to(logits.dtype) for name in together], dim=1)
        joint = _binary(logits, labels, *_groups(batch, together[0], attributes))
        found = dict(zip(together, joint.unbind()))
        if len(together) == len(tasks):
            return joint
    return torch.stack([found[name] if name in found else _one(batch, name, attributes) for name in tasks])


def _single_logit(batch: FairBatch, name: str) -> bool:
    output = batch.outputs[name]
    return isinstance(batch.tasks[name], Binary) and output.shape[1:] in ((), (1,))


def _groups(batch: FairBatch, name: str, attributes: Sequence[str] | None) -> tuple[list[Tensor], list[int]]:
    """Return group ids [B] and number of groups of each attribute that counts."""
    groups: Mapping[str, Tensor] = batch.task_groups(name)
    for attribute in attributes or ():
        if attribute not in groups:
            raise RecipeError(f"FBGrad: {unknown('sensitive attribute', attribute, list(groups))}")
    chosen = list(groups if attributes is None else attributes)
    return [groups[a] for a in chosen], [batch.n_groups[a] for a in chosen]


def _one(batch: FairBatch, name: str, attributes: Sequence[str] | None) -> Tensor:
    task, output, labels = batch.task(name), batch.outputs[name], batch.labels[name]
    groups, sizes = _groups(batch, name, attributes)
    if isinstance(task, Multilabel):
        return _binary(output, labels.to(output.dtype), groups, sizes).mean()
    losses = batch.example_losses[name]
    classes, n_classes = _classes(task, output, labels)
    parts = [F.robust_log_loss(losses, classes, ids, n, n_classes) for ids, n in zip(groups, sizes)]
    return torch.stack(parts).sum()


def _classes(task: Task, output: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return class ids [B], -1 where there is no label, and their number."""
    if isinstance(task, Binary):
        return labels, 2
    if isinstance(task, Multiclass) and not isinstance(task, Regression):
        return labels, output.shape[1]
    return torch.where(task.observed(labels), 0, -1), 1


def _binary(logits: Tensor, labels: Tensor, groups: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the robust log loss of each column of ``logits`` and ``labels`` [B, M] (0, 1, anything else missing): [M]."""
    classes = torch.cat([labels == 0, labels == 1], dim=1)
    losses = nnf.binary_cross_entropy_with_logits(logits, labels.where(labels == 1, 0.0), reduction="none")
    weight = classes.to(losses.dtype)
    member = torch.cat([F.group_indicator(ids, n, losses.dtype) for ids, n in zip(groups, sizes)], dim=1).T
    count = member @ weight
    mean = (member @ (torch.cat([losses, losses], dim=1) * weight)) / count.clamp(min=1)
    present = count > 0
    worst = [
        part.masked_fill(~there, -torch.inf).amax(0).where(there.any(0), 0.0)
        for part, there in zip(torch.split(mean, list(sizes)), torch.split(present, list(sizes)))
    ]
    return torch.stack(worst).sum(0).view(2, -1).sum(0)
