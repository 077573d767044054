from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from libmtl_fair import tune
from libmtl_fair.errors import RecipeError
from libmtl_fair.tune import results, space, study  # noqa: F401 - modules that must not hide the package's functions
from libmtl_fair.tune.plan import Plan

SHARED = {
    "lr": {"low": 5e-4, "high": 1e-2, "log": True, "path": "train.optimizer.lr"},
    "dropout": {"low": 0.0, "high": 0.4, "log": False, "path": "model.dropout"},
    "hidden": {"choices": [[64, 32], [128, 64], [256, 128], [8]], "log": False, "path": "model.hidden"},
}


def own(name, low, high, log=True, path=None):
    return {name: {"low": low, "high": high, "log": log, "path": path or name}}


# In the order in which studies draw them: another order is other trials.
BUILT_IN = {
    "{weighting: ReLiF}": own("lam", 0.01, 0.15),
    "{weighting: ReLiF, pairs: random}": own("target", 0.01, 0.2)
    | own("eta", 0.01, 0.3)
    | own("lambda_max", 1.0, 20.0)
    | own("beta", 0.05, 0.5)
    | own("k", 16, 128),
    "{weighting: FairMT}": {
        "target": {
            "choices": ["eo <= 60%", "eo <= 45%", "eo <= 30%", "eo <= 20%", "eo <= 10%"],
            "log": False,
            "path": "target",
        }
    }
    | own("fpr_weight", 0.3, 1.0, False)
    | own("sharpness", 2.0, 6.0, False),
    "{weighting: FairMT, epsilon: 0.02}": own("epsilon", 0.005, 0.1) | own("mu", 0.1, 1.0) | own("rho", 0.01, 0.5),
    "{weighting: LambdaMix, heads: {loss: glf}}": own("lam", 0.9, 0.999, False),
    "{weighting: GroupRegulariser}": own("lam", 0.3, 1.0, False),
    "{weighting: EW, architecture: FairBranch}": own("threshold", 0.2, 0.9, False, "arch_args.threshold")
    | own("branch_every", 1, 5, False, "arch_args.branch_every"),
    "{weighting: GradNorm}": {},
}


@pytest.mark.parametrize("method", BUILT_IN)
def test_built_in_ranges_are_those_that_studies_were_made_with(small, method):
    ((name, parameters),) = space.make_space(small(f"methods.relif={method}", "tune.space={}")).items()
    assert name == "relif"
    expected = BUILT_IN[method] | SHARED
    assert [p.name for p in parameters] == list(expected)
    assert {p.name: p.described() for p in parameters} == expected


def test_a_recipes_own_ranges(small):
    changes = [
        "tune.space={k: [8, 16], rate_ema: {low: 0.1, high: 1}, weight_decay: builtin, train.epochs: {low: 1, high: 3}}"
    ]
    parameters = space.make_space(small(*changes))["relif"]
    assert [p.distribution for p in parameters] == [
        CategoricalDistribution([8, 16]),
        FloatDistribution(0.1, 1.0),
        FloatDistribution(1e-6, 1e-2, log=True),
        IntDistribution(1, 3),
    ]
    assert [p.ends for p in parameters] == [(8, 16), (0.1, 1), (1e-6, 1e-2), (1, 3)]
    assert [p.contains(8) for p in parameters] == [True, False, False, False]
    assert parameters[3].path == ("train", "epochs")
    assert not parameters[3].contains(True)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{k: [8]}", "k needs at least two choices"),
        ("{k: {low: 1}}", "k expects low < high, found low=1, high=None"),
        ("{lr: {low: 0, high: 1, log: true}}", "lr expects 0 < low < high with log: true"),
        ("{lr: {low: a, high: 1}}", "lr.low must be a number, found 'a'"),
        ("{lr: {lo: 1}}", "lr: unknown entry 'lo'; did you mean"),
        ("{lr: 3}", "lr expects builtin, a list of choices"),
        ("{batch_size: builtin}", "unknown built-in range 'batch_size'"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(small, entry, message):
    with pytest.raises(RecipeError, match=message):
        space.make_space(small(f"tune.space={entry}"))


def test_the_package_offers_functions_beside_modules_of_like_names():
    assert all(callable(getattr(tune, name)) for name in tune.__all__)


@pytest.mark.parametrize(
    ("name", "asked"), [("constraint", "target"), ("target", "constraint"), ("constraint", "constraint")]
)
def test_a_constraint_under_either_of_its_names_is_searched(small, name, asked):
    choices = ["dp <= 60%", "dp <= 30%"]
    recipe = small(
        f"methods.fairmt={{weighting: FairMT, {name}: 'dp <= 0.1'}}",
        "tune.methods=[fairmt]",
        f"tune.space={{{asked}: {choices}}}",
    )
    plan = Plan.make(recipe)
    assert space.current(recipe, "fairmt", plan.space["fairmt"][0]) == "dp <= 0.1"
    made = space.changed(recipe, "fairmt", {p.path: p.ends[1] for p in plan.space["fairmt"]})
    assert made.methods["fairmt"].args == {asked: "dp <= 30%"}


def test_the_built_in_search_asks_for_what_the_recipe_asks_for(small):
    recipe = small(
        "methods.fairmt={weighting: FairMT, constraint: 'dp <= 0.1'}", "tune.methods=[fairmt]", "tune.space={}"
    )
    found = {p.name: p.entry for p in Plan.make(recipe).space["fairmt"]}
    assert found["target"]["choices"] == ["dp <= 60%", "dp <= 45%", "dp <= 30%", "dp <= 20%", "dp <= 10%"]
