"""Batches as a trainer needs them: on the device, checked once, from any loader that LibMTL takes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from libmtl_fair.batch import Columns
from libmtl_fair.data.loader import REFERENCE, SENSITIVE, TWINS, Epoch, Packed, ResidentLoader
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.faults import MOST_GROUPS, check_labels, need_few_groups
from libmtl_fair.libmtl.hooks import hooked
from libmtl_fair.libmtl.state import Loader, Loaders, TrainingState
from libmtl_fair.tasks import Task


def to_device(inputs: Any, device: torch.device) -> Any:
    """Move a tensor, a list, tuple, dict or dataclass of them, or whatever has a ``.to`` (a graph, a tokenizer's output)."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if callable(getattr(inputs, "to", None)):
        moved = inputs.to(device)
        return inputs if moved is None else moved  # which moved itself
    if dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
        held = copy.copy(inputs)
        for field in dataclasses.fields(inputs):
            object.__setattr__(held, field.name, to_device(getattr(inputs, field.name), device))  # frozen ones too
        return held
    if isinstance(inputs, Mapping):
        return {key: to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        parts = [to_device(value, device) for value in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs


def drawn(loader: Loader, trainer: TrainingState | None = None, tasks: Sequence[str] = ()) -> Iterator[object]:
    """Yield a loader's batches; those of a resident loader as the matrices that they are, others' labels and ids checked for a trainer."""
    found = iter(loader)
    if isinstance(found, Epoch):
        return found.packed()
    return found if trainer is None else _checked(trainer, found, tasks)


def _checked(trainer: TrainingState, found: Iterator[Any], tasks: Sequence[str]) -> Iterator[object]:
    """Yield batches whose labels and ids are what they should be: refused before they go to a device, or noted where they lie."""
    declared_tasks = [(name, trainer.task_dict[name].get("task")) for name in tasks]
    for batch in found:
        inputs, labels = _pair(batch, tasks)
        for name, task in declared_tasks:
            if task is not None and name in labels:
                check_labels(trainer.faults, task, labels[name])
        for attribute, ids in labels.get(SENSITIVE, {}).items():
            _check_ids(trainer, attribute, ids)
        yield inputs, labels


def _pair(batch: object, tasks: Sequence[str]) -> tuple[Any, Mapping[str, Any]]:
    """Return inputs, and labels by task with groups under ``"sensitive"``, of what a loader yields.

    That is ``(x, labels)`` or ``(x, labels, groups)``; a bare label tensor belongs to the one task in ``tasks``.
    """
    groups = batch[2] if isinstance(batch, (list, tuple)) and len(batch) == 3 else {}
    if not isinstance(batch, (list, tuple)) or len(batch) not in (2, 3) or not isinstance(groups, Mapping):
        what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (list, tuple)) else type(batch).__name__
        raise DataError(
            f"a loader must yield pairs (x, labels), or (x, labels, groups) with a dict attribute -> ids, found {what}"
        )
    inputs, labels = batch[:2]
    if not isinstance(labels, Mapping):
        if len(tasks) != 1 or not isinstance(labels, Tensor):
            raise DataError(
                f"labels must be a dict task -> tensor, found {type(labels).__name__}; tasks: {', '.join(tasks)}"
            )
        labels = {tasks[0]: labels}
    return inputs, {**labels, SENSITIVE: groups} if groups else labels


def split(batch: object, device: torch.device, tasks: Sequence[str]) -> Packed:
    """Take one batch apart: inputs, labels of the tasks, attribute -> group ids, reference features, on the device."""
    if not isinstance(batch, Packed):
        inputs, labels = _pair(batch, tasks)
        features = None if REFERENCE in tasks else labels.get(REFERENCE)
        twins = None if TWINS in tasks else labels.get(TWINS)
        made = (lambda: to_device(features, device)), (lambda turn: to_device(twins, device))
        batch = Packed(inputs, labels, labels.get(SENSITIVE, {}), *made)
    groups = {name: _tensor(name, ids).to(device, non_blocking=True) for name, ids in batch.groups.items()}
    labels = batch.labels
    if isinstance(labels, Columns) and labels.names == tuple(tasks):
        matrix = Columns(labels.names, to_device(labels.matrix, device))
        return batch._replace(x=to_device(batch.x, device), labels=matrix, groups=groups)
    missing = [task for task in tasks if task not in labels]
    if missing:
        found = [key for key in labels if key not in (SENSITIVE, REFERENCE, TWINS)]
        raise DataError(f"the loader's labels have no task {missing[0]!r}; {unknown('task', missing[0], found)}")
    taken = {task: to_device(labels[task], device) for task in tasks}
    return batch._replace(x=to_device(batch.x, device), labels=taken, groups=groups)


def _tensor(attribute: str, ids: object) -> Tensor:
    if not isinstance(ids, Tensor):
        raise DataError(
            f"groups of sensitive attribute {attribute!r} must be a tensor of whole ids [B], found {type(ids).__name__}: "
            "torch.as_tensor(ids)"
        )
    return ids


def _need_whole(attribute: str, ids: Tensor) -> str:
    """Return how messages call the ids; what are no whole numbers [B] are refused."""
    what = f"groups of sensitive attribute {attribute!r}"
    _tensor(attribute, ids)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() != 1:
        raise DataError(
            f"{what}: expected whole ids [B], found {ids.dtype} of shape {list(ids.shape)}; give ids 0..G-1, and -1 where the "
            "group is not known"
        )
    return what


def _check_ids(trainer: TrainingState, attribute: str, ids: Tensor) -> None:
    what = _need_whole(attribute, ids)
    most = trainer.n_groups.get(attribute, MOST_GROUPS) if trainer.model.training else MOST_GROUPS
    trainer.faults.note((ids < -1) | (ids >= most), ids, what, f"ids 0 to {most - 1}, -1 where the group is not known")


def flat_labels(labels: Mapping[str, Tensor], tasks: Mapping[str, Task | None]) -> Mapping[str, Tensor]:
    """Return the labels as fairness methods expect them: [B] where a loader gives [B, 1]."""
    if isinstance(labels, Columns) and labels.matrix.dim() == 2:
        return labels
    found = {name: (tasks[name], y) for name, y in labels.items() if isinstance(y, Tensor) and y.dim() > 1}
    odd = {name: task.flat(y) for name, (task, y) in found.items() if task is not None}
    return {**labels, **odd} if odd else labels


def per_task(trainer: TrainingState, loaders: Loaders) -> Mapping[str, Loader]:
    """Return task -> loader, or one loader under an empty name."""
    found: Mapping[str, Loader] = {"": loaders}
    if trainer.multi_input:
        assert isinstance(loaders, Mapping)
        missing = [task for task in trainer.main_tasks if task not in loaders]
        if missing:
            raise DataError(f"multi_input=True needs one loader a task; there is none for {missing[0]!r}")
        found = {task: loaders[task] for task in trainer.main_tasks}
    for name, loader in found.items():
        if isinstance(loader, ResidentLoader):
            loader.check(trainer.task_dict[task].get("task") for task in ([name] if name else trainer.main_tasks))
    return found if trainer.own_batches else hooked(trainer, found, loaders)


def endless(trainer: TrainingState, loader: Loader, tasks: Sequence[str]) -> Iterator[object]:
    """Yield the loader's batches again and again, each pass through a new iterator."""
    while True:
        empty = True
        for batch in drawn(loader, trainer, tasks):
            empty = False
            yield batch
        if empty:
            raise DataError(
                "a training loader has no batch: its data set is empty, smaller than a batch with drop_last, or an iterator at its "
                "end (one that can be gone through again starts anew)"
            )


def once(loader: object) -> bool:
    """Whether a loader is an iterator, such as a generator, that gives its batches once."""
    return isinstance(loader, Iterator) and iter(loader) is loader


def declared(loader: Loader, name: str) -> Mapping[str, Any]:
    """Return what the loader, or its data set, says of each attribute; empty if nothing."""
    return getattr(loader, name, None) or getattr(getattr(loader, "dataset", None), name, None) or {}


def set_epoch(trainer: TrainingState, loaders: Loaders, epoch: int) -> None:
    """Tell loaders, their data sets and samplers which epoch begins, where they have ``set_epoch``."""
    for loader in loaders.values() if trainer.multi_input and isinstance(loaders, Mapping) else [loaders]:
        parts = (loader, *(getattr(loader, name, None) for name in ("dataset", "sampler")))
        for part in {id(p): p for p in parts}.values():
            if callable(told := getattr(part, "set_epoch", None)):
                told(epoch)


def batch_count(loaders: Iterable[Loader]) -> int | None:
    """Return the steps of an epoch, those of the longest loader; None where one does not say."""
    try:
        return max(len(loader) for loader in loaders)  # type: ignore[arg-type]
    except TypeError:
        return None


def group_counts(loaders: Sequence[Loader], endless: bool = False) -> dict[str, int]:
    """Return attribute -> number of groups: as the loaders declare it, else by one look through them.

    Ids are never counted anew from a batch, so that a group that a batch lacks does not shift the others. An iterator would be used
    up by a look; so would a pass without end, which a loader without a length may have where ``endless``.
    """
    counts: dict[str, int] = {}
    for loader in loaders:
        if not declared(loader, "n_groups") and (once(loader) or (endless and batch_count([loader]) is None)):
            raise DataError(
                "sensitive groups are needed, and a loader without a length does not say how many there are: give FairTrainer "
                "n_groups={attribute: number of groups}, or the loader or its data set such an attribute"
            )
        for name, count in (declared(loader, "n_groups") or _scan(loader)).items():
            need_few_groups(f"groups of sensitive attribute {name!r}", int(count))
            counts[name] = max(int(count), counts.get(name, 0))
    return counts


def _scan(loader: Loader) -> dict[str, int]:
    highest: dict[str, int] = {}
    for batch in loader:
        labels = batch[1] if isinstance(batch, (list, tuple)) and len(batch) > 1 else None
        given = batch[2] if isinstance(batch, (list, tuple)) and len(batch) == 3 else {}
        groups = labels.get(SENSITIVE, given) if isinstance(labels, Mapping) else given
        if not groups:
            return {}
        for name, ids in groups.items():
            _need_whole(name, ids)
            highest[name] = max(highest.get(name, -1), int(ids.max()))
    return {name: top + 1 for name, top in highest.items()}
