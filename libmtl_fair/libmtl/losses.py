"""LibMTL's losses and metrics for our tasks, and the losses of one step for all tasks at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.batch import Matrices
from libmtl_fair.errors import HostError
from libmtl_fair.libmtl.columns import joint_columns
from libmtl_fair.libmtl.loading import AbsLoss, AbsMetric
from libmtl_fair.tasks import Binary, Multiclass, Regression, Task


class TaskLoss(AbsLoss):  # type: ignore[misc]
    """LibMTL loss of a task: the mean over observed labels. Keeps its running mean on the device."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean loss over observed labels (scalar)."""
        return self.task.loss(pred, gt)

    def _update_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        loss = self.compute_loss(pred, gt)
        self.record.append(loss.detach())
        self.bs.append(self.task.observed(gt).sum())
        return loss

    def _average_loss(self) -> float:
        if not self.record:
            return float("nan")
        weights = torch.stack(self.bs).double()
        return float((torch.stack(self.record).double() * weights).sum() / weights.sum().clamp(min=1))


class TaskMetric(AbsMetric):  # type: ignore[misc]
    """LibMTL metric of a task over observed labels. Collects on the device; numbers are made once, at the end."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        shown = _SHOWN[task.kind]
        self.names, self.weights = list(shown), [better for _, better in shown.values()]
        self._scores = [score for score, _ in shown.values()]

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Collect one batch."""
        self.record.append(self.task.probabilities(pred.detach()))
        self.bs.append(self.task.flat(gt))

    def score_fun(self) -> list[float]:
        """Return the metrics in the order of ``names``; NaN where the labels do not define one."""
        if not self.record or not self.names:
            return [float("nan")] * len(self.names)
        values, labels = torch.cat(self.record), torch.cat(self.bs)
        native = (self.task.mean, self.task.std) if isinstance(self.task, Regression) else (0.0, 1.0)
        return list(F.task_scores(self.task.kind, values, labels, self._scores, native).values())


_SHOWN: Mapping[str, Mapping[str, tuple[str, int]]] = {
    "binary": {"AUC": ("auc", 1), "Acc": ("accuracy", 1)},
    "multiclass": {"Acc": ("accuracy", 1)},
    "multilabel": {"AUC": ("auc", 1)},
    "regression": {"MAE": ("mae", 0), "R2": ("r2", 1)},
    "auxiliary": {},
}
"""Kind of task -> metric as LibMTL shows it -> name of the score, and 1 where higher is better."""


def entry(task: Task) -> dict[str, Any]:
    """Return LibMTL's ``task_dict`` entry of a task."""
    metric = TaskMetric(task)
    return {
        "metrics": list(metric.names),
        "metrics_fn": metric,
        "loss_fn": TaskLoss(task),
        "weight": list(metric.weights),
        "task": task,
    }


def tasks_of(task_dict: Mapping[str, Mapping[str, Any]]) -> dict[str, Task | None]:
    """Return the task behind each entry: the one it carries, or one inferred from a LibMTL loss; None if unknown."""
    return {name: values.get("task") or _infer(name, values["loss_fn"]) for name, values in task_dict.items()}


def _infer(name: str, loss_fn: Any) -> Task | None:
    kind = type(loss_fn).__name__
    if kind in ("MSELoss", "L1Loss"):
        return Regression(name)
    inner = getattr(loss_fn, "loss_fn", None)
    if kind == "CELoss" or isinstance(inner, torch.nn.CrossEntropyLoss):
        return Multiclass(name)
    if isinstance(inner, torch.nn.BCEWithLogitsLoss):
        return Binary(name)
    return None


class LossBank:
    """The losses of all tasks in one step, [T]: single-logit binary tasks in one call, the rest one by one.

    Attributes
    ----------
    matrices : those of the last call, where all tasks are such ones and columns of one matrix.
    standard : whether every loss is its task's own.
    """

    matrices: Matrices | None = None

    def __init__(self, task_dict: Mapping[str, Mapping[str, Any]]) -> None:
        self._loss_fns = {name: values["loss_fn"] for name, values in task_dict.items()}
        self._binary = [
            name for name, fn in self._loss_fns.items() if type(fn) is TaskLoss and isinstance(fn.task, Binary)
        ]
        self._together = len(self._binary) > 1
        ordered = [*self._binary, *(name for name in self._loss_fns if name not in self._binary)]
        position = {name: i for i, name in enumerate(ordered)}
        self._order = [position[name] for name in self._loss_fns]
        self._in_order = self._order == sorted(self._order)
        self.standard = all(type(fn) is TaskLoss for fn in self._loss_fns.values())

    def __call__(self, preds: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of every task, [T], in ``task_dict`` order."""
        self.matrices = None
        if not self._together:
            return self._each(preds, labels)
        outputs, truth = [preds[n] for n in self._binary], [labels[n] for n in self._binary]
        logits, target = joint_columns(outputs), joint_columns(truth)
        if logits is None or target is None or logits.shape != target.shape or not target.is_floating_point():
            if not _stackable(outputs, truth):
                return self._each(preds, labels)
            if logits is None:
                logits = torch.cat([p if p.dim() == 2 else p[:, None] for p in outputs], 1)
            joint, _ = _binary_losses(logits, torch.stack(truth, 1) if target is None else target)
        else:
            joint, labelled = _binary_losses(logits, target)
            if len(self._binary) == len(self._loss_fns):
                self.matrices = Matrices(logits, target, labelled)
        rest = [self.one(n, preds[n], labels[n]) for n in self._loss_fns if n not in self._binary]
        losses = torch.cat([joint, torch.stack(rest)]) if rest else joint
        return losses if self._in_order else losses[self._order]

    def _each(self, preds: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.one(name, preds[name], labels[name]) for name in self._loss_fns])

    def one(self, name: str, pred: Tensor, label: Tensor) -> Tensor:
        """Return the loss of one task (scalar)."""
        try:
            loss = self._loss_fns[name].compute_loss(pred, label)
        except (RuntimeError, ValueError, IndexError) as error:
            target = f"{tuple(label.shape)} {label.dtype}" if isinstance(label, Tensor) else type(label).__name__
            shapes = f"output {tuple(pred.shape)} {pred.dtype}, labels {target}"
            raise HostError(f"task {name!r}: its loss cannot take these tensors ({shapes}): {error}") from error
        loss = torch.as_tensor(loss)
        if loss.numel() != 1:
            raise HostError(f"task {name!r}: its loss must be one number, found shape {tuple(loss.shape)}")
        return loss.reshape(())


def _stackable(preds: Sequence[Tensor], labels: Sequence[Tensor]) -> bool:
    rows = preds[0].shape[:1]
    return all(
        p.shape[1:] in ((), (1,)) and y.is_floating_point() and p.shape[:1] == rows == y.shape
        for p, y in zip(preds, labels)
    )


def _binary_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean binary cross-entropy over observed labels for each column, [T], and how many there are, [T]."""
    target = target.to(torch.promote_types(logits.dtype, torch.float32))
    # 1 where finite, else 0: as a float, which multiplies and sums twice as fast as a bool
    seen = (target - target).eq_(0)
    labelled = seen.sum(0)
    losses = nnf.binary_cross_entropy_with_logits(logits, target.nan_to_num(0.0).to(logits.dtype), reduction="none")
    return (losses * seen).sum(0) / labelled.clamp(min=1), labelled
