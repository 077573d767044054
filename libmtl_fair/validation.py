"""What declarations of data and recipes share: field types that pydantic checks, and its errors in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import ErrorDetails, PydanticUseDefault

from libmtl_fair.errors import DataError, near

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
"""Unknown fields, wrong types and numbers that are not finite are refused."""

_Value = TypeVar("_Value")
_EXPECTED = {
    **dict.fromkeys(("int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping"),
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "text that is not empty",
    "string_too_long": "text of at most {max_length} characters",
    "too_short": "at least {min_length} value(s)",
    "too_long": "at most {max_length} value(s)",
}


def listed(value: object) -> object:
    """Return a single text or number as a list of one, and what can be walked through as a list."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return [value]
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else value


def distinct(values: tuple[_Value, ...]) -> tuple[_Value, ...]:
    """Refuse a value that is there twice."""
    repeated = sorted({str(value) for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"expected distinct values, found {', '.join(repeated)} more than once")
    return values


def _keep(value: object) -> tuple[str, ...] | int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 2:
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return distinct(tuple(value))
    raise ValueError(
        f"expected names of groups, or how many of the largest: keep must be at least 2 groups, found {value!r}"
    )


def form(value: object) -> str:
    """Return pydantic's tag of a field that takes a list of names or a mapping that declares each."""
    return "declared" if isinstance(value, Mapping) else "names"


def _spelt(value: object) -> object:
    """Values of a column may be spelt like numbers (a class 0, a group 1): take them as the column's text has them."""
    if isinstance(value, Mapping):
        return {_spelt(key): _spelt(item) for key, item in value.items()}
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else value


def _spelt_each(value: object) -> object:
    items = listed(value) if not isinstance(value, str | int | float) else value
    return [_spelt(item) for item in items] if isinstance(items, list) else items


def _as_given(value: float, check: ValidatorFunctionWrapHandler) -> float:
    check(value)
    return value


def _or_default(value: object) -> object:
    if value is None or (isinstance(value, list | tuple | dict) and not value):
        raise PydanticUseDefault
    return value


MissingRule = Literal["drop", "group", "error"]
Text = Annotated[str, Field(min_length=1, max_length=10_000)]
Listed = Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(listed)]
"""Names, or one name."""
Names = Annotated[
    tuple[Text, ...], Field(strict=False, min_length=1), AfterValidator(distinct), BeforeValidator(listed)
]
"""At least one name, each of them once."""
Keep = Annotated[tuple[str, ...] | int, PlainValidator(_keep), PlainSerializer(lambda value: value)]
"""Names of the groups to keep, or how many of the largest."""

_OPTIONAL = (BeforeValidator(_or_default), PlainSerializer(lambda value: value or None))
OptionalNames = Annotated[Names, *_OPTIONAL]
"""Names, or an empty list or None for none."""
Edges = Annotated[
    tuple[Annotated[float, WrapValidator(_as_given)], ...], Field(strict=False), BeforeValidator(listed), *_OPTIONAL
]
"""Numbers, or none."""
_Table = Annotated[dict[Text, Text], BeforeValidator(_spelt)]
Renames = Annotated[_Table, *_OPTIONAL]
"""Value of a column -> name, or none."""
_Values = Annotated[
    tuple[Text, ...], Field(strict=False, min_length=2), AfterValidator(distinct), BeforeValidator(_spelt_each)
]
_Named = Annotated[Annotated[_Values, Tag("names")] | Annotated[_Table, Tag("declared")], Discriminator(form)]
Classes = Annotated[_Named | None, *_OPTIONAL]
"""At least two values of a column, or value -> name, or none."""

_adapter = cache(TypeAdapter)


def checked(kind: object, value: object, what: str) -> Any:
    """Return ``value`` as pydantic takes it for a type; ``what`` says where it stands, in the DataError.

    >>> checked(Listed, "age", "features")
    ('age',)
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise DataError(f"{what}: {explain(error.errors(include_url=False)[0])}") from error


def explain(item: ErrorDetails) -> str:
    """Say what one of pydantic's errors expected, what it found, and the near name where there is one."""
    kind, ctx = item["type"], item.get("ctx", {})
    if kind == "value_error":
        return str(ctx.get("error", item["msg"]))
    found = _found(item["input"])
    if kind == "literal_error":
        options = [word.strip().strip("'") for word in str(ctx["expected"]).replace(" or ", ",").split(",")]
        guess = near(str(item["input"]), options)
        hint = f"; did you mean {guess!r}?" if guess else ""
        return f"expected {ctx['expected']}, found {found}{hint}"
    expected = f"expected {_EXPECTED[kind].format(**ctx)}" if kind in _EXPECTED else item["msg"]
    return f"{expected}, found {found}"


def _found(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
