"""What a study searches over: the ranges that methods declare with their settings, and a recipe's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import optuna
from optuna.distributions import CategoricalChoiceType, CategoricalDistribution, FloatDistribution, IntDistribution

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.files import Json
from libmtl_fair.libmtl.registry import OUR_ARCHITECTURES, OUR_WEIGHTINGS
from libmtl_fair.recipe.schema import Recipe

Path = tuple[str, ...]
Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
_ENTRIES = ("low", "high", "log", "choices")
_WIDTHS = ([64, 32], [128, 64], [256, 128])
_SHARED: Mapping[str, tuple[Path, Json | None]] = {
    "lr": (("train", "optimizer", "lr"), {"low": 5e-4, "high": 1e-2, "log": True}),
    "dropout": (("model", "dropout"), {"low": 0.0, "high": 0.4}),
    "hidden": (("model", "hidden"), None),
    "weight_decay": (("train", "optimizer", "weight_decay"), {"low": 1e-6, "high": 1e-2, "log": True}),
    "batch_size": (("train", "batch_size"), None),
    "epochs": (("train", "epochs"), None),
}
"""What is no setting of a method: where it stands in a recipe, and its built-in range."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a study: ``path`` is where its value goes in the method's entry of a recipe.

    ``entry`` is ``low``, ``high`` (both included; two whole numbers give whole numbers) and ``log``, or ``choices``;
    ``distribution`` Optuna's form of it, in which a list is one choice, written ``128-64``.
    """

    name: str
    path: Path
    entry: Json
    distribution: Distribution

    @property
    def ends(self) -> tuple[object, object]:
        """The first and the last value."""
        values = self.entry.get("choices") or (self.entry["low"], self.entry["high"])
        return values[0], values[-1]

    def contains(self, value: object) -> bool:
        """Whether the value (a recipe's) lies in the range."""
        if isinstance(self.distribution, CategoricalDistribution):
            return label(value) in self.distribution.choices
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.distribution.low <= value <= self.distribution.high

    def suggest(self, trial: optuna.Trial) -> object:
        """Return the trial's value, as recipes write it."""
        found = trial._suggest(self.name, self.distribution)
        return next((choice for choice in self.entry.get("choices", ()) if label(choice) == found), found)

    def described(self) -> Json:
        """Return plain values, for the study's fingerprint."""
        return {"path": ".".join(self.path), "log": False, **self.entry}


def label(choice: object) -> CategoricalChoiceType:
    """Return a choice as Optuna stores it: a list of widths as ``128-64``."""
    if isinstance(choice, list | tuple):
        return "-".join(str(item) for item in choice)
    if choice is None or isinstance(choice, bool | int | float | str):
        return choice
    raise RecipeError(f"tune.space: a choice is a number, a text, true/false or a list, found {choice!r}")


def make_space(recipe: Recipe) -> dict[str, tuple[Parameter, ...]]:
    """Return method -> its parameters; the methods are ``tune.methods``, else the first that is not the reference."""
    methods, asked = (recipe.tune.methods, recipe.tune.space) if recipe.tune else (None, None)
    if methods is None:
        trained = (name for name, method in recipe.methods.items() if method.post is None and name != recipe.reference)
        methods = tuple(trained)[:1] or (recipe.reference,)
    space = {}
    for method in methods:
        if method not in recipe.methods:
            raise recipe.error(("tune", "methods"), unknown("method", method, recipe.methods))
        known, found = _built_in(recipe, method, asked or ()), []
        for name, entry in (asked or {name: "builtin" for name in known if name != "weight_decay"}).items():
            path = (_SHARED.get(name) or known.get(name) or (tuple(name.split(".")), None))[0]
            try:
                values, in_study = _entry(name, entry, known), f"{method}.{name}" if len(methods) > 1 else name
                found.append(Parameter(in_study, path, values, _distribution(in_study, values)))
            except RecipeError as error:
                raise recipe.error(("tune", "space", name), str(error)) from error
        space[method] = tuple(found)
    return space


def _built_in(recipe: Recipe, method: str, asked: Iterable[str]) -> dict[str, tuple[Path, Json]]:
    """Return name -> place and range: of the method's and its architecture's settings (whole numbers last), then the shared ones.

    A method of several forms has the ranges of the one that its settings, and those ``asked`` for, belong to.
    """
    model, found = recipe.model_for(method), {}
    weighting = OUR_WEIGHTINGS.get(recipe.methods[method].weighting)
    given = recipe.methods[method].args
    for cls, place in ((weighting, ()), (OUR_ARCHITECTURES.get(model.architecture), ("arch_args",))):
        if (settings := getattr(cls, "settings_class", None)) is None:
            continue
        ranges, fields = settings.search_space(given), settings.model_fields
        if other := {name: fields[name].default for name in asked if name in fields and name not in ranges}:
            ranges = ranges | settings.search_space({**given, **other})
        for name, entry in sorted(ranges.items(), key=lambda item: isinstance(item[1].get("low"), int)):
            found[name] = ((*place, name), entry)
    found |= {name: (path, entry) for name, (path, entry) in _SHARED.items() if entry is not None}
    widths = [*_WIDTHS, *([list(model.hidden)] if list(model.hidden) not in _WIDTHS else [])]
    return {**found, "hidden": (_SHARED["hidden"][0], {"choices": widths})}


def _entry(name: str, entry: object, known: Mapping[str, tuple[Path, Json]]) -> Json:
    """Return a recipe's entry in its full form."""
    if entry == "builtin":
        if name not in known:
            raise RecipeError(f"tune.space: {unknown('built-in range', name, known)}")
        entry = known[name][1]
    if isinstance(entry, list):
        entry = {"choices": entry}
    if not isinstance(entry, dict) or not entry:
        raise RecipeError(
            f"tune.space: {name} expects builtin, a list of choices, or {{low: 0.01, high: 1.0, log: true}}, found {entry!r}"
        )
    for key, value in entry.items():
        if key not in _ENTRIES:
            raise RecipeError(f"tune.space: {name}: {unknown('entry', key, _ENTRIES)}")
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if key in ("low", "high") and value is not None and not number:
            raise RecipeError(f"tune.space: {name}.{key} must be a number, found {value!r}")
    return {key: value for key, value in entry.items() if value is not None}


def _distribution(name: str, entry: Json) -> Distribution:
    low, high, log, choices = map(entry.get, _ENTRIES)
    if choices is not None:
        if len(choices) < 2:
            raise RecipeError(f"tune.space: {name} needs at least two choices, found {choices}")
        return CategoricalDistribution([label(choice) for choice in choices])
    if low is None or high is None or not low < high or (log and low <= 0):
        rule = "0 < low < high with log: true" if log else "low < high"
        raise RecipeError(f"tune.space: {name} expects {rule}, found low={low}, high={high}")
    kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
    return kind(low, high, log=bool(log))


def changed(recipe: Recipe, method: str, values: Mapping[Path, object]) -> Recipe:
    """Return the recipe with one method only, some of its entries changed, and no ``tune`` section."""
    plain = recipe.to_dict()
    entry, names = plain["methods"][method], _names(recipe, method)
    start, most = entry.get("lambda_0"), entry.get("lambda_max")
    for path, value in values.items():
        where = entry
        for key in path[:-1]:
            where = where.setdefault(key, {})
        if len(path) == 1:  # a setting that the recipe gives under another of its names
            one = names.get(path[0], path[0])
            where = plain["methods"][method] = entry = {k: v for k, v in entry.items() if names.get(k, k) != one}
        where[path[-1]] = value
    if ("lambda_max",) in values and ("lambda_0",) not in values and start is not None:
        # A lambda that starts at its bound, as recipes write it, stays there; others start within the new bound.
        entry["lambda_0"] = entry["lambda_max"] if start == most else min(start, entry["lambda_max"])
    return Recipe.from_dict({**plain, "methods": {method: entry}, "tune": None}, recipe._source)


def _names(recipe: Recipe, method: str) -> Mapping[str, str]:
    """Return another name -> setting, of a method's weighting."""
    weighting = OUR_WEIGHTINGS.get(recipe.methods[method].weighting)
    return weighting.settings_class.aliases if weighting else {}


def current(recipe: Recipe, method: str, parameter: Parameter, args: Mapping[str, object] | None = None) -> object:
    """Return the value of a parameter as the recipe has it, None if nothing says; ``args`` replaces the method's own."""
    head, last, spec, model = parameter.path[0], parameter.path[-1], recipe.methods[method], recipe.model_for(method)
    if head == "train":
        train = recipe.train_for(method)
        return getattr(train.optimizer if "optimizer" in parameter.path else train, last, None)
    if head in ("model", "arch_args"):
        return getattr(model, last, None) if head == "model" else model.arch_args.get(last)
    own, weighting = spec.args if args is None else args, OUR_WEIGHTINGS.get(spec.weighting)
    if weighting is None or last in own:
        return own.get(last)
    last = "prototypes_per_task" if last == "k" else _names(recipe, method).get(last, last)
    return getattr(weighting.settings_class.from_args(spec.weighting, own), last, None)
