"""Short facts about a run: what, on which data, by which methods; pairs of a name and a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from libmtl_fair.report.frames import number
from libmtl_fair.report.protocol import words
from libmtl_fair.report.run_folder import RunFolder


def run_facts(run: RunFolder) -> list[tuple[str, str]]:
    """Return data, methods, seeds, split and training time."""
    times = [number((item.metrics.get("timing") or {}).get("train_s")) for item in run.runs]
    seconds = [value for value in times if value == value]
    found = [
        ("Data", str(run.data_card.get("title") or words((run.recipe.get("data") or {}).get("name")))),
        ("Methods", f"{', '.join(run.methods)} (reference: {run.reference})"),
        ("Seeds", ", ".join(map(str, run.seeds))),
        ("Reported split", run.split),
        ("Training time", f"{sum(seconds):.0f} s in all" if seconds else ""),
    ]
    return [(name, value) for name, value in found if value]


def card_facts(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return source, licence, rows, split and inputs of a data card; what it lacks is left out."""
    split = card.get("split") or {}
    rows = card.get("rows")
    found = {
        "Source": card.get("source"),
        "Licence": card.get("licence"),
        "Rows": f"{rows:,}" if isinstance(rows, int) else rows,
        "Filter": card.get("filter"),
        "Split": words(split) if split else None,
        "Inputs": words(card.get("inputs")) if card.get("inputs") else None,
        "Sensitive attributes among the inputs": words(card["sensitive_inputs"])
        if card.get("sensitive_inputs")
        else None,
        "Missing input values": words(card["missing_inputs"]) if card.get("missing_inputs") else None,
        "Left out of the inputs": words(card["dropped"]) if card.get("dropped") else None,
    }
    return [(key, str(value)) for key, value in found.items() if value]


def method_facts(run: RunFolder) -> list[tuple[str, str, str, str]]:
    """Return method, weighting, settings and how the checkpoint was chosen."""
    found = []
    for name in run.methods:
        metrics = run.of(name)[0].metrics
        settings, checkpoint = metrics.get("settings") or {}, metrics.get("checkpoint") or {}
        chosen = words(checkpoint.get("chosen_by") or "–")
        found.append((name, str(metrics.get("weighting") or "–"), words(settings) if settings else "defaults", chosen))
    return found
