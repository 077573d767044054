"""Tables of the report as plain rows of text, so that the page and the card show the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from libmtl_fair.report.frames import audit_frame, groups_frame, mean_sd, pair_frame, rows, utility_frame
from libmtl_fair.report.gains import GAINS, gain_verdict, gains, single_task_methods
from libmtl_fair.report.run_folder import RunFolder
from libmtl_fair.report.shrinkage import shrinkage_verdict
from libmtl_fair.report.tables import HIGHER_IS_BETTER, LABELS, show, show_difference, summary

_RATES = {"difference", "ratio", "difference_mean", "ratio_mean"}


@dataclass(frozen=True)
class Cell:
    """Text of a cell, smaller text below it, and whether it is the best of its column."""

    text: str
    small: str = ""
    best: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table: title, column heads, rows of cells (the first one names the row)."""

    title: str
    heads: tuple[str, ...]
    body: tuple[tuple[Cell, ...], ...]
    note: str = ""


def sheet(title: str, heads: Sequence[str], body: Sequence[Sequence[object]], note: str = "") -> Sheet:
    """Make a table from texts and cells."""
    made = tuple(tuple(item if isinstance(item, Cell) else Cell(str(item)) for item in line) for line in body)
    return Sheet(title, tuple(heads), made, note)


def summary_sheet(run: RunFolder, title: str, prefixes: tuple[str, ...], note: str = "") -> Sheet | None:
    """Columns of the summary that start with one of ``prefixes``: one row a method. None if there are none."""
    cells = summary(run)
    columns = [c for c in dict.fromkeys(cells["column"]) if c.startswith(prefixes)]
    found = {(r.method, r.column): Cell(show(r.mean, r.sd), show_difference(r.difference), r.best) for r in rows(cells)}
    body = [[method, *(found.get((method, column), Cell("–")) for column in columns)] for method in run.methods]
    return sheet(title, ["method", *columns], body, note) if columns else None


def task_sheet(run: RunFolder) -> Sheet:
    """Utility of every task."""
    frame = mean_sd(utility_frame(run), ["task", "method", "metric"])
    frame = frame[frame["task"] != "macro"]
    metrics = list(dict.fromkeys(frame["metric"]))
    found = {(r.task, r.method, r.metric): show(r.mean, r.sd) for r in rows(frame)}
    keys = [(task, method) for task in dict.fromkeys(frame["task"]) for method in run.methods]
    body = [[task, method, *(found.get((task, method, metric), "–") for metric in metrics)] for task, method in keys]
    heads = [f"{LABELS.get(m, m)} {'↑' if m in HIGHER_IS_BETTER else '↓'}" for m in metrics]
    return sheet("Utility by task", ["task", "method", *heads], body)


def gain_sheet(run: RunFolder, found: pd.DataFrame | None = None) -> Sheet | None:
    """Knowledge and discrimination gain by task; None without a single-task method."""
    found = gains(run) if found is None else found
    if found.empty:
        return None
    body = [
        [r.method, r.task, *(_signed(getattr(r, name), getattr(r, f"{name}_sd")) for name in GAINS)]
        for r in rows(found)
    ]
    title = f"Against {single_task_methods(run)[0]} (each task alone)"
    return sheet(title, ["method", "task", *GAINS.values()], body, gain_verdict(found))


def _signed(mean: float, sd: float) -> str:
    if mean != mean:
        return "–"
    return f"{mean:+.4f}" + (f" ± {sd:.4f}" if sd == sd else "")


def audit_sheet(run: RunFolder) -> Sheet | None:
    """Bias and VR under each tolerance, the Brier beside it, and the place relative to the shrinkage curve."""
    frame = audit_frame(run)
    if frame.empty:
        return None
    verdict = {(r.method, r.delta_name): r for r in rows(shrinkage_verdict(run))}
    means = {
        column: {(r.method, r.delta_name): show(r.mean, r.sd, 4) for r in rows(_mean(frame, column))}
        for column in ("delta", "bias", "violation_rate")
    }
    body = []
    for key in means["bias"]:
        row = verdict.get(key)
        words = ["–", "–"] if row is None else [show(row.curve_bias, digits=4), _verdict(row)]
        delta = means["delta"][key].split(" ±")[0]
        body.append([key[1], delta, key[0], means["bias"][key], means["violation_rate"][key], *words])
    heads = ["tolerance", "δ", "method", "Bias ↓", "VR ↓", f"{run.reference} shrunk to equal Brier", "below it"]
    return sheet("Bias and violation rate", heads, body)


def _verdict(row: Any) -> str:
    return f"{'yes' if row.below else 'no'} ({row.seeds_below} of {row.seeds} seeds)"


def _mean(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    return mean_sd(frame, ["method", "delta_name"], column).pipe(in_order, "delta_name")


def pair_sheet(run: RunFolder) -> Sheet | None:
    """Bias and VR of every task pair under the first tolerance."""
    frame = pair_frame(run)
    if frame.empty:
        return None
    first = frame["delta_name"].iloc[0]
    frame = frame[frame["delta_name"] == first]
    keys = ["task_a", "task_b", "method"]
    means = frame.groupby(keys, sort=False)[["bias", "violation_rate"]].mean().reset_index()
    means = in_order(means, "task_a", "task_b")
    body = [
        [r.task_a, r.task_b, r.method, show(r.bias, digits=4), show(r.violation_rate, digits=4)] for r in rows(means)
    ]
    return sheet(f"By task pair, tolerance {first}", ["task", "task", "method", "Bias ↓", "VR ↓"], body)


def disparity_sheet(run: RunFolder) -> Sheet | None:
    """Every difference and ratio between groups, with the mean of its bootstrap intervals."""
    frame = groups_frame(run)
    frame = frame[frame["group"].isin(_RATES) | frame["metric"].str.endswith(("_difference", "_ratio"))]
    return _group_sheet(frame, "Differences and ratios between groups", "statistic")


def group_sheet(run: RunFolder) -> Sheet | None:
    """Every metric of every group, with the mean of its intervals."""
    frame = groups_frame(run)
    frame = frame[~(frame["group"].isin(_RATES) | frame["metric"].str.endswith(("_difference", "_ratio")))]
    return _group_sheet(frame, "Groups", "group")


def _group_sheet(frame: pd.DataFrame, title: str, head: str) -> Sheet | None:
    if frame.empty:
        return None
    keys = ["task", "attribute", "metric", "group", "method"]
    grouped = frame.groupby(keys, sort=False)
    means = (
        grouped[["value", "low", "high", "n"]]
        .mean()
        .join(grouped["value"].std().rename("sd"))
        .join(grouped["flag"].max())
    )
    body = []
    for r in rows(in_order(means.reset_index(), *keys[:4])):
        names = [r.task, r.attribute, r.metric.replace("_", " "), r.group, r.method]
        numbers = [show(r.value, r.sd), interval(r.low, r.high), f"{r.n:.0f}" if r.n == r.n else "–"]
        body.append([*names, *numbers, r.flag])
    return sheet(title, ["task", "attribute", "metric", head, "method", "value", "interval", "n", "flag"], body)


def in_order(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Rows sorted by columns, each in its order of appearance, so that equal things stand together."""
    ranks = pd.DataFrame({column: pd.factorize(frame[column])[0] for column in columns}, index=frame.index)
    return frame.loc[ranks.sort_values(list(columns), kind="stable").index]


def interval(low: float, high: float) -> str:
    """Write an interval, or a dash where there is none.

    >>> interval(0.1, 0.25), interval(float("nan"), 1.0)
    ('[0.100, 0.250]', '–')
    """
    return f"[{low:.3f}, {high:.3f}]" if low == low and high == high else "–"


def data_sheets(run: RunFolder) -> list[Sheet]:
    """Tasks and groups of the data card with sizes and base rates."""
    card, sheets = run.data_card, []
    tasks = {name: task for name, task in (card.get("tasks") or {}).items() if isinstance(task, Mapping)}
    if tasks:
        body = []
        for name, task in tasks.items():
            counts = [_count(task.get("labelled")), _count(task.get("missing"))]
            body.append([name, task.get("kind", ""), task.get("definition", ""), *counts, base_rate(task)])
        sheets.append(sheet("Tasks", ["task", "kind", "definition", "labelled", "missing", "base rate"], body))
    for attribute, entry in (card.get("groups") or {}).items():
        names = entry.get("groups") if isinstance(entry, Mapping) else None
        if not isinstance(names, Mapping):
            continue
        body = [[name, *_sizes(group), *_rates(tasks, attribute, name)] for name, group in names.items()]
        sheets.append(sheet(f"Groups of {attribute}", ["group", "rows", "share", "test rows", *tasks], body))
    return sheets


def _sizes(group: Any) -> list[str]:
    group = group if isinstance(group, Mapping) else {"rows": group}
    share, split = group.get("share"), group.get("split")
    test = split.get("test") if isinstance(split, Mapping) else None
    return [_count(group.get("rows")), f"{share:.1%}" if isinstance(share, float) else "–", _count(test)]


def _rates(tasks: Mapping[str, Mapping[str, Any]], attribute: str, group: str) -> list[str]:
    found = [((task.get("per_group") or {}).get(attribute) or {}).get(group) for task in tasks.values()]
    return [base_rate(entry) if isinstance(entry, Mapping) else "–" for entry in found]


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def base_rate(entry: Mapping[str, Any]) -> str:
    """Base rate, mean or class shares of a task in the data card.

    >>> base_rate({"rate": 0.239}), base_rate({"mean": 40.4, "std": 12.4})
    ('23.9%', '40.4 ± 12.4')
    """
    if isinstance(entry.get("rate"), int | float):
        return f"{entry['rate']:.1%}"
    if isinstance(entry.get("mean"), int | float):
        return f"{entry['mean']:.4g} ± {entry.get('std') or 0:.3g}"
    classes = entry.get("classes")
    total = entry.get("n") or sum(classes.values()) if isinstance(classes, Mapping) else 0
    return ", ".join(f"{name} {count / total:.0%}" for name, count in classes.items()) if total and classes else "–"
