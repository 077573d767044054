"""Finished runs audited again, under other tolerances, from their saved predictions and embeddings: no retraining."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text

from libmtl_fair.arrays import Floats, records
from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.files import DAMAGE, Json, is_sealed
from libmtl_fair.metrics import FixedDeltaAudit, conformal_delta, native_error, pair_distances, quantile_delta, utility
from libmtl_fair.predictions import Predictions
from libmtl_fair.report.run_folder import RunFolder, SeedRun, number, read_run, rows
from libmtl_fair.report.summary import with_sd
from libmtl_fair.report.tables import in_order, show
from libmtl_fair.tasks import Task

_PAIRS = {"pool_size": 256, "n_pairs": 4096, "eval_seed": 0, "pair_seed": 42}
_AGAIN = "keep output.predictions and output.embeddings in the recipe and run it again"


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """One tolerance, held fixed for every method and run: as it was asked for, its value, and where it comes from."""

    name: str
    value: float
    source: str


def tolerances(reference: RunFolder, deltas: Sequence[str]) -> list[Tolerance]:
    """Return the tolerances asked for; quantiles and conformal levels are those of the run's reference model.

    ``deltas`` are numbers in [0, 1], ``"p75"`` (a quantile of the reference's validation pair distances) or
    ``"conformal:0.1"``; none: those of the run's own protocol.
    """
    held = reference.protocol.get("deltas") or {}
    if not deltas and not held:
        raise CheckpointError(f"{reference.path}/audit_protocol.json names no tolerance; give one with --delta")
    if not deltas:
        return [Tolerance(str(name), number(value), "the run's protocol") for name, value in held.items()]
    return [_tolerance(reference, str(name)) for name in deltas]


def _tolerance(run: RunFolder, name: str) -> Tolerance:
    kind, _, rest = name.rpartition(":")
    quantile = not kind and rest.startswith("p")
    try:
        level = float(rest[1:]) / 100 if quantile else float(rest)
    except ValueError:
        level = -1.0
    if kind not in ("", "conformal") or not 0 <= level <= 1 or (kind and level in (0, 1)):
        raise RecipeError(f"--delta {name}: expected a number in [0, 1], a quantile such as p75, or conformal:0.1")
    if not kind and not quantile:
        return Tolerance(name, level, "fixed number")
    distances, whose = _reference_distances(run)
    where = f"of {len(distances):,} validation pair distances of {whose}, in {run.path}"
    if quantile:
        return Tolerance(name, quantile_delta(distances, level), f"{level:.4g} quantile {where}")
    return Tolerance(name, conformal_delta(distances, level), f"split-conformal bound at alpha = {level:g} {where}")


def _reference_distances(run: RunFolder) -> tuple[Floats, str]:
    """Return the distances of the reference model's validation pairs, drawn as the run drew them, and whose they are."""
    model = run.protocol.get("reference_model", run.reference)
    seed = run.protocol.get("reference_seed", run.runs[0].seed)
    item = next((r for r in run.of(model) if r.seed == seed), None)
    if item is None:
        raise CheckpointError(f"{run.path}: its protocol names {model}, seed {seed} as reference, which is not there")
    tasks = [task.name for task in load_predictions(item, "val").tasks]
    path, drawn = item.folder / "embeddings.npz", _draws(run)
    try:
        is_sealed(path)
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as held:
            h = held["val/h"] if "val/h" in held else {task: held[f"val/h/{task}"] for task in tasks}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not there, so there are no reference pairs; {_AGAIN}") from error
    except DAMAGE as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_AGAIN}") from error
    # The file holds the pool that the run drew: all of it is the pool now.
    distances = pair_distances(h, tasks, pool_size=None, n_pairs=drawn["n_pairs"], pair_seed=drawn["pair_seed"])
    return distances, f"{model}, seed {seed}"


def _draws(run: RunFolder) -> dict[str, int]:
    return {name: int(run.protocol.get(name) or default) for name, default in _PAIRS.items()}


def load_predictions(item: SeedRun, part: str) -> Predictions:
    """Return the saved predictions of one method and seed; CheckpointError where they were not saved, or are damaged."""
    path = item.folder / f"predictions_{part}.parquet"
    if not path.exists():
        raise CheckpointError(f"{path} is not there, so this run cannot be audited again; {_AGAIN}")
    return Predictions.load(path)


@dataclasses.dataclass(frozen=True)
class Reaudit:
    """What auditing a split again under fixed tolerances found.

    ``frame``: run, method, seed, delta_name, delta, bias, violation_rate, brier (macro, of the same predictions; NaN
    without classification tasks), native_error (of the audited scores); ``per_pair``: the same by task pair.
    """

    tolerances: tuple[Tolerance, ...]
    frame: pd.DataFrame
    per_pair: pd.DataFrame
    split: str

    def to_dict(self) -> Json:
        """Return plain values for JSON."""
        tables = {"audit": records(self.frame), "per_pair": records(self.per_pair)}
        return {"format": 1, "split": self.split, "tolerances": [vars(item) for item in self.tolerances], **tables}

    def native_error(self, run: str, item: SeedRun) -> float:
        """Return the error of the audited scores of one method and seed of a run."""
        frame = self.frame
        own = frame[(frame["run"] == run) & (frame["method"] == item.method) & (frame["seed"] == item.seed)]
        return float(own["native_error"].iloc[0])

    def entries(self, run: str, item: SeedRun) -> list[Json]:
        """Return what ``metrics.json`` holds of an audit, for one method and seed of a run."""
        keys = pd.Series({"run": run, "method": item.method, "seed": item.seed})
        frame, pairs = (f[(f[keys.index] == keys).all(axis=1)] for f in (self.frame, self.per_pair))
        found = frame.drop(columns=[*keys.index, "brier", "native_error"])
        names = pairs["delta_name"]
        return [{**row, "per_pair": records(pairs[names == row["delta_name"]])} for row in records(found)]


def reaudit(
    run_dirs: Sequence[str | Path], deltas: Sequence[str] = (), *, split: str | None = None, exact: bool | None = None
) -> Reaudit:
    """Audit every method and seed of finished runs under common tolerances.

    Tolerances and score ranges come from the *first* run and hold for all, so that runs can be compared.

    Parameters
    ----------
    run_dirs : sequence of str or Path
        Run folders.
    deltas : sequence of str, default ()
        See :func:`tolerances`.
    split : str, optional
        ``"test"`` or ``"val"``; None takes what the first run reports.
    exact : bool, optional
        All pairs of all examples, or the run's sampled protocol; None takes what the first run's protocol says.

    Raises
    ------
    RecipeError
        No run, a tolerance or split that does not exist, or runs of different tasks.
    CheckpointError
        A folder is incomplete or damaged, or holds no predictions.
    """
    runs = [read_run(path) for path in run_dirs]
    if not runs:
        raise RecipeError("audit needs at least one run folder")
    first, split = runs[0], split or runs[0].split
    if split not in ("test", "val"):
        raise RecipeError(f"split must be 'test' or 'val', found {split!r}")
    chosen = tolerances(first, deltas)
    exact = bool(first.protocol.get("exact", True)) if exact is None else exact
    tasks = load_predictions(first.runs[0], split).tasks
    found: list[Json] = []
    pairs: list[Json] = []
    for run, name in zip(runs, run_names(runs)):
        for item in run.runs:
            predictions = common_scores(item, split, tasks)
            errors = {
                "brier": number(utility(predictions)["macro"].get("brier")),
                "native_error": native_error(predictions),
            }
            for tolerance in chosen:
                report = FixedDeltaAudit(tolerance.value, **_draws(first), exact=exact).run(predictions.scores)
                key: Json = {"run": name, "method": item.method, "seed": item.seed, "delta_name": tolerance.name}
                numbers = {"delta": tolerance.value, "bias": report.bias, "violation_rate": report.violation_rate}
                found.append({**key, **numbers, **errors, "exact": exact})
                pairs += [key | row for row in records(report.per_pair)]
    return Reaudit(tuple(chosen), pd.DataFrame(found), pd.DataFrame(pairs), split)


def common_scores(item: SeedRun, split: str, tasks: tuple[Task, ...]) -> Predictions:
    """Return saved predictions with the scores that ``tasks`` give: one mapping for all; RecipeError for other tasks."""
    held = load_predictions(item, split)
    here, there = (", ".join(f"{t.name} ({t.kind})" for t in each) for each in (held.tasks, tasks))
    if here != there:
        raise RecipeError(
            f"{item.folder} has the tasks {here}, the first run {there}; audit and compare runs of the "
            "same tasks, in the same order"
        )
    return held.rescored(tasks)


def run_names(runs: Sequence[RunFolder]) -> list[str]:
    """Return a name for each run that no other has: the recipe's, the folder's, or the folder's with a number."""
    for names in ([run.name for run in runs], [run.path.resolve().name for run in runs]):
        if len(set(names)) == len(names):
            return names
    return [f"{run.path.resolve().name} ({i})" for i, run in enumerate(runs, 1)]


def reaudit_table(found: Reaudit) -> Table:
    """Return the table for the console: mean ± sd over seeds of Bias and VR, with the Brier beside them."""
    columns, keys = ["bias", "violation_rate", "brier"], ["delta_name", "run", "method"]
    means = with_sd(found.frame, keys, columns)
    table = Table(title=f"Fixed-delta audit: {found.split}, mean ± sd over seeds", title_justify="left")
    table.add_column("tolerance, method")
    for head in ("Bias", "VR", "macro Brier"):
        table.add_column(head, justify="right", no_wrap=True)
    several = found.frame["run"].nunique() > 1
    for tolerance in found.tolerances:
        table.add_section()
        table.add_row(Text(f"{tolerance.name} = {tolerance.value:.4f}", style="bold"))
        for row in rows(in_order(means[means["delta_name"] == tolerance.name], *keys)):
            name = f"{row.run}/{row.method}" if several else row.method
            table.add_row(Text(f"  {name}"), *(show(getattr(row, c), getattr(row, f"{c}_sd"), 4) for c in columns))
    return table
