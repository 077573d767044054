"""eICU in two tasks, mortality and length of stay, in the layout of TPC-LoS-prediction; series are read as a loader goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from libmtl_fair.data.channels import padded
from libmtl_fair.data.eicu_example import write_eicu
from libmtl_fair.data.frames import Series
from libmtl_fair.data.sources import PART, Opened, Settings, Source, need_root
from libmtl_fair.data.spec import SensitiveSpec, TableSpec, TaskSpec, task
from libmtl_fair.data.tables import read_frame
from libmtl_fair.errors import DataError, unknown

_PARTS = ("train", "val", "test")
_ETHNICITY = "ethnicity_"
_MORTALITY, _DAYS = "actualhospitalmortality", "actualiculos"

SPEC = TableSpec(
    name="eicu",
    title="eICU Collaborative Research Database, mortality and length of stay",
    source="Pollard et al. (2018), Scientific Data 5:180178; Rocheteau, Lio, Hyland (2021), Temporal pointwise convolutional networks "
    "for length of stay prediction; files of your own: eICU 2.0 from https://physionet.org/content/eicu-crd/ through the "
    "preprocessing of https://github.com/EmmaRocheteau/TPC-LoS-prediction (its folder with train, val and test)",
    licence="PhysioNet Credentialed Health Data License 1.5.0: training, a signed agreement, no sharing of the data",
    tasks={
        "mortality": task("binary", _MORTALITY, "dies in hospital"),
        "length_of_stay": TaskSpec(
            kind="regression",
            column="days",
            transform="log",
            definition="natural log of the days in the unit, of stays that outlast the input",
        ),
    },
    filed={},
    sensitive={"gender": SensitiveSpec(column="gender"), "ethnicity": SensitiveSpec(column="ethnicity")},
    candidates=(),
    default_tasks=("mortality", "length_of_stay"),
    default_sensitive=("gender", "ethnicity"),
    stratify="",
    notes=(
        "Inputs are the first `hours` (args, default 24) of timeseries.csv, hour by hour, as the preprocessing scaled them; those of "
        "flat.csv, who a person is among them, are inputs with `flat: true` only.",
        "A stay that ends within the input has no length of stay: where the input ends would say it.",
        "Which published run takes which two tasks of eICU its source leaves open; these are its common pair (ours).",
        "Age is scaled in flat.csv, and no group here.",
    ),
)


class EicuSettings(Settings):
    """``hours`` of a stay at most; ``flat``: whether each of them also has the features of flat.csv."""

    hours: Annotated[int, Field(ge=1, le=336)] = 24
    flat: bool = False


class StaysReader:
    """Reads the hours of one stay a row from its place in timeseries.csv: float32 [hours, F], zeros after its end.

    Parameters
    ----------
    files, places : sequence of Path, list of (int, int, int)
        timeseries.csv of each part; of each stay which file, and where its lines begin and end in it.
    columns : int
        Cells of a line, with the stay's number.
    hours : int
        At most.
    flat : Array or None
        [N, d], put beside every hour.
    """

    def __init__(
        self,
        files: Sequence[Path],
        places: list[tuple[int, int, int]],
        columns: int,
        hours: int,
        flat: np.ndarray[tuple[int, int], np.dtype[np.float32]] | None,
    ) -> None:
        self.files, self.places, self.columns, self.hours, self.flat = list(files), places, columns, hours, flat

    @property
    def shape(self) -> tuple[int, ...]:
        """Hours and numbers of an hour."""
        return self.hours, self.columns - 1 + (0 if self.flat is None else self.flat.shape[1])

    def read(self, row: int, tasks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the hours of a row; labels are of whole stays, and none are in files."""
        part, start, end = self.places[row]
        with self.files[part].open("rb") as file:
            file.seek(start)
            held = file.read(end - start).decode("utf-8", "replace").splitlines()
        lines = [line for line in held if line][: self.hours]
        try:
            x = np.array([line.split(",")[1:] for line in lines], dtype=np.float32)
        except ValueError as error:
            raise self._damaged(part, lines, str(error)) from error
        if x.shape[1:] != (self.columns - 1,) or not np.isfinite(x).all():
            raise self._damaged(part, lines, "cells are missing, or no finite numbers")
        x[:, 0] /= 24
        if self.flat is not None:
            x = np.hstack([x, np.repeat(self.flat[row : row + 1], len(x), 0)])
        return torch.from_numpy(padded(x, self.hours)), {}

    def _damaged(self, part: int, lines: Sequence[str], why: str) -> DataError:
        stay = lines[0].split(",")[0] if lines else "?"
        return DataError(
            f"{str(self.files[part])!r}: stay {stay}: {why}; expected {self.columns} numbers a line: make the file anew"
        )


def open_eicu(root: Path, settings: EicuSettings, tasks: tuple[str, ...]) -> Opened:
    """Return the stays of all parts with their labels and groups, and the reader of their hours.

    Raises
    ------
    DataError
        A file that is missing or damaged, or a stay without a series.
    """
    frames, flats, places, files = [], [], list[tuple[int, int, int]](), []
    header: list[str] = []
    for number, part in enumerate(_PARTS):
        labels, flat = (_table(root / part / f"{name}.csv") for name in ("labels", "flat"))
        for frame, names, path in ((labels, (_MORTALITY, _DAYS), "labels"), (flat, ("gender",), "flat")):
            for name in names:
                if name not in frame.columns:
                    raise DataError(
                        f"{str(root / part / path)!r}.csv: {unknown('column', name, map(str, frame.columns))}"
                    )
        files.append(need_root(root / part / "timeseries.csv", "the hours of every stay", SPEC))
        found, index = _index(files[-1])
        if header and found != header:
            raise DataError(f"{str(files[-1])!r}: its columns are not those of {str(files[0])!r}")
        header = found
        lacking = [stay for stay in labels.index if stay not in index or stay not in flat.index]
        if lacking:
            raise DataError(
                f"{str(root / part)!r}: stay {lacking[0]} of labels.csv is not in timeseries.csv and flat.csv"
            )
        places += [(number, *index[stay]) for stay in labels.index]
        flat = flat.loc[labels.index]
        flats.append(flat)
        days = _numbers(labels[_DAYS], root / part / "labels.csv")
        gender = _numbers(flat["gender"], root / part / "flat.csv", (0, 1))
        frames.append(
            pd.DataFrame(
                {
                    _MORTALITY: labels[_MORTALITY].to_numpy(),
                    "days": days.where(days * 24 > settings.hours).to_numpy(),
                    "gender": gender.map({0.0: "Female", 1.0: "Male"}).to_numpy(),
                    "ethnicity": _one_hot(flat, root / part / "flat.csv"),
                    PART: part,
                }
            )
        )
    columns = [name for name in flats[0].columns if all(name in flat.columns for flat in flats)]
    wide = pd.concat(flats)[columns].astype(np.float32).to_numpy() if settings.flat else None
    if wide is not None and not np.isfinite(wide).all():
        raise DataError(f"{str(root)!r}: flat.csv has cells that are no finite numbers; make the files anew")
    return Opened(pd.concat(frames, ignore_index=True), StaysReader(files, places, len(header), settings.hours, wide))


def _table(path: Path) -> pd.DataFrame:
    """Return labels.csv or flat.csv by the stay's number."""
    frame = read_frame(need_root(path, "one line a stay", SPEC))
    if "patient" not in frame.columns or frame["patient"].duplicated().any():
        raise DataError(f"{str(path)!r}: expected a column 'patient' with every stay once")
    return frame.assign(patient=frame["patient"].astype(str)).set_index("patient")


def _numbers(column: Series, path: Path, wanted: tuple[int, ...] = ()) -> Series:
    """Return a column of labels.csv or flat.csv as numbers, NaN where it is empty; DataError where a cell is none of those wanted."""
    found = pd.to_numeric(column, errors="coerce").astype(np.float64)
    wrong = column.notna() & (found.isna() | ~found.isin(wanted or found))
    if wrong.any():
        stay, said = next(iter(column[wrong].items()))
        expected = " or ".join(map(str, wanted)) or "a number"
        raise DataError(
            f"{str(path)!r}: {column.name} of stay {stay} is {str(said)!r}; expected {expected}, or nothing"
        )
    return found


def _one_hot(flat: pd.DataFrame, path: Path) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
    """Return the name of the column ``ethnicity_...`` that is 1; None where none is."""
    columns = [name for name in flat.columns if str(name).startswith(_ETHNICITY)]
    names = np.array([*(str(name).removeprefix(_ETHNICITY) for name in columns), None], dtype=object)
    held = (
        np.stack([_numbers(flat[name], path, (0, 1)) for name in columns], 1) if columns else np.zeros((len(flat), 0))
    )
    place = held.argmax(1) if columns else np.zeros(len(flat), dtype=np.int64)
    return np.asarray(names[np.where(held.max(1, initial=0.0) > 0.5, place, len(columns))])


def _index(path: Path) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """Return the header of timeseries.csv and where each stay's lines begin and end, in one pass over the file."""
    found: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file:
        first = file.readline()
        header, place, last = first.decode("utf-8-sig", "replace").strip().split(","), len(first), ""
        if header[:2] != ["patient", "time"]:
            raise DataError(f"{str(path)!r}: expected columns patient, time, ..., found {', '.join(header[:3])}")
        for line in file:
            stay = line.split(b",", 1)[0].strip().decode("utf-8", "replace")
            if stay != last and stay in found:
                raise DataError(f"{str(path)!r}: the lines of stay {stay} do not stand together; make the file anew")
            if stay:
                found[stay] = (found[stay][0] if stay == last else place, place + len(line))
            place, last = place + len(line), stay or last
    return header, found


SOURCES = {"eicu": Source(SPEC, open_eicu, EicuSettings, write_eicu, (150,))}
"""What this module reads, by name."""
