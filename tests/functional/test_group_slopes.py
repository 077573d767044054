"""Disparities with their derivatives written out equal those of autograd and finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.functional import groups as formulas

OF = {"glf": F.glf, "gld": F.gld, "bgl": F.bounded_group_loss, "spread": F.spread}
FORMULAS = {
    "glf": formulas._glf,
    "gld": formulas._gld,
    "bgl": formulas._worst,
    "spread": formulas._spread,
}
losses = st.floats(0, 10, allow_nan=False).map(lambda v: round(v, 3))


@pytest.mark.parametrize("kind", FORMULAS)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda g: st.lists(
            st.tuples(st.lists(losses, min_size=g, max_size=g), st.lists(st.booleans(), min_size=g, max_size=g)),
            min_size=1,
            max_size=3,
        )
    )
)
def test_the_slope_is_that_of_autograd(kind: str, rows: list[tuple[list[float], list[bool]]]) -> None:
    means = torch.tensor([m for m, _ in rows], dtype=torch.float64, requires_grad=True)
    present = torch.tensor([p for _, p in rows])
    value, slope = formulas._of_two(FORMULAS[kind], means, present)
    (gradient,) = torch.autograd.grad(value.sum(), means)
    torch.testing.assert_close(slope, gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", OF)
@pytest.mark.parametrize("columns", [1, 3])
def test_finite_differences_through_the_cells(kind: str, columns: int) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.rand(2, 20, columns, generator=g, dtype=torch.float64, requires_grad=True)
    condition = (torch.rand(2, 20, 3, generator=g) > 0.3).double()
    member = F.group_indicator(torch.randint(-1, 3, (2, 20), generator=g), 3, torch.float64)

    def value(v: Tensor) -> Tensor:
        mean, count = F.cell_means(v, condition, member)
        return OF[kind](mean, count > 0)

    assert torch.autograd.gradcheck(value, (values,))


@pytest.mark.parametrize("kind", OF)
def test_inside_transforms_it_is_the_same(kind: str) -> None:
    means, present = torch.rand(5, 4, dtype=torch.float64, requires_grad=True), torch.rand(5, 4) < 0.7
    (expected,) = torch.autograd.grad(OF[kind](means, present).sum(), means)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(OF[kind]))(means.detach(), present), expected)


@pytest.mark.parametrize("kind", OF)
def test_losses_that_are_not_finite_stay_visible(kind: str) -> None:
    assert OF[kind](torch.tensor([float("nan"), 1.0, 2.0]), torch.ones(3, dtype=torch.bool)).isnan()


@pytest.mark.parametrize("kind", OF)
def test_no_value_is_read_back_and_a_second_derivative_is_refused(kind: str) -> None:
    assert OF[kind](torch.rand(2, 3, device="meta"), torch.ones(2, 3, device="meta").bool()).shape == (2,)
    means = torch.tensor([0.1, 0.5, 0.2], requires_grad=True)
    (slope,) = torch.autograd.grad(OF[kind](means, torch.ones(3).bool()).square(), means, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()
