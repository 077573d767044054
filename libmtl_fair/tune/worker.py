"""One trial: trained once a seed and measured. And a worker, which claims slots of a study and trains them one at a time."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from libmtl_fair.data import Dataset
from libmtl_fair.data.loader import ResidentLoader, resolve_device
from libmtl_fair.data.streamed import FileLoader
from libmtl_fair.errors import CheckpointError, FairMTLError
from libmtl_fair.libmtl import FairTrainer
from libmtl_fair.libmtl.state import Results
from libmtl_fair.locks import GRACE
from libmtl_fair.metrics.scores import Held, thresholds_in_use
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.build import EVAL_BATCH, data_for, loaders, make_trainer
from libmtl_fair.recipe.measure import Protocol
from libmtl_fair.tasks import Ranged, Task
from libmtl_fair.tune.artifacts import Keeper
from libmtl_fair.tune.budget import Heartbeat, Reaper, claim, fill, give_up, slots
from libmtl_fair.tune.evidence import counts_of, degenerate_tasks, utilities
from libmtl_fair.tune.objectives import PEOPLE, upper_end, value_of
from libmtl_fair.tune.plan import DEGENERATE, Candidate, Outcome, Plan
from libmtl_fair.tune.selection import failures
from libmtl_fair.tune.storage import SEAL, seal_of

PROTOCOL = "protocol"
_FAILURES = (
    ArithmeticError,
    AttributeError,
    AssertionError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_HOPELESS = 5
"""So many failures and no success: the study stops instead of spending its budget."""


def protocol_of(study: optuna.Study, plan: Plan, device: str) -> Protocol:
    """Return a study's tolerances and score ranges; where it has none, those of the plan (of a reference model, if it takes one)."""
    if PROTOCOL in study.user_attrs:
        return Protocol.from_dict(study.user_attrs[PROTOCOL])
    recipe, made = plan.recipe, Protocol({}, {})
    for delta in map(str, recipe.audit.deltas):
        with suppress(ValueError):
            made.deltas[delta] = float(delta)
    levels = {m.level for m in plan.measures if m.level is not None}
    # a run freezes the score ranges of regression tasks before it trains other methods than the reference
    scaled = any(isinstance(task, Ranged) for task in plan.dataset(plan.seeds[0]).tasks)
    if scaled or levels - set(made.deltas):
        for i, seed in enumerate(plan.seeds if scaled else plan.seeds[:1]):
            reference = Candidate(recipe, recipe.reference, [seed])
            trainer, sources = _train(plan, reference, seed, plan.dataset(seed).tasks, device)
            val = trainer.predict(sources["val"], embeddings=True, maps=False)
            made = made.with_seed(seed, val) if i else Protocol.choose(recipe, reference.method, seed, val)
    study.set_user_attr(PROTOCOL, made.to_dict())
    return made


def run_trial(
    plan: Plan,
    candidate: Candidate,
    protocol: Protocol,
    *,
    device: str = "auto",
    trial: optuna.Trial | None = None,
    keeper: Keeper | None = None,
    tested: dict[str, list[float]] | None = None,
) -> Outcome:
    """Train a candidate once a seed and measure it; a ``trial`` that may be pruned is told the first seed's scores.

    ``tested`` takes the measures on test data, too.
    """
    outcome, began = Outcome(candidate.seeds), time.perf_counter()
    for i, seed in enumerate(candidate.seeds):
        tasks = protocol.freeze(plan.dataset(seed).tasks, seed)
        trainer, sources = _train(plan, candidate, seed, tasks, device, None if i else trial)
        bars = measure(plan, predicted(plan, candidate, trainer, seed, sources["val"]), protocol, outcome)
        if tested is not None:
            predictions = predicted(plan, candidate, trainer, seed, sources["test"], "test")
            for m in plan.measures:
                value = value_of(m, predictions, protocol.deltas, plan.recipe, bars)
                tested.setdefault(m.name, []).append(value)
        if keeper is not None and trial is not None:
            keeper.trained(trial, seed, trainer)
    return dataclasses.replace(outcome, train_s=time.perf_counter() - began)


def predicted(
    plan: Plan,
    candidate: Candidate,
    trainer: FairTrainer,
    seed: int,
    loader: ResidentLoader | FileLoader,
    part: str = "val",
) -> Predictions:
    """Return what a model says of a part of the data, with what the audit of people finds where a measure is of it."""
    predictions = trainer.predict(loader, maps=False)
    if not any(m.metric in PEOPLE for m in plan.measures):
        return predictions

    def predict(changed: Dataset, part: str) -> Predictions:
        seen = data_for(candidate.recipe, candidate.method, changed).splits()[part]
        return trainer.predict(seen.loader(EVAL_BATCH, device=trainer.device), maps=False)

    found = plan.people(seed).numbers(plan.recipe, plan.dataset(seed), predictions, predict, part)
    return dataclasses.replace(predictions, people=found)


def measure(plan: Plan, predictions: Predictions, protocol: Protocol, outcome: Outcome) -> Held:
    """Add what one model's validation predictions give to an outcome; return the thresholds of its decisions."""
    recipe, threshold = plan.recipe, plan.recipe.metrics.threshold
    bars = thresholds_in_use(predictions, threshold)
    for m in plan.measures:
        value = value_of(m, predictions, protocol.deltas, recipe, bars)
        outcome.found.setdefault(m.name, []).append(value)
        if m.fair:
            end = upper_end(m, value, predictions, protocol.deltas, recipe)
            outcome.upper.setdefault(m.name, []).append(end)
    outcome.counts.append(counts_of(predictions, bars))
    outcome.utility.append(utilities(predictions, bars))
    outcome.degenerate.update(degenerate_tasks(outcome.counts[-1], threshold))
    return bars


def _train(
    plan: Plan, candidate: Candidate, seed: int, tasks: tuple[Task, ...], device: str, trial: optuna.Trial | None = None
) -> tuple[FairTrainer, dict[str, ResidentLoader | FileLoader]]:
    data = dataclasses.replace(data_for(candidate.recipe, candidate.method, plan.dataset(seed)), tasks=tasks)
    trainer = make_trainer(candidate.recipe, candidate.method, data, tasks, seed, device=resolve_device(device))
    judge, epochs = trainer.select_by, itertools.count()
    if trial is not None and judge is not None and plan.tune.pruner is not None:

        def judged(results: Results) -> float:
            score = judge(results)
            trial.report(score, next(epochs))
            if trial.should_prune():
                raise optuna.TrialPruned
            return score

        trainer.select_by = judged
    model = candidate.recipe.model_for(candidate.method)
    sources = loaders(data, candidate.train.batch_size, seed, resolve_device(device), model)
    trainer.train(sources["train"], None, candidate.train.epochs, sources["val"])
    return trainer, sources


@dataclass
class Worker:
    """Runs trials of a study until none waits, or the ``deadline`` (``time.monotonic()``) is over; ``note`` is told each result.

    ``grace``: seconds without a sign of life after which a worker on another machine counts as dead; ``keeper``: keeps files.
    """

    plan: Plan
    protocol: Protocol
    total: int
    device: str = "auto"
    deadline: float = float("inf")
    grace: float = GRACE
    keeper: Keeper | None = None
    note: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        """Start watching."""
        self.reaper = Reaper(self.grace)

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.deadline

    def __call__(self, study: optuna.Study) -> None:
        """Run one trial after another until none waits or the time is over; see :meth:`check_hope`."""
        while not self.late and (trial := self.ask(study)) is not None:
            self.run(study, trial)
            self.check_hope(study)

    def ask(self, study: optuna.Study) -> optuna.Trial | None:
        """Return a trial that waits, after queueing again what dead colleagues left; None where nothing waits."""
        self.reaper(study)
        fill(study, self.plan, self.total)
        return claim(study, self.total)

    def begin(self, trial: optuna.Trial) -> Candidate:
        """Ask the sampler for a trial's parameters, and note in the trial what it trains."""
        found = self.plan.candidate(trial)
        for name, value in (("seeds", found.seeds), ("method", found.method), ("recipe", found.recipe.to_dict())):
            trial.set_user_attr(name, value)
        return found

    def run(self, study: optuna.Study, trial: optuna.Trial) -> None:
        """Train and measure one trial alone, and tell the study, whatever happens."""
        with self.telling(study, trial):
            with Heartbeat(study, trial, self.grace):
                candidate = self.begin(trial)
                try:
                    outcome = run_trial(
                        self.plan, candidate, self.protocol, device=self.device, trial=trial, keeper=self.keeper
                    )
                except optuna.TrialPruned:
                    outcome = None
            self.finish(study, trial, candidate, outcome)

    @contextmanager
    def telling(self, study: optuna.Study, trial: optuna.Trial) -> Iterator[None]:
        """Within it, what goes wrong is told to the study as the trial's failure, and the study goes on."""
        try:
            yield
        except UpdateFinishedTrialError:
            self.note(f"trial {trial.number} had been given up as lost; another worker has it")
        except CheckpointError:
            raise
        except KeyboardInterrupt:
            give_up(study, trial, "interrupted")
            raise
        except (FairMTLError, *_FAILURES) as error:
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                with suppress(OSError):  # another worker, or the same command later, runs it again
                    give_up(study, trial, "no room for its results")
                raise
            with suppress(UpdateFinishedTrialError), warnings.catch_warnings(action="ignore"):
                trial.set_user_attr("error", f"{type(error).__name__}: {error}")
                trial.set_user_attr("traceback", traceback.format_exc())
                study.tell(trial, state=TrialState.FAIL)
                self.note(f"trial {trial.number} failed: {error}")

    def finish(self, study: optuna.Study, trial: optuna.Trial, candidate: Candidate, outcome: Outcome | None) -> None:
        """Tell the study what a trial found; None is a pruned one."""
        if outcome is None:
            study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            self.note(f"trial {trial.number} pruned")
            return
        if self.keeper is not None:
            self.keeper.measured(trial, outcome, candidate.recipe)
        trial.set_user_attr("validation", outcome.found)
        for name in ("upper", "counts", "utility", "degenerate", "train_s"):
            trial.set_user_attr(name, getattr(outcome, name))
        excess = {c.text: outcome.excess(c) for c in self.plan.constraints}
        excess[DEGENERATE] = float(len(outcome.degenerate))
        for text, value in excess.items():
            trial.set_constraint(text, value)
        # optuna-dashboard 0.21 reads this attribute only
        study._storage.set_trial_system_attr(trial._trial_id, "constraints", list(excess.values()))
        values = [outcome.mean(m.name) for m in self.plan.objectives]
        trial.set_user_attr(SEAL, seal_of(trial.params, values, trial.user_attrs))
        study.tell(trial, values)
        self.note(
            f"trial {trial.number} " + ", ".join(f"{m.name} {outcome.mean(m.name):.4f}" for m in self.plan.measures)
        )

    def check_hope(self, study: optuna.Study) -> None:
        """Raise FairMTLError where every trial so far has failed."""
        done = [t for t in slots(study).values() if t.state.is_finished()]
        failed = [t for t in done if t.state == TrialState.FAIL]
        if len(failed) >= _HOPELESS and len(failed) == len(done):
            raise FairMTLError(
                f"all {len(failed)} trials so far failed{failures(failed)}. The tracebacks are in the trials' user attributes"
            )
