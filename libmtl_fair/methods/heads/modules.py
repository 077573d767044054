"""Heads of auxiliary tasks: a main head with its parameters held fixed, an adversary, several heads as one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn


class DetachedHead(nn.Module):
    """Main heads applied with their parameters held fixed: a gradient goes through to the representation only.

    It has no parameters, and does not own the heads. Buffers (batch norm) are copied, so that a second pass does not
    move them. With an architecture that gives tasks representations of their own, it takes that of its main task, so
    that what is compared between groups is what the main task says; see :meth:`follow`.
    """

    def __init__(self, names: Iterable[str], heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.follows: tuple[str, ...] = tuple(names)
        self._heads: tuple[nn.Module, ...] = tuple(heads)  # a tuple: the heads stay the main tasks'
        self._seen: dict[int, Tensor] = {}
        self._watching = False

    def follow(self) -> None:
        """From now on use what the main heads receive in place of what this head is given."""
        if self._watching:
            return
        self._watching = True
        for i, head in enumerate(self._heads):
            head.register_forward_pre_hook(self._keeper(i))

    def _keeper(self, index: int) -> Any:
        def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs[0].is_leaf and inputs[0].requires_grad:  # rep_grad=True: this task has a leaf of its own
                self._seen.pop(index, None)
            else:
                self._seen[index] = inputs[0]

        keep.__dict__["fairness_head"] = True
        return keep

    def forward(self, h: Tensor) -> Tensor:
        """Return the main heads' outputs, joined: [B, sum of widths], or the one head's as it is."""
        outputs = [detached(head, self._seen.pop(i, h)) for i, head in enumerate(self._heads)]
        return outputs[0] if len(outputs) == 1 else torch.cat([z.flatten(1) for z in outputs], dim=1)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the last step held."""
        return {**self.__dict__, "_seen": {}}


def detached(head: nn.Module, h: Tensor) -> Tensor:
    """Apply a module to ``h`` with its parameters held fixed and its buffers left as they are."""
    if type(head) is nn.Linear:
        return nnf.linear(h, head.weight.detach(), None if head.bias is None else head.bias.detach())
    values = {name: p.detach() for name, p in head.named_parameters()}
    values |= {name: b.clone() for name, b in head.named_buffers()}
    out: Tensor = torch.func.functional_call(head, values, (h,))
    return out


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


def reverse_gradient(h: Tensor) -> Tensor:
    """Return ``h``; its gradient changes sign on the way back (Ganin et al. 2016).

    >>> x = torch.ones(1, requires_grad=True)
    >>> reverse_gradient(x).backward()
    >>> x.grad
    tensor([-1.])
    """
    out: Tensor = _Reverse.apply(h)  # type: ignore[no-untyped-call]
    return out


class Adversary(nn.Module):
    """Predict the group from the representation [B, d] through one hidden layer, with the gradient reversed."""

    def __init__(self, in_features: int, out_features: int, hidden: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, out_features))

    def forward(self, h: Tensor) -> Tensor:
        """Return logits, [B, out_features]."""
        logits: Tensor = self.net(reverse_gradient(h.flatten(1)))
        return logits


class JoinedHeads(nn.Module):
    """Several heads on one representation, their outputs joined: [B, sum of widths]."""

    def __init__(self, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, h: Tensor) -> Tensor:
        """Return the joined outputs."""
        return torch.cat([head(h).flatten(1) for head in self.heads], dim=1)


def fresh_copy(head: nn.Module) -> nn.Module:
    """Return a head of the same shape with parameters drawn anew."""
    copied = copy.deepcopy(head)
    for module in copied.modules():
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return copied
