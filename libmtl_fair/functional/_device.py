"""Where a tensor lives decides how small problems are solved: numpy beside the CPU, fixed-length torch loops elsewhere."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

A = TypeVar("A", Tensor, NDArray[Any])
_SIGNS = np.array([1.0, -1.0])
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def on_cpu(*tensors: Tensor) -> bool:
    """Say whether all ``tensors`` are plain CPU tensors, whose values Python may read without waiting for a device.

    A torch operation on five numbers costs 2 to 4 microseconds, nearly all of it dispatch; numpy and plain Python cost a
    fraction of that. Reading a CPU tensor is no synchronisation, so the small solvers of this package do so there.
    Tensors inside ``torch.func`` transforms (``vmap``, ``grad``) and under ``torch.compile`` have no values to read.

    >>> on_cpu(torch.ones(2))
    True
    """
    for tensor in tensors:
        if not tensor.is_cpu:
            return False
    return has_values(*tensors)


def on_host(values: Tensor) -> Any:
    """Return the same memory as a numpy array where that is the CPU's, else the tensor: what changes in place changes in both.

    >>> on_host(torch.ones(2))
    array([1., 1.], dtype=float32)
    """
    return values.numpy() if on_cpu(values) else values


def library(values: object) -> Any:
    """Return torch for a tensor, numpy for an array: functions of one name, with dimensions as the second argument."""
    return torch if isinstance(values, Tensor) else np


def at_least(values: A, low: float) -> A:
    """Return values of at least ``low``; numpy's own clip takes longer than a dozen sums."""
    found: A = values.clamp(min=low) if isinstance(values, Tensor) else np.maximum(values, low)
    return found


def largest(values: A, dim: int) -> A:
    """Return the largest values along a dimension."""
    found: A = values.amax(dim) if isinstance(values, Tensor) else np.maximum.reduce(values, dim)
    return found


def with_negative(values: A) -> A:
    """Return the values and their negatives, [2, ...]."""
    found: A = torch.stack([values, -values]) if isinstance(values, Tensor) else np.multiply.outer(_SIGNS, values)
    return found


def as_array(values: Tensor) -> NDArray[Any]:
    """Return the values as a numpy array without their graph; numpy has no bfloat16, so those become float32.

    >>> as_array(torch.ones(2, dtype=torch.bfloat16)).dtype
    dtype('float32')
    """
    values = values.detach().cpu()
    found: NDArray[Any] = (values.float() if values.dtype is torch.bfloat16 else values).numpy()
    return found


def has_values(*tensors: Tensor) -> bool:
    """Say whether none of ``tensors`` is inside a transform of ``torch.func`` or ``torch.compile``.

    >>> has_values(torch.ones(2))
    True
    """
    for tensor in tensors:
        if _is_wrapped(tensor):
            return False
    return not torch.compiler.is_compiling()


def widest(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type of a device: float64, or float32 on ``mps``, which lacks it.

    >>> widest(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64
