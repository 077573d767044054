"""What a study hands back: its front and plots, the chosen trial's recipe and test metrics; whether validation and test agree."""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState
from rich.markup import escape
from rich.table import Table

from libmtl_fair.errors import FairMTLError
from libmtl_fair.files import atomic_path, write_json, write_text
from libmtl_fair.metrics.scores import thresholds_in_use
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.measure import Protocol
from libmtl_fair.recipe.schema import Recipe, load_recipe
from libmtl_fair.report.theme import PALETTE, REFERENCE, themed
from libmtl_fair.shown import csv_text, printable
from libmtl_fair.tune.evidence import sampling_deviation
from libmtl_fair.tune.objectives import MACROS, parse_measure, value_of
from libmtl_fair.tune.plan import DESCRIBED, FIXED, ROLE, Candidate, Plan, study_recipe
from libmtl_fair.tune.selection import Rules, complete, disparity, explain, front, standings, to_recipe
from libmtl_fair.tune.study import quiet
from libmtl_fair.tune.worker import protocol_of, run_trial

_MARKS = {
    "baseline": (REFERENCE, 14, "x", "X"),
    "as written": (PALETTE[2], 14, "diamond", "D"),
    "defaults": (PALETTE[2], 14, "square", "s"),
    "published": (PALETTE[2], 14, "cross", "P"),
    "tried first": (PALETTE[2], 14, "triangle-up", "^"),
}
"""Role -> colour, size, symbol on the page, marker in the image; a user's own settings are those ``tried first``."""
_OUTSIDE = "trials outside of the constraints"
Layer = tuple[str, pd.DataFrame, tuple[str, int, str, str]]
Found = dict[str, list[float]]
_SAME = 1e-6
_AGAIN = "trained again, it gives the same numbers on validation data"


def hand_back(
    study: optuna.Study,
    trial: FrozenTrial,
    recipe: Recipe,
    folder: Path,
    device: str,
    how: str = "best",
    rules: Rules | None = None,
) -> Iterator[Table | str]:
    """Measure the chosen trial and the baseline on test data, write the results, and yield what to show of them."""
    yield _front_table(study, trial)
    method = trial.user_attrs["method"]
    values = trial.params or trial.user_attrs["recipe"]["methods"][method]
    text = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    yield f"chosen: {escape(f'trial {trial.number} ({method}): {text}')}"
    yield escape("".join(f"{line}\n" for line in explain(study, trial, how, rules)))
    plan, own = Plan.make(recipe, list(study.metric_names or []) or None), device.split(",")[0]
    protocol, test, missed = protocol_of(study, plan, own), dict[int, Found](), dict[str, float]()
    title = "chosen trial on test data (measured once)"
    table = Table("trial", "", *(m.name for m in plan.measures), title=title, title_justify="left")
    baseline = {t.number: t for t in complete(study) if t.user_attrs.get(ROLE) == "baseline"}
    for each in {trial.number: trial, **baseline}.values():
        again, marks = to_recipe(each), each.user_attrs
        candidate, found = Candidate(again, again.reference, marks["seeds"]), test.setdefault(each.number, {})
        outcome, promised = run_trial(plan, candidate, protocol, device=own, tested=found), marks["validation"]
        if each is trial:
            missed = {name: outcome.mean(name) - float(np.mean(promised[name])) for name in found}
        table.add_row(
            str(each.number), f"{marks.get(ROLE) or 'chosen'}: validation", *(_cell(promised[name]) for name in found)
        )
        table.add_row("", "test", *map(_cell, found.values()))
    yield table
    said = _kept(missed)
    yield f"{escape(said)}\n"
    with quiet():
        yield from (f"{path.stem}: {path}" for path in _write(study, trial, test, said, folder))


def _kept(missed: Mapping[str, float]) -> str:
    """Say whether a second training gave the validation numbers that the study found, or by how much each misses."""
    off = ", ".join(f"{name} {value:+.2g}" for name, value in missed.items() if abs(value) > _SAME)
    return f"trained again, it misses what the study found on validation data by {off}" if off else _AGAIN


def _front_table(study: optuna.Study, chosen: FrozenTrial) -> Table:
    """Return the Pareto front as a table, with the baseline and the chosen trial marked."""
    (trials, feasible), title = front(study), "Pareto front" if len(study.directions) > 1 else "best trial"
    title += " (validation)"
    if not feasible:
        title += "; no trial meets the constraints without being degenerate: those that miss least"
    on_front = {t.number: t for t in trials}
    others = [t for t in complete(study) if t.user_attrs.get(ROLE) == "baseline" or t.number == chosen.number]
    shown = on_front | {t.number: t for t in others}
    names = list(dict.fromkeys(name for t in shown.values() for name in t.user_attrs["validation"]))
    table = Table("trial", "", *names, title=title, title_justify="left")
    for number, trial in sorted(shown.items(), key=lambda item: tuple(item[1].values)):
        marks = [trial.user_attrs.get(ROLE), "chosen" if number == chosen.number else None]
        marks += [None if number in on_front else "not on the front"]
        marks += [f"degenerate: {task} {why}" for task, why in trial.user_attrs.get("degenerate", {}).items()]
        cells = [_cell(trial.user_attrs["validation"].get(name, [])) for name in names]
        table.add_row(str(number), ", ".join(filter(None, marks)), *cells)
    return table


def _cell(values: Sequence[float] | NDArray[np.float64]) -> str:
    """Return the mean, and after several values their standard deviation."""
    if not len(values):
        return ""
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def best_recipe(study: optuna.Study, trial: FrozenTrial, seeds: Sequence[int] | None = None) -> Recipe:
    """Return the recipe that compares a trial with the reference, over the seeds of the study's recipe or those given."""
    recipe = study_recipe(study)
    made = to_recipe(trial, recipe, seeds)
    return Recipe.from_dict({**made.to_dict(), "name": f"{recipe.name}-trial{trial.number}"[:80]}, recipe._source)


def _write(study: optuna.Study, trial: FrozenTrial, test: Mapping[int, Found], said: str, folder: Path) -> list[Path]:
    """Write ``best.yaml``, ``study.html``, ``front.png``, ``trials.csv`` and ``result.json``; return their paths."""
    trials = study.get_trials(deepcopy=False)
    content = {
        "study": study.study_name,
        "chosen": trial.number,
        "states": {s.name.lower(): sum(t.state == s for t in trials) for s in TrialState},
        "front": [t.number for t in front(study)[0]],
        "validation": {str(n): trials[n].user_attrs["validation"] for n in test},
        "test": {str(n): found for n, found in test.items()},
        "seeds": {str(n): trials[n].user_attrs["seeds"] for n in test},
    }
    seeds, held = trial.user_attrs["seeds"], trial.user_attrs["validation"]
    best = "\n".join(
        [
            f"# Trial {trial.number} of study {study.study_name}, beside the reference, with the seeds and rows of the study.",
            f"# Validation: {', '.join(f'{name} {np.mean(values):.6g}' for name, values in held.items())}",
            f"# {said}.",
            best_recipe(study, trial, seeds).to_yaml(),
        ]
    )
    return [
        write_text(folder / "best.yaml", best),
        page(study, folder / "study.html"),
        *([image(study, folder / "front.png")] if disparity(study) is not None else []),
        write_text(folder / "trials.csv", csv_text(trials_table(study))),
        write_json(folder / "result.json", content),
    ]


def _front(study: optuna.Study) -> tuple[str, str, list[Layer]]:
    """Return the names of the disparity and of the first objective, and what to draw: label, points, looks."""
    x, y = disparity(study) or "", next(iter(study.user_attrs[DESCRIBED]["objectives"]))
    every = trials_table(study).query("state == 'COMPLETE'")
    roles = every["role"].map(lambda role: role if role in _MARKS or not isinstance(role, str) else "tried first")
    every = every.assign(x=every[x], y=every[y], role=roles.fillna(""))
    allowed = np.array([all(value <= 0 for value in trial.constraints.values()) for trial in complete(study)])
    plain = every["role"] == ""
    best = every[every["number"].isin([trial.number for trial in front(study)[0]])].sort_values(["x", "y"])
    layers = [
        ("trials", every[plain & allowed], (PALETTE[0], 7, "circle", "o")),
        (_OUTSIDE, every[plain & ~allowed], ("#bbbbbb", 7, "circle", "o")),
        ("front", best, (PALETTE[1], 10, "circle", "o")),
        *((role, every[every["role"] == role], look) for role, look in _MARKS.items()),
    ]
    return x, y, [layer for layer in layers if len(layer[1])]


def page(study: optuna.Study, path: str | Path) -> Path:
    """Write the plots of a study as one HTML page that needs no network."""
    name = html.escape(study.study_name)
    with warnings.catch_warnings(action="ignore"):
        figures = [*([_front_figure(study)] if disparity(study) is not None else []), *_parameter_figures(study)]
        own = {"full_html": False, "default_height": "520px"}
        parts = [figure.to_html(include_plotlyjs=i == 0, **own) for i, figure in enumerate(figures)]
    head = f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{name}</title></head>"
    title = f"<body style='font-family:sans-serif;max-width:70rem;margin:auto'><h1>Study {name}</h1>"
    return write_text(path, printable(head + title + "\n".join(parts) + "</body></html>\n"))


def _front_figure(study: optuna.Study) -> go.Figure:
    (x, y, layers), figure = _front(study), go.Figure()
    for name, some, (colour, size, symbol, _) in layers:
        mode, marker = (
            "lines+markers" if name == "front" else "markers",
            {"color": colour, "size": size, "symbol": symbol},
        )
        text = [f"trial {number}" for number in some["number"]]
        shown = {"text": text, "hovertemplate": "%{text}: %{x:.4f}, %{y:.4f}"}
        figure.add_scatter(x=some["x"], y=some["y"], name=name, mode=mode, marker=marker, **shown)
    return figure.update_layout(
        title="Front on validation data", xaxis_title=x, yaxis_title=y, template="plotly_white", legend_title=None
    )


def _parameter_figures(study: optuna.Study) -> list[go.Figure]:
    """Return what each objective depends on, and all parameters of the trials that have most of them."""
    trials = [t for t in complete(study) if t.params and not t.user_attrs.get(FIXED)]
    most = max((len(t.params) for t in trials), default=0)
    trials = [t for t in trials if len(t.params) == most]
    copy, names = optuna.create_study(directions=study.directions), study.metric_names or ["value"]
    copy.add_trials(trials)
    found = []
    for i, name in enumerate(names):
        if len(trials) >= 4 and len({t.values[i] for t in trials}) > 1:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            target = partial(_value, i)
            figure = optuna.visualization.plot_param_importances(copy, evaluator, target=target, target_name=name)
            title = f"What {name} depends on (fANOVA)"
            found.append(figure.update_layout(title=title, template="plotly_white"))
    if len(trials) > 1:
        figure = optuna.visualization.plot_parallel_coordinate(copy, target=partial(_value, 0), target_name=names[0])
        found.append(figure.update_layout(title=f"All parameters, coloured by {names[0]}"))
    return found


def _value(index: int, trial: FrozenTrial) -> float:
    return float(trial.values[index])


def image(study: optuna.Study, path: str | Path) -> Path:
    """Write the front of a study with a disparity as an image; trials outside of the constraints are left out."""
    x, y, layers = _front(study)
    with themed():
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axis = figure.subplots()
        for name, some, (colour, size, _, marker) in layers:
            if name != _OUTSIDE:
                line = "-" if name == "front" else ""
                axis.plot(some["x"], some["y"], color=colour, marker=marker, ms=0.65 * size, linestyle=line, label=name)
        axis.set(xlabel=f"{x} (validation)", ylabel=f"{y} (validation)")
        axis.legend()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png")
    return Path(path)


def trials_table(study: optuna.Study, rules: Rules | None = None) -> pd.DataFrame:
    """Return one row a trial: number, state, role, measures on validation, parameters, why it is refused, error."""
    done = any(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False))
    refused = {s.trial.number: "; ".join(s.why) for s in standings(study, rules or Rules())[0]} if done else {}
    rows = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        marks = trial.user_attrs
        found = {name: sum(v) / len(v) for name, v in marks.get("validation", {}).items()}
        row = {"number": trial.number, "slot": marks.get("slot"), "state": trial.state.name, "role": marks.get(ROLE)}
        last = {"train_s": marks.get("train_s"), "refused": refused.get(trial.number), "error": marks.get("error")}
        rows.append(row | found | trial.params | last)
    return pd.DataFrame(rows)


def agreement_table(folder: Path) -> Table:
    """Return a table of a run's main numbers on validation and on test data, side by side, of methods with saved predictions.

    ± after a mean: over seeds; after the difference: of drawing other people, of the first seed.
    """
    recipe, deltas = load_recipe(folder / "recipe.yaml"), Protocol.read(folder / "audit_protocol.json").deltas
    title = "validation and test agree? (± over seeds; of the difference: over people)"
    table = Table("", "validation", "test", "test - validation", title=title, title_justify="left")
    for method in sorted({path.parent.parent.name for path in folder.glob("*/seed*/predictions_test.parquet")}):
        seeds = sorted((folder / method).glob("seed*"))
        held = [[Predictions.load(seed / f"predictions_{part}.parquet") for part in ("val", "test")] for seed in seeds]
        table.add_section()
        table.add_row(f"[bold]{method}")
        for name in (*MACROS, *(f"bias@{delta}" for delta in deltas), "eo_difference"):
            with suppress(FairMTLError):  # a measure that these tasks do not have
                table.add_row(name, *_agreement(name, held, deltas, recipe))
    return table


def _agreement(
    name: str, held: Sequence[Sequence[Predictions]], deltas: Mapping[str, float], recipe: Recipe
) -> Iterator[str]:
    """Yield a measure's mean on validation and test data, over seeds, and their difference with its deviation over people."""
    first = held[0][0]
    measure = parse_measure(name, {t.name: t.kind for t in first.tasks}, list(first.groups), list(deltas))
    bars = [thresholds_in_use(each[0], recipe.metrics.threshold) for each in held]
    found = np.array([[value_of(measure, p, deltas, recipe, own) for p in each] for each, own in zip(held, bars)])

    def of_first(part: Predictions) -> float:
        return value_of(measure, part, deltas, recipe, bars[0])

    spread = math.hypot(*(sampling_deviation(part, of_first) for part in held[0]))
    yield from map(_cell, found.T)
    yield f"{(found[:, 1] - found[:, 0]).mean():+.4f} ± {spread:.4f}"
