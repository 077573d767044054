from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as skm
import torch

import libmtl_fair as lf
from libmtl_fair.metrics import task_utility


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
