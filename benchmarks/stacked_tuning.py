"""Trials per minute: stacked, one at a time, and LibMTL's own Trainer. MLP 128-64, T = 2, batch 512, adult-sized.

OMP_NUM_THREADS=1 python benchmarks/stacked_tuning.py [--method plain relif fairmt glf] [--widths] [--members 8] [--epochs 5]

Variants are interleaved; times are process CPU time on the CPU and wall time on a GPU, ratios medians over rounds. LibMTL trains
with equal weighting whatever the method. --workers of `libmtl-fair tune` use further cores, so ratios of one core are those of
two.

Measured on a shared 2-core CPU, M = 8: with equal weighting 12.7 to 13.7 times LibMTL's trials and 2.4 to 2.5 times those of one
at a time; 2.8 times with ReLiF and with FairMT, 1.9 with fairness heads (7.7, 10.0 and 6.9 times LibMTL's). 16 members give what
8 do. Adult's rows have 8 of 76 features that are not zero, which the first layer makes use of; without that, as with features
that are not one-hot, it was 10.7 and 2.0 times.

Below which model size it pays: stacking saves the cost of each call and of zeros, not other arithmetic. With equal weighting
it was 5.2 times as fast as one at a time with widths 32-16, 3.8 with 64-32, 2.5 with 128-64, 1.6 with 256-128 and 1.3 with
512-256: up to there it pays. At 128-64 three fifths of its time are matrix products and a fifth is the first layer. A GPU,
which one such model leaves idle, was not at hand.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from functools import partial

import torch
from _timing import measure, ratio

import libmtl_fair as lf
from libmtl_fair.libmtl.loading import Trainer
from libmtl_fair.libmtl.registry import resolve_architecture, resolve_weighting
from libmtl_fair.models import MLP, linear_heads
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.build import loaders, make_dataset, make_trainer
from libmtl_fair.tune.stacked import Rows, Stack

PAYS = 1.1
METHODS = {
    "plain": {"weighting": "EW"},
    "relif": {"weighting": "ReLiF", "pairs": "random"},
    "fairmt": {"weighting": "FairMT"},
    "glf": {"weighting": "LambdaMix", "lam": 0.95, "heads": {"loss": "glf"}},
}


def recipe_of(hidden: list[int], epochs: int) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "bench",
            "data": {"name": "adult", "tasks": ["income", "never_married"], "sensitive": ["sex"]},
            "model": {"hidden": hidden},
            "train": {"epochs": epochs, "batch_size": 512, "select": "last"},
            "methods": METHODS,
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


def trials(options: argparse.Namespace, method: str, hidden: list[int]) -> dict[str, float]:
    """Print trials a minute; return other -> how many times as fast stacked is, the median over rounds."""
    recipe = recipe_of(hidden, options.epochs)
    data = make_dataset(recipe, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device.type == "cpu"

    def clock() -> float:
        if not on_cpu:
            torch.cuda.synchronize()
        return time.process_time() if on_cpu and not options.wall else time.perf_counter()

    members = {"stacked": options.members, "one at a time": 2, "LibMTL": 1}
    runs = {
        name: partial(run, recipe, data, method, members[name], options.epochs, device)
        for name, run in zip(members, (stacked, single, libmtl))
    }
    with contextlib.redirect_stdout(io.StringIO()):
        per_trial = measure(runs, options.rounds, members, 0, clock)
    widths = "-".join(map(str, hidden))
    rates = ", ".join(f"{name} {60 / statistics.median(times):.0f}" for name, times in per_trial.items())
    print(f"{method}, {widths}, M = {options.members}, {device}: trials a minute: {rates}")
    found = {}
    for other in ("one at a time", "LibMTL"):
        found[other] = ratio(per_trial[other], per_trial["stacked"])
        print(f"  stacked against {other}: {found[other]:.2f} times")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--widths", action="store_true", help="several widths, to see below which stacking pays")
    parser.add_argument("--method", choices=list(METHODS), nargs="+", default=["plain"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="wall time; on the CPU only of use where nothing else runs")
    parser.add_argument("--smoke", action="store_true", help="seconds: checks that it runs, its numbers mean nothing")
    options = parser.parse_args()
    if options.smoke:
        options.members, options.epochs, options.rounds = 2, 1, 1
    torch.set_num_threads(options.threads)
    widths = [[32, 16], [64, 32], [128, 64], [256, 128], [512, 256]] if options.widths else [options.hidden]
    for method in options.method:
        found = {tuple(hidden): trials(options, method, hidden)["one at a time"] for hidden in widths}
        paying = [hidden for hidden, times in found.items() if times >= PAYS]
        if options.widths:
            print(f"{method}: stacking gains a tenth or more up to {max(paying) if paying else 'no width'}")


if __name__ == "__main__":
    main()
