"""What a run's numbers amount to: the summary, and each method beside its reference, a shrunk one, and single tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from libmtl_fair import metrics
from libmtl_fair.data.spec import words
from libmtl_fair.files import Json, write_json
from libmtl_fair.metrics.drift import MARGIN
from libmtl_fair.report import judged
from libmtl_fair.report.judged import NO_GROUP
from libmtl_fair.report.run_folder import RunFolder, number, read_run, rows

HIGHER_IS_BETTER = frozenset(
    words("auc accuracy balanced_accuracy f1 macro_f1 r2 ccc average_precision kappa mIoU pixAcc <11.25 <22.5 <30")
)
LABELS = {"auc": "AUC", "brier": "Brier", "log_loss": "log loss", "f1": "F1", "macro_f1": "macro F1"}
LABELS |= {"kappa": "κ", "rmse": "RMSE", "mae": "MAE", "r2": "R²", "ccc": "CCC"}
LABELS |= {"mean": "mean angle", "median": "median angle", "abs_err": "absolute error", "rel_err": "relative error"}
GAPS = {"EO diff": "equalized_odds", "DP diff": "demographic_parity", "KS": "ks"}
"""Columns that compare groups, by the worst task: yes/no decisions, at both thresholds; KS of numbers."""
_MEANS = {
    "mean EO diff": "equalized_odds",
    "mean EOP diff": "equal_opportunity",
    "mean AUC diff": "auc",
    "mean MAE diff": "mae",
}
PEOPLE = {"inconsistency": "inconsistency", "flip gap": "flip"}
"""Columns of the audit of people, and what they are among its rows."""
DECIDED = frozenset(("accuracy", "balanced_accuracy", "f1", "macro_f1"))
"""Utilities that are of decisions: those of a degenerate one say nothing, and both thresholds have theirs."""
_VALUES = ["method", "seed", "column", "value", "higher"]
BETWEEN_GROUPS = frozenset({"difference", "ratio"})
_MAIN = ("auc", "accuracy", "r2", "mIoU", "RMSE", "mean")


def summary_values(run: RunFolder, further: bool = False) -> pd.DataFrame:
    """Return one row per method, seed and column of the summary: method, seed, column, value, higher.

    "EO diff", "DP diff" and "KS" of an attribute are those of the worst task (yes/no decisions; without any, the mean over
    classification tasks as "mean EO diff"), between groups with enough people (:mod:`libmtl_fair.report.judged`). ``further`` adds
    means over tasks: equalised odds, equal opportunity, AUC and mean absolute error.
    """
    audit, utility, other = (run.frame(part) for part in ("audit", "utility", "utility_base_rate"))
    both = pd.concat([utility.assign(end=""), other[other["metric"].isin(DECIDED)].assign(end=judged.BASE_RATE)])
    macro = both[both["task"] == "macro"]
    columns = [f"{_macro(name)}{end}" for name, end in zip(macro["metric"], macro["end"])]
    parts = [macro.assign(column=columns, higher=macro["metric"].isin(HIGHER_IS_BETTER))]
    for name, source in (("Bias", "bias"), ("VR", "violation_rate")):
        parts.append(audit.assign(column=f"{name}@" + audit["delta_name"], value=audit[source], higher=False))
    parts += _gap_columns(run, further)
    people = run.frame("consistency").dropna(subset=["value"])
    for name, metric in PEOPLE.items():
        parts.append(
            people[(people["task"] == "macro") & (people["metric"] == metric)].assign(column=name, higher=False)
        )
    return pd.DataFrame([row for part in parts for row in rows(part[_VALUES])], columns=_VALUES)


def _macro(metric: str) -> str:
    return f"macro {LABELS.get(metric, metric.replace('_', ' '))}"


def _gap_columns(run: RunFolder, further: bool) -> Iterator[pd.DataFrame]:
    keys = ["attribute", "method", "seed"]
    for end in judged.thresholds(run) or [""]:
        found = judged.gaps(run, end)
        decided = found["binary"].any()
        wanted = dict(GAPS) if decided or not further else {"KS": "ks"}
        wanted |= _MEANS if further and not end else {}
        for name, metric in wanted.items():
            own = found[(found["metric"] == metric)]
            worst = not name.startswith("mean") and (decided or metric == "ks")
            own = own[own["binary"]] if worst and metric != "ks" else own
            values = own.groupby(keys, sort=False)["value"].agg("max" if worst else "mean").reset_index()
            shown = name if worst or name in _MEANS else f"mean {name}"
            yield values.assign(column=f"{shown} " + values["attribute"] + end, higher=False)


def summary(run: RunFolder, further: bool = False) -> pd.DataFrame:
    """Return one row a cell of the summary: method, column, higher, mean, sd, n, difference, low, high, pairs, verdicts, best.

    ``difference`` is the mean of paired differences to the reference over the seeds that both have, ``pairs`` their number,
    low and high their 95 % bootstrap interval (NaN with one pair). Verdicts: ``why`` a degenerate decision makes the number say
    nothing ("" otherwise), ``down`` the tasks in which the method levels down, ``p`` of "no gap", ``gain``: the gap is smaller
    *and* somebody gains by more than noise. ``best`` marks the best mean of each column among what may be called good: no
    degenerate decision, no levelling down, no Bias that shrinking gives as well; none where all methods are equal.
    """
    return run.once(f"summary{further}", lambda: _summary(run, further)).copy()


def _summary(run: RunFolder, further: bool) -> pd.DataFrame:
    values = summary_values(run, further)
    values = values[values["value"].notna().groupby(values["column"]).transform("any")]
    grouped = values.groupby(["method", "column", "higher"], sort=False)["value"]
    cells = grouped.agg(mean="mean", sd="std", n="count").reset_index()
    wide = values.pivot(index="seed", columns=["column", "method"], values="value").astype(float)
    nothing = pd.Series(math.nan, index=wide.index)
    found = []
    for row in rows(cells):
        reference = wide.get((row.column, run.reference), nothing) if row.method != run.reference else nothing
        found.append(metrics.paired_difference(wide[row.column, row.method], reference))
    paired = pd.DataFrame(found, columns=["mean", "low", "high", "n"])
    cells[["difference", "low", "high", "pairs"]] = paired.astype({"n": int})
    cells = cells.join(_verdicts(run, cells))
    signed = cells["mean"].where(~cells["higher"].astype(bool), -cells["mean"])
    able = signed.where((cells["why"] == "") & (cells["down"] == "") & ~cells["shrunk"])
    least, most = able.groupby(cells["column"]).transform("min"), signed.groupby(cells["column"]).transform("max")
    cells["best"] = (able == least) & (signed.round(9) < most.round(9))
    return cells


def column_of(column: str) -> tuple[str, str, str]:
    """Return metric, attribute and end (of the threshold) of a column that compares groups; ("", "", "") of others.

    >>> column_of("EO diff sex, base rate"), column_of("macro AUC")
    (('equalized_odds', 'sex', ', base rate'), ('', '', ''))
    """
    end = judged.BASE_RATE if column.endswith(judged.BASE_RATE) else ""
    for name, metric in (GAPS | _MEANS | {f"mean {name}": metric for name, metric in GAPS.items()}).items():
        if column.startswith(f"{name} "):
            return metric, column.removeprefix(f"{name} ").removesuffix(end), end
    return "", "", ""


def _verdicts(run: RunFolder, cells: pd.DataFrame) -> pd.DataFrame:
    """Return why, down, p, gain and shrunk of every cell."""
    ends = judged.thresholds(run)
    why = {end: judged.why_degenerate(run, end) for end in ends}
    down = {end: judged.levelled_down(run, end) for end in ends}
    p = {end: judged.p_values(run, end) for end in ends}
    gainers = {end: _gainers(run, end) for end in ends}
    decided = set(map(_macro, DECIDED))
    below = {(r.method, r.delta_name) for r in rows(shrinkage_verdict(run)) if r.below}
    made = []
    for row in rows(cells):
        metric, attribute, end = column_of(row.column)
        decision = metric in ("equalized_odds", "demographic_parity", "equal_opportunity")
        at = judged.BASE_RATE * row.column.endswith(judged.BASE_RATE)
        # Scores that decide the same for all even at the base rate rank nobody, and alike in every group.
        judged_at = ends[-1:] if metric == "auc" else [at] if decision or row.column.removesuffix(at) in decided else []
        none = "; ".join(why[e][row.method] for e in judged_at if row.method in why.get(e, {}))
        tasks = ", ".join(down.get(end, {}).get((row.method, attribute), [])) if decision else ""
        sure = row.high < 0 if row.pairs > 1 else row.difference < 0
        gain = bool(decision and not none and not tasks and sure and (row.method, attribute) in gainers.get(end, set()))
        name, _, delta = row.column.partition("@")
        shrunk = name in ("Bias", "VR") and (row.method, delta) not in below
        made.append((none, tasks, p.get(end, {}).get((row.method, attribute, metric), math.nan), gain, shrunk))
    return pd.DataFrame(made, columns=["why", "down", "p", "gain", "shrunk"], index=cells.index)


def _gainers(run: RunFolder, end: str) -> set[tuple[str, str]]:
    """Return (method, attribute) where some group's TPR rises, or its error falls, by more than noise."""
    frame = judged.who_pays(run, end)
    sure = (frame["d_tpr"] > judged.SURE * frame["se_tpr"]) | (frame["d_error"] < -judged.SURE * frame["se_error"])
    return {(row.method, row.attribute) for row in rows(frame[sure])}


def main_utility(values: pd.DataFrame) -> str | None:
    """Return the first macro utility of the summary's values (None where there is none)."""
    return next((c for c in values["column"] if c.startswith("macro ") and c != "macro Brier"), None)


def with_sd(frame: pd.DataFrame, by: list[str], values: list[str]) -> pd.DataFrame:
    """Return means over seeds, each with its sd beside it as ``<name>_sd``, in order of appearance."""
    grouped = frame.groupby(by, sort=False)[values]
    return grouped.mean().join(grouped.std().add_suffix("_sd")).reset_index()


def write_summary(run_dir: str | Path) -> Path:
    """Write ``summary.json``: mean, sd, n and paired difference to the reference of every method and column.

    CheckpointError where the run folder is incomplete or damaged, or cannot be written.
    """
    run = read_run(run_dir)
    methods: dict[str, Json] = {method: {} for method in run.methods}
    for row in rows(summary(run)):
        numbers = {"mean": row.mean, "sd": row.sd, "n": int(row.n), "difference": row.difference}
        said = {"degenerate": row.why, "levels_down": row.down, "p_no_gap": row.p if row.p == row.p else ""}
        methods[row.method][row.column] = {**numbers, "higher_is_better": bool(row.higher)} | {
            k: v for k, v in said.items() if v != ""
        }
    about = {"format": 1, "name": run.name, "split": run.split, "seeds": run.seeds, "reference": run.reference}
    return write_json(run.path / "summary.json", {**about, "methods": methods})


def group_means(run: RunFolder) -> pd.DataFrame:
    """Return task, attribute, metric, group, method, and over seeds the mean value, low, high, n, the sd, and the flag."""
    grouped = run.frame("groups").groupby(["task", "attribute", "metric", "group", "method"], sort=False)
    means = grouped[["value", "low", "high", "n"]].mean()
    return means.assign(sd=grouped["value"].std(), flag=grouped["flag"].max()).reset_index()


def shrinkage_verdict(run: RunFolder) -> pd.DataFrame:
    """Return method, delta_name, brier, bias, curve_bias, below, seeds_below, seeds: means, each seed's own envelope.

    ``curve_bias`` is the least Bias that shrinking the reference towards any constant reaches at no more error (``brier``) than the
    method's (:func:`libmtl_fair.metrics.least_bias`); ``below``: whether the method has less, in the mean over seeds. NaN, where the
    run recorded none, is not below. An envelope of other tasks than the audit's is not used: at a = 1 it must be the reference itself.
    """
    curves, error = shrinkage_curves(run), native_errors(run)
    found = []
    for row in rows(run.frame("audit")):
        curve, own = curves.get((row.seed, row.delta_name)), error.get((row.method, row.seed), math.nan)
        if row.method != run.reference and curve is not None and own == own:
            margin, bias = MARGIN * curve["bias"].max(), row.bias if math.isnan(row.exact_bias) else row.exact_bias
            found.append((row.method, row.delta_name, own, bias, metrics.least_bias(curve, own), margin))
    frame = pd.DataFrame(found, columns=["method", "delta_name", "brier", "bias", "curve_bias", "margin"])
    frame["seeds_below"] = frame["bias"] < frame["curve_bias"] - frame["margin"]
    grouped = frame.groupby(["method", "delta_name"], sort=False)
    means = grouped[["brier", "bias", "curve_bias", "margin"]].mean()
    counts = grouped["seeds_below"].agg(seeds_below="sum", seeds="count")
    whole = grouped["curve_bias"].count() == counts["seeds"]
    means["below"] = whole & (means["bias"] < means["curve_bias"] - means.pop("margin"))
    return means.join(counts).reset_index()


def shrinkage_curves(run: RunFolder) -> dict[tuple[int, str], pd.DataFrame]:
    """Envelopes by seed and tolerance, without those whose unshrunk end is not the reference's own point."""
    found, error, curves, audit = {}, native_errors(run), run.frame("shrinkage"), run.frame("audit")
    for row in rows(audit[audit["method"] == run.reference]):
        curve = curves[(curves["seed"] == row.seed) & curves["delta_name"].isin([row.delta_name, ""])]
        end = curve[curve["a"] == 1]
        own = error.get((row.method, row.seed), math.nan)
        near = (end["bias"] - row.bias).abs().le(0.1 * row.bias + 1e-6) & (end["brier"] - own).abs().le(2e-3)
        if len(curve) and near.all():
            found[row.seed, row.delta_name] = curve
    return found


def native_errors(run: RunFolder) -> dict[tuple[str, int], float]:
    """Return the mean squared error of the audit scores by method and seed: the macro Brier where a run did not record it."""
    frame = run.frame("utility").dropna(subset=["value"])
    taken = frame[(frame["task"] == "macro") & (frame["metric"] == "brier")]
    found = {(row.method, row.seed): row.value for row in rows(taken)}
    recorded = {(item.method, item.seed): item.native_error(run.split) for item in run.runs}
    return found | {key: value for key, value in recorded.items() if value == value}


def main_metrics(run: RunFolder) -> pd.DataFrame:
    """Return method, seed, task, metric, value of each task's main metric: AUC, else accuracy, else R2; of maps mIoU, RMSE, mean angle."""
    frame = run.frame("utility")
    frame = frame[(frame["task"] != "macro") & frame["metric"].isin(_MAIN) & frame["value"].notna()]
    order = frame["metric"].map({name: i for i, name in enumerate(_MAIN)})
    return frame[order == order.groupby(frame["task"]).transform("min")]


def delta_m(run: RunFolder, fair: bool = False) -> dict[str, float]:
    """Return method -> Delta_m in percent of the tasks' main metrics against the reference; below 0 is better.

    ``fair`` counts the differences between groups too: equalised odds, equal opportunity and AUC (regression: mean absolute
    error) of every attribute, means over tasks, each as one more metric; a method with a degenerate decision has none (NaN).
    Source: Navon et al., ICML 2022; GLF compares methods so.
    """
    results, higher = _results(run, fair)
    found = metrics.delta_m(results, results[run.reference], higher) if run.reference in results else {}
    return found | dict.fromkeys(judged.why_degenerate(run) if fair else (), math.nan)


_GLF = ("equalized_odds_mean", "equal_opportunity", "auc")


def glf_delta_m(run: RunFolder) -> dict[str, float]:
    """Return method -> Delta_m on the scale of GLF's table (:func:`libmtl_fair.metrics.delta_m`), over macro AUC and two attributes.

    Differences between groups are means over tasks. Empty unless the run has two attributes.
    """
    frame, gaps = run.frame("utility"), run.frame("groups")
    aucs = frame[(frame["task"] == "macro") & (frame["metric"] == "auc")].assign(name="auc")
    gaps = gaps[
        (gaps["group"] == "difference")
        & gaps["metric"].isin(_GLF)
        & ~gaps["attribute"].str.contains(" & ", regex=False)
    ]
    attributes = list(dict.fromkeys(gaps["attribute"]))
    if len(attributes) != 2 or aucs.empty:
        return {}
    names = ["auc", *(f"{metric} {attribute}" for metric in _GLF for attribute in attributes)]
    both = pd.concat([aucs, gaps.assign(name=gaps["metric"] + " " + gaps["attribute"])])
    wide = both.pivot_table(index="name", columns="method", values="value", sort=False).reindex(
        names, columns=run.methods
    )
    results = {method: dict(zip(names, wide[method].astype(float))) for method in run.methods}
    return metrics.delta_m(results, results[run.reference], {name: name == "auc" for name in names}, definition="glf")


def mean_rank(run: RunFolder, fair: bool = False) -> dict[str, float]:
    """Return method -> its rank by the tasks' main metrics, averaged over tasks; 1 is the best. ``fair`` as in :func:`delta_m`."""
    return metrics.mean_rank(*_results(run, fair))


def _results(run: RunFolder, fair: bool) -> tuple[dict[str, dict[str, float]], dict[str, bool]]:
    """Return method -> measure -> mean over seeds, NaN where a method lacks it, and whether higher is better."""
    frame = main_metrics(run)
    frame = frame.assign(name=frame["task"] + " " + frame["metric"], higher=frame["metric"].isin(HIGHER_IS_BETTER))
    if fair:
        values = summary_values(run, further=True).rename(columns={"column": "name"})
        gaps = values[values["name"].str.startswith(tuple(_MEANS))]
        gaps = gaps[~gaps["method"].isin(judged.why_degenerate(run))]
        frame = pd.concat([frame, gaps]) if len(gaps) else frame
    wide = frame.pivot_table(index="name", columns="method", values="value", sort=False)
    results = {m: {str(k): float(v) for k, v in wide[m].items()} for m in dict.fromkeys(frame["method"])}
    return results, dict(zip(frame["name"], frame["higher"].astype(bool)))


_UNIT = (
    ({"miou"}, "miou", "miou"),
    ({"abs_err", "rmse"}, "rmse", "rmse"),
    ({"mean", "median"}, "mean", "angle"),
    ({"macro_f1"}, "accuracy", "accuracy"),
    ({"kappa"}, "accuracy", "accuracy"),
    ({"auc"}, "auc", "auc"),
    ({"r2"}, "r2", "r2"),
)
"""What tells a task by its metrics, in lower case, the metric that its fixed score is of, and of what kind that is."""


def worst_and_macro(run: RunFolder) -> pd.DataFrame:
    """Return worst and macro of each method (:func:`libmtl_fair.metrics.worst_and_macro`), means over seeds before scores.

    Empty where a task's metrics are of no known kind.
    """
    frame = run.frame("utility")
    frame = frame[frame["task"] != "macro"].assign(metric=lambda rows: rows["metric"].str.lower())
    taken = {}
    for task, names in frame.groupby("task", sort=False)["metric"].agg(set).items():
        found = next(((metric, kind) for known, metric, kind in _UNIT if known <= names and metric in names), None)
        if found is None:
            return pd.DataFrame(columns=["worst", "macro"])
        taken[str(task)] = found
    values = frame.groupby(["method", "task", "metric"])["value"].mean()
    results = {m: {t: float(values.get((m, t, of), math.nan)) for t, (of, _) in taken.items()} for m in run.methods}
    return metrics.worst_and_macro(results, {task: kind for task, (_, kind) in taken.items()})


def single_task_methods(run: RunFolder) -> list[str]:
    """Return the methods that train each task alone, as their recipes say."""
    return [m for m in run.methods if (run.of(m)[0].metrics.get("settings") or {}).get("single_task")]


GAINS = {"knowledge": "knowledge gain ↑", "ep": "discrimination gain, EP ↓", "eo": "discrimination gain, EO ↓"}
"""Columns of :func:`gains` and what they are called."""
MEAN_GAINS = {"knowledge": "knowledge_gain", "ep": "discrimination_gain_ep", "eo": "discrimination_gain_eo"}
"""Columns of :func:`gains` -> the measure of ``published`` that is their mean over tasks."""


def gains(run: RunFolder) -> pd.DataFrame:
    """Return what training together gains against the first single-task method, paired by seed.

    Knowledge gain: accuracy (R2 of a regression task) minus that of the single-task model; above 0 is better. Discrimination
    gain: the violation minus that of the single-task model, below 0 is better; EP takes the differences of true positive
    rates summed over pairs of groups and over attributes, EO adds those of false positive rates; a multiclass task is the
    mean of its classes one against the rest (ours). Source: FairBranch, arXiv:2310.13746.

    Returns
    -------
    DataFrame
        One row a method and task, and one for ``"mean"`` over tasks: method, task, seeds, and for each of knowledge, ep
        and eo its mean over seeds and ``<name>_sd``. Empty without a single-task method.
    """
    alone, keys = single_task_methods(run), ["method", "seed", "task"]
    columns = ["method", "task", "seeds", *(f"{name}{end}" for name in GAINS for end in ("", "_sd"))]
    if not alone:
        return pd.DataFrame(columns=columns)
    utility = run.frame("utility")
    utility = utility[(utility["task"] != "macro") & utility["metric"].isin(["accuracy", "r2"])]
    found = {"knowledge": utility.sort_values("metric").drop_duplicates(keys).set_index(keys)["value"]}
    frame = pd.DataFrame(found | _violations(run)).reindex(columns=list(GAINS)).reset_index()
    single = frame[frame["method"] == alone[0]].drop(columns="method")
    both = frame[~frame["method"].isin(alone)].merge(single, on=["seed", "task"], suffixes=("", "_alone"))
    for name in GAINS:
        both[name] -= both[f"{name}_alone"]
    overall = both.groupby(["method", "seed"], sort=False)[list(GAINS)].mean().reset_index().assign(task="mean")
    groups = pd.concat([both, overall]).groupby(["method", "task"], sort=False)
    means = groups[list(GAINS)].mean().join(groups[list(GAINS)].std().add_suffix("_sd"))
    means = means.assign(seeds=groups["seed"].nunique()).reset_index()
    place = means["method"].map(run.methods.index)
    return means.iloc[place.argsort(kind="stable")].reset_index(drop=True)[columns]


def _violations(run: RunFolder) -> dict[str, pd.Series[float]]:
    """Return EP and EO by method, seed and task: summed over single attributes, mean over classes."""
    frame = run.frame("groups")
    parts = frame["metric"].str.extract(r"^(true_positive_rate|false_positive_rate)(\[.*\])?$")
    frame = frame.assign(rate=parts[0], label=parts[1].fillna(""))
    single = ~frame["attribute"].str.contains(" & ", regex=False)
    frame = frame[frame["rate"].notna() & ~frame["group"].isin(NO_GROUP) & single]
    keys = ["method", "seed", "task"]
    each = frame.groupby([*keys, "label", "rate", "attribute"], sort=False)["value"]
    violated = each.agg(lambda rates: metrics.violation({"rate": list(rates)}))
    true_only = violated[violated.index.isin(["true_positive_rate"], level="rate")]
    of_class = {name: one.groupby(level=[*keys, "label"]).sum() for name, one in (("ep", true_only), ("eo", violated))}
    return {name: one.groupby(level=keys).mean() for name, one in of_class.items()}


def standing(run: RunFolder) -> pd.DataFrame:
    """Return a row a method: delta_m, mean_rank, fair_delta_m, fair_rank, glf_delta_m, and worst and macro where they are known."""
    found: dict[str, Mapping[str, float]] = {"delta_m": delta_m(run), "mean_rank": mean_rank(run)}
    found |= {"fair_delta_m": delta_m(run, fair=True), "fair_rank": mean_rank(run, fair=True)}
    found["glf_delta_m"] = glf_delta_m(run)
    for name, column in worst_and_macro(run).astype(float).items():
        found[str(name)] = dict(zip(map(str, column.index), column.to_list()))
    return pd.DataFrame(found, index=run.methods, dtype=float).rename_axis("method").reset_index()


def beside_published(run: RunFolder, cells: pd.DataFrame, overview: pd.DataFrame) -> pd.DataFrame:
    """Return method, measure, published, ours (mean over seeds): one row for each published number of a method of the run.

    A measure is a column of the comparison's ``cells`` or of its ``overview``, or :func:`gains` averaged over tasks. ``ours`` is NaN where
    it is none of them, and for ``fair_delta_m``, a scale of this project's own: recipes of earlier versions put GLF's Delta_m there,
    which is ``glf_delta_m``.
    """
    ours = overview.set_index("method").join(cells.pivot(index="method", columns="column", values="mean"))
    gained = gains(run)
    gained = gained[gained["task"] == "mean"].set_index("method")[list(GAINS)]
    ours = ours.join(gained.rename(columns=MEAN_GAINS).reindex(ours.index).astype(float))
    values = (run.recipe.get("published") or {}).get("values") or {}
    found = [
        (
            method,
            name,
            number(value),
            float(ours.loc[method, name]) if name in ours and name != "fair_delta_m" else math.nan,
        )
        for method in run.methods
        for name, value in (values.get(method) or {}).items()
    ]
    return pd.DataFrame(found, columns=["method", "measure", "published", "ours"])
