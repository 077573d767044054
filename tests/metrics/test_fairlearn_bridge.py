from __future__ import annotations

import fairlearn.metrics as flm
import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

import libmtl_fair as lf
from libmtl_fair.data import ResidentLoader
from libmtl_fair.errors import DataError
from libmtl_fair.metrics import GroupMetrics, metric_frame, post_process, to_fairlearn
from libmtl_fair.models import MLP, linear_heads
from libmtl_fair.predictions import Predictions


def predictions(n=600, seed=0):
    g = torch.Generator().manual_seed(seed)
    tasks = (
        lf.Binary("b"),
        lf.Multiclass("m", 3, classes=("x", "y", "z")),
        lf.Multilabel("l", 2),
        lf.Regression("r", 40.0, 12.0),
    )
    sex, race = torch.randint(0, 2, (n,), generator=g), torch.randint(-1, 2, (n,), generator=g)
    outputs = {t.name: torch.randn(n, t.out_features, generator=g) for t in tasks}
    labels = {
        "b": (torch.rand(n, generator=g) < torch.sigmoid(outputs["b"][:, 0] + sex)).float(),
        "m": torch.randint(0, 3, (n,), generator=g),
        "l": (torch.rand(n, 2, generator=g) < 0.5).float(),
        "r": torch.randn(n, generator=g),
    }
    labels["b"][:30], labels["m"][:40] = torch.nan, -100
    scores = {t.name: t.score(outputs[t.name]) for t in tasks}
    names = {"sex": ["Female", "Male"], "race": ["a", "b"]}
    return Predictions(tasks, scores, outputs, labels, {"sex": sex, "race": race}, names)


def test_to_fairlearn_leaves_out_missing_and_counts_them():
    p = predictions()
    data = to_fairlearn(p, "b")
    unknown = int((p.groups["race"][30:] < 0).sum())
    assert data.sensitive_features.attrs["libmtl_fair_dropped"] == {"missing_label": 30, "unknown_group": unknown}
    assert len(data.y_true) == 600 - 30 - unknown == len(data.sensitive_features)
    assert set(data.sensitive_features["sex"]) == {"Female", "Male"}
    assert set(data.y_true) == set(data.y_pred) == {0, 1}
    assert ((data.y_score > 0.5) == data.y_pred).all()
    assert flm.demographic_parity_difference(data.y_true, data.y_pred, sensitive_features=data.sensitive_features) >= 0


def test_metric_frame_agrees_with_group_metrics():
    p = predictions()
    frame = metric_frame(p, "b", sensitive="sex")
    table = GroupMetrics(list(p.tasks), {"sex": 2}, group_names={"sex": p.group_names["sex"]}, confidence=None)
    table = table.update(p.outputs, p.labels, {"sex": p.groups["sex"]}).compute().query("task == 'b'")
    for metric in ("selection_rate", "true_positive_rate", "accuracy", "count"):
        for group in ("Female", "Male"):
            ours = table[(table.metric == metric) & (table.group == group)].value.item()
            assert frame.by_group[metric][group] == pytest.approx(ours, abs=1e-12)
    assert frame.libmtl_fair_dropped == {"missing_label": 30, "unknown_group": 0}


def test_metric_frame_by_kind_and_intersections():
    p = predictions()
    both = metric_frame(p, "b")
    assert both.by_group.index.names == ["sex", "race"]
    multiclass = metric_frame(p, "m", "sex")
    data = to_fairlearn(p, "m", "sex")
    assert set(data.y_true) == {"x", "y", "z"}
    rows = data.sensitive_features["sex"] == "Male"
    expected = balanced_accuracy_score(data.y_true[rows], data.y_pred[rows])
    assert multiclass.by_group["balanced_accuracy"]["Male"] == pytest.approx(expected)
    regression = metric_frame(p, "r", "sex").by_group
    assert 30 < regression["mean_prediction"]["Male"] < 50  # native units
    one = metric_frame(p, "m", "sex", label=1).by_group
    assert one["selection_rate"].between(0, 1).all()
    assert metric_frame(p, "l", "sex", label=0).by_group["true_positive_rate"].between(0, 1).all()
    own = metric_frame(p, "b", "sex", metrics=flm.false_negative_rate)
    assert own.by_group.between(0, 1).all()


@pytest.mark.parametrize(
    ("task", "how", "message"),
    [
        ("l", {}, "multilabel, and fairlearn takes one target"),
        ("b", {"label": 1}, "no label 1 to pick"),
        ("b", {"sensitive": "sexx"}, "did you mean 'sex'"),
        ("c", {}, "no task 'c'"),
    ],
)
def test_bad_requests(task, how, message):
    with pytest.raises(DataError, match=message):
        metric_frame(predictions(), task, **how)


def test_no_row_left():
    p = predictions()
    p.groups["race"][:] = -1
    with pytest.raises(DataError, match="no row has both a label and a known group"):
        metric_frame(p, "b")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_post_process_lowers_equalized_odds_and_predicts_again():
    val, test = predictions(4000, 1), predictions(4000, 2)
    chosen = post_process(val, "b", "equalized_odds", sensitive="sex")
    decided = chosen.predict(test, random_state=0)
    data = to_fairlearn(test, "b", "sex")
    rows = np.isfinite(test.labels["b"].numpy())
    after = flm.equalized_odds_difference(data.y_true, decided[rows], sensitive_features=data.sensitive_features)
    before = flm.equalized_odds_difference(data.y_true, data.y_pred, sensitive_features=data.sensitive_features)
    assert after < before
    names = np.array(["Female", "Male"])[test.groups["sex"].numpy()]
    scores = torch.sigmoid(test.outputs["b"][:, 0])
    assert (chosen.predict(scores, names, random_state=0) == decided).all()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_post_process_unknown_groups_fall_back_to_half():
    val = predictions(2000, 1)
    chosen = post_process(val, "b", "demographic_parity")
    decided = chosen.predict(val, random_state=0)
    unknown = (val.groups["race"] < 0).numpy()
    plain = (torch.sigmoid(val.outputs["b"][:, 0]) > 0.5).numpy()
    assert (decided[unknown] == plain[unknown]).all()
    assert chosen.groups == ("Female & a", "Female & b", "Male & a", "Male & b")


def test_post_process_bad_input():
    p = predictions()
    with pytest.raises(DataError, match="needs a binary task"):
        post_process(p, "m")
    p.labels["b"][p.groups["sex"] == 0] = 1.0
    with pytest.raises(DataError, match=r"group 'Female' has only labels \[1\]"):
        post_process(p, "b", sensitive="sex")
    q = post_process(predictions(), "b", "demographic_parity", sensitive="sex")
    with pytest.raises(DataError, match="needs sensitive="):
        q.predict(np.array([0.1]))
    with pytest.raises(DataError, match="1 scores for 2"):
        q.predict(np.array([0.1]), ["Female", "Male"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_post_process_keeps_predicting_through_the_trainer():
    rng = np.random.default_rng(0)
    sex = rng.integers(0, 2, 1500)
    x = torch.from_numpy(rng.normal(size=(1500, 3)) + 0.8 * sex[:, None]).float()
    y = {"b": (x[:, 0] + torch.randn(1500, generator=torch.Generator().manual_seed(0)) > 0.4).float()}
    y["b"][::9] = torch.nan
    loaders = [
        ResidentLoader(
            x[rows],
            {"b": y["b"][rows]},
            {"sex": sex[rows]},
            batch_size=256,
            shuffle=False,
            group_names={"sex": ["f", "m"]},
        )
        for rows in (slice(0, 700), slice(700, 1100), slice(1100, 1500))
    ]
    task = lf.Binary("b")
    trainer = lf.FairTrainer(
        lf.task_dict([task]), "EW", "HPS", lambda: MLP(3, (8,)), linear_heads([task], 8), False, False,
        {"optim": "adam", "lr": 0.01}, None, seed=0, progress=False, device="cpu",
    )  # fmt: skip
    with pytest.raises(DataError, match=r"task 'b'.*without validation data; give data="):
        post_process(trainer, "b", "demographic_parity")
    trainer.train(loaders[0], None, 15, loaders[1])
    chosen = post_process(trainer, "b", "demographic_parity")
    assert chosen.trainer is trainer
    decided = chosen.predict(loaders[2], random_state=0)
    assert (decided == chosen.predict(trainer.predict(loaders[2]), random_state=0)).all()
    names = np.array(["f", "m"])[sex[700:1100]]
    plain = (torch.sigmoid(trainer.predict(loaders[1]).outputs["b"][:, 0]) > 0.5).numpy()
    after = chosen.predict(loaders[1], random_state=0)
    gaps = [flm.demographic_parity_difference(names, d, sensitive_features=names) for d in (plain, after)]
    assert gaps[0] > 0.2
    assert gaps[1] < 0.1
    given = post_process(trainer, "b", "demographic_parity", data=loaders[1])
    assert (given.predict(loaders[2], random_state=0) == decided).all()
    bare = post_process(trainer.predict(loaders[1]), "b", "demographic_parity")
    with pytest.raises(DataError, match="cannot read a ResidentLoader; .*make it from the trainer"):
        bare.predict(loaders[2])
