"""Tutorials compile, are percent scripts, and use only names that exist; CI executes them for the documentation."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"
SCRIPTS = sorted(TUTORIALS.glob("[0-9][0-9]_*.py"))


def test_they_are_numbered_without_gaps():
    assert [path.name[:2] for path in SCRIPTS] == [f"{i:02d}" for i in range(1, 11)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_it_is_a_percent_script_with_a_smoke_flag(path):
    text = path.read_text(encoding="utf-8")
    compile(text, str(path), "exec")
    assert "format_name: percent" in text
    assert text.count("# %%") >= 6
    assert "LIBMTL_FAIR_SMOKE" in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_names_of_the_package_exist(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "libmtl_fair":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(inner), f"there is no {inner}"
        if isinstance(node, ast.Attribute) and (dotted := _dotted(node)) and dotted[0] == "lf":
            found = importlib.import_module("libmtl_fair")
            for part in dotted[1:]:
                assert hasattr(found, part), f"{'.'.join(dotted)}: no {part}"
                found = getattr(found, part)


def _dotted(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return [*inner, node.attr] if inner else []
    return [node.id] if isinstance(node, ast.Name) else []


def test_the_second_shows_metric_frame_in_five_lines():
    text = (TUTORIALS / "02_audit_beside_fairlearn.py").read_text(encoding="utf-8")
    cell = next(part for part in text.split("# %%") if "MetricFrame(" in part and "to_fairlearn" in part)
    lines = [line for line in cell.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(lines) - 1 <= 5  # without the print that shows it


def test_the_runner_knows_its_flags():
    done = subprocess.run(
        [sys.executable, str(TUTORIALS / "run_all.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--smoke" in done.stdout
