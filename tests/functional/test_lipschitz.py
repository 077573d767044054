from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, RecipeError

FAST = settings(max_examples=40, deadline=None, derandomize=True)
D = torch.float64


def brute_force(scores: Tensor, embeddings: Tensor, picks: list[list[int]]) -> tuple[Tensor, Tensor]:
    gap, distance = [], []
    for i, j in itertools.combinations(range(len(scores)), 2):
        for x, y in itertools.product(picks[i], picks[j]):
            u = embeddings[x] if embeddings.dim() == 2 else embeddings[i, x]
            v = embeddings[y] if embeddings.dim() == 2 else embeddings[j, y]
            gap.append(scores[i, x] - scores[j, y])
            distance.append((1 - torch.nn.functional.cosine_similarity(u, v, dim=0)) / 2)
    return torch.stack(gap), torch.stack(distance)


@FAST
@given(u=st.floats(-1e15, 1e15), beta=st.floats(1e-3, 10))
def test_huber_is_its_definition(u: float, beta: float) -> None:
    expected = u * u / (2 * beta) if abs(u) <= beta else abs(u) - beta / 2
    assert F.huber(torch.tensor(u, dtype=D), beta).item() == pytest.approx(expected, rel=1e-12, abs=1e-300)


@FAST
@given(z=st.floats(-1e6, 1e6), mu=st.floats(1e-3, 10))
def test_huberized_hinge_is_its_definition_and_close_to_the_hinge(z: float, mu: float) -> None:
    value = F.huberized_hinge(torch.tensor(z, dtype=D), mu).item()
    expected = 0.0 if z <= 0 else z * z / (2 * mu) if z <= mu else z - mu / 2
    assert value == pytest.approx(expected, rel=1e-12, abs=1e-300)
    assert -1e-9 <= max(z, 0.0) - value <= mu / 2 + 1e-9


def test_gradients_of_the_smooth_functions() -> None:
    u = torch.tensor([-2.0, -0.05, 0.03, 0.7], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: F.huber(x, 0.1), (u,))
    assert torch.autograd.gradcheck(lambda x: F.huberized_hinge(x, 0.05), (u,))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_smoothing_must_be_positive(value: float) -> None:
    with pytest.raises(RecipeError, match="beta must be positive, found"):
        F.huber(torch.ones(1), value)
    with pytest.raises(RecipeError, match="mu must be positive, found"):
        F.huberized_hinge(torch.ones(1), value)


def test_cosine_distance_against_torch(device: torch.device, dtype: torch.dtype) -> None:
    u, v = torch.randn(7, 5, device=device, dtype=dtype), torch.randn(7, 5, device=device, dtype=dtype)
    expected = (1 - torch.nn.functional.cosine_similarity(u, v, dim=-1)) / 2
    torch.testing.assert_close(F.cosine_distance(u, v), expected)
    torch.testing.assert_close(F.cosine_distance(u * 1e12, v * 1e-12), expected)
    assert (F.cosine_distance(u, u) < 1e-6).all()
    torch.testing.assert_close(F.cosine_distance(u, -u), torch.ones(7, device=device, dtype=dtype))


def test_cosine_distance_has_a_gradient_and_zero_vectors_have_none() -> None:
    u, v = torch.randn(4, 5, dtype=D, requires_grad=True), torch.randn(4, 5, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(F.cosine_distance, (u, v))
    zero = torch.zeros(2, 5, requires_grad=True)
    other = torch.randn(2, 5, requires_grad=True)
    distance = F.cosine_distance(zero, other)
    distance.sum().backward()
    assert distance.tolist() == [0.5, 0.5]
    assert zero.grad is not None
    assert other.grad is not None
    assert not zero.grad.any()
    assert not other.grad.any()


@pytest.mark.parametrize("shared", [True, False])
def test_confident_pairs_against_a_loop(device: torch.device, dtype: torch.dtype, shared: bool) -> None:
    scores = torch.rand(4, 11, device=device, dtype=dtype)
    embeddings = torch.randn(*([11, 6] if shared else [4, 11, 6]), device=device, dtype=dtype)
    gap, distance = F.prototype_pairs(scores, embeddings, k=3)
    picks = [scores[t].argsort(descending=True)[:3].tolist() for t in range(4)]
    expected_gap, expected_distance = brute_force(scores, embeddings, picks)
    torch.testing.assert_close(gap, expected_gap)
    torch.testing.assert_close(distance, expected_distance, rtol=1e-4, atol=1e-6)


def test_only_finite_scores_and_valid_examples_are_picked(device: torch.device) -> None:
    scores = torch.rand(3, 8, device=device)
    scores[0, :6] = torch.nan
    scores[1, 2] = torch.inf
    valid = torch.ones(3, 8, dtype=torch.bool, device=device)
    valid[2, 1:] = False
    embeddings = torch.randn(3, 8, 4, device=device)
    embeddings[0, :6] = torch.nan  # a task without this input has no embedding either
    gap, distance, mask = F.prototype_pairs(scores, embeddings, 4, valid, return_mask=True)
    assert gap.shape == distance.shape == mask.shape == (3 * 16,)
    assert gap.isfinite().all()
    assert distance.isfinite().all()
    assert mask.sum() == 2 * 4 + 2 * 1 + 4 * 1
    best_of_1 = scores[1].nan_to_num(posinf=-1).argsort(descending=True)[:4].tolist()
    ordered_0 = (6 + scores[0, 6:].argsort(descending=True)).tolist()
    expected = brute_force(scores, embeddings, [ordered_0, best_of_1, [0]])
    for found, wanted in zip(F.prototype_pairs(scores, embeddings, 4, valid), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_no_valid_example_gives_no_pair_and_no_gradient() -> None:
    scores = torch.full((2, 5), torch.nan, requires_grad=True)
    embeddings = torch.randn(5, 3, requires_grad=True)
    gap, distance, mask = F.prototype_pairs(scores, embeddings, 2, return_mask=True)
    assert not mask.any()
    F.masked_mean(gap + distance, mask).backward()
    assert scores.grad is not None
    assert embeddings.grad is not None
    assert not scores.grad.any()
    assert not embeddings.grad.any()
    assert F.prototype_pairs(scores, embeddings, 2)[0].shape == (0,)


def test_one_task_has_no_pairs_and_a_small_batch_gives_what_it_has() -> None:
    assert F.prototype_pairs(torch.rand(1, 5), torch.randn(5, 3), 2)[0].shape == (0,)
    assert F.prototype_pairs(torch.rand(3, 2), torch.randn(2, 3), 64)[0].shape == (3 * 4,)


def test_pairs_are_differentiable() -> None:
    scores = torch.rand(3, 6, dtype=D, requires_grad=True)
    embeddings = torch.randn(6, 4, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, h: F.prototype_pairs(s, h, 2), (scores, embeddings))
    own = torch.randn(3, 6, 4, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, h: F.prototype_pairs(s, h, 2), (scores, own))


def test_random_pairs_are_drawn_uniformly_without_replacement() -> None:
    batch, k, calls = 12, 3, 600
    scores = torch.stack([torch.arange(batch) / 100, torch.zeros(batch)])
    valid = torch.ones(2, batch, dtype=torch.bool)
    valid[0, 0] = False
    generator = torch.Generator().manual_seed(3)
    counts = torch.zeros(batch)
    for _ in range(calls):
        gap, _ = F.prototype_pairs(scores, torch.ones(batch, 2), k, valid, mode="random", generator=generator)
        drawn = (gap.view(k, k)[:, 0] * 100).round().long()
        assert len(drawn.unique()) == k
        counts[drawn] += 1
    assert counts[0] == 0
    expected = calls * k / (batch - 1)
    assert (counts[1:] / expected - 1).abs().max() < 0.25


def test_random_pairs_follow_the_generator() -> None:
    scores, embeddings = torch.rand(3, 40), torch.randn(40, 5)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return F.prototype_pairs(scores, embeddings, 4, mode="random", generator=generator)[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("limit", [1, 2, 4, 99])
def test_task_pairs_can_be_sampled(limit: int) -> None:
    tasks, k = 6, 2
    scores = torch.arange(tasks, dtype=D).unsqueeze(1).expand(tasks, 9) * 10 + torch.rand(tasks, 9, dtype=D)
    gap, _, mask = F.prototype_pairs(scores, torch.randn(9, 3), k, max_task_pairs=limit, return_mask=True)
    assert len(gap) == min(limit, 15) * k * k
    assert mask.all()
    assert (gap < 0).all()  # i < j, and the scores rise with the task
    all_gaps = F.prototype_pairs(scores, torch.randn(9, 3), k)[0]
    assert torch.isin(gap, all_gaps).all()
    drawn = {tuple(F.prototype_pairs(scores, torch.randn(9, 3), k, max_task_pairs=1)[0].tolist()) for _ in range(200)}
    assert len(drawn) == 15


def test_wrong_arguments_are_refused() -> None:
    scores, embeddings = torch.rand(2, 5), torch.randn(5, 3)
    with pytest.raises(RecipeError, match="unknown prototype mode 'randm'; did you mean 'random'"):
        F.prototype_pairs(scores, embeddings, 2, mode="randm")
    with pytest.raises(RecipeError, match="k must be at least 1, found 0"):
        F.prototype_pairs(scores, embeddings, 0)
    with pytest.raises(RecipeError, match="max_task_pairs must be at least 1"):
        F.prototype_pairs(scores, embeddings, 2, max_task_pairs=0)
    with pytest.raises(DataError, match=r"scores must be \[tasks, examples\]"):
        F.prototype_pairs(scores[0], embeddings, 2)
    with pytest.raises(DataError, match="embeddings must be"):
        F.prototype_pairs(scores, embeddings[:4], 2)
    with pytest.raises(RecipeError, match=r"q must be in \[0, 1\]"):
        F.masked_quantile(torch.rand(3), 1.5)


@FAST
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    q=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_masked_quantile_is_torch_quantile_of_the_valid_entries(values: list[float], q: float, seed: int) -> None:
    x = torch.tensor(values, dtype=D)
    mask = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) < 0.7
    expected = torch.quantile(x[mask], q) if mask.any() else torch.zeros((), dtype=D)
    poisoned = x.where(mask, torch.nan)
    torch.testing.assert_close(F.masked_quantile(poisoned, q, mask), expected, rtol=1e-9, atol=1e-9)
    batched = F.masked_quantile(poisoned.expand(2, -1), q, mask.expand(2, -1))  # the device's way: sort and gather
    torch.testing.assert_close(batched, expected.expand(2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(F.masked_quantile(x, q), torch.quantile(x, q), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(F.masked_quantile(x.expand(2, -1), q)[0], torch.quantile(x, q), rtol=1e-9, atol=1e-9)


def test_masked_quantile_works_above_the_limit_of_torch_quantile_and_under_vmap() -> None:
    x = torch.rand(16_777_217 + 1000)
    assert F.masked_quantile(x, 0.95).item() == pytest.approx(0.95, abs=1e-3)
    rows = torch.rand(3, 20)
    mask = torch.rand(3, 20) < 0.5
    found = torch.func.vmap(lambda a, m: F.masked_quantile(a, 0.5, m))(rows, mask)
    torch.testing.assert_close(found, F.masked_quantile(rows, 0.5, mask))


def test_masked_mean_ignores_the_rest(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, torch.nan, 3.0, torch.inf], device=device, dtype=dtype, requires_grad=True)
    mask = torch.tensor([True, False, True, False], device=device)
    mean = F.masked_mean(x, mask)
    mean.backward()
    assert mean.item() == 2.0
    assert x.grad is not None
    assert x.grad.tolist() == [0.5, 0.0, 0.5, 0.0]
    assert F.masked_mean(x, mask & ~mask).item() == 0.0


@FAST
@given(
    size=st.integers(1, 6000),
    q=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.75, 0.95, 1.0])),
    kind=st.sampled_from(["normal", "rising", "falling", "few", "equal"]),
    seed=st.integers(0, 10**6),
)
def test_masked_quantile_of_many_values_is_that_of_numpy(size: int, q: float, kind: str, seed: int) -> None:
    drawn = np.random.default_rng(seed).standard_normal(size)
    values = {
        "normal": drawn,
        "rising": np.sort(drawn),
        "falling": -np.sort(drawn),
        "few": np.round(drawn),
        "equal": np.ones(size),
    }[kind]
    found = F.masked_quantile(torch.from_numpy(values.copy()), q).item()
    assert found == pytest.approx(np.quantile(values, q), rel=1e-9, abs=1e-12)


def reference(
    scores: Tensor, embeddings: Tensor, pairs: dict[str, Any], tau: float | Tensor, kappa: float, beta: float, mu: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and rate by composition of the definitions, and the mask."""
    gap, distance, mask = F.prototype_pairs(scores, embeddings, return_mask=True, **pairs)
    if callable(tau):
        tau = tau(gap, mask)
    z = F.huber(gap, beta) / tau - distance.clamp(min=1e-3) / kappa
    return F.masked_mean(F.huberized_hinge(z, mu), mask), F.masked_mean((z > 0).to(z.dtype), mask), mask


def test_pairs_under_vmap() -> None:
    scores, embeddings = torch.rand(3, 2, 9), torch.randn(3, 9, 4)
    mapped = torch.func.vmap(lambda s, h: F.prototype_pairs(s, h, 2, return_mask=True))(scores, embeddings)
    for row in range(3):
        single = F.prototype_pairs(scores[row], embeddings[row], 2, return_mask=True)
        for found, expected in zip(mapped, single, strict=True):
            torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("limit", [None, 2, 4])
def test_lipschitz_term_is_its_composition_with_the_same_gradients(
    device: torch.device, shared: bool, detach: bool, limit: int | None
) -> None:
    scores = torch.rand(6, 9, dtype=D, device=device)
    scores[0, :7] = torch.nan
    scores.requires_grad_()
    embeddings = torch.randn(*([9] if shared else [6, 9]), 5, dtype=D, device=device)
    embeddings[..., 3, :] = 0
    embeddings.requires_grad_()
    valid = torch.rand(6, 9, device=device) < 0.9
    seen: list[Tensor] = []

    def scales(gap: Tensor, distance: Tensor, mask: Tensor) -> tuple[Tensor, float]:
        seen.append(mask)
        assert distance.min() >= 1e-3
        return F.masked_quantile(gap, 0.5, mask), 0.7

    options: dict[str, Any] = {"k": 4, "valid": valid, "mode": "random", "max_task_pairs": limit}
    options["generator"] = torch.Generator(device).manual_seed(1)
    loss, rate, some = F.lipschitz_term(scores, embeddings, scales=scales, detach_distance=detach, **options)
    options["generator"].manual_seed(1)
    expected, expected_rate, mask = reference(
        scores,
        embeddings.detach() if detach else embeddings,
        options,
        lambda gap, mask: F.masked_quantile(gap.abs(), 0.5, mask),
        0.7,
        0.1,
        0.05,
    )
    assert torch.equal(seen[0], mask)
    assert some
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(rate, expected_rate)
    wanted = torch.autograd.grad(expected, (scores, embeddings), allow_unused=True)
    for found, gradient in zip(
        torch.autograd.grad(3 * loss, (scores, embeddings), allow_unused=True), wanted, strict=True
    ):
        assert (found is None) == (gradient is None)
        if found is not None:
            torch.testing.assert_close(found, 3 * gradient)


def test_lipschitz_term_passes_gradcheck_and_says_when_nothing_counts() -> None:
    scores = torch.rand(3, 7, dtype=D, requires_grad=True)
    embeddings = torch.randn(7, 4, dtype=D, requires_grad=True)

    def term(s: Tensor, h: Tensor) -> Tensor:
        return F.lipschitz_term(s, h, 3, lambda *_: (0.5, 2.0), mode="confident")[0]

    assert torch.autograd.gradcheck(term, (scores, embeddings))
    nothing = F.lipschitz_term(scores * torch.nan, embeddings, 3, lambda *_: (0.5, 2.0))
    assert [x.item() for x in nothing] == [0.0, 0.0, False]
    loss, _, _ = F.lipschitz_term(scores, embeddings, 3, lambda *_: (0.5, 2.0))
    (grad,) = torch.autograd.grad(loss, scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        torch.autograd.grad(grad.sum(), scores)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tasks=st.integers(2, 9),
    batch=st.integers(1, 40),
    k=st.integers(1, 12),
    limit=st.sampled_from([None, 1, 3, 5]),
    mode=st.sampled_from(["random", "confident"]),
    beta=st.floats(0.01, 1.5),
    mu=st.floats(0.01, 1),
    own=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_many_trainings_are_each_the_definition(
    tasks: int, batch: int, k: int, limit: int | None, mode: str, beta: float, mu: float, own: bool, seed: int
) -> None:
    """Leading dimensions: each training with numbers and draws of its own, against the composition, to its gradients."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, tasks, batch, generator=generator, dtype=D).requires_grad_()
    h = torch.randn(3, *([tasks] if own else []), batch, 5, generator=generator, dtype=D)
    h[torch.rand(h.shape[:-1], generator=generator) < 0.2] = 0
    h.requires_grad_()
    if limit is not None and limit < tasks * (tasks - 1) // 2:  # pairs of tasks are drawn once for all trainings
        limit = None
    sizes = torch.tensor([k, max(k - 1, 1), k])
    betas, mus = torch.tensor([beta, 2 * beta, beta], dtype=D), torch.tensor([mu, mu, mu / 2], dtype=D)
    found = F.lipschitz_term(
        scores, h, k, lambda *_: (torch.full((3,), 0.3, dtype=D), 0.4), mode=mode, max_task_pairs=limit,
        generator=[torch.Generator().manual_seed(m) for m in range(3)], sizes=sizes, beta=betas, mu=mus,
    )  # fmt: skip
    grads = torch.autograd.grad(found[0].sum(), (scores, h))
    for m in range(3):
        pairs = {"k": int(sizes[m]), "mode": mode, "generator": torch.Generator().manual_seed(m)}
        s, e = scores[m].detach().requires_grad_(), h[m].detach().requires_grad_()
        loss, rate, _ = reference(s, e, pairs, 0.3, 0.4, float(betas[m]), float(mus[m]))
        torch.testing.assert_close(found[0][m], loss, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[1][m], rate)
        for all_of, wanted in zip(grads, torch.autograd.grad(loss, (s, e)), strict=True):
            torch.testing.assert_close(all_of[m], wanted, rtol=1e-6, atol=1e-9)
