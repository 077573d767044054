"""LibMTL's own weightings where they fail on today's stack or can hang: the same mathematics, mended.

Each function stands in for a method of the class that its name says (see :mod:`libmtl_fair.libmtl.compat`). The
gradient surgery of PCGrad and GradVac works on the T x T Gram matrix, so that one transfer a step replaces one per pair.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as nnf
from scipy.optimize import minimize
from torch import Tensor

from libmtl_fair.errors import HostError
from libmtl_fair.libmtl.gradients import carry_representation_gradients

Array = npt.NDArray[np.float64]
_TINY = 1e-12


def recorded(self: Any, weights: Tensor) -> Any:
    """Return the step's task weights: on the device for FairTrainer, as numpy for LibMTL's own Trainer."""
    weights = weights.detach()
    return weights if getattr(self, "keeps_weights_on_device", False) else weights.cpu().numpy()


def _need_parameter_gradients(self: Any, name: str) -> None:
    if self.rep_grad:
        raise HostError(f"{name} works on parameter gradients: use rep_grad=False")


def _gram(grads: Tensor) -> Array:
    wide = grads.detach().double()
    return (wide @ wide.T).cpu().numpy()


def _apply(self: Any, coefficients: Array, grads: Tensor) -> None:
    """Set the shared gradients to the sum over tasks of their changed gradients, ``sum_i C_i @ grads``."""
    self._reset_grad(torch.as_tensor(coefficients.sum(0), dtype=grads.dtype, device=grads.device) @ grads)


def ew_backward(self: Any, losses: Tensor, **_: Any) -> Any:
    """Equal weights."""
    torch.autograd.backward(losses.sum())
    carry_representation_gradients(self)
    return recorded(self, torch.ones_like(losses))


def uw_backward(self: Any, losses: Tensor, **_: Any) -> Any:
    """Uncertainty weights (Kendall et al. 2018)."""
    weights = 0.5 * torch.exp(-self.loss_scale)
    torch.autograd.backward((losses * weights + self.loss_scale / 2).sum())
    carry_representation_gradients(self)
    return recorded(self, weights)


def gls_backward(self: Any, losses: Tensor, **_: Any) -> Any:
    """Geometric loss strategy, through logarithms: the product of many small losses underflows."""
    loss = losses.clamp(min=_TINY).log().mean().exp()
    torch.autograd.backward(loss)
    carry_representation_gradients(self)
    return recorded(self, loss / (self.task_num * losses.clamp(min=_TINY)))


def dwa_backward(self: Any, losses: Tensor, **kwargs: Any) -> Any:
    """Dynamic weight average (Liu et al. 2019)."""
    weights = torch.ones_like(losses)
    if self.epoch > 1:
        buffer = np.asarray(self.train_loss_buffer)
        ratio = buffer[:, self.epoch - 1] / np.maximum(buffer[:, self.epoch - 2], _TINY)
        weights = self.task_num * torch.softmax(torch.as_tensor(ratio).to(losses) / kwargs["T"], dim=-1)
    torch.autograd.backward((losses * weights).sum())
    carry_representation_gradients(self)
    return recorded(self, weights)


def gradnorm_backward(self: Any, losses: Tensor, **kwargs: Any) -> Any:
    """GradNorm (Chen et al. 2018); the first epoch sums the losses and sets the reference."""
    if self.epoch < 1:
        return ew_backward(self, losses)
    scale = self.task_num * torch.softmax(self.loss_scale, dim=-1)
    grads = self._get_grads(losses, mode="backward")
    per_grads, grads = grads if self.rep_grad else (None, grads)
    norms = torch.linalg.vector_norm(scale.unsqueeze(1) * grads, dim=-1)
    first = torch.as_tensor(np.maximum(np.asarray(self.train_loss_buffer)[:, 0], _TINY))
    rate = losses.detach() / first.to(losses)
    rate = rate / rate.mean().clamp(min=_TINY)
    target = (norms.mean() * rate ** kwargs["alpha"]).detach()
    torch.autograd.backward((norms - target).abs().sum())
    weights = scale.detach().clone()
    self._backward_new_grads(weights, per_grads=per_grads, grads=grads)
    return recorded(self, weights)


def graddrop_backward(self: Any, losses: Tensor, **kwargs: Any) -> None:
    """GradDrop (Chen et al. 2020); the tasks' batches may differ in size, since the sign is that of the batch's sum."""
    if not self.rep_grad:
        raise HostError("GradDrop works on gradients of the representation: use rep_grad=True")
    leak, reps = kwargs["leak"], [self.rep_tasks[task].detach() for task in self.task_name]
    per_grads = self._compute_grad(losses, mode="backward", rep_grad=True)
    if len({rep.shape[1:] for rep in reps}) > 1:
        raise HostError(f"GradDrop needs representations of one size, found {[tuple(r.shape[1:]) for r in reps]}")
    grads = torch.stack([(grad * rep.sign()).sum(0) for grad, rep in zip(per_grads, reps)])
    positive = 0.5 * (1 + grads.sum(0) / (grads.abs().sum(0) + 1e-7))
    drawn = torch.rand_like(positive)
    mask = (positive > drawn) * (grads > 0) + (positive < drawn) * (grads < 0)
    kept = [grad * (leak + (1 - leak) * m) for grad, m in zip(per_grads, mask)]
    if isinstance(self.rep, dict):
        torch.autograd.backward([self.rep[task] for task in self.task_name], kept)
    else:
        self.rep.backward(torch.stack(kept).sum(0))


def mgda_solution(self: Any, grads: Tensor) -> Tensor:
    """Return the weights [T] of the smallest vector in the convex hull of ``grads`` [T, P].

    Two tasks: LibMTL's closed form with its bounds .001 and .999. More: the exact optimum; LibMTL's own loop does not
    count its rounds and can run for ever.
    """
    gram = grads @ grads.T
    if self.task_num == 1:
        return torch.ones_like(gram[0])
    if self.task_num == 2:
        return _two_tasks(gram)
    from libmtl_fair.functional import min_norm_weights

    return min_norm_weights(gram)


def _two_tasks(gram: Tensor) -> Tensor:
    v11, v12, v22 = gram[0, 0], gram[0, 1], gram[1, 1]
    inner = (v22 - v12) / (v11 + v22 - 2 * v12).clamp(min=_TINY)
    first = torch.where(v12 >= v11, 0.999, torch.where(v12 >= v22, 0.001, inner))
    return torch.stack([first, 1 - first])


def mgda_backward(self: Any, losses: Tensor, **kwargs: Any) -> Any:
    """MGDA (Sener and Koltun 2018)."""
    grads = self._get_grads(losses, mode="backward")
    per_grads, grads = grads if self.rep_grad else (None, grads)
    scaled = self._gradient_normalizers(grads, losses.detach(), ntype=kwargs["mgda_gn"])
    weights = self._find_min_norm_element(scaled).to(grads.dtype)
    self._backward_new_grads(weights, per_grads=per_grads, grads=grads)
    return recorded(self, weights)


def pcgrad_backward(self: Any, losses: Tensor, **_: Any) -> Any:
    """PCGrad (Yu et al. 2020), in the order that Python's ``random`` gives, as LibMTL does."""
    _need_parameter_gradients(self, "PCGrad")
    self._compute_grad_dim()
    grads = self._compute_grad(losses, mode="backward")
    gram = _gram(grads)
    coefficients = np.eye(self.task_num)
    weight = np.ones(self.task_num)
    for i in range(self.task_num):
        order = list(range(self.task_num))
        random.shuffle(order)
        for j in order:
            inner = coefficients[i] @ gram[:, j]
            if inner < 0 and gram[j, j] > 0:
                coefficients[i, j] -= inner / gram[j, j]
                weight[j] -= inner / gram[j, j]
    _apply(self, coefficients, grads)
    return weight


def gradvac_backward(self: Any, losses: Tensor, **kwargs: Any) -> Any:
    """GradVac (Wang et al. 2021), as in LibMTL's package."""
    _need_parameter_gradients(self, "GradVac")
    if not isinstance(getattr(self, "rho_T", None), np.ndarray):
        self.rho_T = np.zeros((self.task_num, self.task_num))
    self._compute_grad_dim()
    grads = self._compute_grad(losses, mode="backward")
    gram = _gram(grads)
    coefficients = np.eye(self.task_num)
    weight = np.ones(self.task_num)
    for i in range(self.task_num):
        order = [j for j in range(self.task_num) if j != i]
        random.shuffle(order)
        for j in order:
            _vaccinate(coefficients[i], gram, self.rho_T, weight, (i, j), kwargs["beta"])
    _apply(self, coefficients, grads)
    return weight


def _vaccinate(row: Array, gram: Array, rho_T: Array, weight: Array, pair: tuple[int, int], beta: float) -> None:
    i, j = pair
    own, other = np.sqrt(max(float(row @ gram @ row), 0.0)), np.sqrt(gram[j, j])
    if own * other <= 0:
        return
    rho, goal = float(np.clip(row @ gram[:, j] / (own * other), -1, 1)), rho_T[i, j]
    if rho < goal:
        slope = np.sqrt(max(1 - goal**2, _TINY))
        w = own * (goal * np.sqrt(1 - rho**2) - rho * slope) / (other * slope)
        row[j] += w
        weight[j] += w
        rho_T[i, j] = (1 - beta) * goal + beta * rho


def cagrad_backward(self: Any, losses: Tensor, **kwargs: Any) -> Any:
    """CAGrad (Liu et al. 2021) for any number of tasks; LibMTL's package reshapes to three."""
    _need_parameter_gradients(self, "CAGrad")
    calpha, rescale = kwargs["calpha"], int(kwargs["rescale"])
    if rescale not in (0, 1, 2):
        raise HostError(f"CAGrad: rescale must be 0, 1 or 2, found {rescale}")
    self._compute_grad_dim()
    grads = self._compute_grad(losses, mode="backward")
    gram = _gram(grads)
    start = np.full(self.task_num, 1 / self.task_num)
    bound = calpha * np.sqrt(gram.mean() + 1e-8) + 1e-8

    def objective(x: Array) -> float:
        return float(x @ gram @ start + bound * np.sqrt(x @ gram @ x + 1e-8))

    simplex = {"type": "eq", "fun": lambda x: 1 - x.sum()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values a rounding error outside of the bounds
        weight = minimize(objective, start, bounds=[(0, 1)] * self.task_num, constraints=simplex).x
    mixed = torch.as_tensor(weight, dtype=grads.dtype, device=grads.device) @ grads
    new = grads.mean(0) + bound / (torch.linalg.vector_norm(mixed) + 1e-8) * mixed
    self._reset_grad(new / (1.0, 1 + calpha**2, 1 + calpha)[rescale])
    return weight


def imtl_backward(self: Any, losses: Tensor, **_: Any) -> Any:
    """IMTL (Liu et al. 2021); linearly dependent gradients get the least-squares solution instead of an error."""
    losses = self.loss_scale.exp() * losses - self.loss_scale
    grads = self._get_grads(losses, mode="backward")
    per_grads, grads = grads if self.rep_grad else (None, grads)
    unit = nnf.normalize(grads, dim=-1, eps=_TINY)
    differences, units = grads[:1] - grads[1:], unit[:1] - unit[1:]
    product = differences @ units.T
    inverse = torch.linalg.pinv(product.nan_to_num(0.0, 0.0, 0.0))  # which fails on what is not finite
    rest = (grads[0] @ units.T) @ inverse.where(product.isfinite().all(), torch.nan)
    weights = torch.cat([1 - rest.sum().unsqueeze(0), rest])
    self._backward_new_grads(weights, per_grads=per_grads, grads=grads)
    return recorded(self, weights)


def aligned_backward(self: Any, losses: Tensor, **_: Any) -> Any:
    """Aligned-MTL (Senushkin et al. 2023), which calls an eigensolver that is gone; without a gradient, equal weights."""
    grads = self._get_grads(losses, mode="backward")
    per_grads, grads = grads if self.rep_grad else (None, grads)
    values, vectors = np.linalg.eigh(_gram(grads))
    kept = values > values.max() * len(values) * np.finfo(np.float32).eps
    alpha = np.ones(len(values))
    if kept.any():
        values, vectors = values[kept], vectors[:, kept]
        alpha = np.sqrt(values.min()) * ((vectors / np.sqrt(values)) @ vectors.T).sum(0)
    weights = torch.as_tensor(alpha, dtype=grads.dtype, device=grads.device)
    self._backward_new_grads(weights, per_grads=per_grads, grads=grads)
    return recorded(self, weights)


def project_numpy(self: Any, v: Array, s: float = 1) -> Array:
    """Euclidean projection on the simplex of radius ``s`` (SDMGrad calls a numpy function that is gone)."""
    v = np.asarray(v, dtype=np.float64)
    u = np.sort(v)[::-1]
    excess = np.cumsum(u) - s
    last = np.nonzero(u * np.arange(1, len(v) + 1) > excess)[0][-1]
    result: Array = (v - excess[last] / (last + 1)).clip(min=0)
    return result
