"""What happened in training: one row a step, kept on the device and read once an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

Floats: TypeAlias = npt.NDArray[np.float64]


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
    """All steps so far. Columns ``epoch, step, loss/<task>``, a weighting's traces; epoch results on an epoch's last row."""

    def __init__(self, frame: pd.DataFrame | None = None) -> None:
        self._frames = [] if frame is None else [frame]
        self._new: list[dict[str, npt.NDArray[np.generic]]] = []
        self._steps = 0 if frame is None else len(frame)

    def add_epoch(self, epoch: int, steps: Mapping[str, Floats], results: Mapping[str, float]) -> None:
        """Append an epoch's steps, name -> [steps]; ``results`` go on its last row."""
        count = len(next(iter(steps.values())))
        last = {name: np.append(np.full(count - 1, np.nan), value) for name, value in results.items()}
        numbers = np.arange(self._steps, self._steps + count)
        self._new.append({"epoch": np.full(count, epoch), "step": numbers, **steps, **last})
        self._steps += count

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

    def to_csv(self) -> str:
        """Return the frame as CSV text with every digit."""
        return str(self.frame.to_csv(index=False))

    def state_dict(self) -> dict[str, list[str] | Tensor]:
        """Return the frame as names and one float64 matrix [rows, columns]: exact, and plain enough for a checkpoint."""
        frame = self.frame
        return {"columns": list(frame.columns), "values": torch.from_numpy(frame.to_numpy(dtype=np.float64, copy=True))}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """Read what :meth:`state_dict` gave."""
        import pandas as pd

        frame = pd.DataFrame(state["values"].cpu().numpy(), columns=state["columns"])
        return cls(frame.astype({"epoch": np.int64, "step": np.int64}))
