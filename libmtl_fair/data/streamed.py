"""Batches of examples that are read when they are needed: images, dense labels, series; nothing has to fit in memory.

Labels and groups of whole examples are a table as everywhere; a :class:`Reader` adds the input of a row and, where they are in files
too, its labels of some tasks.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from libmtl_fair.data.loader import REFERENCE, SENSITIVE, Batch, Resumable, collate, epoch_order, resolve_device
from libmtl_fair.errors import DataError
from libmtl_fair.processes import current

_MOST_AT_ONCE = 2**22
"""Input values of a batch, at most, where nothing is trained."""
_PASSED_ON = "DataError: "


class Reader(Protocol):
    """What reads one example; a plain object that can be pickled, for workers.

    A reader that knows by what its examples are alike may have ``alike(rows) -> ndarray [N, r]`` and ``alike_by``, words for it; one
    that can show an example with another sensitive value ``flips() -> {attribute: reader}``; one whose training examples are changed at
    random ``augmented(row, tasks, seed)``, which gives what ``read`` does, the same for the same seed.

    Attributes
    ----------
    shape : tuple of int
        Of one input.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one input."""

    def read(self, row: int, tasks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the input of a row of the source table and its labels of those ``tasks``, which are in files; DataError where damaged."""


class Augmenting(Reader, Protocol):
    """A reader that can change an example at random."""

    def augmented(self, row: int, tasks: Sequence[str], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what :meth:`read` does, changed by draws from the seed."""


class FileRows(Dataset[Batch]):
    """Rows ``(x, labels)`` that a reader reads, for FileLoader or a DataLoader of one's own; ``rows[index, seed]`` is augmented.

    Parameters
    ----------
    reader : Reader
        Reads inputs, and the labels of the tasks in ``filed``.
    rows : Tensor
        int64 [N], which rows of the source table.
    labels, groups : mapping of str to Tensor
        {task: [N, ...]} and {attribute: int64 [N]}, of whole examples; they stay in memory.
    filed : sequence of str, default ()
        Tasks whose labels the reader gives.
    group_names : mapping of str to sequence of str, optional
        {attribute: names}, index = id.
    """

    def __init__(
        self,
        reader: Reader,
        rows: Tensor,
        labels: Mapping[str, Tensor],
        groups: Mapping[str, Tensor],
        *,
        filed: Sequence[str] = (),
        group_names: Mapping[str, Sequence[str]] | None = None,
        reference: Tensor | None = None,
    ) -> None:
        self.reader, self.rows, self.filed = reader, rows, tuple(filed)
        self.labels, self.groups, self.reference = dict(labels), dict(groups), reference
        self.group_names = {name: list(names) for name, names in (group_names or {}).items()}
        self.n_groups = {name: len(names) for name, names in self.group_names.items()}

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, place: int | tuple[int, int]) -> Batch:
        """Return one row; with a seed beside its number what the reader makes of it at random."""
        index, *seed = place if isinstance(place, tuple) else (place,)
        row = int(self.rows[index])
        if seed:
            x, found = cast(Augmenting, self.reader).augmented(row, self.filed, seed[0])
        else:
            x, found = self.reader.read(row, self.filed)
        labels: dict[str, object] = {task: values[index] for task, values in self.labels.items()}
        labels |= found
        labels[SENSITIVE] = {attribute: ids[index] for attribute, ids in self.groups.items()}
        if self.reference is not None:
            labels[REFERENCE] = self.reference[index]
        return x, labels


class FileLoader(Resumable):
    """Yield ``(x, labels)`` batches of rows that are read when they are needed, in the order that ResidentLoader would have.

    Epoch e's order depends on ``(seed, e)`` only, so that training goes on exactly where it was interrupted; in several
    processes each reads its share of every batch.

    Parameters
    ----------
    rows : FileRows
        What to read.
    batch_size : int
        Rows a batch, of all processes together; without ``shuffle`` fewer where their inputs would be large.
    shuffle : bool
        A new order every epoch.
    seed : int, optional
        Of the order.
    device : str or torch.device, default "auto"
        Of the order, and whether batches are pinned for it; batches stay on the CPU.
    drop_last : bool, default False
        Leave out the last batch if it is not full.
    workers : int, default 0
        Processes that read ahead; 0 reads in this one.
    augment : bool, default False
        Rows are changed at random by the reader, anew every epoch: by ``(seed, e)`` and the row.

    Raises
    ------
    DataError
        No row, or a file that is missing or damaged, when it is read.
    """

    def __init__(
        self,
        rows: FileRows,
        batch_size: int,
        shuffle: bool = False,
        seed: int | None = None,
        device: str | torch.device = "auto",
        drop_last: bool = False,
        workers: int = 0,
        augment: bool = False,
    ) -> None:
        self.augment = augment
        self.dataset, self.n_rows, self.shuffle, self.drop_last = rows, len(rows), shuffle, drop_last
        if not shuffle:
            batch_size = max(1, min(batch_size, _MOST_AT_ONCE // max(1, math.prod(rows.reader.shape))))
        self.batch_size, self.epoch = batch_size, 0
        self.seed = int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed
        if len(self) == 0:
            raise DataError(f"no batch: {self.n_rows} rows, batch_size={batch_size} and drop_last={drop_last}")
        self.group_names, self.n_groups = rows.group_names, rows.n_groups
        pinned = resolve_device(device).type == "cuda"
        self._batches = DataLoader(
            rows, batch_sampler=_Batches(self), num_workers=workers, collate_fn=collate, pin_memory=pinned
        )

    def __len__(self) -> int:
        """Return the number of batches an epoch."""
        full, rest = divmod(self.n_rows, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Batch]:
        """Start an epoch of its own."""
        try:
            yield from self._batches
        except DataError as error:  # a worker's comes with its traceback as text
            raise DataError(str(error).rpartition(_PASSED_ON)[2].strip()) from error

    def indices(self) -> Iterator[list[int]]:
        """Yield which rows each batch of the coming epoch holds; of several processes, this one's share."""
        cpu, shares = torch.device("cpu"), current()
        order = (
            epoch_order(self.seed, self.epoch, self.n_rows, cpu).tolist() if self.shuffle else list(range(self.n_rows))
        )
        self.epoch += 1
        for number in range(len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            n, rank, size = (len(batch), 0, 1) if shares is None else (len(batch), shares.rank, shares.size)
            yield batch[n * rank // size : n * (rank + 1) // size]


class _Batches:
    """A loader's batches as torch's DataLoader asks for them."""

    def __init__(self, loader: FileLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[int] | list[tuple[int, int]]]:
        loader, epoch = self.loader, self.loader.epoch
        for batch in loader.indices():
            yield [(row, _mixed(loader.seed, epoch, row)) for row in batch] if loader.augment else batch

    def __len__(self) -> int:
        return len(self.loader)


def _mixed(*numbers: int) -> int:
    """Return a seed that hangs on all of the numbers."""
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0])


def load_array(path: Path, dims: int, what: str) -> NDArray[np.float32]:
    """Return a .npy file as float32; DataError where it is missing, damaged, of other dimensions or holds Python objects."""
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing ({what}); copy it from the source again") from error
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no readable .npy file ({what}): {error}; copy it from the source again") from error
    if not isinstance(found, np.ndarray) or found.ndim != dims or found.dtype.kind not in "fiub" or not found.size:
        shape = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
        raise DataError(f"{path}: expected numbers in {dims} dimensions ({what}), found {shape}")
    with np.errstate(over="ignore"):  # what becomes infinite is told as such
        return found.astype(np.float32)
