"""Objectives and constraints by name: what of a model's validation predictions they are, and which way is better."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from libmtl_fair import functional as F
from libmtl_fair import metrics
from libmtl_fair.errors import FairMTLError, RecipeError, unknown
from libmtl_fair.files import Json
from libmtl_fair.metrics.intervals import normal_width
from libmtl_fair.metrics.scores import Held, thresholds_in_use
from libmtl_fair.metrics.verdicts import judge
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.recipe.sections import Metrics
from libmtl_fair.tune.evidence import Counts, counts_of, sampling_deviation

UP = ("auc", "accuracy", "r2", "f1", "macro_f1", "ccc", "kappa", "mIoU", "pixAcc")
DOWN = ("brier", "log_loss", "mae", "rmse", "abs_err", "rel_err", "RMSE", "mean", "median")
MACROS = tuple(f"macro_{name}" for name in ("auc", "accuracy", "brier", "r2"))
GAPS: Mapping[str, str] = {
    "eo_difference": "equalized_odds",
    "tpr_difference": "true_positive_rate",
    "fpr_difference": "false_positive_rate",
    "dp_difference": "demographic_parity",
    "accuracy_difference": "accuracy",
}
"""Objective -> what of groups it is the difference of; the worst one over tasks and attributes, unless ``mean_`` stands before."""
PEOPLE = ("inconsistency", "flip_gap")
"""Objectives of the audit of people, mean over tasks: see :class:`libmtl_fair.metrics.ConsistencyAudit`."""
_PHI_MU = 0.5
NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_CONSTRAINT = re.compile(rf"(.+?)\s*(<=|>=)\s*{NUMBER}\s*")
NAMES = (*MACROS, "bias", "violation_rate", *PEOPLE, *GAPS, "phi", "<task>/auc")
"""Names of objectives; ``<task>/`` and ``<attribute>/`` may stand before those about groups, ``mean_`` before their own."""


class UndefinedError(FairMTLError):
    """An objective is not defined on the validation data."""


@dataclass(frozen=True)
class Measure:
    """A named number of a model on validation data.

    ``metric`` is the last part of the name, ``level`` the tolerance of ``bias@0.275``; it is about one ``task`` and ``attribute``, or
    (None) the largest over all, or the ``mean``.
    """

    name: str
    metric: str
    task: str | None = None
    attribute: str | None = None
    level: str | None = None
    mean: bool = False

    @property
    def direction(self) -> str:
        """``"maximize"`` (utility) or ``"minimize"`` (errors and disparities)."""
        return "maximize" if self.metric in UP else "minimize"

    @property
    def fair(self) -> bool:
        """Whether it is a disparity."""
        return self.metric in (*GAPS, *PEOPLE, "bias", "violation_rate", "phi")


@dataclass(frozen=True)
class Constraint:
    """``measure <= bound`` (or ``>=``)."""

    measure: Measure
    bound: float
    at_most: bool

    @property
    def text(self) -> str:
        """As recipes write it."""
        return f"{self.measure.name} {'<=' if self.at_most else '>='} {self.bound:g}"

    def excess(self, value: float) -> float:
        """Return by how much it is violated; at most 0 where it holds."""
        return value - self.bound if self.at_most else self.bound - value


def parse_measure(name: str, tasks: Mapping[str, str], attributes: Sequence[str], deltas: Sequence[str]) -> Measure:
    """Return the measure of a name such as ``macro_auc``, ``income/auc``, ``bias@0.275``, ``income/sex/eo_difference``.

    ``tasks`` are name -> kind; a RecipeError says that there is no such measure, or nothing here that it could be measured on.
    """
    *scope, last = name.split("/")
    metric, _, level = last.removeprefix("mean_").partition("@")
    if name in MACROS:
        return Measure(name, last.removeprefix("macro_"))
    if not scope and metric in ("bias", "violation_rate"):
        if len(tasks) < 2:
            raise RecipeError(f"objective {name} compares tasks with each other: it needs at least two tasks")
        if (level or deltas[0]) not in deltas:
            raise RecipeError(f"objective {name}: {unknown('audit.delta', level, deltas)}")
        return Measure(name, metric, level=level or deltas[0])
    if last in PEOPLE and not scope:
        if last == "flip_gap" and not attributes:
            raise RecipeError(f"objective {name} exchanges a sensitive value, and the data have no sensitive attribute")
        return Measure(name, last)
    task = next((part for part in scope if part in tasks), None)
    attribute = next((part for part in scope if part in attributes), None)
    strange = [part for part in scope if part not in (task, attribute)]
    if strange:
        raise RecipeError(f"objective {name}: {unknown('task or attribute', strange[0], [*tasks, *attributes])}")
    if metric in (*GAPS, "phi"):
        if not attributes:
            raise RecipeError(f"objective {name} compares groups, and the data have no sensitive attribute")
        if "binary" not in (list(tasks.values()) if task is None else [tasks[task]]):
            raise RecipeError(f"objective {name} is for binary tasks, and there is none among {task or list(tasks)}")
        return Measure(name, metric, task, attribute, mean=last.startswith("mean_"))
    if metric in (*UP, *DOWN) and task is not None and attribute is None:
        return Measure(name, metric, task)
    raise RecipeError(unknown("objective", name, NAMES))


def parse_constraint(text: str, parse: Callable[[str], Measure]) -> Constraint:
    """Return the constraint of a text such as ``eo_difference <= 0.05``; anything else is a RecipeError."""
    found = _CONSTRAINT.fullmatch(text.strip())
    if found is None or math.isinf(float(found[3])):
        raise RecipeError(f"tune.constraints: expected a text such as 'eo_difference <= 0.05', found {text!r}")
    return Constraint(parse(found[1]), float(found[3]), found[2] == "<=")


def value_of(
    measure: Measure,
    predictions: Predictions,
    deltas: Mapping[str, float],
    recipe: Recipe,
    bars: Held | None = None,
) -> float:
    """Return the number; an UndefinedError says why there is none, such as which task and attribute lack the people for a rate.

    ``bars``: task -> threshold of its decisions; None takes what ``metrics.threshold`` says of these predictions.
    """
    bars = bars or thresholds_in_use(predictions, recipe.metrics.threshold)
    if measure.metric in GAPS:
        found, why = gap_of(measure, counts_of(predictions, bars), recipe.metrics, ends=False)[0], ""
    elif measure.metric in PEOPLE:
        found = predictions.people.get(measure.metric, math.nan)
        why = "no audit of people was made, no task's ranks differ, or no sensitive attribute is among the inputs"
    elif measure.metric == "phi":
        found, why = _phi(measure, predictions), "no task has two groups"
    elif measure.level is not None:
        how, why = recipe.audit, "no two tasks have finite scores"
        audit = metrics.FixedDeltaAudit(deltas[measure.level], **how.draws, exact=how.exact)
        report = audit.run(predictions.scores)
        found = report.bias if measure.metric == "bias" else report.violation_rate
    else:
        why = "its labels have one class only, or the task's kind does not define it"
        found = metrics.utility(predictions, bars)[measure.task or "macro"].get(measure.metric, math.nan)
    if math.isnan(found):
        raise UndefinedError(f"objective {measure.name} is undefined on the validation data: {why}")
    return float(found)


def upper_end(
    measure: Measure, value: float, predictions: Predictions, deltas: Mapping[str, float], recipe: Recipe
) -> float:
    """Return the upper end of a disparity's interval over draws of people, at the recipe's ``metrics.confidence``.

    Gaps between groups: see :func:`gap_of`. Other disparities: normal, with the jackknife's standard error.
    """
    bars = thresholds_in_use(predictions, recipe.metrics.threshold)
    if measure.metric in GAPS:
        return gap_of(measure, counts_of(predictions, bars), recipe.metrics)[1]
    if measure.metric in PEOPLE:
        return predictions.people.get(f"{measure.metric}_high", value)
    spread = sampling_deviation(predictions, lambda p: value_of(measure, p, deltas, recipe, bars))
    return value + normal_width(recipe.metrics.confidence) * spread


def gap_of(measure: Measure, counts: Counts, how: Metrics, ends: bool = True) -> tuple[float, float]:
    """Return a gap between groups with enough people, and the upper end of its interval (NaN without ``ends``).

    The worst over tasks and attributes has the largest of their ends, a mean the mean of them. Tasks and attributes without two
    such groups are left out.

    Raises
    ------
    UndefinedError
        None is left.
    """
    found, lacking = [], []
    for task in counts if measure.task is None else (measure.task,):
        for attribute, groups in counts[task].items():
            if not attribute or measure.attribute not in (None, attribute):
                continue
            given: Json = {"min_group_size": how.min_group_size, "confidence": how.confidence}
            table, bootstrap = list(groups.values()), 1000 if ends else 0
            verdict = judge(table, GAPS[measure.metric], n_bootstrap=bootstrap, n_permutations=0, **given)
            if math.isnan(verdict.value):
                few = ", ".join(repr(name) for g, name in enumerate(groups) if g not in verdict.used)
                lacking.append(f"task {task!r}, attribute {attribute!r}: too few people in {few}")
            else:
                found.append((verdict.value, verdict.high))
    if not found:
        raise UndefinedError(
            f"objective {measure.name} is undefined on the validation data: {GAPS[measure.metric]} needs two groups of at "
            f"least {how.min_group_size} people and 10 of each label that it is about; {'; '.join(lacking)}. "
            "Take more rows, or a larger validation share"
        )
    value, end = np.mean(found, axis=0) if measure.mean else np.max(found, axis=0)
    return float(value), float(end)


def _attributes(measure: Measure, predictions: Predictions) -> list[str]:
    return [a for a in predictions.groups if measure.attribute in (None, a)]


def _phi(measure: Measure, predictions: Predictions) -> float:
    """Return the worst case over tasks of their AEOD, each the mean over attributes; NaN where no task defines it."""
    tasks = [t.name for t in predictions.tasks if t.kind == "binary" and measure.task in (None, t.name)]
    groups = [(predictions.groups[a], len(predictions.group_names[a])) for a in _attributes(measure, predictions)]
    psi, present = [], []
    for name in tasks:
        scores = predictions.task(name).probabilities(predictions.outputs[name]).double()
        found = [F.aeod(scores, predictions.labels[name], *each, normalise=True) for each in groups]
        values, some = (torch.stack(part) for part in zip(*found))
        psi.append((values * some).sum() / some.sum().clamp(min=1))
        present.append(some.any())
    seen = torch.stack(present)
    phi, _ = F.aggregate_disparities(torch.stack(psi), _PHI_MU, seen)
    return float(phi) if bool(seen.any()) else math.nan
