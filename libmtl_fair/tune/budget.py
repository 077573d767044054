"""The budget of a study as slots: trial 0 to total - 1, each finished exactly once, whoever works and whoever dies.

Slots are queued as waiting trials. A worker claims one, which the storage grants to one worker only; slots without a trial
that counts (a dead worker's, or new ones after a raised total) are queued again.
"""

from __future__ import annotations

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from libmtl_fair.tune.plan import SLOT, Plan

LOST = "lost"


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
            params = lost[slot].system_attrs.get("fixed_params", {}) | lost[slot].params
            marks = {**marks, "again": lost[slot].number}
        study.enqueue_trial(params, user_attrs={**marks, SLOT: slot})


def claim(study: optuna.Study, total: int) -> optuna.Trial | None:
    """Return a trial to run, taken from the queue, or None where nothing waits."""
    for waiting in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        if waiting.user_attrs.get(SLOT, total) >= total:
            continue
        try:
            if not study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                continue
        except UpdateFinishedTrialError:
            continue
        if slots(study)[waiting.user_attrs[SLOT]].number == waiting.number:
            study._thread_local.cached_all_trials = None
            return optuna.Trial(study, waiting._trial_id)
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
