"""What is wrong with values that lie on a device: noted without waiting for it, and said in words."""

from __future__ import annotations

import torch
from torch import Tensor

from libmtl_fair.errors import DataError
from libmtl_fair.tasks import Task

MOST_GROUPS = 100_000
"""Groups of one attribute, at most: ids are counted up, so that a larger one would take memory for all below it."""


def need_few_groups(what: str, count: int) -> None:
    """Raise DataError for more than :data:`MOST_GROUPS` groups."""
    if count > MOST_GROUPS:
        raise DataError(
            f"{what}: found id {count - 1}; ids are 0..G-1, and at most {MOST_GROUPS:,} groups can be told apart: number the "
            "groups anew (numpy.unique with return_inverse=True), or bin the values"
        )


def check_labels(faults: Faults, task: Task, labels: Tensor) -> None:
    """Note labels that are none of the task's kind."""
    if not isinstance(labels, Tensor):
        raise DataError(
            f"task {task.name!r}: labels must be a tensor, found {type(labels).__name__}: torch.as_tensor(labels)"
        )
    if labels.is_complex():
        raise DataError(f"task {task.name!r} ({task.kind}): labels are {labels.dtype}; expected {task.labels_are}")
    faults.note(task.wrong(labels), labels, f"task {task.name!r} ({task.kind}): labels", task.labels_are)


class Faults:
    """Values that should not be there. On the CPU they are refused at once; elsewhere :meth:`check` says what came first.

    Parameters
    ----------
    at_once : bool
        False: also on the CPU only :meth:`check` says it.

    Examples
    --------
    >>> labels = torch.tensor([0.0, 5.0, 1.0])
    >>> Faults().note(labels > 1, labels, "task 'income': labels", "0 or 1")
    Traceback (most recent call last):
    libmtl_fair.errors.DataError: task 'income': labels: found 5 in row 1; expected 0 or 1
    """

    def __init__(self, at_once: bool = True) -> None:
        self.at_once = at_once
        self._noted: dict[tuple[str, str], Tensor] = {}

    def note(self, wrong: Tensor, values: Tensor, what: str, expected: str) -> None:
        """Note the values that are wrong.

        Parameters
        ----------
        wrong : Tensor
            Bool [N, ...], as ``values``.
        values : Tensor
            What was found.
        what, expected : str
            Whose values they are, and what should have been there.

        Raises
        ------
        DataError
            On the CPU, where any is wrong.
        """
        if wrong.is_cpu and self.at_once:
            if bool(wrong.any()):
                raise _fault(what, expected, _first(wrong, values))
        elif not wrong.is_meta:
            key, found = (what, expected), _first(wrong, values)
            noted = self._noted.get(key)
            self._noted[key] = found if noted is None else torch.where(noted[0] > 0, noted, found)

    def merge(self, other: Faults) -> None:
        """Add what another has noted."""
        self._noted = {**other._noted, **self._noted}

    def check(self) -> None:
        """Raise DataError for what was noted; waits for the device, where there is something to wait for."""
        noted, self._noted = self._noted, {}
        for (what, expected), found in noted.items():
            if found[0] > 0:
                raise _fault(what, expected, found)


def _first(wrong: Tensor, values: Tensor) -> Tensor:
    """Return how many are wrong, the first of them and its row, float64 [3]."""
    flat = wrong.reshape(-1)
    position = flat.int().argmax()
    value = values.reshape(-1).take(position)
    width = max(len(flat) // max(len(wrong), 1), 1)
    return torch.stack([flat.sum().double(), value.double(), (position // width).double()])


def _fault(what: str, expected: str, found: Tensor) -> DataError:
    count, value, row = found.tolist()
    others = f" ({count:.0f} such values in all)" if count > 1 else ""
    shown = f"{value:.0f}" if value == round(value, 0) and abs(value) < 1e18 else f"{value:g}"
    return DataError(f"{what}: found {shown} in row {row:.0f}{others}; expected {expected}")
