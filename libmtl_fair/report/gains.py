"""What a method gains against training each task alone, and its place among methods, from a run's own numbers."""

from __future__ import annotations

from typing import Any

import pandas as pd

from libmtl_fair.report.frames import groups_frame, utility_frame
from libmtl_fair.report.run_folder import RunFolder
from libmtl_fair.report.tables import HIGHER_IS_BETTER

_MAIN = ("auc", "accuracy", "r2")
_VIOLATIONS = ("demographic_parity", "equal_opportunity", "true_positive_rate")


def main_metrics(run: RunFolder, split: str | None = None) -> pd.DataFrame:
    """Return method, seed, task, metric, value of each task's main metric: AUC, else accuracy, else R2."""
    frame = utility_frame(run, split)
    frame = frame[(frame["task"] != "macro") & frame["metric"].isin(_MAIN) & frame["value"].notna()]
    order = frame["metric"].map({name: i for i, name in enumerate(_MAIN)})
    return frame[order == order.groupby(frame["task"]).transform("min")]


def delta_m(run: RunFolder, split: str | None = None) -> dict[str, float]:
    """Return method -> Delta_m in percent: the mean relative *loss* of the tasks' main metrics to the reference.

    Negative is better than the reference. Source: Navon et al., ICML 2022.
    """
    wide = _means(main_metrics(run, split))
    base = wide[run.reference]
    signs = pd.Series([1.0 if metric in HIGHER_IS_BETTER else -1.0 for _, metric in wide.index], index=wide.index)
    lost = wide.rsub(base, axis=0).mul(signs, axis=0).div(base.abs(), axis=0)
    return {str(method): float(100 * value) for method, value in lost.mean().items()}


def mean_rank(run: RunFolder, split: str | None = None) -> dict[str, float]:
    """Return method -> mean over tasks of its rank by the main metric; 1 is the best. Source: Navon et al., ICML 2022."""
    ranks = _means(main_metrics(run, split)).rank(axis=1, ascending=False)
    return {str(method): float(value) for method, value in ranks.mean().items()}


def single_task_methods(run: RunFolder) -> list[str]:
    """Return the methods that train each task alone, as their recipes say."""
    return [m for m in run.methods if (run.of(m)[0].metrics.get("settings") or {}).get("single_task")]


def gains(run: RunFolder, split: str | None = None) -> pd.DataFrame:
    """Return method, task, knowledge_gain, discrimination_gain against the first single-task method.

    Knowledge gain is the main metric of the method minus that of the single-task model (above 0 is better); discrimination
    gain the difference of the largest demographic-parity and equal-opportunity gaps between groups, summed over
    attributes (below 0 is better). Empty without a single-task method. Source: FairBranch, arXiv:2310.13746.
    """
    columns = ["method", "task", "knowledge_gain", "discrimination_gain"]
    alone = single_task_methods(run)
    if not alone:
        return pd.DataFrame(columns=columns)
    utility, violation = _means(main_metrics(run, split)).droplevel("metric"), _violations(run, split)
    found = [
        (method, task, _minus(utility, task, method, alone[0]), _minus(violation, task, method, alone[0]))
        for method in run.methods
        if method not in alone
        for task in utility.index
    ]
    return pd.DataFrame(found, columns=columns)


def _violations(run: RunFolder, split: str | None) -> pd.DataFrame:
    frame = groups_frame(run, split)
    frame = frame[frame["metric"].isin(_VIOLATIONS) & (frame["group"] == "difference")]
    # Equal opportunity is the gap of true positive rates: one of the two names counts, not both.
    known = set(frame["metric"])
    if {"equal_opportunity", "true_positive_rate"} <= known:
        frame = frame[frame["metric"] != "true_positive_rate"]
    sums = frame.groupby(["task", "method", "seed"])["value"].sum(min_count=1).groupby(["task", "method"]).mean()
    return sums.unstack("method") if len(sums) else pd.DataFrame()


def _means(frame: pd.DataFrame) -> pd.DataFrame:
    keys = ["task", "metric", "method"]
    return frame.groupby(keys, sort=False)["value"].mean().unstack("method")


def _minus(frame: pd.DataFrame, task: Any, method: str, base: str) -> float:
    if task not in frame.index or method not in frame.columns or base not in frame.columns:
        return float("nan")
    return float(frame.loc[task, method]) - float(frame.loc[task, base])
