"""Heads: a main head with its parameters held fixed, an adversary, several heads as one, a head a group."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, RecipeError, unknown


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
        if not self._watching:
            self._watching = True
            for i, head in enumerate(self._heads):
                keep = partial(self._keep, i)  # which is saved, and copied, with this head
                vars(keep)["fairness_head"] = True
                head.register_forward_pre_hook(keep)

    def _keep(self, index: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].is_leaf and inputs[0].requires_grad:  # rep_grad=True: this task has a leaf of its own
            self._seen.pop(index, None)
        else:
            self._seen[index] = inputs[0]

    def forward(self, h: Tensor) -> Tensor:
        """Return the main heads' outputs, joined: [B, sum of widths], or the one head's as it is."""
        return joined([detached(head, self._seen.pop(i, h)) for i, head in enumerate(self._heads)])

    def __getstate__(self) -> dict[str, object]:
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


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """Return outputs side by side, [B, sum of widths]; one as it is."""
    return outputs[0] if len(outputs) == 1 else torch.cat([z.flatten(1) for z in outputs], dim=1)


def reverse_gradient(h: Tensor) -> Tensor:
    """Return ``h``; its gradient changes sign on the way back (Ganin et al. 2016).

    >>> x = torch.ones(1, requires_grad=True)
    >>> reverse_gradient(x).backward()
    >>> x.grad
    tensor([-1.])
    """
    return 2 * h.detach() - h


class Adversary(nn.Module):
    """Predict the group from the representation, pooled to [B, d], through one hidden layer, with the gradient reversed."""

    def __init__(self, in_features: int, out_features: int, hidden: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, out_features))

    def forward(self, h: Tensor) -> Tensor:
        """Return logits, [B, out_features]."""
        logits: Tensor = self.net(reverse_gradient(F.pooled(h)))
        return logits


class JoinedHeads(nn.Module):
    """Several heads on one representation, their outputs joined: [B, sum of widths]."""

    def __init__(self, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, h: Tensor) -> Tensor:
        """Return the joined outputs."""
        return joined([head(h) for head in self.heads])


def fresh_copy(*heads: nn.Module) -> nn.Module:
    """Return a head of the same shape (several: joined to one) with parameters drawn anew."""
    if len(heads) > 1:
        return JoinedHeads(fresh_copy(head) for head in heads)
    copied = copy.deepcopy(heads[0])
    for module in copied.modules():
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return copied


class GroupHeads(nn.Module):
    """Group-specific decomposition: one head per group, in training and in prediction (baseline of METHODS.md, section 4).

    An example of unknown group gets the mean of the heads' outputs **(ours)**. Prediction needs the groups, which
    :class:`FairTrainer` hands over by :meth:`take_groups`; without them every example counts as unknown.

    Parameters
    ----------
    head : nn.Module
        The main head; each group gets a head of its shape, with parameters of its own.
    attributes : sequence of str
        Sensitive attributes; several are crossed.
    n_groups : sequence of int
        Number of groups of each.

    Raises
    ------
    RecipeError
        No attribute, or fewer than two groups.
    """

    def __init__(self, head: nn.Module, attributes: Sequence[str], n_groups: Sequence[int]) -> None:
        super().__init__()
        total = math.prod(n_groups)
        if not attributes or len(attributes) != len(n_groups) or total < 2:
            raise RecipeError(
                f"group_specific needs at least two groups, found {dict(zip(attributes, n_groups))}; choose another attribute"
            )
        self.attributes, self.n_groups = tuple(attributes), tuple(n_groups)
        self.heads = nn.ModuleList(fresh_copy(head) for _ in range(total))
        self._groups: Tensor | None = None

    def take_groups(self, groups: Mapping[str, Tensor] | None) -> None:
        """Take attribute -> group ids [B] of the next forward pass; None: unknown.

        Raises
        ------
        DataError
            An attribute that the loader does not give.
        """
        self._groups = None
        if not groups:
            return
        for name in self.attributes:
            if name not in groups:
                raise DataError(f"group-specific heads: {unknown('sensitive attribute', name, groups)}")
        self._groups, _ = F.cross_groups([groups[a] for a in self.attributes], self.n_groups)

    def forward(self, h: Tensor) -> Tensor:
        """Return each example's output from its group's head."""
        groups, self._groups = self._groups, None
        outputs = torch.stack([head(h) for head in self.heads])
        mean = outputs.mean(0)
        if groups is None:
            return mean
        chosen = outputs[groups.clamp(min=0), torch.arange(len(h), device=h.device)]
        known = (groups >= 0).reshape(-1, *[1] * (chosen.dim() - 1))
        return torch.where(known, chosen, mean)
