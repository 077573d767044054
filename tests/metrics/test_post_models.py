from __future__ import annotations

from dataclasses import replace

import fairlearn.metrics as flm
import numpy as np
import pytest
import torch
from fairlearn.postprocessing import ThresholdOptimizer
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import libmtl_fair as lf
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.metrics import thresholds_in_use, utility
from libmtl_fair.metrics.fairlearn_bridge import ScorePassThrough
from libmtl_fair.metrics.post_models import (
    STRENGTHS,
    Blend,
    Point,
    fit_offsets,
    fit_thresholds,
    path,
    pick,
    worst_gap,
)
from libmtl_fair.predictions import Predictions


def predictions(n=900, seed=0, shift=1.5, ties=False, two_logits=False):
    g = torch.Generator().manual_seed(seed)
    tasks = (lf.Binary("b"), lf.Binary("c"), lf.Regression("r", 40.0, 12.0), lf.Multiclass("m", 3))
    sex, race = torch.randint(0, 2, (n,), generator=g), torch.randint(-1, 3, (n,), generator=g)
    outputs = {t.name: torch.randn(n, t.out_features, generator=g) for t in tasks}
    outputs["b"] += shift * sex[:, None] - 1
    outputs["c"] -= shift / 2 * sex[:, None]
    if ties:
        outputs["b"] = outputs["b"].round(decimals=0)
    labels = {
        "b": (torch.rand(n, generator=g) < torch.sigmoid(outputs["b"][:, 0])).float(),
        "c": (torch.rand(n, generator=g) < torch.sigmoid(outputs["c"][:, 0])).float(),
        "r": torch.randn(n, generator=g),
        "m": torch.randint(0, 3, (n,), generator=g),
    }
    labels["b"][:30] = torch.nan
    if two_logits:
        outputs["c"] = torch.cat([-outputs["c"] / 2, outputs["c"] / 2], 1)
    scores = {t.name: t.score(outputs[t.name]) for t in tasks}
    names = {"sex": ["Female", "Male"], "race": ["a", "b", "c"]}
    return Predictions(tasks, scores, outputs, labels, {"sex": sex, "race": race}, names)


def rates(p, task, attribute, cut=0.5, label=1):
    """TPR (or FPR, or selection rate) of each group, one by one."""
    probability = p.task(task).probabilities(p.outputs[task]).double().numpy()
    y, found = p.labels[task].numpy(), []
    for g in range(len(p.group_names[attribute])):
        counted = (p.groups[attribute].numpy() == g) & ((y == label) if label is not None else ~np.isnan(y))
        found.append((probability[counted] > cut).mean())
    return np.array(found)


@pytest.mark.parametrize(("constraint", "label"), [("equalized_odds", 1), ("demographic_parity", None)])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
@pytest.mark.parametrize("ties", [False, True])
def test_offsets_are_those_of_a_search_by_brute_force(constraint, label, threshold, ties):
    p = predictions(ties=ties)
    found = fit_offsets(p, "sex", constraint, threshold=threshold)
    for task in ("b", "c"):
        before = rates(p, task, "sex", threshold, label)
        after = rates(found.apply(p), task, "sex", threshold, label)
        for g, group in enumerate(p.group_names["sex"]):
            offset, best, least = found.offsets[task][group], before[g], 0.0
            assert offset >= 0
            z = p.outputs[task][p.groups["sex"] == g, 0].double().numpy()
            for tried in np.unique(np.log(threshold / (1 - threshold)) - z[z < 3] + 2e-6):
                moved = replace(p, outputs={**p.outputs, task: p.outputs[task] + tried})
                rate = rates(moved, task, "sex", threshold, label)[g]
                if tried > 0 and best < rate <= before.max():
                    best, least = rate, tried
            assert after[g] == pytest.approx(best, abs=1e-12)
            assert offset == pytest.approx(least, abs=2e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-3, 3), attribute=st.sampled_from(["sex", "race"]))
def test_along_the_path_no_rate_falls_and_no_gap_grows(seed, shift, attribute):
    p = predictions(300, seed, shift)
    found = fit_offsets(p, attribute, "equal_opportunity")
    tpr = np.array([[rates(found.apply(p, strength=s), t, attribute) for t in ("b", "c")] for s in STRENGTHS])
    assert (np.diff(tpr, axis=0) >= 0).all()
    assert (np.diff(np.ptp(tpr, axis=2), axis=0) <= 1e-12).all()
    assert tpr[-1].max() <= tpr[0].max() + 1e-12
    assert all(o == pytest.approx(found.apply(p, strength=0).outputs[k]) for k, o in p.outputs.items())


def test_offsets_leave_other_tasks_unknown_groups_and_small_groups_alone():
    p = predictions(two_logits=True)
    race = p.groups["race"].clone()
    race[:9] = 2
    race[9:][race[9:] == 2] = -1
    p = replace(p, groups={**p.groups, "race": race})
    found = fit_offsets(p, "race")
    assert "c" not in found.offsets["b"]
    moved = found.apply(p)
    assert moved.outputs["r"] is p.outputs["r"]
    assert moved.outputs["m"] is p.outputs["m"]
    for task in ("b", "c"):
        change = p.task(task).logit(moved.outputs[task]) - p.task(task).logit(p.outputs[task])
        assert (change >= -1e-6).all()
        assert change[race < 0].abs().max() == 0
        assert change[race == 2].abs().max() == 0
    assert torch.equal(moved.scores["b"], torch.sigmoid(moved.outputs["b"][:, 0]))


def test_offsets_of_several_attributes_are_of_their_intersection():
    p = predictions(4000)
    assert set(fit_offsets(p, ["sex", "race"]).offsets["b"]) == {
        f"{s} & {r}" for s in ("Female", "Male") for r in "abc"
    }
    assert set(fit_offsets(p, None).offsets["b"]) == set(fit_offsets(p, ["sex", "race"]).offsets["b"])


def test_offsets_at_the_base_rate_agree_with_the_threshold_of_the_lifted_scores():
    p = predictions(4000)
    moved = fit_offsets(p, "sex", "equal_opportunity", threshold="base_rate").apply(p)
    cut = thresholds_in_use(moved, "base_rate")
    for task in ("b", "c"):
        assert np.ptp(rates(moved, task, "sex", cut[task])) < 0.01 < np.ptp(rates(p, task, "sex"))


def test_offsets_refuse_what_they_do_not_know():
    with pytest.raises(RecipeError, match="constraint of offsets 'equalised_odds'.*did you mean"):
        fit_offsets(predictions(), "sex", "equalised_odds")
    with pytest.raises(DataError, match="sensitive attribute 'sx'"):
        fit_offsets(predictions(), "sx")


@pytest.mark.parametrize("constraint", ["equalized_odds", "demographic_parity"])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_thresholds_decide_as_fairlearns_optimizer(constraint, threshold):
    val, test = predictions(), predictions(seed=1)
    made = fit_thresholds(val, "sex", constraint, threshold=threshold, seed=3).apply(test)
    for task in ("b", "c"):
        seen = ~val.labels[task].isnan().numpy()

        def score(p, task=task):
            return 1 / (1 + np.exp(-p.outputs[task][:, 0].double().numpy()))

        sex = np.array(["Female", "Male"], dtype=object)
        theirs = ThresholdOptimizer(
            estimator=ScorePassThrough(), constraints=constraint, prefit=True, predict_method="predict"
        )
        y = val.labels[task].numpy()[seen].astype(int)
        theirs.fit(
            score(val)[seen, None].astype(np.float32), y, sensitive_features=sex[val.groups["sex"].numpy()][seen]
        )
        wanted = theirs.predict(
            score(test)[:, None], sensitive_features=sex[test.groups["sex"].numpy()], random_state=3
        )
        ours = test.task(task).probabilities(made.outputs[task]).numpy() > 0.5
        assert (ours == wanted).mean() > 0.998  # scores are float32 where it was fitted
    assert made.decided == ("b", "c")
    assert made.outputs["r"] is test.outputs["r"]
    assert thresholds_in_use(made, threshold) == thresholds_in_use(made, "base_rate") == {"b": 0.5, "c": 0.5}


def test_decisions_have_no_auc_and_survive_saving(tmp_path):
    val = predictions()
    made = fit_thresholds(val, "sex").apply(val)
    found = utility(Predictions.load(made.save(tmp_path / "p.parquet")))
    for task in ("b", "c"):
        assert all(np.isnan(found[task][name]) for name in ("auc", "brier", "log_loss"))
        assert found[task]["accuracy"] > 0.5
    assert set(found["macro"]) == {"accuracy", "r2"}  # a mean over fewer tasks would not compare


def test_thresholds_mix_with_the_models_own_decisions_by_strength():
    p = predictions(4000)
    fitted = fit_thresholds(p, "sex")
    own = p.task("b").probabilities(p.outputs["b"]).numpy() > 0.5

    def decided(strength):
        return torch.sigmoid(fitted.apply(p, strength=strength).outputs["b"][:, 0]).numpy() > 0.5

    assert (decided(0.0) == own).all()
    changed = [decided(s) != own for s in (0.25, 0.5, 1.0)]
    assert (changed[0] <= changed[1]).all()
    assert (changed[1] <= changed[2]).all()
    gaps = [worst_gap(fitted.apply(p, strength=s), "sex") for s in (0.0, 0.5, 1.0)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.05


def test_thresholds_leave_groups_without_either_class_to_the_model():
    p = predictions()
    labels = p.labels["b"].clone()
    labels[(p.groups["race"] == 2) & (labels == 1)] = 0
    p = replace(p, labels={**p.labels, "b": labels})
    fitted = fit_thresholds(p, "race")
    assert fitted.fitted["b"].groups == ("a", "b")
    kept = ((p.groups["race"] == 2) | (p.groups["race"] < 0)).numpy()
    own = p.task("b").probabilities(p.outputs["b"]).numpy() > 0.5
    made = torch.sigmoid(fitted.apply(p).outputs["b"][:, 0]).numpy() > 0.5
    assert (made[kept] == own[kept]).all()


def test_a_blend_ends_at_the_two_models():
    a, b = predictions(), predictions(seed=1)
    for strength, model in ((0.0, a), (1.0, b)):
        made = Blend().apply(a, b, strength=strength)
        for task in ("b", "c", "r", "m"):
            assert torch.allclose(made.outputs[task], model.outputs[task], atol=1e-7)
            assert torch.allclose(made.scores[task], model.scores[task], atol=1e-7)
    half = Blend().apply(a, b, strength=0.5).outputs["m"]
    assert torch.allclose(half, (a.outputs["m"] + b.outputs["m"]) / 2)
    with pytest.raises(DataError, match="same tasks on the same people"):
        Blend().apply(a, predictions(100))


def test_the_worst_gap_is_fairlearns_largest_over_binary_tasks():
    p = predictions()
    found = []
    for task in ("b", "c"):
        seen = ~p.labels[task].isnan().numpy()
        chosen = (p.task(task).probabilities(p.outputs[task]).numpy() > 0.4)[seen]
        y, sex = p.labels[task].numpy()[seen], p.groups["sex"].numpy()[seen]
        found.append(flm.equalized_odds_difference(y, chosen, sensitive_features=sex))
    assert worst_gap(p, "sex", thresholds={"b": 0.4, "c": 0.4}) == pytest.approx(max(found), abs=1e-12)


def test_one_person_is_no_gap():
    p = predictions()
    race = torch.zeros_like(p.groups["race"])
    race[30:35] = 1
    assert np.isnan(worst_gap(replace(p, groups={"race": race}, group_names={"race": ["a", "b"]}), "race"))


def test_a_point_is_picked_by_the_least_strength_that_reaches_the_target():
    points = [Point(0.0, 0.3), Point(0.5, float("nan")), Point(0.7, 0.1), Point(1.0, 0.1)]
    assert pick(points).strength == 0.7
    assert pick(points, 0.3).strength == 0.0
    assert pick(points, 0.2).strength == 0.7
    assert pick(points, 0.05).strength == 1.0
    p = predictions()
    offsets = fit_offsets(p, "sex")
    along = path(offsets.along(p), lambda q: worst_gap(q, "sex"))
    assert [x.strength for x in along] == list(STRENGTHS)
    assert along[-1].disparity == worst_gap(offsets.apply(p), "sex")
    assert roc_auc_score(p.labels["c"], offsets.apply(p).outputs["c"][:, 0]) > 0.5
