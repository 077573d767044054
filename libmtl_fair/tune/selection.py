"""From a study to one trial, and from a trial to a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from libmtl_fair.errors import FairMTLError, RecipeError
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.tune.objectives import NUMBER
from libmtl_fair.tune.plan import DESCRIBED

TUNED = "tuned"
_ERRORS = 3


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ended with values; a FairMTLError says that there is none, and of those that failed why."""
    trials = study.get_trials(deepcopy=False)
    found = [t for t in trials if t.state == TrialState.COMPLETE]
    if not found:
        why = failures(trials)
        some = f": {sum(t.state == TrialState.FAIL for t in trials)} of {len(trials)} failed" if why else ""
        raise FairMTLError(f"study {study.study_name!r} has no complete trial yet{some}{why}")
    return found


def failures(trials: Sequence[FrozenTrial]) -> str:
    """Return the last distinct errors of those that failed, to end a sentence; empty where none did."""
    errors = [t.user_attrs["error"] for t in trials if t.state == TrialState.FAIL and "error" in t.user_attrs]
    last = list(dict.fromkeys(reversed(errors)))[:_ERRORS]
    return f"; the last: {'; before it: '.join(last)}" if errors else ""


def front(study: optuna.Study) -> tuple[list[FrozenTrial], bool]:
    """Return (the Pareto front, True), or where no trial meets the constraints (those that violate them least, False).

    Raises
    ------
    FairMTLError : the study has no complete trial.
    """
    trials, best = complete(study), study.best_trials
    if best:
        return sorted(best, key=lambda t: t.values) if len(study.directions) > 1 else best[:1], True
    excess = [sum(max(v, 0.0) for name, v in t.constraints.items() if not name.isdigit()) for t in trials]
    return [t for t, value in zip(trials, excess) if value <= min(excess) + 1e-12], False


def select(study: optuna.Study, max_disparity: float = 0.05) -> FrozenTrial:
    """Return the trial with the best first objective whose disparity is at most ``max_disparity``, on validation data.

    The disparity is the first objective that is minimised, else the first constraint. Where no trial is so fair, the fairest.

    Raises
    ------
    RecipeError : the study has no disparity.
    FairMTLError : it has no complete trial.
    """
    number = isinstance(max_disparity, int | float) and not isinstance(max_disparity, bool)
    if not number or not math.isfinite(max_disparity):
        raise RecipeError(f"max_disparity must be a number, found {max_disparity!r}")
    trials, sign, name = complete(study), _signs(study)[0], disparity(study)
    if name is None:
        raise RecipeError(
            f"study {study.study_name!r} has no disparity among objectives and constraints; choose a trial by number"
        )
    found = {t.number: float(np.mean(t.user_attrs["validation"][name])) for t in trials}
    feasible = [t for t in trials if found[t.number] <= max_disparity]
    if not feasible:
        return min(trials, key=lambda t: (found[t.number], t.number))
    return min(feasible, key=lambda t: (sign * t.values[0], t.number))


def _signs(study: optuna.Study) -> list[float]:
    """Return what to multiply each objective by, so that lower is better."""
    return [1.0 if d == StudyDirection.MINIMIZE else -1.0 for d in study.directions]


def disparity(study: optuna.Study) -> str | None:
    """Return the name of the study's disparity: its first minimised objective, else what its first constraint is about."""
    about = study.user_attrs.get(DESCRIBED, {})
    names = [name for name, sign in zip(about.get("objectives", {}), _signs(study)) if sign > 0]
    return next(iter([*names, *(text.split(" ")[0] for text in about.get("constraints", []))]), None)


def knee(study: optuna.Study) -> FrozenTrial:
    """Return the trial of the front that is farthest from the line between the front's ends, objectives scaled to [0, 1].

    With more than two objectives it is the one nearest to the ideal point (the best of each objective).

    Raises
    ------
    FairMTLError : the study has no complete trial.
    """
    trials, _ = front(study)
    values = np.array([t.values for t in trials]) * _signs(study)
    low, high = values.min(0), values.max(0)
    scaled = (values - low) / np.where(high > low, high - low, 1.0)
    # The ends of two objectives are (0, 1) and (1, 0): the distance to their line falls with x + y.
    far = scaled.sum(1) if scaled.shape[1] == 2 else np.linalg.norm(scaled, axis=1)
    return trials[int(far.argmin())]


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
        why, state = trial.user_attrs.get("error", ""), trial.state.name.lower()
        raise RecipeError(f"trial {number} of study {study.study_name!r} is {state}, not complete. {why}")
    return trial


def selection(how: str) -> int | float | None:
    """Return what a text asks for: a trial's number, a bound on the disparity, or None for ``knee`` and ``best``."""
    text = how.strip()
    if text in ("knee", "best") or text.isdigit():
        return int(text) if text.isdigit() else None
    bound = re.fullmatch(rf"max_disparity\s*=\s*{NUMBER}", text)
    if bound is None or math.isinf(float(bound[1])):
        raise RecipeError(f"--select expects max_disparity=0.05, knee, best, or the number of a trial, found {how!r}")
    return float(bound[1])


def chosen(study: optuna.Study, how: str = "best") -> FrozenTrial:
    """Return the trial that a text asks for.

    ``max_disparity=0.05``: see :func:`select`; ``knee``: see :func:`knee`; a number: that trial; ``best``: of one objective
    the best trial that meets the constraints, of several the knee.

    Raises
    ------
    RecipeError : none of these, or no such trial.
    """
    wanted = selection(how)
    if wanted is not None:
        return trial_by_number(study, wanted) if isinstance(wanted, int) else select(study, wanted)
    return front(study)[0][0] if how.strip() == "best" and len(study.directions) == 1 else knee(study)


def to_recipe(trial: FrozenTrial, reference: Recipe | None = None, seeds: Sequence[int] | None = None) -> Recipe:
    """Return the recipe of a trial: its method, named ``tuned``, beside the reference of the study's recipe if that is given.

    A trial that is the reference itself stands under the reference's name, once.

    Raises
    ------
    RecipeError : the trial was not made by :func:`tune`, or never began.
    """
    held = trial.user_attrs.get("recipe")
    if held is None:
        raise RecipeError(f"trial {trial.number} holds no recipe: it was not made by libmtl_fair.tune, or never began")
    methods = {TUNED: held["methods"][trial.user_attrs["method"]]}
    if reference is not None:
        plain = {reference.reference: reference.to_dict()["methods"][reference.reference]}
        methods = plain if methods[TUNED] == plain[reference.reference] else plain | methods
    changes = {"methods": methods} if seeds is None else {"methods": methods, "seeds": list(seeds)}
    return Recipe.from_dict({**held, **changes}, reference._source if reference is not None else None)
