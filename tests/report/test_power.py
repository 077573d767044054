"""What a test set can see, against the counts that it holds and a simulation of the test."""

from __future__ import annotations

import numpy as np
import pytest

from libmtl_fair.errors import RecipeError
from libmtl_fair.metrics import judge, smallest_gap
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import read_run
from libmtl_fair.report.power import power_of_numbers, power_of_run


def test_power_of_a_run_is_of_its_two_smallest_groups_with_enough_people(tmp_path):
    recipe = {
        "name": "small",
        "data": {"name": "german", "tasks": ["bad_credit"], "sensitive": ["age", "foreign_worker"]},
        "model": {"hidden": [8]},
        "train": {"epochs": 3},
        "methods": {"plain": {"weighting": "EW"}},
        "metrics": {"n_bootstrap": 0},
        "output": {"report": False},
    }
    run = read_run(run_recipe(Recipe.from_dict(recipe), tmp_path / "run", device="cpu"))
    found = power_of_run(run, 0.2).set_index(["attribute", "rate"])
    rates = run.frame("groups_base_rate").query("attribute == 'age'").set_index(["metric", "group"])["value"]
    groups = run.frame("groups").query("attribute == 'age' and metric == 'base_rate' and n < 200")
    positives = sorted(np.rint(groups["value"] * groups["n"]))
    row = found.loc["age", "TPR"]
    assert row.groups == 2 and row.people == " and ".join(f"{n:.0f}" for n in positives)
    assert row.level == pytest.approx(rates["true_positive_rate", "overall"])
    assert row.gap == pytest.approx(smallest_gap((positives[0], positives[1]), row.level))
    assert (row.needed > positives[0]) == (row.gap > 0.2)
    # Too few people of one group: nothing can be said.
    assert found.loc["foreign_worker", "TPR"].groups < 2 and np.isnan(found.loc["foreign_worker", "TPR"].gap)


@pytest.mark.parametrize("groups", [2, 4])
def test_the_people_asked_for_see_the_gap_in_a_simulation(groups):
    needed = power_of_numbers(0.15, None, 0.4, groups=groups).set_index("rate")
    n, rng, seen = int(needed.loc["TPR", "people"]), np.random.default_rng(0), []
    rates = np.full(groups, 0.4)
    rates[:2] = 0.325, 0.475
    for k in range(300):
        tp = rng.binomial(n, rates)
        counts = np.stack([np.full(groups, 50), np.full(groups, 50), n - tp, tp], -1)
        seen.append(judge(counts, "equal_opportunity", n_bootstrap=0, n_permutations=199, seed=k).distinguishable)
    assert np.mean(seen) == pytest.approx(0.8, abs=0.09)


def test_rows_follow_from_the_base_rate():
    found = power_of_numbers(0.1, None, 0.45, 0.2).set_index("rate")["rows"]
    assert found.to_dict() == {"TPR": 1940, "FPR": 485, "selection": 388}
    found = power_of_numbers(None, (1940, 1940), 0.45, 0.2).set_index("rate")["gap"]
    assert found["TPR"] == pytest.approx(0.1, abs=1e-3) and found["TPR"] > found["FPR"] > found["selection"]
    with pytest.raises(RecipeError, match="base rate"):
        power_of_numbers(0.1, None, 0.5, 1.5)
