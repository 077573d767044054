from __future__ import annotations

import optuna
import pytest
import torch
from optuna.trial import TrialState

from libmtl_fair import tune
from libmtl_fair.tune import study
from libmtl_fair.tune.plan import Candidate, Plan
from libmtl_fair.tune.stacked import Stack
from libmtl_fair.tune.storage import open_storage
from libmtl_fair.tune.worker import protocol_of, run_trial


@pytest.fixture
def watched(monkeypatch):
    """How many members each epoch of each stack had, by the stack."""
    seen: dict[int, list[int]] = {}
    real = Stack.epoch

    def epoch(self):
        seen.setdefault(id(self), []).append(len(self.members))
        return real(self)

    monkeypatch.setattr(Stack, "epoch", epoch)
    return seen


def assert_as_alone(recipe, found):
    plan = Plan.make(recipe)
    for trial in found:
        candidate = tune.to_recipe(trial)
        (method,) = candidate.methods
        again = Candidate(candidate, method, trial.user_attrs["seeds"])
        alone = run_trial(plan, again, protocol_of(optuna.create_study(), plan, "cpu"))
        assert [alone.mean(m.name) for m in plan.objectives] == pytest.approx(trial.values, abs=2e-3)


def test_a_stacked_study_finds_what_a_sequential_one_finds(small, tmp_path, watched):
    recipe = small("tune.seeds_per_trial=2")
    found = tune.tune(recipe, 7, storage=tmp_path / "s.journal", stacked=3)
    trials = found.get_trials()
    assert [t.state.name for t in trials] == ["COMPLETE"] * 7
    assert sorted(t.user_attrs["slot"] for t in trials) == list(range(7))
    assert_as_alone(recipe, trials)
    assert max(map(max, watched.values())) > 2


@pytest.mark.parametrize(
    "method",
    ["{weighting: FairMT, rho: 0.3}", "{weighting: LambdaMix, lam: 0.8, heads: {loss: glf}}", "{weighting: ReLiF}"],
)
def test_fair_methods_are_stacked(small, watched, method):
    said = []
    recipe = small(f"methods.relif={method}", "tune.space={lr: builtin}", "train.epochs=2")
    found = tune.tune(recipe, 5, stacked=5, note=said.append)
    assert not any("alone" in line for line in said)
    assert_as_alone(recipe, found.get_trials())
    assert watched


def test_a_pruned_member_leaves_its_place_to_the_next(small, monkeypatch, watched):
    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", lambda self, study, trial: trial.number in (1, 2))
    settings = ["tune.objectives=[macro_auc]", "tune.pruner=median", "tune.constraints=[eo_difference <= 0.3]"]
    recipe = small(*settings, "train.epochs=3", "tune.space={lr: builtin, target: builtin}")
    found = tune.tune(recipe, 6, stacked=2)
    states = [t.state.name for t in found.get_trials()]
    assert states == ["COMPLETE", "PRUNED", "PRUNED", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert [len(t.intermediate_values) for t in found.get_trials()] == [3, 1, 1, 3, 3, 3]
    (rounds,) = watched.values()
    # the baseline takes three epochs; beside it 1, then 2, then 3 begin, one epoch after another
    assert rounds[:4] == [2, 2, 2, 2]
    assert sum(rounds) == 3 * 4 + 2
    complete = [t for t in found.get_trials() if t.state == TrialState.COMPLETE]
    assert_as_alone(small("train.epochs=3", "tune.objectives=[macro_auc]"), complete)


def test_trials_of_other_widths_are_stacked_beside(small, watched):
    found = tune.tune(small("tune.space={hidden: [[8], [16]]}"), 8, stacked=8)
    assert [t.state.name for t in found.get_trials()] == ["COMPLETE"] * 8
    assert len(watched) == 2


def test_others_are_trained_alone_and_say_so(small, watched):
    said = []
    recipe = small("methods.relif={weighting: GradNorm}", "tune.space={lr: builtin}")
    found = tune.tune(recipe, 3, stacked=3, note=said.append)
    assert [t.state.name for t in found.get_trials()] == ["COMPLETE"] * 3
    assert any("trained alone: weighting GradNorm (stacked: an MLP" in line for line in said)
    assert len(watched) == 1  # the baseline


def test_a_member_that_diverges_is_told_as_alone_and_the_others_finish(small):
    said = []
    recipe = small("tune.space={lr: [0.01, 1.0e+30]}", "tune.enqueue=[{lr: 1.0e+30}, {lr: 0.01}]")
    found = tune.tune(recipe, 6, stacked=6, note=said.append)
    trials = found.get_trials()
    bad = [t for t in trials if t.params.get("lr") == 1e30]
    assert bad
    assert all(t.state == TrialState.FAIL and "finite" in t.user_attrs["error"] for t in bad)
    assert all(t.state == TrialState.COMPLETE for t in trials if t not in bad)
    assert any("is trained alone: it diverged" in line for line in said)


def test_an_interrupted_stack_resumes(small, tmp_path, monkeypatch):
    real, calls = Stack.epoch, []

    def stops(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Stack, "epoch", stops)
    recipe = small("train.epochs=2", "tune.space={lr: builtin}")
    with pytest.raises(KeyboardInterrupt):
        tune.tune(recipe, 5, storage=tmp_path / "j.log", stacked=3)
    found = tune.tune(recipe, 5, storage=tmp_path / "j.log", stacked=3)
    complete = found.get_trials(states=[TrialState.COMPLETE])
    assert sorted(t.user_attrs["slot"] for t in complete) == list(range(5))
    lost = [t.user_attrs["lost"] for t in found.get_trials() if "lost" in t.user_attrs]
    assert lost
    assert set(lost) == {"interrupted"}
    assert len(optuna.load_study(study_name="small", storage=open_storage(tmp_path / "j.log")).trials) == 5 + len(lost)


def test_on_a_gpu_stacked_is_the_default(monkeypatch):
    assert study.at_once(0, "cpu") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert study.at_once(0, "auto") == study.ON_GPU > 1
    assert study.at_once(1, "cuda") == 1


def test_a_recipe_may_say_how_many(small, watched):
    tune.tune(small("tune.stacked=4", "tune.space={lr: builtin}"), 4, device="cpu")
    assert max(map(max, watched.values())) == 4


def test_a_stack_that_cannot_train_leaves_its_trials_to_be_trained_alone(small, monkeypatch):
    def fails(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Stack, "epoch", fails)
    said = []
    found = tune.tune(small(), 3, stacked=3, note=said.append)
    assert [t.state.name for t in found.get_trials()] == ["COMPLETE"] * 3
    assert any("alone: their stack cannot be trained: out of memory" in line for line in said)
