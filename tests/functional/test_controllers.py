from __future__ import annotations

from typing import Any

import pytest
import torch

from libmtl_fair.errors import RecipeError
from libmtl_fair.methods.controllers import DualAscent, ViolationController


def replay(rates: list[float | None], **settings: float) -> list[float]:
    """The published control, step by step on Python numbers; None is a step without finite pairs."""
    eta, target, warmup = settings["step_size"], settings["target"], settings["warmup"]
    value, smooth, steps, trace = 0.1, None, 0, []
    for rate in rates:
        if rate is not None:
            smooth = rate if smooth is None else 0.1 * rate + 0.9 * smooth
            steps += 1
            if steps > warmup:
                value = min(max(value * (1 + eta * (smooth - target)), 0.01), 10.0)
        trace.append(value)
    return trace


RATES: list[float | None] = [0.5, None, 0.9, 0.8, None, 0.7, 0.0, 0.1, 0.95, 1.0] * 4


@pytest.mark.parametrize("path", ["host", "device"])
def test_lambda_replayed_by_hand(device: torch.device, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "device":
        monkeypatch.setattr("libmtl_fair.methods.controllers.on_cpu", lambda *_: False)
    chosen = {"step_size": 0.3, "target": 0.2, "warmup": 5}
    controller = ViolationController(**chosen).to(device)
    found = []
    for rate in RATES:
        number = torch.tensor(0.99 if rate is None else rate, device=device)
        found.append(controller.update(number, torch.tensor(rate is not None, device=device)).item())
    assert found == pytest.approx(replay(RATES, **chosen), rel=1e-5)


@pytest.mark.parametrize("path", ["host", "device"])
def test_a_step_without_pairs_changes_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "device":
        monkeypatch.setattr("libmtl_fair.methods.controllers.on_cpu", lambda *_: False)
    controller = ViolationController(warmup=0, step_size=0.5)
    fresh = {name: buffer.clone() for name, buffer in controller.state_dict().items()}
    controller.update(torch.tensor(1.0), torch.tensor(False))
    controller.update(torch.tensor(float("nan")))
    controller.update(torch.tensor(float("nan")), torch.tensor(True))
    assert all(torch.equal(buffer, fresh[name]) for name, buffer in controller.state_dict().items())
    controller.update(torch.tensor(0.6), torch.tensor(True))
    assert controller.smoothed.item() == pytest.approx(0.6)  # starts at the first r, not at 0
    assert controller.steps.item() == 1


def test_lambda_waits_for_the_warm_up_and_keeps_its_range() -> None:
    controller = ViolationController(warmup=3, step_size=5.0, initial=1.0, minimum=0.5, maximum=2.0)
    values = [controller.update(torch.tensor(1.0)).item() for _ in range(8)]
    assert values[:3] == [1.0] * 3
    assert values[-1] == 2.0
    values = [controller.update(torch.tensor(0.0)).item() for _ in range(80)]
    assert values[-1] == 0.5


def test_static_keeps_lambda_and_follows_the_rate() -> None:
    controller = ViolationController(static=True, warmup=0, initial=3.0)
    values = {controller.update(torch.tensor(rate)).item() for rate in (0.9, 0.2, 0.4)}
    assert values == {3.0}
    assert controller.smoothed.item() == pytest.approx(0.9 * (0.9 * 0.9 + 0.1 * 0.2) + 0.1 * 0.4)


def test_controller_state_is_restored_and_returned_values_are_not_aliases() -> None:
    first = ViolationController(warmup=2, step_size=0.5)
    before = [first.update(torch.tensor(0.9)) for _ in range(5)]
    second = ViolationController(warmup=2, step_size=0.5)
    second.load_state_dict(first.state_dict())
    assert before[0].item() == pytest.approx(0.1)
    for rate in (0.1, 0.5, 0.3):
        assert torch.equal(first.update(torch.tensor(rate)), second.update(torch.tensor(rate)))
    assert not list(first.parameters())
    assert "target=0.1" in repr(first)


def test_no_gradient_is_kept() -> None:
    rate = torch.tensor(0.5, requires_grad=True)
    assert not ViolationController(warmup=0).update(rate).requires_grad
    assert not DualAscent().update(rate).requires_grad


@pytest.mark.parametrize("path", ["host", "device"])
def test_dual_ascent_replayed_by_hand(device: torch.device, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "device":
        monkeypatch.setattr("libmtl_fair.methods.controllers.on_cpu", lambda *_: False)
    dual = DualAscent(rho=0.5, epsilon=0.1, maximum=1.0).to(device)
    eta = 0.0
    for phi in [0.3, None, 0.9, 2.0, 2.0, 0.0, 0.0, None, 0.05, *[0.0] * 30]:
        if phi is not None:
            eta = min(max(eta + 0.5 * (phi - 0.1), 0.0), 1.0)
        number = torch.tensor(5.0 if phi is None else phi, device=device)
        found = dual.update(number, torch.tensor(phi is not None, device=device))
        assert found.item() == pytest.approx(eta, abs=1e-6)
    assert found.item() == 0.0


def test_complementary_slackness() -> None:
    dual = DualAscent(rho=0.05, epsilon=0.1)
    rising = [dual.update(torch.tensor(0.4)).item() for _ in range(10)]
    assert rising == sorted(rising)
    assert rising[0] > 0
    falling = [dual.update(torch.tensor(0.02)).item() for _ in range(100)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == 0.0
    assert dual.update(torch.tensor(float("nan"))).item() == 0.0
    assert dual.update(torch.tensor(float("inf"))).item() == 0.0


def test_static_dual_keeps_its_value_and_state_is_restored() -> None:
    assert DualAscent(initial=2.0, static=True).update(torch.tensor(9.0)).item() == 2.0
    first, second = DualAscent(), DualAscent()
    first.update(torch.tensor(0.7))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.value, second.value)
    assert "rho=0.05" in repr(first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 1.5}, r"target must be in \[0, 1\] .*found 1.5"),
        ({"target": float("nan")}, r"target must be in \[0, 1\]"),
        ({"step_size": -1.0}, "step_size must be finite and >= 0, found -1.0"),
        ({"warmup": -1}, "warmup must be >= 0"),
        ({"smoothing": 0.0}, r"smoothing must be in \(0, 1\]"),
        ({"minimum": -0.1}, "0 <= minimum <= initial <= maximum.*found minimum=-0.1"),
        ({"initial": 11.0}, "initial=11.0, maximum=10.0"),
        ({"minimum": 0.2}, "minimum=0.2, initial=0.1"),
        ({"maximum": float("inf")}, "maximum=inf"),
    ],
)
def test_violation_controller_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ViolationController(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -0.1}, "rho must be finite and >= 0, found -0.1"),
        ({"rho": float("nan")}, "rho must be finite"),
        ({"epsilon": -0.1}, "epsilon must be finite and >= 0"),
        ({"maximum": 0.0}, "maximum must be finite and > 0"),
        ({"initial": 11.0}, r"initial must be in \[0, maximum=10.0\], found 11.0"),
        ({"initial": -1.0}, "initial must be in"),
    ],
)
def test_dual_ascent_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DualAscent(**settings)
