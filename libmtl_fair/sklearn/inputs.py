"""X and the rows' weights, checked as scikit-learn checks them, and X as a table for the encoder."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import _check_sample_weight, validate_data

from libmtl_fair.data.features import FeatureEncoder, FeatureKind, feature_kinds, fit_encoder
from libmtl_fair.errors import DataError

Rows = NDArray[np.float64] | pd.DataFrame
"""X: an array, or a DataFrame where it has text columns."""


def check_inputs(estimator: BaseEstimator, x: object, *, reset: bool) -> Rows:
    """Return X as scikit-learn checks it: a float64 array, or a DataFrame where it has text columns.

    Raises
    ------
    ValueError : X is not 2-D, empty, sparse, infinite, or differs from the X of ``fit``.
    """
    texts = not reset and bool(estimator.encoder_.categories)
    if texts and not isinstance(x, pd.DataFrame):
        raise DataError("fitted on a DataFrame with text columns: give a DataFrame with the same columns")
    if isinstance(x, pd.DataFrame) and (texts or (reset and "categorical" in _table(x)[1].values())):
        frame: pd.DataFrame = validate_data(estimator, x, reset=reset, skip_check_array=True)
        if not len(frame):
            raise DataError("X has no rows")
        numbers = frame.select_dtypes("number", exclude="timedelta")
        if np.isinf(numbers.to_numpy(dtype=np.float64, na_value=np.nan)).any():
            raise DataError("X contains infinity; correct these values or leave the rows out")
        return frame
    array: NDArray[np.float64] = validate_data(
        estimator, x, dtype=np.float64, ensure_all_finite="allow-nan", reset=reset, estimator=estimator
    )
    return array


def fit_inputs(x: Rows) -> tuple[FeatureEncoder, NDArray[np.float32]]:
    """Return the encoder fitted on the rows of X, and X encoded, float32 [N, F]."""
    frame, kinds = _table(x)
    return fit_encoder(frame, np.arange(len(frame)), kinds)


def encode_inputs(encoder: FeatureEncoder, x: Rows) -> NDArray[np.float32]:
    """Return X encoded, float32 [N, F]; columns are told by their places."""
    frame = pd.DataFrame(x).set_axis(list(encoder.kinds), axis=1)
    numeric = [name for name, kind in encoder.kinds.items() if kind == "numeric"]
    return encoder.encode(frame.assign(**frame[numeric].infer_objects()))


def _table(x: Rows) -> tuple[pd.DataFrame, dict[str, FeatureKind]]:
    frame = pd.DataFrame(x)
    names = [str(name) for name in frame.columns]
    frame = frame.set_axis(names if len(set(names)) == len(names) else range(len(names)), axis=1).rename(columns=str)
    return frame, feature_kinds(frame, list(frame.columns))


def check_weights(sample_weight: object, x: Rows) -> NDArray[np.float64] | None:
    """Return the rows' weights, float64 [N], or None for none given.

    Raises
    ------
    ValueError : another length than X, a negative weight, one that is not finite, or none above 0.
    """
    if sample_weight is None:
        return None
    weights: NDArray[np.float64] = _check_sample_weight(
        sample_weight, np.zeros((len(x), 1)), dtype=np.float64, copy=True, ensure_non_negative=True
    )
    return weights
