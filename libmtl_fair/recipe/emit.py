"""Plain data written as YAML that every reader takes alike: text is quoted unless it is an ordinary word."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.]*([/+=-][A-Za-z0-9_.]+)*")
_NOT_TEXT = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
_SHORT = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def emit_yaml(data: dict[str, Any]) -> str:
    r"""Write a mapping as YAML: sections as blocks, lists and short mappings of single values on one line.

    >>> print(emit_yaml({"train": {"epochs": 3, "lr": 1e-05}, "seeds": [0, 1]}), end="")
    train: {epochs: 3, lr: 1.0e-05}
    seeds: [0, 1]
    """
    return "".join(_block(data, 0))


def _block(data: dict[str, Any], indent: int) -> Iterator[str]:
    for key, value in data.items():
        head = f"{' ' * indent}{_text(key)}:"
        line = f"{head} {_flow(value)}\n"
        if isinstance(value, dict) and value and (indent == 0 or len(line) > 120) and (len(line) > 80 or _deep(value)):
            yield f"{head}\n"
            yield from _block(value, indent + 2)
        else:
            yield line


def _deep(value: dict[str, Any]) -> bool:
    return any(isinstance(item, dict) and item for item in value.values())


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _number(value)
    return str(value) if isinstance(value, int) else _text(str(value))


def _number(value: float) -> str:
    """Every digit, and a dot, so that readers of YAML 1.1 see a number too."""
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _text(text: str) -> str:
    if _WORD.fullmatch(text) and text.lower() not in _NOT_TEXT:
        return text
    return '"' + "".join(_SHORT.get(char, char if char.isprintable() else _escape(char)) for char in text) + '"'


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
