"""LambdaMix: one number between the main tasks and their auxiliary fairness tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import HostError, RecipeError
from libmtl_fair.libmtl.parts import linearised, part_of
from libmtl_fair.methods.base import FairWeighting, Settings, setting
from libmtl_fair.tasks import AUXILIARY_PREFIX


class LambdaMixSettings(Settings):
    """Hyperparameters of :class:`LambdaMix` (methods.md, 4); the base is the weighting inside each of the two sums."""

    aliases: ClassVar[Mapping[str, str]] = {"lambda": "lam"}

    lam: float = setting(
        0.5,
        "lambda, the share of the main tasks; 1 trains without fairness. With target main and conditional start at 0.85 for "
        "gap, at 0.95 for glf and at 0.5 for gld, try values on both sides, and choose on validation data: "
        "``libmtl-fair compare --choose``",
        expected="lambda, a number in [0, 1]",
        ge=0,
        le=1,
        search=(0.5, 1.0),
    )


class LambdaMix(FairWeighting):
    r"""Main and fairness losses in a fixed proportion.

    The objective is :math:`\lambda \sum_k L_k + (1 - \lambda) \sum_s L_s`, s over the fairness heads.
    With a ``base`` the sums are what that weighting makes of them **(ours)**: it runs on the main tasks and on the
    fairness tasks apart, each with a state of its own, and the gradients that it leaves are mixed by lambda. (Run over
    all tasks at once, a weighting that evens out scales, such as UW, would undo lambda.) A sum of one loss is itself.
    Source: GLF.

    Records each step: ``main`` and ``fair``, the plain sums.
    """

    settings_class = LambdaMixSettings
    source = "GLF, under review"
    settings: LambdaMixSettings
    scale: Tensor

    def init_param(self) -> None:
        """Leave the base's parameters to the parts."""
        self.trace = {}

    def configure(self, settings: Settings) -> None:
        """Split the tasks and make a base weighting for each side.

        Raises
        ------
        RecipeError : no auxiliary fairness task.
        HostError : a base together with ``rep_grad=True``.
        """
        super().configure(settings)
        fair = [name for name in self.task_name if name.startswith(AUXILIARY_PREFIX)]
        main = [name for name in self.task_name if name not in fair]
        if not fair:
            raise RecipeError(
                "LambdaMix mixes main tasks with auxiliary fairness tasks, and there is none: add them with "
                "lf.add_fairness_heads, or in a recipe with heads: {loss: glf}"
            )
        self._rows = [[self.task_name.index(name) for name in side] for side in (main, fair)]
        scale = [self.settings.lam if name in main else 1 - self.settings.lam for name in self.task_name]
        self.register_buffer("scale", torch.tensor(scale, device=self.device), persistent=False)
        self.plain = self.settings.base == "EW"
        if self.plain:
            return
        if self.rep_grad:
            raise HostError("LambdaMix: a base other than 'EW' works on parameter gradients: use rep_grad=False")
        self.sides = torch.nn.ModuleList(
            part_of(self, self.settings.base if len(side) > 1 else "EW", side, self._args(side))
            for side in (main, fair)
        )
        if any(hasattr(side, "update_w") for side in self.sides):  # FAMO, which looks at the losses after the step
            self.__dict__["update_w"] = self._update_sides

    def _update_sides(self, losses: Tensor) -> None:
        for side, rows in zip(self.sides, self._rows):
            update: Any = getattr(side, "update_w", None)
            if update is not None:
                update(losses[rows])

    def _args(self, side: list[str]) -> Any:
        return self.settings.base_args if len(side) > 1 else {}

    def step(self, batch: FairBatch, losses: Tensor) -> Any:
        """Leave the gradient of the mix; return the tasks' weights, lambda times those of the base."""
        main, fair = (losses.detach()[rows] for rows in self._rows)
        self.trace = {"main": main.sum(), "fair": fair.sum()}
        if self.plain:
            self.base_backward(losses * self.scale.to(losses.dtype))
            return self.scale
        return self._mixed(losses)

    def _mixed(self, losses: Tensor) -> Tensor:
        """Let each side's base leave its gradient, the fairness side first and on a graph of its own; mix the two."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        main, fair = self._rows
        weights = torch.full_like(self.scale, torch.nan)
        total: list[Tensor | None] = [None] * len(parameters)
        apart = linearised(losses[fair], parameters)
        for side, rows, part_losses in ((1, fair, apart), (0, main, losses[main])):
            part: Any = self.sides[side]
            share = 1 - self.settings.lam if side else self.settings.lam
            found = part.backward(part_losses, **part.args)
            if found is not None:
                weights[rows] = share * torch.as_tensor(found).to(weights)
            for i, p in enumerate(parameters):
                if p.grad is not None:
                    held = total[i]
                    total[i] = share * p.grad if held is None else torch.add(held, p.grad, alpha=share)
                p.grad = None
        for p, grad in zip(parameters, total):
            p.grad = grad
        return weights
