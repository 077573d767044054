"""A model of FairMT's step in N processes, fitted on 1, 2 and 4 of them: bytes handed over, and processor time, with its error.

    python benchmarks/scale_model.py [--steps 30] [--smoke]

Processor time of a process, median of the steps, counts what a step computes, whatever else the machine does; waiting is not in it. The
fit is least squares on relative errors, and its error is that of each measurement left out in turn.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
import warnings
from itertools import product

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import libmtl_fair as lf
from libmtl_fair.libmtl.losses import task_dict
from libmtl_fair.models import MLP, linear_heads
from libmtl_fair.processes import current

ROWS, COLUMNS, HIDDEN = 512, 64, (128, 64)
TASKS, GROUPS = (2, 8), (2, 16)
TERMS = ("a step", "a doubling of the processes", "1,000 rows of the whole batch x tasks")


def measure(n_tasks: int, n_groups: int, steps: int) -> float:
    """Return milliseconds of processor time of a step of this process."""
    size = int(os.environ["WORLD_SIZE"])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4 * ROWS * size, COLUMNS, generator=g)
    tasks = tuple(lf.Binary(f"t{i}") for i in range(n_tasks))
    labels = {task.name: (x[:, i] + torch.randn(len(x), generator=g) > 0).float() for i, task in enumerate(tasks)}
    groups = {"g": torch.randint(0, n_groups, (len(x),), generator=g)}
    loader = lf.ResidentLoader(x, labels, groups, batch_size=ROWS * size, shuffle=True, seed=0, device="cpu")
    torch.manual_seed(0)
    trainer = lf.FairTrainer(
        task_dict(tasks), "FairMT", "HPS", lambda: MLP(COLUMNS, HIDDEN), linear_heads(tasks, HIDDEN[-1]), False, False,
        {"optim": "adam", "lr": 1e-3}, None, device="cpu", progress=False, seed=0, select="last", callbacks=[clock := Clock()],
    )  # fmt: skip
    trainer.train(loader, epochs=2, steps_per_epoch=steps)
    return statistics.median(clock.spent[len(clock.spent) // 2 :])


class Clock:
    """Notes the processor time of each step."""

    def __init__(self) -> None:
        self.spent: list[float] = []
        self.last = time.process_time()

    def step(self, *_: object) -> None:
        now = time.process_time()
        self.spent.append(1000 * (now - self.last))
        self.last = now


def work(rank: int, size: int, port: int, steps: int, path: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # random labels meet no target
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = []
    for n_tasks, n_groups in product(TASKS, GROUPS):
        before = current().sent if dist.is_initialized() and current() else 0
        spent = measure(n_tasks, n_groups, steps)
        together = current()
        found.append(
            (size, n_tasks, n_groups, spent, 0 if together is None else (together.sent - before) / (2 * steps))
        )
    if rank == 0:
        np.save(path, np.array(found))


def terms(size: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(size), np.log2(size), ROWS * size * tasks / 1000], 1)


def bytes_of(size: int, tasks: int) -> float:
    """Return the bytes that docs/SCALE.md says: outputs, labels and groups, gradients; none where there is one process."""
    parameters = sum(p.numel() for p in MLP(COLUMNS, HIDDEN).parameters()) + tasks * (HIDDEN[-1] + 1)
    flags = 6  # which parameters have a gradient; joined heads are two of them
    return 0.0 if size == 1 else 4 * ROWS * (2 * tasks + 1) + 4 * (parameters + flags)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    rows = []
    for size in (1,) if args.smoke else (1, 2, 4):
        with socket.socket() as found, tempfile.TemporaryDirectory() as folder:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
            found.close()
            path = f"{folder}/found.npy"
            multiprocessing.spawn(work, (size, port, 3 if args.smoke else args.steps, path), size)
            rows.append(np.load(path))
    seen = np.concatenate(rows)
    size, tasks, _, spent, _ = seen.T
    x = terms(size, tasks)

    def fit(at: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(x[at] / spent[at, None], np.ones(at.sum()), rcond=None)[0]

    every = np.ones(len(seen), dtype=bool)
    left = np.array([x[i] @ fit(np.arange(len(seen)) != i) for i in range(len(seen))])
    print("processes tasks groups   ms of processor  left out: fitted   bytes a step   by formula")
    for i, (n, t, g, ms, b) in enumerate(seen):
        print(f"{n:9.0f} {t:5.0f} {g:6.0f} {ms:17.2f} {left[i]:17.2f} {b:14,.0f} {bytes_of(int(n), int(t)):12,.0f}")
    print("fitted, ms: " + ", ".join(f"{value:.3f} {name}" for name, value in zip(TERMS, fit(every))))
    error = np.abs(left / spent - 1)
    print(f"relative error of the one left out: median {np.median(error):.0%}, largest {error.max():.0%}")


if __name__ == "__main__":
    main()
