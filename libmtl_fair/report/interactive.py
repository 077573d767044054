"""Interactive plots as plain plotly specifications (data and layout), drawn in the page by the inlined library."""

from __future__ import annotations

import html
import math
from typing import Any

from libmtl_fair.report.frames import audit_frame, groups_frame, rows
from libmtl_fair.report.plots import bar_metrics, group_means, points, shrinkage_curve, utility_columns
from libmtl_fair.report.run_folder import RunFolder
from libmtl_fair.report.tables import summary_values
from libmtl_fair.report.theme import REFERENCE, colours, label

Figure = dict[str, Any]
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "hexagon")
_PATTERNS = ("", "/", ".", "x", "\\", "+", "-", "|")


def interactive_plots(run: RunFolder) -> dict[str, list[Figure]]:
    """Return section -> figures, each with title, data and layout; names are escaped for plotly's labels."""
    return {"audit": _scatter_plots(run), "groups": _bar_plots(run)}


def _safe(text: object) -> str:
    return html.escape(label(text), quote=False)


def _axis(title: str) -> Figure:
    return {"title": {"text": _safe(title)}, "zeroline": False, "automargin": True}


def _scatter_plots(run: RunFolder) -> list[Figure]:
    utility, bias = utility_columns(run)
    figures = []
    if utility is not None and bias is not None:
        layout = {"xaxis": _axis(bias), "yaxis": _axis(utility)}
        figures.append({"title": f"{utility} against {bias}", "data": _points(run, bias, utility), "layout": layout})
    columns = set(summary_values(run)["column"])
    for name in dict.fromkeys(audit_frame(run)["delta_name"]):
        if "macro Brier" not in columns:
            break
        layout = {"xaxis": _axis("macro Brier"), "yaxis": _axis(f"Bias@{name}")}
        data = [*_curve(run, str(name)), *_points(run, "macro Brier", f"Bias@{name}")]
        figures.append({"title": f"Bias@{name} against Brier", "data": data, "layout": layout})
    return figures


def _points(run: RunFolder, x: str, y: str) -> list[Figure]:
    colour = colours(run.methods)
    data = []
    for row in rows(points(run, x, y)):
        symbol = _SYMBOLS[run.methods.index(row.method) % len(_SYMBOLS)]
        trace = {
            "type": "scatter",
            "mode": "markers",
            "name": _safe(row.method),
            "x": [row.x],
            "y": [row.y],
            "marker": {"color": colour[row.method], "size": 12, "symbol": symbol},
            "hovertemplate": "%{x:.4f}, %{y:.4f}",
        }
        for axis, sd in (("error_x", row.x_sd), ("error_y", row.y_sd)):
            if sd > 0:
                trace[axis] = {"type": "data", "array": [sd], "thickness": 1.2}
        data.append(trace)
    return data


def _curve(run: RunFolder, name: str) -> list[Figure]:
    curve = shrinkage_curve(run, name)
    if curve.empty:
        return []
    trace = {"type": "scatter", "mode": "lines+markers", "name": _safe(f"{run.reference}, shrunk")}
    style = {"line": {"color": REFERENCE}, "marker": {"size": 4}, "hovertemplate": "a = %{text}<br>%{x:.4f}, %{y:.4f}"}
    values = {"x": _plain(curve["brier"]), "y": _plain(curve["bias"]), "text": [f"{a:g}" for a in curve["a"]]}
    return [trace | style | values]


def _bar_plots(run: RunFolder) -> list[Figure]:
    groups = groups_frame(run)
    figures = []
    for task, attribute in dict.fromkeys(zip(groups["task"], groups["attribute"])):
        for metric in bar_metrics(groups, task, attribute):
            frame = group_means(groups, task, attribute, metric)
            data = [_bar(run, method, frame[frame["method"] == method]) for method in run.methods]
            layout = {"barmode": "group", "xaxis": _axis(attribute), "yaxis": _axis(metric.replace("_", " "))}
            figures.append(
                {"title": f"{task} by {attribute}: {metric.replace('_', ' ')}", "data": data, "layout": layout}
            )
    return figures


def _bar(run: RunFolder, method: str, frame: Any) -> Figure:
    i = run.methods.index(method)
    up = [_positive(high - value) for value, high in zip(frame["value"], frame["high"])]
    down = [_positive(value - low) for value, low in zip(frame["value"], frame["low"])]
    pattern = {
        "shape": _PATTERNS[i % len(_PATTERNS)],
        "fillmode": "overlay",
        "fgcolor": "white",
        "solidity": 0.15,
        "size": 10,
    }
    return {
        "type": "bar",
        "name": _safe(method),
        "x": [_safe(name) for name in frame["group"]],
        "y": _plain(frame["value"]),
        "text": [f"n = {n:.0f}" if math.isfinite(n) else "" for n in frame["n"]],
        "textposition": "none",
        "hovertemplate": "%{x}: %{y:.3f} (%{text})",
        "marker": {"color": colours(run.methods)[method], "pattern": pattern},
        "error_y": {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2, "width": 3},
    }


def _positive(value: float) -> float:
    return max(float(value), 0.0) if math.isfinite(value) else 0.0


def _plain(values: Any) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]
