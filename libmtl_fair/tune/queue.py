"""The budget of a study as slots: trial 0 to total - 1, each finished exactly once, whoever works and whoever dies.

Slots are queued as waiting trials. A worker claims one, which the storage grants to one worker only; slots without a trial
that counts (a dead worker's, or new ones after a raised total) are queued again.
"""

from __future__ import annotations

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from libmtl_fair.tune.heartbeat import SLOT, give_up, is_counted
from libmtl_fair.tune.objective import Plan


def slots(study: optuna.Study) -> dict[int, FrozenTrial]:
    """Return slot -> the trial that holds it: a finished one before others, then the lowest number."""
    held: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        if not is_counted(trial):
            continue
        slot = trial.user_attrs[SLOT]
        if slot not in held or (trial.state.is_finished() and not held[slot].state.is_finished()):
            held[slot] = trial
    return held


def fill(study: optuna.Study, plan: Plan, total: int) -> None:
    """Queue every slot below ``total`` that no trial holds; a lost trial's slot with that trial's parameters."""
    held = slots(study)
    missing = [slot for slot in range(total) if slot not in held]
    if not missing:
        return
    lost = {t.user_attrs[SLOT]: t for t in study.get_trials(deepcopy=False) if SLOT in t.user_attrs}
    for slot in missing:
        params, marks = plan.queue(slot)
        if slot in lost:
            params = lost[slot].system_attrs.get("fixed_params", {}) | lost[slot].params
            marks = {**marks, "again": lost[slot].number}
        study.enqueue_trial(params, user_attrs={**marks, SLOT: slot})


def claim(study: optuna.Study, total: int) -> optuna.Trial | None:
    """Return a trial to run, taken from the queue, or None where nothing waits."""
    storage = study._storage
    for waiting in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        if waiting.user_attrs.get(SLOT, total) >= total:
            continue
        try:
            if not storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                continue
        except UpdateFinishedTrialError:
            continue
        if slots(study)[waiting.user_attrs[SLOT]].number != waiting.number:
            give_up(study, waiting, "another trial holds its slot")
            continue
        study._thread_local.cached_all_trials = None
        return optuna.Trial(study, waiting._trial_id)
    return None


def finished(study: optuna.Study, total: int) -> int:
    """Return how many slots below ``total`` have a finished trial."""
    return sum(slot < total and trial.state.is_finished() for slot, trial in slots(study).items())
