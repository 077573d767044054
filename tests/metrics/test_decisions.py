"""Base-rate thresholds: chosen on validation predictions, held on others, for groups and utility alike."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as skm
import torch

import libmtl_fair as lf
from libmtl_fair.errors import RecipeError
from libmtl_fair.metrics import GroupMetrics, base_rate_thresholds, thresholds_in_use, utility
from libmtl_fair.predictions import Predictions

TASKS = (lf.Binary("b"), lf.Multilabel("l", 2), lf.Multiclass("m", 3), lf.Regression("r"))


def predicted(seed=0, n=1000, rate=0.15):
    g = torch.Generator().manual_seed(seed)
    outputs = {t.name: torch.randn(n, t.out_features, generator=g) for t in TASKS}
    labels = {
        "b": (torch.rand(n, generator=g) < rate).float(),
        "l": (torch.rand(n, 2, generator=g) < torch.tensor([0.3, 0.8])).float(),
        "m": torch.randint(0, 3, (n,), generator=g),
        "r": torch.randn(n, generator=g),
    }
    labels["b"][:100] = torch.nan
    scores = {t.name: t.score(outputs[t.name]) for t in TASKS}
    return Predictions(TASKS, scores, outputs, labels, {"sex": torch.arange(n) % 2}, {"sex": ["a", "b"]})


def test_as_many_are_selected_as_are_positive_on_the_data_they_were_chosen_on():
    held = predicted()
    found = base_rate_thresholds(held)
    assert set(found) == {"b", "l"}
    seen = slice(100, None)
    p = torch.sigmoid(held.outputs["b"][seen, 0])
    assert int((p > found["b"]).sum()) == int(held.labels["b"][seen].sum())
    chosen = (torch.sigmoid(held.outputs["l"]) > torch.tensor(found["l"])).sum(0)
    assert chosen.tolist() == held.labels["l"].sum(0).tolist()
    # The in-sample option of GroupMetrics is the same on its own data.
    tables = []
    for threshold in (found, "base_rate"):
        metrics = GroupMetrics(TASKS, {"sex": 2}, threshold, confidence=None)
        tables.append(metrics.update(held.outputs, held.labels, held.groups).compute())
    np.testing.assert_array_equal(tables[0]["value"], tables[1]["value"])


def test_held_thresholds_never_read_the_labels_they_are_applied_to():
    held, test = base_rate_thresholds(predicted(0)), predicted(1, rate=0.6)
    metrics = GroupMetrics([TASKS[0]], {"sex": 2}, held, confidence=None)
    table = metrics.update(test.outputs, test.labels, test.groups).compute()
    selected = table.query("metric == 'selection_rate' and group == 'overall'").value.item()
    assert selected == pytest.approx(0.15, abs=0.04)  # as on validation, not .6


def test_utility_is_of_the_same_decisions():
    held, test = base_rate_thresholds(predicted(0)), predicted(1)
    found, half = utility(test, held), utility(test)
    seen = slice(100, None)
    y = test.labels["b"][seen].numpy()
    decided = torch.sigmoid(test.outputs["b"][seen, 0]).numpy() > held["b"]
    assert found["b"]["accuracy"] == pytest.approx(skm.accuracy_score(y, decided), abs=1e-12)
    assert found["b"]["f1"] == pytest.approx(skm.f1_score(y, decided), abs=1e-12)
    columns = [(test.labels["l"][:, k], torch.sigmoid(test.outputs["l"][:, k]) > held["l"][k]) for k in (0, 1)]
    assert found["l"]["accuracy"] == pytest.approx(np.mean([skm.accuracy_score(*c) for c in columns]), abs=1e-12)
    assert found["b"]["auc"] == half["b"]["auc"] and found["m"] == half["m"] and found["r"] == half["r"]
    assert found["macro"]["accuracy"] == pytest.approx(np.mean([found[t]["accuracy"] for t in "blm"]), abs=1e-12)
    assert found["macro"]["accuracy"] != half["macro"]["accuracy"]
    metrics = GroupMetrics([TASKS[0]], {"sex": 2}, held, confidence=None)
    table = metrics.update(test.outputs, test.labels, test.groups).compute()
    overall = table.query("metric == 'accuracy' and group == 'overall'").value.item()
    assert overall == pytest.approx(found["b"]["accuracy"], abs=1e-12)


@pytest.mark.parametrize(("label", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_one_class_selects_nobody_or_everybody_and_no_label_keeps_a_half(label, share):
    held = predicted()
    held.labels["b"][100:] = label
    held.labels["l"][:, 1] = torch.nan
    found = base_rate_thresholds(held)
    assert (torch.sigmoid(held.outputs["b"][100:, 0]) > found["b"]).double().mean() == share
    assert found["l"][1] == 0.5
    held.labels["b"][:] = torch.nan
    assert "b" not in base_rate_thresholds(held) and thresholds_in_use(held, "base_rate")["b"] == 0.5


def test_thresholds_in_use_of_numbers_and_mappings():
    held = predicted()
    assert thresholds_in_use(held) == {"b": 0.5, "l": 0.5}
    assert thresholds_in_use(held, {"b": 0.2}) == {"b": 0.2, "l": 0.5}
    assert thresholds_in_use(held, "base_rate") == base_rate_thresholds(held)
    with pytest.raises(RecipeError, match="threshold of task 'l'"):
        GroupMetrics(TASKS, {"sex": 2}, {"l": [0.1, 0.2, 0.3]})
    with pytest.raises(RecipeError, match="threshold of task 'b'"):
        GroupMetrics(TASKS, {"sex": 2}, {"b": [0.1, 0.2]})


@pytest.mark.parametrize(
    ("many", "few", "share"), [(-13.8, 2.0, 0.1), (13.8, -2.0, 0.0), (-13.8, -15.0, 0.0), (0.7, -2.0, 0.9)]
)
def test_who_is_tied_at_the_threshold_is_not_decided_by_rounding(many, few, share):
    """Nearly all people have one score: what is chosen on validation must not select all of them for a last digit elsewhere."""
    held = predicted(rate=0.8 if share == 0.9 else 0.3)
    logits = torch.where(torch.arange(1000) % 10 == 0, few, many)[:, None]
    tied = Predictions(
        held.tasks[:1],
        {"b": torch.sigmoid(logits[:, 0])},
        {"b": logits},
        {"b": held.labels["b"]},
        held.groups,
        held.group_names,
    )
    threshold = base_rate_thresholds(tied)["b"]
    p = torch.sigmoid(logits[:, 0])
    for nudged in (p, p.double() * (1 + 1e-7), p.double() * (1 - 1e-7)):
        assert float((nudged > threshold).double().mean()) == share
