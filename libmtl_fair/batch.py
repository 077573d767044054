"""FairBatch: what a fairness method may see of one training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from libmtl_fair.errors import HostError
from libmtl_fair.tasks import Binary, Task


class Matrices(NamedTuple):
    """Binary tasks of one logit each as matrices [B, T], and how many labels each has, [T]."""

    logits: Tensor
    labels: Tensor
    labelled: Tensor

    def loss_gradient(self, probabilities: Tensor) -> Tensor:
        """Return the gradient of each task's mean cross-entropy to its logits, [B, T]; 0 where there is no label."""
        wrong = (probabilities - self.labels).nan_to_num_(0.0, 0.0, 0.0)
        return wrong.div_(self.labelled.clamp(min=1)).to(self.logits.dtype)


@dataclass
class FairBatch:
    """One step of training, before the gradient is taken. Everything is on the model's device.

    Attributes
    ----------
    tasks : task name -> task, in ``task_dict`` order; None where its kind is not known.
    h : what the heads received, [B, d], or task -> [B, d] where the tasks' representations differ.
    outputs : task -> head output after ``process_preds``.
    labels : task -> labels, NaN or -100 where missing; what an auxiliary task trains on is its own (``AuxiliaryLabels``).
    losses : [T], attached to the graph.
    groups : attribute -> int64 [B], -1 unknown. With one input per task: task -> attribute -> int64 [B].
    n_groups : attribute -> number of groups.
    epoch, step : 0-based; ``step`` counts over the whole training.
    standard_losses : whether every loss is its task's own ``Task.loss``, so that its gradient may be written out.
    matrices : where all tasks are binary ones of a single logit and ``outputs`` and ``labels`` are columns of matrices.
    """

    tasks: Mapping[str, Task | None]
    h: Tensor | dict[str, Tensor]
    outputs: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    losses: Tensor
    groups: Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]]
    n_groups: Mapping[str, int] = field(default_factory=dict)
    multi_input: bool = False
    epoch: int = 0
    step: int = 0
    standard_losses: bool = False
    matrices: Matrices | None = None

    def task(self, name: str) -> Task:
        """Return a task whose kind is known.

        Raises
        ------
        HostError : the kind of this task could not be told from its loss.
        """
        task = self.tasks[name]
        if task is None:
            raise HostError(
                f"task {name!r}: its kind is not known, so it has no audit score and no group rates. Build its "
                f"task_dict entry with lf.task_dict, or add 'task': lf.Binary({name!r}) (or Multiclass, ...) to it"
            )
        return task

    def task_groups(self, name: str) -> Mapping[str, Tensor]:
        """Return attribute -> group ids [B] for the examples of one task."""
        return self.groups[name] if self.multi_input else self.groups  # type: ignore[return-value]

    @cached_property
    def main(self) -> tuple[str, ...]:
        """Names of the tasks that are no auxiliary ones; scores, example losses and observed labels are theirs."""
        return tuple(name for name, task in self.tasks.items() if task is None or not task.auxiliary)

    @cached_property
    def observed(self) -> dict[str, Tensor]:
        """Task -> bool [B], True where it has a label."""
        return {name: self.task(name).observed(self.labels[name]) for name in self.main}

    @cached_property
    def example_losses(self) -> dict[str, Tensor]:
        """Task -> loss of each example [B], 0 where it has no label; attached to the graph."""
        return {name: self.task(name).example_losses(self.outputs[name], self.labels[name]) for name in self.main}

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """Task -> audit score of each example [B], attached to the graph."""
        return {name: self.task(name).score(self.outputs[name]) for name in self.main}

    @cached_property
    def main_matrices(self) -> Matrices | None:
        """:attr:`matrices` if their columns are the main tasks."""
        return self.matrices if self.matrices is not None and len(self.main) == self.matrices.logits.shape[1] else None

    def loss_gradient(self, losses: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return where the gradient of ``share`` times the sum of the losses starts, and the gradient there.

        That is at the logits, where the losses' derivative is written out; else at the losses themselves.
        """
        if self.main_matrices is None or not self.standard_losses or len(self.main) < len(self.tasks):
            return losses, torch.full_like(losses, share)
        grad = self.main_matrices.loss_gradient(self.score_matrix.detach().T)
        return self.main_matrices.logits, grad if share == 1 else grad.mul_(share)

    @property
    def row_scores(self) -> Tensor:
        """Values of :attr:`score_matrix` with a row an example, [B, T], contiguous, without graph."""
        if self.main_matrices is not None:
            return torch.sigmoid(self.main_matrices.logits.detach())
        return self.score_matrix.detach().T.contiguous()

    @cached_property
    def score_matrix(self) -> Tensor:
        """Audit scores of all main tasks, [T, B]; NaN past the end of a task that has fewer examples in this step."""
        if self.main_matrices is not None:
            return torch.sigmoid(self.main_matrices.logits).T
        logits = [self.outputs[name] for name in self.main]
        single = all(isinstance(self.tasks[t], Binary) for t in self.main) and all(z.shape[1:] == (1,) for z in logits)
        if single and len({z.shape[0] for z in logits}) == 1:
            return torch.sigmoid(torch.cat(logits, dim=1)).T
        rows = list(self.scores.values())
        longest = max(len(r) for r in rows)
        return torch.stack([torch.nn.functional.pad(r, (0, longest - len(r)), value=float("nan")) for r in rows])

    @cached_property
    def embedding(self) -> Tensor:
        """Representations as [B, d] where all tasks share one, else [T, B, d] of main tasks (zeros past a task's end)."""
        if isinstance(self.h, Tensor):
            return self.h.flatten(1)
        rows = [self.h[name].flatten(1) for name in self.main]
        longest = max(len(r) for r in rows)
        if len({r.shape[1] for r in rows}) > 1:
            widths = {name: self.h[name].flatten(1).shape[1] for name in self.main}
            raise HostError(
                f"the tasks' representations differ in width {widths}; distances between them need one width"
            )
        return torch.stack([torch.nn.functional.pad(r, (0, 0, 0, longest - len(r))) for r in rows])
