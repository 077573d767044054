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


GAINS = {
    "knowledge": "knowledge gain ↑",
    "ep": "discrimination gain, EP ↓",
    "eo": "discrimination gain, EO ↓",
}
"""Columns of :func:`gains` and what they are called."""


def gains(run: RunFolder, split: str | None = None) -> pd.DataFrame:
    """Return what training together gains against the first single-task method, paired by seed.

    Knowledge gain: accuracy (R2 of a regression task) minus that of the single-task model; above 0 is better. Discrimination
    gain: the violation minus that of the single-task model, below 0 is better; EP takes the differences of true positive
    rates summed over pairs of groups and over attributes, EO adds those of false positive rates; a multiclass task is the
    mean of its classes one against the rest (ours). Source: FairBranch, arXiv:2310.13746.

    Returns
    -------
    One row a method and task, and one for ``"mean"`` over tasks: method, task, seeds, and for each of knowledge, ep and eo
    its mean over seeds and ``<name>_sd``. Empty without a single-task method.
    """
    alone = single_task_methods(run)
    columns = ["method", "task", "seeds", *(f"{name}{end}" for name in GAINS for end in ("", "_sd"))]
    if not alone:
        return pd.DataFrame(columns=columns)
    keys = ["method", "seed", "task"]
    frame = pd.concat([_accuracy(run, split), *_violations(run, split)]).pivot(index=keys, columns="of", values="value")
    frame = frame.reindex(columns=list(GAINS)).reset_index()
    single = frame[frame["method"] == alone[0]].drop(columns="method")
    both = frame[~frame["method"].isin(alone)].merge(single, on=["seed", "task"], suffixes=("", "_alone"))
    for name in GAINS:
        both[name] -= both[f"{name}_alone"]
    overall = both.groupby(["method", "seed"], sort=False)[list(GAINS)].mean().reset_index().assign(task="mean")
    groups = pd.concat([both, overall]).groupby(["method", "task"], sort=False)
    found = groups["seed"].nunique().rename("seeds").to_frame()
    for name in GAINS:
        found[name], found[f"{name}_sd"] = groups[name].mean(), groups[name].std()
    place = {name: i for i, name in enumerate(run.methods)}
    return found.reset_index().sort_values("method", key=lambda m: m.map(place), kind="stable", ignore_index=True)[
        columns
    ]


def gain_verdict(found: pd.DataFrame) -> str:
    """Return one sentence that says which methods gain on average over tasks, and which do not."""
    gained: list[str] = []
    short: list[str] = []
    for row in rows(found[found["task"] == "mean"]):
        less = {"knowledge": row.knowledge < 0, "EP": row.ep > 0, "EO": row.eo > 0}
        lacks = ", ".join(name for name, true in less.items() if true)
        (short if lacks else gained).append(f"{row.method} ({lacks})" if lacks else str(row.method))
    return (
        f"Mean knowledge gain at least 0 and mean discrimination gain at most 0: {', '.join(gained) or 'none'}. "
        f"Short of it (in what): {'; '.join(short) or 'none'}."
    )


def _accuracy(run: RunFolder, split: str | None) -> pd.DataFrame:
    frame = utility_frame(run, split)
    frame = frame[(frame["task"] != "macro") & frame["metric"].isin(["accuracy", "r2"])]
    frame = frame.sort_values("metric").drop_duplicates(["method", "seed", "task"])
    return frame[["method", "seed", "task", "value"]].assign(of="knowledge")


def _violations(run: RunFolder, split: str | None) -> list[pd.DataFrame]:
    """Return method, seed, task, value, of for EP and for EO: summed over single attributes, mean over classes."""
    frame = groups_frame(run, split)
    parts = frame["metric"].str.extract(r"^(true_positive_rate|false_positive_rate)(\[.*\])?$")
    frame = frame.assign(rate=parts[0], label=parts[1].fillna(""))
    frame = frame[frame["rate"].notna() & ~frame["group"].isin(SUMMARIES)]
    frame = frame[~frame["attribute"].str.contains(" & ", regex=False)]
    keys = ["method", "seed", "task"]
    of_rate = frame.groupby([*keys, "attribute", "label", "rate"], sort=False)["value"]
    each = of_rate.agg(lambda rates: metrics.violation({"rate": list(rates)})).reset_index()
    found = []
    for name, rates in (("ep", ["true_positive_rate"]), ("eo", ["true_positive_rate", "false_positive_rate"])):
        of_class = each[each["rate"].isin(rates)].groupby([*keys, "label"], sort=False)["value"].sum()
        found.append(of_class.groupby(keys, sort=False).mean().reset_index().assign(of=name))
    return found


def _results(frame: pd.DataFrame) -> tuple[dict[str, dict[str, float]], dict[str, bool]]:
    """Return method -> "task metric" -> mean over seeds, NaN where a method lacks it, and which way each goes."""
    names = frame["task"].astype(str) + " " + frame["metric"].astype(str)
    wide = frame.assign(name=names).pivot_table(index="name", columns="method", values="value", sort=False)
    higher = {str(name): str(name).rpartition(" ")[2] in HIGHER_IS_BETTER for name in wide.index}
    results = {str(m): {str(k): float(v) for k, v in wide[m].items()} for m in dict.fromkeys(frame["method"])}
    return results, higher
