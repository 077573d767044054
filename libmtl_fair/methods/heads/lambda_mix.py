"""LambdaMix: one number between the main tasks and their auxiliary fairness tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import HostError, RecipeError
from libmtl_fair.libmtl.gradients import need_visible
from libmtl_fair.libmtl.parts import linearised, part_of
from libmtl_fair.methods.base import FairWeighting, Settings, setting
from libmtl_fair.tasks import AUXILIARY_PREFIX, MAIN_SHARE


class LambdaMixSettings(Settings):
    """Hyperparameters of :class:`LambdaMix` (METHODS.md, 4); the base is the weighting inside each of the two sums."""

    aliases: ClassVar[Mapping[str, str]] = {"lambda": "lam"}

    lam: float | None = setting(
        None,
        "lambda, the share of the main tasks; 1 trains without fairness. null is 0.98, of gap and lift heads 0.99, of gld 0.9, as "
        "measured for heads that repeat the main ones within classes (target main, conditional); as published, with target "
        "label, it is 0.5. Smaller values can collapse the model: choose on validation data, ``libmtl-fair compare --choose``",
        expected="lambda, a number in [0, 1]",
        ours=True,
        ge=0,
        le=1,
        search=(0.9, 0.999),
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
    needs_known_kinds = True
    source = "GLF, under review"
    settings: LambdaMixSettings
    lam: float
    needs_representation = False
    scale: Tensor
    main: Tensor
    fair: Tensor

    def init_param(self) -> None:
        """Leave the base's parameters to the parts."""
        self.trace = {}

    def configure(self, settings: Settings) -> None:
        """Split the tasks and make a base weighting for each side.

        Raises
        ------
        RecipeError
            No auxiliary fairness task.
        HostError
            A base together with ``rep_grad=True``.
        """
        super().configure(settings)
        fair = [name.startswith(AUXILIARY_PREFIX) for name in self.task_name]
        if not any(fair):
            raise RecipeError(
                "LambdaMix mixes main tasks with auxiliary fairness tasks, and there is none: add them with "
                "lf.add_fairness_heads, or in a recipe with heads: {loss: glf}"
            )
        lam, base = self.settings.lam, self.settings.base
        if lam is None:
            lam = max((task.main_share for task in getattr(self, "auxiliary_tasks", ())), default=MAIN_SHARE)
        self.lam = lam
        rows = [[t for t, other in enumerate(fair) if other is side] for side in (False, True)]
        values = {"main": rows[0], "fair": rows[1], "scale": [float(1 - lam if side else lam) for side in fair]}
        for name, value in values.items():
            self.register_buffer(name, torch.tensor(value, device=self.device), persistent=False)
        if base == "EW":
            return
        if self.rep_grad:
            raise HostError("LambdaMix: a base other than 'EW' works on parameter gradients: use rep_grad=False")
        sides = [[self.task_name[t] for t in side] for side in rows]
        self.sides = torch.nn.ModuleList(
            part_of(self, base, side, self.settings.base_args) if len(side) > 1 else part_of(self, "EW", side, {})
            for side in sides
        )
        if any(hasattr(side, "update_w") for side in self.sides):  # FAMO, which looks at the losses after the step
            self.__dict__["update_w"] = self._update_sides

    def _update_sides(self, losses: Tensor) -> None:
        side: Any
        for side, rows in zip(self.sides, (self.main, self.fair)):
            if hasattr(side, "update_w"):
                side.update_w(losses[rows])

    def step(self, batch: FairBatch, losses: Tensor) -> Tensor:
        """Leave the gradient of the mix; return the tasks' weights, lambda times those of the base."""
        self.trace = {name: losses.detach().index_select(0, getattr(self, name)).sum() for name in ("main", "fair")}
        if self.settings.base != "EW":
            return self._mixed(losses[self.main], losses[self.fair])
        self.base_backward(losses * self.scale.to(losses.dtype))
        return self.scale

    def _mixed(self, main: Tensor, fair: Tensor) -> Tensor:
        """Let each side's base leave its gradient, the fairness side first and on a graph of its own; mix the two."""
        need_visible(self, main)
        parameters = [p for p in self.parameters() if p.requires_grad]
        weights = torch.full_like(self.scale, torch.nan)
        total: list[Tensor | None] = [None] * len(parameters)
        lam, (main_side, fair_side) = self.lam, self.sides
        part: Any
        sides = ((fair_side, self.fair, linearised(fair, parameters), 1 - lam), (main_side, self.main, main, lam))
        for part, rows, losses, share in sides:
            found = part.backward(losses, **part.args)
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
