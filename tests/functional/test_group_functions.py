from __future__ import annotations

import math
from collections.abc import Callable

import fairlearn.metrics as fm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, RecipeError

FAST = settings(max_examples=40, deadline=None, derandomize=True)
D = torch.float64
Batch = tuple[Tensor, Tensor, Tensor]


def batch(seed: int, n: int = 60, n_groups: int = 3, n_classes: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, generator=generator, dtype=D)
    labels = torch.randint(0, n_classes, (n,), generator=generator).to(D)
    labels[torch.rand(n, generator=generator) < 0.2] = torch.nan
    groups = torch.randint(-1, n_groups, (n,), generator=generator)
    return values, labels, groups


def loop_mean(values: Tensor, keep: Tensor) -> float:
    return values[keep].mean().item() if keep.any() else 0.0


@pytest.mark.parametrize("n_groups", [1, 3, 200])
def test_group_mean_against_a_loop(device: torch.device, dtype: torch.dtype, n_groups: int) -> None:
    values, _, groups = batch(0, 300, n_groups)
    values[::7] = torch.nan
    mean, count = F.group_mean(values.to(device, dtype), groups.to(device), n_groups)
    for g in range(n_groups):
        keep = (groups == g) & ~values.isnan()
        assert count[g].item() == keep.sum()
        assert mean[g].item() == pytest.approx(loop_mean(values, keep), rel=1e-5)


def test_group_mean_of_integers_and_of_nothing() -> None:
    mean, count = F.group_mean(torch.tensor([1, 2]), torch.tensor([0, 0]), 2)
    assert mean.tolist() == [1.5, 0.0]
    assert count.tolist() == [2.0, 0.0]
    assert F.group_mean(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 2)[1].tolist() == [0.0, 0.0]


def test_missing_values_have_no_gradient() -> None:
    values = torch.tensor([1.0, torch.nan, 3.0], requires_grad=True)
    mean, _ = F.group_mean(values, torch.tensor([0, 0, -1]), 2)
    mean.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("n_groups", [2, 100])
def test_group_sums_of_columns(n_groups: int) -> None:
    values = torch.rand(50, 3, dtype=D, requires_grad=True)
    groups = torch.randint(-1, n_groups, (50,))
    sums = F.group_sums(values, groups, n_groups)
    expected = torch.stack([values[groups == g].sum(0) for g in range(n_groups)])
    torch.testing.assert_close(sums, expected)
    assert torch.autograd.gradcheck(lambda v: F.group_sums(v, groups, n_groups), (values,))


def test_cross_groups_is_row_major_and_unknown_when_any_is() -> None:
    a, b = torch.tensor([0, 0, 1, 1, -1, 0]), torch.tensor([0, 2, 0, 2, 1, -1])
    crossed, n = F.cross_groups([a, b], [2, 3])
    assert n == 6
    assert crossed.tolist() == [0, 2, 3, 5, -1, -1]
    assert torch.equal(F.cross_groups([a], [2])[0], a)
    with pytest.raises(DataError, match="one number of groups per attribute, found 2 and 1"):
        F.cross_groups([a, b], [2])
    with pytest.raises(DataError, match="found 0 and 0"):
        F.cross_groups([], [])


losses_and_present = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0, 5), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n)
    )
)


@FAST
@given(losses_and_present)
def test_glf_gld_and_bgl_against_their_definitions(case: tuple[list[float], list[bool]]) -> None:
    losses, present = torch.tensor(case[0], dtype=D), torch.tensor(case[1])
    seen = losses[present].tolist()
    n, largest = len(seen), max(seen, default=0.0)
    unit = (
        [v / largest for v in seen] if largest else [1.0] * n
    )  # the index is free of scale; squares of 1e-162 underflow
    jain = sum(unit) ** 2 / (n * sum(v * v for v in unit)) if n else 1.0
    p = torch.softmax(-losses[present], 0)
    kl = (p * (p * n).log()).sum().item() if n else 0.0
    unequal = abs(seen[0] - seen[1]) if n == 2 == len(losses) else 1 - jain  # the attribute's groups decide
    assert F.glf(losses, present).item() == pytest.approx(unequal if n >= 2 else 0.0, abs=1e-9)
    assert F.gld(losses, present).item() == pytest.approx(math.expm1(kl) if n >= 2 else 0.0, abs=1e-9)
    assert F.bounded_group_loss(losses, present).item() == (max(seen) if n >= 2 else 0.0)
    assert 0 <= F.gld(losses, present).item() <= max(n - 1, 0) + 1e-9
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(n))
    for function in (F.glf, F.gld):
        torch.testing.assert_close(function(losses[order], present[order]), function(losses, present))


@pytest.mark.parametrize("function", [F.glf, F.gld, F.bounded_group_loss])
@pytest.mark.parametrize("n_present", [0, 1])
def test_fewer_than_two_groups_have_no_disparity_and_no_gradient(
    function: Callable[[Tensor, Tensor], Tensor], n_present: int, device: torch.device
) -> None:
    losses = torch.tensor([0.7, 0.0, 0.0], device=device, requires_grad=True)
    value = function(losses, torch.tensor([n_present == 1, False, False], device=device))
    value.backward()
    assert value.item() == 0.0
    assert losses.grad is not None
    assert losses.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("function", [F.glf, F.gld])
@pytest.mark.parametrize("present", [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
def test_group_loss_disparities_are_differentiable(
    function: Callable[[Tensor, Tensor], Tensor], present: list[int]
) -> None:
    losses = torch.tensor([0.3, 0.9, 0.1, 0.5], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, torch.tensor(present).bool()), (losses,))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_glf_of_many_groups_has_no_scale(scale: float) -> None:
    losses = torch.tensor([1.0, 2.0, 3.0]) * scale
    losses.requires_grad_()
    value = F.glf(losses, torch.ones(3, dtype=torch.bool))
    value.backward()
    assert value.item() == pytest.approx(1 - 36 / 42, rel=1e-5)
    assert losses.grad is not None
    assert losses.grad.isfinite().all()


def test_equal_and_zero_losses_are_fair_with_a_finite_gradient() -> None:
    for losses in (torch.zeros(3), torch.full((3,), 0.4), torch.full((2,), 0.4)):
        losses.requires_grad_()
        present = torch.ones(len(losses), dtype=torch.bool)
        for function in (F.glf, F.gld):
            value = function(losses, present)
            (grad,) = torch.autograd.grad(value, losses)
            assert value.item() == pytest.approx(0.0, abs=1e-6)
            assert (grad.abs() < 1e-6).all()


def test_absent_groups_may_hold_anything() -> None:
    losses = torch.tensor([0.2, torch.nan, 0.7, torch.inf], requires_grad=True)
    present = torch.tensor([True, False, True, False])
    for function in (F.glf, F.gld, F.bounded_group_loss):
        (grad,) = torch.autograd.grad(function(losses, present), losses)
        assert grad.isfinite().all()
        assert grad[1] == grad[3] == 0


def test_disparities_work_on_rows() -> None:
    losses, present = torch.rand(5, 4), torch.rand(5, 4) < 0.7
    for function in (F.glf, F.gld, F.bounded_group_loss, F.spread):
        rows = torch.stack([function(a, b) for a, b in zip(losses, present, strict=True)])
        torch.testing.assert_close(function(losses, present), rows)


@pytest.mark.parametrize("n_groups", [3, 100])
def test_every_function_takes_leading_dimensions(n_groups: int) -> None:
    trials = [batch(seed, 70, n_groups) for seed in range(4)]
    values, labels, groups = (torch.stack(parts).unflatten(0, (2, 2)) for parts in zip(*trials, strict=True))
    logits, truth = values.unsqueeze(-1).expand(2, 2, 70, 3), labels.unsqueeze(-1).expand(2, 2, 70, 3)
    functions: list[Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]]] = [
        lambda v, y, g: F.group_sums(v[..., 0], g, n_groups),
        lambda v, y, g: F.group_mean(v, g, n_groups),
        lambda v, y, g: F.cross_groups([g, g % 2], [n_groups, 2])[0],
        lambda v, y, g: F.robust_log_loss(v[..., 0], y[..., 0], g, n_groups),
        lambda v, y, g: F.quantile_bins(v[..., 0], 3),
        lambda v, y, g: F.base_rate_threshold(v, y),
        lambda v, y, g: F.soft_rates(v, y, g, n_groups),
        lambda v, y, g: F.cell_means(v, (y == 1).to(D), F.group_indicator(g, n_groups, D)),
    ]
    for function in functions:
        together = function(logits, truth, groups)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            alone = function(logits[i, j], truth[i, j], groups[i, j])
            pairs = [(together, alone)] if isinstance(alone, Tensor) else zip(together, alone, strict=True)
            for whole, one in pairs:
                torch.testing.assert_close(whole[i, j], one)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_robust_log_loss_against_a_loop(n_classes: int, device: torch.device) -> None:
    losses, labels, groups = batch(2, 80, 3, n_classes)
    expected = 0.0
    for y in range(n_classes):
        cells = [losses[(labels == y) & (groups == g)] for g in range(3)]
        expected += max((cell.mean().item() for cell in cells if len(cell)), default=0.0)
    arguments = (groups.to(device), 3, n_classes)
    found = F.robust_log_loss(losses.to(device), labels.to(device), *arguments)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    integer = labels.nan_to_num(-100).long().to(device)
    assert F.robust_log_loss(losses.to(device), integer, *arguments).item() == pytest.approx(expected, rel=1e-12)


def test_robust_log_loss_without_cells_is_zero_and_it_is_differentiable() -> None:
    losses = torch.rand(6, dtype=D, requires_grad=True)
    labels, groups = torch.tensor([0.0, 1, 0, 1, 0, 1]), torch.tensor([0, 0, 1, 1, -1, 1])
    assert F.robust_log_loss(losses, labels * torch.nan, groups, 2).item() == 0.0
    assert torch.autograd.gradcheck(lambda x: F.robust_log_loss(x, labels, groups, 2), (losses,))
    nothing = F.robust_log_loss(losses, labels, groups.fill_(-1), 2)
    (grad,) = torch.autograd.grad(nothing, losses)
    assert not grad.any()


def test_cell_means_against_a_loop() -> None:
    losses, labels, groups = batch(5, 40, 3, 3)
    mean, count = F.cell_means(losses[:, None], F.group_indicator(labels, 3, D), F.group_indicator(groups, 3, D))
    for y in range(3):
        for g in range(3):
            keep = (labels == y) & (groups == g)
            assert mean[y, g].item() == pytest.approx(loop_mean(losses, keep))
            assert count[y, g].item() == keep.sum()


def test_quantile_bins_are_even_and_missing_targets_are_missing() -> None:
    target = torch.randn(101, dtype=D)
    target[100] = torch.nan
    bins = F.quantile_bins(target, 4)
    assert bins[100] == -1
    assert torch.bincount(bins[:100]).tolist() == [25, 25, 25, 25]
    assert (target[:100][bins[:100] == 0].max() < target[:100][bins[:100] == 1].min()).item()
    assert F.quantile_bins(torch.full((5,), torch.nan)).tolist() == [-1] * 5
    assert F.quantile_bins(torch.rand(5), 1).tolist() == [0] * 5
    assert len(F.quantile_bins(torch.ones(5), 4).unique()) == 1
    with pytest.raises(RecipeError, match="n_bins must be at least 1"):
        F.quantile_bins(target, 0)


def test_soft_rates_against_a_loop(device: torch.device, dtype: torch.dtype) -> None:
    scores, labels, groups = batch(7)
    found = F.soft_rates(scores.to(device, dtype), labels.to(device), groups.to(device), 3)
    for g in range(3):
        positive, negative = (labels == 1) & (groups == g), (labels == 0) & (groups == g)
        expected = [loop_mean(scores, positive), loop_mean(scores, negative), positive.sum(), negative.sum()]
        assert [x[g].item() for x in found] == pytest.approx([float(x) for x in expected], rel=1e-5)


def test_hard_rates_are_fairlearns() -> None:
    scores, labels, groups = batch(8, 200)
    keep = ~labels.isnan() & (groups >= 0)
    hard, y, g = (scores > 0.5)[keep].double(), labels[keep], groups[keep]
    tpr, fpr, n_pos, n_neg = F.soft_rates(hard, y, g, 3)
    frame = fm.MetricFrame(
        metrics={"tpr": fm.true_positive_rate, "fpr": fm.false_positive_rate},
        y_true=y.int().numpy(),
        y_pred=hard.int().numpy(),
        sensitive_features=g.numpy(),
    )
    assert tpr.tolist() == pytest.approx(frame.by_group["tpr"].tolist(), abs=1e-12)
    assert fpr.tolist() == pytest.approx(frame.by_group["fpr"].tolist(), abs=1e-12)
    assert F.spread(tpr, n_pos > 0).item() == pytest.approx(frame.difference()["tpr"], abs=1e-12)
    assert F.spread(fpr, n_neg > 0).item() == pytest.approx(frame.difference()["fpr"], abs=1e-12)
    parity = fm.demographic_parity_difference(y.int().numpy(), hard.int().numpy(), sensitive_features=g.numpy())
    selected, count = F.group_mean(hard, g, 3)
    assert F.spread(selected, count > 0).item() == pytest.approx(parity, abs=1e-12)


def test_columns_are_independent() -> None:
    scores, groups = torch.rand(50, 3, dtype=D), torch.randint(-1, 4, (50,))
    labels = torch.randint(0, 2, (50, 3)).double()
    labels[torch.rand(50, 3) < 0.3] = torch.nan
    together = F.soft_rates(scores, labels, groups, 4)
    for c in range(3):
        for all_columns, one in zip(together, F.soft_rates(scores[:, c], labels[:, c], groups, 4), strict=True):
            torch.testing.assert_close(all_columns[:, c], one)


def test_rates_of_missing_cells_are_zero_without_gradient_and_sums_add_up() -> None:
    scores = torch.tensor([0.2, torch.nan, 0.4], requires_grad=True)
    tpr, fpr, n_pos, n_neg = F.soft_rates(scores, torch.tensor([1, 1, -100]), torch.tensor([0, 0, 1]), 2)
    assert torch.equal(tpr, torch.tensor([0.2, 0.0]))
    assert fpr.tolist() == [0.0, 0.0]
    assert n_pos.tolist() == [1.0, 0.0]
    assert n_neg.tolist() == [0.0, 0.0]
    (grad,) = torch.autograd.grad((tpr + fpr).sum(), scores)
    assert grad.tolist() == [1.0, 0.0, 0.0]
    scores, labels, groups = batch(9)
    halves = [F.soft_rates(scores[i::2], labels[i::2], groups[i::2], 3) for i in (0, 1)]
    whole = F.soft_rates(scores, labels, groups, 3)
    for rate, count in ((0, 2), (1, 3)):
        torch.testing.assert_close(whole[count], sum(half[count] for half in halves))
        torch.testing.assert_close(whole[rate] * whole[count], sum(half[rate] * half[count] for half in halves))


def gap(scores: Tensor, labels: Tensor, groups: Tensor, which: int) -> Tensor:
    rates = F.soft_rates(scores, labels, groups, 3)
    return F.spread(rates[which], rates[which + 2] > 0)


def test_gaps_are_differentiable_and_zero_for_one_group() -> None:
    scores = torch.rand(12, dtype=D, requires_grad=True)
    labels, groups = torch.tensor([0.0, 1] * 6), torch.arange(12) % 3
    for which in (0, 1):
        assert torch.autograd.gradcheck(lambda s, which=which: gap(s, labels, groups, which), (scores,))
    alone = gap(scores, labels, groups * 0, 0)
    assert alone.item() == 0.0
    assert not torch.autograd.grad(alone, scores)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_base_rate_threshold_selects_as_many_as_are_positive(device: torch.device, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(400, 3, generator=g, dtype=dtype).to(device).requires_grad_()
    labels = (torch.rand(400, 3, generator=g) < torch.tensor([0.1, 0.5, 0.9])).to(dtype).to(device)
    labels[::7] = torch.nan
    found = F.base_rate_threshold(logits, labels)
    assert not found.requires_grad
    seen = ~labels.isnan()
    chosen = ((logits > found) & seen).sum(0)
    assert ((chosen - (labels == 1).sum(0)).abs() <= 1).all()
    labels[:, 1] = torch.nan
    assert F.base_rate_threshold(logits, labels)[1] == 0
    one = F.base_rate_threshold(logits[:, :1], labels[:, 0])
    torch.testing.assert_close(one, found[:1])


# -- disparities in a step --------------------------------------------------------------------------------------------

OF = {"glf": F.glf, "gld": F.gld, "bgl": F.bounded_group_loss, "spread": F.spread}


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
def test_no_value_is_read_back(kind: str) -> None:
    assert OF[kind](torch.rand(2, 3, device="meta"), torch.ones(2, 3, device="meta").bool()).shape == (2,)


@pytest.mark.parametrize("kind", OF)
@pytest.mark.parametrize("n_groups", [2, 3])
def test_absent_groups_are_as_if_they_were_not_there(kind: str, n_groups: int) -> None:
    losses = torch.tensor([[0.2, 0.7, 0.4], [0.2, torch.nan, 0.4], [torch.inf, torch.nan, 0.4]], dtype=D)[:, :n_groups]
    losses.requires_grad_()
    present = losses.isfinite()
    values = OF[kind](losses, present)
    (grad,) = torch.autograd.grad(values.sum(), losses)
    assert grad.isfinite().all()
    assert not grad[~present].any()
    for row, value, here in zip(losses.detach(), values, present, strict=True):
        kept = slice(None) if kind == "glf" and n_groups > 2 else here  # glf goes by the attribute's number of groups
        filled = torch.where(here, row, 9.0)
        alone = OF[kind](filled[kept], here[kept]) if here.sum() > 1 else torch.zeros((), dtype=D)
        torch.testing.assert_close(value, alone)


def test_the_norm_violation_is_that_of_a_linear_fractional_statistic() -> None:
    """Against the published form: num(s) = sum p y s, denom(s) = sum y s, violation |stat / overall - 1|, p = 1 norm."""
    g = torch.Generator().manual_seed(0)
    p = torch.rand(200, 1, generator=g, dtype=torch.float64, requires_grad=True)
    y, ids = torch.randint(0, 2, (200, 1), generator=g).double(), torch.randint(0, 3, (200,), generator=g)
    sens = torch.nn.functional.one_hot(ids, 3).double()
    theirs = []
    for slope in (1 - y, y):
        stats = torch.einsum("ny,ns->ns", slope * p, sens).sum(0) / torch.einsum("ny,ns->ns", slope, sens).sum(0)
        overall = (slope * p).sum() / slope.sum()
        theirs.append(torch.linalg.vector_norm((stats / overall - 1).abs(), ord=1))
    mean, count = F.cell_means(torch.cat([p, p], 1), torch.cat([1 - y, y], 1), F.group_indicator(ids, 3, p.dtype))
    ours = F.norm_violation(mean, count)
    assert ours.tolist() == pytest.approx([v.item() for v in theirs], abs=1e-10)
    (wanted,), (found,) = (torch.autograd.grad(v, p, retain_graph=True) for v in (sum(theirs), ours.sum()))
    assert torch.allclose(wanted, found, atol=1e-12)


def test_the_norm_violation_is_differentiable_and_zero_where_undefined() -> None:
    rates = torch.tensor([[0.2, 0.5, 0.9], [0.4, 0.3, 0.8], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    count = torch.tensor([[3.0, 5.0, 0.0], [4.0, 0.0, 0.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    value = F.norm_violation(rates, count)
    assert value[1:].tolist() == [0.0, 0.0]
    (slope,) = torch.autograd.grad(value.sum(), rates)
    assert torch.isfinite(slope).all()
    assert not slope[1:].any()
    assert slope[0, 2] == 0
    assert torch.autograd.gradcheck(lambda r: F.norm_violation(r, count[:1]), (rates[:1].detach().requires_grad_(),))


def test_glf_goes_by_the_groups_of_the_attribute_and_not_by_those_of_a_batch() -> None:
    """Jain's form of two groups out of five is on the scale of five groups, as if the others were not there."""
    losses, present = torch.tensor([0.5, 0.2, 9.0, 9.0, 9.0], dtype=D), torch.tensor([True, True, False, False, False])
    assert F.glf(losses, present).item() == pytest.approx(1 - 0.7**2 / (2 * (0.25 + 0.04)))
    assert F.glf(losses[:2], present[:2]).item() == pytest.approx(0.3)
