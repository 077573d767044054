"""The data card: what was loaded, from where, who is in it, how often each label is 1, and what to beware of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from libmtl_fair.data.labels import RawLabels, task_columns
from libmtl_fair.data.sensitive import Groups
from libmtl_fair.data.splits import Rows

SMALL_GROUP = 30
"""Groups with fewer test rows than this are named in the card (methods.md 5: they are flagged in every table)."""


def task_card(labels: RawLabels, definition: str, groups: Sequence[Groups], used: Rows) -> dict[str, Any]:
    """Return one task's entry: kind, definition, labelled rows, and the base rate overall and in each group.

    The rate is the share of 1 (binary), the share of each class (multiclass, multilabel), or the mean in native units
    (regression), over labelled rows.
    """
    seen = labels.observed[used]
    entry: dict[str, Any] = {
        "kind": labels.spec.kind,
        "definition": definition,
        "columns": list(task_columns(labels.spec)),
        "forbids": list(labels.spec.forbids),
        "labelled": int(seen.sum()),
        "missing": int((~seen).sum()),
        **_rates(labels, used),
    }
    entry["per_group"] = {
        item.attribute: {
            name: {"rows": int((item.ids[used] == index).sum()), **_rates(labels, used[item.ids[used] == index])}
            for index, name in enumerate(item.names)
        }
        for item in groups
    }
    return entry


def _rates(labels: RawLabels, rows: Rows) -> dict[str, Any]:
    rows = rows[labels.observed[rows]]
    values = labels.values[rows]
    found: dict[str, Any] = {"n": len(rows)}
    if labels.spec.kind == "binary":
        found["rate"] = float(values.mean(dtype=np.float64)) if len(rows) else None
    elif labels.spec.kind == "regression":
        found["mean"] = float(values.mean()) if len(rows) else None
        found["std"] = float(values.std()) if len(rows) else None
    elif labels.spec.kind == "multiclass":
        counts = np.bincount(values, minlength=len(labels.classes))
        found["classes"] = {name: int(count) for name, count in zip(labels.classes, counts)}
    else:
        found["classes"] = {name: int(np.nansum(values[:, j])) for j, name in enumerate(labels.classes)}
    return found


def group_card(
    groups: Groups, parts: Mapping[str, Rows], rule: str, used: Rows, inputs: Sequence[str]
) -> dict[str, Any]:
    """Return one attribute's entry: its source, missing values, and every group's rows and shares in each split."""
    ids = groups.ids
    entry: dict[str, Any] = {
        "column": groups.spec.column,
        "intersection_of": list(groups.spec.of),
        "bins": list(groups.spec.bins),
        "merged": dict(groups.spec.merge),
        "missing": int(groups.gap[used].sum()),
        "missing_rule": rule,
        "left_out": int(((ids < 0) & ~groups.gap)[used].sum()),
        "is_input": any(column in inputs for column in (groups.spec.column, *groups.spec.also_in)),
        "groups": {},
    }
    for index, name in enumerate(groups.names):
        count = {part: int((ids[rows] == index).sum()) for part, rows in parts.items()}
        total = int((ids[used] == index).sum())
        shares = {part: round(count[part] / len(rows), 6) for part, rows in parts.items()}
        entry["groups"][name] = {
            "rows": total,
            "share": round(total / len(used), 6),
            "split": count,
            "split_share": shares,
        }
    return entry


def small_group_notes(cards: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a note for every group that is too small in the test part for its rates to mean much."""
    return [
        f"sensitive attribute {attribute}: group {name} has {entry['split']['test']} test rows; its rates are noise"
        for attribute, card in cards.items()
        for name, entry in card["groups"].items()
        if entry["split"]["test"] < SMALL_GROUP
    ]


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
