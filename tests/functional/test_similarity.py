from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError

FAST = settings(max_examples=30, deadline=None, derandomize=True)
D = torch.float64


def kernel_cka(a: Tensor, b: Tensor) -> float:
    n = len(a)
    centre = torch.eye(n, dtype=D) - 1 / n
    ka, kb = centre @ a @ a.T @ centre, centre @ b @ b.T @ centre
    return ((ka @ kb).trace() / ((ka @ ka).trace() * (kb @ kb).trace()).sqrt()).item()


@FAST
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(3, 20),
    p=st.integers(1, 6),
    q=st.integers(1, 6),
    power=st.integers(-15, 15),
)
def test_cka_is_the_kernel_form_and_has_no_scale(seed: int, n: int, p: int, q: int, power: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, p, generator=generator, dtype=D)
    b = torch.randn(n, q, generator=generator, dtype=D)
    value = F.linear_cka(a * 10.0**power, b).item()
    assert value == pytest.approx(kernel_cka(a, b), abs=1e-9)
    assert 0 <= value <= 1
    assert F.linear_cka(b, a).item() == pytest.approx(value, abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=D))[0]
    assert F.linear_cka(a @ rotation + 3, b).item() == pytest.approx(value, abs=1e-9)
    assert F.linear_cka(a, -2 * a).item() == pytest.approx(1.0, abs=1e-12)
    pair = F.linear_cka(torch.stack([a, -2 * a]), torch.stack([b, b]))
    assert pair.tolist() == pytest.approx([F.linear_cka(a, b).item()] * 2, abs=1e-12)


def test_no_variance_is_no_similarity(device: torch.device, dtype: torch.dtype) -> None:
    a = torch.randn(6, 3, device=device, dtype=dtype)
    for flat in (
        torch.full_like(a, 0.1),
        torch.zeros_like(a),
        torch.rand(1, 3, device=device, dtype=dtype).repeat(6, 1),
    ):
        assert F.linear_cka(a, flat).item() == 0.0
        assert F.linear_cka(flat, flat).item() == 0.0
    assert F.linear_cka(a[:1], a[:1]).item() == 0.0
    assert F.linear_cka(a * 1e15, a).item() == pytest.approx(1.0, abs=1e-5)


def test_cka_is_differentiable_and_refuses_other_rows() -> None:
    a, b = torch.randn(5, 2, dtype=D, requires_grad=True), torch.randn(5, 3, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(F.linear_cka, (a, b))
    with pytest.raises(DataError, match=r"same number of rows, found \(5, 2\) and \(4, 3\)"):
        F.linear_cka(a, b[:4])


def test_pairs_are_taken_best_first_and_once() -> None:
    sim = torch.eye(5)
    for i, j, value in ((0, 1, 0.6), (1, 2, 0.9), (2, 3, 0.8), (3, 4, 0.7), (0, 4, 0.2)):
        sim[i, j] = sim[j, i] = value
    assert F.pair_by_similarity(sim, 0.5) == [(0,), (1, 2), (3, 4)]
    assert F.pair_by_similarity(sim, 0.75) == [(0,), (1, 2), (3,), (4,)]
    assert F.pair_by_similarity(sim, 0.95) == [(0,), (1,), (2,), (3,), (4,)]
    assert F.pair_by_similarity(sim, 0.9 - 1e-6)[1] == (1, 2)
    assert F.pair_by_similarity(torch.ones(4, 4), 1.0) == [(0, 1), (2, 3)]
    assert F.pair_by_similarity(torch.full((3, 3), torch.nan), 0.0) == [(0,), (1,), (2,)]
    assert F.pair_by_similarity(torch.zeros(0, 0), 0.0) == []
    with pytest.raises(DataError, match=r"sim must be \[n, n\], found shape \(2, 3\)"):
        F.pair_by_similarity(torch.zeros(2, 3), 0.5)


@FAST
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), threshold=st.floats(0, 1))
def test_pairs_partition_the_indices(seed: int, n: int, threshold: float) -> None:
    sim = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    sim = (sim + sim.T) / 2
    groups = F.pair_by_similarity(sim, threshold)
    assert sorted(i for group in groups for i in group) == list(range(n))
    alone = [group[0] for group in groups if len(group) == 1]
    assert all(sim[i, j] < threshold for i in alone for j in alone if i != j)  # a maximal matching
    assert all(sim[group] >= threshold for group in groups if len(group) == 2)
