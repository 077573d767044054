"""What several processes and mixed precision cost, side by side for every method.

``python benchmarks/processes.py [--encoder resnet18] [--processes 1 2 4] [--smoke]`` (gloo and bf16 on the CPU). All sides see the
same rows; a step is forward, backward, communication and Adam. The sides take turns, so that a busy machine slows all alike; ratios
are medians over the turns, of processor time of the first process: what a step works, not what it waits. Printed are:

- ``x plain``: a step in one process beside that of DistributedDataParallel's (DDP) model by itself: what the method costs;
- ``bf16 x own``: the step under ``amp="bf16"`` beside the same method's without;
- ``x DDP``: a step in several processes beside DDP's, method and communication together;
- ``wall``: the same by the wall clock, which counts waiting, and means something on a machine without other work;
- ``x own``: ``x DDP`` over ``x plain``: what of it is communication;
- the bytes that each process hands over.

``rep_grad``: tasks are weighed by gradients of the representation, so that one backward pass goes through the encoder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import libmtl_fair as lf
from libmtl_fair.data.loader import Packed
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl.history import StepLog
from libmtl_fair.models import MLP, linear_heads
from libmtl_fair.models.resnet import ResNet
from libmtl_fair.processes import current, leave

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "EW": ("EW", {}),
    "UW": ("UW", {}),
    "GradNorm": ("GradNorm", {}),
    "PCGrad": ("PCGrad", {}),
    "MGDA": ("MGDA", {}),
    "ReLiF": ("ReLiF", {}),
    "FairMT": ("FairMT", {}),
    "FairMT phi": ("FairMT", {"form": "phi"}),
    "GroupRegulariser": ("GroupRegulariser", {"loss": "gap"}),
    "LambdaMix": ("LambdaMix", {}),
    "FBGrad": ("FBGrad", {"where": "everywhere"}),
    "MGDA, rep_grad": ("MGDA", {"rep_grad": True}),
    "FairMT over MGDA, rep_grad": ("FairMT", {"base": "MGDA", "rep_grad": True}),
}
if importlib.util.find_spec("torchjd") is not None:  # LibMTL's PCGrad works on parameters' gradients only
    METHODS["torchjd:PCGrad, rep_grad"] = ("torchjd:PCGrad", {"rep_grad": True})
SIZES = {"mlp": {"rows": 1024, "steps": 60, "warm": 6}, "resnet18": {"rows": 16, "steps": 9, "warm": 2}}
"""Rows of each process, turns that count, and turns before them."""


def encoder(case: dict[str, Any]) -> tuple[Callable[[], nn.Module], int]:
    """Return what makes the encoder, and how wide its representation is."""
    if case["encoder"] == "resnet18":
        return lambda: ResNet("resnet18"), 512
    return lambda: MLP(case["columns"], tuple(case["hidden"])), case["hidden"][-1]


def endless(loader: lf.ResidentLoader) -> Iterator[Packed]:
    """Yield batches for ever."""
    while True:
        yield from iter(loader).packed()


def plain(loader: lf.ResidentLoader, tasks: tuple[Any, ...], case: dict[str, Any]) -> Callable[[], None]:
    """Return a step of DistributedDataParallel with the sum of the losses."""
    torch.manual_seed(0)
    (make, width), amp = encoder(case), case["amp"]
    model = nn.Sequential(make(), nn.Linear(width, len(tasks)))
    trained: nn.Module = DistributedDataParallel(model) if current() is not None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    drawn = endless(loader)

    def step() -> None:
        batch: Any = next(drawn)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp is not None):
            logits = trained(batch.x).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.matrix, reduction="none")
        optimizer.zero_grad()
        loss.mean(0).sum().backward()
        optimizer.step()

    return step


def ours(
    method: str,
    args: dict[str, Any],
    loader: lf.ResidentLoader,
    tasks: tuple[Any, ...],
    case: dict[str, Any],
) -> Callable[[], None]:
    """Return a step of FairTrainer."""
    make, width = encoder(case)
    rep_grad, args = args.get("rep_grad", False), {name: x for name, x in args.items() if name != "rep_grad"}
    entries, heads = lf.task_dict(tasks), linear_heads(tasks, width)
    if method == "LambdaMix":
        entries, heads = lf.add_fairness_heads(entries, heads, loss="gap", sensitive=("group",))
    trainer = lf.FairTrainer(
        entries, method, "HPS", make, heads, rep_grad, False,
        {"optim": "adam", "lr": 1e-3}, None, device="cpu", progress=False, weight_args=args, seed=0, amp=case["amp"],
    )  # fmt: skip
    trainer.n_groups, trainer.epoch_steps, trainer.model.epochs = dict(loader.n_groups), 4, 1000
    trainer.model.epoch, trainer.model.train_loss_buffer = 0, torch.ones(len(entries), 1).numpy()
    trainer.model.train()
    drawn, log = endless(loader), StepLog()

    def step() -> None:
        batch: Any = next(drawn)
        stepping.step(trainer, batch, 1, log)

    return step


def measure(rank: int, size: int, port: int, case: dict[str, Any], out: str) -> None:
    """Time every side in one process of a group; the first writes what it saw."""
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=size)
    columns, rows = case["columns"], case["rows"] * size
    tasks = tuple(lf.Binary(f"t{i}") for i in range(case["tasks"]))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4 * rows, columns, generator=g)
    labels = {task.name: (x[:, i] > 0).float() for i, task in enumerate(tasks)}
    groups = {"group": torch.randint(0, case["groups"], (4 * rows,), generator=g)}
    seen = torch.randn(4 * rows, 3, 64, 64, generator=g) if case["encoder"] == "resnet18" else x
    loader = lf.ResidentLoader(
        seen, labels, groups, batch_size=rows, shuffle=True, seed=0, device="cpu", reference=x[:, :8]
    )
    sides: dict[str, Callable[[], None]] = {"DDP": plain(loader, tasks, case)}
    sides |= {name: ours(*METHODS[name], loader, tasks, case) for name in case["methods"]}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    processes = current()
    sent = dict.fromkeys(sides, 0)
    for turn in range(case["steps"] + case["warm"]):
        for name, step in sides.items():
            before = processes.sent if processes else 0
            started = time.process_time(), time.perf_counter()
            step()
            if turn >= case["warm"]:
                times[name].append((time.process_time() - started[0], time.perf_counter() - started[1]))
            sent[name] = (processes.sent if processes else 0) - before
    make, width = encoder(case)
    sent["DDP"] = 4 * (sum(p.numel() for p in make().parameters()) + len(tasks) * (width + 1)) if size > 1 else 0
    if rank == 0:
        found = {
            name: {
                "ms": 1e3 * statistics.median(cpu for cpu, _ in t),
                "bytes": sent[name],
                "beside": statistics.median(one[0] / other[0] for one, other in zip(t, times["DDP"])),
                "wall": statistics.median(one[1] / other[1] for one, other in zip(t, times["DDP"])),
            }
            for name, t in times.items()
        }
        with open(out, "w", encoding="utf-8") as stream:
            json.dump(found, stream)
    leave()


def run(size: int, case: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return side -> milliseconds and bytes of a step in so many processes."""
    import socket
    import tempfile

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        if size == 1:
            measure(0, 1, port, case, file.name)
        else:
            multiprocessing.spawn(measure, (size, port, case, file.name), nprocs=size)
        with open(file.name, encoding="utf-8") as stream:
            found: dict[str, dict[str, float]] = json.load(stream)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--encoder", choices=SIZES, default="mlp")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rows", type=int, help="of each process")
    parser.add_argument("--no-amp", action="store_true")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 256])
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--groups", type=int, default=4)
    given = parser.parse_args()
    case: dict[str, Any] = {"encoder": given.encoder, "hidden": given.hidden, "columns": 128, **SIZES[given.encoder]}
    case |= {name: value for name in ("rows", "steps") if (value := getattr(given, name)) is not None}
    case |= {"tasks": given.tasks, "groups": given.groups, "methods": list(METHODS), "amp": None}
    if given.smoke:
        case |= {"hidden": [16], "rows": 32, "steps": 3, "methods": ["EW", "FairMT"]}
    one = run(1, case)
    half = {} if given.no_amp else run(1, {**case, "amp": "bf16"})
    several = {size: run(size, case) for size in given.processes}
    print(f"{'side':28}{'ms':>8}{'x plain':>9}{'bf16 x own':>12}" + "".join(
        f"{f'{n} processes: ms':>18}{'x DDP':>7}{'wall':>7}{'x own':>7}{'kB':>8}" for n in given.processes
    ))  # fmt: skip
    for name in ("DDP", *case["methods"]):
        ms, alone = one[name]["ms"], one[name]["beside"]
        line = f"{name:28}{ms:>8.2f}{alone:>9.2f}" + (f"{half[name]['ms'] / ms:>12.2f}" if half else f"{'':12}")
        for found in several.values():
            beside, wall, sent = (found[name][key] for key in ("beside", "wall", "bytes"))
            line += f"{found[name]['ms']:>18.2f}{beside:>7.2f}{wall:>7.2f}{beside / alone:>7.2f}{sent / 1e3:>8.0f}"
        print(line)


if __name__ == "__main__":
    main()
