from __future__ import annotations

import dataclasses

import pytest
import torch

from libmtl_fair import tune
from libmtl_fair.errors import RecipeError
from libmtl_fair.recipe.build import loaders, make_dataset, make_trainer
from libmtl_fair.tune.objective import Plan, run_trial
from libmtl_fair.tune.space import changed
from libmtl_fair.tune.stacked import Stack, obstacle

CPU = torch.device("cpu")
MEMBERS = [
    ("relif", {("train", "optimizer", "lr"): 0.01, ("target",): 0.05}, 3),
    ("relif", {("train", "optimizer", "lr"): 0.003, ("beta",): 0.2, ("model", "dropout"): 0.3}, 4),
    ("plain", {("train", "optimizer", "weight_decay"): 0.01}, 5),
]


def doubled(data):
    parts = {
        name: dataclasses.replace(part, x=part.x.double(), labels={t: y.double() for t, y in part.labels.items()})
        for name, part in data.splits().items()
    }
    return dataclasses.replace(data, **parts)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("select", ["last", "best"])
def test_each_member_is_the_trial_run_alone(small, dtype, within, select):
    recipe = small("train.epochs=2", f"train.select={select}", "train.scheduler={scheduler: cos, T_max: 2}")
    held = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        data = make_dataset(recipe, 0)
        data = doubled(data) if dtype == torch.float64 else data

        def trainer(method, values, seed):
            return make_trainer(changed(recipe, method, values), method, data, data.tasks, seed, device=CPU)

        stacked = [trainer(*member) for member in MEMBERS]
        Stack(stacked, data, 256, 2).train()
        for (method, values, seed), found in zip(MEMBERS, stacked):
            alone = trainer(method, values, seed)
            sources = loaders(data, 256, seed, CPU)
            alone.train(sources["train"], None, 2, sources["val"])
            for (name, a), b in zip(alone.model.named_parameters(), found.model.parameters()):
                assert torch.allclose(a, b, rtol=0, atol=within), name
            if select == "best":
                assert alone.best["epoch"] == found.best["epoch"]
    finally:
        torch.set_default_dtype(held)


def test_what_cannot_be_stacked_says_why(small):
    tasks = make_dataset(small(), 0).tasks
    assert obstacle(small(), "relif", tasks) is None
    assert "weighting FairMT" in obstacle(small("methods.relif={weighting: FairMT}"), "relif", tasks)
    assert "norm batch" in obstacle(small("model.norm=batch"), "relif", tasks)


def test_a_stacked_study_finds_what_a_sequential_one_finds(small, tmp_path):
    recipe = small("tune.space={target: builtin, lr: builtin}")
    said = []
    stacked = tune.tune(recipe, 6, storage=tmp_path / "s.journal", stacked=3, note=said.append)
    complete = stacked.get_trials()
    assert [t.state.name for t in complete] == ["COMPLETE"] * 6
    plan = Plan.make(recipe)
    for trial in complete[:4]:
        candidate = tune.to_recipe(trial)
        (method,) = candidate.methods
        alone = run_trial(plan, candidate, method, trial.user_attrs["seeds"], plan.plain_protocol())
        assert [alone.mean(m.name) for m in plan.objectives] == pytest.approx(trial.values, abs=2e-3)


def test_others_are_trained_alone_and_say_so(small):
    said = []
    recipe = small("methods.relif={weighting: FairMT}", "tune.space={lr: builtin}")
    study = tune.tune(recipe, 3, stacked=3, note=said.append)
    assert [t.state.name for t in study.get_trials()] == ["COMPLETE"] * 3
    assert any("trained alone: weighting FairMT (stacked: an MLP" in line for line in said)
    with pytest.raises(RecipeError, match="--stacked supports studies without pruner"):
        tune.tune(small("tune.objectives=[macro_auc]", "tune.pruner=median"), 1, stacked=2)
