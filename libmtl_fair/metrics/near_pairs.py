"""Who is like whom: every person's nearest others, by a distance made from inputs alone, which no method can move (ours)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd

from libmtl_fair.arrays import Bools, Floats, Ints, Values, as_floats
from libmtl_fair.data.frames import Series, as_numbers, is_date
from libmtl_fair.data.tables import settled
from libmtl_fair.errors import CheckpointError, DataError, unknown
from libmtl_fair.files import DAMAGE, atomic_path

Features: TypeAlias = Values | pd.DataFrame
Weights: TypeAlias = Mapping[str, float] | Values
Distance: TypeAlias = str | Callable[[Floats, Floats], float]
CLIP = 5.0
_MANY_VALUES, _CELLS, _SLACK, _DIGITS = 1000, 1 << 20, 8, 10


@dataclass(frozen=True)
class NearPairs:
    """Each of A people with the k nearest of all n: rows ``anchors`` [A], ``neighbours`` [A, k], ``distances`` [A, k], ascending.

    ``digest`` tells what they were made from: features, distance, k, anchors.
    """

    anchors: Ints
    neighbours: Ints
    distances: Floats
    n: int
    digest: str

    @property
    def k(self) -> int:
        """Neighbours of each person."""
        return int(self.neighbours.shape[1])

    def describe(self) -> dict[str, object]:
        """Return n, anchors, k, number of pairs, quantiles of the distance, and the share of pairs at distance 0."""
        low, middle, high = np.quantile(self.distances, (0.1, 0.5, 0.9)).tolist()
        sizes = {"n": self.n, "anchors": len(self.anchors), "k": self.k, "pairs": self.neighbours.size}
        zero = float(np.mean(self.distances == 0))
        return {**sizes, "distance_p10": low, "distance_p50": middle, "distance_p90": high, "distance_zero": zero}

    def variance(self, values: Floats) -> float:
        """Return the node-robust variance of the mean of ``values`` [A, k], already centred at 0.

        A person may be in many pairs: ``(sum_i h_i^2 - sum_pairs u^2) / |E|^2``, h_i being the sum over the pairs that contain i
        on either side.
        """
        first = np.repeat(self.anchors, self.k)
        sums = np.bincount(first, values.ravel(), self.n) + np.bincount(self.neighbours.ravel(), values.ravel(), self.n)
        return float(max(0.0, (sums**2).sum() - (values**2).sum()) / values.size**2)

    def save(self, path: str | Path) -> Path:
        """Write a compressed file that :meth:`load` reads."""
        kept = {name: getattr(self, name).astype(np.int32) for name in ("anchors", "neighbours")}
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, **kept, distances=self.distances, n=self.n, digest=self.digest)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> NearPairs:
        """Read what :meth:`save` wrote; CheckpointError where it is missing or damaged."""
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as held:
                anchors, neighbours = (held[name].astype(np.int64) for name in ("anchors", "neighbours"))
                made = cls(anchors, neighbours, held["distances"], int(held["n"]), str(held["digest"]))
        except DAMAGE as error:
            raise CheckpointError(f"{path} holds no near pairs ({error})") from error
        people = np.concatenate([anchors, neighbours.ravel()])
        shapes = neighbours.shape == made.distances.shape and neighbours.shape[:1] == anchors.shape
        if not shapes or not len(people) or people.min() < 0 or people.max() >= made.n:
            raise CheckpointError(f"{path} holds no near pairs (its rows do not fit together)")
        return made


def reference_matrix(features: Features, weights: Weights | None = None, train: Features | None = None) -> Floats:
    """Return columns [N, D] whose Euclidean distance is the reference distance.

    d(x, y)^2 = sum over numbers w_f^2 (clip5(x_f) - clip5(y_f))^2 + sum over categories w_f^2 1[x_f != y_f]; a category
    becomes one column a value, of height 1 / sqrt 2.

    Parameters
    ----------
    features : Features
        Array [N, d] of numbers, or a DataFrame of numbers and categories (text, categorical, boolean).
    weights : Weights, optional
        Column -> weight, or [d]; 1 where a column is not named.
    train : Features, optional
        Rows that numbers are standardised on. None: they are standardised already.

    Raises
    ------
    DataError
        Missing or infinite numbers, a column of more than 1,000 categories, weights that do not fit.
    """
    frame = _frame(features)
    factors = _weights(frame, weights)
    known = None if train is None else _frame(train)
    parts = []
    for name, column in frame.items():
        if _is_number(column):
            values = as_floats(column.to_numpy(np.float64, na_value=np.nan))
            if not np.isfinite(values).all():
                raise DataError(f"reference feature {name!r} has missing or infinite values; fill them or leave it out")
            if known is not None:
                if name not in known:
                    raise DataError(
                        f"the training rows of the reference: {unknown('column', str(name), map(str, known))}"
                    )
                base = as_floats(known[name].to_numpy(np.float64, na_value=np.nan))
                values = (values - np.nanmean(base)) / (np.nanstd(base) or 1.0)
            elif np.mean(np.abs(values) > CLIP) > 0.5:
                advice = f"is beyond ±{CLIP:g} for more than half of the people, where it is clipped"
                warnings.warn(f"reference feature {name!r} {advice}: standardise it, or give train=", stacklevel=4)
            parts.append(factors[name] * np.clip(values, -CLIP, CLIP)[:, None])
        else:
            codes, found = pd.factorize(column, use_na_sentinel=False)
            if len(found) > _MANY_VALUES:
                raise DataError(
                    f"reference feature {name!r} has {len(found):,} categories, as an identifier has; leave it out"
                )
            parts.append((codes[:, None] == np.arange(len(found))) * (factors[name] / np.sqrt(2)))
    return np.hstack(parts) if parts else np.zeros((len(frame), 0))


def _frame(features: Features) -> pd.DataFrame:
    features = settled(features)
    if isinstance(features, pd.DataFrame):
        dates = {name: as_numbers(features[name], "reference") for name in features if is_date(features[name])}
        return pd.DataFrame({name: dates.get(name, features[name]) for name in features}) if dates else features
    values = as_floats(features)
    if values.ndim != 2:
        raise DataError(f"reference features must be [N, d], found shape {list(values.shape)}")
    return pd.DataFrame(values)


def _is_number(column: Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _weights(frame: pd.DataFrame, weights: Weights | None) -> dict[object, float]:
    factors = dict.fromkeys(frame, 1.0)
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in factors:
                raise DataError(f"weights of the reference: {unknown('column', str(name), map(str, factors))}")
        factors |= {name: float(value) for name, value in weights.items()}
    elif weights is not None:
        given = as_floats(weights)
        if given.shape != (len(factors),):
            raise DataError(f"weights must be one a column, [{len(factors)}], found shape {list(given.shape)}")
        factors = dict(zip(factors, given.tolist()))
    if any(not 0 <= value < np.inf for value in factors.values()):
        raise DataError("weights of the reference must be finite and at least 0")
    return factors


def find_near_pairs(
    matrix: Floats, k: int = 10, anchors: int = 20000, seed: int = 0, distance: Distance | None = None
) -> NearPairs:
    """Return each person with the k nearest others; above ``anchors`` people a draw of so many, still among all.

    Exact, memory bounded. Of people at one distance those next by row come first, counted on from the person and round from
    the end: the same pairs in every run, and nobody is the neighbour of all.

    Parameters
    ----------
    matrix : Floats
        [N, D], Euclidean distance (scikit-learn: a tree for few columns, brute force for many); with ``distance``
        "precomputed" [N, N]; or what a function ``distance(x, y)``, or a metric that scikit-learn knows by name, is
        given rows of.

    Raises
    ------
    DataError
        Fewer than two people, or distances that are not finite and at least 0.
    """
    n = len(matrix)
    if n < 2 or k < 1 or anchors < 1:
        raise DataError(
            f"near pairs need two people, k and anchors of at least 1; found {n} people, k={k}, anchors={anchors}"
        )
    if distance == "precomputed" and matrix.shape != (n, n):
        raise DataError(f"distance='precomputed' needs a matrix [N, N], found shape {list(matrix.shape)}")
    rows = np.arange(n)
    if n > anchors:
        rows = np.sort(np.random.default_rng(seed).choice(n, anchors, replace=False))
    digest = pairs_digest(matrix, k, anchors, seed, distance)
    k = min(k, n - 1)
    search = _Euclidean(matrix, k) if distance is None else _Given(matrix, distance)
    found = [_nearest(part, *search.candidates(part, k), k, n) for part in _chunks(rows, search.at_once)]
    neighbours, squared = (np.concatenate(part) for part in zip(*found))
    return NearPairs(rows, neighbours, np.sqrt(squared), n, digest)


def pairs_digest(
    matrix: Floats, k: int = 10, anchors: int = 20000, seed: int = 0, distance: Distance | None = None
) -> str:
    """Return the sha256 of what :func:`find_near_pairs` would make pairs from."""
    how = getattr(distance, "__name__", str(distance))
    drawn = f"{anchors} of {seed}" if len(matrix) > anchors else "all"
    digest = hashlib.sha256(f"{how} {k} {drawn} {matrix.shape}".encode())
    digest.update(np.ascontiguousarray(matrix + 0.0).data)
    return digest.hexdigest()


def _chunks(rows: Ints, size: int) -> Iterator[Ints]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _nearest(rows: Ints, at: Ints, person: Ints, squared: Floats, k: int, n: int) -> tuple[Ints, Floats]:
    """Return the k first of each row's candidates, given as (place of the row, person, squared distance)."""
    order = np.lexsort(((person - rows[at]) % n, squared, at))
    starts = np.searchsorted(at[order], np.arange(len(rows)))
    taken = order[starts[:, None] + np.arange(k)]
    return person[taken], squared[taken]


class _Given:
    """Distances that the user gives: a matrix, or a function of two rows."""

    def __init__(self, matrix: Floats, distance: Distance) -> None:
        self.matrix, self.distance = matrix, distance
        self.at_once = max(1, _CELLS // len(matrix))

    def candidates(self, rows: Ints, k: int) -> tuple[Ints, Ints, Floats]:
        from sklearn.metrics import pairwise_distances

        found = self.matrix[rows]
        if self.distance != "precomputed":
            try:
                found = pairwise_distances(found, self.matrix, metric=self.distance)
            except (ValueError, TypeError) as error:
                raise DataError(f"distance {self.distance!r} gives no number for two people: {error}") from error
        if not (np.isfinite(found) & (found >= 0)).all():
            raise DataError("distances between people must be finite and at least 0")
        squared = np.array(found, dtype=np.float64) ** 2
        squared[np.arange(len(rows)), rows] = np.inf
        at, person = np.nonzero(squared <= np.partition(squared, k - 1)[:, k - 1 : k])
        return at, person, squared[at, person]


class _Euclidean:
    """Distances of different rows, each standing for the people who have it; equal up to rounding is equal."""

    def __init__(self, matrix: Floats, k: int) -> None:
        from sklearn.neighbors import NearestNeighbors

        keys = [row.tobytes() for row in np.ascontiguousarray(matrix + 0.0)]
        self.code = pd.factorize(pd.Series(keys, dtype=object))[0].astype(np.int64)
        self.points = matrix[np.unique(self.code, return_index=True)[1]]
        self.members = np.argsort(self.code, kind="stable")
        self.counts = np.bincount(self.code)
        self.starts = np.cumsum(self.counts) - self.counts
        self.key = self.code[self.members] * len(matrix) + self.members
        self.unit = float(matrix.var(0).sum()) or 1.0
        self.asked = min(k + 1 + _SLACK, len(self.points))
        self.search = NearestNeighbors(n_neighbors=self.asked).fit(self.points) if matrix.shape[1] else None
        self.at_once = max(1, _CELLS // (self.asked * max(1, matrix.shape[1])))

    def candidates(self, rows: Ints, k: int) -> tuple[Ints, Ints, Floats]:
        """Return all people who are no further from each row than its k-th nearest (of one point's, k + 1 next by row)."""
        if self.search is None:  # no column at all: everybody is at distance 0
            near = np.zeros((len(rows), 1), dtype=np.int64)
        else:
            near = self.search.kneighbors(self.points[self.code[rows]], return_distance=False)
        at, point = np.repeat(np.arange(len(rows)), near.shape[1]), near.ravel()
        squared = self._squared(rows, at, point).reshape(near.shape)
        order = np.argsort(squared, axis=1, kind="stable")
        near, squared = np.take_along_axis(near, order, 1), np.take_along_axis(squared, order, 1)
        enough = np.argmax(self.counts[near].cumsum(1) > k, axis=1)
        reach = squared[np.arange(len(rows)), enough]
        whole = (reach < squared[:, -1]) | (near.shape[1] == len(self.points))
        at, place = np.nonzero((squared <= reach[:, None]) & whole[:, None])
        parts = [(at, near[at, place], squared[at, place]), *self._tied(rows, np.flatnonzero(~whole), reach)]
        at, point, distance = (np.concatenate(part) for part in zip(*parts))
        return self._people(rows, at, point, distance, k)

    def _squared(self, rows: Ints, at: Ints, point: Ints) -> Floats:
        gaps = self.points[self.code[rows]][at] - self.points[point]
        return np.asarray(np.round(np.einsum("ij,ij->i", gaps, gaps) / self.unit, _DIGITS) * self.unit)

    def _tied(self, rows: Ints, open_rows: Ints, reach: Floats) -> Iterator[tuple[Ints, Ints, Floats]]:
        """Look through all points where those at the k-th distance may be more than were asked for."""
        from sklearn.metrics import euclidean_distances

        slack = 1e-8 * self.unit
        for part in _chunks(open_rows, max(1, _CELLS // len(self.points))):
            rough = euclidean_distances(self.points[self.code[rows[part]]], self.points, squared=True)
            at, point = np.nonzero(rough <= reach[part][:, None] + slack)
            squared = self._squared(rows, part[at], point)
            kept: Bools = squared <= reach[part[at]]
            yield part[at][kept], point[kept], squared[kept]

    def _people(self, rows: Ints, at: Ints, point: Ints, squared: Floats, k: int) -> tuple[Ints, Ints, Floats]:
        taken = np.minimum(self.counts[point], k + 1)
        after = np.searchsorted(self.key, point * len(self.code) + rows[at], side="right") - self.starts[point]
        place = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
        at, point, squared, after = (np.repeat(part, taken) for part in (at, point, squared, after))
        person = self.members[self.starts[point] + (after + place) % self.counts[point]]
        others = person != rows[at]
        return at[others], person[others], squared[others]
