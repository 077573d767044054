"""LibMTL's ``task_dict`` of our tasks: losses and metrics, and the losses of one step for all tasks at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.batch import joined
from libmtl_fair.errors import HostError, RecipeError
from libmtl_fair.functional.scores import SCORES
from libmtl_fair.libmtl.loading import AbsLoss, AbsMetric
from libmtl_fair.tasks import (
    Binary,
    BinarySequence,
    Depth,
    Multiclass,
    Normals,
    Regression,
    Segmentation,
    Task,
    decisions,
)

Entry: TypeAlias = "dict[str, Any]"
"""A task's entry of LibMTL's ``task_dict``: ``metrics``, ``metrics_fn``, ``loss_fn``, ``weight``, and our ``task``."""


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
        self.bs.append(self.task.count(gt))
        return loss

    def _average_loss(self) -> float:
        if not self.record:
            return float("nan")
        weights = torch.stack(self.bs).double()
        return float((torch.stack(self.record).double() * weights).sum() / weights.sum().clamp(min=1))


class TaskMetric(AbsMetric):  # type: ignore[misc]
    """LibMTL metric of a task over observed labels. Sums or collects on the device; numbers are made once, at the end."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.names, self.weights = list(task.shown), [better for _, better in task.shown.values()]
        self._scores = [score for score, _ in task.shown.values()]

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Collect one batch."""
        task, pred, gt, _ = decisions(self.task, pred.detach(), gt)
        if task.summed:
            found = task.statistics(pred, gt).double().sum(0)
            kept: list[Tensor] = self.record
            kept[:] = [kept[0] + found if kept else found]
            return
        self.record.append(task.probabilities(pred) if task.kind in SCORES else pred)
        self.bs.append(task.flat(gt))

    def score_fun(self) -> list[float]:
        """Return the metrics in the order of ``names``; NaN where the labels do not define one."""
        if not self.record or not self.names:
            return [float("nan")] * len(self.names)
        if self.task.summed:
            found = self.task.native(self.record[0])
            return [float(found[name]) for name in self._scores]
        values, labels = torch.cat(self.record), torch.cat(self.bs)
        kind = self.task.step.kind if isinstance(self.task, BinarySequence) else self.task.kind
        if kind not in SCORES:
            return [float(self.task.loss(values, labels))]
        native = (self.task.mean, self.task.std) if isinstance(self.task, Regression) else (0.0, 1.0)
        return list(F.task_scores(kind, values, labels, self._scores, native).values())


def entry(task: Task) -> Entry:
    """Return LibMTL's ``task_dict`` entry of a task."""
    metric = TaskMetric(task)
    return {
        "metrics": metric.names,
        "metrics_fn": metric,
        "loss_fn": TaskLoss(task),
        "weight": metric.weights,
        "task": task,
    }


def task_dict(tasks: Iterable[Task]) -> dict[str, Entry]:
    """Return LibMTL's ``task_dict`` for these tasks: masked losses and metrics, in the order given.

    Each entry also carries the task itself under ``"task"``, which LibMTL ignores and :class:`FairTrainer` reads.

    Raises
    ------
    RecipeError
        No task, or two of one name.

    Examples
    --------
    >>> list(task_dict([Binary("income"), Regression("hours")]))
    ['income', 'hours']
    """
    entries: dict[str, Entry] = {}
    for task in tasks:
        if not isinstance(task, Task):
            raise RecipeError(
                f"task_dict takes tasks such as lf.Binary('income'), found {type(task).__name__}: {task!r}"
            )
        if task.name in entries:
            raise RecipeError(f"two tasks are named {task.name!r}; names must differ")
        entries[task.name] = entry(task)
    if not entries:
        raise RecipeError("task_dict needs at least one task, for example lf.task_dict([lf.Binary('income')])")
    return entries


def tasks_of(task_dict: Mapping[str, Mapping[str, Any]]) -> dict[str, Task | None]:
    """Return the task behind each entry: the one it carries, or one inferred from a LibMTL loss; None if unknown."""
    return {name: values.get("task") or _infer(name, values) for name, values in task_dict.items()}


def _infer(name: str, values: Mapping[str, object]) -> Task | None:
    loss_fn = values["loss_fn"]
    kind, inner = type(loss_fn).__name__, getattr(loss_fn, "loss_fn", None)
    classes = getattr(values.get("metrics_fn"), "num_classes", None)
    if kind == "SegLoss" and isinstance(classes, int):  # those of LibMTL's nyu example
        return Segmentation(name, classes)
    if kind in _MAPS:
        return _MAPS[kind](name)
    if kind in ("MSELoss", "L1Loss"):
        return Regression(name)
    if kind == "CELoss" or isinstance(inner, torch.nn.CrossEntropyLoss):
        return Multiclass(name)
    return Binary(name) if isinstance(inner, torch.nn.BCEWithLogitsLoss) else None


_MAPS: Mapping[str, type[Task]] = {"DepthLoss": Depth, "NormalLoss": Normals}


class LossBank:
    """The losses of all tasks in one step, [T]: single-logit binary tasks and fairness heads in one call each, the rest one by one.

    ``standard`` says whether every loss is its task's own.
    """

    def __init__(self, task_dict: Mapping[str, Entry]) -> None:
        self._loss_fns = {name: values["loss_fn"] for name, values in task_dict.items()}
        ours = {name: fn.task for name, fn in self._loss_fns.items() if type(fn) is TaskLoss}
        self.standard = len(ours) == len(self._loss_fns)
        self._binary = tuple(name for name, task in ours.items() if isinstance(task, Binary))
        self._fair = {name: task for name, task in ours.items() if hasattr(task, "losses")}  # fairness heads
        self._rest = [name for name in self._loss_fns if name not in self._fair and name not in self._binary]
        ordered = [*self._binary, *self._rest, *self._fair]
        self._order = None if ordered == list(self._loss_fns) else [ordered.index(name) for name in self._loss_fns]

    def __call__(self, preds: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of every task, [T], in ``task_dict`` order."""
        logits = joined(preds, self._binary) if len(self._binary) > 1 else None
        target = None if logits is None else joined(labels, self._binary)
        if logits is not None and target is not None and logits.shape == target.shape:
            blocks = [F.mean_cross_entropy(logits, target)[0]]
        else:
            blocks = [self.one(name, preds[name], labels[name]).unsqueeze(0) for name in self._binary]
        blocks += [self.one(name, preds[name], labels[name]).unsqueeze(0) for name in self._rest]
        if self._fair:
            tasks: list[Any] = list(self._fair.values())
            try:
                blocks.append(tasks[0].losses(tasks, [preds[n] for n in self._fair], [labels[n] for n in self._fair]))
            except (RuntimeError, ValueError, IndexError):  # one by one it says which
                blocks += [self.one(name, preds[name], labels[name]).unsqueeze(0) for name in self._fair]
        losses = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        return losses if self._order is None else losses[self._order]

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
