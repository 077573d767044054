"""Columns of one matrix are found again, and nothing else is taken for one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import libmtl_fair as lf
from libmtl_fair.libmtl import losses as objectives
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl.columns import joint_columns
from libmtl_fair.libmtl.losses import LossBank


def test_splits_and_unbound_columns_are_found() -> None:
    matrix = torch.arange(12.0).view(3, 4).clone()
    assert joint_columns(matrix.unbind(1)) is matrix
    assert joint_columns(torch.split(matrix, [1, 3], 1)) is matrix
    assert joint_columns([matrix[:, 0], matrix[:, 1:3], matrix[:, 3]]) is matrix


def test_anything_else_is_not() -> None:
    matrix = torch.arange(12.0).view(3, 4).clone()
    a, b, c, d = matrix.unbind(1)
    for parts in (
        [a, b, c],
        [a, c, b, d],
        [a, b, c, d.clone()],
        [a, b, c, d, d],
        [matrix.view(-1)[:3], b, c, d],
        [a[:2], b[:2], c[:2], d[:2]],
        [matrix],
        [torch.zeros(3)],
        list(matrix.T.contiguous().T.unbind(1)),
        list(torch.zeros(2, 3, 4).unbind(2)),
    ):
        assert joint_columns(parts) is None


@pytest.mark.parametrize("joint", ["outputs", "labels"])
def test_one_matrix_is_used_where_the_other_has_to_be_made(joint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = LossBank(lf.task_dict([lf.Binary(name) for name in "abc"]))
    z, y = torch.randn(8, 3), (torch.rand(8, 3) > 0.5).float()
    apart = [column.clone() for column in (z.split(1, 1) if joint == "labels" else y.unbind(1))]
    outputs, labels = (apart, y.unbind(1)) if joint == "labels" else (z.split(1, 1), apart)
    seen: list[Any] = []
    made = objectives._binary_losses
    monkeypatch.setattr(objectives, "_binary_losses", lambda *given: seen.append(given) or made(*given))
    losses = bank(dict(zip("abc", outputs)), dict(zip("abc", labels)))
    torch.testing.assert_close(
        losses, torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none").mean(0)
    )
    assert seen[0][0 if joint == "outputs" else 1] is (z if joint == "outputs" else y)
    assert bank.matrices is None


def test_a_matrix_of_width_one() -> None:
    matrix = torch.zeros(3, 1)
    assert joint_columns([matrix[:, 0]]) is matrix


def test_losses_and_gradients_are_those_of_separate_tensors() -> None:
    tasks = [lf.Binary(name) for name in "abc"]
    bank = LossBank(lf.task_dict(tasks))
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(8, 3, generator=g), (torch.rand(8, 3, generator=g) > 0.5).float()
    y[2, 1] = torch.nan
    joint = z.clone().requires_grad_()
    apart = [column.clone().requires_grad_() for column in z.split(1, 1)]
    views = joint * 1
    found = bank(dict(zip("abc", views.split(1, 1))), dict(zip("abc", y.unbind(1))))
    expected = bank(dict(zip("abc", apart)), {name: y[:, i].clone() for i, name in enumerate("abc")})
    torch.testing.assert_close(found, expected)
    weights = torch.tensor([1.0, 2.0, 3.0])
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(joint.grad, torch.cat([p.grad for p in apart], 1))


def test_a_bank_says_which_matrices_it_used() -> None:
    tasks = [lf.Binary(name) for name in "abc"]
    bank = LossBank(lf.task_dict(tasks))
    z, y = torch.randn(8, 3), (torch.rand(8, 3) > 0.5).float()
    y[2, 1] = torch.nan
    bank(dict(zip("abc", z.split(1, 1))), dict(zip("abc", y.unbind(1))))
    assert bank.matrices is not None
    assert bank.matrices.logits is z
    assert bank.matrices.labels is y
    assert bank.matrices.labelled.tolist() == [8, 7, 8]
    bank(dict(zip("abc", z.split(1, 1))), {name: y[:, i].clone() for i, name in enumerate("abc")})
    assert bank.matrices is None
    with_other = LossBank(lf.task_dict([*tasks, lf.Regression("d")]))
    rest = {"d": torch.zeros(8, 1)}
    with_other({**dict(zip("abc", z.split(1, 1))), **rest}, {**dict(zip("abc", y.unbind(1))), "d": torch.zeros(8)})
    assert with_other.matrices is None


@pytest.mark.parametrize("change", ["nothing", "order", "a value", "all values", "loss"])
def test_a_fairness_method_never_gets_matrices_of_other_outputs(kit: SimpleNamespace, change: str) -> None:
    class Changes(lf.FairTrainer):
        def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
            if change == "a value":
                return {**preds, "b": 2 * preds["b"]}
            if change == "all values":
                return {name: 2 * z for name, z in preds.items()}
            return dict(reversed(preds.items())) if change == "order" else preds

    class Weighs(Changes):
        def _compute_loss(self, preds: Any, gts: Any, task_name: str | None = None) -> Any:
            flipped = 1 - torch.stack(list(gts.values()), 1)
            return super()._compute_loss(preds, dict(zip(gts, flipped.unbind(1))), task_name)

    tasks = (lf.Binary("a"), lf.Binary("b"))
    trainer = kit.trainer("FairMT", tasks, Weighs if change == "loss" else Changes)
    x, labels, groups = kit.data()
    both = {name: labels[name] for name in "ab"}
    loader = lf.ResidentLoader(x, both, groups, batch_size=32, shuffle=True, seed=1, device="cpu")
    made = stepping.losses_of(trainer, next(iter(loader)))
    matrices = stepping.fair_batch(trainer, made, 0).matrices
    assert (matrices is not None) == (change in ("nothing", "order"))
    if matrices is not None:
        for i, name in enumerate(trainer.task_name):
            assert torch.equal(matrices.logits[:, i : i + 1], made[1][name])
            assert torch.equal(matrices.labels[:, i], made[2][name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_loss_has_the_type_of_its_logits_or_better(dtype: torch.dtype) -> None:
    bank = LossBank(lf.task_dict([lf.Binary("a"), lf.Binary("b")]))
    z = torch.zeros(3000, 2)
    y = torch.ones(3000, 2, dtype=dtype)
    y[0, 1] = torch.nan
    y[1, 1] = torch.inf
    losses = bank({"a": z[:, :1], "b": z[:, 1:]}, {"a": y[:, 0], "b": y[:, 1]})
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.full((2,), 2.0).log())
    assert bank.matrices is not None
    assert bank.matrices.labelled.tolist() == [3000, 2998]
