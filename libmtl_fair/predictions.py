"""What a model says about a data set: outputs, scores, labels and groups of every example, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from libmtl_fair.errors import CheckpointError, DataError
from libmtl_fair.tasks import IGNORE_INDEX, KINDS, Task

_META = b"libmtl_fair"


@dataclass(frozen=True)
class Predictions:
    """Outputs of a multi-task model on N examples.

    Attributes
    ----------
    tasks : the tasks, in ``task_dict`` order.
    scores : task -> audit score in [0, 1], [N] (methods.md, section 0).
    outputs : task -> raw head output, [N], [N, 1] or [N, C].
    labels : task -> labels as the loader gave them (NaN or -100 where missing).
    groups : attribute -> group ids int64 [N], -1 unknown.
    group_names : attribute -> names, index = id.
    embeddings : representation that the heads received, [N, d], or one per task; None unless asked for.
    """

    tasks: tuple[Task, ...]
    scores: dict[str, Tensor]
    outputs: dict[str, Tensor]
    labels: dict[str, Tensor]
    groups: dict[str, Tensor]
    group_names: dict[str, list[str]] = field(default_factory=dict)
    embeddings: Tensor | dict[str, Tensor] | None = None

    def __len__(self) -> int:
        """Number of examples."""
        return len(next(iter(self.scores.values())))

    def task(self, name: str) -> Task:
        """Return the task of that name."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise DataError(f"no task {name!r} in these predictions; they hold: {', '.join(t.name for t in self.tasks)}")

    def frame(self) -> pd.DataFrame:
        """Return one row per example: ``<task>/label|score|prob|value`` and ``sensitive/<attribute>`` as names.

        Raises
        ------
        DataError : tasks that have inputs of their own, so that a row is no example; or fewer names than groups.
        """
        sizes = {name: len(score) for name, score in self.scores.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(
                f"the tasks have different examples {sizes}, so they make no one table; use .scores and .labels"
            )
        columns: dict[str, Any] = {"row": np.arange(len(self))}
        for task in self.tasks:
            columns.update(self._task_columns(task))
        for attribute, ids in self.groups.items():
            columns[f"sensitive/{attribute}"] = _named(ids, attribute, self._names(attribute))
        return pd.DataFrame(columns)

    def _task_columns(self, task: Task) -> dict[str, Any]:
        labels = self.labels[task.name]
        columns: dict[str, Any] = {}
        values = task.probabilities(self.outputs[task.name]).numpy()
        if labels.dim() == 1:
            columns[f"{task.name}/label"] = _missing(labels)
        else:
            columns.update({f"{task.name}/label_{c}": _missing(labels[:, c]) for c in range(labels.shape[1])})
        columns[f"{task.name}/score"] = self.scores[task.name].numpy()
        if task.kind == "regression":
            columns[f"{task.name}/value"] = values
        elif values.ndim == 1:
            columns[f"{task.name}/prob"] = values
        else:
            columns.update({f"{task.name}/prob_{c}": values[:, c] for c in range(values.shape[1])})
        return columns

    def _names(self, attribute: str) -> list[str]:
        ids = self.groups[attribute]
        return self.group_names.get(attribute) or [str(i) for i in range(int(ids.max()) + 1 if len(ids) else 0)]

    def save(self, path: str | Path) -> Path:
        """Write :meth:`frame` and the raw outputs to a parquet file that :meth:`load` and pandas read."""
        from libmtl_fair.files import atomic_path

        frame = self.frame()
        for task in self.tasks:
            output = self.outputs[task.name].reshape(len(self), -1).numpy()
            for c in range(output.shape[1]):
                frame[f"{task.name}/output_{c}"] = output[:, c]
        meta = {
            "tasks": [{"kind": t.kind, **asdict(t)} for t in self.tasks],
            "group_names": {attribute: self._names(attribute) for attribute in self.groups},
            "shapes": {t.name: list(self.outputs[t.name].shape[1:]) for t in self.tasks},
        }
        table = pa.Table.from_pandas(frame, preserve_index=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _META: json.dumps(meta).encode()})
        path = Path(path)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read what :meth:`save` wrote.

        Raises
        ------
        CheckpointError : no such file, or not written by :meth:`save`.
        """
        try:
            table = pq.read_table(path)
            meta = json.loads((table.schema.metadata or {})[_META])
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise CheckpointError(
                f"{path} holds no predictions of libmtl_fair ({error}); run the recipe again"
            ) from error
        frame = table.to_pandas()
        tasks = tuple(_task(entry) for entry in meta["tasks"])
        outputs, labels, scores = {}, {}, {}
        for task in tasks:
            shape = meta["shapes"][task.name]
            columns = [c for c in frame if str(c).startswith(f"{task.name}/output_")]
            outputs[task.name] = torch.from_numpy(frame[columns].to_numpy(copy=True)).reshape(len(frame), *shape)
            labels[task.name] = _labels(frame, task)
            scores[task.name] = torch.from_numpy(frame[f"{task.name}/score"].to_numpy(copy=True))
        groups = {a: _ids(frame[f"sensitive/{a}"], names) for a, names in meta["group_names"].items()}
        return cls(tasks, scores, outputs, labels, groups, meta["group_names"])


def _task(entry: dict[str, Any]) -> Task:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k != "kind"}
    made: Task = KINDS[str(entry["kind"])](**values)
    return made


def _missing(labels: Tensor) -> Any:
    if labels.is_floating_point():
        return labels.numpy()
    values = pd.array(labels.numpy(), dtype="Int64")
    values[labels.numpy() == IGNORE_INDEX] = pd.NA
    return values


def _labels(frame: pd.DataFrame, task: Task) -> Tensor:
    if task.kind == "multilabel":
        columns = [f"{task.name}/label_{c}" for c in range(task.out_features)]
        return torch.from_numpy(frame[columns].to_numpy(dtype=np.float32, na_value=np.nan, copy=True))
    column = frame[f"{task.name}/label"]
    if column.dtype.kind == "f" and task.kind != "multiclass":
        return torch.from_numpy(column.to_numpy(copy=True))
    return torch.from_numpy(column.fillna(IGNORE_INDEX).to_numpy(dtype=np.int64, copy=True))


def _named(ids: Tensor, attribute: str, names: list[str]) -> Any:
    highest = int(ids.max()) if len(ids) else -1
    if highest >= len(names) or len(set(names)) < len(names):
        raise DataError(
            f"attribute {attribute!r}: group ids go to {highest}, so {highest + 1} different names are needed; found {names}"
        )
    return pd.Series(pd.Categorical.from_codes(ids.numpy(), pd.Index(names)), dtype="category").astype("string")


def _ids(column: pd.Series[Any], names: list[str]) -> Tensor:
    index: Mapping[str, int] = {name: i for i, name in enumerate(names)}
    return torch.tensor([index.get(v, -1) if isinstance(v, str) else -1 for v in column], dtype=torch.int64)
