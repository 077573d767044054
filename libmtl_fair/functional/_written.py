"""Values whose derivatives are known, as one node of the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, n: int, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors[n:])
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, outer: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else outer.view(*outer.shape, *(1,) * (grad.dim() - outer.dim())) * grad
            for grad in ctx.saved_tensors
        ]
        return None, None, *grads, *(None for _ in grads)


def written(value: Tensor, *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
    """Attach a value [...] to the graph by (tensor [...], derivative of the value to it or None); once differentiable.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> written(torch.tensor(5.0), (x, 2 * x.detach())).backward()
    >>> x.grad
    tensor([2., 4.])
    """
    tensors, grads = zip(*pairs)
    found: Tensor = _Written.apply(value, len(pairs), *tensors, *grads)  # type: ignore[no-untyped-call]
    return found
