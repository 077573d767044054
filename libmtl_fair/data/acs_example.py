"""Made-up ACS-PUMS person files with known effects of sex and race, laid out as folktables stores the real ones."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from libmtl_fair.data.spec import words

_CODES = words(
    "AL 01  AK 02  AZ 04  AR 05  CA 06  CO 08  CT 09  DE 10  DC 11  FL 12  GA 13  HI 15  ID 16  IL 17  IN 18 "
    "IA 19  KS 20  KY 21  LA 22  ME 23  MD 24  MA 25  MI 26  MN 27  MS 28  MO 29  MT 30  NE 31  NV 32  NH 33 "
    "NJ 34  NM 35  NY 36  NC 37  ND 38  OH 39  OK 40  OR 41  PA 42  RI 44  SC 45  SD 46  TN 47  TX 48  UT 49 "
    "VT 50  VA 51  WA 53  WV 54  WI 55  WY 56  PR 72"
)
STATES = dict(zip(_CODES[::2], _CODES[1::2]))
"""Two letters of a state -> its FIPS code, as file names have it."""

_HEADER = (
    "RT SERIALNO DIVISION SPORDER PUMA REGION ST ADJINC PWGTP AGEP CIT COW DEAR DEYE DREM ESP FER GCL JWMNP {JWTR} MAR MIG MIL "
    "{RELP} SCHL SEX WKHP ANC DIS ESR NATIVITY OCCP PINCP POBP POVPIP POWPUMA PUBCOV RAC1P PWGTP1 PWGTP2"
)


def write_acs(root: Path, n: int, size: tuple[int, ...] = (), seed: int = 0) -> None:
    """Write ``YEAR/1-Year/psam_pNN.csv`` of 2018, 2019 and 2021, CA and TX, ``n`` people each; CA 2021 zipped as the Census does.

    Income depends on schooling, age, hours and, by -0.35 on the log scale, on being a woman; public coverage on income and, by
    0.5 on the logit scale, on being Black. Names and codes change in 2019 as the real ones did.
    """
    years, states = (2018, 2019, 2021), ("CA", "TX")
    for year in years:
        folder = root / str(year) / "1-Year"
        folder.mkdir(parents=True, exist_ok=True)
        for place, state in enumerate(states):
            frame = person_rows(np.random.default_rng((seed, year, place)), n, year, state)
            text, name = frame.to_csv(index=False), f"psam_p{STATES[state]}.csv"
            if year == years[-1] and place == 0:
                with zipfile.ZipFile(folder / f"csv_p{state.lower()}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                    archive.writestr(name, text)
                    archive.writestr(f"ACS{year}_PUMS_README.pdf", b"%PDF-1.4\n")
            else:
                (folder / name).write_text(text, encoding="utf-8")


def person_rows(rng: np.random.Generator, n: int, year: int, state: str) -> pd.DataFrame:
    """Return the rows of one file, as text: empty where a question is not asked."""

    def codes(values: Sequence[int], shares: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return rng.choice(values, n, p=np.array(shares) / sum(shares))

    age = np.minimum(rng.integers(0, 96, n), 94)
    sex, race = rng.integers(1, 3, n), codes(range(1, 10), (60, 12, 1, 0.2, 0.3, 14, 0.5, 7, 5))
    school = np.where(age < 3, 0, np.clip(np.round(rng.normal(18, 3, n)), 1, 24)).astype(int)
    adult, works = age > 15, (age > 15) & (rng.random(n) < np.where(age < 66, 0.75, 0.2))
    hours = np.where(works, np.clip(np.round(rng.normal(38, 11, n)), 1, 99), 0).astype(int)
    log_income = 8.3 + 0.11 * (school - 16) + 0.03 * np.minimum(age, 50) + 0.02 * hours - 0.35 * (sex == 2)
    income = np.where(works, np.exp(rng.normal(log_income, 0.6)), rng.exponential(9000, n)).round(-1).astype(int)
    covered = rng.random(n) < 1 / (1 + np.exp(0.4 + income / 15000 - 0.5 * (race == 2)))
    status = np.where(works, codes((1, 2), (95, 5)), codes((3, 6), (1, 9)))
    home = rng.random(n) < 0.08
    disability = {name: 1 + (rng.random(n) > 0.04) for name in ("DEAR", "DEYE", "DREM")}
    relation, travel = codes(range(18), [9, 6, 8] + [1] * 15), codes(range(1, 13), [60] + [3] * 11)
    later = year >= 2019
    if later:
        relation, travel = codes(range(20, 39), [9, 5] + [1] * 17), codes(range(1, 13), [60] + [3] * 11)
    minutes = np.clip(np.round(rng.gamma(2, 12 + 2 * (race == 2), n)), 1, 150).astype(int)
    area = rng.integers(101, 112, n)
    asked = np.ones(n, dtype=bool)
    travels = works & (status == 1) & ~home
    table: dict[str, tuple[object, object]] = {
        "RT": ("P", asked),
        "SERIALNO": ([f"{year}HU{i:07d}" for i in range(n)], asked),
        "DIVISION": (9, asked),
        "SPORDER": (1, asked),
        "PUMA": ([f"{code:05d}" for code in area], asked),
        "REGION": (4, asked),
        "ST": (STATES[state], asked),
        "ADJINC": (1013097, asked),
        "PWGTP": (rng.integers(0, 200, n), asked),
        "AGEP": (age, asked),
        "CIT": (codes(range(1, 6), (80, 1, 1, 9, 9)), asked),
        "COW": (codes(range(1, 9), (60, 8, 8, 5, 3, 8, 6, 2)), works),
        "ESP": (codes(range(1, 9), [1] * 8), age < 18),
        "FER": (codes((1, 2), (1, 12)), (sex == 2) & (age >= 15) & (age <= 50)),
        "GCL": (codes((1, 2), (1, 30)), age >= 30),
        "JWMNP": (minutes, travels),
        "JWTRNS" if later else "JWTR": ([f"{code:02d}" for code in np.where(home, 11, travel)], works & (status == 1)),
        "MAR": (np.where(adult, codes(range(1, 6), (48, 6, 10, 2, 34)), 5), asked),
        "MIG": (codes((1, 2, 3), (86, 1, 13)), age > 0),
        "MIL": (codes(range(1, 5), (1, 6, 2, 91)), age >= 17),
        "RELSHIPP" if later else "RELP": (relation, asked),
        "SCHL": ([f"{code:02d}" for code in school], age >= 3),
        "SEX": (sex, asked),
        "WKHP": (hours, works),
        "ANC": (codes(range(1, 5), (50, 20, 10, 20)), asked),
        "DIS": (np.where(np.min(list(disability.values()), axis=0) == 1, 1, 2), asked),
        "ESR": (status, adult),
        "NATIVITY": (codes((1, 2), (80, 20)), asked),
        "OCCP": ([f"{code:04d}" for code in rng.choice([10, 430, 2310, 4720, 5700, 9620], n)], works),
        "PINCP": (income, adult),
        "POBP": ([f"{code:03d}" for code in rng.choice([6, 48, 36, 303, 207], n)], asked),
        "POVPIP": (np.clip(income // 130, 0, 501), relation < (37 if later else 16)),
        "POWPUMA": ([f"{code:05d}" for code in area], travels),
        "PUBCOV": (2 - covered.astype(int), asked),
        "RAC1P": (race, asked),
        "PWGTP1": (rng.integers(0, 200, n), asked),
        "PWGTP2": (rng.integers(0, 200, n), asked),
        **{name: (values, asked) for name, values in disability.items()},
    }
    cells = {
        name: np.where(np.asarray(there), np.broadcast_to(np.asarray(values).astype(str), n), "")
        for name, (values, there) in table.items()
    }
    header = _HEADER.format(JWTR="JWTRNS" if later else "JWTR", RELP="RELSHIPP" if later else "RELP").split()
    return pd.DataFrame(cells)[header]
