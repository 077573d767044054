"""``--set train.epochs=3``: a path and a YAML value, put into the recipe's data before it is validated."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from libmtl_fair.errors import RecipeError, near
from libmtl_fair.recipe.problems import known_fields
from libmtl_fair.recipe.yaml_source import Location, Source, parse_yaml


def apply_overrides(source: Source, overrides: Sequence[str], root: type[BaseModel]) -> Source:
    """Return ``source`` with every ``a.b=value`` set; later ones win.

    Raises
    ------
    RecipeError
        No ``=``, a value that is not YAML, or a path that does not exist, with the near name.
    """
    data, marks = deepcopy(source.data), dict(source.overrides)
    for text in overrides:
        path, sign, value = text.partition("=")
        keys = path.strip().split(".")
        try:
            if not sign or not all(keys):
                raise RecipeError("expected path=value, such as train.epochs=3")
            location = _set(data, keys, _value(value.strip()), root)
        except RecipeError as error:
            raise RecipeError(f"--set {text}: {error}") from error
        marks = {where: mark for where, mark in marks.items() if where[: len(location)] != location}
        marks[location] = text
    return replace(source, data=data, overrides=marks)


def _value(text: str) -> Any:
    try:
        data = parse_yaml(f"value: {text}\n", "value").data
    except RecipeError as error:
        raise RecipeError(f"expected a YAML value: {str(error).split(': ', 1)[1]}") from error
    if not isinstance(data, dict) or list(data) != ["value"]:
        raise RecipeError("expected one YAML value after '=', found several")
    return data["value"]


def _set(data: Any, keys: list[str], value: Any, root: type[BaseModel]) -> Location:
    """Put the value in its place; the longest run of keys that names an entry is one, as names of methods have dots."""
    location: Location = ()
    while keys:
        key: str | int = keys[0]
        end = 1
        if isinstance(data, list):
            if not keys[0].isdecimal() or int(keys[0]) >= len(data):
                raise RecipeError(f"expected a position from 0 to {len(data) - 1} in the list, found {keys[0]!r}")
            key = int(keys[0])
        elif not isinstance(data, dict):
            raise RecipeError(f"{'.'.join(map(str, location))} holds a single value, not a section")
        else:
            end = next((n for n in range(len(keys), 1, -1) if ".".join(keys[:n]) in data), 1)
            key = ".".join(keys[:end])
            if key not in data and (location != ("methods",) or keys[end:] or not isinstance(value, dict)):
                _may_add(data, location, key, root)
        keys, location = keys[end:], (*location, key)
        if not keys:
            data[key] = value
        elif isinstance(data, dict) and data.get(key) is None:
            data[key] = {}
        data = data[key]
    return location


def _may_add(data: dict[str, Any], location: Location, key: str, root: type[BaseModel]) -> None:
    """Refuse a path that does not exist: a misspelt field, or a method that the recipe does not have."""
    known = list(data) if location == ("methods",) else known_fields(root, location)
    free = len(location) > 1 and location[0] in ("methods", "data", "tune", "model")
    if free or (key in known and location != ("methods",)):
        return
    guess = near(key, known)
    hint = f"did you mean {guess!r}?" if guess else f"expected one of {', '.join(known)}"
    raise RecipeError(f"unknown field {key!r} in {'.'.join(map(str, location)) or 'the recipe'}; {hint}")
