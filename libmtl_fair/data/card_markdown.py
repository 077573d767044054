"""The data card as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def card_markdown(card: Mapping[str, Any]) -> str:
    """Return the card as Markdown."""
    split = card["split"]
    sizes = ", ".join(f"{part} {rows:,}" for part, rows in split["rows"].items())
    lines = [
        f"# Data card: {card['title']}",
        "",
        f"- Source: {card['source']}",
        f"- Licence: {card['licence']}",
        f"- Rows: {card['rows']:,} of {card['rows_in_source']:,}" + (f" ({card['filter']})" if card["filter"] else ""),
        f"- Split: {sizes}; seed {split['seed']}, stratified on {split['stratified_on']}",
        f"- Inputs ({len(card['inputs'])} columns, {card['n_features']} features): {', '.join(card['inputs'])}",
    ]
    also = card["sensitive_inputs"]
    lines.append(f"- Sensitive attributes among the inputs: {', '.join(also) if also else 'none'}")
    gaps = ", ".join(f"{name} {count:,}" for name, count in card["missing_inputs"].items())
    lines += [f"- Missing input values: {gaps or 'none'}", "", "## Tasks", ""]
    lines += ["| task | kind | definition | labelled | missing | base rate |", "| --- | --- | --- | --- | --- | --- |"]
    for name, task in card["tasks"].items():
        row = (name, task["kind"], task["definition"], f"{task['labelled']:,}", f"{task['missing']:,}", _shown(task))
        lines.append("| " + " | ".join(row) + " |")
    for attribute, entry in card["groups"].items():
        lines += _group_lines(attribute, entry, card["tasks"])
    if card["dropped"]:
        lines += ["", "## Left out of the inputs", "", *(f"- `{k}`: {why}" for k, why in card["dropped"].items())]
    if card["notes"]:
        lines += ["", "## Known problems", "", *(f"- {note}" for note in card["notes"])]
    return "\n".join(lines) + "\n"


def _group_lines(attribute: str, entry: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[str]:
    head = ["group", "rows", "share", "train", "val", "test", *tasks]
    lines = ["", f"## Sensitive attribute: {attribute}", ""]
    lines.append(
        f"Missing values: {entry['missing']:,} (rule: {entry['missing_rule']}); left out: {entry['left_out']:,}."
    )
    lines += ["", "| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for name, group in entry["groups"].items():
        counts = [f"{group['split'][part]:,}" for part in ("train", "val", "test")]
        rates = [_shown(task["per_group"][attribute][name]) for task in tasks.values()]
        lines.append("| " + " | ".join([name, f"{group['rows']:,}", f"{group['share']:.1%}", *counts, *rates]) + " |")
    return lines


def _shown(entry: Mapping[str, Any]) -> str:
    if entry["n"] == 0:
        return "no label"
    if "rate" in entry:
        return f"{entry['rate']:.1%}"
    if "mean" in entry:
        return f"{entry['mean']:.4g} ± {entry['std']:.3g}"
    return ", ".join(f"{name} {count / entry['n']:.0%}" for name, count in entry["classes"].items())
