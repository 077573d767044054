"""What a training step of FairBranch with FBGrad costs, against PCGrad on the same tasks.

Work: MLP 100-128-64-32, T binary heads, one sensitive attribute of two groups, batch 256, Adam, on the CPU, the same
resident loader for all. PCGrad shares the whole encoder: in LibMTL's own Trainer with LibMTL's own projection loop (the rest
healed, or it does not run), in LibMTL's own Trainer with the healed PCGrad, and in FairTrainer. FairBranch is measured before
any event, and after two events: all tasks alone, in twos then fours (the most tasks a branch can have), and half and half.
Last, the forward pass alone in training mode, of a model whose tasks have a branch each (the trunk's block shared), against
the same products written by hand with ``baddbmm`` on stacked weights. One thread, process CPU time, variants interleaved;
printed are medians of per-round ratios.

    python benchmarks/fairbranch_step.py            # a minute or two
    python benchmarks/fairbranch_step.py --smoke    # seconds, on few steps: checks that it runs, its numbers mean nothing
"""

from __future__ import annotations

import _timing  # noqa: F401, isort: skip  # before torch: one thread

import argparse
import itertools
import json
import statistics
from pathlib import Path

import torch
from _timing import (
    BATCH,
    FEATURES,
    Run,
    binary_data,
    fair_epoch,
    fair_trainer,
    libmtl_epoch,
    measure,
    ratio,
    resident,
    settings,
)

import libmtl_fair as lf

import LibMTL.weighting  # isort: skip

_own_loop = LibMTL.weighting.PCGrad.__dict__["backward"]
lf.heal()
from LibMTL.weighting import PCGrad

HIDDEN = (128, 64, 32)
Tree = list[list[tuple[int, ...]]]


class OwnPCGrad(PCGrad):  # type: ignore[misc]
    """PCGrad with LibMTL's own loop over pairs."""

    backward = _own_loop


def trees(n: int) -> dict[str, Tree]:
    """Return the events of each shape of tree for ``n`` tasks."""

    def twos(k: int) -> list[tuple[int, ...]]:
        return [tuple(range(i, min(i + 2, k))) for i in range(0, k, 2)]

    half = [tuple(range(i, i + 2)) for i in range(0, n // 2 - 1, 2)]
    mixed = half + [(i,) for i in range(2 * len(half), n)]
    return {
        "before any event": [],
        "alone": [[(i,) for i in range(n)]] * 2,
        "twos, then fours": [twos(n), twos((n + 1) // 2)],
        "half in twos": [mixed, [(i,) for i in range(len(mixed))]],
    }


def fbgrad_epoch(data: lf.ResidentLoader, n: int, events: Tree) -> Run:
    """Return one epoch of a FairBranch model that has had these events."""
    made = settings(n, HIDDEN)
    trainer = fair_trainer("FBGrad", made, architecture="FairBranch", arch_args={"max_events": 0})
    for pairs in events:
        trainer.model.encoder.grow(trainer.model.tree.branch(pairs))
    trainer._prepare_optimizer(made["optim_param"], None)
    return fair_epoch(trainer, data)


def forwards(n: int, repeats: int) -> dict[str, Run]:
    """Return repeated forward passes of ``n`` branches, and the same by hand."""
    options = {"architecture": "FairBranch", "arch_args": {"max_events": 0}}
    model = fair_trainer("EW", settings(n, HIDDEN), **options).model.train()
    x = torch.randn(BATCH, FEATURES)
    model(x)
    for pairs in trees(n)["alone"]:
        model.encoder.grow(model.tree.branch(pairs))
    widths = (*HIDDEN, 1)
    trunk = torch.nn.Linear(FEATURES, HIDDEN[0])
    weights = [torch.randn(n, a, b, requires_grad=True) for a, b in itertools.pairwise(widths)]
    biases = [torch.randn(n, 1, b, requires_grad=True) for b in widths[1:]]

    def ours() -> None:
        for _ in range(repeats):
            model(x)

    def by_hand() -> None:
        for _ in range(repeats):
            h = trunk(x).relu().expand(n, BATCH, HIDDEN[0])
            for weight, bias in zip(weights[:-1], biases[:-1]):
                h = torch.baddbmm(bias, h, weight).relu()
            torch.baddbmm(biases[-1], h, weights[-1])

    return {"FairBranch": ours, "baddbmm": by_hand}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to check that it runs")
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    steps, rounds = (2, 1) if args.smoke else (15, args.rounds)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for n in args.tasks:
        made, data, test = settings(n, HIDDEN), *(resident(*binary_data(rows, n)) for rows in (steps * BATCH, BATCH))
        variants = {
            "PCGrad, LibMTL's Trainer and loop": libmtl_epoch(data, test, OwnPCGrad, made),
            "PCGrad, LibMTL's Trainer, healed": libmtl_epoch(data, test, PCGrad, made),
            "PCGrad, FairTrainer": fair_epoch(fair_trainer("PCGrad", settings(n, HIDDEN)), data),
            **{f"FBGrad, {name}": fbgrad_epoch(data, n, events) for name, events in trees(n).items()},
        }
        seconds = measure(variants, rounds)
        peers = [name for name in variants if name.startswith("PCGrad")]
        print(f"\nT = {n}: milliseconds of CPU a step, and share of each PCGrad's (goal: at most 1)")
        print(f"{'':36}{'ms':>8}" + "".join(f"{peer.removeprefix('PCGrad, '):>28}" for peer in peers))
        results[str(n)] = {}
        for name, taken in seconds.items():
            shares = {peer: ratio(taken, seconds[peer]) for peer in peers}
            cost = 1e3 * statistics.median(taken) / steps
            results[str(n)][name] = {"ms": cost, **shares}
            print(f"{name:36}{cost:8.2f}" + "".join(f"{share:28.2f}" for share in shares.values()))
    found = measure(forwards(10, 2 if args.smoke else 100), rounds)
    results["forward of 10 branches"] = {"of baddbmm by hand": {"share": ratio(found["FairBranch"], found["baddbmm"])}}
    share = results["forward of 10 branches"]["of baddbmm by hand"]["share"]
    print(f"\nforward of 10 branches, share of baddbmm by hand (goal: at most 1.3): {share:.2f}")
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
