"""One training step: from batch to update. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from libmtl_fair.batch import FairBatch, Matrices
from libmtl_fair.errors import DataError
from libmtl_fair.libmtl import batches
from libmtl_fair.libmtl import evaluate as evaluation
from libmtl_fair.libmtl.history import StepLog

SAMPLES = {"MoDo": 3, "SDMGrad": 3}
"""Batches that one step of a LibMTL weighting takes, where it is more than one."""

Made = tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Any]


def draw(trainer: Any, loaders: Any) -> Iterator[Any]:
    """Yield what each step of an epoch needs: a batch, a batch a task, or several batches for MoDo and SDMGrad.

    The longest loader sets the number of steps; shorter ones start again.
    """
    samples = trainer._samples
    if not trainer.multi_input and samples == 1:
        yield from loaders
        return
    per_task = loaders if trainer.multi_input else {"": loaders}
    missing = [task for task in trainer.main_tasks if task not in per_task] if trainer.multi_input else []
    if missing:
        raise DataError(f"multi_input=True needs one loader a task; there is none for {missing[0]!r}")
    names = trainer.main_tasks if trainer.multi_input else [""]
    streams = {name: batches.endless(per_task[name]) for name in names}
    for _ in range(max(len(per_task[name]) for name in names)):
        drawn = [{name: next(stream) for name, stream in streams.items()} for _ in range(samples)]
        parts = drawn if trainer.multi_input else [d[""] for d in drawn]
        yield parts if samples > 1 else parts[0]


def step(trainer: Any, batch: Any, epoch: int, log: StepLog) -> None:
    """Train one step and note what happened in ``log``."""
    model, several = trainer.model, trainer._samples > 1
    made = [losses_of(trainer, part) for part in batch] if several else [losses_of(trainer, batch)]
    losses = torch.stack([m[0] for m in made]) if several else made[0][0]
    trainer.optimizer.zero_grad()  # after the forward pass, where LibMTL does it
    joint = getattr(model, "fair_joint", None)
    if joint is not None:
        joint.zero_grad()
    if trainer._is_fair:
        vars(model)["fair_batch"] = fair_batch(trainer, made[0], epoch)
    weights = model.backward(losses, **trainer._weight_args)
    if joint is not None:
        joint.collect_grad()
    trainer.optimizer.step()
    if hasattr(model, "update_w"):  # FAMO looks at the losses after the step
        renewed = losses_of(trainer, batch)[0].detach()
        with torch.no_grad():
            model.update_w(renewed)
    trainer.global_step += 1
    values: dict[str, Tensor] = {"loss": losses[-1] if several else losses}
    if weights is not None:
        values["weight"] = torch.as_tensor(weights)
    if trainer._is_fair:
        values.update(model.trace)
    preds = made[-1][1]
    log.add(values, [len(preds[task]) for task in trainer.task_name])
    if hasattr(model, "after_step"):
        model.after_step(trainer, trainer.global_step)


def losses_of(trainer: Any, part: Any) -> Made:
    """Return (losses [T], outputs, labels, groups) of one batch, or of one batch a task."""
    labels: dict[str, Any]
    if not trainer.multi_input:
        inputs, labels, groups = batches.split(part, trainer.device, trainer.main_tasks)
        preds = evaluation.forward(trainer, inputs, None, groups)
        flat = batches.flat_labels(labels, trainer.tasks) if trainer.auxiliary else labels
        for name in trainer.auxiliary:
            labels[name] = trainer.tasks[name].labels_from(flat, groups, trainer._n_groups)
        return trainer._compute_losses(preds, labels), preds, labels, groups
    preds, labels, by_task = {}, {}, {}
    inputs = {}
    for task in trainer.main_tasks:
        inputs[task], truth, by_task[task] = batches.split(part[task], trainer.device, [task])
        preds.update(evaluation.forward(trainer, inputs[task], task, by_task[task]))
        labels.update(truth)
    flat = batches.flat_labels(labels, trainer.tasks) if trainer.auxiliary else labels
    for name in trainer.auxiliary:  # on the examples of its main task
        ids = by_task[trainer.tasks[name].source]
        preds.update(evaluation.forward(trainer, inputs[trainer.tasks[name].source], name, ids))
        labels[name] = trainer.tasks[name].labels_from(flat, ids, trainer._n_groups)
    return trainer._compute_losses(preds, labels), preds, labels, by_task


def fair_batch(trainer: Any, made: Made, epoch: int, h: Tensor | None = None) -> FairBatch:
    """Return the step as a fairness method may see it; ``h`` where something else than the model made it."""
    losses, preds, labels, groups = made
    return FairBatch(
        tasks={name: trainer.tasks[name] for name in trainer.main_tasks} if trainer.auxiliary else trainer.tasks,
        h=trainer._hook.take() if h is None else h,
        outputs=preds,
        labels=batches.flat_labels(labels, trainer.tasks),
        losses=losses,
        groups=groups,
        n_groups=trainer._n_groups,
        multi_input=trainer.multi_input,
        epoch=epoch,
        step=trainer.global_step,
        standard_losses=trainer._own_losses and trainer.losses.standard,
        matrices=_matrices(trainer, preds),
    )


def _matrices(trainer: Any, preds: dict[str, Tensor]) -> Matrices | None:
    """Return the matrices that the losses were made from, if they were made from these outputs."""
    found: Matrices | None = trainer.losses.matrices if trainer._own_losses else None
    return found if found is not None and preds[trainer.task_name[0]]._base is found.logits else None
