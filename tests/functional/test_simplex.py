from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import quadprog
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.functional import simplex

FAST = settings(max_examples=40, deadline=None, derandomize=True)
D = torch.float64
SOLVERS = ["active-set", "enumeration", "interior-point"]


def vectors(low: float = -5, high: float = 5, size: int = 12) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(low, high), min_size=1, max_size=size)


@FAST
@given(vectors(-1e15, 1e15))
def test_projection_lies_on_the_simplex_at_any_scale(values: list[float]) -> None:
    v = torch.tensor(values, dtype=D)
    w = F.project_to_simplex(v)
    assert (w >= 0).all()
    assert w.sum().item() == pytest.approx(1.0, abs=1e-9)
    assert torch.equal(w.argsort(stable=True), w.argsort(stable=True))
    assert (w[v.argsort()].diff() >= -1e-12).all()  # keeps the order


@FAST
@given(vectors())
def test_projection_is_the_quadratic_programmes_solution(values: list[float]) -> None:
    v = np.array(values)
    n = len(v)
    exact = quadprog.solve_qp(np.eye(n), v, np.vstack([np.ones(n), np.eye(n)]).T, np.append(1.0, np.zeros(n)), 1)[0]
    np.testing.assert_allclose(F.project_to_simplex(torch.tensor(v)).numpy(), exact, atol=1e-9)


def test_projection_of_rows_and_its_gradient(device: torch.device, dtype: torch.dtype) -> None:
    v = torch.randn(3, 4, 6, device=device, dtype=dtype)
    rows = torch.stack([F.project_to_simplex(row) for row in v.flatten(0, 1)]).view_as(v)
    torch.testing.assert_close(F.project_to_simplex(v), rows)
    x = torch.randn(5, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(F.project_to_simplex, (x,))


def aggregate_by_quadprog(psi: Tensor, mu: float) -> tuple[float, np.ndarray]:
    n = len(psi)
    constraints = np.vstack([np.ones(n), np.eye(n)]).T
    w = quadprog.solve_qp(mu * np.eye(n), psi.numpy(), constraints, np.append(1.0, np.zeros(n)), 1)[0]
    return float(w @ psi.numpy() - mu / 2 * (w @ w - 1 / n)), w


@FAST
@given(values=vectors(0, 2, 40), mu=st.floats(0.1, 1.0), seed=st.integers(0, 99))
def test_aggregate_against_quadprog_with_both_solvers(values: list[float], mu: float, seed: int) -> None:
    psi = torch.tensor(values, dtype=D)
    present = torch.rand(len(psi), generator=torch.Generator().manual_seed(seed)) < 0.8
    poisoned = psi.where(present, torch.nan)
    for solver in simplex.AGGREGATION_SOLVERS:
        phi, w = F.aggregate_disparities(poisoned, mu, present, solver)
        assert (w[~present] == 0).all()
        if not present.any():
            assert phi.item() == 0
            continue
        exact_phi, exact_w = aggregate_by_quadprog(psi[present], mu)
        assert phi.item() == pytest.approx(exact_phi, abs=1e-8)
        np.testing.assert_allclose(w[present].numpy(), exact_w, atol=1e-4)
        assert psi[present].mean() - 1e-9 <= phi <= psi[present].max() + 1e-9
        rows_phi, rows_w = F.aggregate_disparities(poisoned.unsqueeze(0), mu, present.unsqueeze(0), "exact")
        torch.testing.assert_close(rows_w[0], w, atol=1e-4, rtol=0)
        torch.testing.assert_close(rows_phi[0], phi, atol=1e-8, rtol=0)


def test_frank_wolfe_on_the_device_agrees(device: torch.device) -> None:
    psi = torch.rand(2, 7, dtype=D, device=device)
    present = torch.tensor([[True] * 7, [True, False] * 3 + [True]], device=device)
    for mu in (0.1, 1.0, 20.0):
        exact = F.aggregate_disparities(psi, mu, present)
        found = F.aggregate_disparities(psi, mu, present, "frank-wolfe")
        torch.testing.assert_close(found[1], exact[1], atol=1e-4, rtol=0)


def test_aggregate_follows_danskin_and_its_limits() -> None:
    psi = torch.rand(5, dtype=D, requires_grad=True)
    phi, w = F.aggregate_disparities(psi, 0.4)
    (grad,) = torch.autograd.grad(phi, psi)
    torch.testing.assert_close(grad, w)
    assert not w.requires_grad
    assert torch.autograd.gradcheck(lambda x: F.aggregate_disparities(x, 0.4)[0], (psi,))
    assert torch.autograd.gradcheck(lambda x: F.aggregate_disparities(x.unsqueeze(0), 0.4)[0], (psi,))
    assert F.aggregate_disparities(psi, 1e-9)[1][psi.argmax()].item() == pytest.approx(1.0)
    torch.testing.assert_close(F.aggregate_disparities(psi, 1e6)[1], torch.full((5,), 0.2, dtype=D), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [False, True])
def test_no_task_present_gives_zero_and_no_gradient(rows: bool, device: torch.device) -> None:
    psi = torch.rand(3, device=device, requires_grad=True)
    given = psi.unsqueeze(0) if rows else psi
    phi, w = F.aggregate_disparities(given, 0.5, torch.zeros_like(given, dtype=torch.bool))
    assert phi.item() == 0.0
    assert not w.any()
    assert not torch.autograd.grad(phi.sum(), psi)[0].any()


def test_aggregate_refuses() -> None:
    with pytest.raises(RecipeError, match=r"mu must be positive, found 0"):
        F.aggregate_disparities(torch.rand(2), 0.0)
    with pytest.raises(RecipeError, match="unknown solver of aggregate_disparities 'exat'; did you mean 'exact'"):
        F.aggregate_disparities(torch.rand(2), 0.5, solver="exat")


def problem(seed: int, n: int, rank: int, spread: float, linear: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    grads = rng.standard_normal((n, rank)) * 10.0 ** rng.uniform(-spread, spread, (n, 1))
    return grads @ grads.T, grads @ rng.standard_normal(rank) if linear else np.zeros(n)


def objective(gram: np.ndarray, linear: np.ndarray, a: np.ndarray) -> float:
    return float(a @ gram @ a + 2 * linear @ a)


def scale(gram: np.ndarray, linear: np.ndarray, a: np.ndarray) -> float:
    return float(a @ np.abs(gram) @ a + 2 * np.abs(linear) @ a) + 1e-300


def by_supports(gram: np.ndarray, linear: np.ndarray) -> float:
    """The optimum, by brute force over supports with a pseudo-inverse."""
    n, best = len(linear), np.inf
    for size in range(1, n + 1):
        for support in itertools.combinations(range(n), size):
            s = list(support)
            system = np.block([[gram[np.ix_(s, s)], -np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            x = (np.linalg.pinv(system) @ np.append(-linear[s], 1.0))[:size]
            if (x >= -1e-12).all() and abs(x.sum() - 1) < 1e-9:
                full = np.zeros(n)
                full[s] = x
                best = min(best, objective(gram, linear, full))
    return best


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), linear=st.booleans())
def test_min_norm_against_quadprog(solver: str, seed: int, n: int, linear: bool) -> None:
    n = min(n, 7) if solver == "enumeration" else n
    gram, b = problem(seed, n, n + 3, 0.5, linear)
    constraints = np.vstack([np.ones(n), np.eye(n)]).T
    exact = quadprog.solve_qp(gram, -b, constraints, np.append(1.0, np.zeros(n)), 1)[0]
    found = F.min_norm_weights(torch.tensor(gram), torch.tensor(b), solver=solver).numpy()
    np.testing.assert_allclose(found, exact, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 5), rank=st.integers(1, 4), linear=st.booleans())
def test_min_norm_of_dependent_gradients_reaches_the_optimum(
    solver: str, seed: int, n: int, rank: int, linear: bool
) -> None:
    gram, b = problem(seed, n, rank, 1.0, linear)
    found = F.min_norm_weights(torch.tensor(gram), torch.tensor(b), solver=solver).numpy()
    excess = objective(gram, b, found) - by_supports(gram, b)
    assert excess <= 1e-9 * scale(gram, b, found)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 40), rank=st.integers(1, 60), linear=st.booleans())
def test_min_norm_of_badly_scaled_gradients_agrees_and_is_optimal(seed: int, n: int, rank: int, linear: bool) -> None:
    gram, b = problem(seed, n, rank, 4.0, linear)  # squared lengths from 1e-8 to 1e8
    solvers = SOLVERS if n <= 6 else ["active-set", "interior-point"]
    found = [F.min_norm_weights(torch.tensor(gram), torch.tensor(b), solver=solver).numpy() for solver in solvers]
    values = [objective(gram, b, a) for a in found]
    for a, value in zip(found, values, strict=True):
        assert value - min(values) <= 1e-7 * scale(gram, b, a)
        slope = gram @ a + b
        noise = 1e-9 * (np.abs(gram) @ a + np.abs(b))  # what rounding of a slope may be
        assert (slope + noise + 1e-6 * scale(gram, b, a) >= a @ slope).all()  # no vertex is better


def test_min_norm_in_float32_in_batches_and_on_the_device(device: torch.device) -> None:
    gram, b = problem(4, 5, 30, 0.3, linear=True)
    exact = F.min_norm_weights(torch.tensor(gram), torch.tensor(b))
    single = torch.tensor(gram, dtype=torch.float32, device=device), torch.tensor(b, dtype=torch.float32, device=device)
    found = F.min_norm_weights(*single)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().cpu(), exact, atol=1e-4, rtol=0)
    for solver in ("auto", "interior-point"):
        rows = F.min_norm_weights(single[0].repeat(2, 3, 1, 1), single[1].repeat(2, 3, 1), solver=solver)
        torch.testing.assert_close(rows.double().cpu(), exact.expand(2, 3, 5), atol=1e-4, rtol=0)
    mapped = torch.func.vmap(F.min_norm_weights)(single[0].repeat(3, 1, 1), single[1].repeat(3, 1))
    torch.testing.assert_close(mapped.double().cpu(), exact.expand(3, 5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_special_gram_matrices(solver: str) -> None:
    def solve(gram: list[list[float]], linear: list[float] | None = None) -> list[float]:
        b = None if linear is None else torch.tensor(linear, dtype=D)
        return F.min_norm_weights(torch.tensor(gram, dtype=D), b, solver=solver).tolist()

    assert solve([[3.0]]) == [1.0]
    assert solve([[1.0, 2.0], [2.0, 9.0]]) == pytest.approx([1.0, 0.0], abs=1e-9)
    assert solve([[1.0, 0.0], [0.0, 1.0]], [0.0, 5.0]) == pytest.approx([1.0, 0.0], abs=1e-9)
    assert sum(solve([[0.0] * 3] * 3)) == pytest.approx(1.0)
    assert solve([[0.0] * 3] * 3, [2.0, 1.0, 3.0]) == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)
    zero_gradient = solve([[0.0, 0, 0], [0, 1, 0.5], [0, 0.5, 1]])
    assert zero_gradient == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)
    opposed = solve([[1.0, -2, 0], [-2, 4, 0], [0, 0, 1]])
    assert opposed == pytest.approx([2 / 3, 1 / 3, 0.0], abs=1e-6)
    assert all(np.isnan(solve([[float("nan"), 0, 0], [0, 1, 0], [0, 0, 1]])))
    assert all(np.isnan(solve([[float("nan"), 0], [0, 1]])))


def test_equal_gradients_of_two_tasks() -> None:
    gram = torch.ones(2, 2)
    assert F.min_norm_weights(gram).tolist() == [0.5, 0.5]
    assert F.min_norm_weights(gram, torch.tensor([1.0, 0.0])).tolist() == [0.0, 1.0]
    assert F.min_norm_weights(gram, torch.tensor([0.0, 1.0])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (RecipeError, {"solver": "actve-set"}, "unknown solver of min_norm_weights 'actve-set'; did you mean"),
        (RecipeError, {"iters": 0}, "iters must be at least 1"),
        (RecipeError, {"gram": torch.eye(13), "solver": "enumeration"}, "up to 12 tasks, found 13"),
        (RecipeError, {"gram": torch.eye(2, device="meta"), "solver": "active-set"}, "needs a problem on the CPU"),
        (DataError, {"gram": torch.rand(2, 3)}, r"gram must be \[T, T\]"),
        (DataError, {"linear": torch.rand(3)}, r"linear must have shape \(2,\), found \(3,\)"),
    ],
)
def test_min_norm_refuses(error: type[Exception], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        F.min_norm_weights(**{"gram": torch.eye(2), **arguments})


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 2), (4,)])
def test_head_gram_is_the_gram_of_representation_gradients(
    sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> None:
    h = torch.randn(20, 6, device=device, dtype=dtype, requires_grad=True)
    weights = [torch.randn(size, 6, device=device, dtype=dtype) for size in sizes]
    logits = [h @ weight.T for weight in weights]
    losses = [(z.tanh() ** 2).mean() for z in logits]
    grads = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss, z in zip(losses, logits, strict=True)]
    exact = torch.stack([torch.autograd.grad(loss, h, retain_graph=True)[0].flatten() for loss in losses])
    torch.testing.assert_close(F.head_gram(grads, weights), exact @ exact.T, rtol=1e-5, atol=1e-9)


def test_rank_one_head_gram_is_its_definition() -> None:
    grads = [torch.randn(8, c, dtype=D) for c in (1, 3)]
    weights = [torch.randn(c, 4, dtype=D) for c in (1, 3)]
    u = [grad.square().mean(0).sqrt() for grad in grads]
    expected = [[(torch.outer(u[s], u[t]) * (weights[s] @ weights[t].T)).sum() for t in (0, 1)] for s in (0, 1)]
    torch.testing.assert_close(F.head_gram(grads, weights, rank_one=True), torch.tensor(expected, dtype=D))


def test_phi_enters_head_gram_as_one_more_objective() -> None:
    grads = [torch.randn(8, c, dtype=D) for c in (1, 2)]
    weights = [torch.randn(c, 4, dtype=D) for c in (1, 2)]
    phi = torch.randn(8, 3, dtype=D)
    gram = F.head_gram([*grads, phi], [*weights, torch.cat(weights)])
    g_phi = phi @ torch.cat(weights)
    torch.testing.assert_close(gram[0, 2], ((grads[0] @ weights[0]) * g_phi).sum())
    torch.testing.assert_close(gram[1, 2], ((grads[1] @ weights[1]) * g_phi).sum())


def test_head_gram_refuses() -> None:
    with pytest.raises(DataError, match="one weight matrix per task, found 1 gradients and 0"):
        F.head_gram([torch.rand(3, 2)], [])
    with pytest.raises(DataError, match=r"task 0: gradients \[B, C\] \(3, 2\) do not fit"):
        F.head_gram([torch.rand(3, 2)], [torch.rand(3, 4)])
