"""Mutated recipes, overrides, tables, specs and run folders: taken, or refused with an error of ours; never a trace.

python -m tests.harness.mutate --n 10000
"""

from __future__ import annotations

import copy
import functools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from libmtl_fair.data import load_table
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.recipe.schema import apply_overrides
from libmtl_fair.recipe.yaml_source import Source, parse_yaml
from libmtl_fair.report import card_markdown, read_run
from libmtl_fair.report.page import render
from tests.harness.common import Trials, WrongNumberError, main
from tests.harness.people import make_people

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SNIPPETS = [
    "&a ",
    "*a",
    "<<: ",
    "!!int ",
    "---\n",
    "%YAML 9.9\n",
    "[",
    "]",
    "{",
    "}",
    ": ",
    "- ",
    "\t",
    "#",
    "'",
    '"',
    "|\n",
    ">-\n",
]
SNIPPETS += [
    "\x00",
    "\x85",
    "\ufeff",
    "é",
    "😀",
    "1e999",
    ".nan",
    "~",
    "?",
    "\r",
    "\n",
    "0x",
    "@",
    "`",
    "\x1b[2J",
    "../",
    "=cmd()",
]
VALUES: list[Any] = [
    None,
    True,
    0,
    1,
    -1,
    10**25,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "EW",
    "adult",
    "p75",
    "1e-3",
    "a: b",
    "<<",
]
VALUES += [
    [],
    {},
    [1],
    ["age"],
    ["age", "nope"],
    {"a": 1},
    [[]],
    {"": {}},
    "sex*race",
    "race:top2",
    (0.6, 0.2, 0.2),
    "*",
    10**9,
    "\x1b[2J",
]


def mutated(data: Any, draw: random.Random) -> Any:
    """Return nested data with one to three values replaced, dropped, doubled or put where they do not belong."""
    data = copy.deepcopy(data)
    for _ in range(draw.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        todo = [data]
        while todo:
            here = todo.pop()
            keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
            places += [(here, key) for key in keys]
            todo += [here[key] for key in keys]
        if not places:
            return draw.choice(VALUES)
        here, key = draw.choice(places)
        kind = draw.randrange(4)
        if kind == 0:
            del here[key]
        elif kind == 1 and isinstance(here, dict):
            here[draw.choice(["x", "", key.upper() if isinstance(key, str) else "y", "épochs"])] = here[key]
        elif kind == 2 and len(places) > 1:
            here[key] = copy.deepcopy(draw.choice(places)[0])
        else:
            here[key] = copy.deepcopy(draw.choice(VALUES))
    return data


def _build(source: Source) -> str:
    if not isinstance(source.data, dict):
        return "no mapping"
    recipe = Recipe.from_dict(source.data, source)
    again = Recipe.from_dict(parse_yaml(recipe.to_yaml()).data)
    if again != recipe or again.fingerprint() != recipe.fingerprint():
        raise WrongNumberError("a recipe is another one after it was written and read")
    return "taken"


def recipe_text(draw: random.Random) -> str:
    """Bytes of a recipe file are cut, doubled or replaced."""
    text = draw.choice(RECIPES).read_text()
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(SNIPPETS) + text[at + draw.randint(0, 6) :]
    return _build(parse_yaml(text, "mutated.yaml"))


def recipe_values(draw: random.Random) -> str:
    """Values of a recipe are replaced."""
    return _build(Source(data=mutated(parse_yaml(draw.choice(RECIPES).read_text()).data, draw)))


def overrides(draw: random.Random) -> str:
    """``--set`` of anything."""
    paths = [
        "train.epochs",
        "methods.relif.x",
        "data.tasks.0",
        "seeds",
        "tune.space.a.b",
        "model.arch_args.q",
        "",
        ".",
        "a..b",
        "methods",
    ]
    given = f"{draw.choice(paths)}{draw.choice(['=', '', '=='])}{draw.choice([*map(repr, VALUES), *SNIPPETS])}"
    return _build(apply_overrides(parse_yaml(draw.choice(RECIPES).read_text()), [given]))


TASKS: dict[str, dict[str, Any]] = {
    "sick": {"kind": "binary"},
    "state": {"kind": "multiclass"},
    "signs": {"kind": "multilabel", "columns": ["pain", "cough"]},
    "cost": {"kind": "regression", "transform": "log"},
    "old": {"kind": "binary", "expression": "age >= 65 and job == 'nurse'"},
}
CELLS = ["?", {1: 2}, [1], 1e308, -np.inf, pd.Timestamp("2020-01-01"), "", 0, "None", "NA", "=1+1", "\x1b[2J", True]


def tables(draw: random.Random) -> str:
    """Columns of a table change their type, name or values, and the spec of tasks and groups its own."""
    frame = make_people(draw.choice([2, 60, 150, 150]), draw.randrange(10**6))
    column = draw.choice(list(frame.columns))
    change = draw.randrange(12)
    if change == 0:
        frame = frame.assign(**{column: np.nan})
    elif change == 1:
        frame = frame.assign(**{column: draw.choice(["x", 1 + 2j, pd.Timestamp("2020-01-01"), True, 1e300])})
    elif change == 2:
        frame = frame.drop(columns=column)
    elif change == 3:
        frame = frame.astype({column: "category"})
    elif change == 4:
        frame = frame.convert_dtypes()
    elif change == 5:
        frame = frame.rename(columns={column: draw.choice(["", 3, "age", "type", "=1"])})
    elif change == 6:
        frame[column] = frame[column].astype(object)
        frame.at[0, column] = draw.choice(CELLS)
    tasks = {name: copy.deepcopy(TASKS[name]) for name in draw.sample(list(TASKS), draw.randint(1, 4))}
    sensitive: Any = draw.choice([["sex"], ["race"], ["sex*race"], ["race:top2"]])
    options: dict[str, Any] = {"sensitive": sensitive}
    if draw.random() < 0.2:
        tasks = mutated(tasks, draw)
    if draw.random() < 0.2:
        fields = [
            "sensitive",
            "features",
            "categorical",
            "seed",
            "split",
            "stratify",
            "missing",
            "keep_groups",
            "subset",
        ]
        options[draw.choice(fields)] = copy.deepcopy(draw.choice(VALUES))
    elif draw.random() < 0.3:
        options["sensitive"] = {
            "race": {draw.choice(["bins", "labels", "merge", "keep", "of", "column"]): draw.choice(VALUES)}
        }
    data = load_table(frame, tasks=tasks, **options)
    for part in data.splits().values():
        if not np.isfinite(part.x.numpy()).all():
            raise WrongNumberError("inputs that are not finite")
        part.loader(7, shuffle=True, device="cpu")
    return "taken"


@functools.cache
def _finished() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mutate"))
    make_people(300, 0).to_csv(folder / "t.csv", index=False)
    data = {
        "table": str(folder / "t.csv"),
        "tasks": {"sick": {"kind": "binary"}, "cost": {"kind": "regression"}},
        "sensitive": {"sex": {"column": "sex"}},
    }
    methods = {"plain": {"weighting": "EW"}, "fair": {"weighting": "FairMT"}}
    recipe = {
        "name": "small",
        "data": data,
        "model": {"hidden": [4]},
        "train": {"epochs": 1},
        "seeds": [0, 1],
        "methods": methods,
    }
    return run_recipe(
        Recipe.from_dict({**recipe, "metrics": {"n_bootstrap": 20}}), folder / "run", note=lambda text: None
    )


def run_folders(draw: random.Random) -> str:
    """A file of a finished run is edited or damaged; what reports read of it is text, or an error of ours."""
    run = _finished()
    files = [p for p in sorted(run.rglob("*")) if p.suffix in (".json", ".jsonl", ".csv", ".yaml") and p.is_file()]
    file = draw.choice(files)
    kept = file.read_bytes()
    try:
        if file.suffix == ".json" and draw.random() < 0.7:
            file.write_text(json.dumps(mutated(json.loads(kept), draw), default=str))
        else:
            at = draw.randrange(max(len(kept), 1))
            middle = draw.choice([b"", b"\xff", b"[" * 3000, draw.choice(SNIPPETS).encode()])
            file.write_bytes(kept[:at] + middle + kept[at + draw.choice([0, 1, 30, 10**6]) :])
        found = read_run(run)
        text = card_markdown(found) + render(found, interactive=False, plots=iter(()))
        if "\x1b" in text:
            raise WrongNumberError(f"a control character of {file.name} reached the report")
        return "read"
    finally:
        file.write_bytes(kept)


TRIALS: Trials = {
    "recipe text": (5, recipe_text),
    "recipe values": (5, recipe_values),
    "overrides": (5, overrides),
    "tables": (5, tables),
    "run folders": (1, run_folders),  # a second each
}

if __name__ == "__main__":
    main(__doc__ or "", TRIALS, 10_000)
