"""Checking what goes into a loader: features, labels and group ids, as tensors of one length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from libmtl_fair.errors import DataError

Array: TypeAlias = "Tensor | np.ndarray[Any, Any]"
"""What loaders take: a tensor or a numpy array."""

UNKNOWN_GROUP = -1
"""Group id of an example whose sensitive value is not known."""

SENSITIVE = "sensitive"
"""Key under which a batch's labels hold the group ids; no task may have this name."""


def as_tensor(values: object, what: str) -> Tensor:
    """Return ``values`` as a tensor. A numpy float64 array becomes torch's default dtype; a tensor keeps its own.

    Raises
    ------
    DataError : neither a tensor nor a numeric array.
    """
    if isinstance(values, Tensor):
        return values.detach()
    array = np.asarray(values)
    if array.dtype == object or array.dtype.kind in "USMm":
        raise DataError(
            f"{what}: expected a tensor or a numeric array, found dtype {array.dtype}; encode it as numbers"
        )
    if array.dtype.byteorder == ">" or any(stride < 0 for stride in array.strides) or not array.flags.writeable:
        array = array.astype(array.dtype.newbyteorder("="), copy=True)
    tensor = torch.from_numpy(array)
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def check_features(x: object, feature_names: Sequence[str] | None = None) -> Tensor:
    """Return ``x`` [N, ...] with N >= 1 and every value finite.

    Raises
    ------
    DataError : no rows, or a NaN or infinity, with its column and row.
    """
    tensor = as_tensor(x, "x")
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        raise DataError(
            f"x has no rows (shape {tuple(tensor.shape)}); expected [N, ...] with N >= 1: is the split empty?"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        row, *rest = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
        column = f"column {rest[0]}" if rest else "the only column"
        if feature_names is not None and rest and rest[0] < len(feature_names):
            column += f" ({feature_names[rest[0]]!r})"
        bad = int((~torch.isfinite(tensor)).sum())
        raise DataError(
            f"x has {bad} values that are NaN or infinite, the first in {column}, row {row}; features must be finite: "
            "impute them (load_table does, with missing indicators) or drop the column"
        )
    return tensor


def check_labels(labels: Mapping[str, object], n_rows: int) -> dict[str, Tensor]:
    """Return the labels of each task as tensors [N, ...]; NaN or -100 mean missing, infinity is refused.

    Booleans become torch's default float type, small integers int64.

    Raises
    ------
    DataError : no task, a wrong length, an infinite label, or a task named ``"sensitive"``.
    """
    if not labels:
        raise DataError("a loader needs the labels of at least one task, found none; expected {task: labels[N]}")
    checked: dict[str, Tensor] = {}
    for task, values in labels.items():
        if task == SENSITIVE:
            raise DataError(f"a task may not be named {SENSITIVE!r}: this key holds the group ids; rename the task")
        tensor = _one_length(as_tensor(values, f"labels of task {task!r}"), n_rows, f"labels of task {task!r}")
        if tensor.dtype == torch.bool:
            tensor = tensor.to(torch.get_default_dtype())
        elif not tensor.is_floating_point():
            tensor = tensor.long()
        elif bool(torch.isinf(tensor).any()):
            raise DataError(f"task {task!r}: {int(torch.isinf(tensor).sum())} labels are infinite; use NaN for missing")
        checked[task] = tensor
    return checked


def check_groups(groups: Mapping[str, object], n_rows: int) -> dict[str, Tensor]:
    """Return the group ids of each attribute as int64 [N], each at least -1 (unknown).

    Raises
    ------
    DataError : a wrong length or shape, ids that are no integers, or an id below -1.
    """
    checked: dict[str, Tensor] = {}
    for attribute, values in groups.items():
        what = f"groups of sensitive attribute {attribute!r}"
        tensor = _one_length(as_tensor(values, what), n_rows, what)
        if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex():
            raise DataError(
                f"{what}: expected integer ids [N], found {tensor.dtype} of shape {tuple(tensor.shape)}; "
                "give ids 0..G-1, and -1 where the group is not known"
            )
        tensor = tensor.long()
        if int(tensor.min()) < UNKNOWN_GROUP:
            raise DataError(
                f"{what}: found id {int(tensor.min())}; ids are 0..G-1, and -1 where the group is not known"
            )
        checked[attribute] = tensor
    return checked


def check_group_names(
    groups: Mapping[str, Tensor], group_names: Mapping[str, Sequence[str]] | None
) -> dict[str, list[str]]:
    """Return the name of every group id of every attribute; without ``group_names`` they are ``"0"``, ``"1"``, ...

    Raises
    ------
    DataError : names for an attribute that is not there, or fewer names than ids.
    """
    given = dict(group_names or {})
    extra = [attribute for attribute in given if attribute not in groups]
    if extra:
        raise DataError(
            f"group_names has {extra[0]!r}, which is no sensitive attribute here; there are: {list(groups)}"
        )
    names: dict[str, list[str]] = {}
    for attribute, ids in groups.items():
        highest = int(ids.max())
        found = [str(name) for name in given.get(attribute, range(highest + 1))]
        if highest >= len(found):
            raise DataError(
                f"sensitive attribute {attribute!r}: found group id {highest}, but only {len(found)} group names; "
                "give one name for each id"
            )
        names[attribute] = found
    return names


def check_weights(weights: object, n_rows: int) -> Tensor:
    """Return the weight of each row, float64 [N], finite, not negative, not all 0.

    Raises
    ------
    DataError : anything else.
    """
    values = torch.as_tensor(weights if isinstance(weights, Tensor) else np.asarray(weights, dtype=np.float64))
    values = _one_length(values.detach().double(), n_rows, "weights")
    if (
        values.dim() != 1
        or not bool(torch.isfinite(values).all())
        or float(values.min()) < 0
        or not float(values.sum())
    ):
        raise DataError("weights: expected [N] finite numbers of at least 0, not all of them 0")
    return values


def _one_length(tensor: Tensor, n_rows: int, what: str) -> Tensor:
    found = tensor.shape[0] if tensor.dim() else 0
    if found != n_rows:
        raise DataError(f"{what}: expected {n_rows} rows, as x has, found {found}")
    return tensor
