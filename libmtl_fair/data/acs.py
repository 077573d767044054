"""ACS-PUMS person files as folktables stores them: its five problems as tasks of one table, each labelled where its filter keeps a row."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Literal, TypeAlias

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.csv
from pydantic import BeforeValidator, Field

from libmtl_fair.data.acs_example import STATES, write_acs
from libmtl_fair.data.frames import Series
from libmtl_fair.data.sources import PART, Opened, Settings, Source
from libmtl_fair.data.spec import SensitiveSpec, TableSpec, age_bands, task, words
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.validation import Names, listed

_URL = "https://www2.census.gov/programs-surveys/acs/data/pums"
_BLOCK = 1 << 24
"""Bytes of a file that are read at a time."""

_LATER_NAMES = {"RELP": "RELSHIPP", "JWTR": "JWTRNS", "ST": "STATE"}
_RELSHIPP = dict(zip(range(20, 39), (0, 1, 13, 1, 13, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 15, 16, 17)))
_JWTRNS = {code: code for code in range(1, 13)} | {3: 4, 4: 5, 5: 3}
_LATER_CODES = {"RELP": _RELSHIPP, "JWTR": _JWTRNS}

_PEOPLE = "AGEP SCHL MAR SEX DIS ESP MIG RAC1P CIT"
_ABLE = "MIL ANC NATIVITY DEAR DEYE DREM"
_BY_WORK = "COW OCCP WKHP JWMNP JWTR POWPUMA PINCP POVPIP"


@dataclass(frozen=True)
class _Problem:
    """One of folktables' problems: the label is ``holds`` of ``target``, of the rows that ``keep``; gaps do not hold, as there."""

    target: str
    holds: Callable[[Series], Series]
    features: tuple[str, ...]
    keep: Callable[[pd.DataFrame], Series]
    reads: tuple[str, ...]
    definition: str
    forbids: str = ""


def _problem(
    target: str,
    holds: Callable[[Series], Series],
    features: str,
    definition: str,
    keep: Callable[[pd.DataFrame], Series] = lambda rows: rows["AGEP"] == rows["AGEP"],
    reads: str = "",
    forbids: str = "",
) -> _Problem:
    return _Problem(target, holds, words(features), keep, words(reads), definition, forbids)


PROBLEMS = {
    "income": _problem(
        "PINCP",
        lambda x: x > 50000,
        "AGEP COW SCHL MAR OCCP POBP RELP WKHP SEX RAC1P",
        "ACSIncome: income above 50,000 US$, of people over 16 who work and earn more than 100",
        lambda r: (r["AGEP"] > 16) & (r["PINCP"] > 100) & (r["WKHP"] > 0) & (r["PWGTP"] >= 1),
        "WKHP PWGTP",
        "POVPIP",
    ),
    "employment": _problem(
        "ESR",
        lambda x: x == 1,
        f"{_PEOPLE} RELP {_ABLE}",
        "ACSEmployment: employed and at work, of all people",
        forbids=_BY_WORK,
    ),
    "public_coverage": _problem(
        "PUBCOV",
        lambda x: x == 1,
        f"{_PEOPLE} {_ABLE} PINCP ESR ST FER",
        "ACSPublicCoverage: public health insurance, of people under 65 with at most 30,000 US$",
        lambda r: (r["AGEP"] < 65) & (r["PINCP"] <= 30000),
        "PINCP",
    ),
    "mobility": _problem(
        "MIG",
        lambda x: x == 1,
        f"{_PEOPLE.replace(' MIG', '')} {_ABLE} RELP GCL COW ESR WKHP JWMNP PINCP",
        "ACSMobility: the same address a year ago, of people aged 19 to 34",
        lambda r: ~((r["AGEP"] <= 18) | (r["AGEP"] >= 35)),
    ),
    "travel_time": _problem(
        "JWMNP",
        lambda x: x > 20,
        f"{_PEOPLE} RELP PUMA ST OCCP JWTR POWPUMA POVPIP",
        "ACSTravelTime: more than 20 minutes to work, of people over 16 at work (at home: no)",
        lambda r: (r["AGEP"] > 16) & (r["PWGTP"] >= 1) & (r["ESR"] == 1),
        "PWGTP ESR",
    ),
}  # fmt: skip
"""folktables' problems (Ding et al. 2021) under the names of our tasks."""

_NUMBERS = words("AGEP SCHL WKHP PINCP JWMNP POVPIP")
_RACES = (
    "White", "Black", "American Indian", "Alaska Native", "American Indian or Alaska Native", "Asian", "Pacific Islander",
    "Other", "Two or more",
)  # fmt: skip


def _features(tasks: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for each in tasks for name in PROBLEMS[each].features))


SPEC = TableSpec(
    name="acs",
    title="American Community Survey, PUMS person files, with folktables' problems",
    source="Ding, Hardt, Miller, Schmidt (2021), Retiring Adult (folktables); US Census Bureau, ACS PUMS; files of your own, "
    f"from {_URL}/YEAR/1-Year/csv_pSTATE.zip",
    licence="US Census Bureau terms for public use microdata: statistical use only, no attempt to identify a person",
    tasks={
        name: task("binary", name, item.definition, f"{item.target} {item.forbids}") for name, item in PROBLEMS.items()
    },
    sensitive={
        "sex": SensitiveSpec(column="SEX", merge={"1": "Male", "2": "Female"}),
        "race": SensitiveSpec(column="RAC1P", merge={str(i): name for i, name in enumerate(_RACES, 1)}),
        "age": age_bands("AGEP", 25, 60),
    },
    candidates=_features(PROBLEMS),
    default_tasks=tuple(PROBLEMS),
    default_sensitive=("sex", "race"),
    kinds={name: "numeric" if name in _NUMBERS else "categorical" for name in _features(PROBLEMS)},
    notes=(
        "A task is labelled where folktables' filter keeps the row, and only there; a row that no chosen task keeps is left out.",
        "Inputs are the features of the chosen problems without what gives any of them away; of one problem they are folktables'.",
        "As in folktables a gap in a target counts as no: without a travel time (works at home), without an ESR (under 16).",
        "From 2019 RELP and JWTR are RELSHIPP and JWTRNS: their codes are brought to those of 2018.",
        "PUMA and POWPUMA are unique within a state only.",
        "2020 has no standard release; the experimental file of that year has weights of its own.",
    ),
)

Files: TypeAlias = dict[tuple[int, str], Path]
"""(year, state) -> the file that holds it."""

Year = Annotated[int, Field(ge=2014, le=2100)]
Years = Annotated[tuple[Year, ...], Field(strict=False, min_length=1), BeforeValidator(listed)]


class AcsFiles(Settings):
    """Which files to read, of ``root/YEAR/HORIZON``; those of ``test_years`` and ``test_states`` are the test part.

    Parameters
    ----------
    years, states : tuple of int, tuple of str, optional
        Of training and validation, and of the test part where nothing else is said; states None: all that lie there.
    test_years, test_states : tuple of int, tuple of str, optional
        Of the test part; None for both: shares of ``split`` of all rows.
    horizon : str, default "1-Year"
        "1-Year" or "5-Year".
    """

    years: Years = (2018,)
    states: Names | None = None
    test_years: Years | None = None
    test_states: Names | None = None
    horizon: Literal["1-Year", "5-Year"] = "1-Year"

    def parts(self, root: Path) -> tuple[Files, Files]:
        """Return the files of training and validation, and those of the test part (none: a share of all rows)."""
        train = self._files(root, self.years, self.states)
        if self.test_years is None and self.test_states is None:
            return train, {}
        test = self._files(root, self.test_years or self.years, self.test_states or self.states)
        if twice := sorted(set(train) & set(test)):
            year, state = twice[0]
            raise DataError(
                f"data set 'acs': {state} {year} would train and test; give test_years or test_states that differ from years "
                "and states"
            )
        return train, test

    def _files(self, root: Path, years: Sequence[int], states: Sequence[str] | None) -> Files:
        """Return (year, state) -> its file."""
        for state in states or ():
            if state not in STATES:
                raise DataError(f"data set 'acs': {unknown('state', state, STATES)}")
        found = {}
        for year in years:
            plain = root / str(year)
            folder = within if (within := plain / self.horizon).is_dir() or not plain.is_dir() else plain
            there = {state: path for state in STATES if (path := _file_of(folder, state, year)) is not None}
            for state in states or there or ("CA",):
                if state not in there:
                    raise DataError(_absent(folder, state, year))
                found[year, state] = there[state]
        return found


def _file_of(folder: Path, state: str, year: int) -> Path | None:
    names = (_member(state, year), f"csv_p{state.lower()}.zip")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _member(state: str, year: int) -> str:
    return f"psam_p{STATES[state]}.csv" if year >= 2017 else f"ss{year % 100}p{state.lower()}.csv"


def _absent(folder: Path, state: str, year: int) -> str:
    archive = f"csv_p{state.lower()}.zip"
    return (
        f"data set 'acs': no person file of {state} {year} in {str(folder)!r}; expected {_member(state, year)} or {archive} there, "
        f"from {_URL}/{year}/1-Year/{archive} (example data in this format: libmtl-fair example-data acs DIR)"
    )


def open_acs(root: Path, files: AcsFiles, tasks: tuple[str, ...]) -> Opened:
    """Return the chosen problems of the chosen years and states as one table with partial labels.

    Raises
    ------
    DataError
        A file is missing or damaged, lacks a column, or would both train and test.
    """
    train, test = files.parts(root)
    frame = read_problems({**train, **test}, tasks)
    if test:
        held = pd.MultiIndex.from_frame(frame[["YEAR", "STATE"]]).isin(list(test))
        frame[PART] = np.where(held, "test", "train")
    return Opened(frame, spec=replace(SPEC, candidates=_features(tasks), default_tasks=tasks))


def read_problems(files: Files, problems: Sequence[str]) -> pd.DataFrame:
    """Return the rows that some problem keeps: features, a label a problem (0, 1, NaN), SEX, RAC1P, AGEP, YEAR and STATE.

    Blocks of 16 MB are read at a time and their other rows and columns dropped, so that memory is that of what is returned.
    """
    chosen = {name: PROBLEMS[name] for name in problems}
    reads = {"AGEP", "SEX", "RAC1P", *_features(chosen)}
    reads |= {name for item in chosen.values() for name in (item.target, *item.reads)}
    kept = []
    for (year, state), path in files.items():
        for rows in _blocks(path, state, year, sorted(reads)):
            for name, item in chosen.items():
                rows[name] = item.holds(rows[item.target]).astype(np.float32).where(item.keep(rows))
            rows = rows.loc[rows[list(chosen)].notna().any(axis=1)]
            kept.append(rows.assign(YEAR=np.int16(year), STATE=pd.Categorical([state] * len(rows), list(STATES))))
    frame = pd.concat(kept, ignore_index=True) if kept else pd.DataFrame()
    if not len(frame):
        named = ", ".join(str(path) for path in files.values())
        raise DataError(f"data set 'acs': no row passes the filters of {', '.join(problems)} in {named}")
    return frame


def _blocks(path: Path, state: str, year: int, names: Sequence[str]) -> Iterator[pd.DataFrame]:
    """Yield the columns, as float32 with 2018's names and codes, block by block; a file of another state or year is refused."""
    with _opened(path, _member(state, year)) as stream:
        try:
            header = stream.readline().decode("utf-8-sig").strip().replace('"', "").split(",")
            own = {name: name if name in header else _LATER_NAMES.get(name, name) for name in names}
            for name, later in own.items():
                if later not in header:
                    raise DataError(
                        f"{str(path)!r}: {unknown('column', name, header)}; expected a PUMS person file with its header"
                    )
            columns = list(own.values())
            telling = [name for name in ("SERIALNO", "ST", "STATE") if name in header]
            told = [name for name in telling if name not in columns]
            reader = pyarrow.csv.open_csv(
                stream,
                pyarrow.csv.ReadOptions(column_names=header, block_size=_BLOCK, use_threads=False),
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=[*columns, *told],
                    column_types=dict.fromkeys(columns, pyarrow.float32()) | dict.fromkeys(told, pyarrow.string()),
                    null_values=["", " "],
                ),
            )
            for batch in reader:
                _need_own(path, state, year, {name: str(batch.column(name)[0]) for name in telling if len(batch)})
                rows = batch.select(columns).to_pandas().set_axis(list(names), axis=1)
                for name, codes in _LATER_CODES.items():
                    if own.get(name, name) != name:
                        rows[name] = rows[name].map(codes).astype(np.float32)
                yield rows
        except (pyarrow.ArrowInvalid, OSError, EOFError, UnicodeDecodeError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(
                f"{str(path)!r} cannot be read as a PUMS person file ({str(error).splitlines()[0]}); fetch it anew"
            ) from error


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a person file as training read it: 2018's names and codes, and codes as numbers, without leading zeros."""
    found = frame.copy(deep=False)
    for name in (*SPEC.candidates, "SEX", "RAC1P"):
        later = _LATER_NAMES.get(name, name)
        taken = name if name in frame.columns else later
        if taken not in frame.columns:
            continue
        read = pd.to_numeric(frame[taken], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        numbers = pd.Series(read, index=frame.index)
        if not (numbers.isna() & frame[taken].notna() & (frame[taken].astype(str).str.strip() != "")).any():
            found[name] = numbers if taken == name or name not in _LATER_CODES else numbers.map(_LATER_CODES[name])
    return found


def _need_own(path: Path, state: str, year: int, first: Mapping[str, str]) -> None:
    """Raise DataError where a row of a file says another state, or a serial number (2018HU..., since 2018) another year."""
    serial = first.get("SERIALNO", "")
    whole = "5-Year" in path.parts  # of five years, that of the folder being the last
    made = int(serial[:4]) if serial[:4].isdigit() and serial[4:6] in ("HU", "GQ") else year
    code = (first.get("ST") or first.get("STATE") or "").removesuffix(".0")  # a number where it is an input
    if made > year or (made != year and not whole) or (code.isdigit() and int(code) != int(STATES[state])):
        found = f"year {made}" if made != year else f"state code {code}"
        raise DataError(
            f"{str(path)!r} holds people of {found}, and {state} ({STATES[state]}) of {year} was expected there: files have changed "
            "places; fetch it anew"
        )


@contextmanager
def _opened(path: Path, member: str) -> Iterator[IO[bytes]]:
    if path.suffix != ".zip":
        with path.open("rb") as stream:
            yield stream
        return
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if Path(name).name.lower() == member.lower()]
            if not inside:
                raise DataError(f"{str(path)!r} holds no {member}; it holds {', '.join(archive.namelist())}")
            with archive.open(inside[0]) as stream:
                yield stream
    except zipfile.BadZipFile as error:
        raise DataError(f"{str(path)!r} is no whole zip file ({error}); fetch it anew") from error


SOURCES = {"acs": Source(SPEC, open_acs, AcsFiles, write_acs, (1500,), named)}
"""What this module reads, by name."""
