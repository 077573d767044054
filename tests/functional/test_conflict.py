from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libmtl_fair import functional as F

FAST = settings(max_examples=40, deadline=None, derandomize=True)
D = torch.float64


def loop(grads: Tensor) -> Tensor:
    out = grads.clone()
    for i in range(len(grads)):
        for j in range(len(grads)):
            square = grads[j] @ grads[j]
            inner = out[i] @ grads[j]
            if i != j and inner < 0 and square > 0:
                out[i] -= inner / square * grads[j]
    return out


@FAST
@given(seed=st.integers(0, 10**6), tasks=st.integers(1, 8), size=st.integers(1, 10), power=st.integers(-8, 8))
def test_projection_against_a_loop(seed: int, tasks: int, size: int, power: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(tasks, size, generator=generator, dtype=D) * 10.0**power
    grads[torch.rand(tasks, generator=generator) < 0.2] = 0
    expected = loop(grads)
    tolerance = {"rtol": 1e-8, "atol": 1e-10 * 10.0**power}
    torch.testing.assert_close(F.project_conflicts(grads), expected, **tolerance)
    both = F.project_conflicts(torch.stack([grads, -grads]))
    torch.testing.assert_close(both[0], expected, **tolerance)
    torch.testing.assert_close(both[1], loop(-grads), **tolerance)


def test_two_conflicting_gradients_become_orthogonal_to_the_others_original(
    device: torch.device, dtype: torch.dtype
) -> None:
    grads = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 1.0, 0.0]], device=device, dtype=dtype)
    out = F.project_conflicts(grads)
    assert (out[0] @ grads[1]).item() == pytest.approx(0.0, abs=1e-6)
    assert (out[1] @ grads[0]).item() == pytest.approx(0.0, abs=1e-6)
    assert out.dtype == dtype


def test_gradients_in_agreement_are_left_as_they_are() -> None:
    grads = torch.rand(4, 6, dtype=D)
    assert torch.equal(F.project_conflicts(grads), grads)
    assert torch.equal(F.project_conflicts(torch.zeros(3, 4)), torch.zeros(3, 4))
    assert torch.equal(F.project_conflicts(-torch.ones(1, 4)), -torch.ones(1, 4))


def test_opposite_gradients_cancel_and_never_meet_themselves() -> None:
    grads = torch.tensor([[1.0, 2.0], [-2.0, -4.0]])
    torch.testing.assert_close(F.project_conflicts(grads), torch.zeros(2, 2), atol=1e-6, rtol=0)


def test_coefficients_of_summed_gram_matrices_serve_split_gradients() -> None:
    grads = torch.randn(4, 12, dtype=D)
    parts = grads[:, :5], grads[:, 5:]
    coefficients = F.conflict_coefficients(sum((p @ p.T for p in parts), torch.zeros(4, 4, dtype=D)))
    torch.testing.assert_close(torch.cat([coefficients @ p for p in parts], 1), loop(grads))


def test_vmap_equals_leading_dimensions() -> None:
    grads = torch.randn(3, 4, 9, dtype=D)
    mapped = torch.func.vmap(F.project_conflicts)(grads)
    torch.testing.assert_close(mapped, torch.stack([loop(g) for g in grads]))
    torch.testing.assert_close(F.project_conflicts(grads), mapped)
    cosines = F.gradient_cosines(grads)
    for found, g in zip(cosines, grads):
        torch.testing.assert_close(found, F.gradient_cosines(g))
    assert F.conflict_count(cosines).tolist() == [int(F.conflict_count(c)) for c in cosines]
    torch.testing.assert_close(F.conflict_angles(cosines), torch.stack([F.conflict_angles(c) for c in cosines]))


def test_cosines_counts_and_angles(device: torch.device) -> None:
    grads = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [1.0, -1.0], [0.0, 0.0]], device=device)
    cosines = F.gradient_cosines(grads)
    for i in range(5):
        for j in range(5):
            expected = torch.nn.functional.cosine_similarity(grads[i], grads[j], dim=0)
            assert cosines[i, j].item() == pytest.approx(expected.item(), abs=1e-6)
    assert F.conflict_count(cosines).item() == 3  # (0, 1), (1, 3), (2, 3)
    angles = F.conflict_angles(cosines)
    assert angles.shape == (10,)
    assert angles[0].item() == pytest.approx(180.0)
    assert angles[2].item() == pytest.approx(math.degrees(math.pi / 4), abs=1e-3)
