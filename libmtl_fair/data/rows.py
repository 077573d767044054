"""Rows of features, labels and group ids, checked once: what loaders are made of, for torch's own DataLoader too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from libmtl_fair.errors import DataError

Array: TypeAlias = "Tensor | NDArray[Any]"
"""What loaders take: a tensor or a numpy array."""

Batch: TypeAlias = "tuple[Tensor, dict[str, Any]]"
"""``(x, labels)``: labels hold one tensor a task and, under ``"sensitive"``, a dict attribute -> int64 group ids."""

SENSITIVE = "sensitive"
"""Key under which a batch's labels hold the group ids; no task may have this name."""


class TableDataset(Dataset[Batch]):
    """Rows ``(x, labels)`` with the structure of :class:`ResidentLoader`'s batches; tensors stay where they are.

    Use it with a DataLoader where the data must not live on the device, or rows need workers or samplers.

    Parameters
    ----------
    x, labels, groups, group_names, feature_names : as for :class:`ResidentLoader`.

    Raises
    ------
    DataError : as :class:`ResidentLoader`.

    >>> import torch
    >>> from torch.utils.data import DataLoader
    >>> rows = TableDataset(torch.eye(3), {"t": torch.arange(3)}, {"sex": torch.tensor([0, 1, -1])})
    >>> x, labels = next(iter(DataLoader(rows, batch_size=2, collate_fn=collate)))
    >>> labels["t"].tolist(), labels["sensitive"]["sex"].tolist()
    ([0, 1], [0, 1])
    """

    def __init__(
        self,
        x: Array,
        labels: Mapping[str, Array],
        groups: Mapping[str, Array] | None = None,
        *,
        group_names: Mapping[str, Sequence[str]] | None = None,
        feature_names: Sequence[str] = (),
    ) -> None:
        if not labels:
            raise DataError("a loader needs the labels of at least one task, found none; expected {task: labels[N]}")
        self.x = _features(x, feature_names)
        self.labels = {task: _labels(task, values, len(self.x)) for task, values in labels.items()}
        self.groups = {name: _groups(name, ids, len(self.x)) for name, ids in (groups or {}).items()}
        self.group_names = _names(self.groups, group_names or {})
        self.n_groups = {attribute: len(names) for attribute, names in self.group_names.items()}
        self.task_names: tuple[str, ...] = tuple(self.labels)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.x.shape[0]

    def __getitem__(self, index: int) -> Batch:
        """Return one row."""
        labels: dict[str, Any] = {task: values[index] for task, values in self.labels.items()}
        labels[SENSITIVE] = {attribute: ids[index] for attribute, ids in self.groups.items()}
        return self.x[index], labels


def collate(rows: list[Batch]) -> Batch:
    """Stack rows of a :class:`TableDataset` to a batch; torch's own collation does the same."""
    x, labels = default_collate(rows)
    return x, labels


def as_tensor(values: object, what: str, n_rows: int | None = None) -> Tensor:
    """Return ``values`` as a tensor. A numpy float64 array becomes torch's default dtype; a tensor keeps its own."""
    if isinstance(values, Tensor):
        tensor = values.detach()
    else:
        array = np.asarray(values)
        if array.dtype == object or array.dtype.kind in "USMm":
            raise DataError(
                f"{what}: expected a tensor or a numeric array, found dtype {array.dtype}; encode it as numbers"
            )
        if array.dtype.byteorder == ">" or any(stride < 0 for stride in array.strides) or not array.flags.writeable:
            array = array.astype(array.dtype.newbyteorder("="), copy=True)
        tensor = torch.from_numpy(array)
        tensor = tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor
    found = tensor.shape[0] if tensor.dim() else 0
    if n_rows is not None and found != n_rows:
        raise DataError(f"{what}: expected {n_rows} rows, as x has, found {found}")
    return tensor


def _features(x: Array, names: Sequence[str]) -> Tensor:
    """Return ``x`` [N, ...] with N >= 1 and every value finite."""
    tensor = as_tensor(x, "x")
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        raise DataError(
            f"x has no rows (shape {tuple(tensor.shape)}); expected [N, ...] with N >= 1: is the split empty?"
        )
    bad = ~torch.isfinite(tensor)
    if tensor.is_floating_point() and bool(bad.any()):
        row, *rest = torch.nonzero(bad)[0].tolist()
        column = f"column {rest[0]}" if rest else "the only column"
        if rest and rest[0] < len(names):
            column += f" ({names[rest[0]]!r})"
        raise DataError(
            f"x has {int(bad.sum())} values that are NaN or infinite, the first in {column}, row {row}; features must be "
            "finite: impute them (load_table does, with missing indicators) or drop the column"
        )
    return tensor


def _labels(task: str, values: Array, n_rows: int) -> Tensor:
    """Return labels [N, ...] in float or int64; NaN or -100 mean missing, infinity is refused."""
    if task == SENSITIVE:
        raise DataError(f"a task may not be named {SENSITIVE!r}: this key holds the group ids; rename the task")
    tensor = as_tensor(values, f"labels of task {task!r}", n_rows)
    if not tensor.is_floating_point():
        return tensor.to(torch.get_default_dtype() if tensor.dtype == torch.bool else torch.int64)
    infinite = int(torch.isinf(tensor).sum())
    if infinite:
        raise DataError(f"task {task!r}: {infinite} labels are infinite; use NaN for missing")
    return tensor


def _groups(attribute: str, values: Array, n_rows: int) -> Tensor:
    """Return group ids int64 [N], each at least -1 (unknown)."""
    what = f"groups of sensitive attribute {attribute!r}"
    tensor = as_tensor(values, what, n_rows)
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex():
        raise DataError(
            f"{what}: expected integer ids [N], found {tensor.dtype} of shape {tuple(tensor.shape)}; "
            "give ids 0..G-1, and -1 where the group is not known"
        )
    if int(tensor.min()) < -1:
        raise DataError(f"{what}: found id {int(tensor.min())}; ids are 0..G-1, and -1 where the group is not known")
    return tensor.long()


def _names(groups: Mapping[str, Tensor], given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the name of every id of every attribute; where none are given they are ``"0"``, ``"1"``, ..."""
    for attribute in given:
        if attribute not in groups:
            raise DataError(
                f"group_names has {attribute!r}, which is no sensitive attribute here; there are: {list(groups)}"
            )
    names = {}
    for attribute, ids in groups.items():
        highest = int(ids.max())
        names[attribute] = [str(name) for name in given.get(attribute, range(highest + 1))]
        if highest >= len(names[attribute]):
            raise DataError(
                f"sensitive attribute {attribute!r}: found group id {highest}, but only {len(names[attribute])} group "
                "names; give one name for each id"
            )
    return names
