"""Group ids of sensitive attributes: binned, merged, restricted, intersected; missing values by one of three rules."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.data.frames import (
    Series,
    as_numbers,
    as_text,
    column_of,
    ids_of,
    is_date,
    is_numeric,
    number_text,
    values_in,
)
from libmtl_fair.data.spec import SensitiveSpec
from libmtl_fair.errors import DataError, about, unknown
from libmtl_fair.validation import Keep, Listed, MissingRule, checked

Specs = Mapping[str, SensitiveSpec]
MISSING_GROUP = "(missing)"
"""Name of the group of rows without a value, under ``missing="group"``."""
MOST_NUMBERS = 10
"""Whole numbers that may be a group each, as codes are; more are refused."""


@dataclass(frozen=True)
class Groups:
    """Groups of one attribute: ``ids`` int64 [N] (-1 unknown), their ``names``, and ``gap`` bool [N]: no value."""

    attribute: str
    spec: SensitiveSpec
    ids: NDArray[np.int64]
    names: tuple[str, ...]
    gap: NDArray[np.bool_]

    def take(self, rows: NDArray[np.int64]) -> Groups:
        """Return the groups of some rows; names and ids stay as they are."""
        return replace(self, ids=self.ids[rows], gap=self.gap[rows])


def tell_tale_columns(spec: SensitiveSpec, known: Specs) -> set[str]:
    """Return the columns from which an attribute, or a part of an intersection, can be read off."""
    parts = [known[part] for part in spec.of] or [spec]
    return {column for part in parts for column in (part.column, *part.also_in) if column}


def choose_sensitive(
    chosen: Sequence[str] | str, known: Specs, keep_groups: Mapping[str, Keep] | None = None
) -> tuple[dict[str, SensitiveSpec], dict[str, SensitiveSpec]]:
    """Return the specs of the chosen attributes, and all known ones with ``keep_groups`` applied.

    >>> choose_sensitive("race:top2", {"race": SensitiveSpec(column="race")})[0]["race"].keep
    2
    """
    keep = {name: {"keep": value} for name, value in (keep_groups or {}).items()}
    known = {name: spec.model_copy(update=keep.get(name)) for name, spec in known.items()}
    specs: dict[str, SensitiveSpec] = {}
    for item in checked(Listed, chosen, "sensitive"):
        name, spec = _one_choice(item, known)
        specs[name] = spec.model_copy(update=keep.get(name))
    used = {*specs, *(part for spec in specs.values() for part in spec.of)}
    for name in keep:
        if name not in used:
            raise DataError(f"keep_groups: {unknown('chosen sensitive attribute', name, used)}")
    return specs, known


def _one_choice(item: str, known: Specs) -> tuple[str, SensitiveSpec]:
    if item in known:
        return item, known[item]
    if "*" in item:
        parts = tuple(part.strip() for part in item.split("*"))
        for part in parts:
            if part not in known:
                raise DataError(f"intersection {item!r}: {unknown('sensitive attribute', part, known)}")
        return item, SensitiveSpec(of=parts)
    name, colon, rule = item.partition(":")
    if colon and name in known and rule.startswith("top") and rule[3:].isdigit():
        return name, known[name].model_copy(update={"keep": int(rule[3:])})
    raise DataError(unknown("sensitive attribute", name if colon and name not in known else item, known))


@about("sensitive")
def make_groups(attribute: str, spec: SensitiveSpec, frame: pd.DataFrame, missing: MissingRule, known: Specs) -> Groups:
    """Return the group ids of one attribute for every row of ``frame``.

    Groups are sorted by name, those of bins by their edges, declared labels as declared.
    """
    if missing not in get_args(MissingRule):
        raise DataError(f"missing: {unknown('rule', missing, get_args(MissingRule))}")
    if spec.of:
        parts = [make_groups(part, known[part], frame, missing, known) for part in spec.of]
        groups = _intersect(attribute, spec, parts)
    else:
        groups = _from_column(attribute, spec, frame, missing)
    if spec.keep is not None:
        groups = _kept(groups, spec.keep, f"sensitive attribute {attribute!r}")
    if len(groups.names) < 2:
        raise DataError(
            f"sensitive attribute {attribute!r} has one group ({', '.join(groups.names) or 'none known'}); comparing "
            "needs at least two: check its column, bins, merge and keep, or leave the attribute out"
        )
    return groups


def _from_column(attribute: str, spec: SensitiveSpec, frame: pd.DataFrame, missing: MissingRule) -> Groups:
    where = f"sensitive attribute {attribute!r}"
    series = column_of(frame, str(spec.column), where)
    if not (spec.bins or spec.merge or spec.labels):
        need_groups(series, where)
    text, order = _text(attribute, spec, frame)
    if spec.merge:
        held = set(values_in(text))
        absent = [value for value in spec.merge if value not in held]
        if absent and not held <= set(spec.merge):  # a list of all codes may name some that nobody has
            raise DataError(f"{where}: merge: {unknown('value', absent[0], sorted(held))}")
        text = np.array([spec.merge.get(value, value) for value in text], dtype=object)
        order = list(dict.fromkeys(spec.merge.get(name, name) for name in order))
    present = values_in(text)
    names = [name for name in order if name in present] if order else present
    extra = sorted(set(present) - set(names))
    if extra:
        raise DataError(f"{where}: column {spec.column!r} holds {extra[0]!r}, which is not among the labels {order}")
    ids = ids_of(text, names)
    gap = ids < 0
    if gap.any() and missing == "error":
        raise DataError(
            f"{where}: {gap.sum()} of {len(ids)} values are missing; use missing='drop' (leave these rows out of group "
            "statistics) or missing='group' (a group of their own)"
        )
    if gap.any() and missing == "group":
        ids, names = np.where(gap, len(names), ids), [*names, MISSING_GROUP]
    return Groups(attribute, spec, ids, tuple(names), gap)


def _text(attribute: str, spec: SensitiveSpec, frame: pd.DataFrame) -> tuple[NDArray[np.object_], list[str]]:
    """Return the values of an attribute's column as text, None where missing, and their declared order."""
    where = f"sensitive attribute {attribute!r}"
    series = column_of(frame, str(spec.column), where)
    return _binned(as_numbers(series, where), spec) if spec.bins else (as_text(series), list(spec.labels))


def cells(attribute: str, known: Specs, frame: pd.DataFrame) -> NDArray[np.object_]:
    """Return an attribute's value in each row as text, None where missing; of an intersection its parts' values, joined."""
    spec = known[attribute]
    if not spec.of:
        return _text(attribute, spec, frame)[0]
    parts = zip(*(cells(part, known, frame) for part in spec.of))
    return np.array([None if None in cell else "\0".join(cell) for cell in parts], dtype=object)


def known_groups(
    attribute: str, known: Specs, names: Sequence[str], frame: pd.DataFrame, missing: MissingRule
) -> NDArray[np.int64]:
    """Return the group ids of new rows, int64 [N], among the ``names`` that training found; -1 for any other value."""

    def text(name: str) -> NDArray[np.object_]:
        spec = known[name]
        if spec.of:
            parts = [text(part) for part in spec.of]
            return np.array([None if None in cell else " & ".join(cell) for cell in zip(*parts)], dtype=object)
        codes, found = pd.factorize(_text(name, spec, frame)[0])
        rest = MISSING_GROUP if missing == "group" else None
        return np.array([*(spec.merge.get(value, value) for value in found), rest], dtype=object)[codes]

    return ids_of(text(attribute), names)


def need_groups(series: Series, where: str) -> None:
    """Refuse numbers that would make a group each, and dates, with bins that would do.

    Raises
    ------
    DataError
        More than 10 different numbers, more than 2 with fractions, or dates.

    Examples
    --------
    >>> need_groups(pd.Series([0, 1, 1]), "sex")
    """
    if not (is_date(series) or (is_numeric(series) and not pd.api.types.is_bool_dtype(series))):
        return
    values = as_numbers(series, where)
    seen = np.unique(values[~np.isnan(values)])
    if not is_date(series) and len(seen) <= (MOST_NUMBERS if (seen % 1 == 0).all() else 2):
        return
    what = "dates" if is_date(series) else f"{len(seen)} different numbers, from {seen[0]:g} to {seen[-1]:g}"
    advice = "make an age, a year or the like of it first"
    if not is_date(series):
        edges = f"[{', '.join(map(number_text, quartiles(values)))}]"
        advice = (
            f"give bins, such as its quartiles: bins: {edges} in a recipe, pd.cut(column, [...]) before an estimator"
        )
    raise DataError(f"{where}: column {series.name!r} holds {what}; one group a value compares nobody: {advice}")


def quartiles(values: NDArray[np.float64]) -> list[float]:
    """Return the three quartiles as edges of bins, rounded where that keeps them apart, each once and none at the bottom."""
    seen = values[~np.isnan(values)]
    edges = np.quantile(seen, [0.25, 0.5, 0.75])
    rounded = np.round(edges) if len(np.unique(np.round(edges))) == len(np.unique(edges)) else edges
    return [float(f"{edge:.10g}") for edge in np.unique(rounded) if edge > seen.min()]


def _binned(values: NDArray[np.float64], spec: SensitiveSpec) -> tuple[NDArray[np.object_], list[str]]:
    edges = [number_text(edge) for edge in spec.bins]
    between = (f"{low} to under {high}" for low, high in itertools.pairwise(edges))
    names = list(spec.labels) or [f"under {edges[0]}", *between, f"{edges[-1]} and over"]
    text = np.array(names, dtype=object)[np.digitize(values, spec.bins)]
    text[np.isnan(values)] = None
    return text, names


def _intersect(attribute: str, spec: SensitiveSpec, parts: Sequence[Groups]) -> Groups:
    """Return the cells that occur, in the order of their parts' groups."""
    ids = np.stack([part.ids for part in parts], axis=1)
    known = (ids >= 0).all(axis=1)
    cells, place = np.unique(ids[known], axis=0, return_inverse=True)
    names = tuple(" & ".join(part.names[i] for part, i in zip(parts, cell)) for cell in cells)
    found = np.full(len(ids), -1)
    found[known] = place
    return Groups(attribute, spec, found, names, gap=np.any([part.gap for part in parts], axis=0))


def _kept(groups: Groups, keep: Sequence[str] | int, where: str) -> Groups:
    if isinstance(keep, int):
        counts = np.bincount(groups.ids[groups.ids >= 0], minlength=len(groups.names))
        keep = [groups.names[index] for index in np.argsort(-counts, kind="stable")[:keep]]
    for name in keep:
        if name not in groups.names:
            raise DataError(f"{where}: keep: {unknown('group', name, groups.names)}")
    names = tuple(name for name in groups.names if name in keep)
    new_id = np.array([names.index(name) if name in names else -1 for name in groups.names] + [-1])
    return replace(groups, ids=new_id[groups.ids], names=names)
