"""Gradients per task, as LibMTL's weightings ask for them, mended for today's PyTorch.

These functions stand in for methods of ``AbsWeighting`` and ``AbsArchitecture`` (see :mod:`libmtl_fair.libmtl.compat`);
``self`` is the LibMTL model. Shapes: T tasks, P shared parameters in all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from libmtl_fair.errors import HostError


def shared_parameters(model: Any) -> list[Tensor]:
    """Return the shared parameters that can be trained, as a list."""
    return [p for p in model.get_share_params() if p.requires_grad]


def own_parameters(model: Any) -> list[Tensor]:
    """Return the parameters that are not shared: heads, gates, and those of the weighting."""
    shared = {id(p) for p in model.get_share_params()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in shared]


def compute_grad_dim(self: Any) -> None:
    """Set the sizes of the shared parameters; anew each time, since a branching model changes them."""
    self.grad_index = [p.numel() for p in shared_parameters(self)]
    self.grad_dim = sum(self.grad_index)


def grad2vec(self: Any) -> Tensor:
    """Return the gradients of the shared parameters as one vector [P], zeros where there is none."""
    return flatten([p.grad for p in shared_parameters(self)], shared_parameters(self))


def flatten(grads: list[Tensor | None], parameters: list[Tensor]) -> Tensor:
    """Join gradients to one vector; a missing one counts as zeros. No parameter at all: an empty vector."""
    if not parameters:
        return torch.zeros(0)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, parameters)])


def reset_grad(self: Any, new_grads: Tensor) -> None:
    """Put the vector ``new_grads`` [P] into the gradients of the shared parameters."""
    parameters = shared_parameters(self)
    for parameter, part in zip(parameters, torch.split(new_grads, [p.numel() for p in parameters])):
        parameter.grad = part.reshape(parameter.shape).clone()


def compute_grad(self: Any, losses: Tensor, mode: str, rep_grad: bool = False) -> Tensor | list[Tensor]:
    """Return each task's gradient of the shared parameters [T, P], or of the representation if ``rep_grad``.

    With ``mode="backward"`` every other parameter (heads, gates) accumulates its own gradient, as LibMTL does.
    """
    if mode not in ("backward", "autograd"):
        raise HostError(f"gradient mode must be 'backward' or 'autograd', found {mode!r}")
    return _representation_grads(self, losses) if rep_grad else _parameter_grads(self, losses, mode)


def _parameter_grads(self: Any, losses: Tensor, mode: str) -> Tensor:
    shared = shared_parameters(self)
    own = own_parameters(self) if mode == "backward" else []
    rows = []
    for t in range(self.task_num):
        keep = mode == "autograd" or t + 1 < self.task_num or _draws_several_batches(self)
        grads = torch.autograd.grad(losses[t], shared + own, retain_graph=keep, allow_unused=True)
        rows.append(flatten(list(grads[: len(shared)]), shared))
        for parameter, grad in zip(own, grads[len(shared) :]):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    return torch.stack(rows)


def _draws_several_batches(model: Any) -> bool:
    """Whether the losses of several batches hang on one graph (LibMTL's git main): freeing one would free all."""
    return any(base.__name__ in ("MoDo", "SDMGrad") for base in type(model).__mro__)


def _representation_grads(self: Any, losses: Tensor) -> Tensor | list[Tensor]:
    grads = []
    for t, task in enumerate(self.task_name):
        torch.autograd.backward(losses[t], retain_graph=t + 1 < self.task_num)
        leaf = self.rep_tasks[task]
        grads.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach().clone())
    return grads if isinstance(self.rep, dict) else torch.stack(grads)


def get_grads(self: Any, losses: Tensor, mode: str = "backward") -> Any:
    """Return [per-example gradients, gradients [T, d]] of the representation, or gradients [T, P] of the parameters."""
    if not self.rep_grad:
        self._compute_grad_dim()
        return self._compute_grad(losses, mode)
    per_grads = self._compute_grad(losses, mode, rep_grad=True)
    rows = [g.sum(0).flatten() for g in per_grads]
    if len({len(r) for r in rows}) > 1:
        sizes = {task: len(r) for task, r in zip(self.task_name, rows)}
        raise HostError(
            f"rep_grad=True: the tasks' representations differ in size {sizes}; this weighting needs one size"
        )
    return [per_grads, torch.stack(rows)]


def backward_new_grads(self: Any, batch_weight: Tensor, per_grads: Any = None, grads: Tensor | None = None) -> None:
    """Give the shared parameters the sum of the tasks' gradients, weighted by ``batch_weight`` [T]."""
    if not self.rep_grad:
        assert grads is not None
        self._reset_grad(batch_weight.to(grads.dtype) @ grads)
    elif isinstance(self.rep, dict):
        parts = [w * g for w, g in zip(batch_weight, per_grads)]
        torch.autograd.backward([self.rep[task] for task in self.task_name], parts)
    else:
        self.rep.backward(torch.einsum("t,t...->...", batch_weight.to(per_grads.dtype), per_grads))


def carry_representation_gradients(self: Any) -> None:
    """After a plain ``loss.backward()`` under ``rep_grad=True``: carry what reached the representation to the encoder."""
    if not self.rep_grad:
        return
    leaves = {task: self.rep_tasks[task].grad for task in self.task_name if self.rep_tasks[task].grad is not None}
    if not leaves:
        return
    if isinstance(self.rep, dict):
        torch.autograd.backward([self.rep[task] for task in leaves], list(leaves.values()))
    else:
        self.rep.backward(torch.stack(list(leaves.values())).sum(0))


def extra_gradients(model: Any, term: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (parameter, gradient) of a term that is added to the tasks' losses; keeps the graph.

    Under ``rep_grad=True`` what reaches the detached representations is carried on to the encoder.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    leaves = list(model.rep_tasks.values()) if model.rep_grad else []
    found = torch.autograd.grad(term, parameters + leaves, retain_graph=True, allow_unused=True)
    grads = list(found[: len(parameters)])
    reached = (
        [(task, g) for task, g in zip(model.rep_tasks, found[len(parameters) :]) if g is not None] if leaves else []
    )
    if reached:
        reps = [model.rep[task] if isinstance(model.rep, dict) else model.rep for task, _ in reached]
        carried = torch.autograd.grad(reps, parameters, [g for _, g in reached], retain_graph=True, allow_unused=True)
        grads = [b if a is None else a if b is None else a + b for a, b in zip(grads, carried)]
    return [(p, g) for p, g in zip(parameters, grads) if g is not None]


def add_gradients(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Add gradients to what the parameters hold."""
    for parameter, grad in pairs:
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad
