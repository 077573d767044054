from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import RecipeError

FAST = settings(max_examples=40, deadline=None, derandomize=True)
D = torch.float64


def batch(seed: int, n: int = 80, n_groups: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, generator=generator, dtype=D)
    labels = torch.randint(0, 2, (n,), generator=generator).to(D)
    labels[torch.rand(n, generator=generator) < 0.2] = torch.nan
    groups = torch.randint(-1, n_groups, (n,), generator=generator)
    return scores, labels, groups


def loop_aeod(
    scores: Tensor, labels: Tensor, groups: Tensor, n_groups: int, symmetric: bool, normalise: bool
) -> tuple[float, bool]:
    value, present = 0.0, False
    for y, best in ((1, max), (0, min)):
        rates = [scores[(labels == y) & (groups == g)] for g in range(n_groups)]
        means = [r.mean().item() for r in rates if len(r)]
        if len(means) < 2:
            continue
        present = True
        if symmetric:
            value += max(means) - min(means)
        else:
            total = sum(abs(best(means) - m) for m in means)
            value += total / (len(means) - 1) if normalise else total
    return value, present


@FAST
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    n_groups=st.integers(1, 5),
    symmetric=st.booleans(),
    normalise=st.booleans(),
)
def test_aeod_against_a_loop(seed: int, n: int, n_groups: int, symmetric: bool, normalise: bool) -> None:
    scores, labels, groups = batch(seed, n, n_groups)
    value, present = F.aeod(scores, labels, groups, n_groups, symmetric=symmetric, normalise=normalise)
    expected = loop_aeod(scores, labels, groups, n_groups, symmetric, normalise)
    assert value.item() == pytest.approx(expected[0], abs=1e-12)
    assert present.item() == expected[1]
    if normalise:
        assert 0 <= value <= 2


def test_aeod_on_the_device_with_integer_labels(device: torch.device, dtype: torch.dtype) -> None:
    scores, labels, groups = batch(3)
    integer = labels.nan_to_num(-100).long()
    value, present = F.aeod(scores.to(device, dtype), integer.to(device), groups.to(device), 3)
    assert value.item() == pytest.approx(loop_aeod(scores, labels, groups, 3, False, False)[0], rel=1e-5)
    assert present


def test_only_the_groups_behind_are_moved() -> None:
    scores = torch.tensor([0.9, 0.4, 0.2, 0.7], requires_grad=True)
    labels, groups = torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 0, 1])
    value, _ = F.aeod(scores, labels, groups, 2)
    (grad,) = torch.autograd.grad(value, scores)
    assert value.item() == pytest.approx(1.0)
    assert grad.tolist() == [0.0, -1.0, 0.0, 1.0]  # group 1: raise its TPR, lower its FPR
    symmetric, _ = F.aeod(scores, labels, groups, 2, symmetric=True)
    assert torch.autograd.grad(symmetric, scores)[0].tolist() == [1.0, -1.0, -1.0, 1.0]


def test_equal_groups_have_no_disparity_and_no_gradient() -> None:
    scores = torch.full((4,), 0.5, requires_grad=True)
    value, present = F.aeod(scores, torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 0, 1]), 2)
    assert present
    assert value.item() == 0
    assert not torch.autograd.grad(value, scores)[0].any()


def test_parts_with_fewer_than_two_groups_drop_out() -> None:
    scores = torch.tensor([0.9, 0.4, 0.2], requires_grad=True)
    groups = torch.tensor([0, 1, 0])
    value, present = F.aeod(scores, torch.tensor([1, 1, 0]), groups, 3)
    assert (value.item(), present.item()) == (0.5, True)  # one group with negatives: no FPR part
    value, present = F.aeod(scores, torch.tensor([1, 0, 0]), groups * 0, 3)
    assert (value.item(), present.item()) == (0.0, False)
    assert not torch.autograd.grad(value, scores)[0].any()


def test_min_count_makes_small_groups_absent() -> None:
    tpr, fpr = torch.tensor([0.2, 0.5, 1.0]), torch.zeros(3)
    n_pos, n_neg = torch.tensor([50.0, 12.5, 2.0]), torch.zeros(3)
    assert F.aeod_from_rates(tpr, fpr, n_pos, n_neg)[0].item() == pytest.approx(1.3)
    value, present = F.aeod_from_rates(tpr, fpr, n_pos, n_neg, min_count=10)
    assert value.item() == pytest.approx(0.3)
    assert present


def test_a_tiny_lucky_group_does_not_set_the_bar_with_lcb() -> None:
    tpr, fpr = torch.tensor([0.6, 0.5, 1.0]), torch.tensor([0.3, 0.2, 0.0])
    count = torch.tensor([1000.0, 1000.0, 2.0])
    value, _ = F.aeod_from_rates(tpr, fpr, count, count, reference="lcb")
    assert value.item() == pytest.approx(0.1 + 0.1)
    usual, _ = F.aeod_from_rates(tpr, fpr, count, count)
    assert usual.item() == pytest.approx(0.4 + 0.5 + 0.3 + 0.2)


def test_multilabel_averages_over_the_labels_present() -> None:
    scores, groups = torch.rand(60, 3, dtype=D), torch.randint(-1, 3, (60,))
    labels = torch.randint(0, 2, (60, 3)).double()
    labels[:, 1] = torch.nan
    value, present = F.aeod(scores, labels, groups, 3)
    each = [F.aeod(scores[:, c], labels[:, c], groups, 3)[0] for c in (0, 2)]
    assert present
    assert value.item() == pytest.approx((each[0] + each[1]).item() / 2)


def test_caeod_is_the_mean_of_one_vs_rest_aeods(device: torch.device) -> None:
    n, classes = 90, 4
    probs = torch.rand(n, classes, dtype=D).softmax(1)
    labels, groups = torch.randint(0, classes, (n,)), torch.randint(-1, 3, (n,))
    labels[::6] = -100
    seen = labels >= 0
    each = [F.aeod(probs[seen, c], (labels[seen] == c).long(), groups[seen], 3, normalise=True) for c in range(classes)]
    assert all(present for _, present in each)
    value, present = F.caeod(probs.to(device), labels.to(device), groups.to(device), 3, normalise=True)
    assert present
    assert value.item() == pytest.approx(sum(v.item() for v, _ in each) / classes)


def test_aep_against_a_loop_and_its_options(device: torch.device, dtype: torch.dtype) -> None:
    errors, _, groups = batch(5)
    errors[::5] = torch.nan
    means = [errors[(groups == g) & ~errors.isnan()].mean().item() for g in range(3)]
    arguments = (errors.to(device, dtype), groups.to(device), 3)
    lift = sum(m - min(means) for m in means)
    assert F.aep(*arguments)[0].item() == pytest.approx(lift, rel=1e-4)
    assert F.aep(*arguments, normalise=True)[0].item() == pytest.approx(lift / 2, rel=1e-4)
    assert F.aep(*arguments, symmetric=True)[0].item() == pytest.approx(max(means) - min(means), rel=1e-4)
    value, present = F.aep(arguments[0], arguments[1] * 0, 3)
    assert (value.item(), present.item()) == (0.0, False)


def test_aep_with_lcb_prefers_a_group_that_is_surely_good() -> None:
    errors = torch.cat([torch.tensor([0.1, 0.3]).repeat(100), torch.tensor([0.0, 0.2]), torch.tensor([0.0])])
    groups = torch.cat([torch.zeros(200), torch.ones(2), torch.full((1,), 2.0)]).long()
    value, present = F.aep(errors, groups, 3, reference="lcb")
    assert present
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert F.aep(errors, groups, 3)[0].item() == pytest.approx(0.3, abs=1e-6)
    alone, present = F.aep(torch.tensor([0.1, 0.4]), torch.tensor([0, 1]), 2, reference="lcb")
    assert present
    assert alone.isfinite()


def ccc(p: np.ndarray, t: np.ndarray) -> float:
    return float(2 * np.cov(p, t, bias=True)[0, 1] / (p.var() + t.var() + (p.mean() - t.mean()) ** 2))


@pytest.mark.parametrize("reference", ["max", "lcb"])
def test_aep_ccc_against_numpy(reference: str) -> None:
    target = torch.randn(90, dtype=D)
    predictions = target + torch.randn(90, dtype=D) * torch.arange(90) / 60
    groups = torch.arange(90) // 30
    lack = [1 - ccc(predictions[groups == g].numpy(), target[groups == g].numpy()) for g in range(3)]
    value, present = F.aep_ccc(predictions, target, groups, 3, reference=reference)
    assert present
    assert value.item() == pytest.approx(sum(x - min(lack) for x in lack))  # equal sizes: both references agree
    predictions[0], target[40] = torch.nan, torch.nan
    assert F.aep_ccc(predictions, target, groups, 3)[0].isfinite()


def test_ccc_of_constants_and_of_single_examples() -> None:
    same = torch.full((4,), 0.3, dtype=D)
    lack, count = F.ccc_lack_from_sums(F.ccc_sums(same, same, torch.tensor([0, 0, 1, 1]), 3))
    assert lack.tolist() == pytest.approx([0.0] * 3, abs=1e-9)
    assert count.tolist() == [2.0, 2.0, 0.0]
    value, present = F.aep_ccc(torch.rand(2), torch.rand(2), torch.tensor([0, 1]), 2)
    assert (value.item(), present.item()) == (0.0, False)


@FAST
@given(count=st.integers(1, 400), share=st.floats(0, 1))
def test_wilson_interval_is_scipys(count: int, share: float) -> None:
    hits = round(share * count)
    exact = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    low, high = F.wilson_interval(torch.tensor(hits / count, dtype=D), torch.tensor(float(count), dtype=D))
    assert low.item() == pytest.approx(exact.low, abs=1e-9)
    assert high.item() == pytest.approx(exact.high, abs=1e-9)


def test_wilson_interval_of_nothing_is_everything() -> None:
    low, high = F.wilson_interval(torch.zeros(()), torch.zeros(()))
    assert (low.item(), high.item()) == (0.0, 1.0)


def aeod_of(x: Tensor, **options: Any) -> Tensor:
    return F.aeod(x, torch.tensor([1, 0, 1, 0, 1, 0, 1, 0]), torch.arange(8) // 3, 3, **options)[0]


def caeod_of(x: Tensor, **options: Any) -> Tensor:
    probs = torch.stack([x, 1 - x], 1)
    return F.caeod(probs, torch.tensor([1, 0, 1, 0, 1, 0, 1, 0]), torch.arange(8) // 3, 3, **options)[0]


def aep_of(x: Tensor, **options: Any) -> Tensor:
    return F.aep(x, torch.arange(8) // 3, 3, **options)[0]


def ccc_of(x: Tensor, **options: Any) -> Tensor:
    return F.aep_ccc(x, torch.linspace(0, 1, 8, dtype=D) ** 2, torch.arange(8) // 3, 3, **options)[0]


MEASURES = [aeod_of, caeod_of, aep_of, ccc_of]


@pytest.mark.parametrize("measure", MEASURES)
def test_symmetric_measures_pass_gradcheck(measure: Callable[..., Tensor]) -> None:
    x = torch.rand(8, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: measure(v, symmetric=True), (x,))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("options", [{}, {"normalise": True}, {"reference": "lcb"}])
def test_lifting_measures_are_finite_and_descend(measure: Callable[..., Tensor], options: dict[str, Any]) -> None:
    x = torch.rand(8, dtype=D, requires_grad=True)
    value = measure(x, **options)
    (grad,) = torch.autograd.grad(value, x)
    assert grad.isfinite().all()
    assert value >= 0
    if grad.any():
        assert measure(x.detach() - 1e-4 * grad, **options) < value


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_refuse_what_excludes_itself(measure: Callable[..., Tensor]) -> None:
    with pytest.raises(RecipeError, match="unknown reference of a disparity 'mex'; did you mean 'max'"):
        measure(torch.rand(8, dtype=D), reference="mex")
    with pytest.raises(RecipeError, match="symmetric=True has no reference group"):
        measure(torch.rand(8, dtype=D), symmetric=True, reference="lcb")
