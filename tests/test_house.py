"""The house keeps its order: no import circles, late imports and those for types counted; pure mathematics."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "libmtl_fair").rglob("*.py"))
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imported(path: Path) -> set[Path]:
    """Files of the package that a file imports, at the top, late or for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports by full names only"
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {full if full in NAMES else str(node.module) for full in inner.values()}
    return {NAMES[name] for name in found if name in NAMES} - {path}


def test_there_are_no_import_circles():
    inner = {path for path in FILES if path.name != "__init__.py"}
    graph = {path: imported(path) & inner for path in inner}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("circle: " + " -> ".join(str(path.relative_to(ROOT)) for path in error.args[1]))


def test_the_mathematics_is_pure():
    for path in (ROOT / "libmtl_fair" / "functional").glob("*.py"):
        others = {other.relative_to(ROOT / "libmtl_fair").parts[0] for other in imported(path)}
        assert others <= {"functional", "errors.py"}, path
