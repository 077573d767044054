"""YAML files as plain data that knows its lines: safe (no tags, no code, no bombs), strict (no duplicates, no NaN).

The file is read as parser events, not constructed objects: a recipe is data, and nothing in it can name a Python type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from libmtl_fair.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_VALUES = 20_000
MAX_DEPTH = 24
MAX_DIGITS = 30

Location = tuple[str | int, ...]
"""Where a value sits: keys and list positions from the top, such as ``("methods", "relif", "eta")``."""

_INT = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_PARSER_ERRORS = (
    YAMLError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    AssertionError,
    RecursionError,
)


@dataclass(frozen=True)
class Source:
    """Plain data read from a file, and the line on which each key or list item stands.

    Two sources always compare equal: where a recipe came from is no part of its content.
    """

    file: str = field(default="recipe", compare=False)
    data: Any = field(default=None, compare=False)
    lines: dict[Location, int] = field(default_factory=dict, compare=False)
    overrides: dict[Location, str] = field(default_factory=dict, compare=False)

    def where(self, location: Location) -> str:
        """Say where ``location`` was set: ``file:line``, or the ``--set`` that did it.

        >>> Source("a.yaml", lines={(): 1, ("train",): 3}).where(("train", "epochs"))
        'a.yaml:3'
        """
        for end in range(len(location), -1, -1):
            if location[:end] in self.overrides:
                return f"--set {self.overrides[location[:end]]}"
            if location[:end] in self.lines:
                return f"{self.file}:{self.lines[location[:end]]}"
        return self.file

    def line(self, location: Location) -> int:
        """Line of ``location`` or of what holds it; 0 if none is known."""
        known = (self.lines[location[:end]] for end in range(len(location), -1, -1) if location[:end] in self.lines)
        return next(known, 0)


@dataclass(frozen=True)
class _Node:
    value: Any
    lines: dict[Location, int]
    size: int


def read_yaml(path: str | Path) -> Source:
    """Read a YAML file into a :class:`Source`.

    Raises
    ------
    RecipeError
        File missing, unreadable, empty, too large, not UTF-8; a syntax error, duplicate key, tag, alias bomb, second
        document or number that is not finite: always with file and line.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such file; expected a recipe in YAML") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: expected a recipe of at most {MAX_BYTES:,} bytes, found more")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: expected UTF-8 text, found byte {raw[error.start]:#04x}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, file: str = "recipe") -> Source:
    r"""Parse YAML text into plain dicts, lists, strings, numbers, booleans and None, with lines.

    >>> source = parse_yaml("train:\n  lr: 1e-3")
    >>> source.data, source.lines[("train", "lr")]
    ({'train': {'lr': 0.001}}, 2)
    """
    node = _Builder(file, text).document()
    return Source(file, node.value, {(): 1, **node.lines})


class _Builder:
    """Turns parser events into a :class:`_Node`, counting values so that aliases cannot explode."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.anchors: dict[str, _Node | None] = {}
        self.events = self._parse(text)

    def _parse(self, text: str) -> Iterator[Event]:
        try:
            yield from YAML(typ="safe", pure=True).parse(text)
        except _PARSER_ERRORS as error:
            mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            line = mark.line + 1 if mark is not None else getattr(error, "line", 0) + 1
            problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).split("\n")[0]
            raise RecipeError(f"{self.file}:{line}: not valid YAML: {problem}") from error

    def _fail(self, event: Event, message: str) -> RecipeError:
        return RecipeError(f"{self.file}:{event.start_mark.line + 1}: {message}")

    def document(self) -> _Node:
        started = False
        node: _Node | None = None
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                if started:
                    raise self._fail(event, "expected one YAML document, found a second ('---')")
                started = True
            elif isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent | AliasEvent):
                node = self._node(event, 0)
        if node is None or node.value is None:
            raise RecipeError(f"{self.file}:1: the file is empty; expected a recipe in YAML")
        return node

    def _node(self, event: Event, depth: int) -> _Node:
        if isinstance(event, AliasEvent):
            return self._alias(event)
        if depth > MAX_DEPTH:
            raise self._fail(event, f"nested deeper than {MAX_DEPTH} levels")
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[anchor] = None
        if isinstance(event, ScalarEvent):
            node = _Node(self._scalar(event), {}, 1)
        elif isinstance(event, SequenceStartEvent):
            self._no_tag(event, "seq")
            node = self._sequence(event, depth)
        else:
            self._no_tag(event, "map")
            node = self._mapping(event, depth)
        if node.size > MAX_VALUES:
            raise self._fail(event, f"expected at most {MAX_VALUES:,} values, found more (aliases count each time)")
        if anchor is not None:
            self.anchors[anchor] = node
        return node

    def _alias(self, event: Event) -> _Node:
        name = str(getattr(event, "anchor", ""))
        if name not in self.anchors:
            raise self._fail(event, f"unknown alias '*{name}'")
        node = self.anchors[name]
        if node is None:
            raise self._fail(event, f"alias '*{name}' stands inside its own anchor")
        return node

    def _no_tag(self, event: Event, allowed: str) -> None:
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", f"tag:yaml.org,2002:{allowed}"):
            raise self._fail(event, f"expected plain data, found the tag {str(tag)!r}: a recipe cannot name types")

    def _sequence(self, start: Event, depth: int) -> _Node:
        items: list[Any] = []
        lines: dict[Location, int] = {}
        size = 1
        for event in self.events:
            if isinstance(event, SequenceEndEvent):
                break
            child = self._node(event, depth + 1)
            lines |= {(len(items), *where): line for where, line in child.lines.items()}
            lines[(len(items),)] = event.start_mark.line + 1
            items.append(child.value)
            size = self._grow(start, size, child)
        return _Node(items, lines, size)

    def _mapping(self, start: Event, depth: int) -> _Node:
        own: dict[str, _Node] = {}
        lines: dict[str, int] = {}
        merged: dict[str, _Node] = {}
        size = 1
        for event in self.events:
            if isinstance(event, MappingEndEvent):
                break
            key = self._key(event)
            child = self._node(next(self.events), depth + 1)
            size = self._grow(start, size, child)
            if key is None:
                merged = self._merge(event, child) | merged
                lines |= {name: event.start_mark.line + 1 for name in merged if name not in lines}
            elif key in own:
                raise self._fail(event, f"duplicate key {key!r}; first given on line {lines[key]}")
            else:
                own[key] = child
                lines[key] = event.start_mark.line + 1
        children = own | {key: node for key, node in merged.items() if key not in own}
        where: dict[Location, int] = {}
        for key, child in children.items():
            where |= {(key, *inner): line for inner, line in child.lines.items()}
            where[(key,)] = lines[key]
        return _Node({key: child.value for key, child in children.items()}, where, size)

    def _grow(self, event: Event, size: int, child: _Node) -> int:
        if size + child.size > MAX_VALUES:
            raise self._fail(event, f"expected at most {MAX_VALUES:,} values, found more (aliases count each time)")
        return size + child.size

    def _key(self, event: Event) -> str | None:
        """Return the key, or None for the merge key ``<<``."""
        if not isinstance(event, ScalarEvent):
            raise self._fail(event, "expected a name as key, found a list, mapping or alias")
        if getattr(event, "anchor", None) is not None:
            raise self._fail(event, "expected a plain name as key, found an anchor")
        self._no_tag(event, "str")
        value = self._unicode(event)
        return None if value == "<<" and event.implicit[0] else value

    def _unicode(self, event: ScalarEvent) -> str:
        """Text with the surrogate pairs of JSON's escapes joined; half a pair is no text."""
        text = str(event.value)
        if not any("\ud800" <= char <= "\udfff" for char in text):
            return text
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            raise self._fail(event, "expected Unicode text, found half of a surrogate pair") from error

    def _merge(self, event: Event, child: _Node) -> dict[str, _Node]:
        if not isinstance(child.value, dict):
            raise self._fail(event, "expected a mapping after '<<' (such as *defaults)")
        return {
            key: _Node(value, {where[1:]: line for where, line in child.lines.items() if where[0] == key}, 1)
            for key, value in child.value.items()
        }

    def _scalar(self, event: ScalarEvent) -> Any:
        self._no_tag(event, "str")
        text = self._unicode(event)
        if not event.implicit[0]:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if len(text) <= MAX_DIGITS and _INT.fullmatch(text):
            return _integer(text)
        if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
            number = float(text.replace("_", "")) if _FLOAT.fullmatch(text) else math.inf
            if len(text) > MAX_DIGITS or not math.isfinite(number):
                raise self._fail(event, f"expected a finite number of at most {MAX_DIGITS} digits, found {text[:40]}")
            return number
        return text


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    if digits.startswith(("0o", "0x")):
        return int(digits, 0)
    return int(digits)
