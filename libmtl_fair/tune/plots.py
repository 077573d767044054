"""Pictures of a study: the front, what matters, and all parameters, in one HTML page; the front as an image."""

from __future__ import annotations

import html
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from libmtl_fair.files import atomic_path, write_text
from libmtl_fair.report.theme import PALETTE, REFERENCE, themed
from libmtl_fair.tune.plan import DESCRIBED, FIXED, ROLE
from libmtl_fair.tune.selection import complete, disparity, front

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
    return write_text(path, head + title + "\n".join(parts) + "</body></html>\n")


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


def trials_table(study: optuna.Study) -> pd.DataFrame:
    """Return one row a trial: number, state, role, measures on validation, parameters, error."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        marks = trial.user_attrs
        found = {name: sum(v) / len(v) for name, v in marks.get("validation", {}).items()}
        row = {"number": trial.number, "slot": marks.get("slot"), "state": trial.state.name, "role": marks.get(ROLE)}
        rows.append(row | found | trial.params | {name: marks.get(name) for name in ("train_s", "error")})
    return pd.DataFrame(rows)
