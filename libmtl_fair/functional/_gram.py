"""Gram matrix of representation gradients from the logits' gradients of linear heads (FairMT's head-aware proxy)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from libmtl_fair.errors import DataError


def head_gram(logit_grads: Sequence[Tensor], head_weights: Sequence[Tensor], rank_one: bool = False) -> Tensor:
    """Gram matrix K [T, T] of the tasks' gradients on the shared representation, without a backward pass to it.

    With linear heads ``z_t = W_t h + c_t`` and D_t [B, C_t] the gradient of task t's loss with respect to its logits, the
    representation gradient is ``D_t W_t``, so ``K_st = sum_cc' (D_s' D_t)_cc' (W_s W_t')_cc'`` exactly **(ours)**. With
    ``rank_one=True`` the source's ``K_st = sum_cc' u_sc u_tc' (W_s W_t')_cc'``, u_tc the root mean square of D_t's
    column c. A further objective on the same logits (FairMT's Phi) is one more entry: its gradients on all logits [B, sum C],
    and all weights stacked. Differentiable.

    Parameters
    ----------
    logit_grads : sequence of Tensor [B, C_t]
        One for each task.
    head_weights : sequence of Tensor [C_t, d]
        The heads' weights, as ``nn.Linear`` holds them.
    rank_one : bool
        The source's approximation.

    Raises
    ------
    DataError
        If the tensors do not fit together.

    Examples
    --------
    >>> head_gram([torch.tensor([[2.0]]), torch.tensor([[1.0]])], [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])])
    tensor([[4., 2.],
            [2., 2.]])
    """
    _check(logit_grads, head_weights)
    sizes = tuple(grad.shape[1] for grad in logit_grads)
    grads, weights = torch.cat(list(logit_grads), dim=1), torch.cat(list(head_weights))
    owner = None if all(size == 1 for size in sizes) else column_owner(sizes, grads.dtype, grads.device)
    gram, _ = head_products(grads, grads, weights, owner, rank_one)
    return gram / len(grads) if rank_one else gram


def head_products(
    grads: Tensor, other: Tensor, weights: Tensor, owner: Tensor | None = None, rank_one: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (K [..., T, T], b [..., T]): inner products of the tasks' representation gradients, and with another objective's.

    Parameters
    ----------
    grads, other : Tensor
        [..., B, C] gradients of the losses and of the other objective to all logits.
    weights : Tensor
        [..., C, d] of the heads.
    owner : Tensor, optional
        [C, T] one-hot, which task a logit belongs to; None where each task has one.
    rank_one : bool, default False
        The source's form: the norm of each logit's gradient in place of the gradient, so that the diagonal is that of
        the exact form (the root mean square times sqrt(B)).
    """
    overlap, c = weights @ weights.mT, grads.shape[-1]
    both = torch.cat([grads, other], -1)
    if rank_one:
        size = both.norm(dim=-2)
        cross = size[..., :c, None] * size[..., None, :]
    else:
        cross = grads.mT @ both
    gram, linear = cross[..., :c] * overlap, (cross[..., c:] * overlap).sum(-1)
    return (gram, linear) if owner is None else (owner.mT @ gram @ owner, linear @ owner)


@lru_cache(maxsize=64)
def column_owner(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Indicator [sum C, T] of each task's logits; kept, as building it on a device each step would wait for a copy."""
    with torch.inference_mode(False):
        task = torch.tensor([t for t, size in enumerate(sizes) for _ in range(size)])
        return (task.unsqueeze(1) == torch.arange(len(sizes))).to(device, dtype)


def _check(logit_grads: Sequence[Tensor], head_weights: Sequence[Tensor]) -> None:
    if not logit_grads or len(logit_grads) != len(head_weights):
        raise DataError(
            f"head_gram: expected one weight matrix per task, found {len(logit_grads)} gradients and {len(head_weights)} weights."
        )
    for task, (grad, weight) in enumerate(zip(logit_grads, head_weights, strict=True)):
        if grad.dim() != 2 or weight.dim() != 2 or grad.shape[1] != weight.shape[0]:
            raise DataError(
                f"head_gram: task {task}: gradients [B, C] {tuple(grad.shape)} do not fit weights [C, d] {tuple(weight.shape)}."
            )
