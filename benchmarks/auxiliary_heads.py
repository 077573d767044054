"""What fairness heads and group regularisers cost a training step: python benchmarks/auxiliary_heads.py [--tasks 40]

Binary tasks (three unless told) on one MLP (128, 64) of 100 inputs, batch 512. Rounds of the variants alternate, so that what else
the machine does hits all alike; the ratio is the median over rounds of each round's own ratio. Limit: 1.3 for one head of
three tasks; goal: 2.5 for heads or a regulariser of all forty tasks.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from _timing import fair_epoch, measure, ratio

import libmtl_fair as lf
from libmtl_fair.models import MLP, linear_heads

ROWS, INPUTS, LIMIT = 512 * 40, 100, 1.3


def make(
    batch: int, device: str, n_tasks: int, heads: dict[str, object] | None, weighting: str = "EW", **args: object
) -> tuple[lf.FairTrainer, object]:
    """Return a trainer and its loader of random data."""
    torch.manual_seed(0)
    tasks = [lf.Binary(name) for name in (f"t{i}" for i in range(n_tasks))]
    x = torch.randn(ROWS, INPUTS)
    labels = {t.name: (x[:, i % INPUTS] + torch.randn(ROWS) > 0).float() for i, t in enumerate(tasks)}
    groups = {"sex": torch.randint(0, 2, (ROWS,)), "race": torch.randint(0, 5, (ROWS,))}
    loader = lf.ResidentLoader(x, labels, groups, batch_size=batch, shuffle=True, seed=0, device=device)
    entries, decoders = lf.task_dict(tasks), linear_heads(tasks, 64)
    if heads is not None:
        entries, decoders = lf.add_fairness_heads(entries, decoders, **heads)
    trainer = lf.FairTrainer(
        entries, weighting, "HPS", lambda: MLP(INPUTS, (128, 64)), decoders, False, False,
        {"optim": "adam", "lr": 1e-3}, None, device=device, seed=0, progress=False, select="last",
        weight_args=args,
    )  # fmt: skip
    return trainer, loader


def main() -> None:
    """Print milliseconds a step and the ratio to a step without heads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--check", action="store_true", help="exit 1 if one head costs more than 1.3 times a step")
    parser.add_argument("--smoke", action="store_true", help="seconds: checks that it runs, its numbers mean nothing")
    options = parser.parse_args()
    if options.smoke:
        options.rounds = 1
    one = {"tasks": ("t0",)}
    variants: dict[str, dict[str, object] | None] = {
        "none": None,
        "one head: main, GLF, sex": {**one, "sensitive": ("sex",)},
        "one head: main, GLD, sex": {**one, "sensitive": ("sex",), "loss": "gld"},
        "one head: main, GLF, race": {**one, "sensitive": ("race",)},
        "one head: main, gap, sex": {**one, "sensitive": ("sex",), "loss": "gap"},
        "one head: label, GLF, sex": {**one, "sensitive": ("sex",), "target": "label", "conditional": False},
        "all heads: main, GLF, sex": {"sensitive": ("sex",)},
        "shared head: main, GLF, sex": {"sensitive": ("sex",), "heads": "shared"},
        "all heads: main, GLF, sex and race": {"sensitive": ("sex", "race")},
        "all heads: main, gap, sex": {"sensitive": ("sex",), "loss": "gap"},
        "one adversary: sex": {**one, "sensitive": {"sex": 2}, "loss": "adversarial"},
    }
    made = {name: make(options.batch, options.device, options.tasks, heads) for name, heads in variants.items()}
    for loss in ("bgl", "dpl", "gap"):
        given = (options.batch, options.device, options.tasks, None, "GroupRegulariser")
        made[f"regulariser: {loss}, sex"] = make(*given, loss=loss, sensitive=("sex",))
    clock = time.process_time  # of this process alone
    if options.device != "cpu":

        def clock() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

    epochs = {name: fair_epoch(*each) for name, each in made.items()}
    times = measure(epochs, options.rounds, {name: len(loader) for name, (_, loader) in made.items()}, 2, clock)
    ratios = {name: ratio(times[name], times["none"]) for name in made}
    for name in made:
        print(f"{name:38s} {1e3 * statistics.median(times[name]):7.3f} ms   {ratios[name]:.2f}")
    worst = max(each for name, each in ratios.items() if name.startswith("one head"))
    print(f"one head costs at most {worst:.2f} times a step without (limit {LIMIT})")
    if options.check and worst > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
