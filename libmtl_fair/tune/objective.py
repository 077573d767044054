"""What a study asks (its plan), and one trial of it: train, measure on validation."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
import torch

from libmtl_fair.data import Dataset
from libmtl_fair.data.loader import resolve_device
from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.libmtl import FairTrainer
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.build import check, loaders, make_dataset, make_trainer
from libmtl_fair.recipe.measure import Protocol
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.recipe.sections import Train
from libmtl_fair.tasks import Regression, Task
from libmtl_fair.tune.objectives import Constraint, Measure, parse_constraint, parse_measure, value_of
from libmtl_fair.tune.space import Parameter, changed, current, label, make_space

OBJECTIVES = ("macro_auc", "eo_difference")
"""Objectives where neither the recipe nor the caller names some."""

ROLE, METHOD, ARGS, FIXED = "role", "method", "args", "fixed"
Queued = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """A study's question: recipe, objectives, constraints and search space, checked against the data."""

    recipe: Recipe
    objectives: tuple[Measure, ...]
    constraints: tuple[Constraint, ...]
    space: Mapping[str, tuple[Parameter, ...]]
    seeds_per_trial: int
    sampler: str
    pruner: str | None
    data: dict[int, Dataset] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def make(cls, recipe: Recipe, objectives: Sequence[str] | None = None) -> Plan:
        """Read the plan of a recipe; ``objectives`` replace its own.

        Raises
        ------
        RecipeError : names, ranges or settings that do not make sense.
        DataError : the data do not fit the recipe.
        """
        check(recipe)
        tune = recipe.tune
        data = make_dataset(recipe, recipe.seeds[0])
        kinds = {task.name: task.kind for task in data.tasks}
        deltas = [str(d) for d in recipe.audit.deltas]

        def parse(name: str) -> Measure:
            return parse_measure(name, kinds, list(data.groups), deltas)

        asked = tuple(objectives) if objectives else (tune.objectives if tune else None) or OBJECTIVES
        wanted = (tune.constraints if tune else None) or ()
        plan = cls(
            recipe,
            tuple(parse(name) for name in asked),
            tuple(parse_constraint(text, parse) for text in wanted),
            make_space(recipe),
            tune.seeds_per_trial if tune else 1,
            (tune.sampler if tune else None) or "tpe",
            tune.pruner if tune else None,
            {recipe.seeds[0] if recipe.data.resplit else 0: data},
        )
        plan._check()
        return plan

    def _check(self) -> None:
        self.known()
        if self.pruner is not None and (len(self.objectives) > 1 or self.objectives[0].fair):
            raise self.recipe.error(
                ("tune", "pruner"),
                "pruning compares one utility after each epoch: give one objective such as macro_auc, and the fairness "
                "as a constraint, such as eo_difference <= 0.05",
            )
        for method in (self.recipe.reference, *self.space):
            if self.recipe.methods[method].single_task:
                raise self.recipe.error(("methods", method), "a single-task method is several models; tune one model")
        for method, parameters in self.space.items():
            for high in (False, True):
                values = {p.path: _end(p, high) for p in parameters}
                try:
                    check(changed(self.recipe, method, values))
                except RecipeError as error:
                    raise RecipeError(
                        f"the search space of {method} leads to settings that do not make sense: {error}"
                    ) from error

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Objectives and what constraints are about, each once."""
        return tuple(dict.fromkeys([*self.objectives, *(c.measure for c in self.constraints)]))

    def described(self) -> dict[str, Any]:
        """Return what decides the results of the study, as plain values: the content of its fingerprint."""
        plain = self.recipe.to_dict()
        kept = {key: plain[key] for key in ("data", "model", "train", "seeds", "methods", "audit", "metrics")}
        return {
            "recipe": kept,
            "objectives": {m.name: m.direction for m in self.objectives},
            "constraints": [c.text for c in self.constraints],
            "space": {p.name: p.described() for parameters in self.space.values() for p in parameters},
            "sampler": self.sampler,
            "pruner": self.pruner,
            "seeds_per_trial": self.seeds_per_trial,
            **({"enqueue": list(self._enqueue)} if self._enqueue else {}),
        }

    def queue(self, slot: int) -> Queued:
        """Return (parameters, attributes) that a slot starts with: the settings tried first, then nothing given."""
        known = self.known()
        return known[slot] if slot < len(known) else ({}, {})

    @property
    def _enqueue(self) -> tuple[Any, ...]:
        return self.recipe.tune.enqueue if self.recipe.tune else ()

    def known(self) -> list[Queued]:
        """Return the settings tried first: unregularised, as the recipe has them, default, published, and its ``enqueue``."""
        found: list[Queued] = [({}, {ROLE: "baseline", METHOD: self.recipe.reference, FIXED: True})]
        for method in self.space:
            if method != self.recipe.reference:
                found.append(self._known("as written", method, None))
            weighting = self.recipe.methods[method].weighting
            if self.recipe.methods[method].args:
                found.append(self._known("defaults", method, {}))
            if weighting == "ReLiF":
                found.append(self._known("published", method, {"preset": "paper"}))
        for i, entry in enumerate(self._enqueue):
            try:
                found.append(self._enqueued(entry))
            except RecipeError as error:
                raise self.recipe.error(("tune", "enqueue", i), str(error)) from error
        return found

    def _enqueued(self, entry: str | Mapping[str, Any]) -> Queued:
        """Return a method as it is written, by name, or some settings, the others as the recipe has them."""
        if isinstance(entry, str):
            if entry not in self.recipe.methods:
                raise RecipeError(unknown("method", entry, self.recipe.methods))
            if self.recipe.methods[entry].single_task:
                raise RecipeError(f"{entry} is a single-task method, which is several models; tune one model")
            return {}, {ROLE: entry, METHOD: entry, FIXED: True}
        values = dict(entry)
        method = values.pop("method", next(iter(self.space)))
        if method not in self.space:
            raise RecipeError(unknown("method", str(method), self.space))
        parameters = {p.name.removeprefix(f"{method}."): p for p in self.space[method]}
        for name, value in values.items():
            if name not in parameters:
                raise RecipeError(unknown("parameter", name, parameters))
            if not parameters[name].contains(value):
                raise RecipeError(f"{name} = {value!r} is outside of the search space; widen tune.space.{name}")
        for name, parameter in parameters.items():
            held = current(self.recipe, method, parameter)
            if name not in values and parameter.contains(held):
                values[name] = held
        params = {parameters[name].name: label(value) for name, value in values.items()}
        return ({"method": method} if len(self.space) > 1 else {}) | params, {ROLE: "enqueued", METHOD: method}

    def _known(self, role: str, method: str, args: dict[str, Any] | None) -> Queued:
        values = {p.name: current(self.recipe, method, p, args) for p in self.space[method]}
        inside = all(p.contains(values[p.name]) for p in self.space[method]) and args != {"preset": "paper"}
        marks = {ROLE: role, METHOD: method, FIXED: not inside, **({} if args is None else {ARGS: args})}
        if not inside:
            return {}, marks
        params = {name: "-".join(map(str, v)) if isinstance(v, (list, tuple)) else v for name, v in values.items()}
        return ({"method": method} if len(self.space) > 1 else {}) | params, marks

    def candidate(self, trial: optuna.Trial) -> tuple[Recipe, str]:
        """Return the recipe that a trial trains, asking the sampler for its parameters, and the method's name."""
        marks = trial.user_attrs
        if marks.get(FIXED):
            return self._recipe(marks[METHOD], marks.get(ARGS), {}), marks[METHOD]
        method = next(iter(self.space))
        if len(self.space) > 1:
            method = trial.suggest_categorical("method", list(self.space))
        values = {p.path: p.suggest(trial) for p in self.space[method]}
        return self._recipe(method, marks.get(ARGS), values), method

    def _recipe(self, method: str, args: Mapping[str, Any] | None, values: Mapping[tuple[str, ...], Any]) -> Recipe:
        base = self.recipe
        if args is not None:
            spec = base.methods[method].model_copy(update={"args": dict(args)})
            base = base.model_copy(update={"methods": {**base.methods, method: spec}})
            base._source = self.recipe._source
        return changed(base, method, values)

    def seeds(self, slot: int) -> list[int]:
        """Return the seeds of a slot's trial: fixed by its number, so that a trial that is run again is the same."""
        first = self.recipe.seeds[0] + 1000 * (slot + 1)
        return [(first + k) % 2**32 for k in range(self.seeds_per_trial)]

    def dataset(self, seed: int) -> Dataset:
        """Return the data for a seed; kept, since making them takes longer than an epoch."""
        key = seed if self.recipe.data.resplit else 0
        if key not in self.data:
            self.data.clear()
            self.data[key] = make_dataset(self.recipe, seed)
        return self.data[key]

    @property
    def needs_protocol(self) -> bool:
        """Whether tolerances or score ranges must come from the reference model."""
        levels = [m.level for m in self.measures if m.level is not None]
        return bool(levels) and (
            any(not _is_number(level) for level in levels)
            or any(isinstance(task, Regression) for task in next(iter(self.data.values())).tasks)
        )

    def plain_protocol(self) -> Protocol:
        """Return the tolerances that need no model."""
        return Protocol({str(d): float(d) for d in self.recipe.audit.deltas if _is_number(str(d))}, {})


def _end(parameter: Parameter, high: bool) -> Any:
    if parameter.choices is not None:
        return parameter.choices[-1 if high else 0]
    return parameter.high if high else parameter.low


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Candidate:
    """What a trial trains: one method of a recipe, once a seed."""

    recipe: Recipe
    method: str
    seeds: list[int]

    @property
    def train(self) -> Train:
        """How it trains."""
        return self.recipe.train_for(self.method)


OnEpoch = Callable[[int, float], None]
OnTrained = Callable[[int, FairTrainer], None]


@dataclass
class Outcome:
    """What a trial found.

    Attributes
    ----------
    found : measure -> value for each seed, on the validation (or test) data.
    seeds, train_s : of the trainings.
    """

    found: dict[str, list[float]]
    seeds: list[int]
    train_s: float

    def mean(self, name: str) -> float:
        """Return the mean over seeds."""
        return float(np.mean(self.found[name]))


def choose_protocol(plan: Plan, device: str) -> Protocol:
    """Return tolerances and score ranges; where the recipe asks for quantiles, the reference model is trained for them."""
    if not plan.needs_protocol:
        return plan.plain_protocol()
    recipe, seed = plan.recipe, plan.seeds(0)[0]
    data = plan.dataset(seed)
    trainer = _train(recipe, recipe.reference, data, data.tasks, seed, device, None)
    predictions = trainer.predict(data.val.loader(8192, device=resolve_device(device)), embeddings=True)
    return Protocol.choose(recipe, recipe.reference, seed, predictions)


def run_trial(
    plan: Plan,
    recipe: Recipe,
    method: str,
    seeds: Sequence[int],
    protocol: Protocol,
    *,
    device: str = "auto",
    part: str = "val",
    on_epoch: OnEpoch | None = None,
    on_trained: OnTrained | None = None,
) -> Outcome:
    """Train a candidate once a seed and measure it.

    Raises
    ------
    UndefinedError : an objective is not defined.
    DivergenceError : a loss was not finite.
    """
    found: dict[str, list[float]] = {m.name: [] for m in plan.measures}
    began = time.perf_counter()
    for i, seed in enumerate(seeds):
        data = plan.dataset(seed)
        tasks = protocol.freeze(data.tasks)
        trainer = _train(recipe, method, data, tasks, seed, device, on_epoch if i == 0 else None)
        predictions = trainer.predict(getattr(data, part).loader(8192, device=resolve_device(device)))
        for name, value in measured(plan, predictions, protocol).items():
            found[name].append(value)
        if on_trained is not None:
            on_trained(seed, trainer)
    return Outcome(found, list(seeds), time.perf_counter() - began)


def measured(plan: Plan, predictions: Predictions, protocol: Protocol) -> dict[str, float]:
    """Return measure -> value of one model's predictions."""
    return {m.name: value_of(m, predictions, protocol.deltas, plan.recipe) for m in plan.measures}


def _train(
    recipe: Recipe,
    method: str,
    data: Dataset,
    tasks: tuple[Task, ...],
    seed: int,
    device: str,
    on_epoch: OnEpoch | None,
) -> FairTrainer:
    where = resolve_device(device)
    trainer = make_trainer(recipe, method, dataclasses.replace(data, tasks=tasks), tasks, seed, device=where)
    if on_epoch is not None:
        _listen(trainer, on_epoch)
    settings = recipe.train_for(method)
    sources = loaders(data, settings.batch_size, seed, torch.device(where))
    trainer.train(sources["train"], None, settings.epochs, sources["val"])
    return trainer


def _listen(trainer: FairTrainer, on_epoch: OnEpoch) -> None:
    """Call ``on_epoch`` with each epoch's validation score; it may raise TrialPruned."""
    judge, epochs = trainer.select_by, itertools.count()
    if judge is None:
        return

    def judged(results: Any) -> float:
        score = judge(results)
        on_epoch(next(epochs), score)
        return score

    trainer.select_by = judged
