"""Input columns -> one float32 matrix: imputation, scaling and one-hot encoding, fitted on the training rows only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from libmtl_fair.data.frames import as_numbers, as_text, column_of, is_numeric
from libmtl_fair.errors import DataError, unknown

Rows: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
FeatureKind = Literal["numeric", "categorical"]
MISSING_CATEGORY = "(missing)"
"""Category of a row without a value, if the training part has such rows."""


@dataclass(frozen=True)
class FeatureEncoder:
    """The fitted encoding of a table's input columns.

    Numbers: the training median where missing, then (value - mean) / sd; one 0/1 column more where the training part
    has gaps. Categories: one 0/1 column each; a category that training lacks is all zeros.

    Attributes
    ----------
    kinds : {input column: "numeric" or "categorical"}, in order.
    names : of the columns of the encoded matrix.
    """

    kinds: Mapping[str, FeatureKind]
    transformer: ColumnTransformer
    names: tuple[str, ...]

    def encode(self, frame: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the inputs of new rows, float32 [N, F].

        Raises
        ------
        DataError : a column is not there, or holds text where training held numbers.
        """
        return _encoded(self.transformer, _prepared(frame, self.kinds), self.names)


def feature_kinds(frame: pd.DataFrame, columns: Sequence[str], declared: Mapping[str, str]) -> dict[str, FeatureKind]:
    """Return the kind of each input column: as declared, else numeric for numbers and booleans, else categorical.

    Raises
    ------
    DataError : unknown column or kind, or dates (which have no meaning as a number or category).
    """
    kinds: dict[str, FeatureKind] = {}
    for name in columns:
        kind = declared.get(name, "auto")
        series = column_of(frame, name, "features")
        if kind not in ("auto", *get_args(FeatureKind)):
            raise DataError(f"feature {name!r}: {unknown('kind', kind, ['auto', *get_args(FeatureKind)])}")
        if pd.api.types.is_datetime64_any_dtype(series) or pd.api.types.is_timedelta64_dtype(series):
            raise DataError(
                f"feature {name!r} holds dates; make a number of it (such as a year or an age) or leave it out"
            )
        if kind == "numeric" or (kind == "auto" and is_numeric(series)):
            kinds[name] = "numeric"
        else:
            kinds[name] = "categorical"
    return kinds


def fit_encoder(
    frame: pd.DataFrame, train: Rows, kinds: Mapping[str, FeatureKind], min_frequency: int | float | None = None
) -> tuple[FeatureEncoder, np.ndarray[Any, np.dtype[np.float32]]]:
    """Fit on the rows in ``train``; return the encoder and the inputs of all rows, float32 [N, F].

    ``min_frequency``: categories with fewer rows (int) or a smaller share (float) than this become one, "(rare)".

    Raises
    ------
    DataError : a numeric column without any value, an infinite value, or text in a numeric column.
    """
    whole = _prepared(frame, kinds)
    clean = whole.iloc[train]
    numeric = [name for name, kind in kinds.items() if kind == "numeric"]
    categorical = [name for name, kind in kinds.items() if kind == "categorical"]
    gaps = clean[numeric].isna()
    for name in numeric:
        if gaps[name].all():
            raise DataError(
                f"feature {name!r} has no value in the training part ({len(clean)} rows); leave the column out"
            )
    incomplete = [name for name in numeric if gaps[name].any()]
    onehot = OneHotEncoder(handle_unknown="ignore", min_frequency=min_frequency, sparse_output=False, dtype=np.float32)
    parts = [
        ("numeric", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numeric),
        ("missing", MissingIndicator(features="all"), incomplete),
        ("categorical", onehot, categorical),
    ]
    transformer = ColumnTransformer([part for part in parts if part[2]], sparse_threshold=0.0)
    transformer.fit(clean)
    names = [*numeric, *(f"{name}={MISSING_CATEGORY}" for name in incomplete)]
    if categorical:
        names += _category_names(transformer.named_transformers_["categorical"], categorical)
    x = _encoded(transformer, whole, names)
    return FeatureEncoder(dict(kinds), transformer, tuple(names)), x


def _encoded(
    transformer: ColumnTransformer, clean: pd.DataFrame, names: Sequence[str]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    with np.errstate(over="ignore"):
        x = np.asarray(transformer.transform(clean), dtype=np.float32)
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise DataError(
            f"feature {names[column]!r} is too far from its training values in row {row} to be scaled as float32; "
            "correct the value, or transform the column first (a logarithm, say)"
        )
    return x


def _category_names(onehot: OneHotEncoder, columns: Sequence[str]) -> list[str]:
    names: list[str] = []
    for index, column in enumerate(columns):
        rare = getattr(onehot, "infrequent_categories_", [None] * len(columns))[index]
        rare = set() if rare is None else set(rare)
        names += [f"{column}={value}" for value in onehot.categories_[index] if value not in rare]
        names += [f"{column}=(rare)"] if rare else []
    return names


def _prepared(frame: pd.DataFrame, kinds: Mapping[str, FeatureKind]) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    for name, kind in kinds.items():
        series = column_of(frame, name, "features")
        if kind == "numeric":
            columns[name] = as_numbers(series, f"feature {name!r}")
        else:
            text = as_text(series)
            text[series.isna().to_numpy()] = MISSING_CATEGORY
            columns[name] = pd.Series(text, dtype=object)
    return pd.DataFrame(columns)
