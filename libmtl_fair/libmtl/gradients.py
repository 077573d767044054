"""Gradients per task, as LibMTL's weightings ask for them, mended for today's PyTorch.

``self`` is the LibMTL model, T its tasks, P the numbers in its shared parameters. A function marked :func:`mends` stands
in for the method of LibMTL that it names (see :mod:`libmtl_fair.libmtl.compat`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch._functorch.config
from torch import Tensor

from libmtl_fair.errors import HostError
from libmtl_fair.libmtl.state import Model
from libmtl_fair.processes import Processes

if hasattr(torch._functorch.config, "donated_buffer"):  # of torch 2.5 and later
    torch._functorch.config.donated_buffer = False  # else torch.compile's graphs are gone through once only

Method = Callable[..., object]
AnyMethod = TypeVar("AnyMethod", bound=Method)


class Patch(NamedTuple):
    """One mended method: which class, which method, what takes its place, and why."""

    owner: str
    method: str
    replacement: Method
    why: str


PATCHES: list[Patch] = []


def mends(where: str, why: str) -> Callable[[AnyMethod], AnyMethod]:
    """Let a function take the place of the method ``"Class.method"`` of LibMTL."""
    owner, method = where.split(".")

    def note(function: AnyMethod) -> AnyMethod:
        PATCHES.append(Patch(owner, method, function, why))
        return function

    return note


def shared_parameters(model: Model) -> list[Tensor]:
    """Return the shared parameters that can be trained, as a list."""
    return [p for p in model.get_share_params() if p.requires_grad]


_looked_through: WeakSet[torch.nn.Module] = WeakSet()


def need_visible(model: torch.nn.Module, roots: Tensor | Sequence[Tensor]) -> None:
    """Raise where parts of the graph are hidden from derivatives by parameters: reentrant checkpointing. Looks once a model.

    Raises
    ------
    HostError
        The encoder would not be trained, or not as the weighting says.
    """
    if model not in _looked_through:
        _looked_through.add(model)
        given = [roots] if isinstance(roots, Tensor) else roots
        if any(node.name() == "CheckpointFunctionBackward" for node in nodes_of(given)):
            raise HostError(
                "this weighting derives each task's loss by the parameters, and reentrant checkpointing hides "
                "them: checkpoint(..., use_reentrant=False), or gradient_checkpointing_kwargs={'use_reentrant': False} of Hugging Face"
            )


def nodes_of(roots: Sequence[Tensor]) -> list[torch.autograd.graph.Node]:
    """Return the nodes of the graph that made these tensors, nearest first."""
    nodes = list(dict.fromkeys(root.grad_fn for root in roots if root.grad_fn is not None))
    seen = set(nodes)
    for node in nodes:  # grows
        for further, _ in node.next_functions:
            if further is not None and further not in seen:
                seen.add(further)
                nodes.append(further)
    return nodes


@contextlib.contextmanager
def of_compiled(weighting: str) -> Iterator[None]:
    """Say in words where a model was compiled, and run, before it was known that its graphs are gone through several times."""
    try:
        yield
    except RuntimeError as error:
        if "donated buffers" not in str(error):
            raise
        raise HostError(
            f"{weighting} derives several times through a model that torch.compile made for one: import libmtl_fair before its "
            "first forward pass"
        ) from error


def whole(model: Model, value: Tensor) -> Tensor:
    """Return the sum over all processes of what each derived by its share of the batch."""
    return value if (processes := _processes(model)) is None else processes.total(value)


def _processes(model: Model) -> Processes | None:
    return getattr(model, "fair_processes", None)  # a model of LibMTL's own, healed in place, has none


@contextlib.contextmanager
def apart(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within it the parameters have no gradient; what they had before is added to what they have then."""
    held = [(p, p.grad) for p in parameters if p.grad is not None]
    for p, _ in held:
        p.grad = None
    yield
    add_gradients(held)


def flatten(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Join gradients to one vector; a missing one counts as zeros. No parameter at all: an empty vector."""
    if not parameters:
        return torch.zeros(0)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, parameters)])


@mends("AbsWeighting._compute_grad_dim", "counted sizes once, or for frozen weights too")
def compute_grad_dim(self: Model) -> None:
    """Set the sizes of the shared parameters; anew each time, since a branching model changes them."""
    self.grad_index = [p.numel() for p in shared_parameters(self)]
    self.grad_dim = sum(self.grad_index)


@mends("AbsWeighting._grad2vec", "went through the CPU")
def grad2vec(self: Model) -> Tensor:
    """Return the gradients of the shared parameters as one vector [P], zeros where there is none."""
    parameters = shared_parameters(self)
    return whole(self, flatten([p.grad for p in parameters], parameters))


@mends("AbsWeighting._reset_grad", "zero_grad() leaves None since PyTorch 2.0")
def reset_grad(self: Model, new_grads: Tensor) -> None:
    """Put the vector ``new_grads`` [P] into the gradients of the shared parameters; each process its part of the sum."""
    parameters = shared_parameters(self)
    processes = _processes(self)
    new_grads = new_grads.clone() if processes is None else new_grads / processes.size
    for parameter, part in zip(parameters, torch.split(new_grads, [p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


@mends("AbsWeighting._compute_grad", "went through the CPU; erased gradients of other modules")
def compute_grad(self: Model, losses: Tensor, mode: str, rep_grad: bool = False) -> Tensor | list[Tensor]:
    """Return each task's gradient of the shared parameters [T, P], or of the representation if ``rep_grad``.

    With ``mode="backward"`` every other parameter (heads, gates) accumulates its own gradient, as LibMTL does: that of
    the sum of the losses, in one pass; the T passes for the tasks serve the shared parameters alone.
    """
    if mode not in ("backward", "autograd"):
        raise HostError(f"gradient mode must be 'backward' or 'autograd', found {mode!r}")
    if rep_grad:
        leaves = [self.rep_tasks[task] for task in self.task_name]  # each task has one of its own
        if mode == "backward":
            torch.autograd.backward(losses.sum())
        found = [leaf.grad for leaf in leaves] if mode == "backward" else gradients(losses.sum(), leaves)
        grads = [torch.zeros_like(leaf) if g is None else g.detach().clone() for leaf, g in zip(leaves, found)]
        return grads if isinstance(self.rep, dict) else torch.stack(grads)
    need_visible(self, losses)
    shared = shared_parameters(self)
    if mode == "backward":
        taken = {id(p) for p in shared}
        own = [p for p in self.parameters() if p.requires_grad and id(p) not in taken]
        add_gradients(zip(own, gradients(losses, own, torch.ones_like(losses))))
    if not shared:
        return losses.new_zeros(len(losses), 0)
    several = any(
        base.__name__ in ("MoDo", "SDMGrad") for base in type(self).__mro__
    )  # batches on one graph (git main)
    rows = _task_rows(self, losses, shared, keep=mode == "autograd" or several)
    return whole(self, rows.to(torch.promote_types(rows.dtype, torch.float32)))  # weightings solve in float32 at least


_CHUNK = 8
"""Tasks that one batched pass serves: beyond, memory costs more than calls."""

_batched: WeakKeyDictionary[torch.nn.Module, tuple[int, bool]] = WeakKeyDictionary()
"""Model -> number of shared parameters when it was tried, and whether its passes can be batched."""


def _task_rows(self: Model, losses: Tensor, shared: list[Tensor], keep: bool) -> Tensor:
    """Return the gradient of each loss by the shared parameters, [T, P]: some tasks a pass, or one where torch has no rule."""
    tried, works = _batched.get(self, (-1, True))
    if tried == len(shared) or len(losses) == 1:
        return _rows(losses, shared, keep, works and len(losses) > 1)
    _batched[self] = len(shared), False
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError, UserWarning):
        warnings.simplefilter("error")
        rows = _rows(losses, shared, True, True)
        _batched[self] = len(shared), True
        return rows
    return _rows(losses, shared, keep, False)


def _rows(losses: Tensor, shared: list[Tensor], keep: bool, batched: bool) -> Tensor:
    each = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    chunks = torch.split(each, _CHUNK) if batched else each.unbind()
    rows = []
    for i, some in enumerate(chunks):
        last = i + 1 == len(chunks)
        found = torch.autograd.grad(losses, shared, some, keep or not last, allow_unused=True, is_grads_batched=batched)
        if batched:
            parts = [p.new_zeros(len(some), p.numel()) if g is None else g.flatten(1) for g, p in zip(found, shared)]
            rows.append(torch.cat(parts, dim=1))
        else:
            rows.append(flatten(found, shared).unsqueeze(0))
    return torch.cat(rows)


def gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Tensor | Sequence[Tensor] | None = None,
    keep: bool = True,
) -> list[Tensor | None]:
    """Return the gradient of the (weighted) outputs by each input, None where it is not used; keeps the graph or frees it."""
    if not inputs:
        return []
    return list(torch.autograd.grad(outputs, inputs, weights, retain_graph=keep, allow_unused=True))


@mends("AbsWeighting._get_grads", "failed where tasks have batches of their own")
def get_grads(self: Model, losses: Tensor, mode: str = "backward") -> Tensor | list[Tensor | list[Tensor]]:
    """Return [per-example gradients, gradients [T, d]] of the representation, or gradients [T, P] of the parameters."""
    if not self.rep_grad:
        self._compute_grad_dim()
        grads: Tensor = self._compute_grad(losses, mode)
        return grads
    per_grads = self._compute_grad(losses, mode, rep_grad=True)
    rows = [whole(self, g.sum(0).flatten()) for g in per_grads]
    if len({len(r) for r in rows}) > 1:
        sizes = {task: len(r) for task, r in zip(self.task_name, rows)}
        raise HostError(
            f"rep_grad=True: the tasks' representations differ in size {sizes}; this weighting needs one size"
        )
    return [per_grads, torch.stack(rows)]


@mends("AbsWeighting._backward_new_grads", "one encoder pass a task instead of one")
def backward_new_grads(
    self: Model, batch_weight: Tensor, per_grads: Iterable[Tensor] = (), grads: Tensor | None = None
) -> None:
    """Give the shared parameters the sum of the tasks' gradients, weighted by ``batch_weight`` [T]."""
    if not self.rep_grad:
        assert grads is not None
        self._reset_grad(batch_weight.to(grads.dtype) @ grads)
    else:
        _carry(self, {task: w * g for task, w, g in zip(self.task_name, batch_weight, per_grads)})


def carry_representation_gradients(self: Model) -> None:
    """After a plain ``loss.backward()`` under ``rep_grad=True``: carry what reached the representation to the encoder."""
    if self.rep_grad:
        leaves = {task: self.rep_tasks[task].grad for task in self.task_name}
        _carry(self, {task: grad for task, grad in leaves.items() if grad is not None})


def _carry(self: Model, grads: dict[str, Tensor]) -> None:
    """Send gradients by the tasks' representations on to the encoder."""
    if isinstance(self.rep, dict):
        torch.autograd.backward([self.rep[task] for task in grads], list(grads.values()))
    elif grads:
        torch.autograd.backward(self.rep, torch.stack(list(grads.values())).sum(0))


@contextlib.contextmanager
def added(
    model: Model, roots: Tensor | Sequence[Tensor], grads_of_roots: Sequence[Tensor] | None = None, share: float = 1.0
) -> Iterator[None]:
    """Within it a weighting leaves its gradient; then that is ``share`` of it plus a term's, or what reaches ``roots``.

    The term is derived first, and keeps the graph. Under ``rep_grad=True`` what it gives the detached representations goes through
    the encoder together with what the weighting gives them.
    """
    need_visible(model, roots)
    parameters = [p for p in model.parameters() if p.requires_grad]
    leaves = model.rep_tasks if model.rep_grad else {}
    found = gradients(roots, [*parameters, *leaves.values()], grads_of_roots)
    waiting: dict[int, tuple[Tensor, Tensor]] = {}
    for task, grad in zip(leaves, found[len(parameters) :]):
        rep = model.rep[task] if isinstance(model.rep, dict) else model.rep
        if grad is not None and rep.requires_grad:
            waiting[id(rep)] = rep, grad / share + (waiting[id(rep)][1] if id(rep) in waiting else 0)

    def join(key: int, grad: Tensor) -> Tensor:
        return grad + waiting.pop(key)[1] if key in waiting else grad

    hooks = [rep.register_hook(partial(join, key)) for key, (rep, _) in waiting.items()]  # type: ignore[no-untyped-call]
    yield
    for hook in hooks:
        hook.remove()
    if waiting:  # where the weighting had nothing to give
        torch.autograd.backward([rep for rep, _ in waiting.values()], [grad for _, grad in waiting.values()])
    if share != 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(share)
    add_gradients(zip(parameters, found))


def add_gradients(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Add gradients to what the parameters hold; none where it is None."""
    for parameter, grad in pairs:
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
