"""Trials in places: M of them train at once, and where one ends or is pruned the next one asked of the study takes its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import optuna

from libmtl_fair.data.loader import resolve_device
from libmtl_fair.errors import FairMTLError
from libmtl_fair.libmtl import FairTrainer
from libmtl_fair.libmtl import checkpoint_selection as judging
from libmtl_fair.progress import tell
from libmtl_fair.recipe.build import make_trainer
from libmtl_fair.tune.budget import Heartbeat, give_up
from libmtl_fair.tune.plan import Candidate, Outcome
from libmtl_fair.tune.stacked import Rows, Stack, obstacle, shape
from libmtl_fair.tune.worker import Worker, measure, predicted

_ALONE = "is trained alone: "


def aloud(say: Callable[[str], None], then: Callable[[str], None]) -> Callable[[str], None]:
    """Return what to note with: ``then`` for a trial's result, ``say`` for why one is not stacked, each reason once."""
    said: set[str] = set()

    def note(text: str) -> None:
        reason = text.partition(_ALONE)[2]
        if not reason:
            then(text)
        elif reason not in said:
            said.add(reason)
            say(text)

    return note


@dataclass
class _Run:
    """A trial in its place: a trainer for each seed, in the stack of its shape."""

    trial: optuna.Trial
    candidate: Candidate
    trainers: list[FairTrainer]
    stack: Stack
    alive: ExitStack
    spent: float = 0.0

    @property
    def epoch(self) -> int:
        return self.trainers[0].epoch

    def places(self) -> list[int]:
        return [m for m, trainer in enumerate(self.stack.trainers) if any(trainer is own for own in self.trainers)]


@dataclass
class Places:
    """Works as a worker does, with up to ``count`` trials of a study at once; one stack for each shape among them."""

    worker: Worker
    study: optuna.Study
    count: int

    def __post_init__(self) -> None:
        """Move the data to the device."""
        self._runs: list[_Run] = []
        self._stacks: dict[tuple[object, ...], Stack] = {}
        plan = self.worker.plan
        self._device = resolve_device(self.worker.device)
        self._data = plan.dataset(plan.recipe.seeds[0])
        self._tasks = self.worker.protocol.freeze(self._data.tasks, plan.recipe.seeds[0])
        self._rows = Rows(self._data, self._device)

    def __call__(self) -> None:
        """Train until nothing waits in the queue and all places are empty."""
        try:
            while self._fill():
                for stack in list(self._stacks.values()):
                    self._train(stack)
                self.worker.check_hope(self.study)
        except KeyboardInterrupt:
            for run in self._runs:
                give_up(self.study, run.trial, "interrupted")
            raise
        finally:
            for run in self._runs:
                run.alive.close()

    def _fill(self) -> bool:
        """Ask for trials until no place is empty; return whether any is taken."""
        while (
            len(self._runs) < self.count and not self.worker.late and (trial := self.worker.ask(self.study)) is not None
        ):
            self._begin(trial)
        return bool(self._runs)

    def _begin(self, trial: optuna.Trial) -> None:
        with self.worker.telling(self.study, trial), ExitStack() as alive:
            alive.enter_context(Heartbeat(self.study, trial, self.worker.grace))
            candidate = self.worker.begin(trial)
            why = obstacle(candidate.recipe, candidate.method, self._tasks)
            if why is None:
                self._runs.append(self._placed(trial, candidate, alive.pop_all()))
                return
        if trial.user_attrs.get("recipe"):
            self.worker.note(f"trial {trial.number} {_ALONE}{why}")
            self.worker.run(self.study, trial)

    def _placed(self, trial: optuna.Trial, candidate: Candidate, alive: ExitStack) -> _Run:
        made, key = (candidate.recipe, candidate.method), shape(candidate.recipe, candidate.method)
        data, device = (self._data, self._tasks), self._device
        trainers = [make_trainer(*made, *data, seed, device=device) for seed in candidate.seeds]
        for trainer in trainers:
            trainer.model.epochs = candidate.train.epochs
        judge_all = self.worker.plan.tune.pruner is not None
        stack = self._stacks.setdefault(key, Stack(self._rows, candidate.train.batch_size, judge_all))
        stack.change(add=trainers)
        return _Run(trial, candidate, trainers, stack, alive)

    def _train(self, stack: Stack) -> None:
        """Train one epoch of a stack; end the trials that are done."""
        runs = [run for run in self._runs if run.stack is stack]
        first = min((run.epoch, run.candidate.train.epochs) for run in runs)
        tell(f"{len(self._runs)} trials at once, the youngest in epoch {first[0] + 1}/{first[1]}")
        began = time.perf_counter()
        try:
            scores = stack.epoch()
        except (FairMTLError, ArithmeticError, RuntimeError) as error:
            self._remove(stack)
            self._alone(runs, f"their stack cannot be trained: {error}")
            return
        each = (time.perf_counter() - began) / len(stack.members)
        for run in runs:
            run.spent += each * len(run.trainers)
        # alone, a trial says in which step and task it diverged
        diverged = [run for run in runs if not all(map(stack.finite, run.places()))]
        pruned = [run for run in runs if run not in diverged and self._is_pruned(run, scores)]
        done = [run for run in runs if run.epoch >= run.candidate.train.epochs]
        ended = [run for run in done if run not in diverged and run not in pruned]
        stack.change(drop=[trainer for run in [*diverged, *pruned, *ended] for trainer in run.trainers])
        if not stack.members:
            self._remove(stack)
        self._alone(diverged, "it diverged")
        for run in [*pruned, *ended]:
            self._end(run, pruned=run in pruned)

    def _remove(self, stack: Stack) -> None:
        self._stacks = {key: other for key, other in self._stacks.items() if other is not stack}

    def _is_pruned(self, run: _Run, scores: dict[int, float]) -> bool:
        """Report the score of a trial's first seed, as a trial alone does; whether the pruner stops it."""
        if self.worker.plan.tune.pruner is None:
            return False
        run.trial.report(scores[run.places()[0]], run.epoch - 1)
        return run.trial.should_prune()

    def _end(self, run: _Run, pruned: bool) -> None:
        self._runs.remove(run)
        with run.alive, self.worker.telling(self.study, run.trial):
            self.worker.finish(self.study, run.trial, run.candidate, None if pruned else self._outcome(run))

    def _outcome(self, run: _Run) -> Outcome:
        plan, keeper = self.worker.plan, self.worker.keeper
        outcome = Outcome(list(run.candidate.seeds), train_s=run.spent)
        for seed, trainer in zip(run.candidate.seeds, run.trainers):
            if trainer.select == "best" and trainer.best["state"] is not None:
                judging.hold_best(trainer)
            seen = predicted(plan, run.candidate, trainer, seed, self._rows.val)
            measure(plan, seen, self.worker.protocol, outcome)
            if keeper is not None:
                keeper.trained(run.trial, seed, trainer)
        return outcome

    def _alone(self, runs: Sequence[_Run], why: str) -> None:
        for run in runs:
            self._runs.remove(run)
            run.alive.close()
            self.worker.note(f"trial {run.trial.number} {_ALONE}{why}")
            self.worker.run(self.study, run.trial)
