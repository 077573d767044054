"""The 17 clinical variables of mimic3-benchmarks, and its discretiser and normaliser: events of a stay -> steps of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from libmtl_fair.errors import DataError

Floats = NDArray[np.float32]

CATEGORIES: dict[str, tuple[str, ...]] = {
    "Capillary refill rate": ("0.0", "1.0"),
    "Glascow coma scale eye opening": (
        "To Pain", "3 To speech", "1 No Response", "4 Spontaneously", "None", "To Speech", "Spontaneously", "2 To pain",
    ),
    "Glascow coma scale motor response": (
        "1 No Response", "3 Abnorm flexion", "Abnormal extension", "No response", "4 Flex-withdraws", "Localizes Pain",
        "Flex-withdraws", "Obeys Commands", "Abnormal Flexion", "6 Obeys Commands", "5 Localizes Pain", "2 Abnorm extensn",
    ),
    "Glascow coma scale total": ("11", "10", "13", "12", "15", "14", "3", "5", "4", "7", "6", "9", "8"),
    "Glascow coma scale verbal response": (
        "1 No Response", "No Response", "Confused", "Inappropriate Words", "Oriented", "No Response-ETT", "5 Oriented",
        "Incomprehensible sounds", "1.0 ET/Trach", "4 Confused", "2 Incomp sounds", "3 Inapprop words",
    ),
}  # fmt: skip
"""Values of the categorical channels, in the order of the benchmark's columns (its spelling, too)."""

NORMAL = {
    "Capillary refill rate": "0.0",
    "Diastolic blood pressure": "59.0",
    "Fraction inspired oxygen": "0.21",
    "Glascow coma scale eye opening": "4 Spontaneously",
    "Glascow coma scale motor response": "6 Obeys Commands",
    "Glascow coma scale total": "15",
    "Glascow coma scale verbal response": "5 Oriented",
    "Glucose": "128.0",
    "Heart Rate": "86",
    "Height": "170.0",
    "Mean blood pressure": "77.0",
    "Oxygen saturation": "98.0",
    "Respiratory rate": "19",
    "Systolic blood pressure": "118.0",
    "Temperature": "36.6",
    "Weight": "81.0",
    "pH": "7.4",
}
"""Channels in order, and the value that stands where none was measured before."""

COLUMNS = (
    *(f"{name}->{value}" if value else name for name in NORMAL for value in CATEGORIES.get(name, ("",))),
    *(f"mask->{name}" for name in NORMAL),
)
"""Names of the 76 numbers of a step."""

CONTINUOUS = tuple(i for i, name in enumerate(COLUMNS) if "->" not in name)
"""Columns that the normaliser shifts and scales."""

_EPS = 1e-6


def discretised(
    events: Sequence[Sequence[str]], header: Sequence[str], hours: float, timestep: float, where: str
) -> Floats:
    """Return the steps of a stay, float32 [n, 76]: the last value of each step, else the one before, else the normal one; and masks.

    Parameters
    ----------
    events : sequence of sequence of str
        Rows of an episode's file: hours since admission, then a text or nothing for each channel of ``header``.
    header : sequence of str
        "Hours" and the channels.
    hours : float
        How long the series is; n is ``hours / timestep``, rounded up. Later events are left out.
    timestep : float
        Hours of a step.
    where : str
        The file, for messages.

    Raises
    ------
    DataError
        A value that is none of its channel's, or no number; an event before admission, or before the one above it.
    """
    n = int(hours / timestep + 1.0 - _EPS)
    places = [header.index(name) for name in NORMAL]
    held: list[list[str]] = [[""] * len(NORMAL) for _ in range(n)]
    before = 0.0
    for line, row in enumerate(events, 2):
        time = _number(row[0], where, line, "Hours")
        if time < -_EPS:
            raise DataError(f"{where}: line {line} is {time:g} hours after admission; expected at least 0")
        if time < before - _EPS:
            raise DataError(f"{where}: line {line}: Hours go back from {before:g} to {time:g}; expected them in order")
        before = time
        if time > hours + _EPS:
            continue
        step = held[min(int(time / timestep - _EPS), n - 1)]
        for channel, place in enumerate(places):
            if row[place]:
                step[channel] = row[place]
    found = np.zeros((n, len(COLUMNS)), dtype=np.float32)
    last, masks = list(NORMAL.values()), len(COLUMNS) - len(NORMAL)
    for i, step in enumerate(held):
        column = 0
        for channel, name in enumerate(NORMAL):
            if step[channel]:
                last[channel], found[i, masks + channel] = step[channel], 1.0
            values = CATEGORIES.get(name)
            if values is None:
                found[i, column] = _number(last[channel], where, None, name)
                column += 1
                continue
            if last[channel] not in values:
                raise DataError(f"{where}: {name} is {last[channel]!r}; expected one of {', '.join(map(repr, values))}")
            found[i, column + values.index(last[channel])] = 1.0
            column += len(values)
    return found


def _number(text: str, where: str, line: int | None, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e30:
        raise DataError(f"{where}:{'' if line is None else f' line {line}:'} {name} is {text!r}; expected a number")
    return value


@dataclass(frozen=True)
class Normaliser:
    """Mean and standard deviation of each column; ``of`` leaves the rest as they are."""

    mean: Floats
    scale: Floats

    @classmethod
    def fitted(cls, series: Iterable[Floats], columns: Sequence[int]) -> Normaliser:
        """Return the mean and deviation (n - 1) of these columns over all steps of the series, one series at a time; 0 and 1 elsewhere."""
        count, total, square = 0, np.zeros(0), np.zeros(0)
        for x in series:
            wide = x.astype(np.float64)
            total = wide.sum(0) + (total if count else 0.0)
            square = (wide**2).sum(0) + (square if count else 0.0)
            count += len(x)
        if count < 2:
            raise DataError(f"the normaliser needs at least 2 steps of training data, found {count}")
        mean = total / count
        deviation = np.sqrt(np.maximum(square - count * mean**2, 0) / (count - 1)).clip(min=1e-7)
        kept = np.zeros(len(mean), dtype=bool)
        kept[list(columns)] = True
        return cls(
            np.where(kept, mean, 0.0).astype(np.float32),
            np.where(kept & (deviation > 1e-6), deviation, 1.0).astype(np.float32),
        )

    def of(self, x: Floats) -> Floats:
        """Return the series shifted and scaled."""
        return (x - self.mean) / self.scale


def padded(x: Floats, steps: int) -> Floats:
    """Return a series [n, F] cut or filled up with zeros to [steps, F]."""
    found = np.zeros((steps, x.shape[1]), dtype=np.float32)
    found[: len(x)] = x[:steps]
    return found
