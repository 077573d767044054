"""A recipe: one YAML file that says what to train, audit and report, as a validated, frozen object."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator
from pydantic_core import ErrorDetails

from libmtl_fair.errors import RecipeError, near, unknown
from libmtl_fair.files import Json
from libmtl_fair.recipe import sections
from libmtl_fair.recipe.sections import FolderName, Method, Model, OptionalText, Section, Seeds, Train
from libmtl_fair.recipe.yaml_source import Location, Source, emit_yaml, parse_yaml, read_yaml
from libmtl_fair.validation import explain

_Section = TypeVar("_Section", bound=Section)
_RESERVED = {"plots"}
_WITHOUT_EFFECT = {"output", "description", "published"}
_TAGS = {"names", "declared", "str", "int", "float", "function-plain", "[key]"}


class Recipe(Section):
    """Data, model, training, seeds and methods (the first is the reference), audit, metrics, output."""

    name: FolderName
    description: OptionalText = ""
    data: sections.Data
    model: Model = Field(default_factory=Model)
    train: Train = Field(default_factory=Train)
    seeds: Seeds = (0,)
    methods: Annotated[dict[FolderName, Method], Field(min_length=1)]
    audit: sections.Audit = Field(default_factory=sections.Audit)
    metrics: sections.Metrics = Field(default_factory=sections.Metrics)
    tune: sections.Tune | None = None
    output: sections.Output = Field(default_factory=sections.Output)
    published: sections.Published | None = None
    _source: Source = PrivateAttr(default_factory=Source)

    @field_validator("methods", mode="after")
    @classmethod
    def _distinct_folders(cls, methods: dict[str, Method]) -> dict[str, Method]:
        folders = [name.lower() for name in methods]
        for name in methods:
            if name.lower() in _RESERVED:
                raise ValueError(f"the name {name!r} is reserved for a folder of the run; choose another")
            if folders.count(name.lower()) > 1:
                raise ValueError(f"expected names that differ by more than upper case, found {name!r} twice")
        return methods

    @property
    def reference(self) -> str:
        """Name of the first method: the one that differences and tolerances refer to."""
        return next(iter(self.methods))

    def train_for(self, method: str) -> Train:
        """Training settings of one method: the recipe's, with the method's own on top (the optimiser's field by field)."""
        change = self.methods[method].train
        made = _over(self.train, change)
        if change is None or "optimizer" not in change.model_fields_set:
            return made
        return made.model_copy(update={"optimizer": _over(self.train.optimizer, change.optimizer)})

    def model_for(self, method: str) -> Model:
        """Model settings of one method; another architecture starts from empty ``arch_args``."""
        spec = self.methods[method]
        changes: dict[str, object] = {}
        if spec.architecture is not None and spec.architecture != self.model.architecture:
            changes = {"architecture": spec.architecture, "arch_args": {}}
        if spec.arch_args is not None:
            changes["arch_args"] = spec.arch_args
        return _over(self.model, spec.model).model_copy(update=changes)

    def table_path(self) -> Path:
        """Path of the user's table."""
        return self.beside(self.data.table or "")

    def beside(self, name: str) -> Path:
        """Return a path that the recipe gives: relative paths are looked up beside the recipe first, then from here."""
        path = Path(name)
        beside = Path(self._source.file).parent / path
        return beside if not path.is_absolute() and beside.exists() else path

    def error(self, location: Location, message: str) -> RecipeError:
        """A RecipeError about one entry, with file and line where they are known."""
        return RecipeError(_problem(self._source, location, message))

    def to_dict(self) -> Json:
        """Plain data that :meth:`Recipe.from_dict` reads back to an equal recipe."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The complete recipe as YAML; :func:`load_recipe` reads it back to an equal recipe."""
        return emit_yaml(self.to_dict())

    def fingerprint(self) -> str:
        """sha256 (hex) of the content that decides results: everything but ``output``, ``description`` and ``published``.

        The order of methods and tasks counts, the order of other keys and the spelling of numbers do not.
        """
        content = {key: value for key, value in self.to_dict().items() if key not in _WITHOUT_EFFECT}
        content["methods"] = list(content["methods"].items())
        for part in ("tasks", "sensitive"):
            if isinstance(content["data"][part], dict):
                content["data"][part] = list(content["data"][part].items())
        text = json.dumps(_canonical(content), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def changed(self, overrides: Sequence[str]) -> Recipe:
        """Return this recipe with changes such as ``train.epochs=3``, validated anew."""
        source = apply_overrides(Source(file=self._source.file, data=self.to_dict()), overrides)
        return Recipe.from_dict(source.data, source)

    @classmethod
    def from_dict(cls, data: Mapping[str, object], source: Source | None = None) -> Recipe:
        """Validate plain data; a RecipeError has a line ``file:line: path: message`` for every problem found."""
        source = source or Source(data=dict(data))
        try:
            recipe = cls.model_validate(dict(data))
        except ValidationError as error:
            found: dict[str, int] = {}
            for item in error.errors(include_url=False):
                location = _clean(item["loc"], source.data)
                found[_problem(source, location, _message(item, location))] = source.line(location)
            raise RecipeError("\n".join(sorted(found, key=found.__getitem__))) from error
        recipe._source = source
        return recipe


def _problem(source: Source, location: Location, message: str) -> str:
    """Return one line ``file:line: path: message``, the path as ``methods.relif.delta[0]``."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    return f"{source.where(location)}: {path}{': ' if path else ''}{message}"


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


def _message(item: ErrorDetails, location: Location) -> str:
    if item["type"] == "extra_forbidden":
        known = _known_fields(location[:-1])
        guess = near(str(location[-1]), known)
        return f"unknown field; did you mean {guess!r}?" if guess else f"unknown field; expected {', '.join(known)}"
    if item["type"] == "missing":  # a key that was taken for a setting of the weighting may be spelt like the field
        given = item["input"]
        keys = given.get("args", given) if isinstance(given, Mapping) else None
        guess = near(str(location[-1]), keys) if isinstance(keys, Mapping) else None
        return "required, but missing" + (f"; did you mean it by {guess!r}?" if guess else "")
    return explain(item)


def _known_fields(location: Location) -> list[str]:
    """Names of the fields at ``location`` in a model, through mappings of models."""
    models: list[type[BaseModel]] = [Recipe]
    for part in location:
        if models and part in models[0].model_fields:
            models = _models_in(models[0].model_fields[str(part)].annotation)
    if not models:
        return []
    return [
        name for name in models[0].model_fields if name != "args" or models[0] is not Method
    ]  # of a method they stand beside it


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _over(base: _Section, change: Section | None) -> _Section:
    """Return a section with what ``change`` sets."""
    return base.model_copy(update={name: getattr(change, name) for name in change.model_fields_set} if change else None)


def _canonical(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    return [_canonical(item) for item in value] if isinstance(value, list) else value


def apply_overrides(source: Source, overrides: Sequence[str]) -> Source:
    """Return ``source`` with every ``a.b=value`` set; later ones win. A path that does not exist is refused."""
    data, marks = deepcopy(source.data), dict(source.overrides)
    for text in overrides:
        path, sign, value = text.partition("=")
        keys = path.strip().split(".")
        try:
            if not sign or not all(keys):
                raise RecipeError("expected path=value, such as train.epochs=3")
            location = _set(data, keys, _value(value.strip()))
        except RecipeError as error:
            raise RecipeError(f"--set {text}: {error}") from error
        marks = {where: mark for where, mark in marks.items() if where[: len(location)] != location}
        marks[location] = text
    return replace(source, data=data, overrides=marks)


def _value(text: str) -> object:
    try:
        data = parse_yaml(f"value: {text}\n", "value").data
    except RecipeError as error:
        raise RecipeError(f"expected a YAML value: {str(error).split(': ', 1)[1]}") from error
    if isinstance(data, dict) and list(data) == ["value"]:
        return data["value"]
    raise RecipeError("expected one YAML value after '=', found several")


def _set(data: Any, keys: list[str], value: object) -> Location:
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
                _may_add(data, location, key)
        keys, location = keys[end:], (*location, key)
        if not keys:
            data[key] = value
        elif isinstance(data, dict) and data.get(key) is None:
            data[key] = {}
        data = data[key]
    return location


def _may_add(data: dict[str, object], location: Location, key: str) -> None:
    """Refuse a path that does not exist: a misspelt field, or a method that the recipe does not have."""
    known = list(data) if location == ("methods",) else _known_fields(location)
    free = len(location) > 1 and location[0] in ("methods", "data", "tune", "model")
    if free or (key in known and location != ("methods",)):
        return
    guess = near(key, known)
    hint = f"did you mean {guess!r}?" if guess else f"expected one of {', '.join(known)}"
    raise RecipeError(f"unknown field {key!r} in {'.'.join(map(str, location)) or 'the recipe'}; {hint}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML file, override entries (``"train.epochs=3"``, ``"seeds=[0, 1]"``) and validate the recipe."""
    source = read_yaml(path)
    if not isinstance(source.data, dict):
        raise RecipeError(
            f"{path}:1: expected a mapping with name, data and methods, found {type(source.data).__name__}"
        )
    source = apply_overrides(source, overrides)
    return Recipe.from_dict(source.data, source)


def check_names(
    recipe: Recipe,
    weightings: Collection[str],
    architectures: Collection[str],
    datasets: Collection[str],
    arguments: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Check the names a recipe uses against what is registered; ``arguments`` are the settings that weightings take."""
    used: list[tuple[Location, str, str, Collection[str]]] = []
    if recipe.data.name is not None:
        used.append((("data", "name"), "data set", recipe.data.name, datasets))
    used.append((("model", "architecture"), "architecture", recipe.model.architecture, architectures))
    for name, method in recipe.methods.items():
        named = (("weighting", method.weighting, weightings), ("architecture", method.architecture, architectures))
        used += [(("methods", name, what), what, value, known) for what, value, known in named if value is not None]
        if arguments is not None and method.weighting in arguments:
            options = {*arguments[method.weighting], *(set(Method.model_fields) - {"args"})}
            used += [(("methods", name, key), f"setting of {method.weighting}", key, options) for key in method.args]
    wrong = [entry for entry in used if entry[2] not in entry[3]]
    if wrong:
        lines = (_problem(recipe._source, where, unknown(what, value, known)) for where, what, value, known in wrong)
        raise RecipeError("\n".join(lines))
