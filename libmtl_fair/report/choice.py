"""A setting chosen on validation data, seed by seed, and reported on test data as if it were a method of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase

import pandas as pd

from libmtl_fair.errors import CheckpointError, RecipeError, unknown
from libmtl_fair.report import judged
from libmtl_fair.report.run_folder import RunFolder, rows
from libmtl_fair.report.summary import LABELS, column_of, shrinkage_verdict, summary_values

CHOSEN = "chosen on validation"
_GUARDED = ("auc", "accuracy", "r2")
_DECISIONS = ("equalized_odds", "demographic_parity", "equal_opportunity")
_TIE = 1e-12
ALLOWED = ("degenerate", "levelling-down")


@dataclasses.dataclass(frozen=True)
class Rule:
    """The fairest method that gives up little: lowest mean of ``measures`` where no task loses more than ``within`` points.

    Refused are methods with a degenerate decision, those that level down, those whose Bias shrinking gives as well (where Bias or VR
    is a measure), and those that lose more than ``within`` points of AUC, accuracy or R2 in any task, at any threshold that the run
    has; a loss of accuracy within noise (:func:`libmtl_fair.report.judged.least_noise`) is none.

    Parameters
    ----------
    measures : sequence of str
        Columns of the summary that are better when lower, such as ``"EO diff sex"``.
    within : float, default 0.5
        What each task may lose against the reference on validation data, in points (hundredths).
    among : sequence of str, default ("*",)
        Patterns of the methods to choose from, such as ``"main_*"``; the reference is always one of them, so a choice
        exists.
    pooled : bool, default False
        One choice for all seeds, by means over their validation data. It is less noisy; but where every seed has a
        split of its own, one seed's validation rows are test rows of others.
    allow : sequence of str, default ()
        What is not refused after all: ``"degenerate"``, ``"levelling-down"``.

    Raises
    ------
    RecipeError
        No measure, a loss that is not a number of at least 0, or an unknown thing to allow.
    """

    measures: Sequence[str]
    within: float = 0.5
    among: Sequence[str] = ("*",)
    pooled: bool = False
    allow: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the settings."""
        if not self.measures:
            raise RecipeError("a choice on validation needs at least one measure, such as 'EO diff sex'")
        if wrong := next((what for what in self.allow if what not in ALLOWED), None):
            raise RecipeError(unknown("thing to allow", wrong, ALLOWED))
        if not 0 <= self.within < float("inf"):
            raise RecipeError(f"within is what the utility may lose, in points of at least 0; found {self.within!r}")


def choose(run: RunFolder, rule: Rule) -> pd.DataFrame:
    """Return one row a seed: the method that the rule takes, its disparity on validation data, and what was refused.

    Columns: seed, method, disparity (of the choice), reference_disparity, refused: a dict of each method with a lower disparity and
    why it was not taken. A seed's choice looks at that seed's validation data only, unless the rule is pooled. The reference is taken
    where nothing else may be.

    Raises
    ------
    RecipeError
        An unknown measure, one that is better when higher, or patterns that fit no method.
    CheckpointError
        The run has no validation results.
    """
    run = dataclasses.replace(run, on="val")
    values = summary_values(run, further=True)
    if values.empty:
        raise CheckpointError(f"{run.path} holds no validation results; run again to make them")
    higher: dict[str, bool] = dict(zip(values["column"], values["higher"]))
    for column in rule.measures:
        if column not in higher:
            raise RecipeError(unknown("measure", column, higher))
    if wrong := next((c for c in rule.measures if higher[c]), None):
        raise RecipeError(f"measure {wrong!r} is better when higher; choose by a disparity, such as 'EO diff sex'")
    methods = [m for m in run.methods if any(fnmatchcase(m, pattern) for pattern in rule.among)]
    if not methods:
        raise RecipeError(f"no method fits {', '.join(rule.among)}; there are: {', '.join(run.methods)}")
    wide = values.pivot_table(index=["seed", "method"], columns="column", values="value", dropna=False)
    disparity = wide[list(rule.measures)].mean(axis=1, skipna=False)
    if rule.pooled:
        disparity = disparity.groupby("method").transform("mean")
    found, reasons = [], _refusals(run, rule, None) if rule.pooled else {}
    for seed in run.seeds:
        why = reasons if rule.pooled else _refusals(run, rule, seed)
        own = disparity.xs(seed, level="seed").reindex(list(dict.fromkeys([run.reference, *methods]))).dropna()
        able = own[[m == run.reference or m not in why for m in own.index]]
        taken = str(able.idxmin()) if len(able) else run.reference
        refused = {str(m): why[m] for m in own[own < own.get(taken, float("-inf"))].index if m in why}
        both = {"disparity": own.get(taken), "reference_disparity": own.get(run.reference)}
        found.append({"seed": seed, "method": taken, **both, "refused": refused})
    return pd.DataFrame(found)


def _refusals(run: RunFolder, rule: Rule, seed: int | None) -> dict[str, str]:
    """Return method -> why it may not be taken, on the data of one seed, or of all."""
    run = run if seed is None else dataclasses.replace(run, runs=tuple(item for item in run.runs if item.seed == seed))
    about = [column_of(column) for column in rule.measures]
    found = _losses(run, rule.within)
    if "levelling-down" not in rule.allow:
        for end in dict.fromkeys(end for metric, _, end in about if metric in _DECISIONS):
            for (method, attribute), tasks in judged.levelled_down(run, end).items():
                if any(of == attribute and at == end and metric in _DECISIONS for metric, of, at in about):
                    found[method] = f"levels down by {attribute} in {', '.join(tasks)}"
    if any(column.startswith(("Bias@", "VR@")) for column in rule.measures):
        shrunk = (str(row.method) for row in rows(shrinkage_verdict(run)) if not row.below)
        found |= dict.fromkeys(shrunk, "shrinking the reference gives as low a Bias")
    if "degenerate" not in rule.allow:
        for end in dict.fromkeys(end for _, _, end in about):
            found |= judged.why_degenerate(run, end)
    return found


def _losses(run: RunFolder, within: float) -> dict[str, str]:
    """Return method -> the greatest loss of a task, where it is more than ``within`` points and than noise."""
    found: dict[str, tuple[float, str]] = {}
    for part, end in (("utility", ""), ("utility_base_rate", judged.BASE_RATE)):
        frame = run.frame(part)
        frame = frame[(frame["task"] != "macro") & frame["metric"].isin(_GUARDED)]
        means = frame.groupby(["method", "task", "metric"], sort=False)["value"].mean()
        noise = judged.accuracy_noise(run, end)
        for row in rows(means.reset_index()):
            lost = means.get((run.reference, row.task, row.metric), float("nan")) - row.value
            allowed = max(within / 100, noise.get((row.method, row.task), 0.0) if row.metric == "accuracy" else 0.0)
            if lost > max(allowed + _TIE, found.get(row.method, (0.0, ""))[0]):
                what = f"{LABELS.get(row.metric, row.metric)} in {row.task}{end}"
                found[row.method] = lost, f"loses {100 * lost:.2f} points of {what}"
    return {method: text for method, (_, text) in found.items()}


def with_choice(run: RunFolder, rule: Rule, name: str = CHOSEN) -> tuple[RunFolder, pd.DataFrame]:
    """Return the run with one method more, ``name``: in each seed that of :func:`choose`; and what was chosen."""
    if name in run.methods:
        raise RecipeError(f"the run has a method {name!r} already; give the choice another name")
    made = choose(run, rule)
    at = {(item.method, item.seed): item for item in run.runs}
    taken = [dataclasses.replace(at[method, seed], method=name) for seed, method in zip(made["seed"], made["method"])]
    return dataclasses.replace(run, runs=(*run.runs, *taken)), made
