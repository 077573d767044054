"""FairBranch itself: events preserve the function and carry optimiser state; similarity, settings, checkpoints, errors."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import libmtl_fair as lf
from libmtl_fair.errors import HostError, RecipeError
from libmtl_fair.libmtl.loading import AbsWeighting
from libmtl_fair.methods.fairbranch.fairbranch import FairBranch, FairBranchSettings, adopt
from libmtl_fair.methods.fairbranch.similarity import matrices, similarity
from libmtl_fair.models import MLP

NEVER = {"threshold": 0.05, "branch_every": 1000}


def outputs(trainer: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.model.eval()
    with torch.no_grad():
        return dict(trainer.model(x))


# -- an event changes nothing but the structure -------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.01, 0.3, 1.0])
def test_outputs_are_bitwise_the_same_across_each_event(branching: SimpleNamespace, threshold: float) -> None:
    trainer = branching.trainer(arch_args={**NEVER, "threshold": threshold})
    x = torch.randn(17, branching.features)
    for event in range(2):
        trainer.train(branching.loader(), epochs=event + 1)
        before = outputs(trainer, x)
        made = trainer.model.branch()
        assert made is not None
        assert made.block == 3 - event
        after = outputs(trainer, x)
        assert all(torch.equal(before[t], after[t]) for t in before)
    assert trainer.model.branch() is None
    assert trainer.model.tree.depth == 1


def test_copies_that_have_not_been_trained_are_not_compared(branching: SimpleNamespace) -> None:
    trainer = branching.trainer(arch_args={**NEVER, "threshold": 1.0})
    trainer.train(branching.loader(), epochs=1)
    assert trainer.model.branch() is not None
    assert trainer.model.branch() is None
    trainer.train(branching.loader(), epochs=2)
    assert trainer.model.branch() is not None


def test_the_function_of_a_user_with_one_batch_and_gradients_is_preserved_in_training_mode(
    branching: SimpleNamespace,
) -> None:
    trainer = branching.trainer(arch_args=NEVER, encoder_class=lambda: MLP(branching.features, (12, 8)))
    trainer.train(branching.loader(), epochs=1)
    x = torch.randn(9, branching.features)
    trainer.model.train()
    before = trainer.model(x)
    trainer.model.branch()
    after = trainer.model(x)
    assert all(torch.allclose(before[t], after[t], atol=1e-6) for t in before)


class Convolutions(nn.Module):
    """A small ResNet: batch norm and an in-place ReLU in the stem, four stages, one of them strided."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        for i in range(1, 5):
            stage = nn.Sequential(
                nn.Conv2d(4, 4, 3, stride=1 + (i == 3), padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            )
            setattr(self, f"layer{i}", stage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).flatten(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("weighting", ["EW", "PCGrad", "FBGrad", "ReLiF", "FairMT"])
def test_batch_norm_in_a_stem_trains_and_moves_once_a_step(weighting: str, branching: SimpleNamespace) -> None:
    tasks = (lf.Binary("a"), lf.Binary("b"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 1, 8, 8, generator=generator)
    labels = {t.name: (x[:, 0, i, i] > 0).float() for i, t in enumerate(tasks)}
    loader = lf.ResidentLoader(x, labels, {"sex": (x[:, 0, 3, 3] > 0).long()}, batch_size=8, shuffle=True, device="cpu")
    trainer = branching.trainer(
        weighting,
        tasks=tasks,
        encoder_class=Convolutions,
        decoders={t.name: nn.Linear(16, 1) for t in tasks},
        arch_args={"threshold": 1.0, "branch_every": 2, "unit": "steps"},
    )
    trainer.train(loader, epochs=3)
    assert trainer.model.tree.depth < 4
    assert len(trainer.model.tree.leaves) == 2
    assert int(trainer.model.encoder.frame.bn1.num_batches_tracked) == 9
    assert np.isfinite(trainer.history["loss/a"]).all()


# -- optimisers ---------------------------------------------------------------------------------------------------

OPTIMISERS = {
    "adam fused": {"optim": "adam", "lr": 1e-2},
    "adam foreach": {"optim": "adam", "lr": 1e-2, "foreach": True},
    "adam loop": {"optim": "adam", "lr": 1e-2, "foreach": False},
    "adamw amsgrad": {"optim": "adamw", "lr": 1e-2, "amsgrad": True},
    "sgd momentum": {"optim": "sgd", "lr": 1e-2, "momentum": 0.9},
    "sgd": {"optim": "sgd", "lr": 1e-2},
    "adagrad": {"optim": "adagrad", "lr": 1e-2},
    "rmsprop": {"optim": "rmsprop", "lr": 1e-2, "momentum": 0.5},
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_state_is_copied_and_independent(branching: SimpleNamespace, name: str) -> None:
    trainer = branching.trainer(optim_param=OPTIMISERS[name], arch_args={**NEVER, "threshold": 1.0})
    trainer.train(branching.loader(), epochs=1)
    optimizer, model = trainer.optimizer, trainer.model
    source = dict(zip(range(100), model.encoder.copies(2)[0].parameters()))
    states = {
        i: {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items() if v is not None}
        for i, p in source.items()
    }
    groups = optimizer.param_groups
    model.branch()
    assert optimizer.param_groups is groups
    assert [id(p) for g in groups for p in g["params"]] == [id(p) for p in model.parameters()]
    for copy in model.encoder.copies(2):
        for i, p in enumerate(copy.parameters()):
            state = {k: v for k, v in optimizer.state[p].items() if v is not None}
            assert state.keys() == states[i].keys()
            assert all(torch.equal(torch.as_tensor(state[k]), states[i][k]) for k in state)
    held = [v.data_ptr() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert len(held) == len(set(held))
    trainer.train(branching.loader(), epochs=2)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_a_copy_moves_like_its_origin_under_the_same_gradients(seed: int, steps: int) -> None:
    torch.manual_seed(seed)
    origin, other = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
    optimizer = torch.optim.Adam([{"params": [origin], "lr": 0.1}, {"params": [other], "lr": 0.2}], fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def step(parameters: list[nn.Parameter], grad: torch.Tensor) -> None:
        for p in parameters:
            p.grad = grad.clone()
        other.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()

    for _ in range(steps):
        step([origin], torch.randn(3))
    copy = nn.Parameter(origin.detach().clone())
    adopt(optimizer, [(origin, copy)], [("copy", copy), ("origin", origin), ("other", other)])
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 1]
    for _ in range(3):
        step([origin, copy], torch.randn(3))
    assert torch.equal(origin, copy)
    assert scheduler.last_epoch == steps + 3


def test_names_in_an_optimiser_follow() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([("a", a)], lr=0.1)
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this PyTorch keeps no names")
    adopt(optimizer, [(a, b)], [("b", b), ("a", a)])
    assert optimizer.param_groups[0]["param_names"] == ["b", "a"]


def test_frozen_parameters_stay_frozen_and_out_of_the_optimiser(branching: SimpleNamespace) -> None:
    def encoder() -> nn.Module:
        made = MLP(branching.features, (12, 10, 8))
        made.blocks[2][0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
        return made

    trainer = branching.trainer("PCGrad", encoder_class=encoder, arch_args={**NEVER, "threshold": 1.0})
    trainer.train(branching.loader(), epochs=1)
    trainer.model.branch()
    trainer.train(branching.loader(), epochs=2)
    weights = [copy[0].weight for copy in trainer.model.encoder.copies(2)]
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert len(weights) == 4
    assert all(not w.requires_grad and torch.equal(w, weights[0]) and id(w) not in held for w in weights)


def test_a_branch_by_hand_with_an_optimiser_of_ones_own() -> None:
    model_class = type("Model", (FairBranch, AbsWeighting), {})
    heads = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
    model: Any = model_class(
        ["a", "b"], lambda: MLP(3, (5, 4)), heads, False, False, torch.device("cpu"), threshold=1.0
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert model.branch(optimizer) is not None
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters())) == 10


# -- what weightings see ------------------------------------------------------------------------------------------


def test_shared_parameters_are_those_of_two_tasks_or_more(branching: SimpleNamespace) -> None:
    trainer = branching.trainer(arch_args=NEVER)
    model = trainer.model
    trainer.train(branching.loader(), epochs=1)
    model.encoder.grow(model.tree.branch([(0, 1), (2,), (3,)]))
    shared = [id(p) for p in model.get_share_params()]
    pair = model.encoder.copies(2)[0]
    trunk = [*model.encoder.copies(0), *model.encoder.copies(1)]
    assert shared == [id(p) for module in [*trunk, pair] for p in module.parameters()]
    assert [group for group, _ in model.branch_parameters()] == [("a", "b"), ("c",), ("d",)]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.zero_grad_share_params()
    assert {id(p) for p in model.parameters() if p.grad is None} == set(shared)


def test_gradients_of_tasks_reach_their_own_path_only(branching: SimpleNamespace) -> None:
    model = branching.trainer(arch_args=NEVER).model
    model.encoder.grow(model.tree.branch([(0, 1), (2,), (3,)]).branch([(0, 1), (2,)]))
    layers = model.layer_parameters()
    for task in model.task_name:
        model.zero_grad()
        model(torch.randn(5, branching.features))[task].sum().backward()
        reached = {id(p) for p in model.encoder.parameters() if p.grad is not None}
        assert reached == {id(p) for layer in layers for p in layer[task]}


@pytest.mark.parametrize("weighting", ["PCGrad", "MGDA", "CAGrad", "GradVac", "GradNorm", "IMTL", "EW"])
def test_weightings_work_when_nothing_is_shared_any_more(branching: SimpleNamespace, weighting: str) -> None:
    trainer = branching.trainer(weighting, arch_args={"threshold": 1.0, "branch_every": 1, "keep_first": False})
    trainer.train(branching.loader(), epochs=5)
    assert trainer.model.tree.depth == 0
    assert list(trainer.model.get_share_params()) == []
    assert trainer.model.tree.n_branches == 9
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


class Keeps(AbsWeighting):  # type: ignore[misc]
    """Keeps a running gradient of each shared parameter, as git main's MoCo does."""

    def init_param(self) -> None:
        self._compute_grad_dim()
        self.y = torch.zeros(self.task_num, self.grad_dim)

    def backward(self, losses: torch.Tensor, **_: Any) -> None:
        self._compute_grad_dim()
        self.y = 0.5 * self.y + self._compute_grad(losses, "backward")
        self._reset_grad(self.y.sum(0))


def test_gradients_that_a_weighting_keeps_move_with_the_parameters(branching: SimpleNamespace) -> None:
    trainer = branching.trainer(Keeps, arch_args=NEVER)
    trainer.train(branching.loader(), epochs=1)
    model = trainer.model
    sizes = [p.numel() for p in model.get_share_params()]
    before = dict(zip((id(p) for p in model.get_share_params()), model.y.split(sizes, dim=1)))
    origin = list(model.encoder.copies(2)[0].parameters())
    event = model.branch()
    assert len(event.groups) > 1
    now = list(model.get_share_params())
    parts = model.y.split([p.numel() for p in now], dim=1)
    places = [
        p for i, g in enumerate(model.tree.levels[2]) if len(g) > 1 for p in model.encoder.copies(2)[i].parameters()
    ]
    expected = {id(p): before[id(p)] for p in now if id(p) in before}
    expected |= {id(p): before[id(origin[i % len(origin)])] for i, p in enumerate(places)}
    assert all(torch.equal(part, expected[id(p)]) for p, part in zip(now, parts))
    trainer.train(branching.loader(), epochs=2)


def test_multi_input_runs_one_path_a_task(branching: SimpleNamespace) -> None:
    loaders = {task.name: branching.loader(32 * (i + 1)) for i, task in enumerate(branching.tasks)}
    trainer = branching.trainer("PCGrad", multi_input=True)
    trainer.train(loaders, epochs=3)
    assert len(trainer.model.events) == 2
    fair = branching.trainer("FBGrad", multi_input=True)
    fair.train(loaders, epochs=3)
    assert np.isfinite(fair.history["conflicts"]).all()


@pytest.mark.parametrize("weighting", ["EW", "MGDA", "IMTL", "GradNorm", "GradDrop"])
@pytest.mark.parametrize("multi", [False, True])
def test_representation_gradients_across_events(branching: SimpleNamespace, weighting: str, multi: bool) -> None:
    trainer = branching.trainer(weighting, rep_grad=True, multi_input=multi)
    one = branching.loader()
    loader = {task.name: branching.loader() for task in branching.tasks} if multi else one
    trainer.train(loader, epochs=3)
    assert len(trainer.model.events) == 2
    assert all(p.grad is not None for p in trainer.model.encoder.parameters())


# -- similarity ---------------------------------------------------------------------------------------------------


def brute_cka(a: np.ndarray, b: np.ndarray) -> float:
    """tr(K_a K_b) / sqrt(tr(K_a K_a) tr(K_b K_b)) with K = theta theta', centred."""
    n = len(a)
    centre = np.eye(n) - 1 / n
    ka, kb = centre @ a @ a.T @ centre, centre @ b @ b.T @ centre
    scale = np.sqrt(np.trace(ka @ ka) * np.trace(kb @ kb))
    return float(np.trace(ka @ kb) / scale) if scale > 1e-20 else 0.0


def test_similarity_of_heads_agrees_with_brute_force(branching: SimpleNamespace) -> None:
    trainer = branching.trainer(arch_args=NEVER)
    found = trainer.model.similarity()
    weights = [trainer.model.decoders[t].weight.detach().double().numpy().T for t in trainer.model.task_name]
    for i, j in itertools.combinations(range(4), 2):
        assert found[i, j] == pytest.approx(brute_cka(weights[i], weights[j]), abs=1e-9)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert torch.equal(found, found.T)


def test_similarity_of_blocks_is_the_mean_over_matrices() -> None:
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)) for _ in range(2)]
    parts = []
    for index in (0, 2):
        a, b = (m[index].weight.detach().double() for m in modules)
        parts.append(brute_cka(*(w.transpose(0, 1).flatten(1).numpy() for w in (a, b))))
    assert similarity(modules)[0, 1] == pytest.approx(np.mean(parts), abs=1e-9)


def test_rows_are_input_features() -> None:
    assert [tuple(m.shape) for m in matrices(nn.Linear(3, 5))] == [(3, 5)]
    assert [tuple(m.shape) for m in matrices(nn.Conv2d(3, 5, 2))] == [(3, 20)]
    assert [tuple(m.shape) for m in matrices(nn.ConvTranspose2d(3, 5, 2))] == [(3, 20)]
    assert [tuple(m.shape) for m in matrices(nn.LSTM(3, 5))] == [(3, 20), (5, 20)]
    assert [tuple(m.shape) for m in matrices(nn.Sequential(nn.Linear(1, 5), nn.Linear(5, 2)))] == [(5, 2)]
    assert [tuple(m.shape) for m in matrices(nn.Linear(1, 5))] == [(1, 5)]


def test_alike_heads_stay_together_and_unlike_ones_part(branching: SimpleNamespace) -> None:
    trainer = branching.trainer(arch_args={**NEVER, "threshold": 0.9}, tasks=(*branching.tasks[:2], lf.Binary("e")))
    with torch.no_grad():
        trainer.model.decoders["e"].weight.copy_(-3 * trainer.model.decoders["a"].weight)
    event = trainer.model.branch()
    assert event.groups == (("a", "e"), ("b",))
    assert event.similarity[0][2] == pytest.approx(1)


def test_heads_may_be_deep_and_of_different_output_width(branching: SimpleNamespace) -> None:
    heads = {
        t.name: nn.Sequential(
            nn.Linear(8, 6 + i), nn.ReLU(), nn.Linear(6 + i, 4), nn.ReLU(), nn.Linear(4, t.out_features)
        )
        for i, t in enumerate(branching.tasks)
    }
    trainer = branching.trainer(decoders=heads)
    trainer.train(branching.loader(), epochs=3)
    assert len(trainer.model.events) == 2


# -- when -----------------------------------------------------------------------------------------------------------


def test_events_come_when_they_are_due(branching: SimpleNamespace) -> None:
    def epochs_of(**args: Any) -> list[int | None]:
        trainer = branching.trainer(arch_args={"threshold": 1.0, **args})
        trainer.train(branching.loader(), epochs=6)
        return [event.epoch for event in trainer.model.events]

    assert epochs_of() == [0, 1]
    assert epochs_of(branch_every=2) == [1, 3]
    assert epochs_of(branch_every=2, keep_first=False) == [1, 3, 5]
    assert epochs_of(branch_every=2, max_events=1) == [1]
    assert epochs_of(max_events=0) == []


def test_events_by_steps(branching: SimpleNamespace) -> None:
    trainer = branching.trainer("FBGrad", arch_args={"threshold": 1.0, "branch_every": 2, "unit": "steps"})
    trainer.train(branching.loader(), epochs=2)
    assert [event.step for event in trainer.model.events] == [2, 4]
    assert len(trainer.history) == 6


def test_a_single_group_ends_it(branching: SimpleNamespace) -> None:
    trainer = branching.trainer(arch_args={"threshold": 1e-9, "branch_every": 1}, tasks=branching.tasks[:2])
    trainer.train(branching.loader(), epochs=3)
    assert [event.groups for event in trainer.model.events] == [(("a", "b"),)]
    assert trainer.model.tree.n_branches == 0
    assert not trainer.model.can_branch


# -- checkpoints ----------------------------------------------------------------------------------------------------


def test_the_best_epoch_may_lie_before_an_event_and_training_goes_on_after_it(
    branching: SimpleNamespace, tmp_path: Path
) -> None:
    scores = iter([0.0, 5.0, 1.0, 2.0, 9.0])
    settings = {
        "select": "best", "select_by": lambda _: next(scores), "run_dir": tmp_path, "arch_args": {"threshold": 1.0, "branch_every": 2},
        "scheduler_param": {"scheduler": "step", "step_size": 1, "gamma": 0.9},
    }  # fmt: skip
    trainer = branching.trainer(**settings)
    trainer.train(branching.loader(), val_dataloaders=branching.loader(), epochs=4)
    assert trainer.best["epoch"] == 1
    assert trainer.model.tree.n_branches == 0
    best = outputs(trainer, torch.ones(3, branching.features))
    loaded = branching.trainer(arch_args=settings["arch_args"], load_path=tmp_path)
    assert all(torch.equal(best[t], v) for t, v in outputs(loaded, torch.ones(3, branching.features)).items())
    trainer.train(branching.loader(), val_dataloaders=branching.loader(), epochs=5)
    assert trainer.scheduler.last_epoch == 5
    assert [event.epoch for event in trainer.model.events] == [1, 3]


def test_a_checkpoint_of_other_tasks_is_told(branching: SimpleNamespace) -> None:
    one = branching.trainer(arch_args=NEVER)
    other = branching.trainer(tasks=branching.tasks[:3], arch_args=NEVER)
    with pytest.raises(HostError, match="does not fit an encoder of 3 blocks and tasks a, b, c"):
        other.model.restore_structure(one.model.structure())


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"threshold": 0}, r"threshold must be a number in \(0, 1\], found 0"),
        ({"threshold": 1.01}, r"threshold must be a number in \(0, 1\], found 1.01"),
        ({"threshold": float("nan")}, "threshold must be a number"),
        ({"threshold": "high"}, "threshold must be a number"),
        ({"branch_every": 0}, "branch_every must be a whole number of at least 1"),
        ({"branch_every": 1.5}, "branch_every must be a whole number"),
        ({"unit": "epoch"}, "unknown unit 'epoch'; did you mean 'epochs'"),
        ({"keep_first": 1}, "keep_first must be true or false"),
        ({"max_events": -1}, "max_events must be a whole number of at least 0, or null"),
        ({"treshold": 0.5}, "unknown setting 'treshold'; did you mean 'threshold'"),
    ],
)
def test_settings_out_of_range(branching: SimpleNamespace, args: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        branching.trainer(arch_args=args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_class": lambda: nn.Linear(6, 8)}, "needs an encoder made of ordered blocks"),
        ({"encoder_class": lambda: MLP(6, (8,))}, "the encoder has one block, which keep_first=True never branches"),
        (
            {"decoders": {t: nn.Linear(8 + (t == "b"), 1) for t in "abcd"}},
            r"need one input width; found \{'a': 8, 'b': 9, 'c': 8, 'd': 8\}",
        ),
        (
            {"decoders": {t: nn.Sigmoid() for t in "abcd"}},
            r"head of task 'a' \(Sigmoid\) has none: give it an nn.Linear",
        ),
    ],
)
def test_models_that_cannot_branch(branching: SimpleNamespace, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HostError, match=message):
        branching.trainer(**changes)


def test_a_task_alone(branching: SimpleNamespace) -> None:
    with pytest.raises(HostError, match=r"needs at least two tasks to tell apart, found 1: \['a'\]"):
        branching.trainer(tasks=branching.tasks[:1])


def test_one_block_may_branch_without_keep_first(branching: SimpleNamespace) -> None:
    trainer = branching.trainer(
        encoder_class=lambda: MLP(branching.features, (8,)), arch_args={"threshold": 1.0, "keep_first": False}
    )
    trainer.train(branching.loader(), epochs=2)
    assert trainer.model.tree.n_branches == 3


def test_registered_with_options() -> None:
    from LibMTL.config import LibMTL_args, prepare_args

    params = LibMTL_args.parse_args(["--fairbranch_threshold", "0.3", "--fairbranch_branch_every", "4"])
    params.weighting, params.arch = "EW", "FairBranch"
    kwargs, _, _ = prepare_args(params)
    assert FairBranchSettings.from_args("FairBranch", kwargs["arch_args"]) == FairBranchSettings(0.3, 4)


@pytest.mark.parametrize(
    ("groups", "inplace"), [([(0,), (1,), (2,)], False), ([(0, 1), (2,)], False), ([(0,), (1,), (2,)], True)]
)
def test_heads_of_all_leaves_at_once_equal_heads_one_by_one(
    branching: SimpleNamespace, groups: list[tuple[int, ...]], inplace: bool
) -> None:
    tasks = tuple(lf.Binary(name) for name in "abc")
    heads: Any = {
        t.name: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 1)) if inplace else nn.Linear(8, 1) for t in tasks
    }
    encoder = lambda: nn.Sequential(nn.Linear(branching.features, 10), nn.ReLU(), nn.Linear(10, 8))  # noqa: E731
    model = branching.trainer(tasks=tasks, decoders=heads, encoder_class=encoder, arch_args=NEVER).model
    model.encoder.grow(model.tree.branch(groups))
    x = torch.randn(9, branching.features)
    found, expected = model.train()(x), model.eval()(x)
    assert list(found) == ["a", "b", "c"]
    for task in found:
        torch.testing.assert_close(found[task], expected[task])
    sum(z.sum() for z in found.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


# -- opposed tasks, and events soon after each other ---------------------------------------------------------------------


def test_opposed_heads_are_alike_to_cka_and_apart_when_signed() -> None:
    one, other, unrelated = (nn.Linear(6, 1) for _ in range(3))
    with torch.no_grad():
        other.weight.copy_(-one.weight)
    plain, signed = similarity([one, other, unrelated]), similarity([one, other, unrelated], signed=True)
    assert plain[0, 1] == pytest.approx(1.0)
    assert signed[0, 1] == pytest.approx(-1.0)
    assert torch.equal(signed.abs(), plain)
    centred = [w.weight.detach().double()[0] - w.weight.detach().double().mean() for w in (one, unrelated)]
    correlation = float(torch.nn.functional.cosine_similarity(*centred, dim=0))
    assert signed[0, 2] == pytest.approx(np.sign(correlation) * correlation**2)


def test_an_event_waits_for_its_steps_after_the_last(branching: SimpleNamespace) -> None:
    trainer = branching.trainer(arch_args={"threshold": 0.01, "branch_every": 1, "unit": "steps", "min_steps": 3})
    trainer.train(branching.loader(), epochs=6)
    steps = [event.step for event in trainer.model.events]
    assert len(steps) == 2
    assert steps[1] - steps[0] == 3
