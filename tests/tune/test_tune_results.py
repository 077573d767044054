from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import Binary
from libmtl_fair.tune.results import sampling_deviation


def drawn(seed: int, n: int = 4000) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, generator=generator) < 0.3).float()
    z = torch.randn(n, 1, generator=generator) + 0.8 * y[:, None]
    groups = torch.randint(0, 2, (n,), generator=generator)
    return Predictions((Binary("a"),), {"a": torch.sigmoid(z[:, 0])}, {"a": z}, {"a": y}, {"sex": groups})


def test_of_a_mean_it_is_the_standard_error():
    predictions = drawn(0)
    scores = predictions.scores["a"]
    found = sampling_deviation(predictions, lambda p: float(p.scores["a"].mean()), folds=200)
    assert found == pytest.approx(float(scores.std()) / math.sqrt(len(scores)), rel=0.15)


def test_of_an_auc_it_is_what_other_draws_show():
    def auc(predictions: Predictions) -> float:
        return float(roc_auc_score(predictions.labels["a"], predictions.scores["a"]))

    draws = [drawn(seed) for seed in range(40)]
    spread = float(torch.tensor([auc(p) for p in draws]).std())
    found = [sampling_deviation(p, auc) for p in draws[:10]]
    assert sum(found) / len(found) == pytest.approx(spread, rel=0.3)
