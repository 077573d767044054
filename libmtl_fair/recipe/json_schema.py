"""The JSON schema of recipes, for editors: as wide as what recipes take, so that no good recipe is marked.

The file beside this one is what :func:`recipe_schema` gives; ``python -m libmtl_fair.recipe.json_schema`` writes it anew.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from libmtl_fair.files import Json, atomic_path
from libmtl_fair.recipe.schema import Recipe

FILE = "recipe.schema.json"
_SPELT = ("classes", "merge", "keep", "keep_groups", "labels")
"""Fields of values of a column, which may be spelt like numbers."""


def recipe_schema() -> Json:
    """Return the JSON schema (draft 2020-12) of recipes."""
    made: Json = _widened(Recipe.model_json_schema())
    method = made["$defs"]["Method"]
    method["additionalProperties"] = {"description": "a setting of the weighting: libmtl-fair methods NAME lists them"}
    method.pop("required", None)  # a weighting, or post
    for spec in ("TaskSpec", "SensitiveSpec"):
        for name in set(_SPELT) & set(made["$defs"][spec]["properties"]):
            made["$defs"][spec]["properties"][name] = {}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": "written by python -m libmtl_fair.recipe.json_schema",
        **made,
    }


def shipped_schema() -> str:
    """Return the schema as it is shipped, JSON."""
    return (resources.files("libmtl_fair.recipe") / FILE).read_text(encoding="utf-8")


def with_settings(schema: Json) -> Json:
    """Return the schema with the settings of every weighting that is installed here, for an editor to complete."""
    from libmtl_fair.libmtl.registry import described, weighting_names

    cases = []
    for name in weighting_names():
        told = {
            row["name"]: {"description": f"{row['help'] or 'of LibMTL'} (default: {row['default']})"}
            for row in described(name)
        }
        named = {"properties": {"weighting": {"const": name}}, "required": ["weighting"]}
        cases += [{"if": named, "then": {"properties": told}}] if told else []
    method = schema["$defs"]["Method"] | {"allOf": cases}
    return {**schema, "$defs": schema["$defs"] | {"Method": method}}


def as_text(schema: Json) -> str:
    """Return a schema as the file holds it."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _widened(node: object) -> Any:
    """Return a schema where one value stands for a list of one, nothing for a default, and no title repeats a name."""
    if isinstance(node, list):
        return [_widened(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: item if key in ("default", "enum", "required") else _widened(item) for key, item in node.items()}
    if isinstance(made.get("title"), str):
        del made["title"]
    if made.get("maxLength") == 10_000:
        del made["maxLength"]
    if made.get("type") != "array":
        return made
    about = {key: made.pop(key) for key in ("default", "description") if key in made}
    made.pop("minItems", None)
    return {"anyOf": [made, made["items"], {"type": "null"}] if "items" in made else [made, {"type": "null"}], **about}


def write() -> Path:
    """Write the shipped file anew, in the source tree."""
    target = Path(__file__).with_name(FILE)
    with atomic_path(target) as path:
        path.write_text(as_text(recipe_schema()), encoding="utf-8")
    return target


if __name__ == "__main__":
    write()
