"""Field types that the sections of a recipe share: strict, frozen, finite, with messages that name what was found."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainSerializer, PlainValidator

from libmtl_fair.validation import STRICT, distinct, listed

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Share = Annotated[float, Field(gt=0, le=1)]

_QUANTILE = re.compile(r"p(\d{1,2}(?:\.\d{1,4})?)")
_CONFORMAL = re.compile(r"conformal:(\d*\.?\d+)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _+.@=-]*")


class Section(BaseModel):
    """A part of a recipe: unknown fields, wrong types and numbers that are not finite are refused."""

    model_config = STRICT


def _plain(value: Any, depth: int = 0) -> Any:
    """Accept JSON-like values only, finite, so that a setting can be written back and hashed."""
    if depth > 20:
        raise ValueError("expected a setting nested at most 20 levels deep")
    if isinstance(value, str):
        value.encode()
        return value
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"expected a number of at most 64 bits, found one of {value.bit_length()}")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"expected a finite number, found {value}")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {_plain(key): _plain(item, depth + 1) for key, item in value.items()}
    raise ValueError(f"expected plain data (text, number, true/false, list, mapping), found {type(value).__name__}")


def _settings(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping of settings, found {value!r}")
    return {str(_plain(key)): _plain(item) for key, item in value.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _delta(value: Any) -> float | str:
    """A tolerance: a number in [0, 1], a quantile "p75", or "conformal:0.1"."""
    if _is_number(value) and 0 <= value <= 1:
        return float(value)
    if isinstance(value, str):
        quantile, conformal = _QUANTILE.fullmatch(value), _CONFORMAL.fullmatch(value)
        if (quantile and float(quantile[1]) > 0) or (conformal and 0 < float(conformal[1]) < 1):
            return value
    raise ValueError(
        "expected a number in [0, 1], a quantile of the reference model such as p75 (above p0, below p100), "
        f"or conformal:0.1, found {value!r}"
    )


def _threshold(value: Any) -> float | str:
    if value == "base_rate" or (_is_number(value) and 0 < value < 1):
        return value if isinstance(value, str) else float(value)
    raise ValueError(f"expected a number between 0 and 1, or base_rate, found {value!r}")


def _folder_name(value: str) -> str:
    if len(value) > 80 or not _NAME.fullmatch(value) or value[-1] in " .":
        raise ValueError(
            "expected a name that can be a folder (letters, digits, space and _ + - . @ =, at most 80, starting with "
            f"a letter or digit), found {value[:100]!r}"
        )
    return value


def _split(value: Any) -> tuple[float, ...] | str:
    """Shares of train, validation and test, or the name of a column that says which row is which."""
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_number, value)):
        raise ValueError(f"expected three shares such as [0.6, 0.2, 0.2], or the name of a column, found {value!r}")
    if min(value) <= 0 or abs(sum(value) - 1) > 1e-6:
        raise ValueError(f"expected three positive shares that sum to 1, found {value} (sum {sum(value):g})")
    return tuple(map(float, value))


def _subset(value: Any) -> int | float:
    if _is_number(value) and (value >= 10 if isinstance(value, int) else 0 < value < 1):
        return value  # type: ignore[no-any-return]
    raise ValueError(f"expected at least 10 rows, or a share between 0 and 1, found {value!r}")


_AS_IS = PlainSerializer(lambda value: value)
OptionalText = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
Settings = Annotated[dict[str, Any], PlainValidator(_settings)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
Delta = Annotated[float | str, PlainValidator(_delta)]
Threshold = Annotated[float | str, PlainValidator(_threshold)]
Split = Annotated[tuple[float, ...] | str, PlainValidator(_split), _AS_IS]
Subset = Annotated[int | float, PlainValidator(_subset), _AS_IS]
Widths = Annotated[
    tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...],
    Field(strict=False, min_length=1, max_length=200),
    BeforeValidator(listed),
]
Seeds = Annotated[
    tuple[Seed, ...], Field(strict=False, min_length=1), AfterValidator(distinct), BeforeValidator(listed)
]
Deltas = Annotated[
    tuple[Delta, ...], Field(strict=False, min_length=1), AfterValidator(distinct), BeforeValidator(listed)
]
