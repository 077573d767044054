"""The data card: what was loaded, from where, who is in it, how often each label is 1, and what to beware of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd

from libmtl_fair.data.features import FeatureEncoder
from libmtl_fair.data.frames import number_text
from libmtl_fair.data.labels import RawLabels, task_columns
from libmtl_fair.data.selection import PARTS, Rows, Table, leaks
from libmtl_fair.data.sensitive import Groups
from libmtl_fair.data.spec import TaskSpec
from libmtl_fair.data.tables import taken_as_missing
from libmtl_fair.files import Json

Card: TypeAlias = Json
SMALL_GROUP = 30
"""Groups with fewer test rows than this are named in the card (METHODS.md 5: they are flagged in every table)."""


def dataset_card(table: Table, source: pd.DataFrame, parts: Mapping[str, Rows], encoder: FeatureEncoder) -> Card:
    """Return the whole card as plain values, ready for JSON."""
    spec, choice = table.spec, table.choice
    used = np.sort(np.concatenate(list(parts.values())))
    inputs = table.inputs
    gaps = {str(name): int(count) for name, count in table.frame[inputs].iloc[used].isna().sum().items()}
    groups = {item.attribute: _group_card(item, parts, used, table) for item in table.groups}
    by_column = isinstance(choice.split, str)
    dropped = dict(spec.excluded)
    for attribute, columns in ({} if choice.sensitive_inputs else table.tell_tale).items():
        dropped |= {name: f"shows {attribute}; sensitive attributes are no inputs here" for name in sorted(columns)}
    for column, names in leaks(table.tasks).items():
        own = all(column in task_columns(table.tasks[name]) for name in names)
        what = "defines" if own else "gives away"
        dropped[column] = f"{what} the task{'s' if len(names) > 1 else ''} {', '.join(names)}"
    return {
        "name": spec.name,
        "title": spec.title,
        "source": spec.source,
        "licence": spec.licence,
        "rows_in_source": len(source),
        "rows": len(used),
        "filter": spec.filter,
        "subset": choice.subset,
        "split": {
            "shares": choice.split if by_column else list(choice.split),
            "seed": choice.seed,
            **({} if choice.test_seed is None else {"test_seed": choice.test_seed}),
            "stratified_on": "nothing" if by_column else table.stratified_on or "nothing",
            "rows": {part: len(rows) for part, rows in parts.items()},
        },
        "inputs": inputs,
        "n_features": len(encoder.names),
        "missing_inputs": {name: count for name, count in gaps.items() if count},
        "taken_as_missing": taken_as_missing(source),
        "other_categories": {name: len(rare) for (name, _), rare in zip(encoder.categorical(), encoder.rare) if rare},
        "dropped": dropped,
        "tasks": {item.name: _task_card(item, table.groups, used) for item in table.labels},
        "groups": groups,
        "sensitive_inputs": [name for name, entry in groups.items() if entry["is_input"]],
        "notes": [*spec.notes, *_small_groups(groups)],
    }


def _definition(spec: TaskSpec) -> str:
    columns = ", ".join(task_columns(spec))
    if spec.definition or spec.expression:
        return spec.definition or str(spec.expression)
    if spec.positive is not None:
        return f"{columns} = {spec.positive}"
    if spec.threshold is not None:
        return f"{columns} >= {number_text(spec.threshold)}"
    return f"{spec.transform} of {columns}" if spec.transform else columns


def _task_card(labels: RawLabels, groups: tuple[Groups, ...], used: Rows) -> Card:
    """Say kind, definition, labelled rows, and the base rate overall and in each group."""
    seen, per_group = int(labels.observed[used].sum()), {}
    for item in groups:
        rows = {name: used[item.ids[used] == index] for index, name in enumerate(item.names)}
        per_group[item.attribute] = {name: {"rows": len(own), **_rates(labels, own)} for name, own in rows.items()}
    return {
        "kind": labels.spec.kind,
        "definition": _definition(labels.spec),
        "columns": list(task_columns(labels.spec)),
        "forbids": list(labels.spec.forbids),
        "labelled": seen,
        "missing": len(used) - seen,
        **_rates(labels, used),
        "per_group": per_group,
    }


def _rates(labels: RawLabels, rows: Rows) -> Card:
    """Return the share of 1 (binary), the rows of each class, or mean and deviation in native units, where labelled."""
    rows = rows[labels.observed[rows]]
    values, n = labels.values[rows], len(rows)
    if labels.spec.kind == "binary":
        return {"n": n, "rate": float(values.mean(dtype=np.float64)) if n else None}
    if labels.spec.kind == "regression":
        return {"n": n, "mean": float(values.mean()) if n else None, "std": float(values.std()) if n else None}
    by_id = labels.spec.kind == "multiclass"
    counts = np.bincount(values, minlength=len(labels.classes)) if by_id else np.nansum(values, axis=0)
    return {"n": n, "classes": {name: int(count) for name, count in zip(labels.classes, counts)}}


def _group_card(groups: Groups, parts: Mapping[str, Rows], used: Rows, table: Table) -> Card:
    """Say where an attribute comes from, how many values are missing, and every group's rows and shares in each part."""
    in_use, spec = groups.take(used), groups.spec
    entries = {}
    for index, name in enumerate(groups.names):
        count = {part: int((groups.ids[rows] == index).sum()) for part, rows in parts.items()}
        total = sum(count.values())
        entries[name] = {
            "rows": total,
            "share": round(total / max(len(used), 1), 6),
            "split": count,
            "split_share": {part: round(count[part] / max(len(rows), 1), 6) for part, rows in parts.items()},
        }
    return {
        "column": spec.column,
        "intersection_of": list(spec.of),
        "bins": list(spec.bins),
        "merged": dict(spec.merge),
        "missing": int(in_use.gap.sum()),  # whatever the rule made of them
        "missing_rule": table.choice.missing,
        "left_out": int(((in_use.ids < 0) & ~in_use.gap).sum()),
        "is_input": bool(table.tell_tale[groups.attribute] & set(table.inputs)),
        "groups": entries,
    }


def _small_groups(cards: Mapping[str, Card]) -> list[str]:
    """Return a note for every group that training lacks, or that is too small in the test part for rates to mean much."""
    rows = {
        f"sensitive attribute {attribute}: group {name} has": entry["split"]
        for attribute, card in cards.items()
        for name, entry in card["groups"].items()
    }
    absent = [f"{group} no training row" for group, split in rows.items() if split["train"] == 0]
    small = {group: split["test"] for group, split in rows.items() if split["test"] < SMALL_GROUP}
    return absent + [f"{group} {n} test rows; its rates are noise" for group, n in small.items()]


_COUNTS = {"rows", "rows_in_source", "labelled", "missing", "left_out", "n"}
_OF_COUNTS = {"rows", "classes", "missing_inputs", "split"}


def joined_cards(one: Card, two: Card, of: str = "") -> Card:
    """Return the card of two tables' rows together, which were read and encoded alike."""
    found = {**two, **one}
    for name in one.keys() & two.keys():
        a, b = one[name], two[name]
        if isinstance(a, dict) and isinstance(b, dict):
            found[name] = joined_cards(a, b, name)
        elif isinstance(a, int) and not isinstance(a, bool) and (name in _COUNTS or of in _OF_COUNTS):
            found[name] = a + b if name not in ("seed", "test_seed") else a
    if "n" in one and found["n"]:
        known = [card for card in (one, two) if card["n"]]
        for name in {"rate", "mean"} & one.keys():
            found[name] = sum(card[name] * card["n"] for card in known) / found["n"]
        if "std" in one:
            squares = sum((card["std"] ** 2 + (card["mean"] - found["mean"]) ** 2) * card["n"] for card in known)
            found["std"] = (squares / found["n"]) ** 0.5
    return found


def settled_card(card: Card, notes: Sequence[str]) -> Card:
    """Return a joined card with the shares and the notes of its counts."""
    sizes = card["split"]["rows"]
    for entry in (group for found in card["groups"].values() for group in found["groups"].values()):
        entry["share"] = round(entry["rows"] / max(card["rows"], 1), 6)
        entry["split_share"] = {part: round(n / max(sizes[part], 1), 6) for part, n in entry["split"].items()}
    return {**card, "notes": [*notes, *_small_groups(card["groups"])]}


def card_markdown(card: Card) -> str:
    """Return the card as Markdown."""
    split, tasks = card["split"], card["tasks"]
    sizes = ", ".join(f"{part} {rows:,}" for part, rows in split["rows"].items())
    gaps = ", ".join(f"{name} {count:,}" for name, count in card["missing_inputs"].items())
    words = card.get("taken_as_missing", {})  # cards of before have none
    taken = "; ".join(
        f"{name}: " + ", ".join(f"{word!r} {count:,} times" for word, count in found.items())
        for name, found in words.items()
    )
    other = ", ".join(f"{count:,} of {name}" for name, count in card.get("other_categories", {}).items())
    lines = [
        f"# Data card: {card['title']}",
        "",
        f"- Source: {card['source']}",
        f"- Licence: {card['licence']}",
        f"- Rows: {card['rows']:,} of {card['rows_in_source']:,}" + (f" ({card['filter']})" if card["filter"] else ""),
        f"- Split: {sizes}; seed {split['seed']}, stratified on {split['stratified_on']}",
        f"- Inputs ({len(card['inputs'])} columns, {card['n_features']} features): {', '.join(card['inputs'])}",
        f"- Sensitive attributes among the inputs: {', '.join(card['sensitive_inputs']) or 'none'}",
        f"- Missing input values: {gaps or 'none'}",
        *([f"- Taken as missing: {taken}"] if taken else []),
        *([f"- Categories that became one, (other): {other}"] if other else []),
        *("", "## Tasks", ""),
        *_markdown_table(
            ["task", "kind", "definition", "labelled", "missing", "base rate"],
            [
                [name, task["kind"], task["definition"], f"{task['labelled']:,}", f"{task['missing']:,}", _shown(task)]
                for name, task in tasks.items()
            ],
        ),
    ]
    for attribute, entry in card["groups"].items():
        rule = f"(rule: {entry['missing_rule']}); left out: {entry['left_out']:,}."
        lines += ["", f"## Sensitive attribute: {attribute}", "", f"Missing values: {entry['missing']:,} {rule}", ""]
        lines += _markdown_table(
            ["group", "rows", "share", *PARTS, *tasks],
            [
                [name, f"{group['rows']:,}", f"{group['share']:.1%}"]
                + [f"{group['split'][part]:,}" for part in PARTS]
                + [_shown(task["per_group"][attribute][name]) for task in tasks.values()]
                for name, group in entry["groups"].items()
            ],
        )
    if card["dropped"]:
        lines += ["", "## Left out of the inputs", "", *(f"- `{k}`: {why}" for k, why in card["dropped"].items())]
    if card["notes"]:
        lines += ["", "## Known problems", "", *(f"- {note}" for note in card["notes"])]
    return "\n".join(lines) + "\n"


def _markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _shown(entry: Card) -> str:
    if "n" not in entry:
        return "in files"
    if entry["n"] == 0:
        return "no label"
    if "rate" in entry:
        return f"{entry['rate']:.1%}"
    if "mean" in entry:
        return f"{entry['mean']:.4g} ± {entry['std']:.3g}"
    return ", ".join(f"{name} {count / entry['n']:.0%}" for name, count in entry["classes"].items())
