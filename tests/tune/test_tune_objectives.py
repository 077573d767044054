from __future__ import annotations

import numpy as np
import pytest
import torch
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference
from sklearn.metrics import roc_auc_score

from libmtl_fair import functional as F
from libmtl_fair.errors import RecipeError
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.tasks import KINDS, Binary
from libmtl_fair.tune import tune
from libmtl_fair.tune.objectives import UndefinedError, parse_constraint, parse_measure, value_of
from libmtl_fair.tune.plan import default_objectives

TASKS = {"a": "binary", "b": "binary"}


def measure(name, tasks=TASKS):
    return parse_measure(name, tasks, ["sex", "race"], ["0.275", "p75"])


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(3)
    n = 400
    outputs = {t: torch.randn(n, 1, generator=generator) for t in TASKS}
    labels = {t: (torch.rand(n, generator=generator) < 0.4).float() for t in TASKS}
    groups = {"sex": torch.randint(2, (n,), generator=generator), "race": torch.randint(3, (n,), generator=generator)}
    tasks = tuple(Binary(t) for t in TASKS)
    return Predictions(
        tasks=tasks,
        scores={t: torch.sigmoid(z[:, 0]) for t, z in outputs.items()},
        outputs=outputs,
        labels=labels,
        groups=groups,
        group_names={"sex": ["f", "m"], "race": ["x", "y", "z"]},
        embeddings=None,
    )


def truth(predictions, task):
    return predictions.labels[task].numpy(), (predictions.scores[task] > 0.5).numpy()


def test_differences_are_the_worst_over_tasks_and_attributes_as_fairlearn_has_them(predictions, small):
    def oracle(metric):
        return [
            metric(*truth(predictions, t), sensitive_features=predictions.groups[a].numpy())
            for t in TASKS
            for a in ("sex", "race")
        ]

    found = value_of(measure("eo_difference"), predictions, {}, small())
    assert found == pytest.approx(max(oracle(equalized_odds_difference)))
    found = value_of(measure("mean_dp_difference"), predictions, {}, small())
    assert found == pytest.approx(np.mean(oracle(demographic_parity_difference)))
    one = value_of(measure("b/race/eo_difference"), predictions, {}, small())
    assert one == pytest.approx(oracle(equalized_odds_difference)[3])


def test_utility_is_scikit_learns(predictions, small):
    aucs = [roc_auc_score(predictions.labels[t], predictions.scores[t]) for t in TASKS]
    assert value_of(measure("macro_auc"), predictions, {}, small()) == pytest.approx(np.mean(aucs))
    assert value_of(measure("b/auc"), predictions, {}, small()) == pytest.approx(aucs[1])


def test_phi_of_one_attribute_is_the_aggregated_aeod(predictions, small):
    psi = torch.stack(
        [
            F.aeod(predictions.scores[t].double(), predictions.labels[t], predictions.groups["sex"], 2, normalise=True)[
                0
            ]
            for t in TASKS
        ]
    )
    expected = F.aggregate_disparities(psi, 0.5)[0]
    assert value_of(measure("sex/phi"), predictions, {}, small()) == pytest.approx(float(expected))


def test_bias_is_the_fixed_delta_audit(predictions, small):
    from libmtl_fair.metrics import FixedDeltaAudit

    expected = FixedDeltaAudit(0.275, exact=True).run(predictions.scores)
    assert value_of(measure("bias"), predictions, {"0.275": 0.275}, small()) == expected.bias
    assert value_of(measure("violation_rate@0.275"), predictions, {"0.275": 0.275}, small()) == expected.violation_rate


def test_an_undefined_rate_is_named(predictions, small):
    before = value_of(measure("eo_difference"), predictions, {}, small())
    predictions.labels["b"][predictions.groups["sex"] == 1] = 0
    expected = "equalized_odds needs two groups of .* 30 people .*; task 'b', attribute 'sex': too few people in 'm'"
    with pytest.raises(UndefinedError, match=expected):
        value_of(measure("b/sex/eo_difference"), predictions, {}, small())
    others = [f"{task}/{attribute}/eo_difference" for task, attribute in (("a", "sex"), ("a", "race"), ("b", "race"))]
    worst = max(value_of(measure(name), predictions, {}, small()) for name in others)
    assert value_of(measure("eo_difference"), predictions, {}, small()) == worst != before
    predictions.labels["b"][:] = 0
    with pytest.raises(UndefinedError, match="b/auc is undefined on the validation data"):
        value_of(measure("b/auc"), predictions, {}, small())


@pytest.mark.parametrize(
    ("name", "direction"),
    [("macro_auc", "maximize"), ("macro_brier", "minimize"), ("a/accuracy", "maximize"), ("bias@p75", "minimize")],
)
def test_directions(name, direction):
    assert measure(name).direction == direction


def test_constraints_are_read():
    found = parse_constraint("eo_difference<=0.05", measure)
    assert (found.text, found.excess(0.07)) == ("eo_difference <= 0.05", pytest.approx(0.02))
    assert parse_constraint("macro_auc >= .8", measure).excess(0.9) == pytest.approx(-0.1)
    with pytest.raises(RecipeError, match="expected a text such as"):
        parse_constraint("macro_auc = 1", measure)


def test_what_the_data_do_not_have_is_refused():
    with pytest.raises(RecipeError, match="at least two tasks"):
        parse_measure("bias", {"a": "binary"}, ["sex"], ["0.275"])
    with pytest.raises(RecipeError, match="no sensitive attribute"):
        parse_measure("eo_difference", TASKS, [], [])
    with pytest.raises(RecipeError, match="is for binary tasks"):
        parse_measure("eo_difference", {"a": "regression"}, ["sex"], [])


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_of_every_kind_have_objectives_without_being_told(kind):
    tasks = [KINDS[kind]("a"), KINDS[kind]("b")]
    names = default_objectives(tasks)
    assert names == (("macro_auc", "eo_difference") if kind == "binary" else (names[0], "bias"))
    assert all(parse_measure(name, {t.name: kind for t in tasks}, ["sex"], ["0.1"]) for name in names)
    if kind != "binary":
        assert default_objectives(tasks[:1]) == names[:1] and names[0].startswith("a/")


def test_a_study_of_maps_needs_no_objectives(tmp_path):
    recipe = {
        "name": "rooms",
        "data": {"name": "scenes", "sensitive": ["light"], "args": {"n": 20, "size": [16, 16]}},
        "model": {"encoder": "cnn", "encoder_args": {"channels": [4]}},
        "train": {"epochs": 1, "batch_size": 6},
        "methods": {"plain": {"weighting": "EW"}, "relif": {"weighting": "ReLiF", "pairs": "random"}},
        "seeds": [0],
    }
    study = tune(Recipe.from_dict(recipe), 2, storage=str(tmp_path / "study.log"))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
