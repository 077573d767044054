"""Confusion counts per group from one bincount of packed codes, ``group * 4 + 2 * y + yhat``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libmtl_fair.errors import DataError
from libmtl_fair.metrics.arrays import Floats, Ints, as_numpy

CHUNK = 1 << 16
"""Rows that are packed at a time: the codes stay in the cache, and extra memory does not grow with n."""


def group_counts(y_true: Any, y_pred: Any, groups: Any, n_groups: int, sample_weight: Any = None) -> Ints | Floats:
    """Return the confusion table of every group, [G, 4]: true negatives, false positives, false negatives, true positives.

    ``y_true`` and ``y_pred`` are 0/1 (any dtype), ``groups`` ids in -1..G-1; rows of unknown group (-1) are left out.
    Linear in n and independent of G; int64 counts, or float64 sums of ``sample_weight``.

    Raises
    ------
    DataError : lengths differ, labels or predictions other than 0 and 1, or ids outside of -1..G-1.

    >>> group_counts([1, 0, 1, 1], [1, 1, 0, 1], [0, 0, 1, -1], 2).tolist()
    [[0, 1, 0, 1], [0, 0, 1, 0]]
    """
    y, p, g = (_column(v) for v in (y_true, y_pred, groups))
    if not len(y) == len(p) == len(g):
        raise DataError(f"y_true, y_pred and groups must have one length, found {len(y)}, {len(p)} and {len(g)}")
    weight = None if sample_weight is None else np.asarray(as_numpy(sample_weight), dtype=np.float64)
    size = 4 * (n_groups + 1)
    total: NDArray[Any] = np.zeros(size, dtype=np.int64 if weight is None else np.float64)
    buffer = np.empty(min(CHUNK, len(y)), dtype=np.int64)
    for start in range(0, len(y), CHUNK):
        rows = slice(start, start + CHUNK)
        codes = _pack(y[rows], p[rows], g[rows], buffer, n_groups)
        total += np.bincount(codes, None if weight is None else weight[rows], minlength=size)
    table: Ints | Floats = total.reshape(n_groups + 1, 4)[1:]
    return table


def _column(values: Any) -> NDArray[Any]:
    array = as_numpy(values)
    array = array.reshape(len(array)) if array.ndim else array.reshape(1)
    return array.view(np.uint8) if array.dtype == np.bool_ else array


def _pack(y: NDArray[Any], p: NDArray[Any], g: NDArray[Any], buffer: Ints, n_groups: int) -> Ints:
    codes = buffer[: len(g)]
    if not (_is_binary(y) and _is_binary(p)):
        raise DataError(
            "y_true and y_pred must hold 0 and 1 only; leave out missing labels (NaN, -100) before counting"
        )
    if g.dtype.kind == "u":
        np.add(g, 1, out=codes, casting="unsafe", dtype=np.int64)
    else:
        np.add(g, 1, out=codes, casting="unsafe")
    if codes.min() < 0 or codes.max() > n_groups:
        raise DataError(
            f"group ids must lie in -1..{n_groups - 1} for n_groups={n_groups}, found {codes.min() - 1} to {codes.max() - 1}"
        )
    codes += codes
    np.add(codes, y, out=codes, casting="unsafe")
    codes += codes
    np.add(codes, p, out=codes, casting="unsafe")
    return codes


def _is_binary(values: NDArray[Any]) -> bool:
    if values.dtype.kind == "f":
        return bool(((values == 0) | (values == 1)).all())
    # Seen as unsigned, a negative number is huge: one pass instead of two.
    return bool(values.view(f"u{values.dtype.itemsize}").max() <= 1)


def add_counts(total: Tensor, codes: Tensor, weight: Tensor | None) -> None:
    """Add one to ``total[0, code]`` of every row; its weight to ``total[1]`` and its squared weight to ``total[2]``.

    ``codes`` int64 [B] index the last dimension of ``total`` float64 [3, K]. On the device, without synchronising.
    """
    ones = torch.ones((), dtype=total.dtype, device=total.device).expand(len(codes))
    w = ones if weight is None else weight.to(total.dtype)
    if codes.device.type == "cpu":
        index, size = codes.numpy(), total.shape[1]
        counts = torch.from_numpy(np.bincount(index, minlength=size))
        if weight is None:
            total += counts
            return
        sums = [np.bincount(index, v.numpy(), minlength=size) for v in (w, w * w)]
        total += torch.stack([counts.to(total.dtype), *(torch.from_numpy(s) for s in sums)])
        return
    for channel, values in enumerate((ones, w, w * w)):
        total[channel].scatter_add_(0, codes, values)
