"""What a model says about a data set: outputs, scores, labels and groups of every example, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libmtl_fair.errors import CheckpointError, DamagedFileError, DataError
from libmtl_fair.files import Json
from libmtl_fair.summaries import Lines, Summarised, shares
from libmtl_fair.tasks import IGNORE_INDEX, Ranged, Task, task_from_dict, task_to_dict

if TYPE_CHECKING:
    import pandas as pd
    from pandas.api.extensions import ExtensionArray

    Values = NDArray[Any]
    Column = ExtensionArray | NDArray[np.generic] | pd.Series

_META, _SEAL = b"libmtl_fair", b"libmtl_fair seal"


@dataclass(frozen=True, repr=False)
class Predictions(Summarised):
    """Outputs of a multi-task model on N examples.

    Attributes
    ----------
    tasks : tuple of Task
        The tasks, in ``task_dict`` order.
    scores : dict of str to Tensor
        Task -> audit score in [0, 1], [N] (METHODS.md, section 0).
    outputs : dict of str to Tensor
        Task -> raw head output, [N], [N, 1] or [N, C].
    labels : dict of str to Tensor
        Task -> labels as the loader gave them (NaN or -100 where missing).
    groups : dict of str to Tensor
        Attribute -> group ids int64 [N], -1 unknown.
    group_names : dict of str to list of str
        Attribute -> names, index = id.
    embeddings : Tensor or dict of str to Tensor, optional
        Representation that the heads received, [N, d], or one per task; None unless asked for.
    decided : tuple of str, default ()
        Tasks of which decisions alone are meant: no AUC, no Brier of their scores.
    people : dict of str to float
        What an audit of people found of them: "inconsistency", "flip_gap"; empty unless one was made.
    raw : dict of str to Tensor
        Task -> score before a range squashes it, [N], of tasks whose outputs are no rows (maps, sequences).
    """

    tasks: tuple[Task, ...]
    scores: dict[str, Tensor]
    outputs: dict[str, Tensor]
    labels: dict[str, Tensor]
    groups: dict[str, Tensor]
    group_names: dict[str, list[str]] = field(default_factory=dict)
    embeddings: Tensor | dict[str, Tensor] | None = None
    decided: tuple[str, ...] = ()
    people: dict[str, float] = field(default_factory=dict)
    raw: dict[str, Tensor] = field(default_factory=dict)

    def _summary(self) -> tuple[str, Lines]:
        sizes = sorted({len(score) for score in self.scores.values()})
        lines = []
        for task in self.tasks:
            labelled = int(task.observed(self.labels[task.name]).sum())
            scores = self.scores[task.name].double()
            what = f", {labelled:,} labelled, mean score {scores.nanmean():.3f}" if len(scores) else ""
            lines.append((task.name, f"{task.kind}{what}" + ("; decisions alone" if task.name in self.decided else "")))
        for attribute, ids in self.groups.items():
            names = self._names(attribute)
            counts = torch.bincount(ids[ids >= 0], minlength=len(names)).tolist()
            lines.append((f"groups of {attribute}", shares(dict(zip(names, counts)))))
        if self.embeddings is not None:
            lines.append(
                (
                    "embeddings",
                    "one for each task" if isinstance(self.embeddings, dict) else str(list(self.embeddings.shape)),
                )
            )
        return f"Predictions of {', '.join(f'{size:,}' for size in sizes)} examples, {len(self.tasks)} tasks", lines

    def __len__(self) -> int:
        """Number of examples."""
        return len(next(iter(self.scores.values())))

    def task(self, name: str) -> Task:
        """Return the task of that name."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise DataError(f"no task {name!r} in these predictions; they hold: {', '.join(t.name for t in self.tasks)}")

    def named_groups(self, attribute: str) -> NDArray[np.object_]:
        """Return the name of each example's group, [N]; empty for an unknown one.

        Raises
        ------
        DataError
            Fewer names than groups, or two alike.
        """
        ids, names = self.groups[attribute].numpy(), self._names(attribute)
        highest = int(ids.max(initial=-1))
        if highest >= len(names) or len(set(names)) < len(names):
            raise DataError(
                f"attribute {attribute!r}: group ids go to {highest}, so {highest + 1} different names are needed; found {names}"
            )
        return np.asarray(np.array([*names, ""], dtype=object)[ids])

    def only(self, names: Sequence[str]) -> Predictions:
        """Return the same predictions of these tasks alone, in this order.

        Raises
        ------
        DataError
            A task that is not among them.
        """
        tasks = tuple(self.task(name) for name in names)
        if tasks == self.tasks:
            return self
        held: dict[str, Any] = {
            field: {name: values[name] for name in names if name in values}
            for field in ("scores", "outputs", "labels", "raw", "embeddings")
            if isinstance(values := getattr(self, field), dict)
        }
        return replace(self, tasks=tasks, decided=tuple(t for t in self.decided if t in names), **held)

    def rescored(self, tasks: tuple[Task, ...]) -> Predictions:
        """Return the same predictions with the audit scores that ``tasks`` give, such as under frozen score ranges."""
        scores = {t.name: scores_of(t, self.outputs[t.name], self.raw.get(t.name)) for t in tasks}
        return replace(self, tasks=tasks, scores=scores)

    def frame(self) -> pd.DataFrame:
        """Return one row per example: ``<task>/label|score|prob|value`` and ``sensitive/<attribute>`` as names.

        Raises
        ------
        DataError
            Tasks that have inputs of their own, so that a row is no example; or fewer names than groups.
        """
        import pandas as pd

        sizes = {name: len(score) for name, score in self.scores.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(
                f"the tasks have different examples {sizes}, so they make no one table; use .scores and .labels"
            )
        columns: dict[str, Column] = {"row": np.arange(len(self))}
        for task in self.tasks:
            given = self.labels[task.name]
            labels = (task.coverage(given) if task.summed else given).numpy()
            columns.update(_numbered(f"{task.name}/label", labels, _missing))
            columns[f"{task.name}/score"] = self.scores[task.name].numpy()
            if task.summed:
                native = task.native(task.statistics(self.outputs[task.name], given))
                columns.update({f"{task.name}/{name}": value.numpy() for name, value in native.items()})
                continue
            values = task.probabilities(self.outputs[task.name]).numpy()
            columns.update(_numbered(f"{task.name}/{'value' if task.kind == 'regression' else 'prob'}", values))
        for attribute, ids in self.groups.items():
            named = pd.Series(self.named_groups(attribute), dtype="string")
            columns[f"sensitive/{attribute}"] = named.where(ids.numpy() >= 0)
        return pd.DataFrame(columns)

    def _names(self, attribute: str) -> list[str]:
        highest = int(self.groups[attribute].numpy().max(initial=-1))
        return self.group_names.get(attribute) or [str(i) for i in range(highest + 1)]

    def save(self, path: str | Path) -> Path:
        """Write :meth:`frame` and the raw outputs to a parquet file that :meth:`load` and pandas read.

        Of outputs that are maps what metrics need is written, in their place.
        """
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq

        from libmtl_fair.files import BLANK_SEAL, sealed_path

        frame = self.frame()
        wide: dict[str, pa.Array] = {}
        more: dict[str, Values] = {}
        for task in self.tasks:
            if task.name in self.raw:
                more[f"{task.name}/raw_score"] = self.raw[task.name].numpy()
            if task.summed:
                kept = task.statistics(self.outputs[task.name], self.labels[task.name]).numpy()
                wide[f"{task.name}/output"] = pa.FixedSizeListArray.from_arrays(kept.ravel(), kept.shape[1])
                continue
            for c, output in enumerate(np.atleast_2d(self.outputs[task.name].numpy().T)):
                more[f"{task.name}/output_{c}"] = output
        frame = pd.concat([frame, pd.DataFrame(more, index=frame.index)], axis=1)
        meta = {
            "tasks": [task_to_dict(task) for task in self.tasks],
            "group_names": {attribute: self._names(attribute) for attribute in self.groups},
            "shapes": {t.name: list(self.outputs[t.name].shape[1:]) for t in self.tasks if t.name not in wide},
            "decided": list(self.decided),
            "sealed": True,
        }
        table = pa.Table.from_pandas(frame, preserve_index=False)
        for name, column in wide.items():
            table = table.append_column(name, column)
        ours = {_META: json.dumps(meta).encode(), _SEAL: BLANK_SEAL.encode()}
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **ours})
        with sealed_path(path) as temporary:
            pq.write_table(table, temporary)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read what :meth:`save` wrote.

        Raises
        ------
        CheckpointError
            No such file, not written by :meth:`save`, or damaged since.
        """
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq

        from libmtl_fair.files import is_sealed

        try:
            sealed = is_sealed(path)
            table = pq.read_table(path)
            meta = json.loads((table.schema.metadata or {})[_META])
            if meta.get("sealed") and not sealed:
                raise DamagedFileError("its seal is missing")
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise CheckpointError(
                f"{path} holds no predictions of libmtl_fair ({error}); run the recipe again"
            ) from error
        frame = table.to_pandas()
        tasks = [task_from_dict(entry) for entry in meta["tasks"]]
        outputs, labels, scores, raw = {}, {}, {}, {}
        for task in tasks:
            columns = [c for c in frame if str(c).startswith(f"{task.name}/output_")]
            output = torch.from_numpy(frame[columns].to_numpy(copy=True))
            outputs[task.name] = (
                torch.from_numpy(np.stack(frame[f"{task.name}/output"].to_list()))
                if task.summed
                else output.reshape(len(frame), *meta["shapes"][task.name])
            )
            if f"{task.name}/raw_score" in frame:
                raw[task.name] = torch.from_numpy(frame[f"{task.name}/raw_score"].to_numpy(copy=True))
            labels[task.name] = _labels(frame, task, meta["shapes"].get(task.name, ()))
            scores[task.name] = torch.from_numpy(frame[f"{task.name}/score"].to_numpy(copy=True))
        names: dict[str, list[str]] = meta["group_names"]
        codes = {a: pd.Categorical(frame[f"sensitive/{a}"], categories=known).codes for a, known in names.items()}
        groups = {a: torch.from_numpy(code.astype(np.int64)) for a, code in codes.items()}
        return cls(
            tuple(tasks), scores, outputs, labels, groups, names, decided=tuple(meta.get("decided") or ()), raw=raw
        )


def scores_of(task: Task, outputs: Tensor, raw: Tensor | None = None) -> Tensor:
    """Return the audit scores [N] of a task's outputs, or of their ``raw`` scores where these were kept."""
    if raw is None:
        return task.score(outputs)
    return task.squash(raw) if isinstance(task, Ranged) else raw


def side_by_side(found: Sequence[Predictions]) -> Predictions:
    """Return predictions of several models for the same examples, of tasks of their own, as those of one model."""
    if len(found) == 1:
        return found[0]
    joined: Json = {
        name: {task: value for each in found for task, value in getattr(each, name).items()}
        for name in ("scores", "outputs", "labels", "raw")
    }
    vectors: dict[str, Tensor] = {}
    for each in found:
        h = each.embeddings
        vectors |= h if isinstance(h, dict) else {task.name: h for task in each.tasks if h is not None}
    tasks = tuple(task for each in found for task in each.tasks)
    return replace(found[0], tasks=tasks, embeddings=vectors or None, **joined)


def _numbered(name: str, values: Values, shown: Callable[[Values], Column] = np.asarray) -> dict[str, Column]:
    """Return [N] under its name, or [N, C] a column each, numbered."""
    return {f"{name}_{c}" if values.ndim > 1 else name: shown(part) for c, part in enumerate(np.atleast_2d(values.T))}


def _missing(labels: Values) -> Column:
    import pandas as pd

    if labels.dtype.kind == "f":
        return labels
    values = pd.array(labels, dtype="Int64")
    values[labels == IGNORE_INDEX] = pd.NA
    return values


def _labels(frame: pd.DataFrame, task: Task, shape: Sequence[int]) -> Tensor:
    if task.kind in ("multilabel", "binary_sequence"):
        columns = [f"{task.name}/label_{c}" for c in range(shape[0])]
        return torch.from_numpy(frame[columns].to_numpy(dtype=np.float32, na_value=np.nan, copy=True))
    column = frame[f"{task.name}/label"]
    if column.dtype.kind == "f" and task.kind != "multiclass":
        return torch.from_numpy(column.to_numpy(copy=True))
    return torch.from_numpy(column.fillna(IGNORE_INDEX).to_numpy(dtype=np.int64, copy=True))
