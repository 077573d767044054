"""LibMTL's own weightings where they fail on today's stack or can hang: the same mathematics, mended.

The gradient surgery of PCGrad and GradVac works on the T x T Gram matrix, so that one transfer a step replaces one a pair.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as nnf
from scipy.optimize import minimize
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.errors import HostError
from libmtl_fair.libmtl.gradients import carry_representation_gradients, mends, whole
from libmtl_fair.libmtl.state import Model

Array: TypeAlias = npt.NDArray[np.float64]
Record: TypeAlias = Tensor | Array
"""The step's task weights [T]: on the device for FairTrainer, as numpy for LibMTL's own Trainer."""
_TINY = 1e-12
UNCARRIED = "rep_grad=True left the encoder without a gradient"
_SYNC = "one device transfer a pair, and parameters without a gradient failed"


def recorded(self: Model, weights: Tensor) -> Record:
    """Return task weights as the trainer wants them."""
    weights = weights.detach()
    return weights if getattr(self, "keeps_weights_on_device", False) else weights.cpu().numpy()


def _descend(self: Model, loss: Tensor, weights: Tensor) -> Record:
    torch.autograd.backward(loss)
    carry_representation_gradients(self)
    return recorded(self, weights)


def _weigh(self: Model, losses: Tensor, solve: Callable[[Tensor], Tensor]) -> Record:
    """Weigh the tasks by what ``solve`` says of their gradients [T, P], or [T, d] of the representation."""
    found = self._get_grads(losses, mode="backward")
    per_grads, grads = found if self.rep_grad else (None, found)
    weights = solve(grads).to(grads.dtype)
    self._backward_new_grads(weights, per_grads=per_grads, grads=grads)
    return recorded(self, weights)


def _parameter_gradients(self: Model, losses: Tensor, name: str) -> Tensor:
    if self.rep_grad:
        raise HostError(f"{name} works on parameter gradients: use rep_grad=False")
    grads: Tensor = self._get_grads(losses, mode="backward")
    return grads


def _gram(grads: Tensor) -> Array:
    wide = grads.detach().double()
    return (wide @ wide.T).cpu().numpy()


def _on_device(weights: Array, grads: Tensor) -> Tensor:
    return torch.as_tensor(weights, dtype=grads.dtype, device=grads.device)


@mends("EW.backward", UNCARRIED)
def ew_backward(self: Model, losses: Tensor, **_: object) -> Record:
    """Equal weights."""
    return _descend(self, losses.sum(), torch.ones_like(losses))


@mends("UW.backward", UNCARRIED)
def uw_backward(self: Model, losses: Tensor, **_: object) -> Record:
    """Uncertainty weights (Kendall et al. 2018)."""
    weights = 0.5 * torch.exp(-self.loss_scale)
    return _descend(self, (losses * weights + self.loss_scale / 2).sum(), weights)


@mends("GLS.backward", f"{UNCARRIED}; the product of many losses underflowed")
def gls_backward(self: Model, losses: Tensor, **_: object) -> Record:
    """Geometric loss strategy, through logarithms: the product of many small losses underflows."""
    loss = losses.clamp(min=_TINY).log().mean().exp()
    return _descend(self, loss, loss / (self.task_num * losses.clamp(min=_TINY)))


@mends("DWA.backward", UNCARRIED)
def dwa_backward(self: Model, losses: Tensor, **kwargs: float) -> Record:
    """Dynamic weight average (Liu et al. 2019)."""
    weights = torch.ones_like(losses)
    if self.epoch > 1:
        buffer = np.asarray(self.train_loss_buffer)
        ratio = buffer[:, self.epoch - 1] / np.maximum(buffer[:, self.epoch - 2], _TINY)
        weights = self.task_num * torch.softmax(torch.as_tensor(ratio).to(losses) / kwargs["T"], dim=-1)
    return _descend(self, (losses * weights).sum(), weights)


@mends("GradNorm.backward", "rep_grad=True froze the encoder in the first epoch")
def gradnorm_backward(self: Model, losses: Tensor, **kwargs: float) -> Record:
    """GradNorm (Chen et al. 2018); the first epoch sums the losses and sets the reference."""

    def solve(grads: Tensor) -> Tensor:
        scale = self.task_num * torch.softmax(self.loss_scale, dim=-1)
        norms = torch.linalg.vector_norm(scale.unsqueeze(1) * grads, dim=-1)
        first = torch.as_tensor(np.maximum(np.asarray(self.train_loss_buffer)[:, 0], _TINY))
        rate = losses.detach() / first.to(losses)
        rate = rate / rate.mean().clamp(min=_TINY)
        target = (norms.mean() * rate ** kwargs["alpha"]).detach()
        torch.autograd.backward((norms - target).abs().sum())
        weights: Tensor = scale.detach()
        return weights

    return ew_backward(self, losses) if self.epoch < 1 else _weigh(self, losses, solve)


@mends("GradDrop.backward", "failed where tasks have batches of their own")
def graddrop_backward(self: Model, losses: Tensor, **kwargs: float) -> None:
    """GradDrop (Chen et al. 2020); the tasks' batches may differ in size, since the sign is that of the batch's sum."""
    if not self.rep_grad:
        raise HostError("GradDrop works on gradients of the representation: use rep_grad=True")
    leak, reps = kwargs["leak"], [self.rep_tasks[task].detach() for task in self.task_name]
    per_grads = self._compute_grad(losses, mode="backward", rep_grad=True)
    if len({rep.shape[1:] for rep in reps}) > 1:
        raise HostError(f"GradDrop needs representations of one size, found {[tuple(r.shape[1:]) for r in reps]}")
    grads = whole(self, torch.stack([(grad * rep.sign()).sum(0) for grad, rep in zip(per_grads, reps)]))
    positive = 0.5 * (1 + grads.sum(0) / (grads.abs().sum(0) + 1e-7))
    drawn = torch.rand_like(positive)
    mask = (positive > drawn) * (grads > 0) + (positive < drawn) * (grads < 0)
    self._backward_new_grads(leak + (1 - leak) * mask, per_grads=per_grads)


@mends("MGDA._find_min_norm_element", "its loop never counted, and could run for ever")
def mgda_solution(self: Model, grads: Tensor) -> Tensor:
    """Return the weights [T] of the smallest vector in the hull of ``grads`` [T, P]; two tasks: LibMTL's own closed form."""
    gram = grads @ grads.T  # not self.task_num: MOML calls an MGDA that is part of no model
    if len(grads) == 1:
        return torch.ones_like(grads[:, 0])
    if len(grads) > 2:
        weights: Tensor = F.min_norm_weights(gram)
        return weights
    v11, v12, v22 = gram[0, 0], gram[0, 1], gram[1, 1]
    inner = (v22 - v12) / (v11 + v22 - 2 * v12).clamp(min=_TINY)
    first = torch.where(v12 >= v11, 0.999, torch.where(v12 >= v22, 0.001, inner))
    return torch.stack([first, 1 - first])


@mends("MGDA.backward", "one device transfer a task")
def mgda_backward(self: Model, losses: Tensor, **kwargs: float) -> Record:
    """MGDA (Sener and Koltun 2018)."""
    found = self._get_grads(losses, mode="backward")
    per_grads, grads = found if self.rep_grad else (None, found)
    scaled = self._gradient_normalizers(grads, losses.detach(), ntype=kwargs["mgda_gn"])
    weights, scaled = self._find_min_norm_element(scaled).to(grads.dtype), scaled.to(grads.dtype)
    self._backward_new_grads(weights, per_grads=per_grads, grads=scaled)  # LibMTL adds up the scaled ones of parameters
    return recorded(self, weights)


@mends("PCGrad.backward", _SYNC)
def pcgrad_backward(self: Model, losses: Tensor, **_: object) -> Record:
    """PCGrad (Yu et al. 2020), in the order that Python's ``random`` gives, as LibMTL does."""

    def share(pair: tuple[int, int], inner: float, own: float, other: float) -> float:
        return -inner / other if inner < 0 < other else 0.0

    return _surgery(self, _parameter_gradients(self, losses, "PCGrad"), share, itself=True)


def gradvac_backward(self: Model, losses: Tensor, **kwargs: float) -> Record:
    """GradVac (Wang et al. 2021), as in LibMTL's package."""
    if not isinstance(getattr(self, "rho_T", None), np.ndarray):
        vars(self)["rho_T"] = np.zeros((self.task_num, self.task_num))
    goals, beta = self.rho_T, kwargs["beta"]

    def share(pair: tuple[int, int], inner: float, own: float, other: float) -> float:
        if own * other <= 0:
            return 0.0
        rho, goal = min(max(inner / math.sqrt(own * other), -1.0), 1.0), float(goals[pair])
        if rho >= goal:
            return 0.0
        goals[pair] = (1 - beta) * goal + beta * rho
        slope = math.sqrt(max(1 - goal**2, _TINY))
        return math.sqrt(own / other) * (goal * math.sqrt(1 - rho**2) - rho * slope) / slope

    return _surgery(self, _parameter_gradients(self, losses, "GradVac"), share, itself=False)


def _surgery(
    self: Model, grads: Tensor, share: Callable[[tuple[int, int], float, float, float], float], itself: bool
) -> Array:
    """Add to each task's gradient a share of each other's, in random order; set and return the weights of their sum.

    ``share`` is asked with the pair (i, j), the inner product of i's changed and j's own gradient, and their squared lengths.
    """
    gram, weights = _gram(grads), np.ones(self.task_num)
    squares = gram.diagonal().tolist()
    for i in range(self.task_num):
        order = [j for j in range(self.task_num) if itself or j != i]
        random.shuffle(order)
        inner, own = gram[i].copy(), squares[i]
        for j in order:
            added = share((i, j), float(inner[j]), own, squares[j])
            if added:
                own = max(own + added * (2 * float(inner[j]) + added * squares[j]), 0.0)
                inner += added * gram[j]
                weights[j] += added
    self._reset_grad(_on_device(weights, grads) @ grads)
    return weights


@mends("CAGrad.backward", "was written for exactly three tasks")
def cagrad_backward(self: Model, losses: Tensor, **kwargs: float) -> Record:
    """CAGrad (Liu et al. 2021) for any number of tasks; LibMTL's package reshapes to three."""
    calpha, rescale = kwargs["calpha"], int(kwargs["rescale"])
    if rescale not in (0, 1, 2):
        raise HostError(f"CAGrad: rescale must be 0, 1 or 2, found {rescale}")
    grads = _parameter_gradients(self, losses, "CAGrad")
    gram = _gram(grads)
    start = np.full(self.task_num, 1 / self.task_num)
    bound = calpha * np.sqrt(gram.mean() + 1e-8) + 1e-8

    def objective(x: Array) -> float:
        return float(x @ gram @ start + bound * np.sqrt(x @ gram @ x + 1e-8))

    simplex = {"type": "eq", "fun": lambda x: 1 - x.sum()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values a rounding error outside of the bounds
        weights: Array = minimize(objective, start, bounds=[(0, 1)] * self.task_num, constraints=simplex).x
    mixed = _on_device(weights, grads) @ grads
    new = grads.mean(0) + bound / (torch.linalg.vector_norm(mixed) + 1e-8) * mixed
    self._reset_grad(new / (1.0, 1 + calpha**2, 1 + calpha)[rescale])
    return weights


@mends("IMTL.backward", "linearly dependent gradients raised")
def imtl_backward(self: Model, losses: Tensor, **_: object) -> Record:
    """IMTL (Liu et al. 2021); linearly dependent gradients get the least-squares solution instead of an error."""

    def solve(grads: Tensor) -> Tensor:
        grads = grads.to(torch.promote_types(grads.dtype, torch.float32))  # half precision has no pseudo-inverse
        unit = nnf.normalize(grads, dim=-1, eps=_TINY)
        differences, units = grads[:1] - grads[1:], unit[:1] - unit[1:]
        product = differences @ units.T
        inverse = torch.linalg.pinv(product.nan_to_num(0.0, 0.0, 0.0))  # which fails on what is not finite
        rest = (grads[0] @ units.T) @ inverse.where(product.isfinite().all(), torch.nan)
        return torch.cat([1 - rest.sum().unsqueeze(0), rest])

    return _weigh(self, self.loss_scale.exp() * losses - self.loss_scale, solve)


@mends("ExcessMTL.backward", "rep_grad=True weighed by zeros and left the encoder without a gradient")
def excess_backward(self: Model, losses: Tensor, **kwargs: float) -> Record:
    """ExcessMTL (He et al. 2024); the first step sets the reference."""
    found = self._get_grads(losses, mode="autograd")
    grads: Tensor = found[1] if self.rep_grad else found
    self.grad_sum = grads**2 + (0 if self.grad_sum is None else self.grad_sum)
    excess = (grads**2 / torch.sqrt(self.grad_sum + 1e-7)).sum(1)
    if self.first_epoch:
        vars(self).update(initial_w=excess, first_epoch=False)
    else:
        grown = self.loss_weight * torch.exp(excess / self.initial_w.clamp(min=_TINY) * kwargs["robust_step_size"])
        self.loss_weight = (grown / grown.sum() * self.task_num).detach()
    return _descend(self, (losses * self.loss_weight).sum(), self.loss_weight)


@mends("Aligned_MTL.backward", "torch.symeig is gone")
def aligned_backward(self: Model, losses: Tensor, **_: object) -> Record:
    """Aligned-MTL (Senushkin et al. 2023), which calls an eigensolver that is gone; without a gradient, equal weights."""

    def solve(grads: Tensor) -> Tensor:
        values, vectors = np.linalg.eigh(_gram(grads))
        kept = values > values.max() * len(values) * np.finfo(np.float32).eps
        if not kept.any():
            return torch.ones_like(grads[:, 0])
        values, vectors = values[kept], vectors[:, kept]
        return _on_device(np.sqrt(values.min()) * ((vectors / np.sqrt(values)) @ vectors.T).sum(0), grads)

    return _weigh(self, losses, solve)


@mends("SDMGrad.euclidean_proj_simplex", "numpy.alltrue is gone")
def project_numpy(self: Model, v: Array, s: float = 1) -> Array:
    """Euclidean projection on the simplex of radius ``s`` (SDMGrad calls a numpy function that is gone)."""
    scaled = torch.as_tensor(np.asarray(v, dtype=np.float64) / s)
    return s * F.project_to_simplex(scaled).numpy()
