"""The exact audit (all pairs of all examples) against the sampled one and plain loops, side by side.

    python benchmarks/audit.py [--smoke] [--rounds 5]

One thread, process CPU time, variants interleaved, medians of per-round ratios. "loop" is the sampled protocol as it is
usually written: per task pair, draw 4,096 index pairs from pools of 256, gather, compare.
"""

from __future__ import annotations

import argparse
import statistics
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _timing import measure, ratio
from threadpoolctl import threadpool_limits

from libmtl_fair.metrics import FixedDeltaAudit

DELTA, POOL, PAIRS = 0.275, 256, 4096


def loop(scores: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return Bias and VR by a loop over task pairs, in torch."""
    generator = torch.Generator().manual_seed(42)
    pools = [s[torch.randperm(len(s), generator=generator)[:POOL]] for s in scores.values()]
    bias, rate, count = 0.0, 0.0, 0
    for i, p in enumerate(pools):
        for q in pools[i + 1 :]:
            x = torch.randint(0, len(p), (PAIRS,), generator=generator)
            y = torch.randint(0, len(q), (PAIRS,), generator=generator)
            gap = (p[x] - q[y]).abs()
            bias += torch.relu(gap - DELTA).mean().item()
            rate += (gap > DELTA).float().mean().item()
            count += 1
    return bias / count, rate / count


def brute(scores: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return Bias and VR over all pairs of the pools' examples."""
    pools = [s[:POOL] for s in scores.values()]
    found = []
    for i, p in enumerate(pools):
        for q in pools[i + 1 :]:
            gap = (p[:, None] - q).abs()
            found.append((torch.relu(gap - DELTA).mean().item(), (gap > DELTA).float().mean().item()))
    return tuple(np.mean(found, axis=0))


def row(tasks: int, n: int, count: int) -> str:
    """Time one number of tasks and examples."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(tasks, 1, generator=generator)
    drawn = torch.sigmoid(torch.randn(tasks, n, generator=generator) + shift)
    scores = {f"task{t}": drawn[t] for t in range(tasks)}
    exact, sampled = FixedDeltaAudit(DELTA, exact=True), FixedDeltaAudit(DELTA, pool_size=POOL, n_pairs=PAIRS)
    variants: dict[str, Callable[[], Any]] = {
        "loop": lambda: loop(scores),
        "sampled": lambda: sampled.run(scores),
        "exact": lambda: exact.run(scores),
        "brute": lambda: brute(scores),
    }
    times = measure(variants, count)
    tracemalloc.start()
    exact.run(scores)
    memory = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    shown = "".join(f"{statistics.median(times[name]) * 1e3:10.1f}" for name in variants)
    ratios = [ratio(times[v], times["exact"]) for v in ("loop", "sampled")]
    return f"{tasks:6d} {n:9,d}{shown}{ratios[0]:12.2f}{ratios[1]:15.2f}{memory:9.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small sizes, one round: does it run?")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    print(" tasks         n   loop ms   sampled     exact brute 256  loop/exact  sampled/exact  peak MB")
    cases = [(3, 500)] if options.smoke else [(3, 10_000), (40, 256), (40, 1_000), (40, 2_000), (40, 10_000)]
    for tasks, n in cases:
        print(row(tasks, n, 1 if options.smoke else options.rounds), flush=True)


if __name__ == "__main__":
    main()
