"""What a study hands back: its front, the chosen trial's recipe and test metrics; and whether validation and test agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState
from rich.markup import escape
from rich.table import Table

from libmtl_fair.errors import FairMTLError
from libmtl_fair.files import read_json, write_json, write_text
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.schema import Recipe, load_recipe
from libmtl_fair.tune.objectives import parse_measure, value_of
from libmtl_fair.tune.plan import ROLE, Candidate, Outcome, Plan, study_recipe
from libmtl_fair.tune.plots import image, page, trials_table
from libmtl_fair.tune.selection import complete, disparity, front, to_recipe
from libmtl_fair.tune.study import quiet
from libmtl_fair.tune.worker import protocol_of, run_trial

_FOLDS = 10


def hand_back(
    study: optuna.Study, trial: FrozenTrial, recipe: Recipe, folder: Path, device: str
) -> Iterator[Table | str]:
    """Measure the chosen trial and the baseline on test data, write the results, and yield what to show of them."""
    yield _front_table(study, trial)
    method = trial.user_attrs["method"]
    values = trial.params or trial.user_attrs["recipe"]["methods"][method]
    text = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    yield f"chosen: {escape(f'trial {trial.number} ({method}): {text}')}\n"
    plan, own = Plan.make(recipe, list(study.metric_names or []) or None), device.split(",")[0]
    protocol, outcomes = protocol_of(study, plan, own), {}
    title = "chosen trial on test data (measured once)"
    table = Table("trial", "", *(m.name for m in plan.measures), title=title, title_justify="left")
    baseline = {t.number: t for t in complete(study) if t.user_attrs.get(ROLE) == "baseline"}
    for each in {trial.number: trial, **baseline}.values():
        again, marks = to_recipe(each), each.user_attrs
        candidate = Candidate(again, again.reference, marks["seeds"])
        found = outcomes[each.number] = run_trial(plan, candidate, protocol, device=own, part="test")
        validation = (_cell(marks["validation"][name]) for name in found.found)
        table.add_row(str(each.number), f"{marks.get(ROLE) or 'chosen'}: validation", *validation)
        table.add_row("", "test", *map(_cell, found.found.values()))
    yield table
    with quiet():
        yield from (f"{path.stem}: {path}" for path in _write(study, trial, outcomes, folder))


def _front_table(study: optuna.Study, chosen: FrozenTrial) -> Table:
    """Return the Pareto front as a table, with the baseline and the chosen trial marked."""
    (trials, feasible), title = front(study), "Pareto front" if len(study.directions) > 1 else "best trial"
    if not feasible:
        title = "no trial meets the constraints; those that violate them least"
    on_front = {t.number: t for t in trials}
    others = [t for t in complete(study) if t.user_attrs.get(ROLE) == "baseline" or t.number == chosen.number]
    shown = on_front | {t.number: t for t in others}
    names = list(dict.fromkeys(name for t in shown.values() for name in t.user_attrs["validation"]))
    table = Table("trial", "", *names, title=f"{title} (validation)", title_justify="left")
    for number, trial in sorted(shown.items(), key=lambda item: tuple(item[1].values)):
        marks = [trial.user_attrs.get(ROLE), "chosen" if number == chosen.number else None]
        marks += [None if number in on_front else "not on the front"]
        cells = [_cell(trial.user_attrs["validation"].get(name, [])) for name in names]
        table.add_row(str(number), ", ".join(filter(None, marks)), *cells)
    return table


def _cell(values: Sequence[float] | NDArray[np.float64]) -> str:
    """Return the mean, and after several values their standard deviation."""
    if not len(values):
        return ""
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def best_recipe(study: optuna.Study, trial: FrozenTrial) -> Recipe:
    """Return the recipe that compares a trial with the reference over the seeds of the study's recipe."""
    recipe = study_recipe(study)
    made = to_recipe(trial, recipe)
    return Recipe.from_dict({**made.to_dict(), "name": f"{recipe.name}-trial{trial.number}"[:80]}, recipe._source)


def _write(study: optuna.Study, trial: FrozenTrial, outcomes: Mapping[int, Outcome], folder: Path) -> list[Path]:
    """Write ``best.yaml``, ``study.html``, ``front.png``, ``trials.csv`` and ``result.json``; return their paths."""
    trials = study.get_trials(deepcopy=False)
    content = {
        "study": study.study_name,
        "chosen": trial.number,
        "states": {s.name.lower(): sum(t.state == s for t in trials) for s in TrialState},
        "front": [t.number for t in front(study)[0]],
        "validation": {str(n): trials[n].user_attrs["validation"] for n in outcomes},
        "test": {str(n): outcome.found for n, outcome in outcomes.items()},
        "seeds": {str(n): outcome.seeds for n, outcome in outcomes.items()},
    }
    best = f"# Trial {trial.number} of study {study.study_name}, beside the reference.\n{best_recipe(study, trial).to_yaml()}"
    return [
        write_text(folder / "best.yaml", best),
        page(study, folder / "study.html"),
        *([image(study, folder / "front.png")] if disparity(study) is not None else []),
        write_text(folder / "trials.csv", trials_table(study).to_csv(index=False)),
        write_json(folder / "result.json", content),
    ]


Statistic = Callable[[Predictions], float]


def agreement_table(folder: Path) -> Table:
    """Return a table of a run's main numbers on validation and on test data, side by side.

    ± after a mean: over seeds; after the difference: of drawing other people, of the first seed, where its predictions were kept.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    title = "validation and test agree? (± over seeds; of the difference: over people)"
    table = Table("", "validation", "test", "test - validation", title=title, title_justify="left")
    for method in sorted({path.parent.parent.name for path in folder.glob("*/seed*/metrics.json")}):
        seeds = sorted((folder / method).glob("seed*"))
        held = [read_json(path / "metrics.json") for path in seeds]
        table.add_section()
        table.add_row(f"[bold]{method}")
        deltas = {str(entry["delta_name"]): float(entry["delta"]) for entry in held[0]["audit"]["val"]}
        names = {f"macro {name}": f"macro_{name}" for name in held[0]["utility"]["val"]["macro"]}
        names |= {f"bias@{name}": f"bias@{name}" for name in deltas} | {"eo difference, worst": "eo_difference"}
        for name, measure in names.items():
            values = np.array([[_read(each, part, name) for part in ("val", "test")] for each in held])
            known = (values[:, 1] - values[:, 0])[~np.isnan(values).any(1)]
            spread = _deviation(seeds[0], partial(_statistic, measure, deltas, recipe))
            gap = f"{known.mean():+.4f}{'' if spread is None else f' ± {spread:.4f}'}" if len(known) else ""
            table.add_row(name, *(_cell(part[~np.isnan(part)]) for part in values.T), gap)
    return table


def _read(held: Mapping[str, Any], part: str, name: str) -> float:
    """Return a number of ``metrics.json``, NaN where it is missing or undefined."""
    if name.startswith("macro "):
        found = [held["utility"][part]["macro"].get(name.removeprefix("macro "))]
    elif name.startswith("bias@"):
        found = [entry["bias"] for entry in held["audit"][part] if f"bias@{entry['delta_name']}" == name]
    else:
        rows = [row for row in held["groups"][part] if row["group"] == "difference"]
        found = [row["value"] for row in rows if row["metric"].startswith("equalized_odds")]
    return max((value for value in found if value is not None and value == value), default=math.nan)


def _statistic(name: str, deltas: Mapping[str, float], recipe: Recipe, predictions: Predictions) -> float:
    measure = parse_measure(name, {t.name: t.kind for t in predictions.tasks}, list(predictions.groups), list(deltas))
    return value_of(measure, predictions, deltas, recipe)


def _deviation(seed: Path, statistic: Statistic) -> float | None:
    """Return the deviation of a difference between test and validation, two independent draws of people."""
    paths = [seed / f"predictions_{part}.parquet" for part in ("val", "test")]
    if not all(path.exists() for path in paths):
        return None
    try:
        return math.hypot(*(sampling_deviation(Predictions.load(path), statistic) for path in paths))
    except FairMTLError:  # a measure that these tasks do not have
        return None


def sampling_deviation(predictions: Predictions, statistic: Statistic, folds: int = _FOLDS) -> float:
    """Return the standard deviation of a statistic over draws of people, by the jackknife over ``folds``: every g-th row is one."""

    def without(fold: int) -> Predictions:
        p, rows = predictions, torch.arange(len(predictions)) % folds != fold
        parts = (p.scores, p.outputs, p.labels, p.groups)
        scores, outputs, labels, groups = ({name: value[rows] for name, value in part.items()} for part in parts)
        return Predictions(p.tasks, scores, outputs, labels, groups, p.group_names)

    return float(math.sqrt(folds - 1) * np.std([statistic(without(fold)) for fold in range(folds)]))
