"""The data card: what was loaded, from where, who is in it, how often each label is 1, and what to beware of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from libmtl_fair.data.features import FeatureEncoder
from libmtl_fair.data.labels import RawLabels, task_columns
from libmtl_fair.data.selection import Choice, leaks
from libmtl_fair.data.sensitive import Groups
from libmtl_fair.data.spec import TableSpec
from libmtl_fair.data.splits import Rows

SMALL_GROUP = 30
"""Groups with fewer test rows than this are named in the card (methods.md 5: they are flagged in every table)."""


def dataset_card(
    spec: TableSpec,
    choice: Choice,
    frame: pd.DataFrame,
    rows_in_source: int,
    labels: Sequence[RawLabels],
    groups: Sequence[Groups],
    parts: Mapping[str, Rows],
    encoder: FeatureEncoder,
    tell_tale: Mapping[str, set[str]],
) -> dict[str, Any]:
    """Return the whole card as plain values, ready for JSON. ``tell_tale``: columns that show each attribute."""
    used = np.sort(np.concatenate(list(parts.values())))
    inputs = list(encoder.kinds)
    gaps = {name: int(frame[name].isna().to_numpy()[used].sum()) for name in inputs}
    group_cards = {
        item.attribute: group_card(item, parts, choice.missing, used, bool(tell_tale[item.attribute] & set(inputs)))
        for item in groups
    }
    return {
        "name": spec.name,
        "title": spec.title,
        "source": spec.source,
        "licence": spec.licence,
        "rows_in_source": rows_in_source,
        "rows": len(used),
        "filter": spec.filter,
        "subset": choice.subset,
        "split": _split_card(spec, choice, parts, labels),
        "inputs": inputs,
        "n_features": len(encoder.names),
        "missing_inputs": {name: count for name, count in gaps.items() if count},
        "dropped": _dropped(spec, choice, labels, tell_tale),
        "tasks": {item.name: task_card(item, _definition(item), groups, used) for item in labels},
        "groups": group_cards,
        "sensitive_inputs": [name for name, entry in group_cards.items() if entry["is_input"]],
        "notes": [*spec.notes, *small_group_notes(group_cards)],
    }


def _split_card(
    spec: TableSpec, choice: Choice, parts: Mapping[str, Rows], labels: Sequence[RawLabels]
) -> dict[str, Any]:
    by_column = isinstance(choice.split, str)
    stratify = labels[0].name if spec.stratify is None else spec.stratify
    return {
        "shares": choice.split if by_column else list(choice.split),
        "seed": choice.seed,
        "stratified_on": "nothing" if by_column or not stratify else stratify,
        "rows": {part: len(rows) for part, rows in parts.items()},
    }


def _dropped(
    spec: TableSpec, choice: Choice, labels: Sequence[RawLabels], tell_tale: Mapping[str, set[str]]
) -> dict[str, str]:
    dropped = dict(spec.excluded)
    for attribute, columns in ({} if choice.sensitive_inputs else tell_tale).items():
        dropped |= {name: f"shows {attribute}; sensitive attributes are no inputs here" for name in sorted(columns)}
    for column, names in leaks({item.name: item.spec for item in labels}).items():
        dropped[column] = f"gives away the task{'s' if len(names) > 1 else ''} {', '.join(names)}"
    return dropped


def _definition(labels: RawLabels) -> str:
    spec = labels.spec
    if spec.definition:
        return spec.definition
    columns = ", ".join(task_columns(spec))
    if spec.expression:
        return spec.expression
    if spec.positive is not None:
        return f"{columns} = {spec.positive}"
    if spec.threshold is not None:
        return f"{columns} >= {spec.threshold:g}"
    return f"{spec.transform} of {columns}" if spec.transform else columns


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


def group_card(groups: Groups, parts: Mapping[str, Rows], rule: str, used: Rows, is_input: bool) -> dict[str, Any]:
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
        "is_input": is_input,
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
    """Return a note for every group that training lacks, or that is too small in the test part for rates to mean much."""
    absent = [
        f"sensitive attribute {attribute}: group {name} has no training row"
        for attribute, card in cards.items()
        for name, entry in card["groups"].items()
        if entry["split"]["train"] == 0
    ]
    return absent + [
        f"sensitive attribute {attribute}: group {name} has {entry['split']['test']} test rows; its rates are noise"
        for attribute, card in cards.items()
        for name, entry in card["groups"].items()
        if entry["split"]["test"] < SMALL_GROUP
    ]
