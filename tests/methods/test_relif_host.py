"""ReLiF beside the CPU: numbers and a written-out gradient, which must be those of the tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair import functional as F
from libmtl_fair.functional import _lipschitz_host as host
from libmtl_fair.functional.margins import host_quantile
from libmtl_fair.libmtl.history import StepLog
from libmtl_fair.methods.controllers import ViolationController
from libmtl_fair.models import MLP, linear_heads


@settings(max_examples=80, deadline=None)
@given(
    tasks=st.integers(2, 9),
    batch=st.integers(1, 40),
    k=st.integers(1, 12),
    limit=st.sampled_from([None, 1, 3, 5]),
    mode=st.sampled_from(["random", "confident"]),
    strength=st.floats(0.01, 10),
    beta=st.floats(0.01, 1.5),
    mu=st.floats(0.01, 1),
    seed=st.integers(0, 10**6),
)
def test_host_pairs_are_the_term_of_tensors(
    tasks: int,
    batch: int,
    k: int,
    limit: int | None,
    mode: str,
    strength: float,
    beta: float,
    mu: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, tasks, generator=generator, dtype=torch.float64).requires_grad_()
    h = torch.randn(batch, 5, generator=generator, dtype=torch.float64)
    h[torch.rand(batch, generator=generator) < 0.2] = 0
    h.requires_grad_()
    seen: list[Tensor] = []

    def scales(gap: Tensor, distance: Tensor, mask: Tensor) -> tuple[float, float]:
        assert mask.all()
        seen.extend((gap, distance))
        return 0.3, 0.4

    drawn: dict[str, Any] = {"mode": mode, "max_task_pairs": limit}
    torch.manual_seed(seed)
    loss, rate, some = F.lipschitz_term(scores.T, h, k, scales, beta=beta, mu=mu, **drawn)
    expected = [strength * g for g in torch.autograd.grad(loss, (scores, h))]
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    assert host.fits(scores.detach(), h.detach())
    pairs = host.HostPairs(scores.detach(), h.detach(), k, **drawn)
    assert torch.equal(torch.get_rng_state(), after)
    found = pairs.violations(0.3, 0.4, beta=beta, mu=mu)
    to_picked, to_h = pairs.gradients(strength)
    assert some
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-9)  # another order of sums
    assert found.rate == pytest.approx(float(rate))
    for x, y in zip((pairs.gap.abs(), pairs.distance), (seen[0].abs(), seen[1])):  # the prototypes are in any order
        torch.testing.assert_close(x.flatten().sort().values, y.sort().values, rtol=1e-12, atol=1e-12)
    to_scores = torch.zeros(scores.numel(), dtype=torch.float64).index_add_(0, pairs.at, to_picked)
    torch.testing.assert_close(to_scores.view_as(scores), expected[0], rtol=1e-6, atol=1e-9)
    assert to_h is not None
    torch.testing.assert_close(to_h, expected[1], rtol=1e-6, atol=1e-9)


def test_what_host_pairs_are_not_made_for() -> None:
    scores, h = torch.rand(6, 2), torch.randn(6, 3)
    assert host.fits(scores, h)
    assert not host.fits(scores.index_fill(0, torch.tensor(1), torch.nan), h)
    assert not host.fits(scores, h.expand(2, 6, 3))
    assert not host.fits(scores.double(), h)
    pairs = host.HostPairs(scores, h, 2)
    pairs.violations(0.3, 0.4, beta=0.1, mu=0.05)
    assert pairs.gradients(1.0, embeddings=False)[1] is None


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(1, 6000),
    q=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.75, 0.95, 1.0])),
    kind=st.sampled_from(["normal", "rising", "falling", "few", "equal"]),
    seed=st.integers(0, 10**6),
)
def test_host_quantile_is_that_of_numpy(size: int, q: float, kind: str, seed: int) -> None:
    drawn = np.random.default_rng(seed).standard_normal(size)
    values = {
        "normal": drawn,
        "rising": np.sort(drawn),
        "falling": -np.sort(drawn),
        "few": np.round(drawn),
        "equal": np.ones(size),
    }[kind]
    assert host_quantile(values, q) == pytest.approx(np.quantile(values, q), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("static", [False, True])
def test_a_controller_takes_numbers_as_it_takes_tensors(static: bool) -> None:
    one, other = (ViolationController(0.2, 0.3, warmup=2, static=static) for _ in range(2))
    for rate in (0.5, float("nan"), 0.0, 0.9, float("inf"), 1.0, 0.3):
        assert one.update_number(rate) == float(other.update(torch.tensor(rate, dtype=torch.float64)))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_log_takes_numbers_and_tensors() -> None:
    log = StepLog()
    log.add({"a": 0.5, "b": torch.tensor(1.0), "c": 2.0}, [1])
    log.add({"a": torch.tensor(1.5), "b": 2.0}, [1])
    frame = log.read(["t"])
    assert frame["a"].tolist() == [0.5, 1.5]
    assert frame["b"].tolist() == [1.0, 2.0]
    assert frame["c"].iloc[0] == 2.0
    assert np.isnan(frame["c"].iloc[1])


def history(tasks: tuple[lf.Task, ...], frozen: bool, **args: Any) -> Any:
    """Train eight steps with missing labels; return history and parameters."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 6, generator=generator)
    labels = {t.name: (x[:, i % 6] > 0).float() for i, t in enumerate(tasks)}
    labels[tasks[0].name][torch.rand(128, generator=generator) < 0.3] = torch.nan
    loader = lf.ResidentLoader(x, labels, batch_size=32, shuffle=True, seed=0, device="cpu")
    torch.manual_seed(2)
    trainer = lf.FairTrainer(
        lf.task_dict(tasks), "ReLiF", "HPS", lambda: MLP(6, (16, 8)), linear_heads(tasks, 8), False, False,
        {"optim": "sgd", "lr": 0.2}, None, device="cpu", progress=False, seed=1, select="last",
        weight_args={"warmup": 2, "lambda_0": 3.0, **args},
    )  # fmt: skip
    if frozen:
        trainer.model.encoder.requires_grad_(False)
    trainer.train(loader, epochs=2)
    return trainer.history.drop(columns="train_s"), dict(trainer.model.state_dict())


KINDS: dict[str, tuple[lf.Task, ...]] = {
    "two": (lf.Binary("a"), lf.Binary("b")),
    "many": tuple(lf.Binary(f"t{i}") for i in range(8)),
    "mixed": (lf.Binary("a"), lf.Regression("b"), lf.Binary("c")),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("args", [{}, {"preset": "paper", "lambda_0": 1.0}, {"scaling": False, "task_pairs": None}])
def test_a_training_is_the_one_of_tensors(
    kind: str, args: dict[str, Any], frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, weights = history(KINDS[kind], frozen, **args)
    taken: list[Any] = []
    monkeypatch.setattr(host, "fits", lambda *tensors: taken.append(tensors))
    expected, others = history(KINDS[kind], frozen, **args)
    assert len(taken) == 8
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), rtol=1e-3, atol=1e-5)
    assert "preset" in args or found["r"].max() > 0
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-5)
