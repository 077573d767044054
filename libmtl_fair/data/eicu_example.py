"""Made-up stays in the layout that TPC-LoS-prediction makes of eICU, with known effects of gender and ethnicity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

_SERIES = ("heartrate", "respiration", "sao2", "systemicmean", "temperature", "glucose", "pH")
_SLOPES = np.array([0.5, 0.4, -0.6, -0.4, 0.2, 0.3, -0.4])
_ETHNICITIES = ("African American", "Asian", "Caucasian", "Hispanic", "misc")


def write_eicu(root: Path, n: int, size: tuple[int, ...] = (), seed: int = 0) -> None:
    """Write train, val and test (70, 15 and 15 %) with timeseries.csv, labels.csv, flat.csv, diagnoses.csv and stays.txt.

    Dying and the days in the unit follow a hidden severity, which the series follow with noise; by 0.6 on the logit scale women, and
    by 0.5 on the log scale African American patients' days, differ beyond it. About a tenth of the labels of mortality are missing.
    """
    rng = np.random.default_rng(seed)
    numbers = 141_000 + rng.permutation(n)
    severity, male = rng.normal(0, 1, n), rng.integers(0, 2, n)
    ethnicity = rng.choice(len(_ETHNICITIES), n, p=[0.2, 0.05, 0.6, 0.1, 0.05])
    days = np.exp(0.7 + 0.5 * severity + 0.5 * (ethnicity == 0) + rng.normal(0, 0.5, n)).clip(6 / 24, 14)
    died = rng.random(n) < 1 / (1 + np.exp(1.6 - 1.2 * severity - 0.6 * (male == 0)))
    parts = np.split(np.arange(n), [round(0.7 * n), round(0.85 * n)])
    for part, rows in zip(("train", "val", "test"), parts):
        folder = root / part
        folder.mkdir(parents=True, exist_ok=True)
        labels = pd.DataFrame(
            {
                "patient": numbers[rows],
                "uniquepid": [f"002-{number}" for number in numbers[rows]],
                "patienthealthsystemstayid": numbers[rows] - 13_000,
                "unitvisitnumber": 1,
                "unitdischargeoffset": (days[rows] * 1440).round().astype(int),
                "predictedhospitalmortality": 0.1,
                "actualhospitalmortality": np.where(rng.random(len(rows)) < 0.1, np.nan, died[rows].astype(float)),
                "predictediculos": 3.0,
                "actualiculos": days[rows].round(4),
                "unitdischargelocation_Death": died[rows].astype(int),
                "unitdischargestatus_Alive": 1 - died[rows].astype(int),
            }
        )
        flat = pd.DataFrame(
            {"patient": numbers[rows], "gender": male[rows].astype(float), "age": rng.uniform(-1, 1, len(rows))}
        )
        flat["admissionheight"], flat["nullheight"] = 0.0, 1
        for place, name in enumerate(_ETHNICITIES):
            flat[f"ethnicity_{name}"] = (ethnicity[rows] == place).astype(int)
        labels.to_csv(folder / "labels.csv", index=False)
        flat.to_csv(folder / "flat.csv", index=False)
        pd.DataFrame({"patient": numbers[rows], "cardiovascular": 0}).to_csv(folder / "diagnoses.csv", index=False)
        (folder / "stays.txt").write_text("".join(f"{number}\n" for number in numbers[rows]), encoding="utf-8")
        series = [_hours(rng, numbers[row], severity[row], int(days[row] * 24)) for row in rows]
        pd.concat(series).to_csv(folder / "timeseries.csv", index=False)


def _hours(rng: np.random.Generator, number: int, severity: float, hours: int) -> pd.DataFrame:
    """Return the hours of one stay: scaled values, how long ago each was measured, and the hour of the day."""
    values = np.clip(severity * _SLOPES + rng.normal(0, 0.6, (hours, len(_SERIES))), -4, 4).round(4)
    seen = rng.choice([1.0, 0.75, 0.375], (hours, len(_SERIES)))
    frame = pd.DataFrame(values, columns=list(_SERIES))
    frame.insert(0, "patient", number)
    frame.insert(1, "time", np.arange(1, hours + 1))
    masks = pd.DataFrame(seen, columns=[f"{name}_mask" for name in _SERIES])
    return pd.concat([frame, masks, pd.Series(np.arange(1, hours + 1) % 24 / 12 - 1, name="hour")], axis=1)
