"""From a study to one trial, and from a trial to a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import t as student

from libmtl_fair.errors import FairMTLError, RecipeError
from libmtl_fair.metrics.intervals import normal_width
from libmtl_fair.metrics.verdicts import enough
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.tune.evidence import FOLDS, jackknife
from libmtl_fair.tune.objectives import GAPS, NUMBER, gap_of, parse_measure
from libmtl_fair.tune.plan import DEGENERATE, DESCRIBED, RECIPE, ROLE, study_recipe

TUNED = "tuned"
_ERRORS, _SHOWN, _SAME = 3, 5, 1e-12


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


@dataclass(frozen=True)
class Rules:
    """What a chosen trial keeps to, besides the study's constraints.

    ``confidence``: level of the interval whose upper end ``max_disparity`` bounds (None: the recipe's ``metrics.confidence``);
    ``within``: what each task's AUC and accuracy (or R2) may lose against the baseline, in points (None: what is within noise).
    """

    confidence: float | None = None
    within: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise RecipeError(f"confidence must lie between 0 and 1, found {self.confidence!r}")
        if self.within is not None and not 0 <= self.within < math.inf:
            raise RecipeError(
                f"within is what a utility may lose, in points of at least 0 (hundredths), found {self.within!r}"
            )


@dataclass(frozen=True)
class Standing:
    """How a trial stands to the rules: by how much it misses each kind (degenerate tasks, utilities, disparities), and in words."""

    trial: FrozenTrial
    miss: tuple[float, float, float]
    why: tuple[str, ...]


def standings(
    study: optuna.Study, rules: Rules | None = None, bound: float | None = None
) -> tuple[list[Standing], list[Standing]]:
    """Return how every complete trial stands, and of these those that miss least: nothing, where any trial keeps every rule.

    Degenerate trials count as the worst, then those that lose utility, then those with too large a disparity. Without ``rules``
    utilities are not asked about; ``bound`` is on the upper end of the study's disparity.

    Raises
    ------
    FairMTLError
        The study has no complete trial.
    """
    trials, found = complete(study), []
    baseline = next((t for t in trials if t.user_attrs.get(ROLE) == "baseline"), None)
    for trial in trials:
        bad = [f"{task} {why}" for task, why in trial.user_attrs.get("degenerate", {}).items()]
        lost = list(_losses(trial, baseline, rules.within)) if rules and baseline is not None else []
        over = [(v, f"{name} is missed by {v:.4f}") for name, v in _constraints(trial) if v > 0]
        if bound is not None and rules is not None:
            over += _over(study, trial, bound, rules.confidence)
        miss = float(len(bad)), max((v for v, _ in lost), default=0.0), sum(v for v, _ in over)
        found.append(Standing(trial, miss, (*bad, *(text for _, text in (*lost, *over)))))
    least = min(each.miss for each in found)
    return found, [s for s in found if all(own <= best + _SAME for own, best in zip(s.miss, least))]


def _constraints(trial: FrozenTrial) -> list[tuple[str, float]]:
    """Return by how much the study's own constraints are violated; Optuna numbers those for its dashboard."""
    return [(name, v) for name, v in trial.constraints.items() if name != DEGENERATE and not name.isdigit()]


def _losses(trial: FrozenTrial, baseline: FrozenTrial, within: float | None) -> Iterator[tuple[float, str]]:
    """Yield by how much each utility loses more than is allowed, paired by seed and person.

    Noise (ours): the 95 % range of Student's t, of the jackknife's error over people and the error over seeds together.
    """
    theirs, mine = (each.user_attrs.get("utility") for each in (baseline, trial))
    if theirs is None or mine is None or trial.user_attrs["seeds"] != baseline.user_attrs["seeds"]:
        return
    for name in (name for name in theirs[0] if all(name in seed for seed in (*theirs, *mine))):
        lost = np.array([seed[name] for seed in theirs]) - np.array([seed[name] for seed in mine])
        seeds = float(lost[:, 0].std(ddof=1)) / math.sqrt(len(lost)) if len(lost) > 1 else 0.0
        noise = float(student.ppf(0.975, FOLDS - 1)) * math.hypot(jackknife(lost.mean(0)[1:]), seeds)
        loss, allowed = float(lost[:, 0].mean()), noise if within is None else within / 100
        if loss > allowed + _SAME:
            by = "noise" if within is None else "within"
            yield loss - allowed, f"{name} loses {100 * loss:.2f} points ({by} {100 * allowed:.2f})"


def _over(study: optuna.Study, trial: FrozenTrial, bound: float, confidence: float | None) -> list[tuple[float, str]]:
    """Return by how much the upper end of a trial's disparity is over a bound, if it is."""
    name = disparity(study)
    if name is None:
        raise RecipeError(
            f"study {study.study_name!r} has no disparity among objectives and constraints; choose a trial by number"
        )
    found, end = float(np.mean(trial.user_attrs["validation"][name])), upper(study, trial, name, confidence)
    text = f"{name} may be as high as {end:.4f} (found {found:.4f}), {end - bound:.4f} over the bound of {bound:g}"
    return [(end - bound, text)] if end - bound > _SAME else []


def upper(study: optuna.Study, trial: FrozenTrial, name: str, confidence: float | None = None) -> float:
    """Return the upper end of the interval of a disparity on validation data; its mean over seeds."""
    values, ends = (trial.user_attrs.get(of, {}).get(name) for of in ("validation", "upper"))
    if ends is None or confidence is None:
        return float(np.mean(ends or values))
    how = study_recipe(study).metrics
    if name.split("/")[-1].removeprefix("mean_") in GAPS:
        tables = trial.user_attrs["counts"]
        measure = parse_measure(name, dict.fromkeys(tables[0], "binary"), list(next(iter(tables[0].values()))), ())
        asked = how.model_copy(update={"confidence": confidence})
        return float(np.mean([gap_of(measure, each, asked)[1] for each in tables]))
    wider = normal_width(confidence) / normal_width(how.confidence)
    return float(np.mean(values) + wider * (np.mean(ends) - np.mean(values)))


def front(study: optuna.Study) -> tuple[list[FrozenTrial], bool]:
    """Return (the Pareto front of trials that meet the constraints and are not degenerate, True), or (of those that miss least, False).

    Raises
    ------
    FairMTLError
        The study has no complete trial.
    """
    least = standings(study)[1]
    found = _undominated([each.trial for each in least], _signs(study))
    return found[:1] if len(study.directions) == 1 else found, not any(least[0].miss)


def _undominated(trials: Sequence[FrozenTrial], signs: Sequence[float]) -> list[FrozenTrial]:
    """Return the trials that no other is better than in one objective and as good as in all, best first."""
    values = np.array([t.values for t in trials]) * signs
    kept = [not ((values <= own).all(1) & (values < own).any(1)).any() for own in values]
    return sorted(
        (t for t, keep in zip(trials, kept) if keep), key=lambda t: (list(np.multiply(t.values, signs)), t.number)
    )


def select(
    study: optuna.Study, max_disparity: float = 0.05, *, confidence: float | None = None, within: float | None = None
) -> FrozenTrial:
    """Return the trial with the best first objective whose disparity, at the upper end of its interval, is within ``max_disparity``.

    The disparity is the first objective that is minimised, else the first constraint, on validation data. Degenerate trials and
    those that lose utility are refused; ``confidence`` and ``within``: see :class:`Rules`. Where no trial is left, the one that
    misses least; :func:`explain` says by how much.

    Raises
    ------
    RecipeError
        The study has no disparity.
    FairMTLError
        It has no complete trial.
    """
    number = isinstance(max_disparity, int | float) and not isinstance(max_disparity, bool)
    if not number or not math.isfinite(max_disparity):
        raise RecipeError(f"max_disparity must be a number, found {max_disparity!r}")
    sign, least = _signs(study)[0], standings(study, Rules(confidence, within), max_disparity)[1]
    return min((each.trial for each in least), key=lambda t: (sign * t.values[0], t.number))


def _signs(study: optuna.Study) -> list[float]:
    """Return what to multiply each objective by, so that lower is better."""
    return [1.0 if d == StudyDirection.MINIMIZE else -1.0 for d in study.directions]


def disparity(study: optuna.Study) -> str | None:
    """Return the name of the study's disparity: its first minimised objective, else what its first constraint is about."""
    about = study.user_attrs.get(DESCRIBED, {})
    names = [name for name, sign in zip(about.get("objectives", {}), _signs(study)) if sign > 0]
    return next(iter([*names, *(text.split(" ")[0] for text in about.get("constraints", []))]), None)


def knee(study: optuna.Study, *, within: float | None = None) -> FrozenTrial:
    """Return the trial that is farthest from the line between the ends of the front of those that keep the rules.

    Objectives are scaled to [0, 1]; ``within``: see :class:`Rules`. With more than two objectives it is the trial nearest to the
    ideal point (the best of each).

    Raises
    ------
    FairMTLError
        The study has no complete trial.
    """
    trials = _undominated([each.trial for each in standings(study, Rules(within=within))[1]], _signs(study))
    values = np.array([t.values for t in trials]) * _signs(study)
    low, high = values.min(0), values.max(0)
    scaled = (values - low) / np.where(high > low, high - low, 1.0)
    # The ends of two objectives are (0, 1) and (1, 0): the distance to their line falls with x + y.
    far = scaled.sum(1) if scaled.shape[1] == 2 else np.linalg.norm(scaled, axis=1)
    return trials[int(far.argmin())]


def explain(study: optuna.Study, trial: FrozenTrial, how: str = "best", rules: Rules | None = None) -> list[str]:
    """Return, in words, which rules a chosen trial misses, and why trials that would be on the front were refused."""
    wanted = selection(how)
    every, least = standings(study, rules or Rules(), wanted if isinstance(wanted, float) else None)
    own = next(each for each in every if each.trial.number == trial.number)
    said = []
    if own.why:
        first = "chosen by number" if isinstance(wanted, int) else "no trial keeps every rule; this one misses least"
        said.append(f"trial {trial.number}: {first}: {'; '.join(own.why)}")
    baseline = next((each for each in every if each.trial.user_attrs.get(ROLE) == "baseline"), None)
    if baseline is None:
        said.append("no baseline is complete: what utilities lose is not known")
    elif baseline.miss[0]:
        hint = "metrics.threshold: base_rate judges decisions that select as many as are positive"
        said.append(f"the baseline: {'; '.join(baseline.why)}. {hint}")
    if few := _few(study, trial):
        said.append(f"too few people on validation data, left out of gaps: {', '.join(few)}")
    on_front = {t.number for t in _undominated([each.trial for each in every], _signs(study))}
    refused = [each for each in every if each.miss[:2] > least[0].miss[:2] and each.trial.number in on_front]
    said += [f"refused: trial {each.trial.number}: {'; '.join(each.why)}" for each in refused[:_SHOWN]]
    more = len(refused) - _SHOWN
    return said + ([f"refused: {more} more of the front; trials.csv says why"] if more > 0 else [])


def _few(study: optuna.Study, trial: FrozenTrial) -> list[str]:
    """Return the groups, and of which tasks, that have too few people for equalised odds in some seed."""
    least = study_recipe(study).metrics.min_group_size if RECIPE in study.user_attrs else 0
    seeds = trial.user_attrs.get("counts", [])
    tables = [(task, a, groups) for counts in seeds for task, of in counts.items() for a, groups in of.items() if a]
    fits = [
        (f"{a} {name} ({task})", fit)
        for task, a, g in tables
        for name, fit in zip(g, enough([*g.values()], min_group_size=least))
    ]
    return list(dict.fromkeys(name for name, fit in fits if not fit))


def trial_by_number(study: optuna.Study, number: int) -> FrozenTrial:
    """Return a complete trial by its number.

    Raises
    ------
    RecipeError
        There is none of that number, or it is not complete.
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


def chosen(
    study: optuna.Study, how: str = "best", *, confidence: float | None = None, within: float | None = None
) -> FrozenTrial:
    """Return the trial that a text asks for.

    ``max_disparity=0.05``: see :func:`select`; ``knee``: see :func:`knee`; a number: that trial, whatever the rules say; ``best``: of
    one objective the best trial that keeps the rules, of several the knee.

    Raises
    ------
    RecipeError
        None of these, or no such trial.
    """
    wanted = selection(how)
    if isinstance(wanted, int):
        return trial_by_number(study, wanted)
    return knee(study, within=within) if wanted is None else select(study, wanted, confidence=confidence, within=within)


def to_recipe(trial: FrozenTrial, reference: Recipe | None = None, seeds: Sequence[int] | None = None) -> Recipe:
    """Return the recipe of a trial: its method, named ``tuned``, beside the reference of the study's recipe if that is given.

    A trial that is the reference itself stands under the reference's name, once.

    Raises
    ------
    RecipeError
        The trial was not made by :func:`tune`, or never began.
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
