"""Clinical series in their publishers' layouts: mimic3-benchmarks' four tasks, eICU in two; damaged files."""

from __future__ import annotations

import csv
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from libmtl_fair import load_dataset
from libmtl_fair.data.channels import COLUMNS, CONTINUOUS, NORMAL, Normaliser, discretised, padded
from libmtl_fair.data.mimic3 import FOLDERS
from libmtl_fair.data.mimic3_example import PHENOTYPES
from libmtl_fair.data.sources import write_example
from libmtl_fair.errors import DataError
from libmtl_fair.functional import valid_steps

HEADER = ["Hours", *NORMAL]
MIMIC = tuple(FOLDERS)


@pytest.fixture(scope="module")
def mimic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example("mimic3", tmp_path_factory.mktemp("data") / "mimic3", 40)


@pytest.fixture(scope="module")
def eicu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example("eicu", tmp_path_factory.mktemp("data") / "eicu", 80)


def cells_of(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def event(hour: str, **values: str) -> list[str]:
    named = {name.replace("_", " "): value for name, value in values.items()}
    return [hour, *(named.get(name, "") for name in NORMAL)]


def test_the_discretiser_keeps_the_last_value_of_a_step_and_carries_it_on() -> None:
    events = [
        event("0.2", Heart_Rate="90", Glascow_coma_scale_total="14"),
        event("0.9", Heart_Rate="100"),
        event("2.0", pH="7.2"),  # the end of the second step
        event("2.5", Heart_Rate="70"),
        event("9.0", Heart_Rate="1"),  # after the end
    ]
    x = discretised(events, HEADER, 3.4, 1.0, "file")
    at = {name: i for i, name in enumerate(COLUMNS)}
    assert x.shape == (4, 76) and len(CONTINUOUS) == 12
    assert x[:, at["Heart Rate"]].tolist() == [100, 100, 70, 70]
    assert x[:, at["mask->Heart Rate"]].tolist() == [1, 0, 1, 0]
    np.testing.assert_allclose(x[:, at["pH"]], [7.4, 7.2, 7.2, 7.2], rtol=1e-6)
    assert x[:, at["Glascow coma scale total->14"]].tolist() == [1, 1, 1, 1]
    assert x[:, at["Weight"]].tolist() == [81.0] * 4
    assert (x[:, [i for i, n in enumerate(COLUMNS) if n.startswith("Glascow coma scale total->")]].sum(1) == 1).all()


BENCHMARKS_OWN = {1.0: 425609.37, 0.8: 529444.75, 2.0: 216175.03}
"""Step of the series -> sum of what mimic3-benchmarks' own Discretizer ("previous", with masks) makes of the example's test stays."""


@pytest.mark.parametrize("timestep", BENCHMARKS_OWN)
def test_the_discretiser_is_the_benchmarks_own(mimic: Path, timestep: float) -> None:
    total = 0.0
    for path in sorted((mimic / "multitask" / "test").glob("*_timeseries.csv")):
        header, *events = cells_of(path)
        total += discretised(events, header, float(events[-1][0]) + 1.3, timestep, path.name).sum(dtype=np.float64)
    assert total == pytest.approx(BENCHMARKS_OWN[timestep], rel=1e-6)


def test_the_normaliser_is_the_mean_and_deviation_of_all_steps() -> None:
    parts = [np.random.default_rng(i).normal(5, 3, (n, 4)).astype(np.float32) for i, n in enumerate((3, 7, 1))]
    found, whole = Normaliser.fitted(iter(parts), [0, 2]), np.concatenate(parts)
    wanted = (whole - whole.mean(0)) / whole.std(0, ddof=1)
    np.testing.assert_allclose(found.of(whole)[:, [0, 2]], wanted[:, [0, 2]], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.of(whole)[:, [1, 3]], whole[:, [1, 3]])
    assert padded(parts[1], 5).shape == padded(parts[0], 5).shape == (5, 4)


def test_the_four_tasks_hold_what_the_listfile_says(mimic: Path) -> None:
    data = load_dataset("mimic3", root=mimic, args={"hours": 30, "los_days": 1.0})
    lines = {row[0]: row for row in cells_of(mimic / "multitask" / "test" / "listfile.csv")[1:]}
    names = list(lines)  # the test stays come last, in the order of their list
    assert [task.kind for task in data.tasks] == ["binary", "binary_sequence", "binary_sequence", "multilabel"]
    (x, labels), *rest = data.test.loader(64)
    assert not rest and x.shape == (len(names), 30, 76) and torch.isfinite(x).all()
    for i, name in enumerate(names):
        _, hours, died, left, conditions, worse = lines[name]
        _, mask, label = map(int, died.split(";"))
        assert labels["in_hospital_mortality"][i].nan_to_num(-1).item() == (label if mask else -1)
        assert labels["phenotyping"][i].tolist() == [float(c) for c in conditions.split(";")]
        n = min(int(float(hours) + 1 - 1e-6), 30)
        assert valid_steps(x[i]).sum() == n
        for task, text in (("length_of_stay", left), ("decompensation", worse)):
            cells = text.split(";")
            seen = {t: float(cells[len(cells) // 2 + t]) for t in range(len(cells) // 2) if int(cells[t])}
            for t, value in seen.items():
                if 0 < t <= n:  # a label of hour t stands at the step before
                    wanted = value if task == "decompensation" else float(value > 24)
                    assert labels[task][i, t - 1] == wanted
            assert labels[task][i].isfinite().sum() == sum(0 < t <= n for t in seen)


def test_the_length_of_stay_may_be_the_hours_that_are_left(mimic: Path, tmp_path: Path) -> None:
    data = load_dataset("mimic3", root=mimic, tasks=["length_of_stay"], args={"hours": 30, "los": "classes"})
    assert [(task.kind, task.out_features) for task in data.tasks] == [("multiclass_sequence", 10)]
    lines = cells_of(mimic / "multitask" / "test" / "listfile.csv")[1:]
    (_, labels), *_ = data.test.loader(64)
    for i, (_, hours, _, left, *_) in enumerate(lines):
        cells, n = left.split(";"), min(int(float(hours) + 1 - 1e-6), 30)
        wanted = {t - 1: float(cells[len(cells) // 2 + t]) for t in range(1, n + 1) if cells[t] == "1"}
        found = labels["length_of_stay"][i]
        assert {t: v for t, v in enumerate(found.tolist()) if v == v} == pytest.approx(wanted, abs=1e-4)
    for folder in ("length-of-stay", "root"):
        (tmp_path / folder).symlink_to(mimic / folder)
    own = load_dataset("mimic3", root=tmp_path, tasks=["length_of_stay"], args={"hours": 30, "los": "classes"})
    (_, other), *_ = own.test.loader(64)
    rows = [sorted(map(tuple, each["length_of_stay"].nan_to_num(-1).tolist())) for each in (labels, other)]
    some = [row for row in rows[0] if max(row) >= 0]
    assert some == [row for row in rows[1] if max(row) >= 0] and len(some) > 3


def test_the_tasks_own_folders_give_the_same_labels(mimic: Path, tmp_path: Path) -> None:
    for folder in (*FOLDERS.values(), "root"):
        (tmp_path / folder).symlink_to(mimic / folder)
    one, other = (load_dataset("mimic3", root=root, args={"hours": 24}) for root in (mimic, tmp_path))
    for part in ("train", "val", "test"):
        assert len(getattr(one, part)) == len(getattr(other, part))
    pair = [next(iter(data.test.loader(64)))[1] for data in (one, other)]
    keys = [[tuple(row) for row in each["phenotyping"].int().tolist()] for each in pair]
    order = [keys[1].index(key) for key in keys[0]]
    for task in MIMIC:
        assert torch.equal(pair[0][task].nan_to_num(-1), pair[1][task][order].nan_to_num(-1))


def mimic_without_list(mimic: Path, root: Path) -> Path:
    (root / "multitask").mkdir(parents=True)
    for name in ("root", "multitask/train", "multitask/test"):
        (root / name).symlink_to(mimic / name)
    return root


def test_a_patient_is_in_one_part_only_and_a_list_of_validation_is_followed(mimic: Path, tmp_path: Path) -> None:
    data = load_dataset("mimic3", root=mimic_without_list(mimic, tmp_path / "other"))
    stays = data.train.reader.stays  # type: ignore[union-attr]
    of = {
        part: {stay.file.name.split("_")[0] for stay in stays if stay.part == part} for part in ("train", "val", "test")
    }
    assert not (of["train"] & of["val"] or of["train"] & of["test"]) and all(of.values())
    root = mimic_without_list(mimic, tmp_path / "listed")
    lines = (mimic / "multitask" / "train" / "listfile.csv").read_text().splitlines(keepends=True)
    (root / "multitask" / "val_listfile.csv").write_text("".join(lines[:6]))
    assert len(load_dataset("mimic3", root=root).val) == 5


def test_readers_go_to_workers(mimic: Path, eicu: Path) -> None:
    for data in (load_dataset("mimic3", root=mimic, args={"hours": 5}), load_dataset("eicu", root=eicu)):
        reader = data.train.reader
        again = pickle.loads(pickle.dumps(reader))
        assert reader is not None and torch.equal(reader.read(3, ())[0], again.read(3, ())[0])


def test_eicu_reads_each_stays_hours(eicu: Path) -> None:
    import pandas as pd

    data = load_dataset("eicu", root=eicu, args={"hours": 12})
    series, labels = (pd.read_csv(eicu / "val" / f"{name}.csv") for name in ("timeseries", "labels"))
    x, y = next(iter(data.val.loader(64)))
    for i, stay in enumerate(labels.patient):
        rows = series[series.patient == stay].drop(columns="patient").to_numpy(np.float32)[:12]
        rows[:, 0] /= 24
        torch.testing.assert_close(x[i, : len(rows)], torch.from_numpy(rows))
        assert (x[i, len(rows) :] == 0).all()
        days = labels.actualiculos[i]
        assert bool(y["length_of_stay"][i].isnan()) == (days * 24 <= 12)
    known = labels.actualhospitalmortality.notna()
    assert y["mortality"][torch.tensor(known)].tolist() == labels.actualhospitalmortality[known].tolist()
    wide = load_dataset("eicu", root=eicu, args={"flat": True})
    assert wide.input_shape[1] > data.input_shape[1] and set(data.groups["gender"]) == {"Female", "Male"}


def write(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def first(folder: Path) -> Path:
    return sorted(folder.glob("*_timeseries.csv"))[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: write(r / "train" / "listfile.csv", lambda t: t.replace(";1;", ",1;", 1)), r"listfile.csv': line 2 cannot be read"),
        (lambda r: (r / "test" / "listfile.csv").unlink(), r"listfile.csv' cannot be read"),
        (lambda r: write(r / "test" / "listfile.csv", lambda t: ""), "listfile.csv' is empty"),
        (lambda r: [p.unlink() for p in (r / "train").glob("*_timeseries.csv")], r"_timeseries.csv' cannot be read"),
        (lambda r: [write(p, lambda t: t[:-9]) for p in (r / "train").glob("*series.csv")], r"_timeseries.csv': line \d+ has \d+ cells"),
        (lambda r: [write(p, lambda t: t.replace("Hours", "Time")) for p in (r / "train").glob("*series.csv")], "lacks 'Hours first'"),
        (lambda r: [write(p, lambda t: t.replace("\n0.", "\nx0.")) for p in (r / "train").glob("*series.csv")], "Hours is 'x0"),
        (lambda r: write(r / "train" / "listfile.csv", lambda t: t.splitlines()[0]), "listfile.csv' holds no stay"),
        *((lambda r, bad=bad: write(r / "train" / "listfile.csv", lambda t: re.sub(r"csv,[\d.]+", f"csv,{bad}", t, count=1)),
           r"listfile.csv': line 2 cannot be read \(length of stay.*0 or more") for bad in ("nan", "-3", "inf")),
        (lambda r: write(r / "train" / "listfile.csv", lambda t: re.sub(r";1(?=;[01](;[01])+\n)", ";7", t, count=1)), "line 2 cannot be read .*0 or 1"),
        (lambda r: write(r / "train" / "listfile.csv", lambda t: re.sub(r"(;1;(?:\d+\.\d+;){8})[\d.]+", r"\1-5", t, count=1)), "line 2 cannot be read .*0 or more"),
        (lambda r: [write(p, lambda t: "\n".join([t.splitlines()[0], *t.splitlines()[:0:-1]])) for p in (r / "train").glob("*series.csv")], "Hours go back from"),
        (lambda r: [write(p, lambda t: t.replace("\n", "\n-", 2)) for p in (r / "train").glob("*series.csv")], "'-Hours|hours after|Hours"),
    ],
)  # fmt: skip
def test_damaged_files_of_mimic_are_named(
    mimic: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(mimic / "multitask", tmp_path / "multitask")
    (tmp_path / "root").symlink_to(mimic / "root")
    damage(tmp_path / "multitask")
    with pytest.raises(DataError, match=message):
        load_dataset("mimic3", root=tmp_path)


def test_a_folder_without_the_benchmark_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"in-hospital-mortality.*expected the folders that mimic3-benchmarks' scripts write"
    ):
        load_dataset("mimic3", root=tmp_path)
    with pytest.raises(DataError, match=r"labels.csv is missing \(one line a stay\)"):
        load_dataset("eicu", root=tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("timeseries.csv", lambda t: t.replace("patient,", "id,", 1), "expected columns patient, time"),
        ("timeseries.csv", lambda t: t + t.splitlines()[1] + "\n", "do not stand together"),
        ("timeseries.csv", lambda t: t.splitlines()[0] + "\n", "is not in timeseries.csv and flat.csv"),
        ("labels.csv", lambda t: t.replace("actualiculos", "iculos", 1), "unknown column 'actualiculos'"),
        ("flat.csv", lambda t: t + t.splitlines()[1] + "\n", "every stay once"),
        ("flat.csv", lambda t: t.replace(",1.0,", ",F,", 1), r"flat.csv': gender of stay \d+ is 'F'; expected 0 or 1"),
        (
            "flat.csv",
            lambda t: t.replace(",1.0,", ",7,", 1),
            r"flat.csv': gender of stay \d+ is '7.0'; expected 0 or 1",
        ),
        (
            "flat.csv",
            lambda t: re.sub(r",\d\n", ",x\n", t, count=1),
            r"flat.csv': ethnicity_misc of stay \d+ is 'x'; expected 0 or 1",
        ),
        (
            "labels.csv",
            lambda t: re.sub(r"\d+\.\d+(?=,\d,\d,?.*\n)", "three", t, count=1),
            r"labels.csv': actualiculos of stay \d+ is 'three'; expected a number",
        ),
    ],
)
def test_damaged_files_of_eicu_are_named(
    eicu: Path, tmp_path: Path, file: str, change: Callable[[str], str], message: str
) -> None:
    shutil.copytree(eicu, tmp_path / "eicu")
    write(tmp_path / "eicu" / "train" / file, change)
    with pytest.raises(DataError, match=message):
        load_dataset("eicu", root=tmp_path / "eicu")


def test_files_of_other_editors_are_the_same_files(mimic: Path, eicu: Path, tmp_path: Path) -> None:
    for name, held in (("mimic3", mimic), ("eicu", eicu)):
        shutil.copytree(held, tmp_path / name)
        for path in (tmp_path / name).rglob("*.csv"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        if name == "eicu":
            write(tmp_path / name / "train" / "timeseries.csv", lambda t: t.replace("\n", "\n\n", 5) + "\n\n")
        (x, labels), (y, others) = (
            next(iter(load_dataset(name, root=root).train.loader(64, device="cpu"))) for root in (held, tmp_path / name)
        )
        assert torch.equal(x, y)
        assert all(torch.equal(labels[t].nan_to_num(-1), others[t].nan_to_num(-1)) for t in labels if t != "sensitive")


def test_a_damaged_hour_is_named_when_it_is_read(eicu: Path, tmp_path: Path) -> None:
    shutil.copytree(eicu, tmp_path / "eicu")
    path = tmp_path / "eicu" / "train" / "timeseries.csv"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].rsplit(",", 2)[0]
    path.write_text("\n".join(lines) + "\n")
    data = load_dataset("eicu", root=tmp_path / "eicu")
    with pytest.raises(DataError, match=r"timeseries.csv': stay \d+: .*expected 17 numbers a line"):
        list(data.train.loader(16))


def test_the_examples_have_the_effects_that_they_name(tmp_path: Path) -> None:
    root = write_example("mimic3", tmp_path / "mimic3", 120)
    rows = {"1": [0, 0], "2": [0, 0]}
    for path in (root / "multitask").rglob("*_timeseries.csv"):
        part, (subject, episode, _) = path.parent.name, path.name.split("_")
        header, person = cells_of(root / "root" / part / subject / f"{episode}.csv")
        gender = person[header.index("Gender")]
        cells = [cell for row in cells_of(path)[1:] for cell in row[1:]]
        rows[gender][0] += sum(cell != "" for cell in cells)
        rows[gender][1] += len(cells)
    shares = {gender: seen / every for gender, (seen, every) in rows.items()}
    assert shares["1"] / shares["2"] == pytest.approx(0.6, abs=0.05)
    assert len(PHENOTYPES) == 25
