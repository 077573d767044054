"""A worker: claims slots of a study, trains them one at a time, and watches for colleagues that died."""

from __future__ import annotations

import errno
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from libmtl_fair.errors import CheckpointError, FairMTLError
from libmtl_fair.recipe.measure import Protocol
from libmtl_fair.tune.artifacts import Keeper
from libmtl_fair.tune.budget import claim, fill, give_up, slots
from libmtl_fair.tune.heartbeat import GRACE, Heartbeat, Reaper
from libmtl_fair.tune.plan import Candidate, Plan
from libmtl_fair.tune.trial import Outcome, run_trial

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


@dataclass
class Worker:
    """Runs trials of a study until none waits.

    Attributes
    ----------
    plan, protocol : what is asked, and the fixed tolerances.
    total : slots of the study.
    device : of this worker's trainings.
    deadline : ``time.monotonic()`` after which no trial is begun.
    grace : seconds without a sign of life after which a worker on another machine counts as dead.
    keeper : keeps each trial's files, None where the storage has no folder for them.
    note : called with one line after each trial.
    """

    plan: Plan
    protocol: Protocol
    total: int
    device: str = "auto"
    deadline: float = float("inf")
    grace: float = GRACE
    keeper: Keeper | None = None
    note: Callable[[str], None] = lambda text: None
    reaper: Reaper = field(init=False)

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
        trial.set_user_attr("seeds", found.seeds)
        trial.set_user_attr("method", found.method)
        trial.set_user_attr("recipe", found.recipe.to_dict())
        return found

    def run(self, study: optuna.Study, trial: optuna.Trial) -> None:
        """Train and measure one trial alone, and tell the study, whatever happens."""

        def on_epoch(epoch: int, score: float) -> None:
            trial.report(score, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        with self.telling(study, trial):
            with Heartbeat(study, trial, self.grace):
                candidate = self.begin(trial)
                try:
                    outcome = run_trial(
                        self.plan,
                        candidate,
                        self.protocol,
                        device=self.device,
                        on_epoch=on_epoch if self.plan.pruner is not None else None,
                        on_trained=self.keeper.trained(trial) if self.keeper else None,
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
            with suppress(UpdateFinishedTrialError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
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
        trial.set_user_attr("train_s", outcome.train_s)
        excess = {c.text: c.excess(outcome.mean(c.measure.name)) for c in self.plan.constraints}
        for text, value in excess.items():
            trial.set_constraint(text, value)
        if excess:  # optuna-dashboard 0.21 reads this attribute only
            study._storage.set_trial_system_attr(trial._trial_id, "constraints", list(excess.values()))
        study.tell(trial, [outcome.mean(m.name) for m in self.plan.objectives])
        line = ", ".join(f"{m.name} {outcome.mean(m.name):.4f}" for m in self.plan.measures)
        self.note(f"trial {trial.number} {line}")

    def check_hope(self, study: optuna.Study) -> None:
        """Stop where every trial fails.

        Raises
        ------
        FairMTLError : every trial so far has failed.
        """
        done = [t for t in slots(study).values() if t.state.is_finished()]
        failed = [t for t in done if t.state == TrialState.FAIL]
        if len(failed) >= _HOPELESS and len(failed) == len(done):
            raise FairMTLError(
                f"all {len(failed)} trials so far failed; the last: {failed[-1].user_attrs.get('error')}. The tracebacks "
                "are in the trials' user attributes"
            )
