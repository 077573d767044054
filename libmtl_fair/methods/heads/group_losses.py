"""Disparity of one task between groups, as a differentiable scalar: what fairness heads and regularisers minimise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.functional._group_slopes import can_write_out, cell_disparity
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


@dataclass(frozen=True)
class Cells:
    """Which examples of a batch count for which condition and group. Carries no gradient.

    Attributes
    ----------
    condition : [B, K], 1 where the example counts for condition k (a class; a label's positives; all).
    member : [B, G], 1 where the example is of group g; the row of an unknown group is 0.
    count : [K, G], examples in each cell.
    """

    condition: Tensor
    member: Tensor
    count: Tensor

    @classmethod
    def of(cls, condition: Tensor, groups: Tensor, n_groups: int) -> Cells:
        """Count the cells of ``condition`` [B, K] (bool) and group ids [B]."""
        member = F.group_indicator(groups, n_groups)
        chosen = condition.to(member.dtype)
        return cls(chosen, member, chosen.T @ member)

    def means(self, values: Tensor) -> Tensor:
        """Return the mean of ``values`` [B, 1] or [B, K] in each cell, [K, G]; 0 in an empty one."""
        sums = (self.condition.to(values.dtype) * values).T @ self.member.to(values.dtype)
        return sums / self.count.clamp(min=1)


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

    def cells(self, task: Task, labels: Tensor, groups: Tensor, n_groups: int) -> Cells:
        """Return the cells of a batch from labels [B] or [B, C] and group ids [B]."""
        return Cells.of(self._condition(task, labels), groups, n_groups)

    def value(self, task: Task, output: Tensor, labels: Tensor, cells: Cells) -> Tensor:
        """Return the disparity (scalar) of a task's outputs; 0 with zero gradient with fewer than two groups."""
        if self.loss in _OF_LOSSES:
            return self._compare(self._losses(task, output, labels), cells, self.loss).sum()
        scores = self._scores(task, output, labels)
        if self.loss in ("dpl", "gap") and self.within_classes:
            both = isinstance(task, Multilabel)  # every label's no, then every label's yes
            return self._compare(torch.cat([scores, scores], dim=1) if both else scores, cells, "spread").sum()
        gaps = self._compare(scores, cells, "spread")
        defined = ((cells.count > 0).sum(-1) >= 2).expand_as(gaps)
        return gaps.sum() / defined.sum().clamp(min=1)

    def _scores(self, task: Task, output: Tensor, labels: Tensor) -> Tensor:
        """Return the scores that gaps are of, [B, 1] or [B, C]."""
        if self.loss == "gap" and isinstance(task, (Binary, Multilabel)):
            logits = output if isinstance(task, Multilabel) else task.logit(output)[:, None]
            return torch.sigmoid(self.scale * (logits - F.base_rate_threshold(logits, labels)))
        sharp = self.scale != 1 and task.kind != "regression"
        scores = task.probabilities(output * self.scale if sharp else output)
        return scores if scores.dim() == 2 else scores[:, None]

    def _compare(self, values: Tensor, cells: Cells, kind: str) -> Tensor:
        """Return the disparity of every condition, [K]."""
        if cells.condition.shape[1] < values.shape[1]:  # one condition for all columns
            cells = replace(
                cells, condition=cells.condition.expand_as(values), count=cells.count.expand(values.shape[1], -1)
            )
        if can_write_out(values, cells.count):
            parts = (cells.condition.to(values.dtype), cells.member.to(values.dtype), cells.count)
            return cell_disparity(values, *parts, kind)
        of = F.spread if kind == "spread" else _OF_LOSSES[kind]
        return of(cells.means(values), cells.count > 0)

    def _condition(self, task: Task, labels: Tensor) -> Tensor:
        if self.loss == "dpl" and not self.within_classes:
            return torch.ones_like(labels.reshape(len(labels), -1)[:, :1], dtype=torch.bool)
        if not self.within_classes:
            return task.observed(labels)[:, None]
        classes = class_indicator(task, labels, self.bins)
        if self.loss not in ("fprl", "tprl"):
            return classes
        if isinstance(task, Multiclass):
            return classes if self.loss == "tprl" else task.observed(labels)[:, None] & ~classes
        negative, positive = classes.chunk(2, dim=1)
        return positive if self.loss == "tprl" else negative

    def _losses(self, task: Task, output: Tensor, labels: Tensor) -> Tensor:
        single = task.kind == "binary" and output.shape[1:] == (1,)
        if not single and not (isinstance(task, Multilabel) and self.within_classes):
            return task.example_losses(output, labels)[:, None]
        target = labels.nan_to_num(0.0).clamp(min=0).to(output.dtype).reshape(output.shape)  # missing: in no cell
        losses = nnf.binary_cross_entropy_with_logits(output, target, reduction="none")
        return losses if single else torch.cat([losses, losses], dim=1)


def class_indicator(task: Task, labels: Tensor, bins: int = 4) -> Tensor:
    """Return which class each example is of, bool [B, K]; the row of a missing label is False.

    Binary: K = 2 (no, yes). Multiclass: K = n_classes. Multilabel: K = 2 n_labels (every label's no, then every label's
    yes). Regression: K = ``bins`` quantile bins of the batch's targets.
    """
    labels = task.flat(labels)
    if isinstance(task, Multilabel):
        return torch.cat([labels == 0, labels == 1], dim=1)
    if task.kind == "binary":
        return torch.stack([labels == 0, labels == 1], dim=1)
    if isinstance(task, Multiclass):
        ids, count = labels, task.n_classes
    else:
        known = task.observed(labels)  # whole numbers say "missing" by a number of their own
        ids, count = F.quantile_bins(torch.where(known, labels, torch.nan), bins), bins
    return ids[:, None] == torch.arange(count, device=ids.device)


def class_count(task: Task, bins: int = 4) -> int:
    """Return the number of columns of :func:`class_indicator`."""
    counts: Mapping[str, Any] = {"binary": 2, "regression": bins, "multilabel": 2 * task.out_features}
    return int(counts.get(task.kind, task.out_features))
