from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import sklearn
from fairlearn.metrics import MetricFrame, selection_rate
from fairlearn.postprocessing import ThresholdOptimizer
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from libmtl_fair.errors import DataError
from libmtl_fair.sklearn import FairMTLClassifier, FairMTLEstimator

SMALL = {"epochs": 2, "hidden": (8,), "random_state": 0}


@pytest.fixture
def routing():
    with sklearn.config_context(enable_metadata_routing=True):
        yield


def test_groups_are_routed_through_pipeline_and_cross_validation(people, routing):
    model = FairMTLClassifier("fairmt", **SMALL).set_fit_request(sensitive_features=True)
    pipeline = make_pipeline(StandardScaler(), model)
    found = cross_validate(
        pipeline,
        people.numbers,
        people.y,
        cv=3,
        params={"sensitive_features": people.groups["sex"]},
        error_score="raise",
    )
    assert np.isfinite(found["test_score"]).all()


def test_without_the_request_the_error_says_what_to_do(people, routing):
    with pytest.raises(DataError, match="set_fit_request"):
        make_pipeline(StandardScaler(), FairMTLClassifier("fairmt")).fit(people.numbers, people.y)


def test_grid_search_over_methods_and_their_settings(people, routing):
    model = FairMTLEstimator(**SMALL).set_fit_request(sensitive_features=True)
    grid = [{"method": ["none"]}, {"method": ["fairmt"], "method_args": [{"epsilon": 0.0}, {"epsilon": 0.1}]}]
    search = GridSearchCV(model, grid, cv=2, error_score="raise")
    search.fit(people.X, people.Y, sensitive_features=people.groups)
    assert len(search.cv_results_["params"]) == 3
    assert search.predict(people.X).shape == people.Y.shape


def test_under_the_threshold_optimizer(people):
    sex = people.groups["sex"]
    model = FairMTLClassifier("none", epochs=15, random_state=0).fit(people.numbers, people.y)
    fair = ThresholdOptimizer(
        estimator=model, constraints="demographic_parity", prefit=True, predict_method="predict_proba"
    )
    fair.fit(people.numbers, people.y, sensitive_features=sex)
    after = fair.predict(people.numbers, sensitive_features=sex, random_state=0)
    gap = {
        name: MetricFrame(
            metrics=selection_rate, y_true=people.y, y_pred=predicted, sensitive_features=sex
        ).difference()
        for name, predicted in (("before", model.predict(people.numbers)), ("after", after))
    }
    assert gap["after"] < 0.1 < gap["before"]


def test_multiclass_strings_in_a_series(people):
    names = pd.Series(np.array(["low", "mid", "top"])[people.Y["level"].fillna(0).astype(int)], name="level")
    model = FairMTLClassifier("glf", **SMALL).fit(people.X, names, sensitive_features=people.groups[["sex"]])
    assert list(model.classes_) == ["low", "mid", "top"]
    assert set(model.predict(people.X)) <= {"low", "mid", "top"}
    assert model.predict_proba(people.X).shape == (len(names), 3)


def test_classifier_saves_and_loads(people, tmp_path):
    model = FairMTLClassifier(**SMALL).fit(people.X, people.y)
    again = FairMTLClassifier.load(model.save(tmp_path / "clf.pt"))
    np.testing.assert_array_equal(model.predict_proba(people.X), again.predict_proba(people.X))
    np.testing.assert_array_equal(again.classes_, [0, 1])
    assert again.classes_.dtype == model.classes_.dtype


def test_validation_share_chooses_the_epoch(people):
    model = FairMTLClassifier(**{**SMALL, "epochs": 4}, validation_fraction=0.25).fit(people.numbers, people.y)
    assert any(column.startswith("val/") for column in model.history_)
