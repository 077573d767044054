from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as skm
import torch

import libmtl_fair as lf
from libmtl_fair.metrics import FixedDeltaAudit, below_curve, shrinkage_curve, task_utility


def scores(n=400, seed=0):
    rng = np.random.default_rng(seed)
    probability = {t: rng.random(n) for t in "ab"}
    labels = {t: (rng.random(n) < p).astype(float) for t, p in probability.items()}
    labels["a"][:10] = np.nan
    return probability, labels


def test_curve_by_hand():
    probability, labels = scores()
    curve = shrinkage_curve(probability, labels, 0.2)
    row = curve[np.isclose(curve.a, 0.7)].iloc[0]
    shrunk = {t: 0.5 + 0.7 * (p - 0.5) for t, p in probability.items()}
    assert row.bias == pytest.approx(FixedDeltaAudit(0.2, exact=True).run(shrunk).bias, abs=1e-12)
    seen = {t: ~np.isnan(y) for t, y in labels.items()}
    brier = np.mean([skm.brier_score_loss(labels[t][seen[t]], shrunk[t][seen[t]]) for t in "ab"])
    auc = np.mean([skm.roc_auc_score(labels[t][seen[t]], probability[t][seen[t]]) for t in "ab"])
    assert row.brier == pytest.approx(brier, abs=1e-12)
    assert row.auc == pytest.approx(auc, abs=1e-12)
    assert (curve.sort_values("a").bias.diff().dropna() >= -1e-12).all()


def test_below_curve_inside_and_outside_of_its_range():
    curve = pd.DataFrame({"a": [1.0, 0.5], "bias": [0.1, 0.0], "brier": [0.10, 0.20]})
    assert below_curve(0.06, 0.15, curve) == (False, pytest.approx(-0.01))
    assert below_curve(0.09, 0.05, curve) == (True, pytest.approx(0.01))  # better Brier than any: against the start
    assert below_curve(0.01, 0.30, curve)[0] is False  # beyond the end: against the end
    overconfident = pd.DataFrame({"a": [1.0, 0.8, 0.5], "bias": [0.1, 0.07, 0.0], "brier": [0.15, 0.10, 0.20]})
    assert below_curve(0.08, 0.10, overconfident)[0] is False  # shrinking alone reaches .07 there


def test_a_shrunk_plain_model_lies_on_its_own_curve():
    probability, labels = scores()
    curve = shrinkage_curve(probability, labels, 0.2)
    for a in (0.9, 0.6):
        row = curve[np.isclose(curve.a, a)].iloc[0]
        assert abs(below_curve(row.bias, row.brier, curve)[1]) < 1e-9


def test_utility_equals_sklearn():
    g = torch.Generator().manual_seed(0)
    n = 500
    b, m = torch.randn(n, 1, generator=g).double(), torch.randn(n, 4, generator=g).double()
    y, c = (torch.rand(n, generator=g) < 0.4).float(), torch.randint(0, 4, (n,), generator=g)
    y[:20], c[:30] = torch.nan, -100
    p = torch.sigmoid(b[20:, 0]).numpy()
    truth = y[20:].numpy()
    found = task_utility(lf.Binary("b"), b, y)
    expected = {
        "auc": skm.roc_auc_score(truth, p),
        "accuracy": skm.accuracy_score(truth, p > 0.5),
        "brier": skm.brier_score_loss(truth, p),
        "log_loss": skm.log_loss(truth, p),
        "f1": skm.f1_score(truth, p > 0.5),
    }
    assert found == {k: pytest.approx(v, abs=1e-12) for k, v in expected.items()}
    q = torch.softmax(m[30:], 1).numpy()
    classes = c[30:].numpy()
    found = task_utility(lf.Multiclass("m", 4), m, c)
    assert found["auc"] == pytest.approx(skm.roc_auc_score(classes, q, multi_class="ovr"), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(skm.f1_score(classes, q.argmax(1), average="macro"), abs=1e-12)
    assert found["log_loss"] == pytest.approx(skm.log_loss(classes, q), abs=1e-12)
    r, t = torch.randn(n, 1, generator=g).double(), torch.randn(n, generator=g).double()
    found = task_utility(lf.Regression("r", 3.0, 2.0), r, t)
    y_r, p_r = t.numpy() * 2 + 3, r[:, 0].numpy() * 2 + 3
    assert found["mae"] == pytest.approx(skm.mean_absolute_error(y_r, p_r), abs=1e-12)
    assert found["rmse"] == pytest.approx(skm.root_mean_squared_error(y_r, p_r), abs=1e-12)
    assert found["r2"] == pytest.approx(skm.r2_score(y_r, p_r), abs=1e-12)


def test_undefined_utility_is_nan_without_warning():
    found = task_utility(lf.Binary("b"), torch.zeros(3, 1), torch.zeros(3))
    assert np.isnan(found["auc"])
    empty = task_utility(lf.Regression("r"), torch.zeros(3, 1), torch.full((3,), torch.nan))
    assert np.isnan(list(empty.values())).all()
