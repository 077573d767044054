"""What one FairMT step costs: against our plain step, LibMTL's plain step and LibMTL's MGDA step.

Work: MLP 100-128-64, T binary heads, one attribute of two groups, batch 256, Adam, on the CPU. All variants get the same
batches, gathered beforehand, so that this is the step alone: forward pass, losses, backward pass, optimiser and the
trainer's own bookkeeping. "LibMTL" is its own Trainer, healed, or it would not run; "LibMTL MGDA" has MGDA's own code as
shipped, "healed MGDA" has ours in its place. One thread, process CPU time, variants interleaved; printed are medians of
per-round ratios.

    python benchmarks/fairmt_step.py            # about two minutes
    python benchmarks/fairmt_step.py --smoke    # seconds: checks that it runs, its numbers mean nothing
"""

from __future__ import annotations

import _timing  # noqa: F401, isort: skip  # before torch: one thread

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from _timing import BATCH, FEATURES, Run, fair_epoch, fair_trainer, libmtl_epoch, measure, ratio, settings

import libmtl_fair as lf
from libmtl_fair.libmtl.loading import AbsWeighting, weighting_namespace

_AS_SHIPPED = {
    name: vars(owner)[name]
    for owner, names in {
        AbsWeighting: ("_compute_grad_dim", "_compute_grad", "_grad2vec", "_get_grads"),
        weighting_namespace.MGDA: ("_find_min_norm_element", "backward"),
    }.items()
    for name in names
}
lf.heal()
from LibMTL.weighting import EW, MGDA

GOALS = {"FairMT / plain": 1.7, "FairMT / LibMTL": 1.0, "FairMT / LibMTL MGDA": 1 / 50}
"""Goals: the first at T = 2, 5 and 40, the second at T = 5, the third at T = 40."""
COLUMNS = ("form phi / plain", *GOALS, "FairMT / healed MGDA")


class ShippedMGDA(MGDA):  # type: ignore[misc]
    """MGDA as LibMTL ships it; only what keeps it from running at all (``_reset_grad``) is mended."""


for _name, _method in _AS_SHIPPED.items():
    setattr(ShippedMGDA, _name, _method)


class Batches(list[Any]):
    """Batches gathered beforehand, with what a loader declares."""

    n_groups: ClassVar = {"group": 2}
    group_names: ClassVar = {"group": ["a", "b"]}


def make_batches(steps: int, n_tasks: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    rows = steps * BATCH
    x = torch.randn(rows, FEATURES, generator=generator)
    logits = x @ torch.randn(FEATURES, n_tasks, generator=generator) / FEATURES**0.5
    groups = (torch.rand(rows, generator=generator) < 0.3).long()
    labels = {f"t{i}": (logits[:, i] + 0.5 * groups > 0).float() for i in range(n_tasks)}
    return Batches(
        lf.ResidentLoader(x, labels, {"group": groups}, batch_size=BATCH, shuffle=True, seed=0, device="cpu")
    )


def ours(batches: Batches, n_tasks: int, weighting: str, **weight_args: Any) -> Run:
    """Return a pass over the batches by FairTrainer."""
    return fair_epoch(fair_trainer(weighting, settings(n_tasks), weight_args=weight_args), batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 5, 40])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.rounds, options.tasks = 4, 1, [2, 5]
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*was not met")  # noise has no fair model to find
    results = []
    print(f"{'T':>3} {'plain':>9} {'FairMT':>9} " + " ".join(f"{name:>21}" for name in COLUMNS))
    for n_tasks in options.tasks:
        batches = make_batches(options.steps, n_tasks)
        few = Batches(batches[: max(1, options.steps // n_tasks)])
        unscaled = {"mgda_gn": "none"}
        seconds = measure(
            {
                "plain": ours(batches, n_tasks, "EW"),
                "FairMT": ours(batches, n_tasks, "FairMT"),
                "form phi": ours(batches, n_tasks, "FairMT", form="phi"),
                "LibMTL": libmtl_epoch(batches, batches[:1], EW, settings(n_tasks)),
                "LibMTL MGDA": libmtl_epoch(few, few[:1], ShippedMGDA, settings(n_tasks), weight_args=unscaled),
                "healed MGDA": libmtl_epoch(few, few[:1], MGDA, settings(n_tasks), weight_args=unscaled),
            },
            options.rounds,
            calls=dict.fromkeys(("plain", "FairMT", "form phi", "LibMTL"), len(batches))
            | dict.fromkeys(("LibMTL MGDA", "healed MGDA"), len(few)),
        )
        pairs = list(COLUMNS)
        row: dict[str, Any] = {"tasks": n_tasks}
        row |= {f"{name} us": 1e6 * statistics.median(seconds[name]) for name in ("plain", "FairMT")}
        row |= {pair: ratio(*(seconds[name] for name in pair.split(" / "))) for pair in pairs}
        results.append(row)
        times = f"{row['plain us']:>6.0f} us {row['FairMT us']:>6.0f} us"
        print(f"{n_tasks:>3} {times} " + " ".join(f"{row[pair]:>21.3f}" for pair in pairs))
    print("goals: " + ", ".join(f"{name} {limit:g}" for name, limit in GOALS.items()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
