"""Batches as a trainer needs them: on the device, checked once, from any loader that LibMTL takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from libmtl_fair.errors import DataError, unknown
from libmtl_fair.tasks import Task

SENSITIVE = "sensitive"
"""Key of the labels under which a loader hands over group ids."""


def to_device(inputs: Any, device: torch.device) -> Any:
    """Move a tensor, or a list, tuple or dict of them, to the device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, Mapping):
        return {key: to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(to_device(value, device) for value in inputs)
    return inputs


def batches(
    loader: Any, device: torch.device, tasks: Sequence[str]
) -> Iterator[tuple[Any, dict[str, Tensor], dict[str, Tensor]]]:
    """Yield (inputs, labels of the tasks, attribute -> group ids) on the device, once through the loader.

    Raises
    ------
    DataError : a batch that is no ``(x, labels)`` pair, or lacks a task.
    """
    for batch in loader:
        yield split(batch, device, tasks)


def split(batch: Any, device: torch.device, tasks: Sequence[str]) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Take one batch apart. A bare label tensor belongs to the one task in ``tasks``."""
    if not isinstance(batch, (list, tuple)) or len(batch) != 2:
        raise DataError(f"a loader must yield pairs (x, labels), found {type(batch).__name__}")
    inputs, labels = batch
    if not isinstance(labels, Mapping):
        if len(tasks) != 1 or not isinstance(labels, Tensor):
            raise DataError(
                f"labels must be a dict task -> tensor, found {type(labels).__name__}; tasks: {', '.join(tasks)}"
            )
        labels = {tasks[0]: labels}
    missing = [task for task in tasks if task not in labels]
    if missing:
        found = [key for key in labels if key != SENSITIVE]
        raise DataError(f"the loader's labels have no task {missing[0]!r}; {unknown('task', missing[0], found)}")
    groups = {name: ids.to(device, non_blocking=True) for name, ids in labels.get(SENSITIVE, {}).items()}
    return to_device(inputs, device), {task: to_device(labels[task], device) for task in tasks}, groups


def flat_labels(labels: Mapping[str, Any], tasks: Mapping[str, Task | None]) -> Mapping[str, Any]:
    """Return the labels as fairness methods expect them: [B] where a loader gives [B, 1]."""
    odd = [name for name, y in labels.items() if isinstance(y, Tensor) and y.dim() > 1 and tasks[name] is not None]
    return labels if not odd else {**labels, **{name: tasks[name].flat(labels[name]) for name in odd}}  # type: ignore[union-attr]


def endless(loader: Any) -> Iterator[Any]:
    """Yield the loader's batches again and again, each pass through a new iterator.

    Raises
    ------
    DataError : the loader has no batch.
    """
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise DataError(
                "a training loader has no batch: its data set is empty, or smaller than a batch with drop_last"
            )


def group_counts(loaders: Sequence[Any]) -> dict[str, int]:
    """Return attribute -> number of groups: as the loaders declare it, else by one look through them.

    Ids are never counted anew from a batch, so that a group that a batch lacks does not shift the others.
    """
    counts: dict[str, int] = {}
    for loader in loaders:
        declared = getattr(loader, "n_groups", None) or getattr(getattr(loader, "dataset", None), "n_groups", None)
        for name, count in (declared or _scan(loader)).items():
            counts[name] = max(int(count), counts.get(name, 0))
    return counts


def _scan(loader: Any) -> dict[str, int]:
    highest: dict[str, int] = {}
    for batch in loader:
        labels = batch[1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else None
        groups = labels.get(SENSITIVE, {}) if isinstance(labels, Mapping) else {}
        if not groups:
            return {}
        for name, ids in groups.items():
            highest[name] = max(highest.get(name, -1), int(ids.max()))
    return {name: top + 1 for name, top in highest.items()}


def group_names(loader: Any) -> dict[str, list[str]]:
    """Return attribute -> names of its groups, as the loader or its data set declares them."""
    found = getattr(loader, "group_names", None) or getattr(getattr(loader, "dataset", None), "group_names", None)
    return {name: list(values) for name, values in (found or {}).items()}
