"""Automatic mixed precision: the encoder in half precision, everything that is measured or solved in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from libmtl_fair.errors import RecipeError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_GROW_AFTER = 2000
_LARGEST = 2.0**24
Made = TypeVar("Made")


def in_full(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within it nothing is computed in half precision, whatever ``torch.autocast`` a loop of one's own is in."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class Precision:
    """Runs an encoder under ``torch.autocast``; what it returns is float32, and so are heads, losses and all that methods do.

    With ``fp16`` gradients are scaled where they enter the encoder and scaled back where they reach its parameters, so that
    nobody else sees the scale: a weighting's gradients, norms and solutions are those without it. A step with a gradient that
    is not finite is left out and halves the scale; 2000 good ones in a row double it (Micikevicius et al. 2018). That asks the
    device once a step; ``bf16`` never does.

    Parameters
    ----------
    kind : str
        ``"bf16"`` or ``"fp16"``.
    device : torch.device
        Where the model is.
    scale : float, default 65536
        Of ``fp16``, at first.

    Raises
    ------
    RecipeError
        Another kind.
    """

    def __init__(self, kind: str, device: torch.device, scale: float = 65536.0) -> None:
        if kind not in DTYPES:
            raise RecipeError(f"amp must be 'bf16', 'fp16' or None, found {kind!r}")
        self.kind, self.device = kind, device
        self.scale, self.good = scale, 0

    def run(self, encoder: Callable[..., Made], *args: object) -> Made:
        """Return what an encoder returns, its tensors as float32; one tensor that stands twice stays one."""
        with torch.autocast(self.device.type, DTYPES[self.kind]):
            out = encoder(*args)
        full: Made = self._full(out, {})
        return full

    def _full(self, value: Any, known: dict[int, Tensor]) -> Any:
        if isinstance(value, Mapping):
            return {key: self._full(part, known) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._full(part, known) for part in value)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if id(value) not in known:
            known[id(value)] = self._out(value)
        return known[id(value)]

    def _out(self, value: Tensor) -> Tensor:
        full = value.float() if value.dtype is not torch.float32 else value.view_as(value)
        if self.kind == "bf16" or not full.requires_grad:
            return full
        full.register_hook(_Times(self, up=True))  # type: ignore[no-untyped-call]
        return full.view_as(full)  # whose own gradient is without the scale

    def watch(self, encoder: nn.Module) -> None:
        """Let the gradients of an encoder's parameters be scaled back; those that are watched stay as they are."""
        for p in encoder.parameters() if self.kind == "fp16" else ():
            watched = any(isinstance(hook, _Times) for hook in (p._backward_hooks or {}).values())
            if p.requires_grad and not watched:
                p.register_hook(_Times(self, up=False))  # type: ignore[no-untyped-call]

    def admits(self, parameters: list[Tensor]) -> bool:
        """Return whether all gradients are finite, so that the step may be taken; moves the scale."""
        if self.kind == "bf16":
            return True
        grads = [p.grad for p in parameters if p.grad is not None]
        fine = not grads or bool(torch.stack(torch._foreach_norm(grads)).isfinite().all())
        self.good = self.good + 1 if fine else 0
        if not fine:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good % _GROW_AFTER == 0:
            self.scale = min(self.scale * 2, _LARGEST)
        return fine

    def state_dict(self) -> dict[str, float]:
        """Return the scale, and the good steps since it was halved."""
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.scale, self.good = state["scale"], int(state["good"])


class _Times:
    """A hook that scales a gradient up, or back down."""

    __torch_unserializable__ = True

    def __init__(self, precision: Precision, up: bool) -> None:
        self.precision, self.up = precision, up

    def __call__(self, grad: Tensor) -> Tensor:
        return grad * (self.precision.scale if self.up else 1 / self.precision.scale)


def encode(model: nn.Module, encoder: Callable[..., Made], *args: object) -> Made:
    """Run a model's encoder: in training under its precision, where it has one."""
    precision: Precision | None = getattr(model, "precision", None)
    if precision is None or not model.training:
        return encoder(*args)
    precision.watch(model.encoder)  # type: ignore[arg-type]
    return precision.run(encoder, *args)
