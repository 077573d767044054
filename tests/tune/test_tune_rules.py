"""What a chosen trial keeps to: upper ends, utilities of every task, decisions that are some."""

from __future__ import annotations

import json
import math

import numpy as np
import optuna
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from sklearn.metrics import confusion_matrix, roc_auc_score

from libmtl_fair import tune
from libmtl_fair.errors import RecipeError
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS
from libmtl_fair.metrics import FixedDeltaAudit, base_rate_thresholds, judge
from libmtl_fair.recipe import load_recipe
from libmtl_fair.tune import worker
from libmtl_fair.tune.plan import DESCRIBED, Candidate, Plan
from libmtl_fair.tune.results import hand_back
from libmtl_fair.tune.selection import Rules, explain, standings, upper

RARE = """\
name: rare
data: {table: rare.csv, tasks: {rare: {kind: binary}, common: {kind: binary}}, sensitive: [sex]}
model: {hidden: [8]}
train: {epochs: 4, batch_size: 128, optimizer: {optim: adam, lr: 0.02}}
seeds: [0, 1]
methods: {plain: {weighting: EW}, fair: {weighting: GroupRegulariser}}
tune: {objectives: [macro_auc, eo_difference], space: {weight_decay: [0.0, 0.1]}, enqueue: [{weight_decay: 0.1}, {weight_decay: 0.0}]}
"""


@pytest.fixture
def rare(tmp_path):
    """A function of the strength of the signal that returns a recipe on a table with rates of .08 and .3, and its file."""

    def make(strength, *changes):
        draw = np.random.default_rng(0)
        man, x = draw.integers(0, 2, 3000), draw.normal(size=(3000, 3))
        frame = pd.DataFrame(x, columns=["a", "b", "c"]).assign(sex=np.where(man == 1, "m", "f"))
        for name, rate, column in (("rare", 0.08, 0), ("common", 0.3, 1)):
            score = max(strength, 2 * column) * x[:, column] + 0.5 * man + draw.logistic(size=3000)
            frame[name] = (score > np.quantile(score, 1 - rate)).astype(int)
        frame.to_csv(tmp_path / "rare.csv", index=False)
        (tmp_path / "rare.yaml").write_text(RARE)
        return load_recipe(tmp_path / "rare.yaml", changes), tmp_path / "rare.yaml"

    return make


def test_a_plain_model_that_selects_nobody_is_not_praised_for_its_equalised_odds(rare, cli, tmp_path):
    """Before: eo_difference 0.0000, chosen, and no warning."""
    _, file = rare(0.7)
    done = cli("tune", file, "--trials", 4, "--select", "max_disparity=0.05", "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "no trial meets the constraints without being degenerate: those that miss least" in text
    assert "no trial keeps every rule; this one misses least: rare selects nobody" in text
    assert "the baseline: rare selects nobody" in text
    assert "metrics.threshold: base_rate" in text
    held = pd.read_csv(tmp_path / "o" / "trials.csv")
    assert held["refused"].str.contains("rare selects nobody").all()
    # decisions at the base rate are some, and are then what the same question is about
    more = ["--set", "metrics.threshold=base_rate", "--new-study"]
    done = cli("tune", file, "--trials", 2, "--select", "max_disparity=0.9", "--out", tmp_path / "o", *more)
    assert done.returncode == 0, done.stderr
    assert "selects nobody" not in done.stdout


def test_a_degenerate_trial_is_never_on_the_front_nor_chosen_unless_told(rare):
    study = tune.tune(rare(4.0, "train.epochs=12")[0], 6)
    trials = study.get_trials()
    idle = [t for t in trials if "rare" in t.user_attrs["degenerate"]]
    assert {t.params["weight_decay"] for t in idle} == {0.1}
    assert trials[0] not in idle
    assert all("selects nobody (0.0 %)" in t.user_attrs["degenerate"]["rare"] for t in idle)
    fairest = min(trials, key=lambda t: t.values[1])
    assert fairest in idle  # by its number alone it would be the best
    front, feasible = tune.front(study)
    assert feasible
    asked = [*front, tune.knee(study), tune.select(study, 0.0), tune.select(study, 1.0), tune.chosen(study)]
    assert not {t.number for t in asked} & {t.number for t in idle}
    assert tune.chosen(study, str(fairest.number)).number == fairest.number
    assert f"refused: trial {fairest.number}: rare selects nobody" in " ".join(explain(study, front[0]))
    assert "chosen by number: rare selects nobody" in explain(study, fairest, str(fairest.number))[0]
    assert {t.number for t in study.best_trials} == {t.number for t in front}  # Optuna's dashboard shows the same


def test_ends_are_those_of_the_verdict_on_the_same_people(small, monkeypatch):
    kept = {}
    real = worker.measure

    def keeps(plan, predictions, protocol, outcome):
        kept.setdefault(len(kept), predictions)
        return real(plan, predictions, protocol, outcome)

    monkeypatch.setattr(worker, "measure", keeps)
    recipe = small("tune.objectives=[macro_auc, never_married/eo_difference, bias]", "data.subset=3000")
    study = tune.tune(recipe, 1)
    (trial,), p = study.get_trials(), kept[0]
    counts = [
        confusion_matrix(p.labels["never_married"][rows], p.scores["never_married"][rows] > 0.5).ravel()
        for rows in (p.groups["sex"] == 0, p.groups["sex"] == 1)
    ]
    for level in (None, 0.5, 0.99):
        verdict = judge(counts, n_permutations=0, confidence=level or 0.95)
        assert upper(study, trial, "never_married/eo_difference", level) == pytest.approx(verdict.high)
    assert trial.user_attrs["validation"]["never_married/eo_difference"][0] == pytest.approx(verdict.value)
    scores, parts = {name: s.numpy() for name, s in p.scores.items()}, []
    for fold in range(10):
        rest = np.arange(len(p)) % 10 != fold
        parts.append(FixedDeltaAudit(0.275, exact=True).run({name: s[rest] for name, s in scores.items()}).bias)
    value = trial.user_attrs["validation"]["bias"][0]
    error = math.sqrt(9 / 10 * sum((x - np.mean(parts)) ** 2 for x in parts))
    assert upper(study, trial, "bias") == pytest.approx(value + 1.959963985 * error)
    assert upper(study, trial, "bias", 0.5) == pytest.approx(value + 0.67448975 * error)


def test_an_upper_end_over_the_bound_is_not_feasible(small):
    recipe = small("data.subset=3000", "tune.objectives=[macro_auc, never_married/eo_difference]")
    first = tune.tune(recipe, 2).get_trials()[1]
    name = "never_married/eo_difference"
    value, end = (first.user_attrs[of][name][0] for of in ("validation", "upper"))
    between = (value + end) / 2
    study = tune.tune(small("data.subset=3000", *_about(name, between)), 2)
    held = study.get_trials()[1]
    assert held.user_attrs["validation"][name][0] == value < between
    assert held.constraints[f"{name} <= {between:g}"] > 0
    stands = standings(study, Rules(), between)[0][1]
    assert any(f"{name} may be as high as {end:.4f} (found {value:.4f})" in text for text in stands.why)
    assert standings(study, Rules(confidence=1e-6), value + 0.01)[0][1].miss[2] <= stands.miss[2]


def _about(name, bound):
    return f"tune.objectives=[macro_auc, {name}]", f"tune.constraints=['{name} <= {bound:g}']"


def study_of(trials, *, seeds=(0,)):
    """A study whose trials are (macro_auc, eo_difference, attributes)."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.set_user_attr(DESCRIBED, {"objectives": {"macro_auc": "maximize", "eo_difference": "minimize"}})
    for number, (auc, eo, marks) in enumerate(trials):
        attrs = {
            "validation": {"macro_auc": [auc], "eo_difference": [eo]},
            "seeds": list(seeds),
            "slot": number,
            **marks,
        }
        attrs |= {"role": "baseline"} if number == 0 else {}
        study.add_trial(optuna.create_trial(values=[auc, eo], user_attrs=attrs))
    return study


def folds(*values):
    """Utilities of seeds that do not depend on the fold."""
    return [{"a/accuracy": [value] * 11} for value in values]


def test_a_utility_may_lose_what_is_within_noise_or_told(small):
    draw = np.random.default_rng(1)
    people = draw.normal(0, 0.002, 11)  # the same people were drawn for both: what they have in common is no noise
    paired = [{"a/accuracy": list(0.8 + people)}], [{"a/accuracy": list(0.795 + people)}]
    study = study_of([(0.80, 0.2, {"utility": paired[0]}), (0.79, 0.1, {"utility": paired[1]})])
    assert tune.select(study, 0.15).number == 0
    assert tune.select(study, 0.15, within=0.6).number == 1
    assert tune.knee(study, within=0.4).number == 0
    assert "a/accuracy loses 0.50 points (noise 0.00)" in explain(study, tune.select(study, 0.15))[-1]
    assert "a/accuracy loses 0.50 points (within 0.40)" in " ".join(
        explain(study, tune.knee(study), rules=Rules(within=0.4))
    )
    own = draw.normal(0, 0.002, 11)
    own[0] = people[0]
    study = study_of(
        [(0.80, 0.2, {"utility": paired[0]}), (0.79, 0.1, {"utility": [{"a/accuracy": list(0.795 + own)}]})]
    )
    assert tune.select(study, 0.15).number == 1
    for bad in (-1, math.inf, math.nan):
        with pytest.raises(RecipeError, match="within is what a utility may lose"):
            tune.select(study, 0.15, within=bad)
    with pytest.raises(RecipeError, match="confidence must lie between 0 and 1"):
        tune.select(study, 0.15, confidence=95)


def test_the_noise_of_seeds_is_that_of_paired_differences():
    before, after = (0.80, 0.70, 0.75), (0.797, 0.694, 0.7495)
    loss = np.subtract(before, after)
    allowed = student.ppf(0.975, 9) * loss.std(ddof=1) / math.sqrt(3)
    assert loss.mean() > 0 and loss.mean() < allowed
    marks = [{"utility": folds(*before)}, {"utility": folds(*after)}, {"utility": folds(*np.subtract(before, 0.003))}]
    study = study_of([(0.8, 0.2, marks[0]), (0.79, 0.1, marks[1]), (0.79, 0.01, marks[2])], seeds=(0, 1, 2))
    assert [s.miss[1] == 0 for s in standings(study, Rules())[0]] == [True, True, False]
    assert tune.select(study, 0.15).number == 1


def test_the_utilities_that_are_guarded_are_scikit_learns_on_the_same_people(small, monkeypatch):
    recipe = small("metrics.threshold=0.3")
    plan = Plan.make(recipe)
    kept, real = [], worker.measure
    monkeypatch.setattr(worker, "measure", lambda *args: (kept.append(args[1]), real(*args))[1])
    outcome = worker.run_trial(plan, Candidate(recipe, "plain", plan.seeds), worker.Protocol({"0.275": 0.275}, {}))
    labels, scores = kept[0].labels["income"].numpy(), kept[0].scores["income"].numpy()
    rest = np.arange(len(labels)) % 10 != 3
    found = outcome.utility[0]
    assert set(found) == {f"{task}/{metric}" for task in ("income", "never_married") for metric in ("auc", "accuracy")}
    for place, rows in ((0, rest | True), (4, rest)):
        assert found["income/auc"][place] == pytest.approx(roc_auc_score(labels[rows], scores[rows]))
        assert found["income/accuracy"][place] == pytest.approx(((scores > 0.3) == (labels > 0.5))[rows].mean())


ANY = st.tuples(
    st.floats(0.5, 0.9), st.floats(0, 0.3), st.booleans(), st.floats(0, 0.2), st.sampled_from([0.7, 0.7, 0.65])
)


@settings(max_examples=40, deadline=None)
@given(trials=st.lists(ANY, min_size=1, max_size=7), bound=st.floats(0, 0.4))
def test_what_is_chosen_keeps_every_rule_where_any_trial_does(trials, bound):
    study = study_of(
        [
            (
                auc,
                eo,
                {
                    "upper": {"eo_difference": [eo + wide]},
                    "utility": folds(accuracy),
                    "degenerate": {"a": "selects nobody"} if idle else {},
                },
            )
            for auc, eo, idle, wide, accuracy in trials
        ]
    )
    base = trials[0][4]
    kept = [
        number
        for number, (_, eo, idle, wide, accuracy) in enumerate(trials)
        if not idle and eo + wide <= bound + 1e-12 and accuracy >= base
    ]
    chosen = tune.select(study, bound).number
    if kept:
        assert chosen == max(kept, key=lambda n: (trials[n][0], -n))
        assert not any(
            "misses least" in text for text in explain(study, study.get_trials()[chosen], f"max_disparity={bound!r}")
        )
    elif not all(idle for _, _, idle, _, _ in trials):
        assert not trials[chosen][2]
    front, feasible = tune.front(study)
    assert feasible == (not all(idle for _, _, idle, _, _ in trials))
    assert not (feasible and any(trials[t.number][2] for t in front))


def test_stacked_trials_keep_the_same_rules(rare):
    recipe, _ = rare(4.0, "train.epochs=12")
    alone, stacked = (tune.tune(recipe, 5, stacked=count).get_trials() for count in (1, 3))
    for one, other in zip(alone, stacked):
        assert one.params == other.params
        assert one.user_attrs["seeds"] == other.user_attrs["seeds"]
        assert set(one.user_attrs["degenerate"]) == set(other.user_attrs["degenerate"])
        for name, ends in one.user_attrs["upper"].items():
            assert other.user_attrs["upper"][name] == pytest.approx(ends, abs=5e-3)
        assert other.user_attrs["utility"][0]["common/auc"] == pytest.approx(
            one.user_attrs["utility"][0]["common/auc"], abs=1e-3
        )


def test_fairmt_is_searched_by_what_matters(small):
    recipe = small("methods.relif={weighting: FairMT}", "tune.space={}", "data.subset=1500")
    (space,) = Plan.make(recipe).space.values()
    assert {"target", "sharpness", "fpr_weight"} <= {p.name for p in space}
    own = OUR_WEIGHTINGS["FairMT"].settings_class.search_space()
    assert all(own[p.name] == p.entry for p in space if p.name in own)
    study = tune.tune(recipe, 4)
    assert [t.state.name for t in study.get_trials()] == ["COMPLETE"] * 4
    target = study.get_trials()[3].params["target"]
    assert tune.to_recipe(study.get_trials()[3]).methods["tuned"].args["target"] == target


def test_thresholds_of_the_base_rate_come_from_validation_and_are_held(small, tmp_path, monkeypatch):
    recipe = small("metrics.threshold=base_rate", "tune.objectives=[macro_accuracy, never_married/eo_difference]")
    study, seen, real = tune.tune(recipe, 1), [], worker.value_of

    def watches(measure, predictions, deltas, recipe, bars):
        seen.append((predictions, bars))
        return real(measure, predictions, deltas, recipe, bars)

    monkeypatch.setattr(worker, "value_of", watches)
    list(hand_back(study, study.get_trials()[0], recipe, tmp_path, "cpu"))
    (val, bars), (test, held) = seen[0], seen[-1]
    assert len(val) == len(test) and val is not test
    assert held == bars == base_rate_thresholds(val) != base_rate_thresholds(test)
    labels, chosen = test.labels["income"].numpy() > 0.5, test.scores["income"].numpy() > np.float32(bars["income"])
    other = test.labels["never_married"].numpy() > 0.5
    right = (other == (test.scores["never_married"].numpy() > np.float32(bars["never_married"]))).mean()
    found = json.loads((tmp_path / "result.json").read_text())["test"]["0"]
    assert found["macro_accuracy"][0] == pytest.approx(((labels == chosen).mean() + right) / 2)


def test_groups_with_too_few_people_are_listed_and_leave_the_gap(small):
    recipe = small(
        "data.sensitive=[race]", "data.subset=6000", "tune.objectives=[macro_auc, never_married/eo_difference]"
    )
    study = tune.tune(recipe, 1)
    (trial,) = study.get_trials()
    counts = trial.user_attrs["counts"][0]["never_married"]["race"]
    few = [name for name, (tn, fp, fn, tp) in counts.items() if min(tn + fp, fn + tp) < 10 or tn + fp + fn + tp < 30]
    assert 0 < len(few) < len(counts)
    (said,) = [text for text in explain(study, trial) if "too few people" in text]
    assert all(f"race {name} (never_married)" in said for name in few)
    rates = [(tp / (tp + fn), fp / (fp + tn)) for name, (tn, fp, fn, tp) in counts.items() if name not in few]
    gap = max(max(column) - min(column) for column in zip(*rates))
    assert trial.user_attrs["validation"]["never_married/eo_difference"][0] == pytest.approx(gap)
