"""FairMT's constraint by numpy beside the CPU is the constraint by tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import libmtl_fair as lf
from libmtl_fair import functional as F
from libmtl_fair.methods.fairmt import host
from libmtl_fair.methods.fairmt.rates import Layout, Lift, disparity


def layout_of(tasks: int, groups: int, lift: Lift) -> Layout:
    named = [lf.Binary(f"t{i}") for i in range(tasks)]
    return Layout(named, [1] * tasks, [groups], [list(range(tasks))], lift, torch.device("cpu"))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_numbers_are_those_of_the_tensor_path(data: Any, dtype: torch.dtype) -> None:
    tasks, groups = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    lift = Lift(
        normalise=data.draw(st.booleans()),
        min_count=data.draw(st.sampled_from([0, 2, 10])),
        fpr_weight=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    mu, solver = data.draw(st.sampled_from([0.01, 0.5, 5.0])), data.draw(st.sampled_from(("exact", "frank-wolfe")))
    counts = data.draw(st.lists(st.sampled_from([0.0, 1.0, 3.0, 10.0, 400.0]), min_size=1, max_size=2 * groups * tasks))
    count = torch.tensor(counts, dtype=dtype).repeat(2 * groups * tasks)[: 2 * groups * tasks].view(groups, -1)
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    sums = torch.rand(count.shape, generator=seed, dtype=dtype) * count
    divisor = (count * torch.rand(count.shape, generator=seed, dtype=dtype)).ceil()
    layout = layout_of(tasks, groups, lift)

    assert host.fits(layout, sums)
    mine = host.constraint(layout, sums, count, divisor, mu, solver)
    found = disparity(layout, sums, count)
    phi, w = F.aggregate_disparities(found.psi, mu, found.present, solver)
    theirs = (found.psi, found.present, phi, w, found.slope(w, divisor))
    for name, a, b in zip(mine._fields, mine, theirs):
        torch.testing.assert_close(
            a, b.to(a.dtype), rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert mine.phi.dtype == mine.slope.dtype == dtype


@pytest.mark.parametrize("changes", [{"reference": "lcb"}, {"symmetric": True}])
def test_other_definitions_are_left_to_the_tensor_path(changes: dict[str, Any]) -> None:
    assert not host.fits(layout_of(2, 2, Lift(**changes)), torch.zeros(2, 4))


def test_several_attributes_or_kinds_are_left_to_the_tensor_path() -> None:
    device = torch.device("cpu")
    two = Layout([lf.Binary("a")], [1], [2, 3], [[0]], Lift(), device)
    mixed = Layout([lf.Binary("a"), lf.Regression("b")], [1, 0], [2], [[0, 1]], Lift(), device)
    assert not host.fits(two, torch.zeros(6, 2))
    assert not host.fits(mixed, torch.zeros(2, 3))


def test_rates_that_are_no_numbers_stay_so() -> None:
    sums, counts = torch.full((2, 4), torch.nan), torch.full((2, 4), 20.0)
    found = host.constraint(layout_of(2, 2, Lift()), sums, counts, counts, 0.5, "exact")
    assert found.phi.isnan()
    assert found.psi.isnan().all()
