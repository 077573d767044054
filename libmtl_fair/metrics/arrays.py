"""Numbers in any container as numpy arrays, and quotients that may be undefined."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Values: TypeAlias = ArrayLike | Tensor
"""What users give: a tensor, an array, a Series or a list."""


def as_numpy(values: Values) -> Array:
    """Return ``values`` (tensor, array, Series or list) as a numpy array; a CPU tensor is not copied."""
    return np.asarray(values.detach().cpu().numpy() if isinstance(values, Tensor) else values)


def as_floats(values: Values) -> Floats:
    """Return ``values`` as a float64 array."""
    return np.asarray(as_numpy(values), dtype=np.float64)


def divide(numerator: Array, denominator: Array) -> Floats:
    """Return the quotient, NaN where the denominator is 0, without warnings."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(denominator != 0, numerator / denominator, np.nan))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a frame as plain objects."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]
