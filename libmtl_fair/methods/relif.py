"""ReLiF: a Lipschitz regulariser across tasks whose strength a controller keeps at a target violation rate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from libmtl_fair.batch import FairBatch
from libmtl_fair.functional._prototypes import PROTOTYPES
from libmtl_fair.libmtl.gradients import add_gradients, extra_gradients
from libmtl_fair.methods.base import FairWeighting, Settings, setting
from libmtl_fair.methods.controllers import ViolationController
from libmtl_fair.methods.lipschitz_term import HostLipschitz, Lipschitz, LipschitzTerm

_sigmoid_backward = torch.ops.aten.sigmoid_backward.default

PAPER: Mapping[str, Any] = {
    "prototypes": "confident",
    "k": 8,
    "target": 0.24,
    "eta": 1e-3,
    "lambda_max": 1.0,
    "task_pairs": None,
}
"""The published settings (NYUv2; for eICU the target is 0.16). ``preset="paper"`` puts them under those given."""


class ReLiFSettings(Settings):
    """Hyperparameters of :class:`ReLiF` (methods.md, 1.2)."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}

    preset: str | None = setting(
        None, '``"paper"`` takes the published settings for what is not given; None takes ours'
    )
    prototypes: str = setting(
        "random", "which examples of a task are compared; published: confident", ours=True, choices=PROTOTYPES
    )
    k: int | None = setting(
        None,
        "prototypes a task and step; default 64 (random) or 8 (confident)",
        ours=True,
        expected="a whole number of at least 1",
        ge=1,
        search=(16, 128, "log"),
    )
    target: float = setting(
        0.10, "violation rate r* that the controller aims at", ours=True, ge=0, le=1, search=(0.01, 0.2, "log")
    )
    eta: float = setting(0.02, "step of the controller", ours=True, ge=0, search=(0.01, 0.3, "log"))
    lambda_min: float = setting(0.01, "least weight of the regulariser")
    lambda_max: float = setting(10.0, "largest weight of the regulariser", ours=True, search=(1.0, 20.0, "log"))
    lambda_0: float = setting(0.1, "weight of the regulariser at the start")
    warmup: int = setting(100, "steps before the controller acts", expected=">= 0 steps", ge=0)
    rate_ema: float = setting(0.1, "share of the new value in the running rate", gt=0, le=1)
    scale_ema: float = setting(0.1, "share of the new value in the running scales", gt=0, le=1)
    beta: float = setting(0.1, "of the Huber gap", expected="above 0", gt=0, search=(0.05, 0.5, "log"))
    mu: float = setting(0.05, "of the huberised hinge", expected="above 0", gt=0)
    quantile: float = setting(0.95, "of gaps and distances, which sets the scales", gt=0, le=1)
    scaling: bool = setting(True, "False is the ablation tau = kappa = 1")
    control: bool = setting(True, "False is the ablation with static lambda = ``lambda_0``")
    lipschitz: bool = setting(True, "False is the ablation without the term; the rates are still recorded")
    detach_distance: bool = setting(False, "no gradient through distances; can collapse the model")
    task_pairs: int | None = setting(
        3,
        "task pairs compared a step, drawn anew each time, so that a step's cost does not grow with T (T - 1) / 2; "
        "three tasks have three. None compares all, as published",
        ours=True,
        ge=1,
    )

    def check(self) -> None:
        """Check what concerns several settings."""
        if self.control and not 0 <= self.lambda_min <= self.lambda_0 <= self.lambda_max:
            ends = f"lambda_min={self.lambda_min} and lambda_max={self.lambda_max}"
            raise self.refused("lambda_0", f"lambda_0 must be between {ends}, found {self.lambda_0!r}")
        self.controller()
        if self.detach_distance:
            warnings.warn(
                "ReLiF: detach_distance=True can collapse the model: the gap scale shrinks with the gaps", stacklevel=3
            )

    @property
    def prototypes_per_task(self) -> int:
        """Number of prototypes a task and step."""
        return self.k or (64 if self.prototypes == "random" else 8)

    def controller(self) -> ViolationController:
        """Return the controller of lambda."""
        return ViolationController(
            self.target,
            self.eta,
            initial=self.lambda_0,
            minimum=self.lambda_min if self.control else min(self.lambda_min, self.lambda_0),
            maximum=self.lambda_max if self.control else max(self.lambda_max, self.lambda_0),
            warmup=self.warmup,
            smoothing=self.rate_ema,
            static=not self.control,
        )


class ReLiF(FairWeighting):
    r"""Controlled Lipschitz regulariser: examples that are near in representation get near scores, across tasks.

    The objective is :math:`L_{MTL} + \lambda L_{lip}` with
    :math:`L_{lip} = \mathrm{mean}\, \phi_\mu(\rho_\beta(\Delta s)/\tau - d/\kappa)` over cross-task prototype pairs, and
    :math:`\lambda \leftarrow \mathrm{clip}(\lambda (1 + \eta (\tilde r - r^*)))` where :math:`\tilde r` is the running
    share of pairs whose margin is positive. Source: arXiv:2606.10632; random prototypes and their defaults are ours.

    Records each step: ``lambda``, ``r`` (this step's violation rate), ``r_smooth``, ``tau``, ``kappa``, ``lipschitz``.
    """

    settings_class = ReLiFSettings
    source = "arXiv:2606.10632"
    settings: ReLiFSettings

    def configure(self, settings: Settings) -> None:
        """Make the controller and the term with its running scales."""
        super().configure(settings)
        self.controller = self.settings.controller()
        self.term = LipschitzTerm(self.settings)
        self.to(self.device)

    def step(self, batch: FairBatch, losses: Tensor) -> Any:
        """Add lambda times the Lipschitz term to the tasks' losses, or to the gradient of the base weighting."""
        alone = self.settings.base == "EW" and self.settings.lipschitz and not self.rep_grad
        if alone:
            found = self.term.on_host(batch)
            if found is not None:
                self._descend(batch, losses, found)
                return None
        term = self.penalty(batch)
        if not self.settings.lipschitz:
            return self.base_backward(losses)
        if alone:
            torch.autograd.backward(losses.sum() + term)
            return None
        extra = extra_gradients(self, term)
        weights = self.base_backward(losses)
        add_gradients(extra)
        return weights

    def _descend(self, batch: FairBatch, losses: Tensor, found: HostLipschitz) -> None:
        """Leave the gradient of the sum of the losses and lambda times the term, in one pass."""
        strength = self.controller.update_number(found.rate)
        self.__dict__["trace"] = {
            "lambda": strength,
            "r": found.rate,
            "r_smooth": float(self.controller.smoothed),
            "tau": found.tau,
            "kappa": found.kappa,
            "lipschitz": found.value,
        }
        pairs, embedding = found.pairs, batch.embedding
        move = embedding.requires_grad and not self.settings.detach_distance
        matrices = batch.main_matrices if batch.standard_losses else None
        to_picked, to_embedding = pairs.gradients(strength, move)
        if matrices is not None:
            to_logits = _sigmoid_backward(to_picked, pairs.picked)
            grad = matrices.loss_gradient(pairs.scores)
            grad.view(-1).index_add_(0, pairs.at, to_logits)
            roots: list[Tensor] = [matrices.logits]
            grads: list[Tensor] = [grad]
        else:
            grad = torch.zeros_like(pairs.scores)
            grad.view(-1).index_add_(0, pairs.at, to_picked)
            roots, grads = [losses, batch.score_matrix], [torch.ones_like(losses), grad.T]
        if to_embedding is not None:
            roots.append(embedding)
            grads.append(to_embedding)
        torch.autograd.backward(roots, grads)

    def penalty(self, batch: FairBatch) -> Tensor:
        """Return lambda times L_lip (scalar, 0 without a finite pair) after moving scales and controller."""
        found: Lipschitz = self.term(batch)
        strength = self.controller.update(found.rate, found.some)
        self.trace = {
            "lambda": strength,
            "r": torch.where(found.some, found.rate, torch.nan),
            "r_smooth": self.controller.smoothed.clone(),
            "tau": found.tau,
            "kappa": found.kappa,
            "lipschitz": torch.where(found.some, found.value.detach(), torch.nan),
        }
        return strength.to(found.value.dtype) * found.value
