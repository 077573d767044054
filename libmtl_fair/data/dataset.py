"""What loading gives: three splits of tensors, the tasks, the groups' names, and a data card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from libmtl_fair.data.card_markdown import card_markdown
from libmtl_fair.data.features import FeatureEncoder
from libmtl_fair.data.loader import ResidentLoader
from libmtl_fair.data.torch_dataset import TableDataset
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.tasks import Task


@dataclass(frozen=True)
class Split:
    """One part of a dataset, on the CPU.

    Attributes
    ----------
    x : float32 [N, F].
    labels : {task: [N] or [N, C]}; NaN or -100 where missing; regression targets in units of the training part.
    groups : {attribute: int64 [N]}; -1 where not known.
    rows : int64 [N], position of each row in the source table.
    group_names : {attribute: names}, index = id.
    feature_names : of the columns of ``x``.
    """

    x: Tensor
    labels: dict[str, Tensor]
    groups: dict[str, Tensor]
    rows: Tensor
    group_names: dict[str, list[str]]
    feature_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.x.shape[0]

    def loader(
        self,
        batch_size: int,
        shuffle: bool = False,
        seed: int | None = None,
        device: str | torch.device = "auto",
        drop_last: bool = False,
    ) -> ResidentLoader:
        """Return a loader of this part that lives on the device."""
        return ResidentLoader(
            self.x,
            self.labels,
            self.groups,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            device=device,
            drop_last=drop_last,
            group_names=self.group_names,
            feature_names=self.feature_names,
        )

    def torch_dataset(self) -> TableDataset:
        """Return the same rows for an ordinary ``torch.utils.data.DataLoader``."""
        return TableDataset(self.x, self.labels, self.groups, group_names=self.group_names)


@dataclass(frozen=True)
class Dataset:
    """A table made ready for multi-task training.

    Attributes
    ----------
    name : of the dataset.
    train, val, test : its parts.
    tasks : in the order chosen.
    groups : {attribute: names of its groups}, index = id.
    card : what the data are, as plain values ready for JSON.
    encoder : the fitted encoding, for new rows.
    """

    name: str
    train: Split
    val: Split
    test: Split
    tasks: tuple[Task, ...]
    groups: dict[str, list[str]]
    feature_names: tuple[str, ...]
    card: dict[str, Any]
    encoder: FeatureEncoder

    @property
    def n_features(self) -> int:
        """Return the number of columns of ``x``."""
        return len(self.feature_names)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Return the names of the tasks, in order."""
        return tuple(task.name for task in self.tasks)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the source columns that the inputs are made of."""
        return tuple(self.encoder.kinds)

    def task(self, name: str) -> Task:
        """Return one task by name.

        Raises
        ------
        DataError : no such task.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise DataError(unknown("task", name, self.task_names))

    def splits(self) -> dict[str, Split]:
        """Return the parts by name."""
        return {"train": self.train, "val": self.val, "test": self.test}

    def encode(self, frame: pd.DataFrame) -> Tensor:
        """Return the inputs of new rows, float32 [N, F]."""
        return torch.from_numpy(self.encoder.encode(frame))

    def card_markdown(self) -> str:
        """Return the data card as Markdown."""
        return card_markdown(self.card)
