"""Heads that are trained as one: the same numbers as heads trained by themselves, and nothing left of it afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import libmtl_fair as lf
from libmtl_fair.libmtl import trainer as trainer_module
from libmtl_fair.libmtl.loading import AbsWeighting
from libmtl_fair.models import MLP, linear_heads

BINARY = tuple(lf.Binary(name) for name in "ab")
OPTIMIZERS = {
    "adam": {"optim": "adam", "lr": 1e-2, "weight_decay": 1e-2},
    "amsgrad": {"optim": "adam", "lr": 1e-2, "amsgrad": True},
    "adamw": {"optim": "adamw", "lr": 1e-2},
    "sgd": {"optim": "sgd", "lr": 1e-2},
    "momentum": {"optim": "sgd", "lr": 1e-2, "momentum": 0.9, "nesterov": True},
    "adagrad": {"optim": "adagrad", "lr": 1e-2},
    "rmsprop": {"optim": "rmsprop", "lr": 1e-2, "centered": True},
}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Make a context within which heads are trained by themselves."""

    @contextlib.contextmanager
    def separate() -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setattr(trainer_module, "joined_heads", lambda *_: contextlib.nullcontext())
            yield

    return separate


def loader(kit: SimpleNamespace) -> Any:
    x, labels, groups = kit.data()
    labels["b"][::7] = torch.nan
    return lf.ResidentLoader(
        x.double(),
        {k: v.double() for k, v in labels.items()},
        groups,
        batch_size=32,
        shuffle=True,
        seed=1,
        device="cpu",
        reference=x.double(),
    )


def spy(trainer: Any) -> list[Any]:
    """Note, at each step of the optimiser, the joint heads and the gradient that each named parameter shows."""
    seen: list[Any] = []

    def look(*_: Any) -> None:
        joint = getattr(trainer.model, "fair_joint", None)
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in trainer.model.named_parameters()}
        seen.append((joint, grads))

    trainer.optimizer.register_step_pre_hook(look)
    return seen


def train(kit: SimpleNamespace, weighting: Any = "EW", epochs: int = 3, **changes: Any) -> Any:
    trainer = kit.trainer(weighting, **changes)
    trainer.seen = spy(trainer)
    trainer.train(loader(kit), epochs=epochs)
    return trainer


def assert_equal_training(one: Any, other: Any) -> None:
    """Equal steps, gradients as seen from outside, weights, and state of the optimiser, up to rounding."""
    close = {"rtol": 1e-9, "atol": 1e-11}
    assert len(one.seen) == len(other.seen) > 0
    for (_, mine), (_, theirs) in zip(one.seen, other.seen):
        assert mine.keys() == theirs.keys()
        for name, grad in mine.items():
            expected = theirs[name]
            if grad is None:
                assert expected is None, name
            else:
                torch.testing.assert_close(grad, torch.zeros_like(grad) if expected is None else expected, **close)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(value, other.model.state_dict()[name], **close)
    a, b = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert state.keys() == b["state"][index].keys()
        for name, value in state.items():
            torch.testing.assert_close(value, b["state"][index][name], **close)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_joint_heads_as_it_moves_each(kit: SimpleNamespace, apart: Any, name: str) -> None:
    joined = train(kit, optim_param=OPTIMIZERS[name])
    assert all(joint is not None for joint, _ in joined.seen)
    with apart():
        alone = train(kit, optim_param=OPTIMIZERS[name])
    assert all(joint is None for joint, _ in alone.seen)
    assert_equal_training(joined, alone)


@pytest.mark.parametrize(
    ("weighting", "args"),
    [
        *(
            (name, {})
            for name in ("EW", "UW", "DWA", "GLS", "RLW", "GradNorm", "MGDA", "PCGrad", "CAGrad", "GradVac", "IMTL")
        ),
        ("ReLiF", {"pairs": "near"}),
        ("ReLiF", {"pairs": "near", "base": "PCGrad"}),
        ("ReLiF", {"pairs": "random"}),
        ("ReLiF", {"pairs": "random", "base": "PCGrad"}),
        ("FairMT", {"eta_0": 2.0, "min_count": 2}),
        ("FairMT", {"eta_0": 2.0, "min_count": 2, "proxy": "full"}),
        ("FairMT", {"eta_0": 2.0, "min_count": 2, "alpha": "base", "base": "MGDA"}),
        ("GroupRegulariser", {"tasks": ("a", "b")}),
        ("GroupRegulariser", {"tasks": ("a", "b"), "base": "MGDA"}),
    ],
)
def test_every_weighting_trains_joint_heads_as_it_trains_each(
    kit: SimpleNamespace, apart: Any, weighting: str, args: dict[str, Any]
) -> None:
    joined = train(kit, weighting, weight_args=args)
    assert all(joint is not None for joint, _ in joined.seen)
    with apart():
        alone = train(kit, weighting, weight_args=args)
    assert_equal_training(joined, alone)


@pytest.mark.parametrize("base", ["EW", "PCGrad"])
@pytest.mark.parametrize("target", ["main", "label+accuracy"])
def test_auxiliary_heads_that_repeat_or_join_the_main_ones(
    kit: SimpleNamespace, apart: Any, base: str, target: str
) -> None:
    def made() -> Any:
        torch.manual_seed(5)
        entries, heads = lf.add_fairness_heads(
            lf.task_dict(BINARY), linear_heads(BINARY, 8), sensitive=("sex",), target=target
        )
        trainer = lf.FairTrainer(
            entries, "LambdaMix", "HPS", lambda: MLP(kit.features, (16, 8)), heads, False, False,
            OPTIMIZERS["adam"], None, device="cpu", seed=0, progress=False, select="last",
            weight_args={"lam": 0.6, "base": base},
        )  # fmt: skip
        trainer.seen = spy(trainer)
        trainer.train(loader(kit), epochs=2)
        return trainer

    joined = made()
    assert all(joint is not None for joint, _ in joined.seen)
    with apart():
        alone = made()
    assert_equal_training(joined, alone)


def test_a_head_that_is_run_by_itself_gets_that_gradient_too(kit: SimpleNamespace, apart: Any) -> None:
    class Twice(lf.FairTrainer):
        def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
            h = torch.ones(len(preds["a"]), 8)
            return {**preds, "a": preds["a"] + 0.5 * self.model.decoders["a"](h)}

    joined = train(kit, cls=Twice)
    with apart():
        alone = train(kit, cls=Twice)
    assert joined.seen[0][0] is not None
    assert_equal_training(joined, alone)


def test_outside_of_an_epoch_nothing_of_it_is_left(kit: SimpleNamespace) -> None:
    trainer = kit.trainer()
    head = trainer.model.decoders["a"]
    names, places = [n for n, _ in trainer.model.named_parameters()], head.weight.data_ptr()
    live, group = trainer.model.state_dict(), trainer.optimizer.param_groups[0]["params"]
    before = live["decoders.a.weight"].clone()
    trainer.train(loader(kit), epochs=2)
    assert trainer.model.fair_joint is None
    assert "fair_joint" not in vars(trainer.model)
    assert [n for n, _ in trainer.model.named_parameters()] == names
    assert list(trainer.model.parameters()) == [p for _, p in trainer.model.named_parameters()]
    assert trainer.optimizer.param_groups[0]["params"] is group
    assert group == list(trainer.model.parameters())
    assert set(trainer.optimizer.state) == set(group)
    assert head.weight.data_ptr() == places
    assert torch.equal(live["decoders.a.weight"], head.weight)  # what LibMTL's own training would show
    assert not torch.equal(before, head.weight)


def test_a_callback_of_steps_sees_each_head(kit: SimpleNamespace) -> None:
    """A running mean of the weights, as one keeps it by torch's AveragedModel."""

    class Mean:
        def start(self, trainer: Any) -> None:
            self.model = AveragedModel(trainer.model)
            self.seen: list[Tensor] = []

        def step(self, trainer: Any, number: int, losses: Tensor) -> None:
            self.model.update_parameters(trainer.model)
            self.seen.append(trainer.model.decoders["b"].weight.detach().clone())
            assert trainer.model.decoders["b"].weight.grad.abs().max() > 0

    mean = Mean()
    trainer = kit.trainer(callbacks=[mean])
    trainer.train(kit.loader(), epochs=2)
    torch.testing.assert_close(mean.model.module.decoders["b"].weight, torch.stack(mean.seen).mean(0))


def test_training_that_stops_in_an_epoch_can_go_on(kit: SimpleNamespace, apart: Any) -> None:
    class Stops(lf.FairTrainer):
        left = 4

        def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return preds

    def interrupted() -> Any:
        trainer = kit.trainer(cls=Stops)
        trainer.seen = spy(trainer)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(loader(kit), epochs=2)
        trainer.train(loader(kit), epochs=2)
        return trainer

    joined = interrupted()
    assert joined.model.fair_joint is None
    with apart():
        alone = interrupted()
    assert_equal_training(joined, alone)


class Own(AbsWeighting):  # type: ignore[misc]
    """A user's weighting, which may look at what it likes."""

    def backward(self, losses: Tensor, **_: Any) -> None:
        losses.sum().backward()
        assert all(p.grad is not None for p in self.decoders.parameters())


def _frozen(trainer: Any) -> None:
    trainer.model.decoders["a"].weight.requires_grad_(False)


def _hooked(trainer: Any) -> None:
    trainer.model.decoders["a"].register_forward_hook(lambda *_: None)
    trainer.model.decoders["b"].register_forward_hook(lambda *_: None)


def _listened_to(trainer: Any) -> None:
    trainer.model.decoders["a"].bias.register_hook(lambda grad: grad * 2)


def _tied(trainer: Any) -> None:
    trainer.model.decoders["b"].weight = trainer.model.decoders["a"].weight


def _own_rates(trainer: Any) -> None:
    slow = list(trainer.model.decoders["a"].parameters())
    rest = [p for p in trainer.model.parameters() if all(p is not q for q in slow)]
    groups = [{"params": rest}, {"params": slow, "lr": 0.1}]
    trainer.optimizer = torch.optim.Adam(groups, lr=1e-2)


def _other_steps(trainer: Any) -> None:
    p = trainer.model.decoders["a"].bias
    p.grad = torch.ones_like(p)
    trainer.optimizer.step()


def _replaced(trainer: Any) -> None:
    trainer.model.decoders["a"] = nn.Linear(8, 1)


@pytest.mark.parametrize("change", [_frozen, _hooked, _listened_to, _tied, _own_rates, _other_steps, _replaced])
def test_heads_that_somebody_treats_apart_stay_apart(kit: SimpleNamespace, apart: Any, change: Any) -> None:
    def made() -> Any:
        trainer = kit.trainer()
        torch.manual_seed(8)
        change(trainer)
        trainer.seen = spy(trainer)
        trainer.train(loader(kit), epochs=2)
        return trainer

    one = made()
    assert one.seen
    assert all(joint is None for joint, _ in one.seen)
    with apart():
        assert_equal_training(one, made())


def test_a_users_own_weighting_sees_single_heads(kit: SimpleNamespace) -> None:
    assert all(joint is None for joint, _ in train(kit, Own).seen)


def test_one_head_or_heads_of_other_kinds_are_not_joined(kit: SimpleNamespace) -> None:
    def deep(task: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, task.out_features))

    assert all(j is None for j, _ in train(kit, decoders={t.name: deep(t) for t in kit.tasks}).seen)
    mixed = train(kit, decoders={t.name: deep(t) if t.name == "b" else nn.Linear(8, 1) for t in kit.tasks})
    assert all(joint.tasks == ("a", "c") for joint, _ in mixed.seen)
