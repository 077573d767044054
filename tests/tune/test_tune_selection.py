from __future__ import annotations

import optuna
import pytest

from libmtl_fair import tune
from libmtl_fair.errors import FairMTLError, RecipeError
from libmtl_fair.tune import results


def study_of(points, constraints=None, names=("macro_auc", "eo_difference")):
    study = optuna.create_study(study_name="s", directions=["maximize", "minimize"])
    directions = {names[0]: "maximize", names[1]: "minimize"}
    study.set_user_attr("about", {"objectives": directions, "constraints": []})
    for i, values in enumerate(points):
        attrs = {"validation": {name: [v] for name, v in zip(names, values)}, "slot": i}
        attrs |= {"role": "baseline"} if i == 0 else {}
        system = {} if constraints is None else {"constraints:eo_difference <= 0": constraints[i]}
        study.add_trial(optuna.create_trial(values=list(values), user_attrs=attrs, system_attrs=system))
    return study


POINTS = [(0.90, 0.20), (0.89, 0.05), (0.88, 0.04), (0.80, 0.01), (0.70, 0.15)]


def test_select_takes_the_best_utility_within_the_bound():
    study = study_of(POINTS)
    assert tune.select(study, max_disparity=0.05).number == 1
    assert tune.select(study, max_disparity=0.04).number == 2
    assert tune.select(study, max_disparity=1).number == 0


def test_select_takes_the_fairest_where_none_is_within_the_bound():
    assert tune.select(study_of(POINTS), max_disparity=0.001).number == 3


def test_knee_is_farthest_from_the_line_between_the_ends():
    assert tune.knee(study_of(POINTS)).number == 1


def test_front_leaves_out_what_is_dominated():
    trials, feasible = tune.front(study_of(POINTS))
    assert feasible
    assert sorted(t.number for t in trials) == [0, 1, 2, 3]


def test_front_is_the_least_violating_where_nothing_is_feasible():
    trials, feasible = tune.front(study_of(POINTS, constraints=[0.2, 0.1, 0.1, 0.3, 0.4]))
    assert not feasible
    assert [t.number for t in trials] == [1, 2]


@pytest.mark.parametrize(("how", "number"), [("knee", 1), ("best", 1), ("max_disparity=0.04", 2), ("3", 3)])
def test_chosen_by_text(how, number):
    assert tune.chosen(study_of(POINTS), how).number == number


@pytest.mark.parametrize("how", ["kneee", "max_disparity", "max_disparity=x", "-1", "max_disparity=nan"])
def test_other_texts_are_refused(how):
    with pytest.raises(RecipeError, match="--select expects"):
        tune.chosen(study_of(POINTS), how)


def test_no_trial_and_no_such_trial():
    with pytest.raises(FairMTLError, match="no complete trial"):
        tune.knee(study_of([]))
    with pytest.raises(RecipeError, match="trials 0 to 4, found trial 9"):
        tune.trial_by_number(study_of(POINTS), 9)


def test_a_trial_of_something_else_has_no_recipe():
    with pytest.raises(RecipeError, match="holds no recipe"):
        tune.to_recipe(study_of(POINTS).get_trials()[0])


def test_pictures(tmp_path):
    study = study_of(POINTS)
    page = results.page(study, tmp_path / "study.html").read_text()
    assert "baseline" in page
    assert page.count("Plotly.newPlot") == 1
    assert results.image(study, tmp_path / "front.png").stat().st_size > 5000
