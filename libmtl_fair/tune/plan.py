"""What a study asks, the settings that it tries first, and its fingerprint: a changed question does not go on with old trials."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import optuna

from libmtl_fair.data import Dataset
from libmtl_fair.errors import CheckpointError, RecipeError, unknown
from libmtl_fair.files import Json
from libmtl_fair.recipe.build import check, make_dataset
from libmtl_fair.recipe.checked import check_data
from libmtl_fair.recipe.networks import by_groups
from libmtl_fair.recipe.people import People, people_of
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.recipe.sections import Method, Train, Tune
from libmtl_fair.recipe.yaml_source import Source
from libmtl_fair.tasks import Task
from libmtl_fair.tune.evidence import Counts, Utility
from libmtl_fair.tune.objectives import Constraint, Measure, parse_constraint, parse_measure
from libmtl_fair.tune.space import Parameter, changed, current, label, make_space

OBJECTIVES = ("macro_auc", "eo_difference")
"""Objectives where neither the recipe nor the caller names some, and a task is binary."""

SLOT, ROLE, METHOD, ARGS, FIXED = "slot", "role", "method", "args", "fixed"
"""Attributes of trials."""
DEGENERATE = "degenerate tasks"
"""Name of the constraint that every trial has."""
FINGERPRINT, DESCRIBED, RECIPE = "fingerprint", "about", "recipe"
"""Attributes of studies."""
COMMON = "seeds of every trial"
"""Of a study's description; studies of before gave each trial seeds, and with resplit rows, of its own."""
Queued = tuple[Json, Json]
"""Parameters and attributes that a trial starts with."""


def default_objectives(tasks: Sequence[Task]) -> tuple[str, ...]:
    """Return :data:`OBJECTIVES`; where no task is binary the first one's own metric, and how far several tasks' scores lie apart.

    >>> from libmtl_fair.tasks import Depth, Segmentation
    >>> default_objectives([Segmentation("rooms", 13), Depth("depth")])
    ('rooms/mIoU', 'bias')
    """
    if any(task.kind == "binary" for task in tasks):
        return OBJECTIVES
    metric, _ = tasks[0].shown[tasks[0].headline]
    return (f"{tasks[0].name}/{metric}", "bias")[: len(tasks)]


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


@dataclass(frozen=True)
class Outcome:
    """What a trial found on validation data; each list has an entry a seed.

    ``found``: measure -> its value; ``upper``: disparity -> the upper end of its interval; ``counts``, ``utility``: what verdicts
    and guards need; ``degenerate``: task -> why its decisions are none, in some seed; ``train_s``: seconds of training.
    """

    seeds: list[int]
    found: dict[str, list[float]] = field(default_factory=dict)
    upper: dict[str, list[float]] = field(default_factory=dict)
    counts: list[Counts] = field(default_factory=list)
    utility: list[Utility] = field(default_factory=list)
    degenerate: dict[str, str] = field(default_factory=dict)
    train_s: float = 0.0

    def mean(self, name: str) -> float:
        """Return the mean over seeds."""
        return float(np.mean(self.found[name]))

    def excess(self, rule: Constraint) -> float:
        """Return by how much a constraint is violated: of a disparity the upper end of the interval, which also has to keep to it."""
        ends = self.upper.get(rule.measure.name) if rule.at_most else None
        return rule.excess(float(np.mean(ends)) if ends else self.mean(rule.measure.name))


@dataclass(frozen=True)
class Plan:
    """A study's question, checked against the data."""

    recipe: Recipe
    objectives: tuple[Measure, ...]
    constraints: tuple[Constraint, ...]
    space: Mapping[str, tuple[Parameter, ...]]
    data: dict[int, Dataset] = field(compare=False, repr=False)
    audits: dict[int, People] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def make(cls, recipe: Recipe, objectives: Sequence[str] | None = None) -> Plan:
        """Read the plan of a recipe; ``objectives`` replace its own."""
        check(recipe)
        tune, seed = recipe.tune or Tune(), recipe.seeds[0]
        if recipe.data.resplit and recipe.data.test_seed is None:
            kept = recipe.data.model_copy(update={"test_seed": seed})
            recipe = recipe.model_copy(update={"data": kept})
        data = make_dataset(recipe, seed)
        check_data(recipe, data)
        kinds, deltas = {task.name: task.kind for task in data.tasks}, [str(d) for d in recipe.audit.deltas]

        def parse(name: str) -> Measure:
            return parse_measure(name, kinds, list(data.groups), deltas)

        asked = tuple(map(parse, objectives or tune.objectives or default_objectives(data.tasks)))
        rules = tuple(parse_constraint(text, parse) for text in tune.constraints or ())
        plan = cls(recipe, asked, rules, make_space(recipe), {seed if recipe.data.resplit else 0: data})
        plan._check()
        return plan

    def _check(self) -> None:
        if self.tune.pruner is not None and (len(self.objectives) > 1 or self.objectives[0].fair):
            raise self.recipe.error(
                ("tune", "pruner"),
                "pruning compares one utility after each epoch: give one objective such as macro_auc, and the fairness "
                "as a constraint, such as eo_difference <= 0.05",
            )
        for method in (self.recipe.reference, *self.space):
            if why := _untunable(self.recipe.methods[method]):
                raise self.recipe.error(("methods", method), f"this is {why}")
        self.known()
        for method, parameters in self.space.items():
            for end in (0, 1):
                try:
                    check(changed(self.recipe, method, {p.path: p.ends[end] for p in parameters}))
                except RecipeError as error:
                    why = f"the search space of {method} leads to settings that do not make sense: {error}"
                    raise RecipeError(why) from error

    @property
    def tune(self) -> Tune:
        """The recipe's ``tune`` section."""
        return self.recipe.tune or Tune()

    @property
    def sampler(self) -> str:
        """Name of the sampler."""
        return self.tune.sampler or "tpe"

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Objectives and what constraints are about, each once."""
        return tuple(dict.fromkeys([*self.objectives, *(c.measure for c in self.constraints)]))

    def described(self) -> Json:
        """Return what decides the results of the study, as plain values: the content of its fingerprint."""
        kept, plain = ("data", "model", "train", "seeds", "methods", "audit", "metrics"), self.recipe.to_dict()
        return {
            "recipe": {key: plain[key] for key in kept},
            "objectives": {m.name: m.direction for m in self.objectives},
            "constraints": [c.text for c in self.constraints],
            "space": {p.name: p.described() for parameters in self.space.values() for p in parameters},
            "sampler": self.sampler,
            "pruner": self.tune.pruner,
            "seeds_per_trial": self.tune.seeds_per_trial,
            COMMON: self.seeds,
            **({"enqueue": list(self.tune.enqueue)} if self.tune.enqueue else {}),
        }

    def known(self) -> list[Queued]:
        """Return the settings tried first: unregularised, as the recipe has them, default, published, and its ``enqueue``."""
        found = [_fixed("baseline", self.recipe.reference)]
        for method in self.space:
            if method != self.recipe.reference:
                found.append(self._known("as written", method, None))
            if self.recipe.methods[method].args:
                found.append(self._known("defaults", method, {}))
            if self.recipe.methods[method].weighting == "ReLiF":
                found.append(_fixed("published", method, {"preset": "paper"}))
        for i, entry in enumerate(self.tune.enqueue):
            try:
                found.append(self._enqueued(entry))
            except RecipeError as error:
                raise self.recipe.error(("tune", "enqueue", i), str(error)) from error
        return found

    def _known(self, role: str, method: str, args: Json | None) -> Queued:
        """Return settings of a method: as parameters where they lie in the space, else fixed."""
        values = {p.name: current(self.recipe, method, p, args) for p in self.space[method]}
        params, marks = _fixed(role, method, args)
        if all(p.contains(values[p.name]) for p in self.space[method]):
            params, marks = self._params(method, values), {**marks, FIXED: False}
        return params, marks

    def _params(self, method: str, values: Mapping[str, object]) -> Json:
        chosen = {"method": method} if len(self.space) > 1 else {}
        return chosen | {name: label(value) for name, value in values.items()}

    def _enqueued(self, entry: str | Mapping[str, object]) -> Queued:
        """Return a method as it is written, by name, or some settings, the others as the recipe has them."""
        if isinstance(entry, str):
            if (spec := self.recipe.methods.get(entry)) is None:
                raise RecipeError(unknown("method", entry, self.recipe.methods))
            if why := _untunable(spec):
                raise RecipeError(f"{entry} is {why}")
            return _fixed(entry, entry)
        given = dict(entry)
        method = str(given.pop("method", next(iter(self.space))))
        if method not in self.space:
            raise RecipeError(unknown("method", method, self.space))
        parameters = {p.name.removeprefix(f"{method}."): p for p in self.space[method]}
        for name, value in given.items():
            if name not in parameters:
                raise RecipeError(unknown("parameter", name, parameters))
            if not parameters[name].contains(value):
                raise RecipeError(f"{name} = {value!r} is outside of the search space; widen tune.space.{name}")
        values = {name: given.get(name, current(self.recipe, method, p)) for name, p in parameters.items()}
        inside = {p.name: values[name] for name, p in parameters.items() if p.contains(values[name])}
        return self._params(method, inside), {ROLE: "enqueued", METHOD: method}

    def candidate(self, trial: optuna.Trial) -> Candidate:
        """Return what a trial trains, asking the sampler for its parameters."""
        marks, recipe = trial.user_attrs, self.recipe
        method, values = marks.get(METHOD, next(iter(self.space))), {}
        if not marks.get(FIXED):
            method = next(iter(self.space))
            if len(self.space) > 1:
                method = trial.suggest_categorical("method", list(self.space))
            values = {p.path: p.suggest(trial) for p in self.space[method]}
        if marks.get(ARGS) is not None:
            spec = recipe.methods[method].model_copy(update={"args": dict(marks[ARGS])})
            recipe = recipe.model_copy(update={"methods": {**recipe.methods, method: spec}})
        return Candidate(changed(recipe, method, values), method, self.seeds)

    @property
    def seeds(self) -> list[int]:
        """The seeds of every trial, so that trials differ in their settings alone: the recipe's, then those after its last."""
        known = self.recipe.seeds
        more = (seed % 2**32 for seed in itertools.count(known[-1] + 1) if seed % 2**32 not in known)
        return list(itertools.islice(itertools.chain(known, more), self.tune.seeds_per_trial))

    def dataset(self, seed: int) -> Dataset:
        """Return the data for a seed; kept, since every trial asks for the same.

        With ``resplit`` the seeds have training and validation rows of their own and one test part (``test_seed``), so that no
        person who decides what is chosen is among those whom it is reported on.
        """
        key = seed if self.recipe.data.resplit else 0
        if key not in self.data:
            self.data[key] = make_dataset(self.recipe, seed)
        return self.data[key]

    def people(self, seed: int) -> People:
        """Return the audits of people for a seed's data; kept, too."""
        key = seed if self.recipe.data.resplit else 0
        if key not in self.audits:
            self.audits[key] = people_of(self.recipe, self.dataset(seed))
        return self.audits[key]


def _untunable(spec: Method) -> str:
    """Return why a method cannot be tuned, or "" where it can."""
    if spec.post is not None:
        return f"made of finished models (post: {spec.post}): it has no training to tune, and chooses its strength on validation"
    if spec.single_task or by_groups(spec):
        what = "a single-task method" if spec.single_task else "a method by task groups"
        return f"{what}, which is several models; tune one model"
    return ""


def _fixed(role: str, method: str, args: Json | None = None) -> Queued:
    """Return a method's settings as they stand, without parameters."""
    return {}, {ROLE: role, METHOD: method, FIXED: True, **({} if args is None else {ARGS: args})}


def fingerprint(described: Json) -> str:
    """Return sha256 (hex) of a plan's description."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def differences(old: Json, new: Json, where: str = "") -> Iterator[str]:
    """Yield a line for every entry that differs.

    >>> list(differences({"a": {"b": 1}}, {"a": {"b": 2}, "c": 3}))
    ['a.b: 1 -> 2', 'c: (none) -> 3']
    """
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key, ...), new.get(key, ...)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from differences(was, now, f"{where}{key}.")
        elif was != now:
            texts = ("(none)" if value is ... else json.dumps(value) for value in (was, now))
            yield f"{where}{key}: {' -> '.join(texts)}"


def stamp(study: optuna.Study, plan: Plan) -> None:
    """Write into a new study what it is about; refuse one of others' trials, or about something else: says what differs."""
    held, described = study.user_attrs, plan.described()
    if FINGERPRINT not in held:
        # Trials with a slot are those of a worker that has begun on another machine just now.
        if any(SLOT not in trial.user_attrs for trial in study.get_trials(deepcopy=False)):
            raise CheckpointError(
                f"study {study.study_name!r} has trials that libmtl-fair tune did not make; choose another name with --study"
            )
        study.set_user_attr(DESCRIBED, described)
        study.set_user_attr(RECIPE, {"recipe": plan.recipe.to_dict(), "file": plan.recipe._source.file})
        study.set_user_attr(FINGERPRINT, fingerprint(described))
    elif COMMON not in held[DESCRIBED]:
        raise RecipeError(
            f"study {study.study_name!r} was made by an earlier version, in which each trial had seeds of its own: old and new "
            "trials cannot be compared. Begin another study with --new-study (its trials are kept) or --study NAME"
        )
    elif held[FINGERPRINT] != fingerprint(described):
        lines = "\n".join(f"  {line}" for line in differences(held[DESCRIBED], json.loads(json.dumps(described))))
        raise RecipeError(
            f"study {study.study_name!r} was made with other settings (study -> now):\n{lines}\n"
            "Undo the change, or begin another study with --new-study (its trials are kept) or --study NAME"
        )


def study_recipe(study: optuna.Study) -> Recipe:
    """Return the recipe that a study is about.

    Raises
    ------
    CheckpointError
        The study was not made by this package.
    """
    held = study.user_attrs.get(RECIPE)
    if held is None:
        raise CheckpointError(f"study {study.study_name!r} holds no recipe: it was not made by libmtl-fair tune")
    return Recipe.from_dict(held["recipe"], Source(file=held["file"], data=held["recipe"]))
