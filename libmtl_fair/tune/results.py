"""What a study hands back: the table of its front, the chosen trial's recipe, and its test metrics, measured once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.markup import escape
from rich.table import Table

from libmtl_fair.files import write_json, write_text
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.tune.fingerprint import study_protocol, study_recipe
from libmtl_fair.tune.objective import ROLE, Outcome, Plan, run_trial
from libmtl_fair.tune.plots import image, page, trials_table
from libmtl_fair.tune.select import complete, front, has_disparity, to_recipe
from libmtl_fair.tune.study import quiet


def front_table(study: optuna.Study, chosen: FrozenTrial | None = None) -> Table:
    """Return the Pareto front as a table, with the baseline and the chosen trial marked."""
    trials, feasible = front(study)
    title = "Pareto front" if len(study.directions) > 1 else "best trial"
    if not feasible:
        title = "no trial meets the constraints; those that violate them least"
    others = [
        t for t in complete(study) if t.user_attrs.get(ROLE) == "baseline" or (chosen and t.number == chosen.number)
    ]
    shown = {t.number: t for t in [*trials, *others]}
    names = list(dict.fromkeys(name for t in shown.values() for name in t.user_attrs["validation"]))
    table = Table("trial", "", *names, title=f"{title} (validation)", title_justify="left")
    for trial in sorted(shown.values(), key=lambda t: tuple(t.values)):
        marks = [trial.user_attrs.get(ROLE) or ""]
        marks += ["chosen"] if chosen is not None and trial.number == chosen.number else []
        marks += [] if any(t.number == trial.number for t in trials) else ["not on the front"]
        cells = [_cell(trial.user_attrs["validation"].get(name)) for name in names]
        table.add_row(str(trial.number), ", ".join(m for m in marks if m), *cells)
    return table


def described(trial: FrozenTrial) -> str:
    """Return what a trial trained, in one line: its method, and its parameters, or its settings where those are fixed."""
    method = trial.user_attrs["method"]
    values = trial.params or trial.user_attrs["recipe"]["methods"][method]
    text = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    return f"trial {trial.number} ({method}): {text}"


def _cell(values: list[float] | None) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.4f}"


def outcome_on_test(study: optuna.Study, plan: Plan, trial: FrozenTrial, device: str = "auto") -> Outcome:
    """Train a trial again, with its own seeds, and measure it on test data."""
    recipe, protocol = to_recipe(trial), study_protocol(study)
    (method,) = recipe.methods
    return run_trial(
        plan, recipe, method, trial.user_attrs["seeds"], protocol or plan.plain_protocol(), device=device, part="test"
    )


def table_on_test(study: optuna.Study, outcomes: dict[int, Outcome]) -> Table:
    """Return validation and test values of some trials, side by side."""
    trials = {t.number: t for t in complete(study)}
    names = list(next(iter(outcomes.values())).found)
    table = Table("trial", "", *names, title="chosen trial on test data (measured once)", title_justify="left")
    for number, outcome in outcomes.items():
        trial = trials[number]
        role = trial.user_attrs.get(ROLE) or "chosen"
        table.add_row(str(number), f"{role}: validation", *(_cell(trial.user_attrs["validation"][n]) for n in names))
        table.add_row("", "test", *(_cell(outcome.found[n]) for n in names))
    return table


def best_recipe(study: optuna.Study, trial: FrozenTrial) -> Recipe:
    """Return the recipe that compares a trial with the reference over the seeds of the study's recipe."""
    recipe = study_recipe(study)
    made = to_recipe(trial, recipe)
    return Recipe.from_dict({**made.to_dict(), "name": f"{recipe.name}-trial{trial.number}"[:80]}, recipe._source)


def write_results(
    study: optuna.Study, trial: FrozenTrial, outcomes: dict[int, Outcome], folder: str | Path
) -> list[Path]:
    """Write ``best.yaml``, ``study.html``, ``front.png``, ``trials.csv`` and ``result.json``; return their paths."""
    folder = Path(folder)
    recipe = best_recipe(study, trial)
    content: dict[str, Any] = {
        "study": study.study_name,
        "chosen": trial.number,
        "states": {s.name.lower(): sum(t.state == s for t in study.get_trials(deepcopy=False)) for s in TrialState},
        "front": [t.number for t in front(study)[0]],
        "validation": {str(n): _by_number(study, n).user_attrs["validation"] for n in outcomes},
        "test": {str(n): outcome.found for n, outcome in outcomes.items()},
        "seeds": {str(n): outcome.seeds for n, outcome in outcomes.items()},
    }
    comment = f"# Trial {trial.number} of study {study.study_name}, beside the reference.\n"
    return [
        write_text(folder / "best.yaml", comment + recipe.to_yaml()),
        page(study, folder / "study.html"),
        *([image(study, folder / "front.png")] if has_disparity(study) else []),
        write_text(folder / "trials.csv", trials_table(study).to_csv(index=False)),
        write_json(folder / "result.json", content),
    ]


def hand_back(
    study: optuna.Study, trial: FrozenTrial, recipe: Recipe, folder: Path, device: str
) -> Iterator[Table | str]:
    """Measure the chosen trial and the baseline on test data, write the results, and yield what to show of them."""
    yield front_table(study, trial)
    yield f"chosen: {escape(described(trial))}\n"
    plan = Plan.make(recipe, list(study.metric_names or []) or None)
    baseline = [t for t in complete(study) if t.user_attrs.get(ROLE) == "baseline"]
    measured = {t.number: outcome_on_test(study, plan, t, device.split(",")[0]) for t in [trial, *baseline]}
    yield table_on_test(study, measured)
    with quiet():
        paths = write_results(study, trial, measured, folder)
    yield from (f"{path.stem}: {path}" for path in paths)


def _by_number(study: optuna.Study, number: int) -> FrozenTrial:
    return study.get_trials(deepcopy=False)[number]
