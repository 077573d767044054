"""Columns of one matrix are found again, and nothing else is taken for one."""

from __future__ import annotations

import torch

import libmtl_fair as lf
from libmtl_fair.host.columns import joint_columns
from libmtl_fair.host.objectives import LossBank


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
