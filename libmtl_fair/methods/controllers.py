"""Controllers that set a penalty's strength while training: ReLiF's lambda and FairMT's dual variable.

Both are modules without parameters. Their state lives in buffers, so it moves with ``.to`` and is saved by ``state_dict``;
``update`` never waits for the device and leaves everything as it was in a step that has nothing to say. On the CPU, where
reading a scalar waits for nothing, the update is plain arithmetic: a sixth of the cost of a dozen tensor operations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from libmtl_fair.errors import RecipeError
from libmtl_fair.functional._device import on_host


class ViolationController(nn.Module):
    """Multiplicative control of ReLiF's lambda towards a target violation rate.

    With the violation rate r of a step, ``r~ <- smoothing r + (1 - smoothing) r~`` (r~ starts at the first r, ours), and after
    ``warmup`` valid steps ``lambda <- clip(lambda (1 + step_size (r~ - target)), minimum, maximum)``.
    Source: ReLiF, arXiv:2606.10632; the default target, step size and range are ours (the paper's: 0.24, 1e-3, [0.01, 1]).

    Parameters
    ----------
    target : float
        Violation rate to keep, in [0, 1].
    step_size : float
        Gain of the control (eta), >= 0.
    initial, minimum, maximum : float
        Start and range of lambda: ``0 <= minimum <= initial <= maximum``.
    warmup : int
        Valid steps during which lambda stays at ``initial``, >= 0.
    smoothing : float
        Weight of the newest r in r~, in (0, 1].
    static : bool
        Keep lambda at ``initial`` (the ablation); r~ is still followed.

    Raises
    ------
    RecipeError
        If a setting is out of its range.

    >>> controller = ViolationController(target=0.1, step_size=0.5, warmup=0)
    >>> round(controller.update(torch.tensor(0.3)).item(), 6)
    0.11
    """

    value: Tensor
    smoothed: Tensor
    steps: Tensor

    def __init__(
        self,
        target: float = 0.10,
        step_size: float = 0.02,
        *,
        initial: float = 0.1,
        minimum: float = 0.01,
        maximum: float = 10.0,
        warmup: int = 100,
        smoothing: float = 0.1,
        static: bool = False,
    ) -> None:
        super().__init__()
        _require(0 <= target <= 1, "ViolationController: target", "in [0, 1] (a violation rate)", target)
        _require(0 <= step_size < math.inf, "ViolationController: step_size", "finite and >= 0", step_size)
        _require(warmup >= 0, "ViolationController: warmup", ">= 0 steps", warmup)
        _require(0 < smoothing <= 1, "ViolationController: smoothing", "in (0, 1]", smoothing)
        if not 0 <= minimum <= initial <= maximum < math.inf:
            raise RecipeError(
                "ViolationController: expected 0 <= minimum <= initial <= maximum < inf, found "
                f"minimum={minimum}, initial={initial}, maximum={maximum}."
            )
        self.target, self.step_size, self.initial = target, step_size, initial
        self.minimum, self.maximum = minimum, maximum
        self.warmup, self.smoothing, self.static = warmup, smoothing, static
        self.register_buffer("value", torch.tensor(float(initial)))
        self.register_buffer("smoothed", torch.tensor(0.0))
        self.register_buffer("steps", torch.tensor(0))

    @torch.no_grad()
    def update(self, rate: Tensor, valid: Tensor | None = None) -> Tensor:
        """Take in one step's violation rate (scalar in [0, 1]) and return the new lambda (scalar), for use in the same step.

        Where ``valid`` (bool scalar) is False, or the rate is not finite, nothing changes: neither lambda nor r~ nor the
        count of warm-up steps.
        """
        rate = rate.detach()
        if on_host(rate, self.value) and (valid is None or on_host(valid)):
            if valid is None or bool(valid):
                self.update_number(float(rate))
        else:
            self._update_device(rate, rate.isfinite() if valid is None else rate.isfinite() & valid)
        return self.value.clone()

    def update_number(self, rate: float) -> float:
        """:meth:`update` for a number, of a controller on the CPU."""
        if not math.isfinite(rate):
            return float(self.value)
        value, held, count = self.value, self.smoothed, self.steps  # looked up once: a module is slow at it
        steps, smoothed = int(count) + 1, float(held)
        smoothed = smoothed + self.smoothing * (rate - smoothed) if steps > 1 else rate
        count.fill_(steps)
        held.fill_(smoothed)
        if steps > self.warmup and not self.static:
            scaled = float(value) * (1 + self.step_size * (smoothed - self.target))
            value.fill_(min(max(scaled, self.minimum), self.maximum))
        return float(value)

    def _update_device(self, rate: Tensor, ok: Tensor) -> None:
        weight = torch.where(self.steps > 0, self.smoothing, 1.0).to(self.smoothed.dtype)
        moved = torch.lerp(self.smoothed, rate.to(self.smoothed.dtype), weight)
        self.smoothed.copy_(moved.where(ok, self.smoothed))
        self.steps.add_(ok)
        if not self.static:
            scaled = self.value * (1 + self.step_size * (self.smoothed - self.target))
            active = ok & (self.steps > self.warmup)
            self.value.copy_(scaled.clamp(self.minimum, self.maximum).where(active, self.value))

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"target={self.target}, step_size={self.step_size}, initial={self.initial}, minimum={self.minimum}, "
            f"maximum={self.maximum}, warmup={self.warmup}, smoothing={self.smoothing}, static={self.static}"
        )


class DualAscent(nn.Module):
    """Projected dual ascent on the multiplier eta of the constraint ``Phi <= epsilon``.

    After each step ``eta <- clip(eta + rho (Phi - epsilon), 0, maximum)``: eta rises while the constraint is violated, and
    falls to 0 and stays there while it holds with slack. Source: FairMT, arXiv:2512.00469; the default epsilon is ours.

    Parameters
    ----------
    rho : float
        Step size, >= 0 (FairMT: 0.01 to 0.1).
    epsilon : float
        Tolerated disparity, >= 0.
    initial, maximum : float
        Start and upper bound of eta: ``0 <= initial <= maximum``, ``maximum > 0``.
    static : bool
        Keep eta at ``initial`` (the ablation: a fixed penalty).

    Raises
    ------
    RecipeError
        If a setting is out of its range.

    >>> dual = DualAscent(rho=0.5, epsilon=0.1)
    >>> round(dual.update(torch.tensor(0.3)).item(), 6)
    0.1
    """

    value: Tensor

    def __init__(
        self,
        rho: float = 0.05,
        epsilon: float = 0.05,
        *,
        initial: float = 0.0,
        maximum: float = 10.0,
        static: bool = False,
    ) -> None:
        super().__init__()
        _require(0 <= rho < math.inf, "DualAscent: rho", "finite and >= 0", rho)
        _require(0 <= epsilon < math.inf, "DualAscent: epsilon", "finite and >= 0", epsilon)
        _require(0 < maximum < math.inf, "DualAscent: maximum", "finite and > 0", maximum)
        _require(0 <= initial <= maximum, "DualAscent: initial", f"in [0, maximum={maximum}]", initial)
        self.rho, self.epsilon, self.initial, self.maximum, self.static = rho, epsilon, initial, maximum, static
        self.register_buffer("value", torch.tensor(float(initial)))

    @torch.no_grad()
    def update(self, phi: Tensor, present: Tensor | None = None) -> Tensor:
        """Take in one step's disparity Phi (scalar) and return the new eta (scalar).

        Where ``present`` (bool scalar: some task had groups to compare) is False, or Phi is not finite, eta stays.
        """
        phi, value = phi.detach(), self.value
        if self.static:
            return value.clone()
        if on_host(phi, value) and (present is None or on_host(present)):
            excess = float(phi) - self.epsilon
            if math.isfinite(excess) and (present is None or bool(present)):
                value.fill_(min(max(float(value) + self.rho * excess, 0.0), self.maximum))
        else:
            ok = phi.isfinite() if present is None else phi.isfinite() & present
            moved = (value + self.rho * (phi.to(value.dtype) - self.epsilon)).clamp(0, self.maximum)
            value.copy_(moved.where(ok, value))
        return value.clone()

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"rho={self.rho}, epsilon={self.epsilon}, initial={self.initial}, maximum={self.maximum}, static={self.static}"


def _require(holds: bool, what: str, expected: str, found: float) -> None:
    if not holds:
        raise RecipeError(f"{what} must be {expected}, found {found}.")
