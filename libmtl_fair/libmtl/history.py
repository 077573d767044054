"""What happened in training: one row a step, kept on the device and read once an epoch."""

from __future__ import annotations

import csv
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from libmtl_fair.errors import DamagedFileError
from libmtl_fair.files import Json, append_text, write_text
from libmtl_fair.shown import printable

if TYPE_CHECKING:
    import pandas as pd

Floats: TypeAlias = npt.NDArray[np.float64]
Columns: TypeAlias = dict[str, npt.NDArray[np.generic]]
_NEEDED = "the checkpoint beside it goes on from them; put it back, or delete both to start afresh"


class StepLog:
    """Values of the steps of one epoch, on the device."""

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[int, Tensor | float]]] = {}
        self._rows: list[int | Sequence[int]] = []

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._rows)

    def add(self, values: Mapping[str, Tensor | float], rows: int | Sequence[int]) -> None:
        """Keep a step's values, numbers or tensors of any shape, and its rows for each task. Nothing is copied to the CPU."""
        for name, value in values.items():
            kept = value.detach() if isinstance(value, Tensor) else value
            self._values.setdefault(name, []).append((len(self._rows), kept))
        self._rows.append(rows)

    def read(self, tasks: Sequence[str], labels: Mapping[str, Sequence[str]] | None = None) -> dict[str, Floats]:
        """Return name -> a value a step; a vector with a number a task becomes ``<name>/<task>``. One transfer a name.

        ``labels`` : name -> what the numbers of another vector are called.
        """
        named = labels or {}
        columns: dict[str, Floats] = {}
        for name, kept in self._values.items():
            steps, values = zip(*kept)
            block = _block(values)
            full = np.full((len(self), block.shape[1]), np.nan)
            full[list(steps)] = block
            if not isinstance(values[0], Tensor) or values[0].dim() == 0:
                columns[name] = full[:, 0]
                continue
            given = named.get(name, tasks)
            each = given if len(given) == block.shape[1] else [str(i) for i in range(block.shape[1])]
            columns.update({f"{name}/{label}": full[:, i] for i, label in enumerate(each)})
        return columns

    def means(self, losses: Floats) -> Floats:
        """Return the means [T] of ``losses`` [steps, T] over the epoch's rows, as LibMTL's ``train_loss_buffer`` holds them."""
        rows = np.array([np.broadcast_to(count, losses.shape[1]) for count in self._rows], dtype=np.float64)
        means: Floats = (losses * rows).sum(0) / rows.sum(0)
        return means


def _block(values: Sequence[Tensor | float]) -> Floats:
    """Return values of one shape, flattened, as rows; a name's may be numbers in some steps and tensors in others."""
    if all(isinstance(value, float) for value in values):
        return np.array(values)[:, None]
    block: Floats = torch.stack([torch.as_tensor(v).reshape(-1) for v in values]).double().cpu().numpy()
    return block


class History:
    """All steps so far. Columns ``epoch, step, loss/<task>``, a weighting's traces; epoch results on an epoch's last row.

    On disk it is a CSV file with every digit, to which epochs are appended; a checkpoint keeps the number of its rows and a chained
    digest of their values.
    """

    def __init__(self, frame: pd.DataFrame | None = None) -> None:
        self._frames: list[pd.DataFrame] = []
        self._new: list[Columns] = []
        self._names: dict[str, None] = {}  # in the order of their first epoch
        self._steps, self._digest = 0, ""
        self._saved = (0, 0, -1)  # rows, columns and bytes of the file
        if frame is not None:
            self._frames = [frame]
            for _, block in frame.groupby("epoch", sort=False):
                self._count({str(name): values.to_numpy() for name, values in block.items()})

    def add_epoch(self, epoch: int, steps: Mapping[str, Floats], results: Mapping[str, float]) -> None:
        """Append an epoch's steps, name -> [steps]; ``results`` go on its last row."""
        count = len(next(iter(steps.values())))
        last = {name: np.append(np.full(count - 1, np.nan), value) for name, value in results.items()}
        numbers = np.arange(self._steps, self._steps + count)
        self._new.append({"epoch": np.full(count, epoch), "step": numbers, **steps, **last})
        self._count(self._new[-1])

    def _count(self, block: Columns) -> None:
        """Take note of an epoch: its rows, its columns, and the digest of its values, of whatever is not all missing."""
        self._steps += len(block["step"])
        self._names.update(dict.fromkeys(block))
        found = hashlib.sha256(self._digest.encode())
        for name, values in sorted(block.items()):
            numbers = np.asarray(values, dtype=np.float64)
            if not (missing := np.isnan(numbers)).all():
                found.update(name.encode() + np.where(missing, np.nan, numbers).tobytes())
        self._digest = found.hexdigest()

    @property
    def frame(self) -> pd.DataFrame:
        """One row a step."""
        import pandas as pd

        if self._new:
            self._frames = [pd.concat([*self._frames, *map(pd.DataFrame, self._new)], ignore_index=True)]
            self._new = []
        return self._frames[0].copy() if self._frames else pd.DataFrame({"epoch": [], "step": []}).astype(np.int64)

    @property
    def epochs(self) -> pd.DataFrame:
        """One row an epoch: means over steps, and the epoch's results."""
        return self.frame.drop(columns="step").groupby("epoch", as_index=False).mean()

    def write(self, path: Path) -> None:
        """Bring a CSV file up to date: the last epoch is appended; a new column, or a file of somebody else, has it written whole."""
        import pandas as pd

        rows, columns, size = self._saved
        whole = columns < len(self._names) or not path.exists() or path.stat().st_size != size
        block = self._new[-1] if self._new and rows + len(self._new[-1]["step"]) == self._steps else None
        if whole or (block is None and rows < self._steps):
            write_text(path, printable(self.frame.to_csv(index=False)))
        elif block is not None:
            append_text(path, pd.DataFrame(block).reindex(columns=list(self._names)).to_csv(index=False, header=False))
        self._saved = self._steps, len(self._names), path.stat().st_size

    def state_dict(self) -> dict[str, list[str] | int | str]:
        """Return what tells whether a file holds this history, see :meth:`read`."""
        return {"names": list(self._names), "rows": self._steps, "digest": self._digest}

    @classmethod
    def read(cls, path: Path, state: Json) -> History:
        """Return the history that :meth:`state_dict` spoke of: the first rows of a file; later ones are cut off in its next writing.

        Raises
        ------
        DamagedFileError
            The file does not hold it.
        """
        import pandas as pd

        if "values" in state:  # format 1 of checkpoints held it itself
            frame = pd.DataFrame(state["values"].cpu().numpy(), columns=state["columns"])
            return cls(frame.astype({"epoch": np.int64, "step": np.int64}))
        names, rows = list(state["names"]), state["rows"]
        try:
            with open(path, newline="", encoding="utf-8") as stream:  # pandas' own reader does not promise every digit
                kept = itertools.islice(csv.reader(stream), 1, rows + 1)
                values = [[float(cell) if cell else np.nan for cell in row[: len(names)]] for row in kept]
            frame = pd.DataFrame(np.array(values, dtype=np.float64), columns=names)
            found = cls(frame)
        except (OSError, ValueError, csv.Error) as error:
            raise DamagedFileError(f"{path} cannot be read ({error}), and {_NEEDED}") from error
        if found._digest != state["digest"]:
            raise DamagedFileError(f"{path} does not hold the {rows} steps of training so far, and {_NEEDED}")
        found._frames = [frame.astype({"epoch": np.int64, "step": np.int64})]
        return found
