"""Tensors that are columns of one matrix: found again, so that work on many tasks is one operation and no copy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def joint_columns(parts: Sequence[Tensor]) -> Tensor | None:
    """Return the contiguous matrix [B, C] whose columns ``parts`` ([B] or [B, C_t]) are, one after another; None if there is none.

    Fused heads split one matrix of logits, and a resident loader one matrix of labels; whoever needs all of them again gets
    the matrix without a copy, and gradients to it without a detour through every view.

    >>> import torch
    >>> matrix = torch.zeros(3, 2)
    >>> joint_columns(matrix.unbind(1)) is matrix, joint_columns([matrix[:, 1], matrix[:, 0]])
    (True, None)
    """
    base = parts[0]._base
    if base is None or base.dim() != 2 or not base.is_contiguous():
        return None
    (rows, width), first, column = base.shape, base.storage_offset(), 0
    for part in parts:
        if part._base is not base or part.storage_offset() != first + column or part.stride(0) != width:
            return None
        if part.size(0) != rows or part.dim() > 2:
            return None
        column += part.size(1) if part.dim() == 2 else 1
    return base if column == width else None
