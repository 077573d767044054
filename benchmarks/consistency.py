"""Time and memory of the consistency audit by number of people: ``python benchmarks/consistency.py [people ... | --smoke]``.

Inputs as a table's: a few numbers, categories of which most people share a few values, so that many are alike. One thread
(OMP_NUM_THREADS=1) is what the goals are for: 20,000 people in 5 s, 100,000 in 60 s.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
import pandas as pd

from libmtl_fair.metrics import ConsistencyAudit


def people(n: int, seed: int = 0) -> pd.DataFrame:
    """Return four numbers and six categories."""
    rng = np.random.default_rng(seed)
    numbers = {f"number {i}": rng.normal(size=n).round(2) for i in range(4)}
    names = {
        f"category {i}": np.minimum(rng.geometric(0.4, n), levels).astype(str)
        for i, levels in enumerate((3, 5, 7, 8, 16, 40))
    }
    return pd.DataFrame(numbers | names)


def main(sizes: list[int]) -> None:
    """Print a line a size: neighbours, one model's audit of three tasks, and the process's peak memory."""
    for n in sizes:
        frame = people(n)
        logit = frame["number 0"].to_numpy()
        scores = {f"task {i}": 1 / (1 + np.exp(-logit - np.random.default_rng(i).normal(size=n))) for i in range(3)}
        audit = ConsistencyAudit(frame, sensitive={"group": np.arange(n) % 2}, twins=scores)
        start = time.perf_counter()
        pairs = audit.pairs
        found = time.perf_counter()
        value = audit.run(scores, labels={task: (s > 0.5) * 1 for task, s in scores.items()}).inconsistency
        done = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{n:,} people, {len(pairs.anchors):,} anchors: neighbours {found - start:.1f} s, audit {done - found:.1f} s, "
            f"peak {peak:,.0f} MB, I = {value:.3f}"
        )


if __name__ == "__main__":
    smoke = "--smoke" in sys.argv  # seconds: checks that it runs, its numbers mean nothing
    main([int(size) for size in sys.argv[1:] if size != "--smoke"] or ([500] if smoke else [20_000, 100_000]))
