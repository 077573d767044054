"""Mutated tables, specs and options: a dataset or an error of ours, never another exception or a warning."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from libmtl_fair.data import load_table
from libmtl_fair.errors import FairMTLError

VALUES = [None, 0, 1, -1, "", "a", "age", "sick", 3.5, [], {}, ["age"], ["age", "nope"], {"age": 1}, True]
VALUES += [float("nan"), (0.6, 0.2, 0.2), "*", ":top2", "sex*race", "race:top2", 10**9]
TASKS = {
    "sick": {"kind": "binary"},
    "state": {"kind": "multiclass"},
    "signs": {"kind": "multilabel", "columns": ["pain", "cough"]},
    "cost": {"kind": "regression", "transform": "log"},
}
TASK_FIELDS = ["kind", "column", "columns", "positive", "threshold", "expression", "classes", "transform", "forbids"]
OPTIONS = ["sensitive", "features", "categorical", "seed", "split", "stratify", "missing", "keep_groups", "subset"]
GROUP_FIELDS = ["bins", "labels", "merge", "keep", "of", "also_in", "column"]
CELLS = ["?", {1: 2}, [1], 1e308, -np.inf, pd.Timestamp("2020-01-01"), "", 0]


def mutate_cell(frame: pd.DataFrame, column: str, draw: random.Random) -> pd.DataFrame:
    frame[column] = frame[column].astype(object)
    frame.at[0, column] = draw.choice(CELLS)
    return frame


MUTATIONS: list[Callable[[pd.DataFrame, str, random.Random], pd.DataFrame]] = [
    lambda f, c, r: f.assign(**{c: np.nan}),
    lambda f, c, r: f.assign(**{c: "x"}),
    lambda f, c, r: f.assign(**{c: pd.Timestamp("2020-01-01")}),
    lambda f, c, r: f.assign(**{c: 1 + 2j}),
    lambda f, c, r: f.drop(columns=c),
    lambda f, c, r: f.astype({c: "category"}),
    lambda f, c, r: f.convert_dtypes(),
    lambda f, c, r: f.rename(columns={c: r.choice(["", 3, "age"])}),
    mutate_cell,
]


@pytest.mark.parametrize("block", range(4))
def test_mutated_input(people_of, block: int) -> None:
    for seed in range(block * 30, block * 30 + 30):
        draw = random.Random(seed)
        frame = people_of(draw.choice([2, 12, 150]), seed)
        if draw.random() < 0.6:
            frame = draw.choice(MUTATIONS)(frame, draw.choice(list(frame.columns)), draw)
        tasks: dict[str, dict[str, Any]] = {
            name: dict(TASKS[name]) for name in draw.sample(list(TASKS), draw.randint(1, 4))
        }
        options: dict[str, Any] = {"sensitive": draw.choice([["sex"], ["race"], ["sex*race"], ["race:top2"]])}
        if draw.random() < 0.3:
            tasks[draw.choice(list(tasks))][draw.choice(TASK_FIELDS)] = draw.choice(VALUES)
        if draw.random() < 0.3:
            options[draw.choice(OPTIONS)] = draw.choice(VALUES)
        elif draw.random() < 0.3:
            options["sensitive"] = {"race": {draw.choice(GROUP_FIELDS): draw.choice(VALUES)}}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                data = load_table(frame, tasks=tasks, **options)
        except FairMTLError:
            continue
        for part in data.splits().values():
            assert np.isfinite(part.x.numpy()).all(), f"seed {seed}"
            assert all(len(values) == len(part) > 0 for values in (*part.labels.values(), *part.groups.values()))
            part.loader(7, shuffle=True, device="cpu")
