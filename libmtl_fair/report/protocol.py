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
        ("Score of each task kind", _at(run, "scores", "score mapping of the package, the same for every method")),
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
        named = {str(name): words(_find(entry, "source") or entry) for name, entry in sources.items()}
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
    return words(found) if found else f"{run.reference} (the recipe's first method); seed and split {MISSING}"


def _pairs(run: RunFolder) -> str:
    audit, reference = _at(run, "pairs"), _find(run.protocol.get("reference"), "pairs")
    return audit if reference in (None, audit) else f"reference: {words(reference)}; audit: {audit}"


def _pools(run: RunFolder) -> str:
    exact = _find(run.protocol, "exact")
    exact = set(audit_frame(run)["exact"].dropna()) == {True} if exact is None else exact
    if exact:
        return "exact: the expectation over all pairs of all valid examples; no pools, no seeds, no sampling error"
    found = {key: _find(run.protocol, key) for key in ("pool_size", "n_pairs", "eval_seed", "pair_seed")}
    return "sampled; " + words({key: MISSING if value is None else value for key, value in found.items()})


def _drift(run: RunFolder) -> str:
    parts = []
    for method in run.methods:
        drift = run.of(method)[0].metrics.get("drift")
        scalars = {k: v for k, v in drift.items() if number(v) == number(v)} if isinstance(drift, Mapping) else {}
        if scalars:
            parts.append(f"{method}: {', '.join(f'{k} {v:.4g}' for k, v in scalars.items())}")
    return f"diagnostics only, never used to rank: {'; '.join(parts)}" if parts else MISSING


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
