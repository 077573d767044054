"""Tables of a run: one summary for the console and the report, mean ± sd over seeds, differences, best marks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group
from rich.table import Table
from rich.text import Text

from libmtl_fair.files import write_json
from libmtl_fair.report.frames import audit_frame, groups_frame, mean_sd, rows, utility_frame
from libmtl_fair.report.run_folder import RunFolder, read_run

HIGHER_IS_BETTER = frozenset(
    {"auc", "accuracy", "balanced_accuracy", "f1", "macro_f1", "r2", "ccc", "average_precision"}
)
LABELS = {
    "auc": "AUC",
    "accuracy": "accuracy",
    "brier": "Brier",
    "log_loss": "log loss",
    "f1": "F1",
    "macro_f1": "macro F1",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R²",
    "ccc": "CCC",
}
_DISPARITIES = {
    "EO diff": {"equalized_odds", "equalized_odds_difference"},
    "DP diff": {"demographic_parity", "demographic_parity_difference"},
    "KS": {"ks", "ks_distance", "kolmogorov_smirnov"},
}
_FURTHER = {
    "EOP diff": {"equal_opportunity", "equal_opportunity_difference"},
    "AUC diff": {"auc", "auc_difference"},
    "MAE diff": {"mae", "mae_difference"},
}
MEANINGS = {
    "EO diff": "equalised-odds difference, mean over classification tasks",
    "DP diff": "demographic-parity difference, mean over classification tasks",
    "EOP diff": "equal-opportunity difference, mean over classification tasks",
    "AUC diff": "largest difference between groups' AUC, mean over classification tasks",
    "MAE diff": "largest difference between groups' mean absolute error, mean over regression tasks",
    "KS": "largest Kolmogorov-Smirnov distance between groups' predictions, mean over regression tasks",
    "Bias": "mean excess of cross-task score gaps over the fixed tolerance",
    "VR": "share of cross-task pairs whose gap exceeds the fixed tolerance",
}


def summary_values(run: RunFolder, split: str | None = None, further: bool = False) -> pd.DataFrame:
    """Return one row per method, seed and column of the summary: method, seed, column, value, higher.

    ``further`` adds differences between groups that the summary leaves out: equal opportunity, AUC and mean absolute error.
    """
    found: list[tuple[str, int, str, float, bool]] = []
    utility = utility_frame(run, split)
    for row in rows(utility[utility["task"] == "macro"]):
        found.append((row.method, row.seed, _label(row.metric), row.value, row.metric in HIGHER_IS_BETTER))
    audit = audit_frame(run, split)
    for column, name in (("bias", "Bias"), ("violation_rate", "VR")):
        for row in rows(audit):
            found.append((row.method, row.seed, f"{name}@{row.delta_name}", getattr(row, column), False))
    found.extend(_disparities(run, split, {**_DISPARITIES, **(_FURTHER if further else {})}))
    return pd.DataFrame(found, columns=["method", "seed", "column", "value", "higher"])


def _label(metric: object) -> str:
    return f"macro {LABELS.get(str(metric), str(metric).replace('_', ' '))}"


def _disparities(
    run: RunFolder, split: str | None, measures: Mapping[str, set[str]]
) -> Iterator[tuple[str, int, str, float, bool]]:
    groups = groups_frame(run, split)
    for name, metrics in measures.items():
        taken = groups[
            groups["metric"].isin(metrics)
            & (groups["group"].eq("difference") | groups["metric"].str.endswith("_difference"))
        ]
        means = taken.groupby(["attribute", "method", "seed"], sort=False)["value"].mean()
        for row in rows(means.reset_index()):
            yield row.method, row.seed, f"{name} {row.attribute}", row.value, False


def summary(run: RunFolder, split: str | None = None, further: bool = False) -> pd.DataFrame:
    """Return method, column, mean, sd, n, higher, difference, best: one row a cell of the summary.

    ``difference`` is the mean of paired differences to the reference over the seeds that both have; ``best`` marks the
    best mean of each column (none where all methods are equal).
    """
    values = summary_values(run, split, further)
    cells = mean_sd(values, ["method", "column", "higher"])
    wide = values.pivot_table(index=["column", "seed"], columns="method", values="value", dropna=False)
    if run.reference in wide:
        paired = wide.sub(wide[run.reference], axis=0).groupby(level="column").mean()
        cells["difference"] = [_at(paired, column, method) for column, method in zip(cells["column"], cells["method"])]
    else:
        cells["difference"] = math.nan
    cells.loc[cells["method"] == run.reference, "difference"] = math.nan
    signed = cells["mean"].where(~cells["higher"].astype(bool), -cells["mean"])
    grouped = signed.groupby(cells["column"])
    cells["best"] = (signed == grouped.transform("min")) & (signed.round(9) < grouped.transform("max").round(9))
    return cells


def write_summary(run_dir: str | Path) -> Path:
    """Write ``summary.json``: mean, sd, n and paired difference to the reference of every method and column.

    Raises
    ------
    CheckpointError : the run folder is incomplete or damaged, or cannot be written.
    """
    run = read_run(run_dir)
    content: dict[str, Any] = {"format": 1, "name": run.name, "split": run.split, "seeds": run.seeds}
    methods: dict[str, dict[str, Any]] = {method: {} for method in run.methods}
    for row in rows(summary(run)):
        numbers = {"mean": row.mean, "sd": row.sd, "n": int(row.n), "difference": row.difference}
        methods[row.method][row.column] = {**numbers, "higher_is_better": bool(row.higher)}
    return write_json(run.path / "summary.json", {**content, "reference": run.reference, "methods": methods})


def _at(frame: pd.DataFrame, row: object, column: object) -> float:
    known = row in frame.index and column in frame.columns
    return float(frame.to_dict()[column][row]) if known else math.nan


def show(mean: float, sd: float = math.nan, digits: int = 3) -> str:
    """Write a number, with its sd where there is one.

    >>> show(0.83251, 0.0021), show(0.5), show(float("nan"))
    ('0.833 ± 0.002', '0.500', '–')
    """
    if not math.isfinite(mean):
        return "–"
    digits = digits if abs(mean) < 100 else 1
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if math.isfinite(sd) else "")


def show_difference(value: float) -> str:
    """Write a difference with its sign; nothing where there is none."""
    return f"{value:+.3f}" if math.isfinite(value) else ""


def summary_table(run: RunFolder, split: str | None = None, width: int | None = None) -> Table | Group:
    """Build the table that ends a run on the console.

    One row a method. Where that needs more than ``width`` characters, one row a column instead; where that does not fit
    either, several tables below each other, so that a narrow terminal shows whole numbers. Best mean with a star,
    difference to the reference below it, dim.
    """
    cells = summary(run, split)
    columns = list(dict.fromkeys(cells["column"]))
    found = {(row.method, row.column): _cell(row) for row in rows(cells)}
    if width is None or _width(run.methods, columns) <= width:
        return _table(run, split, found, run.methods, columns)
    if _width(columns, run.methods) <= width:
        return _table(run, split, {(c, m): text for (m, c), text in found.items()}, columns, run.methods)
    per_part = max(1, (width - 4 - max(map(len, run.methods))) // (max(16, *map(len, columns)) + 3))
    parts = [columns[i : i + per_part] for i in range(0, len(columns), per_part)]
    return Group(*(_table(run, split, found, run.methods, part) for part in parts))


def _width(heads: list[str], columns: list[str]) -> int:
    """Characters that a table needs whose rows are named by ``heads``."""
    return 4 + max(map(len, heads)) + sum(max(16, len(column)) + 3 for column in columns)


def _table(
    run: RunFolder, split: str | None, found: dict[tuple[str, str], Text], heads: list[str], columns: list[str]
) -> Table:
    seeds = f"{len(run.seeds)} seeds" if len(run.seeds) > 1 else "1 seed"
    table = Table(title=f"{run.name}: {split or run.split}, mean ± sd over {seeds}", title_justify="left")
    table.add_column("method" if heads == run.methods else "", no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", no_wrap=True)
    for head in heads:
        table.add_row(Text(head), *(found.get((head, column), Text("–")) for column in columns))
    caption = "* best mean; small: difference to " + run.reference if len(run.methods) > 1 else ""
    table.caption = Text(caption, style="dim") if caption else None
    return table


def _cell(row: Any) -> Text:
    difference = show_difference(row.difference)
    text = Text(show(row.mean, row.sd) + ("*" if row.best else ""), style="bold" if row.best else "")
    return text.append(f"\n{difference}", style="not bold dim") if difference else text
