"""Trials per minute: stacked, one at a time, and LibMTL's own Trainer. MLP 128-64, T = 2, batch 512, adult-sized.

OMP_NUM_THREADS=1 python benchmarks/stacked_tuning.py [--members 8] [--epochs 5] [--rounds 3] [--hidden 128 64] [--method relif]

Variants are interleaved, times are process CPU time on the CPU and wall time on a GPU, ratios are medians over rounds.
Stacking saves the cost of each call, not arithmetic: it is for small models and small batches, and for a GPU, which a single
small model leaves idle. Run with --hidden 32 16 and --hidden 512 256 to see below which size it pays on a machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time

import torch

import libmtl_fair as lf
from libmtl_fair.host.loading import Trainer
from libmtl_fair.host.registry import resolve_architecture, resolve_weighting
from libmtl_fair.models import MLP, linear_heads
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.build import loaders, make_dataset, make_trainer
from libmtl_fair.tune.stacked import Rows, Stack


def recipe_of(options: argparse.Namespace) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "bench",
            "data": {"name": "adult", "tasks": ["income", "never_married"], "sensitive": ["sex"]},
            "model": {"hidden": options.hidden},
            "train": {"epochs": options.epochs, "batch_size": 512, "select": "last"},
            "methods": {"plain": {"weighting": "EW"}, "relif": {"weighting": "ReLiF"}},
        }
    )


def stacked(recipe, data, method, members, epochs, device) -> None:
    trainers = [make_trainer(recipe, method, data, data.tasks, s, device=device) for s in range(members)]
    stack = Stack(Rows(data, device), 512)
    stack.change(add=trainers)
    for _ in range(epochs):
        stack.epoch()
    stack.change(drop=trainers)


def single(recipe, data, method, members, epochs, device) -> None:
    for seed in range(members):
        trainer = make_trainer(recipe, method, data, data.tasks, seed, device=device)
        trainer.train(loaders(data, 512, seed, device)["train"], None, epochs)


def libmtl(recipe, data, method, members, epochs, device) -> None:
    """LibMTL's Trainer with an ordinary DataLoader and equal weighting, mended only where it cannot run at all."""
    lf.heal()
    trainer = Trainer(
        lf.task_dict(data.tasks),
        resolve_weighting("EW"),
        resolve_architecture("HPS"),
        lambda: MLP(data.n_features, recipe.model.hidden),
        linear_heads(data.tasks, recipe.model.hidden[-1]),
        False,
        False,
        {"optim": "adam", "lr": 1e-3},
        None,
        weight_args={},
        arch_args={},
    )
    rows = torch.utils.data.DataLoader(data.train.torch_dataset(), 512, shuffle=True)
    one = torch.utils.data.DataLoader(torch.utils.data.Subset(data.val.torch_dataset(), range(512)), 512)
    trainer.train(rows, one, epochs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--method", choices=["plain", "relif"], default="plain")
    parser.add_argument("--smoke", action="store_true", help="seconds: checks that it runs, its numbers mean nothing")
    options = parser.parse_args()
    if options.smoke:
        options.members, options.epochs, options.rounds = 2, 1, 1
    recipe = recipe_of(options)
    data = make_dataset(recipe, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    variants = {"stacked": (stacked, options.members), "one at a time": (single, 2), "LibMTL": (libmtl, 1)}
    per_trial: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, (run, members) in variants.items():
            began = clock()
            with contextlib.redirect_stdout(io.StringIO()):
                run(recipe, data, options.method, members, options.epochs, device)
            per_trial[name].append((clock() - began) / members)
    for name, times in per_trial.items():
        print(f"{name:14} {60 / statistics.median(times):8.1f} trials a minute ({device})")
    for other in ("one at a time", "LibMTL"):
        ratios = [b / a for a, b in zip(per_trial["stacked"], per_trial[other])]
        print(f"stacked against {other}: {statistics.median(ratios):.2f} times")


if __name__ == "__main__":
    main()
