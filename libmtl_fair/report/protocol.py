"""Short facts about a run, and the audit's protocol as the ReLiF reporting checklist wants it (METHODS.md 1.1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from libmtl_fair.files import Json
from libmtl_fair.report.run_folder import RunFolder, number

MISSING = "not recorded"
Facts = list[tuple[str, str]]


def words(value: object) -> str:
    """Write plain data for a reader.

    >>> words({"method": "plain", "seeds": [0, 1], "exact": True})
    'method: plain; seeds: 0, 1; exact: yes'
    """
    if isinstance(value, Mapping) and value:
        return "; ".join(f"{key}: {words(item)}" for key, item in value.items())
    if isinstance(value, list | tuple) and value:
        return ", ".join(map(words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, Mapping | list | tuple):
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def checklist(run: RunFolder) -> Facts:
    """Return (item, what was done) for every item that a complete report states, or "not recorded"."""
    audit, protocol = run.frame("audit"), run.protocol
    deltas = audit.groupby("delta_name", sort=False)["delta"].mean()
    exact = protocol.get("exact", set(audit["exact"]) == {True})
    reference: Json | str = _recorded(protocol, "model", "seed", "data", prefix="reference_")
    if protocol.get("reference_model") is None:
        reference = f"{run.reference} (the recipe's first method); seed and split {MISSING}"
    scores = "number in [0, 1] by kind of task, the same mapping in training and audit, for every method"
    if ranges := protocol.get("score_ranges_by_seed"):
        by_seed = words({f"seed {seed}": found for seed, found in ranges.items()})
        scores += f"; regression squashed by the 10 % and 90 % quantiles of each seed's reference: {by_seed}"
    elif ranges := protocol.get("score_ranges"):
        scores += f"; regression squashed by the reference's 10 % and 90 % quantiles: {words(ranges)}"
    own = [text for method in run.methods if (text := _own_thresholds(run, method, deltas))]
    pools = "exact: the expectation over all pairs of all valid examples; no pools, no seeds, no sampling error"
    if not exact:
        pools = "sampled; " + words(_recorded(protocol, "pool_size", "n_pairs", "eval_seed", "pair_seed"))
    tolerances = [f"{name} = {value:.4g} ({_source(str(name))})" for name, value in deltas.items()]
    return [
        ("Reference tolerance", "; ".join(tolerances) or "no audit was made (it needs at least two tasks)"),
        ("Reference model", words(reference)),
        ("Representation of the reference distances", words(protocol.get("representation", MISSING))),
        ("Pair distribution", words(protocol.get("pair_distribution", MISSING))),
        ("Pools and seeds", pools),
        ("Score of each task", scores),
        ("Fixed-delta Bias and VR", "in the audit table; lower is better; same pools and pairs for every method"),
        (
            "Thresholds of the methods themselves",
            f"diagnostics only, never used to rank: {'; '.join(own)}" if own else MISSING,
        ),
        ("Utility, Brier and group metrics", "of the same checkpoints and split, in the tables of this report"),
        ("Controller settings", " | ".join(_settings(run, method) for method in run.methods)),
        ("Choice of the checkpoint", _checkpoints(run)),
    ]


def _recorded(protocol: Json, *keys: str, prefix: str = "") -> Json:
    return {key: MISSING if protocol.get(prefix + key) is None else protocol[prefix + key] for key in keys}


def _source(name: str) -> str:
    if name.startswith("p"):
        return f"{name[1:]} % quantile of the reference model's pair distances"
    alpha = name.removeprefix("conformal:")
    conformal = f"split-conformal at alpha = {alpha} on the reference model's pair distances"
    return "fixed number" if alpha == name else conformal


def _own_thresholds(run: RunFolder, method: str, deltas: pd.Series[float]) -> str:
    """Mean of a method's own thresholds over task pairs and seeds, and what part of the tolerances it is; "" without any."""
    found = [
        matrix[np.triu_indices(len(matrix), 1)]
        for item in run.of(method)
        if (matrix := item.thresholds(run.split)) is not None
    ]
    means = [upper[np.isfinite(upper)].mean() for upper in found if np.isfinite(upper).any()]
    if not means:
        return ""
    mean = np.mean(means)
    ratios = ", ".join(f"{mean / delta:.2f} of δ {name}" for name, delta in deltas.items() if delta > 0)
    return f"{method}: mean {mean:.4g}" + (f" ({ratios})" if ratios else "")


def _settings(run: RunFolder, method: str) -> str:
    metrics = run.of(method)[0].metrics
    weighting = metrics.get("weighting") or f"weighting {MISSING}"
    return f"{method} ({weighting}): {words(metrics.get('settings') or 'no settings')}"


def _checkpoints(run: RunFolder) -> str:
    chosen: dict[str, list[str]] = {}
    for method in run.methods:
        checkpoints = [item.metrics.get("checkpoint") or {} for item in run.of(method)]
        by = ", ".join(dict.fromkeys(str(checkpoint.get("chosen_by") or MISSING) for checkpoint in checkpoints))
        epochs = ", ".join(str(checkpoint.get("epoch", "?")) for checkpoint in checkpoints)
        chosen.setdefault(by, []).append(f"{method} {epochs}")
    return "; ".join(f"{by} (epochs by seed: {'; '.join(epochs)})" for by, epochs in chosen.items())


def run_facts(run: RunFolder) -> Facts:
    """Return data, methods, seeds, split and training time."""
    times = [number((item.metrics.get("timing") or {}).get("train_s")) for item in run.runs]
    found = [
        ("Data", str(run.data_card.get("title") or words((run.recipe.get("data") or {}).get("name")))),
        ("Methods", f"{', '.join(run.methods)} (reference: {run.reference})"),
        ("Seeds", ", ".join(map(str, run.seeds))),
        ("Reported split", run.split),
        ("Training time", f"{np.nansum(times):.0f} s in all" if np.isfinite(times).any() else ""),
    ]
    return [(name, value) for name, value in found if value]


def comparison_facts(run: RunFolder) -> Facts:
    """Return methods, reference, seeds and split of a comparison."""
    seeds = ", ".join(map(str, run.seeds))
    return [("Methods", ", ".join(run.methods)), ("Reference", run.reference), ("Seeds", seeds), ("Split", run.split)]


_CARD = {"Source": "source", "Licence": "licence", "Rows": "rows", "Filter": "filter", "Split": "split"}
_CARD |= {"Inputs": "inputs"}
_CARD |= {"Sensitive attributes among the inputs": "sensitive_inputs", "Missing input values": "missing_inputs"}
_CARD |= {"Left out of the inputs": "dropped"}


def card_facts(card: Json) -> Facts:
    """Return source, licence, rows, split and inputs of a data card; what it lacks is left out."""
    found = [(name, card[key]) for name, key in _CARD.items() if card.get(key)]
    return [(name, f"{value:,}" if name == "Rows" else words(value)) for name, value in found]


def method_facts(run: RunFolder) -> list[tuple[str, str, str, str]]:
    """Return method, weighting, settings and how the checkpoint was chosen."""
    found = []
    for name in run.methods:
        metrics = run.of(name)[0].metrics
        settings, chosen = metrics.get("settings"), (metrics.get("checkpoint") or {}).get("chosen_by")
        found.append((name, str(metrics.get("weighting") or "–"), words(settings or "defaults"), words(chosen or "–")))
    return found
