"""LambdaMix and GroupRegulariser: the gradient that they leave is the one of their objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.libmtl import weighting_names
from libmtl_fair.libmtl.parts import linearised
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS
from libmtl_fair.libmtl.step import fair_batch, losses_of
from libmtl_fair.models import MLP, linear_heads
from tests.harness.trainers import settings

FEATURES, N = 6, 64
TASKS = (lf.Binary("a"), lf.Binary("b"), lf.Regression("c"))
BASES = [w for w in weighting_names() if w not in OUR_WEIGHTINGS and w != "GradDrop"]
SEVERAL = {"MoDo", "SDMGrad"}
"""Weightings of git main whose step takes several batches."""


def make_loader(**options: Any) -> lf.ResidentLoader:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, FEATURES, generator=g)
    labels = {"a": (x[:, 0] > 0).float(), "b": (x[:, 1] + x[:, 3] > 0).float(), "c": x[:, 2] + x[:, 3]}
    groups = {"sex": (x[:, 3] > 0).long(), "race": torch.randint(-1, 3, (N,), generator=g)}
    return lf.ResidentLoader(
        x, labels, groups, **{"batch_size": 32, "shuffle": True, "seed": 1, "device": "cpu", **options}
    )


def make_trainer(weighting: str, heads: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(5)
    entries, decoders = lf.task_dict(TASKS), linear_heads(TASKS, 8)
    if heads is not None:
        entries, decoders = lf.add_fairness_heads(entries, decoders, **{"sensitive": ("sex",), **heads})
    given = {**settings(8, TASKS, 0.05, "sgd"), "encoder_class": lambda: MLP(FEATURES, (12, 8)), **options}
    return lf.FairTrainer(entries, weighting, **{**given, "decoders": decoders})


def one_step(trainer: Any, loader: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Return the losses, the gradients that the weighting left, and its weights."""
    trainer.prepare_groups(loader)
    trainer.model.train_loss_buffer = np.zeros((trainer.task_num, 1))
    trainer.model.epoch = 0
    trainer.model.train()
    made = losses_of(trainer, next(iter(loader)))
    trainer.optimizer.zero_grad()
    if trainer.representation is not None:
        trainer.model.fair_batch = fair_batch(trainer, made, 0)
    weights = trainer.model.backward(made[0], **trainer.weight_args)
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return made[0].detach(), grads, weights


def expected_gradient(trainer: Any, loader: Any, objective: Any) -> dict[str, Tensor]:
    made = losses_of(trainer, next(iter(loader)))
    named = dict(trainer.model.named_parameters())
    grads = torch.autograd.grad(objective(made[0]), list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, grads) if g is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in found.keys() | expected.keys():
        zero = torch.zeros(())
        torch.testing.assert_close(
            found.get(name, zero).expand_as(expected.get(name, found.get(name, zero))),
            expected.get(name, zero).expand_as(found.get(name, expected.get(name, zero))),
            rtol=1e-4, atol=1e-6,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "lam"),
    [("glf", 0.98), ("gld", 0.9), ("gap", 0.99), ("lift", 0.99), (["glf", "gap"], 0.99), ("adversarial", 0.98)],
)
def test_the_share_goes_by_the_heads_loss_unless_it_is_given(loss: Any, lam: float) -> None:
    heads = {"loss": loss, "sensitive": {"sex": 2}, "tasks": ["a", "b"]}
    for given in ({}, {"lam": None}):
        model = make_trainer("LambdaMix", heads, weight_args=given).model
        assert model.lam == lam and model.scale[0].item() == pytest.approx(lam)
    assert make_trainer("LambdaMix", heads, weight_args={"lam": 0.7}).model.lam == 0.7
    step = lf.FairStep("LambdaMix", *_entries(heads))
    assert step.model.lam == lam


def _entries(heads: dict[str, Any]) -> tuple[Any, ...]:
    entries, decoders = lf.add_fairness_heads(lf.task_dict(TASKS), linear_heads(TASKS, 8), **heads)
    return entries, decoders


@pytest.mark.parametrize("loss", ["glf", "gld"])
def test_the_published_form_in_double_precision(loss: str, double: None) -> None:
    """Heads of their own, groups compared as a whole, lambda .5: losses and gradient by loops over people, to 1e-9."""
    loader = make_loader(shuffle=False)
    heads = {"loss": loss, "target": "label", "conditional": False}
    trainer = make_trainer("LambdaMix", heads, weight_args={"lam": 0.5})
    trainer.double()
    batch = next(iter(loader))
    losses, grads, _ = one_step(trainer, loader)
    h = trainer.model.encoder(batch[0])
    named = dict(trainer.model.named_parameters())
    total, found = h.new_zeros(()), []
    for name in trainer.task_name:
        main = name.removeprefix("fair:").split("/")[0]
        task, output, label = trainer.tasks[main], trainer.model.decoders[name](h), batch[1][main]
        people = [i for i in range(len(h)) if bool(task.observed(label)[i])]
        each = {i: one_loss(task.kind, output[i].reshape(-1), label[i]) for i in people}
        if name == main:
            found.append(torch.stack(list(each.values())).mean())
        else:
            groups = batch[1]["sensitive"][name.split("/")[1]]
            rows = [[i for i in people if int(groups[i]) == g] for g in range(int(groups.max()) + 1)]
            means = torch.stack([torch.stack([each[i] for i in row]).mean() for row in rows if row])
            found.append(disparity(loss, means))
        total = total + 0.5 * found[-1]
    torch.testing.assert_close(losses, torch.stack(found).detach(), rtol=1e-9, atol=1e-11)
    for name, wanted in zip(named, torch.autograd.grad(total, list(named.values()), allow_unused=True)):
        if wanted is not None:
            torch.testing.assert_close(grads[name], wanted, rtol=1e-8, atol=1e-11, msg=name)


def one_loss(kind: str, output: Tensor, label: Tensor) -> Tensor:
    """The loss of one person."""
    if kind == "binary":
        p = 1 / (1 + (-output[0]).exp())
        return -p.log() if float(label) == 1 else -(1 - p).log()
    if kind == "multiclass":
        return output.exp().sum().log() - output[int(label)]
    return (output[0] - label) ** 2


def disparity(loss: str, means: Tensor) -> Tensor:
    """GLF of two groups, 1 - Jain's index of more; GLD: exp(KL(softmax(-L), uniform)) - 1."""
    if loss == "glf":
        jain = means.sum() ** 2 / (len(means) * (means**2).sum())
        return (means[0] - means[1]).abs() if len(means) == 2 else 1 - jain
    p = (-means).exp() / (-means).exp().sum()
    return (p * (p * len(means)).log()).sum().exp() - 1


@pytest.mark.parametrize("lam", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("target", ["main", "label"])
def test_the_gradient_is_that_of_the_mix(lam: float, target: str) -> None:
    loader = make_loader(shuffle=False)
    trainer = make_trainer("LambdaMix", {"target": target}, weight_args={"lam": lam})
    losses, grads, weights = one_step(trainer, loader)
    assert_close(
        grads, expected_gradient(trainer, loader, lambda found: lam * found[:3].sum() + (1 - lam) * found[3:].sum())
    )
    torch.testing.assert_close(weights, torch.tensor([lam] * 3 + [1 - lam] * 3, dtype=torch.float32))
    torch.testing.assert_close(trainer.model.trace["main"], losses[:3].sum())
    torch.testing.assert_close(trainer.model.trace["fair"], losses[3:].sum())


@pytest.mark.parametrize("base", BASES)
def test_a_base_weighting_sees_each_side_alone(base: str) -> None:
    """The main tasks' gradient is lambda times what the base leaves without fairness heads."""
    if base in SEVERAL:
        pytest.skip("takes several batches a step")
    loader = make_loader(shuffle=False)
    plain = make_trainer(base)
    mixed = make_trainer("LambdaMix", {}, weight_args={"lam": 0.25, "base": base})
    mixed.model.load_state_dict(plain.model.state_dict(), strict=False)
    torch.manual_seed(0)
    _, alone, _ = one_step(plain, loader)
    _, grads, _ = one_step(mixed, loader)
    heads = {name: 0.25 * grad for name, grad in alone.items() if name.startswith("decoders")}
    if base != "RLW":  # draws its weights
        assert_close({name: grads[name] for name in heads}, heads)  # fairness never reaches a main head
    trainer = make_trainer("LambdaMix", {"sensitive": ("sex", "race")}, weight_args={"lam": 0.25, "base": base})
    trainer.train(make_loader(), None, 3)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_mixed_uncertainty_weights_are_their_own_on_each_side() -> None:
    loader = make_loader(shuffle=False)
    trainer = make_trainer("LambdaMix", {}, weight_args={"lam": 0.7, "base": "UW"})
    sides = trainer.model.sides
    assert [tuple(side.loss_scale.shape) for side in sides] == [(3,), (3,)]
    _, grads, weights = one_step(trainer, loader)

    def objective(found: Tensor) -> Tensor:
        parts = [found[:3], found[3:]]
        sums = [(0.5 * part * (-side.loss_scale).exp() + side.loss_scale / 2).sum() for part, side in zip(parts, sides)]
        return 0.7 * sums[0] + 0.3 * sums[1]

    assert_close(grads, expected_gradient(trainer, loader, objective))
    scale = sides[0].loss_scale.detach()
    torch.testing.assert_close(weights[:3], 0.7 * 0.5 * torch.exp(-scale))
    before = scale.clone()
    trainer.train(make_loader(), None, 1)
    assert not torch.equal(sides[0].loss_scale, before)  # the optimiser moves it


def test_one_fairness_task_is_itself_under_any_base() -> None:
    loader = make_loader(shuffle=False)
    trainer = make_trainer("LambdaMix", {"tasks": ("a",)}, weight_args={"lam": 0.5, "base": "CAGrad"})
    one_step(trainer, loader)
    assert [type(side).__name__ for side in trainer.model.sides] == ["CAGrad", "EW"]


def test_linearised_losses_keep_values_and_gradients_and_the_graph() -> None:
    w = torch.randn(3, 2, requires_grad=True)
    b = torch.randn(2, requires_grad=True)
    losses = torch.stack([(w.sum(0) * b).square().sum(), w.exp().sum()])
    copied = linearised(losses, [w, b])
    torch.testing.assert_close(copied, losses)
    for i in range(2):
        for found, expected in zip(
            torch.autograd.grad(copied[i], [w, b], retain_graph=True),
            torch.autograd.grad(losses[i], [w, b], retain_graph=True, allow_unused=True),
        ):
            torch.testing.assert_close(found, torch.zeros_like(found) if expected is None else expected)
    copied.sum().backward()
    losses.sum().backward()  # the graph they came from is still there


@pytest.mark.parametrize("lam", [-0.1, 1.5, "half", True, float("nan")])
def test_lambda_outside_its_range(lam: object) -> None:
    with pytest.raises(RecipeError, match=r"lam must be lambda, a number in \[0, 1\], found"):
        make_trainer("LambdaMix", {}, weight_args={"lam": lam})


def test_bad_input() -> None:
    with pytest.raises(RecipeError, match=r"there is none: add them with lf.add_fairness_heads"):
        make_trainer("LambdaMix")
    with pytest.raises(RecipeError, match="'lambda' and 'lam' are the same setting"):
        make_trainer("LambdaMix", {}, weight_args={"lam": 0.5, "lambda": 0.5})
    with pytest.raises(HostError, match="use rep_grad=False"):
        make_trainer("LambdaMix", {}, weight_args={"base": "UW"}, rep_grad=True)
    with pytest.raises(RecipeError, match="unknown setting 'lamda'; did you mean 'lam'"):
        make_trainer("LambdaMix", {}, weight_args={"lamda": 0.5})


def test_lambda_by_its_name_and_with_representation_gradients() -> None:
    a = make_trainer("LambdaMix", {}, weight_args={"lambda": 0.8})
    b = make_trainer("LambdaMix", {}, weight_args={"lam": 0.8}, rep_grad=True)
    for trainer in (a, b):
        trainer.train(make_loader(), None, 2)
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        torch.testing.assert_close(p, q)


# -- regularisers -----------------------------------------------------------------------------------------------------


def gaps(found: Any, loss: str) -> Tensor:
    """The regulariser of task a between the two sexes, from its definition."""
    _, preds, labels, groups = found[:4]
    z, y, g = preds["a"].squeeze(1), labels["a"], groups["sex"]
    values = {
        "bgl": torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none"),
        "dpl": torch.sigmoid(z), "tprl": torch.sigmoid(z), "fprl": torch.sigmoid(z), "norm": torch.sigmoid(z),
    }[loss]  # fmt: skip
    if loss == "norm":
        parts = [
            (values[(y == c) & (g == k)].mean(), values[(y == c) & (g >= 0)].mean()) for c in (0, 1) for k in (0, 1)
        ]
        return torch.stack([(rate / overall - 1).abs() for rate, overall in parts]).sum()
    keep = {"bgl": y >= 0, "dpl": y >= 0, "tprl": y == 1, "fprl": y == 0}[loss]
    means = torch.stack([values[keep & (g == k)].mean() for k in (0, 1)])
    return means.max() if loss == "bgl" else means.max() - means.min()


@pytest.mark.parametrize("loss", ["bgl", "dpl", "tprl", "fprl", "norm"])
@pytest.mark.parametrize("base", ["EW", "UW", "PCGrad"])
def test_the_regulariser_moves_encoder_and_main_head(loss: str, base: str) -> None:
    loader = make_loader(shuffle=False)
    args = {"loss": loss, "lam": 0.6, "sensitive": ("sex",), "tasks": ("a",)}
    trainer = make_trainer("GroupRegulariser", weight_args={**args, "base": base})
    plain = make_trainer(base)
    _, grads, _ = one_step(trainer, loader)
    _, alone, _ = one_step(plain, loader)
    found = losses_of(trainer, next(iter(loader)))
    named = dict(trainer.model.named_parameters())
    extra = torch.autograd.grad(0.4 * gaps(found, loss), list(named.values()), allow_unused=True)
    expected = {n: 0.6 * alone.get(n, torch.zeros_like(p)) for n, p in named.items()}
    for name, grad in zip(named, extra):
        if grad is not None:
            expected[name] = expected[name] + grad
    assert grads["decoders.a.weight"].any()
    assert_close(grads, expected)


def test_regularisers_take_all_tasks_and_attributes_unless_told() -> None:
    trainer = make_trainer("GroupRegulariser", weight_args={"loss": "glf", "intersectional": True})
    trainer.train(make_loader(), None, 1)
    assert trainer.history["regulariser"].gt(0).all()
    both = make_trainer("GroupRegulariser", weight_args={"loss": "gld"})
    both.train(make_loader(), None, 1)
    assert both.history["regulariser"].gt(0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lam": 0}, RecipeError, r"lam must be lambda, a number in \(0, 1\]"),
        ({"loss": "bgk"}, RecipeError, "unknown fairness loss 'bgk'; did you mean 'bgl'"),
        ({"loss": "tprl"}, RecipeError, "'tprl' needs classes, and task 'c' is a regression"),
        ({"loss": "norm"}, RecipeError, "'norm' needs classes, and task 'c' is a regression"),
        ({"loss": "norm", "conditional": False}, RecipeError, "'norm' has conditional=True by definition"),
        ({"tasks": ("z",)}, RecipeError, "unknown task 'z'"),
        ({"tasks": "a"}, RecipeError, "tasks must be a list of names"),
        ({"sensitive": ("sxe",)}, DataError, "did you mean 'sex'"),
        ({"lam": 0.5, "lambda": 0.5}, RecipeError, "the same setting"),
    ],
)
def test_bad_regularisers(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_trainer("GroupRegulariser", weight_args=arguments).train(make_loader(), None, 1)


def test_a_loader_without_groups() -> None:
    bare = [(x, {k: v for k, v in labels.items() if k != "sensitive"}) for x, labels in make_loader()]
    with pytest.raises(HostError, match="GroupRegulariser needs sensitive groups"):
        make_trainer("GroupRegulariser").train(bare, None, 1)
