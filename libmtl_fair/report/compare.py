"""Methods, runs and seeds side by side: paired differences with intervals, ranks, drift, gains; table and page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.metrics import AuditReport, FixedDeltaAudit, paired_difference
from libmtl_fair.metrics.drift import drift, robust_pairs
from libmtl_fair.report.choice import Rule, describe, with_choice
from libmtl_fair.report.frames import audit_frame, number, rows
from libmtl_fair.report.gains import delta_m, gains, mean_rank, single_task_methods
from libmtl_fair.report.published import beside_published, publication
from libmtl_fair.report.reaudit import Reaudit, common_scores, load_predictions, reaudit, run_names
from libmtl_fair.report.run_folder import RunFolder, SeedRun, read_run
from libmtl_fair.report.tables import summary, summary_values

FEW_SEEDS = 5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that the table and the page show.

    Attributes
    ----------
    run : all runs as one, methods named ``run/method`` where there are several runs; the first is the reference.
    cells : one row per method and measure: mean, sd, n, difference (paired by seed), low, high, pairs, higher, best.
    overview : one row per method: delta_m (%, negative is better) and mean_rank by the tasks' utility; fair_delta_m and
        fair_rank by the differences between groups as well.
    drift : one row per method and tolerance; see :func:`libmtl_fair.metrics.drift.drift`. Empty without predictions.
    gains : as :func:`~libmtl_fair.report.gains.gains` has them; empty without a single-task method.
    notes : limits, in words.
    choice : what a rule took in each seed; see :func:`libmtl_fair.report.choice.choose`. Empty without a rule.
    published : a source's numbers beside the run's; see :func:`libmtl_fair.report.published.beside_published`. May be empty.
    """

    run: RunFolder
    cells: pd.DataFrame
    overview: pd.DataFrame
    drift: pd.DataFrame
    gains: pd.DataFrame
    notes: tuple[str, ...]
    choice: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    published: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        tables = {"cells": self.cells, "overview": self.overview, "drift": self.drift, "gains": self.gains}
        tables |= {k: v for k, v in (("choice", self.choice), ("published", self.published)) if not v.empty}
        return {
            "format": 1,
            "name": self.run.name,
            "split": self.run.split,
            "reference": self.run.reference,
            "methods": self.run.methods,
            "seeds": self.run.seeds,
            **{name: frame.to_dict("records") for name, frame in tables.items()},
            "notes": list(self.notes),
        }


def compare(run_dirs: Sequence[str | Path], deltas: Sequence[str] = (), rule: Rule | None = None) -> Comparison:
    """Compare every method of one or more finished runs with the first method of the first run.

    Several runs are audited again under the first run's tolerances and score ranges, so that one yardstick holds.

    Parameters
    ----------
    run_dirs
        Run folders with the same tasks.
    deltas
        Tolerances other than those of the first run; see :func:`libmtl_fair.report.reaudit.tolerances`.
    rule
        How to choose among the methods on validation data; the choice is then one method more.

    Raises
    ------
    RecipeError : no run, runs of other tasks, or a rule that does not fit them.
    CheckpointError : a folder is incomplete or damaged, or lacks the predictions that auditing again needs.
    """
    runs = [read_run(path) for path in run_dirs]
    if not runs:
        raise RecipeError("compare needs at least one run folder")
    again = reaudit(run_dirs, deltas) if deltas or (len(runs) > 1 and runs[0].protocol.get("deltas")) else None
    run, choice = merged(runs, again), pd.DataFrame()
    if rule is not None:
        run, choice = with_choice(run, rule)
    frame, lacking = _drift(run)
    cells, overview = cells_with_intervals(run), _overview(run)
    return Comparison(
        run=run,
        cells=cells,
        overview=overview,
        drift=frame,
        gains=gains(run),
        notes=tuple([describe(rule, choice)] if rule is not None else []) + tuple(_notes(runs, run, lacking)),
        choice=choice,
        published=beside_published(run, cells, overview),
    )


def merged(runs: Sequence[RunFolder], again: Reaudit | None = None) -> RunFolder:
    """Return several runs as one: methods are named ``run/method``, the audit is that of ``again`` where given."""
    names, found = run_names(runs), []
    for i, (run, name) in enumerate(zip(runs, names)):
        for item in run.runs:
            metrics = dict(item.metrics)
            if i > 0:
                metrics["shrinkage"] = {}  # the curve is the first reference's
            if again is not None:
                metrics["audit"] = {again.split: _audit_entries(again, name, item)}
            label = item.method if len(runs) == 1 else f"{name}/{item.method}"
            found.append(SeedRun(label, item.seed, item.folder, metrics))
    if len(runs) == 1:
        return dataclasses.replace(runs[0], runs=tuple(found))
    recipe = {
        **runs[0].recipe,
        "name": " and ".join(names),
        "description": f"Comparison of {len(runs)} runs.",
        "published": None,
    }
    return dataclasses.replace(runs[0], recipe=recipe, runs=tuple(found))


def _audit_entries(again: Reaudit, run: str, item: SeedRun) -> list[dict[str, Any]]:
    def of(frame: pd.DataFrame) -> pd.DataFrame:
        mask = (frame["run"] == run) & (frame["method"] == item.method) & (frame["seed"] == item.seed)
        return frame[mask]

    pairs = of(again.per_pair)
    return [
        {
            **{str(k): v for k, v in entry.items() if k not in ("run", "method", "seed", "brier")},
            "per_pair": pairs[pairs["delta_name"] == entry["delta_name"]].to_dict("records"),
        }
        for entry in of(again.frame).to_dict("records")
    ]


def cells_with_intervals(run: RunFolder) -> pd.DataFrame:
    """Return the summary and further differences between groups, with 95 % bootstrap intervals of the mean paired difference.

    Columns low, high, and pairs, their number. Seeds are resampled, method and reference together; with one common seed there
    is no interval (NaN).
    """
    cells = summary(run, further=True)
    wide = summary_values(run, further=True).pivot_table(
        index=["column", "seed"], columns="method", values="value", dropna=False
    )
    found = [_interval(wide, row.method, row.column, run.reference) for row in rows(cells)]
    return cells.assign(
        low=[low for low, _, _ in found], high=[high for _, high, _ in found], pairs=[n for _, _, n in found]
    )


def _interval(wide: pd.DataFrame, method: str, column: str, reference: str) -> tuple[float, float, int]:
    if method == reference:
        return float("nan"), float("nan"), 0
    block = wide.xs(column, level="column")
    if method not in block or reference not in block:
        return float("nan"), float("nan"), 0
    found = paired_difference(block[method].to_numpy(float), block[reference].to_numpy(float))
    return found["low"], found["high"], int(found["n"])


def _overview(run: RunFolder) -> pd.DataFrame:
    columns = {
        "delta_m": delta_m(run),
        "mean_rank": mean_rank(run),
        "fair_delta_m": delta_m(run, fair=True),
        "fair_rank": mean_rank(run, fair=True),
    }
    return pd.DataFrame(
        {"method": run.methods, **{k: [v.get(m, float("nan")) for m in run.methods] for k, v in columns.items()}}
    )


def _drift(run: RunFolder) -> tuple[pd.DataFrame, str]:
    """Return drift per method and tolerance, means over seeds, ranks of the means; and why there is none."""
    audits = audit_frame(run)
    deltas = dict(zip(audits["delta_name"], audits["delta"]))
    try:
        by_seed = [_reports(run, seed) for seed in run.seeds] if deltas else []
    except CheckpointError as error:
        return pd.DataFrame(), str(error)
    whole = [(reports, own) for reports, own in by_seed if len(reports) == len(run.methods)]
    frames = [_drift_at(whole, str(name), float(delta)) for name, delta in deltas.items() if whole]
    return (pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()), ""


def _reports(run: RunFolder, seed: int) -> tuple[dict[str, AuditReport], dict[str, Any]]:
    """Return the audits of a seed's methods, ready for any tolerance, and the methods' own thresholds."""
    found = [(i, own) for i in run.runs if i.seed == seed and (own := _thresholds(i, run.split)) is not None]
    tasks = load_predictions(run.runs[0], run.split).tasks
    audit = FixedDeltaAudit(0.0, exact=True)
    reports = {item.method: audit.run(common_scores(item, run.split, tasks).scores) for item, _ in found}
    return reports, {item.method: own for item, own in found}


def _drift_at(whole: list[tuple[dict[str, AuditReport], dict[str, Any]]], name: str, delta: float) -> pd.DataFrame:
    found = [drift(reports, own, delta) for reports, own in whole]
    keep = ["raw_bias", "fixed_bias", "mean_threshold", "ratio_to_reference", "budget"]
    means = pd.concat(found).groupby("method", sort=False)[keep].mean().reset_index()
    means["rank_raw"] = means["raw_bias"].rank(method="min").astype(int)
    means["rank_fixed"] = means["fixed_bias"].rank(method="min").astype(int)
    means["rank_shift"] = means["rank_raw"] - means["rank_fixed"]
    pairs = robust_pairs(means).to_numpy() | np.eye(len(means), dtype=bool)
    means["robust"] = pd.Series(pairs.all(axis=1), index=means.index)
    means.insert(0, "delta_name", name)
    return means.assign(seeds=len(found))


def _thresholds(item: SeedRun, split: str) -> list[list[float]] | None:
    matrix = ((item.metrics.get("drift") or {}).get(split) or {}).get("induced")
    if not isinstance(matrix, list):
        return None
    return [[number(value) for value in row] for row in matrix]


def _notes(runs: Sequence[RunFolder], run: RunFolder, lacking: str) -> list[str]:
    seeds = min(len(run.of(method)) for method in run.methods)
    found = [
        "± is the standard deviation between seeds. Intervals are 95 % bootstrap intervals of the mean paired difference to "
        f"{run.reference}: seeds are resampled, the {run.split} rows are not, so they do not cover another sample of people."
    ]
    if seeds < 2:
        found.append("One seed: no intervals.")
    elif seeds < FEW_SEEDS:
        found.append(
            f"With {seeds} seeds an interval never leaves the range of the differences seen: it is too narrow."
        )
    found.append(
        "Ranks under raw thresholds use each method's own thresholds and are a diagnostic; those under the fixed tolerance "
        "compare. An order is robust where the difference in Bias exceeds the two drift budgets together."
    )
    found += publication(run)
    alone = single_task_methods(run)
    if not alone:
        found.append(
            "No method trains each task alone (single_task: true), so there is no knowledge or discrimination gain."
        )
    if lacking:
        found.append(f"No drift diagnostics: {lacking}.")
    if len(runs) > 1:
        names, first = run_names(runs), _fact(runs[0])
        others = [name for name, one in zip(names, runs) if _fact(one) != first]
        if others:
            found.append(f"{', '.join(others)}: other data or another split than {names[0]}; differences mix both.")
    return found


def _fact(run: RunFolder) -> Any:
    data = run.recipe.get("data") or {}
    keys = ("name", "table", "split", "split_seed", "resplit", "subset", "missing")
    return [data.get(key) for key in keys] if isinstance(data, dict) else None
