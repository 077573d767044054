from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from fairlearn.reductions import DemographicParity, ExponentiatedGradient
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import cross_validate

from libmtl_fair.errors import DataError
from libmtl_fair.sklearn import FairMTLClassifier, FairMTLEstimator

SMALL = {"epochs": 4, "hidden": (8,), "random_state": 0}


def same(a, b):
    return all(torch.equal(value, b.weights_[name]) for name, value in a.weights_.items())


@pytest.mark.filterwarnings("ignore:FairMT. .* was not met")  # in so short a training
@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_equal_weights_are_no_weights(people, fraction):
    model = FairMTLEstimator("fairmt", validation_fraction=fraction, **SMALL)
    plain = model.fit(people.X, people.Y, sensitive_features=people.groups)
    for value in (1, 0.3):
        weighted = FairMTLEstimator("fairmt", validation_fraction=fraction, **SMALL).fit(
            people.X, people.Y, sensitive_features=people.groups, sample_weight=np.full(len(people.X), value)
        )
        assert same(plain, weighted)


def test_rows_of_weight_0_are_as_good_as_absent(people):
    weight = (np.arange(len(people.X)) % 3 > 0).astype(float)
    kept = weight > 0
    weighted = FairMTLEstimator("relif", **SMALL).fit(people.X, people.Y, sample_weight=weight)
    absent = FairMTLEstimator("relif", **SMALL).fit(people.X[kept], people.Y[kept])
    assert same(weighted, absent)


def test_weights_move_the_model_to_the_weighted_population(people):
    """Two opposite halves: the heavier one decides."""
    x, y = people.numbers[:, :1], people.y.copy()
    y[300:] = 1 - y[300:]
    for half, side in ((slice(0, 300), slice(0, 300)), (slice(300, 600), slice(300, 600))):
        weight = np.ones(600)
        weight[half] = 20.0
        model = FairMTLClassifier(epochs=10, random_state=0).fit(x, y, sample_weight=weight)
        assert model.score(x[side], y[side]) > 0.9
        assert model.score(x, y, sample_weight=weight) == pytest.approx(
            accuracy_score(y, model.predict(x), sample_weight=weight)
        )


def test_probabilities_are_calibrated_to_the_weights():
    """A constant input: the model can only learn the weighted share."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 2000)
    weight = np.where(y == 1, 3.0, 1.0) * rng.uniform(0.5, 1.5, 2000)
    model = FairMTLClassifier(epochs=20, hidden=(4,), lr=0.03, random_state=0).fit(
        np.zeros((2000, 1)), y, sample_weight=weight
    )
    assert model.predict_proba([[0.0]])[0, 1] == pytest.approx(weight[y == 1].sum() / weight.sum(), abs=0.04)


def test_scores_are_weighted(people):
    weight = np.arange(len(people.X)) % 4
    model = FairMTLEstimator(**SMALL).fit(people.numbers, np.column_stack([people.y, people.numbers[:, 1]]))
    found = model.predict(people.numbers)
    expected = (
        accuracy_score(people.y, found[:, 0], sample_weight=weight)
        + r2_score(people.numbers[:, 1], found[:, 1], sample_weight=weight)
    ) / 2
    truth = np.column_stack([people.y, people.numbers[:, 1]])
    assert model.score(people.numbers, truth, sample_weight=weight) == pytest.approx(expected)
    assert np.isnan(
        FairMTLEstimator(**SMALL)
        .fit(people.X, people.Y)
        .score(people.X, people.Y.assign(income=None, level=pd.NA, hours=np.nan))
    )


@pytest.mark.filterwarnings("ignore:Setting a")  # fairlearn's own, under pandas 3
def test_under_the_exponentiated_gradient(people):
    model = ExponentiatedGradient(FairMTLClassifier(**SMALL), DemographicParity(), max_iter=2)
    model.fit(people.numbers, people.y, sensitive_features=people.groups["sex"])
    assert set(model.predict(people.numbers, random_state=0)) <= {0, 1}


def test_weights_are_routed(people):
    with sklearn.config_context(enable_metadata_routing=True):
        model = FairMTLClassifier(**SMALL).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        weight = np.linspace(0.1, 2, len(people.y))
        found = cross_validate(model, people.numbers, people.y, params={"sample_weight": weight}, cv=2)
    assert np.isfinite(found["test_score"]).all()


@pytest.mark.parametrize(
    ("weight", "error", "match"),
    [
        (-np.ones(600), ValueError, "[Nn]egative"),
        (np.ones(5), ValueError, "sample_weight.shape"),
        (np.full(600, np.nan), ValueError, "NaN"),
        (np.zeros(600), ValueError, "at least one non-zero"),
    ],
)
def test_bad_weights(people, weight, error, match):
    with pytest.raises(error, match=match):
        FairMTLEstimator(**SMALL).fit(people.X, people.Y, sample_weight=weight)


def test_two_names_of_the_targets(people):
    a = FairMTLEstimator(**SMALL).fit(people.X, people.Y)
    assert same(a, FairMTLEstimator(**SMALL).fit(people.X, y=people.Y))
    with pytest.raises(DataError, match="both Y and y"):
        FairMTLEstimator(**SMALL).fit(people.X, people.Y, y=people.Y)
    assert list(inspect.signature(FairMTLEstimator.fit).parameters)[1:3] == ["X", "Y"]
