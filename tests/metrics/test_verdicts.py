"""Verdicts from counts, against brute force over people, fairlearn and simulations."""

import numpy as np
import pandas as pd
import pytest
import torch
from fairlearn.metrics import demographic_parity_difference, equal_opportunity_difference, equalized_odds_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import libmtl_fair as lf
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.metrics import GroupMetrics, verdicts
from libmtl_fair.metrics.rates import group_counts

FAST = {"n_bootstrap": 0, "n_permutations": 0}


def people(rng, n=600, groups=3, gap=0.0):
    g = rng.integers(0, groups, n)
    y = (rng.random(n) < 0.3 + 0.1 * (g == 0)).astype(int)
    p = (rng.random(n) < 0.2 + 0.4 * y + gap * (g == 0)).astype(int)
    return y, p, g


def test_gap_is_fairlearns():
    rng = np.random.default_rng(0)
    y, p, g = people(rng, gap=0.1)
    counts = group_counts(y, p, g, 3)
    every = {"equalized_odds": equalized_odds_difference, "equal_opportunity": equal_opportunity_difference}
    for metric, of in {**every, "demographic_parity": demographic_parity_difference}.items():
        found = verdicts.judge(counts, metric, **FAST)
        assert found.value == pytest.approx(of(y, p, sensitive_features=g), abs=1e-12)
        assert np.isnan([found.low, found.high, found.p]).all() and not found.distinguishable


@pytest.mark.parametrize("metric", ["equalized_odds", "demographic_parity"])
def test_p_is_that_of_permuting_people_of_one_label(metric):
    rng = np.random.default_rng(1)
    y, p, g = people(rng, n=400, gap=0.05)

    def gap(groups):
        cells = group_counts(y, p, groups, 3)
        return verdicts.judge(cells, metric, **FAST).value

    drawn = []
    for _ in range(1500):
        moved = g.copy()
        for label in (0, 1) if metric == "equalized_odds" else (None,):
            rows = np.flatnonzero(y == label) if label is not None else np.arange(len(y))
            moved[rows] = rng.permutation(g[rows])
        drawn.append(gap(moved))
    by_hand = np.mean(np.array(drawn) >= gap(g) - 1e-12)
    found = verdicts.judge(group_counts(y, p, g, 3), metric, n_bootstrap=0, n_permutations=20_000)
    assert found.p == pytest.approx(by_hand, abs=0.04)
    drawn_at_once = verdicts.chance_gaps([group_counts(y, p, g, 3)], metric, n_permutations=20_000)
    for end in (10, 50, 90):
        assert np.percentile(drawn_at_once, end) == pytest.approx(np.percentile(drawn, end), abs=0.01)


def test_chance_of_the_worst_task_is_the_largest_of_tasks_that_have_two_groups():
    rng = np.random.default_rng(3)
    one, two = (group_counts(*people(rng, n=n), 3) for n in (300, 1500))
    alone = [verdicts.chance_gaps([counts]) for counts in (one, two)]
    both = verdicts.chance_gaps([one, two, one[:1]])
    expected = np.maximum(alone[0], rng.permutation(alone[1]))  # the tasks are permuted one apart from another
    for end in (10, 50, 90):
        assert np.percentile(both, end) == pytest.approx(np.percentile(expected, end), abs=0.01)
    assert np.isnan(verdicts.chance_gaps([one[:1]])).all()


def test_without_a_gap_p_is_uniform():
    rng = np.random.default_rng(2)
    found = []
    for k in range(400):
        y, p, g = people(rng, n=3000)
        found.append(verdicts.judge(group_counts(y, p, g, 3), n_bootstrap=0, n_permutations=199, seed=k).p)
    assert stats.kstest(found, "uniform").pvalue > 0.001
    assert 0.02 < np.mean(np.array(found) <= 0.05) < 0.09


def test_a_gap_of_base_rates_alone_is_none_in_opportunity_and_one_in_parity():
    counts = [[700, 0, 0, 300], [300, 0, 0, 700]]
    assert verdicts.judge(counts).p == 1.0 and not verdicts.judge(counts).distinguishable
    parity = verdicts.judge(counts, "demographic_parity")
    assert parity.distinguishable and parity.low > 0.3 and parity.high < 0.5


def test_headline_gap_that_rests_on_one_person_in_a_group_of_12_is_not_judged_and_is_listed():
    counts = np.array([[800, 200, 120, 380], [700, 190, 110, 370], [11, 0, 1, 0]])
    found = verdicts.judge(counts)
    assert found.used == (0, 1) and found.left_out == (2,)
    assert found.value < 0.05 and not found.distinguishable
    assert verdicts.judge(counts, min_group_size=0, min_class=0).value > 0.7
    # Rows enough, positives not: one person of a large group decides no TPR either.
    few = np.array([[800, 200, 120, 380], [700, 190, 1, 0]])
    assert verdicts.enough(few, "equal_opportunity").tolist() == [True, False]
    assert verdicts.enough(few, "false_positive_rate").all() and verdicts.enough(few, "demographic_parity").all()
    assert np.isnan(verdicts.judge(few).value) and not verdicts.judge(few).distinguishable


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([2000, 4, 500, 6], "selects nobody (0.4 %)"),
        ([4, 496, 0, 2000], "selects everybody (99.8 %)"),
        ([0, 250, 0, 2250], "selects everybody (100.0 %)"),
        ([1500, 60, 395, 65], "no better than one answer for all (accuracy .775 against .772)"),
        ([65, 395, 60, 1500], "no better than one answer for all (accuracy .775 against .772)"),
        ([1300, 260, 280, 180], ""),
        ([1090, 470, 321, 139], "tells nothing of the label (TPR .302, FPR .301)"),
        ([1500, 60, 300, 160], ""),
        ([0, 0, 0, 0], ""),
    ],
)
def test_selecting_nobody_everybody_or_by_no_information_is_degenerate(counts, said):
    assert verdicts.degenerate(counts) == said
    assert verdicts.degenerate(np.array([counts, np.zeros(4)]) / 2 * 2) == said


def test_accuracy_rule_is_of_decisions_at_half_only_and_paired():
    counts = np.array([1500, 60, 395, 65])
    assert verdicts.degenerate(counts) and not verdicts.degenerate(counts, half=False)
    # McNemar's test of the two answers' errors agrees at its boundary.
    for tp in range(60, 110):
        given, (right, wrong) = np.array([1500, 60, 460 - tp, tp]), (tp, 60)
        statistic = (right - wrong) ** 2 / (right + wrong - (right - wrong) ** 2 / given.sum())
        assert bool(verdicts.degenerate(given)) == (statistic <= stats.chi2.ppf(0.95, 1))


def test_random_decisions_are_called_so_about_as_often_as_the_level_says():
    rng = np.random.default_rng(3)
    y = (rng.random((300, 4000)) < 0.2).astype(int)
    p = (rng.random((300, 4000)) < 0.3).astype(int)
    said = [verdicts.degenerate(group_counts(a, b, np.zeros(4000, int), 1), half=False) for a, b in zip(y, p)]
    assert np.mean([bool(s) for s in said]) > 0.94


def test_changes_and_levelling_down():
    plain = np.array([[700, 100, 60, 240], [800, 50, 100, 150]])
    lower = np.array([[720, 80, 110, 190], [805, 45, 102, 148]])
    raised = np.array([[700, 100, 60, 240], [780, 70, 50, 200]])
    found = verdicts.changes(plain, lower)
    np.testing.assert_allclose(found.d_tpr, [190 / 300 - 240 / 300, -2 / 250], atol=1e-12)
    np.testing.assert_allclose(found.d_fpr, [-20 / 800, -5 / 850], atol=1e-12)
    np.testing.assert_allclose(found.d_selection, [-70 / 1100, -7 / 1100], atol=1e-12)
    np.testing.assert_allclose(found.d_error, [30 / 1100, -3 / 1100], atol=1e-12)
    expected = np.sqrt(2 * 0.8 * 0.2 / 300)
    assert found.se_tpr[0] == pytest.approx(
        np.hypot(np.sqrt(0.8 * 0.2 / 300), np.sqrt(0.6333 * 0.3667 / 300)), rel=0.02
    )
    assert expected < found.se_tpr[0] * 1.1
    assert verdicts.levels_down(plain, lower)
    assert not verdicts.levels_down(plain, raised)  # someone gains
    assert not verdicts.levels_down(plain, plain) and not verdicts.levels_down(lower, plain)
    with pytest.raises(DataError, match="same groups"):
        verdicts.changes(plain, lower[:1])


def test_counts_come_back_from_the_rows_of_group_metrics():
    rng = np.random.default_rng(4)
    y, p, g = people(rng, n=500)
    g[:20] = -1
    metrics = GroupMetrics([lf.Binary("t")], {"a": 4}, confidence=None, group_names={"a": list("wxyz")})
    metrics.update({"t": torch.tensor(p * 4.0 - 2)}, {"t": torch.tensor(y * 1.0)}, {"a": torch.tensor(g)})
    found = verdicts.counts_from_rows(metrics.compute())
    assert list(found.index) == list("wxyz") and list(found.columns) == ["tn", "fp", "fn", "tp"]
    np.testing.assert_array_equal(found, group_counts(y, p, g, 4))
    assert verdicts.judge(found, **FAST).used == (0, 1, 2)
    with pytest.raises(DataError, match="one task"):
        verdicts.counts_from_rows(pd.concat([metrics.compute()] * 2))


counted = st.lists(st.tuples(*[st.integers(0, 400)] * 4), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(counted, st.randoms(use_true_random=False))
def test_verdicts_do_not_depend_on_the_order_of_groups(rows, shuffled):
    counts = np.array(rows)
    order = list(range(len(rows)))
    shuffled.shuffle(order)
    one, two = verdicts.judge(counts, **FAST), verdicts.judge(counts[order], **FAST)
    np.testing.assert_equal(one.value, two.value)
    assert sorted(order[k] for k in two.used) == list(one.used)
    assert sorted([*one.used, *one.left_out]) == np.flatnonzero(counts.sum(1)).tolist()
    assert verdicts.degenerate(counts) == verdicts.degenerate(counts[order])
    assert not verdicts.levels_down(counts, counts)


@settings(max_examples=25, deadline=None)
@given(counted)
def test_interval_holds_the_gap_and_p_is_a_probability(rows):
    found = verdicts.judge(np.array(rows), n_bootstrap=200, n_permutations=50)
    if len(found.used) >= 2:
        assert found.low <= found.value + 1e-9 and found.value <= found.high + 1e-9 and 0 < found.p <= 1
    else:
        assert np.isnan([found.value, found.p]).all()


@pytest.mark.parametrize(("gap", "sizes", "rate"), [(0.1, (300, 300), 0.5), (0.08, (1000, 250), 0.3)])
def test_power_is_what_a_simulation_of_the_permutation_test_sees(gap, sizes, rate):
    rng, seen = np.random.default_rng(5), []
    for k in range(400):
        tp = rng.binomial(sizes, [rate - gap / 2, rate + gap / 2])
        counts = np.stack([np.full(2, 50), np.full(2, 50), sizes - tp, tp], -1)
        seen.append(
            verdicts.judge(counts, "equal_opportunity", n_bootstrap=0, n_permutations=199, seed=k).distinguishable
        )
    assert verdicts.power(gap, sizes, rate) == pytest.approx(np.mean(seen), abs=0.06)


def test_people_needed_and_smallest_gap_undo_power():
    for gap, rate, ratio in [(0.1, 0.5, 1.0), (0.05, 0.2, 4.0), (0.3, 0.05, 1.0)]:
        n = verdicts.people_needed(gap, rate, ratio=ratio)
        assert (
            verdicts.power(gap, (n, n * ratio), rate)
            >= 0.8 - 1e-9
            > verdicts.power(gap, (n - 1, (n - 1) * ratio), rate) - 0.01
        )
        assert verdicts.smallest_gap((n, n * ratio), rate) == pytest.approx(gap, rel=0.05)
    assert verdicts.people_needed(0.1, comparisons=3) > verdicts.people_needed(0.1)
    assert np.isnan(verdicts.smallest_gap((0, 50))) and np.isnan(verdicts.smallest_gap((1, 1)))


def test_what_is_no_count_or_metric_is_refused():
    with pytest.raises(DataError, match="groups, 4"):
        verdicts.degenerate([1, 2, 3])
    with pytest.raises(DataError, match="negative"):
        verdicts.enough([[1, -2, 3, 4]])
    with pytest.raises(RecipeError, match="equalized_odds"):
        verdicts.judge([[1, 2, 3, 4]] * 2, "equalised_odds")
    with pytest.raises(RecipeError, match="gap in"):
        verdicts.people_needed(0.0)
