"""A synthetic clinical time series with known group effects and missing labels, in mimic3-benchmarks' layout.

Every stay has a hidden severity that drifts; heart rate, breathing, pressure, oxygen and the coma scale follow it. Mortality,
decompensation, the hours left and the conditions follow it, too, with effects of groups that are known (:data:`EFFECTS`): women are
measured less often, and Black patients' oxygen saturation is read too high, so that the same severity looks milder.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from libmtl_fair.data.channels import NORMAL

PHENOTYPES = (
    "Acute and unspecified renal failure", "Acute cerebrovascular disease", "Acute myocardial infarction",
    "Cardiac dysrhythmias", "Chronic kidney disease", "Chronic obstructive pulmonary disease and bronchiectasis",
    "Complications of surgical procedures or medical care", "Conduction disorders",
    "Congestive heart failure; nonhypertensive", "Coronary atherosclerosis and other heart disease",
    "Diabetes mellitus with complications", "Diabetes mellitus without complication", "Disorders of lipid metabolism",
    "Essential hypertension", "Fluid and electrolyte disorders", "Gastrointestinal hemorrhage",
    "Hypertension with complications and secondary hypertension", "Other liver diseases", "Other lower respiratory disease",
    "Other upper respiratory disease", "Pleurisy; pneumothorax; pulmonary collapse",
    "Pneumonia (except that caused by tuberculosis or sexually transmitted disease)",
    "Respiratory failure; insufficiency; arrest (adult)", "Septicemia (except in labor)", "Shock",
)  # fmt: skip
"""The 25 conditions, in the benchmark's order."""

EFFECTS = {"measured_of_women": 0.6, "saturation_of_black_patients": 3.0, "death_of_black_patients": 0.8}
"""Share of measurements that women get; points of oxygen saturation; log-odds of dying beyond what severity says."""

_DRIFT = {
    "Diastolic blood pressure": (62.0, -5.0, 8.0),
    "Glucose": (130.0, 15.0, 30.0),
    "Heart Rate": (82.0, 12.0, 8.0),
    "Mean blood pressure": (80.0, -8.0, 8.0),
    "Oxygen saturation": (97.0, -2.5, 1.0),
    "Respiratory rate": (18.0, 3.0, 3.0),
    "Systolic blood pressure": (120.0, -10.0, 12.0),
    "Temperature": (36.8, 0.3, 0.4),
    "pH": (7.4, -0.04, 0.03),
}
"""Channel -> its mean, its change with one unit of severity, its noise."""

_COLUMNS = (
    "filename", "length of stay", "in-hospital mortality task (pos;mask;label)", "length of stay task (masks;labels)",
    "phenotyping task (labels)", "decompensation task (masks;labels)",
)  # fmt: skip


def write_mimic3(root: Path, n: int, size: tuple[int, ...] = (), seed: int = 0) -> None:
    """Write ``multitask/``, the four tasks' own folders and ``root/``, who is who: ``n`` stays, a quarter to test."""
    rng = np.random.default_rng(seed)
    lists: dict[tuple[str, str], list[Sequence[object]]] = {}
    for stay in range(n):
        subject, episode = 10_000 + stay // 2 * 2, stay % 2 + 1
        part = "test" if subject // 2 % 4 == 3 else "train"
        _stay(
            rng, root, part, f"{subject}_episode{episode}_timeseries.csv", lists, shortest=50.0 if episode == 1 else 6.0
        )
    header = {
        "multitask": _COLUMNS,
        "in-hospital-mortality": ("stay", "y_true"),
        "decompensation": ("stay", "period_length", "y_true"),
        "length-of-stay": ("stay", "period_length", "y_true"),
        "phenotyping": ("stay", "period_length", *PHENOTYPES),
    }
    for (task, part), rows in lists.items():
        _write(root / task / part / "listfile.csv", [header[task], *rows])
        if part == "train":
            held = [row for row in rows if int(str(row[0]).split("_")[0]) // 2 % 8 == 2]
            _write(root / task / "val_listfile.csv", [header[task], *held])


def _stay(
    rng: np.random.Generator,
    root: Path,
    part: str,
    name: str,
    lists: dict[tuple[str, str], list[Sequence[object]]],
    shortest: float,
) -> None:
    """Write one stay's files and note its lines in the lists."""
    gender, ethnicity, age = (
        int(rng.integers(1, 3)),
        int(rng.choice(5, p=[0.1, 0.05, 0.2, 0.1, 0.55])),
        rng.uniform(18, 90),
    )
    severity = rng.normal(0.02 * (age - 60), 1.0)
    hours = float(np.clip(rng.gamma(2.0, 14.0 + 8.0 * max(severity, 0)), shortest, 150.0))
    path = severity + np.cumsum(rng.normal(0.01 * severity, 0.15, int(hours) + 2))
    odds = 1.6 * path[-1] - 2.0 + EFFECTS["death_of_black_patients"] * (ethnicity == 2)
    died = bool(rng.random() < 1 / (1 + np.exp(-odds)))
    events = _events(rng, path, hours, gender, ethnicity)
    first = float(str(events[0][0]))
    conditions = [
        int(rng.random() < 1 / (1 + np.exp(0.6 - (0.9 if i % 3 == 0 else 0.2) * severity))) for i in range(25)
    ]
    times = list(range(int(hours + 1e-6) + 1))
    masks = [int(t > 4 and t > first) for t in times]
    worse = [int(died and hours - t < 24) for t in times]
    early = hours < 48
    lists.setdefault(("multitask", part), []).append(
        (
            name, f"{hours:.6f}", f"{0 if early else 47};{int(not early)};{int(died)}",
            ";".join([*map(str, masks), *(f"{hours - t:.6f}" for t in times)]), ";".join(map(str, conditions)),
            ";".join(map(str, [*masks, *worse])),
        )
    )  # fmt: skip
    seen = [t for t, mask in zip(times, masks) if mask]
    own: dict[str, list[Sequence[object]]] = {
        "in-hospital-mortality": [] if early else [(name, int(died))],
        "decompensation": [(name, f"{t:.6f}", worse[t]) for t in seen],
        "length-of-stay": [(name, f"{t:.6f}", f"{hours - t:.6f}") for t in seen],
        "phenotyping": [(name, f"{hours:.6f}", *conditions)],
    }
    header = ("Hours", *NORMAL)
    for task, rows in own.items():
        lists.setdefault((task, part), []).extend(rows)
    for task in ("multitask", *(task for task, rows in own.items() if rows)):
        within = [row for row in events if task != "in-hospital-mortality" or float(str(row[0])) < 48]
        _write(root / task / part / name, [header, *within])
    subject, episode = name.split("_")[:2]
    _write(
        root / "root" / part / subject / f"{episode}.csv",
        [
            ("Icustay", "Ethnicity", "Gender", "Age", "Height", "Weight", "Length of Stay", "Mortality"),
            (int(subject) * 10, ethnicity, gender, f"{age:.6f}", "", "", f"{hours / 24:.4f}", int(died)),
        ],
    )


def _events(
    rng: np.random.Generator,
    path: np.ndarray[tuple[int], np.dtype[np.float64]],
    hours: float,
    gender: int,
    ethnicity: int,
) -> list[list[object]]:
    """Return rows of hours and values as text, empty where nothing was measured."""
    share = 0.7 * (EFFECTS["measured_of_women"] if gender == 1 else 1.0)
    rows: list[list[object]] = []
    for time in np.sort(rng.uniform(0.05, hours - 0.01, max(3, int(hours * 0.8)))):
        severity, row = path[int(time)], [f"{time:.6f}"]
        for name in NORMAL:
            value = ""
            if name in _DRIFT and rng.random() < share:
                mean, slope, noise = _DRIFT[name]
                level = mean + slope * severity + noise * rng.normal()
                level += EFFECTS["saturation_of_black_patients"] * (name == "Oxygen saturation" and ethnicity == 2)
                value = f"{level:.2f}"
            elif name == "Glascow coma scale total" and rng.random() < share / 3:
                value = str(int(np.clip(round(15 - 2.5 * max(severity, 0)), 3, 15)))
            elif name == "Glascow coma scale eye opening" and rng.random() < share / 3:
                value = "4 Spontaneously" if severity < 1 else "To Speech"
            row.append(value)
        rows.append([*row] if any(row[1:]) else [row[0], *("86" if name == "Heart Rate" else "" for name in NORMAL)])
    return rows


def _write(path: Path, rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
