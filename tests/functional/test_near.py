"""Gaps of near examples: by the O(B^2) definition, its gradient by autograd, and what the term cannot be fooled by."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError


def gini(f: Tensor) -> Tensor:
    total = f.new_zeros(())
    for i in range(len(f)):
        for j in range(len(f)):
            if i != j:
                total = total + (f[i] - f[j]).abs()
    return total / (len(f) * (len(f) - 1))


def by_loops(values: Tensor, nearest: Tensor, logits: bool) -> Tensor:
    f = values / gini(values) / 2 + torch.sigmoid(values) / gini(torch.sigmoid(values)) / 2 if logits else values
    gaps = [(f[i] - f[int(nearest[i])]).abs() for i in range(len(f))]
    return torch.stack(gaps).mean() / gini(f)


def draw(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=g, dtype=torch.float64) * 3
    return values, F.nearest_others(torch.randn(*shape[:-2], shape[-1], 3, generator=g))


@pytest.mark.parametrize("logits", [False, True])
def test_value_and_slope_are_those_of_the_definition(logits: bool) -> None:
    values, nearest = draw(3, 2, 11)
    found = F.near_gaps(values, nearest.unsqueeze(-2), logits=logits)
    for m in range(3):
        for t in range(2):
            own = values[m, t].clone().requires_grad_()
            expected = by_loops(own, nearest[m], logits)
            (slope,) = torch.autograd.grad(expected, own)
            torch.testing.assert_close(found.value[m, t], expected.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.slope[m, t], slope, rtol=1e-12, atol=1e-12)
    single = F.near_gaps(values.float(), nearest.unsqueeze(-2), logits=logits)
    assert single.value.dtype == torch.float32
    torch.testing.assert_close(single.slope.double(), found.slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("logits", [False, True])
def test_gradcheck(logits: bool) -> None:
    values, nearest = draw(2, 7)
    values.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: F.near_gaps(v.detach(), nearest, logits=logits).attached(v), values, eps=1e-7
    )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 40), scale=st.floats(0.01, 100), shift=st.floats(-50, 50))
def test_shrinking_gains_nothing(seed: int, size: int, scale: float, shift: float) -> None:
    """Scaling about any centre leaves the term of plain values as it is, and to first order gains nothing."""
    values, nearest = draw(1, size, seed=seed)
    found = F.near_gaps(values[0], nearest)
    moved = F.near_gaps(shift + scale * values[0], nearest)
    torch.testing.assert_close(moved.value, found.value, rtol=1e-7, atol=1e-9)
    assert abs(float(found.slope @ (values[0] - shift))) <= 1e-9 * (1 + abs(shift))


def test_logits_are_scaled_without_gain_to_first_order() -> None:
    """Half of the term, the logits', gains nothing by scaling; the probabilities' half can gain only what their shape does."""
    values, nearest = draw(1, 200, seed=3)
    z, p = values[0], torch.sigmoid(values[0])
    for f in (z, p):
        found = F.near_gaps(f, nearest)
        for centre in (f.mean(), f.min(), torch.tensor(0.0)):
            assert abs(float(found.slope @ (f - centre))) < 1e-12
    both = F.near_gaps(z, nearest, logits=True)
    torch.testing.assert_close(both.value, (F.near_gaps(z, nearest).value + F.near_gaps(p, nearest).value) / 2)


def test_people_permuted_at_random_give_one() -> None:
    g = torch.Generator().manual_seed(0)
    nearest = F.nearest_others(torch.randn(4000, 3, generator=g))
    found = F.near_gaps(torch.randn(20, 4000, generator=g), nearest.expand(20, -1), logits=True)
    assert float((found.value - 1).abs().max()) < 0.05


@pytest.mark.parametrize("values", [[0.3, 0.3, 0.3], [1e4] * 5, [2.0]])
def test_without_spread_the_term_is_absent(values: list[float]) -> None:
    found = F.near_gaps(torch.tensor(values), torch.zeros(len(values), dtype=torch.int64), logits=True)
    assert not found.present
    assert float(found.value) == 0
    assert torch.equal(found.slope, torch.zeros(len(values)))


def test_nearest_others_by_loops() -> None:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 30, 4, generator=g)
    found = F.nearest_others(features)
    for m in range(2):
        for i in range(30):
            distances = [float((features[m, i] - features[m, j]).norm()) if i != j else 9e9 for j in range(30)]
            assert int(found[m, i]) == distances.index(min(distances))
        assert torch.equal(F.nearest_others(features[m]), found[m])
    assert F.nearest_others(torch.zeros(1, 3)).tolist() == [0]
    assert F.nearest_others(torch.zeros(4, 30, 2, device="meta")).shape == (4, 30)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match=r"nearest must be \[\.\.\., 3\], found shape \[2\]"):
        F.near_gaps(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("logits", [False, True])
def test_flip_gaps_are_those_of_the_definition(logits: bool) -> None:
    values, _ = draw(3, 2, 11)
    twins = values.flip(-1) * 0.5 + 0.3
    found = F.flip_gaps(values, twins, logits=logits)
    for m in range(3):
        for t in range(2):
            own, other = values[m, t].clone().requires_grad_(), twins[m, t].clone().requires_grad_()
            pairs = [(own, other), (torch.sigmoid(own), torch.sigmoid(other))][: 2 if logits else 1]
            wanted = torch.stack([(f - g).abs().mean() / gini(f) for f, g in pairs]).mean()
            torch.testing.assert_close(found.value[m, t], wanted.detach(), rtol=1e-12, atol=1e-12)
            slopes = torch.autograd.grad(wanted, (own, other))
            torch.testing.assert_close((found.slope[m, t], found.slope_twins[m, t]), slopes, rtol=1e-12, atol=1e-12)
    values.requires_grad_()
    twins.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, w: F.flip_gaps(v.detach(), w.detach(), logits=logits).attached(v, w), (values, twins), eps=1e-7
    )
    with pytest.raises(DataError, match=r"twins must be \[3, 2, 11\], found shape \[11\]"):
        F.flip_gaps(values.detach(), twins[0, 0].detach())


def test_closeness_by_loops() -> None:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(3, 20, 4, generator=g, dtype=torch.float64)
    found = F.near_others(features)
    for m, x in enumerate(features):
        squares = [[float((x[i] - x[j]).square().sum()) for j in range(20) if j != i] for i in range(20)]
        rho = (sum(min(row) for row in squares) / sum(sum(row) / 19 for row in squares)) ** 0.5
        assert float(found.closeness[m]) == pytest.approx((1 - rho) ** 2, rel=1e-9)
    pairs = torch.randn(10, 3, generator=g).repeat_interleave(2, 0)
    assert float(F.near_others(pairs).closeness) == pytest.approx(1, abs=2e-3)  # everybody has a double
    assert float(F.near_others(torch.eye(30)).closeness) == pytest.approx(0, abs=1e-6)  # no two are nearer than others
    assert (
        float(F.near_others(torch.ones(5, 2)).closeness) == 1 and float(F.near_others(torch.ones(1, 2)).closeness) == 0
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_closeness_has_no_unit(seed: int, scale: float, shift: float) -> None:
    features = torch.randn(30, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = F.near_others(shift * scale + scale * features)
    torch.testing.assert_close(moved.closeness, F.near_others(features).closeness, rtol=1e-6, atol=1e-9)
