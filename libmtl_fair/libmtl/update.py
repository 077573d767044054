"""What happens between a step's gradients and the optimiser: accumulation, clipping, and a refusal of gradients that overflowed."""

from __future__ import annotations

import torch
from torch import Tensor

from libmtl_fair.errors import RecipeError
from libmtl_fair.libmtl.precision import Precision


class Update:
    """Collects the gradients of ``accumulate`` batches, clips their mean and lets the optimiser step.

    Every batch is a step of the weighting: its gradients, multipliers and task weights are those of that batch.

    Parameters
    ----------
    accumulate : int, default 1
        Batches of one update; the last update of an epoch may have fewer.
    clip_norm : float, optional
        Gradients whose joint Euclidean norm is larger are scaled down to it.
    precision : Precision, optional
        Refuses updates with gradients that are not finite.

    Raises
    ------
    RecipeError
        A number out of range.
    """

    def __init__(self, accumulate: int = 1, clip_norm: float | None = None, precision: Precision | None = None) -> None:
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise RecipeError(f"accumulate must be a whole number of batches, at least 1, found {accumulate!r}")
        number = isinstance(clip_norm, (int, float)) and not isinstance(clip_norm, bool)
        if clip_norm is not None and not (number and 0 < clip_norm < float("inf")):
            raise RecipeError(f"clip_norm must be a number above 0, or None, found {clip_norm!r}")
        self.accumulate, self.clip_norm, self.precision = accumulate, clip_norm, precision
        self._held: dict[Tensor, Tensor] = {}
        self._count = 0

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients of one batch; step where the update is complete."""
        if self.accumulate > 1:
            for p in _parameters(optimizer):
                if p.grad is not None:
                    self._held[p] = p.grad.clone() if p not in self._held else self._held[p].add_(p.grad)
        self._count += 1
        if self._count == self.accumulate:
            self.finish(optimizer)

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        """Step with what has been collected; nothing where there is nothing."""
        if not self._count:
            return
        parameters = _parameters(optimizer)
        if self.accumulate > 1:
            for p in parameters:
                p.grad = self._held[p].div_(self._count) if p in self._held else None
        self.forget()
        if self.precision is not None and not self.precision.admits(parameters):
            return
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        optimizer.step()

    def forget(self) -> None:
        """Drop what has been collected."""
        self._held, self._count = {}, 0


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
