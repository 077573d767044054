"""The shrinkage envelope against brute force over centre and strength; what Bias does and does not measure."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as skm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import libmtl_fair as lf
from libmtl_fair.errors import DataError
from libmtl_fair.metrics import FixedDeltaAudit, below_curve, least_bias, native_error, score_targets, shrinkage_curve
from libmtl_fair.predictions import Predictions


def model(seed=0, n=300, rates=(0.3, 0.1), sharp=2.0):
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal(n)
    scores, labels = {}, {}
    for task, rate in zip("ab", rates):
        logit = np.log(rate / (1 - rate)) + latent + 0.5 * rng.standard_normal(n)
        scores[task] = 1 / (1 + np.exp(-sharp * logit))
        labels[task] = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(float)
    labels["a"][:10] = np.nan
    return scores, labels


def brier(scores, labels):
    seen = {t: ~np.isnan(y) for t, y in labels.items()}
    return float(np.mean([skm.brier_score_loss(labels[t][seen[t]], scores[t][seen[t]]) for t in scores]))


def bias(scores, delta):
    return FixedDeltaAudit(delta, exact=True).run(scores).bias


def shrunk(scores, a, c):
    return {t: c + a * (s - c) for t, s in scores.items()}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_envelope_is_the_least_over_centres_and_strengths_by_brute_force(seed):
    scores, labels = model(seed)
    curve = shrinkage_curve(scores, labels, 0.2)
    pooled = float(np.mean([s.mean() for s in scores.values()]))
    for a in (1.0, 0.8, 0.5, 0.2):
        row = curve[np.isclose(curve.a, a)].iloc[0]
        centres = [*np.linspace(0, 1, 201), 0.5, pooled]
        errors = [brier(shrunk(scores, a, c), labels) for c in centres]
        assert row.brier <= min(errors) + 1e-12 and row.brier == pytest.approx(min(errors), abs=1e-5)
        assert row.brier == pytest.approx(brier(shrunk(scores, a, row.c), labels), abs=1e-12)
        assert row.bias == pytest.approx(bias(shrunk(scores, a, pooled), 0.2), abs=1e-12)
    for steps, slopes in ((curve.bias, curve.bias_slope), (curve.brier, curve.brier_slope)):
        between = np.diff(steps) / np.diff(curve.a)  # a falls: each secant lies between the tangents of its ends
        assert (between <= slopes[:-1] + 1e-9).all() and (between >= slopes[1:] - 1e-9).all()
    assert least_bias(curve, 0.0) == bias(scores, 0.2)  # no shrunk model has so little error: the plain model itself
    assert least_bias(curve, 1.0) == 0.0


def test_one_centre_is_the_old_curve_and_never_below_the_envelope():
    scores, labels = model()
    half, best = (shrinkage_curve(scores, labels, 0.2, centre=c) for c in (0.5, None))
    row = half[np.isclose(half.a, 0.7)].iloc[0]
    assert row.brier == pytest.approx(brier(shrunk(scores, 0.7, 0.5), labels), abs=1e-12)
    assert (half.brier >= best.brier - 1e-12).all() and (half.bias == best.bias).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0.001, 1),
    st.floats(0, 1),
    st.floats(0.05, 0.5),
    st.integers(3, 60),
    st.floats(0.3, 4),
)
def test_a_plain_model_shrunk_to_any_centre_is_never_below(seed, a, c, delta, n, sharp):
    scores, labels = model(seed, n + 12, sharp=sharp)
    curve, moved = shrinkage_curve(scores, labels, delta), shrunk(scores, a, c)
    below, gap = below_curve(bias(moved, delta), brier(moved, labels), curve)
    assert not below and gap <= 1e-6


def test_a_near_constant_model_is_never_certified():
    rng = np.random.default_rng(3)
    for seed in range(5):
        scores, labels = model(seed, 600)
        noisy = {
            t: np.full(600, np.nanmean(y)) + 0.01 * (labels["b"] + rng.standard_normal(600)) for t, y in labels.items()
        }
        near = {t: np.clip(s, 0, 1) for t, s in noisy.items()}
        seen = ~np.isnan(labels["a"])
        assert 0.55 < skm.roc_auc_score(labels["b"][seen], near["b"][seen]) < 0.95
        assert not below_curve(bias(near, 0.275), brier(near, labels), shrinkage_curve(scores, labels, 0.275))[0]


def test_a_gain_that_no_shrinking_gives_is_below_and_nan_is_not():
    scores, labels = model(0, 2000, rates=(0.5, 0.1), sharp=1.0)
    curve = shrinkage_curve(scores, labels, 0.2)
    assert below_curve(0.5 * bias(scores, 0.2), brier(scores, labels), curve)[0]
    assert not below_curve(float("nan"), 0.1, curve)[0] and not below_curve(0.0, float("nan"), curve)[0]
    assert np.isnan(least_bias(curve.assign(bias_slope=np.nan), 0.1))
    with pytest.raises(DataError, match="at least two"):
        shrinkage_curve({"a": [0.1]}, {"a": [1]}, 0.1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.floats(0, 1), st.floats(0, 1))
def test_allowing_a_larger_error_never_raises_the_competitor(seed, error, more):
    scores, labels = model(seed, 60)
    curve = shrinkage_curve(scores, labels, 0.2)
    assert least_bias(curve, error + more) <= least_bias(curve, error) + 1e-12


def test_published_bias_depends_on_marginals_alone():
    scores, _ = model(0, 500)
    rng = np.random.default_rng(0)
    permuted = {t: rng.permutation(s) for t, s in scores.items()}
    for exact in (True, False):
        audit = FixedDeltaAudit(0.2, exact=exact, pool_size=500)
        found = [audit.run(s).bias for s in (scores, permuted)]
        assert found[0] == pytest.approx(found[1], abs=1e-12 if exact else 0.01)


def test_on_ranks_the_published_bias_is_one_constant_for_every_model():
    found = []
    for seed in range(3):
        scores, _ = model(seed, 4000)
        ranks = {t: (s.argsort().argsort() + 0.5) / 4000 for t, s in scores.items()}
        found.append(bias(ranks, 0.275))
    assert found == pytest.approx([(1 - 0.275) ** 3 / 3] * 3, abs=1e-6)


def predictions(tasks, outputs, labels):
    every = {t.name: t.score(outputs[t.name]) for t in tasks}
    return Predictions(tuple(tasks), every, outputs, labels, {}, {})


def test_native_errors_of_every_kind_of_task():
    g = torch.Generator().manual_seed(0)
    n = 200
    tasks = [lf.Binary("b"), lf.Regression("r", 10, 2, (-1.0, 1.5)), lf.Multiclass("m", 3), lf.Multilabel("l", 2)]
    outputs = {t.name: torch.randn(n, t.out_features, generator=g, dtype=torch.float64) for t in tasks}
    labels = {
        "b": (torch.rand(n, generator=g) < 0.4).float(),
        "r": torch.randn(n, generator=g).double(),
        "m": torch.randint(0, 3, (n,), generator=g),
        "l": (torch.rand(n, 2, generator=g) < 0.5).float(),
    }
    labels["b"][:5], labels["r"][:5], labels["m"][:5], labels["l"][:5] = torch.nan, torch.nan, -100, torch.nan
    found = predictions(tasks, outputs, labels)
    by_hand = []
    for task in tasks:
        out, y = outputs[task.name].numpy()[5:], labels[task.name].numpy()[5:]
        if task.name == "b":
            s, want = 1 / (1 + np.exp(-out[:, 0])), y
        elif task.name == "r":
            s, want = (np.clip((v + 1.0) / (2.5 + 1e-6), 0, 1) for v in (out[:, 0], y))
        elif task.name == "m":
            p = np.exp(out) / np.exp(out).sum(1, keepdims=True)
            s, want = p.max(1), p.argmax(1) == y
        else:
            p = 1 / (1 + np.exp(-out))
            s, want = p.max(1), y[np.arange(n - 5), p.argmax(1)]
        by_hand.append(((s - want) ** 2).mean())
        assert np.isnan(score_targets(task, outputs[task.name], labels[task.name])[:5]).all()
    assert native_error(found) == pytest.approx(np.mean(by_hand), abs=1e-12)
    curve = shrinkage_curve(
        found.scores, {t.name: score_targets(t, outputs[t.name], labels[t.name]) for t in tasks}, 0.1
    )
    assert curve.brier.iloc[0] == pytest.approx(native_error(found), abs=1e-12)
