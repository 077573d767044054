"""Tasks of one label a step of a sequence: the hours of a stay, say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError
from libmtl_fair.tasks.base import Task, registered, with_nan
from libmtl_fair.tasks.tabular import Binary, YesNo

NO_STEP = float("-inf")
"""Logit where a sequence has no step: its probability is missing, and it has no part in loss, score and metrics."""


@registered
@dataclass(frozen=True)
class BinarySequence(YesNo):
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
    single: ClassVar[bool] = False
    has_rates: ClassVar[bool] = False

    @property
    def step(self) -> Binary:
        """The task of one step."""
        return Binary(self.name)

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

    def logits(self, output: Tensor) -> Tensor:
        """Return the log-odds at every step, [B, L], for [B, L] or [B, L, 1].

        Raises
        ------
        DataError
            An output of another shape.
        """
        output = output.squeeze(2) if output.dim() == 3 and output.shape[2] == 1 else output
        if output.dim() != 2:
            raise DataError(f"task {self.name!r}: expected a logit a step, [B, L], found {list(output.shape)}")
        return output

    def observed(self, labels: Tensor) -> Tensor:
        """Return which examples have a label at some step: bool [B]."""
        return with_nan(self.flat(labels)).isfinite().any(-1)

    def example_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the mean binary cross-entropy over the labelled steps of each example, [B]."""
        losses, seen = self.step_losses(output, labels)
        return losses.sum(-1) / seen.sum(-1).clamp(min=1)

    def step_losses(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return binary cross-entropy at every step, 0 where there is no label, and where there is one: [B, L] each."""
        logits, truth = self.logits(output), with_nan(self.flat(labels))
        if logits.shape != truth.shape:
            raise DataError(
                f"task {self.name!r}: outputs {list(logits.shape)} for labels {list(truth.shape)}; expected one label a step"
            )
        there = logits != NO_STEP
        return F.example_cross_entropy(logits.where(there, 0.0), truth.where(there, torch.nan))

    def probabilities(self, output: Tensor) -> Tensor:
        """Return the probability at every step, [B, L], NaN where there is none."""
        logits = self.logits(output)
        there = logits != NO_STEP
        return torch.sigmoid(logits.where(there, 0.0)).masked_fill(~there, torch.nan)

    def log_odds(self, output: Tensor) -> Tensor:
        """Return the log-odds of the audit score, [B]."""
        p = self.score(output)
        eps = torch.finfo(p.dtype).eps
        return torch.logit(p, eps)

    def score(self, output: Tensor) -> Tensor:
        """Return the mean probability over the steps of each example, [B] (METHODS.md, section 0)."""
        logits = self.logits(output)
        there = logits != NO_STEP
        p = torch.sigmoid(logits.where(there, 0.0)) * there
        return p.sum(-1) / there.sum(-1).clamp(min=1)


def at_steps(logits: Tensor, steps: Tensor) -> Tensor:
    """Return logits [B, L] with minus infinity where there is no step (``steps`` bool [B, L]); no gradient goes there."""
    return logits.where(steps, NO_STEP)


def decisions(task: Task, output: Tensor, labels: Tensor) -> tuple[Task, Tensor, Tensor, int]:
    """Return the task of one decision, its outputs and labels, and how many decisions an example has.

    All but sequences are their own decisions, 1 an example. Of a sequence each of L steps is one: [B * L], where a step that is
    none has no label.
    """
    if not isinstance(task, BinarySequence):
        return task, output, labels, 1
    logits, truth = task.logits(output), with_nan(task.flat(labels))
    return task.step, logits.reshape(-1), truth.masked_fill(logits == NO_STEP, torch.nan).reshape(-1), logits.shape[1]
