"""A recipe for a table, as a first look suggests it: YAML with the reasons as comments, made to be read and changed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from libmtl_fair.data.frames import number_text
from libmtl_fair.data.loader import SENSITIVE
from libmtl_fair.recipe.look import Look
from libmtl_fair.recipe.yaml_source import parse_yaml

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*(?: [A-Za-z0-9_.-]+)*")
_WIDE = 110


def draft(found: Look, table: Path, target: Path) -> str:
    """Return the recipe of a look at a table, as text.

    Parameters
    ----------
    found : Look
        What the table suggests.
    table, target : Path
        The table, and where the recipe will lie: its path is written as seen from there.
    """
    lines = [
        f"# {_remark(table.name)}: {found.n_rows:,} rows. Written by libmtl-fair init from a first look: check every line, change any.",
        f"#   libmtl-fair check {_remark(target.name)}    reads everything, trains nothing",
        f"#   libmtl-fair run {_remark(target.name)}      trains, audits and reports",
        f"name: {_word(_folder(table))}",
        "",
        "data:",
        f"  table: {_word(_seen_from(table, target))}",
        "  tasks: # what is predicted",
    ]
    for column, fields in found.tasks.items():
        name = f"{column}_task" if column == SENSITIVE else column
        own = {"column": column} | fields if name != column else fields
        lines += _entry(name, own, found.why[column])
        lines += [
            f"      # {_remark(each)}: {found.why[f'leak {column} {each}']}" for each in fields.get("forbids", ())
        ]
    lines.append("  sensitive: # between whose groups fairness is judged")
    for column, fields in found.sensitive.items():
        lines += _entry(column, {"column": column} | fields, found.why[f"sensitive {column}"])
    if found.drop:
        lines.append("  drop: # no inputs")
        lines += [f"    - {_word(name)} # {_remark(found.why.get(name, 'as asked'))}" for name in found.drop]
    shown = ", ".join(map(_remark, found.inputs))
    lines += [
        f"  # inputs are the other {len(found.inputs)} columns: {shown[: 4 * _WIDE]}{'...' * (len(shown) > 4 * _WIDE)}"
    ]
    lines += [
        "  # where: age >= 18           only the rows of which this is true",
        "  # sensitive_inputs: false    leaves the sensitive columns out of the inputs",
        "",
        "model:",
        "  hidden: [64, 32]",
        "",
        "train:",
        "  epochs: 20",
        f"  batch_size: {_batch(found.n_rows)}",
        "  optimizer: {optim: adam, lr: 0.002, weight_decay: 1.0e-5}",
        "",
        "seeds: [0, 1, 2]",
        "",
        "methods: # the first is what the others are compared with",
        "  plain: {weighting: EW}",
    ]
    lines += _methods(found)
    return "\n".join(lines) + "\n"


def _methods(found: Look) -> list[str]:
    constrained = any(fields["kind"] == "binary" for fields in found.tasks.values())
    lines = [
        "  fairmt: {weighting: FairMT} # equalised odds within 30% of plain's"
        if constrained
        else "  fairmt: {weighting: FairMT, form: phi} # errors alike between groups; no task has decisions to constrain"
    ]
    shown = {*found.sensitive, *(name for fields in found.sensitive.values() for name in fields.get("also_in", ()))}
    if set(found.inputs) & shown and set(found.inputs) - shown:
        lines.append("  # unaware: {weighting: EW, unaware: true}    what leaving the sensitive columns out gives")
    return lines


def _entry(name: str, fields: Mapping[str, object], why: str) -> list[str]:
    return [f"    {_word(name)}: {_flow(fields)} # {_remark(why)}"]


def _flow(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_word(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return number_text(value) if isinstance(value, int | float) and not isinstance(value, bool) else _word(str(value))


def _word(text: str) -> str:
    """Return a text as YAML: as it is where it reads back as itself, else quoted."""
    if _PLAIN.fullmatch(text) and parse_yaml(f"a: {text}\n", "word").data == {"a": text}:
        return text
    return json.dumps(text, ensure_ascii=True)


def _remark(text: str) -> str:
    """Return a text that stays within one comment."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _folder(table: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_+.@=-]+", "_", table.name.split(".")[0]).strip("_.")
    return name if re.match(r"[A-Za-z0-9]", name) else f"table_{name}".rstrip("_")


def _seen_from(table: Path, target: Path) -> str:
    try:
        return Path(os.path.relpath(table.resolve(), target.resolve().parent)).as_posix()
    except ValueError:  # another drive
        return str(table.resolve())


def _batch(n_rows: int) -> int:
    """Return a batch size that gives some 15 steps an epoch, a power of 2 from 16 to 512."""
    size = 16
    while size < 512 and size * 30 <= n_rows * 0.6:
        size *= 2
    return size
