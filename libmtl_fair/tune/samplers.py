"""Samplers and pruners whose choices depend on a trial's slot and on what was found before, never on who asks or how often.

So a study that was interrupted and resumed by one worker, one trial at a time, is the study that was left in peace.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.files import Json
from libmtl_fair.tune.budget import slots
from libmtl_fair.tune.plan import FIXED, SLOT, Plan

SAMPLERS: Mapping[str, Json] = {
    "nsga2": {"population_size": 20, "mutation_prob": None, "crossover_prob": 0.9, "swapping_prob": 0.5},
    "random": {},
    # group: the baseline and the published settings have no parameters, several methods have different ones.
    "tpe": {"n_startup_trials": 10, "n_ei_candidates": 24, "multivariate": True, "group": True, "constant_liar": True},
}
"""Name -> its settings, pinned and recorded, so that another version of Optuna does not change a study."""


class Hyperband(optuna.pruners.HyperbandPruner):
    """Hyperband; a trial's bracket is drawn from its slot, not from its number."""

    def _get_bracket_id(self, study: optuna.Study, trial: FrozenTrial) -> int:
        return super()._get_bracket_id(study, _numbered(trial))


PRUNERS: Mapping[str | None, Callable[[], optuna.pruners.BasePruner]] = {
    None: optuna.pruners.NopPruner,
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
    "hyperband": lambda: Hyperband(min_resource=2),
}


def make_sampler(plan: Plan, seed: int) -> BaseSampler:
    """Return the sampler of a plan."""
    if plan.sampler not in SAMPLERS:
        raise RecipeError(f"tune.sampler: {unknown('sampler', plan.sampler, SAMPLERS)}")
    if plan.sampler != "nsga2":
        kind = optuna.samplers.TPESampler if plan.sampler == "tpe" else optuna.samplers.RandomSampler
        return BySlot(partial(kind, **SAMPLERS[plan.sampler]), seed)
    if len(plan.space) > 1:
        several = f"nsga2 crosses the settings of one method, and tune.methods has {', '.join(plan.space)}; take tpe"
        raise RecipeError(f"tune.sampler: {several}")
    return BySlot(partial(Evolution, {p.name: p.distribution for p in next(iter(plan.space.values()))}), seed)


class Evolution(optuna.samplers.NSGAIISampler):
    """NSGA-II over a space known beforehand; trials of fixed settings, which have no parameters, are no parents."""

    def __init__(self, space: Mapping[str, BaseDistribution], seed: int) -> None:
        super().__init__(**SAMPLERS["nsga2"], seed=seed)
        self._space = space

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the space; Optuna's own guess is what all trials so far have in common."""
        return {} if trial.user_attrs.get(FIXED) else dict(self._space)

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """Return the parents in one order, chosen now or before."""
        return sorted(super().get_parent_population(study, generation), key=lambda trial: trial.number)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> Json:
        """Return a child of the generation before."""
        return super().sample_relative(study, trial, search_space) if search_space else {}


class BySlot(BaseSampler):
    """A sampler made anew for each trial, from the seed and the trial's slot; it sees the trials that hold slots, in their order."""

    def __init__(self, make: Callable[..., BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._held: tuple[int, BaseSampler] | None = None

    def _of(self, trial: FrozenTrial, what: str = "") -> BaseSampler:
        own = (self._seed, trial.user_attrs.get(SLOT, trial.number), what)
        return self._make(seed=zlib.crc32(repr(own).encode()))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return what is sampled together."""
        sampler = self._of(trial)
        self._held = trial._trial_id, sampler
        return sampler.infer_relative_search_space(_Slots(study), _numbered(trial))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> Json:
        """Return the values of what is sampled together."""
        if self._held is None or self._held[0] != trial._trial_id:
            self.infer_relative_search_space(study, trial)
        assert self._held is not None
        return self._held[1].sample_relative(_Slots(study), _numbered(trial), search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the value of one parameter, which does not depend on those asked for before it."""
        sampler = self._of(trial, param_name)
        return sampler.sample_independent(_Slots(study), _numbered(trial), param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Take note of a finished trial."""
        self._of(trial).after_trial(study, trial, state, values)


class _Slots(optuna.Study):
    """A study as a sampler sees it: its trials are those that hold slots, numbered by them."""

    def __init__(self, study: optuna.Study) -> None:
        self._seen = study

    def __getattribute__(self, name: str) -> Any:
        own = ("_seen", "get_trials", "_get_trials", "trials")
        return object.__getattribute__(self, name) if name in own else getattr(self._seen, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        found = [_numbered(trial) for _, trial in sorted(slots(self._seen).items())]
        return [trial for trial in found if states is None or trial.state in states]

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        return self._get_trials(deepcopy, states)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self._get_trials()


def _numbered(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial whose number is its slot."""
    held = copy.copy(trial)
    held.number = trial.user_attrs.get(SLOT, trial.number)
    return held
