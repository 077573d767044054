"""Tasks of one label, or one row of labels, an example: yes or no, classes, several labels, a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.tasks.base import IGNORE_INDEX, Ranged, Task, need_count, registered, with_nan


class YesNo(Task):
    """Labels of 0 and 1."""

    @property
    def labels_are(self) -> str:
        """What labels of this kind are, for messages."""
        return f"0 or 1; where missing NaN, or {IGNORE_INDEX} among whole numbers"

    def wrong(self, labels: Tensor) -> Tensor:
        """Return which values are neither 0 nor 1 nor missing, bool like ``labels``."""
        if labels.dtype == torch.bool:
            return torch.zeros_like(labels)
        other = (labels != 0) & (labels != 1)
        return other & (~labels.isnan() if labels.is_floating_point() else labels != IGNORE_INDEX)


@registered
@dataclass(frozen=True)
class Binary(YesNo):
    """A yes/no task. Output: one logit ([B] or [B, 1]) or two ([B, 2]); labels 0/1, NaN (or -100) where missing.

    >>> import torch
    >>> task = Binary("income")
    >>> task.loss(torch.zeros(3, 1), torch.tensor([1.0, 0.0, float("nan")])).item()  # log 2, over two labels
    0.6931471824645996
    """

    kind: ClassVar[str] = "binary"
    shown: ClassVar[Mapping[str, tuple[str, int]]] = {"AUC": ("auc", 1), "Acc": ("accuracy", 1)}
    headline: ClassVar[str] = "AUC"

    def logit(self, output: Tensor) -> Tensor:
        """Return the log-odds of the positive class, [B]."""
        if output.dim() == 2 and output.shape[1] == 2:
            return output[:, 1] - output[:, 0]
        return output.reshape(output.shape[0])

    log_odds = logit

    def example_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return binary cross-entropy from logits, [B]."""
        return F.example_cross_entropy(self.logit(output), with_nan(self.flat(labels)))[0]

    def probabilities(self, output: Tensor) -> Tensor:
        """Return the probability of the positive class, [B]."""
        return torch.sigmoid(self.logit(output))


@registered
@dataclass(frozen=True)
class Multiclass(Task):
    """One of ``n_classes``. Output: logits [B, C]; labels int64 [B], -100 where missing.

    ``classes`` may name them, in the order of the label ids.
    """

    n_classes: int = 2
    classes: tuple[str, ...] | None = None
    kind: ClassVar[str] = "multiclass"
    shown: ClassVar[Mapping[str, tuple[str, int]]] = {"Acc": ("accuracy", 1)}
    headline: ClassVar[str] = "Acc"

    def __post_init__(self) -> None:
        """Check the number of classes."""
        super().__post_init__()
        need_count(self.name, "n_classes", self.n_classes, 2)
        if self.classes is not None and len(self.classes) != self.n_classes:
            raise RecipeError(
                f"task {self.name!r}: {len(self.classes)} class names for n_classes={self.n_classes}; give one name a class"
            )

    @property
    def out_features(self) -> int:
        """Number of classes."""
        return self.n_classes

    @property
    def labels_are(self) -> str:
        """What labels of this kind are, for messages."""
        return f"whole numbers 0 to {self.n_classes - 1}, {IGNORE_INDEX} where missing"

    def wrong(self, labels: Tensor) -> Tensor:
        """Return which values are neither a class nor missing, bool like ``labels``."""
        outside = (labels < 0) | (labels >= self.n_classes)
        if labels.is_floating_point():
            return (outside | (labels != labels.floor())) & ~labels.isnan()
        return outside & (labels != IGNORE_INDEX)

    def example_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return cross-entropy from logits, [B]."""
        labels = self.flat(labels)
        target = torch.where(self.observed(labels), labels, IGNORE_INDEX).long()
        return nnf.cross_entropy(output, target, reduction="none", ignore_index=IGNORE_INDEX)

    def probabilities(self, output: Tensor) -> Tensor:
        """Return softmax probabilities, [B, C]."""
        return torch.softmax(output, dim=-1)

    def log_odds(self, output: Tensor) -> Tensor:
        """Return the log-odds of each class against all others, [B, C]."""
        log_p = torch.log_softmax(output, dim=-1)
        return log_p - torch.log((-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).eps))


@registered
@dataclass(frozen=True)
class Multilabel(YesNo):
    """Any of ``n_labels``. Output: logits [B, C]; labels float [B, C] of 0/1, NaN where missing.

    An example counts as observed if at least one of its labels is; its loss is the mean over those observed. ``labels`` may name
    them, in order.
    """

    n_labels: int = 2
    labels: tuple[str, ...] | None = None
    kind: ClassVar[str] = "multilabel"
    shown: ClassVar[Mapping[str, tuple[str, int]]] = {"AUC": ("auc", 1)}
    headline: ClassVar[str] = "AUC"

    def __post_init__(self) -> None:
        """Check the number of labels."""
        super().__post_init__()
        need_count(self.name, "n_labels", self.n_labels, 1)
        if self.labels is not None and len(self.labels) != self.n_labels:
            raise RecipeError(f"task {self.name!r}: {len(self.labels)} label names for n_labels={self.n_labels}")

    @property
    def out_features(self) -> int:
        """Number of labels."""
        return self.n_labels

    def observed(self, labels: Tensor) -> Tensor:
        """Return which examples have at least one label: bool [B]."""
        return with_nan(self.flat(labels)).isfinite().any(dim=-1)

    def flat(self, labels: Tensor) -> Tensor:
        """Return the labels as they are, [B, C].

        Raises
        ------
        DataError
            Labels of another shape.
        """
        if labels.dim() != 2:
            raise DataError(
                f"task {self.name!r}: multilabel labels must be [B, {self.n_labels}], found {list(labels.shape)}"
            )
        return labels

    def example_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the mean binary cross-entropy over the observed labels of each example, [B]."""
        losses, seen = F.example_cross_entropy(output, with_nan(self.flat(labels)))
        return losses.sum(-1) / seen.sum(-1).clamp(min=1)

    def probabilities(self, output: Tensor) -> Tensor:
        """Return the probability of each label, [B, C]."""
        return torch.sigmoid(output)


@registered
@dataclass(frozen=True)
class Regression(Ranged):
    """A number. Output [B] or [B, 1] and labels [B] in standardised units; ``mean`` and ``std`` give native units.

    Parameters
    ----------
    mean, std : float
        Of the target on the training part, so that metrics can be shown in native units.
    score_range : tuple of (float, float), optional
        (q10, q90) of a *reference model's* validation outputs, in standardised units. The audit score is the output
        squashed by it, ``clip((s - q10) / (q90 - q10 + 1e-6), 0, 1)``. Without a reference it is that of a standard
        normal, (-1.2816, 1.2816) (ours); :meth:`with_score_range` freezes the reference model's.
    """

    mean: float = 0.0
    std: float = 1.0
    score_range: tuple[float, float] | None = None
    kind: ClassVar[str] = "regression"
    has_rates: ClassVar[bool] = False
    shown: ClassVar[Mapping[str, tuple[str, int]]] = {"MAE": ("mae", 0), "R2": ("r2", 1)}
    headline: ClassVar[str] = "R2"
    higher_is_better: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the scale."""
        super().__post_init__()
        if not self.std > 0:
            raise RecipeError(f"task {self.name!r}: std must be above 0, found {self.std}")

    def probabilities(self, output: Tensor) -> Tensor:
        """Return the predicted value in standardised units, [B]."""
        return output.reshape(output.shape[0])

    value = log_odds = probabilities

    def example_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the squared error in standardised units, [B]."""
        labels, value = self.flat(labels), self.value(output)
        if labels.shape != value.shape:
            raise DataError(
                f"task {self.name!r}: {len(value)} outputs for labels of shape {tuple(labels.shape)}; expected [B]"
            )
        seen = self.observed(labels)
        return torch.where(seen, (value - torch.where(seen, labels, 0).to(value.dtype)) ** 2, 0.0)

    def raw_score(self, output: Tensor, labels: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Return the predicted value, [B]."""
        return self.value(output)

    def score(self, output: Tensor) -> Tensor:
        """Return the output squashed to [0, 1] by the reference range, [B]."""
        return self.squash(self.value(output))
