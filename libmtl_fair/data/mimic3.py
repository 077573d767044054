"""mimic3-benchmarks' folders: its four tasks as one table of stays with partial labels, series read as a loader goes."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from libmtl_fair.data.channels import COLUMNS, CONTINUOUS, NORMAL, Floats, Normaliser, discretised, padded
from libmtl_fair.data.mimic3_example import PHENOTYPES, write_mimic3
from libmtl_fair.data.sources import PART, Opened, Settings, Source
from libmtl_fair.data.spec import SensitiveSpec, TableSpec, TaskSpec, age_bands, task
from libmtl_fair.errors import DataError
from libmtl_fair.tasks import BinarySequence, MulticlassSequence, SequenceTask

FOLDERS = {
    "in_hospital_mortality": "in-hospital-mortality",
    "decompensation": "decompensation",
    "length_of_stay": "length-of-stay",
    "phenotyping": "phenotyping",
}
"""Task -> its folder, where the benchmark's tasks were made one by one."""

LOS_DAYS = (1, 2, 3, 4, 5, 6, 7, 8, 14)
"""Where the benchmark's classes of the remaining stay begin but the first: days."""
LOS_MEANS = (
    11.450379,
    35.070846,
    59.206531,
    83.382723,
    107.487817,
    131.579534,
    155.643957,
    179.660558,
    254.306624,
    585.32589,
)
"""Mean hours left in each class, of the benchmark (its ``CustomBins``): what a class stands for in its mean absolute deviation."""

_VALIDATION = 15
_FITTED = 2000

SPEC = TableSpec(
    name="mimic3",
    title="MIMIC-III, mimic3-benchmarks' four tasks",
    source="Harutyunyan et al. (2019), Multitask learning and benchmarking with clinical time series data, Scientific Data 6:96; "
    "files of your own: MIMIC-III 1.4 from https://physionet.org/content/mimiciii/ through the scripts of "
    "https://github.com/YerevaNN/mimic3-benchmarks (create_multitask, or the four tasks' own)",
    licence="PhysioNet Credentialed Health Data License 1.5.0: training, a signed agreement, no sharing of the data",
    tasks={
        "in_hospital_mortality": task(
            "binary", "in_hospital_mortality", "dies in hospital, of stays of 48 hours and more"
        ),
        "phenotyping": TaskSpec(
            kind="multilabel", columns=PHENOTYPES, definition="25 acute and chronic conditions of the stay"
        ),
    },
    filed={
        "decompensation": "each hour: dies within the next 24 hours",
        "length_of_stay": "each hour: more than los_days (args, default 3) are left in the unit; with los: classes "
        "the benchmark's ten classes of what is left, whose labels are hours",
    },
    sensitive={
        "gender": SensitiveSpec(column="gender"),
        "ethnicity": SensitiveSpec(column="ethnicity"),
        "age": age_bands("age", 45, 65, 80),
    },
    candidates=(),
    default_tasks=("in_hospital_mortality", "decompensation", "length_of_stay", "phenotyping"),
    default_sensitive=("gender", "ethnicity"),
    stratify="",
    notes=(
        "The benchmark's length of stay has ten classes an hour (args: los: classes); without it, it is a yes or no an hour.",
        "Inputs are the first `hours` of a stay (default 48); labels of later hours are left out.",
        "Validation: val_listfile.csv where the benchmark's split_train_val wrote it, else 15 % of the patients of training.",
        "Groups are those of root/{train,test}/SUBJECT/episodeN.csv: ethnicity in the benchmark's five groups.",
    ),
)

_GENDER = {1: "F", 2: "M", 3: "other"}
_ETHNICITY = {0: "other or unknown", 1: "Asian", 2: "Black", 3: "Hispanic", 4: "White"}


class Mimic3Settings(Settings):
    """How series are made: ``hours`` of a stay at most, of ``timestep`` hours a step.

    ``los``: the length of stay as the benchmark's ten classes an hour, or whether more than ``los_days`` are left.
    """

    hours: Annotated[float, Field(gt=0, le=10_000)] = 48.0
    timestep: Annotated[float, Field(gt=0, le=48)] = 1.0
    los: Literal["yes_no", "classes"] = "yes_no"
    los_days: Annotated[float, Field(gt=0, le=365)] = 3.0

    def left(self, hours: float) -> float:
        """Return the label of so many hours left."""
        return hours if self.los == "classes" else float(hours > 24 * self.los_days)

    def task(self, name: str) -> SequenceTask:
        """Return what a task with a label an hour is."""
        if name != "length_of_stay" or self.los == "yes_no":
            return BinarySequence(name)
        return MulticlassSequence(name, len(LOS_MEANS), tuple(24.0 * days for days in LOS_DAYS), LOS_MEANS)

    @property
    def steps(self) -> int:
        """Steps of the longest series."""
        return int(self.hours / self.timestep + 1.0 - 1e-6)

    def step(self, time: float) -> int:
        """Return the step that a label of this time belongs to, as the benchmark has it: the last one before it."""
        return int(time / self.timestep - 1e-6)


@dataclass
class Stay:
    """One stay: its file, how many hours of it are input, and its labels."""

    part: str
    file: Path
    hours: float = 0.0
    mortality: float = float("nan")
    phenotypes: Sequence[float] = (float("nan"),) * len(PHENOTYPES)
    steps: dict[str, Floats] = field(default_factory=dict)

    def label(self, name: str, time: float, value: float, settings: Mimic3Settings) -> None:
        """Set the label of a task at a time; one beyond the input is left out."""
        place = settings.step(time)
        if place < settings.steps:
            self.steps.setdefault(name, np.full(settings.steps, np.nan, np.float32))[place] = value


class EpisodeReader:
    """Reads the series of one stay a row: float32 [steps, 76], zeros after its end, and its labels of every hour.

    Parameters
    ----------
    stays : sequence of Stay
        In the order of the table.
    settings : Mimic3Settings
        How series are made.
    """

    def __init__(self, stays: Sequence[Stay], settings: Mimic3Settings) -> None:
        self.stays, self.settings = list(stays), settings
        train = [stay for stay in self.stays if stay.part == "train"]
        chosen = train[:: max(1, len(train) // _FITTED)]
        self.normaliser = Normaliser.fitted((self.series(stay) for stay in chosen), CONTINUOUS)

    @property
    def shape(self) -> tuple[int, ...]:
        """Steps and numbers of a step."""
        return self.settings.steps, len(COLUMNS)

    def series(self, stay: Stay) -> Floats:
        """Return the discretised series of a stay, as it was measured."""
        header, *events = _lines(stay.file)
        if header[:1] != ["Hours"] or (lacking := [name for name in NORMAL if name not in header]):
            what = "Hours first" if header[:1] != ["Hours"] else lacking[0]
            raise DataError(f"{str(stay.file)!r}: the header lacks {what!r}; expected Hours and the 17 channels")
        short = next((i for i, row in enumerate(events, 2) if len(row) != len(header)), None)
        if short is not None or not events:
            found = "no event" if short is None else f"line {short} has {len(events[short - 2])} cells"
            raise DataError(f"{str(stay.file)!r}: {found}; expected lines of {len(header)} cells")
        hours = min(stay.hours or float(events[-1][0]), self.settings.hours)
        return discretised(events, header, hours, self.settings.timestep, repr(str(stay.file)))

    def read(self, row: int, tasks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the normalised series of a row, and the labels of every step."""
        stay = self.stays[row]
        x = self.normaliser.of(self.series(stay))
        none = np.full(self.settings.steps, np.nan, np.float32)
        labels = {name: torch.from_numpy(stay.steps.get(name, none).copy()) for name in tasks}
        for values in labels.values():
            values[len(x) :] = torch.nan
        return torch.from_numpy(padded(x, self.settings.steps)), labels


def open_mimic3(root: Path, settings: Mimic3Settings, tasks: tuple[str, ...]) -> Opened:
    """Return the stays of the chosen tasks with their labels and groups, and the reader of their series.

    Raises
    ------
    DataError
        A folder or listfile that is missing or damaged.
    """
    stays: dict[tuple[str, str], Stay] = {}
    multitask = next((each for each in (root / "multitask", root) if (each / "train" / "listfile.csv").is_file()), None)
    folders = {name: root / FOLDERS[name] for name in tasks} if multitask is None else {"": multitask}
    there = {name: folder for name, folder in folders.items() if (folder / "train" / "listfile.csv").is_file()}
    if set(there) != set(folders):
        lacking = next(folder for name, folder in folders.items() if name not in there)
        raise DataError(
            f"data set 'mimic3': no {lacking / 'train' / 'listfile.csv'}; expected the folders that mimic3-benchmarks' scripts "
            f"write: multitask, or one a task ({', '.join(FOLDERS.values())}), beside root; they are had from: {SPEC.source}"
        )
    for name, folder in there.items():
        held = (
            {row[0] for row in _lines(folder / "val_listfile.csv")[1:]}
            if (folder / "val_listfile.csv").is_file()
            else None
        )
        for part in ("train", "test"):
            path = folder / part / "listfile.csv"
            rows = _lines(path)[1:]
            if not rows:
                raise DataError(f"{str(path)!r} holds no stay; expected lines as mimic3-benchmarks writes them")
            for line, row in enumerate(rows, 2):
                chosen = part if part == "test" else _part(row[0], held)
                stay = stays.setdefault((part, row[0]), Stay(chosen, folder / part / row[0]))
                if stay.file.parent.parent.name == FOLDERS["in_hospital_mortality"]:
                    stay.file = folder / part / row[0]  # the others' files go on after 48 hours
                try:
                    (_of_all if not name else _OF_ONE[name])(stay, row, settings)
                except (ValueError, IndexError) as error:
                    raise DataError(
                        f"{str(path)!r}: line {line} cannot be read ({error}): {','.join(row)[:80]}"
                    ) from error
    frame = _table(stays, root)
    filed = tuple(settings.task(name) for name in tasks if name in (SPEC.filed or {}))
    return Opened(frame, EpisodeReader(list(stays.values()), settings), filed)


def _lines(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from error
    if not rows:
        raise DataError(f"{str(path)!r} is empty; expected a header and lines as mimic3-benchmarks writes them")
    return rows


def _part(name: str, held: set[str] | None) -> str:
    """Return train or val: as the benchmark's own list says, else by the patient, the same whatever the tasks."""
    if held is not None:
        return "val" if name in held else "train"
    return "val" if zlib.crc32(name.split("_")[0].encode()) % 100 < _VALIDATION else "train"


def _of_all(stay: Stay, row: Sequence[str], settings: Mimic3Settings) -> None:
    """Read a line of the multitask listfile: hours, mortality (position, mask, label), and masks and labels of the others."""
    _, hours, died, left, conditions, worse = row
    stay.hours = _hours(hours)
    _, mask, label = map(int, died.split(";"))
    stay.mortality = float(label) if mask else float("nan")
    stay.phenotypes = _conditions(conditions.split(";"))
    for time, text in _masked(left):
        stay.label("length_of_stay", time, settings.left(_hours(text)), settings)
    for time, text in _masked(worse):
        stay.label("decompensation", time, _yes_no(text), settings)


def _hours(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError(f"length of stay {text}; expected hours, 0 or more")
    return value


def _yes_no(text: str) -> float:
    if text not in ("0", "1"):
        raise ValueError(f"{text!r}; expected 0 or 1")
    return float(text)


def _masked(text: str) -> Iterator[tuple[int, str]]:
    """Yield hour and label of ``masks;labels`` where the mask is 1."""
    cells = text.split(";") if text.strip(";") else []
    if len(cells) % 2:
        raise ValueError(f"{len(cells)} masks and labels; expected as many of each")
    half = len(cells) // 2
    yield from ((i, cells[half + i]) for i in range(half) if _yes_no(cells[i]))


def _conditions(cells: Sequence[str]) -> list[float]:
    if len(cells) != len(PHENOTYPES):
        raise ValueError(f"{len(cells)} phenotypes, expected {len(PHENOTYPES)}")
    return [float(int(cell)) for cell in cells]


def _of_mortality(stay: Stay, row: Sequence[str], settings: Mimic3Settings) -> None:
    stay.mortality, stay.hours = float(int(row[1])), max(stay.hours, 48.0)


def _of_phenotyping(stay: Stay, row: Sequence[str], settings: Mimic3Settings) -> None:
    stay.hours, stay.phenotypes = max(stay.hours, _hours(row[1])), _conditions(row[2:])


def _of_decompensation(stay: Stay, row: Sequence[str], settings: Mimic3Settings) -> None:
    time = _hours(row[1])
    stay.hours = max(stay.hours, time)
    stay.label("decompensation", time, _yes_no(row[2]), settings)


def _of_length(stay: Stay, row: Sequence[str], settings: Mimic3Settings) -> None:
    time, left = map(_hours, row[1:3])
    stay.hours = max(stay.hours, time + left)
    stay.label("length_of_stay", time, settings.left(left), settings)


_OF_ONE = {
    "in_hospital_mortality": _of_mortality,
    "decompensation": _of_decompensation,
    "length_of_stay": _of_length,
    "phenotyping": _of_phenotyping,
}


def _table(stays: Mapping[tuple[str, str], Stay], root: Path) -> pd.DataFrame:
    """Return one row a stay: labels of whole stays, part, and who it is."""
    people = [_person(root, folder, name) for folder, name in stays]
    return pd.DataFrame(
        {
            **{key: [person[key] for person in people] for key in ("gender", "ethnicity", "age")},
            "in_hospital_mortality": [stay.mortality for stay in stays.values()],
            **dict(zip(PHENOTYPES, np.array([stay.phenotypes for stay in stays.values()]).T)),
            PART: [stay.part for stay in stays.values()],
        }
    )


def _person(root: Path, part: str, name: str) -> dict[str, object]:
    """Return who a stay is of, from its episode's file; of one that is not there nothing is known."""
    subject, _, rest = name.partition("_")
    folders = (root / "root", root.parent / "root")
    paths = (each / part / subject / f"{rest.removesuffix('_timeseries.csv')}.csv" for each in folders)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return {"gender": None, "ethnicity": None, "age": None}
    header, *rows = _lines(path)
    try:
        row = dict(zip(header, rows[0]))
        age = float(row["Age"]) if row["Age"] else None
        return {"gender": _GENDER.get(int(row["Gender"])), "ethnicity": _ETHNICITY[int(row["Ethnicity"])], "age": age}
    except (KeyError, ValueError, IndexError) as error:
        raise DataError(
            f"{str(path)!r}: expected a line with Ethnicity (0 to 4), Gender (0 to 3) and Age, found {error}"
        ) from error


SOURCES = {"mimic3": Source(SPEC, open_mimic3, Mimic3Settings, write_mimic3, (150,))}
"""What this module reads, by name."""
