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

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch and numpy are imported

import argparse
import contextlib
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import libmtl_fair as lf
from libmtl_fair.models import MLP, linear_heads

import LibMTL.weighting  # isort: skip

_own_loop = LibMTL.weighting.PCGrad.__dict__["backward"]
lf.heal()
from LibMTL import Trainer
from LibMTL.architecture import HPS
from LibMTL.weighting import PCGrad

FEATURES, BATCH, HIDDEN = 100, 256, (128, 64, 32)
Tree = list[list[tuple[int, ...]]]
Epoch = Callable[[], None]


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


def settings(n: int) -> dict[str, Any]:
    tasks = [lf.Binary(f"t{i}") for i in range(n)]
    return {
        "task_dict": lf.task_dict(tasks),
        "encoder_class": lambda: MLP(FEATURES, HIDDEN),
        "decoders": linear_heads(tasks, HIDDEN[-1]),
        "rep_grad": False,
        "multi_input": False,
        "optim_param": {"optim": "adam", "lr": 1e-3},
        "scheduler_param": None,
    }


def loader(rows: int, n: int) -> lf.ResidentLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, FEATURES, generator=generator)
    logits = x @ torch.randn(FEATURES, n, generator=generator) / FEATURES**0.5
    labels = {f"t{i}": (logits[:, i] > 0).float() for i in range(n)}
    return lf.ResidentLoader(
        x, labels, {"sex": (x[:, 0] > 0).long()}, batch_size=BATCH, shuffle=True, seed=0, device="cpu"
    )


def libmtl_epoch(data: lf.ResidentLoader, test: lf.ResidentLoader, n: int, weighting: type[Any]) -> Epoch:
    """Return one epoch of LibMTL's Trainer; its test pass gets one batch."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(weighting=weighting, architecture=HPS, weight_args={}, arch_args={}, **settings(n))

    def epoch() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train(data, test, 1)

    return epoch


def fair_epoch(data: lf.ResidentLoader, n: int, weighting: str, events: Tree | None = None) -> Epoch:
    """Return one epoch of FairTrainer: PCGrad on hard sharing, or a FairBranch model that has had these events."""
    branching = {"architecture": "FairBranch", "arch_args": {"max_events": 0}} if events is not None else {}
    options: dict[str, Any] = {"architecture": HPS, **settings(n), **branching}
    trainer = lf.FairTrainer(weighting=weighting, device="cpu", progress=False, select="last", **options)
    for pairs in events or []:
        trainer.model.encoder.grow(trainer.model.tree.branch(pairs))
    trainer._prepare_optimizer(options["optim_param"], None)

    def epoch() -> None:
        trainer.train(data, epochs=trainer.epoch + 1)

    return epoch


def forwards(n: int, repeats: int) -> dict[str, Epoch]:
    """Return repeated forward passes of ``n`` branches, and the same by hand."""
    options = {**settings(n), "architecture": "FairBranch", "arch_args": {"max_events": 0}}
    model = lf.FairTrainer(weighting="EW", device="cpu", progress=False, select="last", **options).model.train()
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


def measure(variants: dict[str, Epoch], rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of each variant, a number a round, variants interleaved; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            started = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - started)
    return seconds


def ratio(top: list[float], bottom: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(top, bottom))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to check that it runs")
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps, rounds = (2, 1) if args.smoke else (15, args.rounds)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for n in args.tasks:
        data, test = loader(steps * BATCH, n), loader(BATCH, n)
        variants = {
            "PCGrad, LibMTL's Trainer and loop": libmtl_epoch(data, test, n, OwnPCGrad),
            "PCGrad, LibMTL's Trainer, healed": libmtl_epoch(data, test, n, PCGrad),
            "PCGrad, FairTrainer": fair_epoch(data, n, "PCGrad"),
            **{f"FBGrad, {name}": fair_epoch(data, n, "FBGrad", events) for name, events in trees(n).items()},
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
