"""The same rows for an ordinary ``torch.utils.data.DataLoader``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import default_collate

from libmtl_fair.data.checks import (
    SENSITIVE,
    Array,
    check_features,
    check_group_names,
    check_groups,
    check_labels,
)
from libmtl_fair.data.loader import Batch


class TableDataset(TorchDataset[Any]):
    """Rows ``(x, labels)`` with the structure of :class:`ResidentLoader`'s batches; tensors stay where they are.

    Use it with a DataLoader where the data must not live on the device, or rows need workers or samplers.

    Parameters
    ----------
    x, labels, groups, group_names : as for :class:`ResidentLoader`.

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
    ) -> None:
        self.x = check_features(x)
        self.labels = check_labels(labels, len(self.x))
        self.groups = check_groups(groups or {}, len(self.x))
        self.group_names = check_group_names(self.groups, group_names)
        self.n_groups = {attribute: len(names) for attribute, names in self.group_names.items()}
        self.task_names: tuple[str, ...] = tuple(self.labels)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.x.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Return one row."""
        labels: dict[str, Any] = {task: values[index] for task, values in self.labels.items()}
        labels[SENSITIVE] = {attribute: ids[index] for attribute, ids in self.groups.items()}
        return self.x[index], labels


def collate(rows: list[tuple[Tensor, dict[str, Any]]]) -> Batch:
    """Stack rows of a :class:`TableDataset` to a batch; torch's own collation does the same."""
    x, labels = default_collate(rows)
    return x, labels
