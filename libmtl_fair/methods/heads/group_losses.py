"""Disparities of tasks between groups, differentiable: what fairness heads and regularisers minimise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as nnf
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.batch import joined
from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.methods.base import Declared, setting
from libmtl_fair.tasks import Binary, Multiclass, Multilabel, Task

_OF_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"glf": F.glf, "gld": F.gld, "bgl": F.bounded_group_loss}
_OF_SCORES = ("gap", "lift", "dpl", "fprl", "tprl", "norm")
_SHARP = ("gap", "lift")
WITHIN_CLASSES = (*_SHARP, "fprl", "tprl", "norm")
"""Those that compare rates within classes by definition."""
GROUP_LOSSES: tuple[str, ...] = (*_OF_LOSSES, *_OF_SCORES)
"""Names of the disparities."""
GAP_SHARPNESS = 6.0
"""Sharpness of ``"gap"`` unless told **(ours)**: chosen on adult among 1, 3, 6 and 12."""


Outputs: TypeAlias = "Mapping[str, Tensor] | Sequence[Tensor]"
"""Outputs of tasks by name, or in order."""


class Compared(NamedTuple):
    """What is compared between groups: ``values`` where ``condition`` is 1, [B, K] each, or [B, 1] for all K.

    Columns come in blocks of ``sizes``, each of ``many`` tasks with the k-th columns of all of them beside each other; ``order``
    are the tasks' places, block by block.
    """

    values: Tensor
    condition: Tensor
    sizes: list[int]
    many: list[int]
    order: list[int]


class GroupLoss(Declared):
    """A disparity between the groups of one sensitive attribute (METHODS.md, 4).

    ``glf``, ``gld`` and ``bgl`` are of the groups' mean losses; ``dpl``, ``fprl`` and ``tprl`` the largest gap between the groups'
    mean scores over all examples, over negatives, over positives; ``gap`` **(ours)** is dpl within classes of sharpened scores,
    which is equalised odds made smooth; ``lift`` **(ours)** is the same, but only groups behind the best are moved (FairMT's psi,
    per group behind). Scores of binary and multilabel tasks are then about the threshold that selects as many of the batch as are
    positive, so that lowering all scores, which makes decisions at 0.5 look fair, gains nothing. ``norm`` is
    the norm violation of true and false positive rates of scores, relative to the rate of all groups (Buyl et al., ICLR 2024).

    Multiclass and multilabel tasks have one gap of scores a class or label; the mean is taken **(ours)**. Conditional
    losses of a multilabel task are those of each label's positives and negatives **(ours)**.
    """

    loss: str = setting("glf", "glf, gld, bgl, gap, lift, dpl, fprl, tprl or norm")
    conditional: bool | None = setting(
        None, "compare groups within each class and sum the disparities; null is true, but for dpl", ours=True
    )
    bins: int = setting(4, "classes of a regression target are its quantile bins in the batch", ours=True, ge=1)
    sharpness: float | None = setting(
        None,
        "scores are those of the logits times this, for gaps of scores: above 1 they come near the decisions at 0.5 whose rates "
        "equalised odds compares; null is 6 for gap, else 1",
        ours=True,
        expected="a number above 0",
        gt=0,
        allow_inf_nan=False,
    )

    def check(self) -> None:
        """Raise a RecipeError for an unknown loss, or settings that exclude each other."""
        if self.loss not in GROUP_LOSSES:
            raise self.refused("loss", unknown("fairness loss", self.loss, GROUP_LOSSES))
        if self.loss in WITHIN_CLASSES and self.conditional is False:
            text = f"loss {self.loss!r} has conditional=True by definition, found False; leave it out"
            raise self.refused("conditional", text)
        if self.scale != 1 and self.loss not in _OF_SCORES:
            text = f"sharpness is for gaps of scores ({', '.join(_OF_SCORES)}), found it with {self.loss!r}"
            raise self.refused("sharpness", text)

    @property
    def scale(self) -> float:
        """What logits are multiplied by; regression has none, and keeps its values."""
        default = GAP_SHARPNESS if self.loss in _SHARP else 1.0
        return default if self.sharpness is None else self.sharpness

    @property
    def within_classes(self) -> bool:
        """Whether groups are compared within classes."""
        return self.loss != "dpl" if self.conditional is None else self.conditional

    def check_task(self, task: Task) -> None:
        """Raise a RecipeError where the disparity is not defined for the task."""
        if self.loss not in _OF_LOSSES and not task.single:
            raise RecipeError(
                f"loss {self.loss!r} compares one score an example, and task {task.name!r} is {task.kind}; use 'glf', 'gld' or 'bgl'"
            )
        if self.loss in ("fprl", "tprl", "lift", "norm") and task.kind == "regression":
            raise RecipeError(
                f"loss {self.loss!r} needs classes, and task {task.name!r} is a regression; use 'glf', 'gld', 'bgl' or 'dpl'"
            )

    def columns(self, tasks: Sequence[Task], outputs: Outputs, labels: Mapping[str, Tensor]) -> Compared:
        """Return what is compared of tasks that share the rows of a batch: outputs [B] or [B, C_t], labels [B] or [B, C_t]."""
        binary = [t for t, task in enumerate(tasks) if isinstance(task, Binary)]
        others = [t for t, task in enumerate(tasks) if not isinstance(task, Binary)]
        parts = [self._of_task(tasks[t], _output(outputs, tasks, t), labels[tasks[t].name]) for t in others]
        if binary:
            parts.insert(0, self._yes_no(*yes_no(tasks, outputs, labels)))
        sizes = [max(values.shape[1], condition.shape[1]) for values, condition in parts]
        values, condition = parts[0]
        if len(parts) > 1:
            wide = [[part.expand(-1, size) for part in pair] for pair, size in zip(parts, sizes)]
            values, condition = (torch.cat(part, 1) for part in zip(*wide))
        return Compared(values, condition, sizes, [len(binary)] * bool(binary) + [1] * len(others), [*binary, *others])

    def compare(self, compared: Compared, groups: Tensor, n_groups: int) -> Tensor:
        """Return the disparity of every task, [T], between groups of ids [B]; 0 with zero gradient with fewer than two of them."""
        values, condition, sizes, many, order = compared
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        member = F.group_indicator(groups, n_groups, values.dtype)
        mean, count = F.cell_means(values, condition.to(values.dtype), member)
        gaps = (
            F.norm_violation(mean, count)
            if self.loss == "norm"
            else _OF_LOSSES.get(self.loss, F.shortfall if self.loss == "lift" else F.spread)(mean, count > 0)
        )

        def by_task(columns: Tensor) -> Tensor:
            if len(many) == 1:
                return columns.view(-1, many[0]).sum(0)
            return torch.cat([part.view(-1, m).sum(0) for part, m in zip(torch.split(columns, sizes), many)])

        found = by_task(gaps)
        if self.loss in _OF_SCORES and not (self.loss in ("dpl", *_SHARP, "norm") and self.within_classes):
            defined = (count > 0).sum(-1) >= 2  # the mean over the classes or labels where there is a gap
            found = found / by_task(defined.expand_as(gaps)).clamp(min=1)
        return found if order == sorted(order) else torch.stack([found[order.index(t)] for t in range(len(order))])

    def _yes_no(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and condition of columns of logits and labels [B, M] (0, 1, else missing): every no, then every yes."""
        yes = (labels == 1).to(logits.dtype)
        if self.loss in _OF_SCORES:
            middle = F.base_rate_threshold(logits, labels) if self.loss in _SHARP else 0.0
            values = torch.sigmoid(self.scale * (logits - middle))
            if not self.within_classes:
                return values, torch.ones_like(yes[:, :1])
        elif self.within_classes:
            values = nnf.binary_cross_entropy_with_logits(
                logits, yes, reduction="none"
            )  # a missing label is in no class
        else:
            return F.example_cross_entropy(logits, labels)
        if self.loss in ("tprl", "fprl"):
            return values, yes if self.loss == "tprl" else labels == 0
        if self.loss == "lift":  # a group is behind with a low rate among the yes, with a high one among the no
            return torch.cat([-values, values], 1), torch.cat([labels == 0, yes], 1)
        both = values if values.shape[1] == 1 else torch.cat([values, values], 1)
        return both, torch.cat([labels == 0, yes], 1)

    def _of_task(self, task: Task, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and condition of a task that is not binary."""
        if isinstance(task, Multilabel) and (self.within_classes or self.loss not in _OF_LOSSES):
            return self._yes_no(output, labels)
        if self.loss in _OF_LOSSES:
            values = task.example_losses(output, labels)[:, None]
        else:
            values = task.probabilities(output if task.kind == "regression" else output * self.scale)
            values = values if values.dim() == 2 else values[:, None]
        seen = task.observed(labels)[:, None]
        if self.loss == "dpl" and not self.within_classes:
            return values, torch.ones_like(seen)
        if not self.within_classes:
            return values, seen
        classes = class_indicator(task, labels, self.bins)
        return values, seen & ~classes if self.loss == "fprl" else classes


def yes_no(tasks: Sequence[Task], outputs: Outputs, labels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits and labels of the binary ones of these tasks as matrices [B, M], NaN where a label is missing."""
    binary = {t: task for t, task in enumerate(tasks) if isinstance(task, Binary)}
    names = tuple(task.name for task in binary.values())
    logits = joined(outputs, names) if isinstance(outputs, Mapping) else None
    if logits is None:
        found = {t: _output(outputs, tasks, t) for t in binary}
        columns = [z if z.shape[1:] == (1,) else binary[t].logit(z).unsqueeze(1) for t, z in found.items()]
        logits = columns[0] if len(columns) == 1 else torch.cat(columns, 1)
    truth = joined(labels, names)
    if truth is None:
        raise DataError(f"tasks {', '.join(names)}: expected labels [B] of the same examples")
    return logits, truth


def _output(outputs: Outputs, tasks: Sequence[Task], place: int) -> Tensor:
    return outputs[tasks[place].name] if isinstance(outputs, Mapping) else outputs[place]


def class_indicator(task: Task, labels: Tensor, bins: int = 4) -> Tensor:
    """Return which class each example is of, bool [B, K]; the row of a missing label is False.

    Binary: K = 2 (no, yes). Multiclass: K = n_classes. Multilabel: K = 2 n_labels (every label's no, then every label's
    yes). Regression: K = ``bins`` quantile bins of the batch's targets. Maps and sequences: K = 1, all that have a label.
    """
    labels = task.flat(labels)
    if not task.single:
        return task.observed(labels)[:, None]
    if task.kind in ("binary", "multilabel"):
        columns = labels.reshape(len(labels), -1)
        return torch.cat([columns == 0, columns == 1], dim=1)
    if isinstance(task, Multiclass):
        return F.group_indicator(labels, task.n_classes, torch.bool)
    known = task.observed(labels)  # whole numbers say "missing" by a number of their own
    return F.group_indicator(F.quantile_bins(torch.where(known, labels, torch.nan), bins), bins, torch.bool)


def class_count(task: Task, bins: int = 4) -> int:
    """Return the number of columns of :func:`class_indicator`."""
    if not task.single:
        return 1
    return {"binary": 2, "regression": bins, "multilabel": 2 * task.out_features}.get(task.kind, task.out_features)


def mean_losses(tasks: Sequence[Task], outputs: Outputs, labels: Mapping[str, Tensor]) -> Tensor:
    """Return each task's own mean loss, [T]; all at once where all are binary."""
    if all(isinstance(task, Binary) for task in tasks):
        return F.mean_cross_entropy(*yes_no(tasks, outputs, labels))[0]
    return torch.stack([task.loss(_output(outputs, tasks, t), labels[task.name]) for t, task in enumerate(tasks)])
