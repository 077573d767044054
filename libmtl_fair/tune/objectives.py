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
_NEED = {"true_positive_rate": "positives", "false_positive_rate": "negatives"}
_PHI_MU = 0.5
NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_CONSTRAINT = re.compile(rf"(.+?)\s*(<=|>=)\s*{NUMBER}\s*")
NAMES = (*(f"macro_{m}" for m in _MACRO), "bias", "violation_rate", *_RATES, "phi", "<task>/auc")
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

    ``tasks`` are name -> kind; a RecipeError says that there is no such measure, or nothing here that it could be measured on.
    """
    *scope, last = name.split("/")
    metric, _, level = last.removeprefix("mean_").partition("@")
    if not scope and last.removeprefix("macro_") in _MACRO and last.startswith("macro_"):
        return Measure(name, last.removeprefix("macro_"))
    if not scope and metric in ("bias", "violation_rate"):
        if len(tasks) < 2:
            raise RecipeError(f"objective {name} compares tasks with each other: it needs at least two tasks")
        if (level or deltas[0]) not in deltas:
            raise RecipeError(f"objective {name}: {unknown('audit.delta', level, deltas)}")
        return Measure(name, metric, level=level or deltas[0])
    task = next((part for part in scope if part in tasks), None)
    attribute = next((part for part in scope if part in attributes), None)
    strange = [part for part in scope if part not in (task, attribute)]
    if strange:
        raise RecipeError(f"objective {name}: {unknown('task or attribute', strange[0], [*tasks, *attributes])}")
    if metric in (*_RATES, "phi"):
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


def value_of(measure: Measure, predictions: Predictions, deltas: Mapping[str, float], recipe: Recipe) -> float:
    """Return the number; an UndefinedError says why there is none, such as which group lacks which rate."""
    if measure.metric in _RATES:
        return _difference(measure, predictions, recipe.metrics.threshold)
    if measure.metric == "phi":
        found, why = _phi(measure, predictions), "no task has two groups"
    elif measure.level is not None:
        how, why = recipe.audit, "no two tasks have finite scores"
        audit = metrics.FixedDeltaAudit(deltas[measure.level], **how.draws, exact=how.exact)
        report = audit.run(predictions.scores)
        found = report.bias if measure.metric == "bias" else report.violation_rate
    else:
        why = "its labels have one class only, or the task's kind does not define it"
        found = metrics.utility(predictions)[measure.task or "macro"].get(measure.metric, math.nan)
    if math.isnan(found):
        raise UndefinedError(f"objective {measure.name} is undefined on the validation data: {why}")
    return float(found)


def _scope(measure: Measure, predictions: Predictions) -> tuple[list[str], list[str]]:
    """Return the binary tasks and the attributes that a measure is about."""
    tasks = [t.name for t in predictions.tasks if t.kind == "binary" and measure.task in (None, t.name)]
    return tasks, [a for a in predictions.groups if measure.attribute in (None, a)]


def _difference(measure: Measure, predictions: Predictions, threshold: float | str) -> float:
    tasks, attributes = _scope(measure, predictions)
    found = []
    for name in tasks:
        task, labels = predictions.task(name), predictions.labels[name]
        seen = task.observed(labels)
        truth = labels[seen].double() > 0.5
        bar = float(truth.double().mean()) if threshold == "base_rate" else float(threshold)
        decision = task.probabilities(predictions.outputs[name])[seen] > bar
        for attribute in attributes:
            names = predictions.group_names[attribute]
            rates = metrics.group_rates(truth, decision, predictions.groups[attribute][seen], len(names))
            gaps = []
            for rate in _RATES[measure.metric]:
                lacking = [repr(group) for group, value in zip(names, rates.rate(rate)) if math.isnan(value)]
                if len(names) - len(lacking) < 2:
                    raise UndefinedError(
                        f"objective {measure.name} is undefined on the validation data: task {name!r}, attribute "
                        f"{attribute!r}: {rate} needs two groups with {_NEED.get(rate, 'rows')}, and there are none in "
                        f"{', '.join(lacking)}"
                    )
                gaps.append(rates.difference(rate))
            found.append(max(gaps))
    return float(np.mean(found)) if measure.mean else max(found)


def _phi(measure: Measure, predictions: Predictions) -> float:
    """Return the worst case over tasks of their AEOD, each the mean over attributes; NaN where no task defines it."""
    tasks, attributes = _scope(measure, predictions)
    groups = [(predictions.groups[a], len(predictions.group_names[a])) for a in attributes]
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
