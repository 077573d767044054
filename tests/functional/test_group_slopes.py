"""Disparities with their derivatives written out equal those of autograd and finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libmtl_fair import functional as F
from libmtl_fair.functional._group_slopes import can_write_out, cell_disparity, slopes

OF = {"glf": F.glf, "gld": F.gld, "bgl": F.bounded_group_loss, "spread": F.spread}
losses = st.floats(0, 10, allow_nan=False).map(lambda v: round(v, 3))


@pytest.mark.parametrize("kind", OF)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda g: st.lists(
            st.tuples(st.lists(losses, min_size=g, max_size=g), st.lists(st.integers(0, 2), min_size=g, max_size=g)),
            min_size=1,
            max_size=3,
        )
    )
)
def test_agrees_with_autograd(kind: str, rows: list[tuple[list[float], list[int]]]) -> None:
    means = torch.tensor([m for m, _ in rows], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([c for _, c in rows])
    expected = OF[kind](means, counts > 0)
    (gradient,) = torch.autograd.grad(expected.sum(), means)
    value, slope = slopes(means.tolist(), counts.tolist(), kind)
    torch.testing.assert_close(torch.tensor(value, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.tensor(slope, dtype=torch.float64), gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", OF)
@pytest.mark.parametrize("columns", [1, 3])
def test_finite_differences(kind: str, columns: int) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.rand(20, columns, generator=g, dtype=torch.float64, requires_grad=True)
    condition = (torch.rand(20, 3, generator=g) > 0.3).double()
    member = F.group_indicator(torch.randint(-1, 3, (20,), generator=g), 3, torch.float64)
    count = condition.T @ member

    def value(v: torch.Tensor) -> torch.Tensor:
        return cell_disparity(v, condition, member, count, kind)

    assert torch.autograd.gradcheck(value, (values,))


@pytest.mark.parametrize("kind", OF)
def test_losses_that_are_not_finite_stay_visible(kind: str) -> None:
    value, _ = slopes([[float("nan"), 1.0, 2.0]], [[1, 1, 1]], kind)
    assert value[0] != value[0] or kind in ("bgl", "spread")


def test_is_left_out_inside_transforms_and_for_very_many_groups() -> None:
    seen: list[bool] = []

    def look(v: torch.Tensor) -> torch.Tensor:
        seen.append(can_write_out(v, torch.ones(2, 2)))
        return v

    torch.func.vmap(look)(torch.ones(3, 4))
    assert seen == [False]
    assert not can_write_out(torch.ones(3), torch.ones(40, 40))
