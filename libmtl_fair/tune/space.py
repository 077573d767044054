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
from libmtl_fair.libmtl.registry import OUR_ARCHITECTURES, OUR_WEIGHTINGS
from libmtl_fair.recipe.schema import Recipe

Entry = dict[str, Any]
Path = tuple[str, ...]


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
    path: Path
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[object, ...] | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        if self.choices is not None:
            if len(self.choices) < 2:
                raise RecipeError(f"tune.space: {self.name} needs at least two choices, found {list(self.choices)}")
        elif self.low is None or self.high is None or not self.low < self.high or (self.log and self.low <= 0):
            rule = "0 < low < high with log: true" if self.log else "low < high"
            raise RecipeError(f"tune.space: {self.name} expects {rule}, found low={self.low}, high={self.high}")

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna's."""
        return self._range() if self.choices is None else CategoricalDistribution([label(c) for c in self.choices])

    def _range(self) -> IntDistribution | FloatDistribution:
        assert self.low is not None
        assert self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log)
        return FloatDistribution(float(self.low), float(self.high), log=self.log)

    def ends(self) -> tuple[object, object]:
        """Return the first and the last value."""
        return (self.low, self.high) if self.choices is None else (self.choices[0], self.choices[-1])

    def contains(self, value: object) -> bool:
        """Whether the value (a recipe's) lies in the range."""
        if self.choices is not None:
            return any(label(choice) == label(value) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self._range().low <= value <= self._range().high

    def suggest(self, trial: optuna.Trial) -> object:
        """Return the trial's value, as recipes write it."""
        found = trial._suggest(self.name, self.distribution())
        return next((choice for choice in self.choices or () if label(choice) == found), found)

    def described(self) -> dict[str, object]:
        """Return plain values, for the study's fingerprint."""
        plain = {key: value for key, value in asdict(self).items() if value is not None and key != "name"}
        return {**plain, "path": ".".join(self.path), **({"choices": list(self.choices)} if self.choices else {})}


def label(choice: object) -> CategoricalChoiceType:
    """Return a choice as Optuna stores it: a list of widths as ``128-64``.

    >>> label([128, 64])
    '128-64'
    """
    if isinstance(choice, list | tuple):
        return "-".join(str(item) for item in choice)
    if choice is None or isinstance(choice, bool | int | float | str):
        return choice
    raise RecipeError(f"tune.space: a choice is a number, a text, true/false or a list, found {choice!r}")


_HIDDEN = ([64, 32], [128, 64], [256, 128])
_SHARED: Mapping[str, tuple[Path, Entry | None]] = {
    "lr": (("train", "optimizer", "lr"), {"low": 5e-4, "high": 1e-2, "log": True}),
    "dropout": (("model", "dropout"), {"low": 0.0, "high": 0.4}),
    "hidden": (("model", "hidden"), None),
    "weight_decay": (("train", "optimizer", "weight_decay"), {"low": 1e-6, "high": 1e-2, "log": True}),
    "batch_size": (("train", "batch_size"), None),
    "epochs": (("train", "epochs"), None),
}
"""What is no setting of a method: where it stands in a recipe, and its built-in range."""


def make_space(recipe: Recipe) -> dict[str, tuple[Parameter, ...]]:
    """Return method -> its parameters; the methods are ``tune.methods``, else the first that is not the reference.

    Raises
    ------
    RecipeError : an unknown method or parameter, or a range that does not make sense.
    """
    methods = recipe.tune.methods if recipe.tune else None
    for name in methods or ():
        if name not in recipe.methods:
            raise recipe.error(("tune", "methods"), unknown("method", name, recipe.methods))
    if methods is None:
        methods = tuple(name for name in recipe.methods if name != recipe.reference)[:1] or (recipe.reference,)
    return {name: _of_method(recipe, name, f"{name}." if len(methods) > 1 else "") for name in methods}


def _of_method(recipe: Recipe, method: str, prefix: str) -> tuple[Parameter, ...]:
    model = recipe.model_for(method)
    own = _declared(OUR_WEIGHTINGS.get(recipe.methods[method].weighting))
    structure = _declared(OUR_ARCHITECTURES.get(model.architecture))
    shared = {name: entry for name, (_, entry) in _SHARED.items() if entry is not None}
    widths = [*_HIDDEN, *([list(model.hidden)] if list(model.hidden) not in _HIDDEN else [])]
    known = {**own, **structure, **shared, "hidden": {"choices": widths}}
    asked = recipe.tune.space if recipe.tune else None
    found = []
    for name, entry in (asked or {name: "builtin" for name in known if name != "weight_decay"}).items():
        path = ("arch_args", name) if name in structure else tuple(name.split("."))
        try:
            values = _entry(name, entry, known)
            found.append(Parameter(prefix + name, _SHARED[name][0] if name in _SHARED else path, **values))
        except RecipeError as error:
            raise recipe.error(("tune", "space", name), str(error)) from error
    return tuple(found)


def _declared(method: type[Any] | None) -> Mapping[str, Entry]:
    """Return the ranges that a method's settings declare; whole numbers last, the order in which studies draw them."""
    settings = getattr(method, "settings_class", None)
    found = settings.search_space() if settings else {}
    return dict(sorted(found.items(), key=lambda item: isinstance(item[1].get("low"), int)))


def _entry(name: str, entry: object, known: Mapping[str, Entry]) -> Entry:
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
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not number:
            raise RecipeError(f"tune.space: {name}.{key} must be a number, found {value!r}")
    return {**entry, "choices": tuple(entry["choices"])} if "choices" in entry else dict(entry)


def changed(recipe: Recipe, method: str, values: Mapping[Path, object]) -> Recipe:
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
    return Recipe.from_dict({**plain, "methods": {method: entry}, "tune": None}, recipe._source)


def current(recipe: Recipe, method: str, parameter: Parameter, args: Mapping[str, object] | None = None) -> object:
    """Return the value of a parameter as the recipe has it, None if nothing says; ``args`` replaces the method's own."""
    head, last = parameter.path[0], parameter.path[-1]
    train, model, spec = recipe.train_for(method), recipe.model_for(method), recipe.methods[method]
    if head == "train":
        return getattr(train.optimizer if "optimizer" in parameter.path else train, last, None)
    if head == "model":
        return getattr(model, last, None)
    if head == "arch_args":
        return model.arch_args.get(last)
    own = spec.args if args is None else args
    weighting = OUR_WEIGHTINGS.get(spec.weighting)
    if weighting is None or last in own:
        return own.get(last)
    made = weighting.settings_class.from_args(spec.weighting, own)
    return getattr(made, "prototypes_per_task" if last == "k" else last, None)
