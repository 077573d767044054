"""A member of a stack: its trainer, its random draws, its learning rates, and what its fairness method asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from libmtl_fair.batch import Columns
from libmtl_fair.errors import HostError
from libmtl_fair.libmtl import FairTrainer
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl.optimizers import make_scheduler
from libmtl_fair.methods.base import FairWeighting


class Member:
    """One training among those of a stack.

    Random draws (dropout, prototypes) come from a generator of its own, in the order in which it would draw them alone.
    """

    def __init__(self, trainer: FairTrainer) -> None:
        self.trainer = trainer
        self.device = trainer.device
        self.seed = trainer.seed or 0
        self.generator = torch.Generator(self.device).manual_seed(self.seed + 1)  # as a trainer does
        rates = [module.p for module in trainer.model.encoder.modules() if isinstance(module, nn.Dropout)]
        self.dropout = float(rates[0]) if rates else 0.0
        self.plain = trainer.weighting == "EW" and not trainer.auxiliary
        self._schedule = _schedule(trainer)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within it, torch's global generator is the member's own."""
        default = _default(self.device)
        held = default.get_state()
        default.set_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(default.get_state())
            default.set_state(held)

    def logit_gradients(
        self, z: Tensor, h: Tensor, labels: dict[str, Any], groups: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of this step's objective to the logits [B, C] and, past the heads, to h [B, d].

        The member's own weighting computes them, on logits and representations cut off from what made them.
        """
        trainer, model = self.trainer, self.trainer.model
        z, h = z.clone().requires_grad_(), h.detach().requires_grad_()
        own = tuple(name for name in trainer.task_name if type(model.decoders[name]) is nn.Linear)
        others = {name: model.decoders[name](h) for name in trainer.auxiliary if name not in own}
        made = stepping.made_of(trainer, Columns(own, z, [1] * len(own), others), labels, groups)
        if isinstance(model, FairWeighting):
            model.fair_batch = stepping.fair_batch(trainer, made, trainer.epoch, h)
        with self.drawing():
            model.backward(made.losses, **trainer.weight_args)
        trainer.global_step += 1
        return torch.zeros_like(z) if z.grad is None else z.grad, h.grad

    def end_epoch(self) -> float:
        """Count an epoch; return the learning rate of the next.

        Raises
        ------
        HostError : the method asked for a gradient to the weights themselves.
        """
        trainer = self.trainer
        if any(p.grad is not None for p in trainer.model.parameters()):
            raise HostError(
                f"{trainer.weighting} uses the model's weights, and a stack has gradients of the batch alone: leave --stacked out"
            )
        trainer.model.after_epoch(trainer, trainer.epoch)
        trainer.epoch += 1
        if self._schedule is None:
            return float(trainer.optimizer.param_groups[0]["lr"])
        self._schedule.optimizer.step()
        self._schedule.step()
        return float(self._schedule.get_last_lr()[0])


def _default(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _schedule(trainer: FairTrainer) -> Any:
    """Return a scheduler that only counts: of an optimiser without real parameters."""
    if trainer.scheduler is None:
        return None
    rate = float(trainer.optimizer.param_groups[0].get("initial_lr", trainer.optimizer.param_groups[0]["lr"]))
    return make_scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate), trainer.scheduler_param)
