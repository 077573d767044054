from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone

from libmtl_fair.errors import CheckpointError, DataError, RecipeError
from libmtl_fair.sklearn import FairMTLClassifier, FairMTLEstimator, method_names
from libmtl_fair.sklearn.methods import find_method

SMALL = {"epochs": 2, "hidden": (16, 8), "random_state": 0}


@pytest.fixture(scope="module")
def fitted(people):
    model = FairMTLEstimator("relif", epochs=15, random_state=0)
    return model.fit(people.X, people.Y, sensitive_features=people.groups)


def test_kinds_and_forms(fitted, people):
    assert [t.kind for t in fitted.targets_] == ["binary", "multiclass", "regression"]
    predicted = fitted.predict(people.X)
    assert list(predicted) == ["income", "level", "hours"]
    assert set(predicted["income"]) <= {"high", "low"}
    assert set(predicted["level"]) <= {0, 1, 2}
    probabilities = fitted.predict_proba(people.X)
    assert list(probabilities.columns)[:2] == [("income", "high"), ("income", "low")]
    sums = probabilities.T.groupby(level="target").sum().T
    np.testing.assert_allclose(sums, 1, atol=1e-12)


def test_it_learns_every_target_in_its_own_units(fitted, people):
    predicted, truth = fitted.predict(people.X), people.Y
    seen = truth["income"].notna()
    assert (predicted["income"][seen] == truth["income"][seen]).mean() > 0.75
    error = predicted["hours"] - truth["hours"]
    assert error.abs().mean() < truth["hours"].std()
    assert 35 < predicted["hours"].mean() < 50
    assert fitted.score(people.X, people.Y) > 0.6


def test_unlabelled_rows_do_not_count(people):
    """Labels that are missing may be anything: rows without any label change nothing but the scaling of X."""
    hidden = people.Y.copy()
    hidden.loc[300:, "hours"] = np.nan
    model = FairMTLEstimator(**SMALL).fit(people.X, hidden)
    target = model.targets_[2]
    assert target.mean == pytest.approx(hidden["hours"].mean())


@pytest.mark.parametrize(
    "method", ["none", "relif", "fairmt", "glf", "gld", "adversarial", "dpl", "UW", "GradNorm", "ReLiF"]
)
def test_methods_train_and_predict(people, method):
    args = {"intersectional": True} if method in ("glf", "fairmt") else None
    model = FairMTLEstimator(method, method_args=args, **SMALL)
    model.fit(people.X, people.Y, sensitive_features=people.groups)
    assert model.predict(people.X).notna().all().all()
    assert len(model.history_) == 2 * -(-len(people.X) // 128)


def test_fairbranch_keeps_its_branches(people, tmp_path):
    try:
        find_method("fairbranch")
    except RecipeError:
        pytest.skip("this build has no FairBranch")
    model = FairMTLEstimator("fairbranch", method_args={"threshold": 0.05}, **{**SMALL, "epochs": 3})
    binary = pd.DataFrame({"a": people.y, "b": 1 - people.y, "c": people.y})
    model.fit(people.X, binary, sensitive_features=people.groups["sex"])
    again = FairMTLEstimator.load(model.save(tmp_path / "m"))
    pd.testing.assert_frame_equal(model.predict_proba(people.X), again.predict_proba(people.X))
    assert pickle.loads(pickle.dumps(model)).structure_ == model.structure_


def test_fairmt_lowers_the_gap(people):
    y, sex = people.y, people.groups["sex"]
    gaps = {}
    for method in ("none", "fairmt"):
        args = {"epsilon": 0.0, "rho": 0.1} if method == "fairmt" else None
        model = FairMTLClassifier(method, epochs=30, method_args=args, random_state=0)
        model.fit(people.numbers, y, sensitive_features=sex)
        p = model.predict_proba(people.numbers)[:, 1]
        rates = [p[(sex == g) & (y == 1)].mean() for g in ("f", "m")]
        gaps[method] = abs(rates[0] - rates[1])
    assert gaps["fairmt"] < gaps["none"]


def test_a_sentence_as_method_args_and_what_came_of_it(people):
    """The label is nearly one of the inputs and sex is none of them: decisions cannot be passed alike, and that is said."""
    y, sex = people.y, people.groups["sex"]
    model = FairMTLClassifier("fairmt", epochs=20, batch_size=32, method_args={"target": "dp <= 0.03"}, random_state=0)
    with pytest.warns(UserWarning, match="y, sex: dp <= 0.03 was not met"):
        model.fit(people.numbers, y, sensitive_features=sex)
    assert [row["threshold"] for row in model.constraint_] == ["half", "base_rate"]
    for row in model.constraint_:
        assert (row["attribute"], row["target"], row["at_bound"], row["train_met"]) == (
            "sex",
            "dp <= 0.03",
            True,
            False,
        )
    assert FairMTLClassifier("none", epochs=2, random_state=0).fit(people.numbers, y).constraint_ == []


def test_arrays_in_arrays_out(people):
    numbers = np.column_stack([people.y, people.numbers[:, 1]])
    model = FairMTLEstimator(**SMALL).fit(people.numbers, numbers)
    assert [t.kind for t in model.targets_] == ["binary", "regression"]
    assert model.predict(people.numbers).shape == numbers.shape
    (only,) = model.predict_proba(people.numbers)
    assert only.shape == (len(numbers), 2)
    one = FairMTLEstimator(**SMALL).fit(people.numbers, people.y)
    assert one.predict(people.numbers).shape == (len(numbers),)
    assert one.predict_proba(people.numbers).shape == (len(numbers), 2)


def test_same_seed_same_weights_and_global_generators_untouched(people):
    def draws():
        return np.random.rand(), float(torch.rand(()))  # noqa: NPY002

    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = draws()
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    models = [FairMTLEstimator("relif", **SMALL).fit(people.X, people.Y) for _ in range(2)]
    assert draws() == expected
    for name, value in models[0].weights_.items():
        assert torch.equal(value, models[1].weights_[name])
    other = clone(models[0]).set_params(random_state=1).fit(people.X, people.Y)
    assert not torch.equal(value, other.weights_[name])


def test_a_row_is_predicted_alike_in_any_batch(fitted, people):
    whole = fitted.predict_proba(people.X)
    part = fitted.predict_proba(people.X.iloc[5:7])
    np.testing.assert_allclose(whole.iloc[5:7], part, rtol=0, atol=1e-12)


def test_pickle_and_save_give_the_same_predictions(fitted, people, tmp_path):
    expected = fitted.predict_proba(people.X)
    for again in (pickle.loads(pickle.dumps(fitted)), FairMTLEstimator.load(fitted.save(tmp_path / "model.pt"))):
        pd.testing.assert_frame_equal(again.predict_proba(people.X), expected)
        pd.testing.assert_frame_equal(again.predict(people.X), fitted.predict(people.X))
        assert again.get_params() == fitted.get_params()


def test_saved_files_are_data(fitted, people, tmp_path):
    path = fitted.save(tmp_path / "model.pt")
    content = torch.load(path, weights_only=True)
    assert set(content) == {"format", "kind", "about", "weights"}
    with pytest.raises(CheckpointError, match="not a FairMTLClassifier"):
        FairMTLClassifier.load(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged"):
        FairMTLEstimator.load(path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        FairMTLEstimator.load(tmp_path / "absent.pt")


def test_predictions_feed_the_audit(fitted, people):
    from libmtl_fair.metrics import FixedDeltaAudit

    found = fitted.predictions(people.X, people.Y, sensitive_features=people.groups)
    assert 0 <= FixedDeltaAudit(0.2, exact=True).run(found.scores).bias < 1
    assert found.group_names == {"sex": ["f", "m"], "race": ["p", "q", "r"]}
    assert int((found.groups["race"] == -1).sum()) == 12
    assert int(torch.isnan(found.labels["income"]).sum()) == people.Y["income"].isna().sum()


@pytest.mark.parametrize("method", [m for m in method_names() if m not in ("none", "relif", "fairbranch")])
def test_methods_that_need_groups_say_so(people, method):
    with pytest.raises(DataError, match=f"method '{method}' needs groups.*sensitive_features"):
        FairMTLEstimator(method).fit(people.X, people.Y)


def test_comparing_methods_need_two_tasks(people):
    with pytest.raises(RecipeError, match="'fairbranch' compares tasks.*at least 2, found 1.*FairMTLEstimator"):
        FairMTLClassifier("fairbranch").fit(people.numbers, people.y, sensitive_features=people.groups)


def test_relif_compares_near_people_of_one_task_by_what_does_not_tell_their_groups(people, caplog):
    fitted = FairMTLClassifier("relif", epochs=2, random_state=0).fit(people.numbers, people.y)
    assert fitted.history_["inconsistency"].notna().all()
    told = people.numbers.copy()
    told[:, 0] = np.asarray(people.groups["sex"]) == "f"
    with caplog.at_level("INFO", "libmtl_fair"):  # nothing is left to compare by
        FairMTLEstimator("relif", epochs=1).fit(told[:, :1], people.Y, sensitive_features=people.groups)
    assert "no reference features" in caplog.text


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"method": "relief"}, RecipeError, "did you mean 'relif'"),
        ({"epochs": 0}, RecipeError, "epochs must be a whole number"),
        ({"hidden": 8}, RecipeError, "hidden must be a tuple"),
        ({"validation_fraction": 1.0}, RecipeError, "validation_fraction"),
        ({"tasks": {"incme": "binary"}}, DataError, "did you mean 'income'"),
        ({"tasks": {"hours": "ordinal"}}, DataError, "unknown kind 'ordinal'"),
        ({"tasks": {"level": "binary"}}, DataError, "declared binary and has 3 classes"),
        ({"method_args": {"targt": 1}, "method": "relif"}, RecipeError, "did you mean 'target'"),
    ],
)
def test_wrong_parameters(people, change, error, match):
    with pytest.raises(error, match=match):
        FairMTLEstimator(**{**SMALL, **change}).fit(people.X, people.Y)


def test_ambiguous_and_empty_targets(people):
    whole = people.Y.assign(level=people.Y["level"].astype(float))
    with pytest.raises(DataError, match="'level' holds 3 whole numbers and gaps"):
        FairMTLEstimator().fit(people.X, whole)
    declared = FairMTLEstimator(tasks={"level": "multiclass"}, **SMALL).fit(people.X, whole)
    assert declared.targets_[1].kind == "multiclass"
    with pytest.raises(DataError, match="'hours' has no label"):
        FairMTLEstimator().fit(people.X, people.Y.assign(hours=np.nan))


def test_new_rows_are_checked(fitted, people):
    with pytest.raises(DataError, match="give a DataFrame"):
        fitted.predict(people.X.to_numpy())
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.predict(people.X.rename(columns={"a": "z"}))
    with pytest.raises(DataError, match="sensitive_features has 3 rows"):
        FairMTLEstimator().fit(people.X, people.Y, sensitive_features=["f", "m", "f"])
    with pytest.raises(DataError, match="has one group"):
        FairMTLEstimator().fit(people.X, people.Y, sensitive_features=["f"] * len(people.X))
    unseen = people.X.head(3).assign(city="elsewhere")
    assert len(fitted.predict(unseen)) == 3


def test_odd_labels_and_numpy_parameters_survive_saving(people, tmp_path):
    columns = [("a", 1), 2, "fair:x", None, "a.b"]
    frame = pd.DataFrame({i: people.y for i in range(len(columns))})
    frame.columns = pd.Index(columns, dtype=object, tupleize_cols=False)
    model = FairMTLEstimator(
        "none",
        tasks={2: "multiclass", ("a", 1): "regression"},
        epochs=np.int64(1),
        hidden=(np.int64(4),),
        random_state=np.int64(3),
    )
    model.fit(people.X, frame)
    again = FairMTLEstimator.load(model.save(tmp_path / "m"))
    assert again.get_params() == model.get_params()
    pd.testing.assert_frame_equal(again.predict(people.X), model.predict(people.X))
    assert clone(again).fit(people.X, frame).targets_[0].kind == "regression"
