"""Mean cross-entropy over observed labels: against plain loops, autograd, and with dimensions before it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from libmtl_fair import functional as F

NAN = float("nan")


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return logits and labels of which a fifth are missing."""
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(*shape, generator=g, dtype=torch.float64)
    y = (torch.rand(*shape, generator=g, dtype=torch.float64) > 0.5).double()
    y[torch.rand(*shape, generator=g) < 0.2] = NAN
    return z.to(dtype), y.to(dtype)


def in_loops(z: Tensor, y: Tensor) -> list[float]:
    means = []
    for t in range(z.shape[1]):
        found = [
            -math.log(1 / (1 + math.exp(-a if b else a)))
            for a, b in zip(z[:, t].tolist(), y[:, t].tolist())
            if not math.isnan(b)
        ]
        means.append(sum(found) / max(len(found), 1))
    return means


def test_means_are_those_of_plain_loops() -> None:
    z, y = draw(17, 4)
    y[:, 2] = NAN  # a task without a label
    losses, labelled = F.mean_cross_entropy(z, y)
    assert losses.tolist() == pytest.approx(in_loops(z, y))
    assert losses[2] == 0
    assert labelled.tolist() == y.isfinite().sum(0).tolist()


@pytest.mark.parametrize("missing", [NAN, math.inf, -math.inf])
def test_the_gradient_is_autograds(missing: float) -> None:
    z, y = draw(17, 4)
    y[y.isnan()] = missing
    y[:, 2] = missing
    z.requires_grad_()
    losses, labelled = F.mean_cross_entropy(z, y)
    (expected,) = torch.autograd.grad(losses.sum(), z)
    torch.testing.assert_close(F.mean_cross_entropy_gradient(z.detach().sigmoid(), y, labelled), expected)
    assert expected.isfinite().all()


def test_without_a_missing_label_no_count_is_needed() -> None:
    z, y = draw(17, 4)
    y.nan_to_num_()
    p = z.sigmoid()
    _, labelled = F.mean_cross_entropy(z, y)
    torch.testing.assert_close(F.mean_cross_entropy_gradient(p, y), F.mean_cross_entropy_gradient(p, y, labelled))


@pytest.mark.parametrize("lead", [(1,), (3,), (2, 3)])
def test_leading_dimensions_are_one_after_the_other(lead: tuple[int, ...]) -> None:
    z, y = draw(*lead, 9, 5)
    losses, labelled = F.mean_cross_entropy(z, y)
    grad = F.mean_cross_entropy_gradient(z.sigmoid(), y, labelled)
    for place in torch.cartesian_prod(*map(torch.arange, lead)).reshape(-1, len(lead)).tolist():
        at = tuple(place)
        one, count = F.mean_cross_entropy(z[at], y[at])
        torch.testing.assert_close(losses[at], one)
        torch.testing.assert_close(grad[at], F.mean_cross_entropy_gradient(z[at].sigmoid(), y[at], count))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e15])
def test_logits_of_any_size_have_finite_losses_and_gradients(scale: float) -> None:
    z, y = draw(9, 3, dtype=torch.float32)
    z = (z * scale).requires_grad_()
    losses, _ = F.mean_cross_entropy(z, y)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_half_precision_counts_in_single() -> None:
    z, y = torch.zeros(3000, 1, dtype=torch.float16), torch.ones(3000, 1, dtype=torch.float16)
    losses, labelled = F.mean_cross_entropy(z, y)
    assert losses.dtype == torch.float32
    assert labelled.tolist() == [3000]
    assert losses.item() == pytest.approx(math.log(2), rel=1e-3)


def test_the_loss_of_each_example() -> None:
    z, y = draw(6)
    losses, seen = F.example_cross_entropy(z, y)
    assert seen.tolist() == y.isfinite().double().tolist()
    assert losses.tolist() == pytest.approx([in_loops(a.view(1, 1), b.view(1, 1))[0] for a, b in zip(z, y)])
