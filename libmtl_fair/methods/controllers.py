"""Controllers that set a penalty's strength while training: ReLiF's lambda and FairMT's dual variables.

Both are modules without parameters. Their state lives in buffers, so it moves with ``.to`` and is saved by ``state_dict``;
``update`` works elementwise, never waits for the device, and leaves everything as it was in a step that has nothing to say.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from libmtl_fair.errors import RecipeError
from libmtl_fair.functional._device import as_array, on_cpu, widest


class Controller(nn.Module):
    """Numbers and buffers that an update works on elementwise: one controller, or many with a leading dimension.

    Attributes
    ----------
    numbers : tuple of str, default ()
        Names of the settings that an update reads.
    """

    numbers: ClassVar[tuple[str, ...]] = ()

    def _arrays(self, signal: Tensor, valid: Tensor | None) -> tuple[Any, Any, Any, SimpleNamespace]:
        """Return torch, numpy or plain numbers, then, as theirs: the signal, where it counts, and all numbers and buffers.

        Reading a CPU tensor waits for nothing, and there a dozen numbers cost a fifth in numpy, a tenth as plain numbers. All
        work in the widest type.
        """
        signal, buffers = signal.detach(), {name: b for name, b in self._buffers.items() if b is not None}
        xp: Any = torch
        if on_cpu(signal, *buffers.values()) and (valid is None or on_cpu(valid)):
            xp = np if signal.dim() or any(b.dim() for b in buffers.values()) else _Plain
        array = _ARRAYS[xp]
        found = array(signal)
        ok = xp.isfinite(found) if valid is None else xp.isfinite(found) & array(valid)
        held = {name: array(x) for name, x in buffers.items()}
        for name in self.numbers:
            number = getattr(self, name)
            held[name] = array(number) if isinstance(number, Tensor) else number
        return xp, found, ok, SimpleNamespace(**held)

    def _keep(self, **found: Any) -> None:
        """Put the arrays into the buffers."""
        for name, array in found.items():
            buffer: Any = self._buffers[name]
            if isinstance(array, (np.ndarray, np.generic)):
                buffer.numpy()[...] = array
            else:
                buffer.copy_(array) if isinstance(array, Tensor) else buffer.fill_(array)


class _Plain:
    """What an update takes of numpy and torch, for plain numbers."""

    isfinite = staticmethod(math.isfinite)

    @staticmethod
    def where(condition: bool, this: float, other: float) -> float:
        return this if condition else other

    @staticmethod
    def clip(x: float, low: float, high: float) -> float:
        return min(max(x, low), high)


_ARRAYS: Mapping[Any, Callable[[Tensor], Any]] = {
    _Plain: Tensor.item,
    np: lambda x: as_array(x).astype(np.float64) if x.is_floating_point() else x.numpy(),
    torch: lambda x: x.to(widest(x.device)) if x.is_floating_point() else x,
}


C = TypeVar("C", bound=Controller)


def stack(modules: Sequence[C], device: torch.device | None = None) -> C:
    """Return one module that does what all of these do: numbers and buffers with a leading dimension.

    >>> both = stack([DualAscent(rho=0.5, epsilon=0.1), DualAscent(rho=0.1, epsilon=0.1)])
    >>> both.update(torch.tensor([0.3, 0.3]))
    tensor([0.1000, 0.0200])
    """
    made = copy.deepcopy(modules[0])
    device = device or next(made.buffers()).device
    for name in made.numbers:
        values = [getattr(module, name) for module in modules]
        dtype = widest(device) if any(isinstance(value, float) for value in values) else None
        setattr(made, name, torch.tensor(values, dtype=dtype, device=device))
    for name, _ in list(made.named_buffers()):
        setattr(made, name, torch.stack([getattr(module, name) for module in modules]))
    return made


def unstack(made: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Give the modules the state of the one that :func:`stack` made of them."""
    for name, buffer in made.named_buffers():
        for module, own in zip(modules, buffer):
            getattr(module, name).copy_(own)


class ViolationController(Controller):
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

    Examples
    --------
    >>> controller = ViolationController(target=0.1, step_size=0.5, warmup=0)
    >>> round(controller.update(torch.tensor(0.3)).item(), 6)
    0.11
    """

    numbers: ClassVar[tuple[str, ...]] = ("target", "gain", "minimum", "maximum", "warmup", "smoothing")
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
        self.gain = 0.0 if static else step_size
        self.register_buffer("value", torch.tensor(float(initial)))
        self.register_buffer("smoothed", torch.tensor(0.0))
        self.register_buffer("steps", torch.tensor(0))

    @torch.no_grad()
    def update(self, rate: Tensor, valid: Tensor | None = None) -> Tensor:
        """Take in one step's violation rate (in [0, 1]) and return the new lambda, of its shape, for use in the same step.

        Where ``valid`` (bool) is False, or the rate is not finite, nothing changes: neither lambda nor r~ nor the count of
        warm-up steps.
        """
        xp, rate, ok, n = self._arrays(rate, valid)
        moved = xp.where(n.steps > 0, n.smoothed + n.smoothing * (rate - n.smoothed), rate)
        steps = n.steps + ok
        scaled = xp.clip(n.value * (1 + n.gain * (moved - n.target)), n.minimum, n.maximum)
        self._keep(
            smoothed=xp.where(ok, moved, n.smoothed),
            steps=steps,
            value=xp.where(ok & (steps > n.warmup), scaled, n.value),
        )
        return self.value.clone()

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"target={self.target}, step_size={self.step_size}, initial={self.initial}, minimum={self.minimum}, "
            f"maximum={self.maximum}, warmup={self.warmup}, smoothing={self.smoothing}, static={self.static}"
        )


class ShareController(Controller):
    """Control of the weight of near pairs towards a share of plain training's own inconsistency (METHODS.md, 1.4; ours).

    In the first ``warmup`` valid steps lambda is 0 and the running inconsistency I~ finds its level; then, with
    ``goal = max(share level, floor)``, ``lambda <- clip(lambda (1 + step_size clip(I~ / goal - 1, -1, 1)), lowest, highest)``, both in
    units of ``initial``.

    Raises
    ------
    RecipeError
        A setting out of its range.

    Examples
    --------
    >>> controller = ShareController(share=0.5, step_size=0.1, initial=1.0, warmup=1, smoothing=1.0)
    >>> [round(controller.update(torch.tensor(i)).item(), 6) for i in (0.4, 0.3)]
    [0.0, 1.05]
    """

    numbers: ClassVar[tuple[str, ...]] = (
        "share",
        "floor",
        "step_size",
        "initial",
        "warmup",
        "smoothing",
        "lowest",
        "highest",
    )
    value: Tensor
    smoothed: Tensor
    level: Tensor
    steps: Tensor

    def __init__(
        self,
        share: float,
        floor: float = 0.05,
        step_size: float = 0.02,
        *,
        initial: float = 0.05,
        warmup: int = 100,
        smoothing: float = 0.1,
        lowest: float = 0.2,
        highest: float = 3.0,
    ) -> None:
        super().__init__()
        _require(0 < share <= 1, "ShareController: share", "in (0, 1]", share)
        _require(0 < smoothing <= 1, "ShareController: smoothing", "in (0, 1]", smoothing)
        _require(0 < initial < math.inf, "ShareController: initial", "finite and above 0", initial)
        _require(warmup >= 1, "ShareController: warmup", "at least 1 step", warmup)
        _require(0 < floor <= 1, "ShareController: floor", "in (0, 1]", floor)
        _require(0 < lowest <= 1, "ShareController: lowest", "in (0, 1]", lowest)
        _require(1 <= highest < math.inf, "ShareController: highest", "finite and at least 1", highest)
        self.share, self.floor, self.step_size = share, floor, step_size
        self.initial, self.warmup, self.smoothing = initial, warmup, smoothing
        self.lowest, self.highest = lowest, highest
        for name, start in (("value", initial), ("smoothed", 0.0), ("level", 0.0)):
            self.register_buffer(name, torch.tensor(float(start)))
        self.register_buffer("steps", torch.tensor(0))

    @torch.no_grad()
    def update(self, inconsistency: Tensor, valid: Tensor | None = None, pace: Pace | None = None) -> Tensor:
        """Take in one step's inconsistency and return the lambda to use in it: 0 while warming up. Elsewhere as the others.

        ``pace`` says whether this step is of the warm-up, and the step size, in place of ``warmup`` and ``step_size``.
        """
        xp, found, ok, n = self._arrays(inconsistency, valid)
        smoothed = xp.where(n.steps > 0, n.smoothed + n.smoothing * (found - n.smoothed), found)
        steps = n.steps + ok
        acts = steps > n.warmup if pace is None else (n.steps >= 0) & (not pace.warm)
        level = xp.where(acts, n.level, smoothed)
        goal = xp.where(n.share * level > n.floor, n.share * level, n.floor)
        error = xp.clip(smoothed / goal - 1, -1.0, 1.0)
        gain = n.step_size if pace is None else pace.gain
        moved = xp.clip(n.value * (1 + gain * error), n.lowest * n.initial, n.highest * n.initial)
        self._keep(
            smoothed=xp.where(ok, smoothed, n.smoothed),
            level=xp.where(ok, level, n.level),
            steps=steps,
            value=xp.where(ok & acts, moved, n.value),
        )
        acting = (
            self.steps > self.warmup if pace is None else torch.full_like(self.steps, not pace.warm, dtype=torch.bool)
        )
        return torch.where(acting, self.value, 0.0)


class DualAscent(Controller):
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

    Examples
    --------
    >>> dual = DualAscent(rho=0.5, epsilon=0.1)
    >>> round(dual.update(torch.tensor(0.3)).item(), 6)
    0.1
    """

    numbers: ClassVar[tuple[str, ...]] = ("gain", "epsilon", "minimum", "maximum")
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
        self.gain, self.minimum = 0.0 if static else rho, 0.0
        self.register_buffer("value", torch.tensor(float(initial)))

    @torch.no_grad()
    def update(self, phi: Tensor, present: Tensor | None = None) -> Tensor:
        """Take in one step's disparity Phi and return the new eta, of its shape.

        Where ``present`` (bool: some task had groups to compare) is False, or Phi is not finite, eta stays.
        """
        xp, phi, ok, n = self._arrays(phi, present)
        moved = xp.clip(n.value + n.gain * (phi - n.epsilon), n.minimum, n.maximum)
        self._keep(value=xp.where(ok, moved, n.value))
        return self.value.clone()

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"rho={self.rho}, epsilon={self.epsilon}, initial={self.initial}, maximum={self.maximum}, static={self.static}"


class Pace(NamedTuple):
    """Where a training is.

    ``warm`` while it trains plainly; ``gain`` of a step of log eta after it; ``settled`` in its second half, when multipliers have had
    time; ``patience``: steps that a multiplier stays at its bound for nothing.
    """

    warm: bool
    gain: float
    settled: bool = True
    patience: int = 1

    @classmethod
    def of(cls, step: int, epoch_steps: int, total: int, fastest: float = 0.05) -> Pace:
        """Return the pace of a step (0-based) of ``total``: plain for an epoch or a tenth of the steps, at most a third.

        Examples
        --------
        >>> Pace.of(99, 100, 1000)
        Pace(warm=True, gain=0.015, settled=False, patience=166)
        """
        plain = min(max(epoch_steps, math.ceil(total / 10)), total // 3)
        gain = min(15 / max(total, 1), fastest)
        return cls(step < max(1, plain), gain, 2 * step >= total, max(epoch_steps, total // 6))

    def each(self, steps: int, fastest: float) -> Pace:
        """Return the pace of one move that stands for so many steps."""
        return self._replace(gain=min(steps * self.gain, fastest), patience=max(1, self.patience // steps))


def _require(holds: bool, what: str, expected: str, found: float) -> None:
    if not holds:
        raise RecipeError(f"{what} must be {expected}, found {found}.")
