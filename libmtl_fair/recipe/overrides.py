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
        if not sign or not all(keys):
            raise RecipeError(f"--set {text}: expected path=value, such as train.epochs=3")
        location = _set(data, keys, _value(value, text), text, root)
        marks = {where: mark for where, mark in marks.items() if where[: len(location)] != location}
        marks[location] = text
    return replace(source, data=data, overrides=marks)


def _value(text: str, override: str) -> Any:
    if not text.strip():
        return None
    try:
        data = parse_yaml(f"value: {text.strip()}\n", "value").data
    except RecipeError as error:
        raise RecipeError(f"--set {override}: expected a YAML value: {str(error).split(': ', 1)[1]}") from error
    if not isinstance(data, dict) or list(data) != ["value"]:
        raise RecipeError(f"--set {override}: expected one YAML value after '=', found several")
    return data["value"]


def _set(data: Any, keys: list[str], value: Any, text: str, root: type[BaseModel]) -> Location:
    location: Location = ()
    while True:
        key, rest = _step(data, keys)
        if isinstance(data, list):
            key = _position(data, key, text)
        elif not isinstance(data, dict):
            raise RecipeError(f"--set {text}: {'.'.join(map(str, location))} holds a single value, not a section")
        elif key not in data:
            _may_add(data, location, str(key), bool(rest) or not isinstance(value, dict), text, root)
        location = (*location, key)
        if not rest:
            data[key] = value
            return location
        if isinstance(data, dict) and data.get(key) is None:
            data[key] = {}
        data, keys = data[key], rest


def _step(data: Any, keys: list[str]) -> tuple[str | int, list[str]]:
    """Take the longest run of keys that names an entry, so that method names may contain dots."""
    if isinstance(data, dict):
        for end in range(len(keys), 1, -1):
            if ".".join(keys[:end]) in data:
                return ".".join(keys[:end]), keys[end:]
    return keys[0], keys[1:]


def _position(items: list[Any], key: str | int, text: str) -> int:
    if not str(key).isdecimal() or int(key) >= len(items):
        raise RecipeError(f"--set {text}: expected a position from 0 to {len(items) - 1} in the list, found {key!r}")
    return int(key)


def _may_add(
    data: dict[str, Any], location: Location, key: str, within: bool, text: str, root: type[BaseModel]
) -> None:
    """Refuse a path that does not exist: a misspelt field, or a method that the recipe does not have."""
    if location == ("methods",):
        if not within:
            return
        known = list(data)
    elif location and location[0] in ("methods", "data", "tune", "model") and len(location) > 1:
        return
    else:
        known = known_fields(root, location)
        if key in known:
            return
    guess = near(key, known)
    hint = f"did you mean {guess!r}?" if guess else f"expected one of {', '.join(known)}"
    where = ".".join(map(str, location)) or "the recipe"
    raise RecipeError(f"--set {text}: unknown field {key!r} in {where}; {hint}")
