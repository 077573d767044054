"""Group rates, differences, intervals and AUC against fairlearn and scikit-learn, side by side.

    python benchmarks/group_metrics.py [--smoke] [--rounds 5]

One thread, process CPU time, variants interleaved, medians of per-round ratios. Input is int64, as fairlearn's users have it.
"mended" is fairlearn with its one slow line (``np.stack`` on a one-dimensional column) skipped, here only; "bare" are the
same metric functions called group by group. All compute the true and false positive rate and the selection rate of every group, and
their differences and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import fairlearn.metrics as flm
import numpy as np
import torch
from _timing import measure, ratio
from fairlearn.metrics import _annotated_metric_function as annotated
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

import libmtl_fair as lf
from libmtl_fair.metrics import GroupMetrics, group_auc, group_rates

RATES = ("selection_rate", "true_positive_rate", "false_positive_rate")
FUNCTIONS = {name: getattr(flm, name) for name in RATES}


def rounds(variants: Mapping[str, tuple[Callable[[], Any], int]], count: int) -> dict[str, list[float]]:
    """Time every variant once a round, a call so many times over."""

    def repeated(call: Callable[[], Any], repeats: int) -> Callable[[], None]:
        return lambda: [call() for _ in range(repeats)] and None

    repeats = {name: many for name, (_, many) in variants.items()}
    return measure({name: repeated(*each) for name, each in variants.items()}, count, repeats)


def _stack_mended(column: Any) -> Any:
    return (
        column if isinstance(column, np.ndarray) and column.ndim == 1 and column.dtype != object else np.stack(column)
    )


class _MendedNumpy:
    stack = staticmethod(_stack_mended)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def metric_frame(y: Any, p: Any, group: Any, mended: bool) -> Any:
    """Return fairlearn's differences and ratios."""
    with mock.patch.object(annotated, "np", _MendedNumpy() if mended else np):
        frame = flm.MetricFrame(metrics=FUNCTIONS, y_true=y, y_pred=p, sensitive_features=group)
    return frame.difference(), frame.ratio()


def bare(y: Any, p: Any, group: Any, groups: int) -> Any:
    """Return the metric functions' values, group by group."""
    rows = [group == g for g in range(groups)]
    return {name: [function(y[r], p[r]) for r in rows] for name, function in FUNCTIONS.items()}


def ours(y: Any, p: Any, group: Any, groups: int) -> Any:
    """Return our differences and ratios, equalised odds included."""
    found = group_rates(y, p, group, groups, empty="fairlearn")
    gaps = [(found.difference(name), found.ratio(name)) for name in RATES]
    return gaps, found.equalized_odds_difference()


def rate_row(n: int, groups: int, count: int, stock: bool) -> str:
    """Time one size and number of groups."""
    rng = np.random.default_rng(0)
    y, p, group = rng.integers(0, 2, n), rng.integers(0, 2, n), rng.integers(0, groups, n)
    outputs = {"t": torch.from_numpy(rng.normal(size=(n, 1)).astype(np.float32))}
    labels, ids = {"t": torch.from_numpy(y)}, {"s": torch.from_numpy(group)}
    task = [lf.Binary("t")]

    def whole() -> Any:
        return GroupMetrics(task, {"s": groups}, n_bootstrap=1000, auc=False).update(outputs, labels, ids).compute()

    def table() -> Any:
        return GroupMetrics(task, {"s": groups}, confidence=None, auc=False).update(outputs, labels, ids).compute()

    check = metric_frame(y, p, group, mended=True)[0]
    assert np.allclose(
        [g[0] for g in ours(y, p, group, groups)[0]], [check[name] for name in RATES], atol=1e-12, rtol=0
    )
    variants = {
        "ours": (lambda: ours(y, p, group, groups), max(1, 200_000 // n)),
        "bare": (lambda: bare(y, p, group, groups), 1),
        "mended": (lambda: metric_frame(y, p, group, mended=True), 1),
        "whole": (whole, 1),
        "table": (table, max(1, 200_000 // n)),
    }
    if stock:
        variants["stock"] = (lambda: metric_frame(y, p, group, mended=False), 1)
    times = rounds(variants, count)
    tracemalloc.start()
    ours(y, p, group, groups)
    memory = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    shown, plain = (f"{ratio(times['stock'], times[name]):8.0f}" if stock else "       -" for name in ("ours", "table"))
    own, frame, rows = (statistics.median(times[name]) * 1e3 for name in ("ours", "whole", "table"))
    return (
        f"{n:9,d} {groups:6d} {own:9.3f} {ratio(times['mended'], times['ours']):8.0f} {ratio(times['bare'], times['ours']):8.0f} {shown}"
        f" {memory:8.1f} {frame:10.1f} {ratio(times['mended'], times['whole']):8.1f} {rows:14.2f} {plain}"
    )


def auc_row(n: int, groups: int, count: int) -> str:
    """Time AUC per group in float32 and float64."""
    rng = np.random.default_rng(0)
    y, group = rng.integers(0, 2, n), rng.integers(0, groups, n)
    row = f"{n:9,d} {groups:6d}"
    for dtype in (np.float32, np.float64):
        score = rng.random(n).astype(dtype)

        def theirs(score: Any = score) -> Any:
            return [roc_auc_score(y[group == g], score[group == g]) for g in range(groups)]

        def mine(score: Any = score) -> Any:
            return group_auc(score, y, group, groups, errors=False).value

        assert np.allclose(mine(), theirs(), atol=1e-12, rtol=0)
        times = rounds({"ours": (mine, max(1, 200_000 // n)), "sklearn": (theirs, 1)}, count)
        tracemalloc.start()
        mine()
        memory = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        row += f" {statistics.median(times['ours']) * 1e3:9.2f} {ratio(times['sklearn'], times['ours']):8.1f} {memory:8.1f}"
    return row


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small sizes, one round: does it run?")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    sizes = (2_000,) if options.smoke else (10_000, 100_000, 1_000_000)
    groups = (2, 10) if options.smoke else (2, 10, 50)
    count = 1 if options.smoke else options.rounds
    print(
        "rates and differences: times slower than ours. 'report': GroupMetrics from logits, 10 metrics, the table, and"
    )
    print(
        "intervals of every gap, equalised odds included, from 1,000 bootstrap replicates: one MetricFrame takes that much more"
    )
    print("'table': GroupMetrics from logits without intervals and AUC")
    print(
        "        n groups   ours ms   mended     bare    stock  peak MB  report ms  mended/report  table ms  stock/table"
    )
    for n in sizes:
        for g in groups:
            print(rate_row(n, g, count if n < 1_000_000 else min(count, 3), stock=n <= 100_000), flush=True)
    print("\nAUC per group: float32 ms, scikit-learn / ours, peak MB; then float64")
    for n in sizes:
        for g in groups:
            print(auc_row(n, g, count), flush=True)


if __name__ == "__main__":
    main()
