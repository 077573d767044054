"""Which pictures a run deserves, drawn with matplotlib: as files (PNG) and in the page (SVG)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.report.branches import branch_plots
from libmtl_fair.report.judged import BASE_RATE, NO_GROUP, SURE, degenerate_tasks, thresholds, who_pays, why_degenerate
from libmtl_fair.report.run_folder import RunFolder, damage_named, number, read_run, rows
from libmtl_fair.report.summary import (
    HIGHER_IS_BETTER,
    LABELS,
    column_of,
    group_means,
    main_utility,
    native_errors,
    shrinkage_curves,
    summary,
    summary_values,
)
from libmtl_fair.report.theme import (
    HATCHES,
    INK,
    MARKERS,
    PALETTE,
    REFERENCE,
    Plot,
    Style,
    canvas,
    colours,
    label,
    slug,
)
from libmtl_fair.report.transfer import transfer_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RATES = ("true_positive_rate", "false_positive_rate", "selection_rate", "accuracy", "auc", "mae", "rmse", "r2", "ccc")
_STEP = re.compile(r"(.+?)[ _-]?(\d+(?:\.\d+)?)")
_FEWEST, _MOST = 3, 5
_MULTIPLIERS = ("lambda", "eta")
ERRORS = ("macro Brier", "score error")
"""What Bias is drawn against: the macro Brier, or where a task is not binary the mean squared error of the audit scores."""


class Scatter(NamedTuple):
    """Methods by two columns of the summary; ``curve`` (a, brier, bias) is that of the shrunk reference, if there is one."""

    x: str
    y: str
    points: pd.DataFrame
    curve: pd.DataFrame


def points(values: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Return method, x, y, x_sd, y_sd: means and sd over seeds of two columns of the summary's values."""
    wide = (
        values.pivot(index=["method", "seed"], columns="column", values="value").reindex(columns=[x, y]).astype(float)
    )
    grouped = wide.set_axis(["x", "y"], axis=1).groupby(level="method")
    means = grouped.mean().join(grouped.std().add_suffix("_sd")).dropna(subset=["x", "y"])
    return means.reindex([method for method in dict.fromkeys(values["method"]) if method in means.index]).reset_index()


def scatters(run: RunFolder) -> list[Scatter]:
    """Return utility against the first Bias, and Bias against Brier for every tolerance, as far as the run has them."""
    biases = {name: f"Bias@{name}" for name in run.frame("audit")["delta_name"]}
    values, curves, found = summary_values(run), shrinkage_curves(run), []
    utility = main_utility(values)
    if utility is not None and biases:
        bias = next(iter(biases.values()))
        found.append(Scatter(bias, utility, points(values, bias, utility), pd.DataFrame()))
    errors = native_errors(run)
    brier = values[values["column"] == ERRORS[0]].set_index(["method", "seed"])["value"].to_dict()
    error = ERRORS[any(abs(value - brier.get(key, math.inf)) > 1e-6 for key, value in errors.items())]
    if error not in set(values["column"]):
        own_errors = pd.DataFrame(
            [(*key, error, value, False) for key, value in errors.items()], columns=values.columns
        )
        values = pd.concat([values, own_errors])
    for name, bias in biases.items() if errors else []:
        own = [curve for (_, tolerance), curve in curves.items() if tolerance == name]
        curve = pd.concat(own).groupby("a", as_index=False)[["brier", "bias"]].mean() if own else pd.DataFrame()
        found.append(Scatter(error, bias, points(values, error, bias), curve.dropna()))
    return found


def scatter_plot(run: RunFolder, found: Scatter) -> Figure:
    """Utility (up) against Bias: upper left is better; or Bias (up) against the scores' error, beside the shrunk reference."""
    figure, (axes,) = canvas(5.2, 3.8)
    if not found.curve.empty:
        name = label(f"{run.reference}, shrunk")
        axes.plot(found.curve["brier"], found.curve["bias"], color=REFERENCE, label=name, zorder=1)
    colour = colours(run.methods)
    for row in rows(found.points):
        look: Style = {"fmt": MARKERS[run.methods.index(row.method) % len(MARKERS)], "color": colour[row.method]}
        look |= {f"{axis}err": sd for axis, sd in (("x", row.x_sd), ("y", row.y_sd)) if sd > 0}
        axes.errorbar(row.x, row.y, **look, markersize=7, elinewidth=1.2, capsize=2, label=label(row.method))
    axes.margins(0.12)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    better = "upper" if found.y.removeprefix("macro ") in {LABELS.get(m, m) for m in HIGHER_IS_BETTER} else "lower"
    left = "left: scores closer together, no goal in itself" if found.x.startswith("Bias@") else "left is better"
    axes.set(
        xlabel=found.x, ylabel=found.y, title=f"{better} is better; {left}" if "goal" in left else f"{better} {left}"
    )
    if found.x in ERRORS:
        axes.set(xlabel=f"{found.x} (lower is better)", title="on or above the line: shrinking does as well")
    return figure


def disparities(run: RunFolder) -> list[str]:
    """Return the columns of the summary that compare groups: equalised odds of each attribute, KS for regression."""
    return [c for c in dict.fromkeys(summary_values(run)["column"]) if c.startswith(("EO diff", "KS"))]


def sweeps(methods: Sequence[str]) -> dict[str, list[str]]:
    """Return name -> methods that differ in a number at their end, in its order: three or more make a sweep.

    >>> sweeps(["plain", "glf_90", "glf_98", "glf_95", "gld_5"])
    {'glf': ['glf_90', 'glf_95', 'glf_98']}
    """
    found: dict[str, list[tuple[float, str]]] = {}
    for method in methods:
        if match := _STEP.fullmatch(method):
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


def pareto_plot(run: RunFolder, disparity: str) -> Figure | None:
    """Utility (up) against a difference between groups (right), means over seeds: upper left is better.

    Sweeps are lines with the number at their ends, other methods single points, named where there is room; the dashed line is
    the Pareto front of the means, which favours lucky methods where there are many. Methods with a degenerate decision are left out. None
    with fewer than three methods, or no utility.
    """
    values = summary_values(run)
    utility = main_utility(values)
    frame = points(values, disparity, utility) if utility is not None else pd.DataFrame(columns=["method"])
    frame = frame[~frame["method"].isin(why_degenerate(run, column_of(disparity)[2]))]
    if len(frame) < _FEWEST:
        return None
    figure, (axes,) = canvas(6.4, 4.2)
    best = front(frame)
    axes.plot(best["x"], best["y"], color=REFERENCE, linestyle="--", linewidth=1, zorder=1, label="Pareto front")
    at = {row.method: (float(row.x), float(row.y)) for row in rows(frame)}
    lines = sweeps([method for method in run.methods if method in at])
    names = [(run.reference, label(run.reference, 24))]
    for i, (name, methods) in enumerate(lines.items()):
        line = list(zip(*(at[method] for method in methods)))
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        axes.plot(*line, color=colour, marker=marker, markersize=5, label=label(name))
        names += [(method, method.removeprefix(name).strip(" _-")) for method in (methods[0], methods[-1])]
    swept = {method for methods in lines.values() for method in methods}
    for method in (m for m in at if m not in swept):
        reference = method == run.reference
        axes.plot(*at[method], "*" if reference else "x", color=REFERENCE, markersize=11 if reference else 6)
        names.append((method, label(method, 24)))
    width, height = (max(np.ptp(frame[axis]), 1e-12) for axis in ("x", "y"))
    named: list[tuple[float, float]] = []
    for (x, y), text in ((at[method], text) for method, text in names if method in at):
        if all(abs(x - a) >= width / 7 or abs(y - b) >= height / 25 for a, b in named):
            named.append((x, y))
            axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.margins(0.1)
    axes.set(xlabel=f"{disparity} (lower is better)", ylabel=utility, title="upper left is better")
    axes.legend(fontsize=8)
    return figure


def bars(run: RunFolder) -> dict[tuple[str, str], dict[str, pd.DataFrame]]:
    """Return (task, attribute) -> up to four metrics worth drawing -> their :func:`group_means`."""
    means = group_means(run)
    means = means[~means["group"].isin(NO_GROUP)]
    found: dict[tuple[str, str], dict[str, pd.DataFrame]] = {}
    for (task, attribute), part in means.groupby(["task", "attribute"], sort=False):
        known = set(part.dropna(subset=["value"])["metric"])
        shown = [metric for metric in _RATES if metric in known][:4]
        found[str(task), str(attribute)] = {metric: part[part["metric"] == metric] for metric in shown}
    return {key: metrics for key, metrics in found.items() if metrics}


def group_bars(methods: Sequence[str], title: str, frames: Mapping[str, pd.DataFrame]) -> Figure:
    """Per-group rates with intervals, one panel a metric, one bar a method."""
    names = list(dict.fromkeys(name for frame in frames.values() for name in frame["group"]))
    columns = 2 if len(frames) > 1 else 1
    lines = -(-len(frames) // columns)
    height = 1.3 + 0.22 * len(names) * max(2, len(methods))
    figure, panels = canvas(4.2 * columns, height * lines, lines, columns, sharey=True)
    for axes, (metric, frame) in zip(panels, frames.items()):
        _bars(axes, methods, names, frame)
        axes.set_title(metric.replace("_", " "))
    for axes in panels[len(frames) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(methods)))
    return figure


def _bars(axes: Axes, methods: Sequence[str], names: Sequence[str], frame: pd.DataFrame) -> None:
    colour, thick = colours(methods), 0.8 / len(methods)
    for i, method in enumerate(methods):
        own = frame[frame["method"] == method].set_index("group").reindex(list(names))
        value = own["value"].to_numpy(float)
        spread = np.clip([value - own["low"].to_numpy(float), own["high"].to_numpy(float) - value], 0, None)
        at = np.arange(len(names)) + (i - (len(methods) - 1) / 2) * thick
        look: Style = {"color": colour[method], "hatch": HATCHES[i % len(HATCHES)], "label": label(method)}
        axes.barh(at, np.nan_to_num(value), thick, edgecolor=INK, linewidth=0.4, **look)
        known = np.isfinite(value) & np.isfinite(spread).all(axis=0)
        if known.any():
            error = spread[:, known]
            axes.errorbar(value[known], at[known], xerr=error, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    n, flagged = frame.groupby("group")["n"].max(), set(frame[frame["flag"] != ""]["group"])
    counts = [f"n {n[name]:.0f}" if np.isfinite(n.get(name, np.nan)) else "n ?" for name in names]
    texts = [f"{label(name, 24)} ({count}{', small' if name in flagged else ''})" for name, count in zip(names, counts)]
    axes.set_yticks(range(len(names)), texts)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _end(run: RunFolder, attribute: str) -> str:
    """Return the first threshold at which some decision is to be judged: the recipe's, else that of the base rate."""
    for end in thresholds(run):
        none, frame = degenerate_tasks(run, end), who_pays(run, end)
        own = frame[frame["attribute"] == attribute]
        if any(key not in none for key in zip(own["method"], own["task"])):
            return end
    return ""


def pays_plot(run: RunFolder, attribute: str) -> Figure | None:
    """Change of each group's TPR against the reference, with 95 % intervals: right of 0 more people get a rightful yes.

    Without degenerate decisions, which give everyone the same; of more than five methods those that gain come first. None where
    nothing is left.
    """
    end = _end(run, attribute)
    none, frame, cells = degenerate_tasks(run, end), who_pays(run, end), summary(run)
    kept = np.array([key not in none for key in zip(frame["method"], frame["task"])], dtype=bool)
    frame = frame[kept & (frame["attribute"] == attribute) & frame["d_tpr"].notna()]
    gains = set(cells[cells["gain"]]["method"])
    methods = sorted(dict.fromkeys(frame["method"]), key=lambda method: method not in gains)[:_MOST]
    frame = frame[frame["method"].isin(methods)]
    names = list(dict.fromkeys(zip(frame["task"], frame["group"])))
    if not methods:
        return None
    figure, (axes,) = canvas(6.4, 1.4 + 0.16 * len(names) * max(2, len(methods)))
    colour = colours(run.methods)
    for i, method in enumerate(methods):
        own = frame[frame["method"] == method]
        at = [names.index(key) + 0.7 * ((i + 0.5) / len(methods) - 0.5) for key in zip(own["task"], own["group"])]
        look: Style = {"fmt": MARKERS[i], "color": colour[method], "markersize": 6, "elinewidth": 1.2, "capsize": 2}
        axes.errorbar(100 * own["d_tpr"], at, xerr=100 * SURE * own["se_tpr"], label=label(method), **look)
    axes.axvline(0, color=REFERENCE, linewidth=1)
    axes.set_yticks(range(len(names)), [label(f"{task}: {group}", 32) for task, group in names])
    axes.invert_yaxis()
    axes.set(xlabel="change among 100 who should get a yes")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def thin(history: pd.DataFrame, column: str, bins: int = 200) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return steps and values of a column without gaps, as means of at most ``bins`` bins."""
    steps = history["step"].to_numpy(float) if "step" in history else np.arange(len(history), dtype=float)
    known = np.stack([steps, history[column].to_numpy(float)])[:, np.isfinite(history[column].to_numpy(float))]
    starts = np.arange(0, known.shape[1], max(1, -(-known.shape[1] // bins)))
    if not len(starts):
        return known[0], known[1]
    sums = np.add.reduceat(known, starts, axis=1)
    means = sums / np.diff([*starts, known.shape[1]])
    return means[0], means[1]


def trace_plot(
    histories: Mapping[str, pd.DataFrame], columns: Mapping[str, str], targets: Mapping[str, float] | None = None
) -> Figure | None:
    """One panel a column of the histories (column -> title), one line a run; a dashed line at a column's target.

    None if no history has any of the columns.
    """
    shown = [column for column in columns if _has(histories, column)]
    if not shown:
        return None
    figure, panels = canvas(6.4, 0.6 + 1.7 * len(shown), len(shown), sharex=True)
    for axes, column in zip(panels, shown):
        for i, (name, frame) in enumerate(histories.items()):
            if _has({name: frame}, column):
                axes.plot(*thin(frame, column), color=PALETTE[i % len(PALETTE)], label=label(name), linewidth=1.3)
        _readable(axes, histories, column)
        target = (targets or {}).get(column, math.nan)
        if target == target:
            axes.axhline(target, color=INK, linestyle="--", linewidth=1)
        axes.set_ylabel(label(columns[column], 24))
    panels[-1].set_xlabel("step")
    if len(histories) > 1:
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=min(5, len(histories)))
    return figure


def _readable(axes: Axes, histories: Mapping[str, pd.DataFrame], column: str) -> None:
    """Plain numbers on an axis: no offset to add; decades where a multiplier runs through several; from 0 where it stands still."""
    values = np.concatenate([frame[column].dropna().to_numpy(float) for frame in histories.values() if column in frame])
    values = values[np.isfinite(values)]
    low, high = values.min(initial=math.inf), values.max(initial=-math.inf)
    if column.split("/")[0] in _MULTIPLIERS and low > 0 and high > 20 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        return
    axes.ticklabel_format(axis="y", useOffset=False)
    if high > 0 and high - low <= 1e-3 * high:
        axes.set_ylim(0, 2 * high)


def _has(histories: Mapping[str, pd.DataFrame], *columns: str) -> bool:
    return any(column in frame and frame[column].notna().any() for frame in histories.values() for column in columns)


def dual_plot(history: pd.DataFrame, epsilon: float = math.nan) -> Figure | None:
    """FairMT: eta over time, and Phi - epsilon (Phi where it is NaN) over time, above its zero line; None without both."""
    if not all(_has({"": history}, column) for column in ("eta", "phi")):
        return None
    known = epsilon == epsilon
    frame = history.assign(gap=history["phi"] - (epsilon if known else 0.0))
    titles = {"eta": "dual variable η", "gap": "Φ − ε" if known else "Φ"}
    return trace_plot({"": frame}, titles, {"gap": 0.0} if known else None)


def weight_plot(history: pd.DataFrame, prefix: str = "w/") -> Figure | None:
    """Weights on the simplex over time, stacked (w* of FairMT; ``prefix="alpha/"`` for its task weights)."""
    columns = [c for c in history.columns if str(c).startswith(prefix)]
    frame = history.dropna(subset=columns)
    if not columns or frame.empty:
        return None
    figure, (axes,) = canvas(6.4, 3.2)
    (steps, _), values = thin(frame, columns[0], 100), [thin(frame, column, 100)[1] for column in columns]
    shades = [PALETTE[i % len(PALETTE)] for i in range(len(columns))]
    names = [label(column.removeprefix(prefix)) for column in columns]
    axes.stackplot(steps, values, labels=names, colors=shades, alpha=0.85, linewidth=0)
    axes.set(xlabel="step", ylabel=prefix.rstrip("/"), ylim=(0, max(1.0, float(np.sum(values, axis=0).max()))))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def plots_of(run: RunFolder) -> Iterator[Plot]:
    """Every plot that the run's numbers and traces allow, each under a name of its own."""
    taken: set[str] = set()
    for plot in (*first_plots(run), *_plots(run)):
        name, count = plot.name, 1
        while name.lower() in taken:
            count += 1
            name = f"{plot.name}_{count}"
        taken.add(name.lower())
        yield replace(plot, name=name)


def first_plots(run: RunFolder) -> Iterator[Plot]:
    """Yield the one figure of the first screen: who pays, by the first attribute that has decisions."""
    pays = who_pays(run)
    for attribute in list(dict.fromkeys(pays["attribute"]))[:1]:
        units = " or ".join(sorted(set(pays["unit"][pays["attribute"] == attribute])))
        at = ", when as many get a yes as should" if _end(run, attribute) == BASE_RATE else ""
        who = "who" if units == "people" else "that"
        caption = (
            f"Who pays, by {attribute}{at}: of 100 {units} of a group {who} should get a yes, how many more (right of 0) or fewer "
            f"(left) do than with {run.reference}; 95 % intervals over {units}."
        )
        yield Plot("who_pays", "first", caption, partial(pays_plot, run, attribute))


def _plots(run: RunFolder) -> Iterator[Plot]:
    found = {("utility_bias", "shrinkage")[one.x in ERRORS]: one for one in reversed(scatters(run))}
    for name, caption in (
        ("utility_bias", "Utility against Bias, mean ± sd over seeds."),
        (
            "shrinkage",
            "Bias against the error of scores; the line: the reference shrunk towards the best constant at each strength.",
        ),
    ):
        if name in found:  # that of the first tolerance
            yield Plot(name, "audit", caption, partial(scatter_plot, run, found[name]))
    for column in disparities(run):
        caption = f"Utility against {column}, means over seeds; numbers are those at the end of the methods' names."
        yield Plot(f"pareto_{slug(column)}", "groups", caption, partial(pareto_plot, run, column))
    for (task, attribute), frames in bars(run).items():
        draw = partial(group_bars, run.methods, f"{label(task)} by {label(attribute)}", frames)
        yield Plot(f"groups_{slug(task)}_{slug(attribute)}", "groups", f"{task} by {attribute}", draw)
    yield from branch_plots(run)
    yield from transfer_plots(run)
    for method in run.methods:
        yield from _trace_plots(run, method)


def _trace_plots(run: RunFolder, method: str) -> Iterator[Plot]:
    found = {f"seed {item.seed}": item.history() for item in run.of(method)}
    histories = {name: frame for name, frame in found.items() if frame is not None and len(frame)}
    if not histories:
        return
    first, stem = next(iter(histories.values())), slug(method)
    settings = run.of(method)[0].metrics.get("settings") or {}
    target, epsilon = number(settings.get("target")), number(settings.get("epsilon"))
    if _has(histories, "lambda", "r_smooth"):
        titles, targets = {"lambda": "λ (multiplier)", "r_smooth": "violation rate r̃"}, {"r_smooth": target}
        dashed = f" (dashed: target {target:g})" if target == target else ""
        caption = f"{method}: λ and the smoothed violation rate{dashed}."
        yield Plot(f"controller_{stem}", "traces", caption, partial(trace_plot, histories, titles, targets))
    if _has(histories, "eta", "phi"):
        against = f"Φ − ε (ε = {epsilon:g})" if epsilon == epsilon else "Φ"
        caption = f"{method}: dual variable against {against}, first seed."
        yield Plot(f"dual_{stem}", "traces", caption, partial(dual_plot, first, epsilon))
    for prefix, what in (("w/", "disparity weights w*"), ("alpha/", "task weights α")):
        if any(str(column).startswith(prefix) for column in first):
            caption = f"{method}: {what}, first seed."
            yield Plot(f"{slug(prefix)}_{stem}", "traces", caption, partial(weight_plot, first, prefix))
    losses = {str(c): str(c).removeprefix("loss/") for c in first if str(c).startswith("loss/")}
    if losses:
        draw = partial(trace_plot, histories, dict([*losses.items()][:6]))
        yield Plot(f"losses_{stem}", "losses", f"{method}: training loss of each task.", draw)


@damage_named
def write_plots(run: RunFolder | str | Path, plots: Iterable[Plot] | None = None) -> list[Path]:
    """Write every plot of a run (or those given) as PNG into ``RUN/plots`` and return the paths.

    CheckpointError where the run folder is incomplete or damaged, or cannot be written.
    """
    run = run if isinstance(run, RunFolder) else read_run(run)
    found = plots_of(run) if plots is None else plots
    return [path for plot in found if (path := plot.save(run.path / "plots")) is not None]
