"""One trial: train a candidate once a seed, and measure it."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from libmtl_fair.data.loader import resolve_device
from libmtl_fair.libmtl import FairTrainer
from libmtl_fair.libmtl.state import Results
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.build import loaders, make_trainer
from libmtl_fair.recipe.measure import Protocol
from libmtl_fair.tasks import Regression, Task
from libmtl_fair.tune.objectives import value_of
from libmtl_fair.tune.plan import Candidate, Plan

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


def choose_protocol(plan: Plan, device: str = "auto") -> Protocol:
    """Return tolerances and score ranges; where the recipe asks for quantiles, the reference model is trained for them."""
    recipe, seed = plan.recipe, plan.seeds(0)[0]
    fixed = {str(d): float(d) for d in recipe.audit.deltas if _is_number(str(d))}
    levels = {m.level for m in plan.measures if m.level is not None}
    tasks = next(iter(plan.data.values())).tasks
    if levels <= set(fixed) and not (levels and any(isinstance(task, Regression) for task in tasks)):
        return Protocol(fixed, {})
    data = plan.dataset(seed)
    trainer = _train(plan, Candidate(recipe, recipe.reference, [seed]), seed, data.tasks, device, None)
    predictions = trainer.predict(data.val.loader(8192, device=resolve_device(device)), embeddings=True)
    return Protocol.choose(recipe, recipe.reference, seed, predictions)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def run_trial(
    plan: Plan,
    candidate: Candidate,
    protocol: Protocol,
    *,
    device: str = "auto",
    part: Literal["val", "test"] = "val",
    on_epoch: OnEpoch | None = None,
    on_trained: OnTrained | None = None,
) -> Outcome:
    """Train a candidate once a seed and measure it; ``on_epoch`` is given each score of its first seed.

    Raises
    ------
    UndefinedError : an objective is not defined.
    DivergenceError : a loss was not finite.
    """
    found: dict[str, list[float]] = {m.name: [] for m in plan.measures}
    began = time.perf_counter()
    for i, seed in enumerate(candidate.seeds):
        data = plan.dataset(seed)
        tasks = protocol.freeze(data.tasks)
        trainer = _train(plan, candidate, seed, tasks, device, on_epoch if i == 0 else None)
        rows = data.val if part == "val" else data.test
        for name, value in measured(plan, trainer.predict(rows.loader(8192, device=trainer.device)), protocol).items():
            found[name].append(value)
        if on_trained is not None:
            on_trained(seed, trainer)
    return Outcome(found, candidate.seeds, time.perf_counter() - began)


def measured(plan: Plan, predictions: Predictions, protocol: Protocol) -> dict[str, float]:
    """Return measure -> value of one model's predictions."""
    return {m.name: value_of(m, predictions, protocol.deltas, plan.recipe) for m in plan.measures}


def _train(
    plan: Plan, candidate: Candidate, seed: int, tasks: tuple[Task, ...], device: str, on_epoch: OnEpoch | None
) -> FairTrainer:
    data = dataclasses.replace(plan.dataset(seed), tasks=tasks)
    trainer = make_trainer(candidate.recipe, candidate.method, data, tasks, seed, device=resolve_device(device))
    judge, epochs = trainer.select_by, itertools.count()
    if on_epoch is not None and judge is not None:

        def judged(results: Results) -> float:
            score = judge(results)
            on_epoch(next(epochs), score)  # it may raise TrialPruned
            return score

        trainer.select_by = judged
    sources = loaders(data, candidate.train.batch_size, seed, resolve_device(device))
    trainer.train(sources["train"], None, candidate.train.epochs, sources["val"])
    return trainer
