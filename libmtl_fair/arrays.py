"""Numbers in any container as numpy arrays, and quotients that may be undefined."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from libmtl_fair.data.frames import is_numeric
from libmtl_fair.data.tables import to_pandas
from libmtl_fair.errors import DataError
from libmtl_fair.files import Json

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Values: TypeAlias = ArrayLike | Tensor
"""What users give: a tensor, an array, a column of pandas, polars, pyarrow, ..., or a list."""


def as_numpy(values: Values) -> Array:
    """Return ``values`` (tensor, array, column of any library, or list) as a numpy array; a CPU tensor is not copied.

    Nullable numbers and truth values with gaps are float64, NaN where missing.
    """
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
        return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    found = to_pandas(values)
    if isinstance(found, pd.Series) and pd.api.types.is_extension_array_dtype(found.dtype) and is_numeric(found):
        return found.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.asarray(found)


def as_floats(values: Values) -> Floats:
    """Return ``values`` as a float64 array."""
    return np.asarray(as_numpy(values), dtype=np.float64)


def as_weights(values: Values, n_rows: int) -> Floats:
    """Return row weights [N] as float64; negative ones, and such as are not finite, are refused."""
    weight = as_floats(values)
    if weight.shape != (n_rows,):
        raise DataError(f"sample_weight has shape {list(weight.shape)} for {n_rows} rows; expected [{n_rows}]")
    wrong = np.flatnonzero(~((weight >= 0) & (weight < np.inf)))
    if len(wrong):
        raise DataError(
            f"sample_weight: found {weight[wrong[0]]:g} in row {wrong[0]} ({len(wrong)} such values in all); expected finite "
            "numbers of at least 0"
        )
    return weight


def as_decisions(values: Values, what: str) -> Array:
    """Return zeros and ones [N] of any numeric type; text, and whatever else is no number, is refused."""
    found = as_numpy(values).reshape(-1)
    if found.dtype.kind in "iufb":
        return found
    if found.dtype == object and all(isinstance(each, int | float | np.number) for each in found):
        return found.astype(np.float64)
    raise DataError(f"{what} must hold 0 and 1, found {found.dtype}: {found[:3].tolist()}")


def as_ids(values: Values, what: str = "groups") -> Array:
    """Return group ids [N] as whole numbers of any width; fractions, text and missing values are refused."""
    ids = as_numpy(values)
    if ids.dtype == object and all(isinstance(each, int | np.integer) for each in ids.flat):
        ids = ids.astype(np.int64)
    whole = ids.dtype.kind in "iub" or (ids.dtype.kind == "f" and bool((np.floor(ids) == ids).all()))
    if ids.ndim != 1 or not (whole or not len(ids)):
        raise DataError(
            f"{what}: expected whole ids [N], -1 where not known, found {ids.dtype} of shape {list(ids.shape)}"
        )
    return ids.astype(np.int64) if ids.dtype == bool else ids


def divide(numerator: Array, denominator: Array) -> Floats:
    """Return the quotient, NaN where the denominator is 0, without warnings."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(denominator != 0, numerator / denominator, np.nan))


def records(frame: pd.DataFrame) -> list[Json]:
    """Return the rows of a frame as plain objects."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]
