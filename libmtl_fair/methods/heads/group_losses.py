"""Disparities of tasks between groups, differentiable: what fairness heads and regularisers minimise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.tasks import Binary, Multiclass, Multilabel, Task

_OF_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "glf": F.glf,
    "gld": F.gld,
    "bgl": F.bounded_group_loss,
}
_OF_SCORES = ("gap", "dpl", "fprl", "tprl")
GROUP_LOSSES: tuple[str, ...] = (*_OF_LOSSES, *_OF_SCORES)
"""Names of the disparities."""
GAP_SHARPNESS = 6.0
"""Sharpness of ``"gap"`` unless told **(ours)**: chosen on adult among 1, 3, 6 and 12."""


class Compared(NamedTuple):
    """What is compared between groups: ``values`` where ``condition`` is 1, [B, K] each, or [B, 1] for all K.

    First those of the ``binary`` tasks (places), as many of each, the k-th of all beside each other; then those of the other
    tasks, ``sizes`` of each.
    """

    values: Tensor
    condition: Tensor
    binary: Sequence[int]
    sizes: Sequence[int]


@dataclass(frozen=True)
class GroupLoss:
    """A disparity between the groups of one sensitive attribute (methods.md, 4).

    Parameters
    ----------
    loss : ``"glf"``, ``"gld"``, ``"bgl"`` (of the groups' mean losses); ``"dpl"``, ``"fprl"``, ``"tprl"`` (of the
        groups' mean scores: over all examples, over negatives, over positives; the largest gap between groups); ``"gap"``
        **(ours)**: dpl within classes of sharpened scores, which is equalised odds made smooth. Scores of binary and
        multilabel tasks are then about the threshold that selects as many of the batch as are positive, so that lowering
        all scores, which makes decisions at 0.5 look fair, gains nothing.
    conditional : groups are compared within each class and the disparities summed **(ours)**; None is True, but for dpl.
        dpl with True is the gap of scores within each class; of a multiclass task, of the probability of that class.
    bins : classes of a regression target are its quantile bins in the batch.
    sharpness : scores are those of the logits times this, for gaps of scores **(ours)**: above 1 they come near the
        decisions at 0.5 whose rates equalised odds compares. Regression has no logits, and keeps its values. None is 6 for
        gap, else 1.

    Multiclass and multilabel tasks have one gap of scores a class or label; the mean is taken **(ours)**. Conditional
    losses of a multilabel task are those of each label's positives and negatives **(ours)**.

    Raises
    ------
    RecipeError : an unknown loss, or settings that exclude each other.
    """

    loss: str = "glf"
    conditional: bool | None = None
    bins: int = 4
    sharpness: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.loss not in GROUP_LOSSES:
            raise RecipeError(unknown("fairness loss", self.loss, GROUP_LOSSES))
        if self.loss in ("gap", "fprl", "tprl") and self.conditional is False:
            raise RecipeError(f"loss {self.loss!r} has conditional=True by definition, found False; leave it out")
        value = self.scale
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise RecipeError(f"sharpness must be a number above 0, found {value!r}")
        if value != 1 and self.loss not in _OF_SCORES:
            raise RecipeError(f"sharpness is for gaps of scores ({', '.join(_OF_SCORES)}), found it with {self.loss!r}")
        if isinstance(self.bins, bool) or not isinstance(self.bins, int) or self.bins < 1:
            raise RecipeError(f"bins must be a whole number of at least 1, found {self.bins!r}")

    @property
    def scale(self) -> float:
        """What logits are multiplied by."""
        default = GAP_SHARPNESS if self.loss == "gap" else 1.0
        return default if self.sharpness is None else self.sharpness

    @property
    def within_classes(self) -> bool:
        """Whether groups are compared within classes."""
        return self.loss != "dpl" if self.conditional is None else self.conditional

    def check(self, task: Task) -> None:
        """Raise a RecipeError where the disparity is not defined for the task."""
        if self.loss in ("fprl", "tprl") and task.kind == "regression":
            raise RecipeError(
                f"loss {self.loss!r} needs classes, and task {task.name!r} is a regression; use 'glf', 'gld', 'bgl' or 'dpl'"
            )

    def columns(self, tasks: Sequence[Task], outputs: Sequence[Tensor], labels: Sequence[Tensor]) -> Compared:
        """Return what is compared of tasks that share the rows of a batch: outputs [B] or [B, C_t], labels [B] or [B, C_t]."""
        binary = [t for t, task in enumerate(tasks) if isinstance(task, Binary)]
        others = [t for t in range(len(tasks)) if t not in binary]
        parts = [self._of_task(tasks[t], outputs[t], labels[t]) for t in others]
        if binary:
            logits, truth = yes_no(
                [tasks[t] for t in binary], [outputs[t] for t in binary], [labels[t] for t in binary]
            )
            parts.insert(0, self._yes_no(logits, truth))
            if not others:
                return Compared(*parts[0], binary, ())
        widths = [max(values.shape[1], condition.shape[1]) for values, condition in parts]
        wide = [[part.expand(-1, width) for part in pair] for pair, width in zip(parts, widths)]
        values, condition = (torch.cat(part, 1) for part in zip(*wide))
        return Compared(values, condition, binary, widths[-len(others) :])

    def compare(self, compared: Compared, groups: Tensor, n_groups: int) -> Tensor:
        """Return the disparity of every task, [T], between groups of ids [B]; 0 with zero gradient with fewer than two of them."""
        values, condition, binary, sizes = compared
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        member = F.group_indicator(groups, n_groups, values.dtype)
        mean, count = F.cell_means(values, condition.to(values.dtype), member)
        gaps = _OF_LOSSES.get(self.loss, F.spread)(mean, count > 0)
        joint, *single = torch.split(gaps, [len(gaps) - sum(sizes), *sizes])
        together = joint.view(-1, max(len(binary), 1)).sum(0)
        if not sizes:
            return together
        if self.loss in ("dpl", "fprl", "tprl") and not (self.loss == "dpl" and self.within_classes):
            # the mean over the classes or labels where it is defined
            defined = ((count > 0).sum(-1) >= 2).expand_as(gaps)[len(joint) :]
            sums = [
                part.sum() / some.sum().clamp(min=1) for part, some in zip(single, torch.split(defined, list(sizes)))
            ]
        else:
            sums = [part.sum() for part in single]
        others = [t for t in range(len(binary) + len(sizes)) if t not in binary]
        found = dict(zip([*binary, *others], [*together.unbind(), *sums])) if binary else dict(enumerate(sums))
        return torch.stack([found[t] for t in range(len(found))])

    def _yes_no(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and condition of columns of logits and labels [B, M] (0, 1, else missing): every no, then every yes."""
        if self.loss in _OF_LOSSES:
            values, seen = F.example_cross_entropy(logits, labels)
            if not self.within_classes:
                return values, seen
        else:
            middle = F.base_rate_threshold(logits, labels) if self.loss == "gap" else 0
            values = torch.sigmoid(self.scale * (logits - middle))
            if not self.within_classes:
                return values, torch.ones_like(values[:, :1])
        if self.loss in ("tprl", "fprl"):
            return values, labels == (self.loss == "tprl")
        return torch.cat([values, values], 1), torch.cat([labels == 0, labels == 1], 1)

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


def yes_no(tasks: Sequence[Task], outputs: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits and labels of binary tasks as matrices [B, M], NaN where a label is missing; no copy of what is one."""
    logits = torch.cat([task.logit(z)[:, None] for task, z in zip(tasks, outputs) if isinstance(task, Binary)], 1)
    truth = torch.stack([y.reshape(len(y)) for y in labels], 1)
    return logits, truth if truth.is_floating_point() else torch.where(truth < 0, torch.nan, truth)


def class_indicator(task: Task, labels: Tensor, bins: int = 4) -> Tensor:
    """Return which class each example is of, bool [B, K]; the row of a missing label is False.

    Binary: K = 2 (no, yes). Multiclass: K = n_classes. Multilabel: K = 2 n_labels (every label's no, then every label's
    yes). Regression: K = ``bins`` quantile bins of the batch's targets.
    """
    labels = task.flat(labels)
    if task.kind in ("binary", "multilabel"):
        columns = labels.reshape(len(labels), -1)
        return torch.cat([columns == 0, columns == 1], dim=1)
    if isinstance(task, Multiclass):
        return F.group_indicator(labels, task.n_classes, torch.bool)
    known = task.observed(labels)  # whole numbers say "missing" by a number of their own
    return F.group_indicator(F.quantile_bins(torch.where(known, labels, torch.nan), bins), bins, torch.bool)


def class_count(task: Task, bins: int = 4) -> int:
    """Return the number of columns of :func:`class_indicator`."""
    return {"binary": 2, "regression": bins, "multilabel": 2 * task.out_features}.get(task.kind, task.out_features)


def mean_losses(tasks: Sequence[Task], outputs: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Return each task's own mean loss, [T]; all at once where all are binary."""
    if all(isinstance(task, Binary) for task in tasks):
        return F.mean_cross_entropy(*yes_no(tasks, outputs, labels))[0]
    return torch.stack([task.loss(z, y) for task, z, y in zip(tasks, outputs, labels)])
