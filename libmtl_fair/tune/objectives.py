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
from libmtl_fair.metrics.rates import GroupRates, group_rates
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.schema import Recipe

UP = ("auc", "accuracy", "r2", "f1", "macro_f1", "ccc")
DOWN = ("brier", "log_loss", "mae", "rmse")
_MACRO = ("auc", "accuracy", "brier", "r2")
_RATES: Mapping[str, tuple[str, ...]] = {
    "eo_difference": ("true_positive_rate", "false_positive_rate"),
    "tpr_difference": ("true_positive_rate",),
    "fpr_difference": ("false_positive_rate",),
    "dp_difference": ("selection_rate",),
    "accuracy_difference": ("accuracy",),
}
_PHI_MU = 0.5
_CONSTRAINT = re.compile(r"(.+?)\s*(<=|>=)\s*([-+0-9.eE]+)\s*")


class UndefinedError(FairMTLError):
    """An objective is not defined on the validation data."""


@dataclass(frozen=True)
class Measure:
    """A named number of a model on validation data.

    Attributes
    ----------
    name : as recipes write it.
    direction : ``"maximize"`` (utility) or ``"minimize"`` (errors and disparities).
    task, attribute : what it is restricted to; None is all.
    metric : the last part of the name; ``level`` is the tolerance of ``bias@0.275``.
    mean : the mean over tasks and attributes, instead of the largest.
    """

    name: str
    direction: str
    metric: str
    task: str | None = None
    attribute: str | None = None
    level: str | None = None
    mean: bool = False

    @property
    def fair(self) -> bool:
        """Whether it is a disparity."""
        return self.metric in (*_RATES, "bias", "violation_rate", "phi")


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

    Parameters
    ----------
    tasks : name -> kind.
    attributes, deltas : names of the sensitive attributes and of the audit's tolerances.

    Raises
    ------
    RecipeError : no such measure, or nothing here that it could be measured on.
    """
    *scope, last = name.split("/")
    if not scope and last.startswith("macro_"):
        metric = last.removeprefix("macro_")
        if metric not in _MACRO:
            raise RecipeError(unknown("objective", name, names()))
        return Measure(name, _direction(metric), metric)
    metric, _, level = last.removeprefix("mean_").partition("@")
    if metric in ("bias", "violation_rate") and not scope:
        return _audit(name, metric, level, tasks, deltas)
    task = next((part for part in scope if part in tasks), None)
    attribute = next((part for part in scope if part in attributes), None)
    strange = [part for part in scope if part not in (task, attribute)]
    if strange:
        raise RecipeError(f"objective {name}: {unknown('task or attribute', strange[0], [*tasks, *attributes])}")
    if metric in _RATES or metric == "phi":
        if not attributes:
            raise RecipeError(f"objective {name} compares groups, and the data have no sensitive attribute")
        if "binary" not in (list(tasks.values()) if task is None else [tasks[task]]):
            raise RecipeError(f"objective {name} is for binary tasks, and there is none among {task or list(tasks)}")
        return Measure(name, "minimize", metric, task, attribute, mean=last.startswith("mean_"))
    if metric in (*UP, *DOWN) and task is not None and attribute is None:
        return Measure(name, _direction(metric), metric, task)
    raise RecipeError(unknown("objective", name, names()))


def names() -> list[str]:
    """Return the names of objectives; ``<task>/`` and ``<attribute>/`` may stand before those about groups."""
    return [*(f"macro_{m}" for m in _MACRO), "bias", "violation_rate", *_RATES, "phi", "<task>/auc"]


def _direction(metric: str) -> str:
    return "maximize" if metric in UP else "minimize"


def _audit(name: str, metric: str, level: str, tasks: Mapping[str, str], deltas: Sequence[str]) -> Measure:
    if len(tasks) < 2:
        raise RecipeError(f"objective {name} compares tasks with each other: it needs at least two tasks")
    chosen = level or deltas[0]
    if chosen not in deltas:
        raise RecipeError(f"objective {name}: {unknown('audit.delta', chosen, deltas)}")
    return Measure(name, "minimize", metric, level=chosen)


def parse_constraint(text: str, parse: Callable[[str], Measure]) -> Constraint:
    """Return the constraint of a text such as ``eo_difference <= 0.05``.

    Raises
    ------
    RecipeError : not of that form.
    """
    found = _CONSTRAINT.fullmatch(text.strip())
    try:
        bound = float(found[3]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or not math.isfinite(bound):
        raise RecipeError(f"tune.constraints: expected a text such as 'eo_difference <= 0.05', found {text!r}")
    return Constraint(parse(found[1]), bound, found[2] == "<=")


def value_of(measure: Measure, predictions: Predictions, deltas: Mapping[str, float], recipe: Recipe) -> float:
    """Return the number.

    Raises
    ------
    UndefinedError : it is not defined: says which group lacks which rate.
    """
    if measure.level is not None:
        audit = recipe.audit
        report = metrics.FixedDeltaAudit(
            deltas[measure.level], audit.pool_size, audit.n_pairs, audit.eval_seed, audit.pair_seed, exact=audit.exact
        ).run(predictions.scores)
        found = report.bias if measure.metric == "bias" else report.violation_rate
        return _defined(measure, float(found), "no two tasks have finite scores")
    if measure.metric in _RATES:
        return _disparity(measure, predictions, recipe)
    if measure.metric == "phi":
        return _phi(measure, predictions)
    table = metrics.utility(predictions)
    found = table[measure.task or "macro"].get(measure.metric, math.nan)
    return _defined(measure, float(found), "its labels have one class only, or the task's kind does not define it")


def _defined(measure: Measure, value: float, why: str) -> float:
    if math.isnan(value):
        raise UndefinedError(f"objective {measure.name} is undefined on the validation data: {why}")
    return value


def _rates(predictions: Predictions, task: str, attribute: str, threshold: float | str) -> GroupRates:
    kind = next(t for t in predictions.tasks if t.name == task)
    labels = predictions.labels[task]
    seen = kind.observed(labels)
    truth = labels[seen].double() > 0.5
    probability = kind.probabilities(predictions.outputs[task])[seen]
    bar = float(truth.double().mean()) if threshold == "base_rate" else float(threshold)
    groups = predictions.groups[attribute][seen]
    return group_rates(truth, probability > bar, groups, len(predictions.group_names[attribute]))


def _disparity(measure: Measure, predictions: Predictions, recipe: Recipe) -> float:
    tasks = [t.name for t in predictions.tasks if t.kind == "binary" and measure.task in (None, t.name)]
    attributes = [a for a in predictions.groups if measure.attribute in (None, a)]
    found = []
    for task in tasks:
        for attribute in attributes:
            rates = _rates(predictions, task, attribute, recipe.metrics.threshold)
            names = predictions.group_names[attribute]
            found.append(max(_gap(measure, rates, name, task, attribute, names) for name in _RATES[measure.metric]))
    return float(np.mean(found)) if measure.mean else max(found)


def _gap(
    measure: Measure, rates: GroupRates, rate: str, task: str, attribute: str, group_names: Sequence[str]
) -> float:
    """Return the difference of one rate; fewer than two groups that define it define no difference."""
    values = rates.rate(rate)
    known = values[~np.isnan(values)]
    if len(known) >= 2:
        return float(known.max() - known.min())
    lacking = [name for name, value in zip(group_names, values) if math.isnan(value)]
    need = {"true_positive_rate": "positives", "false_positive_rate": "negatives"}.get(rate, "rows")
    raise UndefinedError(
        f"objective {measure.name} is undefined on the validation data: task {task!r}, attribute {attribute!r}: "
        f"{rate} needs two groups with {need}, and there are none in {', '.join(map(repr, lacking))}"
    )


def _phi(measure: Measure, predictions: Predictions) -> float:
    psi, present = [], []
    for task in predictions.tasks:
        if task.kind != "binary" or measure.task not in (None, task.name):
            continue
        found = [
            F.aeod(
                task.probabilities(predictions.outputs[task.name]).double(),
                predictions.labels[task.name],
                groups,
                len(predictions.group_names[attribute]),
                normalise=True,
            )
            for attribute, groups in predictions.groups.items()
            if measure.attribute in (None, attribute)
        ]
        some = torch.stack([p for _, p in found])
        values = torch.stack([v for v, _ in found])
        psi.append((values * some).sum() / some.sum().clamp(min=1))
        present.append(some.any())
    phi, _ = F.aggregate_disparities(torch.stack(psi), _PHI_MU, torch.stack(present))
    if not bool(torch.stack(present).any()):
        raise UndefinedError(f"objective {measure.name} is undefined on the validation data: no task has two groups")
    return float(phi)
