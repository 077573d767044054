"""What happened in training: one row a step, kept on the device and read once an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor


class StepLog:
    """Values of the steps of one epoch, on the device."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = {}
        self._steps: dict[str, list[int]] = {}
        self._rows: list[Sequence[int]] = []
        self.steps = 0

    def add(self, values: Mapping[str, Tensor | float], rows: Sequence[int]) -> None:
        """Keep a step's values, numbers or tensors of any shape, and its rows for each task. Nothing is copied to the CPU."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)
            self._steps.setdefault(name, []).append(self.steps)
        self._rows.append(rows)
        self.steps += 1

    def read(self, tasks: Sequence[str]) -> pd.DataFrame:
        """Return one row a step; a vector with a number a task becomes columns ``<name>/<task>``. One transfer a name."""
        columns: dict[str, Any] = {}
        for name, values in self._values.items():
            block = _block(values)
            full = np.full((self.steps, block.shape[1]), np.nan)
            full[self._steps[name]] = block
            if not isinstance(values[0], Tensor) or values[0].dim() == 0:
                columns[name] = full[:, 0]
                continue
            labels = tasks if len(tasks) == block.shape[1] else [str(i) for i in range(block.shape[1])]
            columns.update({f"{name}/{label}": full[:, i] for i, label in enumerate(labels)})
        return pd.DataFrame(columns, index=range(self.steps))

    def means(self, losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the means [T] of ``losses`` [steps, T] over the epoch's rows, as LibMTL's ``train_loss_buffer`` holds them."""
        rows = np.asarray(self._rows, dtype=np.float64)
        means: npt.NDArray[np.float64] = (losses * rows).sum(0) / rows.sum(0)
        return means


def _block(values: Sequence[Tensor | float]) -> npt.NDArray[np.float64]:
    """Return values of one shape, flattened, as rows; a name's may be numbers in some steps and tensors in others."""
    if all(isinstance(value, float) for value in values):
        return np.array(values)[:, None]
    block: npt.NDArray[np.float64] = (
        torch.stack([torch.as_tensor(v).reshape(-1) for v in values]).double().cpu().numpy()
    )
    return block


class History:
    """All steps so far. Columns ``epoch, step, loss/<task>``, a weighting's traces; epoch results on an epoch's last row."""

    def __init__(self, frame: pd.DataFrame | None = None) -> None:
        self._parts = [] if frame is None else [frame]

    def add_epoch(self, epoch: int, steps: pd.DataFrame, results: Mapping[str, float]) -> None:
        """Append an epoch's steps; ``results`` go on its last row."""
        first = sum(len(part) for part in self._parts)
        rows = pd.DataFrame({"epoch": epoch, "step": range(first, first + len(steps))})
        part = pd.concat([rows, steps.reset_index(drop=True)], axis=1)
        last = part.index == len(part) - 1
        extra = {name: np.where(last, value, np.nan) for name, value in results.items()}
        self._parts.append(pd.concat([part, pd.DataFrame(extra, index=part.index)], axis=1))

    @property
    def frame(self) -> pd.DataFrame:
        """One row a step."""
        if len(self._parts) > 1:
            self._parts = [pd.concat(self._parts, ignore_index=True)]
        return self._parts[0].copy() if self._parts else pd.DataFrame({"epoch": [], "step": []})

    @property
    def epochs(self) -> pd.DataFrame:
        """One row an epoch: means over steps, and the epoch's results."""
        return self.frame.drop(columns="step").groupby("epoch", as_index=False).mean()

    def to_csv(self) -> str:
        """Return the frame as CSV text with every digit."""
        return str(self.frame.to_csv(index=False))

    def state_dict(self) -> dict[str, Any]:
        """Return the frame as names and one float64 matrix [rows, columns]: exact, and plain enough for a checkpoint."""
        frame = self.frame
        return {"columns": list(frame.columns), "values": torch.from_numpy(frame.to_numpy(dtype=np.float64, copy=True))}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """Read what :meth:`state_dict` gave."""
        frame = pd.DataFrame(state["values"].cpu().numpy(), columns=state["columns"])
        return cls(frame.astype({"epoch": np.int64, "step": np.int64}))
