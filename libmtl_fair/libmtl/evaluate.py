"""Running a model over a loader without training it: metrics, losses, predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from libmtl_fair.errors import DataError, HostError
from libmtl_fair.libmtl.batches import batches, group_names
from libmtl_fair.libmtl.model import RepresentationHook
from libmtl_fair.predictions import Predictions

Results = dict[str, dict[str, float]]


def forward(
    trainer: Any, inputs: Any, task: str | None = None, groups: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return outputs of all tasks, or of one that has inputs of its own, through the user's ``process_preds``.

    Outputs of auxiliary tasks are raw, and there in training only. ``groups`` go to heads that take them.
    """
    for module in trainer.group_modules:
        module.take_groups(groups)
    if task is None:
        found = _run(trainer, inputs)
        extra = {name: found.pop(name) for name in trainer.auxiliary if name in found}
        preds: dict[str, Tensor] = trainer.process_preds(found)
        return {**preds, **extra} if trainer.model.training else preds
    one = _run(trainer, inputs, task)[task]
    return {task: one if task in trainer.auxiliary else trainer.process_preds(one, task)}


def _run(trainer: Any, *inputs: Any) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = trainer.model(*inputs)
        return found
    except RuntimeError as error:
        if not str(error).startswith("mat1 and mat2"):
            raise
        x = inputs[0]
        given = f"inputs of shape {list(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else "these inputs"
        raise HostError(
            f"the model cannot take {given}: {error}. Check the encoder's width and the loader's x"
        ) from error


def _passes(trainer: Any, loader: Any) -> list[tuple[Any, list[str], str | None]]:
    """Return (loader, its tasks, the task to name) for one loader, or one a task."""
    if not trainer.multi_input:
        return [(loader, trainer.main_tasks, None)]
    missing = [task for task in trainer.main_tasks if task not in loader]
    if missing:
        raise DataError(f"multi_input=True needs one loader a task; there is none for {missing[0]!r}")
    return [(loader[task], [task], task) for task in trainer.main_tasks]


@torch.no_grad()
def evaluate(trainer: Any, loader: Any) -> Results:
    """Return task -> metric -> value over the loader; ``loss`` is the mean over observed labels."""
    trainer.model.eval()
    totals = {
        task: [torch.zeros((), dtype=torch.float64, device=trainer.device) for _ in range(2)]
        for task in trainer.main_tasks
    }
    for task in trainer.main_tasks:
        trainer.task_dict[task]["metrics_fn"].reinit()
    for part, tasks, named in _passes(trainer, loader):
        for inputs, labels, groups in batches(part, trainer.device, tasks):
            preds = forward(trainer, inputs, named, groups)
            for task in tasks:
                kind = trainer.tasks[task]
                count = kind.observed(labels[task]).sum() if kind else torch.tensor(len(preds[task]))
                totals[task][0] += trainer.losses.one(task, preds[task], labels[task]) * count
                totals[task][1] += count
                trainer.task_dict[task]["metrics_fn"].update_fun(preds[task], labels[task])
    return {task: _scores(trainer.task_dict[task], totals[task]) for task in trainer.main_tasks}


def _scores(entry: dict[str, Any], total: list[Tensor]) -> dict[str, float]:
    scores = entry["metrics_fn"].score_fun()
    entry["metrics_fn"].reinit()
    entry["loss_fn"]._reinit()
    mean = float(total[0] / total[1].clamp(min=1)) if total[1] > 0 else float("nan")
    return {"loss": mean, **{name: float(score) for name, score in zip(entry["metrics"], scores)}}


@torch.no_grad()
def predict(trainer: Any, loader: Any, embeddings: bool = False) -> Predictions:
    """Return what the model says about every example of the loader, on the CPU.

    Raises
    ------
    HostError : a task whose kind is not known.
    """
    unknown_kind = [name for name, task in trainer.tasks.items() if task is None]
    if unknown_kind:
        raise HostError(
            f"task {unknown_kind[0]!r} has no known kind, so its outputs have no score: build task_dict with lf.task_dict"
        )
    trainer.model.eval()
    outputs: dict[str, list[Tensor]] = {task: [] for task in trainer.main_tasks}
    labels: dict[str, list[Tensor]] = {task: [] for task in trainer.main_tasks}
    groups: dict[str, list[Tensor]] = {}
    h: dict[str, list[Tensor]] = {}
    hook = RepresentationHook(trainer.model) if embeddings else None
    try:
        for part, tasks, named in _passes(trainer, loader):
            for inputs, truth, ids in batches(part, trainer.device, tasks):
                preds = forward(trainer, inputs, named, ids)
                for task in tasks:
                    outputs[task].append(preds[task])
                    labels[task].append(truth[task])
                for name, values in ids.items():
                    groups.setdefault(name, []).append(values)
                if hook is not None:
                    _keep(h, hook.take(), named)
    finally:
        if hook is not None:
            hook.remove()
    return _gather(trainer, loader, outputs, labels, groups, h)


def _keep(h: dict[str, list[Tensor]], seen: Tensor | dict[str, Tensor], named: str | None) -> None:
    parts = {named or "": seen} if isinstance(seen, Tensor) else seen
    for name, value in parts.items():
        h.setdefault(name, []).append(value.detach().flatten(1))


def _gather(trainer: Any, loader: Any, outputs: Any, labels: Any, groups: Any, h: Any) -> Predictions:
    empty = [task for task, parts in outputs.items() if not parts]
    if empty:
        raise DataError(f"the loader has no batch for task {empty[0]!r}; nothing to predict")
    joined = {task: torch.cat(parts) for task, parts in outputs.items()}
    first = loader if not trainer.multi_input else next(iter(loader.values()))
    vectors = {name: torch.cat(parts).cpu() for name, parts in h.items() if name not in trainer.auxiliary}
    main = {name: trainer.tasks[name] for name in trainer.main_tasks}
    return Predictions(
        tasks=tuple(main.values()),
        scores={name: task.score(joined[name]).cpu() for name, task in main.items()},
        outputs={name: value.cpu() for name, value in joined.items()},
        labels={task: trainer.tasks[task].flat(torch.cat(parts)).cpu() for task, parts in labels.items()},
        groups={} if trainer.multi_input else {name: torch.cat(parts).cpu() for name, parts in groups.items()},
        group_names=group_names(first),
        embeddings=vectors.get("", vectors) if vectors else None,
    )


def improvement(results: Results, first: Results, weights: dict[str, list[int]]) -> float:
    """Return LibMTL's selection score: the mean relative improvement of all metrics over the first epoch.

    Metrics that are not finite in either are left out; with none left it is minus infinity.
    """
    gains = []
    for task, scores in results.items():
        names = [n for n in scores if n != "loss"]
        for name, weight in zip(names, weights[task]):
            new, base = scores[name], first[task][name]
            gain = (new - base) / max(abs(base), 1e-8) * (1 if weight else -1)
            if gain == gain and abs(gain) != float("inf"):
                gains.append(gain)
    return sum(gains) / len(gains) if gains else float("-inf")
