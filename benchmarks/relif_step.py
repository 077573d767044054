"""What one ReLiF step costs beside a plain one: near pairs (the default of tables) and random ones.

Work: MLP 300-128-64, T binary heads, batch 512, Adam, on the CPU; 300 input columns, once a table's (10 numbers and 20 categories
as one-hot columns) and once dense numbers. The reference is all of them, of which the loader keeps 32 components. One
thread, process CPU time, variants interleaved; printed are medians of per-round ratios. Batches come from the loader, as in training.

    python benchmarks/relif_step.py            # about a minute
    python benchmarks/relif_step.py --smoke    # seconds: checks that it runs, its numbers mean nothing
"""

from __future__ import annotations

import _timing  # noqa: F401, isort: skip  # before torch: one thread

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _timing import measure, ratio

import libmtl_fair as lf
from libmtl_fair.models import MLP, linear_heads

FEATURES, BATCH, GOAL = 300, 512, 1.4
VARIANTS: dict[str, dict[str, Any]] = {
    "near": {"pairs": "near"},
    "near, share": {"pairs": "near", "share": 0.7},
    "random": {"pairs": "random"},
}


def make_loader(steps: int, n_tasks: int, kind: str) -> lf.ResidentLoader:
    generator = torch.Generator().manual_seed(0)
    rows = steps * BATCH
    x = torch.randn(rows, FEATURES, generator=generator)
    if kind == "table":
        levels = (FEATURES - 10) // 20
        weights = 1 / torch.arange(1, levels + 1)
        drawn = [torch.multinomial(weights, rows, True, generator=generator) for _ in range(20)]
        hot = torch.cat([torch.nn.functional.one_hot(column, levels) for column in drawn], 1).float()
        x = torch.cat([x[:, : FEATURES - hot.shape[1]], hot], 1)
    logits = x @ torch.randn(FEATURES, n_tasks, generator=generator)
    labels = {f"t{i}": (logits[:, i] > 0).float() for i in range(n_tasks)}
    return lf.ResidentLoader(x, labels, batch_size=BATCH, shuffle=True, seed=0, device="cpu", reference=x)


def steps_of(loader: lf.ResidentLoader, n_tasks: int, weighting: str, **args: Any) -> Callable[[], None]:
    """Return a pass over the batches by FairTrainer."""
    tasks = [lf.Binary(f"t{i}") for i in range(n_tasks)]
    trainer = lf.FairTrainer(
        lf.task_dict(tasks), weighting, "HPS", lambda: MLP(FEATURES, (128, 64)), linear_heads(tasks, 64), False, False,
        {"optim": "adam", "lr": 1e-3}, None, device="cpu", progress=False, select="last", weight_args=args,
    )  # fmt: skip
    return lambda: trainer.train(loader, epochs=trainer.epoch + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 5, 40])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.rounds, options.tasks = 4, 1, [2]
    warnings.simplefilter("error")
    results = []
    print(f"{'x':>6} {'T':>3} {'plain':>9} " + " ".join(f"{name + ' / plain':>19}" for name in VARIANTS))
    for kind in ("table", "dense"):
        for n_tasks in options.tasks:
            loader = make_loader(options.steps, n_tasks, kind)
            runs = {"plain": steps_of(loader, n_tasks, "EW")}
            runs |= {name: steps_of(loader, n_tasks, "ReLiF", **args) for name, args in VARIANTS.items()}
            seconds = measure(runs, options.rounds, options.steps)
            ratios = {n: ratio(seconds[n], seconds["plain"]) for n in VARIANTS}
            results.append(
                {"x": kind, "tasks": n_tasks, "plain us": 1e6 * statistics.median(seconds["plain"]), **ratios}
            )
            print(
                f"{kind:>6} {n_tasks:>3} {results[-1]['plain us']:>6.0f} us "
                + " ".join(f"{r:>19.3f}" for r in ratios.values())
            )
    print(f"goal: near / plain at most {GOAL:g}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
