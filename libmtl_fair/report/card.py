"""The fairness card: what a model is, for whom it works how well, and how that was found out, as Markdown and JSON."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from libmtl_fair.arrays import records
from libmtl_fair.files import Json, write_json, write_text
from libmtl_fair.report.findings import findings
from libmtl_fair.report.notes import INTENDED, legend, notes
from libmtl_fair.report.protocol import Facts, card_facts, checklist, method_facts, run_facts
from libmtl_fair.report.run_folder import RunFolder, damage_named, read_run
from libmtl_fair.report.summary import group_means, shrinkage_verdict, summary
from libmtl_fair.report.tables import (
    GAPS,
    MARKS,
    Sheet,
    audit_sheet,
    data_sheets,
    group_sheet,
    pays_sheets,
    summary_sheet,
    task_sheet,
)
from libmtl_fair.shown import printable


def write_card(run_dir: str | Path) -> tuple[Path, Path]:
    """Write ``fairness_card.md`` and ``fairness_card.json`` into a run folder and return both paths.

    CheckpointError where the folder is incomplete or damaged (it says which file), or the card cannot be written.
    """
    run = read_run(run_dir)
    markdown = write_text(run.path / "fairness_card.md", card_markdown(run))
    return markdown, write_json(run.path / "fairness_card.json", card_dict(run))


@damage_named
def card_dict(run: RunFolder) -> Json:
    """Return the card as plain data: the numbers of every table, unrounded, missing ones as None."""
    metrics = {name: run.of(name)[0].metrics for name in run.methods}
    tables = {
        "summary": summary(run).drop(columns=["low", "high", "pairs"]),
        "audit": run.frame("audit"),
        "shrinkage": shrinkage_verdict(run),
    }
    return {
        "format": 1,
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
            name: records(table.astype(object).where(table.notna(), None))
            for name, table in (tables | {"groups": group_means(run)}).items()
        },
        "findings": [{"about": about, "text": text} for about, text in findings(run)],
        "limits": notes(run),
        "environment": run.environment,
    }


@damage_named
def card_markdown(run: RunFolder, longest: int | None = None) -> str:
    """Return the card as Markdown; every name from the run is escaped. A table of more than ``longest`` rows is only named."""
    seeds = f"{len(run.seeds)} seed{'s' if len(run.seeds) > 1 else ''}"
    gaps = summary_sheet(run, "Largest gap of the worst task", GAPS, MARKS)
    results = (summary_sheet(run, "Utility", ("macro ",)), task_sheet(run), gaps, *pays_sheets(run), audit_sheet(run))
    names = [head for each in results if each for head in each.heads]
    sections = {
        "What was found": [_list(findings(run))],
        "Run": [_list(run_facts(run))],
        "Data": [_list(card_facts(run.data_card)), *map(_table, data_sheets(run))],
        "Methods": [_lines(("method", "weighting", "settings", "checkpoint chosen by"), method_facts(run))],
        "Audit protocol": [_list(checklist(run))],
        f"Results ({_escape(run.split)} split, mean ± sd over {seeds})": [
            *(_table(each, longest) for each in (*results, group_sheet(run, between=True), group_sheet(run)))
        ],
        "Short names": [_list(legend(names))],
        "Limits": ["\n".join(f"- {_escape(note)}" for note in notes(run))],
    }
    parts = [f"# Fairness card: {_escape(run.name)}", _escape(run.recipe.get("description") or ""), INTENDED]
    parts += [part for title, own in sections.items() if any(own) for part in (f"## {title}", *own)]
    return printable("\n\n".join(filter(None, parts)) + "\n")


def _list(items: Facts) -> str:
    return "\n".join(f"- **{_escape(name)}**: {_escape(value)}" for name, value in items)


def _table(sheet: Sheet | None, longest: int | None = None) -> str:
    if sheet is None:
        return ""
    if longest is not None and len(sheet.body) > longest:
        return f"### {_escape(sheet.title)}\n\n{len(sheet.body):,} rows, in the run's report and fairness card."
    body = ([f"{cell.text} ({cell.small})" if cell.small else cell.text for cell in line] for line in sheet.body)
    note = f"\n\n{_escape(sheet.note)}" if sheet.note else ""
    return f"### {_escape(sheet.title)}\n\n{_lines(sheet.heads, body)}{note}"


def _lines(heads: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    first = [_escape(head) for head in heads]
    lines = [first, ["---"] * len(first), *([_escape(text) for text in line] for line in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_MARKS = str.maketrans({"\\": "\\\\", "&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "*": "\\*", "`": "\\`"})


def _escape(text: object) -> str:
    r"""Text that Markdown and HTML show as it is.

    >>> _escape("<b>a|b</b>\n*")
    '&lt;b&gt;a\\|b&lt;/b&gt; \\*'
    """
    return " ".join(str(text).split()).translate(_MARKS).replace("](", "]\\(")
