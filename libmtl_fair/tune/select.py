"""From a study to one trial, and from a trial to a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from libmtl_fair.errors import FairMTLError, RecipeError
from libmtl_fair.recipe.schema import Recipe

TUNED = "tuned"


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ended with values.

    Raises
    ------
    FairMTLError : there is none.
    """
    found = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not found:
        raise FairMTLError(f"study {study.study_name!r} has no complete trial yet")
    return found


def front(study: optuna.Study) -> tuple[list[FrozenTrial], bool]:
    """Return (the Pareto front, True), or where no trial meets the constraints (those that violate them least, False)."""
    trials = complete(study)
    several = len(study.directions) > 1
    best = study.best_trials if several else _best_single(study, [t for t in trials if _excess(t) <= 0])
    if best:
        return sorted(best, key=lambda t: t.values), True
    least = min(_excess(t) for t in trials)
    return [t for t in trials if _excess(t) <= least + 1e-12], False


def _best_single(study: optuna.Study, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    if not trials:
        return []
    sign = 1 if study.directions[0] == StudyDirection.MAXIMIZE else -1
    return [max(trials, key=lambda t: sign * t.values[0])]


def _excess(trial: FrozenTrial) -> float:
    """Return the sum of violations of the constraints."""
    return sum(max(value, 0.0) for name, value in trial.constraints.items() if not name.isdigit())


def select(study: optuna.Study, max_disparity: float = 0.05) -> FrozenTrial:
    """Return the trial with the best first objective whose disparity is at most ``max_disparity``, on validation data.

    The disparity is the first objective that is minimised, else the first constraint. Where no trial is so fair, the fairest.

    Raises
    ------
    RecipeError : the study has no disparity.
    FairMTLError : it has no complete trial.
    """
    if (
        isinstance(max_disparity, bool)
        or not isinstance(max_disparity, (int, float))
        or not math.isfinite(max_disparity)
    ):
        raise RecipeError(f"max_disparity must be a number, found {max_disparity!r}")
    trials = complete(study)
    name = disparity_name(study)
    feasible = [t for t in trials if disparity(t, name) <= max_disparity]
    if not feasible:
        return min(trials, key=lambda t: (disparity(t, name), t.number))
    sign = 1 if study.directions[0] == StudyDirection.MAXIMIZE else -1
    return max(feasible, key=lambda t: (sign * t.values[0], -t.number))


def disparity_name(study: optuna.Study) -> str:
    """Return the name of the study's disparity: its first minimised objective, else what its first constraint is about.

    Raises
    ------
    RecipeError : it has none.
    """
    about = study.user_attrs.get("about", {})
    for name, direction in zip(about.get("objectives", {}), study.directions):
        if direction == StudyDirection.MINIMIZE:
            return str(name)
    for text in about.get("constraints", []):
        return str(text).split(" ")[0]
    raise RecipeError(
        f"study {study.study_name!r} has no disparity among objectives and constraints; choose a trial by number"
    )


def has_disparity(study: optuna.Study) -> bool:
    """Whether a study has a disparity: an objective that is minimised, or a constraint."""
    about = study.user_attrs.get("about", {})
    return StudyDirection.MINIMIZE in study.directions or bool(about.get("constraints"))


def disparity(trial: FrozenTrial, name: str) -> float:
    """Return a trial's value of a measure on validation data, mean over seeds."""
    return float(np.mean(trial.user_attrs["validation"][name]))


def knee(study: optuna.Study) -> FrozenTrial:
    """Return the trial of the front that is farthest from the line between the front's ends, objectives scaled to [0, 1].

    With more than two objectives it is the one nearest to the ideal point (the best of each objective).
    """
    trials, _ = front(study)
    signs = np.array([1.0 if d == StudyDirection.MINIMIZE else -1.0 for d in study.directions])
    values = np.array([t.values for t in trials]) * signs
    low, high = values.min(0), values.max(0)
    scaled = (values - low) / np.where(high > low, high - low, 1.0)
    if scaled.shape[1] == 2:
        # The ends are (0, 1) and (1, 0): the distance to their line grows with 1 - (x + y).
        return trials[int((1 - scaled.sum(1)).argmax())]
    return trials[int(np.linalg.norm(scaled, axis=1).argmin())]


def trial_by_number(study: optuna.Study, number: int) -> FrozenTrial:
    """Return a complete trial by its number.

    Raises
    ------
    RecipeError : there is none of that number, or it is not complete.
    """
    trials = study.get_trials(deepcopy=False)
    if not 0 <= number < len(trials):
        raise RecipeError(f"study {study.study_name!r} has trials 0 to {len(trials) - 1}, found trial {number}")
    trial = trials[number]
    if trial.state != TrialState.COMPLETE:
        why = trial.user_attrs.get("error", "")
        raise RecipeError(
            f"trial {number} of study {study.study_name!r} is {trial.state.name.lower()}, not complete. {why}"
        )
    return trial


def selection(how: str) -> int | float | None:
    """Return what a text asks for: a trial's number, a bound on the disparity, or None for ``knee`` and ``best``.

    Raises
    ------
    RecipeError : none of these.

    >>> selection("max_disparity=0.05"), selection("12"), selection("knee")
    (0.05, 12, None)
    """
    text = how.strip()
    if text in ("knee", "best"):
        return None
    if text.isdigit():
        return int(text)
    name, _, value = text.partition("=")
    try:
        bound = float(value)
    except ValueError:
        bound = math.nan
    if name.strip() != "max_disparity" or not math.isfinite(bound):
        raise RecipeError(f"--select expects max_disparity=0.05, knee, best, or the number of a trial, found {how!r}")
    return bound


def chosen(study: optuna.Study, how: str = "best") -> FrozenTrial:
    """Return the trial that a text asks for.

    ``max_disparity=0.05``: see :func:`select`; ``knee``: see :func:`knee`; a number: that trial; ``best``: of one objective
    the best trial that meets the constraints, of several the knee.

    Raises
    ------
    RecipeError : none of these, or no such trial.
    """
    wanted = selection(how)
    if isinstance(wanted, int):
        return trial_by_number(study, wanted)
    if wanted is not None:
        return select(study, wanted)
    if how.strip() == "best" and len(study.directions) == 1:
        return front(study)[0][0]
    return knee(study)


def to_recipe(trial: FrozenTrial, reference: Recipe | None = None, seeds: Sequence[int] | None = None) -> Recipe:
    """Return the recipe of a trial: its method, named ``tuned``, beside the reference of the study's recipe if that is given.

    Raises
    ------
    RecipeError : the trial was not made by :func:`tune`, or never began.
    """
    held: dict[str, Any] | None = trial.user_attrs.get("recipe")
    if held is None:
        raise RecipeError(f"trial {trial.number} holds no recipe: it was not made by libmtl_fair.tune, or never began")
    method = held["methods"][trial.user_attrs["method"]]
    methods = {TUNED: method}
    if reference is not None:
        plain = reference.to_dict()["methods"]
        methods = {reference.reference: plain[reference.reference], TUNED: method}
    return Recipe.from_dict(
        {**held, "methods": methods, **({} if seeds is None else {"seeds": list(seeds)})},
        reference._source if reference is not None else None,
    )
