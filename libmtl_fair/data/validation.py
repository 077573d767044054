"""Values that a user declared, checked for their type where they come in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from libmtl_fair.errors import DataError


def given_names(value: object, what: str) -> tuple[str, ...]:
    """Return a list of names; one string is a list of one.

    Raises
    ------
    DataError : anything but a string or an iterable of strings.

    >>> given_names("age", "features")
    ('age',)
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise DataError(f"{what}: expected a list of names, found {value!r}")
    return tuple(given_text(item, f"{what}: each name") for item in value)


def given_text(value: object, what: str) -> str:
    """Return a string.

    Raises
    ------
    DataError : it is none.
    """
    if not isinstance(value, str):
        raise DataError(f"{what} must be a text, found {value!r}")
    return value


def given_number(value: object, what: str) -> float:
    """Return a finite number.

    Raises
    ------
    DataError : it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{what} must be a finite number, found {value!r}")
    return value


def given_mapping(value: object, what: str) -> dict[Any, Any]:
    """Return a mapping; None is an empty one.

    Raises
    ------
    DataError : it is none.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"{what} must be a mapping, found {value!r}")
    return dict(value)


def given_keep(value: object, what: str) -> tuple[str, ...] | int:
    """Return which groups to keep: their names, or how many of the largest.

    Raises
    ------
    DataError : neither, or fewer than two of the largest.
    """
    if isinstance(value, bool) or (isinstance(value, int) and value < 2):
        raise DataError(f"{what}: keep must be at least 2 groups, found {value}")
    return value if isinstance(value, int) else given_names(value, f"{what}: keep")
