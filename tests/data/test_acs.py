"""ACS-PUMS files in folktables' layout: its filters and labels, years apart, damaged files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from libmtl_fair import load_dataset
from libmtl_fair.data import acs
from libmtl_fair.data.sources import write_example
from libmtl_fair.errors import DataError

FOLKTABLES = {
    "income": (1360, 352, 5518690.0),
    "employment": (3000, 1306, 285075.0),
    "public_coverage": (995, 236, 13671066.0),
    "mobility": (491, 432, 11020386.0),
    "travel_time": (1284, 597, 5645244.0),
}
"""Rows, positives and the sum of absolute features that folktables 0.0.12 itself finds in the 2018 files of the example (seed 0)."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example("acs", tmp_path_factory.mktemp("data") / "acs")


@pytest.mark.parametrize("problem", acs.PROBLEMS)
def test_every_problem_is_folktables_own(root: Path, problem: str) -> None:
    rows = acs.read_problems(acs.AcsFiles().parts(root)[0], (problem,))
    features = rows[list(acs.PROBLEMS[problem].features)].to_numpy(np.float64)
    found = len(rows), int(rows[problem].sum()), float(np.abs(np.nan_to_num(features)).sum())
    assert found == FOLKTABLES[problem]


def test_labels_of_later_years_by_the_filters_written_out(root: Path) -> None:
    with zipfile.ZipFile(root / "2021" / "1-Year" / "csv_pca.zip") as archive:
        raw = pd.read_csv(archive.open("psam_p06.csv"))
    adult = raw[(raw.AGEP > 16) & (raw.PINCP > 100) & (raw.WKHP > 0) & (raw.PWGTP >= 1)]
    young = raw[(raw.AGEP > 18) & (raw.AGEP < 35)]
    found = acs.read_problems(acs.AcsFiles(years=2021, states="CA").parts(root)[0], ("income", "mobility"))
    assert (found.income.sum(), found.income.notna().sum()) == ((adult.PINCP > 50000).sum(), len(adult))
    assert (found.mobility.sum(), found.mobility.notna().sum()) == ((young.MIG == 1).sum(), len(young))
    assert len(found) == len(raw.loc[raw.index.isin(adult.index) | raw.index.isin(young.index)])
    assert set(found.RELP) <= set(range(18))  # 2018's codes


def test_a_year_trains_and_others_test(root: Path) -> None:
    data = load_dataset("acs", ["income", "employment"], root=root, args={"states": ["CA"], "test_years": [2019, 2021]})
    assert len(data.test) == 3000 and len(data.train) + len(data.val) == 1500
    assert not {"WKHP", "COW", "OCCP", "PINCP", "ESR"} & set(data.inputs)  # they give employment away
    assert data.card["tasks"]["income"]["missing"] > 0 and data.card["tasks"]["employment"]["missing"] == 0
    one = load_dataset("acs", ["income"], root=root, args={"years": [2018, 2019]})
    assert set(one.inputs) == set(acs.PROBLEMS["income"].features)
    assert {"Male", "Female"} == set(one.groups["sex"]) and "Black" in one.groups["race"]


def test_blocks_of_a_file_are_read_one_by_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = acs.AcsFiles(states="TX").parts(root)[0]
    whole = acs.read_problems(files, ("travel_time",))
    monkeypatch.setattr(acs, "_BLOCK", 4096)
    pd.testing.assert_frame_equal(acs.read_problems(files, ("travel_time",)), whole)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"years": 2017}, r"no person file of CA 2017 in .*expected psam_p06.csv or csv_pca.zip there, from https"),
        ({"states": ["CA", "Ca"]}, "unknown state 'Ca'; did you mean 'CA'"),
        ({"test_states": ["CA"]}, "CA 2018 would train and test"),
        ({"yeers": 2018}, "unknown setting 'yeers'; did you mean 'years'"),
        ({"years": 1990}, "years.*at least 2014"),
    ],
)
def test_wrong_choices(root: Path, args: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset("acs", root=root, args=args)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20_000])


def test_a_state_without_people_of_a_race_is_read(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "2018" / "1-Year" / "psam_p48.csv"
    path.parent.mkdir(parents=True)
    frame = pd.read_csv(root / "2018" / "1-Year" / path.name, dtype=str)
    frame[~frame["RAC1P"].isin(["4", "7"])].to_csv(path, index=False)
    names = load_dataset("acs", root=tmp_path, args={"states": "TX"}).groups["race"]
    assert {"White", "Black"} < set(names) and not {"Alaska Native", "Pacific Islander"} & set(names)


def _worded(path: Path) -> None:
    path.write_text(path.read_text().replace(",CA,", ",", 1).replace("\nP,", "\nP,x,", 1))


def _unnamed(path: Path) -> None:
    path.write_text(path.read_text().replace("RAC1P", "RACE", 1))


def _letters(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    cells = lines[5].split(",")
    cells[lines[0].split(",").index("SEX")] = "F"
    path.write_text("".join([*lines[:5], ",".join(cells), *lines[6:]]))


def _empty(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize("damage", [_cut, _worded, _unnamed, _letters, _empty])
def test_damaged_files_are_named(root: Path, tmp_path: Path, damage: object) -> None:
    path = tmp_path / "2018" / "1-Year" / "psam_p48.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes((root / "2018" / "1-Year" / path.name).read_bytes())
    assert callable(damage)
    damage(path)
    with pytest.raises(DataError, match="psam_p48.csv"):
        load_dataset("acs", root=tmp_path, args={"states": "TX"})


def test_a_damaged_or_other_zip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "2018" / "csv_pca.zip"
    path.parent.mkdir()
    path.write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(DataError, match="csv_pca.zip' is no whole zip file"):
        load_dataset("acs", root=tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("psam_p01.csv", "")
    with pytest.raises(DataError, match="holds no psam_p06.csv; it holds psam_p01.csv"):
        load_dataset("acs", root=tmp_path)


@pytest.mark.parametrize(
    ("held", "place", "message"),
    [
        (
            ("2019", "psam_p48.csv"),
            ("2018", "psam_p48.csv"),
            r"holds people of year 2019, and TX \(48\) of 2018 was expected",
        ),
        (
            ("2018", "psam_p06.csv"),
            ("2018", "psam_p48.csv"),
            r"holds people of state code 0?6, and TX \(48\) of 2018 was",
        ),
    ],
)
def test_files_that_changed_places_are_told(
    root: Path, tmp_path: Path, held: tuple[str, str], place: tuple[str, str], message: str
) -> None:
    path = tmp_path / place[0] / "1-Year" / place[1]
    path.parent.mkdir(parents=True)
    path.write_bytes((root / held[0] / "1-Year" / held[1]).read_bytes())
    with pytest.raises(DataError, match=message):
        load_dataset("acs", root=tmp_path, args={"states": "TX"})
