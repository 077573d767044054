"""Is a lower Bias worth anything? A method beside the plain model with its scores shrunk (methods.md 1.1, ours)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from libmtl_fair.report.frames import audit_frame, rows, shrinkage_frame, utility_frame
from libmtl_fair.report.run_folder import RunFolder


def curve_bias(curve: pd.DataFrame, brier: float) -> float:
    """Least Bias that shrinking the reference reaches at a Brier of at most ``brier`` (linear between its points).

    NaN where every point of the curve has a larger Brier: no shrinking is as good.

    >>> curve_bias(pd.DataFrame({"brier": [0.10, 0.20], "bias": [0.08, 0.04]}), 0.15)
    0.06
    """
    points = curve.dropna(subset=["brier", "bias"]).sort_values("brier")
    if points.empty or not math.isfinite(brier) or brier < points["brier"].iloc[0]:
        return math.nan
    x, y = points["brier"].to_numpy(float), points["bias"].to_numpy(float)
    return float(round(min(y[x <= brier].min(), np.interp(brier, x, y)), 12))


def shrinkage_verdict(run: RunFolder, split: str | None = None) -> pd.DataFrame:
    """Return method, delta_name, brier, bias, curve_bias, below, seeds_below, seeds: means, each seed's own curve.

    ``below`` says whether the method has less Bias than the shrunk reference at equal Brier, in the mean over seeds; where
    no shrunk reference reaches the method's Brier (``curve_bias`` NaN) it is below by being better calibrated. A curve of
    other tasks than the audit's is not used: at a = 1 it must be the reference itself.
    """
    curves = _curves(run, split)
    found = []
    brier = _macro_brier(run, split)
    for row in rows(audit_frame(run, split)):
        curve = curves.get((row.seed, row.delta_name))
        if row.method == run.reference or curve is None or (row.method, row.seed) not in brier:
            continue
        own = brier[(row.method, row.seed)]
        found.append((row.method, row.delta_name, own, row.bias, curve_bias(curve, own)))
    frame = pd.DataFrame(found, columns=["method", "delta_name", "brier", "bias", "curve_bias"])
    frame["seeds_below"] = ((frame["bias"] < frame["curve_bias"]) | frame["curve_bias"].isna()).astype(int)
    grouped = frame.groupby(["method", "delta_name"], sort=False)
    means = grouped[["brier", "bias", "curve_bias"]].mean()
    means = means.join(grouped["seeds_below"].agg(seeds_below="sum", seeds="count")).reset_index()
    means["below"] = (means["bias"] < means["curve_bias"]) | means["curve_bias"].isna()
    return means


def fits(run: RunFolder, split: str | None = None) -> bool:
    """Whether the shrinkage curves there are belong to the audited tasks (True where there is none)."""
    return shrinkage_frame(run, split).empty or bool(_curves(run, split))


def _curves(run: RunFolder, split: str | None) -> dict[tuple[int, str], pd.DataFrame]:
    """Curves by seed and tolerance, without those whose unshrunk end is not the reference's own point."""
    found, brier = {}, _macro_brier(run, split)
    curves = shrinkage_frame(run, split)
    for row in rows(audit_frame(run, split)):
        if row.method != run.reference:
            continue
        curve = curves[(curves["seed"] == row.seed) & curves["delta_name"].isin([row.delta_name, ""])]
        end = curve[curve["a"] == 1]
        own = brier.get((row.method, row.seed), math.nan)
        near = (end["bias"] - row.bias).abs().le(0.1 * row.bias + 1e-6) & (end["brier"] - own).abs().le(2e-3)
        if len(curve) and (end.empty or near.all()):
            found[(row.seed, row.delta_name)] = curve
    return found


def _macro_brier(run: RunFolder, split: str | None) -> dict[tuple[str, int], float]:
    frame = utility_frame(run, split)
    taken = frame[(frame["task"] == "macro") & (frame["metric"] == "brier")]
    return {(row.method, row.seed): row.value for row in rows(taken) if math.isfinite(row.value)}
