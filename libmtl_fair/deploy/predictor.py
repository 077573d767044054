"""A trained model in use: new rows of a table in, decisions, classes, values and probabilities out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from libmtl_fair.data.catalogue import renamed
from libmtl_fair.data.frames import Values
from libmtl_fair.data.loader import ResidentLoader
from libmtl_fair.data.new_rows import NewRows
from libmtl_fair.data.tables import Source, read_frame
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.files import Json
from libmtl_fair.libmtl.trainer import FairTrainer
from libmtl_fair.metrics.post_models import PostModel
from libmtl_fair.metrics.scores import Held, thresholds_in_use
from libmtl_fair.predictions import Predictions, side_by_side
from libmtl_fair.recipe.build import EVAL_BATCH
from libmtl_fair.recipe.reduction import decided_by
from libmtl_fair.tasks import IGNORE_INDEX, Multiclass, Multilabel, Task


@dataclass(frozen=True)
class Network:
    """Trained networks: one for all tasks, or one for each task or group of tasks; ``serves``: whom each answers for."""

    trainers: tuple[FairTrainer, ...]
    serves: tuple[tuple[str, ...], ...]

    def predictions(self, rows: NewRows, frame: pd.DataFrame, groups: dict[str, Tensor]) -> Predictions:
        """Return what they say of new rows, with representations."""
        x, n_rows = rows.encode(frame), len(frame)
        found = []
        for trainer, served in zip(self.trainers, self.serves):
            tasks = [task for task in trainer.tasks.values() if task is not None and not task.auxiliary]
            labels = {task.name: _no_labels(task, n_rows) for task in tasks}
            names = {attribute: rows.groups[attribute] for attribute in groups}
            how: Json = {"batch_size": EVAL_BATCH, "shuffle": False, "seed": 0, "device": trainer.device}
            loader = ResidentLoader(x, labels, groups, group_names=names, **how)
            found.append(trainer.predict(loader, embeddings=True).only(served))
        return side_by_side(found).only([task.name for task in rows.tasks])


@dataclass(frozen=True)
class Made:
    """A model made of others after training, with a strength along its path."""

    model: PostModel
    strength: float
    sources: tuple[Predictor, ...]

    def predictions(self, rows: NewRows, frame: pd.DataFrame, groups: dict[str, Tensor]) -> Predictions:
        """Return what it makes of its sources' predictions."""
        held = [source.predictions(frame) for source in self.sources]
        return replace(self.model.apply(*held, strength=self.strength), embeddings=None)


@dataclass(frozen=True)
class Reduced:
    """Weighted voters for each binary task; other tasks are those of the method that it is made of."""

    voters: Mapping[str, list[Json]]
    source: Predictor

    def predictions(self, rows: NewRows, frame: pd.DataFrame, groups: dict[str, Tensor]) -> Predictions:
        """Return the expected decisions as scores."""
        return replace(decided_by(self.voters, self.source.predictions(frame), rows.encode(frame)), embeddings=None)


@dataclass(frozen=True, repr=False)
class Predictor:
    """A finished run's model for new rows; made by :func:`libmtl_fair.load`.

    Every method takes a table with the input columns of training, named as there: of pandas, polars, pyarrow, ..., or a file. Other
    columns are ignored, labels too. A category that training did not have counts as none of the known ones; this is said once,
    as a warning, and in :attr:`notes`. Thresholds per group (``post: thresholds``) may be random
    mixtures: they are drawn by the run's seed and a row's place in the table.

    Attributes
    ----------
    run_dir : Path
        The run.
    method, seed : str, int
        Whose model it is.
    rows : NewRows
        How rows are read: the encoding, groups' columns, units.
    thresholds : dict of str to float, or to list of float
        Binary task (or multilabel, one a label) -> the threshold in use: positive above it.
    needs : tuple of str
        Sensitive attributes that the method decides by: the table must have their columns.
    notes : list of str
        What the last table had that training did not; ``said``: of which there was a warning.
    """

    run_dir: Path
    method: str
    seed: int
    rows: NewRows
    thresholds: Held
    source: Network | Made | Reduced
    needs: tuple[str, ...] = ()
    dataset: str = ""
    notes: list[str] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Return the tasks, in order."""
        return self.rows.tasks

    @property
    def groups(self) -> dict[str, list[str]]:
        """Return attribute -> names of its groups, index = id."""
        return self.rows.groups

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the columns that a table must have; see also :attr:`needs`."""
        own = () if isinstance(self.source, Made) else self.rows.encoder.kinds
        return tuple(dict.fromkeys([*own, *(name for source in sources_of(self) for name in source.inputs)]))

    def predict(self, table: Source) -> pd.DataFrame:
        """Return one row a row of the table: ``<task>`` as :meth:`decide` gives it, and ``<task>/score``.

        The score is the audit score in [0, 1] of METHODS.md, section 0, as in a run's saved predictions: the probability of a positive
        decision, of the likeliest class or label; for a regression its value squashed by the reference's range.

        Raises
        ------
        DataError
            Columns that are missing, or values that do not fit those of training.
        """
        found = self.predictions(table)
        made: dict[str, Values] = {}
        for task in self.tasks:
            made |= self._decided(found, self.thresholds, task)
            made[f"{task.name}/score"] = found.scores[task.name].double().numpy()
        return pd.DataFrame(made, index=_index(table))

    def predict_proba(self, table: Source) -> pd.DataFrame:
        """Return the probabilities of classes, columns (task, class): 0 and 1 of a binary task, names of classes and labels.

        Regressions have none. Of a method that decides by thresholds per group these are scores that order people, no
        probabilities.
        """
        found, columns = self.predictions(table), dict[tuple[str, object], Values]()
        for task in self.tasks:
            values = task.probabilities(found.outputs[task.name]).double().numpy()
            if task.kind == "binary":
                columns |= {(task.name, 0): 1 - values, (task.name, 1): values}
            elif task.kind != "regression":
                columns |= {(task.name, name): part for name, part in zip(class_names(task), values.T)}
        index = pd.MultiIndex.from_tuples(columns, names=["task", "class"])
        return pd.DataFrame(dict(enumerate(columns.values())), index=_index(table)).set_axis(index, axis=1)

    def decide(self, table: Source, thresholds: Held | None = None) -> pd.DataFrame:
        """Return ``<task>`` a column: 0 or 1, the likeliest class's name, or a regression's value in native units.

        A multilabel task has its chosen labels, joined by ", ", and 0 or 1 under ``<task>/<label>``.

        Parameters
        ----------
        thresholds : dict of str to float, optional
            Task -> threshold in place of :attr:`thresholds`.

        Raises
        ------
        DataError
            A threshold for no binary or multilabel task; and as :meth:`predict`.
        """
        for name in thresholds or ():
            if name not in self.thresholds:
                raise DataError(f"thresholds: {unknown('task that a threshold decides', name, self.thresholds)}")
        found, cut, made = self.predictions(table), {**self.thresholds, **(thresholds or {})}, dict[str, Values]()
        for task in self.tasks:
            made |= self._decided(found, cut, task)
        return pd.DataFrame(made, index=_index(table))

    def embed(self, table: Source) -> NDArray[np.float32] | dict[str, NDArray[np.float32]]:
        """Return what the heads receive of each row, [N, d], or task -> [N, d] where tasks have representations of their own.

        Raises
        ------
        DataError
            The method is made of others after training, and has none.
        """
        found = self.predictions(table).embeddings
        if found is None:
            raise DataError(
                f"method {self.method!r} was made after training and has no representation; load one of those it is made of"
            )
        return {task: h.numpy() for task, h in found.items()} if isinstance(found, dict) else found.numpy()

    def predictions(self, table: Source) -> Predictions:
        """Return outputs, scores and groups of every row, for this package's own audits and metrics; labels are missing.

        Groups are those of the attributes whose columns the table has.
        """
        frame = read_frame(table, self.rows.missing_values)
        if (as_trained := renamed(self.dataset)) is not None:
            frame = as_trained(frame)
        groups = self.rows.group_ids(frame, self.needs)
        found = self.source.predictions(self.rows, frame, groups).rescored(self.tasks)
        self._note(frame, groups)
        return found

    def _note(self, frame: pd.DataFrame, groups: Mapping[str, Tensor]) -> None:
        held = [note for source in sources_of(self) for note in source.notes]
        own = self.rows.notes(frame) if isinstance(self.source, Network | Reduced) else []
        self.notes[:] = dict.fromkeys([*held, *own])
        for attribute in self.needs:
            strange = int((groups[attribute] < 0).sum())
            if strange:
                known = ", ".join(self.groups[attribute])
                self.notes.append(
                    f"{strange} of {len(frame)} rows have no known group of {attribute!r} (known: {known}); the method decides them "
                    "without one"
                )
        for note in self.notes:
            if note not in self.said:
                self.said.add(note)
                warnings.warn(note, stacklevel=4)

    def _decided(self, found: Predictions, thresholds: Held, task: Task) -> dict[str, Values]:
        values = task.probabilities(found.outputs[task.name])
        if task.kind == "regression":
            return {task.name: self.rows.native(task, values.numpy())}
        names = class_names(task)
        if task.kind == "multiclass":
            return {task.name: np.array(names, dtype=object)[values.argmax(-1).numpy()]}
        bar = torch.as_tensor(thresholds_in_use(found, thresholds)[task.name], dtype=values.dtype)
        chosen = (values > bar).numpy().astype(np.int64)
        if task.kind == "binary":
            return {task.name: chosen}
        listed = [", ".join(name for name, on in zip(names, row) if on) for row in chosen]
        each = {f"{task.name}/{name}": chosen[:, i] for i, name in enumerate(names)}
        return {task.name: np.array(listed, dtype=object), **each}

    def __repr__(self) -> str:
        """Return what the model is of, in a line a task."""
        tasks = "\n".join(
            f"  {t.name}: {t.kind}" + (f", positive above {self.thresholds[t.name]}" if t.kind == "binary" else "")
            for t in self.tasks
        )
        needs = f"; needs the groups of {', '.join(self.needs)}" if self.needs else ""
        who = f"Predictor({str(self.run_dir)!r}, method={self.method!r}, seed={self.seed})"
        return f"{who}: {len(self.inputs)} input columns{needs}\n{tasks}"


def sources_of(predictor: Predictor) -> tuple[Predictor, ...]:
    """Return the models that one is made of."""
    source = predictor.source
    return source.sources if isinstance(source, Made) else (source.source,) if isinstance(source, Reduced) else ()


def class_names(task: Task) -> tuple[str, ...]:
    """Return the names of a task's classes or labels; numbers where it has none."""
    named = task.classes if isinstance(task, Multiclass) else task.labels if isinstance(task, Multilabel) else None
    return named or tuple(map(str, range(task.out_features)))


def _no_labels(task: Task, n_rows: int) -> Tensor:
    if task.kind == "multiclass":
        return torch.full((n_rows,), IGNORE_INDEX)
    shape = (n_rows, task.out_features) if task.kind == "multilabel" else (n_rows,)
    return torch.full(shape, torch.nan)


def _index(table: object) -> pd.Index | None:
    return table.index if isinstance(table, pd.DataFrame) else None
