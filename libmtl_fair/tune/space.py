"""What a study searches over: built-in ranges of every method, and a recipe's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalChoiceType,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.recipe.schema import Recipe

Number = int | float
Entry = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a study: a range, or a list of choices.

    Attributes
    ----------
    name : in the study; where several methods are tuned, ``<method>.<setting>``.
    path : where its value goes in the method's entry of a recipe.
    low, high : ends of the range, both included; two whole numbers give whole numbers.
    log : search the logarithm.
    choices : instead of a range; a list is one choice, written ``128-64``.
    """

    name: str
    path: tuple[str, ...]
    low: Number | None = None
    high: Number | None = None
    log: bool = False
    choices: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        if self.choices is not None:
            if len(self.choices) < 2:
                raise RecipeError(f"tune.space: {self.name} needs at least two choices, found {list(self.choices)}")
            return
        low, high = self.low, self.high
        if low is None or high is None or not low < high or (self.log and low <= 0):
            rule = "0 < low < high with log: true" if self.log else "low < high"
            raise RecipeError(f"tune.space: {self.name} expects {rule}, found low={low}, high={high}")

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna's."""
        if self.choices is not None:
            return CategoricalDistribution([label(choice) for choice in self.choices])
        assert self.low is not None
        assert self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log)
        return FloatDistribution(float(self.low), float(self.high), log=self.log)

    def value(self, found: Any) -> Any:
        """Return a recipe's value for the study's."""
        if self.choices is None:
            return found
        return next((choice for choice in self.choices if label(choice) == found), found)

    def contains(self, value: Any) -> bool:
        """Whether the value (a recipe's) lies in the range."""
        if self.choices is not None:
            return any(label(choice) == label(value) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        assert self.low is not None
        assert self.high is not None
        return self.low <= value <= self.high

    def suggest(self, trial: optuna.Trial) -> Any:
        """Return the trial's value, as recipes write it."""
        if self.choices is not None:
            return self.value(trial.suggest_categorical(self.name, [label(choice) for choice in self.choices]))
        assert self.low is not None
        assert self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.name, self.low, self.high, log=self.log)
        return trial.suggest_float(self.name, float(self.low), float(self.high), log=self.log)

    def described(self) -> dict[str, Any]:
        """Return plain values, for the study's fingerprint."""
        plain = {key: value for key, value in asdict(self).items() if value is not None and key != "name"}
        return {**plain, "path": ".".join(self.path), **({"choices": list(self.choices)} if self.choices else {})}


def label(choice: Any) -> CategoricalChoiceType:
    """Return a choice as Optuna stores it: a list of widths as ``128-64``.

    >>> label([128, 64])
    '128-64'
    """
    if isinstance(choice, (list, tuple)):
        return "-".join(str(item) for item in choice)
    if choice is None or isinstance(choice, (bool, int, float, str)):
        return choice
    raise RecipeError(f"tune.space: a choice is a number, a text, true/false or a list, found {choice!r}")


_WEIGHTINGS: Mapping[str, Mapping[str, Entry]] = {
    "ReLiF": {
        "target": {"low": 0.01, "high": 0.2, "log": True},
        "eta": {"low": 0.01, "high": 0.3, "log": True},
        "lambda_max": {"low": 1.0, "high": 20.0, "log": True},
        "beta": {"low": 0.05, "high": 0.5, "log": True},
        "k": {"low": 16, "high": 128, "log": True},
    },
    "FairMT": {
        "epsilon": {"low": 0.005, "high": 0.1, "log": True},
        "mu": {"low": 0.1, "high": 1.0, "log": True},
        "rho": {"low": 0.01, "high": 0.5, "log": True},
    },
    "LambdaMix": {"lam": {"low": 0.5, "high": 1.0}},
    "GroupRegulariser": {"lam": {"low": 0.3, "high": 1.0}},
}
_ARCHITECTURES: Mapping[str, Mapping[str, Entry]] = {
    "FairBranch": {"threshold": {"low": 0.2, "high": 0.9}, "branch_every": {"low": 1, "high": 5}}
}
_SHARED: Mapping[str, Entry] = {
    "lr": {"low": 5e-4, "high": 1e-2, "log": True},
    "dropout": {"low": 0.0, "high": 0.4},
    "hidden": {"choices": [[64, 32], [128, 64], [256, 128]]},
}
_MORE: Mapping[str, Entry] = {"weight_decay": {"low": 1e-6, "high": 1e-2, "log": True}}
_PATHS: Mapping[str, tuple[str, ...]] = {
    "lr": ("train", "optimizer", "lr"),
    "weight_decay": ("train", "optimizer", "weight_decay"),
    "batch_size": ("train", "batch_size"),
    "epochs": ("train", "epochs"),
    "hidden": ("model", "hidden"),
    "dropout": ("model", "dropout"),
}


def tuned_methods(recipe: Recipe) -> tuple[str, ...]:
    """Return the methods that a study tunes: ``tune.methods``, else the first that is not the reference.

    Raises
    ------
    RecipeError : a name that is no method of the recipe.
    """
    asked = recipe.tune.methods if recipe.tune else None
    if asked is None:
        others = [name for name in recipe.methods if name != recipe.reference]
        return (others[0] if others else recipe.reference,)
    for name in asked:
        if name not in recipe.methods:
            raise recipe.error(("tune", "methods"), unknown("method", name, recipe.methods))
    return tuple(asked)


def built_in(recipe: Recipe, method: str) -> dict[str, Entry]:
    """Return the built-in ranges of a method's weighting and architecture, learning rate, dropout and widths."""
    ranges = dict(_WEIGHTINGS.get(recipe.methods[method].weighting, {}))
    ranges |= _ARCHITECTURES.get(recipe.model_for(method).architecture, {})
    shared = {name: dict(entry) for name, entry in _SHARED.items()}
    own = list(recipe.model_for(method).hidden)
    if own not in shared["hidden"]["choices"]:
        shared["hidden"]["choices"] = [*shared["hidden"]["choices"], own]
    return {**ranges, **shared}


def make_space(recipe: Recipe) -> dict[str, tuple[Parameter, ...]]:
    """Return method -> its parameters.

    Raises
    ------
    RecipeError : an unknown parameter, or a range that does not make sense.
    """
    methods = tuned_methods(recipe)
    return {name: _of_method(recipe, name, f"{name}." if len(methods) > 1 else "") for name in methods}


def _of_method(recipe: Recipe, method: str, prefix: str) -> tuple[Parameter, ...]:
    known = built_in(recipe, method)
    asked: Mapping[str, Any] = (recipe.tune.space if recipe.tune else None) or dict.fromkeys(known, "builtin")
    found = []
    for name, entry in asked.items():
        try:
            path = _path(recipe, method, name)
            found.append(Parameter(prefix + name, path, **_entry(name, entry, {**_MORE, **known})))
        except RecipeError as error:
            raise recipe.error(("tune", "space", name), str(error)) from error
    return tuple(found)


def _path(recipe: Recipe, method: str, name: str) -> tuple[str, ...]:
    if name in _PATHS:
        return _PATHS[name]
    if "." in name:
        return tuple(name.split("."))
    if name in _ARCHITECTURES.get(recipe.model_for(method).architecture, {}):
        return ("arch_args", name)
    return (name,)


def _entry(name: str, entry: Any, known: Mapping[str, Entry]) -> Entry:
    if entry == "builtin":
        if name not in known:
            raise RecipeError(f"tune.space: {unknown('built-in range', name, known)}")
        entry = known[name]
    if isinstance(entry, list):
        entry = {"choices": entry}
    allowed = ("low", "high", "log", "choices")
    if not isinstance(entry, dict) or not entry:
        raise RecipeError(
            f"tune.space: {name} expects builtin, a list of choices, or {{low: 0.01, high: 1.0, log: true}}, found {entry!r}"
        )
    for key in entry:
        if key not in allowed:
            raise RecipeError(f"tune.space: {name}: {unknown('entry', key, allowed)}")
    for key in ("low", "high"):
        value = entry.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value)):
            raise RecipeError(f"tune.space: {name}.{key} must be a number, found {value!r}")
    return {**entry, "choices": tuple(entry["choices"])} if "choices" in entry else dict(entry)


def _finite(value: Number) -> bool:
    return math.isfinite(value)


def changed(recipe: Recipe, method: str, values: Mapping[tuple[str, ...], Any], **more: Any) -> Recipe:
    """Return the recipe with one method only, some of its entries changed, and no ``tune`` section."""
    plain = recipe.to_dict()
    entry = plain["methods"][method]
    start, most = entry.get("lambda_0"), entry.get("lambda_max")
    for path, value in values.items():
        where = entry
        for key in path[:-1]:
            where = where.setdefault(key, {})
        where[path[-1]] = list(value) if isinstance(value, tuple) else value
    if ("lambda_max",) in values and ("lambda_0",) not in values and start is not None:
        # A lambda that starts at its bound, as recipes write it, stays there; others start within the new bound.
        entry["lambda_0"] = entry["lambda_max"] if start == most else min(start, entry["lambda_max"])
    plain |= {"methods": {method: entry}, "tune": None, **more}
    return Recipe.from_dict(plain, recipe._source)


def current(recipe: Recipe, method: str, parameter: Parameter, args: Mapping[str, Any] | None = None) -> Any:
    """Return the value of a parameter as the recipe has it, None if nothing says; ``args`` replaces the method's own."""
    from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS

    head, last = parameter.path[0], parameter.path[-1]
    if head == "train":
        train = recipe.train_for(method)
        return getattr(train.optimizer if "optimizer" in parameter.path else train, last, None)
    if head == "model":
        return getattr(recipe.model_for(method), last, None)
    if head == "arch_args":
        return recipe.model_for(method).arch_args.get(last)
    own = recipe.methods[method].args if args is None else args
    cls: Any = OUR_WEIGHTINGS.get(recipe.methods[method].weighting)
    if cls is None or last in own:
        return own.get(last)
    made = cls.settings_class.from_args(recipe.methods[method].weighting, own)
    return getattr(made, "prototypes_per_task" if last == "k" else last, None)
