"""Limits of a run, said plainly: small groups, missing values, few seeds, gains that shrinking scores would give too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from libmtl_fair.report.frames import audit_frame, groups_frame, rows, shrinkage_frame
from libmtl_fair.report.plots import SUMMARIES
from libmtl_fair.report.run_folder import RunFolder
from libmtl_fair.report.shrinkage import fits, shrinkage_verdict

_AT_MOST = 12


def notes(run: RunFolder) -> list[str]:
    """Return the notes of a run, the most important first."""
    return [*_gains(run), *_small_groups(run), *_missing(run), *_method(run), *_data_notes(run)]


def _gains(run: RunFolder) -> Iterator[str]:
    for row in rows(shrinkage_verdict(run)):
        if row.below:
            continue
        yield (
            f"{row.method}: at its Brier of {row.brier:.4f}, shrinking the scores of {run.reference} alone gives Bias@"
            f"{row.delta_name} {row.curve_bias:.4f}; the method has {row.bias:.4f}. Its lower Bias is no gain in consistency."
        )
    if len(audit_frame(run)) and shrinkage_frame(run).empty:
        yield (
            "No score-shrinkage curve was made: it needs classification tasks only, and audit.shrinkage. A lower Bias may be "
            "no more than what shrinking all scores towards a constant would give."
        )
    if not fits(run):
        yield "The score-shrinkage curve covers other tasks than the audit, so no method is compared with it."
    frame = shrinkage_verdict(run)
    good = [f"{r.method} (Bias@{r.delta_name}; {r.seeds_below} of {r.seeds} seeds)" for r in rows(frame) if r.below]
    if good:
        yield (
            f"Below the score-shrinkage curve of {run.reference} at equal Brier, in the mean over seeds: {', '.join(good)}. "
            "So their lower Bias is more than what shrinking all scores towards a constant would give."
        )


def _small_groups(run: RunFolder) -> Iterator[str]:
    frame = groups_frame(run)
    flagged = frame[~frame["flag"].isin(["", "undefined", "dropped"]) & ~frame["group"].isin(SUMMARIES)]
    found = dict.fromkeys((row.attribute, row.group, row.flag) for row in rows(flagged))
    names = [f"{attribute} = {group} ({flag})" for attribute, group, flag in list(found)[:_AT_MOST]]
    if names:
        more = f" and {len(found) - _AT_MOST} more" if len(found) > _AT_MOST else ""
        yield f"Flagged, their rates are mostly noise: {', '.join(names)}{more}."
    gaps = frame[frame["value"].isna()]
    if len(gaps):
        yield f"{len(gaps)} group metrics are undefined (empty denominator): shown as –, left out of differences, never 0."


def _missing(run: RunFolder) -> Iterator[str]:
    for name, task in _mappings(run.data_card.get("tasks")):
        if task.get("missing"):
            yield f"Task {name}: {task['missing']:,} labels are missing; losses and metrics leave them out."
    for name, group in _mappings(run.data_card.get("groups")):
        gone, out = group.get("missing") or 0, group.get("left_out") or 0
        if gone or out:
            rule = group.get("missing_rule") or "drop"
            yield f"Attribute {name}: {gone:,} values missing (rule: {rule}), {out:,} rows of groups left out of its metrics."
        if group.get("is_input"):
            yield f"Attribute {name} is also an input of the model."


def _method(run: RunFolder) -> Iterator[str]:
    if len(run.seeds) < 5:
        count = f"{len(run.seeds)} seeds" if len(run.seeds) > 1 else "one seed"
        yield f"Only {count}: differences of the size of the standard deviation between seeds are not established."
    if run.split == "val":
        yield "No test split was evaluated: the numbers are of the validation split, which also chose the checkpoints."
    else:
        yield (
            "Numbers are of the test split unless they say so. The protocol says what chose each checkpoint; how the settings "
            "were chosen is not recorded here: they are honest only if the test split had no part in it."
        )
    yield (
        "± is the standard deviation between seeds; intervals on bars are bootstrap intervals within a seed, averaged over "
        "seeds. Group metrics describe this sample; they do not establish why groups differ."
    )


def _data_notes(run: RunFolder) -> Iterator[str]:
    found = run.data_card.get("notes")
    yield from (str(note) for note in (found if isinstance(found, list) else []))
    if not run.data_card:
        yield "The run has no data card: sources, group sizes and missing values are not recorded."


def _mappings(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        yield from ((str(name), item) for name, item in value.items() if isinstance(item, Mapping))
