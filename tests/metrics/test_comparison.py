from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.metrics import (
    delta_m,
    discrimination_gain,
    knowledge_gain,
    mean_rank,
    paired_difference,
    violation,
    worst_and_macro,
)

RESULTS = {"a": {"auc": 0.9, "mae": 2.0}, "b": {"auc": 0.8, "mae": 1.0}, "c": {"auc": 0.8, "mae": 4.0}}
WAYS = {"auc": True, "mae": False}


def test_delta_m_by_hand():
    found = delta_m(RESULTS, {"auc": 0.8, "mae": 2.0}, WAYS)
    assert found["a"] == pytest.approx(-100 * (0.1 / 0.8) / 2)
    assert found["b"] == pytest.approx(-100 * 0.5 / 2)
    assert found["c"] == pytest.approx(100 * 1.0 / 2)


def test_delta_m_of_a_baseline_below_0_says_which_is_worse():
    """R2 may be below 0: dividing by it would turn the sign round."""
    assert delta_m({"a": {"r2": -0.2}, "b": {"r2": 0.1}}, {"r2": -0.1}) == pytest.approx({"a": 100, "b": -200})


def test_delta_m_leaves_out_what_has_no_ratio():
    assert delta_m({"a": {"x": 1.0, "y": 2.0}}, {"x": 0.0, "y": 1.0})["a"] == pytest.approx(-100)
    assert np.isnan(delta_m({"a": {"x": 1.0}}, {"x": 0.0})["a"])


def test_delta_m_on_the_scale_of_glfs_table_is_the_sum_by_hand():
    fair = [f"{metric} {attribute}" for metric in ("eod", "eopd", "gaucd") for attribute in ("race", "gender")]
    base = {"auc": 0.9, **{name: 0.1 + 0.01 * k for k, name in enumerate(fair)}}
    method = {"auc": 0.88, **{name: 0.08 + 0.012 * k for k, name in enumerate(fair)}}
    higher = {name: name == "auc" for name in base}
    by_hand = 0.0
    for attribute in ("race", "gender"):
        by_hand += 100 * (0.9 - 0.88) / 0.9
        by_hand += sum(100 * (method[n] - base[n]) / base[n] for n in fair if n.endswith(attribute))
    found = delta_m({"m": method, "b": base}, base, higher, definition="glf")
    assert found["m"] == pytest.approx(by_hand / 2) and found["b"] == 0
    alike = {name: value * (1.1 if name != "auc" else 1) for name, value in base.items()}
    both = [delta_m({"m": alike}, base, higher, definition=d)["m"] for d in ("glf", "navon")]
    assert both[0] / both[1] == pytest.approx(3.5)  # 7 metrics: a sum / 2 beside a mean
    assert np.isnan(delta_m({"m": {**method, "eod race": float("nan")}}, base, higher, definition="glf")["m"])
    with pytest.raises(RecipeError, match="definition"):
        delta_m({"m": method}, base, higher, definition="other")


def test_mean_rank_shares_ties_and_puts_missing_last():
    assert mean_rank(RESULTS, WAYS) == {"a": 1.5, "b": 1.75, "c": 2.75}
    assert mean_rank({"a": {"x": float("nan")}, "b": {"x": -9.0}}) == {"a": 2.0, "b": 1.0}
    assert mean_rank({}) == {}


def test_worst_and_macro_of_nyuv2_by_hand():
    results = {"a": {"seg": 0.5, "depth": 0.6, "normals": 27.0}, "b": {"seg": 0.2, "depth": 1.0, "normals": 90.0}}
    found = worst_and_macro(results, {"seg": "miou", "depth": "rmse", "normals": "angle"})
    assert found.loc["a"].tolist() == pytest.approx([0.5, (0.5 + 1 / 1.6 + 0.85) / 3])
    assert found.loc["b"].tolist() == pytest.approx([0.2, (0.2 + 0.5 + 0.5) / 3])


KINDS = {"x": "auc", "y": "r2", "z": "rmse"}
CELLS = st.fixed_dictionaries(
    {"x": st.floats(0, 1), "y": st.floats(-5, 1), "z": st.floats(0, 1e6)}  # any AUC, R2 and RMSE
)


@given(st.lists(CELLS, min_size=2, max_size=5))
def test_worst_and_macro_of_a_method_do_not_move_with_the_others(rows):
    found = worst_and_macro({str(i): row for i, row in enumerate(rows)}, KINDS)
    alone = pd.concat([worst_and_macro({str(i): row}, KINDS) for i, row in enumerate(rows)])
    pd.testing.assert_frame_equal(found, alone)
    assert ((found >= 0) & (found <= 1)).all(axis=None)
    assert (found["worst"] <= found["macro"] + 1e-12).all()


def test_worst_and_macro_of_what_is_missing():
    found = worst_and_macro({"a": {"x": 0.9, "y": float("nan")}}, {"x": "auc", "y": "r2"})
    assert found.isna().all(axis=None)
    assert worst_and_macro({"a": {"y": -3.0}}, {"y": "r2"}).loc["a"].tolist() == [0.0, 0.0]
    with pytest.raises(DataError, match="kind y is"):
        worst_and_macro({"a": {"y": 1.0}}, {"x": "auc"})
    with pytest.raises(RecipeError, match="kind.*'f1'"):
        worst_and_macro({"a": {"y": 1.0}}, {"y": "f1"})


def test_gains_and_violation():
    assert knowledge_gain({"a": 0.7}, {"a": 0.8})["a"] == pytest.approx(-0.1)
    assert discrimination_gain({"a": 0.1}, {"a": 0.3})["a"] == pytest.approx(-0.2)
    assert violation({"true_positive_rate": [0.5, np.nan, 0.8, 0.6]}) == pytest.approx(0.3 + 0.1 + 0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: delta_m({"a": {"x": 1.0}}, {"y": 1.0}), "method 'a' lacks y"),
        (lambda: mean_rank(RESULTS, {"auc": True}), "which way mae goes"),
        (lambda: knowledge_gain({"a": 1.0}, {"b": 1.0}), "the same tasks"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "one value a seed"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(DataError, match=message):
        call()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
def test_paired_interval_lies_within_the_differences_and_holds_the_mean(values):
    found = paired_difference(values, [0.0] * len(values), n_bootstrap=500)
    assert min(values) - 1e-9 <= found["low"] <= found["high"] <= max(values) + 1e-9
    assert found["low"] - 1e-9 <= found["mean"] <= found["high"] + 1e-9


def test_paired_interval_covers_at_five_seeds():
    rng = np.random.default_rng(0)
    hits = 0
    for k in range(300):
        x = rng.normal(0.5, 1, 5)
        found = paired_difference(x, np.zeros(5), n_bootstrap=2000, seed=k)
        hits += found["low"] <= 0.5 <= found["high"]
    assert 0.90 <= hits / 300 <= 0.99


def test_one_seed_has_no_interval():
    found = paired_difference([0.5], [0.25])
    assert found["mean"] == 0.25
    assert np.isnan(found["low"])
