"""The budget of a study as slots: trial 0 to total - 1, each finished exactly once, whoever works and whoever dies.

Slots are queued as waiting trials; the storage grants one to one worker only, and slots without a trial that counts are queued
again. Optuna 5 has heartbeats and retries for databases and ``optimize`` only, not for journals, proxies, or trials asked and
told. Here a worker writes its address and a growing counter into its trial, which is stale when its worker was on this machine
and is gone, or when its counter has not moved for ``grace`` seconds of the observer's own clock. A stale trial is marked
``lost`` and failed, and its slot queued with the same parameters.
"""

from __future__ import annotations

import os
import threading
import time

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from libmtl_fair.locks import GRACE, address, alive, machine
from libmtl_fair.tune.plan import SLOT, Plan
from libmtl_fair.tune.storage import storage_failures

LOST, SAMPLED, WORKER, BEAT = "lost", "sampled", "worker", "heartbeat"


def slots(study: optuna.Study) -> dict[int, FrozenTrial]:
    """Return slot -> the trial that holds it: not a lost one, a finished one before others, then the lowest number."""
    held: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        slot = trial.user_attrs.get(SLOT)
        if slot is None or (trial.state == TrialState.FAIL and LOST in trial.user_attrs):
            continue
        if slot not in held or (trial.state.is_finished() and not held[slot].state.is_finished()):
            held[slot] = trial
    return held


def finished(study: optuna.Study, total: int) -> int:
    """Return how many slots below ``total`` have a finished trial."""
    return sum(slot < total and trial.state.is_finished() for slot, trial in slots(study).items())


def fill(study: optuna.Study, plan: Plan, total: int) -> None:
    """Queue every slot below ``total`` that no trial holds; a lost trial's slot with that trial's parameters."""
    held = slots(study)
    missing = [slot for slot in range(total) if slot not in held]
    if not missing:
        return
    known = plan.known()
    lost = {t.user_attrs[SLOT]: t for t in study.get_trials(deepcopy=False) if SLOT in t.user_attrs}
    for slot in missing:
        params, marks = known[slot] if slot < len(known) else ({}, {})
        if slot in lost:
            given = lost[slot].system_attrs.get("fixed_params", {})
            params = given | lost[slot].params
            sampled = bool(lost[slot].user_attrs.get(SAMPLED) or params.keys() - given.keys())
            marks = {**marks, "again": lost[slot].number, SAMPLED: sampled}
        study.enqueue_trial(params, user_attrs={**marks, SLOT: slot})


def claim(study: optuna.Study, total: int) -> optuna.Trial | None:
    """Return a trial to run, the lowest slot of the queue, or None where nothing waits."""
    queue = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    for waiting in sorted(queue, key=lambda trial: int(trial.user_attrs.get(SLOT, total))):
        if waiting.user_attrs.get(SLOT, total) >= total:
            continue
        try:
            if not study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                continue
        except UpdateFinishedTrialError:
            continue
        if slots(study)[waiting.user_attrs[SLOT]].number == waiting.number:
            study._thread_local.cached_all_trials = None
            trial = optuna.Trial(study, waiting._trial_id)
            if waiting.user_attrs.get(SAMPLED):
                trial.relative_params  # noqa: B018  NSGA-II counts it to a generation then
            return trial
        give_up(study, waiting, "another trial holds its slot")
    return None


def give_up(study: optuna.Study, trial: FrozenTrial | optuna.Trial, why: str) -> bool:
    """Fail a running trial so that its slot is queued again; return False where it finished in the meantime."""
    try:
        study._storage.set_trial_user_attr(trial._trial_id, LOST, why)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    return True


_WORKING: set[tuple[int, int]] = set()
"""Studies and trials that this process works on."""


class Heartbeat:
    """Signs of life of one running trial, written by a thread until left."""

    def __init__(self, study: optuna.Study, trial: optuna.Trial, grace: float = GRACE) -> None:
        self._storage, self._id = study._storage, trial._trial_id
        self._place = study._study_id, trial._trial_id
        self._every, self._stop = grace / 5, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._storage.set_trial_user_attr(self._id, WORKER, address())
        _WORKING.add(self._place)
        self._thread.start()
        return self

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self._every):
            count += 1
            try:
                self._storage.set_trial_user_attr(self._id, BEAT, count)
            except (UpdateFinishedTrialError, KeyError):
                return
            except storage_failures():
                continue  # the training thread meets the storage's trouble itself and reports it

    def __exit__(self, *_: object) -> None:
        _WORKING.discard(self._place)
        self._stop.set()
        self._thread.join(timeout=30)


class Reaper:
    """Finds stale trials of a study and gives them up."""

    def __init__(self, grace: float = GRACE) -> None:
        self.grace, self._here = grace, machine()
        self._seen: dict[int, tuple[int | None, float]] = {}

    def __call__(self, study: optuna.Study) -> list[int]:
        """Give up every stale trial; return their numbers."""
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [
            trial.number
            for trial in running
            if self._is_stale(study, trial) and give_up(study, trial, "its worker died")
        ]

    def _is_stale(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        worker, beat, now = trial.user_attrs.get(WORKER), trial.user_attrs.get(BEAT), time.monotonic()
        if SLOT not in trial.user_attrs:
            return False
        if worker is not None and worker["machine"] == self._here:
            if worker["pid"] == os.getpid():  # this process; it let go of a trial where the storage took no word of it
                return (study._study_id, trial._trial_id) not in _WORKING
            return not alive(worker["pid"], worker["started"])
        last, since = self._seen.setdefault(trial.number, (beat, now))
        if beat != last:
            self._seen[trial.number] = (beat, now)
        return beat == last and now - since > self.grace
