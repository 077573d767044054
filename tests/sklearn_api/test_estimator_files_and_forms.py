"""Estimators in skops files; an encoder of one's own, early stopping, sparse rows, and the output's form."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import nn

from libmtl_fair.errors import CheckpointError, HostError, RecipeError
from libmtl_fair.sklearn import FairMTLClassifier, FairMTLEstimator

OURS = "libmtl_fair.sklearn.estimators."


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": rng.normal(size=300), "b": rng.normal(size=300), "c": rng.choice(["x", "y"], 300)})
    X.loc[:20, "b"] = np.nan
    Y = pd.DataFrame({"ill": X["a"] > 0, "kind": rng.choice(["r", "s", "t"], 300), "days": 10 + 3 * X["a"]})
    return X, Y, pd.Series(rng.choice(["f", "m"], 300), name="sex")


class Wide(nn.Module):
    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_features, 7), nn.Tanh())

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("method", ["relif", "fairbranch"])
def test_skops_files_need_no_trust_but_in_our_class(table, method):
    skops = pytest.importorskip("skops.io")
    X, Y, sex = table
    model = FairMTLEstimator(method, epochs=2, hidden=(8, 8), random_state=0).fit(X, Y, sensitive_features=sex)
    held = skops.dumps(model)
    assert skops.get_untrusted_types(data=held) == [f"{OURS}FairMTLEstimator"]
    again = skops.loads(held, trusted=[f"{OURS}FairMTLEstimator"])
    pd.testing.assert_frame_equal(again.predict(X), model.predict(X))
    pd.testing.assert_frame_equal(again.history_, model.history_)
    assert again.targets_[1].classes.tolist() == ["r", "s", "t"] and again.encoder_ == model.encoder_
    assert again.groups_ == model.groups_ and again.structure_ == model.structure_


def test_skops_takes_the_classifier_and_an_unfitted_one(table):
    skops = pytest.importorskip("skops.io")
    X, Y, sex = table
    for model in (FairMTLClassifier(), FairMTLClassifier("dpl", epochs=1).fit(X, Y["kind"], sensitive_features=sex)):
        held = skops.dumps(model)
        again = skops.loads(held, trusted=[f"{OURS}FairMTLClassifier"])
        assert again.get_params() == model.get_params()
    assert again.predict(X).tolist() == model.predict(X).tolist()


def test_an_encoder_of_ones_own(table, tmp_path):
    X, Y, _ = table
    model = FairMTLEstimator(epochs=2, encoder=Wide, random_state=0).fit(X, Y)
    assert isinstance(model.model_.encoder, Wide) and model.transform(X).shape == (300, 7)
    assert clone(model).encoder is Wide
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(model)).predict(X), model.predict(X))
    made = FairMTLEstimator(epochs=1, encoder=lambda n: nn.Linear(n, 3), random_state=0).fit(X, Y)
    assert made.transform(X).shape == (300, 3)
    with pytest.raises(CheckpointError, match="no plain value"):
        model.save(tmp_path / "m.pt")
    with pytest.raises(HostError, match=r"encoder: expected a representation \[N, width\], found shape \[2, 2, 1\]"):
        FairMTLEstimator(epochs=1, encoder=lambda n: nn.Sequential(nn.Linear(n, 2), nn.Unflatten(1, (2, 1)))).fit(X, Y)
    with pytest.raises(HostError, match="takes the number of columns"):
        FairMTLEstimator(epochs=1, encoder=lambda: nn.Linear(3, 3)).fit(X, Y)
    with pytest.raises(RecipeError, match="encoder must be a class or function"):
        FairMTLEstimator(epochs=1, encoder=3).fit(X, Y)


def test_training_stops_where_no_epoch_is_better(table):
    X = table[0]
    noise = pd.Series(np.random.default_rng(1).integers(0, 2, 300))
    how = {"lr": 0.05, "validation_fraction": 0.3, "random_state": 0, "hidden": (8,)}
    whole = FairMTLClassifier(epochs=30, **how).fit(X[["a", "b"]], noise)
    short = FairMTLClassifier(epochs=30, early_stopping=2, **how).fit(X[["a", "b"]], noise)
    judged = short.history_.groupby("epoch")[["val/y/AUC", "val/y/Acc"]].last()
    best = (judged / judged.iloc[0]).mean(axis=1).to_numpy().argmax()  # LibMTL's mean relative improvement
    assert len(judged) == best + 1 + 2 < 30 and whole.history_["epoch"].max() + 1 == 30
    same = whole.history_[whole.history_["epoch"] < len(judged)]
    assert np.array_equal(same["loss/y"], short.history_["loss/y"])
    with pytest.raises(RecipeError, match="early_stopping looks at held-out rows: give validation_fraction"):
        FairMTLClassifier(early_stopping=2).fit(X[["a"]], noise)
    with pytest.raises(RecipeError, match="early_stopping must be a whole number"):
        FairMTLClassifier(early_stopping=0, validation_fraction=0.1).fit(X[["a"]], noise)


@pytest.mark.parametrize("form", [scipy.sparse.csr_array, scipy.sparse.csc_matrix, scipy.sparse.coo_array])
def test_sparse_rows_are_those_of_the_dense_ones(form):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 4)) * (rng.random((120, 4)) < 0.3)
    Y = np.column_stack([X[:, 0] > 0, X[:, 1]])
    dense = FairMTLEstimator(epochs=2, random_state=0).fit(X, Y)
    sparse = FairMTLEstimator(epochs=2, random_state=0).fit(form(X), Y)
    assert np.array_equal(dense.predict(X), sparse.predict(form(X)))


def test_representations_follow_set_output(table):
    X, Y, sex = table
    model = FairMTLEstimator("fairbranch", epochs=3, hidden=(6, 5), random_state=0).fit(X, Y, sensitive_features=sex)
    plain = model.transform(X)
    assert isinstance(plain, np.ndarray) and plain.shape[1] % 5 == 0
    framed = model.set_output(transform="pandas").transform(X)
    assert list(framed.columns) == list(model.get_feature_names_out()) and np.array_equal(framed.to_numpy(), plain)
    assert framed.columns[0] == "fairmtlestimator0"
    chain = make_pipeline(FairMTLEstimator(epochs=1, random_state=0), LogisticRegression())
    assert chain.fit(X, Y["ill"]).predict(X).shape == (300,)
