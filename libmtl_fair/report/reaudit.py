"""Finished runs audited again, under other tolerances, from their saved predictions and embeddings: no retraining."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text

from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.files import write_json
from libmtl_fair.metrics import FixedDeltaAudit, conformal_delta, pair_distances, quantile_delta, utility
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.run import rescore
from libmtl_fair.report.frames import mean_sd, number, rows
from libmtl_fair.report.run_folder import RunFolder, SeedRun, read_run
from libmtl_fair.report.sections import in_order
from libmtl_fair.report.tables import show
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

    Parameters
    ----------
    reference
        The run whose reference model (that of ``audit_protocol.json``) quantiles and conformal levels are taken from.
    deltas
        Numbers in [0, 1], ``"p75"`` (a quantile of the reference's validation pair distances) or ``"conformal:0.1"``;
        none: those of the run's own protocol.

    Raises
    ------
    RecipeError : a tolerance that is none of these.
    CheckpointError : no saved embeddings of the reference model, or damaged ones.
    """
    if not deltas:
        held = reference.protocol.get("deltas")
        if not isinstance(held, dict) or not held:
            raise CheckpointError(f"{reference.path}/audit_protocol.json names no tolerance; give one with --delta")
        return [Tolerance(str(name), number(value), "the run's protocol") for name, value in held.items()]
    return [_tolerance(reference, str(name)) for name in deltas]


def _tolerance(run: RunFolder, name: str) -> Tolerance:
    kind, level = _parsed(name)
    if kind == "number":
        return Tolerance(name, level, "fixed number")
    distances = reference_distances(run)
    model, seed = _reference(run)
    where = f"of {len(distances):,} validation pair distances of {model}, seed {seed}, in {run.path}"
    if kind == "conformal":
        return Tolerance(name, conformal_delta(distances, level), f"split-conformal bound at alpha = {level:g} {where}")
    return Tolerance(name, quantile_delta(distances, level), f"{level:.4g} quantile {where}")


def _parsed(name: str) -> tuple[str, float]:
    kind, _, level = name.partition(":")
    try:
        if kind == "conformal" and 0 < float(level) < 1:
            return "conformal", float(level)
        if name.startswith("p") and 0 <= float(name[1:]) <= 100:
            return "quantile", float(name[1:]) / 100
        if 0 <= float(name) <= 1:
            return "number", float(name)
    except ValueError:
        pass
    raise RecipeError(f"--delta {name}: expected a number in [0, 1], a quantile such as p75, or conformal:0.1")


def _reference(run: RunFolder) -> tuple[str, int]:
    model, seed = run.protocol.get("reference_model"), run.protocol.get("reference_seed")
    if isinstance(model, str) and isinstance(seed, int):
        return model, seed
    return run.reference, run.of(run.reference)[0].seed


def reference_distances(run: RunFolder) -> Any:
    """Return the distances of the reference model's validation pairs, drawn as the run drew them.

    Raises
    ------
    CheckpointError : no embeddings were saved, or the file is damaged.
    """
    model, seed = _reference(run)
    item = next((r for r in run.of(model) if r.seed == seed), None)
    if item is None:
        raise CheckpointError(f"{run.path}: its protocol names {model}, seed {seed} as reference, which is not there")
    tasks = [task.name for task in load_predictions(item, "val").tasks]
    drawn = _draws(run)
    # The file holds the pool that the run drew: all of it is the pool now.
    return pair_distances(
        load_embeddings(item, "val", tasks),
        tasks,
        pool_size=None,
        n_pairs=drawn["n_pairs"],
        pair_seed=drawn["pair_seed"],
    )


def _draws(run: RunFolder) -> dict[str, int]:
    return {name: int(run.protocol.get(name) or default) for name, default in _PAIRS.items()}


def load_embeddings(item: SeedRun, part: str, tasks: Sequence[str]) -> Any:
    """Return the embeddings of a part's audit pool, [n, d], or one per task where each has a model of its own.

    Raises
    ------
    CheckpointError : not saved, or damaged.
    """
    path = item.folder / "embeddings.npz"
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as held:
            if f"{part}/h" in held:
                return held[f"{part}/h"]
            return {task: held[f"{part}/h/{task}"] for task in tasks}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not there, so there are no reference pairs; {_AGAIN}") from error
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_AGAIN}") from error


def load_predictions(item: SeedRun, part: str) -> Predictions:
    """Return the saved predictions of one method and seed.

    Raises
    ------
    CheckpointError : not saved, or damaged.
    """
    path = item.folder / f"predictions_{part}.parquet"
    if not path.exists():
        raise CheckpointError(f"{path} is not there, so this run cannot be audited again; {_AGAIN}")
    return Predictions.load(path)


@dataclasses.dataclass(frozen=True)
class Reaudit:
    """What auditing again found.

    Attributes
    ----------
    tolerances : held fixed for everything below.
    frame : one row per run, method, seed and tolerance: run, method, seed, delta_name, delta, bias, violation_rate,
        brier (macro, of the same predictions; NaN without classification tasks).
    per_pair : the same by task pair.
    split : which part was audited.
    """

    tolerances: tuple[Tolerance, ...]
    frame: pd.DataFrame
    per_pair: pd.DataFrame
    split: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "format": 1,
            "split": self.split,
            "tolerances": [dataclasses.asdict(item) for item in self.tolerances],
            "audit": self.frame.to_dict("records"),
            "per_pair": self.per_pair.to_dict("records"),
        }


def reaudit(
    run_dirs: Sequence[str | Path], deltas: Sequence[str] = (), *, split: str | None = None, exact: bool | None = None
) -> Reaudit:
    """Audit every method and seed of finished runs under common tolerances.

    Tolerances and score ranges come from the *first* run and hold for all, so that runs can be compared.

    Parameters
    ----------
    run_dirs
        Run folders.
    deltas
        See :func:`tolerances`.
    split
        ``"test"`` or ``"val"``; None takes what the first run reports.
    exact
        All pairs of all examples, or the run's sampled protocol; None takes what the first run's protocol says.

    Raises
    ------
    RecipeError : no run, a tolerance or split that does not exist, or runs of different tasks.
    CheckpointError : a folder is incomplete or damaged, or holds no predictions.
    """
    runs = [read_run(path) for path in run_dirs]
    if not runs:
        raise RecipeError("audit needs at least one run folder")
    split = split or runs[0].split
    if split not in ("test", "val"):
        raise RecipeError(f"split must be 'test' or 'val', found {split!r}")
    chosen = tolerances(runs[0], deltas)
    protocol = runs[0].protocol
    exact = bool(protocol.get("exact", True)) if exact is None else exact
    draws = _draws(runs[0])
    tasks = load_predictions(runs[0].runs[0], split).tasks
    found: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for run, name in zip(runs, run_names(runs)):
        for item in run.runs:
            predictions = common_scores(item, split, tasks)
            brier = number(utility(predictions)["macro"].get("brier"))
            key = {"run": name, "method": item.method, "seed": item.seed}
            for tolerance in chosen:
                report = FixedDeltaAudit(tolerance.value, **draws, exact=exact).run(predictions.scores)
                where = {**key, "delta_name": tolerance.name}
                numbers = {"delta": tolerance.value, "bias": report.bias, "violation_rate": report.violation_rate}
                found.append({**where, **numbers, "brier": brier, "exact": exact})
                pairs += [
                    {**where, **{str(k): v for k, v in row.items()}} for row in report.per_pair.to_dict("records")
                ]
    return Reaudit(tuple(chosen), pd.DataFrame(found), pd.DataFrame(pairs), split)


def common_scores(item: SeedRun, split: str, tasks: tuple[Task, ...]) -> Predictions:
    """Return saved predictions with the scores that ``tasks`` of the first run give: one score mapping for all.

    Raises
    ------
    RecipeError : the run has other tasks.
    """
    held = load_predictions(item, split)
    here, there = [(t.name, t.kind) for t in held.tasks], [(t.name, t.kind) for t in tasks]
    if here != there:
        raise RecipeError(
            f"{item.folder} has the tasks {_words(here)}, the first run {_words(there)}; audit and compare runs of the "
            "same tasks, in the same order"
        )
    return rescore(held, tasks)


def _words(tasks: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in tasks)


def run_names(runs: Sequence[RunFolder]) -> list[str]:
    """Return a name for each run that no other has: the recipe's, the folder's, or the folder's with a number."""
    for names in ([run.name for run in runs], [run.path.resolve().name for run in runs]):
        if len(set(names)) == len(names):
            return names
    return [f"{run.path.resolve().name} ({i})" for i, run in enumerate(runs, 1)]


def write_reaudit(found: Reaudit, path: str | Path) -> Path:
    """Write a re-audit as JSON."""
    return write_json(path, found.to_dict())


def reaudit_table(found: Reaudit) -> Table:
    """Return the table for the console: mean ± sd over seeds of Bias and VR, with the Brier beside them."""
    keys = ["delta_name", "run", "method"]
    columns = ("bias", "violation_rate", "brier")
    means = {name: in_order(mean_sd(found.frame, keys, name), *keys) for name in columns}
    table = Table(title=f"Fixed-delta audit: {found.split}, mean ± sd over seeds", title_justify="left")
    table.add_column("tolerance, method")
    for head in ("Bias", "VR", "macro Brier"):
        table.add_column(head, justify="right", no_wrap=True)
    several = found.frame["run"].nunique() > 1
    for tolerance in found.tolerances:
        table.add_section()
        table.add_row(Text(f"{tolerance.name} = {tolerance.value:.4f}", style="bold"))
        parts = (rows(frame[frame["delta_name"] == tolerance.name]) for frame in means.values())
        for lines in zip(*parts):
            name = f"{lines[0].run}/{lines[0].method}" if several else lines[0].method
            table.add_row(Text(f"  {name}"), *(show(line.mean, line.sd, 4) for line in lines))
    return table
