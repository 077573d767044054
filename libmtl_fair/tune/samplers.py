"""Samplers and pruners by name, their settings pinned, so that another version of Optuna does not change a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.trial import FrozenTrial

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.tune.objective import FIXED
from libmtl_fair.tune.space import Parameter

SAMPLERS: Mapping[str, Mapping[str, Any]] = {
    "nsga2": {"population_size": 20, "mutation_prob": None, "crossover_prob": 0.9, "swapping_prob": 0.5},
    "random": {},
    # group: the baseline and the published settings have no parameters, several methods have different ones.
    "tpe": {
        "n_startup_trials": 10,
        "n_ei_candidates": 24,
        "multivariate": True,
        "group": True,
        "constant_liar": True,
    },
}
"""Name -> its settings, which a study records."""
PRUNERS = ("hyperband", "median")


def make_sampler(name: str, space: Mapping[str, Sequence[Parameter]], seed: int) -> BaseSampler:
    """Return a sampler for the methods of a space.

    Raises
    ------
    RecipeError : no such sampler, or ``nsga2``, which crosses the settings of one method, for several.
    """
    if name not in SAMPLERS:
        raise RecipeError(f"tune.sampler: {unknown('sampler', name, SAMPLERS)}")
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "tpe":
        return optuna.samplers.TPESampler(**SAMPLERS[name], seed=seed)
    if len(space) > 1:
        raise RecipeError(
            f"tune.sampler: nsga2 crosses the settings of one method, and tune.methods has {', '.join(space)}; take tpe"
        )
    return Evolution(next(iter(space.values())), seed)


class Evolution(NSGAIISampler):
    """NSGA-II over a space known beforehand; trials of fixed settings, which have no parameters, are no parents."""

    def __init__(self, parameters: Sequence[Parameter], seed: int) -> None:
        super().__init__(**SAMPLERS["nsga2"], seed=seed)
        self._space = {p.name: p.distribution() for p in parameters}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the space; Optuna's own guess is what all trials so far have in common."""
        return {} if trial.user_attrs.get(FIXED) else dict(self._space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a child of the generation before."""
        return super().sample_relative(study, trial, search_space) if search_space else {}


def make_pruner(name: str | None) -> optuna.pruners.BasePruner:
    """Return a pruner; None never prunes.

    Raises
    ------
    RecipeError : no such pruner.
    """
    if name is None:
        return optuna.pruners.NopPruner()
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=2)
    raise RecipeError(f"tune.pruner: {unknown('pruner', name, PRUNERS)}")
