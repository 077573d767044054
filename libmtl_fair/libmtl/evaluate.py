"""Running a model over a loader without training it: metrics, losses, predictions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.batch import Columns, beside
from libmtl_fair.data.blocks import BlockLoader
from libmtl_fair.data.cache import Overflow
from libmtl_fair.errors import DataError, HostError
from libmtl_fair.libmtl import batches
from libmtl_fair.libmtl.state import FeatureHook, Loader, Loaders, RepresentationHook, Results, TrainingState
from libmtl_fair.predictions import Predictions, scores_of
from libmtl_fair.tasks import BinarySequence, Task, with_nan

if TYPE_CHECKING:
    import pandas as pd


def forward(
    trainer: TrainingState, inputs: object, task: str | None = None, groups: Mapping[str, Tensor] | None = None
) -> Mapping[str, Tensor]:
    """Return outputs of all tasks, or of one that has inputs of its own, through the user's ``process_preds``.

    Outputs of auxiliary tasks are raw, and there in training only. ``groups`` go to heads that take them.
    """
    for module in trainer.group_modules:
        module.take_groups(groups)
    if task is not None:
        one = _run(trainer, inputs, task)[task]
        return {task: one if task in trainer.auxiliary else trainer.process_preds(one, task)}
    found = _run(trainer, inputs)
    training = trainer.model.training
    if not trainer.own_outputs and (training or not trainer.auxiliary):
        return found
    main = {name: found[name] for name in trainer.main_tasks}
    processed: Mapping[str, Tensor] = trainer.process_preds(dict(main))
    if not isinstance(processed, Mapping):
        raise HostError(f"process_preds must return a dict task -> output, found {type(processed).__name__}")
    extra = {name: found[name] for name in trainer.auxiliary if training}
    if isinstance(found, Columns) and all(processed.get(name) is output for name, output in main.items()):
        return found
    return beside(processed, extra) if extra else processed


def _run(trainer: TrainingState, *inputs: object) -> Mapping[str, Tensor]:
    try:
        found: Mapping[str, Tensor] = trainer.model(*inputs)
        return found
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise HostError(
            "the model's batch norm cannot train on a batch of 1 example (or, where its maps are of one place, of one a process): leave "
            "it out (drop_last=True), or take a batch_size that leaves no single row at the end"
        ) from error
    except RuntimeError as error:
        if not str(error).startswith("mat1 and mat2"):
            raise
        x = inputs[0]
        given = f"inputs of shape {list(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else "these inputs"
        raise HostError(
            f"the model cannot take {given}: {error}. Check the encoder's width and the loader's x"
        ) from error


class _Seen(NamedTuple):
    """What evaluation saw of a batch."""

    outputs: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    groups: Mapping[str, Tensor]
    h: Mapping[str, Tensor]
    raw: Mapping[str, Tensor]

    def to(self, device: torch.device | str) -> _Seen:
        """Return it on a device."""
        return _Seen(*({name: value.to(device) for name, value in part.items()} for part in self))


class _Watched(NamedTuple):
    """What else than outputs is wanted: representations, feature maps, and whether outputs of maps are kept as they are."""

    h: RepresentationHook | None
    features: FeatureHook
    maps: bool

    def remove(self) -> None:
        """Take the hooks off."""
        self.features.remove()
        if self.h is not None:
            self.h.remove()


def _run_over(
    trainer: TrainingState, loaders: Loaders, hook: _Watched | None = None
) -> Iterator[tuple[list[str], _Seen]]:
    """Yield (tasks, what was seen of them) of every batch, in evaluation mode; of all processes' shares, batch by batch."""
    trainer.model.eval()
    for name, loader in batches.per_task(trainer, loaders).items():
        found, tasks = _run_here(trainer, name, loader, hook), [name] if name else trainer.main_tasks
        if trainer.processes is not None:
            everywhere = trainer.processes.objects([seen.to("cpu") for seen in found])
            found = (
                part.to(trainer.device) for parts in zip_longest(*everywhere) for part in parts if part is not None
            )
        yield from ((tasks, seen) for seen in found)
    trainer.faults.check()


def _run_here(trainer: TrainingState, name: str, loader: Loader, hook: _Watched | None) -> Iterator[_Seen]:
    tasks = [name] if name else trainer.main_tasks
    for batch in batches.drawn(loader, trainer, tasks):
        inputs, labels, groups, *_ = batches.split(batch, trainer.device, tasks)
        outputs = forward(trainer, inputs, name or None, groups)
        h = {} if hook is None or hook.h is None else hook.h.take()
        seen = _Seen(outputs, labels, groups, {name: h} if isinstance(h, Tensor) else h, {})
        yield seen if hook is None else _looked_at(trainer, tasks, seen, hook)


def _looked_at(trainer: TrainingState, tasks: Sequence[str], seen: _Seen, hook: _Watched) -> _Seen:
    """Return raw scores of outputs that are no rows, and, unless they are kept, what metrics need of them in their place."""
    features = hook.features.take()
    outputs, labels = dict(seen.outputs), dict(seen.labels)
    raw: dict[str, Tensor] = {}
    for name in tasks:
        task = trainer.tasks[name]
        if task is None or not task.summed:
            continue
        raw[name] = task.raw_score(outputs[name], labels[name], features.get(name))
        if task.summed and not hook.maps:
            outputs[name] = task.statistics(outputs[name], labels[name])
            labels[name] = task.coverage(labels[name])
    return seen._replace(outputs=outputs, labels=labels, raw=raw) if raw else seen


@torch.no_grad()
def evaluate(trainer: TrainingState, loaders: Loaders) -> Results:
    """Return task -> metric -> value over the loader; ``loss`` is the mean over observed labels."""
    zero = torch.zeros((), dtype=torch.float64, device=trainer.device)
    total, count = dict.fromkeys(trainer.main_tasks, zero), dict.fromkeys(trainer.main_tasks, zero)
    for task in trainer.main_tasks:
        trainer.task_dict[task]["metrics_fn"].reinit()
    for tasks, batch in _run_over(trainer, loaders):
        for task in tasks:
            kind, output, label = trainer.tasks[task], batch.outputs[task], batch.labels[task]
            seen = kind.count(label) if kind else torch.tensor(len(output))
            total[task] = total[task] + trainer.losses.one(task, output, label) * seen
            count[task] = count[task] + seen
            trainer.task_dict[task]["metrics_fn"].update_fun(output, label)
    found: Results = {}
    for task in trainer.main_tasks:
        if total[task] is zero:
            raise DataError(f"the loader has no batch for task {task!r}; nothing to evaluate")
        entry, labelled = trainer.task_dict[task], float(count[task])
        scores = zip(entry["metrics"], entry["metrics_fn"].score_fun())
        found[task] = {"loss": float(total[task]) / labelled if labelled else float("nan")}
        found[task] |= {name: float(score) for name, score in scores}
        entry["metrics_fn"].reinit()
        entry["loss_fn"]._reinit()
    return found


@torch.no_grad()
def group_metrics(trainer: TrainingState, loader: Loader, options: Mapping[str, Any]) -> pd.DataFrame:
    """Return the group metrics of a loader's examples, counted batch by batch; of all processes' shares together."""
    from libmtl_fair.metrics import GroupMetrics

    if trainer.multi_input:
        raise HostError(
            "group_metrics needs one loader for all tasks, and multi_input=True gives each its own: use predict"
        )
    tasks = [trainer.tasks[name] for name in trainer.main_tasks]
    known = [task for task in tasks if task is not None]
    if len(known) < len(tasks):
        raise HostError("group_metrics needs tasks of known kinds: build task_dict with lf.task_dict")
    given = {"auc": False, "group_names": batches.declared(loader, "group_names") or None, **options}
    found = GroupMetrics(known, trainer.n_groups or batches.group_counts([loader]), **given)
    trainer.model.eval()
    hook = _Watched(None, trainer.watch_features(getattr(trainer.model, "decoders", {})), False)
    try:
        for seen in _run_here(trainer, "", loader, hook):
            found.update(seen.outputs, {task.name: task.flat(seen.labels[task.name]) for task in known}, seen.groups)
    finally:
        hook.remove()
    trainer.faults.check()
    if trainer.processes is not None:
        first, *others = trainer.processes.objects(found)
        for other in others:
            first.merge(other)
        found = first
    return found.compute()


@torch.no_grad()
def predict(trainer: TrainingState, loaders: Loaders, embeddings: bool = False, maps: bool = False) -> Predictions:
    """Return what the model says about every example of the loader, on the CPU.

    ``maps``: outputs and labels of tasks with several labels an example as they are; else what metrics need of them.
    """
    unknown_kind = [name for name, task in trainer.tasks.items() if task is None]
    if unknown_kind:
        raise HostError(
            f"task {unknown_kind[0]!r} has no known kind, so its outputs have no score: build task_dict with lf.task_dict"
        )
    parts: dict[str, dict[str, list[Tensor]]] = {key: defaultdict(list) for key in ("out", "label", "group", "raw")}
    on_disk = any(isinstance(loader, BlockLoader) for loader in batches.per_task(trainer, loaders).values())
    vectors: dict[str, Any] = defaultdict(Overflow if on_disk else list)  # many numbers a row
    heads = getattr(trainer.model, "decoders", {})
    hook = _Watched(RepresentationHook(trainer.model) if embeddings else None, trainer.watch_features(heads), maps)
    try:
        for tasks, seen in _run_over(trainer, loaders, hook):
            for task in tasks:
                parts["out"][task].append(seen.outputs[task])
                parts["label"][task].append(seen.labels[task])
                if task in seen.raw:
                    parts["raw"][task].append(seen.raw[task])
            for attribute, ids in seen.groups.items():
                parts["group"][attribute].append(ids)
            for task, h in seen.h.items():
                vectors[task].append(F.pooled(h.detach()))
    finally:
        hook.remove()
    empty = [task for task in trainer.main_tasks if task not in parts["out"]]
    if empty:
        raise DataError(f"the loader has no batch for task {empty[0]!r}; nothing to predict")
    found = {key: {name: torch.cat(values) for name, values in part.items()} for key, part in parts.items()}
    main: dict[str, Task] = {name: task for name, task in trainer.tasks.items() if task and name in trainer.main_tasks}
    first = next(iter(batches.per_task(trainer, loaders).values()))
    held = {
        name: h.whole() if isinstance(h, Overflow) else torch.cat(h).cpu()
        for name, h in vectors.items()
        if name not in trainer.auxiliary
    }
    return Predictions(
        tasks=tuple(main.values()),
        scores={name: scores_of(task, found["out"][name], found["raw"].get(name)).cpu() for name, task in main.items()},
        outputs={name: found["out"][name].cpu() for name in main},
        labels={name: task.flat(found["label"][name]).cpu() for name, task in main.items()},
        groups={} if trainer.multi_input else {name: ids.cpu() for name, ids in found["group"].items()},
        group_names={name: list(names) for name, names in batches.declared(first, "group_names").items()},
        embeddings=held.get("", held) if held else None,
        raw={name: values.cpu() for name, values in found["raw"].items()},
    )


def constant_loss(task: Task, labels: Tensor) -> float:
    """Return the loss of the best constant output on labels [N] or [N, C]: entropy (nats), or variance of a regression's target."""
    seen = with_nan(task.flat(labels)).double()[task.observed(labels)]
    if task.kind == "regression":
        return float(seen.var(correction=0))
    if task.kind == "multiclass":
        return float(torch.special.entr(seen.long().bincount() / max(len(seen), 1)).sum())
    rate = seen.nanmean() if isinstance(task, BinarySequence) else seen.nanmean(0)
    return float((torch.special.entr(rate) + torch.special.entr(1 - rate)).mean())


def collapsed(trainer: TrainingState, loaders: Loaders, losses: Mapping[str, float]) -> list[str]:
    """Say which main tasks have training ``losses`` of 98 % or more of a constant's on a loader's labels **(ours)**."""
    found = predict(trainer, loaders)
    limits = {task.name: constant_loss(task, found.labels[task.name]) for task in found.tasks if not task.summed}
    return [
        f"{task} (training loss {losses[task]:.3f}, of a constant {limit:.3f})"
        for task, limit in limits.items()
        if losses[task] >= 0.98 * limit > 0
    ]
