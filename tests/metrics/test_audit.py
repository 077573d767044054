from __future__ import annotations

import tracemalloc
from itertools import combinations
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.metrics import (
    FixedDeltaAudit,
    audit,
    conformal_delta,
    pair_distances,
    quantile_delta,
    reference_pairs,
)
from libmtl_fair.metrics.audit import draw_pool, excess_tables

scores32 = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=25)


def brute(p, q, delta):
    gaps = np.abs(np.asarray(p)[:, None] - np.asarray(q)[None])
    return np.maximum(gaps - delta, 0).mean(), (gaps > delta).mean()


@settings(max_examples=200, deadline=None)
@given(scores32, scores32, st.sampled_from([0.0, 0.125, 0.25, 0.275, 0.5, 1.0]))
def test_exact_equals_all_pairs(p, q, delta):
    report = FixedDeltaAudit(delta, exact=True).run({"a": p, "b": q})
    bias, rate = brute(p, q, delta)
    assert report.bias == pytest.approx(bias, abs=1e-12)
    assert report.violation_rate == pytest.approx(rate, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(scores32, min_size=2, max_size=4), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_bias_and_rate_never_rise_with_delta(columns, d1, d2, exact):
    scores = {str(i): c for i, c in enumerate(columns)}
    low, high = sorted([d1, d2])
    a = FixedDeltaAudit(low, n_pairs=64, exact=exact).run(scores)
    b = a.at(high)
    assert b.bias <= a.bias + 1e-12
    assert b.violation_rate <= a.violation_rate + 1e-12
    assert abs(a.bias - b.bias) <= high - low + 1e-12


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_bias_is_lipschitz_in_the_threshold_matrix(seed, exact):
    rng = np.random.default_rng(seed)
    scores = {t: rng.random(40) for t in "abc"}
    d1, d2 = (np.triu(rng.random((3, 3)), 1) for _ in range(2))
    one = FixedDeltaAudit(d1 + d1.T, n_pairs=64, exact=exact).run(scores)
    two = one.at(d2 + d2.T)
    assert abs(one.bias - two.bias) <= np.abs(d1 - d2).sum() / 3 + 1e-12


def test_sampled_converges_to_exact():
    rng = np.random.default_rng(0)
    scores = {"a": rng.random(200), "b": rng.random(200) ** 2, "c": rng.random(200) ** 3}
    exact = FixedDeltaAudit(0.2, exact=True).run(scores)
    sampled = FixedDeltaAudit(0.2, pool_size=200, n_pairs=200_000).run(scores)
    assert sampled.bias == pytest.approx(exact.bias, abs=2e-3)
    assert sampled.violation_rate == pytest.approx(exact.violation_rate, abs=5e-3)


def test_sampled_protocol_by_hand():
    rng = np.random.default_rng(1)
    scores = {"a": rng.random(1000), "b": rng.random(1000)}
    report = FixedDeltaAudit(0.1).run(scores)
    pool = np.random.default_rng(0).choice(1000, size=256, replace=False)
    draws = np.random.default_rng((42, 0, 1))
    x, y = draws.integers(0, 256, 4096), draws.integers(0, 256, 4096)
    gaps = np.abs(scores["a"][pool][x] - scores["b"][pool][y])
    assert report.bias == np.maximum(gaps - 0.1, 0).mean()
    assert report.violation_rate == (gaps > 0.1).mean()
    assert list(report.per_pair.columns) == ["task_a", "task_b", "bias", "violation_rate", "delta", "n_pairs"]


def test_draws_depend_on_seeds_and_sizes_only():
    audit = FixedDeltaAudit(0.0, pool_size=10, n_pairs=50)
    index = np.arange(100) / 100
    two = audit.run({"a": index, "b": index})
    three = audit.run({"a": index, "b": index, "c": index})
    assert two.bias == three.per_pair.bias[0]  # another task changes nothing for this pair
    assert (draw_pool(np.ones(100, bool), 10, 0) == draw_pool(np.ones(100, bool), 10, 0)).all()
    assert two.bias != FixedDeltaAudit(0.0, pool_size=10, n_pairs=50, pair_seed=43).run({"a": index, "b": index}).bias
    assert two.bias != FixedDeltaAudit(0.0, pool_size=10, n_pairs=50, eval_seed=1).run({"a": index, "b": index}).bias


def test_tasks_with_the_same_valid_rows_share_the_pool():
    scores = {"a": np.arange(500) / 500, "b": np.arange(500) / 500}
    pool_gap = FixedDeltaAudit(0.0, pool_size=1, n_pairs=20).run(scores)
    assert pool_gap.bias == 0.0  # one row each, and the same row


def test_matrix_delta_applies_per_pair():
    scores = {"a": [0.0], "b": [0.5], "c": [1.0]}
    delta = np.array([[0, 0.1, 0.2], [0.1, 0, 0.6], [0.2, 0.6, 0]])
    table = FixedDeltaAudit(delta, exact=True).run(scores).per_pair
    assert table.bias.tolist() == pytest.approx([0.4, 0.8, 0.0])
    assert table.violation_rate.tolist() == [1.0, 1.0, 0.0]


def test_absent_task_drops_out_of_the_mean():
    nan = float("nan")
    for exact in (True, False):
        report = FixedDeltaAudit(0.1, exact=exact).run({"a": [0.0, 0.0], "b": [nan, nan], "c": [0.5, nan]})
        assert report.bias == pytest.approx(0.4)
        assert len(report.per_pair) == 1
        assert report.protocol["absent_tasks"] == ["b"]


def test_valid_mask_and_tensors():
    scores = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0, 1.0])}
    valid = {"a": torch.tensor([True, False]), "b": torch.tensor([False, True])}
    assert FixedDeltaAudit(0.5, exact=True).run(scores, valid).bias == 0.5


def test_protocol_states_how_it_was_drawn():
    scores = {"a": np.linspace(0, 1, 300), "b": np.linspace(0, 1, 300)}
    sampled = FixedDeltaAudit(0.3, delta_source="plain model, val, p75").run(scores).to_dict()
    assert sampled["protocol"]["delta_source"] == "plain model, val, p75"
    assert sampled["protocol"]["pools"] == {"a": 256, "b": 256}
    assert {"eval_seed", "pair_seed", "n_pairs"} <= sampled["protocol"].keys()
    exact = FixedDeltaAudit(0.3, exact=True).run(scores).to_dict()
    assert exact["protocol"]["exact"] is True
    assert "pair_seed" not in exact["protocol"]
    assert exact["per_pair"][0]["n_pairs"] == 90_000


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": [0.1]}, "at least two"),
        ({"a": [0.1], "b": [float("nan")]}, "only \\['a'\\] have any"),
        ({"a": [3.0], "b": [0.1]}, "task 'a' must lie in \\[0, 1\\]"),
        ({"a": [[0.1]], "b": [0.1]}, "task 'a' must be \\[N\\]"),
    ],
)
def test_bad_scores(scores, message):
    with pytest.raises(DataError, match=message):
        FixedDeltaAudit(0.1).run(scores)


@pytest.mark.parametrize(
    ("delta", "message"),
    [(np.ones((3, 3)), r"\[2, 2\] matrix"), (-0.1, "at least 0"), ([[0, 0.1], [0.2, 0]], "symmetric")],
)
def test_bad_delta(delta, message):
    with pytest.raises(DataError, match=message):
        FixedDeltaAudit(delta).run({"a": [0.1], "b": [0.2]})


def test_bad_mask_and_sizes():
    with pytest.raises(DataError, match="valid\\['a'\\]"):
        FixedDeltaAudit(0.1).run({"a": [0.1], "b": [0.2]}, {"a": [True, False]})
    with pytest.raises(RecipeError, match="pool_size"):
        FixedDeltaAudit(0.1, pool_size=0)


@settings(max_examples=100, deadline=None)
@given(st.integers(5, 60), st.floats(0.02, 0.9), st.integers(0, 2**31))
def test_conformal_coverage_on_exchangeable_distances(n, alpha, seed):
    draws = np.random.default_rng(seed).random((4000, n + 1))
    deltas = np.array([conformal_delta(row[:n], alpha) for row in draws[:400]])
    missed = (draws[:400, n] > deltas).mean()
    assert missed <= alpha + 4 * np.sqrt(alpha * (1 - alpha) / 400) + 1e-3


def test_conformal_and_quantile_edges():
    assert conformal_delta(np.arange(1, 100) / 100, 0.1) == 0.9  # (n + 1)(1 - alpha) is 90 on paper
    assert quantile_delta([0.2, 0.2], 0.75) == 0.2
    with pytest.raises(DataError, match="alpha"):
        conformal_delta([0.1], 1.0)
    with pytest.raises(DataError, match="p75 is 0.75"):
        quantile_delta([0.1], 75)
    with pytest.raises(DataError, match="finite"):
        quantile_delta([], 0.5)


def test_reference_pairs_are_drawn_as_audit_pairs():
    masks = {t: np.ones(1000, bool) for t in "abc"}
    pairs = reference_pairs(masks)
    pool = np.random.default_rng(0).choice(1000, size=256, replace=False)
    draws = np.random.default_rng((42, 1, 2))
    assert set(pairs) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert (pairs["b", "c"][0] == pool[draws.integers(0, 256, 4096)]).all()


def test_pair_distances_of_shared_and_own_embeddings():
    rng = np.random.default_rng(0)
    h = np.maximum(rng.normal(size=(300, 8)), 0) + 1e-3  # after a ReLU all distances are at most 1/2
    shared = pair_distances(h, ["a", "b"])
    own = pair_distances({"a": h, "b": torch.tensor(h)}, ["a", "b"])
    assert np.allclose(shared, own)
    assert shared.max() <= 0.5
    assert shared.shape == (4096,)
    with pytest.raises(DataError, match="no embedding of task 'b'"):
        pair_distances({"a": h}, ["a", "b"])
    with pytest.raises(DataError, match="two tasks"):
        pair_distances(h, ["a", "b"], {"a": np.zeros(300, bool)})


def _every_pair(scores, delta):
    excess, below = np.zeros((2, len(scores), len(scores)))
    for i, p in enumerate(scores):
        for j, q in enumerate(scores):
            gap = (p - delta)[:, None] - q
            excess[i, j], below[i, j] = np.maximum(gap, 0).sum(), (gap > 0).sum()
    return excess, below


@given(
    sizes=st.lists(st.integers(1, 40), min_size=3, max_size=6),
    levels=st.sampled_from([1, 2, 8, 10**6]),
    delta=st.sampled_from([0.0, 0.1, 0.125, 0.275, 0.999, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
    bent=st.sampled_from([1.0, 8.0]),
)
def test_tables_of_all_task_pairs_equal_brute_force(sizes, levels, delta, seed, bent):
    """Ties, single values, few levels, scores crowded at 0, tolerances out of reach."""
    rng = np.random.default_rng(seed)
    scores = [(rng.integers(0, levels + 1, n) / levels) ** bent for n in sizes]
    found = excess_tables(scores, delta)
    excess, below = _every_pair(scores, delta)
    np.testing.assert_allclose(found[0], excess, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(found[1], below)


def test_both_ways_of_the_exact_audit_agree_on_many_tasks():
    rng = np.random.default_rng(0)
    scores = {f"t{t}": 1 / (1 + np.exp(-rng.normal(rng.normal(), 1, 700 + t))) for t in range(12)}
    scores["t3"][5] = np.nan
    together = FixedDeltaAudit(0.275, exact=True).run(scores)
    with mock.patch.object(audit, "excess_tables") as tables:
        pairs = [
            FixedDeltaAudit(0.275, exact=True).run({a: scores[a], b: scores[b]}) for a, b in combinations(scores, 2)
        ]
    assert not tables.called
    apart = pd.concat([pair.per_pair for pair in pairs], ignore_index=True)
    pd.testing.assert_frame_equal(together.per_pair, apart, rtol=0, atol=1e-12)


def test_crowded_scores_of_many_tasks():
    scores = [np.full(3000, 0.1 * (t % 2)) for t in range(12)]
    report = FixedDeltaAudit(0.05, exact=True).run({str(t): s for t, s in enumerate(scores)})
    assert report.violation_rate == pytest.approx(36 / 66)


def test_memory_of_the_exact_audit_is_bounded_by_the_scores():
    rng = np.random.default_rng(0)
    scores = [rng.random(5000) for _ in range(20)]
    tracemalloc.start()
    excess_tables(scores, 0.275)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 100_000 + 8e6
