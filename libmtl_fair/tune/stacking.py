"""Which of some trials are trained as stacks, and their outcomes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import torch

from libmtl_fair.data.loader import resolve_device
from libmtl_fair.errors import FairMTLError
from libmtl_fair.host import FairTrainer
from libmtl_fair.recipe.build import make_trainer
from libmtl_fair.recipe.measure import Protocol
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.tune.keeping import Keeper
from libmtl_fair.tune.objective import Outcome, Plan, measured
from libmtl_fair.tune.stacked import Stack, obstacle, shape
from libmtl_fair.tune.stale import SLOT


@dataclass(frozen=True)
class _Candidate:
    trial: optuna.Trial
    recipe: Recipe
    method: str
    seeds: list[int]


def run_stacks(
    plan: Plan,
    trials: Sequence[optuna.Trial],
    protocol: Protocol,
    *,
    device: str,
    keeper: Keeper | None,
    note: Callable[[str], None],
) -> dict[int, Outcome]:
    """Train what can be stacked of some trials; return number -> outcome. The others are left to be trained alone."""
    groups: dict[tuple[Any, ...], list[_Candidate]] = {}
    tasks = plan.dataset(plan.recipe.seeds[0]).tasks
    for trial in trials:
        recipe, method = plan.candidate(trial)
        why = obstacle(recipe, method, tasks)
        if why is not None:
            note(f"trial {trial.number} is trained alone: {why}")
            continue
        found = _Candidate(trial, recipe, method, plan.seeds(trial.user_attrs[SLOT]))
        groups.setdefault(shape(recipe, method), []).append(found)
    ready: dict[int, Outcome] = {}
    for members in groups.values():
        if len(members) < 2:
            note(f"trial {members[0].trial.number} is trained alone: no other trial at hand has its widths and batches")
            continue
        try:
            ready |= _run(plan, members, protocol, device, keeper)
        except (FairMTLError, ArithmeticError, RuntimeError) as error:
            note(f"{len(members)} stacked trials are trained alone: {error}")
    return ready


def _run(
    plan: Plan, members: Sequence[_Candidate], protocol: Protocol, device: str, keeper: Keeper | None
) -> dict[int, Outcome]:
    where, began = resolve_device(device), time.perf_counter()
    data = plan.dataset(plan.recipe.seeds[0])
    pairs = [(c, seed) for c in members for seed in c.seeds]
    trainers = [make_trainer(c.recipe, c.method, data, data.tasks, seed, device=where) for c, seed in pairs]
    settings = members[0].recipe.train_for(members[0].method)
    Stack(trainers, data, settings.batch_size, settings.epochs).train()
    spent = time.perf_counter() - began
    ready: dict[int, Outcome] = {}
    for (candidate, seed), trainer in zip(pairs, trainers):
        if not _finite(trainer):
            continue  # alone, the trial says in which step and task it diverged
        predictions = trainer.predict(data.val.loader(8192, device=where))
        empty = Outcome({m.name: [] for m in plan.measures}, candidate.seeds, spent / len(members))
        outcome = ready.setdefault(candidate.trial.number, empty)
        for name, value in measured(plan, predictions, protocol).items():
            outcome.found[name].append(value)
        if keeper is not None:
            keeper.trained(candidate.trial)(seed, trainer)
    counts = {c.trial.number: len(c.seeds) for c in members}
    first = plan.measures[0].name
    return {number: o for number, o in ready.items() if len(o.found[first]) == counts[number]}


def _finite(trainer: FairTrainer) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
