"""FairMT's view of heads and outputs: logits as one matrix where they are one, and the Gram matrix of task gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.batch import Matrices
from libmtl_fair.functional._device import on_cpu
from libmtl_fair.libmtl.gradients import flatten, shared_parameters


class Outputs:
    """The tasks' outputs of one step as the tensors that gradients go through.

    Attributes
    ----------
    tensors : the one [B, C] matrix that all outputs are columns of, or each task's own output.
    matrices : where these outputs are all tasks', as they lie in the batch.
    joined : whether it is the one matrix.
    """

    def __init__(
        self, outputs: Sequence[Tensor], matrices: Matrices | None = None, whole: Tensor | None = None
    ) -> None:
        self.outputs, self.matrices = list(outputs), matrices
        base = whole if matrices is None else matrices.logits
        self.joined = base is not None
        self.tensors = self.outputs if base is None else [base]
        self.single = base is not None and base.shape[1] == len(self.outputs)
        if self.single:
            self.widths = (1,) * len(self.outputs)
        else:
            self.widths = tuple(1 if z.dim() == 1 else z.shape[1] for z in self.outputs)
            self.single = all(width == 1 for width in self.widths)

    def gradients(self, losses: Tensor, keep: bool = False) -> list[Tensor]:
        """Return the gradient of each task's loss to its own output (one matrix where joined); keeps what lies below.

        ``keep`` keeps the losses' own graph too, for losses of further tasks that were stacked with them.
        """
        found = torch.autograd.grad(losses.sum(), self.tensors, allow_unused=True, retain_graph=keep)
        return [torch.zeros_like(z) if g is None else g for z, g in zip(self.tensors, found, strict=True)]

    def per_task(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Split what :meth:`gradients` gave into one gradient a task, each shaped as its output."""
        if not self.joined:
            return list(parts)
        return list(torch.split(parts[0], list(self.widths), 1))

    def matrix(self, parts: Sequence[Tensor]) -> Tensor:
        """Join gradients to one [B, C] matrix, zero past the end of a task that has fewer examples."""
        if self.joined:
            return parts[0]
        longest = max(len(g) for g in parts)
        rows = [g.reshape(len(g), -1) for g in parts]
        return torch.cat(
            [g if len(g) == longest else nn.functional.pad(g, (0, 0, 0, longest - len(g))) for g in rows], 1
        )


def last_linear(head: nn.Module) -> nn.Linear | None:
    """Return the linear layer that makes a head's output, or None."""
    if isinstance(head, nn.Linear):
        return head
    if isinstance(head, nn.Sequential) and len(head) and isinstance(head[-1], nn.Linear):
        return head[-1]
    return None


class LastInputs:
    """What the last linear layer of each composed head received in the last forward pass."""

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        self._seen: dict[str, Tensor] = {}
        for name, head in heads.items():
            layer = last_linear(head)
            if layer is not None and layer is not head:
                layer.register_forward_pre_hook(self._keeper(name))

    def _keeper(self, name: str) -> Callable[[nn.Module, Any], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._seen[name] = inputs[0].detach()

        return keep

    def shared(self, names: Sequence[str], h: Tensor) -> bool:
        """Say whether all these layers received ``h`` itself (or a view of all of it); forgets what was seen."""
        seen, self._seen = self._seen, {}
        return all(name not in seen or _same_data(seen[name], h) for name in names)


def _same_data(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.is_contiguous() and b.is_contiguous()


def head_products(
    grads: Tensor, fairness: Tensor, weights: Tensor, owner: Tensor | None, rank_one: bool
) -> tuple[Tensor, Tensor]:
    """Return (K [T, T], b [T]): inner products of representation gradients, from logit gradients and linear heads.

    Parameters
    ----------
    grads, fairness : [B, C] gradients of the losses and of Phi to the logits.
    weights : [C, d] of the heads.
    owner : [C, T] one-hot, which task a logit belongs to; None where each task has one.
    rank_one : the source's form: the RMS sensitivity of each logit in place of its gradients (scaled by sqrt(B), so
        that the diagonal is that of the exact form).
    """
    overlap = weights @ weights.T
    both = torch.cat([grads, fairness], 1)
    c = grads.shape[1]
    if rank_one:
        size = both.norm(dim=0)
        cross = size[:c, None] * size
    else:
        cross = grads.T @ both
    gram, linear = cross[:, :c] * overlap, (cross[:, c:] * overlap).sum(1)
    if owner is not None:
        gram, linear = owner.T @ gram @ owner, owner.T @ linear
    return gram, linear


def head_linear(grads: Tensor, term: Tensor, h: Any, weights: Tensor, owner: Tensor | None) -> Tensor:
    """Return [T], the inner products of the tasks' representation gradients with that of a further term of ``h``."""
    (to_h,) = torch.autograd.grad(term, h, retain_graph=True)
    per_column: Tensor = (grads * (to_h.flatten(1) @ weights.detach().T)).sum(0)
    return per_column if owner is None else owner.T @ per_column


def min_norm_of(gram: Tensor, linear: Tensor, observed: Tensor) -> Tensor:
    """Return ``F.min_norm_weights`` over the tasks ``observed`` [T], 0 for the others (all 0 if there is none)."""
    if on_cpu(gram, linear, observed):
        if bool(observed.all()):
            return F.min_norm_weights(gram, linear)
        alpha = torch.zeros_like(linear)
        index = observed.nonzero().squeeze(1)
        if len(index):
            alpha[index] = F.min_norm_weights(gram[index][:, index], linear[index])
        return alpha
    seen = observed.to(gram.dtype)
    barrier = 1e12 * (gram.diagonal().amax() + linear.abs().amax() + 1)
    alpha = F.min_norm_weights(gram + torch.diag((1 - seen) * barrier), linear * seen) * seen
    return alpha / alpha.sum().clamp(min=torch.finfo(alpha.dtype).tiny)


def autograd_products(
    outputs: Outputs,
    grads: Sequence[Tensor],
    fairness: Sequence[Tensor],
    to: Sequence[Sequence[Tensor]],
    term: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (K, b) by autograd from the outputs to ``to[t]``: representations (MGDA-UB) or shared parameters.

    The graph is kept. ``to`` holds the same list for each task, or one of its own under ``rep_grad``.
    """
    own = outputs.per_task(grads)
    rows = [_pulled([z], [g], anchors) for z, g, anchors in zip(outputs.outputs, own, to, strict=True)]
    fair = outputs.per_task(fairness)
    if len(_distinct(to)) == 1:
        phi = _pulled(outputs.outputs, fair, to[0])
    else:
        phi = torch.stack([_pulled([z], [g], a) for z, g, a in zip(outputs.outputs, fair, to, strict=True)]).sum(0)
    if term is not None:
        phi = phi + sum(_pulled([term], [torch.ones_like(term)], anchors) for anchors in _distinct(to))
    matrix = torch.stack(rows)
    return matrix @ matrix.T, matrix @ phi


def _distinct(to: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    return [to[0]] if all(anchors is to[0] for anchors in to) else list(to)


def _pulled(outputs: Sequence[Tensor], grads: Sequence[Tensor], to: Sequence[Tensor]) -> Tensor:
    found = torch.autograd.grad(list(outputs), list(to), list(grads), retain_graph=True, allow_unused=True)
    return flatten(list(found), list(to))


def shared_anchors(model: Any, names: Sequence[str], h: Any, proxy: str) -> list[list[Tensor]]:
    """Return, for each task, the tensors whose gradients are compared."""
    if proxy == "full":
        parameters = shared_parameters(model)
        return [parameters] * len(names)
    if model.rep_grad:
        return [[model.rep_tasks[name]] for name in names]
    anchor = [h]
    return [anchor] * len(names)
