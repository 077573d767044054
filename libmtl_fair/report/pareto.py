"""Utility against the difference between groups: the Pareto front over methods, and sweeps of one setting as lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from libmtl_fair.report.frames import rows
from libmtl_fair.report.plots import points, utility_columns
from libmtl_fair.report.run_folder import RunFolder
from libmtl_fair.report.tables import summary_values
from libmtl_fair.report.theme import MARKERS, PALETTE, REFERENCE, label

_STEP = re.compile(r"(.+?)[ _-]?(\d+(?:\.\d+)?)")
_FEWEST = 3


def disparities(run: RunFolder, split: str | None = None) -> list[str]:
    """Return the columns of the summary that compare groups: equalised odds of each attribute, KS for regression."""
    columns = dict.fromkeys(summary_values(run, split)["column"])
    return [c for c in columns if c.startswith(("EO diff", "KS"))]


def sweeps(methods: Sequence[str]) -> dict[str, list[str]]:
    """Return name -> methods that differ in a number at their end, in its order: three or more make a sweep.

    >>> sweeps(["plain", "glf_90", "glf_98", "glf_95", "gld_5"])
    {'glf': ['glf_90', 'glf_95', 'glf_98']}
    """
    found: dict[str, list[tuple[float, str]]] = {}
    for method in methods:
        match = _STEP.fullmatch(method)
        if match:
            found.setdefault(match[1], []).append((float(match[2]), method))
    return {name: [method for _, method in sorted(steps)] for name, steps in found.items() if len(steps) >= _FEWEST}


def front(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that no other beats in both: ``x`` is better when lower, ``y`` when higher; by rising ``x``.

    >>> front(pd.DataFrame({"x": [0.1, 0.2, 0.3], "y": [0.7, 0.6, 0.9]}))["x"].tolist()
    [0.1, 0.3]
    """
    ordered = frame.sort_values(["x", "y"], ascending=[True, False])
    best = ordered["y"].astype(float).cummax().shift(fill_value=float("-inf"))
    return ordered[ordered["y"] > best]


def pareto_plot(run: RunFolder, disparity: str, split: str | None = None) -> Figure | None:
    """Utility (up) against a difference between groups (right), means over seeds: upper left is better.

    Sweeps are lines with the number at their ends, other methods single points, named where there is room; the dashed line is
    the Pareto front of the means, which favours lucky methods where there are many. None with fewer than three methods, or no utility.
    """
    utility, _ = utility_columns(run, split)
    frame = points(run, disparity, utility, split) if utility is not None else pd.DataFrame()
    if len(frame) < _FEWEST:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    best = front(frame)
    axes.plot(best["x"], best["y"], color=REFERENCE, linestyle="--", linewidth=1, zorder=1, label="Pareto front")
    at = {row.method: (float(row.x), float(row.y)) for row in rows(frame)}
    lines = sweeps([method for method in run.methods if method in at])
    names: list[tuple[str, str]] = []
    for i, (name, methods) in enumerate(lines.items()):
        x, y = zip(*(at[method] for method in methods))
        style: dict[str, Any] = {
            "color": PALETTE[i % len(PALETTE)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 5,
        }
        axes.plot(x, y, **style, label=label(name))
        names += [(method, method.removeprefix(name).strip(" _-")) for method in (methods[0], methods[-1])]
    swept = {method for methods in lines.values() for method in methods}
    for method in (m for m in at if m not in swept):
        reference = method == run.reference
        axes.plot(*at[method], "*" if reference else "x", color=REFERENCE, markersize=11 if reference else 6)
        names.append((method, label(method, 24)))
    for method, text in _apart([(run.reference, label(run.reference, 24)), *names], at):
        axes.annotate(text, at[method], xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.margins(0.1)
    axes.set(xlabel=f"{disparity} (lower is better)", ylabel=utility, title="upper left is better")
    axes.legend(fontsize=8)
    return figure


def _apart(names: Sequence[tuple[str, str]], at: Mapping[str, tuple[float, float]]) -> list[tuple[str, str]]:
    """Return the names that can be read beside those before them: no two within a seventh of the width and a twenty-fifth of the height."""
    x, y = zip(*at.values())
    width, height = (max(max(v) - min(v), 1e-12) for v in (x, y))
    kept: list[tuple[str, str]] = []
    for method, text in names:
        near = [
            m
            for m, _ in kept
            if abs(at[m][0] - at[method][0]) < width / 7 and abs(at[m][1] - at[method][1]) < height / 25
        ]
        if method in at and not near:
            kept.append((method, text))
    return kept
