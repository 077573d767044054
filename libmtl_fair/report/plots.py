"""Plots of a run as matplotlib figures: utility against bias, the shrinkage curve, groups, traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from libmtl_fair.report.frames import audit_frame, groups_frame, rows, shrinkage_frame
from libmtl_fair.report.run_folder import RunFolder
from libmtl_fair.report.shrinkage import fits
from libmtl_fair.report.tables import HIGHER_IS_BETTER, LABELS, summary_values
from libmtl_fair.report.theme import HATCHES, INK, MARKERS, PALETTE, REFERENCE, colours, label

BAR_METRICS = (
    "true_positive_rate",
    "false_positive_rate",
    "selection_rate",
    "accuracy",
    "auc",
    "mae",
    "rmse",
    "r2",
    "ccc",
)
SUMMARIES = frozenset({"difference", "ratio", "overall", "mean", "worst", "difference_mean", "ratio_mean"})


def points(run: RunFolder, x: str, y: str, split: str | None = None) -> pd.DataFrame:
    """Return method, x, y, x_sd, y_sd: means and sd over seeds of two columns of the summary."""
    values = summary_values(run, split)
    parts = []
    for axis, column in (("x", x), ("y", y)):
        grouped = values[values["column"] == column].groupby("method", sort=False)["value"]
        parts.append(pd.DataFrame({axis: grouped.mean(), f"{axis}_sd": grouped.std()}))
    frame = parts[0].join(parts[1], how="inner").dropna(subset=["x", "y"])
    return frame.reset_index()


def utility_columns(run: RunFolder, split: str | None = None) -> tuple[str | None, str | None]:
    """Return the first macro utility and the first Bias column of the summary (None where there is none)."""
    columns = list(dict.fromkeys(summary_values(run, split)["column"]))
    utility = next((c for c in columns if c.startswith("macro ") and c != "macro Brier"), None)
    return utility, next((c for c in columns if c.startswith("Bias@")), None)


def utility_bias_plot(run: RunFolder, split: str | None = None) -> Figure | None:
    """Utility (up) against Bias (right): upper left is better. None without both."""
    utility, bias = utility_columns(run, split)
    if utility is None or bias is None:
        return None
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = figure.subplots()
    _method_points(axes, run, points(run, bias, utility, split))
    higher = utility.removeprefix("macro ") in {LABELS.get(name, name) for name in HIGHER_IS_BETTER}
    axes.set(xlabel=bias, ylabel=utility, title=f"{'upper' if higher else 'lower'} left is better")
    return figure


def shrinkage_curve(run: RunFolder, delta_name: str, split: str | None = None) -> pd.DataFrame:
    """Return the mean curve of the shrunk reference over seeds for one tolerance: a, brier, bias."""
    curve = shrinkage_frame(run, split)
    curve = curve[curve["delta_name"].isin([delta_name, ""])] if fits(run, split) else curve[:0]
    return curve.groupby("a", as_index=False)[["brier", "bias"]].mean().dropna().sort_values("a")


def shrinkage_plot(run: RunFolder, delta_name: str | None = None, split: str | None = None) -> Figure | None:
    """Bias (up) against Brier (right), methods beside the shrunk reference: below its curve is a real gain."""
    names = list(dict.fromkeys(audit_frame(run, split)["delta_name"]))
    if not names or "macro Brier" not in set(summary_values(run, split)["column"]):
        return None
    name = delta_name or str(names[0])
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = figure.subplots()
    curve = shrinkage_curve(run, name, split)
    if not curve.empty:
        axes.plot(curve["brier"], curve["bias"], color=REFERENCE, label=label(f"{run.reference}, shrunk"), zorder=1)
    _method_points(axes, run, points(run, "macro Brier", f"Bias@{name}", split))
    axes.set(xlabel="macro Brier (lower is better)", ylabel=f"Bias@{name}", title="below the curve is a real gain")
    return figure


def _method_points(axes: Any, run: RunFolder, frame: pd.DataFrame) -> None:
    colour = colours(run.methods)
    for row in rows(frame):
        i = run.methods.index(row.method)
        error = {"xerr": row.x_sd if row.x_sd > 0 else None, "yerr": row.y_sd if row.y_sd > 0 else None}
        style = {"color": colour[row.method], "marker": MARKERS[i % len(MARKERS)], "markersize": 7, "linestyle": "none"}
        axes.errorbar(row.x, row.y, **error, **style, elinewidth=1.2, capsize=2, label=label(row.method))
    axes.margins(0.12)
    if len(axes.get_legend_handles_labels()[0]):
        axes.legend()


def bar_metrics(groups: pd.DataFrame, task: str, attribute: str, at_most: int = 4) -> list[str]:
    """Return the per-group metrics worth drawing for a task and attribute."""
    taken = groups[(groups["task"] == task) & (groups["attribute"] == attribute) & ~groups["group"].isin(SUMMARIES)]
    found = set(taken.dropna(subset=["value"])["metric"])
    return [metric for metric in BAR_METRICS if metric in found][:at_most]


def group_means(groups: pd.DataFrame, task: str, attribute: str, metric: str) -> pd.DataFrame:
    """Return method, group, value, low, high, n, flag, averaged over seeds (intervals too)."""
    taken = groups[(groups["task"] == task) & (groups["attribute"] == attribute) & (groups["metric"] == metric)]
    taken = taken[~taken["group"].isin(SUMMARIES)]
    numbers = taken.groupby(["method", "group"], sort=False)[["value", "low", "high", "n"]].mean()
    flags = taken.groupby(["method", "group"], sort=False)["flag"].max()
    return numbers.join(flags).reset_index()


def group_bars(run: RunFolder, task: str, attribute: str, split: str | None = None) -> Figure | None:
    """Per-group rates with intervals, one panel a metric, one bar a method. None if there is nothing to draw."""
    groups = groups_frame(run, split)
    metrics = bar_metrics(groups, task, attribute)
    if not metrics:
        return None
    frames = {metric: group_means(groups, task, attribute, metric) for metric in metrics}
    names = list(dict.fromkeys(name for frame in frames.values() for name in frame["group"]))
    columns = 2 if len(metrics) > 1 else 1
    height = 1.3 + 0.22 * len(names) * max(2, len(run.methods))
    figure = Figure(figsize=(4.2 * columns, height * -(-len(metrics) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(metrics) // columns), columns, squeeze=False, sharey=True).ravel()
    for axes, metric in zip(panels, metrics):
        _bars(axes, run.methods, names, frames[metric])
        axes.set_title(metric.replace("_", " "))
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    figure.suptitle(f"{label(task)} by {label(attribute)}", fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(run.methods)))
    return figure


def _bars(axes: Any, methods: Sequence[str], names: Sequence[str], frame: pd.DataFrame) -> None:
    colour, thick = colours(methods), 0.8 / len(methods)
    for i, method in enumerate(methods):
        own = frame[frame["method"] == method].set_index("group").reindex(list(names))
        value = own["value"].to_numpy(float)
        spread = np.clip([value - own["low"].to_numpy(float), own["high"].to_numpy(float) - value], 0, None)
        at = np.arange(len(names)) + (i - (len(methods) - 1) / 2) * thick
        style = {"color": colour[method], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": INK, "linewidth": 0.4}
        axes.barh(at, np.nan_to_num(value), thick, label=label(method), **style)
        known = np.isfinite(value) & np.isfinite(spread).all(axis=0)
        error = {"xerr": spread[:, known], "fmt": "none", "ecolor": INK, "elinewidth": 1, "capsize": 2}
        if known.any():
            axes.errorbar(value[known], at[known], **error)
    n = frame.groupby("group")["n"].max()
    flagged = set(frame[frame["flag"] != ""]["group"])
    notes = {name: f"n {n[name]:.0f}" if np.isfinite(n.get(name, np.nan)) else "n ?" for name in names}
    texts = [f"{label(name, 24)} ({notes[name]}{', small' if name in flagged else ''})" for name in names]
    axes.set_yticks(range(len(names)), texts)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def thin(history: pd.DataFrame, column: str, bins: int = 200) -> tuple[Any, Any]:
    """Return steps and values of a column without gaps, as means of at most ``bins`` bins."""
    values = history[column].to_numpy(float)
    steps = history["step"].to_numpy(float) if "step" in history else np.arange(len(values), dtype=float)
    known = np.isfinite(values)
    values, steps = values[known], steps[known]
    size = -(-len(values) // bins)
    if size > 1:
        starts = np.arange(0, len(values), size)
        counts = np.diff([*starts, len(values)])
        values, steps = np.add.reduceat(values, starts) / counts, np.add.reduceat(steps, starts) / counts
    return steps, values


def trace_plot(
    histories: Mapping[str, pd.DataFrame] | pd.DataFrame,
    columns: Sequence[str],
    targets: Mapping[str, float] | None = None,
    titles: Mapping[str, str] | None = None,
) -> Figure | None:
    """One panel a column of the history, one line a run; a dashed line at a column's target.

    None if no history has any of the columns.
    """
    runs = {"": histories} if isinstance(histories, pd.DataFrame) else dict(histories)
    shown = [c for c in columns if any(c in frame and frame[c].notna().any() for frame in runs.values())]
    if not shown:
        return None
    figure = Figure(figsize=(6.4, 0.6 + 1.7 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True).ravel()
    for axes, column in zip(panels, shown):
        for i, (name, frame) in enumerate(runs.items()):
            if column in frame and frame[column].notna().any():
                axes.plot(*thin(frame, column), color=PALETTE[i % len(PALETTE)], label=label(name), linewidth=1.3)
        if targets and column in targets:
            axes.axhline(targets[column], color=INK, linestyle="--", linewidth=1)
        axes.set_ylabel(label((titles or {}).get(column, column), 24))
    panels[-1].set_xlabel("step")
    if len(runs) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(5, len(runs)))
    return figure


def dual_plot(history: pd.DataFrame, epsilon: float | None = None) -> Figure | None:
    """FairMT: eta over time, and Phi - epsilon over time, above its zero line. None without both columns."""
    if not {"eta", "phi"} <= set(history.columns) or history[["eta", "phi"]].isna().all().any():
        return None
    frame = history.assign(gap=history["phi"] - (epsilon or 0.0))
    titles = {"eta": "dual variable η", "gap": "Φ − ε" if epsilon is not None else "Φ"}
    targets = {"gap": 0.0} if epsilon is not None else None
    return trace_plot(frame, ["eta", "gap"], targets, titles)


def weight_plot(history: pd.DataFrame, prefix: str = "w/") -> Figure | None:
    """Weights on the simplex over time, stacked (w* of FairMT; ``prefix="alpha/"`` for its task weights)."""
    columns = [c for c in history.columns if str(c).startswith(prefix)]
    frame = history.dropna(subset=columns)
    if not columns or frame.empty:
        return None
    steps = thin(frame, columns[0], 100)[0]
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    values = [thin(frame, column, 100)[1] for column in columns]
    shades = [PALETTE[i % len(PALETTE)] for i in range(len(columns))]
    names = [label(column.removeprefix(prefix)) for column in columns]
    axes.stackplot(steps, values, labels=names, colors=shades, alpha=0.85, linewidth=0)
    axes.set(xlabel="step", ylabel=prefix.rstrip("/"), ylim=(0, max(1.0, float(np.sum(values, axis=0).max()))))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def heat_map(table: pd.DataFrame, title: str = "", unit: str = "") -> Figure:
    """A matrix with its numbers written in it, such as conflicts per layer and epoch, or similarity of tasks."""
    values = table.to_numpy(float)
    figure = Figure(figsize=(1.6 + 0.6 * table.shape[1], 1.2 + 0.4 * table.shape[0]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="cividis", aspect="auto")
    axes.set_xticks(range(table.shape[1]), [label(c, 16) for c in table.columns], rotation=45, ha="right")
    axes.set_yticks(range(table.shape[0]), [label(i, 24) for i in table.index])
    axes.set_title(label(title, 60))
    axes.grid(visible=False)
    middle = np.nanmean(values) if np.isfinite(values).any() else 0.0
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value) and values.size <= 400:
            ink = "white" if value < middle else "black"
            axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(image, ax=axes, label=unit)
    return figure
