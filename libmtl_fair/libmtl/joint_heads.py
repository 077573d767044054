"""Linear heads as one weight and one bias while an epoch runs, so that forty heads cost little more than one.

Autograd, the optimiser and ``zero_grad`` each have a cost per parameter, which at forty heads is more than that of the
arithmetic. Between epochs nothing of this is left: heads, optimiser state and checkpoints are LibMTL's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from libmtl_fair.batch import Columns
from libmtl_fair.libmtl.state import Model

_OURS = ("LibMTL", "libmtl_fair", "torch", "abc", "builtins")


class JointHeads:
    """Plain linear heads on one representation as the rows of one matrix, which their own parameters are views of.

    So are their gradients: whoever looks at a head, or runs it by itself, finds what would be there without this. ``weight``
    [C, d] and ``bias`` [C], of all heads' C outputs, are trained in place of those whose ids are ``replaced``.
    """

    def __init__(self, heads: Mapping[str, nn.Linear]) -> None:
        self.tasks, self.sizes = tuple(heads), [head.out_features for head in heads.values()]
        own: list[list[Tensor]] = [[head.weight for head in heads.values()], [head.bias for head in heads.values()]]
        self._memory = [[p.data for p in part] for part in own]
        self.weight, self.bias = (nn.Parameter(torch.cat(memory)) for memory in self._memory)
        self.pairs: list[tuple[nn.Parameter, list[Tensor]]] = [(self.weight, own[0]), (self.bias, own[1])]
        self.replaced = {id(p) for part in own for p in part}
        self._flat = self.weight.new_zeros(self.weight.numel() + self.bias.numel())
        weight, bias = torch.split(self._flat, [self.weight.numel(), self.bias.numel()])
        self._grads = [weight.view_as(self.weight), bias]
        self.zero_grad()
        for (joint, part), grad in zip(self.pairs, self._grads):
            for p, values, its in zip(part, torch.split(joint.data, self.sizes), torch.split(grad, self.sizes)):
                p.data, p.grad = values, its

    def run(self, h: Tensor) -> Columns:
        """Return task -> outputs [..., C_t] for representations [..., d]."""
        return Columns(self.tasks, nn.functional.linear(h, self.weight, self.bias), self.sizes)

    def zero_grad(self) -> None:
        """Set all gradients to 0, in the memory that the heads see."""
        self._flat.zero_()
        self.weight.grad, self.bias.grad = self._grads

    def collect_grad(self) -> None:
        """Bring gradients that a weighting put elsewhere into the memory that the heads see; call before the optimiser."""
        for (joint, _), grad in zip(self.pairs, self._grads):
            if joint.grad is not grad:
                grad.zero_() if joint.grad is None else grad.copy_(joint.grad)
                joint.grad = grad

    @torch.no_grad()
    def release(self) -> None:
        """Give the heads the memory that they had, with the values of now."""
        for (_, part), memory in zip(self.pairs, self._memory):
            torch._foreach_copy_(memory, [p.data for p in part])
            for p, held in zip(part, memory):
                p.data = held


def listeners_of(module: nn.Module) -> tuple[Mapping[int, object], ...]:
    """Return a module's hooks by kind; mappings that see later ones too."""
    return (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)


def is_plain_linear(head: nn.Module) -> bool:
    """Whether a head is ``nn.Linear`` with a bias and nobody listens to it, so that it may be run as part of a larger product."""
    return type(head) is nn.Linear and head.bias is not None and not any(listeners_of(head))


def joint_weights(model: Model, tasks: tuple[str, ...]) -> Tensor | None:
    """Return the weights [C, d] of the heads of these tasks, in order, while they are joined; else None."""
    joint: JointHeads | None = getattr(model, "fair_joint", None)
    return joint.weight if joint is not None and joint.tasks == tasks else None


@contextmanager
def joined_heads(model: Model, optimizer: torch.optim.Optimizer) -> Iterator[JointHeads | None]:
    """Within it the model runs, and the optimiser trains, its plain linear heads as one, where that changes no number.

    Heads that are frozen, hooked, shared, of unequal kind or in several groups of the optimiser stay as they are, and so do
    all where somebody's own weighting may look at their gradients.
    """
    heads = _joinable(model)
    own = [p for head in heads.values() for p in (head.weight, head.bias)]
    wanted = {id(p) for p in own}
    places = [i for i, group in enumerate(optimizer.param_groups) if wanted <= {id(p) for p in group["params"]}]
    if not heads or not places or not _same_state(optimizer, own):
        yield None
        return
    joint = JointHeads(heads)
    before = optimizer.param_groups[places[0]]["params"]
    try:
        optimizer.param_groups[places[0]]["params"] = [
            *(p for p in before if id(p) not in joint.replaced),
            joint.weight,
            joint.bias,
        ]
        for whole, parts in joint.pairs:
            _join_state(optimizer, whole, parts)
        vars(model)["fair_joint"] = joint
        yield joint
    finally:
        vars(model).pop("fair_joint", None)
        optimizer.param_groups[places[0]]["params"] = before  # of a group that may have been loaded anew
        for whole, parts in joint.pairs:
            _split_state(optimizer, whole, parts, joint.sizes)
        joint.release()


def _joinable(model: Model) -> dict[str, nn.Linear]:
    """Return task -> head of the heads that may be joined; empty if it is not worth it or may be seen."""
    bases = type(model).__mro__
    if not hasattr(model, "plain_heads") or any(base.__module__.partition(".")[0] not in _OURS for base in bases):
        return {}
    if any(vars(base).get("looks_at_heads") or base.__name__ == "MoDo" for base in bases):
        return {}
    named = ((task, model.decoders[task]) for task in model.plain_heads())
    heads = {task: head for task, head in named if isinstance(head, nn.Linear)}
    found = [p for head in heads.values() for p in (head.weight, head.bias)]
    kinds = {(p.dtype, p.device, p.shape[1:]) for p in found}
    plain = all(p.requires_grad and not p._backward_hooks and not p._post_accumulate_grad_hooks for p in found)
    wanted = {id(p) for p in found}
    places = sum(id(p) in wanted for module in model.modules() for p in module._parameters.values())
    return heads if len(heads) > 1 and plain and len(kinds) == 2 and places == len(found) == len(wanted) else {}


def _same_state(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Whether the optimiser holds for each head tensors of its shape and equal counts (of steps), and nothing else."""
    states = [optimizer.state.get(p, {}) for p in parameters]
    if any(state.keys() != states[0].keys() for state in states):
        return False
    return all(_fits([state[name] for state in states], parameters) for name in states[0])


def _fits(values: Sequence[object], parameters: Sequence[Tensor]) -> bool:
    if all(_is_like(value, p) for value, p in zip(values, parameters)) or all(value is None for value in values):
        return True
    counts = [value for value in values if isinstance(value, Tensor) and value.dim() == 0]
    return len(counts) == len(values) and bool((torch.stack(counts) == counts[0]).all())


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _join_state(optimizer: torch.optim.Optimizer, whole: Tensor, parts: Sequence[Tensor]) -> None:
    states = [optimizer.state.pop(p, {}) for p in parts]
    if states[0]:
        optimizer.state[whole] = {
            name: torch.cat([state[name] for state in states]) if _is_like(value, parts[0]) else value
            for name, value in states[0].items()
        }


def _split_state(optimizer: torch.optim.Optimizer, whole: Tensor, parts: Sequence[Tensor], sizes: list[int]) -> None:
    for name, value in optimizer.state.pop(whole, {}).items():
        shared = (
            value.repeat(len(parts)).unbind() if isinstance(value, Tensor) and not value.dim() else [value] * len(parts)
        )
        rows = torch.split(value, sizes) if _is_like(value, whole) else shared
        for p, own in zip(parts, rows):
            optimizer.state[p][name] = own
