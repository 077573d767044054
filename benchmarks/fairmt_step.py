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

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch and numpy are imported

import argparse
import contextlib
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

import libmtl_fair as lf
from libmtl_fair.libmtl.loading import AbsWeighting, weighting_namespace
from libmtl_fair.models import MLP, linear_heads

_AS_SHIPPED = {
    name: vars(owner)[name]
    for owner, names in {
        AbsWeighting: ("_compute_grad_dim", "_compute_grad", "_grad2vec", "_get_grads"),
        weighting_namespace.MGDA: ("_find_min_norm_element", "backward"),
    }.items()
    for name in names
}
lf.heal()
from LibMTL import Trainer
from LibMTL.architecture import HPS
from LibMTL.weighting import EW, MGDA

FEATURES, BATCH = 100, 256
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


def settings(n_tasks: int) -> dict[str, Any]:
    tasks = [lf.Binary(f"t{i}") for i in range(n_tasks)]
    return {
        "task_dict": lf.task_dict(tasks),
        "architecture": HPS,
        "encoder_class": lambda: MLP(FEATURES, (128, 64)),
        "decoders": linear_heads(tasks, 64),
        "rep_grad": False,
        "multi_input": False,
        "optim_param": {"optim": "adam", "lr": 1e-3},
        "scheduler_param": None,
    }


def libmtl_steps(batches: Batches, n_tasks: int, weighting: type[Any]) -> Callable[[], None]:
    """Return a pass over the batches by LibMTL's Trainer; its test pass gets one batch."""
    args = {"mgda_gn": "none"} if issubclass(weighting, MGDA) else {}
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(weighting=weighting, weight_args=args, arch_args={}, **settings(n_tasks))

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train(batches, batches[:1], 1)

    return run


def our_steps(batches: Batches, n_tasks: int, weighting: str, **weight_args: Any) -> Callable[[], None]:
    """Return a pass over the batches by FairTrainer."""
    trainer = lf.FairTrainer(
        weighting=weighting, weight_args=weight_args, device="cpu", progress=False, select="last", **settings(n_tasks)
    )

    def run() -> None:
        trainer.train(batches, epochs=trainer.epoch + 1)

    return run


def measure(variants: dict[str, tuple[Callable[[], None], int]], rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds a step of each variant, a number a round; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, (run, steps) in variants.items():
            started = time.process_time()
            run()
            if turn:
                seconds[name].append((time.process_time() - started) / steps)
    return seconds


def ratio(top: list[float], bottom: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(top, bottom))


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
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*was not met")  # noise has no fair model to find
    results = []
    print(f"{'T':>3} {'plain':>9} {'FairMT':>9} " + " ".join(f"{name:>21}" for name in COLUMNS))
    for n_tasks in options.tasks:
        batches = make_batches(options.steps, n_tasks)
        few = Batches(batches[: max(1, options.steps // n_tasks)])
        seconds = measure(
            {
                "plain": (our_steps(batches, n_tasks, "EW"), len(batches)),
                "FairMT": (our_steps(batches, n_tasks, "FairMT"), len(batches)),
                "form phi": (our_steps(batches, n_tasks, "FairMT", form="phi"), len(batches)),
                "LibMTL": (libmtl_steps(batches, n_tasks, EW), len(batches)),
                "LibMTL MGDA": (libmtl_steps(few, n_tasks, ShippedMGDA), len(few)),
                "healed MGDA": (libmtl_steps(few, n_tasks, MGDA), len(few)),
            },
            options.rounds,
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
