"""YAML as plain data that knows its lines: safe (no tags, no code, no bombs), strict (no duplicates, no NaN), and written.

ruamel composes the nodes; a recipe is data, and nothing in it can name a Python type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from libmtl_fair.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_VALUES = 20_000
MAX_DEPTH = 24
MAX_DIGITS = 30

Location = tuple[str | int, ...]
"""Where a value sits: keys and list positions from the top, such as ``("methods", "relif", "eta")``."""

_PLAIN = Tag(suffix="plain")
_INT = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"": None, "~": None} | {
    spelt: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelt in (word, word.title(), word.upper())
}
_BROKEN = (YAMLError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError, RecursionError)
"""What ruamel raises on text that is no YAML."""


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
        for held in _from_inside(location):
            if held in self.overrides:
                return f"--set {self.overrides[held]}"
            if held in self.lines:
                return f"{self.file}:{self.lines[held]}"
        return self.file

    def line(self, location: Location) -> int:
        """Line of ``location`` or of what holds it; 0 if none is known."""
        return next((self.lines[held] for held in _from_inside(location) if held in self.lines), 0)


def _from_inside(location: Location) -> Iterator[Location]:
    return (location[:end] for end in range(len(location), -1, -1))


def read_yaml(path: str | Path) -> Source:
    """Read a YAML file; all that is wrong with it is a RecipeError with file and line."""
    try:
        with Path(path).open("rb") as stream:
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
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer, yaml.Resolver = _Composer, _Resolver
    reader = _Reader()
    try:
        node = yaml.compose(text)
        data = None if node is None else reader.value(node, ())
    except _BROKEN as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line + 1 if mark is not None else getattr(error, "line", 0) + 1
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).split("\n")[0]
        if problem == "but found another document":
            problem = "expected one YAML document, found a second ('---')"
        elif not isinstance(error, _RefusedError):
            problem = f"not valid YAML: {problem}"
        raise RecipeError(f"{file}:{line}: {problem}") from error
    if data is None:
        raise RecipeError(f"{file}:1: the file is empty; expected a recipe in YAML")
    return Source(file, data, reader.lines)


class _RefusedError(MarkedYAMLError):
    def __init__(self, at: Node | AliasEvent, message: str) -> None:
        super().__init__(problem=message, problem_mark=at.start_mark)


class _Resolver(VersionedResolver):
    """Leaves what plain text means to :class:`_Reader`."""

    def resolve(self, kind: type[Node], value: str | None, implicit: tuple[bool, bool]) -> Tag:
        plain = kind is ScalarNode and implicit[0]
        return _PLAIN if plain else super().resolve(kind, value, implicit)


class _Composer(Composer):
    """Refuses depth, keys that are no plain names, and aliases that are unknown or inside their own anchor."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.warn_double_anchors, self.level = False, 0

    def compose_node(self, parent: Node | None, index: Node | int | None) -> Node:
        event = self.parser.peek_event()
        if isinstance(event, AliasEvent):
            held = self.anchors.get(event.anchor)
            if held is None:
                raise _RefusedError(event, f"unknown alias '*{event.anchor}'")
            if held.end_mark is None:
                raise _RefusedError(event, f"alias '*{event.anchor}' stands inside its own anchor")
        if isinstance(parent, MappingNode) and index is None and event.anchor is not None:
            raise _RefusedError(event, "expected a plain name as key, found an anchor or alias")
        if self.level > MAX_DEPTH:
            raise _RefusedError(event, f"nested deeper than {MAX_DEPTH} levels")
        self.level += 1
        node: Node = super().compose_node(parent, index)
        self.level -= 1
        return node


def _need_tag(node: Node, allowed: str) -> None:
    if node.ctag not in (_PLAIN, Tag(suffix=f"tag:yaml.org,2002:{allowed}")):
        raise _RefusedError(node, f"expected plain data, found the tag {node.tag!r}: a recipe cannot name types")


class _Reader:
    """Nodes into plain values and their lines, counted so that aliases and merges cannot explode."""

    def __init__(self) -> None:
        self.lines: dict[Location, int] = {(): 1}
        self.count = 0

    def value(self, node: Node, at: Location) -> object:
        self._counted(node, 1)
        if isinstance(node, ScalarNode):
            return _scalar(node)
        if isinstance(node, MappingNode):
            return {key: self._child(inner, (*at, key), line) for key, (line, inner) in self._items(node).items()}
        _need_tag(node, "seq")
        return [self._child(inner, (*at, i), inner.start_mark.line + 1) for i, inner in enumerate(node.value)]

    def _child(self, node: Node, at: Location, line: int) -> object:
        self.lines[at] = line
        return self.value(node, at)

    def _counted(self, node: Node, size: int) -> None:
        self.count += size
        if self.count > MAX_VALUES:
            raise _RefusedError(node, f"expected at most {MAX_VALUES:,} values, found more (aliases count each time)")

    def _items(self, node: MappingNode) -> dict[str, tuple[int, Node]]:
        """Return key -> (its line, value), with what ``<<`` brings in under what is given."""
        _need_tag(node, "map")
        own: dict[str, tuple[int, Node]] = {}
        merged: dict[str, tuple[int, Node]] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                raise _RefusedError(key, "expected a name as key, found a list or mapping")
            _need_tag(key, "str")
            name = _text(key)
            if name == "<<" and key.ctag == _PLAIN:
                if not isinstance(value, MappingNode):
                    raise _RefusedError(key, "expected a mapping after '<<' (such as *defaults)")
                self._counted(key, 1 + len(value.value))
                merged = {inner: (line, item) for inner, (_, item) in self._items(value).items()} | merged
            elif name in own:
                raise _RefusedError(key, f"duplicate key {name!r}; first given on line {own[name][0]}")
            else:
                own[name] = (line, value)
        return own | {name: item for name, item in merged.items() if name not in own}


def _text(node: ScalarNode) -> str:
    """Text with the surrogate pairs of JSON's escapes joined; half a pair is no text."""
    try:
        return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise _RefusedError(node, "expected Unicode text, found half of a surrogate pair") from error


def _scalar(node: ScalarNode) -> str | int | float | bool | None:
    _need_tag(node, "str")
    text = _text(node)
    if node.ctag != _PLAIN:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if len(text) <= MAX_DIGITS and _INT.fullmatch(text):
        return int(text.replace("_", ""), 0 if text[:2] in ("0o", "0x") else 10)
    if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        number = float(text.replace("_", "")) if _FLOAT.fullmatch(text) else math.inf
        if len(text) > MAX_DIGITS or not math.isfinite(number):
            raise _RefusedError(node, f"expected a finite number of at most {MAX_DIGITS} digits, found {text[:40]}")
        return number
    return text


_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.]*([/+=-][A-Za-z0-9_.]+)*")
_NOT_TEXT = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


class _Writer(SafeRepresenter):
    """Writes text and numbers so that readers of YAML 1.1 and 1.2 take them alike, and nothing as an alias."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def text(self, text: str) -> Node:
        word = _WORD.fullmatch(text) and text.lower() not in _NOT_TEXT
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if word else '"')

    def number(self, value: float) -> Node:
        text = repr(value)
        dotted = text.replace("e", ".0e") if "e" in text and "." not in text else text
        return self.represent_scalar("tag:yaml.org,2002:float", dotted)


_Writer.add_representer(str, _Writer.text)
_Writer.add_representer(float, _Writer.number)


def emit_yaml(data: Mapping[str, object]) -> str:
    r"""Write a mapping as YAML: sections are blocks, lists and short mappings of single values stand on one line.

    >>> print(emit_yaml({"train": {"epochs": 3, "lr": 1e-05}, "seeds": [0, 1]}), end="")
    train: {epochs: 3, lr: 1.0e-05}
    seeds: [0, 1]
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer, yaml.default_flow_style, yaml.width = _Writer, None, MAX_BYTES
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    written = StringIO()
    yaml.dump(data, written)
    return written.getvalue()
