from __future__ import annotations

import fairlearn.metrics as flm
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.metrics import group_rates
from libmtl_fair.metrics.rates import group_counts

NAMES = (
    "selection_rate",
    "true_positive_rate",
    "false_positive_rate",
    "true_negative_rate",
    "false_negative_rate",
)


def close(ours, theirs):
    """Equal to 1e-12 wherever fairlearn's is defined."""
    return np.isnan(theirs) or abs(ours - theirs) <= 1e-12


@st.composite
def tables(draw):
    n, g = draw(st.integers(2, 60)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    weight = rng.random(n) + 0.1 if draw(st.booleans()) else None
    share = draw(st.sampled_from([0.1, 0.5, 0.9]))
    return (rng.random(n) < share).astype(int), rng.integers(0, 2, n), rng.integers(0, g, n), g, weight


@settings(max_examples=60, deadline=None)
@given(tables(), st.sampled_from(["between_groups", "to_overall"]))
@pytest.mark.filterwarnings("ignore")
def test_rates_and_gaps_equal_fairlearns(data, method):
    y, p, group, g, weight = data
    ours = group_rates(y, p, group, g, weight, empty="fairlearn")
    params = {n: {"sample_weight": weight} for n in NAMES}
    frame = flm.MetricFrame(
        metrics={n: getattr(flm, n) for n in NAMES},
        y_true=y,
        y_pred=p,
        sensitive_features=group,
        sample_params=params,
    )
    for name in NAMES:
        for i, value in frame.by_group[name].items():
            assert close(ours.rate(name)[i], value)
        assert close(ours.overall(name), frame.overall[name])
        assert close(ours.difference(name, method), frame.difference(method=method)[name])
        assert close(ours.ratio(name, method), frame.ratio(method=method)[name])


@settings(max_examples=50, deadline=None)
@given(tables(), st.sampled_from(["between_groups", "to_overall"]), st.sampled_from(["worst_case", "mean"]))
@pytest.mark.filterwarnings("ignore")
def test_named_metrics_equal_fairlearns(data, method, agg):
    y, p, group, g, weight = data
    ours = group_rates(y, p, group, g, weight, empty="fairlearn")
    how = {"sensitive_features": group, "method": method, "sample_weight": weight}
    assert close(ours.difference("demographic_parity", method), flm.demographic_parity_difference(y, p, **how))
    assert close(ours.ratio("demographic_parity", method), flm.demographic_parity_ratio(y, p, **how))
    assert close(ours.difference("equal_opportunity", method), flm.equal_opportunity_difference(y, p, **how))
    assert close(ours.ratio("equal_opportunity", method), flm.equal_opportunity_ratio(y, p, **how))
    assert close(ours.equalized_odds_difference(agg, method), flm.equalized_odds_difference(y, p, agg=agg, **how))
    parts = [ours.ratio(n, method) for n in NAMES[1:3]]
    if not np.isnan(parts).any():  # with an undefined part fairlearn's answer hangs on Python's min()
        assert close(ours.equalized_odds_ratio(agg, method), flm.equalized_odds_ratio(y, p, agg=agg, **how))


def test_missing_and_fairlearn_rules_for_a_group_without_positives():
    y, p, g = [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]
    missing, fairlearn = (group_rates(y, p, g, 2, empty=e) for e in ("missing", "fairlearn"))
    assert np.isnan(missing.rate("true_positive_rate")[1])
    assert fairlearn.rate("true_positive_rate")[1] == 0
    assert fairlearn.difference("equal_opportunity") == 0.5
    assert missing.difference("equal_opportunity") == 0  # one group is left: no difference


def test_absent_group_keeps_its_id():
    rates = group_rates([1, 0], [1, 0], [2, 2], n_groups=4)
    assert np.isnan(rates.rate("accuracy")[[0, 1, 3]]).all()
    assert rates.rate("accuracy")[2] == 1
    assert rates.difference("accuracy") == 0


def test_empty_input_is_undefined_without_warning():
    rates = group_rates(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), 3)
    assert np.isnan(rates.difference("accuracy"))
    assert np.isnan(rates.equalized_odds_ratio())


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int32, np.int64, np.float32, np.float64])
def test_any_dtype_tensors_and_many_chunks(dtype):
    rng = np.random.default_rng(0)
    n = 70_000
    y, p, g = rng.integers(0, 2, n), rng.integers(0, 2, n), rng.integers(-1, 7, n)
    expected = np.array([[((y == a) & (p == b) & (g == k)).sum() for a in (0, 1) for b in (0, 1)] for k in range(7)])
    assert (group_counts(y.astype(dtype), p.astype(dtype), g, 7) == expected).all()
    tensors = [torch.from_numpy(v) for v in (y.astype(dtype), p.astype(dtype), g)]
    assert (group_counts(*tensors, 7) == expected).all()
    weighted = group_counts(y, p, g.astype(np.int16), 7, np.full(n, 0.5))
    assert np.allclose(weighted, expected / 2)


@pytest.mark.parametrize(
    ("y", "p", "g", "message"),
    [
        ([2], [0], [0], "0 and 1 only"),
        ([-100], [0], [0], "0 and 1 only"),
        ([float("nan")], [0], [0], "0 and 1 only"),
        ([1], [0], [3], "found 3 to 3"),
        ([1], [0], [-2], "-1..2"),
        ([1, 0], [0], [0], "one length"),
    ],
)
def test_bad_input(y, p, g, message):
    with pytest.raises(DataError, match=message):
        group_counts(y, p, g, 3)


def test_unknown_names():
    with pytest.raises(RecipeError, match="did you mean 'accuracy'"):
        group_rates([1], [1], [0], 1).rate("acuracy")
    with pytest.raises(RecipeError, match="rule for empty"):
        group_rates([1], [1], [0], 1, empty="zero")
