"""Methods, runs and seeds side by side: paired differences with intervals, ranks, drift, gains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from libmtl_fair.arrays import records
from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.files import Json
from libmtl_fair.metrics import FixedDeltaAudit
from libmtl_fair.metrics.drift import drift, ranked
from libmtl_fair.report.choice import Rule, with_choice
from libmtl_fair.report.notes import choice_sentence, comparison_notes
from libmtl_fair.report.reaudit import Reaudit, common_scores, load_predictions, reaudit, run_names
from libmtl_fair.report.run_folder import RunFolder, read_run
from libmtl_fair.report.summary import beside_published, gains, standing, summary


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that the table and the page show.

    ``run`` is all runs as one, methods named ``run/method`` where there are several; ``cells`` are those of
    :func:`~libmtl_fair.report.summary.summary`; ``overview`` has delta_m (%, negative is better) and mean_rank of every
    method by the tasks' utility, worst and macro of their fixed scores, fair_delta_m and fair_rank by the differences between groups as
    well, glf_delta_m on the scale of GLF's table; ``drift``, ``gains``, ``choice`` and ``published`` are empty without predictions, a
    single-task method, a rule, and published numbers.
    """

    run: RunFolder
    cells: pd.DataFrame
    overview: pd.DataFrame
    drift: pd.DataFrame
    gains: pd.DataFrame
    choice: pd.DataFrame
    published: pd.DataFrame
    notes: tuple[str, ...]

    def to_dict(self) -> Json:
        """Return plain values for JSON."""
        run, tables = self.run, {}
        for name in ("cells", "overview", "drift", "gains", "choice", "published"):
            frame = getattr(self, name)
            if len(frame) or name not in ("choice", "published"):
                tables[name] = records(frame)
        about = {"name": run.name, "split": run.split, "reference": run.reference, "methods": run.methods}
        return {"format": 1, **about, "seeds": run.seeds, **tables, "notes": list(self.notes)}


def compare(run_dirs: Sequence[str | Path], deltas: Sequence[str] = (), rule: Rule | None = None) -> Comparison:
    """Compare every method of one or more finished runs with the first method of the first run.

    Several runs are audited again under the first run's tolerances and score ranges, so that one yardstick holds.

    Parameters
    ----------
    run_dirs : sequence of str or Path
        Run folders with the same tasks.
    deltas : sequence of str, default ()
        Tolerances other than those of the first run; see :func:`libmtl_fair.report.reaudit.tolerances`.
    rule : Rule, optional
        How to choose among the methods on validation data; the choice is then one method more.

    Raises
    ------
    RecipeError
        No run, runs of other tasks, or a rule that does not fit them.
    CheckpointError
        A folder is incomplete or damaged, or lacks the predictions that auditing again needs.
    """
    runs = [read_run(path) for path in run_dirs]
    if not runs:
        raise RecipeError("compare needs at least one run folder")
    again = reaudit(run_dirs, deltas) if deltas or (len(runs) > 1 and runs[0].protocol.get("deltas")) else None
    run, choice, chosen = merged(runs, again), pd.DataFrame(), []
    if rule is not None:
        run, choice = with_choice(run, rule)
        chosen = [choice_sentence(rule, choice)]
    held, lacking = _drift(run)
    overview = standing(run)
    cells = summary(run, further=True)
    names = run_names(runs)
    others = [name for name, one in zip(names, runs) if _data_of(one) != _data_of(runs[0])]
    notes = (*chosen, *comparison_notes(run, lacking, others, names[0]))
    published = beside_published(run, cells, overview)
    return Comparison(run, cells, overview, held, gains(run), choice, published, notes)


def merged(runs: Sequence[RunFolder], again: Reaudit | None = None) -> RunFolder:
    """Return several runs as one: methods are named ``run/method``, the audit is that of ``again`` where given."""
    names, found = run_names(runs), []
    for run, name in zip(runs, names):
        for item in run.runs:
            metrics = dict(item.metrics)
            if run is not runs[0]:
                metrics["shrinkage"] = {}  # the curve is the first reference's
            if again is not None:
                metrics["audit"] = {again.split: again.entries(name, item)}
                metrics["native_error"] = {again.split: again.native_error(name, item)}
            method = item.method if len(runs) == 1 else f"{name}/{item.method}"
            found.append(dataclasses.replace(item, method=method, metrics=metrics))
    edited = [f"{name}/{file}" if len(runs) > 1 else file for name, run in zip(names, runs) for file in run.edited]
    recipe = dict(runs[0].recipe)
    if len(runs) > 1:
        recipe |= {"name": " and ".join(names), "description": f"Comparison of {len(runs)} runs.", "published": None}
    return dataclasses.replace(runs[0], recipe=recipe, runs=tuple(found), edited=tuple(edited))


def _drift(run: RunFolder) -> tuple[pd.DataFrame, str]:
    """Return drift per method and tolerance, means over seeds, ranks of the means; and why there is none."""
    audits = run.frame("audit")
    deltas = dict(zip(audits["delta_name"], audits["delta"]))
    whole, audit = [], FixedDeltaAudit(0.0, exact=True)
    trained = {item.method for item in run.runs if not item.metrics.get("post")}
    try:
        tasks = load_predictions(run.runs[0], run.split).tasks if deltas else ()
        for seed in run.seeds if deltas else ():
            items = [item for item in run.runs if item.seed == seed]
            own = {item.method: matrix for item in items if (matrix := item.thresholds(run.split)) is not None}
            if own.keys() >= trained:  # a method that is made of others has no representation of its own
                scores = {i.method: common_scores(i, run.split, tasks).scores for i in items if i.method in own}
                reports = {method: audit.run(each) for method, each in scores.items()}
                whole.append((reports, own))
    except CheckpointError as error:
        return pd.DataFrame(), str(error)
    frames = []
    for name, delta in deltas.items() if whole else ():
        found = pd.concat([drift(reports, own, float(delta)) for reports, own in whole])
        keep = ["raw_bias", "fixed_bias", "mean_threshold", "ratio_to_reference", "budget"]
        means = ranked(found.groupby("method", sort=False)[keep].mean().reset_index())
        means.insert(0, "delta_name", name)
        frames.append(means.assign(seeds=len(whole)))
    return (pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()), ""


def _data_of(run: RunFolder) -> list[object]:
    keys = ("name", "table", "split", "split_seed", "resplit", "subset", "missing")
    return [(run.recipe.get("data") or {}).get(key) for key in keys]
