"""The fairness card: what a model is, for whom it works how well, and how that was found out, as Markdown and JSON."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from libmtl_fair.files import write_json, write_text
from libmtl_fair.report.facts import card_facts, method_facts, run_facts
from libmtl_fair.report.frames import audit_frame, groups_frame, rows
from libmtl_fair.report.notes import notes
from libmtl_fair.report.protocol import checklist
from libmtl_fair.report.run_folder import RunFolder, read_run
from libmtl_fair.report.sections import (
    Sheet,
    audit_sheet,
    data_sheets,
    disparity_sheet,
    group_sheet,
    summary_sheet,
    task_sheet,
)
from libmtl_fair.report.shrinkage import shrinkage_verdict
from libmtl_fair.report.tables import summary

CARD_FORMAT = 1


def write_card(run_dir: str | Path) -> tuple[Path, Path]:
    """Write ``fairness_card.md`` and ``fairness_card.json`` into a run folder and return both paths.

    Raises
    ------
    CheckpointError
        The folder is incomplete or damaged (it says which file), or the card cannot be written.
    """
    run = read_run(run_dir)
    markdown = write_text(run.path / "fairness_card.md", card_markdown(run))
    return markdown, write_json(run.path / "fairness_card.json", card_dict(run))


def card_dict(run: RunFolder) -> dict[str, Any]:
    """Return the card as plain data: the numbers of every table, unrounded, missing ones as None."""
    metrics = {name: run.of(name)[0].metrics for name in run.methods}
    return {
        "format": CARD_FORMAT,
        "name": run.name,
        "description": str(run.recipe.get("description") or ""),
        "split": run.split,
        "seeds": run.seeds,
        "reference": run.reference,
        "data": run.data_card,
        "recipe": run.recipe,
        "methods": [
            {"name": name, "weighting": found.get("weighting"), "settings": found.get("settings") or {}}
            | {"checkpoints": {str(item.seed): item.metrics.get("checkpoint") for item in run.of(name)}}
            for name, found in metrics.items()
        ],
        "audit_protocol": run.protocol,
        "checklist": dict(checklist(run)),
        "results": {
            "summary": _records(summary(run)),
            "audit": _records(audit_frame(run)),
            "shrinkage": _records(shrinkage_verdict(run)),
            "groups": _records(_group_means(run)),
        },
        "limits": notes(run),
        "environment": run.environment,
    }


def _group_means(run: RunFolder) -> pd.DataFrame:
    keys = ["task", "attribute", "metric", "group", "method"]
    grouped = groups_frame(run).groupby(keys, sort=False)
    numbers = grouped[["value", "low", "high", "n"]].mean().join(grouped["value"].std().rename("sd"))
    return numbers.join(grouped["flag"].max()).reset_index()


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain dicts; a missing number is None."""
    return [
        {key: None if value != value else _scalar(value) for key, value in row._asdict().items()} for row in rows(frame)
    ]


def _scalar(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def card_markdown(run: RunFolder) -> str:
    """Return the card as Markdown; every name from the run is escaped."""
    group_columns = summary_sheet(run, "Group fairness", ("EO diff", "DP diff", "KS"))
    intended = (
        "This card reports how well each method does, for whom, and how that was measured. It is no approval of any use: "
        "whether a model may decide about people is not settled by these numbers."
    )
    parts = [
        f"# Fairness card: {_escape(run.name)}",
        _escape(run.recipe.get("description") or ""),
        intended,
        *_section("Run", _list(run_facts(run))),
        *_section("Data", _list(card_facts(run.data_card)), *map(_table, data_sheets(run))),
        *_section("Methods", _lines(("method", "weighting", "settings", "checkpoint chosen by"), method_facts(run))),
        *_section("Audit protocol", _list(checklist(run))),
        *_section(
            f"Results ({_escape(run.split)} split, mean ± sd over {len(run.seeds)} seed{'s' if len(run.seeds) > 1 else ''})",
            *map(_table, (summary_sheet(run, "Utility", ("macro ",)), task_sheet(run), group_columns)),
            *map(_table, (audit_sheet(run), disparity_sheet(run), group_sheet(run))),
        ),
        *_section("Limits", "\n".join(f"- {_escape(note)}" for note in notes(run))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, *parts: str) -> list[str]:
    return [f"## {title}", *parts] if any(parts) else []


def _list(items: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- **{_escape(name)}**: {_escape(value)}" for name, value in items)


def _table(sheet: Sheet | None) -> str:
    if sheet is None:
        return ""
    body = [[f"{cell.text} ({cell.small})" if cell.small else cell.text for cell in line] for line in sheet.body]
    note = f"\n\n{_escape(sheet.note)}" if sheet.note else ""
    return f"### {_escape(sheet.title)}\n\n{_lines(sheet.heads, body)}{note}"


def _lines(heads: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    first = [_escape(head) for head in heads]
    lines = [first, ["---"] * len(first), *([_escape(text) for text in line] for line in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: object) -> str:
    r"""Text that Markdown and HTML show as it is.

    >>> _escape("<b>a|b</b>\n*")
    '&lt;b&gt;a\\|b&lt;/b&gt; \\*'
    """
    line = (
        " ".join(str(text).split())
        .replace("\\", "\\\\")
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
    )
    for char in "|*`":
        line = line.replace(char, f"\\{char}")
    return line.replace("](", "]\\(")
