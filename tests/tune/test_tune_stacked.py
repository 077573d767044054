from __future__ import annotations

import dataclasses

import pytest
import torch

from libmtl_fair import functional as F
from libmtl_fair.recipe.build import loaders, make_dataset, make_trainer
from libmtl_fair.tune.space import changed
from libmtl_fair.tune.stacked import Rows, Stack, obstacle, shape
from libmtl_fair.tune.stacked.layers import Adam

CPU = torch.device("cpu")
LR, DECAY, DROPOUT = ("train", "optimizer", "lr"), ("train", "optimizer", "weight_decay"), ("model", "dropout")
HEADS = "{weighting: LambdaMix, lam: 0.7, heads: {loss: %s}}"
METHODS = (
    "methods.fairmt={weighting: FairMT, epsilon: 0.01, rho: 0.3}",
    "methods.lipschitz={weighting: FairMT, rho: 0.3, lipschitz: true, alpha: uniform}",
    f"methods.glf={HEADS % 'glf'}",
    f"methods.gld={HEADS % 'gld, target: main, heads: shared'}",
    "methods.uniform={weighting: FairMT, epsilon: 0.01, rho: 0.3, alpha: uniform, attributes: [sex], fpr_weight: 0.5}",
    "methods.batchwise={weighting: FairMT, rho: 0.5, ema: 0.0, ema_gradient: batch, sharpness: 2.0, normalise: false}",
    "methods.decisions={weighting: FairMT, target: eo <= 10%, min_count: 2}",
    "methods.parity={weighting: FairMT, target: dp <= 0.01, alpha: proxy, reference: lcb, min_count: 2}",
    "methods.lcb={weighting: FairMT, rho: 0.3, reference: lcb}",
    "methods.paper={weighting: ReLiF, preset: paper, lambda_0: 0.5, warmup: 1, eta: 0.3}",
    "methods.rough={weighting: ReLiF, scaling: false, detach_distance: false, control: false, lambda_0: 2.0}",
    "methods.sampled={weighting: ReLiF, lambda_0: 2.0, lipschitz: false}",
    "methods.near={weighting: ReLiF}",
    "methods.share={weighting: ReLiF, share: 0.5, warmup: 2, eta: 0.03, lam: 0.1}",
    "methods.regulariser={weighting: GroupRegulariser, loss: tprl, lam: 0.8}",
    f"methods.own={HEADS % 'glf, target: label+accuracy'}",
)
MEMBERS = [
    ("relif", {LR: 0.01, ("target",): 0.05, ("lambda_max",): 3.0}, 3),
    ("relif", {LR: 0.003, ("beta",): 0.2, DROPOUT: 0.3, ("warmup",): 2, ("k",): 8}, 4),
    ("plain", {DECAY: 0.01}, 5),
    ("fairmt", {LR: 0.02, ("epsilon",): 0.002}, 6),
    ("fairmt", {("mu",): 0.2, DROPOUT: 0.1}, 7),
    ("lipschitz", {}, 8),
    ("glf", {("lam",): 0.8, DROPOUT: 0.2}, 9),
    ("gld", {DECAY: 0.001}, 10),
    ("uniform", {}, 14),
    ("batchwise", {("min_count",): 5.0}, 15),
    ("batchwise", {("ema",): 0.5}, 16),
    ("lcb", {}, 17),
    ("decisions", {("fpr_weight",): 0.5}, 19),
    ("decisions", {("target",): "eo <= 0.02", ("sharpness",): 2.0}, 20),
    ("parity", {}, 21),
    ("paper", {DROPOUT: 0.1}, 11),
    ("rough", {}, 12),
    ("sampled", {}, 13),
    ("regulariser", {}, 18),
    ("near", {("lam",): 0.1}, 19),
    ("near", {("lam",): 0.02, DROPOUT: 0.2}, 20),
    ("share", {}, 21),
    ("share", {("share",): 0.9, ("lam",): 0.03}, 22),
]
OWN_HEADS = [("own", {("lam",): 0.6}, 3), ("own", {LR: 0.02, ("lam",): 0.9}, 4)]


def doubled(data):
    parts = {
        name: dataclasses.replace(part, x=part.x.double(), labels={t: y.double() for t, y in part.labels.items()})
        for name, part in data.splits().items()
    }
    return dataclasses.replace(data, **parts)


@pytest.fixture
def few(monkeypatch):
    """A function that sets how many entries a row may have to be taken as such: 0 none, 1 any number."""
    return lambda share: monkeypatch.setattr("libmtl_fair.tune.stacked.layers.FEW", share)


@pytest.fixture
def world(small, request):
    """A function of changes that returns (data, a function that makes a member's trainer)."""
    held = torch.get_default_dtype()

    def make(*changes, dtype=torch.float64):
        torch.set_default_dtype(dtype)
        recipe = small(*METHODS, *changes)
        data = make_dataset(recipe, 0)
        data = doubled(data) if dtype == torch.float64 else data

        def trainer(method, values, seed):
            return make_trainer(changed(recipe, method, values), method, data, data.tasks, seed, device=CPU)

        return data, trainer

    yield make
    torch.set_default_dtype(held)


def alone(trainer, data, epochs, batch_size=256):
    sources = loaders(data, batch_size, trainer.seed, CPU)
    trainer.train(sources["train"], None, epochs, sources["val"])
    return trainer


def assert_equal(stacked, single, within):
    found = stacked.model.state_dict()
    for name, value in single.model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(found[name], value, rtol=0, atol=within), name


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("select", "share"), [("last", 0), ("best", 1)])
@pytest.mark.parametrize("sensitive", ["[sex]", "[sex, race]"])
@pytest.mark.parametrize("members", [MEMBERS, OWN_HEADS], ids=["main", "own_heads"])
def test_each_member_is_the_trial_run_alone(world, few, dtype, within, select, share, sensitive, members):
    few(share)
    changes = [f"train.select={select}", f"data.sensitive={sensitive}", "train.scheduler={scheduler: cos, T_max: 2}"]
    data, trainer = world(*changes, dtype=dtype)
    trainers = [trainer(*member) for member in members]
    for made in trainers:
        made.model.epochs = 2
    stack = Stack(Rows(data, CPU), 256)
    stack.change(add=trainers)
    for _ in range(2):
        stack.epoch()
    stack.change(drop=trainers)
    for member, found in zip(members, trainers):
        single = alone(trainer(*member), data, 2)
        if select == "best":
            assert single.best["epoch"] == found.best["epoch"]
            single.model.load_state_dict(single.best["state"])
            found.model.load_state_dict(found.best["state"])
        assert_equal(found, single, within)


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_every_step_is_that_of_the_trial_run_alone(world, few, share, dtype, within):
    """An epoch is one step here; after each, the stack goes on from the weights of the trainer alone."""
    few(share)
    data, trainer = world("train.select=last", dtype=dtype)
    data = dataclasses.replace(data, train=_rows(data.train, 100))
    for member in MEMBERS:
        twin, single = trainer(*member), trainer(*member)
        rows = loaders(data, 100, single.seed, CPU)["train"]
        stack = Stack(Rows(data, CPU), 100)
        stack.change(add=[twin])
        for steps in range(1, 9):
            stack.epoch()
            single.train(rows, None, steps)
            assert_equal(twin, single, within)
            twin.model.load_state_dict(single.model.state_dict())


def _rows(split, count):
    return dataclasses.replace(
        split,
        x=split.x[:count],
        labels={name: y[:count] for name, y in split.labels.items()},
        groups={name: g[:count] for name, g in split.groups.items()},
        rows=split.rows[:count],
    )


def test_members_come_and_go_and_do_not_notice_each_other(world):
    data, trainer = world("train.scheduler={scheduler: cos, T_max: 3}")
    first, second, third, fourth = (trainer(*MEMBERS[i]) for i in (0, 1, 3, 6))
    stack = Stack(Rows(data, CPU), 256)
    stack.change(add=[first, second])
    stack.epoch()
    stack.change(add=[third], drop=[first])
    stack.epoch()
    stack.change(add=[fourth])
    stack.epoch()
    stack.change(drop=[second, third, fourth])
    assert not stack.members
    for i, (found, epochs) in enumerate([(first, 1), (second, 3), (third, 2), (fourth, 1)]):
        single = alone(trainer(*MEMBERS[(0, 1, 3, 6)[i]]), data, epochs)
        assert_equal(found, single, 1e-9)


@pytest.mark.parametrize("share", [0, 1])
def test_missing_labels_and_a_member_that_diverges_do_not_disturb_the_others(world, few, share):
    few(share)
    data, trainer = world()
    train = data.train
    labels = {name: y.masked_fill(torch.rand(len(y)) < 0.3, torch.nan) for name, y in train.labels.items()}
    data = dataclasses.replace(data, train=dataclasses.replace(train, labels=labels))
    mad = trainer("plain", {LR: 1e300}, 1)
    good = [trainer(*MEMBERS[i]) for i in (0, 2, 3, 6)]
    stack = Stack(Rows(data, CPU), 256)
    stack.change(add=[good[0], mad, *good[1:]])
    stack.epoch()
    assert [stack.finite(m) for m in range(5)] == [True, False, True, True, True]
    stack.change(drop=[mad])
    stack.epoch()
    stack.change(drop=good)
    for i, found in zip((0, 2, 3, 6), good):
        assert_equal(found, alone(trainer(*MEMBERS[i]), data, 2), 1e-9)


def test_what_cannot_be_stacked_says_why(small):
    tasks = make_dataset(small(), 0).tasks

    def why(change):
        return obstacle(small(change), "relif", tasks)

    assert obstacle(small(), "relif", tasks) is None
    assert "weighting FBGrad (stacked: an MLP" in why("methods.relif={weighting: FBGrad, architecture: FairBranch}")
    assert "proxy full" in why("methods.relif={weighting: FairMT, proxy: full}")
    assert why("methods.relif={weighting: FairMT, proxy: full, alpha: uniform}") is None
    assert "base GradNorm" in why("methods.relif={weighting: ReLiF, base: GradNorm}")
    assert "norm batch" in why("model.norm=batch")
    assert "heads adversarial" in why("methods.relif={weighting: LambdaMix, heads: {loss: adversarial}}")
    assert "resplit" in why("data.resplit=true")
    assert "optimiser sgd" in why("train.optimizer={optim: sgd}")


def test_members_of_one_stack_share_their_shape(small):
    recipe = small(*METHODS)
    assert shape(recipe, "relif") == shape(recipe, "fairmt") == shape(recipe, "glf") != shape(recipe, "own")
    assert shape(small("model.hidden=[4]"), "relif") != shape(recipe, "relif")


def test_members_of_a_method_are_computed_together(world):
    data, trainer = world()
    stack = Stack(Rows(data, CPU), 256)
    stack.change(add=[trainer(*member) for member in MEMBERS])
    found = {tuple(part.places): type(part).__name__ for part in stack._parts}
    named = {tuple(MEMBERS[m][0] for m in places): kind for places, kind in found.items()}
    assert named == {
        ("relif", "relif"): "ReLiFPart",
        ("plain",): "Plain",
        ("fairmt", "fairmt"): "FairMTPart",
        ("lipschitz",): "Own",
        ("glf",): "HeadsPart",
        ("gld",): "HeadsPart",
        ("uniform",): "FairMTPart",
        ("batchwise", "batchwise"): "FairMTPart",
        ("decisions",): "Own",
        ("parity",): "Own",
        ("lcb",): "FairMTPart",
        ("paper",): "ReLiFPart",
        ("rough",): "ReLiFPart",
        ("sampled",): "Own",
        ("regulariser",): "Own",
        ("near", "near"): "NearPart",
        ("share", "share"): "NearPart",
    }


def test_task_weights_away_from_the_cpu_are_those_beside_it():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((20, 3, 5), generator=generator, dtype=torch.float64)
    linear = torch.randn((20, 3), generator=generator, dtype=torch.float64)
    seen = torch.rand((20, 3), generator=generator) < 0.7
    seen[:, 0] |= ~seen.any(1)
    gram = rows @ rows.mT
    alone = torch.stack([F.min_norm_weights(*own) for own in zip(gram, linear, seen)])
    torch.testing.assert_close(torch.func.vmap(F.min_norm_weights)(gram, linear, seen), alone, rtol=0, atol=1e-6)


def test_adam_of_all_rows_at_once_is_that_of_each_row(world):
    _, trainer = world()
    trainers = [trainer("plain", {LR: 0.01, DECAY: 0.1}, 0), trainer("plain", {LR: 0.3}, 1)]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn((2, 7), generator=generator, dtype=torch.float64)
    found = []
    for way in (Adam._rows, Adam._together):
        weights, adam = start.clone(), Adam((0.9, 0.999), 1e-8, start[:0])
        adam.change([], trainers)
        generator.manual_seed(1)
        for step in range(5):
            if step == 2:
                adam.change([1], trainers[:1])
                weights = weights[[1, 0]]
            way(adam, weights, torch.randn((2, 7), generator=generator, dtype=torch.float64))
        found.append(weights)
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
