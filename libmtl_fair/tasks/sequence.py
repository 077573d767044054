"""Tasks of one label a step of a sequence: yes or no, or classes; the hours of a stay, say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.tasks.base import Task, need_count, registered, with_nan
from libmtl_fair.tasks.dense import tally
from libmtl_fair.tasks.tabular import Binary, YesNo

NO_STEP = float("-inf")
"""Logit where a sequence has no step: its probability is missing, and it has no part in loss, score and metrics."""


class SequenceTask(Task):
    """A task with a label at every step. Outputs are minus infinity where there is no step (:func:`at_steps`).

    Labels are [B, L], NaN (or -100) where a step has none. An example's loss is the mean over its labelled steps, so that
    long sequences count as short ones.
    """

    single: ClassVar[bool] = False
    has_rates: ClassVar[bool] = False
    per_step: ClassVar[str] = "a logit a step, [B, L]"

    def flat(self, labels: Tensor) -> Tensor:
        """Return labels [B, L] for [B, L] or [B, L, 1].

        Raises
        ------
        DataError
            Labels of another shape.
        """
        labels = labels.squeeze(2) if labels.dim() == 3 and labels.shape[2] == 1 else labels
        if labels.dim() != 2:
            raise DataError(f"task {self.name!r}: labels of a sequence must be [B, L], found {list(labels.shape)}")
        return labels

    def truth(self, labels: Tensor) -> Tensor:
        """Return 0 and 1, or the classes, as floats [B, L], NaN where missing."""
        return with_nan(self.flat(labels))

    def logits(self, output: Tensor) -> Tensor:
        """Return the logits at every step, [B, L], or [B, L, C] of classes.

        Raises
        ------
        DataError
            An output of another shape.
        """
        shape = (self.out_features,) if self.out_features > 1 else ()
        output = output.squeeze(2) if not shape and output.dim() == 3 and output.shape[2] == 1 else output
        if output.dim() != 2 + len(shape) or output.shape[2:] != shape:
            raise DataError(f"task {self.name!r}: expected {self.per_step}, found {list(output.shape)}")
        return output

    def at_steps(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, 0 where there is no step, and where there is one, bool [B, L]."""
        logits = self.logits(output)
        there = (logits if logits.dim() == 2 else logits[..., 0]) != NO_STEP
        return logits.where(there if logits.dim() == 2 else there.unsqueeze(-1), 0.0), there

    def observed(self, labels: Tensor) -> Tensor:
        """Return which examples have a label at some step: bool [B]."""
        return with_nan(self.flat(labels)).isfinite().any(-1)

    def example_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over the labelled steps of each example, [B]."""
        losses, seen = self.step_losses(output, labels)
        return losses.sum(-1) / seen.sum(-1).clamp(min=1)

    def step_losses(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-entropy at every step, 0 where there is no label, and where there is one: [B, L] each."""
        (logits, there), truth = self.at_steps(output), self.truth(labels)
        if there.shape != truth.shape:
            raise DataError(
                f"task {self.name!r}: outputs {list(output.shape)} for labels {list(truth.shape)}; expected one label a step"
            )
        return self.cross_entropy(logits, truth.where(there, torch.nan))

    def cross_entropy(self, logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each step, 0 where ``truth`` is NaN, and where it is not."""
        raise NotImplementedError

    def chances(self, logits: Tensor) -> Tensor:
        """Return the probabilities of logits."""
        raise NotImplementedError

    def probabilities(self, output: Tensor) -> Tensor:
        """Return the probability at every step, [B, L] or of classes [B, L, C], NaN where there is none."""
        logits, there = self.at_steps(output)
        p = self.chances(logits)
        return p.masked_fill(~(there if p.dim() == 2 else there.unsqueeze(-1)), torch.nan)

    def log_odds(self, output: Tensor) -> Tensor:
        """Return the log-odds of the audit score, [B]."""
        p = self.score(output)
        eps = torch.finfo(p.dtype).eps
        return torch.logit(p, eps)

    def score(self, output: Tensor) -> Tensor:
        """Return the mean over the steps of each example of the probability, or of the highest of the classes', [B]."""
        logits, there = self.at_steps(output)
        p = self.chances(logits)
        p = (p if p.dim() == 2 else p.amax(-1)) * there
        return p.sum(-1) / there.sum(-1).clamp(min=1)


@registered
@dataclass(frozen=True)
class BinarySequence(YesNo, SequenceTask):
    """A yes or no at every step. Output: logits [B, L], minus infinity where there is no step (:func:`at_steps`).

    Labels are [B, L], NaN (or -100) where a step has none. An example's loss is the mean over its labelled steps, so that
    long sequences count as short ones; its audit score is the mean probability over its steps, labelled or not. Metrics and
    group metrics are those of all steps, each a decision about the example's group (their intervals take steps as independent, and are
    too narrow where a person's steps are alike); FBGrad compares groups step by step, FairMT
    (``form="phi"``; its constraints are of tasks with one decision a person) and fairness heads by the losses of their examples.

    >>> task = BinarySequence("decompensation")
    >>> logits = at_steps(torch.zeros(1, 3), torch.tensor([[True, True, False]]))
    >>> task.score(logits).item(), round(task.loss(logits, torch.tensor([[1.0, float("nan"), float("nan")]])).item(), 4)
    (0.5, 0.6931)
    """

    kind: ClassVar[str] = "binary_sequence"
    shown: ClassVar[Mapping[str, tuple[str, int]]] = {"AUC": ("auc", 1), "Acc": ("accuracy", 1)}
    headline: ClassVar[str] = "AUC"

    @property
    def step(self) -> Binary:
        """The task of one step."""
        return Binary(self.name)

    def cross_entropy(self, logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Return binary cross-entropy, and where there is a label."""
        return F.example_cross_entropy(logits, truth)

    def chances(self, logits: Tensor) -> Tensor:
        """Return the probability of yes."""
        return torch.sigmoid(logits)


@registered
@dataclass(frozen=True)
class MulticlassSequence(SequenceTask):
    """One of ``n_classes``, in an order, at every step. Output: logits [B, L, C], minus infinity where there is no step.

    Labels are [B, L]: classes, or with ``edges`` numbers, whose class is how many edges they reach; NaN (or -100) where a step has
    none. An example's loss is the mean cross-entropy over its labelled steps; its audit score the mean over its steps of the highest
    probability. Metrics are sums over all labelled steps, by group too: ``kappa``, Cohen's with linear weights, ``accuracy``, and ``mae``,
    from the label to the mean of the class that is most likely. Intervals by group draw examples anew. FairMT (``form="phi"``),
    FBGrad and fairness heads compare the losses of examples; flips and gaps of scores are refused, as of maps.

    Parameters
    ----------
    n_classes : int
        At least 2.
    edges : tuple of float, optional
        Ascending, one fewer than classes; where labels are numbers.
    means : tuple of float, optional
        What each class stands for, in the unit of the labels; without it classes stand for themselves.

    Raises
    ------
    RecipeError
        Edges or means that do not fit the classes.

    Examples
    --------
    >>> task = MulticlassSequence("days_left", 3, edges=(24, 48), means=(10, 35, 80))
    >>> labels = torch.tensor([[50.0, 30.0, 5.0, torch.nan]])
    >>> logits = 9.0 * torch.eye(3)[torch.tensor([[2, 2, 0, 1]])]
    >>> {name: round(float(v), 3) for name, v in task.native(task.statistics(logits, labels).sum(0)).items()}
    {'kappa': 0.667, 'accuracy': 0.667, 'mae': 28.333}
    """

    n_classes: int = 2
    edges: tuple[float, ...] = ()
    means: tuple[float, ...] = ()
    kind: ClassVar[str] = "multiclass_sequence"
    shown: ClassVar[Mapping[str, tuple[str, int]]] = {
        "kappa": ("kappa", 1),
        "accuracy": ("accuracy", 1),
        "mae": ("mae", 0),
    }
    headline: ClassVar[str] = "kappa"
    summed: ClassVar[bool] = True
    per_step: ClassVar[str] = "a logit a class and step, [B, L, C]"

    def __post_init__(self) -> None:
        """Check classes, edges and means."""
        super().__post_init__()
        need_count(self.name, "n_classes", self.n_classes, 2)
        if self.edges and (
            len(self.edges) != self.n_classes - 1 or any(a >= b for a, b in zip(self.edges, self.edges[1:]))
        ):
            raise RecipeError(
                f"task {self.name!r}: edges must be {self.n_classes - 1} ascending numbers for {self.n_classes} classes, found {self.edges}"
            )
        if self.means and len(self.means) != self.n_classes:
            raise RecipeError(f"task {self.name!r}: {len(self.means)} means for n_classes={self.n_classes}")

    @property
    def out_features(self) -> int:
        """Number of classes."""
        return self.n_classes

    @property
    def labels_are(self) -> str:
        """What labels of this kind are, for messages."""
        return (
            "finite numbers, NaN where missing"
            if self.edges
            else f"whole numbers 0 to {self.n_classes - 1}, -100 or NaN where missing"
        )

    def wrong(self, labels: Tensor) -> Tensor:
        """Return which values are no labels of this kind, bool like ``labels``."""
        values = with_nan(labels)
        if self.edges:
            return values.isinf()
        return (values < 0) | (values >= self.n_classes) | ((values != values.floor()) & ~values.isnan())

    def flat(self, labels: Tensor) -> Tensor:
        """Return labels [B, L] for [B, L] or [B, L, 1]; shares of labelled steps [B] as they are."""
        return labels if labels.dim() == 1 else super().flat(labels)

    def truth(self, labels: Tensor) -> Tensor:
        """Return the class at every step as floats [B, L], NaN where missing."""
        values = with_nan(self.flat(labels))
        if not self.edges:
            return values
        classes = torch.stack([values >= edge for edge in self.edges]).sum(0).to(values.dtype)
        return classes.where(values.isfinite(), torch.nan)

    def observed(self, labels: Tensor) -> Tensor:
        """Return which examples have a label: bool [B]; of shares of labelled steps [B], as predictions keep them, too."""
        return labels > 0 if labels.dim() == 1 else super().observed(labels)

    def coverage(self, labels: Tensor) -> Tensor:
        """Return each example's share of steps that have a label, [B]."""
        return labels if labels.dim() == 1 else with_nan(self.flat(labels)).isfinite().float().mean(1)

    def cross_entropy(self, logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each step, and where there is a label."""
        seen = truth.isfinite()
        target = truth.where(seen, 0).long()
        losses = nnf.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        return losses.where(seen, 0.0), seen

    def chances(self, logits: Tensor) -> Tensor:
        """Return softmax probabilities."""
        return torch.softmax(logits, -1)

    def statistics(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return each example's confusion counts, rows the labels', and sum of absolute errors, [B, C * C + 1]; statistics as they are."""
        if output.dim() == 2:
            return output
        (logits, there), truth, c = self.at_steps(output), self.truth(labels), self.n_classes
        seen, chosen = truth.isfinite() & there, logits.argmax(-1)
        counts = tally(torch.where(seen, truth.where(seen, 0).long() * c + chosen, c * c), c * c)
        means = logits.new_tensor(self.means or range(c))
        given = with_nan(self.flat(labels)).to(logits.dtype)
        errors = torch.where(seen, (given - means[chosen]).abs(), 0.0)
        if self.means and not self.edges:
            errors = torch.where(seen, (means[truth.where(seen, 0).long()] - means[chosen]).abs(), 0.0)
        return torch.cat([counts, errors.sum(1, keepdim=True)], 1)

    def native(self, statistics: Tensor) -> dict[str, Tensor]:
        """Return metric -> value [...] of summed statistics [..., C * C + 1]; NaN where nothing was seen, kappa where all is one class."""
        c = self.n_classes
        table = statistics[..., : c * c].reshape(*statistics.shape[:-1], c, c)
        total, steps = table.sum((-2, -1)), torch.arange(c, dtype=statistics.dtype, device=statistics.device)
        apart = (steps[:, None] - steps).abs()
        chance = table.sum(-1).unsqueeze(-1) * table.sum(-2).unsqueeze(-2) / total[..., None, None]
        kappa = 1 - (apart * table).sum((-2, -1)) / (apart * chance).sum((-2, -1))
        return {
            "kappa": kappa.where(kappa.isfinite(), torch.nan),
            "accuracy": table.diagonal(dim1=-2, dim2=-1).sum(-1) / total,
            "mae": statistics[..., -1] / total,
        }


def at_steps(logits: Tensor, steps: Tensor) -> Tensor:
    """Return logits [B, L] or [B, L, C] with minus infinity where there is no step (``steps`` bool [B, L]); no gradient goes there."""
    return logits.where(steps if logits.dim() == 2 else steps.unsqueeze(-1), NO_STEP)


def decisions(task: Task, output: Tensor, labels: Tensor) -> tuple[Task, Tensor, Tensor, int]:
    """Return the task of one decision, its outputs and labels, and how many decisions an example has.

    All but sequences of a yes or no are their own decisions, 1 an example. Of a sequence each of L steps is one: [B * L], where a step
    that is none has no label.
    """
    if not isinstance(task, BinarySequence):
        return task, output, labels, 1
    logits, truth = task.logits(output), with_nan(task.flat(labels))
    return task.step, logits.reshape(-1), truth.masked_fill(logits == NO_STEP, torch.nan).reshape(-1), logits.shape[1]
