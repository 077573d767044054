"""Pictures of a study: the front, what matters, and all parameters, in one HTML page; the front as an image."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from libmtl_fair.errors import RecipeError
from libmtl_fair.files import atomic_path, write_text
from libmtl_fair.report.theme import PALETTE, REFERENCE, themed
from libmtl_fair.tune.fingerprint import DESCRIBED
from libmtl_fair.tune.objective import FIXED, ROLE
from libmtl_fair.tune.select import complete, disparity, disparity_name, front

_MARKS = {
    "baseline": ("x", "X"),
    "as written": ("diamond", "D"),
    "defaults": ("square", "s"),
    "published": ("cross", "P"),
}
_ENQUEUED = "tried first"
_OTHER = ("triangle-up", "^")


def _marked(every: list[dict[str, Any]]) -> list[tuple[str, tuple[str, str], list[dict[str, Any]]]]:
    """Return (label, symbols, points) of the known settings, and of a user's own together."""
    found = [(role, symbols, [p for p in every if p["role"] == role]) for role, symbols in _MARKS.items()]
    found.append((_ENQUEUED, _OTHER, [p for p in every if p["role"] is not None and p["role"] not in _MARKS]))
    return [entry for entry in found if entry[2]]


def page(study: optuna.Study, path: str | Path) -> Path:
    """Write the plots of a study as one HTML page that needs no network."""
    import plotly.io

    figures = [
        figure for figure in (_front_figure(study), *_importances(study), _parallel(study)) if figure is not None
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parts = [
            plotly.io.to_html(figure, include_plotlyjs=i == 0, full_html=False, default_height="520px")
            for i, figure in enumerate(figures)
        ]
    head = f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{_safe(study.study_name)}</title></head>"
    title = f"<body style='font-family:sans-serif;max-width:70rem;margin:auto'><h1>Study {_safe(study.study_name)}</h1>"
    return write_text(path, head + title + "\n".join(parts) + "</body></html>\n")


def _safe(text: str) -> str:
    import html

    return html.escape(text)


def axes(study: optuna.Study) -> tuple[str, str]:
    """Return the names (x, y) that a study is drawn with: its disparity, and its first objective.

    Raises
    ------
    RecipeError : it has no disparity.
    """
    objectives = list(study.user_attrs[DESCRIBED]["objectives"])
    return disparity_name(study), objectives[0]


def points(study: optuna.Study) -> list[dict[str, Any]]:
    """Return one entry a complete trial: x, y, number, role, whether it meets the constraints and is on the front."""
    x, y = axes(study)
    on_front = {trial.number for trial in front(study)[0]}
    found = []
    for trial in complete(study):
        found.append(
            {
                "x": disparity(trial, x),
                "y": disparity(trial, y),
                "number": trial.number,
                "role": trial.user_attrs.get(ROLE),
                "feasible": all(v <= 0 for v in trial.constraints.values()),
                "front": trial.number in on_front,
            }
        )
    return found


def _front_figure(study: optuna.Study) -> Any:
    import plotly.graph_objects as go

    try:
        x, y = axes(study)
    except RecipeError:
        return None
    every = points(study)
    figure = go.Figure()
    for name, wanted, colour in (("trials", True, PALETTE[0]), ("trials outside of the constraints", False, "#bbbbbb")):
        some = [p for p in every if p["feasible"] is wanted and p["role"] is None]
        if some:
            figure.add_trace(_scatter(name, some, {"color": colour, "size": 7}))
    line = sorted((p for p in every if p["front"]), key=lambda p: (p["x"], p["y"]))
    figure.add_trace(_scatter("front", line, {"color": PALETTE[1], "size": 10}, mode="lines+markers"))
    for role, (symbol, _), some in _marked(every):
        colour = REFERENCE if role == "baseline" else PALETTE[2]
        figure.add_trace(_scatter(role, some, {"color": colour, "size": 14, "symbol": symbol}))
    figure.update_layout(
        title="Front on validation data", xaxis_title=x, yaxis_title=y, template="plotly_white", legend_title=None
    )
    return figure


def _scatter(name: str, some: list[dict[str, Any]], marker: dict[str, Any], mode: str = "markers") -> Any:
    import plotly.graph_objects as go

    return go.Scatter(
        x=[p["x"] for p in some],
        y=[p["y"] for p in some],
        name=name,
        mode=mode,
        marker=marker,
        text=[f"trial {p['number']}" for p in some],
        hovertemplate="%{text}: %{x:.4f}, %{y:.4f}",
    )


def _searched(study: optuna.Study) -> tuple[optuna.Study, list[FrozenTrial]]:
    """Return a copy of the study with the trials that have all parameters, and these trials."""
    trials = [t for t in complete(study) if t.params and not t.user_attrs.get(FIXED)]
    most = max((len(t.params) for t in trials), default=0)
    trials = [t for t in trials if len(t.params) == most]
    copy = optuna.create_study(directions=study.directions)
    copy.add_trials(trials)
    return copy, trials


def _importances(study: optuna.Study) -> list[Any]:
    import plotly.graph_objects as go

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy, trials = _searched(study)
        for i, name in enumerate(study.metric_names or ["value"]):
            if len(trials) < 4 or len({t.values[i] for t in trials}) < 2:
                continue
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            weights = optuna.importance.get_param_importances(copy, evaluator=evaluator, target=partial(_value, i))
            bar = go.Bar(
                x=list(weights.values())[::-1], y=list(weights)[::-1], orientation="h", marker_color=PALETTE[i]
            )
            figure = go.Figure(bar)
            figure.update_layout(title=f"What {name} depends on (fANOVA)", template="plotly_white")
            found.append(figure)
    return found


def _value(index: int, trial: FrozenTrial) -> float:
    return float(trial.values[index])


def _parallel(study: optuna.Study) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy, trials = _searched(study)
        if len(trials) < 2:
            return None
        name = (study.metric_names or ["value"])[0]
        figure = optuna.visualization.plot_parallel_coordinate(copy, target=lambda t: t.values[0], target_name=name)
        figure.update_layout(title=f"All parameters, coloured by {name}")
        return figure


def image(study: optuna.Study, path: str | Path) -> Path:
    """Write the front as an image (the kind by the file's ending); trials outside of the constraints are left out.

    Raises
    ------
    RecipeError : the study has no disparity to draw against.
    """
    from matplotlib.figure import Figure

    x, y = axes(study)
    every = points(study)
    allowed = [p for p in every if p["feasible"] or p["role"] is not None or p["front"]]
    with themed():
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axis = figure.subplots()

        def draw(some: list[dict[str, Any]], **style: Any) -> None:
            axis.scatter([p["x"] for p in some], [p["y"] for p in some], **style)

        draw([p for p in allowed if p["role"] is None], s=22, color=PALETTE[0], alpha=0.6, label="trials")
        line = sorted((p for p in every if p["front"]), key=lambda p: (p["x"], p["y"]))
        axis.plot([p["x"] for p in line], [p["y"] for p in line], color=PALETTE[1], marker="o", label="front")
        for role, (_, marker), some in _marked(every):
            draw(some, s=80, marker=marker, color=REFERENCE if role == "baseline" else PALETTE[2], label=role)
        axis.set_xlabel(f"{x} (validation)")
        axis.set_ylabel(f"{y} (validation)")
        axis.legend()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png")
    return Path(path)


def trials_table(study: optuna.Study) -> Any:
    """Return a DataFrame with one row a trial: number, state, role, measures on validation, parameters, error."""
    import pandas as pd

    rows = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        marks = trial.user_attrs
        found = {name: sum(v) / len(v) for name, v in marks.get("validation", {}).items()}
        row = {"number": trial.number, "slot": marks.get("slot"), "state": trial.state.name, "role": marks.get(ROLE)}
        rows.append({**row, **found, **trial.params, "train_s": marks.get("train_s"), "error": marks.get("error")})
    return pd.DataFrame(rows)


def is_better(study: optuna.Study, index: int, a: float, b: float) -> bool:
    """Whether ``a`` is better than ``b`` in one objective of the study."""
    return a > b if study.directions[index] == StudyDirection.MAXIMIZE else a < b
