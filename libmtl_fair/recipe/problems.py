"""Validation problems as one message with lines: what is wrong, where, expected, found, and the near name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from libmtl_fair.errors import RecipeError, near
from libmtl_fair.recipe.yaml_source import Location, Source
from libmtl_fair.validation import explain

_TAGS = {"names", "declared", "str", "int", "float", "function-plain", "[key]"}


def to_recipe_error(error: ValidationError, source: Source, root: type[BaseModel]) -> RecipeError:
    """Turn pydantic's errors into one RecipeError, one line a problem: ``file:line: path: message``."""
    found: dict[str, int] = {}
    for item in error.errors(include_url=False):
        location = _clean(item["loc"], source.data)
        found[problem(source, location, _message(item, location, root))] = source.line(location)
    return RecipeError("\n".join(sorted(found, key=found.__getitem__)))


def problem(source: Source, location: Location, message: str) -> str:
    """One line ``file:line: path: message``."""
    return f"{source.where(location)}: {dotted(location)}{message}"


def dotted(location: Location) -> str:
    """Write a location as ``train.epochs: `` (nothing for the top).

    >>> dotted(("methods", "relif", "delta", 0))
    'methods.relif.delta[0]: '
    """
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    return f"{text}: " if text else ""


def _clean(loc: tuple[int | str, ...], data: Any) -> Location:
    """Drop the tags that pydantic adds for unions and for settings gathered into ``args``."""
    path: list[str | int] = []
    for part in loc:
        listed = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if listed or (isinstance(data, Mapping) and part in data):
            data = data[part]
        elif part in _TAGS or (part == "args" and path[:1] == ["methods"]):
            continue
        path.append(part)
    return tuple(path)


def _message(item: ErrorDetails, location: Location, root: type[BaseModel]) -> str:
    if item["type"] == "extra_forbidden":
        known = known_fields(root, location[:-1])
        guess = near(str(location[-1]), known)
        return f"unknown field; did you mean {guess!r}?" if guess else f"unknown field; expected {', '.join(known)}"
    if item["type"] == "missing":  # a key that was taken for a setting of the weighting may be spelt like the field
        given = item["input"]
        keys = given.get("args", given) if isinstance(given, Mapping) else None
        guess = near(str(location[-1]), keys) if isinstance(keys, Mapping) else None
        return "required, but missing" + (f"; did you mean it by {guess!r}?" if guess else "")
    return explain(item)


def known_fields(root: type[BaseModel], location: Location) -> list[str]:
    """Names of the fields at ``location`` in a model, through mappings of models."""
    models = [root]
    for part in location:
        if models and part in models[0].model_fields:
            models = _models_in(models[0].model_fields[str(part)].annotation)
    return [name for name in models[0].model_fields if name != "args"] if models else []


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
