from __future__ import annotations

import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from fairlearn import metrics as flm
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score, root_mean_squared_error

import libmtl_fair as lf
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.metrics import GroupMetrics, counts_from_rows, enough, group_auc

TASKS = [
    lf.Binary("b"),
    lf.Multiclass("m", 3, classes=("x", "y", "z")),
    lf.Multilabel("l", 2),
    lf.Regression("r", 40.0, 12.0),
]


def batch(n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    outputs = {
        "b": torch.randn(n, 1, generator=g),
        "m": torch.randn(n, 3, generator=g),
        "l": torch.randn(n, 2, generator=g),
        "r": torch.randn(n, 1, generator=g),
    }
    labels = {
        "b": (torch.rand(n, generator=g) < 0.4).float(),
        "m": torch.randint(0, 3, (n,), generator=g),
        "l": (torch.rand(n, 2, generator=g) < 0.5).float(),
        "r": outputs["r"][:, 0] * 0.5 + torch.randn(n, generator=g),
    }
    labels["b"][:20], labels["m"][20:40], labels["l"][40:60, 0], labels["r"][60:80] = (
        torch.nan,
        -100,
        torch.nan,
        torch.nan,
    )
    groups = {"sex": torch.randint(0, 2, (n,), generator=g), "race": torch.randint(-1, 3, (n,), generator=g)}
    return outputs, labels, groups


def value(table, task, attribute, metric, group, column="value"):
    rows = table[
        (table.task == task) & (table.attribute == attribute) & (table.metric == metric) & (table.group == group)
    ]
    assert len(rows) == 1, (task, attribute, metric, group, len(rows))
    return rows[column].iloc[0]


def quick(**options):
    return GroupMetrics(TASKS, {"sex": 2, "race": 3}, confidence=None, **options)


def known(labels, groups, attribute, task="b"):
    y = labels[task].numpy()
    seen = np.isfinite(y) if y.dtype.kind == "f" else y >= 0
    return seen & (groups[attribute].numpy() >= 0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", ["between_groups", "to_overall"])
@pytest.mark.parametrize("agg", ["worst_case", "mean"])
def test_binary_equals_fairlearn(weighted, method, agg):
    outputs, labels, groups = batch()
    w = torch.rand(400) + 0.1 if weighted else None
    table = quick(method=method, agg=agg).update(outputs, labels, groups, w).compute()
    keep = known(labels, groups, "race")
    y, p = labels["b"].numpy()[keep], (outputs["b"][:, 0] > 0).numpy()[keep].astype(int)
    s = groups["race"].numpy()[keep]
    how = {"sensitive_features": s, "method": method, "sample_weight": None if w is None else w.double().numpy()[keep]}
    for name in ("demographic_parity", "equal_opportunity", "equalized_odds"):
        extra = {"agg": agg} if name == "equalized_odds" else {}
        for kind in ("difference", "ratio"):
            theirs = getattr(flm, f"{name}_{kind}")(y, p, **how, **extra)
            assert value(table, "b", "race", name, kind) == pytest.approx(theirs, abs=1e-12)
    assert value(table, "b", "race", "count", "overall") == keep.sum()
    score = torch.sigmoid(outputs["b"][:, 0]).numpy()[keep]
    for k in range(3):
        rows = s == k
        sw = None if w is None else how["sample_weight"][rows]
        expected = roc_auc_score(y[rows], score[rows], sample_weight=sw)
        assert value(table, "b", "race", "auc", str(k)) == pytest.approx(expected, abs=1e-12)


def test_multiclass_one_vs_rest_equals_fairlearn():
    outputs, labels, groups = batch()
    table = quick().update(outputs, labels, groups).compute()
    keep = known(labels, groups, "sex", "m")
    y, p = labels["m"].numpy()[keep], outputs["m"].argmax(1).numpy()[keep]
    s = groups["sex"].numpy()[keep]
    odds = []
    for c, name in enumerate("xyz"):
        how = {"sensitive_features": s}
        odds.append(flm.equalized_odds_difference((y == c) * 1, (p == c) * 1, **how))
        parity = flm.demographic_parity_ratio((y == c) * 1, (p == c) * 1, **how)
        assert value(table, "m", "sex", f"equalized_odds[{name}]", "difference") == pytest.approx(odds[-1], abs=1e-12)
        assert value(table, "m", "sex", f"demographic_parity[{name}]", "ratio") == pytest.approx(parity, abs=1e-12)
    assert value(table, "m", "sex", "equalized_odds", "difference") == pytest.approx(max(odds), abs=1e-12)
    mean = value(table, "m", "sex", "equalized_odds_mean_over_classes", "difference")
    assert mean == pytest.approx(np.mean(odds), abs=1e-12)
    accuracy = [(y == p)[s == k].mean() for k in (0, 1)]
    assert value(table, "m", "sex", "accuracy", "difference") == pytest.approx(
        abs(accuracy[0] - accuracy[1]), abs=1e-12
    )
    probability = torch.softmax(outputs["m"], 1).numpy()[keep]
    expected = np.mean([roc_auc_score(y[s == 1] == c, probability[s == 1, c]) for c in range(3)])
    assert value(table, "m", "sex", "auc", "1") == pytest.approx(expected, abs=1e-12)


def test_multilabel_masks_each_label():
    outputs, labels, groups = batch()
    table = quick().update(outputs, labels, groups).compute()
    for k in range(2):
        keep = torch.isfinite(labels["l"][:, k]).numpy() & (groups["race"].numpy() >= 0)
        y, p = labels["l"][:, k].numpy()[keep], (outputs["l"][:, k] > 0).numpy()[keep].astype(int)
        expected = flm.equalized_odds_difference(y, p, sensitive_features=groups["race"].numpy()[keep])
        found = value(table, "l", "race", f"equalized_odds[{k}]", "difference")
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_regression_in_native_units_equals_sklearn(weighted):
    outputs, labels, groups = batch()
    w = torch.rand(400) if weighted else None
    table = quick().update(outputs, labels, groups, w).compute()
    keep = known(labels, groups, "sex", "r")
    y, p = labels["r"].double().numpy() * 12 + 40, outputs["r"][:, 0].double().numpy() * 12 + 40
    for k in (0, 1):
        rows = keep & (groups["sex"].numpy() == k)
        sw = None if w is None else w.double().numpy()[rows]
        for name, f in (("mae", mean_absolute_error), ("rmse", root_mean_squared_error), ("r2", r2_score)):
            expected = f(y[rows], p[rows], sample_weight=sw)
            assert value(table, "r", "sex", name, str(k)) == pytest.approx(expected, abs=1e-12, rel=1e-12)
        if not weighted:
            c = np.cov(y[rows], p[rows], bias=True)
            ccc = 2 * c[0, 1] / (c[0, 0] + c[1, 1] + (y[rows].mean() - p[rows].mean()) ** 2)
            assert value(table, "r", "sex", "ccc", str(k)) == pytest.approx(ccc, abs=1e-12)
    means = flm.MetricFrame(
        metrics=flm.mean_prediction,
        y_true=y[keep],
        y_pred=p[keep],
        sensitive_features=groups["sex"].numpy()[keep],
        sample_params={"sample_weight": None if w is None else w.double().numpy()[keep]},
    )
    found = value(table, "r", "sex", "mean_prediction", "difference")
    assert found == pytest.approx(means.difference(), abs=1e-11)


def test_ks_equals_scipy():
    from scipy.stats import ks_2samp

    outputs, labels, groups = batch()
    outputs["r"] = (outputs["r"] * 4).round() / 4  # ties
    table = quick().update(outputs, labels, groups).compute()
    keep = known(labels, groups, "race", "r")
    parts = [outputs["r"][:, 0].numpy()[keep & (groups["race"].numpy() == k)] for k in range(3)]
    expected = max(ks_2samp(parts[i], parts[j]).statistic for i in range(3) for j in range(i))
    assert value(table, "r", "race", "ks", "difference") == pytest.approx(expected, abs=1e-12)


def test_streaming_and_merging_equal_one_update():
    outputs, labels, groups = batch()
    weight = torch.rand(400)
    whole = quick(threshold={"l": "base_rate"}).update(outputs, labels, groups, weight).compute()
    parts = [quick(threshold={"l": "base_rate"}) for _ in range(2)]
    for k, rows in enumerate(torch.arange(400).split(90)):
        part = [{n: v[rows] for n, v in d.items()} for d in (outputs, labels, groups)]
        parts[k % 2].update(*part, weight[rows])
    merged = parts[0].merge(parts[1]).compute()
    pd.testing.assert_frame_equal(whole, merged, rtol=1e-12)
    assert parts[0].reset().compute().query("metric == 'count' and group == 'overall'").value.eq(0).all()


def test_intersections_keep_names_and_equal_fairlearn():
    outputs, labels, groups = batch()
    names = {"sex": ["f", "m"], "race": ["a", "b", "c"]}
    table = quick(group_names=names, intersections=[("sex", "race")]).update(outputs, labels, groups).compute()
    keep = known(labels, groups, "race")
    y, p = labels["b"].numpy()[keep], (outputs["b"][:, 0] > 0).numpy()[keep].astype(int)
    both = pd.DataFrame({a: groups[a].numpy()[keep] for a in ("sex", "race")})
    expected = flm.equalized_odds_difference(y, p, sensitive_features=both)
    found = value(table, "b", "sex & race", "equalized_odds", "difference")
    assert found == pytest.approx(expected, abs=1e-12)
    frame = flm.MetricFrame(metrics=flm.selection_rate, y_true=y, y_pred=p, sensitive_features=both)
    assert value(table, "b", "sex & race", "selection_rate", "m & c") == pytest.approx(frame.by_group[1, 2], abs=1e-12)


def test_unknown_groups_drop_group_error():
    outputs, labels, groups = batch()
    unknown = int(((groups["race"] < 0) & torch.isfinite(labels["b"])).sum())
    drop = quick().update(outputs, labels, groups).compute()
    assert value(drop, "b", "race", "count", "unknown") == unknown
    assert value(drop, "b", "race", "count", "unknown", "flag") == "dropped"
    grouped = quick(missing="group").update(outputs, labels, groups).compute()
    own = grouped[(grouped.task == "b") & (grouped.attribute == "race") & (grouped.metric == "count")]
    assert own[(own.group == "unknown")].value.tolist() == [unknown]
    assert own[own.group == "overall"].value.iloc[0] == torch.isfinite(labels["b"]).sum()
    with pytest.raises(
        DataError,
        match=r"attribute 'race': group ids: found -1 in row \d+ \(\d+ such values in all\); expected a known group",
    ):
        quick(missing="error").update(outputs, labels, groups)


def test_all_groups_unknown_and_empty_update():
    outputs, labels, groups = batch()
    groups = {a: torch.full_like(g, -1) for a, g in groups.items()}
    for metrics in (quick().update(outputs, labels, groups), quick()):
        table = metrics.compute()
        gaps = table[table.group.isin(["difference", "ratio"])]
        assert gaps.value.isna().all()
        assert (gaps.flag == "undefined").all()
    nothing = [{n: v[:0] for n, v in d.items()} for d in (outputs, labels, groups)]
    assert quick().update(*nothing).compute().query("metric == 'count'").value.eq(0).all()
    GroupMetrics(TASKS, {"sex": 2}, n_bootstrap=50).compute()


def test_base_rate_threshold_selects_as_many_as_are_positive():
    outputs, labels, groups = batch()
    table = quick(threshold="base_rate").update(outputs, labels, groups).compute()
    selected = value(table, "b", "sex", "selection_rate", "overall")
    assert selected == pytest.approx(value(table, "b", "sex", "base_rate", "overall"), abs=1e-12)
    constant = {**outputs, "b": torch.zeros(400, 1)}
    table = quick(threshold="base_rate").update(constant, labels, groups).compute()
    assert value(table, "b", "sex", "selection_rate", "overall") == 0  # all tie: none lies above


def test_flags_small_undefined_single():
    outputs, labels, groups = batch()
    groups["race"][:] = 0
    groups["race"][100:110] = 1
    labels["b"][100:110] = 0
    table = quick().update(outputs, labels, groups).compute()
    assert value(table, "b", "race", "selection_rate", "1", "flag") == "small"
    assert value(table, "b", "race", "true_positive_rate", "1", "flag") == "undefined"
    assert value(table, "b", "race", "true_positive_rate", "1", "n") == 10
    assert value(table, "b", "race", "selection_rate", "2", "flag") == "undefined"
    assert value(table, "b", "race", "selection_rate", "difference", "flag") == "small"
    assert value(table, "b", "race", "equal_opportunity", "difference", "flag") == "single"
    assert value(table, "b", "race", "equal_opportunity", "difference") == 0
    fairlearn = quick(empty="fairlearn").update(outputs, labels, groups).compute()
    assert value(fairlearn, "b", "race", "true_positive_rate", "1") == 0


def test_rates_that_rest_on_few_positives_or_negatives_are_flagged_whatever_the_rows():
    rng = np.random.default_rng(0)
    group = torch.arange(400) % 2
    label = torch.from_numpy(rng.random(400) < 0.5).float()
    label[group == 1] = 0
    label[torch.where(group == 1)[0][:9]] = 1
    logits = torch.from_numpy(rng.standard_normal((400, 1)))
    made = GroupMetrics([lf.Binary("b")], {"sex": 2}, n_bootstrap=20)
    table = made.update({"b": logits}, {"b": label}, {"sex": group}).compute()
    for metric in ("true_positive_rate", "false_negative_rate", "auc"):
        assert [value(table, "b", "sex", metric, g, "flag") for g in ("0", "1", "overall", "difference")] == [
            "",
            "few",
            "",
            "few",
        ]
    for metric in ("equalized_odds", "equal_opportunity", "equalized_odds_mean"):
        assert (
            value(table, "b", "sex", metric, "difference", "flag")
            == value(table, "b", "sex", metric, "ratio", "flag")
            == "few"
        )
    for metric in ("false_positive_rate", "selection_rate", "demographic_parity", "accuracy"):
        assert value(table, "b", "sex", metric, "difference", "flag") == ""
    ready = enough(counts_from_rows(table), "equalized_odds")
    assert ready.tolist() == [True, False]
    made = GroupMetrics([lf.Binary("b")], {"sex": 2}, n_bootstrap=20, min_class=9)
    assert "few" not in set(made.update({"b": logits}, {"b": label}, {"sex": group}).compute().flag)


def test_one_class_only_and_constant_scores():
    outputs, labels, groups = batch()
    labels = {**labels, "b": torch.zeros(400)}
    table = quick().update({**outputs, "b": torch.full((400, 1), 3.0)}, labels, groups).compute()
    assert np.isnan(value(table, "b", "sex", "auc", "0"))
    assert value(table, "b", "sex", "false_positive_rate", "0") == 1
    assert value(table, "b", "sex", "equalized_odds", "difference") == 0
    assert np.isnan(value(table, "b", "sex", "equal_opportunity", "difference"))
    constant = quick().update({**outputs, "b": torch.zeros(400, 1)}, batch()[1], groups).compute()
    assert value(constant, "b", "sex", "auc", "0") == 0.5


def test_bad_batches():
    outputs, labels, groups = batch()
    broken = outputs["b"].clone()
    broken[0], broken[50] = torch.nan, torch.nan  # the label of row 0 is missing: not counted
    with pytest.raises(
        DataError, match="task 'b': scores: found nan in row 50; expected finite numbers wherever there is a label"
    ):
        quick().update({**outputs, "b": broken}, labels, groups)
    with pytest.raises(DataError, match="attribute 'sex': group ids: found .* in row .*; expected ids -1 to 1"):
        quick().update(outputs, labels, {**groups, "sex": torch.cat([groups["sex"][1:], torch.tensor([2])])})
    with pytest.raises(DataError, match="lack task 'm'"):
        quick().update({k: v for k, v in outputs.items() if k != "m"}, labels, groups)
    with pytest.raises(DataError, match="lack attribute 'race'"):
        quick().update(outputs, labels, {"sex": groups["sex"]})
    with pytest.raises(DataError, match="task 'b': 5 outputs"):
        quick().update({**outputs, "b": outputs["b"][:5]}, labels, groups)
    with pytest.raises(DataError, match="sample_weight"):
        quick().update(outputs, labels, groups, torch.ones(3))
    with pytest.raises(DataError, match="merged only"):
        quick().merge(GroupMetrics(TASKS, {"sex": 2}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": "median"}, "threshold of task 'b'"),
        ({"missing": "dorp"}, "did you mean 'drop'"),
        ({"agg": "max"}, "unknown agg"),
        ({"confidence": 95}, "confidence"),
        ({"group_names": {"sex": ["a"]}}, "2 different names"),
        ({"group_names": {"sex": ["overall", "b"]}}, "uses itself"),
        ({"intersections": [("sex", "rage")]}, "did you mean 'race'"),
        ({"intersections": [("sex",)]}, "at least two"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(RecipeError, match=message):
        GroupMetrics(TASKS, {"sex": 2, "race": 3}, **options)


def test_table_has_the_same_keys_whatever_the_data():
    outputs, labels, groups = batch()
    keys = ["task", "attribute", "metric", "group"]
    full = GroupMetrics(TASKS, {"sex": 2, "race": 3}, n_bootstrap=40).update(outputs, labels, groups).compute()
    assert not full.duplicated(keys).any()
    assert full[keys].equals(quick().compute()[keys])
    shown = full[full.group.isin(["difference", "ratio"]) & full.value.notna()]
    assert (shown.low <= shown.value + 1e-9).all()
    assert (shown.value <= shown.high + 1e-9).all()


def test_group_auc_against_sklearn_with_ties_and_unknown():
    rng = np.random.default_rng(0)
    for trial in range(60):
        n, g, k = rng.integers(5, 300), rng.integers(1, 6), rng.integers(1, 20)
        score = (rng.integers(-k, k + 1, n) / k).astype([np.float32, np.float64][trial % 2])
        y, group = rng.integers(0, 2, n), rng.integers(-1, g, n)
        found, unit = group_auc(score, y, group, g), group_auc(score, y, group, g, sample_weight=np.ones(n))
        for j in range(g):
            rows = group == j
            expected = roc_auc_score(y[rows], score[rows]) if len(set(y[rows])) == 2 else np.nan
            assert found.value[j] == pytest.approx(expected, abs=1e-12, nan_ok=True)
            assert unit.value[j] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_group_auc_many_rows_cross_chunks_and_delong_error():
    rng = np.random.default_rng(0)
    n = 200_000
    score, y, group = np.round(rng.random(n), 3), rng.integers(0, 2, n), rng.integers(0, 3, n)
    found = group_auc(score, y, group, 3)
    expected = [roc_auc_score(y[group == j], score[group == j]) for j in range(3)]
    assert np.allclose(found.value, expected, atol=1e-12, rtol=0)
    assert np.allclose(found.error, group_auc(score, y, group, 3, sample_weight=np.ones(n)).error, rtol=1e-3)
    with pytest.raises(DataError, match="1 scores are not finite"):
        group_auc([float("nan")], [1], [0], 1)


@given(
    n=st.integers(0, 60),
    groups=st.integers(1, 5),
    levels=st.sampled_from([1, 2, 7, 10**6]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([np.float64, np.float32, np.int64]),
)
def test_group_auc_by_hand(n, groups, levels, seed, dtype):
    """Every pair compared, errors as DeLong wrote them, whatever the ties, groups and dtype."""
    rng = np.random.default_rng(seed)
    score = (rng.integers(-levels, levels, n) / (1 if dtype is np.int64 else 3)).astype(dtype)
    if n and dtype is not np.int64:
        score[rng.random(n) < 0.1] = -0.0
    y, group = rng.integers(0, 2, n), rng.integers(0, groups, n)
    found = group_auc(score, y, group, groups)
    for g in range(groups):
        p, q = (score[(group == g) & (y == label)] for label in (1, 0))
        assert (found.positives[g], found.negatives[g]) == (len(p), len(q))
        won = (p[:, None] > q) + 0.5 * (p[:, None] == q)
        assert found.value[g] == pytest.approx(won.mean() if won.size else np.nan, abs=1e-12, nan_ok=True)
        if min(won.shape) < 2:
            assert np.isnan(found.error[g])
            continue
        error = np.sqrt(won.mean(1).var(ddof=1) / len(p) + won.mean(0).var(ddof=1) / len(q))
        assert found.error[g] == pytest.approx(error, rel=1e-9, abs=1e-12)


def test_float64_auc_of_many_rows_takes_20_bytes_a_row():
    rng = np.random.default_rng(0)
    n = 200_000
    score, y, group = rng.normal(size=n).round(4), rng.integers(0, 2, n), rng.integers(0, 3, n)
    tracemalloc.start()
    found = group_auc(score, y, group, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * n + 3e6
    expected = [roc_auc_score(y[group == j], score[group == j]) for j in range(3)]
    assert np.allclose(found.value, expected, atol=1e-12, rtol=0)
    assert np.allclose(found.error, group_auc(score, y, group, 3, sample_weight=np.ones(n)).error, rtol=1e-3)


@pytest.mark.parametrize("tasks", [["income"], {"income": "binary"}, "income"])
def test_names_are_no_tasks(tasks):
    with pytest.raises(RecipeError, match=r"expected tasks such as \[lf.Binary\('income'\)\], found 'income'"):
        GroupMetrics(tasks, {"sex": 2})
