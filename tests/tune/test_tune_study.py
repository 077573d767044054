from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from libmtl_fair import tune
from libmtl_fair.errors import CheckpointError, FairMTLError, RecipeError
from libmtl_fair.tune import samplers, worker
from libmtl_fair.tune.budget import claim, fill, give_up, slots
from libmtl_fair.tune.plan import Plan


def test_a_study_tries_the_known_settings_first_and_stops_at_the_total(small):
    study = tune.tune(small(), 5)
    trials = study.get_trials()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 5
    assert [t.user_attrs.get("role") for t in trials] == ["baseline", "as written", "defaults", "published", None]
    assert study.metric_names == ["macro_auc", "eo_difference"]
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    baseline = trials[0].user_attrs["recipe"]["methods"]
    assert baseline == {"plain": {"weighting": "EW"}}


def test_the_total_is_a_total(small, tmp_path):
    storage = tmp_path / "study.journal"
    tune.tune(small(), 2, storage=storage)
    study = tune.tune(small(), 4, storage=storage)
    assert len(study.get_trials(states=[TrialState.COMPLETE])) == 4
    again = tune.tune(small(), 4, storage=storage)
    assert [t.values for t in again.get_trials()] == [t.values for t in study.get_trials()]
    fewer = tune.tune(small(), 2, storage=storage)
    assert len(fewer.get_trials()) == 4


def test_one_process_is_reproducible(small):
    first, second = (tune.tune(small(), 6) for _ in range(2))
    assert [t.values for t in first.get_trials()] == [t.values for t in second.get_trials()]
    assert [t.params for t in first.get_trials()] == [t.params for t in second.get_trials()]


def test_another_recipe_objective_or_space_is_refused_with_the_difference(small, tmp_path):
    storage = tmp_path / "study.journal"
    tune.tune(small(), 1, storage=storage)
    with pytest.raises(RecipeError, match=r"recipe.train.epochs: 1 -> 2") as caught:
        tune.tune(small("train.epochs=2"), 1, storage=storage)
    assert "--new-study" in str(caught.value)
    with pytest.raises(RecipeError, match=r'objectives.dp_difference: \(none\) -> "minimize"'):
        tune.tune(small(), 1, ("macro_auc", "dp_difference"), storage=storage)
    with pytest.raises(RecipeError, match=r"space.lr.high: 0.01 -> 0.02"):
        tune.tune(small("tune.space.lr={low: 5.0e-4, high: 0.02, log: true}"), 1, storage=storage)
    other = tune.tune(small("train.epochs=2"), 1, storage=storage, new_study=True)
    assert other.study_name == "small-2"
    same = tune.tune(small("train.epochs=2"), 1, storage=storage, new_study=True)
    assert (same.study_name, len(same.get_trials())) == ("small-2", 1)


def test_text_that_decides_nothing_may_change(small, tmp_path):
    storage = tmp_path / "study.journal"
    tune.tune(small(), 1, storage=storage)
    study = tune.tune(small("description=other", "tune.trials=9", "output.report=false"), 1, storage=storage)
    assert len(study.get_trials()) == 1


def test_without_resume_a_study_with_trials_is_refused(small, tmp_path):
    tune.tune(small(), 1, storage=tmp_path / "j.log")
    with pytest.raises(CheckpointError, match="has trials already"):
        tune.tune(small(), 1, storage=tmp_path / "j.log", resume=False)


def test_a_study_of_someone_else_is_refused(small, tmp_path):
    with worker.warnings.catch_warnings():
        storage = tune.open_storage(tmp_path / "j.log")
        theirs = optuna.create_study(study_name="small", storage=storage, directions=["maximize", "minimize"])
        theirs.add_trial(optuna.create_trial(values=[1, 2]))
    with pytest.raises(CheckpointError, match="did not make"):
        tune.tune(small(), 1, storage=tmp_path / "j.log")


def test_a_failing_trial_keeps_its_traceback_and_the_study_goes_on(small, monkeypatch):
    real, calls = worker.run_trial, []

    def fails(plan, candidate, *args, **options):
        calls.append(candidate.seeds)
        if len(calls) == 2:
            raise RuntimeError("a bad day")
        return real(plan, candidate, *args, **options)

    monkeypatch.setattr(worker, "run_trial", fails)
    study = tune.tune(small(), 3)
    states = [t.state for t in study.get_trials()]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    marks = study.get_trials()[1].user_attrs
    assert marks["error"] == "RuntimeError: a bad day"
    assert "in fails" in marks["traceback"]
    assert marks["seeds"] == calls[1]


def test_a_study_whose_trials_all_fail_stops(small, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("always")

    monkeypatch.setattr(worker, "run_trial", fails)
    with pytest.raises(FairMTLError, match="all 5 trials so far failed; the last: RuntimeError: always"):
        tune.tune(small(), 50)


def test_an_interruption_leaves_a_study_that_resumes_with_the_same_trial(small, tmp_path, monkeypatch):
    real, calls = worker.run_trial, []

    def stops(plan, candidate, *args, **options):
        calls.append((candidate.seeds, candidate.recipe.to_dict()))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(plan, candidate, *args, **options)

    monkeypatch.setattr(worker, "run_trial", stops)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(small(), 6, storage=tmp_path / "j.log")
    study = tune.tune(small(), 6, storage=tmp_path / "j.log")
    complete = study.get_trials(states=[TrialState.COMPLETE])
    assert sorted(t.user_attrs["slot"] for t in complete) == list(range(6))
    assert calls[5] == calls[4]  # the lost slot comes first, as it would have
    lost = [t for t in study.get_trials() if "lost" in t.user_attrs]
    assert [t.user_attrs["lost"] for t in lost] == ["interrupted"]


def test_seeds_a_trial_are_averaged(small):
    study = tune.tune(small("tune.seeds_per_trial=2"), 1)
    (trial,) = study.get_trials()
    found = trial.user_attrs["validation"]["macro_auc"]
    assert len(found) == len(set(trial.user_attrs["seeds"])) == 2
    assert trial.values[0] == pytest.approx(sum(found) / 2)


def test_constraints_are_kept_in_both_forms(small):
    study = tune.tune(small("tune.constraints=[eo_difference <= 0.05, macro_auc >= 0.99]"), 2)
    for trial in study.get_trials():
        marks = trial.user_attrs
        auc, end = marks["validation"]["macro_auc"][0], marks["upper"]["eo_difference"][0]
        assert end > marks["validation"]["eo_difference"][0]
        assert trial.constraints["eo_difference <= 0.05"] == pytest.approx(end - 0.05)
        assert trial.system_attrs["constraints"] == pytest.approx([end - 0.05, 0.99 - auc, len(marks["degenerate"])])
    trials, feasible = tune.front(study)
    assert not feasible
    assert trials


def test_a_single_utility_can_prune(small, monkeypatch):
    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", lambda self, study, trial: trial.number == 1)
    settings = ["tune.objectives=[macro_auc]", "tune.pruner=median", "tune.constraints=[eo_difference <= 0.3]"]
    study = tune.tune(small(*settings), 3)
    assert [t.state.name for t in study.get_trials()] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert study.get_trials()[0].intermediate_values
    with pytest.raises(RecipeError, match="one objective"):
        tune.tune(small("tune.pruner=median"), 1)


def test_several_methods_are_tuned_with_their_own_parameters(small):
    recipe = small("methods.fairmt={weighting: FairMT}", "tune.methods=[relif, fairmt]", "tune.space={lr: builtin}")
    study = tune.tune(recipe, 8)
    for trial in study.get_trials()[1:]:
        if trial.params:
            assert set(trial.params) == {"method", f"{trial.params['method']}.lr"}
    assert {t.user_attrs["method"] for t in study.get_trials()} >= {"plain", "relif", "fairmt"}


def test_the_time_limit_stops_before_the_next_trial(small):
    study = tune.tune(small(), 50, timeout=0.01)
    assert len(study.get_trials(states=[TrialState.COMPLETE])) <= 1


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (["tune.objectives=[macro_ac]"], {}, "did you mean 'macro_auc'"),
        (["tune.objectives=[bias@0.3]"], {}, "unknown audit.delta '0.3'"),
        (["tune.objectives=[incme/auc]"], {}, "did you mean 'income'"),
        (["tune.constraints=[eo_difference < 0.05]"], {}, "eo_difference <= 0.05"),
        (["tune.sampler=tpee"], {}, "did you mean 'tpe'"),
        (["tune.objectives=[macro_auc]", "tune.pruner=medain"], {}, "did you mean 'median'"),
        (["tune.space={tagret: builtin}"], {}, "tune.space.tagret.*did you mean 'target'"),
        (["tune.space={lr: {low: 0.1, high: 0.01}}"], {}, "low < high"),
        (["tune.space={beta: {low: -1.0, high: 1.0}}"], {}, "beta must be above 0"),
        (["tune.space={colour: [1, 2]}"], {}, "unknown setting of ReLiF 'colour'"),
        (["tune.methods=[relof]"], {}, "did you mean 'relif'"),
        ([], {"workers": 2}, "give one as text"),
        ([], {"workers": 0}, "workers must be"),
        ([], {"n_trials": 0}, "number of trials"),
        ([], {"storage": "grpc://nowhere"}, "expected grpc://host:port"),
    ],
)
def test_what_makes_no_sense_is_refused_before_training(small, changes, options, message):
    with pytest.raises(RecipeError, match=message):
        tune.tune(small(*changes), **{"n_trials": 1, **options})


def test_a_slot_is_claimed_once_and_queued_again_when_lost(small, tmp_path):
    plan = Plan.make(small())
    storage = tune.open_storage(tmp_path / "j.log")
    study = optuna.create_study(storage=storage, directions=["maximize", "minimize"])
    fill(study, plan, 3)
    fill(study, plan, 3)
    assert len(study.get_trials()) == 3
    taken = [claim(study, 3) for _ in range(4)]
    assert [t and t.number for t in taken] == [0, 1, 2, None]
    assert give_up(study, taken[1], "test")
    assert not give_up(study, taken[1], "test")
    fill(study, plan, 3)
    assert {slot: t.number for slot, t in slots(study).items()} == {0: 0, 1: 3, 2: 2}


def test_a_slot_queued_twice_runs_once(small):
    study = optuna.create_study(directions=["maximize", "minimize"])
    for _ in range(2):
        study.enqueue_trial({}, user_attrs={"slot": 0})
    assert claim(study, 1).number == 0
    assert claim(study, 1) is None
    assert study.get_trials()[1].state == TrialState.FAIL


def test_own_settings_are_tried_after_the_known_ones(small):
    recipe = small(
        "methods.strong={weighting: ReLiF, lambda_0: 5.0}",
        "tune.enqueue=[strong, {target: 0.05, hidden: [16]}]",
    )
    trials = tune.tune(recipe, 6).get_trials()
    assert [t.user_attrs.get("role") for t in trials][4:] == ["strong", "enqueued"]
    assert trials[4].user_attrs["recipe"]["methods"] == {"strong": {"weighting": "ReLiF", "lambda_0": 5.0}}
    assert trials[5].params == {"target": 0.05, "hidden": "16", "lr": 0.01}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("relof", "did you mean 'relif'"),
        ("{taget: 0.1}", "did you mean 'target'"),
        ("{target: 0.9}", "outside of the search space; widen tune.space.target"),
        ("{method: plain}", "unknown method 'plain'"),
    ],
)
def test_own_settings_that_do_not_fit_are_refused(small, entry, message):
    with pytest.raises(RecipeError, match=message):
        tune.tune(small(f"tune.enqueue=[{entry}]"), 1)


def test_nsga2_crosses_settings_and_is_recorded(small, monkeypatch):
    monkeypatch.setitem(samplers.SAMPLERS["nsga2"], "population_size", 3)
    bred = []
    real = samplers.Evolution.sample_relative

    def watched(self, study, trial, space):
        bred.append(real(self, study, trial, space))
        return bred[-1]

    monkeypatch.setattr(samplers.Evolution, "sample_relative", watched)
    study = tune.tune(small("tune.sampler=nsga2"), 12)
    assert [t.state for t in study.get_trials()] == [TrialState.COMPLETE] * 12
    assert study.user_attrs["sampler"]["name"] == "nsga2"
    assert study.user_attrs["sampler"]["population_size"] == 3
    assert any(bred)
    with pytest.raises(RecipeError, match="nsga2 crosses the settings of one method"):
        tune.tune(small("methods.other={weighting: ReLiF}", "tune.methods=[relif, other]", "tune.sampler=nsga2"), 1)
