"""A setting chosen on validation data, seed by seed, and reported on test data as if it were a method of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase

import pandas as pd

from libmtl_fair.errors import CheckpointError, RecipeError, unknown
from libmtl_fair.report.run_folder import RunFolder
from libmtl_fair.report.summary import summary_values

CHOSEN = "chosen on validation"
_UTILITIES = ("macro AUC", "macro accuracy", "macro R²")


@dataclasses.dataclass(frozen=True)
class Rule:
    """The fairest method that gives up little: lowest mean of ``measures`` where ``utility`` loses at most ``within`` points.

    Parameters
    ----------
    measures : columns of the summary that are better when lower, such as ``"EO diff sex"``.
    within : what the utility may lose against the reference on validation data, in points (hundredths).
    among : patterns of the methods to choose from, such as ``"main_*"``; the reference is always one of them, so a choice
        exists.
    pooled : one choice for all seeds, by means over their validation data. It is less noisy; but where every seed has a split
        of its own, one seed's validation rows are test rows of others.
    utility : column of the summary that must not fall; None is macro AUC, else macro accuracy, else macro R².

    Raises
    ------
    RecipeError : no measure, or a loss that is not a number of at least 0.
    """

    measures: Sequence[str]
    within: float = 0.5
    among: Sequence[str] = ("*",)
    utility: str | None = None
    pooled: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        if not self.measures:
            raise RecipeError("a choice on validation needs at least one measure, such as 'EO diff sex'")
        if not 0 <= self.within < float("inf"):
            raise RecipeError(f"within is what the utility may lose, in points of at least 0; found {self.within!r}")


def choose(run: RunFolder, rule: Rule) -> pd.DataFrame:
    """Return one row a seed: the method that the rule takes, its utility and disparity on validation data.

    Columns: seed, method, utility, disparity (of the choice), reference_utility, reference_disparity; a utility that is better
    when lower has its sign changed. A seed's choice looks at that seed's validation data only, unless the rule is pooled.

    Raises
    ------
    RecipeError : an unknown measure, one that is better when higher, or patterns that fit no method.
    CheckpointError : the run has no validation results.
    """
    values = summary_values(dataclasses.replace(run, on="val"))
    if values.empty:
        raise CheckpointError(f"{run.path} holds no validation results; run again to make them")
    higher: dict[str, bool] = dict(zip(values["column"], values["higher"]))
    utility = rule.utility or next((c for c in _UTILITIES if c in higher), _UTILITIES[0])
    for column in (utility, *rule.measures):
        if column not in higher:
            raise RecipeError(unknown("measure", column, higher))
    if wrong := next((c for c in rule.measures if higher[c]), None):
        raise RecipeError(f"measure {wrong!r} is better when higher; choose by a disparity, such as 'EO diff sex'")
    methods = [m for m in run.methods if any(fnmatchcase(m, pattern) for pattern in rule.among)]
    if not methods:
        raise RecipeError(f"no method fits {', '.join(rule.among)}; there are: {', '.join(run.methods)}")
    wide = values.pivot_table(index=["seed", "method"], columns="column", values="value")
    signed = wide[utility] if higher[utility] else -wide[utility]
    scores = pd.DataFrame({"utility": signed, "disparity": wide[list(rule.measures)].mean(axis=1, skipna=False)})
    if rule.pooled:
        scores = scores.groupby("method").transform("mean")
    found = []
    for seed in run.seeds:
        own = scores.xs(seed, level="seed").reindex(list(dict.fromkeys([run.reference, *methods])))
        reference = own.loc[run.reference]
        allowed = own[own["utility"] >= reference["utility"] - rule.within / 100]["disparity"].dropna()
        taken = str(allowed.idxmin()) if len(allowed) else run.reference
        found.append({"seed": seed, "method": taken, **own.loc[taken], **reference.add_prefix("reference_")})
    return pd.DataFrame(found)


def with_choice(run: RunFolder, rule: Rule, name: str = CHOSEN) -> tuple[RunFolder, pd.DataFrame]:
    """Return the run with one method more, ``name``: in each seed that of :func:`choose`; and what was chosen."""
    if name in run.methods:
        raise RecipeError(f"the run has a method {name!r} already; give the choice another name")
    made = choose(run, rule)
    at = {(item.method, item.seed): item for item in run.runs}
    taken = [dataclasses.replace(at[method, seed], method=name) for seed, method in zip(made["seed"], made["method"])]
    return dataclasses.replace(run, runs=(*run.runs, *taken)), made
