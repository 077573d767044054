"""Input columns -> one float32 matrix: imputation, scaling and one-hot encoding, fitted on the training rows only."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.data.frames import as_numbers, as_text, column_of, ids_of, is_date, is_numeric
from libmtl_fair.data.spec import MAX_CATEGORIES
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.files import Json
from libmtl_fair.memory import need_memory

FeatureKind = Literal["numeric", "categorical"]
Kinds = Mapping[str, FeatureKind]
_T = TypeVar("_T")
MISSING_CATEGORY = "(missing)"
"""Category of a row without a value, if the training part has such rows."""
OTHER = "(other)"
"""Category of the rare ones, and of those beyond ``max_categories``."""
MOST_VALUES = 2**20
"""Different categories of a column that are counted, of a table that is read part by part."""
_FEW = 20


@dataclass(frozen=True)
class FeatureEncoder:
    """The fitted encoding of a table's input columns, as plain data that JSON can hold.

    Numbers: the training median where missing, then (value - mean) / sd; one 0/1 column more where the training part
    has gaps. Categories: one 0/1 column each, one for the rare ones; a category that training lacks is all zeros.

    Attributes
    ----------
    kinds : Kinds
        {input column: "numeric" or "categorical"}, in order.
    fill, centre, scale : tuple of float
        Of each numeric column.
    gaps : tuple of int
        Which numeric columns (counted among them) had missing values in training.
    categories, rare : tuple of tuple of str
        Values of each categorical column, frequent and rare.
    """

    kinds: Kinds
    fill: tuple[float, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    gaps: tuple[int, ...]
    categories: tuple[tuple[str, ...], ...]
    rare: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the columns of the encoded matrix."""
        numeric = _of_kind(self.kinds, "numeric")
        names = [*numeric, *(f"{numeric[i]}={MISSING_CATEGORY}" for i in self.gaps)]
        for name, known, rare in zip(_of_kind(self.kinds, "categorical"), self.categories, self.rare):
            names += [f"{name}={value}" for value in (*known, *([OTHER] if rare else []))]
        return tuple(names)

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the input column that each column of the encoded matrix was made of."""
        numeric = _of_kind(self.kinds, "numeric")
        sources = [*numeric, *(numeric[i] for i in self.gaps)]
        for name, known, rare in zip(_of_kind(self.kinds, "categorical"), self.categories, self.rare):
            sources += [name] * (len(known) + bool(rare))
        return tuple(sources)

    def categorical(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Return the categorical columns with their frequent categories."""
        return tuple(zip(_of_kind(self.kinds, "categorical"), self.categories))

    def without(self, columns: Collection[str]) -> FeatureEncoder:
        """Return the encoding without some input columns."""
        numeric, texts = (_of_kind(self.kinds, kind) for kind in get_args(FeatureKind))
        kept = [i for i, name in enumerate(numeric) if name not in columns]

        def rest(values: Sequence[_T], of: Sequence[str]) -> tuple[_T, ...]:
            return tuple(value for value, name in zip(values, of) if name not in columns)

        return FeatureEncoder(
            kinds={name: kind for name, kind in self.kinds.items() if name not in columns},
            **{name: rest(getattr(self, name), numeric) for name in ("fill", "centre", "scale")},
            gaps=tuple(kept.index(i) for i in self.gaps if i in kept),
            categories=rest(self.categories, texts),
            rare=rest(self.rare, texts),
        )

    def encode(self, frame: pd.DataFrame) -> NDArray[np.float32]:
        """Return the inputs of new rows, float32 [N, F]; columns or values that do not fit those of training are refused."""
        return self._encoded(_numbers(frame, self.kinds), _texts(frame, self.kinds))

    def _encoded(self, numbers: NDArray[np.float64], texts: Sequence[NDArray[np.object_]]) -> NDArray[np.float32]:
        missing = np.isnan(numbers)
        with np.errstate(over="ignore"):
            values = (np.where(missing, self.fill, numbers) - np.array(self.centre)) / np.array(self.scale)
            parts = [values.astype(np.float32), missing[:, list(self.gaps)].astype(np.float32)]
        beyond = np.argwhere(~np.isfinite(parts[0]))
        if len(beyond):
            row, column = beyond[0]
            raise DataError(
                f"feature {_of_kind(self.kinds, 'numeric')[column]!r} is too far from its training values in row {row} "
                f"({numbers[row, column]:g}) to be scaled as float32; correct the value, or transform the column first (a "
                "logarithm, say)"
            )
        for text, known, rare in zip(texts, self.categories, self.rare):
            width = len(known) + bool(rare)
            ids = np.minimum(ids_of(text, [*known, *rare]), width - 1)
            parts.append((ids[:, None] == np.arange(width)).astype(np.float32))
        return np.hstack(parts)

    def to_dict(self) -> Json:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Json) -> FeatureEncoder:
        """Read what :meth:`to_dict` gave, from JSON too; version 0.1 wrote the positions of each kind."""
        fields: Json = {name: item for name, item in values.items() if name not in ("numeric", "categorical")}
        if "numeric" in values:
            kinds = dict.fromkeys(values["numeric"], "numeric") | dict.fromkeys(values["categorical"], "categorical")
            fields |= {"kinds": {str(i): kinds[i] for i in sorted(kinds)}, "rare": [()] * len(values["categorical"])}
        for name in ("categories", "rare"):
            fields[name] = map(tuple, fields[name])
        return cls(kinds=fields.pop("kinds"), **{name: tuple(item) for name, item in fields.items()})


def feature_kinds(
    frame: pd.DataFrame, columns: Sequence[str], declared: Mapping[str, str] | None = None
) -> dict[str, FeatureKind]:
    """Return the kind of each input column: as declared, else numeric for numbers, booleans and dates."""
    kinds: dict[str, FeatureKind] = {}
    for name in columns:
        kind = (declared or {}).get(name, "auto")
        series = column_of(frame, name, "features")
        if kind not in ("auto", *get_args(FeatureKind)):
            raise DataError(f"feature {name!r}: {unknown('kind', kind, ['auto', *get_args(FeatureKind)])}")
        number = is_numeric(series) or is_date(series)
        kinds[name] = "numeric" if kind == "numeric" or (kind == "auto" and number) else "categorical"
    return kinds


def fit_encoder(
    frame: pd.DataFrame,
    train: NDArray[np.int64],
    kinds: Kinds,
    min_frequency: int | float | None = None,
    max_categories: int = MAX_CATEGORIES,
) -> tuple[FeatureEncoder, NDArray[np.float32]]:
    """Fit on the rows in ``train``; return the encoder and the inputs of all rows, float32 [N, F].

    ``min_frequency``: categories with fewer rows (int) or a smaller share (float) than this become one, "(other)", and so do
    all but the ``max_categories`` most frequent. A text column of which nearly every row has a value of its own is refused.
    """
    numbers, texts = _numbers(frame, kinds), _texts(frame, kinds)
    part = numbers[train]
    seen = ~np.isnan(part)
    for name, column in zip(_of_kind(kinds, "numeric"), seen.T):
        if not column.any():
            raise DataError(
                f"feature {name!r} has no value in the training part ({len(part)} rows); leave the column out"
            )
    fill = np.nanmedian(part, axis=0) if part.shape[1] else np.zeros(0)
    whole = np.asfortranarray(np.where(seen, part, fill))  # column by column, as scikit-learn sums them
    counts = [Counter(text[train].tolist()) for text in texts]
    encoder = _encoder(
        kinds,
        fill,
        whole.mean(0),
        whole.std(0),
        ~(~seen).sum(0).astype(bool),
        counts,
        len(part),
        min_frequency,
        max_categories,
    )
    need_memory(
        12 * len(frame) * max(len(encoder.names), 1),
        f"the inputs ({len(frame):,} rows of {len(encoder.names):,} columns after encoding)",
        "leave columns out (drop), lower max_categories, or take a subset",
    )
    return encoder, encoder._encoded(numbers, texts)


def _encoder(
    kinds: Kinds,
    fill: NDArray[np.float64],
    centre: NDArray[np.float64],
    scale: NDArray[np.float64],
    complete: NDArray[np.bool_],
    counts: Sequence[Counter[str]],
    n_rows: int,
    min_frequency: int | float | None,
    max_categories: int,
) -> FeatureEncoder:
    """Return the encoder of training rows with these numbers and categories."""
    constant = scale <= n_rows * np.finfo(np.float64).eps * np.abs(centre)  # but for rounding, as in scikit-learn
    least = min_frequency if isinstance(min_frequency, int) else (min_frequency or 0) * n_rows
    for name, count in zip(_of_kind(kinds, "categorical"), counts):
        _no_id(name, count)
    frequent = [_frequent(count, least, max_categories) for count in counts]
    return FeatureEncoder(
        kinds=dict(kinds),
        fill=tuple(fill.tolist()),
        centre=tuple(centre.tolist()),
        scale=tuple(np.where(constant, 1.0, scale).tolist()),
        gaps=tuple(np.flatnonzero(~complete).tolist()),
        categories=tuple(tuple(sorted(kept)) for kept in frequent),
        rare=tuple(tuple(sorted(set(count) - kept)) for count, kept in zip(counts, frequent)),
    )


class Moments:
    """Mean and variance of columns of numbers, NaN where missing, of which a part at a time is seen.

    Chan, Golub and LeVeque (1979): each part's own mean and sum of squares are joined to those before it.
    """

    def __init__(self, width: int) -> None:
        self.n, self.mean, self.squares = np.zeros(width), np.zeros(width), np.zeros(width)

    def add(self, values: NDArray[np.float64]) -> None:
        """Take rows [N, width] in."""
        seen = ~np.isnan(values)
        n = seen.sum(0)
        mean = np.where(seen, values, 0).sum(0) / np.maximum(n, 1)
        self.join(n, mean, np.where(seen, (values - mean) ** 2, 0).sum(0))

    def join(self, n: NDArray[Any], mean: NDArray[np.float64], squares: NDArray[np.float64] | float = 0.0) -> None:
        """Take in n values of each column with this mean and sum of squares about it."""
        total, shift = np.maximum(self.n + n, 1), mean - self.mean
        self.squares = self.squares + squares + shift**2 * self.n * n / total
        self.mean, self.n = self.mean + shift * n / total, self.n + n

    @property
    def deviation(self) -> NDArray[np.float64]:
        """Return the standard deviations [width]."""
        return np.sqrt(self.squares / np.maximum(self.n, 1))


class Statistics:
    """What :func:`fit_encoder` finds, of training rows of which a part at a time is seen.

    Parameters
    ----------
    kinds : Kinds
        As there.
    """

    def __init__(self, kinds: Kinds) -> None:
        self.kinds, self.n_rows = kinds, 0
        self._moments = Moments(len(_of_kind(kinds, "numeric")))
        self._counts: list[Counter[str]] = [Counter() for _ in _of_kind(kinds, "categorical")]

    def add(self, frame: pd.DataFrame) -> None:
        """Take rows in."""
        self.n_rows += len(frame)
        self._moments.add(_numbers(frame, self.kinds))
        for name, count, text in zip(_of_kind(self.kinds, "categorical"), self._counts, _texts(frame, self.kinds)):
            count.update(text.tolist())
            if len(count) > MOST_VALUES:
                _no_id(name, count)
                raise DataError(f"feature {name!r} has more than {MOST_VALUES:,} categories; leave it out (drop)")

    def encoder(self, sample: pd.DataFrame, min_frequency: int | float | None, max_categories: int) -> FeatureEncoder:
        """Return the encoder of all rows seen; medians are those of a ``sample`` of them."""
        numbers, m = _numbers(sample, self.kinds), self._moments
        for name, n, held in zip(_of_kind(self.kinds, "numeric"), m.n, (~np.isnan(numbers)).sum(0)):
            if not n or not held:
                raise DataError(
                    f"feature {name!r} has no value, or hardly one, in the training part; leave the column out"
                )
        fill, whole = (np.nanmedian(numbers, axis=0) if numbers.shape[1] else np.zeros(0)), copy.deepcopy(m)
        whole.join(self.n_rows - m.n, fill)
        args = self._counts, self.n_rows, min_frequency, max_categories
        return _encoder(self.kinds, fill, whole.mean, whole.deviation, m.n == self.n_rows, *args)


def _no_id(name: str, count: Counter[str]) -> None:
    rows = count.total() - count[MISSING_CATEGORY]
    if len(count) > max(_FEW, 0.9 * rows):
        raise DataError(
            f"feature {name!r} looks like an id or free text: {len(count):,} different values in {rows:,} rows, so it tells "
            f"nothing of new rows; leave it out (drop: [{name}] in a recipe, drop=[{name!r}] in Python)"
        )


def _frequent(count: Counter[str], least: float, most: int) -> set[str]:
    """Return the categories that keep a column of their own: the most frequent, and, of equals, the first by name."""
    kept = [value for value in count if count[value] >= least]
    return set(sorted(kept, key=lambda value: (-count[value], value))[:most])


def _of_kind(kinds: Kinds, kind: FeatureKind) -> list[str]:
    return [name for name in kinds if kinds[name] == kind]


def _numbers(frame: pd.DataFrame, kinds: Kinds) -> NDArray[np.float64]:
    names = _of_kind(kinds, "numeric")
    columns = [as_numbers(column_of(frame, name, "features"), f"feature {name!r}") for name in names]
    return np.column_stack(columns) if columns else np.zeros((len(frame), 0))


def _texts(frame: pd.DataFrame, kinds: Kinds) -> list[NDArray[np.object_]]:
    columns = [as_text(column_of(frame, name, "features")) for name in _of_kind(kinds, "categorical")]
    return [np.where(pd.isna(text), MISSING_CATEGORY, text) for text in columns]
