"""What loading gives: three splits of tensors, the tasks, the groups' names, a data card; and how it is made."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from libmtl_fair.data import cache
from libmtl_fair.data.blocks import BlockLoader
from libmtl_fair.data.card import Card, card_markdown, dataset_card
from libmtl_fair.data.features import FeatureEncoder, feature_kinds, fit_encoder
from libmtl_fair.data.flips import Twins, fit_twins
from libmtl_fair.data.labels import make_task
from libmtl_fair.data.loader import ResidentLoader, TableDataset
from libmtl_fair.data.new_rows import NewRows, fit_new_rows
from libmtl_fair.data.reference import Reference, fit_reference
from libmtl_fair.data.selection import PARTS, Choice, read_table
from libmtl_fair.data.spec import TableSpec
from libmtl_fair.data.streamed import FileLoader, FileRows, Reader
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.summaries import Lines, Summarised, listed, shares
from libmtl_fair.tasks import Task


@dataclass(frozen=True)
class Split:
    """One part of a dataset, on the CPU.

    Attributes
    ----------
    x : Tensor
        float32 [N, F].
    labels : dict of str to Tensor
        {task: [N] or [N, C]}; NaN or -100 where missing; regression targets in units of the training part.
    groups : dict of str to Tensor
        {attribute: int64 [N]}; -1 where not known.
    rows : Tensor
        int64 [N], position of each row in the source table.
    group_names : dict of str to list of str
        {attribute: names}, index = id.
    feature_names : tuple of str, default ()
        Of the columns of ``x``.
    reference : Reference, optional
        Which columns make the reference features, by which people are alike; None for none.
    twins : Twins, optional
        How the inputs become those of people with another sensitive value; None where no input shows one.
    reader : Reader, optional
        Reads the inputs where they are in files; ``x`` then has no column.
    filed : tuple of str, default ()
        Tasks whose labels the reader gives, too.
    workers : int, default 0
        Processes that read ahead of a loader.
    augment : bool, default False
        Whether a loader that shuffles has the reader change each example at random.
    maps : tuple of mmap, default ()
        The files that the tensors are read from, as they are looked at; none where they are in memory.
    """

    x: Tensor
    labels: dict[str, Tensor]
    groups: dict[str, Tensor]
    rows: Tensor
    group_names: dict[str, list[str]]
    feature_names: tuple[str, ...] = ()
    reference: Reference | None = None
    twins: Twins | None = None
    reader: Reader | None = None
    filed: tuple[str, ...] = ()
    workers: int = 0
    augment: bool = False
    maps: tuple[mmap.mmap, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.x.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one input."""
        return tuple(self.x.shape[1:]) if self.reader is None else self.reader.shape

    def only(self, tasks: Sequence[str]) -> Split:
        """Return the part with the labels of some tasks only."""
        labels = {name: values for name, values in self.labels.items() if name in tasks}
        return replace(self, labels=labels, filed=tuple(name for name in self.filed if name in tasks))

    def loader(
        self,
        batch_size: int,
        shuffle: bool = False,
        seed: int | None = None,
        device: str | torch.device = "auto",
        drop_last: bool = False,
    ) -> ResidentLoader | FileLoader:
        """Return a loader of this part: on the device, reading files as it goes, or what was prepared on disk by blocks."""
        if self.reader is not None:
            rows, augment = self._read_by(self.reader), self.augment and shuffle
            return FileLoader(rows, batch_size, shuffle, seed, device, drop_last, self.workers, augment)
        kind = partial(BlockLoader, maps=self.maps) if self.maps else ResidentLoader
        return kind(
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
            reference=self.reference,
            twins=self.twins,
        )

    def torch_dataset(self) -> TableDataset | FileRows:
        """Return the same rows for an ordinary ``torch.utils.data.DataLoader``."""
        if self.reader is not None:
            return self._read_by(self.reader)
        return TableDataset(self.x, self.labels, self.groups, group_names=self.group_names, reference=self.reference)

    def _read_by(self, reader: Reader) -> FileRows:
        names = self.group_names
        return FileRows(reader, self.rows, self.labels, self.groups, filed=self.filed, group_names=names)


@dataclass(frozen=True, repr=False)
class Dataset(Summarised):
    """A table made ready for multi-task training.

    Attributes
    ----------
    name : str
        Of the dataset.
    train, val, test : Split
        Its parts.
    tasks : tuple of Task
        In the order chosen.
    groups : dict of str to list of str
        {attribute: names of its groups}, index = id.
    card : Card
        What the data are, as plain values ready for JSON.
    encoder : FeatureEncoder
        The fitted encoding of the inputs.
    tell_tale : dict of str to tuple of str
        {attribute: source columns that show it}, inputs or not.
    new_rows : NewRows
        How rows of other tables are read, for models in use.
    prepared : tuple of Path and str, optional
        The folder on disk that the parts are mapped from, and of what it was made; None where they are in memory.
    """

    name: str
    train: Split
    val: Split
    test: Split
    tasks: tuple[Task, ...]
    groups: dict[str, list[str]]
    feature_names: tuple[str, ...]
    card: Card
    new_rows: NewRows
    tell_tale: dict[str, tuple[str, ...]] = field(default_factory=dict)
    prepared: tuple[Path, str] | None = None

    @property
    def encoder(self) -> FeatureEncoder:
        """Return the fitted encoding of the inputs."""
        return self.new_rows.encoder

    @property
    def n_features(self) -> int:
        """Return the number of columns of ``x``."""
        return len(self.feature_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of one input."""
        return self.train.shape

    @property
    def task_names(self) -> tuple[str, ...]:
        """Return the names of the tasks, in order."""
        return tuple(task.name for task in self.tasks)

    @property
    def reference(self) -> Reference | None:
        """Return which columns make the reference features; None where none is left."""
        return self.train.reference

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the source columns that the inputs are made of."""
        return tuple(self.encoder.kinds)

    def _summary(self) -> tuple[str, Lines]:
        sizes = ", ".join(f"{len(split):,} {part}" for part, split in self.splits().items())
        lines = [
            ("rows", sizes),
            ("inputs", f"{listed(self.inputs)}; {self.n_features} columns encoded")
            if self.train.reader is None
            else ("inputs", f"read from files, {' x '.join(map(str, self.input_shape))}"),
            *((f"task {task.name}", _about(task, self.card["tasks"][task.name])) for task in self.tasks),
        ]
        for attribute, entry in self.card["groups"].items():
            counts = {name: group["rows"] for name, group in entry["groups"].items()}
            unknown = len(self.train) + len(self.val) + len(self.test) - sum(counts.values())
            lines.append(
                (f"groups of {attribute}", shares(counts) + (f"; {unknown:,} rows unknown" if unknown > 0 else ""))
            )
        return f"Dataset {self.name}: {self.card['title']}", lines

    def task(self, name: str) -> Task:
        """Return one task by name.

        Raises
        ------
        DataError
            No such task.
        """
        if name not in self.task_names:
            raise DataError(unknown("task", name, self.task_names))
        return self.tasks[self.task_names.index(name)]

    def splits(self) -> dict[str, Split]:
        """Return the parts by name."""
        return {"train": self.train, "val": self.val, "test": self.test}

    def encode(self, frame: pd.DataFrame) -> Tensor:
        """Return the inputs of new rows, float32 [N, F]."""
        return torch.from_numpy(self.encoder.encode(frame))

    def unaware(self) -> Dataset:
        """Return the data without the inputs that show a sensitive attribute, and without what is one-hot of them.

        What was prepared on disk is written there once more, without these columns.

        Raises
        ------
        DataError
            No input is left.
        """
        shown = {column for columns in self.tell_tale.values() for column in columns}
        encoder = self.encoder.without(shown)
        kept = [i for i, name in enumerate(self.encoder.sources) if name not in shown]
        if not kept:
            raise DataError(
                f"dataset {self.name!r}: every input shows a sensitive attribute ({', '.join(sorted(shown))})"
            )
        reference = self.train.reference  # its columns are among those that stay
        if reference is not None:
            reference = replace(reference, columns=tuple(kept.index(i) for i in reference.columns))
        names = encoder.names
        train, val, test = (
            replace(self._narrowed(part, kept), feature_names=names, reference=reference, twins=None) for part in PARTS
        )
        seen = replace(self.new_rows, encoder=encoder)
        return replace(self, train=train, val=val, test=test, feature_names=names, new_rows=seen)

    def _narrowed(self, part: str, kept: list[int]) -> Split:
        """Return a part with some columns of its inputs."""
        split: Split = getattr(self, part)
        if not split.maps or self.prepared is None:
            return replace(split, x=split.x[:, kept])
        x, maps = cache.columns(*self.prepared, part, split.x, kept)
        return replace(split, x=x, maps=(*split.maps, *maps))

    def card_markdown(self) -> str:
        """Return the data card as Markdown."""
        return card_markdown(self.card)


def _about(task: Task, card: Card) -> str:
    """Return a task's kind and what its labels are like."""
    if "n" not in card:
        return f"{task.kind}, labels in files"
    if task.kind == "regression":
        what = f", mean {card['mean']:.4g}, standard deviation {card['std']:.4g}" if "mean" in card else ""
    elif task.kind == "binary":
        what = f", {card['rate']:.1%} positive" if "rate" in card else ""
    else:
        words = {"multiclass": "classes", "multilabel": "labels"}
        what = f", {task.out_features} {words[task.kind]}" if task.kind in words else ""
    return f"{task.kind}{what}" + (f"; {card['missing']:,} rows without a label" if card.get("missing") else "")


def build_dataset(
    spec: TableSpec, frame: pd.DataFrame, choice: Choice, fitted: FeatureEncoder | None = None
) -> Dataset:
    """Return the dataset that ``choice`` asks for: rows, labels, groups, splits, inputs, card, in this order.

    The inputs are encoded as they were ``fitted``; without it, on the training part.
    """
    table = read_table(spec, frame, choice)
    parts = table.parts()
    made = {item.name: make_task(item, parts["train"]) for item in table.labels}
    if fitted is None:
        kinds = feature_kinds(table.frame, table.inputs, spec.kinds)
        encoder, x = fit_encoder(table.frame, parts["train"], kinds, choice.min_frequency, choice.max_categories)
    else:
        encoder, x = fitted, fitted.encode(table.frame)
    names = {item.attribute: list(item.names) for item in table.groups}
    training = parts["train"]
    known = {item.attribute: item.ids[training] for item in table.groups}
    reference = fit_reference(encoder, x[training], known, table.tell_tale)
    card = dataset_card(table, frame, parts, encoder)
    twins = fit_twins(
        encoder.sources,
        torch.from_numpy(x[training]),
        {name: torch.from_numpy(ids) for name, ids in known.items()},
        {name: len(each) for name, each in names.items()},
        table.tell_tale,
        {name: entry["column"] for name, entry in card["groups"].items()},
    )
    splits = {
        part: Split(
            x=torch.from_numpy(x[rows]),
            labels={task: torch.from_numpy(values[rows]) for task, (_, values) in made.items()},
            groups={item.attribute: torch.from_numpy(item.ids[rows]) for item in table.groups},
            rows=torch.from_numpy(table.rows[rows]),
            group_names=names,
            feature_names=encoder.names,
            reference=reference,
            twins=twins,
        )
        for part, rows in parts.items()
    }
    return Dataset(
        name=spec.name,
        **splits,
        tasks=tuple(task for task, _ in made.values()),
        groups=names,
        feature_names=encoder.names,
        card=card,
        new_rows=fit_new_rows(table, encoder, tuple(task for task, _ in made.values())),
        tell_tale={name: tuple(sorted(columns)) for name, columns in table.tell_tale.items()},
        prepared=None,
    )
