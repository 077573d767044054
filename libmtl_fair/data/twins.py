"""Flip twins of a part of a data set, for audits (METHODS.md, 1.3; ours)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from libmtl_fair.data.dataset import Dataset


def flipped(data: Dataset, part: str) -> Iterator[tuple[str, Dataset]]:
    """Yield (attribute, data) with another sensitive value for everybody in a part, where the attribute is an input."""
    split = data.splits()[part]
    if split.reader is not None:
        for attribute, reader in getattr(split.reader, "flips", dict)().items():
            if attribute in split.groups:
                read: dict[str, Any] = {part: replace(split, reader=reader)}
                yield attribute, replace(data, **read)
        return
    for flip in () if split.twins is None else split.twins.flips:
        for shift in flip.shifts:
            x = flip.twins(split.x, split.groups[flip.attribute], shift)
            changed: dict[str, Any] = {part: replace(split, x=x, maps=())}  # in memory
            yield flip.attribute, replace(data, **changed)
