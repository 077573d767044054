"""What a method gains against training each task alone, and its place among methods, from a run's own numbers."""

from __future__ import annotations

import pandas as pd

from libmtl_fair import metrics
from libmtl_fair.report.frames import groups_frame, rows, utility_frame
from libmtl_fair.report.plots import SUMMARIES
from libmtl_fair.report.run_folder import RunFolder
from libmtl_fair.report.tables import HIGHER_IS_BETTER, summary_values

_MAIN = ("auc", "accuracy", "r2")
_BETWEEN_GROUPS = ("EO diff", "EOP diff", "AUC diff", "MAE diff")
_RATES = ("true_positive_rate", "false_positive_rate")


def main_metrics(run: RunFolder, split: str | None = None) -> pd.DataFrame:
    """Return method, seed, task, metric, value of each task's main metric: AUC, else accuracy, else R2."""
    frame = utility_frame(run, split)
    frame = frame[(frame["task"] != "macro") & frame["metric"].isin(_MAIN) & frame["value"].notna()]
    order = frame["metric"].map({name: i for i, name in enumerate(_MAIN)})
    return frame[order == order.groupby(frame["task"]).transform("min")]


def delta_m(run: RunFolder, split: str | None = None, fair: bool = False) -> dict[str, float]:
    """Return method -> Delta_m in percent of the tasks' main metrics against the reference; below 0 is better.

    ``fair`` counts the differences between groups too: equalised odds, equal opportunity and AUC (regression: mean absolute
    error) of every attribute, each as one more metric. Source: Navon et al., ICML 2022; GLF compares methods so.
    """
    results, higher = _results(_measures(run, split, fair))
    return metrics.delta_m(results, results[run.reference], higher) if run.reference in results else {}


def mean_rank(run: RunFolder, split: str | None = None, fair: bool = False) -> dict[str, float]:
    """Return method -> its rank by the tasks' main metrics, averaged over tasks; 1 is the best. ``fair`` as in :func:`delta_m`."""
    return metrics.mean_rank(*_results(_measures(run, split, fair)))


def _measures(run: RunFolder, split: str | None, fair: bool) -> pd.DataFrame:
    """Return method, seed, task, metric, value; differences between groups have their column of the summary as the task."""
    found = main_metrics(run, split)
    if not fair:
        return found
    values = summary_values(run, split, further=True)
    values = values[values["column"].str.startswith(_BETWEEN_GROUPS)]
    return pd.concat([found, values.assign(task=values["column"], metric="difference")[list(found.columns)]])


def single_task_methods(run: RunFolder) -> list[str]:
    """Return the methods that train each task alone, as their recipes say."""
    return [m for m in run.methods if (run.of(m)[0].metrics.get("settings") or {}).get("single_task")]


def gains(run: RunFolder, split: str | None = None) -> pd.DataFrame:
    """Return method, task, knowledge_gain, discrimination_gain against the first single-task method.

    Knowledge gain: the task's main metric minus that of the single-task model (above 0 is better). Discrimination gain: the
    equalised-odds violation, absolute differences of true and false positive rates summed over pairs of groups and over
    attributes, minus that of the single-task model (below 0 is better). Means over seeds; empty without a single-task
    method. Source: FairBranch, arXiv:2310.13746.
    """
    alone = single_task_methods(run)
    columns = ["method", "task", "knowledge_gain", "discrimination_gain"]
    if not alone:
        return pd.DataFrame(columns=columns)
    utility, violation = _by_task(main_metrics(run, split)), _by_task(_violations(run, split))
    found = []
    for method in (m for m in run.methods if m not in alone):
        known = metrics.knowledge_gain(utility[method], utility[alone[0]])
        worse = _same_tasks(violation.get(method, {}), violation.get(alone[0], {}))
        found += [(method, task, gain, worse.get(task, float("nan"))) for task, gain in known.items()]
    return pd.DataFrame(found, columns=columns)


def _same_tasks(multi: dict[str, float], single: dict[str, float]) -> dict[str, float]:
    both = [task for task in multi if task in single]
    return metrics.discrimination_gain({t: multi[t] for t in both}, {t: single[t] for t in both})


def _violations(run: RunFolder, split: str | None) -> pd.DataFrame:
    """Return method, seed, task, value: the equalised-odds violation, summed over single attributes."""
    frame = groups_frame(run, split)
    frame = frame[frame["metric"].isin(_RATES) & ~frame["group"].isin(SUMMARIES)]
    frame = frame[~frame["attribute"].str.contains(" & ", regex=False)]
    found = []
    for (method, seed, task), part in frame.groupby(["method", "seed", "task"], sort=False):
        by = part.groupby(["attribute", "metric"])["value"].apply(list)
        whole = sum(metrics.violation({str(key): values}) for key, values in by.items())
        found.append((method, seed, task, whole))
    return pd.DataFrame(found, columns=["method", "seed", "task", "value"])


def _by_task(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    means = frame.groupby(["method", "task"], sort=False)["value"].mean().reset_index()
    found: dict[str, dict[str, float]] = {}
    for row in rows(means):
        found.setdefault(row.method, {})[row.task] = float(row.value)
    return found


def _results(frame: pd.DataFrame) -> tuple[dict[str, dict[str, float]], dict[str, bool]]:
    """Return method -> "task metric" -> mean over seeds, NaN where a method lacks it, and which way each goes."""
    names = frame["task"].astype(str) + " " + frame["metric"].astype(str)
    wide = frame.assign(name=names).pivot_table(index="name", columns="method", values="value", sort=False)
    higher = {str(name): str(name).rpartition(" ")[2] in HIGHER_IS_BETTER for name in wide.index}
    results = {str(m): {str(k): float(v) for k, v in wide[m].items()} for m in dict.fromkeys(frame["method"])}
    return results, higher
