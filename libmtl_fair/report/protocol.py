"""The audit's protocol as the ReLiF reporting checklist wants it (methods.md 1.1): every item, or "not recorded"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from libmtl_fair.report.frames import audit_frame, number
from libmtl_fair.report.run_folder import RunFolder

MISSING = "not recorded"


def checklist(run: RunFolder) -> list[tuple[str, str]]:
    """Return (item, what was done) for every item that a complete report states."""
    return [
        ("Reference tolerance", _tolerance(run)),
        ("Reference model", _reference(run)),
        ("Representation of the reference distances", _at(run, "representation")),
        ("Pair distribution", _pairs(run)),
        ("Pools and seeds", _pools(run)),
        ("Score of each task", _scores(run)),
        ("Fixed-delta Bias and VR", "in the audit table; lower is better; same pools and pairs for every method"),
        ("Thresholds of the methods themselves", _drift(run)),
        ("Utility, Brier and group metrics", "of the same checkpoints and split, in the tables of this report"),
        ("Controller settings", _settings(run)),
        ("Choice of the checkpoint", _checkpoints(run)),
    ]


def _find(value: Any, key: str) -> Any:
    """The first value under ``key``, however deep."""
    if isinstance(value, Mapping):
        if value.get(key) not in (None, "", []):
            return value[key]
        value = list(value.values())
    if isinstance(value, list):
        return next((found for item in value if (found := _find(item, key)) is not None), None)
    return None


def _at(run: RunFolder, key: str, default: str = MISSING) -> str:
    found = _find(run.protocol, key)
    return default if found is None else words(found)


def words(value: Any) -> str:
    """Write plain data for a reader.

    >>> words({"method": "plain", "seeds": [0, 1], "exact": True})
    'method: plain; seeds: 0, 1; exact: yes'
    """
    if isinstance(value, Mapping | list | tuple) and not value:
        return "none"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {words(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(words(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _tolerance(run: RunFolder) -> str:
    sources = run.protocol.get("deltas")
    named: dict[str, str] = {}
    for entry in sources if isinstance(sources, list) else []:
        if isinstance(entry, Mapping) and "name" in entry:
            named[str(entry["name"])] = words(entry.get("source") or entry.get("delta_source") or MISSING)
    if isinstance(sources, Mapping):
        named = {str(name): words(source) for name, entry in sources.items() if (source := _find(entry, "source"))}
    frame = audit_frame(run)
    if frame.empty:
        return "no audit was made (it needs at least two tasks)"
    values = frame.groupby("delta_name", sort=False)["delta"].mean()
    return "; ".join(
        f"{name} = {value:.4g} ({named.get(str(name)) or _source(str(name))})" for name, value in values.items()
    )


def _source(name: str) -> str:
    if name.startswith("p") and name[1:].replace(".", "", 1).isdigit():
        return f"{name[1:]} % quantile of the reference model's pair distances"
    if name.startswith("conformal:"):
        return f"split-conformal at alpha = {name.split(':', 1)[1]} on the reference model's pair distances"
    return "fixed number"


def _reference(run: RunFolder) -> str:
    found = run.protocol.get("reference")
    if found:
        return words(found)
    parts = {key: run.protocol.get(f"reference_{key}") for key in ("model", "seed", "data")}
    if parts["model"] is None:
        return f"{run.reference} (the recipe's first method); seed and split {MISSING}"
    return words({key: MISSING if value is None else value for key, value in parts.items()})


def _scores(run: RunFolder) -> str:
    ranges = run.protocol.get("score_ranges")
    text = "number in [0, 1] by kind of task, the same mapping in training and audit, for every method"
    return (
        f"{text}; regression squashed by the reference's 10 % and 90 % quantiles: {words(ranges)}" if ranges else text
    )


def _pairs(run: RunFolder) -> str:
    stated = _find(run.protocol, "pair_distribution")
    audit = words(stated) if stated is not None else _at(run, "pairs")
    reference = _find(run.protocol.get("reference"), "pairs")
    return audit if reference in (None, audit) else f"reference: {words(reference)}; audit: {audit}"


def _pools(run: RunFolder) -> str:
    exact = _find(run.protocol, "exact")
    exact = set(audit_frame(run)["exact"].dropna()) == {True} if exact is None else exact
    if exact:
        return "exact: the expectation over all pairs of all valid examples; no pools, no seeds, no sampling error"
    found = {key: _find(run.protocol, key) for key in ("pool_size", "n_pairs", "eval_seed", "pair_seed")}
    return "sampled; " + words({key: MISSING if value is None else value for key, value in found.items()})


def _drift(run: RunFolder) -> str:
    frame = audit_frame(run)
    deltas = dict(zip(frame["delta_name"], frame["delta"]))
    parts = []
    for method in run.methods:
        means = [
            mean for item in run.of(method) if (mean := induced_mean(item.metrics.get("drift"), run.split)) is not None
        ]
        if means:
            mean = sum(means) / len(means)
            ratios = ", ".join(f"{mean / delta:.2f} of δ {name}" for name, delta in deltas.items() if delta > 0)
            parts.append(f"{method}: mean {mean:.4g}" + (f" ({ratios})" if ratios else ""))
    return f"diagnostics only, never used to rank: {'; '.join(parts)}" if parts else MISSING


def induced_mean(drift: Any, split: str) -> float | None:
    """Mean of a method's own thresholds over task pairs, from ``{split: {"induced": [T, T]}}``; None if not there.

    >>> induced_mean({"test": {"induced": [[0.0, 0.2], [0.2, 0.0]]}}, "test")
    0.2
    """
    matrix = (drift.get(split) or {}).get("induced") if isinstance(drift, Mapping) else None
    if not isinstance(matrix, list) or not all(isinstance(row, list) for row in matrix):
        return None
    upper = [number(value) for i, row in enumerate(matrix) for value in row[i + 1 :]]
    known = [value for value in upper if value == value]
    return sum(known) / len(known) if known else None


def _settings(run: RunFolder) -> str:
    parts = []
    for method in run.methods:
        metrics = run.of(method)[0].metrics
        settings = metrics.get("settings") or {}
        known = words(settings) if settings else "no settings"
        parts.append(f"{method} ({metrics.get('weighting') or 'weighting ' + MISSING}): {known}")
    return " | ".join(parts)


def _checkpoints(run: RunFolder) -> str:
    chosen: dict[str, list[str]] = {}
    for method in run.methods:
        checkpoints = [item.metrics.get("checkpoint") or {} for item in run.of(method)]
        by = ", ".join(dict.fromkeys(str(checkpoint.get("chosen_by") or MISSING) for checkpoint in checkpoints))
        epochs = ", ".join(str(checkpoint.get("epoch", "?")) for checkpoint in checkpoints)
        chosen.setdefault(by, []).append(f"{method} {epochs}")
    return "; ".join(f"{by} (epochs by seed: {'; '.join(epochs)})" for by, epochs in chosen.items())
