"""What one batch adds to FairMT's running sums, and the way back from the sums to the heads' outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from libmtl_fair.batch import Matrices
from libmtl_fair.methods.fairmt.rates import Lift
from libmtl_fair.tasks import Multiclass, Multilabel, Regression, Task


class Block(ABC):
    """The summed values of tasks that share a batch.

    Attributes
    ----------
    summed : [B, 2M], M values (0 where not seen; columns are positives, negatives, errors), then M of 0 and 1: what is seen.
    """

    summed: Tensor

    @abstractmethod
    def pull_back(self, gradient: Tensor) -> list[Tensor]:
        """Return the gradient to each output from that to the M values, [B, M]."""


class BinaryBlock(Block):
    """Binary tasks of one logit each, as one matrix; the gradient is written out."""

    def __init__(self, matrices: Matrices, sharpness: float) -> None:
        self.matrices, self.sharpness, self.labelled = matrices, sharpness, matrices.labelled
        logits = matrices.logits.detach()
        p = self.p = torch.sigmoid(logits if sharpness == 1 else logits * sharpness)
        self.positive, self.negative = (torch.eq(matrices.labels, y, out=torch.empty_like(p)) for y in (1, 0))
        missed = torch.addcmul(self.positive, p, self.positive, value=-1)  # (1 - p) where positive
        self.summed = torch.cat([missed, p * self.negative, self.positive, self.negative], 1)

    def pull_back(self, gradient: Tensor) -> list[Tensor]:
        """Return the gradient to the logits, one matrix [B, T]."""
        k = self.p.shape[1]
        signed = torch.addcmul(gradient[:, k:] * self.negative, gradient[:, :k], self.positive, value=-1)
        found = torch.ops.aten.sigmoid_backward(signed, self.p)
        return [found if self.sharpness == 1 else found * self.sharpness]

    def loss_gradient(self) -> Tensor:
        """Return the gradient of each task's mean cross-entropy to the logits, [B, T]."""
        p = self.p if self.sharpness == 1 else torch.sigmoid(self.matrices.logits.detach())
        return self.matrices.loss_gradient(p)


class MixedBlock(Block):
    """Tasks of any kind; autograd goes from the probabilities to the outputs, and no further."""

    def __init__(
        self, tasks: Sequence[Task], outputs: Sequence[Tensor], labels: Sequence[Tensor], lift: Lift, dtype: torch.dtype
    ) -> None:
        self._leaves = [output.detach().requires_grad_() for output in outputs]
        with torch.enable_grad():
            bad, seen = _columns(tasks, self._leaves, labels, lift)
            self._values = torch.cat(bad, 1).to(dtype)
        self.summed = torch.cat([self._values.detach(), *(part.to(dtype) for part in seen)], 1)

    def pull_back(self, gradient: Tensor) -> list[Tensor]:
        """Return the gradient to each task's output."""
        found = torch.autograd.grad(self._values, self._leaves, gradient, allow_unused=True)
        return [
            torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(self._leaves, found, strict=True)
        ]


def _columns(
    tasks: Sequence[Task], outputs: Sequence[Tensor], labels: Sequence[Tensor], lift: Lift
) -> tuple[list[Tensor], list[Tensor]]:
    rates = [i for i, task in enumerate(tasks) if not isinstance(task, Regression)]
    errors = [i for i, task in enumerate(tasks) if isinstance(task, Regression)]
    bad: list[Tensor] = []
    seen: list[Tensor] = []
    if rates:
        p = torch.cat([_probabilities(tasks[i], outputs[i]) for i in rates], 1)
        if lift.sharpness != 1:
            p = torch.sigmoid(lift.sharpness * torch.logit(p, eps=1e-6))
        y = torch.cat([_targets(tasks[i], labels[i]) for i in rates], 1)
        positive, negative = (y == 1).to(p.dtype), (y == 0).to(p.dtype)
        bad += [(1 - p) * positive, p * negative]
        seen += [positive, negative]
    for i in errors:
        values, mask = _errors(tasks[i], outputs[i], labels[i], lift)
        bad.append(values)
        seen.append(mask)
    return bad, seen


def _probabilities(task: Task, output: Tensor) -> Tensor:
    p = task.probabilities(output)
    return p.unsqueeze(1) if p.dim() == 1 else p


def _targets(task: Task, labels: Tensor) -> Tensor:
    """Labels as 0/1 columns [B, C]; anything else is missing."""
    if isinstance(task, Multiclass):
        seen = task.observed(labels).unsqueeze(1)
        classes = torch.arange(task.n_classes, device=labels.device)
        return (labels.unsqueeze(1) == classes).float().masked_fill(~seen, torch.nan)
    return labels if isinstance(task, Multilabel) else labels.unsqueeze(1)


def _errors(task: Task, output: Tensor, labels: Tensor, lift: Lift) -> tuple[Tensor, Tensor]:
    assert isinstance(task, Regression)
    seen = task.observed(labels)
    f = torch.where(seen, task.value(output), 0.0)
    y = torch.where(seen, labels, 0.0).to(f.dtype)
    mask = seen.to(f.dtype).unsqueeze(1)
    wrong = f - y
    if lift.error == "ccc":
        return torch.stack([f, y, f * f, y * y, wrong.square()], 1), mask.expand(-1, 5)
    size = (wrong.abs() if lift.error == "absolute" else wrong.square()).unsqueeze(1)
    return (torch.cat([size, size.detach().square()], 1), mask.expand(-1, 2)) if lift.moments > 1 else (size, mask)
